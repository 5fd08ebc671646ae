"""Velocities in 16 and 8 bits: right on average, the same bits everywhere, never stuck."""

import functools
import itertools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import export
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import momentum_jax
from momentum_jax import _storage
from momentum_jax._velocity import check_dtype

mj: Any = momentum_jax  # Optax's trees are of too many types to compute with.

LOW = ["bfloat16", "float16", "int8"]
SHAPE = (64, 128)  # Blocks of 32 rows: scales of shape (2, 128).
every_dtype = pytest.mark.parametrize("velocity_dtype", LOW)
both_ways = pytest.mark.parametrize("velocity_dtype", ["bfloat16", "int8"])

TRANSFORMS: dict[str, Any] = {
    "momentum": lambda dtype: mj.momentum(0.375, 0.75, nesterov=True, velocity_dtype=dtype),
    "trace": lambda dtype: mj.trace(0.75, velocity_dtype=dtype),
    "qhm": lambda dtype: mj.qhm(0.375, 0.75, 0.5, velocity_dtype=dtype),
    "aggmo": lambda dtype: mj.aggmo(0.375, (0.0, 0.75), velocity_dtype=dtype),
    "restart": lambda dtype: mj.adaptive_restart(make(dtype)),
    "apply_if_finite": lambda dtype: optax.apply_if_finite(make(dtype), 3),
    "MultiSteps": lambda dtype: optax.MultiSteps(make(dtype), 2),
}
OWN = ["momentum", "trace", "qhm", "aggmo"]


def numbers(shape=SHAPE, seed=0):
    """Multiples of 1/64: the arithmetic on them is exact for some steps."""
    return jnp.asarray(np.random.default_rng(seed).integers(-255, 256, shape) / 64, jnp.float32)


def normal(shape=SHAPE, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


# Outside jit each of their operations would be compiled on its own.
stochastic_round = jax.jit(_storage.stochastic_round, static_argnums=2)
hash_bits = jax.jit(lambda value, count: _storage.hash_bits(value, _storage.seed_of(count)))


def bits(tree):
    leaves, treedef = jax.tree.flatten(tree)
    return treedef, [(x.shape, x.dtype, np.asarray(x).tobytes()) for x in leaves]


def types(tree):
    leaves, treedef = jax.tree.flatten(tree)
    return treedef, [(x.shape, x.dtype, x.weak_type) for x in leaves]


def make(velocity_dtype, mu=0.75):
    return mj.momentum(0.375, mu, velocity_dtype=velocity_dtype)


def moving(tx, grads, steps=2):
    """The state after some steps."""
    state = tx.init(grads)
    for _ in range(steps):
        _, state = tx.update(grads, state, grads)
    return state


# The random bits and the rounding. -------------------------------------------------------


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
    assert _storage.block_axis(shape) == block
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


# The stall. ------------------------------------------------------------------------------


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


# The same bits everywhere. ---------------------------------------------------------------


@both_ways
def test_bits_are_the_same_eager_jitted_scanned_and_vmapped(velocity_dtype):
    tx, grads = make(velocity_dtype), numbers()
    eager = moving(tx, grads)
    scanned, _ = jax.lax.scan(
        lambda s, _: (tx.update(grads, s)[1], None), tx.init(grads), None, length=2
    )
    mapped = jax.vmap(lambda grads: moving(tx, grads))(jnp.stack([grads, -grads]))
    for state in (
        jax.jit(lambda grads: moving(tx, grads))(grads),
        scanned,
        jax.tree.map(lambda x: x[0], mapped),
    ):
        assert bits(state) == bits(eager)


PLACED = [
    (SHAPE, P("d", "m")),  # A device's part ends within a block.
    (SHAPE, P(None, ("d", "m"))),
    ((512, 8), P(("d", "m"))),  # Joined, and split between blocks.
    ((64, 36, 3), P("d", "m")),  # A block of 32 along the axis before the one before the last.
    ((30, 1024), P(None, ("d", "m"))),  # Blocks along the last axis: a part is one.
    ((30, 256), P(None, ("d", "m"))),  # A part ends within one.
    ((100, 100), P("d")),  # Blocks of 50.
    ((16, 8), P("d", "m")),  # Wide among those of 8 bits.
]
WHOLE = {str(i): numbers(shape, i) for i, (shape, _) in enumerate(PLACED)}


@functools.cache
def on_one_device(velocity_dtype):
    return bits(moving(make(velocity_dtype), WHOLE))


@pytest.mark.parametrize(
    ("axis_type", "wrap"),
    [(AxisType.Auto, jax.jit), (AxisType.Explicit, lambda f: f)],
    ids=["Auto, jit", "Explicit, eager"],
)
@both_ways
def test_c2_c7_bits_and_shardings_on_eight_devices(velocity_dtype, axis_type, wrap):
    """Those of one device; velocities in the param's sharding, and all where it was at init."""
    mesh = jax.make_mesh((4, 2), ("d", "m"), axis_types=(axis_type,) * 2)
    tx = make(velocity_dtype)
    params = {
        name: jax.device_put(x, NamedSharding(mesh, spec))
        for (name, x), (_, spec) in zip(WHOLE.items(), PLACED, strict=True)
    }
    start = state = wrap(tx.init)(params)
    for _ in range(2):
        _, state = wrap(tx.update)(params, state)
    assert bits(state) == on_one_device(velocity_dtype)
    for name, param in params.items():
        assert state.velocity[name].sharding.is_equivalent_to(param.sharding, param.ndim)
    for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(start), strict=True):
        assert a.sharding.is_equivalent_to(b.sharding, a.ndim)


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("along", ["rows", "columns"])
@both_ways
def test_c7_no_device_holds_or_sends_more_than_its_part(velocity_dtype, axis_type, along):
    """Read from the compiled init and update, with blocks along each of the axes."""
    mesh = jax.make_mesh((4, 2), ("d", "m"), axis_types=(axis_type,) * 2)
    shape, spec = ((256, 512), P("d", "m")) if along == "rows" else ((30, 4096), P(None, "d"))
    params = jax.device_put(jnp.ones(shape), NamedSharding(mesh, spec))
    part = int(np.prod(params.sharding.shard_shape(shape)))
    tx = make(velocity_dtype)
    init = jax.jit(tx.init).lower(params).compile()
    update = jax.jit(tx.update).lower(params, tx.init(params)).compile()
    for compiled in (init, update):
        text = str(compiled.as_text())
        sizes = re.findall(r"\b(?:f32|bf16|s8|u16|u32|pred)\[([\d,]+)\]", text)
        assert max(np.prod([int(n) for n in size.split(",")]) for size in sizes) == part
        assert not re.search(r"all-|collective-", text)


