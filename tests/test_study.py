"""Tests of the command: its options, output, errors and files."""

import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import xarray as xr

import momentum_jax as mj
from momentum_jax import study
from momentum_jax.study import Study, design, problems
from momentum_jax.study.__main__ import main
from momentum_jax.study.options import parse

pytestmark = pytest.mark.slow

COMMAND = [sys.executable, "-m", "momentum_jax.study"]
SMALL = ["--seeds", "6", "--steps", "40", "--init-scale", "2", "0.5", "--no-controls"]
OWN = """
import jax
import jax.numpy as jnp
from momentum_jax.study import Problem


def init(key):
    return jax.random.normal(key, (3,))


def loss(w):
    # Slow on purpose, so that the test can stop the process during training.
    w = jax.lax.fori_loop(0, {work}, lambda i, w: w + 1e-9 * jnp.sin(w), w)
    return jnp.sum(jnp.array([1.0, 10.0, 100.0]) * w**2)


problem = Problem(init, loss, name="my bowl", defaults=dict(learning_rate=0.001, steps=20))
little = Problem(init, lambda w, batch: loss(w) + 0 * batch.sum(), data=jnp.ones((10, 2)))
vector = Problem(init, lambda w: w, name="vector")
a_number = 3
"""


def environment(devices=2):
    """The environment of a user, without the device settings of the tests."""
    return {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"} | {
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"
    }


def command(*arguments, **options):
    options = {"check": True, "capture_output": True, "text": True, "timeout": 240} | options
    return subprocess.run([*COMMAND, *arguments], env=environment(), **options)


