"""Steps over trees of velocities: what counts as no gradient, which trees and dtypes match.

How one leaf is stored is in `_storage`. What is computed, the recurrence, is handed in.
"""

import functools
import operator
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer
from jax.sharding import SingleDeviceSharding

from momentum_jax._dispatch import inlined_jit
from momentum_jax._placement import give_out, in_memory_of, is_explicit, on_device, reshard_like
from momentum_jax._placement import hold_like as hold_like
from momentum_jax._placement import take_in as take_in
from momentum_jax._placement import zeros_like as zeros_like
from momentum_jax._storage import (
    BLOCKS,
    CAST,
    CODECS,
    WIDE,
    Stored,
    codec_for,
    codec_of,
    compute_dtype,
    decoded_dtype,
    seed_of,
)

PyTree = Any
# (velocity, gradient, **hyperparameters) -> (velocity, update): arrays of one dtype.
Recurrence = Callable[..., tuple[Any, Any]]

ARRAYS = (jax.Array, np.ndarray, np.generic, bool, int, float, complex)

_LEAVE_OUT = (
    "To leave the param out, give None as its gradient or update, or give it "
    "optax.set_to_zero() with optax.partition (optax.masked alone would pass the gradient on "
    "as its update)."
)


SAME_PARAMS = "Call update with the params that init was given, or init again if they change."

# What may have gone wrong where two trees do not match.
_HINTS = {
    "params": SAME_PARAMS,
    "params of the last step": SAME_PARAMS,
    "gradients": "Call init with the very params that are differentiated and updated, again if "
    "they change, and give None where a param has no gradient.",
    "updates": "Give the first of what update returned for these params: "
    "`updates, state = tx.update(grads, state, params)`.",
}


def check_dtype(velocity_dtype: Any) -> np.dtype | None:
    """The factory's `velocity_dtype` as a NumPy dtype, or None."""
    if velocity_dtype is None:
        return None
    try:
        # An array has a dtype and is none; None would be NumPy's float64.
        is_array = isinstance(velocity_dtype, (jax.Array, np.ndarray, np.generic))
        dtype = None if is_array else np.dtype(velocity_dtype)
    except TypeError:
        dtype = None
    if dtype is None or dtype not in CODECS:
        raise TypeError(
            f"velocity_dtype={velocity_dtype!r} must be None or one of "
            f"{', '.join(map(str, CODECS))}. Under optax.inject_hyperparams name it in static_args."
        )
    return dtype


def check_arrays(name: str, tree: PyTree) -> None:
    """Raises a TypeError that names the first leaf that is no array."""
    if all(isinstance(leaf, ARRAYS) for leaf in jax.tree.leaves(tree)):
        return
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        if not isinstance(leaf, ARRAYS):
            remedy = (
                "Call it: what counts is the array that it returns"
                if name == "gradient" and callable(leaf)
                else "Give the arrays alone, for example equinox.filter(model, "
                "equinox.is_inexact_array), and join the result with equinox.combine"
            )
            raise TypeError(
                f"the {name} {path_text(path)} is {type(leaf).__name__}, not an array. {remedy}."
            )


def materialize(params: PyTree) -> PyTree:
    """The params, with zeros in place of each `jax.ShapeDtypeStruct`, in its sharding.

    Raises a TypeError that names the first leaf for which there can be no velocity.
    """
    params = jax.tree_util.tree_map_with_path(_stand_in, params)
    check_arrays("param", params)
    return params


def _stand_in(path, param):
    dtype = getattr(param, "dtype", None)
    if dtype is not None and not jnp.issubdtype(dtype, jnp.number) and dtype != np.bool_:
        raise TypeError(
            f"the param {path_text(path)} has dtype {dtype}, which no velocity can have. Leave it "
            "out with optax.masked, or give None in its place."
        )
    if not isinstance(param, jax.ShapeDtypeStruct):
        return param
    sharding: Any = param.sharding
    # An array that is not committed to a device has the sharding of one that is. On the default
    # device it is taken as not committed, as arrays are that were made without naming a device.
    if sharding is None or sharding == SingleDeviceSharding(_default_device()):
        return jnp.zeros(param.shape, dtype)
    # Eager, `device` takes no memory kind of a single device.
    on_device = sharding.with_memory_kind(None) if sharding.memory_kind else sharding
    zeros = jnp.zeros(param.shape, dtype, device=on_device)
    if isinstance(zeros, Tracer):
        # Under jit, `device` alone is no constraint, and a constraint has no memory kind.
        mesh = getattr(sharding, "mesh", None)
        explicit = mesh is not None and is_explicit(mesh)
        put = jax.sharding.reshard if explicit else jax.lax.with_sharding_constraint
        zeros = put(zeros, on_device)
    return zeros if on_device == sharding else jax.device_put(zeros, sharding)


