"""Converts between the states of `momentum` and `trace`.

    v <- mu * v - learning_rate * g        velocity of `momentum`
    m <- mu * m + g                        velocity of `trace`

At a constant learning rate v = -learning_rate * m.
"""

from typing import Any

import optax

from momentum_jax._hyperparameters import check_value, is_zero
from momentum_jax._momentum import MomentumState, TraceState
from momentum_jax._states import Conversion, carry_velocities
from momentum_jax.frameworks import _carry, _counts


def momentum_from_trace(
    opt_state: optax.OptState, trace_state: optax.OptState, *, learning_rate: float
) -> Any:
    """Fills a state of `momentum` with the velocity of `trace`: v = -learning_rate * m.

    This is exact if the learning rate was constant. After a schedule, the velocity of `momentum`
    would hold each gradient times the learning rate of its own step. The state of `trace` does
    not contain these learning rates, so the result is the velocity of a run in which the learning
    rate had always been the present one.

    Args:
      opt_state: the state to fill: what init returned, from a transformation that contains a
        `momentum`.
      trace_state: the state of a transformation that contains a `trace`.
      learning_rate: the present learning rate, above 0.

    Returns:
      `opt_state` with velocity and count filled.

    Raises:
      ValueError: the learning rate is not above 0; shapes or paths do not match; a state holds
        what `momentum_jax.frameworks` refuses to drop.

    Example:
      >>> import jax.numpy as jnp, momentum_jax as mj
      >>> from momentum_jax.frameworks import momentum_from_trace
      >>> trace_state = mj.TraceState(count=jnp.array(3), trace=jnp.array([2.0]))
      >>> state = mj.momentum(0.5).init(jnp.zeros(1))
      >>> print(momentum_from_trace(state, trace_state, learning_rate=0.5).velocity)
      [-1.]
    """
    conversion = Conversion(MomentumState, TraceState, -_above_zero(learning_rate))
    return _converted(opt_state, trace_state, "trace_state", conversion)


def trace_from_momentum(
    opt_state: optax.OptState, momentum_state: optax.OptState, *, learning_rate: float
) -> Any:
    """Fills a state of `trace` with the velocity of `momentum`: m = -v / learning_rate.

    This is exact if the learning rate was constant. After a schedule, the velocity of `trace`
    would hold the gradients without learning rates. The state of `momentum` does not contain
    these gradients: each was multiplied by the learning rate of its own step. The next update is
    the same in any case. If the learning rate changes later, the old gradients are scaled
    differently.

    Args:
      opt_state: the state to fill: what init returned, from a transformation that contains a
        `trace`.
      momentum_state: the state of a transformation that contains a `momentum`.
      learning_rate: the present learning rate, above 0.

    Returns:
      `opt_state` with velocity and count filled.

    Raises:
      ValueError: the learning rate is not above 0; shapes or paths do not match; a state holds
        what `momentum_jax.frameworks` refuses to drop.

    Example:
      >>> import jax.numpy as jnp, momentum_jax as mj
      >>> from momentum_jax.frameworks import trace_from_momentum
      >>> momentum_state = mj.MomentumState(count=jnp.array(3), velocity=jnp.array([-1.0]))
      >>> state = mj.trace(0.9).init(jnp.zeros(1))
      >>> print(trace_from_momentum(state, momentum_state, learning_rate=0.5).trace)
      [2.]
    """
    conversion = Conversion(TraceState, MomentumState, -1 / _above_zero(learning_rate))
    return _converted(opt_state, momentum_state, "momentum_state", conversion)


def _converted(opt_state, source, name, conversion):
    _carry.check_nothing_lost(opt_state, "opt_state")
    velocities = _carry.source_velocities(source, name, conversion.old_type)
    _carry.check_same_params(_carry.velocities(opt_state, conversion.new_type), velocities)
    count = _counts.taken_count(source)
    _counts.check_count_fits(opt_state, count, conversion.new_type)
    return carry_velocities(source, opt_state, count, conversion)


def _above_zero(learning_rate):
    value = check_value("learning_rate", learning_rate)
    if is_zero(value):
        raise ValueError(
            "learning_rate=0 must be above 0: at 0, v = -learning_rate * m is 0 for every m. Give "
            "the learning rate of the last step that moved the params."
        )
    return float(value)
