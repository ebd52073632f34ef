"""What OpenAI's fields mean: forms by brackets, models by name, sizes, qualities, masks."""

import io

import pytest
from PIL import Image
from pydantic import ValidationError

from bentoml_diffusers import RequestLimits
from bentoml_diffusers.errors import UnreadableRequest
from bentoml_diffusers.serving.dialects.names import ServedModel, UnknownModel
from bentoml_diffusers.serving.dialects.openai.errors import FieldsRefused
from bentoml_diffusers.serving.dialects.openai.fields import EditRequest, ImageRequest
from bentoml_diffusers.serving.dialects.openai.forms import fold_form
from bentoml_diffusers.serving.dialects.openai.orders import Translator
from bentoml_diffusers.serving.endpoints import classic_endpoints

ENDPOINTS = classic_endpoints(RequestLimits(max_steps=60))
REQUESTS = {one.task: one.request for one in ENDPOINTS}


@pytest.fixture
def translator():
    return Translator(REQUESTS, ServedModel("demo", "v1"), {"max": 40})


def encode(image, image_format="PNG"):
    buffer = io.BytesIO()
    image.save(buffer, image_format)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("items", "expected"),
    [
        ([("n", "1"), ("prompt", "a [b]")], {"n": "1", "prompt": "a [b]"}),
        ([("image[]", b"1"), ("image[]", b"2")], {"image": [b"1", b"2"]}),
        (
            [("l[][name]", "a"), ("l[][scale]", "0.5"), ("l[][name]", "b")],
            {"l": [{"name": "a", "scale": "0.5"}, {"name": "b"}]},
        ),
        (
            [("l[][scale][unet]", "1"), ("l[][scale][vae]", "2"), ("l[][scale][unet]", "3")],
            {"l": [{"scale": {"unet": "1", "vae": "2"}}, {"scale": {"unet": "3"}}]},
        ),
        (
            [("l[0][name]", "a"), ("l[1][name]", "b"), ("l[1][scale]", "2")],
            {"l": [{"name": "a"}, {"name": "b", "scale": "2"}]},
        ),
        ([("l", '[{"name": "a"}]'), ("s[w]", "1")], {"l": [{"name": "a"}], "s": {"w": "1"}}),
    ],
)
def test_names_in_brackets_are_lists_and_objects(items, expected):
    assert fold_form(items) == expected


@pytest.mark.parametrize(
    "names",
    [
        ("a", "a"),
        ("a", "a[b]"),
        ("a[b]", "a[]"),
        ("a[1]",),
        ("a[0]", "a[2]"),
        ("a[",),
        ("",),
        ("a" + "[b]" * 9,),
        ("a[b]", "a[b]"),
    ],
)
def test_forms_that_cannot_be_are_refused(names):
    with pytest.raises(UnreadableRequest):
        fold_form([(name, "1") for name in names])


class TestModelNames:
    model = ServedModel("demo", "v1", aliases={"gpt-image-1": "demo", "thin": "demo:outline"})

    @pytest.mark.parametrize(
        ("name", "loras"),
        [
            ("", ()),
            ("demo", ()),
            ("demo:latest", ()),
            ("demo:v1", ()),
            ("demo:outline", ("outline",)),
            ("demo:outline+stripes", ("outline", "stripes")),
            ("gpt-image-1", ()),
            ("thin", ("outline",)),
        ],
    )
    def test_a_name_stands_for_loras(self, name, loras):
        assert self.model.read(name) == loras

    @pytest.mark.parametrize("name", ["other", "other:outline", ":outline", "demo:a+", "Demo"])
    def test_another_model_is_unknown(self, name):
        with pytest.raises(UnknownModel, match="not served"):
            self.model.read(name)

    def test_names_of_the_model_join_those_of_the_request(self, translator):
        given = {"name": "c", "scale": 0.5}
        request = ImageRequest(prompt="x", model="demo:a+b", lora_weights=given)
        values = translator.generation(request).values
        assert values["lora_weights"] == [{"name": "a"}, {"name": "b"}, given]


