"""The name `bentoml.diffusers`, in processes of their own."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import bentoml
import pytest

import _bentoml_impl

ROOT = Path(__file__).parent.parent
OURS = "assert {}.MODULE_NAME == 'bentoml_diffusers', {}; print('OURS')"


def run(code, site=None):
    environment = {**os.environ, "PYTHONWARNINGS": "error::DeprecationWarning:__main__"}
    if site is not None:
        environment["PYTHONPATH"] = str(site)
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "is deprecated" not in done.stderr
    return done.stdout.strip()


@pytest.fixture(scope="module")
def same_place(tmp_path_factory):
    """A folder with BentoML and this package side by side, as pip installs them."""
    site = tmp_path_factory.mktemp("site")
    for package in (bentoml, _bentoml_impl):
        folder = Path(package.__path__[0])
        shutil.copytree(folder, site / folder.name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "src" / "bentoml_diffusers", site / "bentoml_diffusers")
    shim = Path("_bentoml_impl", "frameworks", "diffusers.py")
    shutil.copy(ROOT / "src" / shim, site / shim)
    return site


@pytest.fixture(scope="module")
def future(same_place, tmp_path_factory):
    """The same with a BentoML that has dropped its module."""
    site = tmp_path_factory.mktemp("future") / "site"
    shutil.copytree(same_place, site)
    (site / "bentoml" / "_internal" / "frameworks" / "diffusers.py").unlink()
    init = site / "bentoml" / "__init__.py"
    lines = init.read_text().replace("    diffusers = _LazyLoader(", "    _dropped = _LazyLoader(")
    assert "_dropped" in lines
    init.write_text(lines)
    return site


def test_after_our_import_the_attribute_and_the_module_are_ours():
    assert "OURS" in run(
        "import bentoml_diffusers, bentoml, bentoml.diffusers as module, sys\n"
        "assert bentoml.diffusers is module is bentoml_diffusers\n"
        "assert sys.modules['bentoml.diffusers'] is bentoml_diffusers\n"
        "from bentoml.diffusers import ModelOptions\n"
        "assert ModelOptions is bentoml_diffusers.ModelOptions\n" + OURS.format(*["module"] * 2)
    )


def test_without_our_import_where_both_are_installed_in_one_place(same_place):
    code = "import bentoml.diffusers as module\n" + OURS.format(*["module"] * 2)
    code += "\nimport bentoml; assert bentoml.diffusers is module"
    assert "OURS" in run(code, same_place)


@pytest.mark.parametrize("start", ["import bentoml_diffusers, bentoml", "import bentoml.diffusers"])
def test_when_bentoml_has_dropped_its_module(future, start):
    code = f"{start}\nimport bentoml, importlib\n" + OURS.format(*["bentoml.diffusers"] * 2)
    code += "\nassert importlib.import_module('bentoml.diffusers') is bentoml.diffusers"
    assert "OURS" in run(code, future)


def test_old_models_reach_ours_when_bentoml_has_dropped_its_module(future):
    code = (
        "import bentoml\n"
        "from bentoml._internal.models.model import ModelInfo, ModelContext\n"
        "from bentoml import Tag\n"
        "info = ModelInfo(tag=Tag('a', 'b'), module='bentoml.diffusers', labels={}, options={},\n"
        "    metadata={}, signatures={}, api_version='v1',\n"
        "    context=ModelContext(framework_name='diffusers', framework_versions={}))\n"
        + OURS.format(*["info.imported_module"] * 2)
    )
    assert "OURS" in run(code, future)


def test_the_hook_is_written_used_and_removed(same_place, tmp_path):
    def hook(action):
        code = (
            "import sysconfig; sysconfig.get_path = lambda name: sys.argv[1]\n"
            "from bentoml_diffusers import _hook\n"
            f"print(_hook.{action}())\n"
        )
        done = subprocess.run(
            [sys.executable, "-c", "import sys\n" + code, str(tmp_path)],
            capture_output=True,
            text=True,
            check=True,
        )
        return done.stdout

    use = f"import site; site.addsitedir({str(tmp_path)!r}); import bentoml\n"
    use += OURS.format(*["bentoml.diffusers"] * 2)
    assert "not installed" in hook("show")
    hook("install")
    assert "OURS" in run(use)
    assert "removed" in hook("remove")
    assert list(tmp_path.glob("*.pth")) == []


@pytest.mark.slow
def test_the_wheel_has_the_namespace_file(tmp_path):
    import zipfile

    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--no-deps", "-q", "-w", tmp_path, ROOT], check=True
    )
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert "_bentoml_impl/frameworks/diffusers.py" in names
    assert "bentoml_diffusers/demo/pipeline/model_index.json" in names
    assert not [name for name in names if name.startswith("_bentoml_impl/__init__")]
