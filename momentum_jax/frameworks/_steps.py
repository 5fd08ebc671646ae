"""The steps that the recipes of the frameworks are made of: weight decay, learning rate, chain.

Inside `chain` all steps compute at least float32 wide, and a missing gradient is None.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from momentum_jax import _velocity
from momentum_jax._dispatch import inlined_jit
from momentum_jax._hyperparameters import Hyperparameter, check_value, is_zero, resolve
from momentum_jax._placement import in_memory_of, on_device
from momentum_jax._recurrence import incremented


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
        if _velocity.is_absent(g):
            return None
        g = jnp.asarray(g)
        floats = jnp.issubdtype(g.dtype, jnp.inexact)
        return g.astype(np.promote_types(g.dtype, np.float32)) if floats else g

    def narrowed(g, update):
        return g if _velocity.is_absent(g) else update.astype(jnp.asarray(g).dtype)

    def update(updates, state, params=None, **extra_args):
        mu = extra_args.get("mu")
        if mu is not None and not has_velocity and not is_zero(check_value("mu", mu)):
            raise ValueError(
                f"mu={mu} has no effect, because without momentum there is no velocity. Create the "
                "transformation with a momentum; jnp.zeros([]) starts without."
            )
        _velocity.check_arrays("gradient", updates)
        if params is not None and not has_velocity:
            _check_params(updates, params)
        wide = jax.tree.map(widened, updates, is_leaf=_velocity.is_absent)
        moved, state = tx.update(wide, state, params, **extra_args)
        return jax.tree.map(narrowed, updates, moved, is_leaf=_velocity.is_absent), state

    return optax.GradientTransformationExtraArgs(tx.init, update)


def negate() -> optax.GradientTransformation:
    """Flips the gradients: g <- -g."""
    return optax.stateless(lambda updates, _: jax.tree.map(jnp.negative, updates))


def scale(learning_rate: Hyperparameter) -> optax.GradientTransformationExtraArgs:
    """Scales the gradients: g <- -learning_rate * g."""

    def step(updates, params, rate):
        del params

        def leaf(path, g):
            _velocity.check_gradient_dtype(path, g.dtype, np.promote_types(g.dtype, np.float32))
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


def _by_rate(learning_rate, step: Callable[..., Any]):
    """The transformation step(updates, params, rate); a call of update may override the rate."""
    scheduled = callable(learning_rate)

    def init(params):
        del params
        zero = jnp.zeros([], jnp.int32)
        return optax.ScaleByScheduleState(zero) if scheduled else optax.EmptyState()

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
    treedef, pairs = _velocity.zip_leaves("gradients", updates, "params", params)

    def leaf(path, g, w):
        if g is None:
            return None
        g, w = _velocity.expect_pair("gradient", path, g, "param", w)
        _velocity.check_gradient_dtype(path, g.dtype, w.dtype, "param")
        return _decayed_leaf(g, w, *factors)

    return treedef.unflatten(leaf(*pair) for pair in pairs)


@inlined_jit
def _decayed_leaf(g, w, *factors):
    given = g
    g, w = on_device((g, w))
    dtype = np.promote_types(g.dtype, w.dtype)
    product = w.astype(dtype)
    for factor in factors:
        product = jnp.asarray(factor, dtype) * product
    total = _velocity.take_in(g, w).astype(dtype) + product
    return in_memory_of(given, _velocity.give_out(total))


@inlined_jit
def _scaled_leaf(g, rate):
    return -jnp.asarray(rate, g.dtype) * g


def _check_params(grads, params):
    """Checks the gradients against the params, where there is no velocity to check against."""
    for path, g, w in _velocity.zip_leaves("gradients", grads, "params", params)[1]:
        if not _velocity.is_absent(g):
            g, w = _velocity.expect_pair("gradient", path, g, "param", w)
            _velocity.check_gradient_dtype(path, g.dtype, w.dtype, "param")
