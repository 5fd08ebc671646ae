"""Every code block of the README and of docs/ runs, and says what the page says it says."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from processes import run_job

from benchmarks import compiled
from momentum_jax import study

ROOT = Path(__file__).parents[1]


def blocks(page):
    return re.findall(r"```(\w+)\n(.*?)```", (ROOT / page).read_text(), flags=re.DOTALL)


BLOCKS = blocks("README.md")
PYTHON = [code for language, code in BLOCKS if language == "python"]
SHELL = [code for language, code in BLOCKS if language == "bash"]


def test_every_block_is_of_a_kind_that_is_checked():
    assert {language for language, _ in BLOCKS} <= {"python", "bash", "text", "bibtex"}
    assert len(PYTHON) == len(SHELL) == 2


def test_the_example_reaches_the_minimum(capsys):
    names = {}
    exec(PYTHON[0], names)
    assert all(abs(value) < 0.1 for value in names["params"].values())
    assert len(PYTHON[0].strip().splitlines()) <= 12


def test_inside_and_outside_print_the_worked_numbers(capsys):
    exec(PYTHON[1], {})
    assert capsys.readouterr().out == "inside: -0.91\noutside: -0.10\n"


def test_what_it_links_to_is_there():
    text = (ROOT / "README.md").read_text()
    for target in re.findall(r"\]\((?!http)([^)]+)\)", text):
        assert (ROOT / target).exists(), target


def test_the_bytes_per_parameter_are_those_of_the_compiled_programs():
    """Read by `python -m benchmarks.compiled`; if that has changed, the table is this one."""
    table = compiled.readme_table(json.loads(compiled.RESULT.read_text()))
    assert table in (ROOT / "README.md").read_text()


def test_it_fits_two_screens():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


@pytest.mark.slow
def test_a_problem_of_ones_own_is_studied_as_a_command_and_in_python(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (_, problem), (_, command), (_, program), *others = blocks("docs/study/own.md")
    name = re.match(r"# (\w+\.py)\n", problem)
    assert name
    Path(name[1]).write_text(problem)
    interpreter, *arguments = command.split()
    assert interpreter == ".venv/bin/python"
    # Fewer runs than the page's, which are the same otherwise.
    few = ["--seeds", "6", "--steps", "20", "--quick", "--init-scale", "1", "--out", "results"]
    subprocess.run([sys.executable, *arguments, *few], check=True, capture_output=True)
    assert (tmp_path / "results" / "report.html").exists()

    monkeypatch.syspath_prepend(tmp_path)
    names = {}
    exec(program, names)
    assert (tmp_path / "study-results" / "ravine" / "report.html").exists()
    assert dict(names["dataset"].sizes)["arm"] == 7
    assert re.search(r"^mu 0.9 at 0.005 +\d", capsys.readouterr().out, re.MULTILINE)

    linen, nnx, schedule = ({} for _ in others)
    for (_, code), names in zip(others, (linen, nnx, schedule), strict=True):
        exec(code, names)
    for names in (linen, nnx):
        result = study.run(names["problem"], [schedule["arm"]], range(2), [0], steps=20)
        assert (result.loss.isel(step=-1) < result.loss.isel(step=0)).all()


@pytest.mark.slow
@pytest.mark.parametrize("command", SHELL)
def test_a_command_is_one_line_that_installs_and_runs(command):
    """The installs run in continuous integration, the modules that they call are here."""
    steps = command.strip().split(" && ")
    assert "\n" not in command.strip()
    assert steps[0] == "python3 -m venv .venv"
    assert re.fullmatch(r"\.venv/bin/pip install -q (-e )?'\.\[(study|test)\]'", steps[1])
    module = re.fullmatch(r"\.venv/bin/python -m ([\w.]+)", steps[2])
    assert module
    subprocess.run([sys.executable, "-m", module[1], "--help"], check=True, capture_output=True)


@pytest.mark.slow
def test_the_page_on_devices_prints_what_its_comments_say(capsys):
    """Its blocks follow one another in one program, on eight devices; the last is a job's."""
    found = blocks("docs/devices.md")
    assert {language for language, _ in found} == {"python"}
    program = "\n".join(code for _, code in found[:-1])
    exec(program, {})
    said = re.findall(r"^print\(.*\)\s+# (\[.*?\]|\{.*\}|\w+)", program, flags=re.MULTILINE)
    assert capsys.readouterr().out.splitlines() == said
    assert len(said) == 8


@pytest.mark.slow
def test_the_job_of_the_page_on_devices_runs_in_two_processes(tmp_path):
    (tmp_path / "job.py").write_text(blocks("docs/devices.md")[-1][1])
    for printed in run_job(tmp_path / "job.py", str(tmp_path)):
        assert re.search(r"^4 devices, loss 0\.\d+$", printed, flags=re.MULTILINE)
    assert (tmp_path / "step-20").is_dir()
