"""Which way imports run, what stays unloaded, what is public, where text becomes code.

And that the design page names what there is, and that modules and functions stay small.
"""

import ast
import inspect
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import bentoml_diffusers
from tools import figures

ROOT = Path(__file__).parent.parent
SOURCE = Path(bentoml_diffusers.__file__).parent
DESIGN = (ROOT / "docs" / "design.md").read_text()
MODULES = sorted(SOURCE.rglob("*.py"))
PACKAGE = "bentoml_diffusers"

# Each package may import itself and those before it.
LAYERS = (
    "errors",
    "options",
    "media",
    "store",
    "tasks",
    "loading",
    "adapters",
    "workflow",
    "engine",
    "serving",
)
# Wings of a layer: each may import those before it, and is imported by its face. What lies beside
# them in the layer may import all of them.
WINGS = {
    "store": ("entries", "sources", "code", "modular"),
    "workflow": ("files", "record", "replay"),
    "engine": ("order", "requests", "forwards", "views"),
}
BASE = ("_compat", "_logs", "_names")
OUTSIDE = ("cli", "demo", "testing", "_hook")  # they use the layers; only `serving` may know them
HEAVY = ("torch", "diffusers", "transformers", "peft")

PUBLIC = {
    "API_VERSION",
    "AccessOptions",
    "EmbedOptions",
    "Engine",
    "EngineLimits",
    "EngineReport",
    "Handle",
    "KeyOptions",
    "JobOptions",
    "MODULE_NAME",
    "ModelOptions",
    "OpenAIOptions",
    "Progress",
    "ReplayReport",
    "RequestLimits",
    "RequestOptions",
    "Result",
    "Workflow",
    "get",
    "get_runnable",
    "import_demo_models",
    "import_lora",
    "import_model",
    "import_textual_inversion",
    "load_model",
    "populate_workflow_from_pipeline",
    "replay",
    "run_with_workflow",
    "save_model",
    "save_image",
    "service",
}


def module_name(path):
    parts = path.relative_to(SOURCE).with_suffix("").parts
    return ".".join(part for part in (PACKAGE, *parts) if part != "__init__")


NAMES = {module_name(path) for path in MODULES}


