"""What runs calls: a pipeline by itself, or an engine with adapters of its own.

Recording and replaying ask a host, so both are written once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from collections.abc import Mapping

    from bentoml_diffusers.tasks import Task
    from bentoml_diffusers.workflow.files import Pipeline, Workflow


class AdapterSource(Protocol):
    """Where a host finds the adapters that a request names."""

    def hash_adapter(self, option: str, item: Mapping[str, Any]) -> str:
        """Returns the sha256 of an adapter's file.

        Args:
            option: Of the request: ``"lora_weights"`` or ``"textual_inversions"``.
            item: One entry of that option.

        Raises:
            AdapterNotFound: 404, no such adapter here.
        """


class Host(Protocol):
    """What runs calls.

    Attributes:
        pipeline: Whose methods run.
        device: Type of the device that it computes on, such as ``"cuda"``.
        adapters: Where it finds the adapters of a request; ``None`` if a call cannot have any.
        rebuilds_guider: A call can have any guider of the pipeline's class, not only another
            guidance scale.
    """

    @property
    def pipeline(self) -> Any: ...  # noqa: D102 - see the class
    @property
    def device(self) -> str: ...  # noqa: D102 - see the class
    @property
    def adapters(self) -> AdapterSource | None: ...  # noqa: D102 - see the class
    @property
    def rebuilds_guider(self) -> bool: ...  # noqa: D102 - see the class

    def describe(self) -> Pipeline:
        """Returns what the pipeline is, and what sits on it."""

    def name_task(self, workflow: Workflow) -> str:
        """Returns what this host calls the task that a workflow records.

        Raises:
            InvalidWorkflow: 400, a method that generates nothing.
        """

    def find_task(self, name: str) -> Task:
        """Returns what a task takes and gives.

        Raises:
            InvalidRequest: 400, there is none of this name.
        """
