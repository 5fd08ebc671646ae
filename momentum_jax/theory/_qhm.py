"""Settings at which quasi-hyperbolic momentum (QHM) equals other methods."""

import math
import sys
from fractions import Fraction
from typing import NamedTuple

from momentum_jax._hyperparameters import Number, require
from momentum_jax.theory._checks import require_above_0, require_curvatures, require_finite
from momentum_jax.theory._exact import below_1, square_root, to_float
from momentum_jax.theory._formulas import effective_learning_rate, one_minus_mu
from momentum_jax.theory._tuning import fastest_rate, triple_momentum


class QHMSettings(NamedTuple):
    """The arguments of `momentum_jax.qhm`.

    Attributes:
      learning_rate: alpha in the paper.
      mu: beta in the paper.
      nu: the weight of the velocity in the update; the gradient has the weight 1 - nu.

    Example:
      >>> from momentum_jax.theory import QHMSettings
      >>> QHMSettings(learning_rate=1.0, mu=0.999, nu=0.7).nu
      0.7
    """

    learning_rate: float
    mu: float
    nu: float


def qhm_from_pid(kp: Number, ki: Number, kd: Number) -> QHMSettings:
    """Converts a PID controller of the gradient to quasi-hyperbolic momentum.

        e = -g;  d <- mu * d + (1 - mu) * (e - previous e);  s <- s + e
        w = start + kp * e + ki * s + kd * d

    The derivative is smoothed. Its mu is chosen so that the gradient of two steps ago cancels:
    mu = kd / (kd - kp), learning_rate = ki, nu = kp^2 / (ki kd).

    Args:
      kp: the proportional gain, below 0.
      ki: the integral gain, above 0.
      kd: the derivative gain, above 0.

    Returns:
      The `QHMSettings`.

    Raises:
      ValueError: a value is out of range.

    Example:
      >>> from momentum_jax.theory import qhm_from_pid
      >>> qhm_from_pid(kp=-1.0, ki=1.0, kd=3.0)
      QHMSettings(learning_rate=1.0, mu=0.75, nu=0.3333333333333333)

    Source:
      Ma and Yarats (2019), Quasi-hyperbolic momentum and Adam for deep learning, section 4.
    """
    rule = "below 0: only then is the derivative smoothed"
    p = Fraction(require("kp", kp, lambda x: x < 0, rule))
    i = Fraction(require_above_0("ki", ki))
    d = Fraction(require_above_0("kd", kd))
    return QHMSettings(float(i), below_1(float(d / (d - p))), to_float(p**2 / (i * d)))


def qhm_from_accsgd(delta: Number, kappa: Number, xi: Number, epsilon: Number = 0.7) -> QHMSettings:
    """Converts Accelerated SGD (AccSGD) to quasi-hyperbolic momentum.

        a = 1 - epsilon^2 xi / kappa
        u <- a * u + (1 - a) * (w - kappa * delta / epsilon * g)
        w <- (epsilon * (w - delta * g) + (1 - a) * u) / (epsilon + 1 - a)

    Args:
      delta: the short step, above 0.
      kappa: the long step, as a multiple of the short step, at least 1.
      xi: the statistical advantage, in (0, sqrt(kappa)].
      epsilon: the constant of the paper, in (0, 1); 0.7 by default.

    Returns:
      The `QHMSettings`.

    Raises:
      ValueError: a value is out of range.

    Example:
      >>> from momentum_jax.theory import qhm_from_accsgd
      >>> settings = qhm_from_accsgd(delta=0.1, kappa=1000.0, xi=10.0)
      >>> round(settings.mu, 4), round(settings.nu, 4)
      (0.9882, 0.7792)

    Source:
      Kidambi, Netrapalli, Jain and Kakade (2018), On the insufficiency of existing momentum
      schemes for stochastic optimization; Ma and Yarats (2019), Quasi-hyperbolic momentum and Adam
      for deep learning.
    """
    short = Fraction(require_above_0("delta", delta))
    k = Fraction(require("kappa", kappa, lambda x: x >= 1, "at least 1"))
    most = math.sqrt(k)
    x = Fraction(require("xi", xi, lambda x: 0 < x <= most, "in (0, sqrt(kappa)]"))
    e = Fraction(require("epsilon", epsilon, lambda x: 0 < x < 1, "in (0, 1)"))
    return QHMSettings(
        learning_rate=to_float(short * e * (1 + x) / (1 + e)),
        mu=below_1(float((k - e**2 * x) / (k + e * x))),
        nu=to_float((e * x - 1) / (e * (1 + x))),
    )


