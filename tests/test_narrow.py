"""Velocities in 16 and 8 bits: right on average, the same bits everywhere, never stuck."""

import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference
from jax import export
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import momentum_jax
from momentum_jax import _narrow

mj: Any = momentum_jax  # Optax's trees are of too many types to compute with.

NARROW = ["bfloat16", "float16", "int8"]
SHAPE = (64, 128)
every_dtype = pytest.mark.parametrize("velocity_dtype", NARROW)


def numbers(shape=SHAPE, seed=0):
    """Multiples of 1/64: the arithmetic on them is exact for some steps."""
    return jnp.asarray(np.random.default_rng(seed).integers(-255, 256, shape) / 64, jnp.float32)


def normal(shape=SHAPE, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


# Outside jit each of its operations would be compiled on its own.
round_by_chance = jax.jit(_narrow.round_by_chance, static_argnums=2)


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


# The rounding. ---------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(), (7,), (3, 5), (2, 3, 4, 5)])
def test_noise_is_the_references(shape):
    """To the bit: anyone can repeat a run, in any language."""
    tree = {"layer": [jnp.zeros(shape)]}
    ((path, leaf),) = jax.tree_util.tree_leaves_with_path(tree)
    noise = jax.jit(lambda count: _narrow._noise(_narrow.make_seed(path, count), leaf))
    for count in (0, 1, 2**31 - 1):
        np.testing.assert_array_equal(noise(count), reference.noise("['layer'][0]", count, shape))


def test_noise_is_uniform_and_of_counts_paths_and_positions_independent():
    """Means, bits, and correlations along each way that a stream might repeat itself."""
    size = 2**14
    each = np.stack(
        [reference.noise(path, count, (size,)) for path in ("['a']", "['b']") for count in range(8)]
    )
    uniform: Any = each / 2**32
    one = 1 / np.sqrt(each.size)
    assert abs(uniform.mean() - 0.5) < 5 * one / np.sqrt(12)
    for bit in range(32):
        assert abs((each >> np.uint64(bit) & np.uint64(1)).mean() - 0.5) < 5 * one / 2
    between: Any = np.corrcoef(np.concatenate([uniform, np.roll(uniform, 1, axis=1)]))
    assert np.abs(between[np.triu_indices(32, 1)]).max() < 5 / np.sqrt(size)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize(("low", "high"), [(-2, 3), (-13, -10), (-23, -14)])
def test_rounding_is_the_references(dtype, low, high):
    """Also where float16 has fewer and fewer bits."""
    rng = np.random.default_rng(0)
    values = np.ldexp(rng.uniform(-1, 1, 4096), rng.integers(low, high, 4096))
    values = np.rint(values * 2.0**36) / 2.0**36
    values = values.astype(np.float32).astype(np.float64)
    noise = reference.noise("", 3, values.shape)
    expected = reference.rounded_by_chance(values, dtype, noise)
    found = round_by_chance(
        jnp.asarray(values, jnp.float32), jnp.asarray(noise, jnp.uint32), np.dtype(dtype)
    )
    np.testing.assert_array_equal(np.asarray(found, np.float64), expected)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_rounding_keeps_what_can_be_held(dtype):
    """All 65,536 numbers, whatever the noise: NaN and the infinities among them."""
    every = np.arange(2**16, dtype=np.uint16).view(np.dtype(dtype))
    wide = jnp.asarray(every.astype(np.float32))
    wide = jnp.where(jnp.abs(wide) < jnp.finfo(jnp.float32).tiny, 0, wide)  # As compilers may.
    for noise in (0, 2**32 - 1):
        found = round_by_chance(wide, jnp.full(wide.shape, noise, jnp.uint32), np.dtype(dtype))
        np.testing.assert_array_equal(np.asarray(found, np.float32), np.asarray(wide))


def test_codes_are_the_references():
    """Codes and values, up to ties between float32 and float64."""
    value = normal() * jnp.asarray([1.0, 1e-12, 0.0, 1e30]).repeat(16)[:, None]
    seed = _narrow.make_seed((), jnp.int32(5))
    held = jax.jit(_narrow.quantize, static_argnums=1)(value, (64, 2), seed)
    expected, codes = reference.quantized(value, "", 5)
    found = np.asarray(held.codes, int)
    assert np.abs(found - codes).max() <= 1
    assert (found != codes).mean() < 1e-3
    largest = np.abs(value).max(-1, keepdims=True)
    agree = found == codes
    difference = np.abs(jax.jit(_narrow.read)(held) - expected) / np.where(largest > 0, largest, 1)
    assert difference[agree].max() < 1e-6


@every_dtype
def test_stored_velocities_are_right_on_average(velocity_dtype):
    """Each value, over 4,000 steps: to 5 standard errors of the mean."""
    value, tx = normal((32, 128)), make(velocity_dtype, mu=0.0)
    state = tx.init(value)

    def step(total, count):
        _, after = tx.update(value, state._replace(count=count))
        return total + (mj.read_velocity(after).astype(jnp.float32) + 0.375 * value), None

    steps = 4000
    run = jax.jit(lambda: jax.lax.scan(step, jnp.zeros_like(value), jnp.arange(steps))[0])
    mean = np.asarray(run()) / steps
    # The widest step of each dtype, in units of the largest value around.
    largest = np.abs(0.375 * value).reshape(32, 2, 64).max(-1).repeat(64, -1)
    width = {"bfloat16": 2**-7, "float16": 2**-10, "int8": 1.5 / 126.5}[velocity_dtype]
    assert np.abs(mean / largest).max() < 5 * 0.5 * width / np.sqrt(steps)


# The stall. ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("velocity_dtype", "mu"),
    [(dtype, mu) for dtype in ("bfloat16", "int8") for mu in (0.9, 0.99, 0.999)]
    + [("float16", 0.999)],
)
def test_velocity_reaches_its_limit(velocity_dtype, mu):
    """Within 1%, from rest and from the limit of other gradients; nearest stops at a quarter."""
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


