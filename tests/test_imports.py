"""The rules of the house: who may import whom, what is pure, and that importing the package does nothing."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[1] / "hf_longalign"
MODULES = sorted(ROOT.rglob("*.py"))
STDLIB_AND_NUMPY = set(sys.stdlib_module_names) | {"numpy"}
PURE = ("positions", "blocks", "data_record", "report")
PURE_IN_WINGS = (
    "synthesis/prompts",
    "synthesis/compose",
    "evaluation/prompt",
    "evaluation/haystack",
    "evaluation/noise",
    "evaluation/needle",
    "evaluation/placement",
    "evaluation/intervals",
    "evaluation/longbench/averages",
    "evaluation/longbench/metrics",
    "evaluation/longbench/rouge",
    "evaluation/longbench/scoring",
    "evaluation/longbench/tasks",
)
# What a card is made with: front matter and templates.
CARDS_MAY_IMPORT = {"huggingface_hub", "jinja2", "yaml"}
WINGS = {"synthesis", "evaluation", "hub", "cards", "commands"}
# They write the card and push, and import what they need where they need it.
USE_CARDS_AND_HUB = {"config", "publishing"}
TRAINER_MAY_IMPORT = {
    "attention",
    "blocks",
    "callback",
    "collator",
    "config",
    "adapter",
    "loss",
    "marker",
    "coverage",
    "positions",
    "preflight",
    "publishing",
    "records",
    "rope",
    "run_record",
    "version",
}


def _name(path: Path) -> str:
    return path.relative_to(ROOT).with_suffix("").as_posix()


def _imports(path: Path, top: bool = False) -> set[str]:
    """Every module imported anywhere in the file, or by importing it, absolute."""
    found, tree = set(), ast.parse(path.read_text())
    for node in tree.body if top else ast.walk(tree):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: write absolute imports"
            found.add(node.module)
            if node.module == "hf_longalign":
                found.update(f"hf_longalign.{alias.name}" for alias in node.names)
    return found


def _own(path: Path, top: bool = False) -> set[str]:
    return {name.split(".", 1)[1] for name in _imports(path, top) if name.startswith("hf_longalign.")}


@pytest.mark.parametrize("path", MODULES, ids=_name)
def test_import_rules(path):
    name, own = _name(path), _own(path)
    wing = name.split("/")[0] if "/" in name else None
    for other in own:
        other_wing = other.split(".")[0] if other.split(".")[0] in WINGS else None
        if wing in {"synthesis", "evaluation"} and other_wing in {"synthesis", "evaluation"}:
            assert other_wing == wing, f"{name} and {other}: synthesis and evaluation do not know each other"
        if wing == "endpoint":
            assert other.split(".")[0] == "endpoint", f"{name} imports {other}: the client stands below both wings"
        if wing in {"synthesis", "evaluation"} and other_wing == "hub":
            raise AssertionError(f"{name} imports {other}: they write files, the commands push")
        if wing == "cards":
            assert other_wing in (None, "cards"), f"{name} imports {other}: cards are made from records alone"
        if wing is None and name != "__init__":
            lazy = name in USE_CARDS_AND_HUB and other_wing in ("cards", "hub") and other not in _own(path, top=True)
            assert other_wing is None or lazy, f"{name} imports {other}: only commands join the wings"
    if name == "trainer":
        assert {other.split(".")[0] for other in own} <= TRAINER_MAY_IMPORT
    if wing == "cards":
        foreign = {module.split(".")[0] for module in _imports(path)} - STDLIB_AND_NUMPY - {"hf_longalign"}
        assert foreign <= CARDS_MAY_IMPORT, f"{name}: {foreign}"
    if name in PURE or name.startswith(PURE_IN_WINGS):
        foreign = {module.split(".")[0] for module in _imports(path)} - STDLIB_AND_NUMPY - {"hf_longalign"}
        assert not foreign, f"{name} is pure: standard library and NumPy alone, got {foreign}"


def test_import_is_lazy_and_changes_nothing():
    code = (
        "import sys, hf_longalign; heavy = {'torch', 'transformers', 'trl', 'datasets'} & set(sys.modules);"
        "assert not heavy, heavy;"
        "import hf_longalign.attention;"
        "from transformers.modeling_utils import AttentionInterface;"
        "assert 'longalign_varlen' not in AttentionInterface()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_export_exists():
    import hf_longalign

    assert len(hf_longalign.__all__) <= 19  # 18 public names and the version
    for name in hf_longalign.__all__:
        assert getattr(hf_longalign, name) is not None
