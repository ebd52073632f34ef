"""Options of a service that are not those of its model or its engine."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING

from bentoml_diffusers.errors import InvalidOption

if TYPE_CHECKING:
    import os
    from collections.abc import Mapping

# Steps by the `quality` of OpenAI's images API, as a share of those of a request that gives none.
STEP_SHARES: Mapping[str, float] = {
    "low": 0.5,
    "medium": 1.0,
    "standard": 1.0,
    "high": 1.5,
    "hd": 1.5,
    "xhigh": 2.0,
    "max": 3.0,
}


@dataclass(frozen=True, kw_only=True)
class OpenAIOptions:
    """How a service speaks OpenAI's images API.

    Attributes:
        quality_steps: Denoising steps by ``quality`` of a request: ``{"low": 10, "high": 40}``. A
            quality that is not named gets a share of the steps of a request that gives none: 0.5
            for ``low``, 1 for ``medium`` and ``standard``, 1.5 for ``high`` and ``hd``, 2 for
            ``xhigh``, 3 for ``max``; never more than ``max_steps``.
        model_aliases: Other names that requests may give the model, or the model with LoRAs:
            ``{"gpt-image-1": "demo", "sketch": "demo:outline"}``. For clients whose names are
            fixed.
    """

    quality_steps: Mapping[str, int] = field(default_factory=dict)
    model_aliases: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for quality, steps in self.quality_steps.items():
            if quality not in STEP_SHARES:
                raise InvalidOption("quality_steps", quality, f"one of {', '.join(STEP_SHARES)}")
            if type(steps) is not int or steps < 1:
                raise InvalidOption("quality_steps", steps, "an integer from 1")
        for pair in self.model_aliases.items():
            if not all(isinstance(name, str) and name for name in pair):
                raise InvalidOption("model_aliases", pair, "a name by a name")


_LEAST = {
    "max_waiting": 1,
    "max_running": 1,
    "max_attempts": 1,
    "timeout_s": 1,
    "lease_s": 1,
    "keep_s": 1,
    "url_lifetime_s": 1,
}


@dataclass(frozen=True, kw_only=True)
class JobOptions:
    """Where jobs are kept, how many, and for how long; ``service(..., jobs=JobOptions(...))``.

    Attributes:
        folder: Of the SQLite database and of the images, where ``database`` and ``results`` name
            no other place. ``~`` is the home of the user who runs the service.
        database: URL for SQLAlchemy, such as ``"postgresql+psycopg://user@host/name"``. SQLite is
            for the workers of one machine, PostgreSQL for those of many.
        results: Folder, or URL for fsspec such as ``"s3://bucket/jobs"``, that all workers reach.
        max_waiting: Jobs that wait; more are refused with 429.
        max_running: Jobs that a worker runs at once; they share forwards like other requests.
        max_attempts: How often a job is begun: one whose worker dies is begun again.
        timeout_s: Seconds that a job may take once it is begun; that of other requests
            (``traffic.timeout``) is not for jobs.
        lease_s: Seconds after which a job whose worker is silent is given to another one.
        keep_s: Seconds that a job and its images are kept after its end.
        url_lifetime_s: Seconds that the address of an image is good for.

    Raises:
        InvalidOption: 400, a number that is too small.
    """

    folder: str | os.PathLike[str] = "~/.local/share/bentoml_diffusers/jobs"
    database: str | None = None
    results: str | None = None
    max_waiting: int = 10_000
    max_running: int = 4
    max_attempts: int = 3
    timeout_s: float = 3600.0
    lease_s: float = 30.0
    keep_s: float = 7 * 24 * 3600.0
    url_lifetime_s: float = 3600.0

    def __post_init__(self) -> None:
        for item in fields(self):
            least, value = _LEAST.get(item.name), getattr(self, item.name)
            if least is not None and (not isinstance(value, (int, float)) or value < least):
                raise InvalidOption(item.name, value, f"a number from {least}")

    @property
    def database_url(self) -> str:
        """Where the table is."""
        return self.database or f"sqlite:///{self._folder / 'jobs.sqlite'}"

    @property
    def results_url(self) -> str:
        """Where the images are."""
        return self.results or str(self._folder / "results")

    @property
    def _folder(self) -> Path:
        folder = Path(self.folder).expanduser()
        folder.mkdir(parents=True, exist_ok=True)
        return folder
