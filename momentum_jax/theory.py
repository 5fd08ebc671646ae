"""What momentum does to quadratics, noise and energy, in closed form: plain floats, no JAX.

Throughout: v <- mu * v - learning_rate * g, w <- w + v; a function whose curvatures lie between
strong_convexity and smoothness (m and L in the literature, L / m the condition number); rates
are those of the distance to the minimum, per step.
"""

import math
from typing import NamedTuple

from momentum_jax._hyperparameters import require


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


def gradient_descent(smoothness: float, strong_convexity: float) -> Tuning:
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
    return Tuning(2 / (big + small), 0.0, (big - small) / (big + small))


def heavy_ball(smoothness: float, strong_convexity: float) -> Tuning:
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
    big, small = (math.sqrt(c) for c in _curvatures(smoothness, strong_convexity))
    rate = (big - small) / (big + small)
    return Tuning(4 / (big + small) ** 2, rate**2, rate)


def nesterov(smoothness: float, strong_convexity: float, *, tuned: bool = False) -> Tuning:
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
      >>> nesterov(smoothness=9.0, strong_convexity=1.0)
      Tuning(learning_rate=0.1111111111111111, mu=0.5, rate=0.6666666666666667)
      >>> nesterov(smoothness=5.0, strong_convexity=1.0, tuned=True)
      Tuning(learning_rate=0.25, mu=0.3333333333333333, rate=0.5)

    Source:
      Nesterov (2004), Introductory lectures on convex optimization, section 2.2; Lessard, Recht
      and Packard (2016), as above, proposition 1.
    """
    big, small = _curvatures(smoothness, strong_convexity)
    if tuned:
        root = math.sqrt(3 * big / small + 1)
        return Tuning(4 / (3 * big + small), (root - 2) / (root + 2), 1 - 2 / root)
    root = math.sqrt(big / small)
    return Tuning(1 / big, (root - 1) / (root + 1), 1 - 1 / root)


def triple_momentum(smoothness: float, strong_convexity: float) -> TripleMomentumTuning:
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
    rate = 1 - math.sqrt(small / big)
    return TripleMomentumTuning(
        learning_rate=(1 + rate) / big,
        mu=rate**2 / (2 - rate),
        gamma=rate**2 / ((1 + rate) * (2 - rate)),
        delta=rate**2 / (1 - rate**2),
        rate=rate,
    )


def stability_limit(mu: float, *, nesterov: bool = False) -> float:
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
    _check_mu(mu)
    if not nesterov:
        return 2 * (1 + mu)
    return 2 * (1 + mu) / (1 + 2 * mu) if mu >= -1 / 3 else 1 - 1 / mu


def spectral_radius(
    learning_rate: float, mu: float, curvature: float, *, nesterov: bool = False
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
    _check_learning_rate(learning_rate, zero=True)
    _check_mu(mu)
    require("curvature", curvature, True, "finite")
    a = learning_rate * curvature
    if nesterov:
        trace, determinant = (1 + mu) * (1 - a), mu * (1 - a)
    else:
        trace, determinant = 1 + mu - a, mu
    discriminant = trace**2 - 4 * determinant
    if discriminant < 0:
        return math.sqrt(determinant)
    return (abs(trace) + math.sqrt(discriminant)) / 2


def effective_learning_rate(learning_rate: float, mu: float) -> float:
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
    _check_learning_rate(learning_rate, zero=True)
    require("mu", mu, -1 < mu < 1, "in (-1, 1): at 1 the sum has no limit")
    return learning_rate / (1 - mu)


def friction(learning_rate: float, mu: float) -> float:
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
    _check_learning_rate(learning_rate)
    _check_mu(mu)
    return (1 - mu) / math.sqrt(learning_rate)


def stationary_variance(
    learning_rate: float, mu: float, curvature: float, noise_variance: float
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
    _check_learning_rate(learning_rate)
    require("mu", mu, -1 < mu < 1, "in (-1, 1): without friction there is no stationary state")
    require("curvature", curvature, curvature > 0, "above 0")
    require("noise_variance", noise_variance, noise_variance >= 0, "at least 0")
    room = 2 * (1 + mu) - learning_rate * curvature
    require(
        "learning_rate * curvature",
        learning_rate * curvature,
        room > 0,
        f"below {2 * (1 + mu)}, the stability limit at mu={mu}",
    )
    scale = learning_rate * noise_variance / ((1 - mu) * room)
    return StationaryVariance(scale * (1 + mu) / curvature, 2 * learning_rate * scale)


def no_escape_bound(mu: float, smoothness: float) -> float:
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
    require("mu", mu, 0 <= mu < 1, "in [0, 1)")
    require("smoothness", smoothness, smoothness > 0, "above 0")
    return 2 * (1 - mu) / smoothness


def qhm_from_pid(kp: float, ki: float, kd: float) -> QHMSettings:
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
    require("kp", kp, kp < 0, "below 0: only then does it smooth its derivative")
    require("ki", ki, ki > 0, "above 0")
    require("kd", kd, kd > 0, "above 0")
    return QHMSettings(ki, kd / (kd - kp), kp**2 / (ki * kd))


def qhm_from_accsgd(delta: float, kappa: float, xi: float, epsilon: float = 0.7) -> QHMSettings:
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
    require("delta", delta, delta > 0, "above 0")
    require("kappa", kappa, kappa >= 1, "at least 1")
    require("xi", xi, 0 < xi <= math.sqrt(kappa), "in (0, sqrt(kappa)]")
    require("epsilon", epsilon, 0 < epsilon < 1, "in (0, 1)")
    return QHMSettings(
        learning_rate=delta * epsilon * (1 + xi) / (1 + epsilon),
        mu=(kappa - epsilon**2 * xi) / (kappa + epsilon * xi),
        nu=(epsilon * xi - 1) / (epsilon * (1 + xi)),
    )


def qhm_from_synthesized_nesterov(gamma: float, beta1: float, beta2: float) -> QHMSettings:
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
    require("gamma", gamma, gamma > 0, "above 0")
    require("beta1", beta1, -1 < beta1 < 1 and beta1 != 0, "in (-1, 1) and not 0")
    require("beta2", beta2, True, "finite")
    return QHMSettings(gamma / (1 - beta1), beta1, 1 - beta2 * (1 - beta1) / beta1)


def qhm_from_robust_momentum(
    smoothness: float, strong_convexity: float, rate: float
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
    k = big / small
    require("smoothness / strong_convexity", k, k > 1, "above 1")
    fastest, slowest = 1 - 1 / math.sqrt(k), 1 - 1 / k
    fits = fastest <= rate <= slowest
    require("rate", rate, fits, f"in [{fastest}, {slowest}] for these curvatures")
    scale = (1 - rate) ** 2 * (1 + rate)
    return qhm_from_synthesized_nesterov(
        gamma=k * scale / big,
        beta1=k * rate**3 / (k - 1),
        beta2=rate**3 / ((k - 1) * scale),
    )


def qhm_from_triple_momentum(smoothness: float, strong_convexity: float) -> QHMSettings:
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
    tuning = triple_momentum(smoothness, strong_convexity)
    k = smoothness / strong_convexity
    require("smoothness / strong_convexity", k, k > 1, "above 1")
    return qhm_from_synthesized_nesterov(tuning.learning_rate, tuning.mu, tuning.gamma)


def _curvatures(smoothness, strong_convexity):
    require("strong_convexity", strong_convexity, strong_convexity > 0, "above 0")
    require(
        "smoothness",
        smoothness,
        smoothness >= strong_convexity,
        f"at least strong_convexity={strong_convexity}",
    )
    return smoothness, strong_convexity


def _check_learning_rate(learning_rate, zero=False):
    fits = learning_rate > 0 or (zero and learning_rate == 0)
    require("learning_rate", learning_rate, fits, "at least 0" if zero else "above 0")


def _check_mu(mu):
    require("mu", mu, -1 < mu <= 1, "in (-1, 1]")
