"""What each pipeline class goes through: by the tests, and by the table of the documentation."""

import contextlib
import functools
import inspect
import itertools
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import bentoml
import numpy as np
import torch
from comparing import same_image
from holding import held

import bentoml_diffusers
from bentoml_diffusers import Engine, errors
from bentoml_diffusers.engine.requests.request import Ticket
from bentoml_diffusers.loading import denoiser_names
from families.family import Family, numbers

_names = itertools.count()
_TIMEOUT_S = 120
_TRIES = 3
_PER_PROMPT = ("num_images_per_prompt", "num_videos_per_prompt", "num_waveforms_per_prompt")


@dataclass(frozen=True)
class Outcome:
    """What came of one check.

    Attributes:
        passed: It did what is promised.
        reason: Why the check does not apply, or fails.
    """

    passed: bool
    reason: str = ""

    @property
    def failed(self) -> bool:
        """True if it should have passed."""
        return not self.passed and self.reason.startswith("FAILED")


class Trial:
    """A class that is tried: its pipeline in an engine, and what lone requests made."""

    def __init__(self, family: Family, name: str, engine: Engine) -> None:
        self.family, self.name, self.engine = family, name, engine
        self.calls = family.calls(name)
        self.shared: Counter[str] = Counter()
        _note_shared(engine, self.shared)

    @functools.cached_property
    def lone(self) -> list[np.ndarray]:
        """What each of three requests makes alone."""
        return [self.run(call, seed) for seed, call in enumerate(self.calls)]

    def run(self, call: dict[str, Any], seed: Any, **more: Any) -> np.ndarray:
        return numbers(self.engine.run("__call__", **call, seed=seed, **more).output)


def check_class(family: Family, name: str) -> dict[str, Outcome]:
    """Returns what came of each check."""
    with Engine(family.build(name)) as engine:
        trial = Trial(family, name, engine)
        outcomes = {}
        for check in CHECKS:
            outcomes[check.__name__] = _try(check, trial)
            if outcomes[check.__name__].failed and check is runs:
                break
        return outcomes


def runs(trial: Trial) -> str:
    """Alone it makes what diffusers' own call makes, bit for bit; seeds make a difference."""
    pipeline = trial.family.build(trial.name)
    own = [_call(pipeline, call, seed) for seed, call in enumerate(trial.calls)]
    assert all(np.isfinite(made).all() for made in own)
    assert all(np.array_equal(*pair) for pair in zip(trial.lone, own, strict=True))
    assert not same_image(own[0], _call(pipeline, trial.calls[0], 9)), "a seed makes no difference"
    return ""


def shares(trial: Trial) -> str:
    """Three at once are within a level of their lone runs, and share forwards of the denoiser."""
    why_alone = trial.family.why_alone(trial.name)
    expected = 1 if why_alone else trial.family.shares(trial.name)
    for _ in range(_TRIES):  # what is shared depends on measured costs
        most = _run_together(trial)
        if most >= expected:
            break
    assert most == expected, f"requests that share a forward: {dict(trial.shared)}"
    return why_alone


def _run_together(trial: Trial) -> int:
    """Returns how many of three requests shared a forward of the denoiser at most."""
    _ = trial.lone
    trial.shared.clear()
    with held(trial.engine, len(trial.calls)):
        handles = [
            trial.engine.submit("__call__", **call, seed=seed)
            for seed, call in enumerate(trial.calls)
        ]
    together = [numbers(handle.result(_TIMEOUT_S).output) for handle in handles]
    for here, there in zip(together, trial.lone, strict=True):
        assert same_image(here, there), f"{np.abs(here - there).max() * 255:.2g} levels off"
    return max(trial.shared[name] for name in denoiser_names(trial.engine.pipeline))


def seeds(trial: Trial) -> str:
    """The second of two results of one prompt is that of its seed."""
    takes = inspect.signature(type(trial.engine.pipeline).__call__).parameters
    count = next((name for name in _PER_PROMPT if name in takes), None)
    if count is None:
        return "takes no number of results"
    call = trial.calls[0]
    result = trial.engine.run("__call__", **call, seed=5, **{count: 2})
    assert result.seeds == (5, 6)
    both = numbers(result.output)
    alone = trial.run(call, 6)
    assert same_image(both[1:2], alone), f"{np.abs(both[1:2] - alone).max() * 255:.2g} levels off"
    return ""


