"""How a velocity is held: zeros like a param, widened to compute, narrowed once to store.

The rules for one leaf live here and nowhere else: what counts as no gradient, which dtype
a velocity has, how wide the arithmetic is, which sharding a result keeps. What is computed,
the recurrence, is handed in.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer
from jax.sharding import SingleDeviceSharding

from momentum_jax import _narrow
from momentum_jax._narrow import is_quantized as is_quantized
from momentum_jax._narrow import read as read
from momentum_jax._placement import give_out, is_explicit, reshard_like
from momentum_jax._placement import hold_like as hold_like
from momentum_jax._placement import take_in as take_in

PyTree = Any
# (velocity, grad, *coefficients) -> (velocity, update): arrays of one dtype.
Recurrence = Callable[..., tuple[jax.Array, jax.Array]]

_ARRAYS = (jax.Array, np.ndarray, np.generic, bool, int, float, complex)

# Compiled when called from Python; within another program, operations of that program. From
# JAX 0.11 `inline=True` would make a function of that program, with one lowering for equal calls.
_inline = getattr(jax, "Inline", None)
inlined_jit = functools.partial(jax.jit, inline=_inline.JAX_EARLY if _inline else True)

_HELD = tuple(np.dtype(t) for t in (jnp.float32, jnp.float64, jnp.bfloat16, jnp.float16, jnp.int8))

_LEAVE_OUT = (
    "To leave the param out, give None as its gradient or update, or give it "
    "optax.set_to_zero() with optax.partition (optax.masked alone would pass the gradient on "
    "as its update)."
)


# What may have gone wrong where two trees do not match.
_REMEDIES = {
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
    if dtype is None or dtype not in _HELD:
        raise TypeError(
            f"velocity_dtype={velocity_dtype!r} must be None or one of "
            f"{', '.join(map(str, _HELD))}. Under optax.inject_hyperparams, name it in static_args."
        )
    return dtype


def check_arrays(name: str, tree: PyTree) -> None:
    """Raises a TypeError that names the first leaf that is no array."""
    if all(isinstance(leaf, _ARRAYS) for leaf in jax.tree.leaves(tree)):
        return
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        if not isinstance(leaf, _ARRAYS):
            remedy = (
                "Call it: what counts is the array that it returns"
                if name == "gradient" and callable(leaf)
                else "Give the arrays alone, for example equinox.filter(model, "
                "equinox.is_inexact_array), and join the result with equinox.combine"
            )
            raise TypeError(
                f"the {name} {at(path)} is {type(leaf).__name__}, not an array. {remedy}."
            )


def concrete(params: PyTree) -> PyTree:
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
            f"the param {at(path)} has dtype {dtype}, which no velocity can have. Leave it out "
            "with optax.masked, or give None in its place."
        )
    if not isinstance(param, jax.ShapeDtypeStruct):
        return param
    # The sharding of an array that is bound to no device names the one where it happens to be.
    if param.sharding in (None, SingleDeviceSharding(jax.local_devices()[0])):
        return jnp.zeros(param.shape, dtype)
    zeros = jnp.zeros(param.shape, dtype, device=param.sharding)
    if not isinstance(zeros, Tracer):
        return zeros
    # Under jit, `device` alone is no constraint.
    mesh = getattr(param.sharding, "mesh", None)
    if mesh is not None and is_explicit(mesh):
        return jax.sharding.reshard(zeros, param.sharding)
    return jax.lax.with_sharding_constraint(zeros, param.sharding)


def zeros(params: PyTree, velocity_dtype: np.dtype | None) -> PyTree:
    """A velocity at rest: zeros of each param's shape, in its sharding."""

    def at_rest(path, param):
        param = jnp.asarray(param)
        dtype = _held_dtype(path, param, velocity_dtype)
        if dtype == np.int8 and jnp.issubdtype(param.dtype, jnp.inexact):
            blocks = _narrow.blocks(param, _narrow.scales_shape(param.shape))
            return _narrow.Quantized(
                zeros_like(param, dtype),
                zeros_like(jnp.max(blocks, axis=(-2, -1)), np.dtype(np.uint32)),
                jnp.zeros([], np.uint32),
            )
        return zeros_like(param, dtype)

    return jax.tree_util.tree_map_with_path(at_rest, params)


