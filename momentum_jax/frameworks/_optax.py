"""Optax's SGD, and its states: `optax_sgd`, `load_optax`, `dump_optax`."""

from typing import Any

import optax

from momentum_jax._hyperparameters import Hyperparameter, by_value, check, check_flag, is_zero
from momentum_jax._momentum import TraceState, trace
from momentum_jax._states import any_velocity_nonzero, carry_velocities
from momentum_jax.frameworks import _carry, _counts
from momentum_jax.frameworks._steps import chain, scale


def optax_sgd(
    learning_rate: Hyperparameter, momentum: Hyperparameter | None = None, nesterov: bool = False
) -> optax.GradientTransformationExtraArgs:
    """Optax's `optax.sgd`, with the state of `momentum_jax.trace`, whose dtypes never change.

        m <- momentum * m + g
        w <- w - learning_rate * m
        w <- w - learning_rate * (g + momentum * m)        with nesterov: the new m

    In float32 and float64, under jit, the result is the same to the bit (tested on CPU).

    Args:
      learning_rate: the learning rate, or a schedule of it.
      momentum: the momentum coefficient, in (-1, 1]. None means no velocity; nesterov then has
        no effect.
      nesterov: whether the update looks one step ahead.

    Returns:
      An Optax transformation.

    Raises:
      ValueError: a value is out of range.

    Example:
      >>> import jax.numpy as jnp
      >>> from momentum_jax.frameworks import optax_sgd
      >>> tx = optax_sgd(learning_rate=0.1, momentum=0.5, nesterov=True)
      >>> updates, state = tx.update(jnp.ones(1), tx.init(jnp.ones(1)))
      >>> print(updates)
      [-0.15]

    Source:
      Optax's documentation of optax.sgd and optax.trace.
    """
    learning_rate = check("learning_rate", learning_rate)
    nesterov = check_flag("nesterov", nesterov)
    mu = None if momentum is None else check("mu", momentum, display_name="momentum")
    steps = [] if mu is None else [trace(mu, nesterov=nesterov and not is_zero(mu))]
    tx = chain(*steps, scale(learning_rate), has_velocity=mu is not None)
    return by_value(tx, "optax_sgd", learning_rate, mu, nesterov)


def load_optax(
    opt_state: optax.OptState, optax_state: optax.OptState, *, count: int | None = None
) -> Any:
    """Fills a state with the velocity of `optax.sgd` or `optax.trace`.

    Args:
      opt_state: the state to fill: what init returned, from `optax_sgd` or any transformation
        that contains a `momentum_jax.trace`.
      optax_state: the state of Optax, with one or more `optax.TraceState` in it.
      count: the number of steps taken. It is needed if a schedule depends on it and no schedule
        in `optax_state` has counted it.

    Returns:
      `opt_state` with velocity and count filled; each leaf keeps its dtype and sharding. If
      neither `count` nor `optax_state` gives the count, it is 1 if the velocity is not 0, else 0.
      That is enough for constant settings.

    Raises:
      ValueError: shapes or paths do not match (the message lists both sides); a schedule needs a
        count and there is none; a state holds what `momentum_jax.frameworks` refuses to drop.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> from momentum_jax.frameworks import load_optax, optax_sgd
      >>> old, new = optax.sgd(0.1, 0.9), optax_sgd(0.1, 0.9)
      >>> _, old_state = old.update(jnp.ones(1), old.init(jnp.ones(1)))
      >>> print(load_optax(new.init(jnp.ones(1)), old_state)[0].trace)
      [1.]
    """
    _carry.check_nothing_lost(opt_state, "opt_state")
    theirs = _carry.source_velocities(optax_state, "optax_state", optax.TraceState)
    _carry.check_same_params(_carry.velocities(opt_state, TraceState), theirs)
    known = _counts.scheduled_count(optax_state) if count is None else None
    moved = any_velocity_nonzero(theirs.values())
    count = _counts.steps_taken(count, known, opt_state, moved, "the number of calls of update")
    _counts.check_count_fits(opt_state, count, TraceState)
    return carry_velocities(optax_state, opt_state, count)


def dump_optax(optax_state: optax.OptState, opt_state: optax.OptState) -> Any:
    """Fills a state of `optax.sgd` or `optax.trace` with the velocity of a state of this package.

    Args:
      optax_state: the state to fill: what init returned, with one or more `optax.TraceState` in
        it.
      opt_state: the state of `optax_sgd`, or of any transformation that contains a
        `momentum_jax.trace`.

    Returns:
      `optax_state` with the traces and the schedules' count filled.

    Raises:
      ValueError: shapes or paths do not match (the message lists both sides); a state holds what
        `momentum_jax.frameworks` refuses to drop.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> from momentum_jax.frameworks import dump_optax, optax_sgd
      >>> ours, theirs = optax_sgd(0.1, 0.9), optax.sgd(0.1, 0.9)
      >>> _, state = ours.update(jnp.ones(1), ours.init(jnp.ones(1)))
      >>> print(dump_optax(theirs.init(jnp.ones(1)), state)[0].trace)
      [1.]
    """
    _carry.check_nothing_lost(optax_state, "optax_state")
    ours = _carry.source_velocities(opt_state, "opt_state", TraceState)
    _carry.check_same_params(_carry.velocities(optax_state, optax.TraceState), ours)
    count = _counts.taken_count(opt_state)
    _counts.check_count_fits(optax_state, count, optax.TraceState)
    return carry_velocities(opt_state, optax_state, count)
