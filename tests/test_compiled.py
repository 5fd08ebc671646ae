"""What a step costs on a TPU that is not present: bytes and temporaries stay within limits.

The compiler alone is needed: `pip install -e '.[tpu-compiler]'`. `python -m benchmarks.compiled`
prints the numbers, and those of many more steps.
"""

import json

import pytest
from processes import run_for_tpu

# By the row of the benchmark, bytes per parameter: the most that may be moved in device memory, and
# the most that may be allocated beside params, gradients and state. Except for int8 and
# kahan, the limits are 2% above what was measured with JAX 0.10.2 and libtpu 0.0.42.1.
LIMITS = {
    "optax.sgd": (20.4, 0.01),  # 20.00, 0.00
    "momentum": (20.4, 0.01),  # 20.00, 0.00
    "momentum, Nesterov": (20.4, 0.01),  # 20.00, 0.00
    "trace, then scale": (20.4, 0.01),  # 20.00, 0.00
    "qhm": (20.4, 0.01),  # 20.00, 0.00
    "aggmo": (36.8, 0.01),  # 36.00, 0.00
    "adaptive_restart": (40.8, 0.01),  # 40.00, 0.00
    "velocity bfloat16": (16.4, 0.01),  # 16.00, 0.00
    "velocity int8": (26.7, 4.1),  # 26.12, 4.00
    "velocity int8, (50257, 768)": (22.5, 4.1),  # 22.03, 4.01
    "velocity int8, (3, 3, 512, 2048)": (14.5, 0.01),  # 14.12, 0.00
    "velocity int8, (33554432,)": (22.5, 0.01),  # 22.03, 0.00
    "kahan": (18.4, 0.01),  # 18.00, 0.00
}


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """The numbers of each step, by the name of its row."""
    out = tmp_path_factory.mktemp("compiled") / "compiled.json"
    only = [f"--only={name}" for name in LIMITS]
    run_for_tpu("-m", "benchmarks.compiled", "tpu", *only, "--out", str(out))
    return json.loads(out.read_text())["platforms"]["tpu"]["rows"]


@pytest.mark.parametrize("name", LIMITS)
def test_a_step_on_a_tpu_moves_few_bytes_and_needs_few_temporaries(name, rows):
    moved, temporaries = LIMITS[name]
    row = rows[name]
    assert row["least_bytes_per_param"] <= row["bytes_per_param"] <= moved
    assert row["temp_bytes_per_param"] <= temporaries


def test_where_nothing_is_copied_the_compiler_counts_the_same_bytes(rows):
    row = rows["momentum"]
    assert row["compiler_bytes_per_param"] == pytest.approx(row["bytes_per_param"], rel=1e-3)
