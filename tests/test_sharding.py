"""ZeRO-1: a part of the state on each device, the numbers and the params as they were.

Run as a program, this file is one process of a job of several.
"""

import contextlib
import math
import pathlib
import re
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from jax.experimental import multihost_utils
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from processes import run_job

import momentum_jax as mj

set_mesh = jax.set_mesh if hasattr(jax, "set_mesh") else getattr(jax.sharding, "use_mesh")  # noqa: B009

zero1: Any = mj.sharding.zero1

# Nothing divides the bias; along "model" the layers are sharded as tensor-parallel ones are.
SHAPES = {"bias": (3,), "hidden": (64, 32), "out": (32, 16)}
TENSOR_PARALLEL = {"bias": P(), "hidden": P(None, "model"), "out": P("model")}
REPLICATED = dict.fromkeys(SHAPES, P())
INNER: dict[str, Any] = {
    "momentum": mj.momentum(0.05, nesterov=True),
    "adam": optax.adam(1e-3),
    "adamw": optax.adamw(1e-3, weight_decay=0.1),
    "chain": optax.chain(optax.clip_by_global_norm(0.5), mj.trace(), optax.scale(-0.05)),
    "restart": mj.adaptive_restart(mj.momentum(0.05, mj.schedules.nesterov())),
    "groups": optax.partition(
        {"slow": mj.aggmo(0.01), "fast": optax.MultiSteps(mj.qhm(0.1), 2)},  # pyright: ignore[reportArgumentType]
        {"bias": "fast", "hidden": "slow", "out": "fast"},
    ),
    "factored": optax.adafactor(1e-3, min_dim_size_to_factor=8),
}
AUTO, EXPLICIT = AxisType.Auto, AxisType.Explicit
MESHES = [(AUTO, "data"), (AUTO, "data, model"), (EXPLICIT, "data"), (EXPLICIT, "data, model")]


