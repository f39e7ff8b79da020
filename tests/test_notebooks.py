"""The notebooks run from their first cell to their last, without the Hub."""

import shutil
from pathlib import Path

import pytest


nbclient = pytest.importorskip("nbclient", reason="the notebooks run with nbclient, of the extra [test]")
nbformat = pytest.importorskip("nbformat")
pytest.importorskip("ipykernel", reason="the notebooks run in a kernel, of the extra [test]")

FOLDER = Path(__file__).parents[1] / "recipes" / "notebooks"


@pytest.mark.parametrize("name", ["train_with_skips", "write_contexts", "prove_it"])
def test_a_notebook_runs_without_the_hub(name, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    shutil.copy(FOLDER / "stand_in.py", tmp_path)
    notebook = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
    client = nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}})
    client.execute()  # raises with the cell and its traceback


def test_notebooks_are_committed_without_output():
    names = sorted(path.stem for path in FOLDER.glob("*.ipynb"))
    assert names == ["prove_it", "train_with_skips", "write_contexts"]
    for name in names:
        for cell in nbformat.read(FOLDER / f"{name}.ipynb", as_version=4).cells:
            assert not cell.get("outputs") and not cell.get("execution_count")
