"""The order of work under a virtual clock, with everything that can happen to requests.

Random worlds of callers, sizes, LoRAs, corrupt files, cancels, deadlines, too little memory and
workers that die; the engine's own queue, baton, policy and costs; threads are generators. After
each event the promises are checked. A world is repeated by its seed::

    python -m tools.simulation --requests 10000000 --processes 2
    python -m tools.simulation --seed 4711
"""

from tools.simulation.actors import Broken
from tools.simulation.world import REQUESTS, World, run_world, run_worlds

__all__ = ["Broken", "REQUESTS", "World", "run_world", "run_worlds"]