def own_imports(path):
    """Modules of this package that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.split(".")[0] == PACKAGE}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno} imports relatively"
            if (node.module or "").split(".")[0] == PACKAGE:
                found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name if name in NAMES else name.rpartition(".")[0] for name in found}


def layer(name):
    return [*name.split("."), ""][1]


def is_upward(source, target):
    if target in BASE:
        return False
    if source in BASE:
        return target != "errors"
    if target in OUTSIDE:
        return source != "serving"
    return LAYERS.index(target) > LAYERS.index(source)


def test_imports_run_one_way():
    upward = [
        f"{module_name(path)} imports {target}"
        for path in MODULES
        if layer(module_name(path)) in (*LAYERS, *BASE)
        for target in sorted(own_imports(path))
        if target != PACKAGE and is_upward(layer(module_name(path)), layer(target))
    ]
    assert not upward


def wing(name):
    """The wing of a module; nothing for what lies beside the wings."""
    found = [*name.split("."), "", ""][2]
    return found if found in WINGS.get(layer(name), ()) else ""


@pytest.mark.parametrize("name", WINGS)
def test_imports_of_wings_run_one_way(name):
    wings = WINGS[name]
    mine = [path for path in MODULES if layer(module_name(path)) == name]
    assert {path.parent.name for path in mine} == {name, *wings}
    upward = [
        f"{module_name(path)} imports {target}"
        for path in mine
        if wing(module_name(path))
        for target in sorted(own_imports(path))
        if layer(target) == name
        and [*wings, ""].index(wing(target)) > wings.index(wing(module_name(path)))
    ]
    assert not upward


@pytest.mark.parametrize("name", WINGS)
def test_wings_are_imported_by_their_faces(name):
    faces = {f"{PACKAGE}.{name}", *(f"{PACKAGE}.{name}.{one}" for one in WINGS[name])}
    past = [
        f"{module_name(path)} imports {target}"
        for path in MODULES
        for target in sorted(own_imports(path))
        if layer(target) == name and target not in faces
        if (layer(module_name(path)), wing(module_name(path))) != (name, wing(target))
    ]
    assert not past


def test_every_module_belongs_to_a_layer():
    assert {layer(name) for name in NAMES} == {"", *LAYERS, *BASE, *OUTSIDE}


def test_no_circle():
    graph = {module_name(path): own_imports(path) for path in MODULES}
    graph[PACKAGE] = set()  # its names are imported when they are used
    done = set()

    def visit(name, trail):
        assert name not in trail, " -> ".join([*trail, name])
        if name not in done:
            for target in graph[name] - {name}:
                visit(target, [*trail, name])
            done.add(name)

    for name in graph:
        visit(name, [])


@pytest.mark.parametrize("module", figures.read_modules(SOURCE), ids=lambda one: str(one.path))
def test_modules_stay_small(module):
    assert module.lines <= 400


def test_functions_stay_small():
    modules = figures.read_modules(SOURCE)
    lengths = [lines for module in modules for lines in module.functions.values()]
    assert figures.quantile(lengths, 0.5) <= 10
    assert figures.quantile(lengths, 0.9) <= 32


def test_the_design_page_has_the_package_layout():
    section = DESIGN.partition("## Package layout\n")[2].partition("\n## ")[0]
    listed = re.findall(r"^\| `([^`]+)` \|", section, re.MULTILINE)
    entries = (path for path in SOURCE.iterdir() if path.name not in ("__init__.py", "__pycache__"))
    there = {f"{path.name}/" if path.is_dir() else path.name for path in entries}
    for name, wings in WINGS.items():
        there |= {f"{name}/{one}/" for one in wings}
        if [path.name for path in (SOURCE / name).glob("*.py")] == ["__init__.py"]:
            there.remove(f"{name}/")  # nothing lies beside the wings
    assert sorted(listed) == sorted(there - {"py.typed"})
    assert f"`{' → '.join(reversed(LAYERS))}`" in section


@pytest.mark.parametrize("page", ["docs/design.md", "CONTRIBUTING.md", "README.md"])
def test_pages_name_files_that_exist(page):
    text = (ROOT / page).read_text()
    paths = re.findall(r"`((?:[\w.]+/)*(?:[\w.]+/|\w+\.(?:py|md|toml|txt)))`", text)
    gone = [path for path in paths if not ((SOURCE / path).exists() or (ROOT / path).exists())]
    assert not gone


def loaded_by(code):
    report = f"import json, sys; print(json.dumps([n for n in {HEAVY!r} if n in sys.modules]))"
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\n{report}"], capture_output=True, text=True, check=True
    )
    return json.loads(done.stdout.splitlines()[-1])


def test_importing_the_package_loads_nothing_heavy():
    assert loaded_by("import bentoml_diffusers") == []


def test_reading_a_workflow_loads_nothing_heavy():
    assert loaded_by("import bentoml_diffusers; bentoml_diffusers.Workflow") == []


@pytest.mark.parametrize("arguments", [["--help"], ["diffusers", "--help"]])
def test_help_loads_nothing_heavy(arguments):
    code = f"""
import contextlib
from bentoml_cli.cli import cli
with contextlib.suppress(SystemExit):
    cli({arguments!r})