def _default_device():
    config: Any = jax.config
    device = config.jax_default_device
    if isinstance(device, str):
        return jax.local_devices(backend=device)[0]
    return device or jax.local_devices()[0]


def zeros(params: PyTree, velocity_dtype: np.dtype | None) -> Stored:
    """A velocity of zeros, each of its param's shape and in its sharding."""

    def at_start(path, param):
        param = jnp.asarray(param)
        _check_storable(path, param, velocity_dtype)
        codec, dtype = codec_for(param, velocity_dtype)
        return codec.init(param, dtype)

    leaves = jax.tree_util.tree_map_with_path(at_start, params)
    values, scales = (
        jax.tree.map(operator.itemgetter(i), leaves, is_leaf=lambda node: isinstance(node, Stored))
        for i in range(2)
    )
    return Stored(values, None if velocity_dtype != np.int8 else scales)


def advance(
    recurrence: Recurrence,
    is_tuple: bool,
    grads: PyTree,
    several: Sequence[Stored],
    hyperparameters: dict[str, Any],
    count: jax.Array,
    velocity_dtype: np.dtype | None,
) -> tuple[PyTree, Sequence[Stored]]:
    """Advances each leaf that has a gradient by one step; returns the updates and what to store.

    Of one velocity the recurrence is given the array, of several (`is_tuple`) a tuple. Updates have
    the dtypes of the gradients, what is stored those that it had. The random bits of stochastic
    rounding depend on the count.
    """
    seed = seed_of(count)

    def leaf(path, grad, row):
        if is_absent(grad):
            return grad, row
        checked = []
        for one in row:
            grad, values = expect_pair("gradient", path, grad, "velocity", one.values)
            checked.append(one._replace(values=values))
            check_gradient_dtype(path, grad.dtype, decoded_dtype(checked[-1]))
            _check_stored(path, checked[-1], velocity_dtype)
        step = _advance_shared_leaf if codec_of(checked[0]).is_shared else _advance_leaf
        try:
            return step(recurrence, is_tuple, grad, checked, seed, hyperparameters)
        except RecurrenceError as error:
            raise TypeError(f"{error} (for the param {path_text(path)})") from None

    zipped = [zip_leaves("gradients", grads, "velocity", stored.values) for stored in several]
    treedef, found = zipped[0]
    columns = [
        with_scales(treedef, [values for _, _, values in leaves], stored.scales)
        for (_, leaves), stored in zip(zipped, several, strict=True)
    ]
    rows = zip(*columns, strict=True)
    results = [leaf(path, grad, row) for (path, grad, _), row in zip(found, rows, strict=True)]
    advanced = [
        together(treedef, [row[i] for _, row in results], stored)
        for i, stored in enumerate(several)
    ]
    return treedef.unflatten(update for update, _ in results), advanced


class RecurrenceError(TypeError):
    """A recurrence that does not return what it must."""


def leaves_of(stored: Stored) -> tuple[list[tuple[Any, Stored]], Any]:
    """Each leaf with its path, and the structure of the tree."""
    found, treedef = jax.tree_util.tree_flatten_with_path(stored.values)
    leaves = with_scales(treedef, [values for _, values in found], stored.scales)
    return [(path, one) for (path, _), one in zip(found, leaves, strict=True)], treedef


def with_scales(treedef: Any, values: Sequence[Any], scales: PyTree) -> list[Stored]:
    """The leaves of a velocity, each with its scales, if there are any."""
    if scales is None:
        return [Stored(one) for one in values]
    try:
        found = treedef.flatten_up_to(scales)
    except (ValueError, TypeError) as error:
        raise ValueError(
            "the velocity and its scales must be trees of one structure. Give the state that init "
            "or the last update returned."
        ) from error
    return [Stored(*pair) for pair in zip(values, found, strict=True)]