@pytest.fixture
def own(tmp_path):
    """A file with a user's own problem."""
    path = tmp_path / "bowl.py"
    path.write_text(OWN.format(work=1))
    return path


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder and the output of one small study, run as a command."""
    folder = tmp_path_factory.mktemp("study") / "results"
    rates = ["--rates", "0.016", "0.16", "--learning-rate", "0.016"]
    rates += ["--tuning-seeds", "2", "--mu", "0.9"]
    done = command("--problem", "double-well", *SMALL, *rates, "--out", str(folder))
    return folder, done


def refused(capsys, *arguments):
    """Returns the single line with which the command ends."""
    with pytest.raises(SystemExit) as stopped:
        main(list(arguments))
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1, error
    return error


def test_it_says_what_it_does_and_where_the_results_are(finished):
    folder, done = finished
    assert (
        "double well: 48 runs of 40 steps (4 arms x 6 seeds x initial scales 0.5, 2), "
        "16 runs to tune learning rates, on 2 x cpu" in done.stderr
    )
    for bar in ("tuning: 100%", "training: 100%", "loss=", "comparisons: 100%", "pictures: 100%"):
        assert bar in done.stderr
    assert "Traceback" not in done.stderr
    assert "Warning" not in done.stderr
    for name in ("report.html", "report.md", "results.nc", "comparisons.csv", "summary.json"):
        assert f"wrote {folder / name}" in done.stdout
        assert (folder / name).stat().st_size > 1000


def test_the_verdict_and_the_table_are_in_the_terminal(finished):
    folder, done = finished
    verdict = json.loads((folder / "summary.json").read_text())["verdict"]["sentence"]
    assert verdict in done.stdout
    assert done.stdout.strip().startswith("Does momentum make the result of training depend less")
    assert re.search(r"\| mu 0.9 at 0.0016 +\| all +\|", done.stdout)


def test_the_files_hold_the_same_numbers(finished):
    folder, _ = finished
    results = xr.load_dataset(folder / "results.nc", engine="scipy")
    summary = json.loads((folder / "summary.json").read_text())
    assert dict(results.sizes)["seed"] == 6
    assert dict(results.sizes)["step"] == 41
    table = pd.read_csv(folder / "comparisons.csv")
    (ratio,) = table.value[
        (table.arm == "mu 0.9 at 0.0016") & (table.scale == 0.5) & (table.question == "std")
    ]
    last = results.loss.sel(init_scale=0.5).isel(step=-1)
    spreads = [
        np.std(np.minimum(last.sel(arm=arm).values, 1375 / 3072), ddof=1)
        for arm in ("mu 0.9 at 0.0016", "mu 0 at 0.016")
    ]
    assert ratio == pytest.approx(spreads[0] / spreads[1], rel=1e-4)
    provenance = summary["provenance"]
    assert provenance["command"].startswith("python -m momentum_jax.study --problem double-well")
    assert {"jax", "optax", "momentum_jax"} <= provenance["versions"].keys()


def test_killed_and_resumed_it_ends_with_the_same_numbers_to_the_bit(tmp_path):
    """After SIGKILL during training, finished runs are not trained again."""
    (tmp_path / "slow.py").write_text(OWN.format(work=4000))
    arguments = ["--problem", "slow.py:problem", "--seeds", "600", "--init-scale", "1"]
    arguments += ["--mu", "0.9", "--rates", "0.001", "--tuning-seeds", "0", "--no-controls"]
    command(*arguments, "--out", "whole", cwd=tmp_path)

    stopped = subprocess.Popen(
        [*COMMAND, *arguments, "--out", "stopped"],
        env=environment(),
        cwd=tmp_path,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    chunks = tmp_path / "stopped" / "runs"
    deadline = time.monotonic() + 120
    while not list(chunks.glob("*.npz")) and time.monotonic() < deadline:
        time.sleep(0.005)
    stopped.send_signal(signal.SIGKILL)
    assert stopped.wait(timeout=30) == -signal.SIGKILL
    kept = list(chunks.glob("*.npz"))
    assert 1 <= len(kept) < 5

    resumed = command("--resume", str(tmp_path / "stopped"))  # Resumed from another working folder.
    assert "my bowl: 1200 runs" in resumed.stderr
    # The progress bar starts where it stopped: only the rest is trained.
    assert f"| {240 * len(kept)}/1200 " in resumed.stderr
    whole, again = (
        xr.load_dataset(tmp_path / name / "results.nc", engine="scipy")
        for name in ("whole", "stopped")
    )
    xr.testing.assert_equal(whole, again)


def test_a_finished_study_is_extended_and_compared(tmp_path, capsys):
    arguments = ["--problem", "quadratic", "--steps", "5", "--init-scale", "1", "--mu", "0.5"]
    arguments += ["--rates", "0.1", "1", "--tuning-seeds", "2", "--no-controls"]
    one, two = (str(tmp_path / name) for name in ("one", "two"))
    main([*arguments, "--seeds", "6", "--out", one])
    shutil.copytree(one, two)
    main(["--resume", two, "--seeds", "8", "--mu", "0.9", "--init-scale", "2"])
    first, second = (
        xr.load_dataset(Path(name) / "results.nc", engine="scipy") for name in (one, two)
    )
    assert dict(second.sizes) | {"seed": 8, "arm": 6, "init_scale": 2} == dict(second.sizes)
    shared = second.loss.sel(arm=first.arm, seed=first.seed, init_scale=first.init_scale)
    np.testing.assert_array_equal(shared, first.loss)
    started = " ".join([*arguments, "--seeds", "6"])
    added = "--resume DIR --seeds 8 --mu 0.9 --init-scale 2"
    assert (
        f"\npython -m momentum_jax.study {started}\npython -m momentum_jax.study {added}\n"
        in (Path(two) / "report.md").read_text()
    )
    main(["--resume", two])  # Nothing new, so no new command.
    assert (Path(two) / "report.md").read_text().count("momentum_jax.study --") == 2
    capsys.readouterr()

    main(["compare", one, two])
    printed = capsys.readouterr().out
    assert f"(1) {one}, quadratic: " in printed
    assert f"(2) {two}, quadratic: " in printed
    main(["compare", one, two, "--csv"])
    both = pd.read_csv(io.StringIO(capsys.readouterr().out))
    assert set(both.arm) >= {"mu 0.5 at 0.5"}
    assert {"value_1", "value_2"} <= set(both.columns)


def test_two_arms_that_differ_in_the_rate_alone_are_not_credited_to_momentum(tmp_path):
    """Both arms have mu 0, so the report must speak of the arms and not of momentum."""
    rates = [
        study.Arm(f"baseline at {rate}", mj.momentum, learning_rate=rate, mu=0.0)
        for rate in (0.5, 0.1)
    ]
    results = study.run(problems.find("digits"), rates, range(8), range(2), steps=20)
    study.report(results, tmp_path)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert "momentum" not in summary["verdict"]["sentence"]
    assert "baseline at 0.1" in summary["verdict"]["sentence"]
    assert summary["question"] == (
        "Does the result of training depend less on the random initial weights with baseline at "
        "0.1 than with baseline at 0.5?"
    )
    page = (tmp_path / "report.md").read_text().split("## Reproduction")[0]
    assert re.findall(r"\w*momentum\w*", page) == ["momentum_jax"]  # Of the error rates.


def test_csv_is_the_table_and_nothing_else(tmp_path, capsys):
    out = tmp_path / "out"
    main(
        [
            "--problem",
            "quadratic",
            "--steps",
            "5",
            *SMALL[:2],
            "--quick",
            "--csv",
            "--out",
            str(out),
        ]
    )
    printed = capsys.readouterr().out
    assert len(pd.read_csv(io.StringIO(printed))) == len(pd.read_csv(out / "comparisons.csv"))


def test_two_processes_train_a_study_together(own, tmp_path):
    """Two processes with jax.distributed: each trains half, and one writes the report."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    arguments = [*COMMAND, "--problem", f"{own}:problem", "--seeds", "300", "--init-scale", "1"]
    arguments += ["--mu", "0.9", "--no-controls", "--rates", "0.001", "0.003"]
    processes = [
        subprocess.Popen(
            [*arguments, "--out", str(tmp_path / "two"), "--distributed", address, "2", str(i)],
            env=environment(devices=1),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(2)
    ]
    try:
        (first, progress), (second, silent) = (p.communicate(timeout=240) for p in processes)
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], progress + silent
    assert "on 2 processes, each with 1 x cpu" in progress
    assert "wrote" in first
    assert "wrote" not in second
    assert "run/s" not in silent
    alone = command(*arguments[3:], "--out", str(tmp_path / "one"))
    assert "wrote" in alone.stdout
    one, two = (
        xr.load_dataset(tmp_path / name / "results.nc", engine="scipy") for name in ("one", "two")
    )
    np.testing.assert_allclose(one.loss, two.loss, rtol=1e-5)
    np.testing.assert_allclose(one.tuning_loss, two.tuning_loss, rtol=1e-5)


