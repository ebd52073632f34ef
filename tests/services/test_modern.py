"""The modern service as `bentoml diffusers serve` runs it, over real HTTP."""

import base64
import itertools
import json
import re
import select
import socket
import struct
import subprocess
import sys
import zlib
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
import safetensors.torch
import torch
from comparing import same_image
from processes import ROOT, SLOW

MANY_BRACKETS = b"[" * 100_000


@pytest.fixture(scope="module")
def server(serve, tiny_home):
    with serve("demo", home=tiny_home, command=("diffusers", "serve")) as running:
        yield running


@pytest.fixture(scope="module")
def plain(server):
    """The image of a request without anything special."""
    return server.generate()


@pytest.fixture
def refused(server, tiny_home):
    """Posts what must be refused at once; returns the status and the text of the answer."""

    def post(path="/txt2img", field=None, **body):
        answer = server.client.post(path, **body)
        assert 400 <= answer.status_code < 500, answer.text
        if field is not None:
            assert field in str(answer.json()["detail"][0]["loc"])
            assert field in answer.json()["error"]
        for inside in (str(ROOT), sys.prefix, str(tiny_home), "Traceback", 'File "'):
            assert inside not in answer.text
        return answer.status_code, answer.text

    return post


def test_log_of_the_start_is_a_line_for_each_stage(server, tiny_model):
    server.check_loading(tiny_model.tag)
    start = server.log.partition("Service diffusers initialized")[0].splitlines()
    plain = [line for line in start if not re.match(r"\S+ \[[A-Z]+\] \[\S+\] ", line)]
    assert all(line.startswith("Listens on this machine only") for line in filter(None, plain))


