"""Records of calls that replay.

Three wings, each of which may import those before it: ``files`` is a workflow as data, in texts
and in files, and loads no torch; ``record`` writes a call of a pipeline down; ``replay`` repeats
it.
"""

from bentoml_diffusers.workflow.files import Workflow

__all__ = ["Workflow"]
