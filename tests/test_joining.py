"""Joining and splitting calls: what is not understood never shares a forward."""

import pytest
import torch

from bentoml_diffusers.engine.forwards import joining, splitting
from bentoml_diffusers.engine.forwards.padding import PaddedText

ROWS = {"sample": torch.ones(2, 4, 8, 8)}


def take(**more):
    return joining.take_apart({**ROWS, **more})


def test_samples_are_joined_and_split_again():
    first = take(timestep=torch.tensor(7), encoder_hidden_states=torch.zeros(2, 3, 5))
    second = take(timestep=torch.tensor(9), encoder_hidden_states=torch.ones(2, 3, 5))
    assert first.key == second.key
    joined = joining.join([first, second])
    assert joined["sample"].shape == (4, 4, 8, 8)
    assert joined["timestep"].tolist() == [7, 7, 9, 9]
    one, two = splitting.split((joined["encoder_hidden_states"],), [2, 2])
    assert (one[0] == 0).all()
    assert (two[0] == 1).all()


def test_padding_is_dropped():
    call = take(timestep=torch.tensor(7))
    joined = joining.join([call], rows=8)
    assert joined["sample"].shape[0] == 8
    (part,) = splitting.split(joined["sample"], [2], rows=8)
    assert part.shape[0] == 2


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (torch.tensor(7), torch.tensor(7.0)),
        (torch.tensor([7]), 7),
        (7.5, torch.tensor([7.0, 8.0])),
    ],
)
def test_timesteps_of_any_form_are_joined(one, other):
    calls = [take(timestep=one), take(timestep=other)]
    assert calls[0].key == calls[1].key
    assert joining.join(calls)["timestep"].shape == (4,)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"return_dict": False}, {"return_dict": True}),
        ({"scale": 0.5}, {"scale": 0.6}),
        ({"options": {"scale": 0.5}}, {"options": {"scale": 1.0}}),
        (
            {"encoder_hidden_states": torch.zeros(2, 3)},
            {"encoder_hidden_states": torch.zeros(2, 4)},
        ),
        (
            {"encoder_hidden_states": torch.zeros(2, 3)},
            {"encoder_hidden_states": torch.zeros(2, 3).half()},
        ),
        ({"img_ids": torch.zeros(5, 3)}, {"img_ids": torch.ones(5, 3)}),
        ({"extra": None}, {"extra": torch.zeros(2)}),
    ],
)
def test_calls_that_differ_are_kept_apart(one, other):
    assert take(**one).key != take(**other).key


def test_a_shared_tensor_whose_length_is_the_batch_by_accident_is_passed_once():
    ids = torch.arange(6.0).reshape(2, 3)
    joined = joining.join([take(img_ids=ids), take(img_ids=ids.clone())])
    assert torch.equal(joined["img_ids"], ids)


def test_a_shared_tensor_is_looked_at_again_when_it_was_written_to():
    ids = torch.zeros(5, 3)
    before = take(img_ids=ids).key
    ids.add_(1)
    assert take(img_ids=ids).key != before


@pytest.mark.parametrize(
    "more",
    [
        {"callback": print},
        {"generator": torch.Generator()},
        {"lengths": [3, 4]},
        {"names": ["a", "b"]},
    ],
)
def test_what_is_not_understood_runs_alone(more):
    assert take(**more) is None


def test_a_call_without_a_leading_tensor_runs_alone():
    assert joining.take_apart({"sample": [[torch.ones(4, 8, 8)]]}) is None
    assert joining.take_apart({"sample": [3, 4]}) is None
    assert joining.take_apart({}) is None


@pytest.mark.parametrize(
    "output", [torch.ones(3, 2), torch.tensor(1.0), [torch.ones(4), torch.ones(5)], object()]
)
def test_outputs_that_cannot_be_told_apart_are_not_split(output):
    with pytest.raises(splitting.NotSplittable):
        splitting.split(output, [2, 2])


def test_modes_of_the_thread_are_kept_apart():
    with torch.no_grad():
        first = take().key
    with torch.enable_grad():
        assert take().key != first


