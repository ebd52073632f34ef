"""`bentoml diffusers demo`: pictures of the bundled model show what their prompts say."""

import json

import pytest
from processes import ROOT

from bentoml_diffusers.demo import PROMPTS

# The model was measured with these; see its README.
SETTINGS = {"num_inference_steps": 20, "seed": 1}


@pytest.fixture(scope="module")
def server(serve, make_home):
    with serve(home=make_home(), command=("diffusers", "demo")) as running:
        yield running


@pytest.fixture
def judge(monkeypatch, open_picture):
    """Says what the picture in the body of an answer shows."""
    monkeypatch.syspath_prepend(ROOT)
    from tools.demo_model.judge import judge_picture

    return lambda body: judge_picture(open_picture(body))


def test_picture_shows_what_the_prompt_says(server, judge):
    seen = judge(server.paint(prompt=PROMPTS[0], **SETTINGS))
    assert PROMPTS[0] == "a big red circle on a blue background at the left"
    assert (seen.colour, seen.background) == ("red", "blue")


def test_lora_changes_the_picture_of_its_request_only(server):
    plain = server.paint(prompt=PROMPTS[0], **SETTINGS)
    for name in ("outline", "stripes"):
        body = server.paint(prompt=PROMPTS[0], lora_weights=[{"name": name}], **SETTINGS)
        assert body != plain, name
    assert server.paint(prompt=PROMPTS[0], **SETTINGS) == plain


def test_command_that_is_printed_works(server):
    printed = server.log
    assert f"curl {server.url.replace('127.0.0.1', 'localhost')}/txt2img" in printed
    body = printed.partition("-d '")[2].partition("'")[0]
    assert server.client.post("/txt2img", json=json.loads(body)).status_code == 200