@pytest.mark.parametrize("between", [" ", "="])
def test_stopped_by_hand_it_says_how_to_resume(between, tmp_path, monkeypatch):
    (tmp_path / "mu=0.9").mkdir()
    own = tmp_path / "mu=0.9" / "slow.py"
    own.write_text(OWN.format(work=40_000))
    given = f"--problem{between}mu=0.9/slow.py:problem".split()
    out = tmp_path / "out"
    stopped = subprocess.Popen(
        [*COMMAND, *given, *SMALL, "--out", str(out)],
        env=environment(),
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 120
    while not list(out.rglob("*.json")) and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.5)
    stopped.send_signal(signal.SIGINT)
    printed, error = stopped.communicate(timeout=120)
    assert (stopped.returncode, printed) == (130, "")
    assert error.splitlines()[-1] == (
        f"python -m momentum_jax.study: stopped; finished runs are kept: --resume {out}"
    )
    assert "Traceback" not in error
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert len(parse(["--resume", str(out)]).study.seeds) == 6


@pytest.mark.parametrize("delay", [0.15, 0.6, 1.2])
def test_stopped_while_it_starts_it_ends_with_one_line(delay):
    starting = subprocess.Popen(
        [*COMMAND, "--help"], env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    time.sleep(delay)
    starting.send_signal(signal.SIGINT)
    _, error = starting.communicate(timeout=60)
    assert error.decode().split() in ([], ["stopped"])


def test_defaults_are_the_problems_and_quick_is_less(own):
    full = parse(["--problem", f"{own}:problem"]).study
    assert (full.learning_rate, full.steps, len(full.seeds)) == (0.001, 20, 40)
    assert (len(full.rates), full.rates[4]) == (9, 0.001)
    assert full.order_seeds is None
    assert {c.kind for c in full.all_contrasts} == {
        "same effective rate", "same rate", "tuned", "control"
    }  # fmt: skip
    digits = parse([]).study
    assert digits.order_seeds == tuple(range(4))
    quick = parse(["--quick"]).study
    assert (len(quick.seeds), len(quick.init_scales), quick.tuning_seeds) == (20, 1, 0)
    assert [arm.name for arm in quick.arms] == ["mu 0", "mu 0.9"]
    given = parse(["--quick", "--rates", "0.1", "0.2", "0.3"]).study
    assert given.rates == (0.1, 0.2, 0.3)
    mixed = parse(["--quick", "--seeds", "5", "--controls", "--order-seeds", "paired"]).study
    assert (len(mixed.seeds), len(mixed.arms), mixed.order_seeds) == (5, 4, None)
    assert parse(["--learning-rate", "0.5"]).study.rates[0] == 0.05


def test_a_default_fits_small_data_and_one_mu_is_one_arm(own):
    little = parse(["--problem", f"{own}:little", "--tuning-seeds", "0"]).study
    assert {arm.batch_size for arm in little.arms} == {10}
    mus = parse(["--mu", "0.9", "0.90", "nesterov-0.90", "--no-controls"]).study.arms
    assert [arm.name for arm in mus] == ["mu 0", "mu 0.9", "Nesterov 0.9"]


def test_batch_sizes_are_compared_apart_and_at_equal_epochs():
    arguments = ["--batch-size", "16", "32", "--mu", "0.9", "--steps", "100"]
    study = parse([*arguments, "--equal-epochs"]).study
    assert [(arm.name, arm.batch_size, arm.steps) for arm in study.arms[:4]] == [
        ("mu 0, batch 16", 16, 100),
        ("mu 0.9, batch 16", 16, 100),
        ("mu 0, batch 32", 32, 50),
        ("mu 0.9, batch 32", 32, 50),
    ]
    assert {arm.steps for arm in study.arms[4:]} == {100, 50}
    sizes = {arm.name: arm.batch_size for arm in study.all_arms}
    for contrast in study.all_contrasts:
        if contrast.kind != "tuned":
            assert len({sizes[name] for name in (contrast.baseline, *contrast.arms)}) == 1
    assert {arm.steps for arm in parse(arguments).study.arms} == {None}


def test_help_names_every_option_and_default(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")  # Wide, so that no default is split over two lines.
    with pytest.raises(SystemExit) as stopped:
        parse(["--help"])
    assert stopped.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for option in (
        "--problem NAME", "--mu X", "--learning-rate X", "--rates X", "--init-scale X",
        "--batch-size N", "--equal-epochs", "--controls, --no-controls", "--margin X",
        "--seeds N", "--order-seeds N", "--steps N", "--quick", "--tuning-seeds N", "--record NAME",
        "--out DIR", "--resume DIR", "--csv", "--distributed", "compare DIR DIR",
    ):  # fmt: skip
        assert option in text
    for problem in ("digits", "mnist1d", "double-well", "safran-shamir", "quadratic"):
        assert problem in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seeds", "2"], "--seeds 2: must be at least 3 to measure a standard deviation"),
        (["--steps", "0"], "'0' must be a whole number, at least 1"),
        (["--steps", "many"], "'many' must be a whole number, at least 1"),
        (["--learning-rate", "-1"], "'-1' must be a finite number above 0"),
        (["--learning-rate", "big"], "'big' must be a finite number above 0"),
        (["--mu", "1"], "'1' must be a number above 0 and below 1, such as 0.9, or nesterov-0.9"),
        (["--order-seeds", "many"], "'many' must be a whole number, at least 1"),
        (["--record", "weights"], "invalid choice: 'weights'"),
        (
            ["--problem", "nothing"],
            "--problem nothing: there is no problem 'nothing': give one of digits, mnist1d",
        ),
        (["--problem", "no.py:p"], "there is no file 'no.py'"),
        (
            ["--batch-size", "1500"],
            "--batch-size 1500: must be at most the number of training examples of digits, 1077",
        ),
        (["--problem", "quadratic", "--batch-size", "8"], "quadratic has no data to draw batches"),
        (["--rates", "0.2"], "needs at least two rates to choose from"),
        (["--out", __file__], "already exists and is not empty"),
        (["--out", str(Path(__file__).parent)], "already exists and is not empty"),
        (["--out", "/dev/null/results"], "--out /dev/null/results: cannot write there"),
        (["--resume", "/nowhere"], "/nowhere holds no study, because it has no study.json"),
        (["compare", "/nowhere", "/here"], "/nowhere holds no finished study"),
        (["--distributed"], "--distributed: give --out too"),
        (["--wrong"], "unrecognized arguments: --wrong"),
    ],
)
def test_an_error_is_one_line_before_the_work_starts(arguments, message, capsys, tmp_path):
    alone = ("--out", "--resume", "--distributed", "compare")
    out = [] if arguments[0] in alone else ["--out", str(tmp_path)]
    assert message in refused(capsys, *arguments, *out)


