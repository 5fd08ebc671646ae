"""Momentum over time: schedules of `mu`, as Optax's schedules are, functions of the count from 0.

Each works on Python ints and on traced arrays, and is given in place of a number:
`momentum_jax.momentum(0.1, mu=schedules.sutskever())`.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from momentum_jax._hyperparameters import require


def sutskever(mu_max: float = 0.99, period: int = 250) -> optax.Schedule:
    """Momentum that rises by steps: mu = min(1 - 2^(-1 - log2(floor(count / period) + 1)), mu_max).

    That is 1/2, 3/4, 5/6, 7/8, ... for `period` steps each, up to `mu_max`.

    Args:
      mu_max: what mu does not exceed, in [0, 1]. The paper has 0, 0.9, 0.99, 0.995 and 0.999.
      period: for how many steps a value holds, at least 1.

    Returns:
      A function of the number of steps taken.

    Raises:
      ValueError: a value out of range.

    Example:
      >>> from momentum_jax.schedules import sutskever
      >>> mu = sutskever(mu_max=0.9, period=100)
      >>> [round(float(mu(count)), 3) for count in (0, 99, 100, 250, 10_000)]
      [0.5, 0.5, 0.75, 0.833, 0.9]

    Source:
      Sutskever, Martens, Dahl and Hinton (2013), On the importance of initialization and
      momentum in deep learning, equation 5.
    """
    require("mu_max", mu_max, 0 <= mu_max <= 1, "in [0, 1]")
    require("period", period, _is_whole(period) and period >= 1, "a whole number, at least 1")
    return lambda count: jnp.minimum(1 - 0.5 / (jnp.asarray(count) // period + 1), mu_max)


def nesterov() -> optax.Schedule:
    """Nesterov's momentum for convex functions: mu = count / (count + 3).

    Give it with `nesterov=True`; on an L-smooth convex function and with a learning rate of
    1 / L the loss then falls as 1 / count^2.

    Returns:
      A function of the number of steps taken.

    Example:
      >>> from momentum_jax.schedules import nesterov
      >>> [float(nesterov()(count)) for count in (0, 1, 3, 9)]
      [0.0, 0.25, 0.5, 0.75]

    Source:
      Nesterov (1983), A method of solving a convex programming problem with convergence rate
      O(1/k^2), in the form of O'Donoghue and Candes (2015), Adaptive restart for accelerated
      gradient schemes.
    """
    return lambda count: _float(count) / (jnp.asarray(count) + 3)


def demon(total_steps: int, mu_init: float = 0.9) -> optax.Schedule:
    """Momentum that decays to 0: what a gradient adds in all to later updates falls linearly.

        left = 1 - count / total_steps
        mu = mu_init * left / (1 - mu_init + mu_init * left)

    so that mu / (1 - mu) = left * mu_init / (1 - mu_init). From `total_steps` on mu is 0.

    Args:
      total_steps: the length of training, at least 1.
      mu_init: where mu starts, in [0, 1).

    Returns:
      A function of the number of steps taken.

    Raises:
      ValueError: a value out of range.

    Example:
      >>> from momentum_jax.schedules import demon
      >>> mu = demon(total_steps=100, mu_init=0.9)
      >>> [round(float(mu(count)), 3) for count in (0, 50, 90, 100, 200)]
      [0.9, 0.818, 0.474, 0.0, 0.0]

    Source:
      Chen, Wolfe, Li and Kyrillidis (2022), Demon: improved neural network training with
      momentum decay.
    """
    whole = _is_whole(total_steps) and total_steps >= 1
    require("total_steps", total_steps, whole, "a whole number, at least 1")
    require("mu_init", mu_init, 0 <= mu_init < 1, "in [0, 1)")

    def mu(count):
        left = jnp.maximum(1 - _float(count) / total_steps, 0)
        return mu_init * left / (1 - mu_init + mu_init * left)

    return mu


def _float(count: Any) -> jax.Array:
    """The count in the widest float that there is: 64-bit mode keeps its digits."""
    return jnp.asarray(count, jnp.result_type(float))


def _is_whole(value):
    return isinstance(value, int) and not isinstance(value, bool)
