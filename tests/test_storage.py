"""Velocities in 16 and 8 bits: unbiased, bit-identical everywhere, never stalled."""

import functools
import itertools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import export
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from stored import SHAPE, bits, every_dtype, make, mj, moving, normal, numbers
from test_quantization import BLOCKED

from momentum_jax import _rounding, _storage
from momentum_jax._storage import check_dtype

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


def types(tree):
    leaves, treedef = jax.tree.flatten(tree)
    return treedef, [(x.shape, x.dtype, x.weak_type) for x in leaves]


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
    (SHAPE, P("d", "m")),  # A shard ends within a block.
    (SHAPE, P(None, ("d", "m"))),
    ((512, 8), P(("d", "m"))),  # Two mesh axes; shards end between blocks.
    ((64, 36, 3), P("d", "m")),  # Blocks of 32 along the third axis from the end.
    ((30, 1024), P(None, ("d", "m"))),  # Blocks along the last axis: a shard is one block.
    ((30, 256), P(None, ("d", "m"))),  # A shard ends within a block.
    ((100, 100), P("d")),  # Blocks of 50.
    ((16, 8), P("d", "m")),  # Too small for 8 bits.
]
WHOLE = {str(i): numbers(shape, i) for i, (shape, _) in enumerate(PLACED)}


@functools.cache
def on_one_device(velocity_dtype):
    return bits(moving(make(velocity_dtype), WHOLE))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("axis_type", "wrap"),
    [(AxisType.Auto, jax.jit), (AxisType.Explicit, lambda f: f)],
    ids=["Auto, jit", "Explicit, eager"],
)
@both_ways
def test_c2_c7_bits_and_shardings_on_eight_devices(velocity_dtype, axis_type, wrap):
    """Same bits as on one device; velocities have the param's sharding and keep it."""
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
    """Reads the compiled init and update, with blocks along each axis."""
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
    """Replicas stay equal. Parts that are large enough for 8 bits are read as they were written."""
    mesh = jax.make_mesh((2,), ("d",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])
    tx, grads = make(velocity_dtype), numbers()

    def read(grads):
        return mj.read_velocity(moving(tx, grads))

    mapped = jax.shard_map(read, mesh=mesh, in_specs=P("d"), out_specs=P("d"))
    parts = map(jax.jit(read), jnp.split(grads, 2))
    np.testing.assert_array_equal(jax.jit(mapped)(grads), jnp.concatenate([*parts]))


@pytest.mark.parametrize("velocity_dtype", [None, "bfloat16", "int8"])
def test_c2_zeros_under_jit_are_made_in_the_params_sharding(velocity_dtype):
    """Holds for codes and scales, with blocks along the sharded axis."""
    mesh = jax.make_mesh((4, 2), ("d", "m"), axis_types=(AxisType.Auto,) * 2)
    params = jax.device_put(jnp.ones((256, 512)), NamedSharding(mesh, P("d", "m")))
    for leaf in jax.tree.leaves(jax.jit(make(velocity_dtype).init)(params))[1:]:
        assert leaf.sharding.is_equivalent_to(params.sharding, 2)


@both_ways
def test_c12_equal_leaves_share_one_function(velocity_dtype):
    """The traced, lowered and compiled program does not grow with the number of equal leaves."""

    def parts(number):
        params = [jnp.ones(SHAPE)] * number
        tx = make(velocity_dtype)
        text = jax.jit(tx.update).lower(params, tx.init(params)).as_text()
        # Functions, and how often the random bits are computed, found by a multiplier of the hash.
        return text.count("func.func"), text.count(str(0x7FEB352D))

    assert parts(2) == parts(12)
    assert min(parts(2)) > 0


# Blocks and codecs. ----------------------------------------------------------------------


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
    """Numbers that the format can represent are unchanged by encoding and decoding."""
    dtype = np.dtype(velocity_dtype)
    param = jnp.ones(SHAPE, "float32")
    codec, stored_dtype = _storage.codec_for(param, dtype)
    stored = jax.jit(codec.init, static_argnums=1)(param, stored_dtype)
    assert codec is _storage.CODECS[dtype] is _storage.codec_of(stored)
    assert stored.values.dtype == dtype
    value = jnp.resize(jnp.asarray([0.0, 1.0, -1.0, 0.0]), SHAPE).astype("float32")
    encoded = jax.jit(codec.encode)(value, stored, _rounding.seed_of(jnp.int32(1)))
    assert types(encoded) == types(stored)
    decoded = jax.jit(codec.decode)(encoded)
    assert decoded.dtype == _storage.decoded_dtype(stored)
    np.testing.assert_array_equal(np.asarray(decoded, np.float32), value)


# The contract in 8 bits. -----------------------------------------------------------------


def test_c6_scales_are_a_tree_like_the_params():
    """For any tree; if the velocity is not quantized, scales are ones of the param's shape."""
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