def store(trial: Trial) -> str:
    """Stored and loaded it makes the same."""
    model = bentoml_diffusers.save_model(f"family{next(_names)}", trial.family.build(trial.name))
    try:
        loaded = bentoml_diffusers.load_model(model.tag)
        loaded.set_progress_bar_config(disable=True)
        assert type(loaded) is type(trial.engine.pipeline)
        assert same_image(_call(loaded, trial.calls[0], 0), trial.lone[0])
    finally:
        bentoml.models.delete(model.tag)
    return ""


def cancel(trial: Trial) -> str:
    """Cancelled after the first step it does no other; the next request is right."""
    before = trial.lone[0]
    ticket = Ticket()
    ticket.on_step = lambda _: ticket.cancel()
    arguments = {**trial.calls[0], "seed": 0, "on_step": ticket.on_step}
    try:
        trial.engine._submit(ticket, "__call__", (), arguments).result(_TIMEOUT_S)
    except errors.RequestCancelled:
        assert ticket.steps_done == 1
    else:
        raise AssertionError(f"not cancelled, {ticket.steps_done} steps")
    assert np.array_equal(trial.run(trial.calls[0], 0), before)
    return ""


def lora(trial: Trial) -> str:
    """A LoRA of a request makes what diffusers makes with it, and leaves the base clean."""
    pipeline = trial.family.build(trial.name)
    if not hasattr(pipeline, "load_lora_weights"):
        return "the class takes none"
    with tempfile.TemporaryDirectory() as folder:
        file = _save_lora(trial, Path(folder))
        pipeline.load_lora_weights(folder, weight_name=file.name)
        own = _call(pipeline, trial.calls[0], 0)
        options = bentoml_diffusers.ModelOptions(lora_dir=folder)
        with Engine(trial.family.build(trial.name), options) as engine:
            made = [
                numbers(engine.run("__call__", **trial.calls[0], seed=0, **more).output)
                for more in ({}, {"lora_weights": file.name}, {})
            ]
    assert same_image(made[1], own), f"{np.abs(made[1] - own).max() * 255:.2g} levels off"
    assert not same_image(made[1], made[0]), "the LoRA makes no difference"
    assert np.array_equal(made[2], made[0])
    return ""


def replay(trial: Trial) -> str:
    """A recorded request makes the same again."""
    call = {**trial.calls[0], "seed": 0, "exclusive": True}
    result = trial.engine.run("__call__", **call, return_workflow=True)
    again = trial.engine.replay(result.workflow)
    assert again.replay.matches
    assert np.array_equal(numbers(again.output), numbers(result.output))
    return ""


CHECKS: tuple[Callable[[Trial], str], ...] = (runs, shares, seeds, store, cancel, lora, replay)


def _try(check: Callable[[Trial], str], trial: Trial) -> Outcome:
    reason = trial.family.why_not(trial.name, check.__name__)
    if reason:
        return Outcome(False, reason)
    try:
        reason = check(trial)
    except Exception:  # noqa: BLE001 - told with the others
        return Outcome(False, f"FAILED {traceback.format_exc(limit=-4)}")
    return Outcome(not reason, reason)


def _call(pipeline: Any, call: dict[str, Any], seed: int) -> np.ndarray:
    with torch.no_grad():
        return numbers(pipeline(**call, generator=torch.Generator().manual_seed(seed)))


def _save_lora(trial: Trial, folder: Path) -> Path:
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    pipeline = trial.family.build(trial.name)
    part = next(
        name for name in ("transformer", "unet", "prior", "dit") if getattr(pipeline, name, None)
    )
    denoiser = getattr(pipeline, part)
    denoiser.add_adapter(
        LoraConfig(r=4, lora_alpha=4, target_modules=list(trial.family.lora_layers))
    )
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(1)
        for key, parameter in denoiser.named_parameters():
            if "lora_" in key:
                parameter.normal_(0, 0.5)
    layers = {f"{part}_lora_layers": get_peft_model_state_dict(denoiser)}
    type(pipeline).save_lora_weights(folder, **layers, weight_name="tiny.safetensors")
    return folder / "tiny.safetensors"


def _note_shared(engine: Engine, shared: Counter[str]) -> None:
    """Notes how many requests share a forward at most, by module."""
    forwards = engine._worker.conductor._runs
    count = forwards._count

    def note(jobs: Any) -> None:
        component = jobs[0].module.component
        shared[component] = max(shared[component], len(jobs))
        count(jobs)

    forwards._count = note


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Tiny models run fastest on one thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
