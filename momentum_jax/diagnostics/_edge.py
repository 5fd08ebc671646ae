"""Compares a learning rate with the stability limit at the measured curvature."""

import math
from typing import NamedTuple

from momentum_jax import theory
from momentum_jax._hyperparameters import Number, check_flag, require
from momentum_jax.diagnostics._curvature import Curvature
from momentum_jax.theory import _formulas


class Edge(NamedTuple):
    """How a learning rate compares with the stability limit. Printed, it has five lines.

    Attributes:
      learning_rate: the learning rate of the step.
      mu: the momentum coefficient of the step.
      largest: the largest curvature.
      smallest: the smallest curvature.
      fraction: learning_rate / largest_learning_rate, the fraction of the stability limit in use;
        0 if no curvature is above 0.
      largest_learning_rate: the largest stable learning rate at this mu. Above it, the sharpest
        direction diverges. Infinite if no curvature is above 0.
      growth: the long-run factor per step for the distance along the sharpest direction. If it is
        above 1, this distance grows without limit.
      heavy_ball: the best `theory.Tuning` of momentum for this range of curvatures. Its rate is
        the factor along the slowest direction. None if the smallest curvature is not above 0.
      nesterov: the same for the Nesterov form.
      scatter: the standard deviation of a param along the sharpest direction in gradient noise;
        None if no variance was given, or if the step is unstable.
      converged: whether the measured curvature had converged.

    Example:
      >>> from momentum_jax.diagnostics import Edge
      >>> Edge._fields[4:6]
      ('fraction', 'largest_learning_rate')
    """

    learning_rate: float
    mu: float
    largest: float
    smallest: float
    fraction: float
    largest_learning_rate: float
    growth: float
    heavy_ball: theory.Tuning | None
    nesterov: theory.Tuning | None
    scatter: float | None
    converged: bool

    def __str__(self) -> str:
        """Returns a summary in five lines."""
        unsure = "" if self.converged else " (not converged: give curvature more steps)"
        return "\n".join(
            [
                f"curvature {self.smallest:.4g} to {self.largest:.4g}{unsure}: {self._used()}",
                f"learning rate {self.learning_rate:.4g} at mu {self.mu:.4g}: {self._limit()}",
                f"best heavy ball on a quadratic: {_settings(self.heavy_ball)}",
                f"best nesterov on a quadratic: {_settings(self.nesterov)}",
                f"standard deviation in gradient noise: {self._noise()}",
            ]
        )

    def _used(self):
        if self.largest <= 0:
            return "no stability limit, because no curvature is above 0"
        return f"{self.fraction:.1%} of the stability limit is used"

    def _limit(self):
        return (
            f"at most {self.largest_learning_rate:.4g} is stable; sharpest direction "
            f"x {self.growth:.4g} per step"
        )

    def _noise(self):
        return "unknown" if self.scatter is None else f"{self.scatter:.4g}, sharpest direction"


def _settings(tuning):
    if tuning is None:
        return "unknown, because the smallest curvature is not above 0"
    rate, mu, factor = tuning
    return f"{rate:.4g} at mu {mu:.4g}; slowest direction x {factor:.4g} per step"


def edge(
    curvature: Curvature,
    learning_rate: Number,
    mu: Number,
    *,
    nesterov: bool = False,
    noise_variance: Number | None = None,
) -> Edge:
    """Compares a learning rate with the stability limit at the measured curvature.

        heavy ball: learning_rate * largest < 2 (1 + mu)
        nesterov:   learning_rate * largest < 2 (1 + mu) / (1 + 2 mu)

    (For nesterov with mu < -1/3: learning_rate * largest < 1 - 1 / mu.) The result is exact on a
    quadratic. When a network is trained with all examples in each step, the sharpness rises to the
    limit and stays there while the loss still falls. So a fraction near 1 is not an error.

    Printed factors such as x 0.5195 multiply the distance to the minimum in each step. The factor
    of the given learning rate is for the sharpest direction. The factors of the best settings are
    for the slowest direction, so do not compare them with the first.

    Args:
      curvature: the result of `curvature`, computed outside jit.
      learning_rate: at least 0.
      mu: the momentum coefficient, in (-1, 1).
      nesterov: whether the optimizer uses the Nesterov form; False by default.
      noise_variance: the variance of the noise in one gradient along the sharpest direction,
        independent from step to step; None by default. Only for heavy ball.

    Returns:
      An `Edge`.

    Raises:
      ValueError: a value is out of range, or `noise_variance` is given with nesterov.

    Example:
      >>> import jax.numpy as jnp, momentum_jax as mj
      >>> def loss(w):
      ...     return jnp.sum(jnp.array([10.0, 1.0]) * w**2) / 2
      >>> curvature = mj.diagnostics.curvature(loss, jnp.ones(2))
      >>> print(mj.diagnostics.edge(curvature, learning_rate=0.4, mu=0.9))
      curvature 1 to 10: 105.3% of the stability limit is used
      learning rate 0.4 at mu 0.9: at most 0.38 is stable; sharpest direction x 1.5 per step
      best heavy ball on a quadratic: 0.2309 at mu 0.2699; slowest direction x 0.5195 per step
      best nesterov on a quadratic: 0.129 at mu 0.4714; slowest direction x 0.6408 per step
      standard deviation in gradient noise: unknown

    Source:
      Polyak (1964), as in `theory.stability_limit`; Cohen, Kaur, Li, Kolter and Talwalkar (2021),
      Gradient descent on neural networks typically occurs at the edge of stability.
    """
    nesterov = check_flag("nesterov", nesterov)
    largest = require("curvature.largest", curvature.largest, math.isfinite, "finite")
    smallest = require("curvature.smallest", curvature.smallest, math.isfinite, "finite")
    rate = require("learning_rate", learning_rate, lambda x: x >= 0, "at least 0")
    mu = require("mu", mu, lambda x: -1 < x < 1, "in (-1, 1)")
    limit = theory.stability_limit(mu, nesterov=nesterov)
    if nesterov and noise_variance is not None:
        raise ValueError(
            f"noise_variance={noise_variance} has no effect with nesterov=True, as there is no "
            "formula for it. Leave it out."
        )
    fraction = _formulas.fraction_of_limit(rate, largest, limit)
    scatter = None
    if noise_variance is not None and 0 < fraction < 1:
        variance = theory.stationary_variance(rate, mu, largest, noise_variance).params
        scatter = math.sqrt(variance)
    convex = smallest > 0
    return Edge(
        learning_rate=rate,
        mu=mu,
        largest=largest,
        smallest=smallest,
        fraction=fraction,
        largest_learning_rate=_formulas.largest_stable_learning_rate(largest, limit),
        growth=theory.spectral_radius(rate, mu, largest, nesterov=nesterov),
        heavy_ball=theory.heavy_ball(largest, smallest) if convex else None,
        nesterov=theory.nesterov(largest, smallest, tuned=True) if convex else None,
        scatter=scatter,
        converged=bool(curvature.converged),
    )
