"""Blocks, codes and scales: to the bit those of the reference, on every platform."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from hypothesis import given, settings
from hypothesis import strategies as st
from stored import SHAPE, bits, make, mj, moving, normal, numbers

from momentum_jax import _quantization, _rounding, _storage

# Blocks along the first, a middle and the last axis, of 32, of 128 and of another length.
BLOCKED = {
    (64, 128): (0, 32),
    (3, 64, 40): (1, 32),
    (64, 12, 7): (0, 32),
    (30, 256): (1, 128),
    (4096,): (0, 128),
    (100, 100): (0, 50),
}


@pytest.mark.parametrize(("shape", "block"), BLOCKED.items(), ids=str)
def test_codes_and_scales_are_the_references(shape, block):
    """Scales to the bit; codes and values up to ties between float32 and float64."""
    assert _quantization.block_axis(shape) == block
    sizes = jnp.asarray([1.0, 1e-12, 0.0, 1e30])
    value = normal(shape) * jnp.resize(jnp.repeat(sizes, shape[0] // 4), (shape[0],)).reshape(
        -1, *[1] * (len(shape) - 1)
    )
    tx = mj.trace(0.0, velocity_dtype="int8")
    state = tx.init(value)._replace(count=jnp.int32(5))
    _, state = tx.update(value, state)
    codes, scales, expected = reference.quantized(value, 5, *block)
    np.testing.assert_array_equal(np.asarray(state.scales, np.float64), scales)
    found = np.asarray(state.trace, int)
    assert np.abs(found - codes).max() <= 1
    assert (found != codes).mean() < 1e-3
    read = np.asarray(mj.read_velocity(state), np.float64)
    agree = found == codes
    largest = np.repeat(scales, block[1], block[0])
    assert np.max(np.abs(read - expected)[agree] / largest[agree]) < 1e-6


SHAPES = {
    (8192, 4096): (0, 32),
    (50257, 768): (1, 128),
    (3, 3, 512, 2048): (2, 32),
    (4096, 16, 64): (0, 32),
    (100, 100): (0, 50),
    (4096,): (0, 128),
    (33554432,): (0, 128),
    (3, 3, 517, 2053): (2, 47),
    (768, 12, 64): (0, 32),
    (96, 11, 5): (0, 32),
    (101, 96): (1, 32),
    (101, 62): (1, 62),
    (101, 103): (0, 101),
    (1009, 17): (1, 17),
    (5003,): None,
    (4099, 7): None,
    (): None,
}


@pytest.mark.parametrize(("shape", "expected"), SHAPES.items(), ids=str)
def test_block_axis_and_bytes_per_parameter(shape, expected):
    """At most 1.13 bytes, and 1.0625 where 32 divides an axis; wide where nothing divides one."""
    assert _quantization.block_axis(shape) == expected
    param = jax.ShapeDtypeStruct(shape, np.float32)
    state = jax.eval_shape(lambda: make("int8").init(jnp.ones(shape)))
    nbytes = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state[1:]))
    if expected is None:
        assert state.velocity.dtype == np.float32
        assert nbytes == 5 * param.size
        return
    axis, length = expected
    assert (state.velocity.shape, state.velocity.dtype) == (shape, np.int8)
    of_scales = (*shape[:axis], shape[axis] // length, *shape[axis + 1 :])
    assert (state.scales.shape, state.scales.dtype) == (of_scales, jnp.bfloat16)
    limit = 1.0625 if any(size % 32 == 0 for size in shape) else 1.13
    assert nbytes <= limit * param.size


@given(st.lists(st.integers(1, 2000), max_size=4).map(tuple))
@settings(max_examples=300, deadline=None)
def test_block_axis_divides_any_shape(shape):
    """Into blocks of 16 to 128, of 32 where that is possible; else there is no such length."""
    found = _quantization.block_axis(shape)
    if found is None:
        assert not any(size % n == 0 for size in shape for n in range(16, 129))
        return
    axis, length = found
    assert shape[axis] % length == 0
    assert 16 <= length <= 128
    if any(size % 32 == 0 for size in shape):
        assert length in (32, 128)


@pytest.mark.slow
@pytest.mark.parametrize(("shape", "block"), BLOCKED.items(), ids=str)
def test_c7_every_platforms_view_gives_the_same_bits(shape, block):
    """That of CPU and TPU, of GPU, and of TPU with few blocks, run on one platform.

    Updates may differ in the last bit: a compiler may fuse the scale with the recurrence.
    """
    views = [_quantization.SplitView, _quantization.View, _quantization.LanesView]

    def run(view):
        @jax.jit
        def step(carry, count):
            grad = numbers(shape, 1) * jnp.where(count == 1, 0.25, 1.0)
            update, carry = _storage._step_in_view(view(*block), advance)(
                grad, carry, _rounding.seed_of(count)
            )
            return carry, update

        def advance(velocities, g):
            (v,) = velocities
            v = 0.5 * v - 0.25 * g
            return [v], v

        stored = _storage.BLOCKS.init(jnp.ones(shape), np.dtype(np.int8))
        state, updates = jax.lax.scan(step, [stored], jnp.arange(3))
        return bits(state), np.asarray(updates)

    (first, updates), *others = map(run, views)
    for state, of_other in others:
        assert state == first
        np.testing.assert_allclose(of_other, updates, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("size", [1e-30, 1e-8, 1e8, 1e30])
def test_codes_for_any_size(size):
    """The error follows the block: 0.7% of normally distributed values, in the mean square."""
    value = normal() * size
    read = mj.read_velocity(moving(mj.trace(0.0, velocity_dtype="int8"), value, steps=1))
    wide = np.asarray(value, np.float64)
    error = np.linalg.norm(np.asarray(read, np.float64) - wide)
    assert 0.0070 < error / np.linalg.norm(wide) < 0.0077


@pytest.mark.parametrize("pattern", [0x7FC00000, 0x7FFFFFFF, 0xFFFFFFFF, 0x7F800001])
def test_every_nan_is_seen_in_8_bits(pattern):
    """Also that of NVIDIA's arithmetic, 0x7FFFFFFF: its upper half, rounded up, is that of -0."""
    value = jnp.asarray(np.ones(SHAPE, np.float32))
    nan = jnp.asarray(np.asarray(pattern, np.uint32).view(np.float32))
    stored = _storage.BLOCKS.init(value, np.dtype(np.int8))
    encoded = jax.jit(_storage.BLOCKS.encode)(
        value.at[3, 40].set(nan), stored, _rounding.seed_of(jnp.int32(0))
    )
    expected = np.ones(SHAPE, bool)
    expected[:32, 40] = False
    np.testing.assert_array_equal(np.isfinite(_storage.BLOCKS.decode(encoded)), expected)


def _as_it_is(velocity, gradient):
    return gradient, velocity


@pytest.mark.parametrize("exponent", [-99, 0, 125, 126, 127])
def test_8_bits_of_any_size(exponent):
    """Also of a scale whose inverse is below the normal numbers."""
    grads = np.float32(2.0**exponent) * np.linspace(-1.9, 1.9, 8192, dtype=np.float32)
    tx = mj.recurrence(_as_it_is, velocity_dtype="int8")
    for update in (tx.update, jax.jit(tx.update)):
        _, state = update(jnp.asarray(grads), tx.init(jnp.zeros(8192)))
        read = np.asarray(mj.read_velocity(state), np.float64)
        assert np.max(np.abs(read - grads)) < 0.025 * 2.0**exponent


def test_zeros_are_exact():
    """A value that has never moved does not begin to."""
    value = (normal() * (numbers(seed=3) > 0)).at[0].set(0.0)
    state = moving(mj.trace(0.5, velocity_dtype="int8"), value)
    still = np.asarray(value) == 0
    assert not np.any(np.asarray(state.trace)[still])
    assert not np.any(np.asarray(mj.read_velocity(state))[still])
    assert np.mean(np.asarray(state.trace)[~still] == 0) < 0.01
