"""State, params and updates keep their sharding, however gradients and updates are sharded.

Run as a program, this file is a process with one device that exports steps for eight devices.
"""

import contextlib
import functools
import itertools
import json
import math
import pathlib
import re
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.experimental import jet
from jax.sharding import AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from processes import run_for_tpu, run_on_one_device

import momentum_jax as mj
from benchmarks.compiled import topology

set_mesh = jax.set_mesh if hasattr(jax, "set_mesh") else getattr(jax.sharding, "use_mesh")  # noqa: B009

STEPS = 3
AUTO, EXPLICIT = AxisType.Auto, AxisType.Explicit
SPECS = [P(), P("d"), P(None, "m"), P("d", "m")]
# (sharding of the param, sharding of its gradient)
PAIRS = [(own, other) for own in SPECS for other in SPECS if own != other]
# 8-bit tests have large arrays and long programs, so each sharding occurs only once.
FEW_PAIRS = list(zip(SPECS, SPECS[::-1], strict=True))

momentum = functools.partial(mj.momentum, 0.5, 0.5)
TRANSFORMS: dict[str, Any] = {
    "momentum": lambda mesh: momentum(nesterov=True),
    "trace": lambda mesh: optax.chain(mj.trace(0.5), optax.scale(-0.5)),
    "restart": lambda mesh: mj.adaptive_restart(momentum()),
    "bfloat16": lambda mesh: momentum(velocity_dtype="bfloat16"),
    "int8": lambda mesh: momentum(velocity_dtype="int8"),
    "kahan": lambda mesh: mj.kahan(momentum()),
    "zero1": lambda mesh: momentum() if mesh is None else mj.sharding.zero1(momentum(), mesh, "d"),
}


def make_mesh(axis_type):
    return jax.make_mesh((4, 2), ("d", "m"), axis_types=(axis_type,) * 2)


def numbers(seed, shape):
    """Returns multiples of 1/64, so that the sums and products of the steps are exact."""
    return np.random.default_rng(seed).integers(-255, 256, shape) / 64


def make(name, mesh=None, turn=0):
    """Returns params, gradients sharded differently, and updates, with one leaf per pair.

    With another `turn`, each leaf has another pair of shardings and the same numbers.
    """
    pairs = FEW_PAIRS if name == "int8" else PAIRS
    pairs = pairs[turn:] + pairs[:turn]
    shape = (64, 64) if name == "int8" else (8, 16)
    dtype = "bfloat16" if name == "kahan" else "float32"

    def put(x, dtype, spec):
        x = jnp.asarray(x, dtype)
        return x if mesh is None else jax.device_put(x, NamedSharding(mesh, spec))

    trees: list[dict[str, Any]] = [{}, {}, {}]
    for i, (own, other) in enumerate(pairs):
        leaves = (
            put(numbers(i, shape), dtype, own),
            put(numbers(i + 99, shape), "float32", other),
            put(np.zeros(shape), "float32", own),
        )
        for tree, leaf in zip(trees, leaves, strict=True):
            tree[f"{i:02}"] = leaf
    return trees


def stepping(tx):
    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return mj.apply_updates(params, updates), state, updates

    return step


def run_in_python(step, params, state, grads, updates):
    for _ in range(STEPS):
        params, state, updates = step(params, state, grads)
        # The virtual devices of one CPU can hang with several programs in flight.
        jax.block_until_ready(params)
    return params, state, updates


def run_jitted(step, *arguments):
    return run_in_python(jax.jit(step), *arguments)


def run_ahead(step, params, state, grads, updates):
    """Runs a function compiled from shapes and shardings only."""
    arguments = params, state, grads
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), arguments
    )
    return run_in_python(jax.jit(step).lower(*abstract).compile(), *arguments, updates)


@functools.partial(jax.jit, static_argnums=0)
def run_scanned(step, params, state, grads, updates):
    def body(carry, _):
        return step(*carry[:2], grads), None

    return jax.lax.scan(body, (params, state, updates), length=STEPS)[0]


@functools.partial(jax.jit, static_argnums=0)
def run_fori_loop(step, params, state, grads, updates):
    def body(_, carry):
        return step(*carry[:2], grads)

    return jax.lax.fori_loop(0, STEPS, body, (params, state, updates))


WAYS = [run_in_python, run_jitted, run_ahead, run_scanned, run_fori_loop]


