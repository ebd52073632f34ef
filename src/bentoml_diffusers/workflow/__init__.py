"""Workflows: records of calls that can be replayed.

Three packages, each of which may import those before it: ``files`` is a workflow as data, in text
and files, and does not load torch; ``record`` records a call of a pipeline; ``replay`` repeats it.
"""

from bentoml_diffusers.workflow.files import Workflow

__all__ = ["Workflow"]
