"""Tries the pipeline classes of all families and writes the table of the documentation.

    python -m tools.families                   # all pages, two at once: some minutes
    python -m tools.families flux z_image      # these pages; other rows stay as they are
    python -m tools.families --table           # writes the table from the last results

The results are kept in build/families.json.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "build" / "families.json"
PAGES = ROOT / "tests" / "families"
TABLE = ROOT / "docs" / "reference" / "families.md"
SETTINGS = {"BENTOML_DO_NOT_TRACK": "True", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
COLUMNS = {
    "runs": "runs",
    "shares": "shares",
    "seeds": "seeds",
    "store": "stored",
    "cancel": "cancels",
    "lora": "LoRA",
    "replay": "replays",
}
HEAD = """# Families of pipelines

Which classes of diffusers {version} were tried, with tiny weights on a CPU, and what they do here.
What follows a class in brackets says how its pipeline is made. `python -m tools.families` writes
this page; `tests/families` says how each pipeline is made, `make test-families` tries them.

- **runs**: alone it makes what diffusers' own call makes, bit for bit, and another seed another
  result.
- **shares**: three requests at once share forwards of the denoiser, and each is within one 8-bit
  level of its lone run. `2 of 3`: only those with text of equal length.
- **seeds**: the second of two results of one prompt is that of its reported seed.
- **stored**, **replays**: stored and loaded, and repeated from its workflow, it makes the same.
- **cancels**: cancelled after a step it does no other, and the next request is right.
- **LoRA**: a LoRA of a request makes what diffusers makes with it, and the base stays clean.
- **served**: the endpoints that a service of the class has.

A number refers to the reasons below the table.
"""
_Row = dict[str, list[object]]
_Results = dict[str, dict[str, _Row]]


def main() -> int:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("pages", nargs="*", help="names of files in tests/families")
    parser.add_argument("--table", action="store_true", help="try nothing")
    parser.add_argument("--into", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    sys.path.insert(0, str(ROOT / "tests"))
    if arguments.into:
        Path(arguments.into).write_text(json.dumps(try_page(arguments.pages[0])))
        return 0
    results: _Results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    if not arguments.table:
        for found in try_pages(arguments.pages or list_pages()):
            results |= found
            RESULTS.parent.mkdir(exist_ok=True)
            RESULTS.write_text(json.dumps(results, indent=1, sort_keys=True))
    TABLE.write_text(make_page(results), encoding="utf-8")
    failed = [
        f"{name}: {check} {cell[1]}"
        for rows in results.values()
        for name, row in rows.items()
        for check, cell in row.items()
        if str(cell[1]).startswith("FAILED")
    ]
    print("\n".join(failed) or "nothing failed")
    return bool(failed)


def list_pages() -> list[str]:
    """Returns the names of all pages that declare a family."""
    files = sorted(PAGES.glob("*.py"))
    return [file.stem for file in files if "\nFAMILY = " in file.read_text(encoding="utf-8")]


def try_pages(pages: list[str]) -> Iterator[_Results]:
    """Tries pages in processes of their own, two at once."""
    with ThreadPoolExecutor(2) as pool:
        yield from pool.map(_try_apart, pages)


def _try_apart(page: str) -> _Results:
    with tempfile.TemporaryDirectory() as folder:
        into = Path(folder, "results.json")
        environment = {**os.environ, **SETTINGS, "BENTOML_HOME": folder}
        command = [sys.executable, "-m", "tools.families", page, "--into", str(into)]
        done = subprocess.run(  # noqa: S603
            command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
        )
        results: _Results = json.loads(into.read_text()) if done.returncode == 0 else {}
    print(page if results else f"{page} FAILED: {done.stderr[-2000:]}", flush=True)
    return results


def try_page(page: str) -> _Results:
    """Tries the classes of one page in this process."""
    import importlib

    from families.checks import check_class, one_thread

    family = importlib.import_module(f"families.{page}").FAMILY
    rows: dict[str, _Row] = {}
    for name in family.classes:
        missing = family.why_missing(name)
        if missing:
            rows[name] = {"runs": [False, missing]}
            continue
        with one_thread():
            outcomes = check_class(family, name)
        rows[name] = {check: [item.passed, item.reason] for check, item in outcomes.items()}
        if rows[name].get("shares", [False])[0] and family.shares(name) == 2:
            rows[name]["shares"] = ["2 of 3", ""]
    return {family.name: rows}


def make_page(results: _Results) -> str:
    """Returns the page of the documentation."""
    import diffusers

    reasons: dict[str, int] = {}
    heads = ["family", "class", *COLUMNS.values(), "served"]
    lines = [HEAD.format(version=diffusers.__version__)]
    lines += [f"| {' | '.join(heads)} |", f"|{'---|' * len(heads)}"]
    for family, rows in sorted(results.items()):
        for name, row in rows.items():
            cells = [_cell(row.get(check), reasons) for check in COLUMNS]
            shown = " | ".join([family, f"`{name}`", *cells, _served(name, reasons)])
            lines.append(f"| {shown} |")
    lines += ["", *(f"{number}. {reason}" for reason, number in reasons.items()), ""]
    others = sorted(
        _all_classes() - {_class_of(name) for rows in results.values() for name in rows}
    )
    lines += [f"Not tried yet ({len(others)}): {', '.join(f'`{name}`' for name in others)}.", ""]
    return "\n".join(lines)


def _cell(cell: list[object] | None, reasons: dict[str, int]) -> str:
    if cell is None:
        return ""
    if cell[0]:
        return str(cell[0]) if isinstance(cell[0], str) else "yes"
    reason = "it fails" if str(cell[1]).startswith("FAILED") else str(cell[1])
    return f"no ({reasons.setdefault(reason, len(reasons) + 1)})"


def _served(name: str, reasons: dict[str, int]) -> str:
    import diffusers

    from bentoml_diffusers import RequestLimits, errors
    from bentoml_diffusers.serving.endpoints import classic_endpoints

    try:
        cls = getattr(diffusers, _class_of(name))
        found = classic_endpoints(RequestLimits(), cls)
    except (errors.DiffusersError, AttributeError):
        found = ()
    if not found:
        reason = "a service has no endpoint for what it takes or makes"
        return f"no ({reasons.setdefault(reason, len(reasons) + 1)})"
    return ", ".join(f"`{endpoint.name}`" for endpoint in found)


def _class_of(name: str) -> str:
    return name.partition(" ")[0]


def _all_classes() -> set[str]:
    """By their names: to import all of them takes minutes."""
    import diffusers

    none = ("Auto", "Flax", "Onnx", "Modular", "DiffusionPipeline")
    return {
        name for name in dir(diffusers) if name.endswith("Pipeline") and not name.startswith(none)
    }


if __name__ == "__main__":
    sys.exit(main())
