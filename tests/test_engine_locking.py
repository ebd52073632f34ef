"""What another thread reads of an engine while requests run."""

import statistics
import threading

import pytest
from adapter_models import ATTENTION, FAMILIES, save_lora

from bentoml_diffusers import Engine, ModelOptions, errors, testing
from bentoml_diffusers.adapters import AdapterBank
from bentoml_diffusers.adapters.cache import HostCache
from bentoml_diffusers.engine.forwards import profile

CALL = {"prompt": "a red circle", "num_inference_steps": 1}


@pytest.fixture
def engine(lora_dir):
    with Engine.from_model(testing.tiny_stable_diffusion(), lora_dir=str(lora_dir)) as engine:
        yield engine


def test_a_report_holds_while_a_request_of_a_new_kind_is_counted(engine, monkeypatch):
    """In the middle of a report another request measures a kind of forward that nobody has seen."""
    engine.run("txt2img", **CALL)
    sides = iter([40, 48])

    def median(values):
        side = next(sides, None)
        if side is not None:
            handle = engine.submit("txt2img", **CALL, height=side, width=side)
            assert handle.result(60).images
        return statistics.median(values)

    monkeypatch.setattr(profile, "statistics", type("Slow", (), {"median": median}))
    kinds = engine.report().seconds_per_row
    assert next(sides, None) is None
    monkeypatch.undo()
    assert set(kinds) < set(engine.report().seconds_per_row)


def test_what_a_report_says_does_not_change_any_more(engine):
    before = engine.report()
    told = (dict(before.counts), dict(before.forwards), before.adapters.in_slots)
    engine.run("txt2img", **CALL, lora_weights="one.safetensors")
    assert (dict(before.counts), dict(before.forwards), before.adapters.in_slots) == told
    after = engine.report()
    assert after.counts == {"submitted": 1, "done": 1}
    assert after.adapters.in_slots == ("one.safetensors",)


def test_residents_are_listed_while_one_more_comes(lora_dir):
    """The name of a LoRA is asked for in the middle of the list."""
    options = ModelOptions(lora_dir=str(lora_dir))
    bank = AdapterBank(testing.tiny_stable_diffusion(), options)
    prepared = {name: bank.prepare(bank.find(f"{name}.safetensors")) for name in ("one", "two")}
    bank.acquire(prepared["one"]).release()
    lora, pool = prepared["one"].loras[0][0], bank._pool
    threads = []

    class Asked:
        @property
        def name(self):
            thread = threading.Thread(target=lambda: bank.acquire(prepared["two"]).release())
            threads.append(thread)
            thread.start()
            return lora.name

    pool._residents[lora.key].lora = Asked()
    assert pool.residents() == ["one.safetensors"]
    threads[0].join(30)
    pool._residents[lora.key].lora = lora
    assert pool.residents() == ["one.safetensors", "two.safetensors"]


def test_no_file_is_read_against_modules_that_peft_changes(tmp_path, monkeypatch):
    """In the middle of reading, another request wants to put PEFT's layers into the denoiser."""
    make, _ = FAMILIES["flux"]
    save_lora(tmp_path / "plain.safetensors", make, {"transformer": ATTENTION})
    save_lora(tmp_path / "dora.safetensors", make, {"transformer": ATTENTION}, use_dora=True)
    pipeline = make()
    bank = AdapterBank(pipeline, ModelOptions(lora_dir=str(tmp_path)))
    lease = bank.acquire(bank.prepare(bank.find("dora.safetensors")))
    injected, read, seen = threading.Event(), threading.Event(), []

    def inject():
        with lease.applied():
            injected.set()
            assert read.wait(30)

    state_dict = pipeline.transformer.state_dict
    thread = threading.Thread(target=inject)

    def slow_state_dict(*args, **kwargs):
        if threading.current_thread() is not threading.main_thread():
            return state_dict(*args, **kwargs)
        before = list(state_dict(*args, **kwargs))
        if not thread.ident:
            thread.start()
            injected.wait(1)  # in vain, where the reader has the modules for itself
        seen.append(before == list(state_dict(*args, **kwargs)))
        return state_dict(*args, **kwargs)

    monkeypatch.setattr(pipeline.transformer, "state_dict", slow_state_dict)
    bank.prepare(bank.find("plain.safetensors"))
    read.set()
    thread.join(30)
    assert seen
    assert all(seen)
    assert injected.is_set()


class Loaded:
    name, n_bytes = "file", 10


def test_a_file_that_two_threads_read_is_counted_once():
    """The first try fails while the second one waits; then a third comes beside the second."""
    cache = HostCache(100)
    second_reads, done = threading.Event(), threading.Event()

    def fail():
        second.start()
        raise errors.InvalidModel("file", "is gone")

    def load_slowly():
        second_reads.set()
        assert done.wait(30)
        return Loaded()

    second = threading.Thread(target=lambda: cache.get("key", load_slowly))
    with pytest.raises(errors.InvalidModel):
        cache.get("key", fail)
    assert second_reads.wait(30)
    cache._loading.clear()  # as the first one does if the second waited at its gate
    cache.get("key", Loaded)
    done.set()
    second.join(30)
    assert cache.n_bytes == 10
