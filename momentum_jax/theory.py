"""What momentum does to quadratics, noise and energy, in closed form: on the host, without JAX.

Throughout: v <- mu * v - learning_rate * g, w <- w + v; a function whose curvatures lie between
strong_convexity and smoothness (m and L in the literature, L / m the condition number); rates
are those of the distance to the minimum, per step. Numbers may be of any type that holds a known
real number, such as a NumPy scalar; results are Python floats, right to a few units in the last
place. What is below 1 is never rounded to 1: neither a rate nor a `mu` of a `Tuning`, nor the
radius of an iteration that converges.
"""

import math
import sys
from fractions import Fraction
from typing import NamedTuple

from momentum_jax._hyperparameters import Number, require


class Tuning(NamedTuple):
    """Settings of a method and what they achieve.

    Attributes:
      learning_rate: to give to `momentum_jax.momentum`, at the mu beside it.
      mu: the momentum coefficient.
      rate: what the distance to the minimum is multiplied by a step, in the long run.

    Example:
      >>> from momentum_jax.theory import Tuning
      >>> Tuning(learning_rate=0.1, mu=0.9, rate=0.95).rate
      0.95
    """

    learning_rate: float
    mu: float
    rate: float


class TripleMomentumTuning(NamedTuple):
    """Settings of the triple momentum method, in the words of its paper's recurrence.

        x <- x + mu * (x - last x) - learning_rate * g(y),   y = x + gamma * (x - last x)

    Attributes:
      learning_rate: alpha in the paper.
      mu: beta in the paper.
      gamma: how far ahead the gradient is taken.
      delta: how far ahead the result is read: x + delta * (x - last x).
      rate: what the distance to the minimum is multiplied by a step, in the long run.

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


class StationaryVariance(NamedTuple):
    """Where noise and friction balance.

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


class QHMSettings(NamedTuple):
    """What to give to `momentum_jax.qhm`.

    Attributes:
      learning_rate: alpha in the paper.
      mu: beta in the paper.
      nu: how much of the update is the velocity's.

    Example:
      >>> from momentum_jax.theory import QHMSettings
      >>> QHMSettings(learning_rate=1.0, mu=0.999, nu=0.7).nu
      0.7
    """

    learning_rate: float
    mu: float
    nu: float


def gradient_descent(smoothness: Number, strong_convexity: Number) -> Tuning:
    """The best learning rate without momentum: 2 / (L + m), rate (k - 1) / (k + 1), k = L / m.

    Args:
      smoothness: L, the largest curvature, above 0.
      strong_convexity: m, the least curvature, above 0.

    Returns:
      A `Tuning` with mu 0.

    Raises:
      ValueError: a value out of range.

    Example:
      >>> from momentum_jax.theory import gradient_descent
      >>> gradient_descent(smoothness=3.0, strong_convexity=1.0)
      Tuning(learning_rate=0.5, mu=0.0, rate=0.5)

    Source:
      Polyak (1964), Some methods of speeding up the convergence of iteration methods.
    """
    big, small = _curvatures(smoothness, strong_convexity)
    middle = big / 2 + small / 2
    return _tuning(big, 1 / middle, 0.0, (big / 2 - small / 2) / middle)


