"""The limits of a service hold for what a request leaves out, too."""

import base64
import json

import pytest
from PIL import Image

import bentoml_diffusers
from bentoml_diffusers import Engine, ModelOptions, RequestLimits, errors, testing
from bentoml_diffusers.serving.endpoints import classic_endpoints, find_endpoints
from bentoml_diffusers.serving.replays import read_overrides
from bentoml_diffusers.serving.sizes import check_default_sizes, check_whole_size
from bentoml_diffusers.workflow import Workflow


def requests_of(endpoints):
    return {endpoint.task: endpoint.request for endpoint in endpoints}


@pytest.fixture(scope="module")
def engine():
    """Of a model that makes 32 x 32 pixels where a request gives no size."""
    with Engine(testing.tiny_stable_diffusion()) as running:
        yield running


@pytest.fixture(scope="module")
def stored():
    return str(bentoml_diffusers.save_model("bounded", testing.tiny_stable_diffusion()).tag)


class TestSteps:
    def test_a_service_whose_default_is_too_much_is_not_made(self):
        with pytest.raises(errors.InvalidOption, match=r"'max_steps': got 10.* 50.*default_steps"):
            bentoml_diffusers.service("bounded", limits=RequestLimits(max_steps=10))

    def test_the_default_can_be_said(self):
        limits = RequestLimits(max_steps=10, default_steps=6)
        for request in requests_of(classic_endpoints(limits)).values():
            assert request.model_fields["num_inference_steps"].default == 6

    def test_the_default_is_within(self):
        with pytest.raises(errors.InvalidOption, match=r"'max_steps': got 10.*at least 20"):
            RequestLimits(max_steps=10, default_steps=20)

    def test_a_default_strength_that_leaves_no_step_is_none(self):
        fields = {
            steps: requests_of(
                classic_endpoints(RequestLimits(max_steps=steps, default_steps=steps))
            )["img2img"].model_fields["strength"]
            for steps in (1, 2)
        }
        assert fields[1].is_required()
        assert fields[2].default == 0.8

    def test_modular(self, modular_model):
        tag = str(modular_model.tag)
        with pytest.raises(errors.InvalidOption, match=r"'max_steps': got 10"):
            find_endpoints(tag, ModelOptions(), RequestLimits(max_steps=10))
        narrow = find_endpoints(tag, ModelOptions(), RequestLimits(max_steps=10, default_steps=10))
        for request in requests_of(narrow).values():
            assert request.model_fields["num_inference_steps"].default == 10


class TestSize:
    @pytest.mark.parametrize(
        ("limits", "option"),
        [({"max_side": 16}, "max_side"), ({"max_pixels": 32 * 31}, "max_pixels")],
    )
    def test_a_service_whose_model_makes_more_does_not_start(self, stored, limits, option):
        service = bentoml_diffusers.service(stored, limits=RequestLimits(**limits))
        with pytest.raises(errors.InvalidOption, match=f"'{option}'.*32 x 32 .*default_side"):
            service.inner()

    @pytest.mark.parametrize("limits", [{"max_side": 16}, {"max_pixels": 32 * 31}])
    def test_it_is_said_before_a_worker_starts(self, stored, limits):
        service = bentoml_diffusers.service(stored, limits=RequestLimits(**limits))
        with pytest.raises(errors.InvalidOption, match="32 x 32"):
            service.inner.check_model()

    @pytest.mark.parametrize("limits", [{"max_side": 32}, {"max_side": 16, "default_side": 16}])
    def test_nothing_is_said_of_what_is_within(self, stored, limits):
        bentoml_diffusers.service(stored, limits=RequestLimits(**limits)).inner.check_model()

    def test_it_starts_with_a_default_within(self, stored):
        limits = RequestLimits(max_side=16, default_side=16)
        running = bentoml_diffusers.service(stored, limits=limits).inner()
        running.close_engine()
        request = requests_of(classic_endpoints(limits))["txt2img"]
        assert request(prompt="a").width == request(prompt="a").height == 16

    def test_what_the_model_can_not_do_is_no_hindrance(self, engine):
        check_default_sizes(engine, requests_of(classic_endpoints(RequestLimits(max_side=32))))

    @pytest.mark.parametrize("side", [12, 24])
    def test_the_default_is_one_that_can_be(self, side):
        with pytest.raises(errors.InvalidOption, match=r"default_side|max_side"):
            RequestLimits(max_side=16, default_side=side)

    def test_one_side_with_the_default_of_the_other(self, engine):
        limits = RequestLimits(max_side=64, max_pixels=32 * 40)
        check_whole_size(engine, "txt2img", limits, {"height": 40})
        with pytest.raises(errors.InvalidRequest, match=r"^height: .*32 x 48"):
            check_whole_size(engine, "txt2img", limits, {"height": 48})

    def test_modular(self, modular_model):
        limits = RequestLimits(max_side=16)
        endpoints = find_endpoints(str(modular_model.tag), ModelOptions(), limits)
        with (
            Engine.from_model(modular_model, device="cpu") as engine,
            pytest.raises(errors.InvalidOption, match="'max_side': got 16"),
        ):
            check_default_sizes(engine, requests_of(endpoints))


