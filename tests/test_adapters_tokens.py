"""Textual inversions of requests: placeholder tokens, bounded, and nothing of them left."""

import pytest
import torch
from adapter_models import (
    FAMILIES,
    generate,
    generate_alone,
)
from safetensors.torch import save_file

import bentoml_diffusers
from bentoml_diffusers import ModelOptions, errors, testing
from bentoml_diffusers.adapters import AdapterBank
from bentoml_diffusers.demo import PIPELINE, TEXTUAL_INVERSIONS, TOKEN

PROMPT = "a <teal> circle on the left"
WIDTHS = {"text_encoder": 16, "text_encoder_2": 24}


def vectors(count, width=16, seed=1):
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokens")
    save_file({"<teal>": vectors(1)[0]}, folder / "teal.safetensors")
    save_file({"<teal>": vectors(3, seed=2)}, folder / "three.safetensors")
    save_file({"emb_params": vectors(2, seed=3)}, folder / "a1111.safetensors")
    save_file(
        {"clip_l": vectors(2, seed=4), "clip_g": vectors(2, 24, seed=5)},
        folder / "sdxl.safetensors",
    )
    return folder


@pytest.fixture
def pipeline():
    return testing.tiny_stable_diffusion()


@pytest.fixture
def bank(pipeline, folder):
    bank = AdapterBank(pipeline, ModelOptions(lora_dir=str(folder)))
    yield bank
    bank.close()


def asked(name, token=None):
    return {"name": f"{name}.safetensors", **({"token": token} if token else {})}


def generate_by_diffusers(folder, items, prompt, make=testing.tiny_stable_diffusion):
    pipeline = make()
    for item in items:
        pipeline.load_textual_inversion(str(folder / item["name"]), token=item.get("token"))
    return generate(pipeline, prompt=prompt)


def words_of(pipeline):
    tokenizer = pipeline.tokenizer
    return (
        tokenizer.get_vocab(),
        dict(tokenizer.added_tokens_encoder),
        len(tokenizer),
        pipeline.text_encoder.get_input_embeddings().weight.clone(),
        [tokenizer(prompt).input_ids for prompt in (PROMPT, "a <x> star")],
    )


def same_words(one, other):
    return one[:3] == other[:3] and torch.equal(one[3], other[3]) and one[4] == other[4]


@pytest.mark.parametrize(
    ("items", "prompt"),
    [
        ([asked("teal")], PROMPT),
        ([asked("three")], PROMPT),
        ([asked("three", "<other>")], "a <other> star, <other>"),
        ([asked("a1111", "placeholder")], "the placeholder star"),
        ([asked("three", "circle")], "a circle on the left"),
        ([asked("teal"), asked("a1111", "<x>")], "a <teal> star <x>"),
    ],
)
def test_a_word_is_what_diffusers_makes_of_it(pipeline, bank, folder, items, prompt):
    before, plain = words_of(pipeline), generate(pipeline, prompt=prompt)
    if "a1111" in str(items):
        # diffusers reads this layout only as a bare tensor.
        reference = testing.tiny_stable_diffusion()
        for item in items:
            tensor = next(iter(torch_file(folder / item["name"]).values()))
            reference.load_textual_inversion(
                {item.get("token", "<teal>"): tensor}, token=item.get("token")
            )
        theirs = generate(reference, prompt=prompt)
    else:
        theirs = generate_by_diffusers(folder, items, prompt)
    ours = generate_alone(pipeline, bank, None, items, prompt=prompt)
    assert torch.equal(ours, theirs)
    assert (ours - plain).abs().max() > 1e-3
    assert same_words(words_of(pipeline), before)
    assert torch.equal(generate(pipeline, prompt=prompt), plain)


def torch_file(path):
    from safetensors.torch import load_file

    return load_file(path)