def heavy_ball(smoothness: Number, strong_convexity: Number) -> Tuning:
    """The best momentum on quadratics: the rate is (sqrt k - 1) / (sqrt k + 1), k = L / m.

        learning_rate = 4 / (sqrt L + sqrt m)^2
        mu = ((sqrt k - 1) / (sqrt k + 1))^2

    On functions that are not quadratic these settings may cycle instead of converge.

    Args:
      smoothness: L, the largest curvature, above 0.
      strong_convexity: m, the least curvature, above 0.

    Returns:
      A `Tuning`, for `momentum_jax.momentum`.

    Raises:
      ValueError: a value out of range.

    Example:
      >>> from momentum_jax.theory import heavy_ball
      >>> heavy_ball(smoothness=9.0, strong_convexity=1.0)
      Tuning(learning_rate=0.25, mu=0.25, rate=0.5)

    Source:
      Polyak (1964), Some methods of speeding up the convergence of iteration methods; Lessard,
      Recht and Packard (2016), Analysis and design of optimization algorithms via integral
      quadratic constraints, for the cycle.
    """
    big, small = _curvatures(smoothness, strong_convexity)
    roots = math.sqrt(big) + math.sqrt(small)
    rate = (big - small) / roots / roots  # sqrt L - sqrt m, taken as such, loses its digits.
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
      strong_convexity: m, the least curvature, above 0.
      tuned: whether to take the best settings on quadratics.

    Returns:
      A `Tuning`, for `momentum_jax.momentum(..., nesterov=True)`; the rate is that on quadratics.

    Raises:
      ValueError: a value out of range.

    Example:
      >>> from momentum_jax.theory import nesterov
      >>> nesterov(smoothness=4.0, strong_convexity=1.0)
      Tuning(learning_rate=0.25, mu=0.3333333333333333, rate=0.5)
      >>> nesterov(smoothness=5.0, strong_convexity=1.0, tuned=True)
      Tuning(learning_rate=0.25, mu=0.3333333333333333, rate=0.5)

    Source:
      Nesterov (2004), Introductory lectures on convex optimization, section 2.2; Lessard, Recht
      and Packard (2016), as above, proposition 1.
    """
    big, small = _curvatures(smoothness, strong_convexity)
    if tuned:
        middle = 0.75 * big + 0.25 * small
        one = 1 + math.sqrt(small) / math.sqrt(middle)
        rate = 0.75 * (big - small) / middle / one
        return _tuning(big, 1 / middle, rate / one, rate, nesterov=True)
    one = 1 + math.sqrt(small) / math.sqrt(big)
    rate = (big - small) / big / one
    return _tuning(big, 1 / big, rate / one, rate, nesterov=True)


def triple_momentum(smoothness: Number, strong_convexity: Number) -> TripleMomentumTuning:
    """The fastest method known for smooth strongly convex functions: rate r = 1 - 1 / sqrt k.

        learning_rate = (1 + r) / L        mu = r^2 / (2 - r)
        gamma = r^2 / ((1 + r) (2 - r))    delta = r^2 / (1 - r^2)

    with k = L / m. `qhm_from_triple_momentum` gives it as quasi-hyperbolic momentum.

    Args:
      smoothness: L, the largest curvature, above 0.
      strong_convexity: m, the least curvature, above 0.

    Returns:
      A `TripleMomentumTuning`.

    Raises:
      ValueError: a value out of range.

    Example:
      >>> from momentum_jax.theory import triple_momentum
      >>> tuning = triple_momentum(smoothness=4.0, strong_convexity=1.0)
      >>> tuning.learning_rate, tuning.rate
      (0.375, 0.5)

    Source:
      Van Scoy, Freeman and Lynch (2018), The fastest known globally convergent first-order
      method for minimizing strongly convex functions.
    """
    big, small = _curvatures(smoothness, strong_convexity)
    root = math.sqrt(small) / math.sqrt(big)  # 1 - rate
    rate = _fastest(big, small)
    return TripleMomentumTuning(
        learning_rate=(1 + rate) / big,
        mu=_below_1(rate**2 / (2 - rate)),
        gamma=rate**2 / ((1 + rate) * (2 - rate)),
        delta=rate**2 / (root * (1 + rate)),
        rate=rate,
    )


def stability_limit(mu: Number, *, nesterov: bool = False) -> float:
    """The largest learning_rate * curvature that converges on a quadratic.

        2 (1 + mu),  with nesterov  2 (1 + mu) / (1 + 2 mu),  or 1 - 1 / mu for mu < -1/3

    Below it the iteration converges, above it it diverges; with mu 1 it only stays bounded.

    Args:
      mu: the momentum coefficient, in (-1, 1].
      nesterov: whether the update looks one step ahead.

    Returns:
      The limit, without unit.

    Raises:
      ValueError: mu out of range.

    Example:
      >>> from momentum_jax.theory import stability_limit
      >>> stability_limit(0.5), stability_limit(0.5, nesterov=True)
      (3.0, 1.5)

    Source:
      The roots of z^2 - (1 + mu - a) z + mu and z^2 - (1 + mu) (1 - a) z + mu (1 - a), with
      a = learning_rate * curvature, lie in the unit circle (Jury's criterion).
    """
    return float(_limit(_check_mu(mu), nesterov))


def spectral_radius(
    learning_rate: Number, mu: Number, curvature: Number, *, nesterov: bool = False
) -> float:
    """What the distance to the minimum of a quadratic is multiplied by a step, in the long run.

    The largest root, in absolute value, with a = learning_rate * curvature, of

        z^2 - (1 + mu - a) z + mu,  with nesterov  z^2 - (1 + mu) (1 - a) z + mu (1 - a)

    Args:
      learning_rate: at least 0.
      mu: the momentum coefficient, in (-1, 1].
      curvature: of the quadratic in the direction that is meant; may be negative, at a saddle.
      nesterov: whether the update looks one step ahead.

    Returns:
      The radius: below 1 it converges.

    Raises:
      ValueError: a value out of range.

    Example:
      >>> from momentum_jax.theory import spectral_radius
      >>> spectral_radius(learning_rate=0.25, mu=0.25, curvature=1.0)
      0.5

    Source:
      Polyak (1964), as above; Sutskever and others (2013), theorem 2.1, for Nesterov's.
    """
    rate = Fraction(_check_learning_rate(learning_rate, zero=True))
    mu_ = Fraction(_check_mu(mu))
    a = rate * Fraction(require("curvature", curvature, _any, "finite"))
    # Exactly, for the side of 1 may hang on a last digit.
    if nesterov:
        trace, determinant = (1 + mu_) * (1 - a), mu_ * (1 - a)
    else:
        trace, determinant = 1 + mu_ - a, mu_
    discriminant = trace**2 - 4 * determinant
    if discriminant < 0:
        radius, excess = _root(determinant), determinant - 1
    else:
        radius = (abs(trace) + _root(discriminant)) / 2
        excess = max(abs(trace) - 1 - determinant, determinant - 1)
    if excess == 0:
        return 1.0
    return _below_1(_float(radius)) if excess < 0 else max(_float(radius), _ABOVE_1)


def effective_learning_rate(learning_rate: Number, mu: Number) -> float:
    """How far a gradient moves the params in all: learning_rate / (1 - mu).

    Args:
      learning_rate: at least 0.
      mu: the momentum coefficient, in (-1, 1).

    Returns:
      The learning rate of the plain descent that moves as far under a constant gradient.

    Raises:
      ValueError: a value out of range.

    Example:
      >>> from momentum_jax.theory import effective_learning_rate
      >>> effective_learning_rate(0.125, 0.75)
      0.5

    Source:
      The sum of the geometric series of mu.
    """
    rate = _check_learning_rate(learning_rate, zero=True)
    return rate / (1 - require("mu", mu, _inside, "in (-1, 1): at 1 the sum has no limit"))


def friction(learning_rate: Number, mu: Number) -> float:
    """The friction of the ball: (1 - mu) / sqrt(learning_rate).

    Momentum is q'' + friction q' + grad f = 0 with unit mass in time steps of
    sqrt(learning_rate): the friction has the unit of 1 / time.

    Args:
      learning_rate: above 0.
      mu: the momentum coefficient, in (-1, 1].

    Returns:
      The friction; 0 without any, at mu 1.

    Raises:
      ValueError: a value out of range.

    Example:
      >>> from momentum_jax.theory import friction
      >>> friction(learning_rate=0.25, mu=0.5)
      1.0

    Source:
      Qian (1999), On the momentum term in gradient descent learning algorithms.
    """
    rate = _check_learning_rate(learning_rate)
    return (1 - _check_mu(mu)) / math.sqrt(rate)


def stationary_variance(
    learning_rate: Number, mu: Number, curvature: Number, noise_variance: Number
) -> StationaryVariance:
    """How widely params and velocity scatter about the minimum of a quadratic, in noise.

        Var w = learning_rate s^2 (1 + mu) / (c (1 - mu) (2 (1 + mu) - learning_rate c))
        Var v = 2 learning_rate^2 s^2 / ((1 - mu) (2 (1 + mu) - learning_rate c))

    Args:
      learning_rate: above 0; learning_rate * curvature below `stability_limit(mu)`.
      mu: the momentum coefficient, in (-1, 1).
      curvature: c, above 0.
      noise_variance: s^2, the variance of each gradient's noise, independent from step to step.

    Returns:
      A `StationaryVariance` of one param.

    Raises:
      ValueError: a value out of range.

    Example:
      >>> from momentum_jax.theory import stationary_variance
      >>> stationary_variance(1.0, 0.0, 1.0, noise_variance=1.0)
      StationaryVariance(params=1.0, velocity=2.0)

    Source:
      The fixed point of the second moments of (w, v); Mandt, Hoffman and Blei (2017), Stochastic
      gradient descent as approximate Bayesian inference, in the limit of small learning rates.
    """
    rate = Fraction(_check_learning_rate(learning_rate))
    rule = "in (-1, 1): without friction there is no stationary state"
    mu_ = Fraction(require("mu", mu, _inside, rule))
    c = Fraction(require("curvature", curvature, _above_0, "above 0"))
    noise = Fraction(require("noise_variance", noise_variance, lambda x: x >= 0, "at least 0"))
    room = 2 * (1 + mu_) - rate * c
    if room <= 0:
        raise ValueError(
            f"learning_rate * curvature={_float(rate * c)} must be below {float(2 * (1 + mu_))}, "
            f"the stability limit at mu={float(mu_)}."
        )
    scale = rate * noise / ((1 - mu_) * room)
    return StationaryVariance(_float(scale * (1 + mu_) / c), _float(2 * rate * scale))


def no_escape_bound(mu: Number, smoothness: Number) -> float:
    """The largest learning rate at which no run climbs above its start: 2 (1 - mu) / L.

    Up to it the energy f(w) + mu |v|^2 / (2 learning_rate) never rises, for any function whose
    gradient changes at most L times as fast as w. So from rest, momentum cannot cross a
    barrier that is higher than the loss where it started: the limit of the picture of the ball
    that rolls out of a local minimum.

    Args:
      mu: the momentum coefficient, in [0, 1).
      smoothness: L, above 0.

    Returns:
      A learning rate.

    Raises:
      ValueError: a value out of range.

    Example:
      >>> from momentum_jax.theory import no_escape_bound
      >>> no_escape_bound(mu=0.75, smoothness=2.0)
      0.25

    Source:
      The descent lemma, applied to the energy: f(w + v) <= f(w) + g . v + L |v|^2 / 2, and
      g = (mu * last v - v) / learning_rate.
    """
    rest = 1 - require("mu", mu, lambda x: 0 <= x < 1, "in [0, 1)")
    return 2 * rest / require("smoothness", smoothness, _above_0, "above 0")


def qhm_from_pid(kp: Number, ki: Number, kd: Number) -> QHMSettings:
    """A PID controller of the gradient, as quasi-hyperbolic momentum.

        e = -g;  d <- mu * d + (1 - mu) * (e - last e);  s <- s + e
        w = start + kp * e + ki * s + kd * d

    The derivative is smoothed with the mu that cancels the gradient before last:
    mu = kd / (kd - kp), learning_rate = ki, nu = kp^2 / (ki kd).

    Args:
      kp: the proportional gain, below 0.
      ki: the integral gain, above 0.
      kd: the derivative gain, above 0.

    Returns:
      `QHMSettings`.

    Raises:
      ValueError: a value out of range.

    Example:
      >>> from momentum_jax.theory import qhm_from_pid
      >>> qhm_from_pid(kp=-1.0, ki=1.0, kd=3.0)
      QHMSettings(learning_rate=1.0, mu=0.75, nu=0.3333333333333333)

    Source:
      Ma and Yarats (2019), Quasi-hyperbolic momentum and Adam for deep learning, section 4.
    """
    rule = "below 0: only then does it smooth its derivative"
    p = Fraction(require("kp", kp, lambda x: x < 0, rule))
    i = Fraction(require("ki", ki, _above_0, "above 0"))
    d = Fraction(require("kd", kd, _above_0, "above 0"))
    return QHMSettings(float(i), _below_1(float(d / (d - p))), _float(p**2 / (i * d)))


def qhm_from_accsgd(delta: Number, kappa: Number, xi: Number, epsilon: Number = 0.7) -> QHMSettings:
    """Accelerated SGD (AccSGD), as quasi-hyperbolic momentum.

        a = 1 - epsilon^2 xi / kappa
        u <- a * u + (1 - a) * (w - kappa * delta / epsilon * g)
        w <- (epsilon * (w - delta * g) + (1 - a) * u) / (epsilon + 1 - a)

    Args:
      delta: the short step, above 0.
      kappa: the long step, as a multiple of the short, at least 1.
      xi: the statistical advantage, in (0, sqrt(kappa)].
      epsilon: the paper's constant, in (0, 1).

    Returns:
      `QHMSettings`.

    Raises:
      ValueError: a value out of range.

    Example:
      >>> from momentum_jax.theory import qhm_from_accsgd
      >>> settings = qhm_from_accsgd(delta=0.1, kappa=1000.0, xi=10.0)
      >>> round(settings.mu, 4), round(settings.nu, 4)
      (0.9882, 0.7792)

    Source:
      Kidambi, Netrapalli, Jain and Kakade (2018), On the insufficiency of existing momentum
      schemes for stochastic optimization; Ma and Yarats (2019), as above.
    """
    short = Fraction(require("delta", delta, _above_0, "above 0"))
    k = Fraction(require("kappa", kappa, lambda x: x >= 1, "at least 1"))
    most = math.sqrt(k)
    x = Fraction(require("xi", xi, lambda x: 0 < x <= most, "in (0, sqrt(kappa)]"))
    e = Fraction(require("epsilon", epsilon, lambda x: 0 < x < 1, "in (0, 1)"))
    return QHMSettings(
        learning_rate=_float(short * e * (1 + x) / (1 + e)),
        mu=_below_1(float((k - e**2 * x) / (k + e * x))),
        nu=_float((e * x - 1) / (e * (1 + x))),
    )


def qhm_from_synthesized_nesterov(gamma: Number, beta1: Number, beta2: Number) -> QHMSettings:
    """A synthesized Nesterov variant, as quasi-hyperbolic momentum.

        x <- x + beta1 * (x - last x) - gamma * g(y),   y = x + beta2 * (x - last x)

    Heavy ball has beta2 = 0, Nesterov's beta2 = beta1. The params of QHM are y:
    learning_rate = gamma / (1 - beta1), mu = beta1, nu = 1 - beta2 (1 - beta1) / beta1.

    Args:
      gamma: the learning rate of the variant, above 0.
      beta1: its momentum, in (-1, 1) and not 0.
      beta2: how far ahead the gradient is taken.

    Returns:
      `QHMSettings`.

    Raises:
      ValueError: a value out of range.

    Example:
      >>> from momentum_jax.theory import qhm_from_synthesized_nesterov
      >>> qhm_from_synthesized_nesterov(gamma=0.25, beta1=0.75, beta2=0.75)
      QHMSettings(learning_rate=1.0, mu=0.75, nu=0.75)

    Source:
      Lessard, Recht and Packard (2016), as above; Ma and Yarats (2019), as above.
    """
    rate = Fraction(require("gamma", gamma, _above_0, "above 0"))
    rule = "in (-1, 1) and not 0"
    mu = Fraction(require("beta1", beta1, lambda x: _inside(x) and x != 0, rule))
    ahead = Fraction(require("beta2", beta2, _any, "finite"))
    return QHMSettings(_float(rate / (1 - mu)), float(mu), _float(1 - ahead * (1 - mu) / mu))


def qhm_from_robust_momentum(
    smoothness: Number, strong_convexity: Number, rate: Number
) -> QHMSettings:
    """The robust momentum method, as quasi-hyperbolic momentum.

    With r the rate and k = L / m, the synthesized Nesterov variant of

        gamma = k (1 - r)^2 (1 + r) / L      beta1 = k r^3 / (k - 1)
        beta2 = r^3 / ((k - 1) (1 - r)^2 (1 + r))

    Args:
      smoothness: L, the largest curvature.
      strong_convexity: m, the least curvature, above 0 and below L.
      rate: from 1 - 1 / sqrt k, the fastest (triple momentum), to 1 - 1 / k, the most robust
        to noise in the gradients (gradient descent).

    Returns:
      `QHMSettings`.

    Raises:
      ValueError: a value out of range.

    Example:
      >>> from momentum_jax.theory import qhm_from_robust_momentum
      >>> settings = qhm_from_robust_momentum(smoothness=4.0, strong_convexity=1.0, rate=0.6)
      >>> round(settings.mu, 3), round(settings.nu, 2)
      (0.288, 0.3)

    Source:
      Cyrus, Hu, Van Scoy and Lessard (2018), A robust accelerated optimization algorithm for
      strongly convex functions; Ma and Yarats (2019), as above.
    """
    big, small = _curvatures(smoothness, strong_convexity)
    _check_condition(big, small)
    fastest, slowest = _fastest(big, small), (big - small) / big
    rule = f"in [{fastest}, {slowest}] for these curvatures"
    # Computed in another order, an end of the range differs in its last digits.
    given = require("rate", rate, lambda x: fastest - _SLACK <= x <= slowest + _SLACK, rule)
    k = Fraction(big) / Fraction(small)
    r = min(max(Fraction(given), 1 - _root(1 / k)), 1 - 1 / k)
    scale = (1 - r) ** 2 * (1 + r)
    return qhm_from_synthesized_nesterov(
        gamma=_float(k * scale / Fraction(big)),
        beta1=_below_1(_float(k * r**3 / (k - 1))),
        beta2=_float(r**3 / ((k - 1) * scale)),
    )


def qhm_from_triple_momentum(smoothness: Number, strong_convexity: Number) -> QHMSettings:
    """The triple momentum method, as quasi-hyperbolic momentum.

    The params of QHM are the y of `TripleMomentumTuning`, where the gradient is taken.

    Args:
      smoothness: L, the largest curvature.
      strong_convexity: m, the least curvature, above 0 and below L.

    Returns:
      `QHMSettings`.

    Raises:
      ValueError: a value out of range.

    Example:
      >>> from momentum_jax.theory import qhm_from_triple_momentum
      >>> settings = qhm_from_triple_momentum(smoothness=4.0, strong_convexity=1.0)
      >>> round(settings.learning_rate, 3), round(settings.mu, 3), round(settings.nu, 3)
      (0.45, 0.167, 0.444)

    Source:
      Van Scoy, Freeman and Lynch (2018), as above; Ma and Yarats (2019), as above.
    """
    _check_condition(*_curvatures(smoothness, strong_convexity))
    tuning = triple_momentum(smoothness, strong_convexity)
    return qhm_from_synthesized_nesterov(tuning.learning_rate, tuning.mu, tuning.gamma)


_BELOW_1, _ABOVE_1 = math.nextafter(1, 0), math.nextafter(1, 2)
_SLACK = 4 * sys.float_info.epsilon


def _tuning(big, learning_rate, mu, rate, nesterov=False):
    """The settings, with what is below 1 below 1, and with a learning rate that converges."""
    mu, rate = _below_1(mu), _below_1(rate)
    limit = _limit(mu, nesterov)
    # At condition numbers from 1e15 on, a learning rate that is rounded up is beyond the limit.
    while Fraction(learning_rate) * Fraction(big) >= limit:
        learning_rate = math.nextafter(learning_rate, 0)
    return Tuning(learning_rate, mu, rate)


def _limit(mu, nesterov):
    """The stability limit, exactly."""
    mu = Fraction(mu)
    if not nesterov:
        return 2 * (1 + mu)
    return 2 * (1 + mu) / (1 + 2 * mu) if 3 * mu >= -1 else 1 - 1 / mu


def _fastest(big, small):
    """1 - sqrt(m / L), where 1 - x would lose its digits."""
    return _below_1((big - small) / big / (1 + math.sqrt(small) / math.sqrt(big)))


def _root(square):
    """The square root of a fraction, to 120 bits."""
    product = square.numerator * square.denominator
    shift = max(0, 128 - product.bit_length() // 2)
    return Fraction(math.isqrt(product << 2 * shift), square.denominator << shift)


def _float(exact):
    """The nearest float; infinite beyond the largest."""
    try:
        return float(exact)
    except OverflowError:
        return math.inf if exact > 0 else -math.inf


def _below_1(x):
    """What is below 1, but may have been rounded to it."""
    return min(x, _BELOW_1)


def _curvatures(smoothness, strong_convexity):
    small = require("strong_convexity", strong_convexity, _above_0, "above 0")
    rule = f"at least strong_convexity={small}"
    return require("smoothness", smoothness, lambda x: x >= small, rule), small


def _check_condition(big, small):
    if big == small:
        raise ValueError("smoothness / strong_convexity=1.0 must be above 1.")


def _check_learning_rate(learning_rate, zero=False):
    if zero:
        return require("learning_rate", learning_rate, lambda x: x >= 0, "at least 0")
    return require("learning_rate", learning_rate, _above_0, "above 0")


def _check_mu(mu):
    return require("mu", mu, lambda x: -1 < x <= 1, "in (-1, 1]")


def _above_0(x):
    return x > 0


def _inside(mu):
    return -1 < mu < 1


def _any(_):
    return True
