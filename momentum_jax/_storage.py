"""How a velocity is stored: one codec per way, which says how values are rounded.

A codec decodes what is stored to floats, and encodes a new value. What loses bits rounds
stochastically, up or down with probabilities that make it right on average: rounded to nearest,
a velocity stops where the change of a step is below half the distance of two stored values. The
random bits are a hash of the step's count, the position of the value and its own upper 16 bits:
there is no key to carry, a run repeats to the bit, and equal leaves share one compiled function.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from momentum_jax._elementwise import elementwise
from momentum_jax._placement import (
    hold_like,
    in_memory_of,
    is_split,
    merge_axes,
    on_device,
    reshard_like,
    set_apart,
    split_axis,
    zeros_like,
)

# Values that share a scale, where the axis allows it.
BLOCK = 32
# Along the last axis, and otherwise at most.
LAST_BLOCK = 128
# At least: 1 + 2 / 16 bytes per parameter.
LEAST_BLOCK = 16
# Leaves with fewer values stay wide: they need little memory, and biases and norms are small.
SMALLEST = 4096
# Blocks along the last axis that a TPU computes one by one, rather than turn the array around.
MOST_ON_LANES = 32

# A code k stands for k (|k| + 127) / (2 * 127^2) of its block's scale: with a = |k| / 127 that is
# (a + a^2) / 2, three times as dense around 0, where most values are, as at the scale.
LARGEST = 127
_UNITS = np.float32(2 * LARGEST**2)
# The least scale, 2^-100: below it, some backends have no normal numbers for the codes' units.
_LEAST_SCALE = np.float32(2**-100)
# The bits of the largest NaN that is a bfloat16.
_LARGEST_NAN = np.int32(0x7FFF0000)

# A step of one leaf: (velocities, grad) -> (velocities, update).
Advance = Callable[[Sequence[jax.Array], jax.Array], tuple[Sequence[jax.Array], jax.Array]]


class Stored(NamedTuple):
    """What is stored of a velocity, of one leaf or of a tree of them.

    Attributes:
      values: in the params' shapes: the values, or the codes that stand for them.
      scales: None, but with 8 bits a tree of the same structure: bfloat16, the largest magnitude
        in each block of codes, and int8 ones of the param's shape where the values are wide.
    """

    values: Any
    scales: Any = None


class Cast:
    """Stored in a dtype, rounded to the nearest value."""

    # Whether equal leaves share one function, traced and lowered once.
    is_shared = False

    def init(self, param: jax.Array, dtype: np.dtype) -> Stored:
        """A velocity of 0, in the param's shape and sharding."""
        return Stored(zeros_like(param, dtype))

    def decode(self, stored: Stored) -> jax.Array:
        """The velocity as floats."""
        return jnp.asarray(stored.values)

    def encode(self, value: jax.Array, stored: Stored, seed: jax.Array) -> Stored:
        """A new value, as `stored` is: in its dtypes, blocks and shardings."""
        del seed
        return stored._replace(values=value.astype(stored.values.dtype))

    def rescale(
        self, stored: Stored, factor: jax.Array, mask: jax.Array, seed: jax.Array
    ) -> Stored:
        """`factor * stored` where the mask says so, 0 if the factor is; elsewhere the same bits."""
        encoded = self.encode(_times(self.decode(stored), factor), stored, seed)
        return stored._replace(values=jnp.where(mask, encoded.values, stored.values))

    def step(
        self, advance: Advance, grad: jax.Array, several: Sequence[Stored], seed: jax.Array
    ) -> tuple[jax.Array, Sequence[Stored]]:
        """The update, and what is stored of each velocity after it."""
        values, update = advance([self.decode(stored) for stored in several], grad)
        encoded = [self.encode(*pair, seed) for pair in zip(values, several, strict=True)]
        return update, encoded


class StochasticCast(Cast):
    """Stored in bfloat16 or float16, rounded stochastically to one of the two neighbours."""

    is_shared = True

    def encode(self, value: jax.Array, stored: Stored, seed: jax.Array) -> Stored:
        """Each value that the dtype holds stays what it is."""
        bits = hash_bits(value, seed)
        return stored._replace(values=stochastic_round(value, bits, stored.values.dtype))


