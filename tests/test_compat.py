"""What `_compat` relies on in other packages: a test of the name for each of its entries.

They look at the other package itself, so each fails by the name of what changed there.
"""

import ast
import copy
import importlib.util
import inspect
import logging
import textwrap
from collections import OrderedDict

import bentoml
import diffusers
import peft
import pytest
import torch
import transformers
from diffusers import StableDiffusionPipeline
from diffusers.loaders import lora_base
from diffusers.models import attention_dispatch, attention_processor
from diffusers.modular_pipelines import ComponentsManager, modular_pipeline
from diffusers.pipelines import auto_pipeline, pipeline_loading_utils
from diffusers.utils import dummy_onnx_objects, peft_utils
from diffusers.utils import logging as of_diffusers
from packaging.version import Version
from PIL import Image
from starlette.middleware.cors import CORSMiddleware
from torch.utils import _pytree
from transformers.utils import logging as of_transformers

from bentoml_diffusers import _compat, testing

IS_LOWEST = Version(diffusers.__version__) < Version("0.42")


@pytest.fixture(scope="module")
def classic():
    return testing.tiny_stable_diffusion()


@pytest.fixture(scope="module")
def modular():
    return testing.tiny_modular_stable_diffusion_xl()


@pytest.fixture(scope="module")
def container():
    from bentoml._internal.configuration.containers import BentoMLContainer

    return BentoMLContainer


def test_every_entry_has_a_test():
    assert {f"test_{name}" for name in _compat.__all__} <= set(globals())


def test_every_entry_says_what_will_let_us_delete_it():
    own = {"find_version", "unmet_requirements"}  # of all packages
    entries = {name: getattr(_compat, name) for name in set(_compat.__all__) - own}
    functions = {
        name: one
        for name, one in entries.items()
        if getattr(one, "__module__", "").startswith("bentoml_diffusers._compat")
    }
    missing = [name for name, one in functions.items() if "Until" not in inspect.getdoc(one)]
    assert len(functions) > 30
    assert missing == []


# BentoML


def test_StoreAccess():
    """BentoML reads which version is the latest from the file that is written here."""
    tags = []
    for version in ("a", "b"):
        with bentoml.models.create(f"compat:{version}") as model:
            tags.append(model.tag)
    assert bentoml.models.get("compat:latest").tag == tags[1]
    _compat.model_store().set_latest(tags[0])
    assert bentoml.models.get("compat:latest").tag == tags[0]


def test_model_store(container):
    with bentoml.models.create("compat:c"):
        pass
    assert bentoml.models.get("compat:c").path == f"{container.model_store_dir.get()}/compat/c"


def test_parse_models_by_libyaml():
    from bentoml._internal.models import model

    assert "yaml.safe_load(" in inspect.getsource(model.ModelInfo.from_yaml_file)


def test_alias_upstream_module():
    assert importlib.util.find_spec("bentoml._internal.frameworks.diffusers")


@bentoml.service(traffic={"timeout": 30})
class Service:
    """A modern service."""

    @bentoml.api
    def answer(self) -> str:
        """Answers."""
        return ""


def test_swagger_folder():
    files = {path.name for path in _compat.swagger_folder().iterdir()}
    assert {"swagger-ui.css", "swagger-ui-bundle.js"} <= files


def test_bound_host(container):
    assert isinstance(container.remote_runner_mapping.get(), dict)


def test_bound_connections():
    from _bentoml_impl.worker import service
    from uvicorn.config import HTTP_PROTOCOLS, Config
    from uvicorn.protocols.http import auto, flow_control, h11_impl

    source = inspect.getsource(service)  # it takes the protocol that uvicorn chooses
    assert "uvicorn.Config(" in source
    assert "http=" not in source
    assert HTTP_PROTOCOLS["auto"] == "uvicorn.protocols.http.auto:AutoHTTPProtocol"
    assert auto.AutoHTTPProtocol.__name__ in ("H11Protocol", "HttpToolsProtocol", "BoundedProtocol")
    plain = h11_impl.H11Protocol
    attributes = inspect.getsource(plain.__init__)
    for name in ("connections", "timeout_keep_alive_task", "cycle", "flow", "transport"):
        assert f"self.{name}" in attributes
    cycle = inspect.getsource(h11_impl.RequestResponseCycle.__init__)
    assert "self.more_body" in cycle
    assert "self.response_complete" in cycle
    assert "read_paused" in inspect.getsource(flow_control.FlowControl)
    assert not [name for name in inspect.signature(Config).parameters if "header_timeout" in name]


