"""Records the trajectories of the real PyTorch and Keras, which the tests compare with.

    python tests/golden/record.py            writes tests/golden/*.json
    python tests/golden/record.py --check    says whether they are what would be written

Both are trained on one small problem, step by step, in float64, under a learning rate that
changes up and down, with every combination of their options.
"""

import argparse
import contextlib
import importlib
import importlib.metadata
import itertools
import json
import os
import pathlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

FOLDER = pathlib.Path(__file__).parent
STEPS = 48
START = np.array([1.0, -0.5, 0.25, 2.0])
CURVATURE = np.array([[0.9, 0.1, 0, 0], [0.1, 0.4, 0, 0.05], [0, 0, 0.02, 0], [0, 0.05, 0, 0.6]])
LEARNING_RATES = [0.01, 0.06, 0.03, 0.005]

Trajectory = list[list[float]]


def learning_rate(step: int) -> float:
    """Up, down and further down, and up again."""
    return LEARNING_RATES[step // 5 % len(LEARNING_RATES)]


def gradient(w: np.ndarray, step: int) -> np.ndarray:
    """Of a quadratic, and a force that changes with time."""
    return CURVATURE @ w + 0.3 * np.sin(step + np.arange(4.0))


def grid(**options: list[Any]) -> list[dict[str, Any]]:
    """Every combination."""
    return [
        dict(zip(options, values, strict=True)) for values in itertools.product(*options.values())
    ]


TORCH_CASES = [
    case
    for case in grid(
        momentum=[0.0, 0.9],
        dampening=[0.0, 0.3],
        weight_decay=[0.0, 0.05],
        nesterov=[False, True],
        maximize=[False, True],
    )
    # What PyTorch refuses.
    if not case["nesterov"] or (case["momentum"] and not case["dampening"])
]
KERAS_CASES = grid(momentum=[0.0, 0.9], nesterov=[False, True], weight_decay=[None, 0.05])


def torch_trajectory(case: dict[str, Any]) -> Trajectory:
    """The params after each step of `torch.optim.SGD`."""
    torch = importlib.import_module("torch")
    w = torch.nn.Parameter(torch.tensor(START))
    optimizer = torch.optim.SGD([w], lr=1.0, **case)
    trajectory = []
    for step in range(STEPS):
        optimizer.param_groups[0]["lr"] = learning_rate(step)
        w.grad = torch.tensor(gradient(w.detach().numpy(), step))
        optimizer.step()
        trajectory.append(w.tolist())
    return trajectory


def keras_trajectory(case: dict[str, Any]) -> Trajectory:
    """The params after each step of `keras.optimizers.SGD`, on JAX."""
    keras = import_keras()
    with float64(keras):
        w = keras.Variable(START)
        optimizer = keras.optimizers.SGD(1.0, **case)
        optimizer.build([w])
        trajectory = []
        for step in range(STEPS):
            optimizer.learning_rate.assign(learning_rate(step))
            optimizer.apply([keras.ops.array(gradient(np.asarray(w), step))], [w])
            trajectory.append(np.asarray(w).tolist())
    return trajectory


def import_keras() -> Any:
    """Keras on its JAX backend, which it chooses when it is imported."""
    os.environ["KERAS_BACKEND"] = "jax"
    return importlib.import_module("keras")


@contextlib.contextmanager
def float64(keras: Any) -> Iterator[None]:
    """Keras and JAX in float64: its variables, learning rate and layers, with no narrower cast."""
    jax = importlib.import_module("jax")
    was = keras.config.floatx(), jax.config.read("jax_enable_x64"), keras.config.dtype_policy()
    keras.config.set_floatx("float64")
    keras.config.set_dtype_policy("float64")
    jax.config.update("jax_enable_x64", True)
    try:
        yield
    finally:
        keras.config.set_floatx(was[0])
        jax.config.update("jax_enable_x64", was[1])
        keras.config.set_dtype_policy(was[2])


FRAMEWORKS: dict[str, tuple[list[dict[str, Any]], Callable[[dict[str, Any]], Trajectory]]] = {
    "torch": (TORCH_CASES, torch_trajectory),
    "keras": (KERAS_CASES, keras_trajectory),
}


def load(framework: str) -> list[dict[str, Any]]:
    """What was recorded: a list of cases, each with its trajectory."""
    return json.loads((FOLDER / f"{framework}.json").read_text())["cases"]


def main() -> None:
    """Records all, or checks what was recorded."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="compare, and write nothing")
    check = parser.parse_args().check
    for framework, (cases, trajectory) in FRAMEWORKS.items():
        version = importlib.metadata.version(framework).split("+")[0]
        recorded = [{"case": case, "trajectory": trajectory(case)} for case in cases]
        path = FOLDER / f"{framework}.json"
        if not check:
            text = json.dumps({"version": version, "cases": recorded}, indent=1)
            path.write_text(text + "\n")
            print(f"wrote {path.name}: {len(cases)} cases of {framework} {version}")
            continue
        old = load(framework)
        same = [entry["case"] for entry in old] == cases and all(
            np.allclose(a["trajectory"], b["trajectory"], rtol=1e-12, atol=0)
            for a, b in zip(old, recorded, strict=True)
        )
        if not same:
            sys.exit(f"{path.name} is not what {framework} {version} does: record it again")
        print(f"{path.name} is what {framework} {version} does ({len(cases)} cases)")


if __name__ == "__main__":
    main()
