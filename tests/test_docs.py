"""What README and docs show runs: Python blocks, requests, commands; and the reference is whole.

A fence is left out only with its reason, as ```` ```sh no-run: downloads a model ````. One that
asks a server runs as a program of its own, beside the demo: ```` ```python served: client.py ````.
"""

import functools
import importlib
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path

import click
import pytest

import bentoml_diffusers
from bentoml_diffusers.cli import diffusers_command

sys.path.append(str(Path(__file__).parent / "services"))
from processes import start_server

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted(path for path in DOCS.rglob("*.md") if "_build" not in path.parts),
]
SERVED_AT = "http://localhost:3000"
FENCE = re.compile(
    r"^(?P<indent> *)```(?P<info>[^\n`]*)\n(?P<body>.*?)^(?P=indent)```$", re.MULTILINE | re.DOTALL
)


@dataclass(frozen=True)
class Block:
    page: str
    line: int
    language: str
    excuse: str
    text: str

    def __str__(self):
        return f"{self.page}:{self.line}"


def read_blocks(path):
    text = path.read_text()
    for match in FENCE.finditer(text):
        language, _, remark = match["info"].partition(" ")
        yield Block(
            page=path.relative_to(ROOT).as_posix(),
            line=text.count("\n", 0, match.start("body")) + 1,
            language=language,
            excuse=remark,
            text=textwrap.dedent(match["body"]),
        )


BLOCKS = [block for path in PAGES for block in read_blocks(path)]
PYTHON = [block for block in BLOCKS if block.language == "python" and not block.excuse]
SERVED = [block for block in BLOCKS if block.excuse.startswith("served: ")]
SHELL = [block for block in BLOCKS if block.language == "sh"]


def read_commands(block):
    """Splits a block into commands, each a list of words; quotes may span lines."""
    pending = ""
    for line in block.text.splitlines():
        pending += line
        if pending.endswith("\\"):
            pending = pending[:-1]
            continue
        try:
            words = shlex.split(pending, comments=True)
        except ValueError:
            pending += "\n"
            continue
        if words:
            yield words
        pending = ""
    assert not pending.strip(), f"{block}: unfinished command {pending!r}"


@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_a_block_has_a_language_and_an_excuse_has_a_reason(block):
    assert block.language, "write what is in the block, such as `text`"
    assert block.language not in ("bash", "console", "shell", "python3"), "write `sh` or `python`"
    if block.language in ("python", "sh") and block.excuse and block not in SERVED:
        assert re.fullmatch(r"no-run: .{8,}", block.excuse)


@pytest.mark.slow
@pytest.mark.parametrize("page", sorted({block.page for block in PYTHON}))
def test_python_blocks_of_a_page_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(ROOT / "examples" / "differential_diffusion")  # of guides/modular
    namespace = {"__name__": "__main__"}
    for block in PYTHON:
        if block.page == page:
            source = "\n" * (block.line - 1) + block.text
            exec(compile(source, str(ROOT / page), "exec"), namespace)


@pytest.mark.parametrize("block", SHELL, ids=str)
def test_commands_exist(block, monkeypatch):
    monkeypatch.syspath_prepend(ROOT)
    for words in read_commands(block):
        program, *arguments = (word for word in words if not re.match(r"[A-Z_]+=", word))
        assert program in CHECKS, f"{program!r} is checked by nothing"
        CHECKS[program](arguments)


def check_bentoml(arguments):
    name, *rest = arguments
    if name != "diffusers":
        assert has_help(name)
        return
    command, *rest = rest
    try:
        diffusers_command.commands[command].make_context(command, list(rest))
    except click.UsageError as error:
        pytest.fail(f"bentoml diffusers {command}: {error}")


