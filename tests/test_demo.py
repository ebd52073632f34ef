"""The bundled demo model, in this process. Its quality is measured in its card."""

from pathlib import Path

import pytest
from diffusers import StableDiffusionPipeline

import bentoml_diffusers
from bentoml_diffusers import demo

ROOT = Path(__file__).parent.parent
CALL = {"num_inference_steps": 15, "guidance_scale": 5.0}
SCENES = [
    ("big", "red", "circle", "blue", "left"),
    ("big", "yellow", "star", "black", "right"),
    ("big", "green", "square", "white", "centre"),
    ("big", "purple", "triangle", "yellow", "centre"),
    ("big", "white", "circle", "red", "right"),
    ("small", "blue", "square", "orange", "left"),
]


@pytest.fixture(scope="module")
def engine():
    models = bentoml_diffusers.import_demo_models()
    with bentoml_diffusers.Engine.from_model(models["demo"], device="cpu") as engine:
        yield engine


@pytest.fixture
def judge(monkeypatch):
    monkeypatch.syspath_prepend(ROOT)
    from tools.demo_model.judge import judge_image

    return judge_image


@pytest.fixture
def scenes(monkeypatch):
    monkeypatch.syspath_prepend(ROOT)
    from tools.demo_model.shapes import Scene

    return [Scene(*properties) for properties in SCENES]


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


def generate(engine, scenes, **more):
    prompts = [scene.prompt for scene in scenes]
    return engine.run("txt2img", prompt=prompts, seed=1, **CALL, **more).images


def test_images_show_what_their_prompts_say(engine, judge, scenes):
    marks = [
        judge(image).agrees_with(scene)
        for image, scene in zip(generate(engine, scenes), scenes, strict=True)
    ]
    for name in ("background", "colour", "position", "size"):
        assert all(mark[name] for mark in marks), name
    assert sum(mark["shape"] for mark in marks) >= len(marks) - 1  # by the card, 9 in 10


@pytest.mark.parametrize("name", ["outline", "stripes"])
def test_each_lora_draws_in_its_style_and_goes(engine, judge, scenes, pixels, name):
    plain = generate(engine, scenes)
    assert all(judge(image).style == "solid" for image in plain)
    styles = [judge(image).style for image in generate(engine, scenes, lora_weights=name)]
    assert styles.count(name) >= len(scenes) - 1
    for first, second in zip(plain, generate(engine, scenes), strict=True):
        assert (pixels(first) == pixels(second)).all()


def test_the_new_word_generates_its_colour(judge):
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
        images = engine.run("txt2img", prompt=prompts, **call).images
        other = [prompt.replace(demo.TOKEN, "red") for prompt in prompts[:2]]
        red = engine.run("txt2img", prompt=other, **call).images
    assert sum(judge(image).colour == "teal" for image in images) >= 4  # 85 % by the card
    assert [judge(image).colour for image in red] == ["red", "red"]
