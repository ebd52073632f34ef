"""Runs clients that others write against a server of this package, and tables what they can do.

    python -m tools.clients --python .venv-clients/bin/python          # all; writes the table
    python -m tools.clients --python .venv-clients/bin/python --quick  # openai and huggingface_hub

The clients are in an environment of their own (``requirements.txt``); those of npm are installed
beside it where there is a ``node``.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
EXAMPLES = ROOT / "examples" / "clients"
TABLE = ROOT / "docs" / "reference" / "clients.md"
QUICK = ("with_openai.py", "with_huggingface.py")
ALL = (*QUICK, "with_litellm.py", "with_recorded.py")
BEGIN, END = "<!-- written by make test-clients -->\n", "<!-- to here -->\n"
Told = dict[str, Any]

sys.path.append(str(ROOT / "tests" / "services"))
from processes import start_server  # noqa: E402


def run_script(command: list[str | Path], folder: Path) -> list[Told]:
    """Runs a script; what it writes beside its lines is shown.

    Returns:
        What it tells of each operation.
    """
    done = subprocess.run(  # noqa: S603
        [str(word) for word in command],
        cwd=folder,
        env=_environment(),
        stdout=subprocess.PIPE,
        text=True,
        check=False,
        timeout=300,
    )
    told = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or not told:
        sys.exit(f"{command[1]} ended with {done.returncode}: {done.stdout}")
    return told


def _environment() -> dict[str, str]:
    """Without what keeps Hugging Face's client from asking anybody."""
    return {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}


def run_python(python: Path, scripts: tuple[str, ...], url: str) -> list[Told]:
    """Runs scripts, and the examples of the documentation, in the environment of the clients."""
    for name in ("openai_images.py", "huggingface_images.py"):
        run_example([python, EXAMPLES / name, url])
    return [told for name in scripts for told in run_script([python, HERE / name, url], HERE)]


def run_example(command: list[str | Path]) -> None:
    """Runs an example of the documentation, in a folder that is gone afterwards."""
    with tempfile.TemporaryDirectory() as scratch:
        words = [str(word) for word in command]
        subprocess.run(words, cwd=scratch, env=_environment(), check=True, timeout=300)  # noqa: S603


def run_javascript(folder: Path, url: str) -> list[Told]:
    """Installs the packages of npm into a folder, and runs what uses them."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in (HERE / "package.json", HERE / "javascript.mjs", EXAMPLES / "openai_images.mjs"):
        shutil.copy(path, folder)
    install = ["npm", "install", "--no-audit", "--no-fund", "--silent"]
    subprocess.run(install, cwd=folder, check=True)  # noqa: S603
    sys.path.append(str(HERE))
    from operations import make_mask, make_photo

    files = {"photo.png": make_photo(), "mask.png": make_mask()}
    for name, data in files.items():
        (folder / name).write_bytes(data)
    run_example(["node", folder / "openai_images.mjs", url])
    return run_script(["node", "javascript.mjs", url, *files], folder)


def write_table(told: list[Told], versions: dict[str, str]) -> None:
    """Writes client by operation into the page of the documentation."""
    operations = list(dict.fromkeys(one["operation"] for one in told))
    clients = list(dict.fromkeys(one["client"] for one in told))
    can = {(one["client"], one["operation"]) for one in told}
    lines = [f"| Client | {' | '.join(operations)} |", f"|{' --- |' * (len(operations) + 1)}"]
    for client in clients:
        cells = ["yes" if (client, operation) in can else "" for operation in operations]
        lines.append(f"| {client} {versions.get(client, '')} | {' | '.join(cells)} |")
    text = TABLE.read_text()
    head, _, rest = text.partition(BEGIN)
    table = "\n".join(lines)
    TABLE.write_text(f"{head}{BEGIN}{table}\n{END}{rest.partition(END)[2]}")


def read_versions() -> dict[str, str]:
    """Returns the version of each client, as it is pinned."""
    lines = "".join(path.read_text() for path in HERE.glob("requirements*.txt")).splitlines()
    pinned = dict(line.split("==") for line in lines if "==" in line)
    packages = json.loads((HERE / "package.json").read_text())["dependencies"]
    return {
        "openai (Python)": pinned["openai"],
        "huggingface_hub": pinned["huggingface_hub"],
        "LiteLLM": pinned["litellm"],
        "openai (JavaScript)": packages["openai"],
        "AI SDK (openai-compatible)": packages["@ai-sdk/openai-compatible"],
        "@huggingface/inference": packages["@huggingface/inference"],
    }


def run_all(python: Path, *, quick: bool) -> list[Told]:
    """Starts a server with the demo model, and runs the clients."""
    with tempfile.TemporaryDirectory() as scratch:
        environment = {**os.environ, "BENTOML_HOME": scratch, "BENTOML_DO_NOT_TRACK": "True"}
        code = "import bentoml_diffusers; bentoml_diffusers.import_demo_models()"
        subprocess.run([sys.executable, "-c", code], env=environment, check=True)  # noqa: S603
        command, log = ["serve", "service:svc"], Path(scratch) / "log.txt"
        with start_server(command, HERE, environment, log) as server:
            told = run_python(python, QUICK if quick else ALL, server.url)
            if not quick and shutil.which("npm"):
                told += run_javascript(python.parents[1] / "javascript", server.url)
            assert "Traceback" not in server.log, server.log
    return told


def main() -> int:
    """Shows what failed; the exit status is 1 if anything did, and the table stays as it was."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--python", type=Path, required=True, help="of the clients' environment")
    parser.add_argument("--quick", action="store_true", help="two clients, and no table")
    options = parser.parse_args()
    told = run_all(options.python.absolute(), quick=options.quick)
    failed = [one for one in told if one["fault"]]
    for one in failed:
        print(f"--- {one['client']}: {one['operation']}\n{one['fault']}")
    print(f"{len(told) - len(failed)} of {len(told)} operations passed")
    has_all = {one["client"] for one in told} >= set(read_versions())
    if has_all and not failed:
        write_table(told, read_versions())
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