def together(treedef: Any, leaves: Sequence[Stored], like: Stored) -> Stored:
    """The tree of these leaves, with scales if `like` has them."""
    values, scales = zip(*leaves, strict=True) if leaves else ((), ())
    return Stored(
        treedef.unflatten(values), None if like.scales is None else treedef.unflatten(scales)
    )


def decode(stored: Stored) -> PyTree:
    """A velocity as floats."""
    leaves, treedef = leaves_of(stored)
    return treedef.unflatten(
        in_memory_of(one.values, codec_of(one).decode(on_device(one))) for _, one in leaves
    )


def rescale(stored: Stored, factor: Any, masks: PyTree, count: jax.Array) -> Stored:
    """`factor * stored` where the mask of a leaf says so; 0 if the factor is, whatever it was."""
    # Of states that were stacked, by vmap or scan, there are several counts.
    seed = seed_of(jnp.max(jnp.asarray(count)))

    def leaf(one, mask):
        given = jax.tree.map(jnp.asarray, one)
        one, mask = on_device((given, jnp.asarray(mask)))
        if mask.ndim:
            mask = take_in(mask, one.values)
        else:
            mask = reshard_like(jnp.broadcast_to(mask, one.values.shape), one.values)
        return in_memory_of(given, codec_of(one).rescale(one, jnp.asarray(factor), mask, seed))

    leaves, treedef = leaves_of(stored)
    pairs = zip(leaves, treedef.flatten_up_to(masks), strict=True)
    return together(treedef, [leaf(one, mask) for (_, one), mask in pairs], stored)


def inner_product(grads: PyTree, held: PyTree, name: str = "velocity") -> jax.Array:
    """The sum of `grad * held` over all leaves that have a gradient; real, at least float32."""
    total = jnp.zeros((), jnp.float32)
    for path, grad, leaf in zip_leaves("gradients", grads, name, held)[1]:
        if is_absent(grad):
            continue
        grad, leaf = _wide(name, path, grad, leaf)
        product = jnp.sum(jnp.real(grad.conj() * leaf))
        width = np.promote_types(total.dtype, product.dtype)
        total = total.astype(width) + product.astype(width)
    return total


class Products(NamedTuple):
    """The sums of `grad^2`, `grad * held` and `held^2`, where floats hold no square of theirs.

    Attributes:
      gg: the first, of the gradients divided by 2^g_exponent.
      gh: the second, of both divided by theirs.
      hh: the third, of what is held divided by 2^h_exponent.
      g_exponent: so that the largest gradient is near 1 when divided; an int32 scalar.
      h_exponent: the same of what is held.
    """

    gg: jax.Array
    gh: jax.Array
    hh: jax.Array
    g_exponent: jax.Array
    h_exponent: jax.Array


def products(
    grads: PyTree, held: PyTree, exponents: tuple[jax.Array, jax.Array] | None = None
) -> PyTree:
    """The `Products` of each leaf that has a gradient, in a tree like the gradients.

    With exponents, of the gradients and of what is held, these are used: the arrays are read once.
    """
    treedef, found = zip_leaves("gradients", grads, "velocity", held)

    def leaf(path, grad, one):
        if is_absent(grad):
            return None
        grad, one = _wide("velocity", path, grad, one)
        return _products(_real_parts(grad), _real_parts(one), exponents or (None, None))

    return treedef.unflatten(leaf(*each) for each in found)


def exponents(grads: PyTree, held: PyTree) -> tuple[jax.Array, jax.Array]:
    """Those of the largest gradient and of the largest that is held, where there is a gradient.

    As `exponent_of` has it, the least of the dtype where the largest is 0 or not finite.
    """
    _, found = zip_leaves("gradients", grads, "velocity", held)
    pairs = [_wide("velocity", *each) for each in found if not is_absent(each[1])]
    grads, held = zip(*pairs, strict=True) if pairs else ((), ())
    return _exponent_of_all(grads), _exponent_of_all(held)


def _exponent_of_all(leaves):
    parts = [part for x in leaves for part in _real_parts(x) if part.size]
    width = jnp.result_type(jnp.float32, *parts)
    largest = [jnp.max(jnp.abs(part)).astype(width) for part in parts]
    return exponent_of(functools.reduce(jnp.maximum, largest, jnp.zeros((), width)))


