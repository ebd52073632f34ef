"""API keys without a server: what is stored, what is left of a limit, who pays for what."""

import asyncio
import json

import pytest

from bentoml_diffusers import (
    AccessOptions,
    Engine,
    EngineLimits,
    KeyOptions,
    RequestLimits,
    errors,
    testing,
)
from bentoml_diffusers.engine import expect_parts, payer
from bentoml_diffusers.serving import refusals
from bentoml_diffusers.serving.calls import Call
from bentoml_diffusers.serving.dispatcher import Dispatcher
from bentoml_diffusers.serving.endpoints import classic_endpoints
from bentoml_diffusers.serving.key_file import KeyRecord, add_key, hash_key, read_keys, read_pairs
from bentoml_diffusers.serving.keys import Account, KeyRing, Visit
from bentoml_diffusers.serving.quotas import Bucket, Places

CALL = {"prompt": "a red circle", "num_inference_steps": 2}
WORK = 2 * 32 * 32


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


def make_account(**limits):
    options = KeyOptions(variable="UNUSED")
    return Account(KeyRecord(name="a", sha256=hash_key("k"), **limits), options)


@pytest.fixture(scope="module")
def engine():
    with Engine(testing.tiny_stable_diffusion()) as running:
        yield running


@pytest.fixture
def pay():
    """Has an account pay for what this test runs."""
    tokens = []

    def start(account):
        tokens.append(payer.set(Visit(account)))

    yield start
    for token in reversed(tokens):
        payer.reset(token)


class TestLimits:
    @pytest.mark.parametrize("amounts", [(6, 5), (10, 1), (1, 10)])
    def test_it_may_come_again_when_it_was_told_and_not_before(self, clock, amounts):
        bucket = Bucket("x", 10, clock)
        bucket.take(amounts[0])
        with pytest.raises(refusals.QuotaExceeded) as refused:
            bucket.take(amounts[1])
        clock.now = refused.value.retry_after_s - 1.01
        with pytest.raises(refusals.QuotaExceeded):
            bucket.take(amounts[1])
        clock.now = refused.value.retry_after_s
        bucket.take(amounts[1])

    def test_an_hour_of_nothing_saves_a_minute(self, clock):
        bucket = Bucket("x", 10, clock)
        clock.now = 3600
        bucket.take(10)
        with pytest.raises(refusals.QuotaExceeded):
            bucket.take(1)

    def test_more_than_there_ever_is(self, clock):
        with pytest.raises(refusals.QuotaTooSmall, match="takes 11 of the key's x=10"):
            Bucket("x", 10, clock).take(11)

    def test_places_by_the_usual_time(self, clock):
        places = Places(1, clock)
        for _ in range(40):
            began = places.take()
            clock.now += 20
            places.leave(began, is_done=True)
        places.take()
        clock.now += 5
        with pytest.raises(refusals.QuotaExceeded) as refused:
            places.take()
        assert refused.value.retry_after_s == 15


class TestWhoPays:
    def test_a_call_pays_once_and_leaves(self, engine, pay):
        account = make_account(requests_per_minute=2, pixel_steps_per_minute=10**6, max_running=1)
        for seed in range(2):
            pay(account)
            engine.run("txt2img", **CALL, seed=seed)
        pay(account)
        with pytest.raises(refusals.QuotaExceeded, match="requests_per_minute=2"):
            engine.run("txt2img", **CALL)

    def test_parts_of_a_call_are_paid_with_the_first(self, engine, pay):
        account = make_account(pixel_steps_per_minute=5 * WORK, requests_per_minute=1)
        pay(account)
        expect_parts(3)
        for seed in range(3):
            engine.run("txt2img", **CALL, seed=seed)
        assert account.places.taken == 0
        pay(account)
        expect_parts(6)
        with pytest.raises(refusals.QuotaTooSmall):
            engine.run("txt2img", **CALL)

    def test_other_tasks(self, engine, pay):
        pay(make_account(tasks=("img2img",)))
        with pytest.raises(refusals.TaskForbidden, match="'txt2img'"):
            engine.run("txt2img", **CALL)

    def test_what_the_engine_refuses_costs_nothing(self, pay):
        account = make_account(pixel_steps_per_minute=WORK, requests_per_minute=1, max_running=1)
        closed = Engine(testing.tiny_stable_diffusion(), limits=EngineLimits())
        closed.close()
        for _ in range(3):
            pay(account)
            with pytest.raises(errors.RequestCancelled):
                closed.run("txt2img", **CALL)

    def test_a_request_that_fails_frees_its_place(self, engine, pay):
        account = make_account(max_running=1)
        for _ in range(2):
            pay(account)
            with pytest.raises(errors.DeadlineExceeded):
                engine.run("txt2img", **{**CALL, "num_inference_steps": 900}, timeout_s=0.05)