class TestImages:
    def test_image_and_its_seed(self, server, open_image):
        body = {"prompt": "a red circle", "num_inference_steps": 4, "seed": 7}
        answer = server.client.post("/txt2img", json=body)
        assert answer.headers["content-type"] == "image/png"
        assert answer.headers["x-seed"] == "7"
        assert (open_image(answer.content).format, open_image(answer.content).size) == (
            "PNG",
            (32, 32),
        )

    @pytest.mark.parametrize("output_format", ["png", "jpeg", "webp"])
    def test_nothing_is_written_into_it(self, server, open_image, output_format):
        """Prompts are private unless the operator says otherwise."""
        body = {"prompt": "my secret", "num_inference_steps": 1, "output_format": output_format}
        answer = server.client.post("/txt2img", json=body)
        assert "x-workflow" not in answer.headers
        assert not {"exif", "xmp", "parameters"} & set(open_image(answer.content).info)
        assert b"secret" not in answer.content

    def test_seed_that_was_drawn_generates_the_image_again(self, server):
        body = {"prompt": "a red circle", "num_inference_steps": 4}
        answer = server.client.post("/txt2img", json=body)
        assert server.generate(seed=int(answer.headers["x-seed"])) == answer.content

    @pytest.mark.parametrize("kind", ["json", "data"])
    def test_minus_one_draws_a_seed(self, server, kind):
        body = {"prompt": "a red circle", "num_inference_steps": 4, "seed": -1}
        answers = [server.client.post("/txt2img", **{kind: body}) for _ in range(2)]
        first, second = (int(answer.headers["x-seed"]) for answer in answers)
        assert first != second
        assert server.generate(seed=first) == answers[0].content

    def test_null_says_that_a_field_is_not_given(self, server, plain):
        given = ("prompt", "seed", "num_inference_steps", "latents", "image", "mask_image")
        fields = server.client.get("/docs.json").json()["components"]["schemas"]
        names = next(one["properties"] for one in fields.values() if "latents" in one["properties"])
        assert server.generate(**dict.fromkeys(set(names) - set(given))) == plain
        lora = {"name": "tiny-lora", "scale": None}
        assert server.generate(lora_weights=[lora]) == server.generate(lora_weights="tiny-lora")

    def test_same_request_same_bytes(self, server, plain):
        assert server.generate() == plain

    @pytest.mark.parametrize(
        "fields",
        [
            {"prompt": "a blue star"},
            {"negative_prompt": "a green square"},
            {"num_inference_steps": 5},
            {"guidance_scale": 2},
            {"seed": 2},
            {"scheduler": "EulerDiscreteScheduler"},
            {"height": 40},
            {"lora_weights": [{"name": "tiny-lora"}]},
        ],
        ids=lambda fields: next(iter(fields)),
    )
    def test_each_field_arrives(self, server, plain, fields):
        assert server.generate(**fields) != plain
        assert server.generate() == plain  # and nothing of it stays

    @pytest.mark.parametrize("output_format", ["png", "jpeg", "webp"])
    def test_formats(self, server, open_image, output_format):
        body = {"prompt": "a red circle", "num_inference_steps": 4, "output_format": output_format}
        answer = server.client.post("/txt2img", json=body)
        assert answer.headers["content-type"] == f"image/{output_format}"
        assert open_image(answer.content).format == output_format.upper()

    def test_size(self, server, open_image):
        assert open_image(server.generate(height=40, width=24)).size == (24, 40)

    def test_scale_of_lora(self, server, plain):
        half, whole, none = (
            server.generate(lora_weights=[{"name": "tiny-lora", "scale": scale}])
            for scale in (0.5, 1, 0)
        )
        assert none == plain
        assert len({plain, half, whole}) == 3

    def test_scales_of_lora_by_component_and_block(self, server, plain):
        """JSON, and JSON text in a form; some blocks at 0 are neither all nor none."""
        loras = [{"name": "tiny-lora", "scale": {"unet": {"down": 0, "up": {"block_0": [0.5]}}}}]
        generated = server.generate(lora_weights=loras)
        assert generated not in (plain, server.generate(lora_weights="tiny-lora"))
        form = {"prompt": "a red circle", "num_inference_steps": "4", "seed": "1"}
        form["lora_weights"] = json.dumps(loras)
        answer = server.client.post("/txt2img", data=form)
        assert answer.content == generated
        whole = [{"name": "tiny-lora", "scale": {"unet": 1}}]
        assert server.generate(lora_weights=whole) == server.generate(lora_weights="tiny-lora")

    @pytest.mark.parametrize(
        "value", ["tiny-lora", [" tiny-lora"], {"name": "tiny-lora"}, [{"name": "tiny-lora"}]]
    )
    def test_a_lora_in_each_way_to_name_it(self, server, value):
        assert server.generate(lora_weights=value) == server.generate(
            lora_weights=[{"name": "tiny-lora", "scale": 1}]
        )

    def test_requests_at_once_are_as_alone(self, server, open_image):
        requests = [
            {"prompt": "a red circle", "seed": 1},
            {"prompt": "a blue star", "seed": 2, "lora_weights": [{"name": "tiny-lora"}]},
            {"prompt": "a green square", "seed": 3, "scheduler": "EulerDiscreteScheduler"},
            {"prompt": "a red star", "seed": 4, "height": 64, "num_inference_steps": 8},
        ]
        alone = [server.generate(**fields) for fields in requests]
        with ThreadPoolExecutor(len(requests)) as pool:
            together = list(pool.map(lambda fields: server.generate(**fields), requests))
        for one, other in zip(together, alone, strict=True):
            assert same_image(open_image(one), open_image(other))


FORM = {"prompt": "a blue star", "num_inference_steps": "4", "seed": "1"}


