"""The benchmarks run, and their statistics are right; how fast anything is, no test asks."""

import json
import math
import os
import pathlib
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from benchmarks import at_scale, compiled, hlo, on_device
from benchmarks.__main__ import parse, parse_size
from benchmarks.quantization import CHOSEN, SCHEMES, errors, velocities
from benchmarks.step import OPTAX, OURS, Size, limit_seconds, whole_step
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


@pytest.mark.slow
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
    for situation in ("eager, new instance", "jitted, value as argument"):
        assert situations[situation]["ours"] == {"learning_rate": 0, "mu": 0}
    # Where a compile cannot be avoided, it was counted.
    for library in ("ours", "optax"):
        again = situations["jitted, new instance inside"][library]
        assert again == {"learning_rate": 1, "mu": 1}


def test_the_chosen_scheme_is_what_the_package_does():
    """Of the comparison of 8-bit schemes, on normal values: one error, within 1%."""
    values = velocities()["normal"][: 2**16]
    once = errors(SCHEMES[CHOSEN], {"normal": values})["normal"]
    grads = jnp.asarray(values.reshape(-1, 512), jnp.float32)
    tx: Any = trace(0.0, velocity_dtype="int8")
    stored = np.asarray(read_velocity(tx.update(grads, tx.init(grads))[1]), np.float64)
    difference = stored - np.asarray(grads, np.float64)
    assert np.sqrt(np.mean(difference**2) / np.mean(values**2)) == pytest.approx(once, rel=0.01)
    assert SCHEMES[CHOSEN].bytes == 1.0625


def test_the_page_about_low_precision_says_what_was_measured():
    """What docs/low_precision.md says, in the committed numbers."""
    results = json.loads((ROOT / "benchmarks" / "results" / "quantization.json").read_text())
    assert results["schemes"].keys() == SCHEMES.keys()
    ours = results["schemes"][results["chosen"]]
    once = {name: results["schemes"][name]["errors"]["normal"] for name in SCHEMES}
    assert round(once[CHOSEN], 4) == 0.0074
    assert round(once["same codes, nearest"], 4) == round(once["flashoptim"], 4) == 0.0050
    assert round(once["earlier format, dithered"], 4) == 0.0049
    assert round(ours["errors"]["rows of unequal size"], 2) == 0.13
    levels = ours["levels"]
    assert [round(levels[mu]["scatter"], 3) for mu in levels] == [0.011, 0.017, 0.024]
    exact = results["schemes"]["same codes, exact scales"]["levels"]["0.999"]
    assert round(exact["scatter"], 3) == 0.007
    for level in levels.values():
        assert abs(level["reached"] - 1) < 0.001
        assert level["remaining"] < 0.0002
    larger = {}
    for name, of in results["stationary"].items():
        for mu, each in of.items():
            low = each["bfloat16"]["variance"]["value"] - 1
            assert abs(low) < 0.0035
            larger[name, mu] = each["int8"]["variance"]["value"] - 1
            if "unequal" not in name:
                for dtype in ("bfloat16", "int8"):
                    mean = each[dtype]["mean"]
                    assert -0.0003 < mean["low"] <= 0 <= mean["high"] < 0.0003
    assert larger["blocks of 32", "0.9"] < 0.001
    assert list(larger.values())[1:6] == pytest.approx(
        [0.003, 0.029, 0.001, 0.004, 0.040], abs=0.0005
    )
    assert list(larger.values())[6:] == pytest.approx([0.03, 0.28, 2.2], abs=0.02)
    for name, row in results["training"].items():
        low, high = row["difference"]["low"], row["difference"]["high"]
        assert low < 0 < high
        if name.startswith("int8"):
            limit = 0.0005 if name.endswith("mu 0.9") else 0.002
            assert max(-low, high) < limit * row["float32_loss"]["value"]
    timed = json.loads((ROOT / "benchmarks" / "results" / "storage-speed.json").read_text())
    ratios = {
        dtype: [of[dtype]["ratio"]["median"] for of in timed["shapes"].values()]
        for dtype in ("bfloat16", "int8")
    }
    assert 1.45 < min(ratios["bfloat16"]) <= max(ratios["bfloat16"]) < 1.85
    assert 2.65 < min(ratios["int8"]) <= max(ratios["int8"]) < 3.25