def zeros_like(param: jax.Array, dtype: np.dtype) -> jax.Array:
    """Zeros of the param's shape, in its sharding."""
    # Arrays in the memory of the host cannot be compared.
    space = getattr(jax.typeof(param), "memory_space", None)
    is_on_host = space is not None and space != jax.memory.Space.Device
    param = jax.device_put(param, jax.memory.Space.Device) if is_on_host else param
    # Under jit, fresh zeros would be whole on each device, and invariant within shard_map.
    zero = jnp.zeros((), dtype)
    zeros = jnp.where(param == jnp.zeros((), param.dtype), zero, zero)
    zeros = hold_like(zeros, param, backward=True)
    return jax.device_put(zeros, space) if is_on_host else zeros


def advance(
    recurrence: Recurrence,
    grads: PyTree,
    velocity: PyTree,
    coefficients: Sequence[Any],
    count: jax.Array,
    place: tuple[Any, ...] = (),
) -> tuple[PyTree, PyTree]:
    """Advances each leaf that has a gradient by one step; returns (updates, velocity).

    Updates have the dtypes of the gradients, the new velocity those of the old one. What is
    rounded by chance depends on the count and the path, which begins with the velocity's place.
    """

    def leaf(path, grad, held):
        if is_absent(grad):
            return grad, held
        grad, held = arrays("gradient", path, grad, "velocity", held)
        _check_gradient_dtype(path, grad.dtype, _dtype(held))
        seed = _narrow.make_seed((*place, *path), count) if _narrow.needs_seed(held) else None
        return _advance_leaf(recurrence, grad, held, seed, *coefficients)

    treedef, pairs = zip_leaves("gradients", grads, "velocity", velocity)
    results = [leaf(*pair) for pair in pairs]
    updates, velocities = zip(*results, strict=True) if results else ((), ())
    return treedef.unflatten(updates), treedef.unflatten(velocities)


def advance_together(
    recurrence: Recurrence,
    grads: PyTree,
    velocities: Sequence[PyTree],
    coefficients: Sequence[Sequence[Any]],
    count: jax.Array,
) -> tuple[PyTree, tuple[PyTree, ...]]:
    """Advances several velocities by the same gradients; the updates are the mean of theirs."""

    def widened(grad):
        grad = grad if is_absent(grad) else jnp.asarray(grad)
        floats = not is_absent(grad) and jnp.issubdtype(grad.dtype, jnp.inexact)
        return grad.astype(_wide(grad.dtype)) if floats else grad

    def mean(grad, *updates):
        if is_absent(grad):
            return grad
        return jnp.asarray(sum(updates) / len(updates), jnp.asarray(grad).dtype)

    wide = jax.tree.map(widened, grads, is_leaf=is_absent)
    pairs = [
        advance(recurrence, wide, velocity, each, count, (jax.tree_util.SequenceKey(index),))
        for index, (velocity, each) in enumerate(zip(velocities, coefficients, strict=True))
    ]
    updates, advanced = zip(*pairs, strict=True)
    return jax.tree.map(mean, grads, *updates, is_leaf=is_absent), advanced


def scale(held: Any, factor: Any, mask: Any) -> Any:
    """`factor * held` where the mask says so; 0 if the factor is, whatever was held."""
    like = jnp.asarray(held.codes if is_quantized(held) else held)
    mask = jnp.asarray(mask)
    if mask.ndim:
        mask = take_in(mask, like)
    else:
        mask = reshard_like(jnp.broadcast_to(mask, like.shape), like)
    if is_quantized(held):
        return _narrow.scale(held, factor, mask)
    held = like
    if not jnp.issubdtype(held.dtype, jnp.inexact):
        return held
    dtype = _wide(held.dtype)
    factor = jnp.asarray(factor, dtype)
    scaled = jnp.where(factor == 0, jnp.zeros((), dtype), factor * held.astype(dtype))
    return jnp.where(mask, scaled.astype(held.dtype), held)


def inner_product(grads: PyTree, held: PyTree) -> jax.Array:
    """The sum of `grad * held` over all leaves that have a gradient; real, at least float32."""
    return inner_products(grads, held)[1]


