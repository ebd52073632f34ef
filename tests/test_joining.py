"""Joining and splitting calls: what is not understood never shares a forward."""

import pytest
import torch

from bentoml_diffusers.engine.forwards import joining

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
    one, two = joining.split((joined["encoder_hidden_states"],), [2, 2])
    assert (one[0] == 0).all()
    assert (two[0] == 1).all()


def test_padding_is_dropped():
    call = take(timestep=torch.tensor(7))
    joined = joining.join([call], rows=8)
    assert joined["sample"].shape[0] == 8
    (part,) = joining.split(joined["sample"], [2], rows=8)
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
    assert joining.take_apart({"sample": [torch.ones(4, 8, 8)]}) is None
    assert joining.take_apart({}) is None


@pytest.mark.parametrize(
    "output", [torch.ones(3, 2), torch.tensor(1.0), [torch.ones(4), torch.ones(5)], object()]
)
def test_outputs_that_cannot_be_told_apart_are_not_split(output):
    with pytest.raises(joining.NotSplittable):
        joining.split(output, [2, 2])


def test_modes_of_the_thread_are_kept_apart():
    with torch.no_grad():
        first = take().key
    with torch.enable_grad():
        assert take().key != first
