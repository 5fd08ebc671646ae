"""The command: what a person types, and what they get."""

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
import pytest
import xarray as xr

from momentum_jax.study import sweep
from momentum_jax.study.__main__ import UNFINISHED, main, parse

COMMAND = [sys.executable, "-m", "momentum_jax.study"]
SMALL = ["--seeds", "6", "--steps", "40", "--init-scale", "2", "0.5", "--no-controls"]
OWN = """
import jax
import jax.numpy as jnp
from momentum_jax.study import Problem


def init(key):
    return jax.random.normal(key, (3,))


def loss(w):
    # What takes its time, so that there is a time at which to be stopped.
    w = jax.lax.fori_loop(0, {work}, lambda i, w: w + 1e-9 * jnp.sin(w), w)
    return jnp.sum(jnp.array([1.0, 10.0, 100.0]) * w**2)


problem = Problem(init, loss, name="my bowl", defaults=dict(learning_rate=0.001, steps=20))
a_number = 3
"""


def environment(devices=2):
    """Without the tests' own devices and cores: as a person has it."""
    return {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"} | {
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"
    }


def command(*arguments, **options):
    options = {"check": True, "capture_output": True, "text": True, "timeout": 240} | options
    return subprocess.run([*COMMAND, *arguments], env=environment(), **options)


@pytest.fixture
def own(tmp_path):
    """A file with a problem of one's own."""
    path = tmp_path / "bowl.py"
    path.write_text(OWN.format(work=1))
    return path


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder and the output of one small study, run as a person runs it."""
    folder = tmp_path_factory.mktemp("study") / "results"
    rates = ["--tuning-rates", "0.01", "0.1", "--tuning-seeds", "2"]
    done = command("--problem", "double-well", *SMALL, *rates, "--out", str(folder))
    return folder, done


def test_it_says_what_it_does_and_where_the_results_are(finished):
    folder, done = finished
    assert (
        "double well: 132 runs of 40 steps (11 arms, 2 initial scales, 6 initial weights), "
        "after 32 runs to tune learning rates, on 2 x cpu" in done.stdout
    )
    for bar in ("tuning: 100%", "training: 100%", "loss=", "statistics: 100%", "pictures: 100%"):
        assert bar in done.stderr
    assert "Traceback" not in done.stderr
    assert "Warning" not in done.stderr
    for name in ("report.html", "report.md", "results.nc", "summary.json", "final-loss-tuned.png"):
        assert f"wrote {folder / name}" in done.stdout
        assert (folder / name).stat().st_size > 1000
    assert "2 compiled programs" in done.stdout
    assert not (folder / UNFINISHED).exists()


def test_the_answer_and_the_tables_are_in_the_terminal(finished):
    folder, done = finished
    answer = json.loads((folder / "summary.json").read_text())["answer"].replace("**", "")
    assert answer in done.stdout
    for contrast in ("At the same learning rate:", "At the same effective", "With the learning"):
        assert re.search(rf"^{contrast}", done.stdout, re.MULTILINE)
    assert re.search(r"\| mu 0.9, tuned +\| all +\|", done.stdout)
    assert "a better one may lie beyond it" in done.stdout


def test_the_files_hold_the_same_numbers(finished):
    folder, _ = finished
    results = xr.load_dataset(folder / "results.nc", engine="scipy")
    summary = json.loads((folder / "summary.json").read_text())
    assert dict(results.sizes)["seed"] == 6
    assert dict(results.sizes)["step"] == 41
    (cell,) = (
        cell
        for cell in summary["cells"]
        if (cell["arm"], cell["init_scale"]) == ("mu 0.9 at 0.016", 0.5)
    )
    last = results.loss.sel(arm="mu 0.9 at 0.016", init_scale=0.5).isel(step=-1).values
    expected = np.minimum(last, 1375 / 3072).mean()
    assert cell["loss"]["mean"]["value"] == pytest.approx(expected, rel=1e-5)
    provenance = summary["provenance"]
    assert provenance["command"].startswith("python -m momentum_jax.study --problem double-well")
    assert "--out" not in provenance["command"]
    assert {"jax", "optax", "momentum_jax"} <= provenance["versions"].keys()


def test_killed_and_resumed_it_ends_with_the_same_numbers_to_the_bit(tmp_path):
    """SIGKILL in the middle; what had ended is not trained again."""
    (tmp_path / "slow.py").write_text(OWN.format(work=4000))
    arguments = [
        "--problem",
        "slow.py:problem",
        "--seeds",
        "600",
        "--init-scale",
        "1",
        "--mu",
        "0.9",
    ]
    arguments += ["--contrast", "same-rate", "--no-controls"]
    command(*arguments, "--out", "whole", cwd=tmp_path)

    stopped = subprocess.Popen(
        [*COMMAND, *arguments, "--out", "stopped"],
        env=environment(),
        cwd=tmp_path,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    chunks = tmp_path / "stopped" / UNFINISHED / "runs"
    deadline = time.monotonic() + 120
    while not list(chunks.glob("*.npz")) and time.monotonic() < deadline:
        time.sleep(0.005)
    stopped.send_signal(signal.SIGKILL)
    assert stopped.wait(timeout=30) == -signal.SIGKILL
    kept = list(chunks.glob("*.npz"))
    assert 1 <= len(kept) < 5

    resumed = command("--resume", str(tmp_path / "stopped"))  # From another folder.
    assert "my bowl: 1200 runs" in resumed.stdout
    # The bar starts where it stopped: only the rest is trained.
    assert f"| {240 * len(kept)}/1200 " in resumed.stderr
    whole, again = (
        xr.load_dataset(tmp_path / name / "results.nc", engine="scipy")
        for name in ("whole", "stopped")
    )
    xr.testing.assert_equal(whole, again)
    ended = command("--resume", "stopped", cwd=tmp_path, check=False)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert "that study has ended, see stopped/report.html" in ended.stderr


def test_two_processes_train_a_study_together(own, tmp_path):
    """Over jax.distributed on this machine; each trains half, one writes the report."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    arguments = [*COMMAND, "--problem", f"{own}:problem", "--seeds", "300", "--init-scale", "1"]
    arguments += ["--mu", "0.9", "--no-controls", "--tuning-rates", "0.001", "0.003", "0.01"]
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
    assert "on 2 processes, each with 1 x cpu" in first
    assert "wrote" in first
    assert "wrote" not in second
    assert "run/s" not in silent
    alone = command(*arguments[3:], "--out", str(tmp_path / "one"))
    assert "wrote" in alone.stdout
    one, two = (
        xr.load_dataset(tmp_path / name / "results.nc", engine="scipy") for name in ("one", "two")
    )
    np.testing.assert_allclose(one.loss, two.loss, rtol=1e-5)
    assert one.attrs["tuning"] == two.attrs["tuning"]


