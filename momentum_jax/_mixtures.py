"""Other read-outs of one or several velocities: quasi-hyperbolic and aggregated momentum."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import export

from momentum_jax import _velocity
from momentum_jax._dispatch import by_leaf
from momentum_jax._hyperparameters import Hyperparameter, check, resolve
from momentum_jax._momentum import as_optax, incremented, inside, transformation
from momentum_jax._storage import Stored


class QHMState(NamedTuple):
    """What `qhm` carries from step to step.

    Attributes:
      count: the number of steps taken, an int32 scalar; schedules are functions of it.
      velocity: the average of the gradients, stored as that of `MomentumState`.
      scales: as in `MomentumState`.

    Example:
      >>> import jax.numpy as jnp, momentum_jax as mj
      >>> print(mj.qhm(0.1).init({"w": jnp.ones(2)}).velocity)
      {'w': Array([0., 0.], dtype=float32)}
    """

    count: jax.Array  # pyright: ignore[reportIncompatibleMethodOverride]  (a tuple has one too)
    velocity: Any
    scales: Any = None


class AggMoState(NamedTuple):
    """What `aggmo` carries from step to step.

    Attributes:
      count: the number of steps taken, an int32 scalar; schedules are functions of it.
      velocity: a tuple of trees, one for each mu, each stored as that of `MomentumState`.
      scales: None; with velocity_dtype int8 a tuple of trees, each as in `MomentumState`.

    Example:
      >>> import jax.numpy as jnp, momentum_jax as mj
      >>> print(mj.aggmo(0.1, mus=(0.0, 0.9)).init(jnp.ones(2)).velocity)
      (Array([0., 0.], dtype=float32), Array([0., 0.], dtype=float32))
    """

    count: jax.Array  # pyright: ignore[reportIncompatibleMethodOverride]
    velocity: Any
    scales: Any = None


for _state_type in (QHMState, AggMoState):
    export.register_namedtuple_serialization(
        _state_type, serialized_name=f"momentum_jax.{_state_type.__name__}"
    )


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
    """Quasi-hyperbolic momentum: a mean of plain descent and of momentum.

        v <- mu * v + (1 - mu) * g
        update = -learning_rate * ((1 - nu) * g + nu * v)

    At nu = 0 it is plain descent; at nu = 1 momentum, and at nu = mu Nesterov's, both with a
    learning rate of learning_rate * (1 - mu). `momentum_jax.theory` has the settings at which
    it is a PID controller, AccSGD, a synthesized Nesterov variant, robust or triple momentum.

    Args:
      learning_rate: as for `momentum`, but larger by 1 / (1 - mu): the velocity is an average.
        A part of (1 - nu) of it meets each gradient at once, and must be stable on its own.
      mu: as for `momentum`.
      nu: how much of the update is the velocity's, given in the same ways; finite.
      velocity_dtype: as for `momentum`.

    Returns:
      An Optax transformation like that of `momentum`, whose state is a `QHMState`; `update` takes
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
    return transformation(
        QHMState, _quasi_hyperbolic, velocity_dtype, learning_rate=learning_rate, mu=mu, nu=nu
    )


def aggmo(
    learning_rate: Hyperparameter,
    mus: Sequence[Hyperparameter] = (0.0, 0.9, 0.99),
    *,
    velocity_dtype: Any = None,
) -> optax.GradientTransformationExtraArgs:
    """Aggregated momentum: the mean of several velocities, each with a mu of its own.

        v_k <- mu_k * v_k - learning_rate * g        for each of K mus
        update = (v_1 + ... + v_K) / K

    The slow velocities accelerate, the fast ones damp their oscillations. The paper takes
    mu_k = 1 - 0.1^k for k = 0, 1, ..., K - 1.

    Args:
      learning_rate: as for `momentum`.
      mus: one or more momentum coefficients, each as for `momentum`.
      velocity_dtype: as for `momentum`; there are as many velocities as mus.

    Returns:
      An Optax transformation like that of `momentum`; its state is an `AggMoState`, and `update`
      takes `learning_rate` and `mus` as overriding keywords.

    Raises:
      ValueError, TypeError: as for `momentum`; no mus, or as an override not as many.

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
    velocity_dtype = _velocity.check_dtype(velocity_dtype)
    learning_rate = check("learning_rate", learning_rate)
    mus = _check_mus(mus)

    def init(params):
        trees, count = _init((velocity_dtype, len(mus)), (_velocity.concrete(params),))
        return _state(count, trees)

    def step(grads, state, overrides):
        if not isinstance(state.velocity, tuple) or len(state.velocity) != len(mus):
            held = len(state.velocity) if isinstance(state.velocity, tuple) else 1
            raise ValueError(
                f"the state must have a velocity for each of the {len(mus)} mus, but has {held}. "
                "Give the state that this transformation's init returned."
            )
        given = overrides.get("mus")
        if given is not None:
            _check_sequence(given)
        if given is not None and len(given) != len(mus):
            raise ValueError(
                f"mus has {len(given)} values, but the state has {len(mus)} velocities. "
                "Give as many as when the transformation was made."
            )
        rate = resolve("learning_rate", learning_rate, overrides.get("learning_rate"), state.count)
        each = [
            (rate, resolve("mu", mu, override, state.count, called=f"mus[{i}]"))
            for i, (mu, override) in enumerate(zip(mus, given or [None] * len(mus), strict=True))
        ]
        scales = state.scales or [None] * len(mus)
        trees = (grads, *state.velocity, *scales)
        (updates, *trees), count = _update((velocity_dtype,), trees, (state.count, each))
        return updates, _state(count, trees)

    return as_optax(AggMoState, init, step, velocity_dtype, learning_rate, *mus)


def _check_mus(mus):
    _check_sequence(mus)
    return tuple(check("mu", mu, called=f"mus[{i}]") for i, mu in enumerate(mus))


def _check_sequence(mus):
    if isinstance(mus, (int, float)) or not isinstance(mus, Sequence) or len(mus) == 0:
        raise ValueError(
            f"mus={mus!r} must be a tuple of one or more momentum coefficients, for example "
            "(0.0, 0.9, 0.99)."
        )


def _state(count, trees):
    """The state of K velocities, followed by the scales of each."""
    number = len(trees) // 2
    scales = trees[number:]
    return AggMoState(count, tuple(trees[:number]), None if scales[0] is None else tuple(scales))


@by_leaf
def _init(static, trees, _):
    (velocity_dtype, number), (params,) = static, trees
    several = [_velocity.zeros(params, velocity_dtype) for _ in range(number)]
    return _columns(several), jnp.zeros([], jnp.int32)


@by_leaf
def _update(static, trees, shared):
    (velocity_dtype,), (grads, *stored), (count, coefficients) = static, trees, shared
    number = len(coefficients)
    several = [Stored(*pair) for pair in zip(stored[:number], stored[number:], strict=True)]
    updates, several = _velocity.advance_together(
        inside, grads, several, coefficients, count, velocity_dtype
    )
    return (updates, *_columns(several)), incremented(count)


def _columns(several):
    """The values of each velocity, then the scales of each."""
    values, scales = zip(*several, strict=True)
    return *values, *scales
