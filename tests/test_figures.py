"""`python -m tools.figures`."""

import subprocess
import sys
from pathlib import Path

import pytest

from tools import figures

ROOT = Path(__file__).parent.parent

CODE = '''
# A comment.
class Outer:
    """Not # one."""

    def method(self):
        def inner():
            pass  # another
        return inner


@decorated
async def free(): ...
'''


@pytest.fixture
def modules(tmp_path):
    (tmp_path / "part").mkdir()
    (tmp_path / "part" / "code.py").write_text(CODE)
    (tmp_path / "empty.py").write_text("")
    return figures.read_modules(tmp_path)


def test_a_module_is_measured(modules):
    empty, code = modules
    assert (empty.package, empty.lines, empty.comments, empty.functions) == (".", 0, 0, {})
    assert (code.package, code.lines, code.comments) == ("part", 13, 2)
    assert code.functions == {"Outer.method": 4, "Outer.method.inner": 2, "free": 1}


def test_a_quantile_is_one_of_the_values():
    assert figures.quantile(range(1, 11), 0.9) == 9
    assert figures.quantile([3, 1, 2], 0.5) == 2
    assert figures.quantile([], 0.5) == 0


def test_rows_have_the_packages_and_all(modules):
    rows = [row[:3] for row in figures.table_rows(modules)]
    assert rows == [(".", 0, 1), ("part", 13, 1), ("all", 13, 2)]


def test_it_runs():
    command = [sys.executable, "-m", "tools.figures", "--top", "3"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    for package in ("engine", "store", "all"):
        assert f"\n{package} " in done.stdout
    modules, functions = done.stdout.partition("longest modules\n")[2].split("\n\n")
    assert [len(part.splitlines()) for part in (modules, functions)] == [3, 4]
    sizes = [int(line.split()[0]) for line in modules.splitlines()]
    assert sizes == sorted(sizes, reverse=True)
