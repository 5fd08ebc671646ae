"""The step of a velocity: over a tree of leaves, compiled, and of one leaf.

`_storage` knows how a leaf is stored. The recurrence is an argument.
"""

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from momentum_jax._dispatch import jit_by_leaf
from momentum_jax._jax import inlined_jit, is_x64_enabled
from momentum_jax._leaves import (
    ARRAYS,
    check_gradient_dtype,
    expect_pair,
    map_leaves,
    path_text,
)
from momentum_jax._placement import (
    isolate_input,
    isolate_output,
    reshard_like,
    to_device_memory,
    to_memory_of,
)
from momentum_jax._rounding import seed_of
from momentum_jax._storage import (
    BLOCKS,
    CAST,
    WIDE,
    Stored,
    codec_for,
    codec_of,
    compute_dtype,
    decoded_dtype,
)

PyTree = Any
# (velocity, gradient, **hyperparameters) -> (velocity, update): arrays of one dtype.
Recurrence = Callable[..., tuple[Any, Any]]


# `start` and `advance` are compiled once for all transformations: a hyperparameter is an argument,
# not part of the program. Each of their trees is like the params, so that the arrays of one param
# have its path, as `jit_by_leaf` needs it.


@jit_by_leaf
def start(static, trees, _):
    """Velocities of 0 and the count 0.

    Args:
      static: the velocity_dtype, and the number of velocities per param.
      trees: the params.

    Returns:
      The values of each velocity and then the scales of each; and the count.
    """
    (velocity_dtype, number), (params,) = static, trees

    def leaf(path, param):
        param = jnp.asarray(param)
        _check_storable(path, param, velocity_dtype)
        codec, dtype = codec_for(param, velocity_dtype)
        return codec.init(param, dtype)

    def zeros():
        values, scales = map_leaves(
            leaf, ("params", params), absent=lambda param: (param, param), outputs=2
        )
        return Stored(values, scales if velocity_dtype == np.int8 else None)

    return columns_of([zeros() for _ in range(number)]), jnp.zeros([], jnp.int32)


