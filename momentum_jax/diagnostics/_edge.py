"""How far a step is from the edge of stability, from the curvature that was measured."""

import math
from typing import NamedTuple

from momentum_jax import theory
from momentum_jax._hyperparameters import Number, check_flag, require
from momentum_jax.diagnostics._curvature import Curvature


class Edge(NamedTuple):
    """Where a step stands between too small and unstable. Printed, it is four lines.

    Attributes:
      learning_rate: that of the step.
      mu: that of the step.
      largest: the largest curvature.
      smallest: the smallest.
      fraction: learning_rate over the largest stable one: the share of the limit that is in use.
        0 where no curvature is above 0.
      largest_learning_rate: above it the sharpest direction diverges at this mu; infinite where no
        curvature is above 0.
      growth: what the distance along the sharpest direction is multiplied by a step, in the long
        run; above 1 it diverges.
      heavy_ball: the `theory.Tuning` of momentum that is best for this range of curvatures; None if
        the smallest is not above 0.
      nesterov: the same with nesterov.
      scatter: the standard deviation of a param along the sharpest direction in gradient noise;
        None if no variance was given, or it is unstable.
      converged: whether the curvature had converged.

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
        """What to do, in four lines."""
        unsure = "" if self.converged else " (not converged: give curvature more steps)"
        return "\n".join(
            [
                f"curvature {self.smallest:.4g} to {self.largest:.4g}{unsure}: {self._used()}",
                f"learning rate {self.learning_rate:.4g} at mu {self.mu:.4g}: {self._limit()}",
                f"best on a quadratic: {self._best()}",
                f"scatter in noise: {self._noise()}",
            ]
        )

    def _used(self):
        if self.largest <= 0:
            return "there is no limit, as none is above 0"
        return f"{self.fraction:.1%} of the stability limit is used"

    def _limit(self):
        return (
            f"at most {self.largest_learning_rate:.4g} is stable; x {self.growth:.4g} a step along "
            "the sharpest direction"
        )

    def _best(self):
        if self.heavy_ball is None or self.nesterov is None:
            return "none, as the smallest curvature is not above 0"
        (a, b, c), (d, e, f) = self.heavy_ball, self.nesterov
        return f"{a:.4g} at mu {b:.4g} (x {c:.4g}), nesterov {d:.4g} at {e:.4g} (x {f:.4g})"

    def _noise(self):
        if self.scatter is None:
            return "not known"
        return f"{self.scatter:.4g} along the sharpest direction"


def edge(
    curvature: Curvature,
    learning_rate: Number,
    mu: Number,
    *,
    nesterov: bool = False,
    noise_variance: Number | None = None,
) -> Edge:
    """How near a step of momentum is to the largest that is stable at this curvature.

        heavy ball: learning_rate * largest < 2 (1 + mu)
        nesterov:   learning_rate * largest < 2 (1 + mu) / (1 + 2 mu)

    Exact on a quadratic. Training of a network with all examples in each step drives the sharpness
    up to the limit and then stays there, where the loss still falls: a fraction near 1 is no fault.

    Args:
      curvature: as `curvature` measured it, outside jit.
      learning_rate: at least 0.
      mu: the momentum coefficient, in (-1, 1).
      nesterov: whether the update looks one step ahead.
      noise_variance: that of the noise of one gradient along the sharpest direction, independent
        from step to step; for heavy ball alone.

    Returns:
      An `Edge`.

    Raises:
      ValueError: a value out of range; noise with nesterov.

    Example:
      >>> import jax.numpy as jnp, momentum_jax as mj
      >>> def loss(w):
      ...     return jnp.sum(jnp.array([10.0, 1.0]) * w**2) / 2
      >>> curvature = mj.diagnostics.curvature(loss, jnp.ones(2))
      >>> print(mj.diagnostics.edge(curvature, learning_rate=0.4, mu=0.9))
      curvature 1 to 10: 105.3% of the stability limit is used
      learning rate 0.4 at mu 0.9: at most 0.38 is stable; x 1.5 a step along the sharpest direction
      best on a quadratic: 0.2309 at mu 0.2699 (x 0.5195), nesterov 0.129 at 0.4714 (x 0.6408)
      scatter in noise: not known

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
            f"noise_variance={noise_variance} has no effect with nesterov=True, for which there is "
            "no formula here. Leave it out."
        )
    fraction = max(rate * largest / limit, 0.0)
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
        largest_learning_rate=limit / largest if largest > 0 else math.inf,
        growth=theory.spectral_radius(rate, mu, largest, nesterov=nesterov),
        heavy_ball=theory.heavy_ball(largest, smallest) if convex else None,
        nesterov=theory.nesterov(largest, smallest, tuned=True) if convex else None,
        scatter=scatter,
        converged=bool(curvature.converged),
    )
