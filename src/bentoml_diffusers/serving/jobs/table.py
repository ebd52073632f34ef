"""The table of jobs, in SQLite or PostgreSQL. Safe from any thread and process.

Each change of a job is one statement that says in its ``WHERE`` what it expects, so what two
workers do at once cannot both be done.
"""

from __future__ import annotations

import contextlib
import json
import secrets
import time
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from bentoml_diffusers.errors import InvalidOption
from bentoml_diffusers.serving.jobs.states import ENDED, Job, JobConflict, JobNotFound, JobsFull

try:
    import sqlalchemy as sa
    from sqlalchemy import event
except ImportError as err:
    raise InvalidOption(
        "jobs", "JobOptions", "SQLAlchemy: pip install bentoml-diffusers[jobs]"
    ) from err

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from sqlalchemy.engine import Connection, RowMapping

    from bentoml_diffusers.serving.jobs.states import Status

# Raise it with each change of the columns, and migrate in `_create`.
TABLE_VERSION = 1
_JSON = ("values", "asked", "files", "seeds")
_RENAMED = {"values": "input_values"}  # a keyword of SQL

_metadata = sa.MetaData()
_facts = sa.Table(
    "diffusers_job_facts",
    _metadata,
    sa.Column("name", sa.String(64), primary_key=True),
    sa.Column("value", sa.Text, nullable=False),
)
_jobs = sa.Table(
    "diffusers_jobs",
    _metadata,
    sa.Column("number", sa.BigInteger().with_variant(sa.Integer, "sqlite"), primary_key=True),
    sa.Column("id", sa.String(128), nullable=False),
    sa.Column("service", sa.String(256), nullable=False, index=True),
    sa.Column("owner", sa.String(256), nullable=False, index=True),
    sa.Column("fingerprint", sa.String(64), nullable=False),
    sa.Column("task", sa.String(256), nullable=False),
    sa.Column("input_values", sa.Text, nullable=False),
    sa.Column("n", sa.Integer, nullable=False),
    sa.Column("output_format", sa.String(16), nullable=False),
    sa.Column("asked", sa.Text, nullable=False),
    sa.Column("priority", sa.Integer, nullable=False),
    sa.Column("status", sa.String(16), nullable=False, index=True),
    sa.Column("attempt", sa.Integer, nullable=False),
    sa.Column("worker", sa.String(64)),
    sa.Column("lease", sa.Float),
    sa.Column("cancelling", sa.Boolean, nullable=False),
    sa.Column("step", sa.Integer, nullable=False),
    sa.Column("of", sa.Integer, nullable=False),
    sa.Column("files", sa.Text, nullable=False),
    sa.Column("seeds", sa.Text, nullable=False),
    sa.Column("error", sa.Text),
    sa.Column("created", sa.Float, nullable=False),
    sa.Column("started", sa.Float),
    sa.Column("ended", sa.Float, index=True),
    sa.UniqueConstraint("service", "id"),
)
_COLUMNS = _jobs.c