class Blocks(Cast):
    """Stored as int8 codes, with a bfloat16 scale for each block along one axis.

    Which axis, and how long its blocks are, is where the shapes of codes and scales differ. So
    arrays that were stacked, by vmap or scan, are read as they are.
    """

    is_shared = True

    def init(self, param: jax.Array, dtype: np.dtype) -> Stored:
        """Codes and scales of 0, in the param's sharding."""
        block = block_axis(param.shape)
        assert block is not None  # Else it is stored wide.
        view = _View(*block)
        first = lax.index_in_dim(view.split(param), 0, view.axis + 1, keepdims=False)
        return Stored(zeros_like(param, dtype), zeros_like(first, np.dtype(jnp.bfloat16)))

    def decode(self, stored: Stored) -> jax.Array:
        """The velocity in float32; no gradient is propagated."""
        codes, scales = map(jnp.asarray, stored)
        view = _View.of(codes, scales)
        return _values(codes, view.broadcast_blocks(set_apart(scales), codes))

    def encode(self, value: jax.Array, stored: Stored, seed: jax.Array) -> Stored:
        """Where a value is not finite, the whole block is not."""
        view = _View.of(*stored)
        codes, scales = _encoded(value, view, seed)
        return Stored(codes, hold_like(scales, stored.scales))

    def rescale(
        self, stored: Stored, factor: jax.Array, mask: jax.Array, seed: jax.Array
    ) -> Stored:
        """Blocks in which nothing is scaled keep their bits."""
        view, value = _View.of(*stored), self.decode(stored)
        encoded = self.encode(jnp.where(mask, _times(value, factor), value), stored, seed)
        changed = view.largest(mask.astype(np.int32))
        return Stored(
            jnp.where(
                view.broadcast_blocks(changed, stored.values) > 0, encoded.values, stored.values
            ),
            jnp.where(hold_like(changed, stored.scales) > 0, encoded.scales, stored.scales),
        )

    def step(
        self, advance: Advance, grad: jax.Array, several: Sequence[Stored], seed: jax.Array
    ) -> tuple[jax.Array, Sequence[Stored]]:
        """Written for each platform in the way that its compiler makes the least traffic of.

        A GPU fuses the decoding, the step and the encoding around one reduction in the array's own
        shape. A TPU and a CPU do where an axis is split in two and nothing moves that split. A step
        that is not elementwise is computed in the array's own shape on each.
        """
        floats = [lax.convert_element_type(stored.values, np.float32) for stored in several]
        arranged = elementwise(advance, floats, grad)
        if arranged is None:
            return super().step(advance, grad, several, seed)
        view = _View.of(*several[0])
        split = _through(_SplitView(*view), arranged)
        on_lanes = view.axis == grad.ndim - 1 > 0 and view.length == LAST_BLOCK
        on_lanes &= grad.shape[view.axis] // view.length <= MOST_ON_LANES
        # Where a device has some of the blocks, no slice is that of one block.
        on_lanes &= not is_split(several[0].scales, view.axis)
        update, stored = lax.platform_dependent(
            grad,
            [Stored(codes, set_apart(scales)) for codes, scales in several],
            seed,
            cpu=split,
            tpu=_through(_LanesView(*view), arranged) if on_lanes else split,
            default=_through(view, arranged),
        )
        return update, [
            Stored(codes, hold_like(scales, held.scales))
            for (codes, scales), held in zip(stored, several, strict=True)
        ]


class Wide(Cast):
    """Stored as it is computed, among leaves of 8 bits: in place of scales it has ones."""

    def init(self, param: jax.Array, dtype: np.dtype) -> Stored:
        """The ones have the param's shape, so that what shards the param can shard them."""
        given, param = param, on_device(param)
        ones = jnp.ones_like(zeros_like(param, np.dtype(np.int8)))
        ones = in_memory_of(given, hold_like(ones, param, backward=True))
        return Stored(zeros_like(given, dtype), ones)


CAST, STOCHASTIC_CAST, BLOCKS, WIDE = Cast(), StochasticCast(), Blocks(), Wide()

