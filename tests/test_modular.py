"""Modular workflows by name in the engine, and the requests that services make of them."""

import base64
import collections
import io

import diffusers
import numpy as np
import pytest
import torch
from comparing import same_image
from diffusers.modular_pipelines import ModularPipelineBlocks
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from PIL import Image

from bentoml_diffusers import Engine, RequestLimits, save_model, service, testing
from bentoml_diffusers.errors import InvalidModel, InvalidOption, InvalidRequest
from bentoml_diffusers.serving.fields import why_left_out
from bentoml_diffusers.serving.schema import make_request_model
from bentoml_diffusers.tasks import read_all_blocks, read_modular_workflows
from bentoml_diffusers.tasks.inputs import read_kind

SHIPPED = {
    name: found
    for name in dir(diffusers)
    if isinstance(found := getattr(diffusers, name), type)
    and issubclass(found, ModularPipelineBlocks)
    and getattr(found, "block_classes", None)
    and name.endswith("Blocks")
}
CALL = {"prompt": "a red circle", "num_inference_steps": 4, "seed": 3}


@pytest.fixture(scope="module")
def image():
    pixels = np.random.default_rng(0).integers(0, 255, (32, 32, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.fixture(scope="module")
def pipeline():
    return testing.tiny_modular_stable_diffusion_xl(controlnet=True)


@pytest.fixture(scope="module")
def engine(pipeline):
    with Engine(pipeline) as engine:
        yield engine


class TestEngine:
    def call_diffusers(self, **inputs):
        pipeline = testing.tiny_modular_stable_diffusion_xl(controlnet=True)
        generator = torch.Generator().manual_seed(3)
        call = {"prompt": "a red circle", "num_inference_steps": 4, **inputs}
        return pipeline(**call, generator=generator, output="images")[0]

    @pytest.mark.parametrize(
        ("task", "names"),
        [
            ("text2image", []),
            ("txt2img", []),
            ("image2image", ["image"]),
            ("img2img", ["image"]),
            ("inpainting", ["image", "mask_image"]),
            ("inpaint", ["image", "mask_image"]),
            ("controlnet_text2image", ["control_image"]),
            ("controlnet_image2image", ["control_image", "image"]),
        ],
    )
    def test_a_modular_workflow_is_what_diffusers_generates(self, engine, image, task, names):
        inputs = dict.fromkeys(names, image)
        result = engine.run(task, **CALL, **inputs)
        assert np.array_equal(result.images[0], self.call_diffusers(**inputs))
        assert result.seeds == (3,)

    @pytest.mark.parametrize(
        ("task", "field", "changes"),
        [
            ("text2image", "prompt", {"prompt": None}),
            ("text2image", "prompt", {"prompt": 5}),
            ("text2image", "negative_prompt", {"negative_prompt": 5}),
            ("text2image", "guidance_scale", {"guidance_scale": "high"}),
            ("text2image", "image", {"image": Image.new("RGB", (32, 32))}),
            ("text2image", "promt", {"promt": "a"}),
            ("text2image", "original_size", {"original_size": 32}),
            ("image2image", "image", {}),
            ("image2image", "image", {"image": "image.png"}),
            ("inpainting", "mask_image", {"image": Image.new("RGB", (32, 32))}),
            ("controlnet_text2image", "control_image", {}),
            (
                "controlnet_text2image",
                "guess_mode",
                {"control_image": Image.new("RGB", (32, 32)), "guess_mode": "yes"},
            ),
            ("text2video", "task", {}),
            ("controlnet", "task", {}),
            ("controlnet_union_text2image", "task", {}),
            ("save_pretrained", "task", {}),
        ],
    )
    def test_a_wrong_field_is_named(self, engine, task, field, changes):
        with pytest.raises(InvalidRequest) as caught:
            engine.submit(task, **{**CALL, **changes})
        assert caught.value.field == field

    @pytest.mark.parametrize(
        "changes", [{"num_inference_steps": 3}, {"strength": 0.2}, {"strength": float("nan")}]
    )
    @pytest.mark.parametrize("task", ["image2image", "__call__"])
    def test_strength_that_leaves_no_step_is_refused(self, engine, image, task, changes):
        with pytest.raises(InvalidRequest) as caught:
            engine.submit(task, **{**CALL, "image": image, **changes})
        assert caught.value.field == "strength"

    def test_the_guider_is_the_requests_own(self, engine):
        plain, strong, again = (
            engine.run("text2image", **CALL, **more).images[0]
            for more in ({}, {"guidance_scale": 2.0}, {})
        )
        assert np.array_equal(plain, again)
        assert not np.array_equal(plain, strong)

    @pytest.mark.parametrize("task", ["text2image", "image2image", "inpainting"])
    def test_each_of_several_images_is_that_of_its_seed(self, engine, image, task):
        names = {"text2image": [], "image2image": ["image"]}.get(task, ["image", "mask_image"])
        call = {**CALL, **dict.fromkeys(names, image)}
        result = engine.run(task, **call, num_images_per_prompt=2)
        assert result.seeds == (3, 4)
        for image, seed in zip(result.images, result.seeds, strict=True):
            assert same_image(image, engine.run(task, **{**call, "seed": seed}).images[0])
        assert not same_image(*result.images)

    def test_components_that_are_missing(self):
        with (
            Engine(testing.tiny_modular_stable_diffusion_xl()) as engine,
            pytest.raises(InvalidRequest, match="controlnet") as caught,
        ):
            engine.submit("controlnet_text2image", **CALL)
        assert caught.value.field == "task"

    def test_an_ip_adapter_wants_its_image(self, tmp_path, image):
        pipeline = testing.tiny_modular_stable_diffusion_xl(image_encoder=True)
        file = testing.save_tiny_ip_adapter(tmp_path)
        pipeline.load_ip_adapter(str(tmp_path), subfolder="", weight_name=file.name)
        with Engine(pipeline) as engine:
            with pytest.raises(InvalidRequest, match="ip_adapter_image"):
                engine.submit("text2image", **CALL)
            with pytest.raises(InvalidRequest, match="ip_adapter_image"):
                engine.submit("__call__", **CALL)
            result = engine.run("ip_adapter_text2image", **CALL, ip_adapter_image=image)
        assert result.images[0].size == (32, 32)


class TestStored:
    @pytest.fixture(scope="class")
    def model(self):
        pipeline = testing.tiny_modular_stable_diffusion_xl(controlnet=True)
        return save_model(
            "blocks", pipeline, signatures={key: {"batchable": False} for key in _METHODS}
        )

    def test_a_runner_has_them_as_methods(self, model, run_local, image):
        generate = run_local(model, "image2image")
        images = generate(**CALL, image=image)[0]
        again = run_local(model)(**CALL, image=image)[0]
        assert np.array_equal(images[0], again[0])
        with pytest.raises(InvalidRequest) as caught:
            generate(**CALL)
        assert caught.value.field == "image"

    def test_a_service_has_an_endpoint_for_what_the_components_suffice_for(self, model):
        names = {"text2image", "image2image", "inpainting"}
        expected = names | {f"controlnet_{name}" for name in names}
        assert _paths_of(service(str(model.tag))) == expected

    def test_a_service_of_one_modular_workflow(self, model, image):
        options = {"modular_workflow": "image2image"}
        assert _paths_of(service(str(model.tag), **options)) == {"image2image"}
        with Engine.from_model(model, **options) as engine:
            results = [engine.run(task, **CALL, image=image) for task in ("image2image", "img2img")]
            assert np.array_equal(*(result.images[0] for result in results))
            with pytest.raises(InvalidRequest, match="image2image needs prompt, image"):
                engine.submit("image2image", **CALL)

    def test_with_an_ip_adapter_all_endpoints_want_its_image(self, name, tmp_path):
        pipeline = testing.tiny_modular_stable_diffusion_xl(image_encoder=True)
        file = testing.save_tiny_ip_adapter(tmp_path)
        pipeline.load_ip_adapter(str(tmp_path), subfolder="", weight_name=file.name)
        save_model(name, pipeline)
        expected = {f"ip_adapter_{task}" for task in ("text2image", "image2image", "inpainting")}
        assert _paths_of(service(name)) == expected

    def test_blocks_without_a_name_for_what_they_do(self, name):
        blocks = diffusers.StableDiffusionXLAutoBlocks().get_workflow("text2image")
        model = save_model(name, testing.tiny_modular_stable_diffusion_xl(blocks=blocks))
        made = service(name)
        assert _paths_of(made) == {"generate"}
        assert "prompt" in made.apis["generate"].input_spec.model_fields
        with Engine.from_model(model) as engine:
            assert engine.run("txt2img", **CALL).images[0].size == (32, 32)

    def test_a_classic_model_as_a_modular_one(self, name):
        save_model(name, testing.tiny_stable_diffusion_xl())
        assert _paths_of(service(name)) == {"txt2img", "img2img", "inpaint"}
        modular = service(name, pipeline_class="StableDiffusionXLModularPipeline")
        assert _paths_of(modular) == {"text2image", "image2image", "inpainting"}

    @pytest.mark.parametrize("taken", ["replay", "adapters", "engine", "text-2-image"])
    def test_a_modular_workflow_whose_path_cannot_be(self, name, monkeypatch, taken):
        save_model(name, testing.tiny_modular_stable_diffusion_xl())
        workflows = {taken: {"prompt": True}}
        monkeypatch.setattr(diffusers.StableDiffusionXLAutoBlocks, "_workflow_map", workflows)
        with pytest.raises(InvalidModel, match=taken):
            service(name)

    def test_a_modular_workflow_that_is_not_there(self, model):
        with pytest.raises(InvalidOption, match="image2image"):
            service(str(model.tag), modular_workflow="image2video")


class TestService:
    """Shipped blocks, in this process; other processes: tests/services/test_modular_service.py."""

    @pytest.fixture(scope="class")
    def client(self, tmp_path_factory, open_service):
        folder = tmp_path_factory.mktemp("loras")
        save_lora(folder)
        save_model("shipped", testing.tiny_modular_stable_diffusion_xl())
        with open_service(service("shipped", lora_dir=str(folder))) as client:
            yield client

    @pytest.fixture
    def post(self, client, image):
        def ask(path, **fields):
            buffer = io.BytesIO()
            image.save(buffer, "PNG")
            encoded = base64.b64encode(buffer.getvalue()).decode()
            return client.post(path, json={**CALL, "image": encoded, **fields})

        return ask

    @pytest.mark.parametrize(
        "changes", [{"num_inference_steps": 3}, {"strength": 0.2}, {"strength": 0}]
    )
    def test_strength_that_leaves_no_step_is_refused(self, post, changes):
        answer = post("/image2image", **changes)
        assert answer.status_code == 400, answer.text
        assert answer.json()["detail"][0]["loc"] == ["strength"]

    def test_strength_that_leaves_one(self, post):
        plain, stronger = (post("/image2image", strength=value) for value in (0.25, 1))
        assert (plain.status_code, stronger.status_code) == (200, 200), plain.text
        assert plain.content != stronger.content

    def test_a_lora_of_one_request(self, client):
        plain, styled, again = (
            client.post("/text2image", json={**CALL, **more})
            for more in ({}, {"lora_weights": [{"name": "xl.safetensors", "scale": 1}]}, {})
        )
        assert styled.status_code == 200, styled.text
        assert plain.content == again.content != styled.content


def save_lora(folder):
    pipeline = testing.tiny_stable_diffusion_xl()
    pipeline.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"]))
    with torch.no_grad():
        for key, parameter in pipeline.unet.named_parameters():
            if "lora_" in key:
                parameter.fill_(0.5)
    diffusers.StableDiffusionXLPipeline.save_lora_weights(
        folder, get_peft_model_state_dict(pipeline.unet), weight_name="xl.safetensors"
    )


_METHODS = ("__call__", "text2image", "image2image")


def _paths_of(made):
    others = {"adapters", "replay"}
    return set(made.apis) - others


class TestShippedBlocks:
    def test_there_are_many(self):
        assert len(SHIPPED) >= 36  # as diffusers 0.41 has

    @pytest.mark.parametrize("name", SHIPPED)
    def test_each_modular_workflow_that_generates_has_a_request(self, name):
        blocks = SHIPPED[name]()
        for workflow in _workflows_of(blocks):
            lost = {
                item.name
                for item in workflow.inputs.values()
                if item.is_required and why_left_out(item)
            }
            assert not (lost and workflow.output == "images"), workflow.name
            model = make_request_model(workflow, RequestLimits())
            for field in model.model_json_schema()["properties"].values():
                assert field["description"]

    def test_what_is_left_out_is_known(self):
        """A new kind of input in diffusers is looked at by a person once."""
        reasons = collections.defaultdict(set)
        for cls in SHIPPED.values():
            for workflow in _workflows_of(cls()):
                for item in workflow.inputs.values():
                    if workflow.output.kind == "image":
                        reasons[why_left_out(item)].add(item.name)
        fields = reasons.pop(None)
        assert {"prompt", "image", "mask_image", "strength", "num_inference_steps"} <= fields
        unknown = {reason: names - LEFT_OUT.get(reason, set()) for reason, names in reasons.items()}
        assert not any(unknown.values()), unknown  # older diffusers have fewer


def _workflows_of(blocks):
    return list(read_modular_workflows(blocks).values()) or [read_all_blocks(blocks)]


LEFT_OUT = {
    "a request has a seed": {"generator"},
    "not for clients": {"num_images_per_prompt", "output_type", "resized_image", "_auto_resize"},
    "no request can carry it: tensor": {
        "image_latent_ids",
        "image_latents",
        "ip_adapter_embeds",
        "latents",
        "negative_ip_adapter_embeds",
        "timesteps",
    },
    "no request can carry it: structure": {
        "attention_kwargs",
        "boxes",
        "crops_coords",
        "guidance_schedule",
        "preprocess_kwargs",
        "reference_crop",
        "sigmas",
        "text_encoder_out_layers",
    },
    "no request can carry it: other": {
        "cross_attention_kwargs",
        "dtype",
        "joint_attention_kwargs",
        "output",
        "sigmas",
    },
}


class TestKinds:
    @pytest.mark.parametrize(
        ("name", "hint", "default", "kind"),
        [
            ("diffdiff_map", Image.Image, None, "image"),
            ("anything", Image.Image | list[Image.Image], None, "image"),
            ("anything", float | list[float] | torch.Tensor, None, "number"),
            ("anything", bool | None, None, "boolean"),
            ("anything", torch.Tensor | None, None, "tensor"),
            ("anything", list[torch.Tensor], None, "tensor"),
            ("anything", dict, None, "structure"),
            ("control_image", None, None, "image"),
            ("mask_image", Image.Image | None, None, "mask"),
            ("video", list[Image.Image], None, "video"),
            ("anything", torch.FloatTensor | None, None, "tensor"),
            ("prompt", None, None, "string"),
            ("anything", None, True, "boolean"),
            ("anything", None, 3, "integer"),
            ("anything", None, None, "other"),
        ],
    )
    def test_from_type_then_name_then_default(self, name, hint, default, kind):
        assert read_kind(name, hint, default) == kind
