"""The rules of the house: who may import whom, what is pure, and that importing the package does nothing."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[1] / "hf_longalign"
MODULES = sorted(ROOT.rglob("*.py"))
STDLIB_AND_NUMPY = set(sys.stdlib_module_names) | {"numpy"}
PURE = ("positions", "blocks", "distances", "data_record", "report")
PURE_IN_WINGS = (
    "synthesis/prompts",
    "synthesis/compose",
    "cards",
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
TRAINER_MAY_IMPORT = {
    "attention",
    "base_weights",
    "blocks",
    "callback",
    "collator",
    "config",
    "distances",
    "loss",
    "marker",
    "coverage",
    "positions",
    "preflight",
    "records",
    "rope",
    "run_record",
    "version",
}


def _name(path: Path) -> str:
    return path.relative_to(ROOT).with_suffix("").as_posix()


def _imports(path: Path) -> set[str]:
    """Every module imported anywhere in the file, absolute."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: write absolute imports"
            found.add(node.module)
            if node.module == "hf_longalign":
                found.update(f"hf_longalign.{alias.name}" for alias in node.names)
    return found


def _own(path: Path) -> set[str]:
    return {name.split(".", 1)[1] for name in _imports(path) if name.startswith("hf_longalign.")}


@pytest.mark.parametrize("path", MODULES, ids=_name)
def test_import_rules(path):
    name, own = _name(path), _own(path)
    wing = name.split("/")[0] if "/" in name else None
    for other in own:
        other_wing = (
            other.split(".")[0]
            if other.split(".")[0] in {"synthesis", "evaluation", "hub", "cards", "commands"}
            else None
        )
        if wing in {"synthesis", "evaluation"} and other_wing in {"synthesis", "evaluation"}:
            assert other_wing == wing, f"{name} and {other}: synthesis and evaluation do not know each other"
        if wing in {"synthesis", "evaluation"} and other_wing == "hub":
            raise AssertionError(f"{name} imports {other}: they write files, the commands push")
        if wing is None and name != "__init__":
            assert other_wing is None, f"{name} imports {other}: only recipes join the wings"
    if name == "trainer":
        assert {other.split(".")[0] for other in own} <= TRAINER_MAY_IMPORT
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

    assert len(hf_longalign.__all__) <= 13  # 12 public names and the version
    for name in hf_longalign.__all__:
        assert getattr(hf_longalign, name) is not None
