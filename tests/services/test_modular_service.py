"""A modular pipeline over HTTP: one endpoint for each modular workflow, fields from the blocks."""

import base64
import io
import json
import sys

import bentoml
import numpy as np
import pytest
from PIL import Image
from processes import ROOT

import bentoml_diffusers
from bentoml_diffusers import testing

sys.path.append(str(ROOT / "examples" / "differential_diffusion"))
from block import DifferentialDiffusionBlocks
from write_repository import write_repository

CALL = {"prompt": "a red circle", "num_inference_steps": 4, "seed": 1}
JSON_TYPES = {"integer", "number"}


@pytest.fixture(scope="module")
def blocks_model(tmp_path_factory, set_aside):
    """A modular repository with code and a ControlNet, imported."""
    folder = tmp_path_factory.mktemp("repository")
    blocks = DifferentialDiffusionBlocks()
    pipeline = testing.tiny_modular_stable_diffusion_xl(blocks=blocks, controlnet=True)
    write_repository(pipeline, folder)
    return set_aside(bentoml_diffusers.import_model("blocks", folder))


@pytest.fixture(scope="module")
def home(make_home, blocks_model):
    return make_home(blocks_model)


@pytest.fixture(scope="module")
def server(serve, home):
    folder = ROOT / "tests" / "services"
    with serve("modular_service:svc", home=home, folder=folder, TRUST="yes") as server:
        yield server


@pytest.fixture(scope="module")
def image(encode):
    return encode(colour=(200, 40, 40))


def as_text(data):
    return base64.b64encode(data).decode()


@pytest.fixture(scope="module")
def refused(server):
    def refuse(path, **request):
        answer = server.client.post(path, **request)
        assert answer.status_code == 400, answer.text
        text = answer.text
        assert not any(word in text for word in ("Traceback", "site-packages", str(ROOT)))
        return [str(place) for item in answer.json()["detail"] for place in item["loc"]]

    return refuse