def sum_of_products(several: Iterable[Products]) -> Products:
    """The `Products` over all leaves."""
    zero, exponent = jnp.zeros((), jnp.float32), jnp.zeros((), jnp.int32)
    several = list(several) or [Products(zero, zero, zero, exponent, exponent)]
    return functools.reduce(_sum_of_two, several)


def times_power_of_2(x: jax.Array, exponent: jax.Array) -> jax.Array:
    """`x * 2^exponent`, rounded once, also where floats do not hold the power."""
    info = jnp.finfo(x.dtype)
    for _ in range(3):
        part = jnp.clip(exponent, info.minexp, info.maxexp - 1)
        exponent = exponent - part
        x = x * _power_of_2(part, info)
    return x


def _power_of_2(exponent, info):
    bits = (exponent.astype(f"int{info.bits}") - (info.minexp - 1)) << info.nmant
    return jax.lax.bitcast_convert_type(bits, info.dtype)


def exponent_of(x: jax.Array) -> jax.Array:
    """The whole number e with 2^e <= |x| < 2^(e + 1); the least of the dtype for 0, inf and NaN."""
    x = jax.lax.stop_gradient(x)
    usual = jnp.isfinite(x) & (x != 0)
    exponent = jnp.frexp(jnp.where(usual, x, jnp.ones_like(x)))[1].astype(jnp.int32) - 1
    return jnp.where(usual, exponent, jnp.int32(jnp.finfo(x.dtype).minexp))


def _sum_of_two(first, second):
    width = np.promote_types(first.gg.dtype, second.gg.dtype)
    g = jnp.maximum(first.g_exponent, second.g_exponent)
    h = jnp.maximum(first.h_exponent, second.h_exponent)
    least = jnp.int32(jnp.finfo(width).minexp)

    def powers(each):
        # One factor after the other: what is infinite stays so, and is no NaN.
        by_g, by_h = (
            times_power_of_2(jnp.ones((), width), jnp.maximum(exponent, least))
            for exponent in (each.g_exponent - g, each.h_exponent - h)
        )
        gg, gh, hh = (x.astype(width) for x in each[:3])
        return gg * by_g * by_g, gh * by_g * by_h, hh * by_h * by_h

    gg, gh, hh = (a + b for a, b in zip(powers(first), powers(second), strict=True))
    return Products(gg, gh, hh, g, h)


# The most by which the powers of `_products` are apart.
_APART = 3


def _products(grad_parts, held_parts, exponents):
    info = jnp.finfo(grad_parts[0].dtype)

    def exponent_for(parts, exponent):
        if exponent is None:
            largest = [jnp.max(jnp.abs(x), initial=0) for x in parts]
            exponent = exponent_of(functools.reduce(jnp.maximum, largest))
        # So that each factor below is a normal number; what is left is at most 2^5.
        limit = -info.minexp - _APART
        return jnp.clip(exponent, -limit, limit)

    g, h = map(exponent_for, (grad_parts, held_parts), exponents)

    def summed(apart, *pair):
        # Each sum divides by other powers, whose product is the same: an array that two of the
        # sums had in common would be written to memory and read again.
        by = [_power_of_2(shift - e, info) for (_, e), shift in zip(pair, apart, strict=True)]
        (first, _), (second, _) = pair
        found = [jnp.sum(a * by[0] * (b * by[1])) for a, b in zip(first, second, strict=True)]
        return functools.reduce(jnp.add, found)

    grads, held = (grad_parts, g), (held_parts, h)
    gg = summed((1, -1), grads, grads)
    gh = summed((2, -2), grads, held)
    hh = summed((_APART, -_APART), held, held)
    return Products(gg, gh, hh, g, h)


def _real_parts(x):
    return [jnp.real(x), jnp.imag(x)] if jnp.iscomplexobj(x) else [x]