def make_mesh(axis_type=AUTO, names="data", devices=8):
    names = tuple(names.split(", "))
    shape = (devices,) if len(names) == 1 else (2, devices // 2)
    return jax.make_mesh(
        shape, names, axis_types=(axis_type,) * len(names), devices=jax.devices()[:devices]
    )


def make_params(mesh=None, shapes=SHAPES):
    rng = np.random.default_rng(0)
    params = {name: rng.normal(size=s, scale=0.1).astype(np.float32) for name, s in shapes.items()}
    if mesh is None:
        return params
    specs = TENSOR_PARALLEL if "model" in mesh.axis_names else REPLICATED
    return {name: jax.device_put(w, NamedSharding(mesh, specs[name])) for name, w in params.items()}


def abstract(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


def make_batch(index, mesh=None):
    x = np.random.default_rng(index).normal(size=(16, 64)).astype(np.float32)
    if mesh is None:
        return x
    return jax.make_array_from_callback(x.shape, NamedSharding(mesh, P("data")), lambda i: x[i])


def loss(params, x):
    def product(x, w):
        """On Explicit axes JAX asks how a sum over a sharded dimension is to be sharded."""
        if AxisType.Explicit not in jax.typeof(w).sharding.mesh.axis_types:
            return x @ w
        columns = jax.typeof(w).sharding.spec[1]
        return jnp.dot(x, w, out_sharding=P("data", columns))

    hidden = jnp.tanh(product(x, params["hidden"]))
    return jnp.mean((product(hidden, params["out"]) - 1) ** 2) + jnp.mean(params["bias"] ** 2)


def make_step(tx):
    def step(params, state, x):
        updates, state = tx.update(jax.grad(loss)(params, x), state, params)
        return mj.apply_updates(params, updates), state

    return step


def train(tx, params, state, steps, mesh=None):
    """The params and the state after these steps, of a step that is traced once."""
    traces = []

    @jax.jit
    def step(*arguments):
        traces.append(1)
        return make_step(tx)(*arguments)

    for index in steps:
        params, state = step(params, state, make_batch(index, mesh))
        # The virtual devices of one CPU can hang with several programs under way.
        jax.block_until_ready(params)
    assert len(traces) == 1
    return params, state


def assert_close(actual, expected, tolerance=1e-6):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=tolerance, atol=tolerance)


def assert_same_sharding(actual, expected):
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert a.sharding.is_equivalent_to(b.sharding, a.ndim), (a.sharding, b.sharding)


def bytes_by_device(tree):
    held = dict.fromkeys(jax.devices(), 0)
    for leaf in jax.tree.leaves(tree):
        for shard in leaf.addressable_shards:
            held[shard.device] += shard.data.nbytes
    return set(held.values())


@pytest.fixture(scope="module")
def unsharded():
    """What 50 steps on one device come to, by the name of the transformation."""
    found = {}

    def result(name):
        if name not in found:
            params = jax.tree.map(jnp.asarray, make_params())
            found[name] = train(INNER[name], params, INNER[name].init(params), range(50))
        return found[name]

    return result


@pytest.mark.parametrize(
    ("name", "axis_type", "axes"),
    [(name, *MESHES[0]) for name in INNER if name != "adam"]
    + [("adamw", *MESHES[1]), ("momentum", *MESHES[2]), ("restart", *MESHES[3])],
)
def test_50_steps_equal_the_unsharded_run(name, axis_type, axes, unsharded):
    """To 1e-6, while every array stays where it was and the step is traced once."""
    mesh = make_mesh(axis_type, axes)
    tx = zero1(INNER[name], mesh)
    with set_mesh(mesh) if axis_type is EXPLICIT else contextlib.nullcontext():
        params = make_params(mesh)
        state = tx.init(params)
        moved = train(tx, params, state, range(50), mesh)
    assert_same_sharding(moved, (params, state))
    assert_close(moved, unsharded(name))


@pytest.mark.parametrize(("axis_type", "axes"), MESHES)
@pytest.mark.parametrize(("name", "arrays"), [("momentum", 1), ("adam", 2), ("restart", 2)])
def test_each_device_holds_an_eighth_of_the_state(name, arrays, axis_type, axes):
    """And the count, and what nothing divides; with tensor-parallel params too."""
    mesh = make_mesh(axis_type, axes)
    params = make_params(mesh)
    state = zero1(INNER[name], mesh).init(params)
    divided = sum(math.prod(shape) for shape in SHAPES.values() if len(shape) == 2)
    assert bytes_by_device(state) == {arrays * 4 * (divided // 8 + 3) + 4}


@pytest.mark.parametrize(("axis_type", "axes"), MESHES[1:3])
def test_eager_steps_equal_the_jitted_ones(axis_type, axes):
    mesh = make_mesh(axis_type, axes)
    params = make_params(mesh)
    tx = zero1(INNER["momentum"], mesh)
    state = tx.init(params)
    grads = jax.tree.map(lambda w: w + 1, params)
    eager, jitted = (wrap(tx.update)(grads, state, params) for wrap in (lambda f: f, jax.jit))
    assert_close(eager, jitted, 1e-7)
    for result in (eager, jitted):
        assert_same_sharding(result, (params, state))


def arrays_in(compiled):
    """Shapes of all arrays in a compiled program but its arguments, which the caller holds."""
    return [
        tuple(map(int, dims.split(",")))
        for line in compiled.as_text().splitlines()
        if "parameter(" not in line
        for dims in re.findall(r"= f32\[([\d,]+)\]", line)
    ]


@pytest.mark.parametrize("name", ["momentum", "adam"])
@pytest.mark.parametrize(("axis_type", "axes"), MESHES)
def test_jitted_init_never_holds_a_whole_array_of_the_state(name, axis_type, axes):
    """Read from the compiled program, and as bytes; eager init is such a program too."""
    mesh = make_mesh(axis_type, axes)
    params = make_params(mesh)
    tx = zero1(INNER[name], mesh)
    with set_mesh(mesh) if axis_type is EXPLICIT else contextlib.nullcontext():
        compiled: Any = jax.jit(tx.init).lower(params).compile()
        state = jax.jit(tx.init)(params)
    # On Auto axes jit hides that `out` has its rows over "model": they are over "data" alone.
    slices = {
        "hidden": 64 * 32 // 8,
        "out": 32 * 16 // (2 if (axis_type, axes) == (AUTO, "data, model") else 8),
    }
    assert max(map(math.prod, arrays_in(compiled))) == max(slices.values())
    assert compiled.memory_analysis().temp_size_in_bytes == 0
    held = sum(slices.values()) + 3
    assert bytes_by_device(state) == {4 * held * (1 if name == "momentum" else 2) + 4}


def collectives(compiled):
    """(kind, shape) of each collective operation of a compiled program, sorted."""
    found = re.findall(
        r"= (.*?) (all-\w+|reduce-scatter|collective-\w+)(?:-start)?\(", compiled.as_text()
    )
    return sorted(
        (kind, tuple(map(int, dims.split(","))) if dims else ())
        for result, kind in found
        for dims in re.findall(r"f32\[([\d,]*)\]", result)
    )


@pytest.mark.parametrize(
    ("name", "axis_type"),
    [("momentum", AUTO), ("momentum", EXPLICIT), ("chain", AUTO), ("adamw", EXPLICIT)],
)
def test_the_program_gathers_the_updates_and_nothing_else(name, axis_type):
    """One all-gather a split param, whatever number of arrays the state has for it.

    XLA for CPU has no pass that makes all-reduce and slice one reduce-scatter, as for TPU.
    """
    mesh = make_mesh(axis_type)
    tx = zero1(INNER[name], mesh)
    with set_mesh(mesh):
        params = make_params(mesh)
        arguments = params, tx.init(params), make_batch(0, mesh)
        compiled = jax.jit(make_step(tx)).lower(*arguments).compile()
    found = collectives(compiled)
    gathered = [shape for kind, shape in found if kind == "all-gather"]
    assert sorted(map(sorted, gathered)) == [[16, 32], [32, 64]]
    summed = [shape for kind, shape in found if kind in ("all-reduce", "reduce-scatter")]
    assert sorted(sorted(shape) for shape in summed if shape)[-2:] == [[16, 32], [32, 64]]
    assert {kind for kind, _ in found} <= {"all-gather", "all-reduce", "reduce-scatter"}


def test_a_value_may_be_held_in_two_shardings():
    """The update of optax.trace is the state: whole as an update, split as the state."""
    mesh = make_mesh()
    tx = zero1(optax.trace(0.9), mesh)
    params = make_params(mesh)
    state = tx.init(params)
    result = jax.jit(tx.update)(params, state, params)
    assert_same_sharding(result, (params, state))


@pytest.mark.parametrize(("axis_type", "axes"), MESHES)
def test_a_whole_run_in_one_program_leaves_every_array_where_it_was(axis_type, axes):
    """The params are carried by the loop: nothing but the step says how they are sharded."""
    mesh = make_mesh(axis_type, axes)
    tx = zero1(mj.momentum(0.1), mesh)
    params = make_params(mesh)
    state = tx.init(params)
    batch = make_batch(0, mesh)

    @jax.jit
    def run(params, state):
        def step(carry, _):
            params, state = carry
            return make_step(tx)(params, state, batch), None

        return jax.lax.scan(step, (params, state), None, length=3)[0]

    with set_mesh(mesh) if axis_type is EXPLICIT else contextlib.nullcontext():
        assert_same_sharding(run(params, state), (params, state))


def test_init_from_abstract_params():
    """Their shardings are seen inside jit too."""
    mesh = make_mesh(AUTO, "data, model")
    params = make_params(mesh)
    for inner in (INNER["momentum"], INNER["adam"]):
        tx = zero1(inner, mesh)
        state = tx.init(params)
        for other in (
            tx.init(abstract(params)),
            jax.jit(lambda tx=tx: tx.init(abstract(params)))(),
        ):
            assert_close(other, state, 0)
            assert_same_sharding(other, state)


def test_what_is_sharded_over_the_axis_already_stays():
    """Fully sharded params beside one that is not."""
    mesh = make_mesh()
    params = make_params(mesh)
    params["out"] = jax.device_put(params["out"], NamedSharding(mesh, P(None, "data")))
    tx = zero1(mj.momentum(0.1), mesh)
    state = tx.init(params)
    assert state.velocity["out"].sharding == params["out"].sharding
    assert mj.sharding.unsplit(params, mesh) == {"['bias']": (3,)}
    assert_same_sharding(jax.jit(tx.update)(params, state, params), (params, state))


@pytest.mark.parametrize(("axis_type", "axes"), [MESHES[0], MESHES[3]])
def test_velocities_of_8_bits_are_split_with_their_scales(axis_type, axes):
    """50 steps with gradients that turn: codes and scales are those of one device, to the bit."""
    mesh = make_mesh(axis_type, axes)
    shapes = {"bias": (3,), "hidden": (64, 256), "out": (256, 64)}
    inner = mj.adaptive_restart(mj.momentum(0.05, velocity_dtype="int8"))

    def run(tx, params, state):
        def step(carry, index):
            params, state = carry
            grads = jax.tree.map(lambda w: (index % 5 - 1) * w, whole)
            updates, state = tx.update(grads, state, params)
            return (mj.apply_updates(params, updates), state), None

        whole = params
        return jax.jit(lambda *carry: jax.lax.scan(step, carry, jnp.arange(50.0))[0])(params, state)

    with set_mesh(mesh) if axis_type is EXPLICIT else contextlib.nullcontext():
        params, tx = make_params(mesh, shapes), zero1(inner, mesh)
        state = tx.init(params)
        moved = run(tx, params, state)
        read = mj.read_velocity(moved[1])
    assert_same_sharding(moved, (params, state))
    held: Any = state.inner_state
    # A byte and a sixteenth per parameter, an eighth of them here.
    eighth = 64 * 256 // 8
    assert bytes_by_device(held.velocity["hidden"]) == {eighth}
    assert bytes_by_device(held.scales["hidden"]) == {eighth // 16}
    params = jax.tree.map(jnp.asarray, make_params(shapes=shapes))
    expected = run(inner, params, inner.init(params))
    assert_close(moved[0], expected[0])
    assert_close(moved[1], expected[1], 1e-7)
    assert_close(read, mj.read_velocity(expected[1]))


@pytest.mark.parametrize("axis_type", [AUTO, EXPLICIT])
@pytest.mark.parametrize(
    ("shape", "axis"), [((1001, 31), "data"), ((4097, 8), "data"), ((63, 151), "model")]
)
def test_scales_of_8_bits_may_be_split_where_codes_cannot_be(axis_type, shape, axis):
    """Or the other way round: the numbers are those of one device."""
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(axis_type,) * 2)
    inner = mj.adaptive_restart(mj.momentum(0.05, velocity_dtype="int8"))
    whole = jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32)

    def run(tx, params):
        _, state = jax.jit(tx.update)(params, tx.init(params), params)
        updates, state = jax.jit(tx.update)(params, state, params)
        return updates, mj.read_velocity(state)

    found = run(zero1(inner, mesh, axis), jax.device_put(whole, NamedSharding(mesh, P())))
    # The compiler may join a product and a sum, or not, by the shape of a part.
    for a, b in zip(found, run(inner, whole), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)


def test_params_without_a_gradient_are_left_alone():
    mesh = make_mesh()
    params = make_params(mesh)
    tx = zero1(mj.momentum(0.5), mesh)
    state = tx.init(params)
    for wrap in (lambda f: f, jax.jit):
        grads: Any = {**params, "hidden": None, "bias": optax.MaskedNode()}
        updates, moved = wrap(tx.update)(grads, state, params)
        assert updates["hidden"] is None
        assert updates["bias"] == optax.MaskedNode()
        assert_close(moved.velocity["hidden"], state.velocity["hidden"], 0)
        assert_same_sharding(moved, state)


def test_params_and_gradients_from_the_host():
    """Numbers and NumPy arrays are taken as replicated."""
    mesh = make_mesh()
    params = {"gain": 2.0, "kernel": np.ones((8, 2), np.float32)}
    tx = zero1(optax.adamw(0.1), mesh)
    state: Any = tx.init(params)
    updates, state = tx.update(params, state, params)
    assert bytes_by_device(state[0].mu["kernel"]) == {8}
    assert updates["kernel"].sharding.is_fully_replicated
    assert_close(updates, optax.adamw(0.1).update(params, optax.adamw(0.1).init(params), params)[0])


def test_params_that_nothing_divides_are_listed_and_strict_refuses_them():
    mesh = make_mesh()
    params = {"a": {"gain": 1.0}, "b": np.zeros((3, 5)), "c": np.zeros((3, 16)), "d": np.zeros(0)}
    expected = {"['a']['gain']": (), "['b']": (3, 5), "['d']": (0,)}
    assert mj.sharding.unsplit(params, mesh) == expected
    tx = zero1(mj.momentum(0.1), mesh, strict=True)
    message = r"\['a'\]\['gain'\] \(\), \['b'\] \(3, 5\), \['d'\] \(0,\).*strict=False"
    with pytest.raises(ValueError, match=message):
        tx.init(params)
    assert tx.init({"c": params["c"]}).count == 0


def test_the_own_sharding_of_a_param_is_counted():
    """6 rows over 2 devices leave 3, which 4 do not divide: the columns are split."""
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AUTO,) * 2)
    param = jax.device_put(np.zeros((6, 8), np.float32), NamedSharding(mesh, P("model")))
    state = zero1(mj.momentum(0.1), mesh).init(param)
    assert state.velocity.sharding.spec == P("model", "data")


