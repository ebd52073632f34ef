"""What was not done as it was written is said: cut prompts, foreign syntax, flagged images."""

import json
import pickle
from concurrent.futures import ThreadPoolExecutor

import diffusers
import numpy as np
import pytest
import torch
from diffusers.pipelines.stable_diffusion import StableDiffusionSafetyChecker
from transformers import CLIPConfig, CLIPImageProcessor

import bentoml_diffusers
from bentoml_diffusers import Engine, testing
from bentoml_diffusers.engine.forwards import splitting
from bentoml_diffusers.serving.answers import _as_header

SMALL = {"num_inference_steps": 1}
LIMIT = 24  # of the tiny CLIP tokenizers
LONG = "a red circle on the left " * 6


@pytest.fixture(scope="module")
def engine():
    with Engine(testing.tiny_stable_diffusion()) as running:
        yield running


def warnings_of(engine, prompt, **arguments):
    return engine.run("txt2img", prompt=prompt, **SMALL, **arguments).warnings


class TestCutPrompts:
    def test_nothing_is_said_of_what_is_read(self, engine):
        assert warnings_of(engine, "a red circle", negative_prompt="blue") == ()
        tokenizer = engine.pipeline.tokenizer
        whole = " ".join(["red"] * (LIMIT - 2))
        assert len(tokenizer(whole).input_ids) == LIMIT
        assert warnings_of(engine, whole) == ()
        assert len(warnings_of(engine, f"{whole} red")) == 1

    def test_the_tokens_that_were_cut(self, engine):
        text = " ".join(["red"] * (LIMIT - 2) + ["blue", "star"])
        (said,) = warnings_of(engine, text)
        assert said == (
            f"prompt: text_encoder reads {LIMIT} tokens, the last 2 of {LIMIT + 2} were cut: "
            "'blue star'"
        )

    def test_negative_prompts_and_lists(self, engine):
        said = warnings_of(engine, ["a", LONG], negative_prompt=["b", LONG])
        assert [one.partition(":")[0] for one in said] == ["prompt", "negative_prompt"]

    def test_the_image_is_that_of_the_prompt_that_was_read(self, engine):
        """What the warning says is cut, is."""
        text = " ".join(["red"] * (LIMIT - 2))
        images = [
            engine.run("txt2img", prompt=prompt, seed=1, **SMALL).images[0]
            for prompt in (text, f"{text} blue star")
        ]
        assert images[0].tobytes() == images[1].tobytes()

    def test_each_encoder_has_its_length(self):
        with Engine(testing.tiny_flux()) as engine:
            call = {"height": 32, "width": 32, "max_sequence_length": 30}
            said = warnings_of(engine, LONG, **call)
            assert [one.split(" reads ")[0] for one in said] == [
                "prompt: text_encoder",
                "prompt: text_encoder_2",
            ]
            assert f"reads {LIMIT} tokens" in said[0]
            assert "reads 30 tokens" in said[1]
            (only_clip,) = warnings_of(engine, LONG, **{**call, "max_sequence_length": 512})
            assert only_clip == said[0]
            (second,) = warnings_of(engine, "a", prompt_2=LONG, **call)
            assert second.startswith("prompt_2: text_encoder_2 reads 30")

    def test_both_encoders_of_sdxl_and_of_its_blocks(self):
        for pipeline, task in (
            (testing.tiny_stable_diffusion_xl(), "txt2img"),
            (testing.tiny_modular_stable_diffusion_xl(), "text2image"),
        ):
            with Engine(pipeline) as engine:
                said = engine.run(task, prompt=LONG, **SMALL).warnings
            assert [one.split(" reads ")[0] for one in said] == [
                "prompt: text_encoder",
                "prompt: text_encoder_2",
            ]

    def test_a_lone_run_is_still_that_of_the_pipeline(self, engine):
        """Counting tokens leaves no padding or length behind in a tokenizer."""
        plain = testing.tiny_stable_diffusion()
        plain.set_progress_bar_config(disable=True)
        for prompt in (LONG, "a blue star"):
            expected = plain(prompt, generator=torch.Generator().manual_seed(1), **SMALL).images[0]
            got = engine.run("txt2img", prompt=prompt, seed=1, **SMALL).images[0]
            assert got.tobytes() == expected.tobytes()