@pytest.mark.parametrize("velocity_dtype", ["bfloat16", "int8"])
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
    np.testing.assert_array_equal(jax.vmap(mj.read_velocity)(mapped)[0], mj.read_velocity(eager))


# The last one has blocks that end within a device's part.
PLACED = [
    (SHAPE, P("d", "m")),
    (SHAPE, P(None, ("d", "m"))),
    ((512, 8), P(("d", "m"))),  # Joined, and split between blocks.
    ((64, 36, 3), P("d", "m")),
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
@pytest.mark.parametrize("velocity_dtype", ["bfloat16", "int8"])
def test_c2_c7_bits_and_shardings_on_eight_devices(velocity_dtype, axis_type, wrap):
    """Those of one device; codes in the param's sharding, and all where it was at init."""
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
        held = state.velocity[name]
        codes = held.codes if velocity_dtype == "int8" else held
        assert codes.sharding.is_equivalent_to(param.sharding, param.ndim)
    for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(start), strict=True):
        assert a.sharding.is_equivalent_to(b.sharding, a.ndim)


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("velocity_dtype", ["bfloat16", "int8"])
def test_c7_no_device_holds_or_sends_more_than_its_part(velocity_dtype, axis_type):
    """Read from the compiled init and update."""
    mesh = jax.make_mesh((4, 2), ("d", "m"), axis_types=(axis_type,) * 2)
    params = jax.device_put(jnp.ones((256, 512)), NamedSharding(mesh, P("d", "m")))
    tx = make(velocity_dtype)
    init = jax.jit(tx.init).lower(params).compile()
    update = jax.jit(tx.update).lower(params, tx.init(params)).compile()
    for compiled in (init, update):
        text = str(compiled.as_text())
        sizes = re.findall(r"\b(?:f32|bf16|s8|u16|u32|pred)\[([\d,]+)\]", text)
        assert max(np.prod([int(n) for n in size.split(",")]) for size in sizes) == 64 * 256
        assert not re.search(r"all-|collective-", text)