@pytest.mark.usefixtures("as_shipped")
def test_bad_input_is_refused_with_the_way_out():
    mesh = make_mesh()
    inner = mj.momentum(0.1)
    with pytest.raises(TypeError, match=r"must be a jax\.sharding\.Mesh"):
        zero1(inner, (8,))
    with pytest.raises(ValueError, match=r"axis='model' must be one of .*'data'"):
        zero1(inner, mesh, "model")
    mixed = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AUTO, EXPLICIT))
    with pytest.raises(ValueError, match="all Auto or all Explicit"):
        zero1(inner, mixed)
    tx = zero1(inner, mesh)
    params = make_params(mesh)
    state = tx.init(params)
    with pytest.raises(ValueError, match=r"needs the params.*tx\.update\(grads, state, params\)"):
        tx.update(params, state)
    elsewhere = params | {"out": jnp.ones((32, 16))}
    with pytest.raises(ValueError, match=r"\['out'\] is not on the mesh .*device_put"):
        tx.init(elsewhere)
    with pytest.raises(TypeError, match=r"\['out'\] is str"):
        tx.init(params | {"out": "w"})
    mapped = jax.shard_map(tx.update, mesh=mesh, in_specs=P(), out_specs=P())
    with pytest.raises(ValueError, match="Leave shard_map for the loss and its gradient"):
        jax.jit(mapped)(params, state, params)


