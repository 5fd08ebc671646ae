"""How a velocity is held in 16 or 8 bits: by chance too high or too low, and right on average.

Rounded to the nearest number that it can hold, a velocity stops where a step's change is smaller
than half the distance between two such numbers. Rounded by chance, it goes on: what single
steps lose and win cancels. The chance is a hash of the step's count, the leaf's path and the
position of the value in it: there is no key to carry, and a run repeats to the bit.
"""

import functools
import math
import zlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import export, lax

from momentum_jax._placement import along_blocks, hold_like, reshape, reshard_like, set_apart

# Values a block, unless the last axes have another number: 1 + 4 / 64 bytes a value.
BLOCK = 64
# Of each quarter of a block the scale takes 6 bits, and the exponent of all of them 8.
QUARTERS = 4
# Below this many values a leaf stays wide: it weighs nothing, and biases and norms are small.
SMALLEST = 4096

# Codes, in either direction, stand for f(|code| / LARGEST) of the scale, f(a) = (a + a^2) / 2:
# three times as dense around 0, where most values are, as at the scale. The code beyond is for 0,
# so that what does not move stays put.
LARGEST = 126.5
ZERO = -128
# What squaring a uniform error of one code adds on average, to be taken off again.
_EXCESS = 1 / (12 * LARGEST**2)

# The bits of a float32 mantissa that each dtype has no room for.
_DROPPED = {np.dtype(jnp.bfloat16): 16, np.dtype(jnp.float16): 13}


class Quantized(NamedTuple):
    """A velocity in 8 bits a value, and 32 bits a block of about 64 values.

        value = scale * sign(a) * f(|a|)    with a = (code - u) / 126.5, f(a) = (a + a^2) / 2 - 3e-6

    u is uniform in [-0.5, 0.5): a hash of the seed and of the value's position. It was added
    before the code was rounded, so that the code's error does not depend on the code, and the
    value's is 0 on average, to 1e-6 of the scale (subtractive dither); neither is larger than
    with the nearest code. The code -128 is 0. Each quarter of a block has a scale, above its
    largest value: one of 64 multiples of what the block's exponent stands for.

    Parts of a last axis that is split over devices should be multiples of 64 values: others are
    gathered in each step. What is not finite spoils its block, what is above 3.35e38 its quarter,
    and a block without a value above 3.8e-37 is 0.

    Attributes:
      codes: int8, of the param's shape and in its sharding.
      scales: uint32, one a block along the last axis, or along as many of the last axes as it
        takes to have 64 values. The upper 8 bits, e, are the exponent of the block's largest
        value as float32 has it; then come 6 bits, q, for each quarter, the scale of which is
        (q + 1) / 64 * 2^(e - 126).
      seed: uint32 scalar, of the step that wrote them.

    Example:
      >>> import jax.numpy as jnp, momentum_jax as mj
      >>> state = mj.momentum(0.1, velocity_dtype=jnp.int8).init(jnp.zeros((64, 128)))
      >>> print(state.velocity.codes.shape, state.velocity.scales.shape)
      (64, 128) (64, 2)

    Source:
      Dettmers, Lewis, Shleifer and Zettlemoyer (2022), 8-bit optimizers via block-wise
      quantization; Schuchman (1964), Dither signals and their effect on quantization noise.
    """

    codes: jax.Array
    scales: jax.Array
    seed: jax.Array


export.register_namedtuple_serialization(Quantized, serialized_name="momentum_jax.Quantized")


def is_quantized(node: Any) -> bool:
    """To stop at, where a tree of velocities is walked."""
    return isinstance(node, Quantized)


def needs_seed(held: Any) -> bool:
    """Whether what is stored there is rounded by chance."""
    return is_quantized(held) or held.dtype in _DROPPED


def make_seed(path: tuple[Any, ...], count: jax.Array) -> jax.Array:
    """32 bits for a leaf and a step, by the leaf's path: others may come and go."""
    leaf = np.uint32(zlib.crc32(jax.tree_util.keystr(path).encode()))
    return _mix(_mix(jnp.asarray(count).astype(np.uint32)) + leaf)