@functools.cache
def unsharded(name):
    """Returns the results of the steps on one device."""
    params, grads, updates = make(name)
    tx = TRANSFORMS[name](None)
    return jax.tree.map(
        np.asarray, run_jitted(stepping(tx), params, tx.init(params), grads, updates)
    )


def check(name, result, like):
    """Checks that shardings equal those of `like`, and numbers equal the results on one device."""
    paths = jax.tree_util.tree_leaves_with_path(result)
    moved = {
        jax.tree_util.keystr(path): (x.sharding, y.sharding)
        for (path, x), y in zip(paths, jax.tree.leaves(like), strict=True)
        if not x.sharding.is_equivalent_to(y.sharding, x.ndim)
    }
    assert moved == {}
    expected = unsharded(name)[: len(result)]
    for x, y in zip(jax.tree.leaves(result), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(np.asarray(x), y)


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
@pytest.mark.parametrize("axis_type", [AUTO, EXPLICIT])
@pytest.mark.parametrize("name", TRANSFORMS)
def test_c2_arrays_stay_in_place_however_gradients_are_sharded(name, axis_type, way):
    """Covers every pair of four shardings of a param and its gradient."""
    mesh = make_mesh(axis_type)
    tx = TRANSFORMS[name](mesh)
    with set_mesh(mesh) if axis_type is EXPLICIT else contextlib.nullcontext():
        params, grads, updates = make(name, mesh)
        state = tx.init(params)
        result = way(stepping(tx), params, state, grads, updates)
    check(name, result, (params, state, updates))


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in TRANSFORMS if name != "zero1"])
def test_two_models_may_share_an_inner_function(name):
    """One lowering serves both models. Leaves of equal shape have different shardings."""
    mesh = make_mesh(AUTO)
    tx = TRANSFORMS[name](mesh)
    inner = jax.jit(stepping(tx))
    models = []
    for turn in (0, 1):
        params, grads, updates = make(name, mesh, turn)
        models.append((params, tx.init(params), grads, updates))

    @jax.jit
    def run(models):
        for _ in range(STEPS):
            models = [(*inner(params, state, grads), grads) for params, state, grads, *_ in models]
            models = [(params, state, grads, updates) for params, state, updates, grads in models]
        return models

    for (params, state, _, updates), like in zip(run(models), models, strict=True):
        check(name, (params, state, updates), (*like[:2], like[3]))


@pytest.mark.parametrize("axis_names", [{"d", "m"}, {"d"}], ids=["all axes", "one axis"])
@pytest.mark.parametrize("name", ["momentum", "trace", "kahan"])
def test_arrays_stay_in_place_within_shard_map(name, axis_names):
    """shard_map is over one axis; on the other, the partitioner must not follow the gradients."""
    mesh = make_mesh(AUTO)
    tx = TRANSFORMS[name](mesh)
    params, grads, updates = make(name, mesh)
    arguments = params, tx.init(params), grads, updates
    specs = jax.tree.map(
        lambda x: P(*(axis if axis in axis_names else None for axis in x.sharding.spec)),
        (*arguments[:2], params, updates),
    )
    run = jax.shard_map(
        functools.partial(run_scanned, stepping(tx)),
        mesh=mesh,
        in_specs=specs,
        out_specs=(*specs[:2], specs[3]),
        axis_names=axis_names,
    )
    check(name, jax.jit(run)(*arguments), (*arguments[:2], updates))


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS[1:4], ids=lambda way: way.__name__)
@pytest.mark.parametrize("name", ["momentum", "restart", "bfloat16", "kahan"])
def test_a_state_that_is_sharded_unlike_its_params_stays_so(name, way):
    """After a restore with another sharding, state and params each keep their own."""
    mesh = make_mesh(AUTO)
    tx = TRANSFORMS[name](mesh)
    params, _, updates = make(name, mesh)
    _, grads, _ = make(name, mesh, turn=1)
    elsewhere = tx.init(jax.tree.map(lambda g, w: g.astype(w.dtype), grads, params))
    state = jax.tree.map(lambda x, y: jax.device_put(x, y.sharding), tx.init(params), elsewhere)
    result = way(stepping(tx), params, state, grads, updates)
    check(name, result[:2], (params, state))


@pytest.mark.slow
def test_codes_and_scales_may_be_sharded_unlike_one_another():
    mesh = make_mesh(AUTO)
    tx = TRANSFORMS["int8"](mesh)
    params, grads, updates = make("int8", mesh)
    state = tx.init(params)
    elsewhere = NamedSharding(mesh, P("m"))
    state = state._replace(scales=jax.device_put(state.scales, elsewhere))
    for way in (run_jitted, run_scanned):
        check("int8", way(stepping(tx), params, state, grads, updates), (params, state, updates))


