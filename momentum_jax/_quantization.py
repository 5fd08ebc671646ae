"""Quantization to int8 codes with one scale per block of values, and the views that compute it.

A code k stands for k (|k| + 127) / (2 * 127^2) times the scale of its block. With a = |k| / 127
that is (a + a^2) / 2: the values that can be represented are three times as dense near 0, where
most values are, as near the scale.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from momentum_jax._placement import merge_axes, reshard_like, split_axis
from momentum_jax._rounding import hash_bits

# Values per scale, along every axis but the last.
BLOCK = 32
# Values per scale along the last axis; elsewhere the most values per scale.
LAST_BLOCK = 128
# The fewest values per scale: 1 + 2 / 16 bytes per parameter.
LEAST_BLOCK = 16
# The largest code.
LARGEST = 127

_UNITS = np.float32(2 * LARGEST**2)
# The smallest scale, 2^-100: below it, some backends have no normal numbers for the codes' units.
_LEAST_SCALE = np.float32(2**-100)
# The bits of the largest NaN that is a bfloat16.
_LARGEST_NAN = np.int32(0x7FFF0000)


def block_axis(shape: tuple[int, ...]) -> tuple[int, int] | None:
    """The axis along which an array is divided into blocks, and their length; None if none fits.

    The first choice is the last axis but one, or the nearest axis before it, that 32 divides: then
    the scales can be sharded like their params, and no compiler has to transpose an array. The
    second choice is blocks of 128 along the last axis. The third is the smallest length from 32 to
    128 that divides any axis, or else the largest length from 31 down to 16.
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


@dataclasses.dataclass(frozen=True)
class View:
    """Arrays in their own shape, with blocks along one axis."""

    axis: int
    length: int

    @classmethod
    def of(cls, codes, scales):
        """The axis and the length are found where the shapes of codes and scales differ."""
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
        """One value per block, broadcast to all values of the block."""
        split = (*each.shape[: self.axis + 1], self.length, *each.shape[self.axis + 1 :])
        return reshard_like(merge_axes(self.broadcast(each, split), self.axis), arranged)

    def broadcast(self, each, shape):
        dimensions = [i for i in range(len(shape)) if i != self.axis + 1]
        return lax.broadcast_in_dim(each, shape, dimensions)

    def largest(self, arranged):
        """The largest integer of each block."""
        return lax.reduce_max(self.split(arranged), (self.axis + 1,))


@dataclasses.dataclass(frozen=True)
class SplitView(View):
    """Arrays with the axis split into two: blocks, and positions within a block."""

    def arrange(self, x):
        # The barrier keeps compilers from moving operations before the split.
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
        """By elementwise maxima, which a CPU vectorizes; it does not vectorize this reduction."""
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
class LanesView(View):
    """Arrays in their own shape, each of a few blocks selected by comparing positions."""

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


# Written in lax, which traces several times as fast as jnp: these are traced for each shape.


def decode_blocks(codes: jax.Array, scale: jax.Array) -> jax.Array:
    """The float32 values of codes. `scale` has one value per code."""
    code = lax.convert_element_type(codes, np.float32)
    scale = lax.convert_element_type(lax.stop_gradient(scale), np.float32)
    units = lax.mul(code, lax.add(lax.abs(code), np.float32(LARGEST)))
    return lax.mul(lax.mul(units, np.float32(1 / _UNITS)), scale)


def encode_blocks(value: jax.Array, view: View, seed: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The stochastically rounded codes of an array that `view` arranged, and its scales."""
    value = lax.convert_element_type(lax.stop_gradient(value), np.float32)
    # As integers, infinity and NaN are the largest on every backend.
    magnitude = lax.bitwise_and(lax.bitcast_convert_type(value, np.int32), np.int32(0x7FFFFFFF))
    # Scales are rounded up, so that no value exceeds its scale. The clamp is for the NaN of NVIDIA,
    # whose bits are all ones: rounded up it would become 0.
    largest = lax.clamp(_LEAST_SCALE.view(np.int32), view.largest(magnitude), _LARGEST_NAN)
    upper = lax.shift_right_logical(lax.add(largest, np.int32(0xFFFF)), np.int32(16))
    scales = _from_upper_bits(upper)

    # XLA replaces a division by a product with the inverse, which would be 0 above 2^126. A quarter
    # of the scale is exact; it is made from the bits, so that XLA finds nothing to simplify.
    quarters = _from_upper_bits(lax.sub(upper, np.int32(2 << jnp.finfo(jnp.bfloat16).nmant)))
    quarter = lax.convert_element_type(view.broadcast_blocks(quarters, value), np.float32)
    units = lax.mul(lax.div(lax.abs(value), quarter), _UNITS * np.float32(0.25))
    # units = code (code + 127) = (code + 63.5)^2 - 63.5^2, so the next lower code is low - 64. From
    # it to the next higher code, units grow by 2 low. The probability to round up is the fraction
    # of this step that the value is above the lower code.
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