def qhm_from_synthesized_nesterov(gamma: Number, beta1: Number, beta2: Number) -> QHMSettings:
    """Converts a synthesized Nesterov variant to quasi-hyperbolic momentum.

        x <- x + beta1 * (x - previous x) - gamma * g(y),   y = x + beta2 * (x - previous x)

    Heavy ball has beta2 = 0. Nesterov's momentum has beta2 = beta1. The params of QHM are y:
    learning_rate = gamma / (1 - beta1), mu = beta1, nu = 1 - beta2 (1 - beta1) / beta1.

    Args:
      gamma: the learning rate of the variant, above 0.
      beta1: the momentum coefficient of the variant, in (-1, 1) and not 0.
      beta2: how far ahead of x the gradient is evaluated.

    Returns:
      The `QHMSettings`.

    Raises:
      ValueError: a value is out of range.

    Example:
      >>> from momentum_jax.theory import qhm_from_synthesized_nesterov
      >>> qhm_from_synthesized_nesterov(gamma=0.25, beta1=0.75, beta2=0.75)
      QHMSettings(learning_rate=1.0, mu=0.75, nu=0.75)

    Source:
      Lessard, Recht and Packard (2016), Analysis and design of optimization algorithms via integral
      quadratic constraints; Ma and Yarats (2019), Quasi-hyperbolic momentum and Adam for deep
      learning.
    """
    rate = Fraction(require_above_0("gamma", gamma))
    rule = "in (-1, 1) and not 0"
    mu = Fraction(require("beta1", beta1, lambda x: -1 < x < 1 and x != 0, rule))
    ahead = Fraction(require_finite("beta2", beta2))
    rest = one_minus_mu(mu)
    return QHMSettings(
        learning_rate=to_float(effective_learning_rate(rate, rest)),
        mu=float(mu),
        nu=to_float(1 - ahead * rest / mu),
    )


def qhm_from_robust_momentum(
    smoothness: Number, strong_convexity: Number, rate: Number
) -> QHMSettings:
    """Converts the robust momentum method to quasi-hyperbolic momentum.

    With r the rate and k = L / m, it is the synthesized Nesterov variant with

        gamma = k (1 - r)^2 (1 + r) / L      beta1 = k r^3 / (k - 1)
        beta2 = r^3 / ((k - 1) (1 - r)^2 (1 + r))

    Args:
      smoothness: L, the largest curvature.
      strong_convexity: m, the smallest curvature, above 0 and below L.
      rate: from 1 - 1 / sqrt k to 1 - 1 / k. The first is the fastest (triple momentum). The last
        is the most robust to noise in the gradients (gradient descent).

    Returns:
      The `QHMSettings`.

    Raises:
      ValueError: a value is out of range.

    Example:
      >>> from momentum_jax.theory import qhm_from_robust_momentum
      >>> settings = qhm_from_robust_momentum(smoothness=4.0, strong_convexity=1.0, rate=0.6)
      >>> round(settings.mu, 3), round(settings.nu, 2)
      (0.288, 0.3)

    Source:
      Cyrus, Hu, Van Scoy and Lessard (2018), A robust accelerated optimization algorithm for
      strongly convex functions; Ma and Yarats (2019), Quasi-hyperbolic momentum and Adam for deep
      learning.
    """
    big, small = require_curvatures(smoothness, strong_convexity)
    _check_condition_number(big, small)
    fastest, slowest = fastest_rate(big, small), (big - small) / big
    rule = f"in [{fastest}, {slowest}] for these curvatures"
    # A caller who computes an end of the range in another order gets other last digits.
    given = require("rate", rate, lambda x: fastest - _SLACK <= x <= slowest + _SLACK, rule)
    k = Fraction(big) / Fraction(small)
    r = min(max(Fraction(given), 1 - square_root(1 / k)), 1 - 1 / k)
    scale = (1 - r) ** 2 * (1 + r)
    return qhm_from_synthesized_nesterov(
        gamma=to_float(k * scale / Fraction(big)),
        beta1=below_1(to_float(k * r**3 / (k - 1))),
        beta2=to_float(r**3 / ((k - 1) * scale)),
    )


def qhm_from_triple_momentum(smoothness: Number, strong_convexity: Number) -> QHMSettings:
    """Converts the triple momentum method to quasi-hyperbolic momentum.

    The params of QHM are the y of `TripleMomentumTuning`, at which the gradient is evaluated.

    Args:
      smoothness: L, the largest curvature.
      strong_convexity: m, the smallest curvature, above 0 and below L.

    Returns:
      The `QHMSettings`.

    Raises:
      ValueError: a value is out of range.

    Example:
      >>> from momentum_jax.theory import qhm_from_triple_momentum
      >>> settings = qhm_from_triple_momentum(smoothness=4.0, strong_convexity=1.0)
      >>> round(settings.learning_rate, 3), round(settings.mu, 3), round(settings.nu, 3)
      (0.45, 0.167, 0.444)

    Source:
      Van Scoy, Freeman and Lynch (2018), The fastest known globally convergent first-order method
      for minimizing strongly convex functions; Ma and Yarats (2019), Quasi-hyperbolic momentum and
      Adam for deep learning.
    """
    _check_condition_number(*require_curvatures(smoothness, strong_convexity))
    tuning = triple_momentum(smoothness, strong_convexity)
    return qhm_from_synthesized_nesterov(tuning.learning_rate, tuning.mu, tuning.gamma)


_SLACK = 4 * sys.float_info.epsilon


def _check_condition_number(big, small):
    if big == small:
        raise ValueError(
            f"smoothness / strong_convexity=1.0 must be above 1. Both are {big}: for equal "
            "curvatures use gradient_descent."
        )