def inner_products(grads: PyTree, held: PyTree) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The sums of `grad^2`, `grad * held` and `held^2` over all leaves that have a gradient."""
    totals = [jnp.zeros((), jnp.float32)] * 3
    for products in inner_products_by_leaf(grads, held).values():
        width = np.promote_types(totals[0].dtype, products[0].dtype)
        totals = [a.astype(width) + b.astype(width) for a, b in zip(totals, products, strict=True)]
    gg, gh, hh = totals
    return gg, gh, hh


def inner_products_by_leaf(
    grads: PyTree, held: PyTree
) -> dict[str, tuple[jax.Array, jax.Array, jax.Array]]:
    """The same sums for each leaf that has a gradient, by its path."""
    found = {}
    for path, grad, leaf in zip_leaves("gradients", grads, "velocity", held)[1]:
        if is_absent(grad):
            continue
        grad, leaf = arrays("gradient", path, grad, "velocity", leaf)
        leaf = read(leaf)
        _check_gradient_dtype(path, grad.dtype, leaf.dtype)
        dtype = np.promote_types(_wide(grad.dtype), _wide(leaf.dtype))
        grad, leaf = take_in(grad.astype(dtype), leaf), leaf.astype(dtype)
        pairs = ((grad, grad), (grad, leaf), (leaf, leaf))
        found[jax.tree_util.keystr(path)] = tuple(jnp.sum(jnp.real(a.conj() * b)) for a, b in pairs)
    return found


def with_value(held: Any, value: Any) -> Any:
    """A velocity of another value in the dtype of what is held."""
    if is_quantized(held):
        # On the host, for outside jit nothing new can be made on an Explicit mesh.
        value, seed = np.asarray(value), np.asarray(held.seed)
        return _narrow.quantize(jnp.asarray(value), held.scales.shape, seed)
    return np.asarray(value).astype(held.dtype)


def replaced(held: PyTree, updates: PyTree) -> PyTree:
    """The updates in the dtypes of what is held, which stays where there is no update."""

    def leaf(path, update, held):
        if is_absent(update):
            return held
        update, held = arrays("update", path, update, "velocity", held)
        return hold_like(update.astype(held.dtype), held)

    treedef, pairs = zip_leaves("updates", updates, "velocity", held)
    return treedef.unflatten(leaf(*pair) for pair in pairs)


def add(params: PyTree, updates: PyTree) -> PyTree:
    """`params + updates`, each param keeping its dtype, weak type and sharding."""

    def leaf(path, update, param):
        if is_absent(update):
            return param
        update, param = arrays("update", path, update, "param", param)
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


@functools.partial(inlined_jit, static_argnums=0)
def _advance_leaf(recurrence, grad, held, seed, *coefficients):
    velocity = read(held)
    dtype = np.promote_types(_wide(grad.dtype), _wide(velocity.dtype))
    coefficients = (jnp.asarray(coefficient, dtype) for coefficient in coefficients)
    wide_grad = take_in(grad, velocity).astype(dtype)
    velocity, update = recurrence(velocity.astype(dtype), wide_grad, *coefficients)
    return give_out(update.astype(grad.dtype)), _narrow.store(velocity, held, seed)


@inlined_jit
def _add_leaf(param, update):
    update = take_in(update, param)
    if jnp.issubdtype(param.dtype, jnp.inexact):
        dtype = np.promote_types(_wide(param.dtype), _wide(update.dtype))
        total = (param.astype(dtype) + update.astype(dtype)).astype(param.dtype)
    else:
        total = param + update.astype(param.dtype)
    if param.weak_type:  # A Python number: a strong result would be a new type to trace.
        total = param.at[...].set(total)
    return total


def _wide(dtype):
    """The dtype to compute in: the same kind, at least float32 wide."""
    if jnp.issubdtype(dtype, jnp.complexfloating):
        return np.dtype(dtype)
    return np.dtype(np.float64 if dtype == np.float64 else np.float32)


def _held_dtype(path, param, velocity_dtype):
    param_dtype = param.dtype
    if not jnp.issubdtype(param_dtype, jnp.inexact):
        return param_dtype  # Never moved: a real gradient for it is refused.
    if velocity_dtype is None:
        return _wide(param_dtype)
    if velocity_dtype == np.float64 and not jax.config.read("jax_enable_x64"):
        raise ValueError(
            "velocity_dtype=float64 needs 64-bit mode, or JAX would make it float32. Set "
            "jax.config.update('jax_enable_x64', True) first."
        )
    if jnp.issubdtype(param_dtype, jnp.complexfloating):
        raise TypeError(
            f"the param {at(path)} is {param_dtype}, which velocity_dtype={velocity_dtype} "
            "cannot hold. Leave velocity_dtype=None for it (optax.partition separates them)."
        )
    if velocity_dtype == np.int8 and param.size < _narrow.SMALLEST:
        return _wide(param_dtype)
    return velocity_dtype


def shape_of(held: Any) -> tuple[int, ...]:
    """The shape of the param whose velocity it is."""
    return np.shape(held.codes if is_quantized(held) else held)


def _dtype(held):
    """Of the values that are held, not of what stands for them."""
    return np.dtype(np.float32) if is_quantized(held) else held.dtype


def zip_leaves(
    name: str, tree: PyTree, other_name: str, other: PyTree
) -> tuple[Any, list[tuple[Any, Any, Any]]]:
    """The structure of `tree`, and (path, leaf, what `other` has in its place) a leaf."""
    leaves, treedef = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_absent)
    try:
        others = treedef.flatten_up_to(other)
    except (ValueError, TypeError) as error:
        raise ValueError(_difference(name, tree, other_name, other)) from error
    return treedef, [(path, leaf, o) for (path, leaf), o in zip(leaves, others, strict=True)]


def _difference(name, tree, other_name, other):
    def paths(tree):
        leaves = jax.tree_util.tree_leaves_with_path(
            tree, is_leaf=lambda node: is_absent(node) or is_quantized(node)
        )
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
        f"{_REMEDIES[name]}"
    )


def arrays(
    name: str, path: tuple[Any, ...], leaf: Any, other_name: str, other: Any
) -> tuple[jax.Array, Any]:
    """Both as arrays of one shape; raises a ValueError that names the path if they are not."""
    if not jax.tree_util.all_leaves([other], is_leaf=is_quantized) or other is None:
        raise ValueError(
            f"the {name} {at(path)} is an array, but the {other_name} there is "
            f"{type(other).__name__}. {_REMEDIES[name + 's']}"
        )
    leaf, other = jnp.asarray(leaf), jax.tree.map(jnp.asarray, other)
    shape = shape_of(other)
    if leaf.shape != shape:
        raise ValueError(
            f"the {name} {at(path)} has shape {leaf.shape}, but the {other_name} there has "
            f"shape {shape}. They must be equal. {_REMEDIES[name + 's']}"
        )
    return leaf, other


def _check_gradient_dtype(path, grad, held):
    if not jnp.issubdtype(held, jnp.inexact):
        raise TypeError(
            f"the param {at(path)} is {held}, and a step of momentum cannot move an integer "
            f"or a boolean. {_LEAVE_OUT}"
        )
    if not jnp.issubdtype(grad, jnp.inexact):
        raise TypeError(
            f"the gradient {at(path)} is {grad}, but a gradient is a floating-point or complex "
            f"array. Convert it. {_LEAVE_OUT}"
        )
    if jnp.issubdtype(grad, jnp.complexfloating) != jnp.issubdtype(held, jnp.complexfloating):
        raise TypeError(
            f"the gradient {at(path)} is {grad}, but its velocity is {held}: a real and a "
            "complex array do not mix. Give the gradient of the param that init was called with."
        )


def _check_update_dtype(path, update, param):
    if jnp.issubdtype(param, jnp.inexact) and jnp.issubdtype(update, jnp.number):
        if jnp.issubdtype(param, jnp.complexfloating) or not jnp.issubdtype(
            update, jnp.complexfloating
        ):
            return
    elif jnp.issubdtype(param, jnp.integer) and jnp.issubdtype(update, jnp.integer):
        return
    raise TypeError(
        f"the update {at(path)} is {update}, which cannot be added to a param that is {param} "
        f"without losing part of it. {_LEAVE_OUT}"
    )


def at(path: tuple[Any, ...]) -> str:
    """Where in the tree: "at ['dense']['kernel']"."""
    return f"at {jax.tree_util.keystr(path)}" if path else "at the root of the tree"
