"""Moves arrays into the places of others: into their dtypes, shapes, shardings and devices."""

import contextlib
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer
from jax.experimental import multihost_utils

from momentum_jax import _velocity
from momentum_jax._dispatch import group_of, jit_by_leaf, replicated
from momentum_jax._jax import inlined_jit
from momentum_jax._placement import (
    isolate,
    isolate_input,
    replicate,
    shard_like,
    to_device_memory,
    to_memory_of,
)
from momentum_jax._storage import Stored, codec_of, compute_dtype

# Compiled, because outside jit no new array can be made on an Explicit mesh, as decoding does.
decode = inlined_jit(_velocity.decode)
any_nonzero = inlined_jit(jnp.any)


def any_velocity_nonzero(velocities: Iterable[Any]) -> Any:
    """Whether a velocity is not 0; traced if one of them is traced."""
    velocities = list(velocities)
    if any(isinstance(x, Tracer) for x in velocities):
        return jnp.any(jnp.stack([jnp.any(x != 0) for x in velocities]))
    return any(bool(any_nonzero(x)) for x in velocities)


class Move(NamedTuple):
    """One array to move into the place of another.

    Attributes:
      source: the array to move.
      target: the array in that place. It gives dtype, shape and sharding; if the shapes differ, it
        also gives the values where they do not overlap.
      was_velocity: whether the source is stored by a codec.
      is_velocity: whether the target is stored by a codec.
      is_converted: whether the source is multiplied by the factor.
    """

    source: Stored
    target: Stored
    was_velocity: bool
    is_velocity: bool
    is_converted: bool = False


def move_arrays(moves: Sequence[Move], factor: Any) -> tuple[list[Stored], list[Any]]:
    """Makes the moves, in one program or in one program per group of devices.

    Returns:
      The new content of each place; and how many values of each were finite before and are no
      longer, or None where no value can become non-finite.
    """
    if not moves:
        return [], []
    targets = [jax.tree.map(jnp.asarray, move.target) for move in moves]
    sources = [
        _brought_to(target, jax.tree.map(jnp.asarray, move.source))
        for move, target in zip(moves, targets, strict=True)
    ]
    modes = tuple(move[2:] for move in moves)
    # Arrays that are not committed to a device are computed on the default one: make it theirs.
    free = [x for x in jax.tree.leaves(targets) if not isinstance(x, Tracer) and not x.committed]
    with jax.default_device(next(iter(free[0].devices()))) if free else contextlib.nullcontext():
        return _moved((modes,), (targets, sources), factor)[0]


def cast_like(target: Any, value: Any) -> Any:
    """Returns a value in the dtype of the target, and in its shape and sharding.

    The value is a scalar or has the target's shape.
    """
    target = jnp.asarray(target)
    if jnp.issubdtype(target.dtype, jax.dtypes.extended):
        data = jnp.copy(jax.random.key_data(value))
        value = jax.random.wrap_key_data(data, impl=jax.random.key_impl(value))
        if isinstance(target, Tracer) or not target.committed:
            return value
        return jax.device_put(value, target.sharding)
    if isinstance(value, Tracer) or isinstance(target, Tracer):
        return jnp.broadcast_to(value, target.shape).astype(target.dtype)
    value = np.broadcast_to(to_host(value), target.shape).astype(target.dtype)
    if target.weak_type and not target.ndim:
        return jnp.asarray(value.item())
    return put_like(target, value)


def put_like(target: jax.Array, value: np.ndarray) -> jax.Array:
    """Returns a NumPy array as a JAX array in the sharding of the target."""
    if not target.committed:  # Stay uncommitted, free to follow other arrays.
        (device,) = target.devices()
        with jax.default_device(device):
            return jnp.asarray(value)
    if target.is_fully_addressable:
        return jax.device_put(value, target.sharding)
    return jax.make_array_from_callback(value.shape, target.sharding, value.__getitem__)


def to_host(array: Any) -> np.ndarray:
    """Returns the whole array as NumPy; if several processes share it, in each of them."""
    if isinstance(array, jax.Array) and not (
        array.is_fully_addressable or array.is_fully_replicated
    ):
        array = multihost_utils.process_allgather(array, tiled=True)
    return np.asarray(array)


def _brought_to(target, source):
    """Returns the source on the target's devices and mesh."""
    if isinstance(source.values, Tracer) or isinstance(target.values, Tracer):
        return source
    if group_of(source.values) == group_of(target.values):
        return source
    scales = source.scales
    if scales is not None:
        scales = _put_beside(target.values if target.scales is None else target.scales, scales)
    return Stored(_put_beside(target.values, source.values), scales)


def _put_beside(target, x):
    if not target.committed:
        return put_like(target, to_host(x))
    sharding = target.sharding if x.shape == target.shape else replicated(target.sharding)
    same_devices = x.sharding.device_set == sharding.device_set
    if same_devices or (x.is_fully_addressable and sharding.is_fully_addressable):
        return jax.device_put(x, sharding)
    x = to_host(x)
    return jax.make_array_from_callback(x.shape, sharding, x.__getitem__)


@jit_by_leaf
def _moved(static, trees, factor):
    (modes,), (targets, sources) = static, trees
    results = [
        (Stored(None), None) if target.values is None else _moved_leaf(target, source, mode, factor)
        for target, source, mode in zip(targets, sources, modes, strict=True)
    ]
    stored, counts = zip(*results, strict=True)
    return (list(stored), list(counts)), ()


def _moved_leaf(target, source, mode, factor):
    was_velocity, is_velocity, is_converted = mode
    given_target = target
    target, source = to_device_memory((target, source))
    is_copy = was_velocity == is_velocity and not is_converted
    if is_copy and _types(source) == _types(target):
        return to_memory_of(given_target, jax.tree.map(_copied_like, source, target)), None
    value = codec_of(source).decode(source) if was_velocity else source.values
    before = value
    if is_converted:
        dtype = compute_dtype(value.dtype)
        value = jnp.asarray(factor, dtype) * value.astype(dtype)
    if value.shape != target.values.shape:
        base = codec_of(target).decode(target) if is_velocity else target.values
        before = value = _overlapping(value, base)
    if is_velocity:
        stored = _velocity.encode(value, target)
    else:
        stored = Stored(value.astype(target.values.dtype))
    stored = jax.tree.map(_copied_like, stored, target)
    no_longer_finite = None
    if is_converted or _may_overflow(value.dtype, stored.values.dtype):
        after = codec_of(stored).decode(stored) if is_velocity else stored.values
        no_longer_finite = jnp.sum(
            jnp.isfinite(isolate_input(before, after)) & ~jnp.isfinite(isolate(after))
        )
    return to_memory_of(given_target, stored), no_longer_finite


def _types(stored):
    return [(x.shape, x.dtype) for x in jax.tree.leaves(stored)]


def _copied_like(x, target):
    return shard_like(jnp.copy(x), target)


def _may_overflow(before, after):
    return jnp.issubdtype(before, jnp.inexact) and jnp.promote_types(before, after) != after


def _overlapping(value, base):
    """Returns the base, with the value where both shapes overlap."""
    dtype = jnp.promote_types(value.dtype, base.dtype)
    sizes = [min(pair) for pair in zip(value.shape, base.shape, strict=True)]
    value = lax.slice(replicate(value.astype(dtype)), [0] * len(sizes), sizes)
    return lax.dynamic_update_slice(replicate(base.astype(dtype)), value, [0] * len(sizes))
