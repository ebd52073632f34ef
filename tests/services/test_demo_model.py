"""`bentoml diffusers demo`: images of the bundled model show what their prompts say."""

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
from processes import ROOT

from bentoml_diffusers.demo import PROMPTS

# The model was measured with these; see its README.
SETTINGS = {"num_inference_steps": 20, "seed": 1}


@pytest.fixture
def server(demo_server):
    return demo_server


@pytest.fixture
def judge(monkeypatch, open_image):
    """Says what the image in the body of an answer shows."""
    monkeypatch.syspath_prepend(ROOT)
    from tools.demo_model.judge import judge_image

    return lambda body: judge_image(open_image(body))


def test_image_shows_what_the_prompt_says(server, judge):
    seen = judge(server.generate(prompt=PROMPTS[0], **SETTINGS))
    assert PROMPTS[0] == "a big red circle on a blue background at the left"
    assert (seen.size, seen.colour, seen.shape) == ("big", "red", "circle")
    assert (seen.background, seen.position) == ("blue", "left")


def test_loras_are_seen_where_they_were_asked_for_in_one_batch(server, judge):
    """Four clients at once: each gets its own LoRA, and only that."""
    plain = server.generate(prompt=PROMPTS[0], **SETTINGS)
    wishes = {"solid": None, "outline": [{"name": "outline"}], "stripes": [{"name": "stripes"}]}

    def style_of(name):
        return judge(
            server.generate(prompt=PROMPTS[0], lora_weights=wishes[name], **SETTINGS)
        ).style

    with ThreadPoolExecutor(len(wishes)) as clients:
        assert dict(zip(wishes, clients.map(style_of, wishes), strict=True)) == {
            name: name for name in wishes
        }
    assert server.generate(prompt=PROMPTS[0], **SETTINGS) == plain


def test_a_word_for_a_colour_is_known_to_its_request_only(server, judge):
    prompt = "a big <teal> square on a white background in the centre"
    teal = {"textual_inversions": [{"name": "teal", "token": "<teal>"}]}
    assert judge(server.generate(prompt=prompt, **teal, **SETTINGS)).colour == "teal"
    assert judge(server.generate(prompt=prompt, **SETTINGS)).colour != "teal"


def test_the_command_line_lists_what_is_loaded(server):
    server.generate(prompt=PROMPTS[0], lora_weights=[{"name": "outline"}], **SETTINGS)
    command = [sys.executable, "-m", "bentoml", "diffusers", "lora", "list", "--loaded", "--url"]
    shown = subprocess.run([*command, server.url], capture_output=True, text=True, check=True)
    lines = dict(line.split(maxsplit=1) for line in shown.stdout.splitlines())
    assert "stripes" in lines["LoRAs"]
    assert "teal" in lines["embeddings"]
    assert "outline" in shown.stdout.partition("in slots")[2]
    nobody = subprocess.run([*command, "http://127.0.0.1:9"], capture_output=True, text=True)
    assert nobody.returncode == 1
    assert "no service of this package responds at http://127.0.0.1:9" in nobody.stderr


def test_command_that_is_printed_works(server):
    printed = server.log
    assert f"curl {server.url.replace('127.0.0.1', 'localhost')}/txt2img" in printed
    body = printed.partition("-d '")[2].partition("'")[0]
    assert server.client.post("/txt2img", json=json.loads(body)).status_code == 200