def test_lists_of_equal_entries_are_joined_by_sample_and_tuples_passed_once():
    """`img_shapes` of Qwen-Image, `rope_interpolation_scale` of LTX."""
    shapes = [[(1, 4, 4)]] * 2
    calls = [take(img_shapes=shapes, scale=(8 / 25, 32, 32), layers=[3, 7, 9]) for _ in range(2)]
    assert calls[0].key == calls[1].key
    joined = joining.join(calls, rows=8)
    assert joined["img_shapes"] == [[(1, 4, 4)]] * 8
    assert joined["scale"] == (8 / 25, 32, 32)
    assert joined["layers"] == [3, 7, 9]
    assert take(img_shapes=[[(1, 4, 8)]] * 2).key != take(img_shapes=shapes).key
    assert take(scale=(1, 2)).key != take(scale=(1, 3)).key
    assert take(img_shapes=[[(1, 4, 4)], [(1, 4, 8)]]) is None


def take_list(*lengths, size=4, text=5):
    """A call of Z-Image: a list of images, a list of texts of unlike length."""
    return joining.take_apart(
        {
            "x": [torch.full((3, size, size), float(length)) for length in lengths],
            "t": torch.tensor([0.5] * len(lengths)),
            "cap_feats": [torch.ones(length, text) for length in lengths],
        }
    )


def test_samples_in_lists_are_joined_and_split_again():
    calls = [take_list(4, 6), take_list(9)]
    assert calls[0].key == calls[1].key
    assert calls[0].lengths != calls[1].lengths
    joined = joining.join(calls)
    assert [len(text) for text in joined["cap_feats"]] == [4, 6, 9]
    assert joined["t"].shape == (3,)
    first, second = splitting.split((joined["x"],), [2, 1], in_lists=True)
    assert [image[0, 0, 0].item() for image in first[0]] == [4, 6]
    assert [image[0, 0, 0].item() for image in second[0]] == [9]
    assert take_list(4, size=8).key != take_list(4).key
    assert take_list(4, text=6).key != take_list(4).key


@pytest.mark.parametrize(
    "output",
    [torch.ones(3, 2), [torch.ones(2)] * 2, [1, 2, 3], ([torch.ones(2)] * 3, torch.ones(3))],
)
def test_outputs_beside_lists_of_samples_are_not_split(output):
    with pytest.raises(splitting.NotSplittable):
        splitting.split(output, [2, 1], in_lists=True)


TEXTS = (PaddedText("text", "mask"),)


def take_text(length, mask=None):
    more = {} if mask is None else {"mask": mask}
    return joining.take_apart({**ROWS, "text": torch.ones(2, length, 5), **more}, TEXTS)


def test_text_of_unlike_length_is_padded_and_masked():
    short, long = take_text(3), take_text(7, torch.tensor([[1] * 7, [1] * 5 + [0] * 2]))
    assert short.key == long.key
    assert short.lengths != long.lengths
    joined = joining.join([short, long])
    assert joined["text"].shape == (4, 7, 5)
    assert joined["text"][:2, 3:].abs().max() == 0
    assert joined["mask"].tolist() == [[1] * 3 + [0] * 4] * 2 + [[1] * 7, [1] * 5 + [0] * 2]
    assert joined["mask"].dtype == torch.int64


def test_text_of_equal_length_gets_no_mask():
    joined = joining.join([take_text(3), take_text(3)])
    assert joined["text"].shape == (4, 3, 5)
    assert joined["mask"] is None


def test_text_of_a_module_that_reads_no_mask_is_not_padded():
    calls = [take(text=torch.ones(2, length, 5)) for length in (3, 7)]
    assert calls[0].key != calls[1].key


def test_several_rows_for_each_sample_are_joined_sample_by_sample():
    """Text of AnimateDiff, for each frame."""
    calls = [
        take(encoder_hidden_states=torch.arange(6.0)[:, None, None] + start) for start in (0, 10)
    ]
    assert calls[0].key == calls[1].key
    joined = joining.join(calls, rows=5)["encoder_hidden_states"]
    assert joined.flatten().tolist() == [*range(6), *range(10, 16), 13, 14, 15]
    assert take(encoder_hidden_states=torch.ones(4, 1, 1)).key != calls[0].key