@pytest.mark.slow
@pytest.mark.parametrize("name", OWN)
@pytest.mark.usefixtures("x64")
def test_c9_a_state_stored_in_another_dtype_is_refused(name):
    """Every pair of dtypes, also under jit. The error gives the path, both dtypes and the remedy.

    None stores each velocity in its param's own dtype, which the transformation does not know.
    """
    params = {"w": jnp.ones(SHAPE, "float32"), "b": jnp.ones(3, "float32")}
    made = {dtype: TRANSFORMS[name](dtype) for dtype in STORED}
    states = {dtype: made[dtype].init(params) for dtype in STORED}
    alike = {(None, "float32"), ("float32", None), ("float64", None)}
    for (given, state), (asked, tx) in itertools.product(states.items(), made.items()):
        for grads in (params, {**params, "b": None}, {**params, "w": None}):
            if given == asked or (given, asked) in alike:
                assert types(jax.eval_shape(tx.update, grads, state)[1]) == types(state)
                continue
            (path, shape) = ("b", (3,)) if grads["b"] is not None else ("w", SHAPE)
            stored = "float32" if given in (None, "int8") and shape == (3,) else given or "float32"
            message = (
                rf"the velocity at \['{path}'\] in {stored}.* velocity_dtype={asked}\..* "
                "(Make it with|make a new state)"
            )
            for update in (tx.update, jax.jit(tx.update)):
                with pytest.raises(TypeError, match=message) as error:
                    update(grads, state)
                assert ("int8" in str(error.value)) == ("int8" in (given, asked))


@pytest.mark.parametrize(("given", "asked"), list(itertools.permutations(OWN, 2)))
def test_c9_a_state_of_another_transformation_is_refused(given, asked):
    """All pairs, also within a chain. The error gives the names of both types."""
    params = {"w": jnp.ones(SHAPE)}
    names = {"momentum": "Momentum", "trace": "Trace", "qhm": "QHM", "aggmo": "AggMo"}
    message = rf"the state is {names[given]}State, but must be the {names[asked]}State"
    for dtype in (None, "int8"):
        theirs, ours = TRANSFORMS[given](dtype), TRANSFORMS[asked](dtype)
        for make_tx in (lambda tx: tx, lambda tx: optax.chain(optax.clip(1.0), tx)):
            state = make_tx(theirs).init(params)
            with pytest.raises(TypeError, match=message):
                make_tx(ours).update(params, state)


@pytest.mark.slow
@pytest.mark.parametrize("name", OWN)
@pytest.mark.parametrize("velocity_dtype", [None, "bfloat16", "int8"])
def test_arrays_stacked_by_vmap_and_scan_are_read_and_reset_as_they_are(name, velocity_dtype):
    """For an ensemble, and for the states of all steps, reading needs no vmap."""
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


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@every_dtype
def test_what_is_not_finite_is_seen(velocity_dtype, bad):
    """In 8 bits it makes its whole block non-finite, and only that; a reset makes it 0."""
    value = normal().at[3, 40].set(bad)
    state = moving(mj.trace(0.5, velocity_dtype=velocity_dtype), value)
    finite = np.isfinite(np.asarray(mj.read_velocity(state), np.float32))
    expected = np.ones(SHAPE, bool)
    expected[: 32 if velocity_dtype == "int8" else 4, 40] = False
    if velocity_dtype != "int8":
        expected[:3, 40] = True
    np.testing.assert_array_equal(finite, expected)
    assert not np.any(np.asarray(mj.read_velocity(mj.reset_velocity(state)), np.float32))


PARAMS = {"w": numbers(), "half": numbers(seed=1).astype("bfloat16"), "b": 1.0, "none": None}


@pytest.mark.parametrize("name", ["aggmo", "restart", "apply_if_finite", "MultiSteps"])
def test_c2_types_are_those_of_init(name):
    """Eager, jitted, donated and scanned, with one trace; updates have the gradients' dtypes."""
    tx = TRANSFORMS[name]("int8")
    # Before Optax 0.2.6, a Python number changes the type of the accumulator of its MultiSteps.
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
    """With all transformations, the 8-bit velocity differs from the float32 one by at most 1.5%."""
    grads = {"w": normal()}
    low, wide = (
        mj.read_velocity(moving(TRANSFORMS[name](dtype), grads, steps=4))
        for dtype in ("int8", None)
    )
    for a, b in zip(jax.tree.leaves(low), jax.tree.leaves(wide), strict=True):
        assert 0 < np.linalg.norm(np.asarray(a - b)) <= 0.015 * np.linalg.norm(np.asarray(b))