class TestImageFromImage:
    def generate(self, server, name, data, media_type, **fields):
        answer = server.client.post(
            "/img2img",
            files={"image": (name, data, media_type)},
            data={**FORM, **fields},
        )
        assert answer.status_code == 200, answer.text
        return answer.content

    def test_image_matters(self, server, encode):
        dark, light = (encode(colour=(grey,) * 3) for grey in (10, 240))
        assert self.generate(server, "a.png", dark, "image/png") != self.generate(
            server, "a.png", light, "image/png"
        )

    def test_strength(self, server, encode):
        weak, strong = (
            self.generate(server, "a.png", encode(), "image/png", strength=strength)
            for strength in ("0.5", "1")
        )
        assert weak != strong

    def test_base64_in_json_is_the_same(self, server, encode):
        form = self.generate(server, "a.png", encode(), "image/png")
        text = base64.b64encode(encode()).decode()
        lines = base64.encodebytes(encode()).decode()
        assert "\n" in lines.strip()
        data_url = f"data:image/png;base64,{text}"
        for image in (text, data_url, lines, lines.replace("\n", "\r\n"),
                      f"data:image/png;base64, {lines}"):  # fmt: skip
            assert server.generate("/img2img", prompt="a blue star", image=image) == form

    def test_content_counts_not_the_declared_type(self, server, encode):
        right = self.generate(server, "a.png", encode(), "image/png")
        assert self.generate(server, "a.jpg", encode(), "image/jpeg") == right

    @pytest.mark.parametrize(
        ("image_format", "mode"),
        [
            ("PNG", "RGBA"),
            ("PNG", "LA"),
            ("PNG", "P"),
            ("PNG", "1"),
            ("PNG", "I;16"),
            ("JPEG", "L"),
            ("TIFF", "CMYK"),
            ("GIF", "P"),
            ("WEBP", "RGB"),
            ("BMP", "RGB"),
        ],
    )
    def test_images_of_any_making(self, server, encode, open_image, image_format, mode):
        data = encode(image_format, mode)
        image = open_image(self.generate(server, "a", data, "application/octet-stream"))
        assert image.size == (32, 32)

    @pytest.mark.parametrize("size", [(47, 33), (40, 32), (9, 100)])
    def test_the_size_is_that_of_the_image(self, server, encode, open_image, size):
        data = encode(size=size)
        assert open_image(self.generate(server, "a.png", data, "image/png")).size == size

    def test_lora_in_a_form(self, server, encode):
        plain = self.generate(server, "a.png", encode(), "image/png")
        asked = ('[{"name": "tiny-lora"}]', '{"name": "tiny-lora"}', "tiny-lora")
        styled = {
            self.generate(server, "a.png", encode(), "image/png", lora_weights=one) for one in asked
        }
        assert len(styled | {plain}) == 2