# How a velocity of this velocity_dtype is stored. Others are refused.
CODECS: dict[np.dtype, Cast] = {
    np.dtype(jnp.float32): CAST,
    np.dtype(jnp.float64): CAST,
    np.dtype(jnp.bfloat16): STOCHASTIC_CAST,
    np.dtype(jnp.float16): STOCHASTIC_CAST,
    np.dtype(jnp.int8): BLOCKS,
}


def codec_for(param: jax.Array, velocity_dtype: np.dtype | None) -> tuple[Cast, np.dtype]:
    """How the velocity of a param is to be stored, and in which dtype."""
    moves = jnp.issubdtype(param.dtype, jnp.inexact)  # Or no gradient for it is accepted.
    wide = compute_dtype(param.dtype) if moves else param.dtype
    if velocity_dtype is None:
        return CAST, wide
    if velocity_dtype == np.int8:
        real = moves and not jnp.issubdtype(param.dtype, jnp.complexfloating)
        fits = real and param.size >= SMALLEST and block_axis(param.shape) is not None
        return (BLOCKS, velocity_dtype) if fits else (WIDE, wide)
    return (CODECS[velocity_dtype], velocity_dtype) if moves else (CAST, wide)


def codec_of(stored: Stored) -> Cast:
    """How a leaf is stored."""
    values, scales = stored
    if scales is not None:
        return WIDE if np.shape(scales) == np.shape(values) else BLOCKS
    codec = CODECS.get(np.dtype(values.dtype), CAST)
    return CAST if codec is BLOCKS else codec  # The int8 of a param that never moves.


def decoded_dtype(stored: Stored) -> np.dtype:
    """The dtype of the floats that a leaf stands for."""
    return np.dtype(np.float32) if codec_of(stored) is BLOCKS else np.dtype(stored.values.dtype)


def block_axis(shape: tuple[int, ...]) -> tuple[int, int] | None:
    """The axis along which an array is cut into blocks, and their length; None if none fits.

    The axis before the last, or the next before it, that 32 divides: the arrays of scales can be
    sharded like their params, and no compiler has to turn anything around. Else blocks of 128
    along the last axis. Else the least length from 32 to 128 that divides any axis, or the largest
    from 31 down to 16.
    """
    axes = list(range(len(shape) - 2, -1, -1))
    for axis in axes:
        if shape[axis] % BLOCK == 0:
            return axis, BLOCK
    if shape and shape[-1] % LAST_BLOCK == 0:
        return len(shape) - 1, LAST_BLOCK
    lengths = [*range(BLOCK, LAST_BLOCK + 1), *range(BLOCK - 1, LEAST_BLOCK - 1, -1)]
    for length in lengths:
        for axis in [*axes, len(shape) - 1][: len(shape)]:
            if shape[axis] % length == 0:
                return axis, length
    return None


def compute_dtype(dtype: Any) -> np.dtype:
    """The dtype to compute in: the same kind, at least float32 wide."""
    if jnp.issubdtype(dtype, jnp.complexfloating):
        return np.dtype(dtype)
    return np.dtype(np.float64 if dtype == np.float64 else np.float32)


def seed_of(count: jax.Array) -> jax.Array:
    """32 bits for the step of this count."""
    return lowbias32(jnp.asarray(count).astype(np.int32))


def hash_bits(value: jax.Array, seed: jax.Array) -> jax.Array:
    """32 random bits for each value: a hash of the seed, its position and its upper 16 bits.

    Integers only, and no order of evaluation: the same bits on every machine and under any
    sharding. Within shard_map the position is that in the device's own part. The value's upper
    bits make leaves differ from one another, and the members of a vmap, without a constant in the
    program for each; and a last bit that another machine rounds in another way seldom moves them.
    """
    value = lax.convert_element_type(lax.stop_gradient(value), np.float32)
    upper = lax.shift_right_logical(lax.bitcast_convert_type(value, np.int32), np.int32(16))
    position = reshard_like(_positions(value.shape), value)
    return lowbias32(lax.bitwise_xor(lax.add(position, seed), upper))


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
def stochastic_round(value: jax.Array, bits: jax.Array, dtype: np.dtype) -> jax.Array:
    """To one of the two neighbours in bfloat16 or float16, the nearer one more often.

    The upper random bits decide; what the dtype can hold stays what it is.
    """
    value = lax.convert_element_type(value, np.float32)
    dropped = np.int32(23 - jnp.finfo(dtype).nmant)
    offset = np.float32(0)
    if dtype == np.float16:
        # Below its normal numbers float16 is evenly spaced: just as it is between 1 and 2 of the
        # least of them, where the value is brought.
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


