"""Holds a value in the sharding of another, where the partitioner would be free to choose.

JAX had `jax.experimental.shard_alike` for this up to 0.11.0; the operation of the partitioner
that it stood for is still there, and this is its primitive.
"""

import itertools

import jax
from jax.extend.core import Primitive
from jax.extend.mlir.dialects import sdy
from jax.interpreters import ad, batching, mlir


def shard_alike(value: jax.Array, like: jax.Array) -> jax.Array:
    """`value`, in the sharding that `like` turns out to have. Shapes must be equal.

    The partitioner groups arrays by the code that they come from: a jitted function that is
    called for two models within one program ties the shardings of the two together.
    """
    if jax.device_count() == 1:
        return value  # Nothing to hold, and an annotation costs compile time.
    return _shard_alike_p.bind(reshard_alike(value, like), like)


def reshard_alike(value: jax.Array, like: jax.Array) -> jax.Array:
    """`value`, in the sharding that is part of `like`'s type: on Explicit axes alone."""
    held = jax.typeof(like).sharding
    return value if jax.typeof(value).sharding == held else jax.sharding.reshard(value, held)


_shard_alike_p = Primitive("momentum_jax_shard_alike")
_shard_alike_p.def_impl(lambda value, like: value)
_shard_alike_p.def_abstract_eval(lambda value, like: value)
_group_ids = itertools.count()


def _lower(ctx, value, like):
    del ctx
    # Without Shardy, JAX's partitioner from 0.7 on, the choice is left to its predecessor.
    if jax.config.values.get("jax_use_shardy_partitioner", True):
        group = next(_group_ids)
        sdy.ShardingGroupOp(value, group)
        sdy.ShardingGroupOp(like, group)
    return [value]


def _batch(arguments, dimensions):
    value, like = arguments
    value_dimension, like_dimension = dimensions
    if value_dimension == like_dimension:
        value = _shard_alike_p.bind(value, like)
    return value, value_dimension


def _differentiate(primals, tangents):
    return _shard_alike_p.bind(*primals), tangents[0]


# Cached, one lowering would serve all leaves of a shape, and put them all into one group.
mlir.register_lowering(_shard_alike_p, _lower, cacheable=False)
batching.primitive_batchers[_shard_alike_p] = _batch
ad.primitive_jvps[_shard_alike_p] = _differentiate
