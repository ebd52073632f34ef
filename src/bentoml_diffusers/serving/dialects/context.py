"""What a dialect may know of the service that it belongs to."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

    from bentoml_diffusers.options import RequestLimits
    from bentoml_diffusers.serving.dispatcher import Dispatcher
    from bentoml_diffusers.serving.endpoints import Endpoint
    from bentoml_diffusers.serving.reader import RequestModel
    from bentoml_diffusers.serving.uploads import UploadBudget


@dataclass(kw_only=True)
class DialectContext:
    """A service, before and after its model is loaded.

    Attributes:
        name: Of the service.
        model: Tag of its model, as the operator wrote it.
        endpoints: What it can be asked for.
        limits: What a request may ask for.
        uploads: Bounds the bodies that are read at once.
        dialects: Names of all that the service speaks.
    """

    name: str
    model: str
    endpoints: tuple[Endpoint, ...]
    limits: RequestLimits
    uploads: UploadBudget
    dialects: tuple[str, ...]
    _loaded: list[Dispatcher] = field(default_factory=list)

    @property
    def requests(self) -> Mapping[str, type[RequestModel]]:
        """What each task takes."""
        return {endpoint.task: endpoint.request for endpoint in self.endpoints}

    @property
    def dispatcher(self) -> Dispatcher:
        """What runs calls. BentoML lets in no request before the model is loaded."""
        return self._loaded[-1]

    def load(self, dispatcher: Dispatcher) -> None:
        """Notes what runs the calls of this worker."""
        self._loaded[:] = [dispatcher]