def encode(pipeline, bank, lease, prompt):
    tokenizer = (lease.components if lease else {}).get("tokenizer", pipeline.tokenizer)
    text = pipeline.maybe_convert_prompt(prompt, tokenizer)
    return tokenizer(
        text, padding="max_length", max_length=24, truncation=True, return_tensors="pt"
    ).input_ids


def test_the_same_word_of_two_requests_in_one_batch(pipeline, bank):
    finds = [None, asked("teal"), asked("three"), asked("a1111", "<teal>")]
    leases = [bank.acquire(bank.prepare(bank.find(None, one))) for one in finds]
    leases[0] = None
    ids = [encode(pipeline, bank, lease, PROMPT) for lease in leases]
    alone = []
    for lease, one in zip(leases, ids, strict=True):
        with torch.no_grad(), bank.forwarding("text_encoder", [(lease, None)]):
            alone.append(pipeline.text_encoder(one)[0])
    with torch.no_grad(), bank.forwarding("text_encoder", [(lease, 1) for lease in leases]):
        together = pipeline.text_encoder(torch.cat(ids))[0]
    for index, one in enumerate(alone):
        assert (one[0] - together[index]).abs().max() < 1e-5
        assert all((one - other).abs().max() > 1e-3 for other in alone[:index])
    with torch.no_grad():
        assert torch.equal(pipeline.text_encoder(ids[0])[0], alone[0])


def test_both_encoders_of_sdxl(folder):
    pipeline = testing.tiny_stable_diffusion_xl()
    bank = AdapterBank(pipeline, ModelOptions(lora_dir=str(folder)))
    reference = testing.tiny_stable_diffusion_xl()
    file = torch_file(folder / "sdxl.safetensors")
    for part, encoder in (("clip_l", "text_encoder"), ("clip_g", "text_encoder_2")):
        reference.load_textual_inversion(
            file[part],
            token="<teal>",
            text_encoder=getattr(reference, encoder),
            tokenizer=getattr(reference, encoder.replace("text_encoder", "tokenizer")),
        )
    plain = generate(pipeline, prompt=PROMPT)
    ours = generate_alone(pipeline, bank, None, asked("sdxl", "<teal>"), prompt=PROMPT)
    assert torch.equal(ours, generate(reference, prompt=PROMPT))
    assert (ours - plain).abs().max() > 1e-3
    assert torch.equal(generate(pipeline, prompt=PROMPT), plain)
    bank.close()


def test_the_layouts_of_trainers_for_both_encoders(folder, tmp_path):
    """The older of diffusers' trainers counts the encoders; a static embedding is read alike."""
    file = torch_file(folder / "sdxl.safetensors")
    renamed = {"text_encoders_0": file["clip_l"], "text_encoders_1": file["clip_g"]}
    save_file(renamed, tmp_path / "pivotal.safetensors")
    save_file(file, tmp_path / "sdxl.safetensors")
    pipeline = testing.tiny_stable_diffusion_xl()
    bank = AdapterBank(pipeline, ModelOptions(lora_dir=str(tmp_path)))
    images = [
        generate_alone(pipeline, bank, None, asked(name, "<teal>"), prompt=PROMPT)
        for name in ("sdxl", "pivotal")
    ]
    bank.close()
    assert not torch.equal(images[0], generate(pipeline, prompt=PROMPT))
    for name in ("sdxl", "pivotal"):
        static = testing.tiny_stable_diffusion_xl()
        options = {"lora_dir": str(tmp_path), "textual_inversions": asked(name, "<teal>")}
        AdapterBank(static, ModelOptions(**options)).close()
        images.append(generate(static, prompt=PROMPT))
    assert all(torch.equal(image, images[0]) for image in images[1:])