@pytest.mark.parametrize("velocity_dtype", ["bfloat16", "int8"])
def test_shard_map_steps_each_part_as_an_array_of_its_own(velocity_dtype):
    """Replicas stay equal, and parts, each large enough for 8 bits, are read as written."""
    mesh = jax.make_mesh((2,), ("d",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])
    tx, grads = make(velocity_dtype), numbers()

    def read(grads):
        return mj.read_velocity(moving(tx, grads))

    mapped = jax.shard_map(read, mesh=mesh, in_specs=P("d"), out_specs=P("d"))
    parts = map(jax.jit(read), jnp.split(grads, 2))
    np.testing.assert_array_equal(jax.jit(mapped)(grads), jnp.concatenate([*parts]))


def test_streams_go_by_path():
    """Of another leaf, and for another velocity of aggmo, another one; neighbours do not matter."""
    grads = normal()
    tx = make("bfloat16")
    both = moving(tx, {"a": grads, "b": grads}).velocity
    assert bits(both["a"]) != bits(both["b"])
    frozen = tx.init({"a": grads, "b": grads})
    for _ in range(2):
        _, frozen = tx.update({"a": None, "b": grads}, frozen)
    assert bits(frozen.velocity["b"]) == bits(both["b"])
    masked: Any = optax.masked(tx, {"a": False, "b": True})
    alone = moving(masked, {"a": grads, "b": grads}).inner_state.velocity
    assert bits(alone["b"]) == bits(both["b"])
    twins = moving(mj.aggmo(0.375, (0.75, 0.75), velocity_dtype="bfloat16"), grads).velocity
    assert bits(twins[0]) != bits(twins[1])


# The contract in 8 bits. -----------------------------------------------------------------


def test_blocks_of_any_shape():
    """At most 1.07 bytes a param; values come back to within a code."""
    scales = {
        (4096,): (64,),
        (64, 150): (64, 2),
        (1000, 31): (484,),
        (32, 16, 3, 3): (32, 2),
    }
    values = {str(shape): normal(shape) for shape in scales}
    state = moving(mj.trace(0.0, velocity_dtype="int8"), values, steps=1)
    read = mj.read_velocity(state)
    for shape, of_scales in scales.items():
        held, value = state.velocity[str(shape)], values[str(shape)]
        assert (held.codes.shape, held.codes.dtype) == (shape, jnp.int8)
        assert (held.scales.shape, held.scales.dtype) == (of_scales, jnp.uint32)
        assert sum(x.nbytes for x in held) <= 1.07 * value.size
        error = np.abs(read[str(shape)] - value)
        assert error.max() < 1.5 / 126.5 * np.abs(value).max()


def test_small_leaves_stay_wide():
    """And integer ones as they are."""
    params = {"b": jnp.ones(4095), "h": jnp.ones(3, "bfloat16"), "i": jnp.ones(5000, "int32")}
    velocity = make("int8").init(params).velocity
    assert {name: v.dtype.name for name, v in velocity.items()} == {
        "b": "float32",
        "h": "float32",
        "i": "int32",
    }


def test_complex_params_are_refused():
    with pytest.raises(TypeError, match=r"complex64, which velocity_dtype=int8 cannot hold"):
        make("int8").init(jnp.ones(5000, "complex64"))


def test_zeros_are_exact():
    """A value that has never moved does not begin to."""
    value = (normal() * (numbers(seed=3) > 0)).at[0].set(0.0)
    state = moving(mj.trace(0.0, velocity_dtype="int8"), value)
    read = np.asarray(mj.read_velocity(state))
    np.testing.assert_array_equal(read == 0, value == 0)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@every_dtype
def test_what_is_not_finite_is_seen(velocity_dtype, bad):
    """In 8 bits by the whole block, and only that; a reset makes it 0."""
    value = normal().at[3, 40].set(bad)
    state = moving(mj.trace(0.5, velocity_dtype=velocity_dtype), value)
    finite = np.isfinite(np.asarray(mj.read_velocity(state), np.float32))
    expected = np.ones(SHAPE, bool)
    expected[3, : 64 if velocity_dtype == "int8" else 41] = False
    if velocity_dtype != "int8":
        expected[3, :40] = True
    np.testing.assert_array_equal(finite, expected)
    assert not np.any(np.asarray(mj.read_velocity(mj.reset_velocity(state)), np.float32))


