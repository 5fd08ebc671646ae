"""Three problems in closed form, whose minima, barriers and curvatures are known."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from momentum_jax.study.problem import Problem, quarter_decades

# Number of rows of gradient noise. Batches are drawn without replacement within an epoch, so the
# noise of different steps is nearly independent only because an epoch is long.
NOISE_ROWS = 4096


def _with_noise(loss, dimensions: int, noise: float) -> dict[str, Any]:
    """Makes the fields `loss` and data of a problem with gradient noise.

    loss(w, batch) = loss(w) + w . mean(batch), so a batch adds its mean row to the gradient. Rows
    come in pairs r, -r, so that the mean of all rows is exactly 0. Their standard deviation in each
    coordinate is `noise`. Test and validation data are one row of 0: results have no noise.
    """
    if not 0 <= noise < math.inf:
        raise ValueError(f"noise={noise} must be finite and at least 0.")
    if noise == 0:
        return {"loss": loss}
    silent = np.zeros((1, dimensions), np.float32)
    half = np.random.default_rng(0).normal(size=(NOISE_ROWS // 2, dimensions))
    half = np.float32(noise * half / np.sqrt((half**2).mean(axis=0)))
    pairs = np.stack([half, -half], axis=1).reshape(NOISE_ROWS, dimensions)
    return {
        "loss": lambda w, batch: loss(w) + w @ jnp.asarray(batch).mean(axis=0),
        "data": pairs,
        "test_data": silent,
        "validation_data": silent,
    }


def double_well(noise: float = 0.0) -> Problem:
    """A loss of two params with a deep and a shallow valley, and a barrier of known height.

        f(x, y) = x^4 / 4 - x^3 / 12 - x^2 / 2 + x / 4 + 5 / 12 + y^2 / 2
        df/dx = (x + 1) (x - 1/4) (x - 1)

    | point | x | y | f |
    | --- | --- | --- | --- |
    | deep minimum | -1 | 0 | 0 |
    | barrier (saddle) | 1/4 | 0 | 1375/3072 = 0.448 |
    | shallow minimum | 1 | 0 | 1/3 |

    Initial weights are uniform in |x| <= 2, |y| <= 1/2. Of them 7/16 are in the shallow valley.
    17% of all have x > 1.326: they start high enough on the outer wall to cross the barrier if
    they lose little energy. At initial scale 0.5 none starts that high. The curvature at |x| <= 2
    is at most L = 12 (at x = -2). For learning_rate <= 2 (1 - mu) / L, a run that starts with
    velocity 0 below the barrier therefore stays in its valley.

    Args:
      noise: the standard deviation, in each coordinate, of the gradient noise of a batch of one;
        for a batch of n it is this over sqrt(n). 0 makes the problem deterministic, without data.

    Returns:
      The problem. A run is solved if its final loss is at most 0.3, which is reached only in the
      deep valley. The loss cap is the height of the barrier.

    Raises:
      ValueError: a noise that is negative or not finite.

    Example:
      >>> import jax.numpy as jnp
      >>> print([round(float(double_well().loss(jnp.array([x, 0.0]))), 3) for x in (-1, 1)])
      [0.0, 0.333]
    """

    def loss(w):
        x, y = w
        return x**4 / 4 - x**3 / 12 - x**2 / 2 + x / 4 + 5 / 12 + y**2 / 2

    def init(key):
        return jax.random.uniform(key, (2,), minval=-1, maxval=1) * jnp.array([2.0, 0.5])

    return Problem(
        init=init,
        **_with_noise(loss, 2, noise),
        name="double well",
        loss_cap=1375 / 3072,
        solved={"loss": 0.3},
        defaults=dict(
            learning_rate=0.1,
            rates=quarter_decades(0.01, 11),
            steps=2000,
            init_scales=(0.5, 1.0, 2.0),
        )
        | ({"batch_size": 1} if noise else {}),
    )


def quadratic(condition: float = 1000.0, dimensions: int = 20, noise: float = 0.0) -> Problem:
    """An ill-conditioned quadratic, for which theory gives the exact gain from momentum.

        f(w) = 1/2 sum_i c_i w_i^2,   c_i = condition^(-(i - 1) / (dimensions - 1))

    The curvatures c_i go from L = 1 to 1 / condition in equal ratios. The axes are the
    eigenvectors, without loss of generality: gradient descent is invariant to rotations, with and
    without momentum. Initial weights are normal with variance 1.

    Args:
      condition: the largest curvature divided by the smallest.
      dimensions: number of params.
      noise: the standard deviation, in each coordinate, of the gradient noise of a batch of one;
        for a batch of n it is this over sqrt(n). 0 makes the problem deterministic, without data.

    Returns:
      The problem. A run is solved if its final loss is at most 1e-4 times 1/2 sum_i c_i, which is
      the mean initial loss at scale 1; with noise, 1e-2 times.

    Raises:
      ValueError: a condition below 1, fewer than 2 dimensions, or a noise that is negative or
        not finite.

    Example:
      >>> import jax.numpy as jnp
      >>> print(quadratic(condition=4.0, dimensions=2).loss(jnp.array([1.0, 2.0])))
      1.0
    """
    if not 1 <= condition < math.inf:
        raise ValueError(f"condition={condition} must be finite and at least 1.")
    if dimensions < 2:
        raise ValueError(f"dimensions={dimensions} must be at least 2.")
    curvatures = np.float32(np.geomspace(1, 1 / condition, dimensions))
    return Problem(
        init=lambda key: jax.random.normal(key, (dimensions,)),
        **_with_noise(lambda w: (curvatures * w**2).sum() / 2, dimensions, noise),
        name="quadratic",
        solved={"loss": (1e-2 if noise else 1e-4) * float(curvatures.sum()) / 2},
        curvature=1.0,
        defaults=dict(
            learning_rate=1.0,
            rates=quarter_decades(0.1, 13),
            steps=500,
            init_scales=(0.1, 1.0, 10.0),
        )
        | ({"batch_size": 1} if noise else {}),
    )


# sqrt(1 - r^2) + r arcsin(r) = 1 + r^2 / 2 + r^4 / 24 + r^6 / 80 + ..., from r^4 on.
_SERIES = tuple(math.comb(2 * n, n) / (4**n * (2 * n + 1) * (2 * n + 2)) for n in range(1, 12))


@jax.custom_jvp
def _kernel_from_fourth_order(cosine):
    """Computes (sqrt(1 - r^2) + r arcsin(r) - 1 - r^2 / 2) / (2 pi) at r = cosine."""
    r = jnp.clip(cosine, -1, 1)
    square = r**2
    # Near 0 the closed form is a small difference of large numbers, which loses precision.
    series = square**2 * jnp.polyval(jnp.array(_SERIES[::-1], r.dtype), square)
    closed = jnp.sqrt((1 - r) * (1 + r)) + r * jnp.arcsin(r) - 1 - square / 2
    return jnp.where(square < 0.25, series, closed) / (2 * jnp.pi)


@_kernel_from_fourth_order.defjvp
def _(primals, tangents):
    # Written out because sqrt and arcsin each have an infinite derivative at 1, while their sum has
    # a finite one. Clipped below 1 because a Hessian differentiates arcsin again.
    (cosine,), (tangent,) = primals, tangents
    limit = 1 - jnp.finfo(cosine.dtype).epsneg
    r = jnp.clip(cosine, -limit, limit)
    return _kernel_from_fourth_order(cosine), (jnp.arcsin(r) - r) / (2 * jnp.pi) * tangent


def safran_shamir(units: int = 10) -> Problem:
    """A student network learns a teacher of the same shape; the loss has spurious minima.

    Student and teacher are sums of `units` ReLUs in `units` dimensions; the teacher's weights
    are the unit vectors e_1 ... e_units. The loss is the expectation over Gaussian inputs:

        f(W) = 1/2 E (sum_i relu(w_i . x) - sum_j relu(e_j . x))^2,   x ~ N(0, I)

    Its closed form uses E relu(w . x) relu(v . x) = |w| |v| k(w . v / (|w| |v|)), with the
    arc-cosine kernel k(r) = (sqrt(1 - r^2) + (pi - arccos r) r) / (2 pi). Summed directly, numbers
    near 10 would cancel to a loss near 0. Therefore the terms of k in r^0, r^1 and r^2, which are
    1 / (2 pi), r / 4 and r^2 / (4 pi), are summed as squares:

        2 f = (sum |w_i| - units)^2 / (2 pi) + |sum w_i - sum e_j|^2 / 4
              + |sum w_i w_i^T / |w_i| - I|^2 / (4 pi) + (the rest of k, at most 0.0113)

    In float32 the error of this sum is about 1e-7. The global minimum is 0, at W = I up to the
    order of the units. Safran and Shamir prove that for 6 to 20 units there are spurious minima:
    local minima that are not global. The more units, the more often gradient descent ends in one:
    from these initial weights in 1% of runs for 6 units, 34% for 10, 90% for 20. Initial weights
    are normal with variance 1 / units (Xavier).

    Args:
      units: number of units and of dimensions; at least 2.

    Returns:
      The problem. A run is solved if its final loss is at most 1e-3. Any other run ended in a
      spurious minimum or needed more steps: the lowest spurious minimum that gradient descent
      found has a loss of 0.0251 for 6 units, 0.0187 for 10 and 0.0113 for 20. The loss cap is the
      loss of a student whose output is always 0.

    Raises:
      ValueError: fewer than 2 units.

    Example:
      >>> import jax.numpy as jnp
      >>> print(safran_shamir(units=6).loss(jnp.eye(6)))
      0.0

    Source:
      Safran and Shamir (2018), Spurious Local Minima are Common in Two-Layer ReLU Neural
      Networks; the kernel is from Cho and Saul (2009), Kernel Methods for Deep Learning.
    """
    if units < 2:
        raise ValueError(f"units={units} must be at least 2.")

    def loss(w):
        with jax.default_matmul_precision("highest"):  # Accelerators use low precision by default.
            return exactly(w)

    def exactly(w):
        square = (w**2).sum(axis=1)
        # A unit whose weights are exactly 0 has no direction, and its gradient is 0.
        alive = square > 0
        norm = jnp.where(alive, jnp.sqrt(jnp.where(alive, square, 1)), 0)
        direction = w / jnp.where(alive, norm, 1)[:, None]
        zeroth = (norm.sum() - units) ** 2 / (2 * jnp.pi)
        first = ((w.sum(axis=0) - 1) ** 2).sum() / 4
        second = ((w.T @ direction - jnp.eye(units)) ** 2).sum() / (4 * jnp.pi)
        student = norm @ _kernel_from_fourth_order(direction @ direction.T) @ norm
        between = (norm @ _kernel_from_fourth_order(direction)).sum()
        teacher = units * _kernel_from_fourth_order(jnp.ones(()))
        return (zeroth + first + second + (student - 2 * between + teacher)) / 2

    return Problem(
        init=lambda key: jax.random.normal(key, (units, units)) / math.sqrt(units),
        loss=loss,
        name=f"safran-shamir, {units} units",
        loss_cap=(units / 2 + units * (units - 1) / (2 * math.pi)) / 2,
        solved={"loss": 1e-3},
        defaults=dict(
            learning_rate=float(f"{2 / units:.3g}"),
            rates=quarter_decades(0.2 / units, 12),
            steps=300 * units,
            init_scales=(0.1, 1.0, 2.0),
        ),
    )
