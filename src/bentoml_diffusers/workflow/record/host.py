"""Hosts, which run calls: a plain pipeline, or an engine with adapters of its own.

Recording and replaying use a host, so both are implemented once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from collections.abc import Mapping

    from bentoml_diffusers.tasks import Task
    from bentoml_diffusers.workflow.files import Pipeline, Workflow


class AdapterSource(Protocol):
    """Finds the adapters that a request names."""

    def hash_adapter(self, option: str, item: Mapping[str, Any]) -> str:
        """Returns the sha256 of an adapter's file.

        Args:
            option: Option of the request: ``"lora_weights"`` or ``"textual_inversions"``.
            item: Entry of that option.

        Raises:
            AdapterNotFound: 404, no such adapter.
        """


class Host(Protocol):
    """Runs calls of a pipeline.

    Attributes:
        pipeline: The pipeline whose methods run.
        device: Type of the device that it computes on, such as ``"cuda"``.
        adapters: Finds the adapters of a request; ``None`` if calls cannot have any.
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
        """Describes the pipeline and the adapters in it."""

    def name_task(self, workflow: Workflow) -> str:
        """Returns this host's name for the task that a workflow records.

        Raises:
            InvalidWorkflow: 400, a method that generates nothing.
        """

    def find_task(self, name: str) -> Task:
        """Returns a task.

        Raises:
            InvalidRequest: 400, there is no task of this name.
        """
