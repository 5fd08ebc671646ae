"""Schedules of `mu`. Like Optax's schedules, they are functions of the step count, from 0.

Each accepts Python ints and traced arrays. Give a schedule in place of a number:
`momentum_jax.momentum(0.1, mu=schedules.sutskever())`.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import optax

from momentum_jax._hyperparameters import Function, Number, require, require_whole


def sutskever(mu_max: Number = 0.99, period: Number = 250) -> optax.Schedule:
    """Raises mu stepwise: mu = min(1 - 2^(-1 - log2(floor(count / period) + 1)), mu_max).

    The values are 1/2, 3/4, 5/6, 7/8, ... for `period` steps each, up to `mu_max`.

    Args:
      mu_max: the largest mu, in [0, 1]; 0.99 by default. The paper uses 0, 0.9, 0.99, 0.995 and
        0.999.
      period: the number of steps at each value, a whole number of at least 1; 250 by default.

    Returns:
      A function of the number of steps taken.

    Raises:
      ValueError: a value is out of range.

    Example:
      >>> from momentum_jax.schedules import sutskever
      >>> mu = sutskever(mu_max=0.9, period=100)
      >>> [round(float(mu(count)), 3) for count in (0, 99, 100, 250, 10_000)]
      [0.5, 0.5, 0.75, 0.833, 0.9]

    Source:
      Sutskever, Martens, Dahl and Hinton (2013), On the importance of initialization and
      momentum in deep learning, equation 5.
    """
    highest = require("mu_max", mu_max, lambda x: 0 <= x <= 1, "in [0, 1]")
    length = require_whole("period", period, 1)

    def mu(count):
        count = jnp.asarray(count)
        # A period above the largest count would not fit into the dtype of the count.
        periods = count // length if length <= _most(count) else jnp.zeros_like(count)
        # Convert to float before adding 1: the largest integer count would overflow.
        return jnp.minimum(1 - 0.5 / (_float(periods) + 1), highest)

    return Function(mu, "sutskever", highest, length)


def nesterov_convex() -> optax.Schedule:
    """Nesterov's schedule for convex functions: mu = count / (count + 3).

    Use it with `nesterov=True`. On an L-smooth convex function with a learning rate of 1 / L, the
    loss then approaches its minimum as 1 / count^2.

    Returns:
      A function of the number of steps taken.

    Example:
      >>> from momentum_jax.schedules import nesterov_convex
      >>> [float(nesterov_convex()(count)) for count in (0, 1, 3, 9)]
      [0.0, 0.25, 0.5, 0.75]

    Source:
      Nesterov (1983), A method of solving a convex programming problem with convergence rate
      O(1/k^2), in the form of O'Donoghue and Candes (2015), Adaptive restart for accelerated
      gradient schemes.
    """

    def mu(count):
        # Convert to float before adding 3: the largest integer counts would overflow.
        return jnp.minimum(_float(count) / (_float(count) + 3), 1)

    return Function(mu, "nesterov_convex")


def demon(total_steps: Number, mu_init: Number = 0.9) -> optax.Schedule:
    """Lowers mu to 0 so that the total contribution of a gradient to later updates falls linearly.

        left = 1 - count / total_steps
        mu = mu_init * left / (1 - mu_init + mu_init * left)

    This contribution is mu / (1 - mu) = left * mu_init / (1 - mu_init). After `total_steps` steps
    mu stays 0.

    Args:
      total_steps: the length of training in steps, a whole number of at least 1.
      mu_init: the first mu, in [0, 1); 0.9 by default.

    Returns:
      A function of the number of steps taken.

    Raises:
      ValueError: a value is out of range.

    Example:
      >>> from momentum_jax.schedules import demon
      >>> mu = demon(total_steps=100, mu_init=0.9)
      >>> [round(float(mu(count)), 3) for count in (0, 50, 90, 100, 200)]
      [0.9, 0.818, 0.474, 0.0, 0.0]

    Source:
      Chen, Wolfe, Li and Kyrillidis (2022), Demon: improved neural network training with
      momentum decay.
    """
    total = require_whole("total_steps", total_steps, 1)
    start = require("mu_init", mu_init, lambda x: 0 <= x < 1, "in [0, 1)")

    def mu(count):
        left = _part_left(jnp.asarray(count), total)
        return jnp.minimum(start * left / (1 - start + start * left), start)

    return Function(mu, "demon", total, start)


def _part_left(count, total):
    """Returns 1 - count / total, in [0, 1]; for integers, subtracts before rounding to float."""
    if not jnp.issubdtype(count.dtype, jnp.integer):
        return jnp.clip(1 - _float(count) / float(total), 0, 1)
    last = min(total, _most(count))  # A larger total would not fit into the dtype of the count.
    left = _float(last - jnp.clip(count, 0, last))
    left = left / min(float(total), float(jnp.finfo(left.dtype).max))
    # The compiler may turn a division by a constant into a product, which may exceed 1.
    return jnp.minimum(left + (total - last) / total, 1)


def _most(count):
    """Returns the largest possible count of this dtype."""
    return jnp.iinfo(count.dtype).max if jnp.issubdtype(count.dtype, jnp.integer) else math.inf


def _float(count: Any) -> jax.Array:
    """Returns the count in the widest available float; with 64-bit mode it keeps its digits."""
    return jnp.asarray(count, jnp.result_type(float))
