"""Every notebook runs from top to bottom, and shows what is committed with it."""

import importlib.util
import re
import types
from pathlib import Path

import jax
import nbclient
import nbformat
import pytest
from IPython.core.inputtransformer2 import TransformerManager

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))
NUMBER = re.compile(r"-?\d+(?:\.(?P<decimals>\d+))?(?:e(?P<exponent>[-+]?\d+))?")
# Another CPU or another version of JAX adds float32s in another order. The instructions of an old
# CPU alone (XLA_FLAGS=--xla_cpu_max_isa=SSE4_2), or the first weights of notebook 2 moved by 1e-5,
# change no printed number by as much.
TOLERANCE = 0.01


def read(path):
    return nbformat.read(path, as_version=4)


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def kinds(cell):
    return {output.output_type for output in cell.outputs}


def printed(cell):
    """The lines, but for those that say what it ran on."""
    # One print may come in two parts.
    streams = "".join(output.text for output in cell.outputs if output.output_type == "stream")
    results = [o.data["text/plain"] for o in cell.outputs if o.output_type == "execute_result"]
    lines = [*streams.splitlines(), *results]
    return [line for line in lines if not line.startswith("JAX ")]


def words(line):
    """What is between the numbers, whose widths may differ."""
    return NUMBER.sub("#", line).split()


def agree(before, after):
    """Whether two numbers are within the tolerance, or a unit of the last digit shown."""
    unit = 10.0 ** (int(before["exponent"] or 0) - len(before["decimals"] or ""))
    allowed = max(TOLERANCE * abs(float(before[0])), unit)
    return abs(float(before[0]) - float(after[0])) <= allowed * (1 + 1e-9)


def same(before, after):
    """Whether two lines say the same."""
    pairs = zip(NUMBER.finditer(before), NUMBER.finditer(after), strict=False)
    return words(before) == words(after) and all(agree(*pair) for pair in pairs)


def test_there_are_notebooks():
    assert NOTEBOOKS


def test_numbers_are_compared_as_they_are_shown():
    assert same("loss 0.581, accuracy 90.3%", "loss  0.585, accuracy 90.9%")
    assert not same("loss 0.581, accuracy 90.3%", "loss 0.588, accuracy 90.3%")
    assert same("a loss of 10^-1.2 or 1e-3", "a loss of 10^-1.3 or 2e-3")
    assert not same("a loss of 10^-1.2 or 1e-3", "a loss of 10^1.2 or 1e-3")
    assert not same("never rises: True", "never rises: False")
    assert not same("296 steps", "more than 296 steps")
    assert not same("1, 2", "1, 2, 3")


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_and_shows_what_is_committed(path):
    committed = read(path)
    fresh = read(path)
    for cell in code_cells(fresh):
        cell.outputs = []
    nbclient.NotebookClient(
        fresh, timeout=900, resources={"metadata": {"path": str(path.parent)}}
    ).execute()
    for before, after in zip(code_cells(committed), code_cells(fresh), strict=True):
        assert before.execution_count == after.execution_count
        assert "error" not in kinds(before)
        assert kinds(before) == kinds(after)
        if jax.default_backend() != "cpu":
            continue  # An accelerator may multiply in fewer bits, and the notebooks say its name.
        pairs = zip(printed(before), printed(after), strict=True)
        assert [pair for pair in pairs if not same(*pair)] == []


def installs(path, folder, monkeypatch):
    """What the first cell gives to pip in this folder, where the package cannot be imported."""
    commands = []
    monkeypatch.chdir(folder)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    source = code_cells(read(path))[0].source.partition("\n\n#")[0]
    code = TransformerManager().transform_cell(source)
    shell = types.SimpleNamespace(run_line_magic=lambda name, line: commands.append((name, line)))
    # IPython puts the values of the braces in, when it runs the command.
    names = {"get_ipython": lambda: shell}
    exec(code, names)
    return [(name, line.format(**names)) for name, line in commands]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_first_cell_installs_the_wheel_beside_it(path, tmp_path, monkeypatch):
    """In a fresh Colab; in a clone, the clone; elsewhere it says what to do."""
    (tmp_path / "notebooks").mkdir()
    folder = tmp_path / "notebooks"
    with pytest.raises(FileNotFoundError, match=r"no momentum_jax-\*\.whl in .*notebooks"):
        installs(path, folder, monkeypatch)
    (tmp_path / "pyproject.toml").touch()
    assert installs(path, folder, monkeypatch) == [("pip", f'install -q "{tmp_path}[study]"')]
    wheel = folder / "momentum_jax-0.1.0-py3-none-any.whl"
    wheel.touch()
    assert installs(path, folder, monkeypatch) == [("pip", f'install -q "{wheel}[study]"')]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_committed_without_warnings_and_times(path):
    for cell in code_cells(read(path)):
        assert "execution" not in cell.metadata
        assert [output.text for output in cell.outputs if output.get("name") == "stderr"] == []
