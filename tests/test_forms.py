"""`.github/`, `SECURITY.md` and `[project.urls]` agree with each other and with promises."""

import re
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent
PROJECT = (ROOT / "pyproject.toml").read_text()
FORMS = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"))


PYTHONS = re.findall(r'"Programming Language :: Python :: (3\.\d+)"', PROJECT)
MAKEFILE = (ROOT / "Makefile").read_text()


def jobs_of(workflow):
    return yaml.safe_load((ROOT / ".github/workflows" / workflow).read_text())["jobs"]


def variables_of(job):
    """Returns what a job sets for make, which knows all of it."""
    for variable in job["env"]:
        assert f"\n{variable} ?=" in MAKEFILE
    return job["env"]


def test_each_promised_python_is_checked():
    checks = jobs_of("ci.yml")["checks"]
    assert checks["strategy"]["matrix"]["python"] == PYTHONS
    assert {"run": ".ci/run"} in checks["steps"]
    assert variables_of(checks)["PYTHON"] == "python${{ matrix.python }}"
    (promised,) = re.findall(r"^PYTHONS \?= (.*)$", MAKEFILE, re.MULTILINE)
    assert promised.split() == [f"python{python}" for python in PYTHONS]


@pytest.mark.parametrize(
    ("workflow", "target", "python"),
    [("ci.yml", "lowest", PYTHONS[0]), ("newest.yml", "newest", PYTHONS[-1])],
)
def test_the_lowest_and_the_newest_versions_are_checked(workflow, target, python):
    job = jobs_of(workflow)[target]
    *_, setup, run = job["steps"]
    assert variables_of(job)["PYTHON"] == f"python{python}"
    assert setup["with"]["python-version"] == python
    assert run == {"run": f"make {target}"}
    assert f"\n{target}:" in MAKEFILE


@pytest.mark.parametrize("path", FORMS, ids=lambda path: path.stem)
def test_forms_can_be_read(path):
    form = yaml.safe_load(path.read_text())
    if path.stem != "config":
        assert form["name"]
        assert form["description"]
        ids = [item["id"] for item in form["body"]]
        assert len(ids) == len(set(ids))


def test_a_bug_report_asks_for_the_doctor():
    for page in (".github/ISSUE_TEMPLATE/bug.yml", "CONTRIBUTING.md", "SECURITY.md"):
        assert "bentoml diffusers doctor" in (ROOT / page).read_text()


def test_all_name_one_repository():
    (home,) = re.findall(r'^Source = "([^"]+)"', PROJECT, re.MULTILINE)
    for page in ("pyproject.toml", "SECURITY.md", ".github/ISSUE_TEMPLATE/config.yml"):
        urls = re.findall(
            r"https://github\.com/bentoml-diffusers[^\s\">]*", (ROOT / page).read_text()
        )
        assert urls
        assert all(url.startswith(home) for url in urls)
