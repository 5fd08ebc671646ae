"""A smoke test of an installed package, with no more than it depends on: `python .ci/smoke.py`.

It is run in an environment of its own, outside the repository; pytest is not needed.
"""

import importlib.metadata
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax

import momentum_jax as mj

installed = Path(mj.__file__).resolve()
assert installed.is_relative_to(Path(sysconfig.get_paths()["purelib"]).resolve()), installed
assert importlib.metadata.version("momentum_jax") == mj.__version__
assert (installed.parent / "py.typed").exists()

# Every public name is there, and none needs what is not installed.
for name in mj.__all__:
    assert getattr(mj, name) is not None, name


def distance_after(tx: Any, steps=100):
    """From the minimum of a ravine."""
    params: Any = {"x": jnp.float32(4.0), "y": jnp.float32(1.0)}
    state = tx.init(params)
    for _ in range(steps):
        grads = jax.grad(lambda p: p["x"] ** 2 / 2 + 10 * p["y"] ** 2)(params)
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
    return max(abs(params["x"]), abs(params["y"]))


for tx in (
    mj.momentum(0.02),
    mj.momentum(0.02, nesterov=True, velocity_dtype=jnp.bfloat16),
    optax.chain(mj.trace(0.9), optax.scale_by_learning_rate(0.02)),
    mj.kahan(mj.adaptive_restart(mj.momentum(0.02))),
    mj.frameworks.torch_sgd(0.02, 0.9),
):
    assert distance_after(tx) < 0.1

# The study needs more packages, and says so on one line.
command = [sys.executable, "-m", "momentum_jax.study", "--help"]
found = subprocess.run(command, capture_output=True, text=True, check=False)
if found.returncode:
    assert found.stderr.strip().count("\n") == 0, found.stderr
    assert "pip install 'momentum_jax[study]'" in found.stderr, found.stderr

print(f"momentum_jax {mj.__version__} works with JAX {jax.__version__}, Optax {optax.__version__}")