def test_an_error_in_ones_own_file_is_one_line_too(own, capsys):
    for name, message in (
        ("a_number", "must be a momentum_jax.study.Problem"),
        ("q", "no object 'q'"),
        ("vector", "loss(params) of vector must return one float, but returns shape (3,)"),
    ):
        assert message in refused(capsys, "--problem", f"{own}:{name}")


def test_what_cannot_be_resumed_is_one_line(own, tmp_path, capsys):
    out = tmp_path / "out"
    study = parse(["--problem", f"{own}:problem", *SMALL]).study
    study.save(out)
    resume = ("--resume", str(out))
    assert "--steps cannot change in a study that has started" in refused(
        capsys, *resume, "--steps", "9"
    )
    changed = refused(capsys, *resume, "--seeds", "3")
    assert "holds another study, which differs in seeds" in changed
    started = refused(capsys, "--problem", f"{own}:problem", "--out", str(out))
    assert f"it holds a study: --resume {out} resumes or extends it" in started
    (out / design.FILE).write_text("{")
    assert f"{out / design.FILE} is damaged: it is not JSON" in refused(capsys, *resume)
    own.unlink()
    study.save(tmp_path / "other")
    gone = refused(capsys, "--resume", str(tmp_path / "other"))
    assert "there is no file" in gone


