"""The laws of the house: who may import whom, what is pure, who writes to the Hub, and that importing does nothing."""

import ast
import importlib
import importlib.util
import re
import subprocess
import sys
from importlib.metadata import packages_distributions, requires
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[1] / "hf_longalign"
MODULES = sorted(ROOT.rglob("*.py"))
ROOMS = sorted(path.parent.name for path in ROOT.glob("*/__init__.py"))
# What stands below every wing and knows none of them.
BELOW = {"records", "text", "plots", "endpoint", "puzzles", "lazy", "options", "rows"}
# What joins the wings.
JOINS = {"__init__", "__main__", "cli", "commands"}
# Standard library and NumPy alone, and through `require` an extra; cards also use what the Hub's own client uses.
PURE = {
    *("positions", "blocks", "records"),
    *("synthesis/prompts", "synthesis/compose"),
    *("evaluation/prompt", "evaluation/needles", "evaluation/intervals"),
    *("evaluation/results", "evaluation/longbench_metrics", "evaluation/ruler"),
}
PURE_MODULES = set(sys.stdlib_module_names) | {"numpy", "hf_longalign"}
CARDS_MAY_USE = PURE_MODULES | {"huggingface_hub", "jinja2", "yaml"}
HEAVY = {"torch", "transformers", "trl", "datasets", "peft", "accelerate"}
# What writes to the Hub.
WRITERS = {"HfApi", "CommitOperationAdd", "CommitOperationDelete", "CommitScheduler", "create_repo", "create_commit"}
WRITERS |= {"upload_file", "upload_folder", "upload_large_folder", "delete_file", "create_branch", "create_tag"}


def name_of(path):
    return path.relative_to(ROOT).with_suffix("").as_posix()


def room_of(name):
    """The folder of a module, or the module itself where it lies at the top."""
    return name.split("/")[0].split(".")[0]


def imports(path, *, at_import=False):
    """Every module that a file imports, absolute; with `at_import` only what importing the file does."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    nodes = list(ast.walk(tree))
    if at_import:
        nodes = [node for node in tree.body if not isinstance(node, ast.If)]  # `if TYPE_CHECKING`
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: write absolute imports"
            found.add(node.module)
            if node.module == "hf_longalign":
                found.update(f"hf_longalign.{alias.name}" for alias in node.names)
    return found


def own(path, **options):
    """The rooms of this package that a file imports from, its own left out."""
    rooms = {room_of(name.split(".", 1)[1]) for name in imports(path, **options) if name.startswith("hf_longalign.")}
    return rooms - {room_of(name_of(path))}


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_import_rules(path):
    name, used = name_of(path), own(path)
    room = room_of(name)
    if room in JOINS:
        return
    assert not used & JOINS - {"__init__"}, f"{name} imports {used & JOINS}, which join the wings"
    if room in BELOW:
        assert used <= BELOW, f"{name} stands below and imports {used - BELOW}"
    for wing, others in {
        "synthesis": {"evaluation", "hub", "trainer"},
        "evaluation": {"synthesis", "hub", "trainer"},
        "cards": {"synthesis", "evaluation", "hub", "trainer"},
        "hub": {"synthesis", "evaluation", "trainer"},
        "attention": {"synthesis", "evaluation", "hub", "cards", "trainer"},
    }.items():
        if room == wing:
            assert not used & others, f"{name} imports {used & others}"
    if room not in ROOMS:
        assert not used & {"synthesis", "evaluation"}, f"{name} imports {used}: training knows neither"
        eager = own(path, at_import=True) & {"cards", "hub"}
        assert not eager, f"{name} imports {eager} before it needs them: do so in the function"
    foreign = {module.split(".")[0] for module in imports(path)}
    if room in PURE or name in PURE:
        assert foreign <= PURE_MODULES, f"{name} is pure, got {foreign}"
    if room == "cards":
        assert foreign <= CARDS_MAY_USE, f"{name} makes text of records, got {foreign - CARDS_MAY_USE}"


def test_the_lists_name_what_is_there():
    names = {name_of(path) for path in MODULES}
    missing = {entry for entry in PURE if not any(name == entry or name.startswith(f"{entry}/") for name in names)}
    assert not missing


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_only_hub_writes_to_the_hub(path):
    used = {getattr(node, "id", getattr(node, "attr", "")) for node in ast.walk(ast.parse(path.read_text("utf-8")))}
    used |= {alias for module in imports(path) for alias in [module.rpartition(".")[2]]}
    assert room_of(name_of(path)) == "hub" or not used & WRITERS


def test_what_is_imported_is_required():
    """By the package itself or one of its extras, not only by what it requires."""
    required = {re.split(r"[ ;<>=!~\[]", line)[0].lower().replace("-", "_") for line in requires("hf_longalign")}
    installed = packages_distributions()
    foreign = {name.split(".")[0] for path in MODULES for name in imports(path)} - set(sys.stdlib_module_names)
    for name in sorted((foreign - {"hf_longalign"}) & set(installed)):
        assert required & {each.lower().replace("-", "_") for each in installed[name]}, name


def test_the_options_of_every_command_are_read_without_torch():
    from hf_longalign.cli import COMMANDS

    modules = ", ".join(f"hf_longalign.commands.{command.module}" for command in COMMANDS.values())
    code = f"import sys, hf_longalign.cli, {modules}; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_import_is_lazy_and_changes_nothing():
    code = (
        f"import sys, hf_longalign, hf_longalign.cli; heavy = {HEAVY} & set(sys.modules);"
        "assert not heavy, heavy;"
        "import hf_longalign.attention;"
        "from transformers.modeling_utils import AttentionInterface;"
        "assert 'longalign_varlen' not in AttentionInterface()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_export_exists_and_its_room_exports_it_too():
    import hf_longalign

    assert 15 <= len(hf_longalign.__all__) <= 23
    for name in hf_longalign.__all__:
        assert getattr(hf_longalign, name) is not None
    for name, module in hf_longalign._EXPORTS.items():
        assert "." not in module, f"{name}: import it from the room {module.split('.')[0]}, which exports it"
        assert getattr(importlib.import_module(f"hf_longalign.{module}"), name) is getattr(hf_longalign, name)


@pytest.mark.parametrize("room", ["", "synthesis", "evaluation"])
def test_editors_see_what_python_loads(room):
    package = importlib.import_module(f"hf_longalign.{room}".rstrip("."))
    tree = ast.parse(Path(package.__file__).read_text(encoding="utf-8"))
    (block,) = [node for node in tree.body if isinstance(node, ast.If)]
    seen = {alias.name: node.module for node in block.body for alias in node.names}
    assert seen == {name: f"{package.__name__}.{module}" for name, module in package._EXPORTS.items()}
    # A module of the same name would take its place in the package as soon as somebody imports it.
    assert not set(seen) & {path.stem for path in Path(package.__file__).parent.iterdir()}


SCRIPTS = [path for folder in ("benchmarks", "recipes") for path in sorted((ROOT.parent / folder).rglob("*.py"))]


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.relative_to(ROOT.parent).as_posix())
def test_what_scripts_import_from_the_package_is_there(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("hf_longalign"):
            module = importlib.import_module(node.module)
            for alias in node.names:
                assert hasattr(module, alias.name) or importlib.util.find_spec(f"{node.module}.{alias.name}")


def test_what_is_not_exported_is_an_attribute_error():
    import hf_longalign

    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        hf_longalign.nothing  # noqa: B018
    assert set(hf_longalign.__all__) <= set(dir(hf_longalign))
