"""Corners of BentoML's runners, which serve legacy bentos."""

from __future__ import annotations

import functools
import os
import pickle
from typing import Any


def is_runner_process() -> bool:
    """True in the process of a legacy runner that ``bentoml serve`` started.

    Until BentoML (1.4) tells it in public.
    """
    from bentoml._internal.context import server_context

    return bool(server_context.service_type == "runner")


def runner_timeout_s() -> float | None:
    """Seconds that a call of a runner may take; ``None`` outside of one.

    A little less than BentoML's own timeout, whose answer has no text. Until a runnable (1.4) can
    ask for it in public.
    """
    from bentoml._internal.configuration.containers import BentoMLContainer

    if not is_runner_process():
        return None
    return 0.95 * float(BentoMLContainer.runners_config.get()["traffic"]["timeout"])


def let_runner_calls_overlap() -> None:
    """Lets the calls of a runner run side by side if its runnable has ``max_concurrent_calls``.

    BentoML allows one call at a time in each runner process, also for runnables that say that
    they support threads. Until ``LocalRunnerRef`` honours ``SUPPORTS_CPU_MULTI_THREADING``.
    """
    import anyio
    from bentoml._internal.runner.runner_handle.local import LocalRunnerRef

    if getattr(LocalRunnerRef, "lets_calls_overlap", False):
        return
    start = LocalRunnerRef.__init__

    @functools.wraps(start)
    def start_with_limit(self: Any, runner: Any) -> None:
        start(self, runner)
        calls = getattr(self._runnable, "max_concurrent_calls", None)
        self._limiter = anyio.CapacityLimiter(calls) if calls else None

    LocalRunnerRef.__init__ = start_with_limit
    LocalRunnerRef.lets_calls_overlap = True


def keep_thread_counts() -> None:
    """Lets a number of threads that the operator sets reach the workers of a runner.

    BentoML sets ``OMP_NUM_THREADS``, ``MKL_NUM_THREADS`` and others to the number of CPUs in each
    worker, whatever is set. Applies to runnables with ``keeps_thread_counts``. Until
    ``DefaultStrategy.get_worker_env`` leaves alone what is set (not in 1.4.40).
    """
    from bentoml._internal.runner.strategy import THREAD_ENVS, DefaultStrategy

    if getattr(DefaultStrategy, "keeps_thread_counts", False):
        return
    decide = DefaultStrategy.get_worker_env

    @functools.wraps(decide)
    def get_worker_env(cls: Any, runnable_class: Any, *args: Any) -> dict[str, Any]:
        del cls
        environ: dict[str, Any] = decide(runnable_class, *args)
        is_set = any(name in os.environ for name in THREAD_ENVS)
        if not (is_set and getattr(runnable_class, "keeps_thread_counts", False)):
            return environ
        # None of them: torch asks MKL first, and MKL what OpenMP says where it is told nothing.
        return {name: value for name, value in environ.items() if name not in THREAD_ENVS}

    DefaultStrategy.get_worker_env = classmethod(get_worker_env)
    DefaultStrategy.keeps_thread_counts = True


def install_image_container() -> None:
    """Lets PIL images of any making pass to a legacy runner.

    BentoML encodes an image argument in ``image.format``, which is ``None`` for every image that
    was created or resized, and fails; here it travels as it is. Until BentoML's
    ``PILImageContainer`` does so (broken in 1.4.40).
    """
    from bentoml._internal.runner.container import (
        DataContainerRegistry,
        Payload,
        PILImageContainer,
    )
    from bentoml._internal.types import LazyType

    class PicklePILContainer(PILImageContainer):  # type: ignore[misc]
        """A PIL image as pickled pixels: exact, for every mode, and faster than PNG."""

        @classmethod
        def to_payload(cls, batch: Any, batch_dim: int) -> Payload:
            del batch_dim
            return cls.create_payload(pickle.dumps(batch.copy()), batch_size=1)

        @classmethod
        def from_payload(cls, payload: Payload) -> Any:
            return pickle.loads(payload.data)  # noqa: S301 - between BentoML's own processes

    image_type = LazyType("PIL.Image", "Image")
    DataContainerRegistry.register_container(image_type, image_type, PicklePILContainer)