@both_ways
def test_shard_map_steps_each_part_as_an_array_of_its_own(velocity_dtype):
    """Replicas stay equal, and parts, each large enough for 8 bits, are read as written."""
    mesh = jax.make_mesh((2,), ("d",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])
    tx, grads = make(velocity_dtype), numbers()

    def read(grads):
        return mj.read_velocity(moving(tx, grads))

    mapped = jax.shard_map(read, mesh=mesh, in_specs=P("d"), out_specs=P("d"))
    parts = map(jax.jit(read), jnp.split(grads, 2))
    np.testing.assert_array_equal(jax.jit(mapped)(grads), jnp.concatenate([*parts]))


@pytest.mark.parametrize("velocity_dtype", [None, "bfloat16", "int8"])
def test_c2_zeros_under_jit_are_made_in_the_params_sharding(velocity_dtype):
    """Codes and scales, with blocks along the axis that is split."""
    mesh = jax.make_mesh((4, 2), ("d", "m"), axis_types=(AxisType.Auto,) * 2)
    params = jax.device_put(jnp.ones((256, 512)), NamedSharding(mesh, P("d", "m")))
    for leaf in jax.tree.leaves(jax.jit(make(velocity_dtype).init)(params))[1:]:
        assert leaf.sharding.is_equivalent_to(params.sharding, 2)


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


@both_ways
def test_c12_equal_leaves_share_one_function(velocity_dtype):
    """What is traced, lowered and compiled does not grow with the number of equal leaves."""

    def parts(number):
        params = [jnp.ones(SHAPE)] * number
        tx = make(velocity_dtype)
        text = jax.jit(tx.update).lower(params, tx.init(params)).as_text()
        # Functions, and how often the random bits are computed: by a multiplier of their hash.
        return text.count("func.func"), text.count(str(0x7FEB352D))

    assert parts(2) == parts(12)
    assert min(parts(2)) > 0


