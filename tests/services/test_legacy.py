"""The services of BentoML's documentation, with runners in processes of their own."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from processes import ENDLESS

ONE_API_PROCESS = ("--api-workers", "1")


@pytest.fixture(scope="module")
def simple(serve, tiny_home, tmp_path_factory):
    config = tmp_path_factory.mktemp("config") / "configuration.yaml"
    config.write_text("runners: {traffic: {timeout: 8}}")
    target = ("legacy_txt2img:svc", *ONE_API_PROCESS)
    with serve(*target, home=tiny_home, BENTOML_CONFIG=str(config)) as running:
        yield running


@pytest.fixture(scope="module")
def mega(serve, tiny_home):
    with serve("legacy_mega:svc", *ONE_API_PROCESS, home=tiny_home) as running:
        yield running


def refuse(server, status, *words, **body):
    """Posts what must be refused; an error that hangs comes as the timeout of the runner, a 5xx."""
    answer = server.client.post("/txt2img", **body)
    assert answer.status_code == status, answer.text
    assert "Traceback" not in answer.text
    for word in words:
        assert word in answer.text


def test_log_of_the_start_is_a_line_for_each_stage(simple, tiny_model):
    simple.check_loading(tiny_model.tag)


class TestSimple:
    def test_image(self, simple, open_image):
        image = open_image(simple.generate())
        assert (image.format, image.size) == ("JPEG", (32, 32))

    def test_same_request_same_bytes(self, simple):
        assert simple.generate() == simple.generate()
        assert simple.generate() != simple.generate(prompt="a blue star")
        assert simple.generate() != simple.generate(seed=2)

    def test_lora_of_one_request(self, simple):
        plain = simple.generate()
        assert simple.generate(lora_weights="tiny-lora") != plain
        assert simple.generate(lora_weights={"model_name": "tiny-lora", "scale": 0.5}) != plain
        assert simple.generate() == plain

    @pytest.mark.parametrize(
        ("field", "value"),
        [
            ("height", 63),
            ("num_inference_steps", 0),
            ("num_inference_steps", 10_000),
            ("num_inference_steps", "many"),
            ("guidance_scale", "high"),
            ("prompt", None),
            ("prompt", 5),
            ("heigth", 64),
            ("scheduler", "os.system"),
            ("lora_weights", "/etc/passwd"),
            ("lora_weights", "../../etc/passwd"),
        ],
    )
    def test_error_of_the_runner_comes_back_at_once(self, simple, field, value):
        refuse(simple, 400, field, json={"prompt": "a red circle", field: value})

    def test_unknown_lora(self, simple):
        body = {"prompt": "a red circle", "lora_weights": "tiny-lara"}
        refuse(simple, 404, "did you mean 'tiny-lora'?", json=body)

    def test_what_the_caller_did_wrong_is_one_line_of_the_log(self, simple):
        before = len(simple.log)
        refuse(simple, 400, json={"prompt": "a red circle", "height": 63})
        refuse(simple, 404, json={"prompt": "a red circle", "lora_weights": "no-lora"})
        assert "Traceback" not in simple.log[before:]
        assert simple.log[before:].count("Exception on /txt2img") == 2

    def test_no_json(self, simple):
        headers = {"content-type": "application/json"}
        refuse(simple, 400, "JSON", content=b"{prompt", headers=headers)

    def test_requests_at_once_are_as_alone(self, simple, open_image):
        requests = [
            {"seed": 1},
            {"seed": 2, "lora_weights": "tiny-lora"},
            {"seed": 3, "scheduler": "EulerDiscreteScheduler"},
        ]
        alone = [simple.generate(**fields) for fields in requests]
        with ThreadPoolExecutor(len(requests)) as pool:
            together = list(pool.map(lambda fields: simple.generate(**fields), requests))
        for one, other in zip(together, alone, strict=True):
            pixels = [np.asarray(open_image(body)).astype(int) for body in (one, other)]
            # One level of a shared forward is a few where JPEG rounds its waves the other way.
            assert np.abs(pixels[0] - pixels[1]).mean() < 1

    def test_timeout_of_the_runner(self, simple):
        plain = simple.generate()
        # BentoML's own timeout, a 500, mostly comes before that of the engine.
        assert simple.client.post("/txt2img", json=ENDLESS).status_code in (500, 504)
        assert simple.generate() == plain  # within the client's own timeout: the device is free

    def test_images_come_after_errors(self, simple):
        plain = simple.generate()
        refuse(simple, 400, json={"prompt": "a red circle", "height": 63})
        assert simple.generate() == plain


class TestMega:
    def generate_over(self, server, image, media_type="image/png", seed=1):
        data = f'{{"prompt": "a blue star", "num_inference_steps": 4, "seed": {seed}}}'
        answer = server.client.post(
            "/img2img",
            files={"img": ("a", image, media_type), "data": (None, data, "application/json")},
        )
        assert answer.status_code == 200, answer.text
        return answer.content

    def test_both_tasks(self, mega, encode, open_image):
        first = mega.generate()
        assert open_image(first).size == (32, 32)
        over_first = self.generate_over(mega, first, "image/jpeg")
        over_other = self.generate_over(mega, encode())
        assert over_first != over_other
        assert self.generate_over(mega, first, "image/jpeg") == over_first
        assert mega.generate() == first

    @pytest.mark.parametrize(
        ("image_format", "mode"),
        [("PNG", "RGBA"), ("PNG", "P"), ("PNG", "L"), ("JPEG", "RGB"), ("GIF", "P"), ("BMP", "L")],
    )
    def test_images_of_any_making(self, mega, encode, open_image, image_format, mode):
        image = encode(image_format, mode)
        generated = self.generate_over(mega, image, f"image/{image_format.lower()}")
        assert open_image(generated).size == (32, 32)

    def test_size_that_is_no_multiple_of_8(self, mega, encode, open_image):
        assert open_image(self.generate_over(mega, encode(size=(47, 33)))).size == (40, 32)

    def test_error_names_the_field(self, mega):
        refuse(mega, 400, "height", json={"prompt": "a red circle", "height": 63})
