"""Trains many runs at once: vmapped over runs, scanned over steps, sharded over devices."""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import xarray as xr
from jax.sharding import NamedSharding, PartitionSpec
from tqdm import tqdm

import momentum_jax as mj
from momentum_jax.study.problems import Problem

PyTree = Any


@dataclasses.dataclass(frozen=True)
class Arm:
    """One way to train: a transform and its settings.

    Arms with the same `make_transform` share one compiled program, whatever their settings.

    Attributes:
      name: what tables and pictures call it.
      make_transform: `make_transform(**settings)` returns an Optax transformation.
      settings: numbers, traced when the transform is made.

    Example:
      >>> import momentum_jax as mj
      >>> Arm("heavy", mj.momentum, {"learning_rate": 0.01, "mu": 0.9}).settings["mu"]
      0.9
    """

    name: str
    make_transform: Callable[..., optax.GradientTransformation]
    settings: Mapping[str, float]


NESTEROV = functools.partial(mj.momentum, nesterov=True)


def contrasts(learning_rate: float) -> dict[str, list[Arm]]:
    """Momentum against plain gradient descent, in two ways; the plain arm comes first.

    "same learning rate" gives every arm the same one: what happens on switching momentum on.
    "same effective learning rate" gives every arm the same learning_rate / (1 - mu), which is
    how far a gradient moves the params in the end: what is left when momentum's longer
    strides are taken away.

    Args:
      learning_rate: that of the plain arm.

    Returns:
      The arms of each contrast, by its name: mu 0, 0.9, 0.99, and 0.9 with Nesterov.
    """

    def arms(rate):
        return [
            Arm(f"{name} at {rate(mu):g}", transform, {"learning_rate": rate(mu), "mu": mu})
            for name, transform, mu in (
                ("mu 0", mj.momentum, 0.0),
                ("mu 0.9", mj.momentum, 0.9),
                ("mu 0.99", mj.momentum, 0.99),
                ("Nesterov 0.9", NESTEROV, 0.9),
            )
        ]

    return {
        "same learning rate": arms(lambda mu: learning_rate),
        "same effective learning rate": arms(lambda mu: learning_rate * (1 - mu)),
    }