class TestGenerations:
    def test_size_and_extensions_are_native_fields(self, translator):
        request = ImageRequest(prompt="x", size="64x32", seed=3, user="me", style="vivid")
        order = translator.generation(request)
        assert order.task == "txt2img"
        assert order.values == {"prompt": "x", "n": 1, "width": 64, "height": 32, "seed": 3}
        assert order.names["width"] == "size"

    @pytest.mark.parametrize(
        ("quality", "steps"),
        [("low", 25), ("medium", 50), ("high", 60), ("max", 40), ("hd", 60), ("standard", 50)],
    )
    def test_quality_is_a_number_of_steps(self, translator, quality, steps):
        values = translator.generation(ImageRequest(prompt="x", quality=quality)).values
        assert values["num_inference_steps"] == steps

    def test_steps_of_the_request_count_more(self, translator):
        request = ImageRequest(prompt="x", quality="low", num_inference_steps=7)
        assert translator.generation(request).values["num_inference_steps"] == 7

    @pytest.mark.parametrize(
        ("fields", "field", "code"),
        [
            ({"size": "64x64", "width": 32}, "width", "invalid_value"),
            ({"frame_count": 2}, "frame_count", "unsupported_parameter"),
            ({"svg": {"model": "x"}}, "svg", "unsupported_parameter"),
        ],
    )
    def test_what_cannot_be_is_refused_by_name(self, translator, fields, field, code):
        with pytest.raises(FieldsRefused) as caught:
            translator.generation(ImageRequest(prompt="x", **fields))
        assert (caught.value.faults[0][0], caught.value.code) == ((field,), code)

    @pytest.mark.parametrize(
        ("field", "value", "code"),
        [
            ("background", "transparent", "unsupported_value"),
            ("output_format", "gif", "unsupported_value"),
            ("output_format", "bmp", "invalid_value"),
            ("output_compression", 50, "unsupported_value"),  # of a PNG
            ("response_format", "url", "unsupported_value"),
            ("n", 11, "invalid_value"),
            ("n", True, "invalid_value"),
            ("partial_images", 4, "invalid_value"),
            ("quality", "best", "invalid_value"),
            ("size", "64", "invalid_value"),
        ],
    )
    def test_values_that_cannot_be_are_refused(self, field, value, code):
        with pytest.raises(ValidationError) as caught:
            ImageRequest(prompt="x", **{field: value})
        error = FieldsRefused.of(caught.value)
        assert (error.faults[0][0], error.code) == ((field,), code)


class TestEdits:
    image = Image.new("RGB", (64, 32), "red")
    mask = Image.new("RGBA", (64, 32), (0, 0, 0, 255))
    mask.paste((0, 0, 0, 0), (0, 0, 32, 32))

    def test_transparent_is_what_is_generated(self, translator):
        request = EditRequest(prompt="x", image=encode(self.image), mask=encode(self.mask))
        order = translator.edit(request)
        assert order.task == "inpaint"
        mask = order.values["mask_image"]
        assert (mask.getpixel((10, 10)), mask.getpixel((40, 10))) == ((255,) * 3, (0,) * 3)

    def test_image_and_mask_get_the_size_that_is_asked_for(self, translator):
        files = {"image": [encode(self.image)], "mask": encode(self.mask)}
        order = translator.edit(EditRequest(prompt="x", size="32x32", **files))
        assert {order.values[name].size for name in ("image", "mask_image")} == {(32, 32)}
        assert not {"width", "height"} & set(order.values)

    def test_a_variation_has_an_empty_prompt(self, translator):
        order = translator.variation(EditRequest(image=encode(self.image)))
        assert order.task == "img2img"
        assert order.complete({"prompt": order.values["prompt"], "seed": 1}) == {
            "prompt": "",
            "seed": 1,
        }

    @pytest.mark.parametrize(
        ("field", "fields"),
        [
            ("image", {"image": b"no image"}),
            ("mask", {"mask": encode(Image.new("RGB", (64, 32)))}),
            ("mask", {"mask": encode(Image.new("RGBA", (32, 32)))}),
            ("size", {"size": "9999x9999"}),
        ],
    )
    def test_images_that_cannot_be_are_refused_by_name(self, translator, field, fields):
        with pytest.raises(FieldsRefused) as caught:
            translator.edit(EditRequest(**{"prompt": "x", "image": encode(self.image), **fields}))
        assert caught.value.faults[0][0] == (field,)

    def test_several_images_are_refused(self):
        with pytest.raises(ValidationError, match="2 images, expected one"):
            EditRequest(prompt="x", image=[b"1", b"2"])