class TestBadInput:
    @pytest.mark.parametrize(
        ("field", "value"),
        [
            ("prompt", ""),
            ("prompt", "   "),
            ("prompt", 5),
            ("prompt", ["a", "b"]),
            ("prompt", None),
            ("prompt", "x" * 2001),
            ("negative_prompt", 5),
            ("num_inference_steps", "many"),
            ("num_inference_steps", 0),
            ("num_inference_steps", 2.5),
            ("num_inference_steps", 10_000),
            ("guidance_scale", "high"),
            ("guidance_scale", -1),
            ("guidance_scale", "nan"),
            ("height", 63),
            ("height", 0),
            ("width", 100_000),
            ("seed", -2),
            ("seed", 2**32),
            ("seed", "today"),
            ("output_format", "gif"),
            ("scheduler", "NoSuchScheduler"),
            ("scheduler", "os.system"),
            ("scheduler", "StableDiffusionPipeline"),
            ("lora_weights", 7),
            ("lora_weights", [["tiny-lora"]]),
            ("lora_weights", [""]),
            ("lora_weights", [{"scale": 1}]),
            ("lora_weights", [{"name": "tiny-lora", "scale": 1e9}]),
            ("lora_weights", [{"name": "tiny-lora", "scale": "much"}]),
            ("lora_weights", [{"name": "tiny-lora", "scale": {"unet": {"down": 11}}}]),
            ("lora_weights", [{"name": "tiny-lora", "scale": {"unet": {"left": 1}}}]),
            ("lora_weights", [{"name": "tiny-lora", "scale": {"vae": 1}}]),
            ("lora_weights", [{"name": "tiny-lora", "components": ["unet"]}]),
            ("lora_weights", [{"name": "tiny-lora"}] * 17),
            ("lora_weights", [{"name": "/etc/passwd"}]),
            ("lora_weights", [{"name": "../../etc/passwd"}]),
            ("lora_weights", [{"name": "~/lora.safetensors"}]),
            ("lora_weights", [{"name": "https://example.com/lora.safetensors"}]),
            ("lora_weights", [{"name": "somebody/some-lora"}]),
            ("lora_weights", [{"name": "a\0b.safetensors"}]),
            ("heigth", 64),
        ],
        ids=repr,
    )
    def test_field_is_named(self, refused, field, value):
        body = {"prompt": "a red circle", "num_inference_steps": 4, field: value}
        status, _ = refused(field=field, json=body)
        assert status == 400

    def test_missing_prompt(self, refused):
        assert refused(field="prompt", json={})[0] == 400

    def test_unknown_lora(self, refused):
        body = {"prompt": "a red circle", "lora_weights": [{"name": "tiny-lara"}]}
        status, text = refused(field="lora_weights", json=body)
        assert status == 404
        assert "did you mean 'tiny-lora'?" in text

    @pytest.mark.parametrize(
        "content",
        [
            b"{prompt",
            b"[1, 2]",
            b'"text"',
            b"null",
            b'{"prompt": "\xff"}',
            b'{"prompt": "a", "seed": ' + b"9" * 5000 + b"}",
            pytest.param(MANY_BRACKETS, id="deep"),
        ],
    )
    def test_body_that_is_no_object(self, refused, content):
        assert refused(content=content, headers={"content-type": "application/json"})[0] == 400

    def test_deep_brackets_in_a_form(self, refused):
        deep = "[" * 200_000
        assert refused(data={"prompt": deep, "lora_weights": deep})[0] == 400

    def test_a_name_that_is_nearly_one(self, refused):
        text = refused(field="guidance_scal", json={"prompt": "x", "guidance_scal": 3})[1]
        assert "did you mean 'guidance_scale'" in text

    @pytest.mark.parametrize(
        ("path", "given", "meant"),
        [
            (["steps"], "steps", "num_inference_steps"),
            (["cfg_scale"], "cfg_scale", "guidance_scale"),
            (["cfgScale"], "cfgScale", "guidance_scale"),
            (["sampler_name"], "sampler_name", "scheduler"),
            (["negativePrompt"], "negativePrompt", "negative_prompt"),
            (["size"], "size", "height' and 'width"),
            (["lora_weights", 0, "weight"], "weight", "scale"),
            (["lora_weights", 0, "lora_name"], "lora_name", "name"),
            (["textual_inversions", 0, "trigger_word"], "trigger_word", "token"),
        ],
    )
    def test_names_of_other_apis_are_understood(self, refused, path, given, meant):
        body = {"prompt": "x"}
        body[path[0]] = [{"name": "a", given: 0.5}] if len(path) > 1 else 5
        answer = json.loads(refused(json=body)[1])
        assert [one["loc"] for one in answer["detail"]] == [path]
        assert f"did you mean '{meant}'?" in answer["detail"][0]["msg"]

    @pytest.mark.parametrize("kind", ["json", "data"])
    def test_all_unknown_fields_are_named_with_the_other_faults(self, refused, kind):
        body = {"prompt": "x", "steps": "4", "height": "63", "foo": "1", "cfg_scale": "2"}
        answer = json.loads(refused(**{kind: body})[1])
        places = [tuple(one["loc"]) for one in answer["detail"]]
        assert sorted(places) == [("cfg_scale",), ("foo",), ("height",), ("steps",)]

    def test_a_million_unknown_fields(self, refused):
        body = json.dumps({"prompt": "x", **dict.fromkeys(map(str, range(300_000)), 1)})
        headers = {"content-type": "application/json"}
        answer = json.loads(refused(content=body, headers=headers)[1])
        assert len(answer["detail"]) == 33
        assert answer["detail"][-1]["loc"] == ["body"]

    @pytest.mark.parametrize(
        ("near", "meant"),
        [
            ("DPM++ 2M Karas", "DPM++ 2M Karras"),
            ("dpm++ sde beto", "DPM++ SDE Beta"),
            ("eular a", "Euler a"),
            ("UniPCMultistepShceduler", "UniPCMultistepScheduler"),
        ],
    )
    def test_the_nearest_of_all_schedulers_is_suggested(self, refused, near, meant):
        text = json.loads(refused(field="scheduler", json={"prompt": "x", "scheduler": near})[1])
        assert f"did you mean '{meant}'" in text["error"]

    def test_json_that_would_grow_when_it_is_parsed(self, refused):
        content = b'{"prompt": [' + b"[]," * 2**20 + b"[]]}"
        headers = {"content-type": "application/json"}
        status, text = refused(field="body", content=content, headers=headers)
        assert status == 400
        assert "too many lists" in text

    @pytest.mark.parametrize(("path", "mebibytes"), [("/txt2img", 9), ("/img2img", 60)])
    def test_body_without_end(self, server, path, mebibytes):
        """Sent in chunks, so that no header says how much there will be."""
        head = b'--x\r\ncontent-disposition: form-data; name="image"; filename="a"\r\n\r\n'
        chunks = itertools.chain([head], (b"x" * 2**20 for _ in range(mebibytes)))
        headers = {"content-type": "multipart/form-data; boundary=x"}
        answer = server.client.post(path, content=chunks, headers=headers)
        assert answer.status_code == 400
        assert answer.json()["detail"][0]["loc"] == ["body"]

    @pytest.mark.parametrize("parameters", ["", "; boundary=x"])
    def test_broken_form(self, refused, parameters):
        headers = {"content-type": f"multipart/form-data{parameters}"}
        assert refused("/img2img", content=b"no form", headers=headers)[0] == 400

    def test_prompt_of_a_refused_request_is_not_logged(self, server, refused):
        refused(json={"prompt": "my secret dream", "height": 63})
        refused("/img2img", json={"prompt": "my secret dream"})
        assert "secret dream" not in server.log

    def test_it_is_counted_and_logs_no_traceback(self, server, refused):
        def count():
            found = re.findall(
                r'requests_total{outcome="invalid",task="txt2img"} (.*)',
                server.client.get("/metrics").text,
            )
            return float(found[0]) if found else 0.0

        before = count()
        refused(json={"prompt": "a red circle", "height": 63})
        refused(json={"prompt": "a red circle", "lora_weights": [{"name": "tiny-lara"}]})
        assert count() == before + 2
        assert "Traceback" not in server.log

    def test_many_wrong_fields(self, refused):
        body = {"prompt": 5, "seed": -2, "height": 63, "width": 63, "scheduler": 1}
        status, text = refused(json=body)
        assert status == 400
        answer = json.loads(text)
        assert {one["loc"][0] for one in answer["detail"]} == set(body)
        assert answer["error"].endswith("; and 2 more")


