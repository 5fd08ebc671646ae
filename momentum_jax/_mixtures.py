"""Updates that are mixtures: quasi-hyperbolic momentum and aggregated momentum."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import optax

from momentum_jax._hyperparameters import Hyperparameter
from momentum_jax._recurrence import transformation
from momentum_jax._state_types import holds_velocity


@holds_velocity("qhm")
class QHMState(NamedTuple):
    """The state of `qhm`.

    Attributes:
      count: the number of steps taken, an int32 scalar; schedules are functions of it.
      velocity: the average of the gradients, stored like the velocity of `MomentumState`.
      scales: as in `MomentumState`.

    Example:
      >>> import jax.numpy as jnp, momentum_jax as mj
      >>> print(mj.qhm(0.1).init({"w": jnp.ones(2)}).velocity)
      {'w': Array([0., 0.], dtype=float32)}
    """

    count: jax.Array  # pyright: ignore[reportIncompatibleMethodOverride]  (a tuple has one too)
    velocity: Any
    scales: Any = None


@holds_velocity("aggmo", several=True)
class AggMoState(NamedTuple):
    """The state of `aggmo`.

    Attributes:
      count: the number of steps taken, an int32 scalar; schedules are functions of it.
      velocity: a tuple of trees, one for each mu, each stored like the velocity of
        `MomentumState`.
      scales: None, or with velocity_dtype int8 a tuple of trees, each as in `MomentumState`.

    Example:
      >>> import jax.numpy as jnp, momentum_jax as mj
      >>> print(mj.aggmo(0.1, mus=(0.0, 0.9)).init(jnp.ones(2)).velocity)
      (Array([0., 0.], dtype=float32), Array([0., 0.], dtype=float32))
    """

    count: jax.Array  # pyright: ignore[reportIncompatibleMethodOverride]
    velocity: Any
    scales: Any = None


def _quasi_hyperbolic(v, g, learning_rate, mu, nu):
    v = mu * v + (1 - mu) * g
    return v, -learning_rate * ((1 - nu) * g + nu * v)


def qhm(
    learning_rate: Hyperparameter,
    mu: Hyperparameter = 0.999,
    nu: Hyperparameter = 0.7,
    *,
    velocity_dtype: Any = None,
) -> optax.GradientTransformationExtraArgs:
    """Quasi-hyperbolic momentum: an average of gradient descent and momentum.

        v <- mu * v + (1 - mu) * g
        update = -learning_rate * ((1 - nu) * g + nu * v)

    With nu = 0 it is gradient descent. With nu = 1 it is momentum, and with nu = mu Nesterov's
    momentum, both with a learning rate of learning_rate * (1 - mu). `momentum_jax.theory` has the
    settings that make it a PID controller, AccSGD, a synthesized Nesterov variant, robust momentum
    or triple momentum.

    Args:
      learning_rate: as for `momentum`, but larger by the factor 1 / (1 - mu), because the velocity
        is an average. A part of each gradient changes the params directly, with the learning rate
        (1 - nu) * learning_rate. Plain gradient descent must be stable at this learning rate.
      mu: as for `momentum`.
      nu: the weight of the velocity in the update: like mu, a float, a scalar array or a schedule.
        Finite.
      velocity_dtype: as for `momentum`.

    Returns:
      An Optax transformation like that of `momentum`, whose state is a `QHMState`. `update` takes
      `learning_rate`, `mu` and `nu` as overriding keywords.

    Raises:
      ValueError, TypeError: as for `momentum`.

    Example:
      >>> import jax.numpy as jnp, momentum_jax as mj
      >>> tx = mj.qhm(learning_rate=1.0, mu=0.5, nu=0.5)
      >>> state = tx.init(jnp.zeros(1))
      >>> for _ in range(2):
      ...     updates, state = tx.update(jnp.ones(1), state)
      ...     print(updates)
      [-0.75]
      [-0.875]

    Source:
      Ma and Yarats (2019), Quasi-hyperbolic momentum and Adam for deep learning, equations 3, 4.
    """
    given = {"learning_rate": learning_rate, "mu": mu, "nu": nu}
    return transformation(QHMState, _quasi_hyperbolic, velocity_dtype, given)


def _aggregated(velocities, g, learning_rate, **mus):
    velocities = tuple(mus[f"mus[{k}]"] * v - learning_rate * g for k, v in enumerate(velocities))
    return velocities, sum(velocities) / len(velocities)


def aggmo(
    learning_rate: Hyperparameter,
    mus: Sequence[Hyperparameter] = (0.0, 0.9, 0.99),
    *,
    velocity_dtype: Any = None,
) -> optax.GradientTransformationExtraArgs:
    """Aggregated momentum: the mean of several velocities, each with its own mu.

        v_k <- mu_k * v_k - learning_rate * g        for each of K mus
        update = (v_1 + ... + v_K) / K

    Velocities with a large mu accelerate; velocities with a small mu damp the oscillations. The
    paper uses mu_k = 1 - 0.1^k for k = 0, 1, ..., K - 1.

    Args:
      learning_rate: as for `momentum`.
      mus: one or more momentum coefficients, each as for `momentum`.
      velocity_dtype: as for `momentum`, for each of the velocities.

    Returns:
      An Optax transformation like that of `momentum`, whose state is an `AggMoState`. `update`
      takes `learning_rate` and `mus` as overriding keywords.

    Raises:
      ValueError, TypeError: as for `momentum`; no mus; an override with another number of mus.

    Example:
      >>> import jax.numpy as jnp, momentum_jax as mj
      >>> tx = mj.aggmo(learning_rate=1.0, mus=(0.0, 0.5))
      >>> state = tx.init(jnp.zeros(1))
      >>> for _ in range(2):
      ...     updates, state = tx.update(jnp.ones(1), state)
      ...     print(updates)
      [-1.]
      [-1.25]

    Source:
      Lucas, Sun, Zemel and Grosse (2019), Aggregated momentum: stability through passive
      damping, equation 4.
    """
    mus = _check_sequence(mus)

    def by_name(overrides):
        given = overrides.get("mus")
        if given is None:
            return overrides
        if len(_check_sequence(given)) != len(mus):
            raise ValueError(
                f"mus has {len(given)} values, but the state has {len(mus)} velocities. "
                "Give as many as when the transformation was made."
            )
        return overrides | _each(given)

    return transformation(
        AggMoState,
        _aggregated,
        velocity_dtype,
        {"learning_rate": learning_rate, **_each(mus)},
        velocities=len(mus),
        by_name=by_name,
    )


def _each(mus):
    return {f"mus[{i}]": mu for i, mu in enumerate(mus)}


def _check_sequence(mus):
    if isinstance(mus, (int, float)) or not isinstance(mus, Sequence) or len(mus) == 0:
        raise ValueError(
            f"mus={mus!r} must be a tuple of one or more momentum coefficients, for example "
            "(0.0, 0.9, 0.99)."
        )
    return mus