class JobTable:
    """All jobs of a service.

    Args:
        url: For SQLAlchemy.
        service: Whose jobs; those of others are neither seen nor run.
        lease_s: Seconds that a job belongs to its worker without a sign of life.
        max_attempts: How often a job is begun.

    Attributes:
        secret: The same for all workers; it signs addresses of images.

    Raises:
        InvalidOption: 400, a database that cannot be used.
    """

    def __init__(self, url: str, service: str, *, lease_s: float, max_attempts: int) -> None:
        self._lease_s, self._max_attempts = lease_s, max_attempts
        self._service = service
        self._mine = _COLUMNS.service == service
        try:
            self._engine = sa.create_engine(url, pool_pre_ping=True)
            self._is_sqlite = self._engine.dialect.name == "sqlite"
            if self._is_sqlite:
                _prepare_sqlite(self._engine)
            self.secret = self._create()
        except (sa.exc.SQLAlchemyError, ImportError) as err:
            shown = sa.engine.make_url(url).render_as_string() if "://" in url else url
            raise InvalidOption("database", shown, f"a database that can be used: {err}") from err

    def close(self) -> None:
        """Closes all connections."""
        self._engine.dispose()

    def add(self, job: Job, max_waiting: int) -> Job:
        """Stores a job; the same wish under the same id is the job that is there.

        Raises:
            JobConflict: 409, another job has the id.
            JobsFull: 429, ``max_waiting`` jobs wait.
        """
        with self._engine.begin() as connection:
            found = self._find(connection, job.id)
            if found is None:
                waiting = self._count(connection, "starting")
                if waiting >= max_waiting:
                    raise JobsFull(waiting)
        if found is None:
            try:
                with self._engine.begin() as connection:
                    connection.execute(
                        sa.insert(_jobs).values(service=self._service, **_to_row(job))
                    )
                return job
            except sa.exc.IntegrityError:  # somebody else was faster
                with self._reading() as connection:
                    found = self._find(connection, job.id)
                if found is None:
                    raise
        if found["fingerprint"] != job.fingerprint:
            raise JobConflict(job.id)
        return _to_job(found)

    def get(self, job_id: str) -> Job:
        """Returns a job.

        Raises:
            JobNotFound: 404.
        """
        with self._reading() as connection:
            found = self._find(connection, job_id)
        if found is None:
            raise JobNotFound(job_id)
        return _to_job(found)

    def list_jobs(
        self, owner: str, *, before: int | None = None, limit: int = 100
    ) -> list[tuple[int, Job]]:
        """Returns jobs of a caller, the latest first, with the number of each for ``before``."""
        query = (
            sa.select(_jobs)
            .where(self._mine, _COLUMNS.owner == owner)
            .order_by(_COLUMNS.number.desc())
        )
        if before is not None:
            query = query.where(_COLUMNS.number < before)
        with self._reading() as connection:
            return [
                (row["number"], _to_job(row))
                for row in connection.execute(query.limit(limit)).mappings()
            ]

    def position(self, job: Job) -> int:
        """Returns how many jobs wait that began to wait earlier, whoever asked for them."""
        mine = sa.select(_COLUMNS.number).where(self._mine, _COLUMNS.id == job.id).scalar_subquery()
        query = sa.select(sa.func.count()).where(
            self._mine, _COLUMNS.status == "starting", _COLUMNS.number < mine
        )
        with self._reading() as connection:
            return int(connection.execute(query).scalar_one())

    def claim(self, worker: str) -> Job | None:
        """Gives the next job to a worker; ``None`` if none waits.

        Callers take turns: first comes whose jobs run least. A job whose worker is silent for
        longer than its lease counts as waiting; begun too often, it has failed.
        """
        now = time.time()
        with self._engine.begin() as connection:
            self._fail_worn_out(connection, now)
            running = _jobs.alias()
            mine = (
                sa.select(sa.func.count())
                .where(
                    running.c.service == self._service,
                    running.c.owner == _COLUMNS.owner,
                    running.c.status == "processing",
                )
                .scalar_subquery()
            )
            query = (
                sa.select(_jobs)
                .where(self._mine, self._is_free(now))
                .order_by(_COLUMNS.priority.desc(), mine, _COLUMNS.number)
                .limit(1)
                .with_for_update(skip_locked=True, of=_jobs)
            )
            row = connection.execute(query).mappings().first()
            if row is None:
                return None
            changes = {
                "status": "processing",
                "worker": worker,
                "attempt": row["attempt"] + 1,
                "lease": now + self._lease_s,
                "started": now,
                "step": 0,
            }
            connection.execute(
                sa.update(_jobs).where(_COLUMNS.number == row["number"]).values(**changes)
            )
            return _to_job(row, **{name: changes[name] for name in changes if name != "lease"})

    def list_cancelled(self, worker: str) -> set[str]:
        """Returns the ids of those jobs of a worker that it must stop."""
        query = sa.select(_COLUMNS.id).where(
            self._mine, _COLUMNS.worker == worker, _COLUMNS.cancelling
        )
        with self._reading() as connection:
            return {row.id for row in connection.execute(query)}

    def renew(self, jobs: Sequence[Job]) -> set[str]:
        """Renews the leases of a worker's jobs, and notes their steps.

        Returns:
            Ids of those that the worker must stop: cancelled, or another worker has them.
        """
        lost = set()
        with self._engine.begin() as connection:
            for job in jobs:
                done = connection.execute(
                    sa.update(_jobs)
                    .where(*self._is_held(job), _COLUMNS.cancelling.is_(False))
                    .values(lease=time.time() + self._lease_s, step=job.step, of=job.of)
                )
                if not done.rowcount:
                    lost.add(job.id)
        return lost

    def finish(
        self,
        job: Job,
        status: Status,
        *,
        files: Sequence[str] = (),
        seeds: Sequence[int] = (),
        error: str | None = None,
    ) -> bool:
        """Ends a job, once; ``False`` where it is another worker's by now."""
        with self._engine.begin() as connection:
            done = connection.execute(
                sa.update(_jobs)
                .where(*self._is_held(job))
                .values(
                    status=status,
                    files=json.dumps(list(files)),
                    seeds=json.dumps(list(seeds)),
                    error=error,
                    ended=time.time(),
                    step=job.step,
                    of=job.of,
                    lease=None,
                )
            )
        return bool(done.rowcount)

    def give_back(self, job: Job) -> None:
        """Lets a job wait again, as if it had not been begun."""
        with self._engine.begin() as connection:
            connection.execute(
                sa.update(_jobs)
                .where(*self._is_held(job))
                .values(status="starting", worker=None, lease=None, attempt=job.attempt - 1)
            )

    def cancel(self, job_id: str) -> None:
        """Ends a job that waits, and has one that runs stopped by its worker."""
        mine = sa.and_(self._mine, _COLUMNS.id == job_id)
        with self._engine.begin() as connection:
            connection.execute(
                sa.update(_jobs)
                .where(mine, _COLUMNS.status == "starting")
                .values(status="canceled", ended=time.time())
            )
            connection.execute(
                sa.update(_jobs)
                .where(mine, _COLUMNS.status == "processing")
                .values(cancelling=True)
            )

    def delete_older(self, keep_s: float, limit: int = 100) -> list[Job]:
        """Deletes jobs that ended longer ago, and returns them."""
        query = (
            sa.select(_jobs)
            .where(self._mine, _COLUMNS.status.in_(ENDED), _COLUMNS.ended < time.time() - keep_s)
            .limit(limit)
        )
        with self._engine.begin() as connection:
            rows = connection.execute(query).mappings().all()
            numbers = [row["number"] for row in rows]
            connection.execute(sa.delete(_jobs).where(_COLUMNS.number.in_(numbers)))
        return [_to_job(row) for row in rows]

    def _create(self) -> str:
        """Makes the tables where there are none; returns the secret."""
        _metadata.create_all(self._engine)
        for name, value in (("version", str(TABLE_VERSION)), ("secret", secrets.token_hex(32))):
            # There already of an earlier start, or by another worker.
            with contextlib.suppress(sa.exc.IntegrityError), self._engine.begin() as connection:
                connection.execute(sa.insert(_facts).values(name=name, value=value))
        with self._reading() as connection:
            facts = {row.name: row.value for row in connection.execute(sa.select(_facts))}
        if int(facts["version"]) > TABLE_VERSION:
            raise InvalidOption(
                "database",
                f"tables of version {facts['version']}",
                f"up to {TABLE_VERSION}: update bentoml-diffusers",
            )
        return str(facts["secret"])

    def _reading(self) -> Connection:
        """A connection that waits for nobody who writes."""
        return self._engine.connect().execution_options(only_reads=True)

    def _find(self, connection: Connection, job_id: str) -> RowMapping | None:
        return (
            connection.execute(sa.select(_jobs).where(self._mine, _COLUMNS.id == job_id))
            .mappings()
            .first()
        )

    def _count(self, connection: Connection, status: Status) -> int:
        query = sa.select(sa.func.count()).where(self._mine, _COLUMNS.status == status)
        return int(connection.execute(query).scalar_one())

    def _is_free(self, now: float) -> Any:
        is_silent = sa.and_(_COLUMNS.status == "processing", _COLUMNS.lease < now)
        return sa.or_(_COLUMNS.status == "starting", is_silent)

    def _fail_worn_out(self, connection: Connection, now: float) -> None:
        """Ends jobs whose workers died with them again and again, or that were being cancelled."""
        is_silent = sa.and_(_COLUMNS.status == "processing", _COLUMNS.lease < now)
        text = f"its worker ended {self._max_attempts} times while it ran"
        connection.execute(
            sa.update(_jobs)
            .where(self._mine, is_silent, _COLUMNS.cancelling)
            .values(status="canceled", ended=now, lease=None)
        )
        connection.execute(
            sa.update(_jobs)
            .where(self._mine, is_silent, _COLUMNS.attempt >= self._max_attempts)
            .values(status="failed", error=text, ended=now, lease=None)
        )

    def _is_held(self, job: Job) -> Iterator[Any]:
        """The job runs in the attempt that its worker knows of."""
        yield self._mine
        yield _COLUMNS.id == job.id
        yield _COLUMNS.status == "processing"
        yield _COLUMNS.worker == job.worker
        yield _COLUMNS.attempt == job.attempt


