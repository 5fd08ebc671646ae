"""Formulas of momentum that theory, diagnostics and the study share, each written once.

A value may be a Python float, an exact fraction or a JAX array, traced or not. The result has the
same kind and the same precision. `one_minus_mu` and `effective_learning_rate` also take NumPy and
xarray arrays. Values are not checked here: functions for users check their arguments.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp


def one_minus_mu(mu: Any) -> Any:
    """1 - mu, computed before mu is rounded to the dtype of other arrays.

    Rounded to float32, a mu of 1 - 1e-9 is 1. A JAX array is widened to at least float32.

    Example:
      >>> one_minus_mu(0.75)
      0.25
    """
    return 1 - _widened(mu)


def effective_learning_rate(learning_rate: Any, one_minus_mu: Any) -> Any:
    """learning_rate / (1 - mu): how far a gradient moves the params in total.

    For JAX arrays it is 0 at a learning rate of 0, even if mu is 1, and infinite at any other
    learning rate if mu is 1.

    Example:
      >>> effective_learning_rate(0.125, one_minus_mu(0.75))
      0.5
    """
    if not _in_jax(learning_rate, one_minus_mu):
        return learning_rate / one_minus_mu
    return jnp.where(learning_rate == 0, 0, learning_rate / one_minus_mu)


def friction(learning_rate: Any, one_minus_mu: Any) -> Any:
    """(1 - mu) / sqrt(learning_rate), in 1 / time; 0 at a learning rate of 0.

    Example:
      >>> friction(0.25, one_minus_mu(0.5))
      1.0
    """
    return divide(one_minus_mu, _sqrt(learning_rate))


def kinetic_energy(learning_rate: Any, squared_norm: Any) -> Any:
    """|v|^2 / (2 learning_rate), in the unit of the loss; 0 at a learning rate of 0.

    Args:
      learning_rate: the learning rate of the step.
      squared_norm: |v|^2, summed over all params.

    Example:
      >>> kinetic_energy(0.5, 4.0)
      4.0
    """
    return divide(squared_norm, 2 * learning_rate)


def speed(learning_rate: Any, norm: Any) -> Any:
    """|v| / sqrt(learning_rate), in distance per time; 0 at a learning rate of 0.

    Example:
      >>> speed(0.25, 2.0)
      4.0
    """
    return divide(norm, _sqrt(learning_rate))


def stability_limit(mu: Any, *, nesterov: bool) -> Any:
    """The largest learning_rate * curvature that converges on a quadratic.

        2 (1 + mu),  with nesterov  2 (1 + mu) / (1 + 2 mu),  or 1 - 1 / mu for mu < -1/3

    Exact for a fraction. A JAX array is widened to at least float32.

    Example:
      >>> stability_limit(0.5, nesterov=True)
      1.5
    """
    mu = _widened(mu)
    if not nesterov:
        return 2 * (1 + mu)
    if not _in_jax(mu):
        return 2 * (1 + mu) / (1 + 2 * mu) if 3 * mu >= -1 else 1 - 1 / mu
    # In the branch that is not taken, mu is replaced by a value at which the formula is finite.
    low = mu < -1 / 3
    below, above = jnp.where(low, mu, -1), jnp.where(low, 0, mu)
    return jnp.where(low, 1 - 1 / below, 2 * (1 + above) / (1 + 2 * above))


def fraction_of_limit(learning_rate: Any, curvature: Any, limit: Any) -> Any:
    """learning_rate * curvature / limit: the fraction of the stability limit in use; at least 0.

    Args:
      learning_rate: the learning rate of the step.
      curvature: the largest curvature. If it is not above 0, there is no limit, and the fraction
        is 0.
      limit: what `stability_limit` returned.

    Example:
      >>> fraction_of_limit(0.5, 2.0, stability_limit(0.0, nesterov=False))
      0.5
    """
    fraction = learning_rate * curvature / limit
    return jnp.maximum(fraction, 0) if _in_jax(fraction) else max(fraction, 0.0)


def largest_stable_learning_rate(curvature: float, limit: float) -> float:
    """The learning rate at the limit: limit / curvature; infinite if curvature is not above 0.

    Example:
      >>> largest_stable_learning_rate(2.0, stability_limit(0.0, nesterov=False))
      1.0
    """
    return limit / curvature if curvature > 0 else math.inf


def divide(numerator: Any, denominator: Any) -> Any:
    """The ratio, or 0 where the denominator is 0; derivatives are finite there too.

    Example:
      >>> divide(1.0, 2.0), divide(1.0, 0.0)
      (0.5, 0.0)
    """
    if not _in_jax(numerator, denominator):
        return numerator / denominator if denominator else 0.0
    zero = denominator == 0
    return jnp.where(zero, 0, numerator / jnp.where(zero, 1, denominator))


def _in_jax(*values):
    return any(isinstance(value, jax.Array) for value in values)


def _widened(mu):
    return mu.astype(jnp.promote_types(mu.dtype, jnp.float32)) if _in_jax(mu) else mu


def _sqrt(x):
    return jnp.sqrt(x) if _in_jax(x) else math.sqrt(x)