def test_find_origin_check(container):
    from bentoml._internal.configuration import containers

    assert container.http.cors.enabled.get() is False
    assert container.access_control_options.get() == {}
    names = inspect.signature(CORSMiddleware).parameters
    assert {"allow_origins", "allow_origin_regex", "allow_methods"} <= set(names)
    assert '"allow_origins": allow_origins' in inspect.getsource(containers)


def test_quiet_refusals():
    from bentoml._internal.server import http_app

    assert http_app.logger.name == "bentoml._internal.server.http_app"
    assert "exc_info" in inspect.getsource(http_app)


def test_service_timeout_s(container):
    assert Service.config["traffic"]["timeout"] == 30
    assert isinstance(container.config.get(), dict)


def test_read_payload():
    from _bentoml_impl.serde import Payload, PickleSerde

    sent = PickleSerde().serialize_value({"prompt": "a"})
    body = b"".join(bytes(part) for part in sent.data)
    again = PickleSerde().deserialize_value(Payload((body,), metadata=sent.metadata))
    assert again == {"prompt": "a"}


def test_log_as_bentoml():
    from bentoml._internal import log

    assert "bentoml" in log.SERVER_LOGGING_CONFIG["loggers"]
    assert log.SERVER_LOGGING_CONFIG["root"]["level"] == logging.WARNING


def test_is_runner_process():
    from bentoml._internal.context import server_context
    from bentoml_cli.worker import runner

    assert server_context.service_type != "runner"
    assert 'server_context.service_type = "runner"' in inspect.getsource(runner)


def test_runner_timeout_s(container):
    assert container.runners_config.get()["traffic"]["timeout"] > 0


def original(function):
    """Returns BentoML's own function, also where another test has put ours around it."""
    return inspect.unwrap(getattr(function, "__func__", function))


def test_let_runner_calls_overlap():
    from bentoml._internal.runner.runner_handle.local import LocalRunnerRef

    source = inspect.getsource(original(LocalRunnerRef.__init__))
    assert "self._runnable = " in source
    assert "self._limiter = " in source
    assert "limiter=self._limiter" in inspect.getsource(LocalRunnerRef)


def test_keep_thread_counts():
    from bentoml._internal.runner.strategy import THREAD_ENVS, DefaultStrategy

    decide = original(DefaultStrategy.get_worker_env)
    assert {"OMP_NUM_THREADS", "MKL_NUM_THREADS"} <= set(THREAD_ENVS)
    assert "runnable_class" in inspect.signature(decide).parameters


def test_install_image_container():
    from bentoml._internal.runner.container import DataContainerRegistry, PILImageContainer

    image = Image.new("RGB", (2, 2))
    payload = PILImageContainer.create_payload(b"x", batch_size=1)
    assert (payload.data, payload.batch_size) == (b"x", 1)
    assert callable(DataContainerRegistry.register_container)
    with pytest.raises((AttributeError, KeyError, ValueError, TypeError)):
        PILImageContainer.to_payload(image, batch_dim=0)  # fixed? then it can go


# diffusers


def test_execution_device(classic, modular):
    for pipeline in (classic, modular):
        assert pipeline._execution_device == torch.device("cpu")


def test_fix_execution_device(classic, modular):
    """A property: what a subclass sets in its place is found first."""
    for pipeline in (classic, modular):
        found = inspect.getattr_static(type(pipeline), "_execution_device")
        assert isinstance(found, property)


def test_signature_of():
    decode = testing.tiny_stable_diffusion().vae.decode
    assert decode.__func__.__qualname__ in (
        "apply_forward_hook.<locals>.wrapper",
        "AutoencoderKL.decode",
    )
    assert next(iter(_compat.signature_of(decode).parameters)) == "z"


