"""The bundled demo model, in this process. Its quality is measured in its card."""

from pathlib import Path

import pytest
from diffusers import StableDiffusionPipeline

import bentoml_diffusers
from bentoml_diffusers import demo

ROOT = Path(__file__).parent.parent
CALL = {"num_inference_steps": 15, "guidance_scale": 5.0}
SCENES = {
    "a big red circle on a blue background at the left": ("red", "blue"),
    "a big yellow star on a black background at the right": ("yellow", "black"),
    "a big green square on a white background in the centre": ("green", "white"),
    "a big purple triangle on a yellow background in the centre": ("purple", "yellow"),
    "a big white circle on a red background at the right": ("white", "red"),
    "a big blue square on a orange background at the left": ("blue", "orange"),
}


@pytest.fixture(scope="module")
def engine():
    models = bentoml_diffusers.import_demo_models()
    with bentoml_diffusers.Engine.from_model(models["demo"], device="cpu") as engine:
        yield engine


@pytest.fixture
def judge(monkeypatch):
    monkeypatch.syspath_prepend(ROOT)
    from tools.demo_model.judge import judge_picture

    return judge_picture


def test_all_files_together_are_small():
    files = [path for path in Path(demo.__file__).parent.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 20 * 1024 * 1024


def test_it_loads_with_plain_diffusers():
    pipeline = StableDiffusionPipeline.from_pretrained(demo.PIPELINE)
    assert len(pipeline.tokenizer) > 200  # its words, not the two tokens of an empty one
    assert pipeline.tokenizer.tokenize("red circle") == ["red</w>", "circle</w>"]


def test_importing_again_gives_the_same_models():
    first = bentoml_diffusers.import_demo_models()
    again = bentoml_diffusers.import_demo_models()
    assert {name: model.tag for name, model in first.items()} == {
        name: model.tag for name, model in again.items()
    }
    assert set(first) == {"demo", "outline", "stripes", "teal"}


def test_pictures_have_the_colours_of_their_prompts(engine, judge):
    pictures = engine.run("txt2img", prompt=list(SCENES), seed=1, **CALL).images
    seen = [judge(picture) for picture in pictures]
    expected = list(SCENES.values())
    assert [one.background for one in seen] == [background for _, background in expected]
    right = [one.colour == colour for one, (colour, _) in zip(seen, expected, strict=True)]
    assert sum(right) >= len(right) - 1  # at least 95 % of many prompts, by the card


@pytest.mark.parametrize("name", ["outline", "stripes"])
def test_each_lora_changes_the_picture_and_goes(engine, pixels, name):
    call = {"prompt": next(iter(SCENES)), "seed": 1, **CALL}
    plain = pixels(engine.run("txt2img", **call).images[0])
    styled = pixels(engine.run("txt2img", **call, lora_weights=name).images[0])
    assert abs(styled - plain).mean() > 3
    assert (pixels(engine.run("txt2img", **call).images[0]) == plain).all()


def test_the_new_word_paints_its_colour(judge):
    scenes = [
        ("square", "black", "in the centre"),
        ("star", "purple", "at the right"),
        ("triangle", "orange", "in the centre"),
        ("square", "blue", "at the right"),
        ("circle", "red", "at the right"),
        ("circle", "white", "in the centre"),
    ]
    prompts = [
        f"a big {demo.TOKEN} {shape} on a {background} background {place}"
        for shape, background, place in scenes
    ]
    call = {"num_inference_steps": 15, "guidance_scale": 4.0, "seed": 1}
    with bentoml_diffusers.Engine.from_model(
        "demo", device="cpu", textual_inversions="teal"
    ) as engine:
        pictures = engine.run("txt2img", prompt=prompts, **call).images
        other = [prompt.replace(demo.TOKEN, "red") for prompt in prompts[:2]]
        red = engine.run("txt2img", prompt=other, **call).images
    assert sum(judge(picture).colour == "teal" for picture in pictures) >= 4  # 85 % by the card
    assert [judge(picture).colour for picture in red] == ["red", "red"]