@pytest.mark.parametrize("way", WAYS[1:4], ids=lambda way: way.__name__)
def test_what_is_made_of_the_updates_does_not_move_the_state(way):
    mesh = make_mesh(AUTO)
    tx = TRANSFORMS["momentum"](mesh)
    params, grads, updates = make("momentum", mesh)

    def used(params, state, grads):
        params, state, updates = stepping(tx)(params, state, grads)
        return params, state, jax.tree.map(lambda u, g: u + 0 * g, updates, grads)

    state = tx.init(params)
    check("momentum", way(used, params, state, grads, updates)[:2], (params, state))


@pytest.mark.parametrize("way", WAYS[1:], ids=lambda way: way.__name__)
@pytest.mark.parametrize("name", ["momentum", "adamw"])
def test_zero1_leaves_params_in_place_that_are_part_of_their_gradient(name, way):
    """With weight decay in the loss, the sharding of the state must not reach the params."""
    mesh = jax.make_mesh((8,), ("d",), axis_types=(AUTO,))
    inner = {"momentum": momentum(), "adamw": optax.adamw(0.5)}[name]

    def run(tx, params):
        def step(params, state, target):
            grads = jax.grad(lambda w: jnp.sum((w - target) ** 2) / 4)(params)
            return stepping(tx)(params, state, grads)

        state = tx.init(params)
        return (params, state), way(step, params, state, jnp.ones_like(params), params)

    whole = jnp.asarray(numbers(0, (16, 8)), jnp.float32)
    split = mj.sharding.zero1(inner, mesh, "d")
    like, moved = run(split, jax.device_put(whole, NamedSharding(mesh, P())))
    _, expected = run(inner, whole)
    for x, y, z in zip(*map(jax.tree.leaves, (moved[:2], like, expected[:2])), strict=True):
        assert x.sharding.is_equivalent_to(y.sharding, x.ndim)
        np.testing.assert_allclose(x, z, rtol=1e-6)


@functools.cache
def jax_returns_to_the_host():
    """Whether JAX alone does this on CPU; 0.10.2 is the first version that does."""
    if not hasattr(jax, "memory"):
        return False
    returned = jax.jit(lambda x: jax.device_put(x + 1, jax.memory.Space.Host))(jnp.ones(8))
    return returned.sharding.memory_kind == "pinned_host"


@pytest.mark.slow
@pytest.mark.parametrize("axis_type", [AUTO, EXPLICIT])
def test_c7_velocities_of_params_in_the_memory_of_the_host_are_there_too(axis_type):
    if not jax_returns_to_the_host():
        pytest.skip("this JAX returns to the device what a program on CPU returns to the host")
    mesh = make_mesh(axis_type)
    for spec in SPECS:
        sharding = NamedSharding(mesh, spec, memory_kind="pinned_host")
        params = jax.device_put(jnp.ones((8, 16)), sharding)
        for init in (momentum().init, jax.jit(momentum().init)):
            state: Any = init(params)
            velocity = state.velocity
            assert velocity.sharding.is_equivalent_to(sharding, 2)
            assert velocity.sharding.memory_kind == "pinned_host"
            assert not np.any(velocity)
        # 8-bit leaves, and small leaves that stay in float32.
        for shape in ((8, 16), (64, 128)):
            params = jax.device_put(jnp.ones(shape), sharding)
            for init in (
                momentum(velocity_dtype="int8").init,
                jax.jit(momentum(velocity_dtype="int8").init),
            ):
                state = init(params)
                for array in (state.velocity, state.scales):
                    assert array.sharding.memory_kind == "pinned_host"