def run(
    problem: Problem,
    arms: Sequence[Arm],
    *,
    seeds: Sequence[int],
    init_scales: Sequence[float],
    steps: int,
    batch_size: int,
    evaluations: int = 20,
    progress: bool = False,
) -> xr.Dataset:
    """Trains every arm from the same initial weights on the same batches.

    A seed fixes the initial weights (before they are multiplied by the initial scale) and the
    order of the data: runs that differ in the arm alone are pairs.

    Args:
      problem: what to train.
      arms: how to train it; names must be unique.
      seeds: one run each.
      init_scales: what the initial weights are multiplied by; one run each.
      steps: how many steps a run takes; rounded up to a multiple of `evaluations`.
      batch_size: how many examples a step sees, without repetition within an epoch.
      evaluations: at how many equally spaced steps loss and metric are measured on the test
        examples, the last step among them.
      progress: whether to show a progress bar.

    Returns:
      A dataset with the variables `loss` and `metric`, of dimensions (arm, init_scale, seed,
      step), not finite where a run diverged, and the attribute `programs`: how many programs
      were compiled.

    Raises:
      ValueError: no arm, two arms of one name, or a batch larger than the training data.

    Example:
      >>> import momentum_jax as mj
      >>> from momentum_jax.study.problems import digits
      >>> arms = [Arm(f"mu {mu}", mj.momentum, dict(learning_rate=0.02, mu=mu)) for mu in (0, 0.9)]
      >>> results = run(digits(), arms, seeds=[0, 1], init_scales=[1.0], steps=40, batch_size=32)
      >>> print(results.loss.isel(step=-1).mean(["init_scale", "seed"]).diff("arm").item() < 0)
      True
    """
    names = [arm.name for arm in arms]
    if not names or len(set(names)) < len(names):
        raise ValueError(f"the arms need unique names, at least one, but are {names}.")
    examples = len(jax.tree.leaves(problem.train)[0])
    if not 1 <= batch_size <= examples:
        raise ValueError(
            f"batch_size={batch_size} must be between 1 and the {examples} training examples."
        )
    shape = (len(arms), len(init_scales), len(seeds))
    values = np.empty((2, *shape, evaluations), np.float32)
    interval = -(-steps // evaluations)
    mesh = jax.make_mesh((jax.local_device_count(),), ("runs",), devices=jax.local_devices())

    families: dict[Any, list[int]] = {}
    for index, arm in enumerate(arms):
        families.setdefault((arm.make_transform, frozenset(arm.settings)), []).append(index)

    with tqdm(total=math.prod(shape), unit="run", disable=not progress) as bar:
        for (make_transform, settings), members in families.items():
            train = _compile(problem, make_transform, batch_size, evaluations, interval, mesh)
            runs = list(itertools.product(members, range(len(init_scales)), range(len(seeds))))
            at_once = _runs_at_once(problem, len(runs), mesh.size)
            for start in range(0, len(runs), at_once):
                chunk = runs[start : start + at_once]
                # The last chunk is filled up, so that all have the shape that was compiled.
                padded = chunk + [chunk[-1]] * (at_once - len(chunk))
                ended = train(
                    np.array([seeds[seed] for _, _, seed in padded]),
                    np.array([init_scales[scale] for _, scale, _ in padded], np.float32),
                    {
                        name: np.array(
                            [arms[arm].settings[name] for arm, _, _ in padded], np.float32
                        )
                        for name in settings
                    },
                )
                at = (slice(None), *np.array(chunk).T)
                values[at] = np.stack(ended)[:, : len(chunk)]
                bar.update(len(chunk))
                bar.set_postfix(loss=f"{_typical(values[at][0, :, -1]):.3f}")

    dimensions = ("arm", "init_scale", "seed", "step")
    return xr.Dataset(
        {"loss": (dimensions, values[0]), "metric": (dimensions, values[1])},
        coords={
            "arm": names,
            "init_scale": list(init_scales),
            "seed": list(seeds),
            "step": interval * np.arange(1, evaluations + 1),
        },
        attrs={
            "problem": problem.name,
            "chance": problem.chance,
            "passing": problem.passing,
            "batch_size": batch_size,
            "programs": len(families),
        },
    )


def _compile(problem, make_transform, batch_size, evaluations, interval, mesh):
    """The function that trains one run for each (seed, init_scale, settings), on all devices."""
    examples = len(jax.tree.leaves(problem.train)[0])
    epoch = examples // batch_size
    epochs = -(-evaluations * interval // epoch)

    def train(seed, init_scale, settings):
        weights_key, order_key = jax.random.split(jax.random.key(seed))
        params = jax.tree.map(lambda w: init_scale * w, problem.init(weights_key))
        tx = make_transform(**settings)

        def shuffle(key):
            return jax.random.permutation(key, examples)[: epoch * batch_size]

        order = jax.vmap(shuffle)(jax.random.split(order_key, epochs)).reshape(-1, batch_size)
        order = order[: evaluations * interval].reshape(evaluations, interval, batch_size)

        def step(carry, chosen):
            params, state = carry
            batch = jax.tree.map(lambda x: jnp.asarray(x)[chosen], problem.train)
            grads = jax.grad(problem.loss)(params, batch)
            updates, state = tx.update(grads, state, params)
            return (mj.apply_updates(params, updates), state), None

        def stretch(carry, order):
            carry, _ = jax.lax.scan(step, carry, order)
            params, _ = carry
            return carry, (problem.loss(params, problem.test), problem.metric(params, problem.test))

        return jax.lax.scan(stretch, (params, tx.init(params)), order)[1]

    one_run_a_row = NamedSharding(mesh, PartitionSpec("runs"))
    return jax.jit(jax.vmap(train), in_shardings=one_run_a_row, out_shardings=one_run_a_row)


def _runs_at_once(problem, runs, devices):
    """As many as the memory surely holds, and few enough for the progress bar to move."""
    params = jax.eval_shape(problem.init, jax.random.key(0))
    held = 16 * sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(params))
    wanted = min(runs, 100 * devices, 2**30 * devices // held)
    return devices * max(1, wanted // devices)


def _typical(losses):
    return np.median(np.nan_to_num(losses, nan=np.inf))
