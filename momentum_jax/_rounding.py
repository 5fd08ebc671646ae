"""Stochastic rounding to 16 bits, with random bits that are a hash, and rounding to nearest.

A value is rounded up or down with probabilities that make the result right on average. With
rounding to nearest, a velocity no longer changes when the change per step is less than half the
distance between two representable values.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from momentum_jax._placement import reshard_like


def seed_of(count: jax.Array) -> jax.Array:
    """The seed of the random bits in the step with this count: 32 bits."""
    return lowbias32(jnp.asarray(count).astype(np.int32))


def hash_bits(value: jax.Array, seed: jax.Array) -> jax.Array:
    """32 random bits for each value: a hash of the seed, its position and its upper 16 bits.

    The hash uses integer operations only, and does not depend on the order of evaluation: the bits
    are the same on every machine and under any sharding. Within shard_map the position is the
    position in the device's part of the array. The upper bits of the value make the bits of
    different leaves differ, and of different members of a vmap, without a constant per leaf in the
    program. A last bit that another machine rounds differently seldom changes them.
    """
    value = lax.convert_element_type(lax.stop_gradient(value), np.float32)
    upper = lax.shift_right_logical(lax.bitcast_convert_type(value, np.int32), np.int32(16))
    position = reshard_like(_positions(value.shape), value)
    return lowbias32(lax.bitwise_xor(lax.add(position, seed), upper))


def lowbias32(x: jax.Array) -> jax.Array:
    """Mixes 32 bits: lowbias32 (Wellons 2018) without its last step, which alters lower bits."""
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        x = lax.bitwise_xor(x, lax.shift_right_logical(x, np.int32(shift)))
        x = lax.mul(x, np.uint32(factor).view(np.int32))
    return x


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
def stochastic_round(value: jax.Array, bits: jax.Array, dtype: np.dtype) -> jax.Array:
    """Rounds to one of the two neighbours in bfloat16 or float16, to the nearer one more often.

    The upper random bits decide. A value that the dtype represents exactly does not change.
    """
    value = lax.convert_element_type(value, np.float32)
    dropped = np.int32(23 - jnp.finfo(dtype).nmant)
    offset = np.float32(0)
    if dtype == np.float16:
        # The subnormal numbers of float16 have the same spacing as its numbers between `tiny` and
        # 2 * `tiny`. The offset moves a subnormal value there.
        least = np.float32(jnp.finfo(dtype).tiny)
        low = jnp.abs(value) < least
        offset = jnp.where(low, jnp.copysign(least, value), np.float32(0))
    wide = lax.bitcast_convert_type(lax.add(value, offset), np.int32)
    wide = lax.add(wide, lax.shift_right_logical(bits, np.int32(32) - dropped))
    wide = lax.shift_left(lax.shift_right_logical(wide, dropped), dropped)
    rounded = lax.sub(lax.bitcast_convert_type(wide, np.float32), offset)
    return lax.convert_element_type(lax.select(lax.is_finite(value), rounded, value), dtype)


@stochastic_round.defjvp
def _stochastic_round_jvp(dtype, primals, tangents):
    return stochastic_round(*primals, dtype), tangents[0].astype(dtype)


def round_to_nearest(value: jax.Array, dtype: np.dtype) -> jax.Array:
    """Float32 values rounded to bfloat16 or float16, still as float32.

    XLA may remove a cast to `dtype` and back (`xla_allow_excess_precision`); it does not remove
    this.
    """
    if dtype == jnp.bfloat16:
        return lax.reduce_precision(value, exponent_bits=8, mantissa_bits=7)
    normal = lax.reduce_precision(value, exponent_bits=5, mantissa_bits=10)
    # reduce_precision makes 0 of the subnormal numbers, which are multiples of the smallest one.
    unit = np.float32(jnp.finfo(dtype).smallest_subnormal)
    low = lax.round(value / unit, lax.RoundingMethod.TO_NEAREST_EVEN) * unit
    return jnp.where(jnp.abs(value) < np.float32(jnp.finfo(dtype).tiny), low, normal)


def _positions(shape):
    """The index of each value in row-major order, times an odd constant, modulo 2^32.

    Splitting an axis in two does not change it.
    """
    position = np.int32(0)
    for axis in range(len(shape)):
        stride = np.uint32(math.prod(shape[axis + 1 :]) * 0x9E3779B1 % 2**32).view(np.int32)
        position = lax.add(position, lax.mul(lax.broadcasted_iota(np.int32, shape, axis), stride))
    return jnp.asarray(position)