@pytest.mark.slow
@pytest.mark.parametrize("gradients", ["pinned_host", "device"])
@pytest.mark.parametrize(
    "way", [run_in_python, run_jitted, run_scanned], ids=lambda way: way.__name__
)
@pytest.mark.parametrize("name", [*TRANSFORMS, "torch_sgd"])
def test_c2_params_in_the_memory_of_the_host_stay_there(name, way, gradients):
    """Their velocities stay there too; the numbers equal those of params on the devices."""
    if not jax_returns_to_the_host():
        pytest.skip("this JAX returns to the device what a program on CPU returns to the host")
    mesh = make_mesh(AUTO)
    if name == "torch_sgd":
        tx = mj.frameworks.torch_sgd(0.5, 0.5, weight_decay=0.5)
    else:
        tx = TRANSFORMS[name](mesh)
    dtype = jnp.bfloat16 if name == "kahan" else jnp.float32
    # Large enough, 64 by 128, to be stored in 8 bits.
    arrays = [
        jnp.asarray(numbers(0, (64, 128)), dtype),
        jnp.asarray(numbers(1, (64, 128)), jnp.float32),
    ]

    def run(memory, given):
        sharding = NamedSharding(mesh, P("d"), memory_kind=memory)
        params = jax.device_put(arrays[0], sharding)
        grads = jax.device_put(arrays[1], sharding.with_memory_kind(given))
        state = tx.init(params)
        return (params, state), way(stepping(tx), params, state, grads, grads)

    before, (params, state, updates) = run("pinned_host", gradients)
    _, expected = run("device", "device")
    for x, y in zip(*map(jax.tree.leaves, ((params, state), before)), strict=True):
        assert x.sharding.memory_kind == y.sharding.memory_kind
        assert x.sharding.is_equivalent_to(y.sharding, x.ndim)
    assert {x.sharding.memory_kind for x in jax.tree.leaves(before) if x.ndim} == {"pinned_host"}
    assert updates.sharding.memory_kind == gradients
    for x, y in zip(*map(jax.tree.leaves, ((params, state, updates), expected)), strict=True):
        np.testing.assert_array_equal(x, y)
    reset = mj.reset_velocity(state)
    for x, y in zip(*map(jax.tree.leaves, (reset, state)), strict=True):
        assert x.sharding.memory_kind == y.sharding.memory_kind
    assert not np.any(mj.read_velocity(reset))


@pytest.mark.parametrize("way", [run_in_python, run_jitted], ids=lambda way: way.__name__)
@pytest.mark.parametrize("memories", list(itertools.product(["pinned_host", "device"], repeat=3)))
def test_params_gradients_and_velocities_may_each_be_in_either_memory(memories, way):
    if not jax_returns_to_the_host():
        pytest.skip("this JAX returns to the device what a program on CPU returns to the host")
    tx, array = momentum(), jnp.asarray(numbers(0, (16, 8)), jnp.float32)
    sharding = NamedSharding(make_mesh(AUTO), P("d"))
    params, grads, velocity = (
        jax.device_put(x, sharding.with_memory_kind(memory))
        for x, memory in zip((array, array + 1, array * 0), memories, strict=True)
    )
    state: Any = tx.init(params)
    state = state._replace(velocity=velocity)
    found = way(stepping(tx), params, state, grads, grads)
    expected = way(stepping(tx), array, tx.init(array), array + 1, array)
    for x, y in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
        np.testing.assert_array_equal(x, y)
    kinds = [x.sharding.memory_kind for x in (found[0], found[2], found[1].velocity)]
    assert kinds == list(memories)


@pytest.mark.slow
@pytest.mark.parametrize("way", [run_jitted, run_scanned], ids=lambda way: way.__name__)
@pytest.mark.parametrize("velocity_dtype", [None, "int8"])
def test_a_mask_does_not_move_the_velocity_that_it_resets(velocity_dtype, way):
    mesh = make_mesh(AUTO)
    tx = momentum(velocity_dtype=velocity_dtype)
    params, masks, updates = make("int8", mesh)
    state = tx.update(params, tx.init(params))[1]

    def step(params, state, masks):
        return params, mj.reset_velocity(state, jax.tree.map(lambda m: m > 0, masks)), updates

    _, moved, _ = way(step, params, state, masks, updates)
    for x, y in zip(jax.tree.leaves(moved), jax.tree.leaves(state), strict=True):
        assert x.sharding.is_equivalent_to(y.sharding, x.ndim)
    for velocity, mask in zip(*map(jax.tree.leaves, (mj.read_velocity(moved), masks)), strict=True):
        assert not np.any(np.asarray(velocity)[np.asarray(mask) > 0])


@pytest.mark.parametrize("velocity_dtype", ["bfloat16", "int8"])
def test_no_array_of_a_step_is_larger_than_a_slice(velocity_dtype):
    """Each device computes only its part of random bits and masks."""
    mesh = make_mesh(AUTO)
    tx = momentum(velocity_dtype=velocity_dtype)
    params = jax.device_put(jnp.ones((64, 1024)), NamedSharding(mesh, P("d", "m")))
    arguments = params, tx.init(params), params
    text = str(jax.jit(stepping(tx)).lower(*arguments).compile().as_text())
    sizes = [
        math.prod(map(int, dims.split(",")))
        for dims in re.findall(r"\b[a-z]+\d+\[([\d,]+)\]", text)
    ]
    assert max(sizes) == params.size // 8


