"""`.github/`, `SECURITY.md` and `[project.urls]` agree with each other and with promises."""

import re
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent
PROJECT = (ROOT / "pyproject.toml").read_text()
FORMS = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"))


def test_each_promised_python_is_checked():
    promised = re.findall(r'"Programming Language :: Python :: (3\.\d+)"', PROJECT)
    jobs = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())["jobs"]
    assert jobs["checks"]["strategy"]["matrix"]["python"] == promised
    assert {"run": ".ci/run"} in jobs["checks"]["steps"]
    makefile = (ROOT / "Makefile").read_text()
    for variable in jobs["checks"]["env"]:
        assert f"\n{variable} ?=" in makefile


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
