"""Checks of the arguments of theory: each returns a Python float, or raises a ValueError."""

from momentum_jax._hyperparameters import Number, require


def require_curvatures(smoothness: Number, strong_convexity: Number) -> tuple[float, float]:
    """Returns (L, m); raises unless L >= m > 0.

    Example:
      >>> require_curvatures(2, 1)
      (2.0, 1.0)
    """
    small = require_above_0("strong_convexity", strong_convexity)
    rule = f"at least strong_convexity={small}"
    return require("smoothness", smoothness, lambda x: x >= small, rule), small


def require_above_0(name: str, value: Number) -> float:
    """Returns the number; raises unless it is above 0.

    Example:
      >>> require_above_0("curvature", 1)
      1.0
    """
    return require(name, value, lambda x: x > 0, "above 0")


def require_at_least_0(name: str, value: Number) -> float:
    """Returns the number; raises unless it is at least 0.

    Example:
      >>> require_at_least_0("learning_rate", 0)
      0.0
    """
    return require(name, value, lambda x: x >= 0, "at least 0")


def require_mu(mu: Number) -> float:
    """Returns mu; raises unless it is in (-1, 1].

    Example:
      >>> require_mu(1)
      1.0
    """
    return require("mu", mu, lambda x: -1 < x <= 1, "in (-1, 1]")


def require_mu_below_1(mu: Number, reason: str = "") -> float:
    """Returns mu; raises unless it is in (-1, 1), with the reason why 1 is excluded.

    Example:
      >>> require_mu_below_1(0.5)
      0.5
    """
    rule = f"in (-1, 1): {reason}" if reason else "in (-1, 1)"
    return require("mu", mu, lambda x: -1 < x < 1, rule)


def require_finite(name: str, value: Number) -> float:
    """Returns the number; raises unless it is finite.

    Example:
      >>> require_finite("curvature", -1)
      -1.0
    """
    return require(name, value, lambda _: True, "finite")