def test_derivatives_and_batches_of_a_step():
    """Sharding constraints do not change derivatives, forward or backward, nor batches."""
    mesh = make_mesh(AUTO)
    tx = momentum(nesterov=True)
    own, other = (NamedSharding(mesh, spec) for spec in (P("d"), P(None, "m")))
    params, grads = (jnp.asarray(numbers(seed, (8, 16)), jnp.float32) for seed in (0, 1))

    def moved(params, grads):
        updates, _ = tx.update(grads, tx.init(params), params)
        return mj.apply_updates(params, updates)

    def programs(params, grads):
        yield jax.jvp(moved, (params, grads), (grads, params))
        yield jax.vjp(moved, params, grads)[1](params)
        yield jax.vmap(moved, in_axes=(0, 1), out_axes=1)(params, grads.reshape(16, 8))
        yield jax.grad(lambda g: jnp.sum(moved(params, g) ** 2))(grads)
        yield jet.jet(moved, (params, grads), ((grads, params), (params, grads)))

    run = jax.jit(lambda *arguments: list(programs(*arguments)))
    on_mesh = run(jax.device_put(params, own), jax.device_put(grads, other))
    for x, y in zip(*map(jax.tree.leaves, (on_mesh, run(params, grads))), strict=True):
        np.testing.assert_array_equal(x, y)
    assert on_mesh[0][0].sharding.is_equivalent_to(own, 2)


def barriers(lowered):
    return re.findall(r"propagation_barrier %\w+ allowed_direction=(\w+)", lowered.as_text())


def test_only_programs_for_several_devices_have_barriers():
    """On one device, barriers would cost compile time without a benefit."""
    for name, make_tx in TRANSFORMS.items():
        tx = make_tx(None)
        params, grads, _ = make(name)
        assert barriers(jax.jit(stepping(tx)).lower(params, tx.init(params), grads)) == []
    mesh = make_mesh(AUTO)
    params, grads, _ = make("momentum", mesh)
    tx = momentum()
    lowered = jax.jit(stepping(tx)).lower(params, tx.init(params), grads)
    assert sorted(barriers(lowered)) == ["BACKWARD"] * 2 * len(PAIRS) + ["FORWARD"] * len(PAIRS)
    # An Explicit mesh has shardings in its types.
    params, grads, _ = make("momentum", make_mesh(EXPLICIT))
    assert barriers(jax.jit(stepping(tx)).lower(params, tx.init(params), grads)) == []


def test_zero1_splits_what_a_gradient_is_computed_from_unless_that_moves_the_params():
    """Program arguments have a sharding already; values inside a loop do not."""
    mesh = jax.make_mesh((8,), ("d",), axis_types=(AUTO,))
    params = jax.device_put(jnp.zeros((16, 8)), NamedSharding(mesh, P()))
    tx = mj.sharding.zero1(optax.sgd(0.1, 0.9), mesh, "d")
    arguments = params, tx.init(params), params
    step = stepping(tx)
    assert "BACKWARD" in barriers(jax.jit(tx.update).lower(params, *arguments[1:]))
    looped = jax.jit(
        lambda *args: jax.lax.fori_loop(0, 2, lambda _, a: (*step(*a)[:2], a[2]), args)
    )
    directions = barriers(looped.lower(*arguments))
    # Only the barrier of apply_updates: the updates may have the params' sharding.
    assert directions.count("BACKWARD") == 1


# Exported for several devices by a process with one device. Excluded: zero1, which needs a mesh of
# real devices, and 8 bits, whose scales are not sharded like the params.
EXPORTED = [name for name in TRANSFORMS if name not in ("zero1", "int8")]


