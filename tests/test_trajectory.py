"""Tests of `trajectory`, and of the command that uses it."""

import math
import re
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from matplotlib.figure import Figure

from momentum_jax.diagnostics.__main__ import main
from momentum_jax.study import Problem, problems
from momentum_jax.study.trajectory import draw, trajectory

pytestmark = pytest.mark.slow

CURVATURES = np.array([1.0, 10.0])
OWN = """
import jax
import jax.numpy as jnp
from momentum_jax.study import Problem

problem = Problem(
    lambda key: jax.random.normal(key, (2,)),
    lambda w: jnp.sum(jnp.array([1.0, 10.0]) * w**2) / 2,
    name="my bowl",
    defaults=dict(learning_rate=0.5, steps=20),
)
a_number = 3
"""


def bowl(**options: Any) -> Problem:
    return Problem(
        lambda key: jnp.ones(2), lambda w: jnp.sum(jnp.array(CURVATURES) * w**2) / 2, **options
    )


@pytest.mark.parametrize("nesterov", [False, True])
def test_a_quadratic_goes_the_way_of_the_recurrence(nesterov):
    """Computes the loss, and the cosine of update and negative gradient, in float64."""
    rate, mu, limit = 0.05, 0.9, 3.8 / 2.8 if nesterov else 3.8
    found = list(trajectory(bowl(), rate, mu, nesterov=nesterov, steps=12, points=4))
    w, v, alignment = np.ones(2), np.zeros(2), math.nan
    for step in range(13):
        if step % 3 == 0:
            point = found[step // 3]
            assert point.step == step
            assert point.loss == pytest.approx(CURVATURES @ w**2 / 2, rel=1e-4)
            assert point.curvature.largest == pytest.approx(10, rel=1e-5)
            assert point.fraction == pytest.approx(rate * 10 / limit, rel=1e-5)
            assert point.alignment == pytest.approx(alignment, abs=1e-5, nan_ok=True)
        gradient = CURVATURES * w
        v = mu * v - rate * gradient
        update = mu * v - rate * gradient if nesterov else v
        w = w + update
        norms = np.linalg.norm(update) * np.linalg.norm(gradient)
        alignment = -(update @ gradient) / norms
    assert len(found) == 5


def test_batches_are_those_of_the_study():
    """Batches follow a new order each epoch, and the model state is updated."""

    def loss(w, state, batch):
        return w * jnp.sum(batch), state + len(batch)

    data = np.arange(6.0, dtype=np.float32)
    problem = Problem(lambda key: (1.0 + jax.random.uniform(key), 0.0), loss, data=data,
                      stateful=True)  # fmt: skip
    found = list(trajectory(problem, 1e-3, 0.0, steps=6, points=2, batch_size=2, seed=3))
    # After whole epochs each row was used equally often.
    falls = [found[0].loss - point.loss for point in found]
    np.testing.assert_allclose(np.array(falls) / data.sum() ** 2, [0, 1e-3, 2e-3], rtol=1e-2)
    again = list(trajectory(problem, 1e-3, 0.0, steps=6, points=2, batch_size=2, seed=3))
    assert [point.loss for point in again] == [point.loss for point in found]


def test_it_ends_where_the_loss_is_not_finite():
    found = list(trajectory(bowl(), 1.0, 0.9, steps=1000, points=10))
    assert not math.isfinite(found[-1].loss)
    assert len(found) < 11


def test_the_picture():
    found = list(trajectory(bowl(), 0.2, 0.9, steps=20, points=10))
    figure = Figure(layout="constrained")
    draw(found, figure)
    loss, sharpness, share, alignment = figure.axes
    assert [axes.get_ylabel() for axes in figure.axes] == [
        "loss", "sharpness", "fraction of the stability limit", "alignment"
    ]  # fmt: skip
    for axes, quantity in ((loss, "loss"), (share, "fraction"), (alignment, "alignment")):
        x, y = axes.lines[0].get_data()
        np.testing.assert_array_equal(x, [point.step for point in found])
        np.testing.assert_array_equal(y, [getattr(point, quantity) for point in found])
    (limit,) = np.unique(sharpness.lines[1].get_ydata())
    assert limit == pytest.approx(3.8 / 0.2)
    figure = Figure()
    draw(list(trajectory(bowl(), 0.001, 0.9, steps=2, points=1)), figure)
    assert len(figure.axes[1].lines) == 1  # The limit is far above the plotted values.


@pytest.fixture
def own(tmp_path):
    path = tmp_path / "bowl.py"
    path.write_text(OWN)
    return path


def test_the_command_as_a_person_runs_it(own, tmp_path):
    """The command prints a table and advice on the learning rate, and draws a picture."""
    command = [sys.executable, "-m", "momentum_jax.diagnostics", f"{own}:problem"]
    done = subprocess.run(
        [*command, "--points", "4"], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert done.stderr == ""
    lines = done.stdout.splitlines()
    assert lines[0].startswith("my bowl: momentum at learning rate 0.05, mu 0.9, on ")
    assert lines[1].split() == ["step", "loss", "sharpness", "of", "the", "limit", "alignment"]
    rows = [line.split() for line in lines[2:7]]
    assert [row[0] for row in rows] == ["0", "5", "10", "15", "20"]
    assert [row[2:4] for row in rows] == 5 * [["10", "13.2%"]]
    assert rows[0][4] == "-"
    assert lines[7:10] == [
        "after 20 steps, last measured:",
        "curvature 1 to 10: 13.2% of the stability limit is used",
        "learning rate 0.05 at mu 0.9: at most 0.38 is stable; sharpest direction x 0.9487 per "
        "step",
    ]
    assert lines[-1] == "wrote my-bowl.png"
    assert (tmp_path / "my-bowl.png").read_bytes().startswith(b"\x89PNG")


def test_a_run_that_diverges_is_explained(own, tmp_path, capsys):
    out = str(tmp_path / "a.svg")
    main([f"{own}:problem", "--learning-rate", "0.5", "--out", out])
    printed = capsys.readouterr().out
    assert re.search(r"^the loss rose, from \S+ to \S+$", printed, re.MULTILINE)
    assert "after 0 steps, first above the limit:" in printed
    assert "131.6% of the stability limit is used" in printed
    assert "at most 0.38 is stable" in printed


def test_where_the_start_is_not_finite(tmp_path, capsys, monkeypatch):
    start = Problem(lambda key: jnp.ones(2), lambda w: jnp.sum(jnp.sqrt(-w)))
    monkeypatch.setattr(problems, "find", lambda text: start)
    main(["it", "--out", str(tmp_path / "a.png")])
    assert "not finite at the initial weights" in capsys.readouterr().out


def test_a_loss_that_is_not_finite_ends_it(own, tmp_path, capsys):
    main(
        [
            f"{own}:problem",
            "--learning-rate",
            "5",
            "--steps",
            "99",
            "--out",
            str(tmp_path / "a.png"),
        ]
    )
    printed = capsys.readouterr().out
    assert re.search(r"^diverged: the loss is not finite after \d+ steps$", printed, re.MULTILINE)


REFUSED = {
    "nesterov without mu": (["quadratic", "--nesterov", "--mu", "0"], "nesterov"),
    "a rate beyond float32": (["quadratic", "--learning-rate", "1e39"], "learning_rate"),
    "a seed too large": (["quadratic", "--seed", "9" * 20], ""),
    "no data": (["quadratic", "--batch-size", "8"], "--batch-size: quadratic has no data"),
    "no problem": (["nothing"], "there is no problem 'nothing'"),
    "no such object": (["{own}:a_number"], "a_number in .* must be a momentum_jax.study.Problem"),
    "mu": (["digits", "--mu", "1"], r"--mu: '1' is not a number in \[0, 1\)"),
    "learning rate": (["digits", "--learning-rate", "0"], "'0' must be a finite number above 0"),
    "batch size": (["digits", "--batch-size", "9999"], "--batch-size 9999: digits has 1077"),
    "folder": (["digits", "--out", "no/such/a.png"], "the folder no/such does not exist"),
    "suffix": (["digits", "--out", "a.xyz"], "the name must end in .png, .svg or .pdf"),
    "steps of Lanczos": (
        ["digits", "--lanczos-steps", "1"],
        "--lanczos-steps 1: must be at least 2",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_done_is_one_line(case, own, capsys):
    arguments, words = REFUSED[case]
    with pytest.raises(SystemExit) as stopped:
        main([word.format(own=own) for word in arguments])
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert re.match(rf"python -m momentum_jax.diagnostics: error: .*{words}", said)
    assert said.count("\n") == 1