@pytest.mark.parametrize("between", [" ", "="])
def test_stopped_by_hand_it_says_how_to_go_on(between, own, tmp_path, monkeypatch, capsys):
    (tmp_path / "mu=0.9").mkdir()
    own = own.rename(tmp_path / "mu=0.9" / own.name)
    given = f"--problem{between}mu=0.9/{own.name}:problem".split()
    monkeypatch.chdir(tmp_path)

    def stop(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(sweep, "run", stop)
        with pytest.raises(SystemExit) as stopped:
            main([*given, "--out", str(tmp_path / "out"), *SMALL])
    assert stopped.value.code == 2
    expected = f"stopped; what has ended is kept: go on with --resume {tmp_path / 'out'}\n"
    assert capsys.readouterr().err.endswith(expected)
    with pytest.raises(SystemExit):
        parse(["--problem", f"{own}:problem", "--resume", str(tmp_path / "out")])
    assert "--resume goes alone" in capsys.readouterr().err
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert parse(["--resume", str(tmp_path / "out")]).seeds == 6


def test_defaults_are_the_problems_and_quick_is_less(own):
    full = parse(["--problem", f"{own}:problem"])
    assert (full.learning_rate, full.steps, full.seeds) == ([0.001], 20, 100)
    assert full.contrast == ["same-rate", "same-effective-rate", "tuned"]
    assert full.controls
    assert len(full.tuning_rates) == 9
    assert full.tuning_rates[4] == pytest.approx(0.001)
    quick = parse(["--quick"])
    assert (quick.seeds, len(quick.init_scale), quick.controls) == (20, 3, False)
    assert quick.contrast == ["same-rate", "same-effective-rate"]
    mixed = parse(["--quick", "--seeds", "5", "--controls", "--contrast", "tuned"])
    assert (mixed.seeds, mixed.controls, mixed.contrast) == (5, True, ["tuned"])


def test_a_default_fits_small_data_and_one_mu_is_one_arm(own):
    with own.open("a") as file:
        file.write("""
little = Problem(init, lambda w, batch: loss(w) + 0 * batch.sum(), data=jnp.ones((10, 2)))
""")
    assert parse(["--problem", f"{own}:little"]).batch_size == [10]
    assert parse(["--mu", "0.9", "0.90", "nesterov-0.90"]).mu == ["0.9", "nesterov-0.9"]


def test_several_rates_and_batch_sizes_are_contrasts_of_their_own(tmp_path, capsys):
    arguments = ["--problem", "quadratic", "--steps", "5", "--seeds", "3", "--init-scale", "1"]
    arguments += ["--mu", "0.5", "--learning-rate", "0.1", "0.2", "--contrast", "same-rate"]
    main([*arguments, "--no-controls", "--out", str(tmp_path / "out")])
    names = [
        contrast["name"]
        for contrast in json.loads((tmp_path / "out" / "summary.json").read_text())["contrasts"]
    ]
    assert names == ["same rate, 0.1", "same rate, 0.2"]
    assert "At the same learning rate, 0.2:" in capsys.readouterr().out


def test_help_names_every_option_and_default(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")  # Else a default may be broken over two lines.
    with pytest.raises(SystemExit) as stopped:
        parse(["--help"])
    assert stopped.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for option in (
        "--problem NAME", "--mu X", "--learning-rate X", "--contrast NAME", "--init-scale X",
        "--batch-size N", "--controls, --no-controls", "--seeds N", "--steps N", "--quick",
        "--tuning-rates X", "--tuning-seeds N", "--out DIR", "--resume DIR", "--distributed",
    ):  # fmt: skip
        assert option in text
    for problem in ("digits", "mnist1d", "double-well", "safran-shamir", "quadratic"):
        assert problem in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seeds", "2"], "--seeds 2: a spread needs at least 3"),
        (["--steps", "0"], "'0' is not a whole number from 1"),
        (["--steps", "many"], "'many' is not a whole number from 1"),
        (["--learning-rate", "-1"], "'-1' is not a number above 0"),
        (["--learning-rate", "big"], "'big' is not a number above 0"),
        (["--mu", "1"], "'1' is not a number above 0 and below 1, or nesterov- and such"),
        (["--contrast", "fair"], "invalid choice: 'fair'"),
        (
            ["--problem", "nothing"],
            "--problem nothing: no problem is called 'nothing': there are digits, mnist1d",
        ),
        (["--problem", "no.py:p"], "there is no file 'no.py'"),
        (["--batch-size", "1500"], "--batch-size 1500: digits has 1437 training examples"),
        (["--problem", "quadratic", "--batch-size", "8"], "quadratic has no data to draw batches"),
        (["--tuning-rates", "0.1"], "there must be two or more to choose from"),
        (["--out", __file__], "is there already, and is no empty folder"),
        (["--out", str(Path(__file__).parent)], "is there already, and is no empty folder"),
        (["--out", "/dev/null/results"], "--out /dev/null/results: cannot write there"),
        (["--resume", "/nowhere"], "--resume /nowhere: there is no unfinished study"),
        (["--distributed"], "--distributed needs --out"),
        (["--wrong"], "unrecognized arguments: --wrong"),
    ],
)
def test_a_mistake_is_one_line_before_the_work_starts(arguments, message, capsys, tmp_path):
    out = [] if arguments[0] in ("--out", "--resume", "--distributed") else ["--out", str(tmp_path)]
    with pytest.raises(SystemExit) as stopped:
        main([*arguments, *out])
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_a_mistake_in_ones_own_file_is_one_line_too(own, capsys):
    with own.open("a") as file:
        file.write('vector = Problem(init, lambda w: w, name="vector")\n')
    for name, message in (
        ("a_number", "must be a momentum_jax.study Problem"),
        ("q", "no 'q'"),
        ("vector", "loss(params) of vector must return one float, but returns shape (3,)"),
    ):
        with pytest.raises(SystemExit):
            parse(["--problem", f"{own}:{name}"])
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1


def test_too_little_room_is_said_before_the_work_starts(tmp_path, monkeypatch, capsys):
    usage = shutil.disk_usage(tmp_path)._replace(free=10 * 2**20)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(SystemExit):
        main(["--quick", "--out", str(tmp_path / "out")])
    assert "10 MB are free there, and the results may take" in capsys.readouterr().err
    assert not list((tmp_path / "out").iterdir())


def test_a_study_is_not_begun_over_an_unfinished_one(own, tmp_path, capsys):
    out = tmp_path / "out"
    (out / UNFINISHED).mkdir(parents=True)
    (out / UNFINISHED / "command.json").write_text("[]")
    with pytest.raises(SystemExit):
        main(["--problem", f"{own}:problem", "--out", str(out)])
    assert f"an unfinished study is in it: --resume {out}" in capsys.readouterr().err
