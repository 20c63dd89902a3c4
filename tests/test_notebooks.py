"""Every notebook runs from top to bottom, without warnings, and draws."""

from pathlib import Path

import pytest
from conftest import COMPILED_QUICKLY

nbclient = pytest.importorskip("nbclient")
nbformat = pytest.importorskip("nbformat")

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # the notebook client's own; a kernel is another process
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_notebook_runs(path, tmp_path, monkeypatch):
    for key, value in {**COMPILED_QUICKLY, "JAX_PLATFORMS": "cpu"}.items():
        monkeypatch.setenv(key, value)
    monkeypatch.delenv("JAXTP_CHECKPOINT", raising=False)
    notebook = nbformat.read(path, as_version=4)
    nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert any("image/png" in output.get("data", {}) for output in outputs), "no picture"
    warned = [o.text for o in outputs if o.output_type == "stream" and "Warning" in o.text]
    assert warned == []


def test_there_are_notebooks():
    assert NOTEBOOKS
