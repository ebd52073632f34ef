"""Requests that really run at once."""

import contextlib
import threading
import time

from bentoml_diffusers.engine.forwards.calls import Member
from bentoml_diffusers.engine.requests.request import Ticket


@contextlib.contextmanager
def held(engine, count):
    """Keeps the baton until ``count`` requests wait for it, so that they really run at once."""
    conductor = engine._worker.conductor
    with conductor.turn(Member(Ticket())):
        yield
        give_up = time.monotonic() + 30
        while len(conductor._baton.ready) + len(conductor._baton.entering) < count:
            assert time.monotonic() < give_up
            time.sleep(0.001)


class _All:
    def __contains__(self, mark):
        return True


def skip_verification(engine):
    """Leaves out the lone forwards beside the first shared ones, for tests that count."""
    engine._worker.conductor._runs._verified = _All()


class Gate:
    """Holds a request at its first step until it is opened; a ``callback_on_step_end``."""

    def __init__(self):
        self.reached, self.opened = threading.Event(), threading.Event()

    def __call__(self, pipeline, index, timestep, tensors):
        self.reached.set()
        assert self.opened.wait(60)
        return tensors