def test_the_times_on_a_gpu_are_those_of_the_pages():
    h100, h200 = (
        {
            part: {name: round(row["ratio"]["median"], 2) for name, row in of[part].items()}
            for part in ("alone", "training")
        }
        for of in on_device.results()
    )
    assert h100["alone"] == {
        "optax.sgd": 1.0, "momentum": 1.01, "velocity bfloat16": 0.81, "velocity float16": 0.81,
        "velocity int8": 1.02, "record": 1.48, "params bfloat16": 0.71, "kahan": 0.92,
        "kahan, velocity int8": 0.86, "adaptive_restart": 2.4,
    }  # fmt: skip
    assert list(h100["training"].values()) == [1.0, 1.01, 0.95, 1.03, 1.24]
    assert h200["alone"] == {
        "optax.sgd": 1.0, "momentum": 1.01, "velocity bfloat16": 0.82, "velocity float16": 0.82,
        "velocity int8": 1.27, "record": 1.53, "params bfloat16": 0.72, "kahan": 0.92,
        "kahan, velocity int8": 1.24, "adaptive_restart": 2.41,
    }  # fmt: skip
    assert list(h200["training"].values()) == [1.0, 1.0, 0.97, 1.08, 1.18]
    # On an H100 the time is that of the bytes: the memory is busy all the time. On an H200, whose
    # memory is faster, so is it but for 8-bit velocities.
    for of, speed in zip(on_device.results(), (2.85e12, 4.05e12), strict=True):
        for name, row in of["alone"].items():
            if speed < 3e12 or not ("int8" in name or name == "record"):
                assert row["bytes_per_second"] == pytest.approx(speed, rel=0.05)


@pytest.mark.slow
def test_the_benchmark_on_a_device_runs(tmp_path, capsys):
    out = tmp_path / "a.json"
    on_device.main(["--scale", "64", "--rounds", "2", "--out", str(out)])
    found = json.loads(out.read_text())
    assert list(found["alone"]) == list(on_device.ALONE)
    assert list(found["training"]) == list(on_device.TRAINING)
    assert len(capsys.readouterr().out.splitlines()) == 1 + len(found["alone"]) + 5


# In the form that the compiler for TPUs writes: a scalar, a copy into memory on the chip under way
# beside a slice, a fusion that reads both and one array twice, a copy back.
TPU_PROGRAM = """HloModule jit_step, is_scheduled=true, entry_computation_layout={...}

%fused (a: f32[8,128], b: f32[8,128], c: f32[2,128]) -> (f32[8,128], bf16[8,128]) {
  %a = f32[8,128]{1,0:T(8,128)} parameter(0)
  ROOT %t = (f32[8,128]{1,0:T(8,128)}, bf16[8,128]{1,0:T(8,128)}) tuple(%a, %a)
}

ENTRY %main.2 (p: f32[8,128], n: s32[], g: f32[8,128]) -> (f32[8,128], s32[]) {
  %p.1 = f32[8,128]{1,0:T(8,128)} parameter(0), sharding={replicated}
  %n.1 = s32[]{:T(128)} parameter(1)
  %g.1 = f32[8,128]{1,0:T(8,128)} parameter(2)
  %one = s32[]{:T(128)} constant(1)
  %copy.6 = s32[]{:T(128)S(6)} copy(%n.1), backend_config={"flag_configs":[]}
  %add.2 = s32[]{:T(128)} add(%copy.6, %one), metadata={op_name="jit(step)/add"}
  %copy-start = (f32[8,128]{1,0:T(8,128)S(1)}, f32[8,128]{1,0:T(8,128)}, u32[]{:S(2)}) copy-start(%g.1)
  %copy-done = f32[8,128]{1,0:T(8,128)S(1)} copy-done(%copy-start)
  %slice-start = ((f32[8,128]{1,0:T(8,128)}), f32[2,128]{1,0:T(8,128)S(1)}, u32[]{:S(2)}) slice-start(%p.1), slice={[0:2], [0:128]}
  %slice-done = f32[2,128]{1,0:T(8,128)S(1)} slice-done(%slice-start)
  %join = f32[2,128]{1,0:T(8,128)S(1)} custom-call(%slice-done), custom_call_target="ConcatBitcast"
  %fusion = (f32[8,128]{1,0:T(8,128)}, /*index=1*/bf16[8,128]{1,0:T(8,128)(2,1)S(1)}) fusion(%p.1, %p.1, %copy-done, %join), kind=kLoop, calls=%fused
  %gte = f32[8,128]{1,0:T(8,128)} get-tuple-element(%fusion), index=0
  %gte.1 = bf16[8,128]{1,0:T(8,128)(2,1)S(1)} get-tuple-element(%fusion), index=1
  %copy-start.1 = (bf16[8,128]{1,0:T(8,128)}, bf16[8,128]{1,0:T(8,128)S(1)}, u32[]{:S(2)}) copy-start(%gte.1)
  %copy-done.1 = bf16[8,128]{1,0:T(8,128)} copy-done(%copy-start.1)
  ROOT %tuple = (f32[8,128]{1,0:T(8,128)}, s32[]{:T(128)}) tuple(%gte, %add.2)
}
"""  # noqa: E501
# In the form of the compiler for GPUs: a loop of 24 runs, a graph of kernels, a condition.
GPU_PROGRAM = """HloModule jit_step

%body (t: (f32[4], s32[])) -> (f32[4], s32[]) {
  %t = (f32[4]{0}, s32[]) parameter(0)
  %x = f32[4]{0} get-tuple-element(%t), index=0
  %i = s32[] get-tuple-element(%t), index=1
  %fusion.1 = f32[4]{0} fusion(%x), kind=kLoop, calls=%fused
  ROOT %r = (f32[4]{0}, s32[]) tuple(%fusion.1, %i)
}

%condition (t: (f32[4], s32[])) -> pred[] {
  %t = (f32[4]{0}, s32[]) parameter(0)
  %i = s32[] get-tuple-element(%t), index=1
  ROOT %less = pred[] fusion(%i), kind=kLoop, calls=%compare
}

%graph (x: f32[4], y: s8[1024]) -> f32[4] {
  %x = f32[4]{0} parameter(0)
  %y = s8[1024]{0} parameter(1)
  ROOT %gemm = f32[4]{0} custom-call(%x, %y), custom_call_target="__cublas$gemm"
}

%none (x: f32[4]) -> f32[4] {
  ROOT %x = f32[4]{0} parameter(0)
}

%some (x: f32[4]) -> f32[4] {
  %x = f32[4]{0} parameter(0)
  ROOT %copy = f32[4]{0} copy(%x)
}

ENTRY %main (x: f32[4], y: s8[1024], b: s32[]) -> f32[4] {
  %x = f32[4]{0} parameter(0)
  %y = s8[1024]{0} parameter(1)
  %b = s32[] parameter(2)
  %tuple = (f32[4]{0}, s32[]) tuple(%x, %b)
  %while = (f32[4]{0}, s32[]) while(%tuple), condition=%condition, body=%body, backend_config={"known_trip_count":{"n":"24"}}
  %x.1 = f32[4]{0} get-tuple-element(%while), index=0
  %call = f32[4]{0} call(%x.1, %y), to_apply=%graph
  %slice = s8[8]{0} slice(%y), slice={[0:8]}
  ROOT %conditional = f32[4]{0} conditional(%b, %call, %call), branch_computations={%none, %some}
}
"""  # noqa: E501


