"""The benchmarks run, and their statistics are right; how fast anything is, no test asks."""

import json
import math
import os
import pathlib
import subprocess
import sys
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from benchmarks.__main__ import parse, parse_size
from benchmarks.quantization import CHOSEN, SCHEMES, errors, velocities
from benchmarks.step import Size, limit_seconds
from benchmarks.timing import compare, interleave, paired_ratio, summary
from momentum_jax import read_velocity, trace

ROOT = pathlib.Path(__file__).parents[1]


def test_summary_gives_the_quartiles_of_numpy():
    samples = np.random.default_rng(0).lognormal(size=23).tolist()
    lower, median, upper = np.quantile(samples, [0.25, 0.5, 0.75]).tolist()
    expected = {"min": min(samples), "lower_quartile": lower, "median": median}
    assert summary(samples) == pytest.approx(expected | {"upper_quartile": upper})


def test_the_ratio_is_paired_within_rounds():
    """A drift that both share cancels: the ratio is 2 in each round, though not of the sums."""
    theirs = [1.0, 100.0, 10.0, 3.0, 7.0, 2.0]
    ratio = paired_ratio([2 * x for x in theirs], theirs)
    assert ratio == {"median": 2.0, "low": 2.0, "high": 2.0, "coverage": 1 - 2 / 2**6}


def test_the_ratio_is_the_median_of_the_ratios():
    """Of 1, 2, 10: not 13 / 3, the ratio of the means, nor 2 / 3, of the medians."""
    assert paired_ratio([10.0, 2.0, 1.0], [1.0, 1.0, 1.0])["median"] == 2
    assert paired_ratio([1.0, 2.0, 30.0], [1.0, 1.0, 3.0])["median"] == 2


@pytest.mark.parametrize("rounds", [3, 6, 20, 25, 30, 101])
def test_the_interval_is_scipys(rounds):
    ratios = np.random.default_rng(rounds).lognormal(size=rounds)
    ratio = paired_ratio(ratios.tolist(), [1.0] * rounds)
    level = 0.95 if rounds >= 6 else 0.7  # The extremes of 3 cover 75%, and no more is to be had.
    expected = scipy.stats.quantile_test(ratios, p=0.5).confidence_interval(level)
    assert (ratio["low"], ratio["high"]) == (expected.low, expected.high)
    outside = np.searchsorted(np.sort(ratios), ratio["low"])
    assert ratio["coverage"] == pytest.approx(1 - 2 * scipy.stats.binom.cdf(outside, rounds, 0.5))


@pytest.mark.parametrize(
    ("target", "reached", "within_noise"),
    [(0.4, False, False), (0.5, True, True), (0.7, True, False)],
)
def test_a_target_is_judged_by_the_median(target, reached, within_noise):
    seconds = {"ours": [0.9, 1.0, 1.1], "optax": [2.0, 2.0, 2.0]}
    result = compare(seconds, "optax", target)
    assert (result["reached"], result["within_noise"]) == (reached, within_noise)


def test_every_contestant_takes_part_in_every_round():
    runs = {"ours": 0, "optax": 0}

    def contestant(name):
        def run(calls):
            for _ in range(calls):  # Each takes some time, or no number of them takes enough.
                runs[name] += 1

        return run

    seconds = interleave({name: contestant(name) for name in runs}, 5, sample_seconds=1e-6)
    assert {name: len(samples) for name, samples in seconds.items()} == {"ours": 5, "optax": 5}
    assert min(runs.values()) >= 1 + 1 + 5 * 2  # To compile, to calibrate, untimed and timed.


@pytest.mark.parametrize(
    ("name", "leaves", "values"),
    [("1x20M", 1, 20_000_000), ("60x10k", 60, 10_000), ("3x7", 3, 7)],
)
def test_a_size_is_read_from_its_name(name, leaves, values):
    assert parse_size(name) == Size(name, leaves, values)


@pytest.mark.parametrize("arguments", [["--sizes", "10k"], ["--sizes", "0x5"], ["--rounds", "19"]])
def test_the_command_line_refuses_what_measures_nothing(arguments, capsys):
    with pytest.raises(SystemExit):
        parse(arguments)
    assert "must be" in capsys.readouterr().err


def test_the_limit_counts_20_bytes_a_param():
    assert limit_seconds(Size("", 1000, 1_000), 2e9) == pytest.approx(0.01)


def numbers(tree, path=()):
    """Every number in the tree with the path to it."""
    if isinstance(tree, dict):
        for name, branch in tree.items():
            yield from numbers(branch, (*path, name))
    elif isinstance(tree, int | float) and not isinstance(tree, bool):
        yield path, tree


def test_the_quick_run_writes_every_number(tmp_path):
    """On one device and without warnings, as a user starts it."""
    out = tmp_path / "results.json"
    environment = os.environ | {"XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-W", "error", "-m", "benchmarks", "--quick", "--out", str(out)]
    done = subprocess.run(
        [*command, "--sizes", "2x10", "1x1k"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    results = json.loads(out.read_text())

    assert list(results["sizes"]) == ["2x10", "1x1k"]
    for result in results["sizes"].values():
        for what in ("init", "eager_step", "jitted_step"):
            assert {"ours", "optax", "ratio"} <= result[what].keys()
        state = 4 * result["leaves"] * result["values"]
        assert result["memory"]["optax"]["state_bytes"] == state
        assert result["memory"]["ours"]["state_bytes"] == state + 4  # The count.
        kinds = set() if results["torch"].startswith("not measured") else {"foreach", "fused"}
        assert set(result.get("torch", {})) == kinds
    for stage in ("trace", "lower", "compile", "total"):
        assert {"ours", "optax", "ratio", "reached"} <= results["compile_times"][stage].keys()

    for path, number in numbers(results):
        may_be_zero = path[0] == "compiles" or path[-1] == "temp_bytes"
        assert math.isfinite(number), path
        assert number >= 0 if may_be_zero else number > 0, path
        if path[-1] == "median" and path[-2] in ("ratio", "control"):
            assert f"{number:.3f} [" in done.stdout, path

    situations = results["compiles"]
    for situation in ("eager, a new instance", "jitted, the value an argument"):
        assert situations[situation]["ours"] == {"learning_rate": 0, "mu": 0}
    # Where a compile cannot be avoided, it was counted.
    for library in ("ours", "optax"):
        again = situations["jitted around a new instance"][library]
        assert again == {"learning_rate": 1, "mu": 1}


def test_the_chosen_scheme_is_what_the_package_does():
    """Of the comparison of 8-bit schemes, on normal values: one error, within 1%."""
    values = velocities()["normal"][: 2**16]
    once = errors(SCHEMES[CHOSEN], {"normal": values})["normal"]
    grads = jnp.asarray(values.reshape(-1, 512), jnp.float32)
    tx: Any = trace(0.0, velocity_dtype="int8")
    held = np.asarray(read_velocity(tx.update(grads, tx.init(grads))[1]), np.float64)
    difference = held - np.asarray(grads, np.float64)
    assert np.sqrt(np.mean(difference**2) / np.mean(values**2)) == pytest.approx(once, rel=0.01)
    assert SCHEMES[CHOSEN].bytes == 1.0625
