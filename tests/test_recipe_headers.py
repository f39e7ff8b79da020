"""`uv run recipes/X.py` and `hf jobs uv run recipes/X.py`: what the inline metadata of the scripts asks for."""

import configparser
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
from packaging.requirements import Requirement


tomllib = pytest.importorskip("tomllib", reason="needs Python 3.11")
ROOT = Path(__file__).parents[1]
# Those that are no scripts but modules of one.
MODULES = {"quickstart_task", "study_data", "study_arms", "study_report"}
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


def test_what_the_scripts_ask_for_resolves_in_an_empty_environment():
    """By uv, which reads what the index says of the newest versions and installs nothing."""
    uv = pytest.importorskip("uv", reason="the scripts' requirements are resolved by uv, of the extra [test]")
    known, asked = options(), set()
    for path in SCRIPTS:
        (requirement,) = map(Requirement, metadata(path)["dependencies"])
        asked |= set(map(str, requirements(requirement.extras, known)))
    command = [uv.find_uv_bin(), "pip", "compile", "--python", sys.executable, "--no-header", "--no-annotate", "-"]
    try:
        done = subprocess.run(command, input="\n".join(sorted(asked)), capture_output=True, text=True, timeout=300)
    except subprocess.TimeoutExpired:
        pytest.skip("the package index is too slow")
    if "No solution found" not in done.stderr and done.returncode:
        pytest.skip(f"no package index can be reached: {done.stderr[-200:]}")
    assert done.returncode == 0, done.stderr
    assert "\ntrl==" in done.stdout


def test_what_the_pages_install_beside_the_package_is_found():
    """By pip, as they say: unlike uv it takes no pre-release that is not asked for."""
    told = "".join(page.read_text(encoding="utf-8") for page in (ROOT / "recipes").rglob("*.md"))
    quoted = re.findall(r'pip install "([^".][^"]*)"', told)
    asked = sorted(line for line in quoted if Requirement(line).name != "hf_longalign")
    assert asked
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--no-deps", "--ignore-installed", *asked]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    except subprocess.TimeoutExpired:
        pytest.skip("the package index is too slow")
    if done.returncode and "connection" in done.stderr.lower():
        pytest.skip(f"no package index can be reached: {done.stderr[-200:]}")
    assert done.returncode == 0, done.stderr