@pytest.mark.parametrize(
    ("make", "tensors", "error"),
    [
        (
            testing.tiny_stable_diffusion_xl,
            {"<x>": (1, 16)},
            "one text encoder.*and text_encoder_2",
        ),
        (testing.tiny_stable_diffusion_xl, {"emb_params": (1, 24)}, "one text encoder"),
        (testing.tiny_flux, {"<x>": (1, 16)}, "one text encoder"),
        (testing.tiny_stable_diffusion, {"clip_l": (1, 16), "clip_g": (1, 24)}, "text_encoder_2"),
        (testing.tiny_stable_diffusion, {"emb_params": (1, 16), "extra": (1, 16)}, "exactly one"),
    ],
)
@pytest.mark.parametrize("is_static", [False, True], ids=["request", "static"])
def test_an_embedding_is_applied_whole_or_refused(tmp_path, make, tensors, error, is_static):
    save_file(
        {key: torch.ones(shape) for key, shape in tensors.items()}, tmp_path / "x.safetensors"
    )
    embedding = asked("x", "<z>")
    if is_static:
        options = ModelOptions(lora_dir=str(tmp_path), textual_inversions=embedding)
        with pytest.raises(errors.InvalidModel, match=error):
            AdapterBank(make(), options)
        return
    bank = AdapterBank(make(), ModelOptions(lora_dir=str(tmp_path)))
    with pytest.raises(errors.InvalidModel, match=error):
        bank.prepare(bank.find(None, embedding))


def test_vectors_for_the_encoder_that_a_file_names(tmp_path):
    """It says that the other one shall read the letters."""
    save_file({"clip_g": vectors(1, 24)}, tmp_path / "x.safetensors")
    bank = AdapterBank(testing.tiny_stable_diffusion_xl(), ModelOptions(lora_dir=str(tmp_path)))
    prepared = bank.prepare(bank.find(None, asked("x", "<x>")))
    assert list(prepared.tokens[0].embedding.vectors) == ["text_encoder_2"]
    bank.close()


@pytest.mark.parametrize("key", ["*", "placeholder"])
@pytest.mark.parametrize("is_stored", [False, True], ids=["file", "store"])
def test_files_of_automatic1111_as_safetensors(pipeline, tmp_path, name, key, is_stored):
    """`*` is not a placeholder; the other tensors are numbers beside it."""
    tensors = {f"string_to_param.{key}": vectors(2), f"string_to_token.{key}": torch.tensor(265)}
    path = tmp_path / "x.safetensors"
    save_file({**tensors, "step": torch.tensor(7)}, path)
    if is_stored and key == "*":
        with pytest.raises(errors.InvalidModel, match="token="):
            bentoml_diffusers.import_textual_inversion(name, path)
        bentoml_diffusers.import_textual_inversion(name, path, token="<x>")
    elif is_stored:
        bentoml_diffusers.import_textual_inversion(name, path)
    bank = AdapterBank(pipeline, ModelOptions(lora_dir=str(tmp_path)))
    if not is_stored and key == "*":
        with pytest.raises(errors.InvalidRequest, match=r"textual_inversions\.token"):
            bank.prepare(bank.find(None, path.name))
        found = bank.find(None, asked("x", "<x>"))
    else:
        found = bank.find(None, name if is_stored else path.name)
    (placeholder,) = bank.prepare(found).tokens
    assert placeholder.token == ("<x>" if key == "*" else "placeholder")
    assert torch.equal(placeholder.embedding.vectors["text_encoder"], vectors(2))
    bank.close()


def test_the_table_is_bounded(pipeline, folder):
    bank = AdapterBank(pipeline, ModelOptions(lora_dir=str(folder), embedding_slots=4))

    def acquire(*items):
        return bank.acquire(bank.prepare(bank.find(None, list(items))))

    one = acquire(asked("three"))
    with pytest.raises(errors.AdaptersBusy, match="embedding_slots=4"):
        acquire(asked("a1111", "<x>"))
    acquire(asked("teal")).release()
    one.release()
    acquire(asked("a1111", "<x>")).release()
    with pytest.raises(errors.InvalidRequest, match="at most 4 vectors"):
        acquire(asked("a1111", "<x>"), asked("three"))
    for items in ([asked("three")], [asked("teal")], [asked("three", "<y>")]):
        prompt = f"a {items[0].get('token', '<teal>')} star"
        ours = generate_alone(pipeline, bank, None, items, prompt=prompt)
        assert torch.equal(ours, generate_by_diffusers(folder, items, prompt))
    bank.close()