def test_bytes_in_device_memory_are_counted_and_those_on_the_chip_are_not():
    array, scalar = 8 * 128 * 4, 4
    copied = array + array / 2  # g in, the bfloat16 result out.
    expected = (scalar + scalar + scalar) + copied + array / 4 + (array + array)
    # The fusion; the instructions on scalars and the copies that run beside it are no kernels.
    assert hlo.traffic(TPU_PROGRAM) == hlo.Traffic(expected, kernels=1)


def test_loops_calls_and_conditions_are_counted_as_they_run():
    loop = 24 * ((16 + 16) + (4 + 1))
    call, sliced, condition = 16 + 1024 + 16, 8 + 8, 16 + 16
    expected = hlo.Traffic(loop + call + sliced + condition, kernels=48 + 1 + 1 + 1)
    assert hlo.traffic(GPU_PROGRAM) == expected


def test_a_text_that_is_no_program_is_refused():
    with pytest.raises(ValueError, match="as_text"):
        hlo.traffic("f32[8]")


@pytest.mark.parametrize(
    ("shape", "size"),
    [("f32[3,5]{1,0}", 60), ("pred[7]", 7), ("s4[10]", 5), ("f8e4m3fn[8]", 8), ("c64[]", 8)],
)
def test_the_size_of_an_array_is_read_from_its_shape(shape, size):
    assert [x.bytes for x in hlo.arrays(f"({shape}, token[])")] == [size]


@pytest.mark.parametrize("library", [OURS, OPTAX])
def test_a_step_compiled_for_a_cpu_moves_20_bytes_a_param_or_reads_the_velocity_again(library):
    params = {"w": jnp.ones((64, 64))}
    step = jax.jit(whole_step(library), donate_argnums=(0, 1))
    program = step.lower(params, library[0].init(params), params).compile().as_text()
    assert 20 <= hlo.traffic(str(program)).bytes / 64**2 <= 24.01


LEAST = {
    "optax.sgd": 20,
    "momentum": 20,
    "aggmo": 36,
    "adaptive_restart": 36,
    "velocity bfloat16": 16,
    "velocity int8": 12 + 2 * 1.0625,
    "kahan": 18,
    "kahan, velocity int8": 10 + 2 * 1.0625,
    "training, momentum": None,
}


