"""When momentum converges on a quadratic, how fast, and when it cannot leave a basin."""

from fractions import Fraction

from momentum_jax._hyperparameters import Number, require
from momentum_jax.theory import _formulas
from momentum_jax.theory._checks import (
    require_above_0,
    require_at_least_0,
    require_finite,
    require_mu,
)
from momentum_jax.theory._exact import ABOVE_1, below_1, square_root, to_float


def stability_limit(mu: Number, *, nesterov: bool = False) -> float:
    """The largest learning_rate * curvature that converges on a quadratic.

        2 (1 + mu),  with nesterov  2 (1 + mu) / (1 + 2 mu),  or 1 - 1 / mu for mu < -1/3

    Below the limit the iteration converges. Above it, the iteration diverges. At mu 1 and below the
    limit, it does not converge, but stays bounded.

    Args:
      mu: the momentum coefficient, in (-1, 1].
      nesterov: whether the optimizer uses the Nesterov form; False by default.

    Returns:
      The limit, without unit.

    Raises:
      ValueError: mu is out of range.

    Example:
      >>> from momentum_jax.theory import stability_limit
      >>> stability_limit(0.5), stability_limit(0.5, nesterov=True)
      (3.0, 1.5)

    Source:
      The roots of z^2 - (1 + mu - a) z + mu and z^2 - (1 + mu) (1 - a) z + mu (1 - a), with
      a = learning_rate * curvature, lie in the unit circle (Jury's criterion).
    """
    return float(_formulas.stability_limit(Fraction(require_mu(mu)), nesterov=nesterov))


def spectral_radius(
    learning_rate: Number, mu: Number, curvature: Number, *, nesterov: bool = False
) -> float:
    """The long-run factor per step for the distance to the minimum of a quadratic.

    With a = learning_rate * curvature, it is the largest absolute value of a root of

        z^2 - (1 + mu - a) z + mu,  with nesterov  z^2 - (1 + mu) (1 - a) z + mu (1 - a)

    Args:
      learning_rate: at least 0.
      mu: the momentum coefficient, in (-1, 1].
      curvature: the curvature of the quadratic in the direction of interest; negative at a saddle.
      nesterov: whether the optimizer uses the Nesterov form; False by default.

    Returns:
      The radius. The iteration converges if it is below 1.

    Raises:
      ValueError: a value is out of range.

    Example:
      >>> from momentum_jax.theory import spectral_radius
      >>> spectral_radius(learning_rate=0.25, mu=0.25, curvature=1.0)
      0.5

    Source:
      Polyak (1964), Some methods of speeding up the convergence of iteration methods; Sutskever,
      Martens, Dahl and Hinton (2013), On the importance of initialization and momentum in deep
      learning, theorem 2.1, for the Nesterov form.
    """
    rate = Fraction(require_at_least_0("learning_rate", learning_rate))
    mu_ = Fraction(require_mu(mu))
    a = rate * Fraction(require_finite("curvature", curvature))
    # Exact arithmetic: a last digit can decide whether the radius is above or below 1.
    if nesterov:
        trace, determinant = (1 + mu_) * (1 - a), mu_ * (1 - a)
    else:
        trace, determinant = 1 + mu_ - a, mu_
    discriminant = trace**2 - 4 * determinant
    if discriminant < 0:
        radius, excess = square_root(determinant), determinant - 1
    else:
        radius = (abs(trace) + square_root(discriminant)) / 2
        excess = max(abs(trace) - 1 - determinant, determinant - 1)
    if excess == 0:
        return 1.0
    return below_1(to_float(radius)) if excess < 0 else max(to_float(radius), ABOVE_1)


def no_escape_bound(mu: Number, smoothness: Number) -> float:
    """The learning rate up to which no run rises above its initial loss: 2 (1 - mu) / L.

    At this learning rate or a smaller one, the energy f(w) + mu |v|^2 / (2 learning_rate) never
    rises. This holds for any function whose gradient is Lipschitz continuous with constant L. So a
    run that starts with velocity 0 cannot cross a barrier that is higher than its initial loss.
    This limits the common picture of a ball that rolls out of a local minimum.

    Args:
      mu: the momentum coefficient, in [0, 1).
      smoothness: L, above 0.

    Returns:
      A learning rate.

    Raises:
      ValueError: a value is out of range.

    Example:
      >>> from momentum_jax.theory import no_escape_bound
      >>> no_escape_bound(mu=0.75, smoothness=2.0)
      0.25

    Source:
      The descent lemma, applied to the energy: f(w + v) <= f(w) + g . v + L |v|^2 / 2, and
      g = (mu * previous v - v) / learning_rate.
    """
    rest = _formulas.one_minus_mu(require("mu", mu, lambda x: 0 <= x < 1, "in [0, 1)"))
    return 2 * rest / require_above_0("smoothness", smoothness)
