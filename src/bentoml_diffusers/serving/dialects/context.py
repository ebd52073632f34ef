"""What a dialect is, and what it may know of the service that it belongs to."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from bentoml import Tag

from bentoml_diffusers.serving.dialects.names import ServedModel

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    import bentoml
    from starlette.routing import BaseRoute

    from bentoml_diffusers.options import RequestLimits
    from bentoml_diffusers.serving.dispatcher import Dispatcher
    from bentoml_diffusers.serving.endpoints import Endpoint
    from bentoml_diffusers.serving.jobs import Jobs
    from bentoml_diffusers.serving.openapi import Schemas
    from bentoml_diffusers.serving.openapi.document import Paths
    from bentoml_diffusers.serving.options import OpenAIOptions
    from bentoml_diffusers.serving.reader import RequestModel
    from bentoml_diffusers.serving.uploads import UploadBudget


@dataclass(frozen=True)
class Dialect:
    """An API that a service speaks.

    Attributes:
        make_routes: Returns its routes. They read bodies within ``context.uploads.bound``.
        describe_paths: Returns its part of the OpenAPI document.
        describe_fields: Returns, for ``GET /capabilities``, what becomes of the fields of its
            operations: which are applied, refused and ignored.
    """

    make_routes: Callable[[DialectContext], Sequence[BaseRoute]]
    describe_paths: Callable[[DialectContext, Schemas], Paths]
    describe_fields: Callable[[DialectContext], Mapping[str, Any]]


@dataclass(kw_only=True)
class DialectContext:
    """A service, before and after its model is loaded.

    Attributes:
        name: Of the service.
        model: Tag of its model, as the operator wrote it; with its version once it is loaded.
        endpoints: What it can be asked for.
        limits: What a request may ask for.
        uploads: Bounds the bodies that are read at once.
        dialects: All that the service speaks, by name.
        openai: How it speaks OpenAI's.
    """

    name: str
    model: str
    endpoints: tuple[Endpoint, ...]
    limits: RequestLimits
    uploads: UploadBudget
    dialects: Mapping[str, Dialect]
    openai: OpenAIOptions
    _loaded: list[tuple[Dispatcher, ServedModel]] = field(default_factory=list)
    _jobs: list[Jobs] = field(default_factory=list)

    @property
    def requests(self) -> Mapping[str, type[RequestModel]]:
        """What each task takes."""
        return {endpoint.task: endpoint.request for endpoint in self.endpoints}

    @property
    def dispatcher(self) -> Dispatcher:
        """What runs calls. BentoML lets in no request before the model is loaded."""
        return self._loaded[-1][0]

    @property
    def served(self) -> ServedModel:
        """What clients call the model."""
        return self._loaded[-1][1]

    @property
    def jobs(self) -> Jobs:
        """What takes jobs, in a service that has some."""
        return self._jobs[-1]

    def load_jobs(self, jobs: Jobs) -> None:
        """Notes what takes the jobs of this worker."""
        self._jobs[:] = [jobs]

    def load(self, dispatcher: Dispatcher, model: bentoml.Model) -> None:
        """Notes what runs the calls of this worker, and on which model."""
        name = Tag.from_taglike(self.model).name
        created = int(model.info.creation_time.timestamp())
        served = ServedModel(name, model.tag.version, created, self.openai.model_aliases)
        self._loaded[:] = [(dispatcher, served)]
