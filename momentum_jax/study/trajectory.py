"""Trains one run and measures loss, sharpness, fraction of the stability limit and alignment."""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

import momentum_jax as mj
from momentum_jax import theory
from momentum_jax.diagnostics import Curvature, curvature, record
from momentum_jax.study._drawing import COLORS, loss_axis
from momentum_jax.study.problem import Problem
from momentum_jax.study.training import MEASURED_ROWS, keys, next_batch
from momentum_jax.theory._formulas import fraction_of_limit


class Point(NamedTuple):
    """The measurements at one step.

    Attributes:
      step: the number of steps so far.
      loss: the loss over the first 512 training rows, as a float.
      curvature: the `Curvature` of that loss.
      fraction: the fraction of the stability limit in use, learning_rate * largest / limit, where
        largest is the largest Hessian eigenvalue; at least 0.
      alignment: the cosine between the last update and the negative gradient of its step; NaN
        before the first step.

    Example:
      >>> Point._fields[:2]
      ('step', 'loss')
    """

    step: int
    loss: float
    curvature: Curvature
    fraction: float
    alignment: float


def trajectory(
    problem: Problem,
    learning_rate: float,
    mu: float,
    *,
    nesterov: bool = False,
    steps: int = 200,
    points: int = 20,
    batch_size: int = 32,
    seed: int = 0,
    init_scale: float = 1.0,
    lanczos_steps: int = 48,
) -> Iterator[Point]:
    """Trains one run, and measures it before the first step and then at equal intervals.

    Stops early if the loss is not finite.

    Args:
      problem: what is trained.
      learning_rate: the learning rate of `momentum`.
      mu: the momentum coefficient.
      nesterov: whether to use Nesterov momentum.
      steps: number of steps, rounded up to a multiple of `points`.
      points: number of measurements after the one before the first step.
      batch_size: examples per step, if the problem has data.
      seed: the seed of the initial weights and of the data order.
      init_scale: the factor that multiplies the initial weights.
      lanczos_steps: the argument `steps` of `curvature`.

    Yields:
      A `Point` for each measurement.

    Example:
      >>> from momentum_jax.study import problems
      >>> found = list(trajectory(problems.quadratic(), 0.1, 0.9, steps=20, points=2))
      >>> [point.step for point in found], round(found[-1].fraction, 3)
      ([0, 10, 20], 0.026)
    """
    tx = record(mj.momentum(learning_rate, mu, nesterov=nesterov), learning_rate, mu)
    first_key, order_key, _ = keys(seed, seed, 0)
    params, state = problem.start(first_key)
    params = problem.scale(params, init_scale)
    interval = -(-steps // points)
    rows = jax.tree.map(lambda x: jnp.asarray(x[:MEASURED_ROWS]), problem.data)
    data = jax.tree.map(jnp.asarray, problem.data)

    def loss_of(params: Any, state: Any, rows: Any) -> jax.Array:
        return problem.value_and_state(params, state, rows)[0]

    @jax.jit
    def stretch(carry, data, start):
        def step(carry, count):
            params, state, tx_state, order = carry
            batch, order = next_batch(data, batch_size, order, order_key, count)
            grads, state = jax.grad(problem.value_and_state, has_aux=True)(params, state, batch)
            updates, tx_state = tx.update(grads, tx_state, params)
            return (mj.apply_updates(params, updates), state, tx_state, order), None

        return jax.lax.scan(step, carry, start + jnp.arange(interval))[0]

    limit = float(theory.stability_limit(mu, nesterov=nesterov))
    value = jax.jit(loss_of)
    carry: Any = params, state, tx.init(params), jnp.arange(problem.examples)
    for number in range(points + 1):
        params, state, tx_state, _ = carry
        loss = float(value(params, state, rows))
        bent = curvature(loss_of, params, state, rows, steps=lanczos_steps)
        alignment = float(tx_state.measurement.alignment)
        fraction = fraction_of_limit(learning_rate, float(bent.largest), limit)
        yield Point(number * interval, loss, bent, fraction, alignment)
        if not math.isfinite(loss):
            return
        if number < points:
            carry = stretch(carry, data, number * interval)


def draw(found: list[Point], figure: Figure) -> None:
    """Draws loss, sharpness, fraction of the stability limit and alignment against the step.

    Args:
      found: the points that `trajectory` yielded.
      figure: an empty figure.

    Example:
      >>> from momentum_jax.study import problems
      >>> figure = Figure(layout="constrained")
      >>> draw(list(trajectory(problems.quadratic(), 0.1, 0.9, steps=4, points=2)), figure)
      >>> len(figure.axes)
      4
    """
    steps = np.array([point.step for point in found])
    values = {
        "loss": [point.loss for point in found],
        "sharpness": [float(point.curvature.largest) for point in found],
        "fraction of the stability limit": [point.fraction for point in found],
        "alignment": [point.alignment for point in found],
    }
    panels = figure.subplots(2, 2, sharex=True).ravel()
    for axes, (name, of_steps) in zip(panels, values.items(), strict=True):
        axes.plot(steps, of_steps, color=COLORS[2], marker=".")
        axes.set(ylabel=name)
        axes.spines[["top", "right"]].set_visible(False)
    loss_axis(panels[0], "y", np.array(values["loss"]))
    sharpest = max(found, key=lambda point: point.fraction)
    if sharpest.fraction > 0.1:  # Otherwise the limit is far above the plotted values.
        at_limit = float(sharpest.curvature.largest) / sharpest.fraction
        for axes, where in ((panels[1], at_limit), (panels[2], 1.0)):
            axes.axhline(where, color="0.4", linestyle=":", label="stability limit")
        panels[1].legend(frameon=False)
    for axes, name in ((panels[1], "sharpness"), (panels[2], "fraction of the stability limit")):
        known = [value for value in values[name] if math.isfinite(value)]
        if known and 0 < 20 * min(known) < max(known):
            axes.set(yscale="log")
        elif known and min(known) >= 0:
            axes.set_ylim(bottom=0)
    panels[2].xaxis.set_major_locator(MaxNLocator(integer=True))
    panels[3].axhline(0, color="0.8", zorder=0)
    panels[3].set_ylim(-1.05, 1.05)
    for axes in panels[2:]:
        axes.set(xlabel="step")
