"""The best settings of a method for a known range of curvatures, and the rates they achieve."""

import math
from fractions import Fraction
from typing import NamedTuple

from momentum_jax._hyperparameters import Number
from momentum_jax.theory import _formulas
from momentum_jax.theory._checks import require_curvatures
from momentum_jax.theory._exact import below_1


class Tuning(NamedTuple):
    """The settings of a method and the rate that they achieve.

    Attributes:
      learning_rate: for `momentum_jax.momentum`, to use with this mu.
      mu: the momentum coefficient.
      rate: the long-run factor per step for the distance to the minimum.

    Example:
      >>> from momentum_jax.theory import Tuning
      >>> Tuning(learning_rate=0.1, mu=0.9, rate=0.95).rate
      0.95
    """

    learning_rate: float
    mu: float
    rate: float


class TripleMomentumTuning(NamedTuple):
    """The settings of the triple momentum method, for the recurrence of its paper.

        x <- x + mu * (x - previous x) - learning_rate * g(y),   y = x + gamma * (x - previous x)

    Attributes:
      learning_rate: alpha in the paper.
      mu: beta in the paper.
      gamma: how far ahead of x the gradient is evaluated.
      delta: how far ahead of x the result is read: x + delta * (x - previous x).
      rate: the long-run factor per step for the distance to the minimum.

    Example:
      >>> from momentum_jax.theory import TripleMomentumTuning
      >>> TripleMomentumTuning(0.1, 0.9, 0.5, 0.2, 0.95).gamma
      0.5
    """

    learning_rate: float
    mu: float
    gamma: float
    delta: float
    rate: float


def gradient_descent(smoothness: Number, strong_convexity: Number) -> Tuning:
    """The best learning rate without momentum: 2 / (L + m), rate (k - 1) / (k + 1), k = L / m.

    Args:
      smoothness: L, the largest curvature, above 0.
      strong_convexity: m, the smallest curvature, above 0.

    Returns:
      A `Tuning` with mu 0.

    Raises:
      ValueError: a value is out of range.

    Example:
      >>> from momentum_jax.theory import gradient_descent
      >>> gradient_descent(smoothness=3.0, strong_convexity=1.0)
      Tuning(learning_rate=0.5, mu=0.0, rate=0.5)

    Source:
      Polyak (1964), Some methods of speeding up the convergence of iteration methods.
    """
    big, small = require_curvatures(smoothness, strong_convexity)
    middle = big / 2 + small / 2
    return _tuning(big, 1 / middle, 0.0, (big / 2 - small / 2) / middle)


def heavy_ball(smoothness: Number, strong_convexity: Number) -> Tuning:
    """The best momentum on quadratics: the rate is (sqrt k - 1) / (sqrt k + 1), k = L / m.

        learning_rate = 4 / (sqrt L + sqrt m)^2
        mu = ((sqrt k - 1) / (sqrt k + 1))^2

    On functions that are not quadratic, these settings may cycle instead of converge.

    Args:
      smoothness: L, the largest curvature, above 0.
      strong_convexity: m, the smallest curvature, above 0.

    Returns:
      A `Tuning`, for `momentum_jax.momentum`.

    Raises:
      ValueError: a value is out of range.

    Example:
      >>> from momentum_jax.theory import heavy_ball
      >>> heavy_ball(smoothness=9.0, strong_convexity=1.0)
      Tuning(learning_rate=0.25, mu=0.25, rate=0.5)

    Source:
      Polyak (1964), Some methods of speeding up the convergence of iteration methods; Lessard,
      Recht and Packard (2016), Analysis and design of optimization algorithms via integral
      quadratic constraints, for the cycle.
    """
    big, small = require_curvatures(smoothness, strong_convexity)
    roots = math.sqrt(big) + math.sqrt(small)
    rate = (big - small) / roots / roots  # Computing sqrt L - sqrt m would lose digits.
    return _tuning(big, 4 / roots / roots, rate * rate, rate)


