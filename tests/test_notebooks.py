"""Every notebook runs from top to bottom, and is committed with what it shows."""

from pathlib import Path

import nbclient
import nbformat
import pytest

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))


def read(path):
    return nbformat.read(path, as_version=4)


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def kinds(cell):
    return {output.output_type for output in cell.outputs}


def test_there_are_notebooks():
    assert NOTEBOOKS


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_and_shows_what_is_committed(path):
    committed = read(path)
    fresh = read(path)
    for cell in code_cells(fresh):
        cell.outputs = []
    nbclient.NotebookClient(
        fresh, timeout=300, resources={"metadata": {"path": str(path.parent)}}
    ).execute()
    for before, after in zip(code_cells(committed), code_cells(fresh), strict=True):
        assert before.execution_count == after.execution_count
        assert "error" not in kinds(before)
        assert kinds(before) == kinds(after)