@dataclasses.dataclass(frozen=True)
class _View:
    """An array in its own shape, and its blocks along one axis."""

    axis: int
    length: int

    @classmethod
    def of(cls, codes, scales):
        """Their axis and length are where the shapes differ."""
        shapes = zip(np.shape(codes), np.shape(scales), strict=True)
        (found,) = [(axis, a // b) for axis, (a, b) in enumerate(shapes) if a != b]
        return cls(*found)

    def __iter__(self):
        yield self.axis
        yield self.length

    def split(self, x):
        return split_axis(x, self.axis, self.length)

    def arrange(self, x):
        return x

    def restore(self, x, like):
        return reshard_like(x, like)

    def broadcast_blocks(self, each, arranged):
        """To each value what its block has."""
        split = (*each.shape[: self.axis + 1], self.length, *each.shape[self.axis + 1 :])
        return reshard_like(merge_axes(self.broadcast(each, split), self.axis), arranged)

    def broadcast(self, each, shape):
        dimensions = [i for i in range(len(shape)) if i != self.axis + 1]
        return lax.broadcast_in_dim(each, shape, dimensions)

    def largest(self, arranged):
        """Of each block, the largest integer."""
        return lax.reduce_max(self.split(arranged), (self.axis + 1,))


@dataclasses.dataclass(frozen=True)
class _SplitView(_View):
    """An array with the axis split in two: blocks, and places in them."""

    def arrange(self, x):
        # No compiler moves operations to before the splitting.
        return lax.optimization_barrier(self.split(x))

    def restore(self, x, like):
        return reshard_like(merge_axes(x, self.axis), like)

    def broadcast_blocks(self, each, arranged):
        return reshard_like(self.broadcast(each, arranged.shape), arranged)

    def largest(self, arranged):
        return lax.platform_dependent(arranged, cpu=self._halved, default=self._reduced)

    def _reduced(self, arranged):
        return lax.reduce_max(arranged, (self.axis + 1,))

    def _halved(self, arranged):
        """By elementwise maxima, which are vectorized on a CPU: reductions of this axis are not."""
        axis, length = self.axis + 1, self.length
        while length % 2 == 0:
            length //= 2
            first, second = (
                lax.slice_in_dim(arranged, start, start + length, axis=axis)
                for start in (0, length)
            )
            arranged = lax.max(first, second)
        return lax.reduce_max(arranged, (axis,))


@dataclasses.dataclass(frozen=True)
class _LanesView(_View):
    """An array in its own shape, each of a few blocks found by comparing positions."""

    def _blocks(self, arranged):
        position = lax.broadcasted_iota(np.int32, arranged.shape, self.axis)
        block = reshard_like(position, arranged) // np.int32(self.length)
        return [block == i for i in range(arranged.shape[self.axis] // self.length)]

    def broadcast_blocks(self, each, arranged):
        broadcast = jnp.zeros((), each.dtype)
        for i, here in enumerate(self._blocks(arranged)):
            one = lax.slice_in_dim(each, i, i + 1, axis=self.axis)
            broadcast = jnp.where(here, one, broadcast)
        return broadcast

    def largest(self, arranged):
        least = jnp.iinfo(arranged.dtype).min
        each = [
            jnp.max(jnp.where(here, arranged, least), axis=self.axis, keepdims=True)
            for here in self._blocks(arranged)
        ]
        return jnp.concatenate(each, axis=self.axis)


def _through(view, advance):
    """The step of one leaf, computed in a view of its arrays."""

    def step(grad, several, seed):
        codes = [view.arrange(stored.values) for stored in several]
        arranged = view.arrange(grad)
        held = [
            _values(each, view.broadcast_blocks(stored.scales, each))
            for each, stored in zip(codes, several, strict=True)
        ]
        values, update = advance(held, arranged)
        encoded = [_encoded(value, view, seed) for value in values]
        stored = [Stored(view.restore(new, grad), scales) for new, scales in encoded]
        return view.restore(update, grad), stored

    return step


# Written in lax, which traces several times as fast as jnp: this is traced for each shape.


def _values(codes, scale):
    """What codes stand for, each with its scale."""
    code = lax.convert_element_type(codes, np.float32)
    scale = lax.convert_element_type(lax.stop_gradient(scale), np.float32)
    units = lax.mul(code, lax.add(lax.abs(code), np.float32(LARGEST)))
    return lax.mul(lax.mul(units, np.float32(1 / _UNITS)), scale)


def _encoded(value, view, seed):
    """The codes of an arranged value, stochastically rounded, and the scales of its blocks."""
    value = lax.convert_element_type(lax.stop_gradient(value), np.float32)
    # As integers, so that what is not finite is the largest on every backend.
    magnitude = lax.bitwise_and(lax.bitcast_convert_type(value, np.int32), np.int32(0x7FFFFFFF))
    # Rounded up: no value is above its scale. A NaN whose bits are all ones, NVIDIA's, would be 0.
    largest = lax.clamp(_LEAST_SCALE.view(np.int32), view.largest(magnitude), _LARGEST_NAN)
    upper = lax.shift_right_logical(lax.add(largest, np.int32(0xFFFF)), np.int32(16))
    scales = _from_upper_bits(upper)

    # XLA makes of the division a product with the inverse, which would be 0 above 2^126. A quarter
    # of the scale is exact, and made of the bits, where XLA sees nothing to put together.
    quarters = _from_upper_bits(lax.sub(upper, np.int32(2 << jnp.finfo(jnp.bfloat16).nmant)))
    quarter = lax.convert_element_type(view.broadcast_blocks(quarters, value), np.float32)
    units = lax.mul(lax.div(lax.abs(value), quarter), _UNITS * np.float32(0.25))
    # units = code (code + 127) = (code + 63.5)^2 - 63.5^2, so the code below is low - 64. Above it
    # units grow by 2 low: up with the probability of the share of that by which low falls short.
    square = lax.add(units, np.float32(LARGEST**2 / 4))
    low = lax.floor(lax.add(lax.sqrt(square), np.float32(0.5)))
    chance = lax.convert_element_type(hash_bits(value, seed), np.float32)
    chance = lax.mul(chance, np.float32(2**-31))
    up = lax.gt(lax.sub(square, np.float32(0.25)), lax.mul(low, lax.add(low, chance)))
    code = lax.add(low, lax.convert_element_type(up, np.float32))
    code = lax.sub(lax.min(code, np.float32(LARGEST + 64)), np.float32(64))
    code = lax.select(lax.lt(value, np.float32(0)), lax.neg(code), code)
    return lax.convert_element_type(code, np.int8), scales


def _from_upper_bits(upper):
    return lax.bitcast_convert_type(lax.convert_element_type(upper, np.uint16), jnp.bfloat16)


def _times(value, factor):
    if not jnp.issubdtype(value.dtype, jnp.inexact):
        return value  # Of a param that never moves.
    dtype = compute_dtype(value.dtype)
    factor = jnp.asarray(factor, dtype)
    return jnp.where(factor == 0, jnp.zeros((), dtype), factor * value.astype(dtype))


def _positions(shape):
    """The number of each place, row by row, times an odd constant, modulo 2^32.

    An axis that is split in two leaves it as it is.
    """
    position = np.int32(0)
    for axis in range(len(shape)):
        stride = np.uint32(math.prod(shape[axis + 1 :]) * 0x9E3779B1 % 2**32).view(np.int32)
        position = lax.add(position, lax.mul(lax.broadcasted_iota(np.int32, shape, axis), stride))
    return jnp.asarray(position)


def lowbias32(x):
    """Mixes 32 bits (Wellons 2018, lowbias32, but for its last step, which alters lower bits)."""
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        x = lax.bitwise_xor(x, lax.shift_right_logical(x, np.int32(shift)))
        x = lax.mul(x, np.uint32(factor).view(np.int32))
    return x
