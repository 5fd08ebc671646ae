"""Momentum as a ball with friction: effective learning rate, friction, and scatter in noise."""

from fractions import Fraction
from typing import NamedTuple

from momentum_jax._hyperparameters import Number
from momentum_jax.theory import _formulas
from momentum_jax.theory._checks import (
    require_above_0,
    require_at_least_0,
    require_mu,
    require_mu_below_1,
)
from momentum_jax.theory._exact import to_float


class StationaryVariance(NamedTuple):
    """The variances at which gradient noise and friction balance.

    Attributes:
      params: the variance of w.
      velocity: the variance of v.

    Example:
      >>> from momentum_jax.theory import StationaryVariance
      >>> StationaryVariance(params=0.1, velocity=0.02).params
      0.1
    """

    params: float
    velocity: float


def effective_learning_rate(learning_rate: Number, mu: Number) -> float:
    """How far a gradient moves the params in total: learning_rate / (1 - mu).

    Args:
      learning_rate: at least 0.
      mu: the momentum coefficient, in (-1, 1).

    Returns:
      The learning rate at which plain gradient descent moves as far under a constant gradient.

    Raises:
      ValueError: a value is out of range.

    Example:
      >>> from momentum_jax.theory import effective_learning_rate
      >>> effective_learning_rate(0.125, 0.75)
      0.5

    Source:
      The sum of the geometric series of mu.
    """
    rate = require_at_least_0("learning_rate", learning_rate)
    rest = _formulas.one_minus_mu(require_mu_below_1(mu, "at 1 the sum has no limit"))
    return _formulas.effective_learning_rate(rate, rest)


def friction(learning_rate: Number, mu: Number) -> float:
    """The friction of the ball: (1 - mu) / sqrt(learning_rate).

    Momentum discretizes q'' + friction q' + grad f = 0, with unit mass and time steps of
    sqrt(learning_rate). So the friction has the unit 1 / time.

    Args:
      learning_rate: above 0.
      mu: the momentum coefficient, in (-1, 1].

    Returns:
      The friction; 0 at mu 1.

    Raises:
      ValueError: a value is out of range.

    Example:
      >>> from momentum_jax.theory import friction
      >>> friction(learning_rate=0.25, mu=0.5)
      1.0

    Source:
      Qian (1999), On the momentum term in gradient descent learning algorithms.
    """
    rate = require_above_0("learning_rate", learning_rate)
    return _formulas.friction(rate, _formulas.one_minus_mu(require_mu(mu)))


def stationary_variance(
    learning_rate: Number, mu: Number, curvature: Number, noise_variance: Number
) -> StationaryVariance:
    """The variances of a param and its velocity on a quadratic with gradient noise.

        Var w = learning_rate s^2 (1 + mu) / (c (1 - mu) (2 (1 + mu) - learning_rate c))
        Var v = 2 learning_rate^2 s^2 / ((1 - mu) (2 (1 + mu) - learning_rate c))

    Args:
      learning_rate: above 0; learning_rate * curvature must be below `stability_limit(mu)`.
      mu: the momentum coefficient, in (-1, 1).
      curvature: c, above 0.
      noise_variance: s^2, the variance of the noise in each gradient, at least 0. The noise is
        independent from step to step.

    Returns:
      The `StationaryVariance` of one param.

    Raises:
      ValueError: a value is out of range.

    Example:
      >>> from momentum_jax.theory import stationary_variance
      >>> stationary_variance(1.0, 0.0, 1.0, noise_variance=1.0)
      StationaryVariance(params=1.0, velocity=2.0)

    Source:
      The fixed point of the second moments of (w, v); Mandt, Hoffman and Blei (2017), Stochastic
      gradient descent as approximate Bayesian inference, in the limit of small learning rates.
    """
    rate = Fraction(require_above_0("learning_rate", learning_rate))
    mu_ = Fraction(require_mu_below_1(mu, "without friction there is no stationary state"))
    c = Fraction(require_above_0("curvature", curvature))
    noise = Fraction(require_at_least_0("noise_variance", noise_variance))
    limit = _formulas.stability_limit(mu_, nesterov=False)
    room = limit - rate * c
    if room <= 0:
        raise ValueError(
            f"learning_rate * curvature={to_float(rate * c)} must be below {float(limit)}, "
            f"the stability limit at mu={float(mu_)}. Lower learning_rate."
        )
    scale = rate * noise / (_formulas.one_minus_mu(mu_) * room)
    return StationaryVariance(to_float(scale * (1 + mu_) / c), to_float(2 * rate * scale))