def test_static_words_and_those_of_requests(folder):
    pipeline = testing.tiny_stable_diffusion()
    options = ModelOptions(lora_dir=str(folder), textual_inversions=asked("teal"))
    bank = AdapterBank(pipeline, options)
    prompt = "a <teal> star <x>"
    ours = generate_alone(pipeline, bank, None, asked("three", "<x>"), prompt=prompt)
    items = [asked("teal"), asked("three", "<x>")]
    assert torch.equal(ours, generate_by_diffusers(folder, items, prompt))
    with pytest.raises(errors.InvalidRequest, match="token"):
        bank.prepare(bank.find(None, asked("three")))
    bank.close()


@pytest.mark.parametrize(
    ("tensors", "error"),
    [
        ({"<x>": torch.ones(17)}, "another base model"),
        ({"<x>": torch.full((16,), float("nan"))}, "NaN"),
        ({"<x>": torch.ones(2, 2, 16)}, "must hold vectors"),
        ({"<x>": torch.ones(16), "<y>": torch.ones(16)}, "exactly one textual inversion"),
        ({"<x>": torch.ones(16, dtype=torch.int64)}, "must hold vectors"),
        ({"clip_l": torch.ones(1, 17)}, "another base model"),
        ({}, "exactly one textual inversion"),
    ],
)
def test_broken_files_are_refused(pipeline, tmp_path, tensors, error):
    save_file(tensors, tmp_path / "x.safetensors")
    bank = AdapterBank(pipeline, ModelOptions(lora_dir=str(tmp_path)))
    with pytest.raises(errors.InvalidModel, match=error) as caught:
        bank.prepare(bank.find(None, asked("x", "<z>")))
    assert caught.value.error_code == 400
    assert str(tmp_path) not in str(caught.value)


@pytest.mark.parametrize("token", ["a", "<|endoftext|>", "", " x", 3])
def test_words_that_cannot_be(pipeline, bank, token):
    with pytest.raises(errors.InvalidRequest, match="token"):
        bank.prepare(bank.find(None, {"name": "three.safetensors", "token": token}))


def test_words_that_nobody_named(pipeline, bank):
    with pytest.raises(errors.InvalidRequest, match="token"):
        bank.prepare(bank.find(None, asked("a1111")))
    with pytest.raises(errors.InvalidRequest, match="token"):
        bank.prepare(bank.find(None, [asked("teal"), asked("three")]))


def test_classes_without_textual_inversion_say_so(folder):
    bank = AdapterBank(FAMILIES["pixart"][0](), ModelOptions(lora_dir=str(folder)))
    with pytest.raises(errors.UnsupportedByPipeline, match="textual inversion"):
        bank.find(None, "teal.safetensors")


def test_the_word_of_the_demo_model():
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(PIPELINE, safety_checker=None)
    file = TEXTUAL_INVERSIONS["teal"]
    bank = AdapterBank(pipeline, ModelOptions(lora_dir=str(file.parent)))
    prompt = f"a big {TOKEN} circle on a white background in the centre"
    call = {"prompt": prompt, "height": 64, "width": 64, "num_inference_steps": 8}
    plain = generate(pipeline, **call)
    ours = generate_alone(pipeline, bank, None, {"name": file.name, "token": TOKEN}, **call)
    reference = StableDiffusionPipeline.from_pretrained(PIPELINE, safety_checker=None)
    reference.load_textual_inversion(str(file), token=TOKEN)
    assert torch.equal(ours, generate(reference, **call))
    assert (ours - plain).abs().mean() > 0.01
    bank.close()