def _wide(name, path, grad, leaf):
    """A gradient and what is held for its param, both in one wide dtype."""
    grad, leaf = expect_pair("gradient", path, grad, name, leaf)
    if leaf.dtype == np.int8 and jnp.issubdtype(grad.dtype, jnp.inexact):
        raise TypeError(
            f"the {name} {path_text(path)} is int8: codes, which mean nothing without their "
            "scales. Give momentum_jax.read_velocity(state)."
        )
    check_gradient_dtype(path, grad.dtype, leaf.dtype)
    dtype = np.promote_types(compute_dtype(grad.dtype), compute_dtype(leaf.dtype))
    grad, leaf = on_device((grad, leaf))
    return take_in(grad.astype(dtype), leaf), leaf.astype(dtype)


def encoded(value: jax.Array, one: Stored) -> Stored:
    """The value, stored as a leaf is."""
    value, one = on_device((value, one))
    value = reshard_like(value, one.values)
    return codec_of(one).encode(value, one, seed_of(jnp.uint32(0)))


def copies(params: PyTree) -> PyTree:
    """The params, in buffers of their own, in their dtypes and shardings, none weakly typed."""

    def leaf(param):
        given = jnp.asarray(param)
        param = on_device(given)
        copy = jnp.copy(param.astype(param.dtype))
        return in_memory_of(given, hold_like(copy, param, backward=True))

    return jax.tree.map(leaf, params)


def movement(params: PyTree, last: PyTree) -> tuple[PyTree, PyTree]:
    """`params - last`, at least float32; and copies of the params, of the types of `last`.

    None in place of the difference, and `last` itself, where one of them is absent.
    """

    def leaf(path, held, param):
        if is_absent(held) or is_absent(param):
            return None, held
        param, held = expect_pair("param", path, param, "param of the last step", held)
        given = held
        param, held = on_device((param, held))
        # The params are no part of the state: neither takes the other's sharding.
        param = hold_like(param, held)
        copy = in_memory_of(given, jnp.copy(param.astype(held.dtype)))
        if not jnp.issubdtype(held.dtype, jnp.inexact):
            return held, copy
        dtype = compute_dtype(held.dtype)
        return param.astype(dtype) - held.astype(dtype), copy

    treedef, found = zip_leaves("params of the last step", last, "params", params)
    pairs = [leaf(*each) for each in found]
    moved, copied = zip(*pairs, strict=True) if pairs else ((), ())
    return treedef.unflatten(moved), treedef.unflatten(copied)


def only_where(name: str, tree: PyTree, params: PyTree) -> PyTree:
    """The params, with what is in the tree in place of those for which it is absent.

    These need not be arrays: the activation functions of a model that is a tree, for example.
    """
    treedef, found = zip_leaves(name, tree, "params", params)
    params = treedef.unflatten(leaf if is_absent(leaf) else param for _, leaf, param in found)
    check_arrays("param", params)
    return params


def add(params: PyTree, updates: PyTree) -> PyTree:
    """`params + updates`, each param keeping its dtype, weak type and sharding."""

    def leaf(path, update, param):
        if is_absent(update):
            return param
        update, param = expect_pair("update", path, update, "param", param)
        _check_update_dtype(path, update.dtype, param.dtype)
        return _add_leaf(param, update)

    treedef, pairs = zip_leaves("updates", updates, "params", params)
    return treedef.unflatten(leaf(*pair) for pair in pairs)


def is_absent(grad: Any) -> bool:
    """No gradient: None, a masked node, or the float0 that JAX gives an integer input."""
    return (
        grad is None
        or isinstance(grad, optax.MaskedNode)
        or getattr(grad, "dtype", None) == jax.dtypes.float0
    )


def _advanced(recurrence, is_tuple, grad, several, seed, hyperparameters):
    given = grad, several
    grad, several = on_device(given)
    dtypes = [grad.dtype, *map(decoded_dtype, several)]
    dtype = functools.reduce(np.promote_types, map(compute_dtype, dtypes))
    hyperparameters = {name: jnp.asarray(value, dtype) for name, value in hyperparameters.items()}

    def advance(velocities, grad):
        held = tuple(velocity.astype(dtype) for velocity in velocities)
        result = recurrence(held if is_tuple else held[0], grad.astype(dtype), **hyperparameters)
        velocities, update = _checked(recurrence, is_tuple, held, result)
        return velocities, update.astype(grad.dtype)

    grad = take_in(grad, several[0].values)
    update, several = codec_of(several[0]).step(advance, grad, several, seed)
    return in_memory_of(given, (give_out(update), several))


