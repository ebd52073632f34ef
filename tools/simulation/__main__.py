"""The command line of the simulation."""

from __future__ import annotations

import argparse
import multiprocessing
import time
from collections import Counter

from tools import simulation
from tools.simulation import REQUESTS, run_worlds


def main() -> None:
    """Reads the command line and says what came of it."""
    parser = argparse.ArgumentParser(description=simulation.__doc__)
    parser.add_argument("--requests", type=int, default=100_000)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--seed", type=int, help="repeat this world only")
    given = parser.parse_args()
    began, first = time.perf_counter(), given.seed or 0
    worlds = 1 if given.seed is not None else -(-given.requests // REQUESTS)
    chunks = [range(n, min(n + 50, first + worlds)) for n in range(first, first + worlds, 50)]
    counts: Counter[str] = Counter()
    with multiprocessing.Pool(given.processes) as pool:
        for found in pool.imap_unordered(run_worlds, chunks):
            counts += found
    print(f"{counts.total()} requests in {time.perf_counter() - began:.0f} s: {dict(counts)}")


if __name__ == "__main__":
    main()
