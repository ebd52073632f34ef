"""Jobs: requests that are on disk before they are accepted, and run until they end once.

``states`` says what a job is, ``table`` keeps jobs in SQLite or PostgreSQL, ``results`` their
images, ``worker`` runs them, and ``service`` is what dialects ask.
"""

from bentoml_diffusers.serving.jobs.service import Jobs
from bentoml_diffusers.serving.jobs.states import Job, JobConflict, JobNotFound, JobsFull

__all__ = ["Job", "JobConflict", "JobNotFound", "Jobs", "JobsFull"]
