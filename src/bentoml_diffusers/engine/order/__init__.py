"""The order of work: who starts, and whose forward runs next.

Decisions are functions of a state that they do not change. They import neither torch nor threads,
so that they can be simulated; :mod:`~bentoml_diffusers.engine.admission` and
:mod:`~bentoml_diffusers.engine.forwards.conductor` carry them out.
"""

from bentoml_diffusers.engine.order.baton import Baton
from bentoml_diffusers.engine.order.costs import Costs, bucket
from bentoml_diffusers.engine.order.deadlines import note_urgency
from bentoml_diffusers.engine.order.forecasts import Estimate, Load, forecast, lone_seconds
from bentoml_diffusers.engine.order.paces import Pace, Paces
from bentoml_diffusers.engine.order.policy import (
    choose_entry,
    choose_group,
    choose_start,
    kept_places,
    record_group,
)
from bentoml_diffusers.engine.order.queue import Queue
from bentoml_diffusers.engine.order.turns import Turns
from bentoml_diffusers.engine.order.work import Work

__all__ = [
    "Baton",
    "Costs",
    "Estimate",
    "Queue",
    "Load",
    "Pace",
    "Paces",
    "Turns",
    "Work",
    "bucket",
    "choose_entry",
    "choose_group",
    "choose_start",
    "forecast",
    "kept_places",
    "lone_seconds",
    "note_urgency",
    "record_group",
]
