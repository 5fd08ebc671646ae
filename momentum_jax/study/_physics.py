"""The formulas of momentum that the study uses: each is written once, here."""

from typing import Any


def one_minus_mu(mu: Any) -> Any:
    """Returns 1 - mu: the learning rate divided by the effective learning rate.

    Args:
      mu: the momentum coefficient, a number or an array.

    Example:
      >>> one_minus_mu(0.75)
      0.25
    """
    return 1 - mu


def effective_learning_rate(learning_rate: Any, mu: Any) -> Any:
    """Returns learning_rate / (1 - mu), the step size that a constant gradient reaches.

    Args:
      learning_rate: a number or an array.
      mu: the momentum coefficient, a number or an array; below 1.

    Example:
      >>> effective_learning_rate(0.5, 0.75)
      2.0
    """
    return learning_rate / one_minus_mu(mu)


def kinetic_energy(squared_norm: Any, learning_rate: Any) -> Any:
    """Returns |v|^2 / (2 learning_rate), in the unit of the loss.

    Args:
      squared_norm: |v|^2, the squared norm of the last update of all params.
      learning_rate: a number or an array.

    Example:
      >>> kinetic_energy(4.0, 0.5)
      4.0
    """
    return squared_norm / (2 * learning_rate)