def test_a_damaged_chunk_is_one_line_and_trained_again(own, tmp_path):
    out = tmp_path / "out"
    arguments = ["--problem", f"{own}:problem", *SMALL, "--tuning-seeds", "0", "--mu", "0.9"]
    command(*arguments, "--out", str(out))
    chunk = next((out / "runs").glob("*.npz"))
    chunk.write_bytes(chunk.read_bytes()[:50])
    done = command("--resume", str(out))
    (line,) = [line for line in done.stderr.splitlines() if "damaged" in line]
    assert line.startswith(f"python -m momentum_jax.study: {chunk} is damaged (BadZipFile): ")
    assert "UserWarning" not in done.stderr


def test_too_little_room_is_said_before_the_work_starts(tmp_path, monkeypatch, capsys):
    usage = shutil.disk_usage(tmp_path)._replace(free=10 * 2**20)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    error = refused(capsys, "--quick", "--out", str(tmp_path / "out"))
    assert "but only 10 MB are free; give a folder on another disk" in error
    assert not (tmp_path / "out").exists()


def test_a_study_in_which_all_runs_diverge_says_so_first(own, tmp_path):
    few = ["--seeds", "6", "--quick", "--init-scale", "1", "--learning-rate", "1e9"]
    arguments = ["--problem", f"{own}:problem", *few, "--rates", "1e9", "1e10"]
    done = command(*arguments, "--out", str(tmp_path / "out"))
    assert "every run diverged" in done.stdout.lower().strip().splitlines()[0]
    assert "every run diverged" in (tmp_path / "out" / "report.md").read_text().lower()[:800]
    assert Study.load(tmp_path / "out").learning_rate == 1e9


@pytest.mark.parametrize("module", ["study", "diagnostics"])
def test_without_the_packages_of_the_study_a_command_says_what_to_install(module, tmp_path):
    (tmp_path / "matplotlib.py").write_text("raise ModuleNotFoundError('No module named it')")
    done = subprocess.run(
        [sys.executable, "-m", f"momentum_jax.{module}", "--help"],
        env=environment() | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr == "error: No module named it; pip install 'momentum_jax[study]'\n"
