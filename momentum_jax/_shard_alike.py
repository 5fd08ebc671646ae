"""Holds a value in the sharding of another, where the partitioner would be free to choose.

JAX had `jax.experimental.shard_alike` for this up to 0.11.0; the operation of the partitioner
that it stood for is still there, and this is its primitive.
"""

import itertools
import math
import weakref
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.extend.mlir.dialects import sdy
from jax.interpreters import ad, batching, mlir
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P


def shard_alike(value: jax.Array, like: jax.Array, *, apart: bool = False) -> jax.Array:
    """`value`, in the sharding that `like` turns out to have. Shapes must be equal.

    With `apart` it is a copy that is held so: what it is made of keeps a sharding of its own.

    The partitioner groups arrays by the code that they come from: a jitted function that is
    called for two models within one program ties the shardings of the two together.
    """
    if jax.device_count() == 1:
        return value  # Nothing to hold, and an annotation costs compile time.
    if AxisType.Manual in jax.typeof(like).sharding.mesh.axis_types:
        return value  # Within shard_map: the partitioner has no groups beside manual axes.
    return _shard_alike_p.bind(reshard_alike(value, like), like, apart=apart)


def reshard_alike(value: jax.Array, like: jax.Array) -> jax.Array:
    """`value`, in the sharding that is part of `like`'s type: on Explicit axes alone."""
    held = jax.typeof(like).sharding
    if held.mesh.empty or jax.typeof(value).sharding == held:
        return value
    return jax.sharding.reshard(value, held)


def along_blocks(value: jax.Array, like: jax.Array, axis: int, block: int) -> jax.Array:
    """`value`, split as `like` is where that cuts all from this axis on between blocks, or whole.

    All from the axis on are taken in a row. On Explicit axes alone; of others the partitioner
    finds a way.
    """
    held = jax.typeof(like).sharding
    if not is_explicit(held.mesh):
        return value
    names = held.spec[axis]
    parts = math.prod(held.mesh.shape[name] for name in axes(names))
    if math.prod(like.shape[axis:]) % (parts * block) or any(held.spec[axis + 1 :]):
        names = None
    return jax.sharding.reshard(value, NamedSharding(held.mesh, P(*held.spec[:axis], names)))


def reshape(value: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """What is split along an axis goes on to be, by place: axes after it are split or joined."""
    held = jax.typeof(value).sharding
    if not is_explicit(held.mesh):
        return value.reshape(shape)
    return jnp.reshape(
        value, shape, out_sharding=NamedSharding(held.mesh, P(*held.spec[: len(shape)]))
    )


def is_explicit(mesh: Mesh | AbstractMesh) -> bool:
    """Whether shardings over the mesh are part of types."""
    return AxisType.Explicit in mesh.axis_types


def axes(*entries: Any) -> Iterator[str]:
    """The names of the axes in the entries of a PartitionSpec."""
    for entry in entries:
        if isinstance(entry, str):
            yield entry
        elif isinstance(entry, tuple):
            yield from entry


_shard_alike_p = Primitive("momentum_jax_shard_alike")
_shard_alike_p.def_impl(lambda value, like, apart: value)
_shard_alike_p.def_abstract_eval(lambda value, like, apart: value)
# Each program counts from 0, so that one function gives one text: the compilation cache's key.
_group_ids: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()


def _lower(ctx, value, like, *, apart):
    # Without Shardy, JAX's partitioner from 0.7 on, the choice is left to its predecessor. Two
    # exported programs may meet in a third, where their groups would be taken for one another.
    module = ctx.module_context
    if (
        jax.config.values.get("jax_use_shardy_partitioner", True)
        and not module.lowering_parameters.for_export
    ):
        if apart:
            value = sdy.PropagationBarrierOp(value, sdy.PropagationDirection.NONE).result
        group = next(_group_ids.setdefault(module.module, itertools.count()))
        sdy.ShardingGroupOp(value, group)
        sdy.ShardingGroupOp(like, group)
    return [value]


def _batch(arguments, dimensions, **how):
    value, like = arguments
    value_dimension, like_dimension = dimensions
    if None in dimensions:
        return value, value_dimension
    value = jnp.moveaxis(value, value_dimension, like_dimension)
    return _shard_alike_p.bind(value, like, **how), like_dimension


def _differentiate(primals, tangents, **how):
    return _shard_alike_p.bind(*primals, **how), tangents[0]


# Cached, one lowering would serve all leaves of a shape, and put them all into one group.
mlir.register_lowering(_shard_alike_p, _lower, cacheable=False)
batching.primitive_batchers[_shard_alike_p] = _batch
ad.primitive_jvps[_shard_alike_p] = _differentiate
