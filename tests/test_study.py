"""The command: what a person types, and what they get."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import xarray as xr

from momentum_jax.study.__main__ import main, parse

SMALL = ["--seeds", "4", "--steps", "20", "--init-scale", "2", "0.5"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder and the output of one small study, run as a person runs it."""
    folder = tmp_path_factory.mktemp("study") / "results"
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    command = [sys.executable, "-m", "momentum_jax.study", *SMALL, "--out", str(folder)]
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    return folder, done


def test_it_says_what_it_does_and_where_the_results_are(finished):
    folder, done = finished
    assert (
        "digits: 56 runs of 20 steps (7 arms, 2 initial scales, 4 initial weights)" in done.stdout
    )
    assert f"on {os.cpu_count()} x cpu" in done.stdout
    assert "100%" in done.stderr
    assert "loss=" in done.stderr
    for name in ("results.nc", "summary.json", "final_loss.png", "loss_curves.png"):
        assert f"wrote {folder / name}" in done.stdout
        assert (folder / name).stat().st_size > 1000
    assert "2 compiled training programs" in done.stdout


def test_the_tables_hold_every_arm_at_both_contrasts(finished):
    _, done = finished
    same, effective = done.stdout.split("== Same effective learning rate ==")
    for text, names in (
        (same, ("mu 0 at 0.05", "mu 0.9 at 0.05", "mu 0.99 at 0.05", "Nesterov 0.9 at 0.05")),
        (effective, ("mu 0 at 0.05", "mu 0.9 at 0.005", "mu 0.99 at 0.0005")),
    ):
        for name in names:
            assert f"x0.5  {name}" in text
            assert f"x2    {name}" in text
        for title in ("Final test loss", "Final test accuracy", "Share of failed", "Spread of the"):
            assert title in text
    assert "Does momentum reduce the dependence on the initial weights?" in effective


def test_the_files_hold_the_numbers_of_the_table(finished):
    folder, done = finished
    results = xr.load_dataset(folder / "results.nc", engine="scipy")
    summary = json.loads((folder / "summary.json").read_text())
    assert dict(results.sizes) == {"arm": 7, "init_scale": 2, "seed": 4, "step": 20}
    assert (summary["seeds"], summary["steps"], summary["batch_size"]) == (4, 20, 32)
    row = next(
        row for row in summary["rows"] if (row["arm"], row["init_scale"]) == ("mu 0.9 at 0.05", 0.5)
    )
    last = results.loss.sel(arm="mu 0.9 at 0.05", init_scale=0.5).isel(step=-1).values
    expected = np.minimum(last, np.log(10)).mean()
    assert row["loss"]["mean"]["value"] == pytest.approx(expected, rel=1e-5)
    assert re.search(rf"x0\.5 +mu 0\.9 at 0\.05 +{expected:.3f} \[", done.stdout)
    assert {"jax", "optax", "momentum_jax"} <= summary["versions"].keys()


def test_quick_and_default_settings(tmp_path):
    quick = parse(["--quick", "--out", str(tmp_path)])
    assert (quick.seeds, quick.steps, quick.init_scale) == (20, 100, [0.25, 1, 4])
    full = parse(["--out", str(tmp_path)])
    assert (full.seeds, full.init_scale) == (100, [0.25, 0.5, 1, 2, 4])
    mixed = parse(["--quick", "--seeds", "5", "--out", str(tmp_path)])
    assert (mixed.seeds, mixed.steps) == (5, 100)


def test_help_names_every_option_and_default(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")  # Else a default may be broken over two lines.
    with pytest.raises(SystemExit) as stopped:
        parse(["--help"])
    assert stopped.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for option in ("--seeds N", "--steps N", "--init-scale X", "--learning-rate X", "--quick"):
        assert option in text
    for default in ("(100)", "(0.05)", "(32)", "(0.25 0.5 1 2 4)", "study-results/digits-DATE"):
        assert default in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seeds", "2"], "--seeds 2: a spread and its interval need at least 3"),
        (["--steps", "0"], "'0' is not a whole number from 1"),
        (["--steps", "many"], "'many' is not a whole number from 1"),
        (["--learning-rate", "-1"], "'-1' is not a number above 0"),
        (["--learning-rate", "big"], "'big' is not a number above 0"),
        (["--out", __file__], "is there already, and is no empty folder"),
        (["--out", str(Path(__file__).parent)], "is there already, and is no empty folder"),
        (["--batch-size", "1500"], "--batch-size 1500: digits has 1437 training examples"),
        (["--out", "/dev/null/results"], "--out /dev/null/results: cannot write there"),
    ],
)
def test_a_mistake_is_one_line_before_the_work_starts(arguments, message, capsys, tmp_path):
    out = [] if "--out" in arguments else ["--out", str(tmp_path)]
    with pytest.raises(SystemExit) as stopped:
        main([*arguments, *out])
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