@jit_by_leaf
def advance(static, trees, shared):
    """One step of each leaf that has a gradient.

    Args:
      static: the recurrence, whether it takes a tuple of velocities, and the velocity_dtype.
      trees: the gradients, the values of each velocity, and the scales of each.
      shared: the count, and the hyperparameters by name.

    Returns:
      The updates, in the gradients' dtypes, the new values and scales, in their dtypes and
      shardings; and the next count.
    """
    (recurrence, is_tuple, velocity_dtype), (grads, *columns) = static, trees
    count, hyperparameters = shared
    number, seed = len(columns) // 2, seed_of(count)
    columns = [*columns[:number], *(scales for scales in columns[number:] if scales is not None)]
    names = ["velocity", "scales"]

    def leaf(path, grad, *arrays):
        several = stored_in(arrays, number)
        for i, stored in enumerate(several):
            grad, values = expect_pair(path, "gradient", grad, "velocity", stored.values)
            several[i] = stored = stored._replace(values=values)
            check_gradient_dtype(path, grad.dtype, decoded_dtype(stored))
            _check_stored(path, stored, velocity_dtype)
        step = _shared_step_of_leaf if codec_of(several[0]).is_shared else _inlined_step_of_leaf
        try:
            update, several = step(recurrence, is_tuple, grad, several, seed, hyperparameters)
        except RecurrenceError as error:
            raise TypeError(f"{error} (for the param {path_text(path)})") from None
        return update, *columns_of(several)[: len(arrays)]

    updates, *columns = map_leaves(
        leaf,
        ("gradients", grads),
        *[(names[i // number], column) for i, column in enumerate(columns)],
        absent=lambda grad, *arrays: (grad, *arrays),
        outputs=1 + len(columns),
    )
    return (updates, *columns_of(stored_in(columns, number))), incremented(count)


def columns_of(several: Sequence[Stored]) -> tuple[Any, ...]:
    """The values of each velocity, then the scales of each."""
    values, scales = zip(*several, strict=True)
    return *values, *scales


def stored_in(columns: Sequence[Any], number: int) -> list[Stored]:
    """The reverse of `columns_of`, also for columns without scales."""
    scales = columns[number:] or [None] * number
    return [Stored(*pair) for pair in zip(columns[:number], scales, strict=True)]


def incremented(count: jax.Array) -> jax.Array:
    """The count of the next step; it stops at its largest value."""
    return jnp.asarray(optax.safe_increment(count))


def _step_of_leaf(recurrence, is_tuple, grad, several, seed, hyperparameters):
    """Decodes the velocities, widens, applies the recurrence, narrows and encodes."""
    given = grad, several
    grad, several = to_device_memory(given)
    dtypes = [grad.dtype, *map(decoded_dtype, several)]
    dtype = functools.reduce(np.promote_types, map(compute_dtype, dtypes))
    hyperparameters = {name: jnp.asarray(value, dtype) for name, value in hyperparameters.items()}

    def step(velocities, grad):
        wide = tuple(velocity.astype(dtype) for velocity in velocities)
        result = recurrence(wide if is_tuple else wide[0], grad.astype(dtype), **hyperparameters)
        velocities, update = _checked(recurrence, is_tuple, wide, result)
        return velocities, update.astype(grad.dtype)

    grad = isolate_input(grad, several[0].values)
    update, several = codec_of(several[0]).step(step, grad, several, seed)
    return to_memory_of(given, (isolate_output(update), several))


_inlined_step_of_leaf = functools.partial(inlined_jit, static_argnums=(0, 1))(_step_of_leaf)
_shared_step_of_leaf = functools.partial(jax.jit, static_argnums=(0, 1))(_step_of_leaf)


class RecurrenceError(TypeError):
    """A recurrence returned something other than the new velocity and the update."""


def _checked(recurrence, is_tuple, before, result):
    """The new velocities and the update that a recurrence returned, as arrays."""
    name = name_of(recurrence)
    if not (isinstance(result, (tuple, list)) and len(result) == 2):
        raise RecurrenceError(
            f"{name} must return the new velocity and the update, but returned {_kind(result)}."
        )
    velocities, update = result
    if not is_tuple:
        velocities = (velocities,)
    elif not isinstance(velocities, (tuple, list)) or len(velocities) != len(before):
        raise RecurrenceError(
            f"{name} must return {len(before)} new velocities, but returned {_kind(velocities)}."
        )
    for what, array in [*(("new velocity", each) for each in velocities), ("update", update)]:
        if not isinstance(array, ARRAYS):
            raise RecurrenceError(f"{name} must return arrays, but its {what} is {_kind(array)}.")
        shape, dtype = np.shape(array), jnp.result_type(array)
        if shape != before[0].shape or dtype != before[0].dtype:
            raise RecurrenceError(
                f"{name} was given a velocity and a gradient of {before[0].dtype}"
                f"{list(before[0].shape)}, but its {what} is {dtype}{list(shape)}. Return arrays "
                "of the same shape and dtype."
            )
    return [jnp.asarray(velocity) for velocity in velocities], jnp.asarray(update)


def name_of(function: Callable[..., Any]) -> str:
    """The name of a function, for an error message."""
    return getattr(function, "__qualname__", None) or repr(function)


def _kind(value):
    if isinstance(value, (tuple, list)):
        return f"{len(value)} values"
    return "one array" if isinstance(value, ARRAYS) else repr(value)


def _check_storable(path, param, velocity_dtype):
    if velocity_dtype is None or not jnp.issubdtype(param.dtype, jnp.inexact):
        return
    if velocity_dtype == np.float64 and not is_x64_enabled():
        raise ValueError(
            "velocity_dtype=float64 needs 64-bit mode, or JAX would make it float32. Set "
            "jax.config.update('jax_enable_x64', True) first."
        )
    if velocity_dtype != np.int8 and jnp.issubdtype(param.dtype, jnp.complexfloating):
        raise TypeError(
            f"the param {path_text(path)} is {param.dtype}, which velocity_dtype={velocity_dtype} "
            "cannot hold. Leave velocity_dtype=None for it (optax.partition separates them)."
        )


def _check_stored(path, stored, velocity_dtype):
    """Raises a TypeError unless the state stores the leaf as this velocity_dtype does."""
    dtype = stored.values.dtype
    if velocity_dtype is None:
        fits = codec_of(stored) is CAST
    elif velocity_dtype == np.int8:
        fits = stored.scales is not None
    else:
        fits = stored.scales is None and dtype == velocity_dtype
    if not fits:
        notes = {BLOCKS: " codes", WIDE: ", as velocity_dtype=int8 does with some leaves"}
        raise TypeError(
            f"the state stores the velocity {path_text(path)} in "
            f"{dtype}{notes.get(codec_of(stored), '')}, but the transformation was made with "
            f"velocity_dtype={velocity_dtype}. Make it with the velocity_dtype of the state, or "
            "convert the state: momentum_jax.transplant(state, tx.init(params))."
        )


# Stored velocities outside a step. ---------------------------------------------------------


def leaves_of(stored: Stored) -> tuple[list[tuple[Any, Stored]], Any]:
    """Each leaf of a stored tree with its path, and the structure of the tree."""
    found, treedef = jax.tree_util.tree_flatten_with_path(stored.values)
    scales = [None] * len(found)
    if stored.scales is not None:
        try:
            scales = treedef.flatten_up_to(stored.scales)
        except (ValueError, TypeError) as error:
            raise ValueError(
                "the velocity and its scales must be trees of one structure. Give the state that "
                "init or the last update returned."
            ) from error
    pairs = zip(found, scales, strict=True)
    return [(path, Stored(values, each)) for (path, values), each in pairs], treedef


def together(treedef: Any, leaves: Iterable[Stored], like: Stored) -> Stored:
    """The stored tree of these leaves, with scales if `like` has them."""
    leaves = list(leaves)
    values, scales = zip(*leaves, strict=True) if leaves else ((), ())
    return Stored(
        treedef.unflatten(values), None if like.scales is None else treedef.unflatten(scales)
    )


def decode(stored: Stored) -> PyTree:
    """A stored tree as floats."""
    leaves, treedef = leaves_of(stored)
    return treedef.unflatten(
        to_memory_of(one.values, codec_of(one).decode(to_device_memory(one))) for _, one in leaves
    )


def encode(value: jax.Array, like: Stored) -> Stored:
    """One array, stored as the leaf `like` is."""
    value, like = to_device_memory((value, like))
    value = reshard_like(value, like.values)
    return codec_of(like).encode(value, like, seed_of(jnp.uint32(0)))


def rescale(stored: Stored, factor: Any, masks: PyTree, count: jax.Array) -> Stored:
    """`factor * stored` where a leaf's mask is True; 0 if the factor is 0, also for NaN."""
    # A state that was stacked, by vmap or scan, has several counts.
    seed = seed_of(jnp.max(jnp.asarray(count)))

    def leaf(one, mask):
        given = jax.tree.map(jnp.asarray, one)
        one, mask = to_device_memory((given, jnp.asarray(mask)))
        if mask.ndim:
            mask = isolate_input(mask, one.values)
        else:
            mask = reshard_like(jnp.broadcast_to(mask, one.values.shape), one.values)
        return to_memory_of(given, codec_of(one).rescale(one, jnp.asarray(factor), mask, seed))

    leaves, treedef = leaves_of(stored)
    pairs = zip(leaves, treedef.flatten_up_to(masks), strict=True)
    return together(treedef, (leaf(one, mask) for (_, one), mask in pairs), stored)