@pytest.mark.parametrize("size", [1e-30, 1e-8, 1e8, 1e30])
def test_codes_for_any_size(size):
    """The error follows the block, also where a float16 scale would be 0 or infinite."""
    value = normal() * size
    read = mj.read_velocity(moving(mj.trace(0.0, velocity_dtype="int8"), value, steps=1))
    error = np.asarray(read, np.float64) - np.asarray(value, np.float64)
    assert 0.0045 < np.linalg.norm(error) / np.linalg.norm(np.asarray(value, np.float64)) < 0.0052


TRANSFORMS: dict[str, Any] = {
    "momentum": lambda dtype: mj.momentum(0.375, 0.75, nesterov=True, velocity_dtype=dtype),
    "qhm": lambda dtype: mj.qhm(0.375, 0.75, 0.5, velocity_dtype=dtype),
    "aggmo": lambda dtype: mj.aggmo(0.375, (0.0, 0.75), velocity_dtype=dtype),
    "restart": lambda dtype: mj.adaptive_restart(make(dtype)),
    "apply_if_finite": lambda dtype: optax.apply_if_finite(make(dtype), 3),
    "MultiSteps": lambda dtype: optax.MultiSteps(make(dtype), 2),
}
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


@pytest.mark.parametrize("name", ["momentum", "qhm", "aggmo"])
def test_velocity_is_the_wide_one_to_within_codes(name):
    """All transformations in 8 bits do what they do in 32."""
    grads = {"w": normal()}
    narrow, wide = (
        mj.read_velocity(moving(TRANSFORMS[name](dtype), grads, steps=4))
        for dtype in ("int8", None)
    )
    for a, b in zip(jax.tree.leaves(narrow), jax.tree.leaves(wide), strict=True):
        assert 0 < np.linalg.norm(np.asarray(a - b)) <= 0.015 * np.linalg.norm(np.asarray(b))


@pytest.mark.parametrize("velocity_dtype", ["bfloat16", "int8"])
def test_c1_exports_for_every_platform_and_back(velocity_dtype):
    """With the state's own types."""
    tx, grads = make(velocity_dtype), {"w": numbers()}
    state = tx.init(grads)
    exported = export.export(jax.jit(tx.update), platforms=["cpu", "cuda", "rocm", "tpu"])(
        grads, state
    )
    read = export.deserialize(exported.serialize())
    assert bits(read.call(grads, state)) == bits(tx.update(grads, state))


@every_dtype
def test_c1_under_strict_modes(velocity_dtype):
    tx, grads = make(velocity_dtype), {"h": numbers().astype("bfloat16")}
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


def test_c1_derivatives_pass_through_16_bits():
    """As if nothing had been rounded."""

    def second(mu, velocity_dtype):
        tx = mj.momentum(0.5, mu, velocity_dtype=velocity_dtype)
        state = tx.update(jnp.ones(3), tx.init(jnp.ones(3)))[1]
        return tx.update(jnp.ones(3), state)[0].sum()

    slope = jax.jit(jax.grad(second), static_argnums=1)
    assert slope(0.75, "bfloat16") == slope(0.75, "float16") == slope(0.75, None)


@pytest.mark.usefixtures("x64")
@every_dtype
def test_c4_wide_arithmetic_for_64_bit_params(velocity_dtype):
    """Updates have 64 bits; what is stored has few."""
    params = jnp.asarray(numbers(), "float64")
    tx = make(velocity_dtype)
    updates, state = tx.update(params, tx.init(params))
    np.testing.assert_array_equal(updates, -0.375 * params)
    assert updates.dtype == jnp.float64
    assert types(state) == types(tx.init(params))


def test_c5_no_gradient_leaves_codes_scales_and_seed():
    tx = make("int8")
    grads = {"still": numbers(), "moved": numbers()}
    state = moving(tx, grads)
    _, after = tx.update({**grads, "still": None}, state)
    assert bits(after.velocity["still"]) == bits(state.velocity["still"])
    assert bits(after.velocity["moved"]) != bits(state.velocity["moved"])