@pytest.mark.parametrize("task", ["img2img", "inpaint"])
def test_the_largest_images_fit_into_a_body_as_base64_in_lines(task):
    limits = RequestLimits(max_upload_bytes=3_000_000, max_prompt_chars=1)
    request = requests_of(classic_endpoints(limits))[task]
    lines = base64.encodebytes(bytes(limits.max_upload_bytes)).decode().replace("\n", "\r\n")
    body = dict.fromkeys(("image", "mask_image")[: 1 + (task == "inpaint")], lines)
    without_margin = request._max_body_bytes() - 2**20
    assert len(json.dumps(body)) <= without_margin


class TestReplay:
    @pytest.fixture(scope="class")
    def values(self, engine):
        call = {"prompt": "a", "num_inference_steps": 2, "guidance_scale": 5.0}
        result = engine.run("txt2img", **call, negative_prompt="", return_workflow=True)
        return json.loads(result.workflow.to_json())

    def read(self, engine, values, limits, **overrides):
        workflow = Workflow.from_json(json.dumps(values))
        return read_overrides(engine, requests_of(classic_endpoints(limits)), workflow, overrides)

    def test_a_workflow_without_a_size(self, engine, values):
        assert values["arguments"]["height"] is None
        assert self.read(engine, values, RequestLimits(max_side=32)) == {}
        narrow = RequestLimits(max_side=16, default_side=16)
        with pytest.raises(errors.InvalidWorkflow, match=r"workflow\.arguments\.height: .*32 x 32"):
            self.read(engine, values, narrow)
        assert self.read(engine, values, narrow, height=16, width=16) == {"height": 16, "width": 16}

    def test_a_workflow_with_an_image_whose_size_the_model_chooses(self):
        """Flux makes 1024 x 1024 of any image, if nobody says a size."""
        image = Image.new("RGB", (48, 32), "red")
        call = {"prompt": "a", "num_inference_steps": 2, "guidance_scale": 5.0, "strength": 0.9}
        limits = RequestLimits(max_side=64)
        with Engine(testing.tiny_flux()) as engine:
            result = engine.run(
                "img2img", **call, image=image, keep_size=True, return_workflow=True
            )
            values = json.loads(result.workflow.to_json())
            assert self.read(engine, values, limits) == {}
            with pytest.raises(errors.InvalidWorkflow, match="1024 x 1024"):
                self.read(engine, {**values, "keep_size": False}, limits)

    def test_an_image_that_is_not_there_says_no_size(self, engine, values):
        narrow = RequestLimits(max_side=16, default_side=16)
        with pytest.raises(errors.InvalidWorkflow, match="32 x 32"):
            self.read(engine, {**values, "keep_size": True}, narrow)