def test_AUTO_TASKS():
    for name in ("TEXT2IMAGE", "IMAGE2IMAGE", "INPAINT"):
        mapping = getattr(auto_pipeline, f"AUTO_{name}_PIPELINES_MAPPING")
        assert issubclass(mapping["stable-diffusion"], diffusers.DiffusionPipeline)


def test_find_task_class():
    mapping = auto_pipeline.AUTO_IMAGE2IMAGE_PIPELINES_MAPPING
    find = auto_pipeline._get_task_class
    found = find(mapping, "StableDiffusionPipeline", throw_error_if_not_exist=False)
    assert found is diffusers.StableDiffusionImg2ImgPipeline
    assert find(mapping, "Nothing", throw_error_if_not_exist=False) is None


def test_missing_backends():
    assert dummy_onnx_objects.OnnxRuntimeModel._backends == ["onnx"]


def test_optional_components():
    assert "safety_checker" in StableDiffusionPipeline._optional_components


def test_describe_class(classic):
    describe = pipeline_loading_utils._fetch_class_library_tuple
    assert describe(classic.unet) == ("diffusers", "UNet2DConditionModel")
    assert describe(classic.text_encoder) == ("transformers", "CLIPTextModel")


def test_origin_of(modular, tmp_path):
    modular.save_pretrained(str(tmp_path), overwrite_modular_index=True)
    again = diffusers.ModularPipeline.from_pretrained(tmp_path)
    assert str(again._pretrained_model_name_or_path) == str(tmp_path)


def test_progress_bar_options():
    pipeline = testing.tiny_ddpm()
    pipeline.set_progress_bar_config(disable=True, desc="x")
    assert pipeline._progress_bar_config == {"disable": True, "desc": "x"}


def test_is_offloaded(monkeypatch):
    """Each sets it by itself; the manager asks the device for its free memory, as a GPU has it."""
    monkeypatch.setattr(torch.cpu, "mem_get_info", lambda *_: (2**30, 2**30), raising=False)
    pipeline, manager = testing.tiny_stable_diffusion(), ComponentsManager()
    assert not getattr(pipeline, "_all_hooks", None)
    pipeline.enable_model_cpu_offload(device="cpu")
    assert pipeline._all_hooks
    assert not manager._auto_offload_enabled
    manager.enable_auto_cpu_offload(device="cpu")
    assert manager._auto_offload_enabled


def test_latent_unpacker():
    latents = torch.randn(1, 4, 8, 8)
    pack, unpack = diffusers.FluxPipeline._pack_latents, diffusers.FluxPipeline._unpack_latents
    packed = pack(latents, 1, 4, 8, 8)
    assert packed.shape == (1, 16, 16)
    assert torch.equal(unpack(packed, 32, 32, 4), latents)


def test_has_repeated_blocks():
    assert "FluxTransformerBlock" in diffusers.FluxTransformer2DModel._repeated_blocks


def test_takes_attention_backend():
    processor = testing.tiny_flux().transformer.transformer_blocks[0].attn.processor
    assert hasattr(processor, "_attention_backend")
    assert not hasattr(attention_processor.AttnProcessor2_0(), "_attention_backend")


def test_attention_backend():
    backend, function = attention_dispatch._AttentionBackendRegistry.get_active_backend()
    assert isinstance(backend.value, str)
    assert callable(function)


def test_quantization_of():
    eight = transformers.BitsAndBytesConfig(load_in_8bit=True)
    config = diffusers.PipelineQuantizationConfig(quant_mapping={"text_encoder": eight})
    assert config._resolve_quant_config(False, "text_encoder") is eight
    assert config._resolve_quant_config(True, "unet") is None


def test_make_image_projection(classic):
    convert = classic.unet._convert_ip_adapter_image_proj_to_diffusers
    assert list(inspect.signature(convert).parameters) == ["state_dict", "low_cpu_mem_usage"]


def test_lora_components():
    assert StableDiffusionPipeline._lora_loadable_modules == ["unet", "text_encoder"]
    assert "transformer_2" in diffusers.WanPipeline._lora_loadable_modules