_advance_leaf = functools.partial(inlined_jit, static_argnums=(0, 1))(_advanced)
_advance_shared_leaf = functools.partial(jax.jit, static_argnums=(0, 1))(_advanced)


def _checked(recurrence, is_tuple, held, result):
    """The new velocities and the update that a recurrence returned, as arrays like what it had."""
    name = name_of(recurrence)
    if not (isinstance(result, (tuple, list)) and len(result) == 2):
        raise RecurrenceError(
            f"{name} must return the new velocity and the update, but returned {_kind(result)}."
        )
    velocities, update = result
    if not is_tuple:
        velocities = (velocities,)
    elif not isinstance(velocities, (tuple, list)) or len(velocities) != len(held):
        raise RecurrenceError(
            f"{name} must return {len(held)} new velocities, but returned {_kind(velocities)}."
        )
    for what, found in [*(("new velocity", each) for each in velocities), ("update", update)]:
        if not isinstance(found, ARRAYS):
            raise RecurrenceError(f"{name} must return arrays, but its {what} is {_kind(found)}.")
        shape, dtype = np.shape(found), jnp.result_type(found)
        if shape != held[0].shape or dtype != held[0].dtype:
            raise RecurrenceError(
                f"{name} was given a velocity and a gradient of {held[0].dtype}"
                f"{list(held[0].shape)}, but its {what} is {dtype}{list(shape)}. Return arrays of "
                "the same shape and dtype."
            )
    return [jnp.asarray(velocity) for velocity in velocities], jnp.asarray(update)


def name_of(function: Callable[..., Any]) -> str:
    """What a function is called, for a message."""
    return getattr(function, "__qualname__", None) or repr(function)


def _kind(value):
    if isinstance(value, (tuple, list)):
        return f"{len(value)} values"
    return "one array" if isinstance(value, ARRAYS) else repr(value)


@inlined_jit
def _add_leaf(param, update):
    given = param
    param, update = on_device((param, update))
    update = take_in(update, param)
    if jnp.issubdtype(param.dtype, jnp.inexact):
        dtype = np.promote_types(compute_dtype(param.dtype), compute_dtype(update.dtype))
        total = (param.astype(dtype) + update.astype(dtype)).astype(param.dtype)
    else:
        total = param + update.astype(param.dtype)
    if param.weak_type:  # A Python number: a strong result would be a new type to trace.
        total = param.at[...].set(total)
    return in_memory_of(given, total)


def _check_storable(path, param, velocity_dtype):
    if velocity_dtype is None or not jnp.issubdtype(param.dtype, jnp.inexact):
        return
    if velocity_dtype == np.float64 and not jax.config.read("jax_enable_x64"):
        raise ValueError(
            "velocity_dtype=float64 needs 64-bit mode, or JAX would make it float32. Set "
            "jax.config.update('jax_enable_x64', True) first."
        )
    if velocity_dtype != np.int8 and jnp.issubdtype(param.dtype, jnp.complexfloating):
        raise TypeError(
            f"the param {path_text(path)} is {param.dtype}, which velocity_dtype={velocity_dtype} "
            "cannot hold. Leave velocity_dtype=None for it (optax.partition separates them)."
        )


def _check_stored(path, one, velocity_dtype):
    """Raises a TypeError unless the state stores a leaf as the transformation would."""
    dtype = one.values.dtype
    if velocity_dtype is None:
        fits = codec_of(one) is CAST
    elif velocity_dtype == np.int8:
        fits = one.scales is not None
    else:
        fits = one.scales is None and dtype == velocity_dtype
    if not fits:
        note = {BLOCKS: " codes", WIDE: ", as velocity_dtype=int8 does with some leaves"}
        raise TypeError(
            f"the state stores the velocity {path_text(path)} in "
            f"{dtype}{note.get(codec_of(one), '')}, but the transformation was made with "
            f"velocity_dtype={velocity_dtype}. Make it with the velocity_dtype of the state, or "
            "carry the velocity over: momentum_jax.transplant(state, tx.init(params))."
        )