"""
    assert loaded_by(code) == []


@pytest.mark.slow
def test_the_check_for_heavy_imports_works():
    assert "torch" in loaded_by("import bentoml_diffusers; bentoml_diffusers.Engine; import torch")


def test_public_names_are_exact():
    assert set(bentoml_diffusers.__all__) == PUBLIC
    assert len(bentoml_diffusers.__all__) == len(PUBLIC)
    assert set(dir(bentoml_diffusers)) == PUBLIC


@pytest.mark.parametrize("name", sorted(PUBLIC))
def test_public_names_are_documented(name):
    value = getattr(bentoml_diffusers, name)
    if callable(value):
        # A class inherits no docstring here: `inspect.getdoc` would look at its bases.
        assert inspect.cleandoc(value.__doc__ or "")


def test_unknown_names_are_attribute_errors():
    with pytest.raises(AttributeError, match="no attribute 'load'"):
        bentoml_diffusers.load  # noqa: B018


def dynamic_code(path):
    """Lines where text becomes code: imports by a name that is not written out, eval, exec."""
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func).rpartition(".")[2]
        if called in ("import_module", "__import__"):
            if not node.args or not isinstance(node.args[0], ast.Constant):
                yield node.lineno
        elif isinstance(node.func, ast.Name) and called in ("eval", "exec", "compile"):
            yield node.lineno


@pytest.mark.parametrize(
    "path",
    [path for path in MODULES if module_name(path) not in (PACKAGE, f"{PACKAGE}._names")],
    ids=module_name,
)
def test_text_becomes_code_in_one_file_only(path):
    assert list(dynamic_code(path)) == []


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_no_value_has_one_lock_for_all_instances_of_its_class(path):
    """Up to Python 3.11 `cached_property` has, and one instance waits for the other."""
    assert "cached_property" not in path.read_text().replace("``functools.cached_property``", "")


# What counts as a private corner of another package, which only `_compat` may look into:
# - an attribute whose name begins with one underscore, unless this package has one of that name;
# - such a name as a text for `getattr` and its like, or any that `_compat` knows;
# - a module or a name that begins with an underscore, imported from another package;
# - a version, a stack frame by its name, the dicts of hooks.
OF_NAMED_TUPLES = {"_asdict", "_fields", "_replace"}
# Keys of diffusers' files, which are no attributes.
OF_FILES = {"_blocks_class_name", "_class_name", "_diffusers_version", "_name_or_path"}
BY_VERSION = {"__version__", "check_inputs", "_hooks"}
BY_TEXT = {"getattr", "hasattr", "setattr", "delattr", "attrgetter"}


def is_private(name):
    return name.isidentifier() and name.startswith("_") and not name.startswith("__")


def nodes_of(paths):
    return [node for path in paths for node in ast.walk(ast.parse(path.read_text()))]


def defined_names(paths):
    """Names of functions, classes, variables and of what `self` is given."""
    for node in nodes_of(paths):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Attribute | ast.Name) and isinstance(node.ctx, ast.Store):
            is_own = isinstance(node, ast.Name) or ast.unparse(node.value) in ("self", "cls")
            yield (node.id if isinstance(node, ast.Name) else node.attr) if is_own else ""


def names_in(paths):
    """Private names that files write: as attributes, texts and imports."""
    for node in nodes_of(paths):
        if isinstance(node, ast.Attribute):
            yield node.attr
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value
        elif isinstance(node, ast.alias):
            yield node.name


COMPAT = [path for path in MODULES if layer(module_name(path)) == "_compat"]
OTHERS = [path for path in MODULES if path not in COMPAT]
OWN = {*defined_names(OTHERS), *OF_NAMED_TUPLES}
CORNERS = {name for name in names_in(COMPAT) if is_private(name)} - OWN - OF_FILES | BY_VERSION


def is_face(node):
    return isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"


def private_touches(code):
    """Yields each touch of a private corner of another package in a piece of code."""
    nodes = list(ast.walk(ast.parse(code)))
    pieces = {id(part) for node in nodes if isinstance(node, ast.JoinedStr) for part in node.values}
    pieces |= {id(part) for node in nodes if is_face(node) for part in ast.walk(node.value)}
    for node in nodes:
        if isinstance(node, ast.Attribute):
            found = (is_private(node.attr) and node.attr not in OWN) or node.attr in BY_VERSION
        elif isinstance(node, ast.Constant):
            found = node.value in CORNERS and id(node) not in pieces
        elif isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in BY_TEXT:
            texts = [one.value for one in node.args if isinstance(one, ast.Constant)]
            found = any(is_private(str(one)) and one not in OWN for one in texts)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            module = getattr(node, "module", None) or ""
            names = [f"{module}.{alias.name}" for alias in node.names]
            parts = [part for name in names for part in name.split(".")]
            is_ours = parts[0] == PACKAGE or (module == "" and parts[1] == PACKAGE)
            found = not is_ours and any(map(is_private, parts))
        else:
            found = False
        if found:
            yield f"{node.lineno}: {ast.unparse(node)}"


@pytest.mark.parametrize("path", OTHERS, ids=module_name)
def test_private_corners_of_other_packages_are_in_compat(path):
    assert list(private_touches(path.read_text())) == []


@pytest.mark.parametrize(
    "code",
    [
        "pipeline._execution_device",
        "self._all_hooks",
        "getattr(pipeline, '_auto_offload_enabled', False)",
        "operator.attrgetter('_something')",
        "vars(module)['_orig_mod']",
        "from torch.utils._pytree import tree_map",
        "from diffusers.pipelines.auto_pipeline import _get_model",
        "import bentoml._internal.context",
        "if torch.__version__ > '2': pass",
        "frame.f_code.co_name == 'check_inputs'",
        "name.endswith('_hooks')",
    ],
)
def test_the_check_for_private_corners_works(code):
    assert list(private_touches(code))


def test_compat_loads_nothing_heavy():
    assert loaded_by("import bentoml_diffusers._compat") == []