class TestImages:
    def test_text2image_is_what_the_engine_generates(self, server, blocks_model, open_image):
        generated = open_image(server.generate("/text2image", **CALL, guidance_scale=3.0))
        with bentoml_diffusers.Engine.from_model(blocks_model, trust_remote_code=True) as engine:
            expected = engine.run("text2image", **CALL, guidance_scale=3.0).images[0]
        difference = np.abs(np.asarray(generated).astype(int) - np.asarray(expected).astype(int))
        assert difference.max() <= 1  # another process sums in another order

    def test_a_map_as_a_file_and_as_base64(self, server, encode, image):
        files = {
            "image": ("a.png", image, "image/png"),
            "diffdiff_map": ("map.png", encode("PNG", "L", colour=255), "image/png"),
        }
        form = {key: str(value) for key, value in CALL.items()}
        answer = server.client.post("/differential", files=files, data=form)
        assert answer.status_code == 200, answer.text
        assert answer.headers["x-seed"] == "1"
        texts = {name: as_text(data) for name, (_, data, _) in files.items()}
        assert server.generate("/differential", **CALL, **texts) == answer.content
        texts["diffdiff_map"] = as_text(encode("PNG", "L", colour=1))
        assert server.generate("/differential", **CALL, **texts) != answer.content

    def test_bentoml_s_own_client(self, server, image, encode, tmp_path):
        files = {"image": image, "diffdiff_map": encode("PNG", "L", colour=255)}
        for name, data in files.items():
            (tmp_path / name).write_bytes(data)
        given = {**CALL, "guidance_scale": 2.0, "scheduler": "Euler a"}
        texts = {name: as_text(data) for name, data in files.items()}
        expected = server.generate("/differential", **given, **texts)
        with bentoml.SyncHTTPClient(server.url) as client:
            answer = client.differential(**given, **{name: tmp_path / name for name in files})
        client._temp_dir.cleanup()  # BentoML 1.4.39 leaves it
        assert np.array_equal(np.asarray(answer), np.asarray(Image.open(io.BytesIO(expected))))

    def test_a_workflow_of_a_modular_workflow_replays(self, server, blocks_model, open_image):
        inputs = {name: Image.new("RGB", (32, 32), "red") for name in ("image", "diffdiff_map")}
        with bentoml_diffusers.Engine.from_model(blocks_model, trust_remote_code=True) as engine:
            call = {**CALL, **inputs, "guidance_scale": 2.0}
            result = engine.run("differential", **call, exclusive=True, return_workflow=True)
            assert np.array_equal(engine.replay(result.workflow).images[0], result.images[0])
        body = result.workflow.to_json().encode()
        answer = server.client.post("/replay", files={"workflow": ("a.json", body)})
        assert answer.status_code == 200, answer.text
        generated = np.asarray(open_image(answer.content)).astype(int)
        assert np.abs(generated - np.asarray(result.images[0])).max() <= 1
        refused = server.client.post(
            "/replay",
            files={"workflow": ("a.json", body)},
            data={"overrides": json.dumps({"num_inference_steps": 100})},
        )
        assert refused.status_code == 400
        assert "num_inference_steps" in refused.text

    @pytest.mark.parametrize(
        "changes",
        [
            {"guidance_scale": 1.5},
            {"scheduler": "DDIM"},
            {"negative_prompt": "a blue star"},
            {"original_size": [8, 8]},
            {"seed": 2},
        ],
        ids=repr,
    )
    def test_each_choice_arrives(self, server, changes):
        plain = server.generate("/text2image", **CALL)
        assert server.generate("/text2image", **{**CALL, **changes}) != plain
        assert server.generate("/text2image", **CALL) == plain

    def test_controlnet_with_a_flag(self, server, image):
        control = {"control_image": as_text(image)}
        plain = server.generate("/controlnet_text2image", **CALL, **control)
        guess = server.generate("/controlnet_text2image", **CALL, **control, guess_mode=True)
        assert len({plain, guess, server.generate("/text2image", **CALL)}) == 3

    def test_formats_and_sizes(self, server, open_image):
        body = server.generate("/text2image", **CALL, height=64, width=48, output_format="webp")
        assert open_image(body).format == "WEBP"
        assert open_image(body).size == (48, 64)

    @pytest.mark.parametrize("size", [(32, 32), (50, 35)])
    def test_an_image_is_answered_in_its_size(self, server, open_image, encode, size):
        call = {**CALL, "image": as_text(encode(size=size))}
        again = {**call, "strength": 0.6}
        assert open_image(server.generate("/image2image", **again)).size == size
        call["diffdiff_map"] = as_text(encode("PNG", "L", size, 255))
        assert open_image(server.generate("/differential", **call)).size == size
        chosen = server.generate("/image2image", **again, height=48, width=40)
        assert open_image(chosen).size == (40, 48)

    def test_requests_are_counted_by_their_modular_workflow(self, server):
        server.generate("/text2image", **CALL)
        text = server.client.get("/metrics").text
        assert 'diffusers_requests_total{outcome="done",task="text2image"}' in text