class TestBadImages:
    def refuse(self, refused, data, name="a.png", media_type="image/png"):
        files = {"image": (name, data, media_type)}
        status, text = refused("/img2img", field="image", files=files, data=FORM)
        assert status == 400
        return text

    def test_no_image(self, refused):
        assert refused("/img2img", field="image", json={"prompt": "a"})[0] == 400

    def test_broken(self, refused, encode):
        assert "broken" in self.refuse(refused, encode()[:60])

    def test_text_file(self, refused):
        text = self.refuse(refused, b"I am no image", "a.txt", "text/plain")
        assert "not an image" in text

    def test_empty_file(self, refused):
        self.refuse(refused, b"")

    def test_two_images(self, refused, encode):
        files = [("image", ("a.png", encode(), "image/png"))] * 2
        assert refused("/img2img", field="image", files=files, data=FORM)[0] == 400

    @pytest.mark.parametrize("side", [3_000, 50_000])
    def test_enormous_image_is_refused_by_its_header(self, refused, side):
        text = self.refuse(refused, png_header(side))
        assert "pixels" in text

    def test_image_of_one_pixel(self, refused, encode):
        self.refuse(refused, encode(size=(1, 1)))

    def test_enormous_file(self, refused):
        self.refuse(refused, bytes(33 * 1024 * 1024))

    def test_address_is_never_fetched(self, refused):
        with socket.create_server(("127.0.0.1", 0)) as listener:
            address = f"http://127.0.0.1:{listener.getsockname()[1]}/a.png"
            form = {"image": (None, address), "prompt": (None, "a")}
            refused("/img2img", field="image", files=form)
            refused("/img2img", field="image", data={**FORM, "image": address})
            refused("/img2img", field="image", json={"prompt": "a", "image": address})
            connected, _, _ = select.select([listener], [], [], 0.5)
        assert not connected


def png_header(side):
    """A PNG that says it has side x side pixels, and has almost none."""

    def chunk(kind, data):
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def latents_file(*shape, fill=None):
    latents = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    return safetensors.torch.save({"latents": latents if fill is None else latents + fill})