def _to_row(job: Job) -> dict[str, Any]:
    row = {item.name: getattr(job, item.name) for item in fields(job)}
    row |= {name: json.dumps(row[name]) for name in _JSON}
    named = {_RENAMED.get(name, name): value for name, value in row.items()}
    return {**named, "fingerprint": job.fingerprint}


def _to_job(row: RowMapping, **changes: Any) -> Job:
    values = {item.name: row[_RENAMED.get(item.name, item.name)] for item in fields(Job)}
    values |= {name: json.loads(values[name]) for name in _JSON}
    values |= {name: tuple(values[name]) for name in ("files", "seeds")}
    return Job(**{**values, **changes})


def _prepare_sqlite(engine: sa.Engine) -> None:
    """WAL, so that readers wait for nobody; and each writer takes its turn from the beginning.

    Without ``BEGIN IMMEDIATE`` two that have read fail where they begin to write.
    """

    @event.listens_for(engine, "connect")
    def connect(connection: Any, _record: Any) -> None:
        connection.isolation_level = None
        for pragma in ("journal_mode=WAL", "synchronous=FULL", "busy_timeout=30000"):
            connection.execute(f"PRAGMA {pragma}")

    @event.listens_for(engine, "begin")
    def begin(connection: Connection) -> None:
        only_reads = connection.get_execution_options().get("only_reads", False)
        connection.exec_driver_sql("BEGIN" if only_reads else "BEGIN IMMEDIATE")