def test_c9_errors_speak_of_params_not_of_codes():
    tx = make("int8")
    state = tx.init({"w": numbers()})
    with pytest.raises(ValueError, match=r"at \['w'\] has shape \(64, 64\), but .* \(64, 128\)"):
        tx.update({"w": jnp.ones((64, 64))}, state)
    with pytest.raises(ValueError, match=r"only in the gradients: \['v'\]; .*: \['w'\]\."):
        tx.update({"v": numbers()}, state)


# Around it. ------------------------------------------------------------------------------


def test_reset_of_8_bits():
    """All, a leaf, single values; blocks that have none of them keep their bits."""
    state = moving(make("int8"), {"w": normal(), "v": normal(seed=1)})
    before = mj.read_velocity(state)
    assert not np.any(mj.read_velocity(mj.reset_velocity(state))["w"])
    halved = mj.reset_velocity(state, {"w": True, "v": False}, scale=-0.5)
    assert bits(halved.velocity["v"]) == bits(state.velocity["v"])
    np.testing.assert_allclose(
        mj.read_velocity(halved)["w"], -0.5 * before["w"], atol=0.02 * np.abs(before["w"]).max()
    )
    mask = np.zeros(SHAPE, bool)
    mask[5, 3] = True
    after = mj.reset_velocity(state, {"w": mask, "v": False})
    read = np.asarray(mj.read_velocity(after)["w"])
    assert read[5, 3] == 0
    elsewhere = np.ones(SHAPE, bool)
    elsewhere[5, :64] = False
    np.testing.assert_array_equal(read[elsewhere], before["w"][elsewhere])
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
    """What is measured is what is held."""
    grads = normal()
    state = moving(make("int8"), grads)
    settings = {"learning_rate": 0.375, "mu": 0.75}
    found = mj.diagnostics.measure(grads, state.velocity, **settings)
    expected = mj.diagnostics.measure(grads, mj.read_velocity(state), **settings)
    np.testing.assert_allclose(found.gain, expected.gain, rtol=1e-6)
    np.testing.assert_allclose(found.kinetic_energy, expected.kinetic_energy, rtol=1e-6)


@pytest.mark.parametrize("velocity_dtype", [None, "int8"])
def test_explicit_meshes_bring_masks_and_gradients_to_the_velocity(velocity_dtype):
    """In resets, restarts and jobs that are carried over: all that scales or reads one."""
    mesh = jax.make_mesh((4, 2), ("d", "m"), axis_types=(AxisType.Explicit,) * 2)

    def put(x, *spec):
        return jax.device_put(x, NamedSharding(mesh, P(*spec)))

    tx, whole = mj.adaptive_restart(make(velocity_dtype)), numbers()
    params, state = put(whole, "m"), moving(tx, put(whole, "d", "m"))
    mask = np.asarray(whole > 3)
    reset = mj.read_velocity(mj.reset_velocity(state, put(mask)))
    np.testing.assert_array_equal(reset == 0, mask | (mj.read_velocity(state) == 0))
    updates, after = tx.update(-params, state, 0.625 * params)
    np.testing.assert_array_equal(updates, 0.375 * whole)
    held = after.inner_state
    dumped = mj.frameworks.dump_optax(optax.trace(0.75).init(params), (held,))
    back = mj.frameworks.load_optax((held,), (dumped,))[0]
    for a, b in zip(jax.tree.leaves(back), jax.tree.leaves(held), strict=True):
        assert a.sharding.is_equivalent_to(b.sharding, a.ndim)


def test_frameworks_of_8_bits():
    """A job goes to Optax and comes back, at the price of being stored once more."""
    params = {"kernel": normal()}
    state = moving(make("int8"), params)
    dumped = mj.frameworks.dump_optax(optax.trace(0.75).init(params), (state,))
    held = np.asarray(mj.read_velocity(state)["kernel"])
    np.testing.assert_allclose(dumped.trace["kernel"], held, rtol=1e-6)
    back = mj.frameworks.load_optax((make("int8").init(params),), (dumped,))[0]
    assert types(back) == types(state)
    error = np.linalg.norm(mj.read_velocity(back)["kernel"] - held)
    assert error < 0.006 * np.linalg.norm(held)


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
    with pytest.raises(ValueError, match="there is no velocity"):
        mj.read_velocity(optax.adam(0.1).init(params))
