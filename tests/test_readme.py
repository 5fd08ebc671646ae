"""Every code block of the README runs, and says what the README says it says."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

README = (Path(__file__).parents[1] / "README.md").read_text()
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README, flags=re.DOTALL)
PYTHON = [code for language, code in BLOCKS if language == "python"]
SHELL = [code for language, code in BLOCKS if language == "bash"]


def test_every_block_is_of_a_kind_that_is_checked():
    assert {language for language, _ in BLOCKS} <= {"python", "bash", "text", "bibtex"}
    assert len(PYTHON) == 3
    assert len(SHELL) == 2


def test_the_example_reaches_the_minimum(capsys):
    names = {}
    exec(PYTHON[0], names)
    assert all(abs(value) < 0.1 for value in names["params"].values())
    assert len(PYTHON[0].strip().splitlines()) <= 12


def test_inside_and_outside_print_the_worked_numbers(capsys):
    exec(PYTHON[1], {})
    assert capsys.readouterr().out == "inside: -0.91\noutside: -0.10\n"


def test_the_job_of_pytorch_goes_on():
    names = {}
    exec(PYTHON[2], names)
    np.testing.assert_array_equal(names["state"][0].velocity["kernel"], np.ones((2, 3)))


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