def test_optax_tree_map_params_finds_what_is_split():
    mesh = make_mesh()
    params = make_params(mesh)
    tx = zero1(optax.adam(0.1), mesh)
    map_params: Any = optax.tree_utils.tree_map_params
    moved = map_params(tx, lambda v: v + 2, tx.init(params))
    assert float(moved[0].nu["out"].max()) == 2
    assert int(moved[0].count) == 0


STOP, END = 6, 12


def job(coordinator, processes, index, folder):
    """One process of several: they train and write one checkpoint, the first what they hold."""
    jax.distributed.initialize(coordinator, int(processes), int(index))
    assert jax.device_count() == 2 * jax.local_device_count() == 4
    mesh = make_mesh(devices=4)
    tx = zero1(INNER["chain"], mesh)
    params = make_params(mesh)
    reached = train(tx, params, tx.init(params), range(STOP), mesh)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(pathlib.Path(folder) / "checkpoint", reached)
        checkpointer.wait_until_finished()
    whole = jax.tree.leaves(multihost_utils.process_allgather(reached, tiled=True))
    if index == "0":
        np.savez(pathlib.Path(folder) / "whole.npz", *whole)


def test_two_processes_train_alike_and_their_checkpoint_goes_on_elsewhere(tmp_path):
    """On two devices, or eight, from four: restored to the bit, and trained on as if unbroken."""
    run_job(__file__, str(tmp_path))
    inner = INNER["chain"]
    params = jax.tree.map(jnp.asarray, make_params())
    expected: Any = train(inner, params, inner.init(params), range(STOP))
    with np.load(tmp_path / "whole.npz") as whole:
        reached = jax.tree.unflatten(jax.tree.structure(expected), whole.values())
    assert_close(reached, expected)
    unbroken = train(inner, expected[0], expected[1], range(STOP, END))
    for devices in (2, 8):
        mesh = make_mesh(devices=devices)
        tx = zero1(inner, mesh)
        params = make_params(mesh)
        target = params, tx.init(params)
        with ocp.StandardCheckpointer() as checkpointer:
            restored: Any = checkpointer.restore(tmp_path / "checkpoint", target)
        assert_same_sharding(restored, target)
        for a, b in zip(jax.tree.leaves(restored), jax.tree.leaves(reached), strict=True):
            assert np.asarray(a).tobytes() == b.tobytes()
        assert_close(train(tx, restored[0], restored[1], range(STOP, END), mesh), unbroken)


if __name__ == "__main__":
    job(*sys.argv[1:])