def scales_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Of the scales of a leaf of this shape."""
    axis = len(shape) - 1
    while axis > 0 and math.prod(shape[axis:]) < BLOCK:
        axis -= 1
    return (*shape[:axis], max(1, math.prod(shape[axis:]) // BLOCK))


def read(held: Any) -> jax.Array:
    """The velocity as floats."""
    if not is_quantized(held):
        return jnp.asarray(held)
    codes, scales = (jnp.asarray(x) for x in (held.codes, held.scales))
    a = (codes.astype(np.float32) - _dither(held.seed, codes)) / np.float32(LARGEST)
    share = jnp.where(codes == ZERO, np.float32(0), jnp.sign(a) * _expand(jnp.abs(a)))
    # Codes and scales may be sharded unlike one another, and each keep their sharding.
    return _spread(_of_quarters(set_apart(scales)), codes) * share


def store(value: jax.Array, held: Any, seed: jax.Array | None) -> Any:
    """A new value in the dtype, the blocks and the sharding of what is held."""
    if is_quantized(held):
        stored = quantize(value, held.scales.shape, seed)
        return Quantized(stored.codes, hold_like(stored.scales, held.scales), stored.seed)
    if seed is not None:
        value = round_by_chance(value, _noise(seed, value), held.dtype)
    return value.astype(held.dtype)


def quantize(value: jax.Array, shape: tuple[int, ...], seed: Any) -> Quantized:
    """The codes of a velocity, and scales of this shape."""
    value = lax.stop_gradient(value).astype(np.float32)
    seed = jnp.asarray(seed, np.uint32)
    # Not every backend's maximum lets a NaN through.
    size = jnp.where(jnp.isfinite(value), jnp.abs(value), np.float32(np.inf))
    scales = _scales(size, shape)
    scale = _spread(_of_quarters(scales), value)
    share = size / jnp.where(scale > 0, scale, np.float32(1))
    code = jnp.sign(value) * LARGEST * _compress(share)
    code = jnp.clip(jnp.floor(code + _dither(seed, value) + 0.5), -127, 127)
    code = jnp.where(size == 0, np.float32(ZERO), code)
    code = jnp.where(jnp.isfinite(value), code, np.float32(127))
    return Quantized(code.astype(np.int8), scales, seed)


def blocks(value: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """By block, quarter and place there, after the axes that scales of this shape have before.

    The last ones are filled up with zeros.
    """
    length = math.prod(value.shape[len(shape) - 1 :])
    quarter = _quarter(length, shape)
    value = along_blocks(value, value, len(shape) - 1, BLOCK)
    value = reshape(value, (*shape[:-1], length))
    padding = [(0, 0)] * (len(shape) - 1) + [(0, QUARTERS * quarter * shape[-1] - length)]
    return reshape(jnp.pad(value, padding), (*shape, QUARTERS, quarter))


def scale(held: Quantized, factor: jax.Array, mask: jax.Array) -> Quantized:
    """`factor * held` where the mask says so; blocks without any such value keep their bits."""
    value = read(held)
    factor = jnp.asarray(factor, np.float32)
    scaled = jnp.where(factor == 0, np.float32(0), factor * value)
    stored = store(jnp.where(mask, scaled, value), held, held.seed)
    changed = jnp.any(blocks(mask, held.scales.shape), axis=(-2, -1))
    return Quantized(
        jnp.where(_spread(changed[..., None], held.codes), stored.codes, held.codes),
        jnp.where(hold_like(changed, held.scales), stored.scales, held.scales),
        held.seed,
    )


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
def round_by_chance(value: jax.Array, noise: jax.Array, dtype: np.dtype) -> jax.Array:
    """To one of the two neighbours in bfloat16 or float16, the nearer one more often.

    32 random bits a value decide; what the dtype can hold stays what it is.
    """
    value = value.astype(np.float32)
    dropped = _DROPPED[dtype]
    # Below its normal numbers float16 is evenly spaced: just as it is between 1 and 2 of the
    # least of them, where the value is brought.
    least = np.float32(jnp.finfo(dtype).tiny)
    low = (jnp.abs(value) < least) & (dtype == np.float16)
    offset = jnp.where(low, jnp.copysign(least, value), np.float32(0))
    bits = lax.bitcast_convert_type(value + offset, np.uint32)
    bits = (bits + (noise >> (32 - dropped))) >> dropped << dropped
    rounded = lax.bitcast_convert_type(bits, np.float32) - offset
    return jnp.where(jnp.isfinite(value), rounded, value).astype(dtype)


@round_by_chance.defjvp
def _round_by_chance_jvp(dtype, primals, tangents):
    return round_by_chance(*primals, dtype), tangents[0].astype(dtype)


def _mix(x):
    """A bijection of 32 bits after which each depends on all (Wellons 2018, lowbias32)."""
    x = (x ^ (x >> 16)) * np.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * np.uint32(0x846CA68B)
    return x ^ (x >> 16)


def _noise(seed, like):
    """32 random bits a value: a hash of its position in the whole array, turned by the seed.

    Integers only, and no order of evaluation: the same bits on every machine and under any
    sharding. Within shard_map the whole array is the device's own part.
    """
    position = jnp.zeros(like.shape, np.uint32)
    for axis, size in enumerate(like.shape):
        along = lax.broadcasted_iota(np.uint32, like.shape, axis)
        position = position * np.uint32(size % 2**32) + along
    return _mix(reshard_like(position, like) + seed)


def _dither(seed, like):
    """Uniform in [-0.5, 0.5)."""
    return (_noise(seed, like) >> 8).astype(np.float32) * np.float32(2**-24) - np.float32(0.5)


def _expand(a):
    return (a + (a * a - np.float32(_EXCESS))) / 2


def _compress(x):
    """The inverse of `_expand` before the excess is taken off."""
    return jnp.sqrt(np.float32(0.25) + 2 * x) - np.float32(0.5)


def _scales(size, shape):
    """The least for each quarter that are above all its values."""
    maxima = jnp.max(blocks(size, shape), axis=-1)
    exponent = lax.bitcast_convert_type(jnp.max(maxima, axis=-1), np.uint32) >> 23
    unit = _unit(exponent)[..., None]
    # Of what is not finite, NaN, for which a conversion to integers has no rule.
    multiple = jnp.where(unit < np.inf, maxima / jnp.where(unit > 0, unit, np.float32(1)), 0)
    multiple = multiple.astype(np.uint32)
    return (exponent << 24) + jnp.sum(multiple << _shifts(shape), axis=-1, dtype=np.uint32)


def _of_quarters(scales):
    multiple = (scales[..., None] >> _shifts(scales.shape)) & np.uint32(63)
    return _unit(scales >> 24)[..., None] * (multiple + np.uint32(1)).astype(np.float32)


def _shifts(shape):
    """Where in 32 bits each quarter has its 6."""
    quarter = lax.broadcasted_iota(np.uint32, (*shape, QUARTERS), len(shape))
    return np.uint32(18) - np.uint32(6) * quarter


def _unit(exponent):
    """2^-5 of the power of two that float32 has this exponent for, and so above all by 2^-6.

    0 where that would be no normal number, which backends do not agree on.
    """
    bits = jnp.where(exponent > 5, exponent - np.uint32(5), np.uint32(0)) << 23
    return lax.bitcast_convert_type(
        jnp.where(exponent == 255, np.uint32(0xFF << 23), bits), np.float32
    )


def _quarter(length, shape):
    return -(-length // (QUARTERS * shape[-1]))


def _spread(each, like):
    """To each value what its quarter has, or its block, if there is one for all four."""
    length = math.prod(like.shape[each.ndim - 2 :])
    quarter = _quarter(length, each.shape[:-1])
    # Scales may be split where values are not, and the other way round.
    each = along_blocks(each, like, each.ndim - 2, BLOCK)
    spread = jnp.broadcast_to(each[..., None], (*each.shape[:-1], QUARTERS, quarter))
    spread = reshape(spread, (*each.shape[:-2], math.prod(spread.shape[-3:])))
    return reshard_like(reshape(spread[..., :length], like.shape), like)