class TestStore:
    def test_pairs_of_a_variable(self):
        key = "k" * 32
        read = read_pairs(f"alice={key}, bob=sha256:{hash_key('other')}\n")
        assert [(one.name, one.sha256) for one in read] == [
            ("alice", hash_key(key)),
            ("bob", hash_key("other")),
        ]

    @pytest.mark.parametrize(
        "text", ["alice", "alice=short", "=" + "k" * 32, "a=sha256:zz", "a=b c"]
    )
    def test_an_error_holds_no_key(self, text):
        with pytest.raises(errors.InvalidOption) as refused:
            read_pairs(text)
        assert "short" not in str(refused.value)
        assert "kkk" not in str(refused.value)

    @pytest.mark.parametrize(
        "document",
        [
            "{",
            "[]",
            {"version": 2, "keys": []},
            {"version": 1, "keys": [{"name": "a"}]},
            {"version": 1, "keys": [{"name": "a", "sha256": "b"}]},
            {"version": 1, "keys": [{"name": "a b", "sha256": "0" * 64}]},
            {"version": 1, "keys": [{"name": "a", "sha256": "0" * 64, "max_running": 0}]},
            {"version": 1, "keys": [{"name": "a", "sha256": "0" * 64}] * 2},
        ],
    )
    def test_a_file_that_is_none_of_keys(self, tmp_path, document):
        path = tmp_path / "keys.json"
        path.write_text(document if isinstance(document, str) else json.dumps(document))
        with pytest.raises(errors.InvalidOption):
            read_keys(path)

    def test_a_broken_file_leaves_the_keys_of_before(self, tmp_path):
        path = tmp_path / "keys.json"
        key = add_key(path, "alice")
        ring = KeyRing(KeyOptions(file=str(path)))
        headers = {"authorization": f"bearer {key}"}
        account = ring.find(headers)
        path.write_text("{")
        assert ring.find(headers) is account
        path.unlink()
        add_key(path, "bob")
        with pytest.raises(refusals.KeyRefused):
            ring.find(headers)

    def test_another_key_in_the_file_resets_no_limit(self, tmp_path):
        path = tmp_path / "keys.json"
        headers = {"authorization": f"Bearer {add_key(path, 'alice')}"}
        ring = KeyRing(KeyOptions(file=str(path)))
        account = ring.find(headers)
        add_key(path, "bob")
        assert ring.find(headers) is account


class TestPaths:
    @pytest.mark.parametrize(
        ("method", "path", "access"),
        [
            ("GET", "/livez", "open"),
            ("GET", "/", "open"),
            ("HEAD", "/docs/files/a.css", "open"),
            ("POST", "/", "key"),  # Hugging Face's route
            ("POST", "/docs", "key"),
            ("POST", "/livez", "key"),
            ("GET", "/metrics", "closed"),
            ("POST", "/metrics/", "closed"),
            ("GET", "/metricsx", "key"),
            ("POST", "/txt2img", "key"),
        ],
    )
    def test_who_may_ask(self, method, path, access):
        assert AccessOptions(metrics="closed").of_path(path, method) == access

    @pytest.mark.parametrize(
        "options",
        [
            {"metrics": "no"},
            {"cors_origins": "https://a.example"},
            {"cors_origins": ["a.example"]},
            {"cors_origins": ["https://a.example/"]},
            {"receive_timeout_s": 0},
            {"max_connections": 1},
        ],
        ids=repr,
    )
    def test_wrong_options(self, options):
        with pytest.raises(errors.InvalidOption):
            AccessOptions(**options)


class TestJobs:
    """A job runs when its caller has gone: it is charged when it is accepted."""

    @pytest.fixture
    def check(self, engine):
        endpoints = classic_endpoints(RequestLimits())
        dispatcher = Dispatcher(engine, {one.task: one.request for one in endpoints})

        def check(task="txt2img"):
            asyncio.run(dispatcher.check(Call(task=task, arguments=CALL, n=2)))

        return check

    def test_it_is_charged_once_with_all_its_images(self, pay, check):
        account = make_account(requests_per_minute=2, pixel_steps_per_minute=2 * WORK)
        pay(account)
        check()
        pay(account)  # each call is a visit
        with pytest.raises(refusals.QuotaExceeded):
            check()

    def test_a_key_for_other_tasks_has_no_job(self, pay, check):
        pay(make_account(tasks=("img2img",)))
        with pytest.raises(refusals.TaskForbidden):
            check()