def nesterov(smoothness: Number, strong_convexity: Number, *, tuned: bool = False) -> Tuning:
    """Nesterov's momentum for strongly convex functions, or its best settings on quadratics.

        standard: learning_rate = 1 / L,         mu = (sqrt k - 1) / (sqrt k + 1),
                  rate 1 - 1 / sqrt k
        tuned:    learning_rate = 4 / (3 L + m), mu = (sqrt(3 k + 1) - 2) / (sqrt(3 k + 1) + 2),
                  rate 1 - 2 / sqrt(3 k + 1)

    with k = L / m.

    Args:
      smoothness: L, the largest curvature, above 0.
      strong_convexity: m, the smallest curvature, above 0.
      tuned: whether to return the best settings on quadratics; False by default.

    Returns:
      A `Tuning`, for `momentum_jax.momentum(..., nesterov=True)`. The rate is the rate on
      quadratics.

    Raises:
      ValueError: a value is out of range.

    Example:
      >>> from momentum_jax.theory import nesterov
      >>> nesterov(smoothness=4.0, strong_convexity=1.0)
      Tuning(learning_rate=0.25, mu=0.3333333333333333, rate=0.5)
      >>> nesterov(smoothness=5.0, strong_convexity=1.0, tuned=True)
      Tuning(learning_rate=0.25, mu=0.3333333333333333, rate=0.5)

    Source:
      Nesterov (2004), Introductory lectures on convex optimization, section 2.2; Lessard, Recht
      and Packard (2016), Analysis and design of optimization algorithms via integral quadratic
      constraints, proposition 1.
    """
    big, small = require_curvatures(smoothness, strong_convexity)
    if tuned:
        middle = 0.75 * big + 0.25 * small
        one = 1 + math.sqrt(small) / math.sqrt(middle)
        rate = 0.75 * (big - small) / middle / one
        return _tuning(big, 1 / middle, rate / one, rate, nesterov=True)
    one = 1 + math.sqrt(small) / math.sqrt(big)
    rate = (big - small) / big / one
    return _tuning(big, 1 / big, rate / one, rate, nesterov=True)


def triple_momentum(smoothness: Number, strong_convexity: Number) -> TripleMomentumTuning:
    """The fastest known method for smooth strongly convex functions: rate r = 1 - 1 / sqrt k.

        learning_rate = (1 + r) / L        mu = r^2 / (2 - r)
        gamma = r^2 / ((1 + r) (2 - r))    delta = r^2 / (1 - r^2)

    with k = L / m. `qhm_from_triple_momentum` returns the settings for quasi-hyperbolic momentum.

    Args:
      smoothness: L, the largest curvature, above 0.
      strong_convexity: m, the smallest curvature, above 0.

    Returns:
      A `TripleMomentumTuning`.

    Raises:
      ValueError: a value is out of range.

    Example:
      >>> from momentum_jax.theory import triple_momentum
      >>> tuning = triple_momentum(smoothness=4.0, strong_convexity=1.0)
      >>> tuning.learning_rate, tuning.rate
      (0.375, 0.5)

    Source:
      Van Scoy, Freeman and Lynch (2018), The fastest known globally convergent first-order
      method for minimizing strongly convex functions.
    """
    big, small = require_curvatures(smoothness, strong_convexity)
    root = math.sqrt(small) / math.sqrt(big)  # 1 - rate
    rate = fastest_rate(big, small)
    return TripleMomentumTuning(
        learning_rate=(1 + rate) / big,
        mu=below_1(rate**2 / (2 - rate)),
        gamma=rate**2 / ((1 + rate) * (2 - rate)),
        delta=rate**2 / (root * (1 + rate)),
        rate=rate,
    )


def fastest_rate(big: float, small: float) -> float:
    """Returns 1 - sqrt(m / L), in a form that keeps all digits.

    Example:
      >>> fastest_rate(4.0, 1.0)
      0.5
    """
    return below_1((big - small) / big / (1 + math.sqrt(small) / math.sqrt(big)))


def _tuning(big, learning_rate, mu, rate, nesterov=False):
    """Returns the settings, with mu and rate below 1 and a learning rate that converges."""
    mu, rate = below_1(mu), below_1(rate)
    limit = _formulas.stability_limit(Fraction(mu), nesterov=nesterov)
    # At condition numbers of 1e15 and more, a learning rate that is rounded up exceeds the limit.
    while Fraction(learning_rate) * Fraction(big) >= limit:
        learning_rate = math.nextafter(learning_rate, 0)
    return Tuning(learning_rate, mu, rate)