def test_lora_config():
    state = {"a.q.lora_A.weight": torch.ones(4, 8), "a.q.lora_B.weight": torch.ones(8, 4)}
    config = peft_utils.get_peft_kwargs({"^a.q.lora_B.weight": 4}, {"a.q.alpha": 2.0}, state)
    assert (config["r"], config["lora_alpha"]) == (4, 2.0)
    assert {"rank_pattern", "alpha_pattern", "target_modules"} <= set(config)


def source_of(cls):
    return inspect.getsource(inspect.unwrap(cls.lora_state_dict.__func__))


@pytest.mark.skipif(IS_LOWEST, reason="diffusers 0.41 reads none")
def test_reads_lokr():
    for cls in (diffusers.ZImagePipeline, diffusers.Flux2Pipeline):
        assert "lokr" in source_of(cls)
    assert "lokr" not in source_of(StableDiffusionPipeline)


def test_reads_alpha_of_file():
    from diffusers.loaders.lora_pipeline import MiniMaxH3LoraLoaderMixin

    assert "file_metadata" in source_of(MiniMaxH3LoraLoaderMixin)
    assert "file_metadata" not in source_of(StableDiffusionPipeline)


def test_CHECKS(classic):
    with pytest.raises(ValueError, match="prompt") as caught:
        classic(prompt=None, height=32, width=32)
    assert "check_inputs" in [entry.name for entry in caught.traceback]


def decoders():
    """Returns ``decode`` of each autoencoder, also from behind the wrapper of diffusers 0.41."""
    found = {}
    for name in dir(diffusers):
        cls = getattr(diffusers, name) if name.startswith("Autoencoder") else None
        decode = inspect.unwrap(getattr(cls, "decode", None) or len)
        if decode.__qualname__ == "apply_forward_hook.<locals>.wrapper":
            decode = inspect.getclosurevars(decode).nonlocals["method"]
        if decode is not len:
            found[name] = decode
    return found


def test_DECODER_INPUTS():
    first = {name: list(inspect.signature(one).parameters)[1] for name, one in decoders().items()}
    assert len(first) > 15
    assert set(first.values()) <= set(_compat.DECODER_INPUTS)


@pytest.mark.parametrize("name", _compat.DETERMINISTIC_DECODERS)
def test_DETERMINISTIC_DECODERS(name):
    """It takes a generator, and no line of its code has one."""
    decode = decoders()[name]
    assert "generator" in inspect.signature(decode).parameters
    tree = ast.parse(textwrap.dedent(inspect.getsource(decode)))
    assert "generator" not in {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}


# Modular pipelines of diffusers


def test_BLOCK_STATE(modular):
    """What diffusers sets on blocks: beside it nothing but what their class says."""
    blocks = [modular._blocks]
    while blocks:
        block = blocks.pop()
        own = {name for name in vars(block) if not hasattr(type(block), name)}
        assert own <= {*_compat.BLOCK_STATE}
        blocks += block.sub_blocks.values()
    assert "self._progress_bar_config = " in inspect.getsource(modular_pipeline)


def test_find_modular_class():
    model = auto_pipeline._get_model("StableDiffusionXLPipeline")
    choose = modular_pipeline.MODULAR_PIPELINE_MAPPING[model]
    assert choose({}) == "StableDiffusionXLModularPipeline"


def test_blocks_of(classic, modular):
    assert isinstance(modular._blocks, diffusers.StableDiffusionXLAutoBlocks)
    assert not hasattr(classic, "_blocks")


def test_copy_blocks(modular):
    assert modular.blocks is not modular._blocks
    assert type(modular.blocks) is type(modular._blocks)


def test_workflow_map():
    assert "text2image" in diffusers.StableDiffusionXLAutoBlocks()._workflow_map


def test_components_manager():
    manager = ComponentsManager()
    pipeline = diffusers.StableDiffusionXLAutoBlocks().init_pipeline(components_manager=manager)
    assert pipeline._components_manager is manager


# PEFT


def test_tuner_layer():
    unet = testing.tiny_stable_diffusion().unet
    unet.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q"]), adapter_name="x")
    layers = [one for one in unet.modules() if isinstance(one, _compat.tuner_layer())]
    assert layers
    for layer in layers:
        assert type(layer.get_base_layer()) is torch.nn.Linear
        assert (layer.active_adapters, layer.disable_adapters) == (["x"], False)