def zip_leaves(
    name: str, tree: PyTree, other_name: str, other: PyTree
) -> tuple[Any, list[tuple[Any, Any, Any]]]:
    """The structure of `tree`, and (path, leaf, what `other` has in its place) a leaf."""
    leaves, treedef = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_absent)
    try:
        others = treedef.flatten_up_to(other)
    except (ValueError, TypeError) as error:
        raise ValueError(_structure_error(name, tree, other_name, other)) from error
    return treedef, [(path, leaf, o) for (path, leaf), o in zip(leaves, others, strict=True)]


def _structure_error(name, tree, other_name, other):
    def paths(tree):
        leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_absent)
        return {jax.tree_util.keystr(path): leaf for path, leaf in leaves}

    def only(here, there):
        missing = [path or "the root" for path in here if path not in there]
        return ", ".join(missing[:5]) + (", ..." if len(missing) > 5 else "") or "none"

    leaves, others = paths(tree), paths(other)
    if leaves.keys() == others.keys():
        what = f"the containers differ: {jax.tree.structure(tree)} and {jax.tree.structure(other)}"
    else:
        what = (
            f"only in the {name}: {only(leaves, others)}; "
            f"only in the {other_name}: {only(others, leaves)}"
        )
    return (
        f"the {name} and the {other_name} must be trees of one structure, but {what}. "
        f"{_HINTS[name]}"
    )


def expect_pair(
    name: str, path: tuple[Any, ...], leaf: Any, other_name: str, other: Any
) -> tuple[jax.Array, Any]:
    """Both as arrays of one shape; raises a ValueError that names the path if they are not."""
    if not jax.tree_util.all_leaves([other]) or other is None:
        raise ValueError(
            f"the {name} {path_text(path)} is an array, but the {other_name} there is "
            f"{type(other).__name__}. {_HINTS[name + 's']}"
        )
    leaf, other = jnp.asarray(leaf), jnp.asarray(other)
    if leaf.shape != other.shape:
        raise ValueError(
            f"the {name} {path_text(path)} has shape {leaf.shape}, but the {other_name} there has "
            f"shape {other.shape}. They must be equal. {_HINTS[name + 's']}"
        )
    return leaf, other


def check_gradient_dtype(
    path: tuple[Any, ...], grad: Any, held: Any, name: str = "velocity"
) -> None:
    """Raises a TypeError unless a gradient of a dtype can move what is held of its param."""
    if not jnp.issubdtype(held, jnp.inexact):
        raise TypeError(
            f"the param {path_text(path)} is {held}, and a step of momentum cannot move an integer "
            f"or a boolean. {_LEAVE_OUT}"
        )
    if not jnp.issubdtype(grad, jnp.inexact):
        raise TypeError(
            f"the gradient {path_text(path)} is {grad}, but a gradient is a floating-point or "
            f"complex array. Convert it. {_LEAVE_OUT}"
        )
    if jnp.issubdtype(grad, jnp.complexfloating) != jnp.issubdtype(held, jnp.complexfloating):
        raise TypeError(
            f"the gradient {path_text(path)} is {grad}, but its {name} is {held}: a real and a "
            "complex array do not mix. Give the gradient of the param that init was called with."
        )


def _check_update_dtype(path, update, param):
    if jnp.issubdtype(param, jnp.inexact) and jnp.issubdtype(update, jnp.number):
        if jnp.issubdtype(param, jnp.complexfloating) or not jnp.issubdtype(
            update, jnp.complexfloating
        ):
            return
    elif jnp.issubdtype(param, jnp.integer) and jnp.issubdtype(update, jnp.integer):
        # By their ranges: outside 64-bit mode JAX has no type that holds both int32 and uint32.
        held, added = jnp.iinfo(param), jnp.iinfo(update)
        if held.min <= added.min and added.max <= held.max:
            return
        raise TypeError(
            f"the update {path_text(path)} is {update}, which may be beyond {param}, the dtype of "
            f"the param, and would wrap around. Convert it: update.astype({param}), if its values "
            "fit."
        )
    raise TypeError(
        f"the update {path_text(path)} is {update}, which cannot be added to a param that is "
        f"{param} without losing part of it. {_LEAVE_OUT}"
    )


def path_text(path: tuple[Any, ...]) -> str:
    """Where in the tree: "at ['dense']['kernel']"."""
    return f"at {jax.tree_util.keystr(path)}" if path else "at the root of the tree"
