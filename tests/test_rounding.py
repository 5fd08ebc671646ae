"""Stochastic rounding: the same bits everywhere, right on average, never stuck."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference
from stored import bits, every_dtype, make, mj, moving, normal

from momentum_jax import _rounding

# Outside jit each of their operations would be compiled on its own.
stochastic_round = jax.jit(_rounding.stochastic_round, static_argnums=2)


hash_bits = jax.jit(lambda value, count: _rounding.hash_bits(value, _rounding.seed_of(count)))


@pytest.mark.parametrize("shape", [(), (7,), (3, 5), (2, 3, 4, 5)])
def test_random_bits_are_the_references(shape):
    """To the bit: anyone can repeat a run, in any language."""
    value = normal(shape)
    for count in (0, 1, 2**31 - 1):
        np.testing.assert_array_equal(
            np.asarray(hash_bits(value, jnp.int32(count))).view(np.uint32),
            reference.hash_bits(value, count),
        )


def test_random_bits_are_uniform_and_independent_of_count_position_and_value():
    """Means, bits, and correlations along each way that a stream might repeat itself.

    Values that are equal everywhere are the worst case: position and count alone differ.
    """
    size = 2**14
    each = np.stack(
        [
            reference.hash_bits(np.full(size, value), count)
            for value in (0.0, 1.0, -1.0078125)
            for count in range(6)
        ]
    )
    uniform: Any = each / 2**32
    one = 1 / np.sqrt(each.size)
    assert abs(uniform.mean() - 0.5) < 5 * one / np.sqrt(12)
    for bit in range(32):
        assert abs((each >> np.uint64(bit) & np.uint64(1)).mean() - 0.5) < 5 * one / 2
    between: Any = np.corrcoef(np.concatenate([uniform, np.roll(uniform, 1, axis=1)]))
    assert np.abs(between[np.triu_indices(len(between), 1)]).max() < 5 / np.sqrt(size)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize(("low", "high"), [(-2, 3), (-13, -10), (-23, -14)])
def test_rounding_is_the_references(dtype, low, high):
    """Also where float16 has fewer and fewer bits."""
    rng = np.random.default_rng(0)
    values = np.ldexp(rng.uniform(-1, 1, 4096), rng.integers(low, high, 4096))
    values = np.rint(values * 2.0**36) / 2.0**36
    values = values.astype(np.float32).astype(np.float64)
    of_values = reference.hash_bits(values, 3)
    expected = reference.stochastic_round(values, dtype, of_values)
    found = stochastic_round(
        jnp.asarray(values, jnp.float32),
        jnp.asarray(of_values.astype(np.uint32).view(np.int32)),
        np.dtype(dtype),
    )
    np.testing.assert_array_equal(np.asarray(found, np.float64), expected)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_rounding_keeps_what_can_be_held(dtype):
    """All 65,536 numbers, whatever the random bits: NaN and the infinities among them."""
    every = np.arange(2**16, dtype=np.uint16).view(np.dtype(dtype))
    wide = jnp.asarray(every.astype(np.float32))
    wide = jnp.where(jnp.abs(wide) < jnp.finfo(jnp.float32).tiny, 0, wide)  # As compilers may.
    for of_each in (0, -1):
        found = stochastic_round(wide, jnp.full(wide.shape, of_each, jnp.int32), np.dtype(dtype))
        np.testing.assert_array_equal(np.asarray(found, np.float32), np.asarray(wide))


@every_dtype
def test_stored_velocities_are_right_on_average(velocity_dtype):
    """Each value, over 4,000 counts, and all together: to 5 standard errors of the mean."""
    value, tx = normal((32, 128)), mj.trace(0.0, velocity_dtype=velocity_dtype)
    state, steps = tx.init(value), 4000

    def step(total, count):
        _, after = tx.update(value, state._replace(count=count))
        return total + (mj.read_velocity(after).astype(jnp.float32) - value), None

    run = jax.jit(lambda: jax.lax.scan(step, jnp.zeros_like(value), jnp.arange(steps))[0])
    mean, wide = np.asarray(run(), np.float64) / steps, np.abs(np.asarray(value, np.float64))
    if velocity_dtype == "int8":
        _, scales, _ = reference.quantized(value, 0, 0, 32)
        below = np.floor(np.sqrt(wide / scales * 2 * 127**2 + 127**2 / 4) - 127 / 2)
        gap = (2 * below + 128) / (2 * 127**2) * scales
    else:
        bits_kept = {"bfloat16": 8, "float16": 11}[velocity_dtype]
        gap = 2.0 ** (np.frexp(wide)[1] - bits_kept)
    # Of a choice between two neighbours the standard deviation is at most half their distance.
    assert np.max(np.abs(mean) / gap) < 5 * 0.5 / np.sqrt(steps)
    for sign in (1, np.sign(value)):  # Neither upwards nor away from 0.
        assert np.abs(np.mean(sign * mean / gap)) < 5 * 0.5 / np.sqrt(steps * value.size)


@pytest.mark.parametrize(
    ("velocity_dtype", "mu"),
    [(dtype, mu) for dtype in ("bfloat16", "int8") for mu in (0.9, 0.99, 0.999)]
    + [("float16", 0.999)],
)
def test_velocity_reaches_its_limit(velocity_dtype, mu):
    """Within 1%, from 0 and from the limit of other gradients; nearest stops at a quarter."""
    tx = mj.trace(mu, velocity_dtype=velocity_dtype)
    # After 9 times its memory a velocity is within 0.02% of its limit.
    steps = round(9 / (1 - mu))

    @jax.jit
    def settle(state, grads):
        state, _ = jax.lax.scan(lambda s, _: (tx.update(grads, s)[1], None), state, None, steps)
        return state, mj.read_velocity(state).astype(jnp.float32)

    first, second = normal(seed=1), jnp.roll(normal(seed=1), 1, axis=0)
    state = tx.init(first)
    for grads in (first, second):
        state, velocity = settle(state, grads)
        reached = float(jnp.sum(velocity * grads) * (1 - mu) / jnp.sum(grads**2))
        assert abs(reached - 1) < 0.01
    _, left = settle(state, jnp.zeros_like(first))
    assert np.linalg.norm(left) < 0.01 * np.linalg.norm(velocity)


def test_optax_in_bfloat16_stops_at_a_quarter():
    """As the README says: where a gradient of 1 is half the distance between two numbers.

    It depends on the gradient: the distances double where the velocity does.
    """
    tx = optax.trace(0.999, accumulator_dtype=jnp.bfloat16)
    grads = jnp.ones(())

    @jax.jit
    def settle(state):
        return jax.lax.scan(lambda s, _: (tx.update(grads, s)[1], None), state, None, 9000)[0]

    assert settle(tx.init(grads)).trace == 256


def test_random_bits_go_by_the_value_and_not_by_its_neighbours():
    """Leaves of one shape differ in them, and so do the members of a vmap.

    Without that, leaves that share a function would all be rounded up in the same places. What
    other leaves there are, and whether they have a gradient, does not matter.
    """
    first, second = normal(), normal(seed=1)
    both = np.stack([hash_bits(value, jnp.int32(3)) for value in (first, second)])
    members = jax.vmap(lambda value: hash_bits(value, jnp.int32(3)))(jnp.stack([first, second]))
    np.testing.assert_array_equal(members, both)
    assert np.mean(both[0] == both[1]) < 0.01
    assert abs(np.corrcoef(both.reshape(2, -1))[0, 1]) < 5 / np.sqrt(first.size)
    tx = make("bfloat16")
    together = moving(tx, {"a": first, "b": second}).velocity["b"]
    frozen = tx.init({"a": first, "b": second})
    for _ in range(2):
        _, frozen = tx.update({"a": None, "b": second}, frozen)
    assert bits(frozen.velocity["b"]) == bits(together) == bits(moving(tx, second).velocity)
