"""`uv run recipes/X.py` and `hf jobs uv run recipes/X.py`: what the inline metadata of the scripts asks for."""

import configparser
import re
from importlib.metadata import version
from pathlib import Path

import pytest
from packaging.requirements import Requirement


tomllib = pytest.importorskip("tomllib", reason="needs Python 3.11")
ROOT = Path(__file__).parents[1]
# Those that are no scripts but modules of one.
MODULES = {"quickstart_model", "quickstart_task"}
SCRIPTS = [path for path in sorted((ROOT / "recipes").glob("*.py")) if path.stem not in MODULES]
# As PEP 723 has it.
BLOCK = re.compile(r"(?m)^# /// script$\s(?P<content>(^#(| .*)$\s)+)^# ///$")


def metadata(path):
    (block,) = BLOCK.finditer(path.read_text(encoding="utf-8"))
    return tomllib.loads("".join(line[2:] or "\n" for line in block["content"].splitlines(keepends=True)))


def options():
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg")
    return parser


def requirements(extras, known):
    """All requirements of the package with these extras, by name."""
    lines = known["options"]["install_requires"].splitlines()
    for extra in extras:
        lines += known["options.extras_require"][extra].splitlines()  # a KeyError: there is no such extra
    for requirement in map(Requirement, filter(None, map(str.strip, lines))):
        if requirement.name == "hf_longalign":
            yield from requirements(requirement.extras, known)
        else:
            yield requirement


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_what_a_script_asks_for_is_there(path):
    known, header = options(), metadata(path)
    assert header["requires-python"] == known["options"]["python_requires"]
    (requirement,) = map(Requirement, header["dependencies"])
    assert requirement.name == known["metadata"]["name"]
    assert header["tool"]["uv"]["sources"] == {requirement.name: {"git": known["metadata"]["url"]}}
    for needed in requirements(requirement.extras, known):
        assert needed.specifier.contains(version(needed.name), prereleases=True), needed