@pytest.mark.parametrize("name", LEAST)
def test_the_least_is_each_array_read_and_the_new_ones_written(name):
    (row,) = (row for row in compiled.ROWS if row.name == name)
    assert row.least() == pytest.approx(LEAST[name], abs=1e-3)


def test_rows_have_names_of_their_own_and_the_readme_names_rows():
    names = [row.name for row in compiled.ROWS]
    assert len(names) == len(set(names))
    assert set(compiled.README.values()) <= set(names)


@pytest.mark.parametrize("platform", compiled.PLATFORMS)
def test_the_committed_numbers_are_of_all_rows_and_count_20_bytes_for_any_shape(platform):
    rows = json.loads(compiled.RESULT.read_text())["platforms"][platform]["rows"]
    assert list(rows) == [row.name for row in compiled.ROWS]
    # Float32 is fused into one kernel an array: what is counted beside these bytes is wrong.
    for name in ("momentum", *(f"momentum, {shape}" for shape in compiled.SHAPES)):
        assert rows[name]["bytes_per_param"] == pytest.approx(20, abs=0.001), name


def test_a_shortfall_is_said_with_its_number():
    rows = {
        "good": {"least_bytes_per_param": 20.0, "bytes_per_param": 20.9},
        "bad": {"least_bytes_per_param": 20.0, "bytes_per_param": 30.0},
        "training, optax.sgd": {"least_bytes_per_param": None, "bytes_per_param": 24.0},
        "training, good": {"least_bytes_per_param": None, "bytes_per_param": 25.0},
        "training, bad": {"least_bytes_per_param": None, "bytes_per_param": 36.0},
        "large": {"error": "no room"},
    }
    assert compiled.shortfalls({"device": "H100", "rows": rows}) == [
        "H100: *bad* moves 30.0 bytes per parameter, 1.50 times the minimum (20.0).",
        "H100: *training, bad* moves 36.0 bytes per parameter, "
        "1.50 times the bytes of `optax.sgd` (24.0).",
        "H100: *large* does not compile: no room",
    ]


def test_compile_times_are_said_beside_those_of_float32():
    def row(seconds):
        return {"trace_seconds": seconds, "lower_seconds": 0.0, "compile_seconds": seconds}

    rows = {
        "momentum, 200 shapes": row(1.0),
        "velocity int8, 200 shapes": row(5.5),
        "velocity int8, (8, 8)": row(1.0),
        "velocity bfloat16, 200 shapes": {"error": "no room"},
        "velocity int8, 200 more": row(1.0),
    }
    assert compiled.compile_times({"device": "H100", "rows": rows}) == [
        "H100: *velocity int8, 200 shapes* takes 11.0 s, 5.5 times as long as float32 (2.0 s)."
    ]


def test_what_is_not_compiled_again_stays_in_the_file(tmp_path):
    path = tmp_path / "new" / "compiled.json"
    compiled.write(None, platforms={"tpu": 1})
    compiled.write(path, platforms={"tpu": 1})
    compiled.write(path, platforms={"gpu": 2}, scale={"rows": {}})
    compiled.write(path, platforms={"tpu": 3})
    expected = {"platforms": {"tpu": 3, "gpu": 2}, "scale": {"rows": {}}}
    assert json.loads(path.read_text()) == expected


def test_without_a_compiler_one_line_names_the_package(monkeypatch, capsys, tmp_path):
    nothing = compiled.Platform("TPU v5e", ("no-such-package",), "pip install 'jax[tpu]'")
    monkeypatch.setitem(compiled.PLATFORMS, "tpu", nothing)
    out = tmp_path / "compiled.json"
    with pytest.raises(SystemExit, match="1"):
        compiled.main(["tpu", "--out", str(out)])
    (line,) = capsys.readouterr().err.splitlines()
    assert "no-such-package" in line
    assert "pip install 'jax[tpu]'" in line
    assert not out.exists()


@pytest.mark.parametrize("arguments", [["cpu"], ["--scale", "gpu"], ["--scale", "--quick"]])
def test_the_command_that_compiles_refuses_what_it_cannot_do(arguments, capsys):
    with pytest.raises(SystemExit):
        compiled.parse(arguments)
    assert "error: " in capsys.readouterr().err


def test_collectives_are_counted_by_kind():
    text = """
      %a = f32[8] all-gather-start(%x), dimensions={0}
      %b = f32[8] all-gather-done(%a)
      %c = f32[8] all-reduce(%b), to_apply=%add
      %d = f32[2] fusion(%c), kind=kCustom, calls=%all-reduce-scatter.1
    """
    expected = {"all-gather": 1, "all-reduce": 1, "fused reduce-scatter": 1}
    assert at_scale.collectives(text) == expected
