"""Codecs: how a velocity is stored, one codec per way to store it.

A codec decodes a stored array to floats, and encodes a new value. Codecs that lose bits round
stochastically (`_rounding`). The random bits are a hash of the step's count, the position of the
value and its upper 16 bits: the state holds no random key, a run can be repeated to the bit, and
equal leaves share one compiled function.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from momentum_jax._elementwise import elementwise
from momentum_jax._placement import (
    is_split,
    isolate,
    shard_like,
    to_device_memory,
    to_memory_of,
    zeros_like,
)
from momentum_jax._quantization import (
    LAST_BLOCK,
    LanesView,
    SplitView,
    View,
    block_axis,
    decode_blocks,
    encode_blocks,
)
from momentum_jax._rounding import hash_bits, stochastic_round

# Leaves with fewer values are not quantized: they need little memory, and biases and norms are
# among them.
SMALLEST = 4096
# A TPU computes up to this many blocks along the last axis one by one, without a transposition.
MOST_ON_LANES = 32

# One step of one leaf: (velocities, grad) -> (velocities, update).
Step = Callable[[Sequence[jax.Array], jax.Array], tuple[Sequence[jax.Array], jax.Array]]


class Stored(NamedTuple):
    """A stored velocity: of one leaf, or of a tree of leaves.

    Attributes:
      values: values or int8 codes, in the params' shapes.
      scales: None, or with velocity_dtype int8 a tree of the same structure. For a leaf of codes it
        holds bfloat16, the largest magnitude in each block. For a leaf that is not quantized it
        holds int8 ones of the param's shape.
    """

    values: Any
    scales: Any = None


class Cast:
    """Stored in a floating-point dtype, rounded to nearest."""

    # Whether equal leaves share one function that is traced and lowered once.
    is_shared = False

    def init(self, param: jax.Array, dtype: np.dtype) -> Stored:
        """A velocity of 0, in the param's shape and sharding."""
        return Stored(zeros_like(param, dtype))

    def decode(self, stored: Stored) -> jax.Array:
        """The velocity as floats."""
        return jnp.asarray(stored.values)

    def encode(self, value: jax.Array, stored: Stored, seed: jax.Array) -> Stored:
        """A new value, in the dtypes, blocks and shardings of `stored`."""
        del seed
        return stored._replace(values=value.astype(stored.values.dtype))

    def rescale(
        self, stored: Stored, factor: jax.Array, mask: jax.Array, seed: jax.Array
    ) -> Stored:
        """`factor * stored` where `mask` is True, 0 if `factor` is 0; the same bits elsewhere."""
        encoded = self.encode(_times(self.decode(stored), factor), stored, seed)
        return stored._replace(values=jnp.where(mask, encoded.values, stored.values))

    def step(
        self, step: Step, grad: jax.Array, several: Sequence[Stored], seed: jax.Array
    ) -> tuple[jax.Array, Sequence[Stored]]:
        """Decodes the velocities, makes the step, encodes: the update and the stored velocities."""
        values, update = step([self.decode(stored) for stored in several], grad)
        encoded = [self.encode(*pair, seed) for pair in zip(values, several, strict=True)]
        return update, encoded


class StochasticCast(Cast):
    """Stored in bfloat16 or float16, rounded stochastically to one of the two neighbours."""

    is_shared = True

    def encode(self, value: jax.Array, stored: Stored, seed: jax.Array) -> Stored:
        """Values that the dtype represents exactly do not change."""
        bits = hash_bits(value, seed)
        return stored._replace(values=stochastic_round(value, bits, stored.values.dtype))


class Blocks(Cast):
    """Stored as int8 codes, with a bfloat16 scale for each block along one axis.

    The axis and the length of the blocks are found where the shapes of codes and scales differ. So
    arrays that were stacked, by vmap or scan, can be decoded without further information.
    """

    is_shared = True

    def init(self, param: jax.Array, dtype: np.dtype) -> Stored:
        """Codes and scales of 0, in the param's sharding."""
        block = block_axis(param.shape)
        assert block is not None  # `codec_for` chose this codec because there is one.
        view = View(*block)
        first = lax.index_in_dim(view.split(param), 0, view.axis + 1, keepdims=False)
        return Stored(zeros_like(param, dtype), zeros_like(first, np.dtype(jnp.bfloat16)))

    def decode(self, stored: Stored) -> jax.Array:
        """The velocity in float32, which is not differentiable."""
        codes, scales = map(jnp.asarray, stored)
        view = View.of(codes, scales)
        return decode_blocks(codes, view.broadcast_blocks(isolate(scales), codes))

    def encode(self, value: jax.Array, stored: Stored, seed: jax.Array) -> Stored:
        """A value that is not finite makes its whole block not finite."""
        view = View.of(*stored)
        codes, scales = encode_blocks(value, view, seed)
        return Stored(codes, shard_like(scales, stored.scales))

    def rescale(
        self, stored: Stored, factor: jax.Array, mask: jax.Array, seed: jax.Array
    ) -> Stored:
        """Blocks without a scaled value keep their bits."""
        view, value = View.of(*stored), self.decode(stored)
        encoded = self.encode(jnp.where(mask, _times(value, factor), value), stored, seed)
        changed = view.largest(mask.astype(np.int32))
        is_changed = view.broadcast_blocks(changed, stored.values) > 0
        return Stored(
            jnp.where(is_changed, encoded.values, stored.values),
            jnp.where(shard_like(changed, stored.scales) > 0, encoded.scales, stored.scales),
        )

    def step(
        self, step: Step, grad: jax.Array, several: Sequence[Stored], seed: jax.Array
    ) -> tuple[jax.Array, Sequence[Stored]]:
        """The same, arranged for each platform so that its compiler moves the fewest bytes.

        A GPU fuses decoding, step and encoding around one reduction in the array's own shape. A TPU
        and a CPU fuse them when the axis is split in two and no operation moves across the split.
        A step that is not elementwise is computed in the array's own shape on all platforms.
        """
        floats = [lax.convert_element_type(stored.values, np.float32) for stored in several]
        elementwise_step = elementwise(step, floats, grad)
        if elementwise_step is None:
            return super().step(step, grad, several, seed)
        view = View.of(*several[0])
        split = _step_in_view(SplitView(*view), elementwise_step)
        on_lanes = view.axis == grad.ndim - 1 > 0 and view.length == LAST_BLOCK
        on_lanes &= grad.shape[view.axis] // view.length <= MOST_ON_LANES
        # Where a device holds some of the blocks only, one slice is not one block.
        on_lanes &= not is_split(several[0].scales, view.axis)
        update, stored = lax.platform_dependent(
            grad,
            [Stored(codes, isolate(scales)) for codes, scales in several],
            seed,
            cpu=split,
            tpu=_step_in_view(LanesView(*view), elementwise_step) if on_lanes else split,
            default=_step_in_view(view, elementwise_step),
        )
        return update, [
            Stored(codes, shard_like(scales, before.scales))
            for (codes, scales), before in zip(stored, several, strict=True)
        ]


