"""The notebooks run from top to bottom, on a CPU and without the Hub, and keep no outputs."""

import os
from pathlib import Path

import pytest


nbformat = pytest.importorskip("nbformat", reason='needs pip install "hf_longalign[test]"')
nbclient = pytest.importorskip("nbclient", reason='needs pip install "hf_longalign[test]"')
NOTEBOOKS = Path(__file__).parents[1] / "recipes" / "notebooks"


@pytest.mark.parametrize("path", sorted(NOTEBOOKS.glob("*.ipynb")), ids=lambda path: path.stem)
def test_a_notebook_runs(path, tmp_path, monkeypatch):
    for name, value in {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(NOTEBOOKS.parents[1]), os.environ.get("PYTHONPATH", "")]))
    book = nbformat.read(path, as_version=4)
    assert not any(cell.get("outputs") for cell in book.cells), "clear the outputs before you commit"
    nbclient.NotebookClient(book, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    said = "".join(output.get("text", "") for cell in book.cells for output in cell.get("outputs", ()))
    expected = {
        "train_with_skips": "jumps from and to [(",
        "write_contexts": "7 contexts a row, 0 requests",
        "prove_it": "'report.json'",
    }
    assert expected[path.stem] in said, said
