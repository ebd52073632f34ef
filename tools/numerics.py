"""Runs the tests under several settings of the numeric libraries: as on several processors.

MKL, oneDNN and torch choose their kernels by the processor, and each kernel rounds otherwise. These
settings choose the kernels of other processors on this one; on a processor where a setting means
nothing the tests run as always.

    python -m tools.numerics            # every setting, all tests but the slow ones
    python -m tools.numerics --quick    # two settings, the tests of engine, adapters and replay
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

SETTINGS = (
    {"MKL_CBWR": "COMPATIBLE"},
    {"MKL_CBWR": "AVX2"},
    {"MKL_CBWR": "AUTO,STRICT"},
    {"ATEN_CPU_CAPABILITY": "default"},
    {"ATEN_CPU_CAPABILITY": "avx2"},
    {"ONEDNN_MAX_CPU_ISA": "SSE41"},
    {"OMP_NUM_THREADS": "1"},
    {"OMP_NUM_THREADS": "2"},
)
# The oldest kernels of all libraries, and two threads: the farthest from an ordinary run.
QUICK_SETTINGS = (
    {"MKL_CBWR": "COMPATIBLE", "ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41"},
    {"MKL_CBWR": "AUTO,STRICT", "OMP_NUM_THREADS": "2"},
)
QUICK_FILES = ("engine*", "joining", "adapters*", "store_classic", "workflow_replay", "modular")
_PYTEST = ("-m", "pytest", "-q", "--dist", "loadfile", "-m", "not slow")


def run_tests(setting: dict[str, str], files: list[str], arguments: list[str]) -> bool:
    """Runs the tests in a process with this environment; returns whether they passed."""
    words = " ".join(f"{name}={value}" for name, value in setting.items())
    print(f"--- {words}", flush=True)
    command = [sys.executable, *_PYTEST, "-n", _workers(setting), *files, *arguments]
    environment = {**os.environ, **setting}
    return subprocess.run(command, env=environment, check=False).returncode == 0  # noqa: S603


def _workers(setting: dict[str, str]) -> str:
    threads = int(setting.get("OMP_NUM_THREADS", "1"))
    return str(max(1, min(4, (os.cpu_count() or 1) // threads)))


def main() -> int:
    """Runs every setting, also after a failure; the exit status is 1 if one failed."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="two settings, fewer tests")
    options, arguments = parser.parse_known_args()
    tests = Path("tests")
    patterns = QUICK_FILES if options.quick else ()
    files = sorted(str(path) for name in patterns for path in tests.glob(f"test_{name}.py"))
    settings = QUICK_SETTINGS if options.quick else SETTINGS
    passed = [run_tests(setting, files, arguments) for setting in settings]
    print(f"{sum(passed)} of {len(passed)} settings passed")
    return 0 if all(passed) else 1


if __name__ == "__main__":
    sys.exit(main())