def test_quiet_lora_loading():
    assert "Already found a `peft_config` attribute" in inspect.getsource(peft.tuners.tuners_utils)
    assert "No LoRA keys associated to" in inspect.getsource(lora_base)
    assert lora_base.logger.name == "diffusers.loaders.lora_base"


# torch


def test_count_writes():
    tensor = torch.zeros(2)
    before = tensor._version
    tensor.add_(1)
    assert tensor._version == before + 1
    assert tensor[:1]._version == before + 1


def test_copy_tensors():
    places = [torch.zeros(2), torch.zeros(3)]
    torch._foreach_copy_(places, [torch.ones(2), torch.ones(3)])
    assert all(bool(one.all()) for one in places)


def test_unwrap_compiled():
    layer = torch.nn.Linear(2, 2)
    assert torch.compile(layer)._orig_mod is layer


def test_compile_in_place():
    wrapper = torch.compile(torch.nn.Linear(2, 2))
    assert wrapper._modules["_orig_mod"] is wrapper._orig_mod
    assert callable(wrapper.dynamo_ctx(wrapper._orig_mod._call_impl))


def test_is_compiled():
    layer = torch.nn.Linear(2, 2)
    assert layer._compiled_call_impl is None
    layer.compile()
    assert layer._compiled_call_impl is not None


def test_drop_hooks():
    """All dicts of hooks have such names, a shallow copy shares them, and nothing else has one."""
    layer = torch.nn.Linear(2, 2)
    shadow = copy.copy(layer)
    ends = {name for name, value in vars(layer).items() if name.endswith("_hooks")}
    kinds = {name for name in ends if isinstance(vars(layer)[name], OrderedDict)}
    assert {"_forward_hooks", "_forward_pre_hooks", "_backward_hooks"} <= kinds
    assert all(vars(shadow)[name] is vars(layer)[name] for name in kinds)
    layer.register_forward_hook(lambda *_: torch.zeros(1))
    assert torch.equal(shadow(torch.ones(2)), torch.zeros(1))


@pytest.mark.parametrize("name", ["flatten", "leaves", "map_only", "unflatten"])
def test_tree_functions_are_those_of_torch(name):
    assert getattr(_compat, f"tree_{name}") is getattr(_pytree, f"tree_{name}")


def test_tree_flatten():
    leaves, spec = _pytree.tree_flatten({"a": [1, (2,)], "b": None})
    assert leaves == [1, 2, None]
    assert isinstance(spec, _pytree.TreeSpec)
    assert "dict" in repr(spec)
    assert _pytree.tree_flatten([[1], 2], is_leaf=lambda one: one == [1])[0] == [[1], 2]


def test_tree_leaves():
    assert _pytree.tree_leaves(([1], 2)) == [1, 2]


def test_tree_map_only():
    assert _pytree.tree_map_only(int, str, (1, "a")) == ("1", "a")


def test_tree_unflatten():
    leaves, spec = _pytree.tree_flatten([1, {"a": 2}])
    assert _pytree.tree_unflatten(leaves, spec) == [1, {"a": 2}]


test_TreeSpec = test_tree_flatten


# transformers


def test_restore_text_model(classic):
    """diffusers asks for what transformers has one level higher since its version 5."""
    source = inspect.getsource(StableDiffusionPipeline.encode_prompt)
    assert "self.text_encoder.text_model.final_layer_norm" in source
    assert hasattr(classic.text_encoder, "final_layer_norm")


@pytest.mark.parametrize("module", [of_diffusers, of_transformers])
def test_no_progress_bars(module):
    assert module._tqdm_active in (True, False)
    assert "if _tqdm_active" in inspect.getsource(module.tqdm.__class__)


def test_no_torchvision_notes():
    from transformers.utils import import_utils

    assert import_utils.logger.name == "transformers.utils.import_utils"
    assert "requires torchvision" in inspect.getsource(import_utils)


# All


def test_find_version():
    assert torch.__version__.startswith(_compat.find_version("torch"))
    assert _compat.find_version("no-such-package") is None


def test_unmet_requirements():
    assert not any("torch" in one for one in _compat.unmet_requirements())