class TestSyntax:
    @pytest.mark.parametrize(
        ("prompt", "part"),
        [
            ("a (red:1.4) star", "'(red:1.4)'"),
            ("a (red: .5 ) star", "'(red: .5 )'"),
            ("a <lora:x:0.8>", "'<lora:x:0.8>'"),
            ("a <hypernet:x:1>", "'<hypernet:x:1>'"),
            ("a [red:blue:0.5]", "'[red:blue:0.5]'"),
            ("a ((red)) star", "'((red))'"),
        ],
    )
    def test_what_others_read_as_syntax(self, engine, prompt, part):
        (said,) = warnings_of(engine, prompt)
        assert said.startswith(f"prompt: {part} was read as plain letters: ")

    @pytest.mark.parametrize(
        "prompt",
        ["a red (big) star", "<teal> star", "a star :) (see: it)", r"a \(red:1.4\) star", "[a, b]"],
    )
    def test_what_is_plain(self, engine, prompt):
        assert warnings_of(engine, prompt) == ()

    def test_it_is_read_in_a_moment(self, engine):
        for text in ("(" * 2000, "(a:" * 600, "[:" * 1000, "<a:" * 600, "((" * 1000 + "))" * 1000):
            assert isinstance(warnings_of(engine, text), tuple)

    def test_code_from_elsewhere_may_read_it(self):
        class Weighted(diffusers.StableDiffusionPipeline):
            pass

        parts = testing.tiny_stable_diffusion().components
        with Engine(Weighted(**parts, requires_safety_checker=False)) as engine:
            assert engine.run("__call__", prompt=f"(red:1.4) {LONG}", **SMALL).warnings == ()