@pytest.mark.slow
@both_ways
def test_c1_exports_for_every_platform_and_back(velocity_dtype):
    """The exported program keeps the state's types."""
    tx, grads = make(velocity_dtype), {str(shape): numbers(shape) for shape in BLOCKED}
    state = tx.init(grads)
    exported = export.export(jax.jit(tx.update), platforms=["cpu", "cuda", "rocm", "tpu"])(
        grads, state
    )
    read = export.deserialize(exported.serialize())
    assert bits(read.call(grads, state)) == bits(tx.update(grads, state))


@pytest.mark.slow
@every_dtype
def test_c1_under_strict_modes(velocity_dtype):
    tx = make(velocity_dtype)
    shapes = (64, 128), (30, 256)  # Blocks along the last axis but one, and along the last.
    grads = {str(shape): numbers(shape).astype("bfloat16") for shape in shapes}
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
    """16 bits: as if nothing were rounded. An 8-bit velocity is a constant of the next step."""
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
    """Updates have 64 bits; the stored velocity has 16 or 8."""
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


# Other functions with 8-bit velocities. --------------------------------------------------


def test_reset_of_8_bits():
    """Resets everything, a leaf, single values; other blocks keep their bits."""
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
    for tree, old, others in (
        (after.velocity, state.velocity, elsewhere),
        (after.scales, state.scales, elsewhere[::32]),
    ):
        np.testing.assert_array_equal(np.asarray(tree["w"])[others], np.asarray(old["w"])[others])
    assert types(after) == types(state)
    with pytest.raises(ValueError, match=r"where at \['v'\] has shape \(3,\)"):
        mj.reset_velocity(state, {"w": False, "v": np.ones(3, bool)})


def test_restart_of_8_bits():
    """When the gradient turns, the velocity restarts from 0."""
    tx = mj.adaptive_restart(make("int8"))
    grads = normal()
    state = moving(tx, grads)
    updates, _ = tx.update(-grads, state, 0.625 * grads)
    np.testing.assert_array_equal(updates, 0.375 * grads)


def test_diagnostics_of_8_bits():
    """Diagnostics measure the decoded velocity; codes are refused with a remedy."""
    grads = normal()
    state = moving(make("int8"), grads)
    read = mj.read_velocity(state)
    found = mj.diagnostics.measure(grads, read, learning_rate=0.375, mu=0.75)
    energy = np.sum(np.asarray(read, np.float64) ** 2) / (2 * 0.375)
    np.testing.assert_allclose(found.kinetic_energy, energy, rtol=1e-5)
    with pytest.raises(TypeError, match=r"int8: codes.*read_velocity\(state\)"):
        mj.diagnostics.measure(grads, state.velocity, learning_rate=0.375, mu=0.75)


@pytest.mark.slow
@pytest.mark.parametrize("velocity_dtype", [None, "int8"])
def test_explicit_meshes_bring_masks_and_gradients_to_the_velocity(velocity_dtype):
    """Covers resets, restarts and checkpoints from other frameworks."""
    mesh = jax.make_mesh((4, 2), ("d", "m"), axis_types=(AxisType.Explicit,) * 2)

    def put(x, *spec):
        return jax.device_put(x, NamedSharding(mesh, P(*spec)))

    tx = mj.adaptive_restart(mj.trace(0.75, velocity_dtype=velocity_dtype))
    whole = numbers()
    params, state = put(whole, "m"), moving(tx, put(whole, "d", "m"))
    mask = np.asarray(whole > 3)
    reset = mj.read_velocity(mj.reset_velocity(state, put(mask)))
    np.testing.assert_array_equal(reset == 0, mask | (mj.read_velocity(state) == 0))
    # The params have moved by -3/8 of a gradient that turns, so the velocity restarts.
    updates, after = tx.update(-params, state, 0.625 * params)
    np.testing.assert_array_equal(updates, -whole)
    inner = after.inner_state
    dumped = mj.frameworks.dump_optax(optax.trace(0.75).init(params), (inner,))
    back = mj.frameworks.load_optax((inner,), (dumped,))[0]
    for a, b in zip(jax.tree.leaves(back), jax.tree.leaves(inner), strict=True):
        assert a.sharding.is_equivalent_to(b.sharding, a.ndim)


def test_frameworks_of_8_bits():
    """A state is converted to Optax and back; the velocity is stored once more."""
    params = {"kernel": normal()}
    tx = mj.trace(0.75, velocity_dtype="int8")
    state = moving(tx, params)
    dumped = mj.frameworks.dump_optax(optax.trace(0.75).init(params), (state,))
    velocity = np.asarray(mj.read_velocity(state)["kernel"])
    np.testing.assert_allclose(dumped.trace["kernel"], velocity, rtol=1e-6)
    back = mj.frameworks.load_optax((tx.init(params),), (dumped,))[0]
    assert types(back) == types(state)
    error = np.linalg.norm(mj.read_velocity(back)["kernel"] - velocity)
    assert error < 0.008 * np.linalg.norm(velocity)


def test_read_velocity_puts_together_what_is_held_apart():
    """For partition and masked."""
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
