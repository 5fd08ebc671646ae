"""Arrays of one state into the places of another: their dtypes, shapes, shardings, devices."""

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

# Outside jit nothing new can be made on an Explicit mesh, as decoding 8 bits does.
decode = inlined_jit(_velocity.decode)
has_any = inlined_jit(jnp.any)


def has_moved(velocities: Iterable[Any]) -> Any:
    """Whether a velocity is not 0; traced if one of them is."""
    velocities = list(velocities)
    if any(isinstance(x, Tracer) for x in velocities):
        return jnp.any(jnp.stack([jnp.any(x != 0) for x in velocities]))
    return any(bool(has_any(x)) for x in velocities)


class Move(NamedTuple):
    """One array that goes into the place of another.

    Attributes:
      source: the array.
      target: what is in the place, which gives dtype, shape and sharding; where the shapes differ,
        its values where they do not overlap.
      was_velocity: whether the source is stored by a codec.
      is_velocity: whether the target is.
      is_converted: whether it is multiplied by the factor.
    """

    source: Stored
    target: Stored
    was_velocity: bool
    is_velocity: bool
    is_converted: bool = False


def moved(moves: Sequence[Move], factor: Any) -> tuple[list[Stored], list[Any]]:
    """What is then in each place, in one program, or one per group of devices.

    And how many of the values that were finite are so no more; None where all must be.
    """
    if not moves:
        return [], []
    targets = [jax.tree.map(jnp.asarray, move.target) for move in moves]
    sources = [
        _beside(jax.tree.map(jnp.asarray, move.source), target)
        for move, target in zip(moves, targets, strict=True)
    ]
    modes = tuple(move[2:] for move in moves)
    # What is bound to no device is computed on the default one: that on which it is.
    free = [x for x in jax.tree.leaves(targets) if not isinstance(x, Tracer) and not x.committed]
    with jax.default_device(next(iter(free[0].devices()))) if free else contextlib.nullcontext():
        return _moved((modes,), (targets, sources), factor)[0]


def like(target: Any, value: Any) -> Any:
    """A value in the dtype, the shape and the sharding of what it replaces, if it is a scalar."""
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
    return placed_like(target, value)


def placed_like(target: jax.Array, value: np.ndarray) -> jax.Array:
    """A value from the host, in the sharding of what it replaces."""
    if not target.committed:  # What is bound to no device stays free to follow others.
        (device,) = target.devices()
        with jax.default_device(device):
            return jnp.asarray(value)
    if target.is_fully_addressable:
        return jax.device_put(value, target.sharding)
    return jax.make_array_from_callback(value.shape, target.sharding, value.__getitem__)


def to_host(array: Any) -> np.ndarray:
    """An array whole, as NumPy; in every process, if it is sharded over several."""
    if isinstance(array, jax.Array) and not (
        array.is_fully_addressable or array.is_fully_replicated
    ):
        array = multihost_utils.process_allgather(array, tiled=True)
    return np.asarray(array)


def _beside(source, target):
    """The source where the target is: on its devices, on its mesh."""
    if isinstance(source.values, Tracer) or isinstance(target.values, Tracer):
        return source
    if group_of(source.values) == group_of(target.values):
        return source
    scales = source.scales
    if scales is not None:
        scales = _put(scales, target.values if target.scales is None else target.scales)
    return Stored(_put(source.values, target.values), scales)


def _put(x, beside):
    if not beside.committed:
        return placed_like(beside, to_host(x))
    sharding = beside.sharding if x.shape == beside.shape else replicated(beside.sharding)
    on_same = x.sharding.device_set == sharding.device_set
    if on_same or (x.is_fully_addressable and sharding.is_fully_addressable):
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
    stored, lost = zip(*results, strict=True)
    return (list(stored), list(lost)), ()


def _moved_leaf(target, source, mode, factor):
    was_velocity, is_velocity, is_converted = mode
    given = target
    target, source = to_device_memory((target, source))
    same = was_velocity == is_velocity and not is_converted
    if same and _types(source) == _types(target):
        return to_memory_of(given, jax.tree.map(_copied_like, source, target)), None
    value = codec_of(source).decode(source) if was_velocity else source.values
    before = value
    if is_converted:
        wide = compute_dtype(value.dtype)
        value = jnp.asarray(factor, wide) * value.astype(wide)
    if value.shape != target.values.shape:
        base = codec_of(target).decode(target) if is_velocity else target.values
        before = value = _overlapping(value, base)
    if is_velocity:
        stored = _velocity.encode(value, target)
    else:
        stored = Stored(value.astype(target.values.dtype))
    stored = jax.tree.map(_copied_like, stored, target)
    lost = None
    if is_converted or _narrows(value.dtype, stored.values.dtype):
        read = codec_of(stored).decode(stored) if is_velocity else stored.values
        lost = jnp.sum(jnp.isfinite(isolate_input(before, read)) & ~jnp.isfinite(isolate(read)))
    return to_memory_of(given, stored), lost


def _types(stored):
    return [(x.shape, x.dtype) for x in jax.tree.leaves(stored)]


def _copied_like(x, other):
    return shard_like(jnp.copy(x), other)


def _narrows(before, after):
    return jnp.issubdtype(before, jnp.inexact) and jnp.promote_types(before, after) != after


def _overlapping(value, base):
    """The base, with the value where both shapes overlap."""
    dtype = jnp.promote_types(value.dtype, base.dtype)
    sizes = [min(pair) for pair in zip(value.shape, base.shape, strict=True)]
    value = lax.slice(replicate(value.astype(dtype)), [0] * len(sizes), sizes)
    return lax.dynamic_update_slice(replicate(base.astype(dtype)), value, [0] * len(sizes))