class Wide(Cast):
    """Not quantized, among leaves of int8 codes: the scales are ones."""

    def init(self, param: jax.Array, dtype: np.dtype) -> Stored:
        """The ones have the param's shape, so that a sharding for the param is one for them."""
        given, param = param, to_device_memory(param)
        ones = jnp.ones_like(zeros_like(param, np.dtype(np.int8)))
        ones = to_memory_of(given, shard_like(ones, param, backward=True))
        return Stored(zeros_like(given, dtype), ones)


CAST, STOCHASTIC_CAST, BLOCKS, WIDE = Cast(), StochasticCast(), Blocks(), Wide()

# The codec of each velocity_dtype. Other dtypes are refused.
CODECS: dict[np.dtype, Cast] = {
    np.dtype(jnp.float32): CAST,
    np.dtype(jnp.float64): CAST,
    np.dtype(jnp.bfloat16): STOCHASTIC_CAST,
    np.dtype(jnp.float16): STOCHASTIC_CAST,
    np.dtype(jnp.int8): BLOCKS,
}


def check_dtype(velocity_dtype: Any) -> np.dtype | None:
    """The factory's `velocity_dtype` as a NumPy dtype, or None."""
    if velocity_dtype is None:
        return None
    try:
        # np.dtype would accept an array, and take its dtype.
        is_array = isinstance(velocity_dtype, (jax.Array, np.ndarray, np.generic))
        dtype = None if is_array else np.dtype(velocity_dtype)
    except TypeError:
        dtype = None
    if dtype is None or dtype not in CODECS:
        raise TypeError(
            f"velocity_dtype={velocity_dtype!r} must be None or one of "
            f"{', '.join(map(str, CODECS))}. Under optax.inject_hyperparams name it in static_args."
        )
    return dtype


def codec_for(param: jax.Array, velocity_dtype: np.dtype | None) -> tuple[Cast, np.dtype]:
    """The codec and the dtype in which to store the velocity of a param."""
    moves = jnp.issubdtype(param.dtype, jnp.inexact)  # Else gradients for it are refused.
    wide = compute_dtype(param.dtype) if moves else param.dtype
    if velocity_dtype is None:
        return CAST, wide
    if velocity_dtype == np.int8:
        real = moves and not jnp.issubdtype(param.dtype, jnp.complexfloating)
        fits = real and param.size >= SMALLEST and block_axis(param.shape) is not None
        return (BLOCKS, velocity_dtype) if fits else (WIDE, wide)
    return (CODECS[velocity_dtype], velocity_dtype) if moves else (CAST, wide)


def codec_of(stored: Stored) -> Cast:
    """The codec of a stored leaf."""
    values, scales = stored
    if scales is not None:
        return WIDE if np.shape(scales) == np.shape(values) else BLOCKS
    codec = CODECS.get(np.dtype(values.dtype), CAST)
    return CAST if codec is BLOCKS else codec  # int8 without scales: of an int8 param.


def decoded_dtype(stored: Stored) -> np.dtype:
    """The dtype of the floats to which a stored leaf is decoded."""
    return np.dtype(np.float32) if codec_of(stored) is BLOCKS else np.dtype(stored.values.dtype)


def compute_dtype(dtype: Any) -> np.dtype:
    """The dtype to compute in: of the same kind, at least float32 wide."""
    if jnp.issubdtype(dtype, jnp.complexfloating):
        return np.dtype(dtype)
    return np.dtype(np.float64 if dtype == np.float64 else np.float32)


def _step_in_view(view, step):
    """The step of one leaf, computed on arrays that `view` arranges."""

    def step_in_view(grad, several, seed):
        codes = [view.arrange(stored.values) for stored in several]
        arranged = view.arrange(grad)
        velocities = [
            decode_blocks(each, view.broadcast_blocks(stored.scales, each))
            for each, stored in zip(codes, several, strict=True)
        ]
        values, update = step(velocities, arranged)
        encoded = [encode_blocks(value, view, seed) for value in values]
        stored = [Stored(view.restore(new, grad), scales) for new, scales in encoded]
        return view.restore(update, grad), stored

    return step_in_view


def _times(value, factor):
    if not jnp.issubdtype(value.dtype, jnp.inexact):
        return value  # The velocity of an integer param, which is always 0.
    dtype = compute_dtype(value.dtype)
    factor = jnp.asarray(factor, dtype)
    return jnp.where(factor == 0, jnp.zeros((), dtype), factor * value.astype(dtype))
