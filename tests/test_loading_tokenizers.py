"""A model whose tokenizer tells no prompts apart is refused at load; no other one is."""

from types import SimpleNamespace

import pytest
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers
from transformers import (
    ByT5Tokenizer,
    CanineTokenizer,
    CLIPTokenizer,
    PreTrainedTokenizerFast,
)

import bentoml_diffusers
from bentoml_diffusers import errors, testing
from bentoml_diffusers.loading.tokenizers import check_tokenizers

_MARKS = {"<|startoftext|>": 0, "<|endoftext|>": 1}


def word_level(words, normalizer=None):
    vocabulary = {word: index for index, word in enumerate(["<unk>", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


def characters(alphabet):
    tokenizer = Tokenizer(models.WordLevel({"?": 0, **alphabet}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="?")


def without_words():
    """What transformers makes of files that it does not understand: no word, and no error."""
    return CLIPTokenizer(vocab=dict(_MARKS), merges=[])


def one_for_all():
    return word_level(["a", "b"], normalizers.Replace(Regex(".+"), "a"))


@pytest.mark.parametrize("make", [without_words, one_for_all])
def test_a_tokenizer_that_tells_no_prompts_apart_is_refused(make):
    pipeline = SimpleNamespace(components={"tokenizer": testing.tiny_tokenizer(), "other": make()})
    with pytest.raises(errors.InvalidModel, match=r"has a other .* for all prompts; .* again"):
        check_tokenizers(pipeline, "demo:1")


def test_also_inside_a_processor():
    processor = SimpleNamespace(tokenizer=without_words())
    with pytest.raises(errors.InvalidModel, match="has a processor"):
        check_tokenizers(SimpleNamespace(components={"processor": processor}), "demo:1")


@pytest.mark.parametrize(
    "make",
    [
        testing.tiny_tokenizer,
        testing.tiny_t5_tokenizer,
        ByT5Tokenizer,
        CanineTokenizer,
        lambda: word_level(["红色圆圈", "蓝星"]),
        lambda: word_level(["cat", "dog"]),  # none of the words of the self-test
        lambda: characters({"क": 1, "ख": 2}),
        lambda: "no tokenizer of transformers",
        lambda: None,
    ],
)
def test_any_other_passes(make):
    check_tokenizers(SimpleNamespace(components={"tokenizer": make()}), "demo:1")


def test_a_stored_model_is_refused_at_load(tmp_path, name):
    pipeline = testing.tiny_stable_diffusion()
    pipeline.tokenizer = without_words()
    pipeline.save_pretrained(tmp_path)
    model = bentoml_diffusers.import_model(name, tmp_path)
    for load in (bentoml_diffusers.load_model, bentoml_diffusers.Engine.from_model):
        with pytest.raises(errors.InvalidModel, match=rf"{name}.*tokenizer \(CLIPTokenizer\)"):
            load(model)


@pytest.mark.parametrize("make", [name for name in testing.__all__ if name.startswith("tiny_")])
def test_every_tiny_pipeline_passes(make):
    made = getattr(testing, make)()
    if hasattr(made, "components"):
        check_tokenizers(made, "tiny:1")
