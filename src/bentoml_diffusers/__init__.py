"""BentoML integration for Hugging Face diffusers.

Importing this package makes it available as ``bentoml.diffusers``. It loads neither torch nor
diffusers: names are imported when they are first used.
"""

import importlib
import sys
from typing import TYPE_CHECKING, Any

from bentoml_diffusers import _compat

if TYPE_CHECKING:
    from bentoml_diffusers.demo import import_demo_models
    from bentoml_diffusers.engine import Engine, EngineReport, Handle, Progress, Result
    from bentoml_diffusers.options import (
        EmbedOptions,
        EngineLimits,
        ModelOptions,
        RequestLimits,
    )
    from bentoml_diffusers.serving.access import AccessOptions, KeyOptions
    from bentoml_diffusers.serving.legacy import get_runnable, load_model
    from bentoml_diffusers.serving.options import JobOptions, OpenAIOptions
    from bentoml_diffusers.serving.service import service
    from bentoml_diffusers.store import (
        API_VERSION,
        MODULE_NAME,
        get,
        import_lora,
        import_model,
        import_textual_inversion,
        save_model,
    )
    from bentoml_diffusers.tasks import RequestOptions
    from bentoml_diffusers.workflow import Workflow
    from bentoml_diffusers.workflow.files import save_image
    from bentoml_diffusers.workflow.replay import (
        ReplayReport,
        populate_workflow_from_pipeline,
        replay,
        run_with_workflow,
    )

__version__ = "0.1.0"

_HOMES = {
    "API_VERSION": "store",
    "AccessOptions": "serving.access",
    "EmbedOptions": "options",
    "Engine": "engine",
    "EngineLimits": "options",
    "EngineReport": "engine",
    "Handle": "engine",
    "KeyOptions": "serving.access",
    "JobOptions": "serving.options",
    "MODULE_NAME": "store",
    "ModelOptions": "options",
    "OpenAIOptions": "serving.options",
    "Progress": "engine",
    "ReplayReport": "workflow.replay",
    "RequestLimits": "options",
    "RequestOptions": "tasks",
    "Result": "engine",
    "Workflow": "workflow",
    "get": "store",
    "get_runnable": "serving.legacy",
    "import_demo_models": "demo",
    "import_lora": "store",
    "import_model": "store",
    "import_textual_inversion": "store",
    "load_model": "serving.legacy",
    "populate_workflow_from_pipeline": "workflow.replay",
    "replay": "workflow.replay",
    "run_with_workflow": "workflow.replay",
    "save_model": "store",
    "save_image": "workflow.files",
    "service": "serving.service",
}

__all__ = [
    "API_VERSION",
    "AccessOptions",
    "EmbedOptions",
    "Engine",
    "EngineLimits",
    "EngineReport",
    "Handle",
    "KeyOptions",
    "JobOptions",
    "MODULE_NAME",
    "ModelOptions",
    "OpenAIOptions",
    "Progress",
    "ReplayReport",
    "RequestLimits",
    "RequestOptions",
    "Result",
    "Workflow",
    "get",
    "get_runnable",
    "import_demo_models",
    "import_lora",
    "import_model",
    "import_textual_inversion",
    "load_model",
    "populate_workflow_from_pipeline",
    "replay",
    "run_with_workflow",
    "save_model",
    "save_image",
    "service",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)


_compat.alias_upstream_module(sys.modules[__name__])