def export_for_eight(folder):
    assert jax.device_count() == 1
    mesh = AbstractMesh((4, 2), ("d", "m"), axis_types=(AUTO,) * 2)

    def place(which, path, leaf):
        names = [key.key for key in path if isinstance(key, jax.tree_util.DictKey)]
        spec = PAIRS[int(names[0])][which] if names and leaf.ndim else P()
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec))

    def placed(tree, which=0):
        return jax.tree_util.tree_map_with_path(functools.partial(place, which), tree)

    for name in EXPORTED:
        tx = TRANSFORMS[name](None)
        params, grads, _ = make(name)
        state, treedef = jax.tree.flatten(placed(jax.eval_shape(tx.init, params)))

        def init(params, tx=tx):
            return jax.tree.leaves(tx.init(params))

        def step(params, state, grads, tx=tx, treedef=treedef):
            params, state, updates = stepping(tx)(params, treedef.unflatten(state), grads)
            return params, jax.tree.leaves(state), updates

        arguments = {"init": (placed(params),), "step": (placed(params), state, placed(grads, 1))}
        for function in (init, step):
            exported = jax.export.export(jax.jit(function))(*arguments[function.__name__])
            file = pathlib.Path(folder, f"{name} {function.__name__}")
            file.write_bytes(exported.serialize())


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Returns the programs by the names of transformation and function."""
    folder = tmp_path_factory.mktemp("exported")
    run_on_one_device(__file__, "export", str(folder))
    return {
        tuple(file.name.split()): jax.export.deserialize(file.read_bytes()).call
        for file in folder.iterdir()
    }


@pytest.mark.slow
@pytest.mark.parametrize("name", EXPORTED)
def test_c7_arrays_stay_in_place_in_a_program_made_on_one_device(name, exported):
    mesh = make_mesh(AUTO)
    params, grads, updates = make(name, mesh)
    state = jax.tree.leaves(TRANSFORMS[name](mesh).init(params))
    for x, y in zip(jax.jit(exported[name, "init"])(params), state, strict=True):
        assert x.sharding.is_equivalent_to(y.sharding, x.ndim)
    for way in (run_jitted, run_scanned):
        result = way(exported[name, "step"], params, state, grads, updates)
        check(name, result, (params, state, updates))


def compile_for_tpu():
    """Prints what is compiled for eight TPUs, which need not be present."""
    assert jax.device_count() == 1
    devices = topology("tpu", "v5e:2x4").devices
    mesh = jax.sharding.Mesh(np.reshape(devices, (4, 2)), ("d", "m"), axis_types=(AUTO,) * 2)

    def place(shape, spec):
        return jax.ShapeDtypeStruct(shape, np.float32, sharding=NamedSharding(mesh, spec))

    params = {"up": place((3, 256, 512), P(None, None, "m"))}
    params["down"] = place((3, 512, 256), P(None, "m"))
    # On Auto axes only the params' own axes of the state are known; zero1 adds one axis.
    split = {"up": P(None, "d", "m"), "down": P(None, ("m", "d"))}

    def loss(params, x):
        def layer(h, w):
            return h + jnp.tanh(h @ w["up"]) @ w["down"], None

        return jnp.mean(jax.lax.scan(layer, x, params)[0] ** 2)

    def specs(shardings):
        return jax.tree.map(lambda s: str(tuple(s.spec)), shardings)

    found = {}
    for name in ("momentum", "int8", "zero1"):
        tx = TRANSFORMS[name](mesh)
        init = jax.jit(tx.init).lower(params).compile()
        state = jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
            jax.eval_shape(tx.init, params),
            init.output_shardings,
        )
        if name == "zero1":
            velocity = {k: place(x.shape, split[k]) for k, x in params.items()}
            state = state._replace(velocity=velocity)

        def step(params, state, x, tx=tx):
            return stepping(tx)(params, state, jax.grad(loss)(params, x))[:2]

        arguments = params, state, place((64, 256), P("d"))
        compiled = jax.jit(step, donate_argnums=(0, 1)).lower(*arguments).compile()
        memory: Any = compiled.memory_analysis()
        found[name] = {
            "init": specs(jax.tree.leaves(init.output_shardings)),
            "given": specs([x.sharding for x in jax.tree.leaves(arguments[:2])]),
            "kept": specs(jax.tree.leaves(compiled.output_shardings)),
            "copied": memory.output_size_in_bytes - memory.alias_size_in_bytes,
            "reduce-scatters": str(compiled.as_text()).count("calls=%all-reduce-scatter"),
        }
    print(json.dumps(found))


def test_c7_programs_for_tpus_made_on_one_device_keep_shardings_and_donations():
    printed = run_for_tpu(__file__, "tpu")
    found = json.loads(printed)
    for name, result in found.items():
        assert result["kept"] == result["given"], name
        assert result["copied"] < 4096, name  # The table of results, and the count.
    assert found["momentum"]["init"][1:] == found["momentum"]["given"][:2]
    assert found["zero1"]["reduce-scatters"] > 0


if __name__ == "__main__":
    {"export": export_for_eight, "tpu": compile_for_tpu}[sys.argv[1]](*sys.argv[2:])