# Blocks and codecs. ----------------------------------------------------------------------

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
    assert _storage.block_axis(shape) == expected
    param = jax.ShapeDtypeStruct(shape, np.float32)
    state = jax.eval_shape(lambda: make("int8").init(jnp.ones(shape)))
    held = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state[1:]))
    if expected is None:
        assert state.velocity.dtype == np.float32
        assert held == 5 * param.size
        return
    axis, length = expected
    assert (state.velocity.shape, state.velocity.dtype) == (shape, np.int8)
    of_scales = (*shape[:axis], shape[axis] // length, *shape[axis + 1 :])
    assert (state.scales.shape, state.scales.dtype) == (of_scales, jnp.bfloat16)
    limit = 1.0625 if any(size % 32 == 0 for size in shape) else 1.13
    assert held <= limit * param.size


@given(st.lists(st.integers(1, 2000), max_size=4).map(tuple))
@settings(max_examples=300, deadline=None)
def test_block_axis_divides_any_shape(shape):
    """Into blocks of 16 to 128, of 32 where that is possible; else there is no such length."""
    found = _storage.block_axis(shape)
    if found is None:
        assert not any(size % n == 0 for size in shape for n in range(16, 129))
        return
    axis, length = found
    assert shape[axis] % length == 0
    assert 16 <= length <= 128
    if any(size % 32 == 0 for size in shape):
        assert length in (32, 128)


ADMITTED = ["float32", "float64", "bfloat16", "float16", "int8"]


def test_there_is_a_codec_for_each_velocity_dtype_that_is_admitted():
    assert [str(dtype) for dtype in _storage.CODECS] == ADMITTED
    for dtype in ADMITTED:
        assert check_dtype(dtype) in _storage.CODECS
    others = ["int16", "int32", "uint8", "bool", "complex64", "float8_e4m3fn", "float8_e5m2"]
    for dtype in [*others, "text", 8, jnp.ones(3), object()]:
        with pytest.raises(TypeError, match=r"must be None or one of float32, .*, int8\."):
            check_dtype(dtype)


@pytest.mark.parametrize("velocity_dtype", ADMITTED)
@pytest.mark.usefixtures("x64")
def test_each_codec_returns_what_it_stores(velocity_dtype):
    """Encoded and decoded, numbers that it can hold are what they were."""
    dtype = np.dtype(velocity_dtype)
    param = jnp.ones(SHAPE, "float32")
    codec, stored_dtype = _storage.codec_for(param, dtype)
    stored = jax.jit(codec.init, static_argnums=1)(param, stored_dtype)
    assert codec is _storage.CODECS[dtype] is _storage.codec_of(stored)
    assert stored.values.dtype == dtype
    value = jnp.resize(jnp.asarray([0.0, 1.0, -1.0, 0.0]), SHAPE).astype("float32")
    encoded = jax.jit(codec.encode)(value, stored, _storage.seed_of(jnp.int32(1)))
    assert types(encoded) == types(stored)
    decoded = jax.jit(codec.decode)(encoded)
    assert decoded.dtype == _storage.decoded_dtype(stored)
    np.testing.assert_array_equal(np.asarray(decoded, np.float32), value)


@pytest.mark.parametrize(("shape", "block"), BLOCKED.items(), ids=str)
def test_c7_every_platforms_view_gives_the_same_bits(shape, block):
    """That of CPU and TPU, of GPU, and of TPU with few blocks, run on one platform.

    Updates may differ in the last bit: a compiler may fuse the scale with the recurrence.
    """
    views = [_storage._SplitView, _storage._View, _storage._LanesView]

    def run(view):
        @jax.jit
        def step(carry, count):
            grad = numbers(shape, 1) * jnp.where(count == 1, 0.25, 1.0)
            update, carry = _storage._through(view(*block), advance)(
                grad, carry, _storage.seed_of(count)
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


# The contract in 8 bits. -----------------------------------------------------------------


def test_c6_scales_are_a_tree_like_the_params():
    """Whatever is in it; where the velocity is wide, scales are ones of the param's shape."""
    params = {
        "codes": jnp.ones(SHAPE),
        "half": jnp.ones(SHAPE, "bfloat16"),
        "small": jnp.ones(4095),
        "small half": jnp.ones(3, "bfloat16"),
        "complex": jnp.ones(SHAPE, "complex64"),
        "integer": jnp.ones(5000, "int32"),
        "prime": jnp.ones(5003),
        "empty": jnp.ones((0, 4096)),
        "number": 1.0,
        "none": None,
        "masked": optax.MaskedNode(),
        "nested": [(jnp.ones(()),), []],
    }
    wide = {"complex": "complex64", "integer": "int32"}
    state = make("int8").init(params)
    for tree in (state.velocity, state.scales):
        assert jax.tree.structure(tree) == jax.tree.structure(params)
    for (path, param), velocity, scales in zip(
        jax.tree_util.tree_leaves_with_path(params),
        jax.tree.leaves(state.velocity),
        jax.tree.leaves(state.scales),
        strict=True,
    ):
        name = path[0].key
        assert (velocity.shape, scales.ndim) == (np.shape(param), np.ndim(param))
        if name in ("codes", "half"):
            assert (velocity.dtype, scales.dtype) == (np.int8, jnp.bfloat16)
            assert scales.shape == (2, 128)
        else:
            assert velocity.dtype == wide.get(name, "float32")
            assert (scales.dtype, scales.shape) == (np.int8, np.shape(param))
            np.testing.assert_array_equal(scales, 1)
    grads = {name: None if name == "integer" else param for name, param in params.items()}
    updates, after = make("int8").update(grads, state)
    assert types(after) == types(state)
    np.testing.assert_array_equal(updates["complex"], -0.375 * params["complex"])
    read = mj.read_velocity(after)
    np.testing.assert_array_equal(read["complex"], -0.375 * params["complex"])
    np.testing.assert_array_equal(read["prime"], -0.375 * params["prime"])


@pytest.mark.parametrize("name", OWN)
def test_only_int8_has_scales(name):
    for dtype in (None, "float32", "bfloat16", "float16"):
        assert TRANSFORMS[name](dtype).init(jnp.ones(SHAPE)).scales is None
    assert TRANSFORMS[name]("int8").init(jnp.ones(SHAPE)).scales is not None


STORED = [None, *ADMITTED]


@pytest.mark.parametrize("name", OWN)
@pytest.mark.usefixtures("x64")
def test_c9_a_state_stored_in_another_dtype_is_refused(name):
    """Every pair, by path, with both dtypes and the remedy, also under jit; leaves of any size.

    None stores in each param's own width, which the transformation does not know.
    """
    params = {"w": jnp.ones(SHAPE, "float32"), "b": jnp.ones(3, "float32")}
    made = {dtype: TRANSFORMS[name](dtype) for dtype in STORED}
    states = {dtype: made[dtype].init(params) for dtype in STORED}
    alike = {(None, "float32"), ("float32", None), ("float64", None)}
    for (held, state), (asked, tx) in itertools.product(states.items(), made.items()):
        for grads in (params, {**params, "b": None}, {**params, "w": None}):
            if held == asked or (held, asked) in alike:
                assert types(jax.eval_shape(tx.update, grads, state)[1]) == types(state)
                continue
            (path, shape) = ("b", (3,)) if grads["b"] is not None else ("w", SHAPE)
            stored = "float32" if held in (None, "int8") and shape == (3,) else held or "float32"
            message = (
                rf"the velocity at \['{path}'\] in {stored}.* velocity_dtype={asked}\..* "
                "(Make it with|make a new state)"
            )
            for update in (tx.update, jax.jit(tx.update)):
                with pytest.raises(TypeError, match=message) as error:
                    update(grads, state)
                assert ("int8" in str(error.value)) == ("int8" in (held, asked))


@pytest.mark.parametrize(("held", "asked"), list(itertools.permutations(OWN, 2)))
def test_c9_a_state_of_another_transformation_is_refused(held, asked):
    """All pairs, by the names of both types, also within a chain."""
    params = {"w": jnp.ones(SHAPE)}
    names = {"momentum": "Momentum", "trace": "Trace", "qhm": "QHM", "aggmo": "AggMo"}
    message = rf"the state is {names[held]}State, but must be the {names[asked]}State"
    for dtype in (None, "int8"):
        theirs, ours = TRANSFORMS[held](dtype), TRANSFORMS[asked](dtype)
        for make_tx in (lambda tx: tx, lambda tx: optax.chain(optax.clip(1.0), tx)):
            state = make_tx(theirs).init(params)
            with pytest.raises(TypeError, match=message):
                make_tx(ours).update(params, state)


@pytest.mark.parametrize("name", OWN)
@pytest.mark.parametrize("velocity_dtype", [None, "bfloat16", "int8"])
def test_arrays_stacked_by_vmap_and_scan_are_read_and_reset_as_they_are(name, velocity_dtype):
    """An ensemble, and the states of all steps; no vmap around the reading."""
    tx = TRANSFORMS[name](velocity_dtype)
    members = jnp.stack([numbers(), -2 * numbers(seed=1), numbers(seed=2)])
    grads = {"w": members, "b": members[:, 0, :5]}
    mapped = jax.vmap(lambda grads: moving(tx, grads))(grads)
    alone = [moving(tx, jax.tree.map(lambda x, i=i: x[i], grads)) for i in range(3)]
    expected = jax.tree.map(lambda *each: jnp.stack(each), *map(mj.read_velocity, alone))
    assert bits(mj.read_velocity(mapped)) == bits(expected)
    assert bits(jax.vmap(mj.read_velocity)(mapped)) == bits(expected)

    one = jax.tree.map(lambda x: x[0], grads)
    _, steps = jax.lax.scan(
        lambda state, _: (tx.update(one, state)[1],) * 2, tx.init(one), None, length=2
    )
    last = jax.tree.map(lambda x: x[-1], mj.read_velocity(steps))
    assert bits(last) == bits(mj.read_velocity(moving(tx, one)))

    reset = mj.reset_velocity(mapped)
    assert types(reset) == types(mapped)
    assert not any(np.any(np.asarray(x, bool)) for x in jax.tree.leaves(mj.read_velocity(reset)))
    halved = mj.read_velocity(mj.reset_velocity(mapped, scale=0.5))
    for a, b in zip(jax.tree.leaves(halved), jax.tree.leaves(expected), strict=True):
        a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
        np.testing.assert_allclose(a, 0.5 * b, atol=0.012 * np.abs(b).max())


def test_c9_a_state_of_optax_is_told_from_ours():
    """Two types are called TraceState."""
    params = jnp.ones(3)
    state: Any = optax.trace(0.9).init(params)
    message = "the state is TraceState of Optax, but must be the TraceState .*load_optax"
    with pytest.raises(TypeError, match=message):
        mj.trace(0.9).update(params, state)


def test_zeros_are_exact():
    """A value that has never moved does not begin to."""
    value = (normal() * (numbers(seed=3) > 0)).at[0].set(0.0)
    state = moving(mj.trace(0.5, velocity_dtype="int8"), value)
    still = np.asarray(value) == 0
    assert not np.any(np.asarray(state.trace)[still])
    assert not np.any(np.asarray(mj.read_velocity(state))[still])
    assert np.mean(np.asarray(state.trace)[~still] == 0) < 0.01


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@every_dtype
def test_what_is_not_finite_is_seen(velocity_dtype, bad):
    """In 8 bits by the whole block, and only that; a reset makes it 0."""
    value = normal().at[3, 40].set(bad)
    state = moving(mj.trace(0.5, velocity_dtype=velocity_dtype), value)
    finite = np.isfinite(np.asarray(mj.read_velocity(state), np.float32))
    expected = np.ones(SHAPE, bool)
    expected[: 32 if velocity_dtype == "int8" else 4, 40] = False
    if velocity_dtype != "int8":
        expected[:3, 40] = True
    np.testing.assert_array_equal(finite, expected)
    assert not np.any(np.asarray(mj.read_velocity(mj.reset_velocity(state)), np.float32))


@pytest.mark.parametrize("size", [1e-30, 1e-8, 1e8, 1e30])
def test_codes_for_any_size(size):
    """The error follows the block: 0.7% of normally distributed values, in the mean square."""
    value = normal() * size
    read = mj.read_velocity(moving(mj.trace(0.0, velocity_dtype="int8"), value, steps=1))
    wide = np.asarray(value, np.float64)
    error = np.linalg.norm(np.asarray(read, np.float64) - wide)
    assert 0.0070 < error / np.linalg.norm(wide) < 0.0077


PARAMS = {"w": numbers(), "half": numbers(seed=1).astype("bfloat16"), "b": 1.0, "none": None}


@pytest.mark.parametrize("name", ["aggmo", "restart", "apply_if_finite", "MultiSteps"])
def test_c2_types_are_those_of_init(name):
    """Eager, jitted, donated and scanned, with one trace; updates in the gradients' dtypes."""
    tx = TRANSFORMS[name]("int8")
    # Before 0.2.6 the accumulator of Optax's own MultiSteps drifts with a Python number.
    params = PARAMS | {"b": jnp.ones(())} if name == "MultiSteps" else PARAMS
    state = start = tx.init(params)
    updates = {}
    assert types(jax.eval_shape(tx.init, params)) == types(start)
    traces = []

    def step(params, state):
        traces.append(1)
        updates, state = tx.update(params, state, params)
        return updates, state

    jitted = jax.jit(step, donate_argnums=1)
    for _ in range(3):
        updates, state = jitted(params, jax.tree.map(jnp.copy, state))
        assert types(state) == types(start)
        leaves = [x for x in jax.tree.leaves((updates, state)) if x.size]
        addresses = [s.data.unsafe_buffer_pointer() for x in leaves for s in x.addressable_shards]
        assert len(addresses) == len(set(addresses))
    assert len(traces) == 1
    assert {k: v.dtype for k, v in updates.items() if v is not None} == {
        k: jnp.asarray(v).dtype for k, v in PARAMS.items() if v is not None
    }


@pytest.mark.parametrize("name", OWN)
def test_velocity_is_the_wide_one_to_within_codes(name):
    """All transformations in 8 bits do what they do in 32."""
    grads = {"w": normal()}
    low, wide = (
        mj.read_velocity(moving(TRANSFORMS[name](dtype), grads, steps=4))
        for dtype in ("int8", None)
    )
    for a, b in zip(jax.tree.leaves(low), jax.tree.leaves(wide), strict=True):
        assert 0 < np.linalg.norm(np.asarray(a - b)) <= 0.015 * np.linalg.norm(np.asarray(b))


@both_ways
def test_c1_exports_for_every_platform_and_back(velocity_dtype):
    """With the state's own types."""
    tx, grads = make(velocity_dtype), {str(shape): numbers(shape) for shape in BLOCKED}
    state = tx.init(grads)
    exported = export.export(jax.jit(tx.update), platforms=["cpu", "cuda", "rocm", "tpu"])(
        grads, state
    )
    read = export.deserialize(exported.serialize())
    assert bits(read.call(grads, state)) == bits(tx.update(grads, state))


@every_dtype
def test_c1_under_strict_modes(velocity_dtype):
    tx = make(velocity_dtype)
    grads = {str(shape): numbers(shape).astype("bfloat16") for shape in BLOCKED}
    with (
        jax.checking_leaks(),
        jax.numpy_dtype_promotion("strict"),
        jax.numpy_rank_promotion("raise"),
    ):
        state = jax.eval_shape(lambda grads: tx.update(grads, tx.init(grads))[1], grads)
        jax.eval_shape(mj.read_velocity, state)
        jax.eval_shape(lambda state: mj.reset_velocity(state, scale=0.5), state)
        start = jax.eval_shape(tx.init, grads)
    assert types(state) == types(start)


def test_c1_derivatives_pass_through_16_bits_and_not_through_8():
    """As if nothing had been rounded; a velocity in 8 bits is a constant of the next step."""
    ones = jnp.ones(SHAPE)

    def second(learning_rate, velocity_dtype):
        tx = mj.momentum(learning_rate, 0.75, velocity_dtype=velocity_dtype)
        state = tx.update(ones, tx.init(ones))[1]
        return tx.update(ones, state)[0].mean()

    slope = jax.jit(jax.grad(second), static_argnums=1)
    assert slope(0.5, "bfloat16") == slope(0.5, "float16") == slope(0.5, None) == -1.75
    assert slope(0.5, "int8") == -1.0

    def first(grads):
        tx = make("int8")
        updates, state = tx.update(grads, tx.init(grads))
        return updates.sum() + mj.read_velocity(state).sum()

    np.testing.assert_array_equal(jax.jit(jax.grad(first))(ones), -0.375)


@pytest.mark.usefixtures("x64")
@every_dtype
def test_c4_wide_arithmetic_for_64_bit_params(velocity_dtype):
    """Updates have 64 bits; what is stored has few."""
    params = {str(shape): jnp.asarray(numbers(shape), "float64") for shape in BLOCKED}
    tx = make(velocity_dtype)
    updates, state = tx.update(params, tx.init(params))
    for name, update in updates.items():
        np.testing.assert_array_equal(update, -0.375 * params[name])
        assert update.dtype == jnp.float64
    assert types(state) == types(tx.init(params))


def test_c5_no_gradient_leaves_codes_and_scales():
    tx = make("int8")
    grads = {"still": numbers(), "moved": numbers()}
    state = moving(tx, grads)
    _, after = tx.update({**grads, "still": None}, state)
    for tree, before in ((after.velocity, state.velocity), (after.scales, state.scales)):
        assert bits(tree["still"]) == bits(before["still"])
        assert bits(tree["moved"]) != bits(before["moved"])


def test_c9_errors_speak_of_params_not_of_codes():
    tx = make("int8")
    state = tx.init({"w": numbers()})
    with pytest.raises(ValueError, match=r"at \['w'\] has shape \(64, 64\), but .* \(64, 128\)"):
        tx.update({"w": jnp.ones((64, 64))}, state)
    with pytest.raises(ValueError, match=r"only in the gradients: \['v'\]; .*: \['w'\]\."):
        tx.update({"v": numbers()}, state)


@pytest.mark.parametrize("pattern", [0x7FC00000, 0x7FFFFFFF, 0xFFFFFFFF, 0x7F800001])
def test_every_nan_is_seen_in_8_bits(pattern):
    """Also that of NVIDIA's arithmetic, 0x7FFFFFFF: its upper half, rounded up, is that of -0."""
    value = jnp.asarray(np.ones(SHAPE, np.float32))
    nan = jnp.asarray(np.asarray(pattern, np.uint32).view(np.float32))
    stored = _storage.BLOCKS.init(value, np.dtype(np.int8))
    encoded = jax.jit(_storage.BLOCKS.encode)(
        value.at[3, 40].set(nan), stored, _storage.seed_of(jnp.int32(0))
    )
    expected = np.ones(SHAPE, bool)
    expected[:32, 40] = False
    np.testing.assert_array_equal(np.isfinite(_storage.BLOCKS.decode(encoded)), expected)


# Around it. ------------------------------------------------------------------------------


def test_reset_of_8_bits():
    """All, a leaf, single values; blocks that have none of them keep their bits."""
    state = moving(make("int8"), {"w": normal(), "v": normal(seed=1)})
    before = mj.read_velocity(state)
    assert not np.any(mj.read_velocity(mj.reset_velocity(state))["w"])
    halved = mj.reset_velocity(state, {"w": True, "v": False}, scale=-0.5)
    assert bits(halved.velocity["v"]) == bits(state.velocity["v"])
    assert bits(halved.scales["v"]) == bits(state.scales["v"])
    np.testing.assert_allclose(
        mj.read_velocity(halved)["w"], -0.5 * before["w"], atol=0.02 * np.abs(before["w"]).max()
    )
    mask = np.zeros(SHAPE, bool)
    mask[5, 3] = True
    after = mj.reset_velocity(state, {"w": mask, "v": False})
    read = np.asarray(mj.read_velocity(after)["w"])
    assert read[5, 3] == 0
    elsewhere = np.ones(SHAPE, bool)
    elsewhere[:32, 3] = False
    np.testing.assert_array_equal(read[elsewhere], before["w"][elsewhere])
    for tree, held, others in (
        (after.velocity, state.velocity, elsewhere),
        (after.scales, state.scales, elsewhere[::32]),
    ):
        np.testing.assert_array_equal(np.asarray(tree["w"])[others], np.asarray(held["w"])[others])
    assert types(after) == types(state)
    with pytest.raises(ValueError, match=r"where at \['v'\] has shape \(3,\)"):
        mj.reset_velocity(state, {"w": False, "v": np.ones(3, bool)})


def test_restart_of_8_bits():
    """Where the gradient turns, the velocity starts anew."""
    tx = mj.adaptive_restart(make("int8"))
    grads = normal()
    state = moving(tx, grads)
    updates, _ = tx.update(-grads, state, 0.625 * grads)
    np.testing.assert_array_equal(updates, 0.375 * grads)


def test_diagnostics_of_8_bits():
    """What is measured is what is read; codes are refused with the way to read them."""
    grads = normal()
    state = moving(make("int8"), grads)
    read = mj.read_velocity(state)
    found = mj.diagnostics.measure(grads, read, learning_rate=0.375, mu=0.75)
    energy = np.sum(np.asarray(read, np.float64) ** 2) / (2 * 0.375)
    np.testing.assert_allclose(found.kinetic_energy, energy, rtol=1e-5)
    with pytest.raises(TypeError, match=r"int8: codes.*read_velocity\(state\)"):
        mj.diagnostics.measure(grads, state.velocity, learning_rate=0.375, mu=0.75)


@pytest.mark.parametrize("velocity_dtype", [None, "int8"])
def test_explicit_meshes_bring_masks_and_gradients_to_the_velocity(velocity_dtype):
    """In resets, restarts and jobs that are carried over: all that scales or reads one."""
    mesh = jax.make_mesh((4, 2), ("d", "m"), axis_types=(AxisType.Explicit,) * 2)

    def put(x, *spec):
        return jax.device_put(x, NamedSharding(mesh, P(*spec)))

    tx = mj.adaptive_restart(mj.trace(0.75, velocity_dtype=velocity_dtype))
    whole = numbers()
    params, state = put(whole, "m"), moving(tx, put(whole, "d", "m"))
    mask = np.asarray(whole > 3)
    reset = mj.read_velocity(mj.reset_velocity(state, put(mask)))
    np.testing.assert_array_equal(reset == 0, mask | (mj.read_velocity(state) == 0))
    # The params have moved by -3/8 of a gradient that turns: the velocity starts anew.
    updates, after = tx.update(-params, state, 0.625 * params)
    np.testing.assert_array_equal(updates, -whole)
    held = after.inner_state
    dumped = mj.frameworks.dump_optax(optax.trace(0.75).init(params), (held,))
    back = mj.frameworks.load_optax((held,), (dumped,))[0]
    for a, b in zip(jax.tree.leaves(back), jax.tree.leaves(held), strict=True):
        assert a.sharding.is_equivalent_to(b.sharding, a.ndim)


def test_frameworks_of_8_bits():
    """A job goes to Optax and comes back, at the price of being stored once more."""
    params = {"kernel": normal()}
    tx = mj.trace(0.75, velocity_dtype="int8")
    state = moving(tx, params)
    dumped = mj.frameworks.dump_optax(optax.trace(0.75).init(params), (state,))
    held = np.asarray(mj.read_velocity(state)["kernel"])
    np.testing.assert_allclose(dumped.trace["kernel"], held, rtol=1e-6)
    back = mj.frameworks.load_optax((tx.init(params),), (dumped,))[0]
    assert types(back) == types(state)
    error = np.linalg.norm(mj.read_velocity(back)["kernel"] - held)
    assert error < 0.008 * np.linalg.norm(held)


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


def test_read_velocity_puts_together_what_is_held_apart():
    """Of partition and masked; two velocities of one param are refused, and none."""
    params = {"a": {"w": numbers(), "v": numbers(seed=1)}, "b": numbers(seed=2)}
    tx = optax.partition(
        {"8": make("int8"), "32": make(None), "0": optax.set_to_zero()},
        {"a": {"w": "8", "v": "0"}, "b": "32"},
    )
    read = mj.read_velocity(moving(tx, params))
    assert isinstance(read["a"]["v"], optax.MaskedNode)
    np.testing.assert_array_equal(read["b"], -0.375 * 1.75 * params["b"])
    assert read["a"]["w"].shape == SHAPE
    first, second = mj.read_velocity(
        moving(mj.aggmo(0.375, (0.0, 0.75), velocity_dtype="int8"), params)
    )
    assert jax.tree.structure(first) == jax.tree.structure(second) == jax.tree.structure(params)
    with pytest.raises(ValueError, match="two velocities"):
        mj.read_velocity(optax.chain(make(None), make("int8")).init(params))
    mixed = optax.partition({0: make(None), 1: mj.aggmo(0.5)}, {"a": 0, "b": 1})
    with pytest.raises(ValueError, match="velocities of momentum, aggmo, which have not one"):
        mj.read_velocity(mixed.init(params))
    with pytest.raises(ValueError, match="there is no velocity"):
        mj.read_velocity(optax.adam(0.1).init(params))