class TestBadInput:
    @pytest.mark.parametrize(
        ("field", "value"),
        [
            ("prompt", None),
            ("prompt", " "),
            ("prompt", 5),
            ("prompt", "x" * 2001),
            ("negative_prompt", 5),
            ("num_inference_steps", 61),
            ("num_inference_steps", 100_000),
            ("num_inference_steps", "many"),
            ("num_inference_steps", True),
            ("height", 72),
            ("height", 63),
            ("guidance_scale", "high"),
            ("guidance_scale", 51),
            ("original_size", [8]),
            ("original_size", "big"),
            ("original_size", [8, -1]),
            ("eta", 2),
            ("seed", -2),
            ("scheduler", "os.system"),
            ("lora_weights", [{"name": "/etc/passwd"}]),
            ("image", "aGVsbG8="),
            ("latents", [[0.0]]),
            ("generator", 5),
            ("output_type", "latent"),
            ("num_images_per_prompt", 1000),
            ("cross_attention_kwargs", {"scale": 1}),
            ("promt", "a"),
        ],
        ids=lambda value: repr(value)[:30],
    )
    def test_field_is_named(self, refused, field, value):
        assert field in refused("/text2image", json={**CALL, field: value})

    def test_too_many_pixels_in_all(self, refused):
        refused("/text2image", json={**CALL, "height": 64, "width": 64})

    @pytest.mark.parametrize("missing", ["prompt", "image", "diffdiff_map"])
    def test_missing_trigger(self, refused, image, missing):
        body = {**CALL, "image": as_text(image), "diffdiff_map": as_text(image)}
        del body[missing]
        assert refused("/differential", json=body) == [missing]

    @pytest.mark.parametrize(
        "value", ["no image", 5, None, {"a": 1}, as_text(b"no image"), "/etc/passwd"], ids=repr
    )
    def test_a_map_that_is_no_image(self, refused, image, value):
        body = {**CALL, "image": as_text(image), "diffdiff_map": value}
        assert refused("/differential", json=body) == ["diffdiff_map"]

    def test_a_map_beyond_the_limits(self, refused, image, encode):
        body = {**CALL, "image": as_text(image), "diffdiff_map": as_text(encode(size=(80, 16)))}
        assert refused("/differential", json=body) == ["diffdiff_map"]

    @pytest.mark.parametrize(
        "changes", [{"num_inference_steps": 3}, {"strength": 0.2}, {"strength": 0}, {"strength": 2}]
    )
    def test_strength_that_leaves_no_step(self, refused, image, changes):
        body = {**CALL, "image": as_text(image), **changes}
        assert refused("/image2image", json=body) == ["strength"]

    @pytest.mark.parametrize("value", ["perhaps", 7, "image"], ids=repr)
    def test_a_flag_that_is_none(self, refused, image, value):
        body = {**CALL, "control_image": as_text(image), "guess_mode": value}
        assert refused("/controlnet_text2image", json=body) == ["guess_mode"]

    @pytest.mark.parametrize(
        "path", ["/txt2img", "/inpainting", "/ip_adapter_text2image", "/__call__"]
    )
    def test_what_the_model_cannot_do_has_no_endpoint(self, server, path):
        assert server.client.post(path, json=CALL).status_code == 404

    @pytest.mark.slow
    def test_code_without_trust_is_not_served(self, run_command, home):
        folder = ROOT / "tests" / "services"
        done = run_command("serve", "modular_service:svc", home=home, folder=folder)
        assert done.returncode != 0
        assert "trust_remote_code=True" in done.stderr


class TestOpenApi:
    @pytest.fixture(scope="class")
    def document(self, server):
        return server.client.get("/docs.json").json()

    @pytest.mark.parametrize(
        ("path", "media_type", "required"),
        [
            ("/text2image", "application/json", ["prompt"]),
            ("/differential", "multipart/form-data", ["prompt", "image", "diffdiff_map"]),
        ],
    )
    def test_every_field_is_described(self, document, path, media_type, required):
        operation = document["paths"][path]["post"]
        schema = operation["requestBody"]["content"][media_type]["schema"]
        while "$ref" in schema:
            schema = document["components"]["schemas"][schema["$ref"].rpartition("/")[2]]
        assert operation["description"]
        assert sorted(schema["required"]) == sorted(required)
        for name, field in schema["properties"].items():
            assert field.get("description"), name
            text = json.dumps(field)
            if any(f'"{kind}"' in text for kind in JSON_TYPES):
                assert '"maximum"' in text, name
        assert "seed" in schema["properties"]
        assert not {"generator", "latents", "output_type"} & set(schema["properties"])