def test_given_latents_decide_the_image(server):
    size = {"height": 32, "width": 32}
    file = latents_file(1, 4, 4, 4)
    images = [
        server.generate(**size, seed=seed, latents=base64.b64encode(file).decode())
        for seed in (1, 2)
    ]
    assert images[0] == images[1] != server.generate(**size, seed=1)


@pytest.mark.parametrize(
    ("latents", "size", "said"),
    [
        (latents_file(1, 4, 4, 4), {}, "needs height and width beside it"),
        (latents_file(1, 4, 8, 8), {"height": 32, "width": 32}, "shape (1, 4, 4, 4)"),
        (latents_file(2, 4, 4, 4), {"height": 32, "width": 32}, "shape (1, 4, 4, 4)"),
        (latents_file(1, 4, 4, 4, fill=torch.nan), {"height": 32, "width": 32}, "finite"),
        (b"no safetensors", {"height": 32, "width": 32}, "no safetensors file"),
    ],
    ids=["no-size", "other-size", "two", "nan", "junk"],
)
def test_wrong_latents_are_refused(refused, latents, size, said):
    body = {"prompt": "x", **size, "latents": base64.b64encode(latents).decode()}
    status, text = refused(field="latents", json=body)
    assert status == 400
    assert said in text


def test_client_that_goes_away_frees_the_server(server, plain):
    with pytest.raises(httpx.ReadTimeout):
        server.client.post("/txt2img", json=SLOW, timeout=1)
    server.wait_for_metric(r'outcome="cancelled",task="txt2img"\} 1\.0$')
    assert server.generate() == plain


def test_example_client(server, tmp_path, plain, open_image):
    first, second = tmp_path / "first.png", tmp_path / "second.png"
    script = [sys.executable, str(ROOT / "examples" / "client.py"), "--url", server.url]
    options = ["--num-inference-steps", "4", "--seed", "1"]
    subprocess.run([*script, "a red circle", *options, "--output", first], check=True)
    assert first.read_bytes() == plain
    subprocess.run(
        [*script, "a blue star", *options, "--image", first, "--output", second], check=True
    )
    assert open_image(second.read_bytes()).size == (32, 32)
    assert second.read_bytes() != first.read_bytes()


class TestOpenApi:
    @pytest.fixture(scope="class")
    def document(self, server):
        return server.client.get("/docs.json").json()

    @pytest.mark.parametrize("path", ["/txt2img", "/img2img", "/inpaint"])
    def test_every_field_is_described(self, document, path):
        bodies = document["paths"][path]["post"]["requestBody"]["content"]
        has_file = path != "/txt2img"
        assert next(iter(bodies)) == ("multipart/form-data" if has_file else "application/json")
        form, schema = (
            resolve(document, bodies[name]["schema"])
            for name in ("multipart/form-data", "application/json")
        )
        assert list(form["properties"]) == list(schema["properties"])
        assert (form["properties"].get("image", {}).get("format") == "binary") == has_file
        assert document["paths"][path]["post"]["description"]
        assert schema["required"][0] == "prompt"
        for name, field in schema["properties"].items():
            assert field.get("description"), name
            assert "default" in field or "example" in field or name in ("image", "mask_image")
            text = json.dumps(field)
            if '"integer"' in text or '"number"' in text:
                assert '"minimum"' in text or '"exclusiveMinimum"' in text, name
                assert '"maximum"' in text, name

    def test_headers_of_the_answer_are_described(self, document, server):
        body = {"prompt": "a (red:1.4) circle", "num_inference_steps": 1}
        answer = server.client.post("/txt2img", json=body)
        sent = {name for name in answer.headers if name.startswith("x-")}
        for path in ("/txt2img", "/img2img", "/inpaint", "/replay"):
            headers = document["paths"][path]["post"]["responses"]["200"]["headers"]
            assert sent - {"x-bentoml-request-id"} <= set(headers)
            assert ("x-workflow-match" in headers) == (path == "/replay")
            assert all(one["description"] and one["schema"] for one in headers.values())


def resolve(document, schema):
    while "$ref" in schema:
        schema = document["components"]["schemas"][schema["$ref"].rpartition("/")[2]]
    return schema


def test_page_for_people(server):
    assert server.client.get("/").status_code == 200
