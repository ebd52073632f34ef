"""Which endpoints a service has, and which fields: they follow from the tasks of its pipeline."""

import asyncio

import diffusers
import pytest
from combined_models import tiny_kandinsky_prior

import bentoml_diffusers
from bentoml_diffusers import ModelOptions, RequestLimits, errors, testing
from bentoml_diffusers.serving.endpoints import classic_endpoints, find_endpoints

LIMITS = RequestLimits()


def fields_of(cls):
    """Names of the fields of each endpoint of a class, and those that are required."""
    return {
        endpoint.name: {
            name: item.is_required() for name, item in endpoint.request.model_fields.items()
        }
        for endpoint in classic_endpoints(LIMITS, cls)
    }


def test_fields_are_those_of_the_family():
    stable_diffusion = fields_of(diffusers.StableDiffusionPipeline)
    assert list(stable_diffusion) == ["txt2img", "img2img", "inpaint"]
    assert {"clip_skip", "eta", "guidance_rescale"} <= set(stable_diffusion["txt2img"])
    assert "strength" not in stable_diffusion["txt2img"]
    assert {"prompt_2", "max_sequence_length"} <= set(fields_of(diffusers.FluxPipeline)["txt2img"])
    assert "true_cfg_scale" in fields_of(diffusers.QwenImagePipeline)["txt2img"]
    assert "prompt_3" in fields_of(diffusers.StableDiffusion3Pipeline)["inpaint"]


@pytest.mark.parametrize("cls", ["StableDiffusionPipeline", "FluxPipeline", "QwenImagePipeline"])
def test_what_no_client_should_say_is_no_field(cls):
    for fields in fields_of(getattr(diffusers, cls)).values():
        assert not set(fields) & {
            *("generator", "output_type", "return_dict", "num_images_per_prompt"),
            *("callback_on_step_end", "prompt_embeds", "ip_adapter_image"),
        }


def test_what_a_task_needs_is_required():
    plain = fields_of(diffusers.StableDiffusionPipeline)
    needed = {name: {one for one, is_needed in plain[name].items() if is_needed} for name in plain}
    assert needed == {
        "txt2img": {"prompt"},
        "img2img": {"prompt", "image"},
        "inpaint": {"prompt", "image", "mask_image"},
    }
    controlled = fields_of(diffusers.StableDiffusionControlNetPipeline)
    assert controlled["txt2img"]["image"]
    assert controlled["img2img"]["control_image"]


def test_defaults_are_those_of_the_class():
    request = classic_endpoints(LIMITS, diffusers.FluxPipeline)[0].request
    model = request(prompt="a red circle")
    assert (model.num_inference_steps, model.guidance_scale) == (28, 3.5)
    assert model.negative_prompt is None  # "" would switch on the guidance of some families


def test_each_field_is_described_and_has_bounds():
    for cls in (diffusers.StableDiffusionXLPipeline, diffusers.FluxPipeline):
        for endpoint in classic_endpoints(LIMITS, cls):
            for name, schema in endpoint.request.model_json_schema()["properties"].items():
                assert schema.get("description"), (cls, endpoint.name, name)


def test_a_pipeline_that_no_service_can_serve_is_refused_at_once(name):
    model = bentoml_diffusers.save_model(name, tiny_kandinsky_prior())
    with pytest.raises(errors.InvalidModel, match="makes image_embeds") as caught:
        bentoml_diffusers.service(str(model.tag))
    assert "KandinskyV22PriorPipeline" in str(caught.value)


@pytest.mark.parametrize(
    ("name", "endpoints"),
    [
        ("LTXPipeline", "txt2video img2video"),
        ("LTX2ImageToVideoPipeline", "img2video"),
        ("WanPipeline", "txt2video video2video"),
        ("WanImageToVideoPipeline", "img2video"),
        ("WanVideoToVideoPipeline", "txt2video video2video"),
        ("HunyuanVideoPipeline", "txt2video"),
        ("CogVideoXVideoToVideoPipeline", "video2video"),
        ("AnimateDiffPipeline", "txt2video"),
        ("StableVideoDiffusionPipeline", "img2video"),
        ("StableAudioPipeline", "txt2audio"),
        ("AudioLDM2Pipeline", "txt2audio"),
        ("DanceDiffusionPipeline", "unconditional"),
        ("DDPMPipeline", "unconditional"),
        ("StableDiffusionInstructPix2PixPipeline", "edit"),
        ("FluxKontextPipeline", "txt2img img2img edit"),
        ("QwenImageEditPipeline", "img2img inpaint edit"),
        ("StableDiffusionUpscalePipeline", "upscale"),
        ("StableDiffusionLatentUpscalePipeline", "upscale"),
        ("StableDiffusionControlNetPipeline", "txt2img img2img inpaint"),
    ],
)
def test_endpoints_are_named_by_what_a_class_does(name, endpoints):
    made = classic_endpoints(RequestLimits(default_steps=8), getattr(diffusers, name))
    assert [one.name for one in made] == endpoints.split()


def test_a_stored_controlnet_has_its_image_as_a_field(name):
    pipeline = testing.tiny_controlnet()
    model = bentoml_diffusers.save_model(name, pipeline)
    found = {one.name: one for one in find_endpoints(str(model.tag), ModelOptions(), LIMITS)}
    assert set(found) == {"txt2img", "img2img", "inpaint"}
    assert "image" in found["txt2img"].request.multipart_fields
    assert "control_image" in found["inpaint"].request.multipart_fields


def test_sizes_as_json_lists_are_what_diffusers_takes(pixels):
    call = {"prompt": "a red circle", "num_inference_steps": 1, "height": 32, "width": 32}
    with bentoml_diffusers.Engine(testing.tiny_stable_diffusion_xl()) as engine:

        async def run(size):
            return await engine.arun("txt2img", **call, seed=1, original_size=size)

        as_list, as_tuple = (asyncio.run(run(size)) for size in ([64, 64], (64, 64)))
    assert (pixels(as_list.images[0]) == pixels(as_tuple.images[0])).all()