def check_make(arguments):
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    variables = re.findall(r"^([A-Z_]+) \?=", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for word in arguments:
        name, is_variable, _ = word.partition("=")
        assert name in (variables if is_variable else targets)


def check_python(arguments):
    flag, module, *rest = arguments
    assert flag == "-m"
    assert importlib.util.find_spec(module)
    if module == "tools.demo_model":
        parser = importlib.import_module(f"{module}.__main__")._build_parser()
        parser.parse_args(rest)  # exits, and says why, if they are wrong


def check_cd(arguments):
    (folder,) = arguments
    assert (ROOT / folder).is_dir()


def check_install(arguments):
    for word in arguments:
        path = re.sub(r"\[[a-z,]+\]$", "", word)
        if path == "." or path.endswith(".txt"):
            assert (ROOT / path).exists()


def accept(arguments):
    """Run by another test, or a program that is not ours."""


CHECKS = {
    "bentoml": check_bentoml,
    "make": check_make,
    "python": check_python,
    "pip": check_install,
    "cd": check_cd,
    "curl": accept,
    "docker": accept,
    "openapi-python-client": accept,
    ".ci/run": accept,
}


@functools.cache
def has_help(name):
    command = [sys.executable, "-m", "bentoml", name, "--help"]
    return subprocess.run(command, capture_output=True, check=False, timeout=120).returncode == 0


REQUESTS = {
    page: commands
    for page in sorted({block.page for block in SHELL})
    if (
        commands := [
            words
            for block in SHELL
            if block.page == page and not block.excuse
            for words in read_commands(block)
            if words[0] == "curl"
        ]
    )
}


@pytest.fixture(scope="module")
def demo_server(tmp_path_factory):
    """Address of `bentoml diffusers demo`."""
    folder = tmp_path_factory.mktemp("demo")
    with start_server(
        ["diffusers", "demo", "--jobs", "jobs"], folder, dict(os.environ), folder / "log.txt"
    ) as server:
        yield server.url


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("curl") is None, reason="there is no curl here")
@pytest.mark.parametrize("page", REQUESTS)
def test_requests_of_a_page_are_answered(page, demo_server, tmp_path):
    for words in REQUESTS[page]:
        assert any(SERVED_AT in word for word in words)
        command = [word.replace(SERVED_AT, demo_server) for word in words]
        done = subprocess.run(
            [*command, "--silent", "--show-error", "--fail-with-body"],
            cwd=tmp_path,
            capture_output=True,
            check=False,
            timeout=120,
        )
        assert done.returncode == 0, (words, done.stderr, done.stdout[:500])


@pytest.mark.slow
@pytest.mark.parametrize("block", SERVED, ids=str)
def test_programs_that_ask_a_server_run(block, demo_server, tmp_path):
    interpreter = sys.executable if block.language == "python" else shutil.which("node")
    if interpreter is None:
        pytest.skip("there is no node here")
    program = tmp_path / block.excuse.removeprefix("served: ")
    program.write_text(block.text.replace(SERVED_AT, demo_server))
    done = subprocess.run(
        [interpreter, program],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() or list(tmp_path.glob("*.png"))


def test_every_public_name_is_in_the_api_reference_once():
    text = (DOCS / "reference" / "api.md").read_text()
    documented = re.findall(
        r"^\.\. (?:auto)?(?:function|class|data):: bentoml_diffusers\.(\w+)$", text, re.MULTILINE
    )
    assert sorted(documented) == sorted(bentoml_diffusers.__all__)


def test_every_command_is_in_the_cli_reference_once():
    text = (DOCS / "reference" / "cli.md").read_text()
    documented = re.findall(r"^```\{command-help\} (\w+)$", text, re.MULTILINE)
    headings = re.findall(r"^## bentoml diffusers (\w+)$", text, re.MULTILINE)
    assert sorted(documented) == sorted(diffusers_command.commands)
    assert headings == documented


def test_links_of_the_readme_lead_somewhere():
    text = (ROOT / "README.md").read_text()
    links = [link for link in re.findall(r"\]\(([^)#]+)", text) if "://" not in link]
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_the_changelog_has_the_version():
    text = (ROOT / "CHANGELOG.md").read_text()
    assert re.search(rf"^## \[?{re.escape(bentoml_diffusers.__version__)}\b", text, re.MULTILINE)
