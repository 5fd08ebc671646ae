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

from momentum_jax._shard_alike import reshard_alike, shard_alike, whole_from

# Values a block, unless the last axes have another number: 1 + 2 / 32 bytes a value.
BLOCK = 32
# Below this many values a leaf stays wide: it weighs nothing, and biases and norms are small.
SMALLEST = 4096

# Codes up to LARGEST, in either direction, stand for f(|code| / LARGEST) of the block's scale,
# f(a) = LINEAR * a + (1 - LINEAR) * a^2: four times as dense around 0, where most values are, as
# at the scale. The two codes beyond are for what has no error: the largest value of a block, so
# that it is not shrunk or grown by being stored, and 0, so that what does not move stays put.
LARGEST = 126
EXTREME = 127
ZERO = -128
LINEAR = 0.4
# What squaring a uniform error of one code adds on average, to be taken off again.
_EXCESS = 1 / (12 * LARGEST**2)

# The bits of a float32 mantissa that each dtype has no room for.
_DROPPED = {np.dtype(jnp.bfloat16): 16, np.dtype(jnp.float16): 13}


class Quantized(NamedTuple):
    """A velocity in 8 bits a value, and 16 bits a block of about 32 values.

        value = scale * sign(a) * f(|a|)    with a = (code - u) / 126, f(a) = 0.4 a + 0.6 a^2 - 3e-6

    u is uniform in [-0.5, 0.5): a hash of the seed and of the value's position. It was added
    before the code was rounded, so that the error is independent of the value and 0 on average
    (subtractive dither), and no larger than with the nearest code. The codes 127 and -127 are
    the block's largest value, to the bit of the scale, and -128 is 0.

    Attributes:
      codes: int8, of the param's shape and in its sharding.
      scales: uint16, the bits of a float32 after its sign, cut off after 16; one a block along
        the last axis, or along as many of the last axes as it takes to have 32 values.
      seed: uint32 scalar, of the step that wrote them.

    Example:
      >>> import jax.numpy as jnp, momentum_jax as mj
      >>> state = mj.momentum(0.1, velocity_dtype=jnp.int8).init(jnp.zeros((64, 128)))
      >>> print(state.velocity.codes.shape, state.velocity.scales.shape)
      (64, 128) (64, 4)

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
    code = codes.astype(np.float32)
    a = (code - _dither(held.seed, codes)) / LARGEST
    share = jnp.where(jnp.abs(code) == EXTREME, np.float32(1), _expand(jnp.abs(a)))
    share = jnp.where(code == ZERO, np.float32(0), share)
    return _spread(_float(scales), codes) * jnp.sign(a) * share


def store(value: jax.Array, held: Any, seed: jax.Array | None) -> Any:
    """A new value in the dtype, the blocks and the sharding of what is held."""
    if is_quantized(held):
        stored = quantize(value, held.scales.shape, seed)
        return Quantized(
            shard_alike(stored.codes, held.codes),
            shard_alike(stored.scales, held.scales),
            stored.seed,
        )
    if seed is not None:
        value = round_by_chance(value, _noise(seed, value), held.dtype)
    return shard_alike(value.astype(held.dtype), held)


def quantize(value: jax.Array, shape: tuple[int, ...], seed: Any) -> Quantized:
    """The codes of a velocity, and scales of this shape. What is not finite spoils its block."""
    value = lax.stop_gradient(value).astype(np.float32)
    seed = jnp.asarray(seed, np.uint32)
    # Not every backend's maximum lets a NaN through.
    size = jnp.where(jnp.isfinite(value), jnp.abs(value), np.float32(np.inf))
    maxima = block_maxima(size, shape)
    bits = lax.bitcast_convert_type(maxima, np.uint32)
    noise = jnp.where(jnp.isfinite(maxima), _noise(seed, maxima) >> 17, np.uint32(0))
    scales = ((bits + noise) >> 15).astype(np.uint16)

    spread = _spread(_float(scales), value)
    share = size / jnp.where(spread > 0, spread, np.float32(1))
    code = LARGEST * jnp.sign(value) * _compress(share)
    code = jnp.clip(jnp.floor(code + _dither(seed, value) + 0.5), -LARGEST, LARGEST)
    code = jnp.where(size == _spread(maxima, value), EXTREME * jnp.sign(value), code)
    code = jnp.where(size == 0, np.float32(ZERO), code)
    code = jnp.where(jnp.isfinite(value), code, np.float32(EXTREME))
    return Quantized(code.astype(np.int8), scales, seed)


def block_maxima(value: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """The largest value of each block, or 0; of the shape that the scales have."""
    return jnp.max(_blocks(value, shape), axis=-1)


def scale(held: Quantized, factor: jax.Array, mask: jax.Array) -> Quantized:
    """`factor * held` where the mask says so; blocks without any such value keep their bits."""
    value = read(held)
    factor = jnp.asarray(factor, np.float32)
    scaled = jnp.where(factor == 0, np.float32(0), factor * value)
    mask = reshard_alike(jnp.broadcast_to(mask, value.shape), value)
    stored = store(jnp.where(mask, scaled, value), held, held.seed)
    changed = jnp.any(_blocks(mask, held.scales.shape), axis=-1)
    return Quantized(
        jnp.where(_spread(changed, held.codes), stored.codes, held.codes),
        jnp.where(changed, stored.scales, held.scales),
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
    return _mix(reshard_alike(position, like) + seed)


def _dither(seed, like):
    """Uniform in [-0.5, 0.5)."""
    return (_noise(seed, like) >> 8).astype(np.float32) * np.float32(2**-24) - np.float32(0.5)


def _expand(a):
    return LINEAR * a + (1 - LINEAR) * (a * a - _EXCESS)


def _compress(x):
    """The inverse of `_expand` before the excess is taken off."""
    root = jnp.sqrt(LINEAR**2 + 4 * (1 - LINEAR) * x)
    return (root - LINEAR) / (2 * (1 - LINEAR))


def _float(scales):
    return lax.bitcast_convert_type(scales.astype(np.uint32) << 15, np.float32)


def _blocks(value, shape):
    """With an axis of its own for the values of a block, the last ones filled up with zeros."""
    length = math.prod(value.shape[len(shape) - 1 :])
    block = -(-length // shape[-1])
    if length % BLOCK:  # Blocks do not end where devices' parts do.
        value = whole_from(value, len(shape) - 1)
    value = value.reshape((*shape[:-1], length))
    padding = [(0, 0)] * (len(shape) - 1) + [(0, block * shape[-1] - length)]
    return jnp.pad(value, padding).reshape((*shape, block))


def _spread(scales, like):
    """To each value what its block has."""
    length = math.prod(like.shape[scales.ndim - 1 :])
    block = -(-length // scales.shape[-1])
    spread = jnp.broadcast_to(scales[..., None], (*scales.shape, block))
    spread = spread.reshape((*scales.shape[:-1], -1))[..., :length].reshape(like.shape)
    return reshard_alike(spread, like)