def make_checker(threshold):
    """A safety checker that flags an image if any score is above a threshold."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        tiny = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1,
                "num_attention_heads": 1}  # fmt: skip
        vision = {**tiny, "image_size": 32, "patch_size": 8}
        checker = StableDiffusionSafetyChecker(
            CLIPConfig(text_config=tiny, vision_config=vision, projection_dim=8)
        )
        checker.concept_embeds.data = torch.randn(17, 8)
    checker.special_care_embeds_weights.data.fill_(2.0)
    checker.concept_embeds_weights.data.fill_(threshold)
    return checker.eval()


def with_checker(threshold):
    parts = testing.tiny_stable_diffusion().components
    size = {"height": 32, "width": 32}
    parts["safety_checker"] = make_checker(threshold)
    parts["feature_extractor"] = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=size)
    return diffusers.StableDiffusionPipeline(**parts)


class TestFlaggedImages:
    @pytest.mark.parametrize(("threshold", "is_flagged"), [(-2.0, True), (2.0, False)])
    def test_the_result_says_so(self, threshold, is_flagged):
        with Engine(with_checker(threshold)) as engine:
            result = engine.run("txt2img", prompt="a", num_images_per_prompt=2, **SMALL)
            plain = engine.run("txt2img", prompt="a", return_dict=False, **SMALL)
        assert result.nsfw_content_detected == (is_flagged,) * 2
        assert plain.nsfw_content_detected == (is_flagged,)
        assert [one.partition(":")[0] for one in result.warnings] == (
            ["image 1", "image 2"] if is_flagged else []
        )
        assert (np.asarray(result.images[0]).max() == 0) == is_flagged
        assert pickle.loads(pickle.dumps(result)).nsfw_content_detected == (is_flagged,) * 2

    def test_without_a_checker_nothing_is_said(self, engine):
        result = engine.run("txt2img", prompt="a", return_dict=False, **SMALL)
        assert result.nsfw_content_detected == ()

    def test_requests_at_once_have_flags_of_their_own(self):
        """A threshold between two images flags one of them, alone as beside the other."""
        pipeline = with_checker(2.0)
        seeds = range(8)
        with Engine(pipeline) as engine:
            scores = []
            handle = pipeline.safety_checker.register_forward_hook(
                lambda _module, args, kwargs, _out: scores.append(_score(pipeline, kwargs)),
                with_kwargs=True,
            )
            for seed in seeds:
                engine.run("txt2img", prompt="a", seed=seed, **SMALL)
            handle.remove()
            middle = sorted(scores)
            threshold = (middle[3] + middle[4]) / 2
            pipeline.safety_checker.concept_embeds_weights.data.fill_(threshold)
            alone = [engine.run("txt2img", prompt="a", seed=seed, **SMALL) for seed in seeds]
            assert len({one.nsfw_content_detected for one in alone}) == 2
            with ThreadPoolExecutor(len(seeds)) as callers:
                together = list(
                    callers.map(
                        lambda seed: engine.run("txt2img", prompt="a", seed=seed, **SMALL), seeds
                    )
                )
        for one, other in zip(alone, together, strict=True):
            assert other.nsfw_content_detected == one.nsfw_content_detected
            levels = [np.asarray(result.images[0]).astype(int) for result in (one, other)]
            assert np.abs(levels[0] - levels[1]).max() <= 1


class TestHttp:
    @pytest.fixture(scope="class", params=[-2.0, 2.0], ids=["flagged", "clean"])
    def client(self, request, open_service):
        model = bentoml_diffusers.save_model("checked", with_checker(request.param))
        with open_service(bentoml_diffusers.service(str(model.tag))) as client:
            client.is_flagged = request.param < 0
            yield client

    def test_headers(self, client):
        body = {"prompt": f"(réd:1.4) {LONG}", **SMALL}
        answer = client.post("/txt2img", json=body)
        assert answer.status_code == 200, answer.text
        assert answer.headers["x-nsfw-content-detected"] == str(client.is_flagged).lower()
        said = json.loads(answer.headers["x-warnings"])
        kinds = [one.split(" ")[0] for one in said]
        assert kinds == ["image"] * client.is_flagged + ["prompt:"] * 2
        assert "'(réd:1.4)'" in " ".join(said)

    def test_nothing_to_say(self, client):
        answer = client.post("/txt2img", json={"prompt": "a red circle", **SMALL})
        assert ("x-warnings" in answer.headers) == client.is_flagged


def test_without_a_checker_no_header_says_that_an_image_is_clean(open_service, model):
    with open_service(bentoml_diffusers.service(str(model.tag))) as client:
        answer = client.post("/txt2img", json={"prompt": "a red circle", **SMALL})
    assert not {"x-warnings", "x-nsfw-content-detected"} & set(answer.headers)


def _score(pipeline, kwargs):
    with torch.no_grad():
        checker = pipeline.safety_checker
        embeds = checker.visual_projection(checker.vision_model(kwargs["clip_input"])[1])
        cosines = torch.nn.functional.cosine_similarity(embeds, checker.concept_embeds)
        return float(cosines.max())


def test_flags_of_a_joint_forward_are_split_by_row():
    output = (torch.zeros(3, 2), [True, False, False])
    parts = splitting.split(output, [1, 2])
    assert [part[1] for part in parts] == [[True], [False, False]]
    with pytest.raises(splitting.NotSplittable, match="perhaps one for each"):
        splitting.split((torch.zeros(3, 2), [1, 2, 3]), [1, 2])
    assert splitting.split((torch.zeros(3, 2), [4, 4]), [1, 2])[1][1] == [4, 4]


@pytest.mark.parametrize(
    "texts", [("a",), ("ä\n\ud800🦁" * 100,) * 16, ("x" * 5000,), ("a" * 600,) * 16], ids=len
)
def test_headers_are_short_and_ascii(texts):
    value = _as_header(texts)
    assert value.isascii()
    assert value.isprintable()
    assert len(value) <= 2048
    assert json.loads(value)
