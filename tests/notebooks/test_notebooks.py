"""The notebooks, from top to bottom, on a CPU: `pytest tests/notebooks -m ""`, three minutes on two cores."""

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from tests.marks import slow

FOLDER = Path(__file__).parents[2] / "notebooks"
LARGEST = 500_000  # bytes, with outputs
SLOWEST = 900  # seconds a cell, where other tests keep the cores busy; alone the slowest takes 80


@pytest.mark.parametrize("name", ["quickstart", slow("ablation_topk_sigma"), slow("kernels")])
def test_notebook(name, tmp_path, monkeypatch):
    """Every cell runs, and shows something where the committed one does; its assertions check what the text says."""
    for variable in ("JAX_DISABLE_MOST_OPTIMIZATIONS", "XLA_FLAGS"):  # here programs run for long, see conftest.py
        monkeypatch.delenv(variable, raising=False)
    notebook = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
    shown = [bool(cell.get("outputs")) for cell in notebook.cells]
    NotebookClient(
        notebook, timeout=SLOWEST, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    ).execute()
    assert [bool(cell.get("outputs")) for cell in notebook.cells] == shown
    assert any(shown)


def test_they_are_there_and_small():
    notebooks = list(FOLDER.glob("*.ipynb"))
    assert {path.stem for path in notebooks} == {"quickstart", "ablation_topk_sigma", "kernels"}
    assert all(path.stat().st_size < LARGEST for path in notebooks)
