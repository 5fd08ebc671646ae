"""The steps that the recipes of the frameworks are made of: weight decay, learning rate, chain.

Inside `chain` all steps compute at least float32 wide, and a missing gradient is None.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from momentum_jax._dispatch import jit_by_leaf
from momentum_jax._hyperparameters import Hyperparameter, check_value, is_zero, resolve
from momentum_jax._jax import inlined_jit
from momentum_jax._leaves import (
    check_arrays,
    check_gradient_dtype,
    expect_pair,
    is_absent,
    map_leaves,
    materialize,
)
from momentum_jax._placement import isolate_input, isolate_output, to_device_memory, to_memory_of
from momentum_jax._velocity import incremented


def is_static_zero(value: Any) -> bool:
    """Whether a hyperparameter is 0 and a Python float.

    An array does not count, even if its value could be read: the structure of the state must not
    change when `optax.inject_hyperparams` gives a traced value in place of a known one.
    """
    return isinstance(value, float) and value == 0


def chain(*steps: Any, has_velocity: bool = True) -> optax.GradientTransformationExtraArgs:
    """The steps one after the other; each gets all extra arguments of `update`.

    The gradients are widened to at least float32, and the updates converted back to the
    gradients' dtypes. The steps see None for a missing gradient.
    """
    tx = optax.chain(*steps)

    def widened(g):
        if is_absent(g):
            return None
        g = jnp.asarray(g)
        floats = jnp.issubdtype(g.dtype, jnp.inexact)
        return g.astype(np.promote_types(g.dtype, np.float32)) if floats else g

    def narrowed(g, update):
        return g if is_absent(g) else update.astype(jnp.asarray(g).dtype)

    def update(updates, state, params=None, **extra_args):
        mu = extra_args.get("mu")
        if mu is not None and not has_velocity and not is_zero(check_value("mu", mu)):
            raise ValueError(
                f"mu={mu} has no effect, because without momentum there is no velocity. Create the "
                "transformation with a momentum; jnp.zeros([]) starts without."
            )
        check_arrays("gradient", updates)
        if params is not None and not has_velocity:
            _check_params(updates, params)
        wide = jax.tree.map(widened, updates, is_leaf=is_absent)
        moved, state = tx.update(wide, state, params, **extra_args)
        return jax.tree.map(narrowed, updates, moved, is_leaf=is_absent), state

    return optax.GradientTransformationExtraArgs(tx.init, update)


def negate() -> optax.GradientTransformation:
    """Flips the gradients: g <- -g."""
    return optax.stateless(lambda updates, _: jax.tree.map(jnp.negative, updates))


def scale(learning_rate: Hyperparameter) -> optax.GradientTransformationExtraArgs:
    """Scales the gradients: g <- -learning_rate * g."""

    def step(updates, params, rate):
        del params

        def leaf(path, g):
            check_gradient_dtype(path, g.dtype, np.promote_types(g.dtype, np.float32))
            return _scaled_leaf(g, rate)

        return jax.tree_util.tree_map_with_path(leaf, updates)

    return _by_rate(learning_rate, step)


def coupled_decay(weight_decay: Any) -> list[optax.GradientTransformation]:
    """Adds the decay to g: g <- g + weight_decay * w. An empty list if there is no decay."""
    if is_static_zero(weight_decay):
        return []
    return [optax.stateless(lambda updates, params: _decayed(updates, params, weight_decay))]


def decoupled_decay(
    weight_decay: Any, learning_rate: Hyperparameter
) -> list[optax.GradientTransformationExtraArgs]:
    """Adds the decay to the update: u <- u - learning_rate * weight_decay * w.

    An empty list if there is no decay.
    """
    if is_static_zero(weight_decay):
        return []

    def step(updates, params, rate):
        return _decayed(updates, params, -1.0, weight_decay, rate)

    return [_by_rate(learning_rate, step)]


@jit_by_leaf
def _first_count(*_):
    """The count 0, on the devices of the params."""
    return (), jnp.zeros([], jnp.int32)


def _by_rate(learning_rate, step: Callable[..., Any]):
    """The transformation step(updates, params, rate); a call of update may override the rate."""
    scheduled = callable(learning_rate)

    def init(params):
        if not scheduled:
            return optax.EmptyState()
        return optax.ScaleByScheduleState(_first_count((), (materialize(params),))[1])

    def update(updates, state, params=None, **extra_args):
        count: Any = state.count if scheduled else None
        rate = resolve("learning_rate", learning_rate, extra_args.get("learning_rate"), count)
        updates = step(updates, params, rate)
        return updates, optax.ScaleByScheduleState(incremented(count)) if scheduled else state

    return optax.GradientTransformationExtraArgs(init, update)


def _decayed(updates, params, *factors):
    """The updates plus the product of the params and the factors."""
    if params is None:
        raise ValueError("weight_decay needs the params: update(grads, state, params).")

    def leaf(path, g, w):
        g, w = expect_pair(path, "gradient", g, "param", w)
        check_gradient_dtype(path, g.dtype, w.dtype, "param")
        return _decayed_leaf(g, w, *factors)

    return map_leaves(leaf, ("gradients", updates), ("params", params))


@inlined_jit
def _decayed_leaf(g, w, *factors):
    given = g
    g, w = to_device_memory((g, w))
    dtype = np.promote_types(g.dtype, w.dtype)
    product = w.astype(dtype)
    for factor in factors:
        product = jnp.asarray(factor, dtype) * product
    total = isolate_input(g, w).astype(dtype) + product
    return to_memory_of(given, isolate_output(total))


@inlined_jit
def _scaled_leaf(g, rate):
    return -jnp.asarray(rate, g.dtype) * g


def _check_params(grads, params):
    """Checks the gradients against the params, where there is no velocity to check against."""

    def leaf(path, g, w):
        g, w = expect_pair(path, "gradient", g, "param", w)
        check_gradient_dtype(path, g.dtype, w.dtype, "param")

    map_leaves(leaf, ("gradients", grads), ("params", params))
