"""8-bit states in the hands of libraries that know nothing of them: C6.

What handles the params handles the state: it is one array of codes and one of scales a param, in
trees like the params. Gradients are exact, and so is the recurrence, so that every comparison
with a plain loop is one of bits.
"""

import copy
import pickle
from typing import Any, NamedTuple

import equinox as eqx
import flax.core
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
import reference
from flax import linen as nn
from flax import nnx
from flax.training.train_state import TrainState
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import momentum_jax

mj: Any = momentum_jax  # Optax's trees are of too many types to compute with.

INPUTS, OUTPUTS, BATCH = 256, 128, 8
STEPS = 3
TX = mj.momentum(0.25, 0.5, velocity_dtype="int8")
# Flax 0.11 calls it pure.
as_pure: Any = nnx.as_pure if hasattr(nnx, "as_pure") else nnx.pure


def exact(shape, seed):
    """Whole numbers, which are summed exactly in any order."""
    return jnp.asarray(np.random.default_rng(seed).integers(-8, 9, shape), jnp.float32)


def batches(steps=STEPS):
    return [(exact((BATCH, INPUTS), i), exact((BATCH, OUTPUTS), 100 + i)) for i in range(steps)]


def bits(tree):
    return [(np.shape(x), x.dtype, np.asarray(x).tobytes()) for x in jax.tree.leaves(tree)]


def plain_loop(params, tx: Any = TX, steps=STEPS) -> Any:
    """The params and the state after some steps of loss = sum(target * (x @ kernel + bias))."""
    state = tx.init(params)

    @jax.jit
    def step(params, state, x, target):
        grads = {"kernel": x.T @ target, "bias": target.sum(0)}
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    for x, target in batches(steps):
        params, state = step(params, state, x, target)
    return params, state


def linear_loss(model, x, target):
    return jnp.sum(model(x) * target)


# Flax NNX. -------------------------------------------------------------------------------


def make_nnx(seed=0, tx=TX, **options):
    model = nnx.Linear(INPUTS, OUTPUTS, rngs=nnx.Rngs(seed), **options)
    return model, nnx.Optimizer(model, tx, wrt=nnx.Param)


def nnx_step(model: Any, optimizer: Any, x, target):
    grads = nnx.grad(linear_loss)(model, x, target)
    optimizer.update(model, grads)


def pure(module, *filters) -> Any:
    state: Any = nnx.state(module, *filters)
    return nnx.to_pure_dict(state)


def assert_trained_as_by_plain_loop(model, optimizer, start, tx=TX):
    params, state = plain_loop(start, tx)
    opt_state = pure(optimizer)["opt_state"]
    assert bits(pure(model, nnx.Param)) == bits(params)
    for name in ("velocity", "scales"):
        assert bits(opt_state[name]) == bits(getattr(state, name))
    assert opt_state["count"] == STEPS


@pytest.mark.slow
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "nnx.jit"])
def test_c6_nnx_optimizer(compiled):
    model, optimizer = make_nnx()
    start = pure(model, nnx.Param)
    step = nnx.jit(nnx_step) if compiled else nnx_step
    for batch in batches():
        step(model, optimizer, *batch)
    assert_trained_as_by_plain_loop(model, optimizer, start)


@pytest.mark.slow
def test_c6_nnx_states_are_read_and_reset():
    """The arrays of an nnx.Optimizer are in nnx Variables, and come back in them."""
    model, optimizer = make_nnx()
    start = pure(model, nnx.Param)
    for batch in batches():
        nnx_step(model, optimizer, *batch)
    expected = mj.read_velocity(plain_loop(start)[1])
    for state in (optimizer.opt_state, as_pure(optimizer.opt_state)):
        read = mj.read_velocity(state)
        assert {x.dtype for x in jax.tree.leaves(read)} == {np.dtype("float32")}
        assert bits(read) == bits(expected)
        reset = mj.reset_velocity(state)
        assert jax.tree.structure(reset) == jax.tree.structure(state)
        for x in jax.tree.leaves(mj.read_velocity(reset)):
            np.testing.assert_array_equal(x, 0.0)
        assert [x.dtype for x in jax.tree.leaves(reset)] == [
            x.dtype for x in jax.tree.leaves(state)
        ]
        kept = mj.reset_velocity(state, lambda path: "bias" in jax.tree_util.keystr(path))
        assert bits(mj.read_velocity(kept)["kernel"]) == bits(expected["kernel"])
        np.testing.assert_array_equal(jax.tree.leaves(mj.read_velocity(kept)["bias"])[0], 0.0)
    optimizer.opt_state = nnx.data(mj.reset_velocity(optimizer.opt_state))
    nnx_step(model, optimizer, *batches()[0])
    x, target = batches()[0]
    read = mj.read_velocity(as_pure(optimizer.opt_state))
    np.testing.assert_array_equal(read["bias"], -0.25 * target.sum(0))
    error = np.abs(read["kernel"] + 0.25 * x.T @ target)
    assert error.max() < 0.012 * np.abs(x.T @ target).max()


class Stack(nnx.Module):
    """Layers whose params are stacked along a first axis, and applied by nnx.scan."""

    def __init__(self, layers, rngs):
        @nnx.split_rngs(splits=layers)
        @nnx.vmap(in_axes=0, out_axes=0)
        def create(rngs):
            return nnx.Linear(64, 64, rngs=rngs)

        self.layers = create(rngs)

    def __call__(self, x):
        @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        def forward(x, layer):
            return jnp.tanh(layer(x))

        return forward(x, self.layers)


@pytest.mark.slow
def test_c6_nnx_scan_over_stacked_layers():
    """The gradients are what nnx makes of them, and the steps those of a plain tree of them."""
    model = Stack(3, nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, TX, wrt=nnx.Param)
    params, x = pure(model, nnx.Param), exact((8, 64), 0) / 8
    state = TX.init(params)
    differentiate = nnx.jit(nnx.value_and_grad(lambda model: jnp.mean((model(x) - 0.5) ** 2)))
    losses = []
    for _ in range(4):
        loss, grads = differentiate(model)
        updates, state = TX.update(nnx.to_pure_dict(grads), state, params)
        params = optax.apply_updates(params, updates)
        optimizer.update(model, grads)
        losses.append(loss)
    opt_state = pure(optimizer)["opt_state"]
    assert opt_state["velocity"]["layers"]["kernel"].shape == (3, 64, 64)
    assert opt_state["velocity"]["layers"]["kernel"].dtype == np.int8
    assert opt_state["scales"]["layers"]["kernel"].shape == (3, 2, 64)
    assert bits(opt_state["velocity"]) == bits(state.velocity)
    assert bits(opt_state["scales"]) == bits(state.scales)
    assert bits(pure(model, nnx.Param)) == bits(params)
    assert losses[-1] < losses[0]


def test_c6_nnx_scan_over_steps():
    """Model and optimizer are what the loop carries."""
    model, optimizer = make_nnx()
    start = pure(model, nnx.Param)
    xs, targets = (jnp.stack(each) for each in zip(*batches(), strict=True))

    @nnx.scan(in_axes=(nnx.Carry, 0, 0), out_axes=nnx.Carry)
    def steps(carry, x, target):
        model, optimizer = carry
        nnx_step(model, optimizer, x, target)
        return carry

    steps((model, optimizer), xs, targets)
    assert_trained_as_by_plain_loop(model, optimizer, start)


@pytest.mark.slow
def test_c6_nnx_vmap_trains_an_ensemble():
    """Each member as if it were alone; velocities are read from the stacked state."""
    members = 3

    @nnx.vmap(in_axes=0, out_axes=0)
    def create(key):
        model = nnx.Linear(INPUTS, OUTPUTS, rngs=nnx.Rngs(key))
        return model, nnx.Optimizer(model, TX, wrt=nnx.Param)

    model, optimizer = create(jax.random.split(jax.random.key(0), members))
    start = pure(model, nnx.Param)
    step = nnx.jit(nnx.vmap(nnx_step, in_axes=(0, 0, None, None)))
    for batch in batches():
        step(model, optimizer, *batch)
    read = mj.read_velocity(as_pure(optimizer.opt_state))
    for i in range(members):
        params, state = plain_loop(jax.tree.map(lambda x, i=i: x[i], start))
        assert bits(jax.tree.map(lambda x, i=i: x[i], pure(model, nnx.Param))) == bits(params)
        expected = mj.read_velocity(state)
        assert bits(jax.tree.map(lambda x, i=i: x[i], read)) == bits(expected)


def make_mesh(shape=(4, 2), names=("data", "model"), axis_type=AxisType.Auto):
    devices = jax.devices()[: int(np.prod(shape))]
    return jax.make_mesh(shape, names, axis_types=(axis_type,) * len(shape), devices=devices)


SPECS = [("model", None), (None, "model"), ("data", "model")]
each_spec = pytest.mark.parametrize("spec", SPECS, ids=str)


def set_mesh(mesh: Mesh):
    return jax.set_mesh(mesh) if hasattr(jax, "set_mesh") else mesh


@pytest.mark.slow
@each_spec
def test_c6_nnx_metadata_shards_codes_and_scales(spec):
    """As Flax' guide does it: the metadata of the params is that of the state."""
    mesh = make_mesh()
    kernel_init = nnx.with_partitioning(nnx.initializers.lecun_normal(), spec)
    start = pure(make_nnx()[0], nnx.Param)

    @nnx.jit
    def create():
        pair = make_nnx(kernel_init=kernel_init)
        state = nnx.state(pair)
        nnx.update(pair, jax.lax.with_sharding_constraint(state, nnx.get_partition_spec(state)))
        return pair

    with set_mesh(mesh):
        model, optimizer = create()
        for batch in batches():
            nnx.jit(nnx_step)(model, optimizer, *batch)
    opt_state = pure(optimizer)["opt_state"]
    sharding = NamedSharding(mesh, P(*spec))
    for name in ("velocity", "scales"):
        assert opt_state[name]["kernel"].sharding.is_equivalent_to(sharding, 2)
    assert_trained_as_by_plain_loop(model, optimizer, start)


# Flax Linen. -----------------------------------------------------------------------------


@pytest.mark.slow
@each_spec
def test_c6_linen_metadata_shards_codes_and_scales(spec):
    """Through nn.get_sharding, as out_shardings of a jitted init."""
    mesh = make_mesh()
    network = nn.Dense(
        OUTPUTS, kernel_init=nn.with_partitioning(nn.initializers.lecun_normal(), spec)
    )
    x = batches()[0][0]

    def create(key):
        params = network.init(key, x)["params"]
        return TrainState.create(apply_fn=network.apply, params=params, tx=TX)

    abstract = jax.eval_shape(create, jax.random.key(0))
    specs = nn.get_partition_spec(abstract)
    assert specs.opt_state.velocity == specs.opt_state.scales == specs.params
    assert specs.params["kernel"] == P(*spec)
    shardings = nn.get_sharding(abstract, mesh)
    train_state = jax.jit(create, out_shardings=shardings)(jax.random.key(0))
    start = nn.meta.unbox(train_state.params)
    sharding = NamedSharding(mesh, P(*spec))

    @jax.jit
    def step(train_state, x, target):
        def loss(params):
            return linear_loss(lambda x: network.apply({"params": params}, x), x, target)

        return train_state.apply_gradients(grads=jax.grad(loss)(train_state.params))

    for batch in batches():
        train_state = step(train_state, *batch)
        for tree in (train_state.opt_state.velocity, train_state.opt_state.scales):
            assert isinstance(tree["kernel"], nn.Partitioned)
            assert tree["kernel"].value.sharding.is_equivalent_to(sharding, 2)
    params, state = plain_loop(flax.core.unfreeze(start))
    assert bits(nn.meta.unbox(train_state.params)) == bits(params)
    assert bits(nn.meta.unbox(train_state.opt_state)) == bits(state)


# Optax. ----------------------------------------------------------------------------------


def make_params():
    return {"kernel": exact((INPUTS, OUTPUTS), 7), "bias": exact((OUTPUTS,), 8)}


OWN: dict[str, Any] = {
    "momentum": lambda dtype: mj.momentum(0.25, 0.5, velocity_dtype=dtype),
    "trace": lambda dtype: mj.trace(0.5, velocity_dtype=dtype),
    "qhm": lambda dtype: mj.qhm(0.25, 0.5, velocity_dtype=dtype),
    "aggmo": lambda dtype: mj.aggmo(0.25, (0.0, 0.5), velocity_dtype=dtype),
    "recurrence": lambda dtype: mj.recurrence(
        reference.heavy_ball, learning_rate=0.25, mu=0.5, velocity_dtype=dtype
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", OWN)
@pytest.mark.parametrize("map_params", [optax.tree.map_params, optax.tree_utils.tree_map_params])
def test_c6_optax_map_params_with_a_tree_of_specs(map_params, name):
    """Codes and scales are mapped with their param's spec, the count is not."""
    params, tx = make_params(), optax.chain(optax.clip(100.0), OWN[name]("int8"))
    specs = {"kernel": P("data", "model"), "bias": P()}
    mesh = make_mesh()
    state = tx.init(params)
    shardings = map_params(
        tx,
        lambda _, spec: NamedSharding(mesh, spec),
        state,
        specs,
        transform_non_params=lambda _: NamedSharding(mesh, P()),
    )
    assert jax.tree.structure(shardings) == jax.tree.structure(state)
    placed = jax.device_put(state, shardings)
    ours = placed[1]
    for several in ours[1:]:
        for tree in several if name == "aggmo" else [several]:
            assert {k: v.sharding.spec for k, v in tree.items()} == specs
    assert ours.count.sharding.spec == P()
    _, after = jax.jit(tx.update)(params, placed, params)
    assert bits(after) == bits(tx.update(params, state, params)[1])


def moved(tx: Any, steps=STEPS) -> Any:
    """Updates and state after some steps, each with the same gradients."""
    params = make_params()
    state = tx.init(params)
    updates = None
    for _ in range(steps):
        updates, state = jax.jit(tx.update)(params, state, params)
    return updates, state


WRAPPERS: dict[str, Any] = {
    "masked": lambda tx: optax.masked(tx, True),
    "partition": lambda tx: optax.partition({"all": tx}, "all"),
    "MultiSteps": lambda tx: optax.MultiSteps(tx, 1),
    "apply_if_finite": lambda tx: optax.apply_if_finite(tx, 2),
    "inject_hyperparams": lambda _: optax.inject_hyperparams(
        mj.momentum, static_args=("velocity_dtype", "nesterov")
    )(0.25, 0.5, velocity_dtype="int8"),
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_c6_optax_wrappers_change_no_bit_of_8_bit_states(wrapper):
    updates, state = moved(WRAPPERS[wrapper](TX))
    expected, expected_state = moved(TX)
    assert bits(updates) == bits(expected)
    assert bits(mj.read_velocity(state)) == bits(mj.read_velocity(expected_state))
    for name in ("velocity", "scales"):
        assert bits(optax.tree.get(state, name)) == bits(getattr(expected_state, name))
    cleared = mj.reset_velocity(state)
    assert jax.tree.structure(cleared) == jax.tree.structure(state)
    assert not any(np.any(x) for x in jax.tree.leaves(mj.read_velocity(cleared)))


def test_c6_optax_groups_hold_codes_and_scales_of_their_own_params():
    """What is masked has neither; a step that is not finite leaves both."""
    tx: Any = optax.partition(
        {"8": TX, "32": mj.momentum(0.25, 0.5)}, {"kernel": "8", "bias": "32"}
    )
    _, state = moved(tx)
    low, wide = (state.inner_states[name].inner_state for name in ("8", "32"))
    assert isinstance(low.velocity["bias"], optax.MaskedNode)
    assert isinstance(low.scales["bias"], optax.MaskedNode)
    assert wide.scales is None
    assert bits(mj.read_velocity(state)) == bits(mj.read_velocity(moved(TX)[1]))

    tx = optax.apply_if_finite(TX, 2)
    _, state = moved(tx)
    params = make_params()
    broken = {**params, "kernel": params["kernel"].at[3, 4].set(jnp.nan)}
    _, after = jax.jit(tx.update)(broken, state, params)
    assert bits(after.inner_state) == bits(state.inner_state)


# Checkpoints, copies, trees. -------------------------------------------------------------


@pytest.mark.parametrize("devices", [8, 4, 1])
def test_c6_orbax_restores_on_other_devices(devices, tmp_path):
    """Saved on 8, restored on as many or fewer; the next step is that of the run that went on."""
    params, spec = make_params(), {"kernel": P("data"), "bias": P()}

    def place(tree, devices):
        mesh = make_mesh((devices,), ("data",))
        shardings = optax.tree.map_params(
            TX,
            lambda _, spec: NamedSharding(mesh, spec),
            tree,
            spec,
            transform_non_params=lambda _: NamedSharding(mesh, P()),
        )
        return jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings
        )

    state = moved(TX)[1]
    on_eight = jax.device_put(state, jax.tree.map(lambda x: x.sharding, place(state, 8)))
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", on_eight)
        checkpointer.wait_until_finished()
        target = place(jax.eval_shape(TX.init, params), devices)
        restored = checkpointer.restore(tmp_path / "state", target)
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    assert bits(restored) == bits(state)
    for x, like in zip(jax.tree.leaves(restored), jax.tree.leaves(target), strict=True):
        assert x.sharding == like.sharding
    assert bits(jax.jit(TX.update)(params, restored)) == bits(TX.update(params, state))


def test_c6_codes_scales_and_params_are_mapped_side_by_side():
    params, (_, state) = make_params(), moved(TX)

    def check(param, codes, scales):
        assert codes.shape == param.shape
        assert scales.ndim == param.ndim
        assert all(a % b == 0 for a, b in zip(param.shape, scales.shape, strict=True))
        return codes.nbytes + scales.nbytes

    sizes = jax.tree.map(check, params, state.velocity, state.scales)
    assert sizes == {"kernel": INPUTS * OUTPUTS * 17 // 16, "bias": 5 * OUTPUTS}


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_c6_states_are_copied_and_pickled(copied):
    _, state = moved(TX)
    again = copied(state)
    assert type(again) is mj.MomentumState
    assert bits(again) == bits(state)
    params = make_params()
    assert bits(TX.update(params, again)) == bits(TX.update(params, state))


@pytest.mark.slow
@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_c6_zero1_splits_codes_and_scales(axis_type, wrap):
    """What is stored is that of the unsharded_params run to the bit, whether blocks are cut or not.

    So are the updates on Auto axes. On Explicit ones arrays are moved within the step, and what is
    fused otherwise rounds their last bit in another way.
    """
    ulp = 0 if axis_type is AxisType.Auto else 2.0**-23
    mesh = make_mesh((8,), ("data",), axis_type)
    params = {
        **make_params(),
        "cut": exact((64, 128), 9),  # 8 rows a device, of blocks of 32.
        "last": exact((30, 1024), 10),  # Blocks of 128 along the axis that is split.
        "whole": exact((97, 43 * 2), 11),  # Nothing is divided by 8.
    }
    placed = jax.device_put(params, NamedSharding(mesh, P()))
    tx = mj.sharding.zero1(TX, mesh)
    state, expected_state = tx.init(placed), TX.init(params)
    start, updates = state, None
    for _ in range(STEPS):
        updates, state = wrap(tx.update)(placed, state, placed)
        expected, expected_state = TX.update(params, expected_state)
        jax.block_until_ready(updates)
        for a, b in zip(jax.tree.leaves(updates), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(a, b, rtol=0, atol=ulp * np.abs(b).max())
        assert bits(state) == bits(expected_state)
    for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(start), strict=True):
        assert a.sharding.is_equivalent_to(b.sharding, a.ndim)
    for name in ("kernel", "cut", "last", "bias"):
        for x in (state.velocity[name], state.scales[name]):
            assert x.addressable_shards[0].data.size * 8 == x.size
    for update, param in zip(jax.tree.leaves(updates), jax.tree.leaves(placed), strict=True):
        assert update.sharding.is_equivalent_to(param.sharding, param.ndim)


class Model(eqx.Module):
    kernel: jax.Array
    bias: jax.Array
    table: jax.Array
    name: str

    def __call__(self, x):
        return x @ self.kernel + self.bias


def test_c6_equinox_partition_and_combine():
    """Filtered params have None in place of the rest, and so have codes and scales."""
    model = Model(**make_params(), table=jnp.arange(3), name="linear")
    params, rest = eqx.partition(model, eqx.is_inexact_array)
    state = TX.init(params)
    assert state.velocity.table is state.scales.table is None

    @eqx.filter_jit
    def step(params, state, x, target):
        def loss(params):
            return linear_loss(eqx.combine(params, rest), x, target)

        updates, state = TX.update(eqx.filter_grad(loss)(params), state, params)
        return eqx.apply_updates(params, updates), state

    for batch in batches():
        params, state = step(params, state, *batch)
    expected, expected_state = plain_loop(make_params())
    trained = eqx.combine(params, rest)
    assert trained.name == "linear"
    for name in ("kernel", "bias"):
        assert bits(getattr(trained, name)) == bits(expected[name])
        assert bits(getattr(state.velocity, name)) == bits(expected_state.velocity[name])
        assert bits(getattr(state.scales, name)) == bits(expected_state.scales[name])


# Names. ----------------------------------------------------------------------------------


class Params(NamedTuple):
    """A user's own params, named as the fields of states are."""

    velocity: Any
    scales: Any
    trace: Any
    count: Any  # pyright: ignore[reportIncompatibleMethodOverride]


def make_named():
    return Params(
        exact((64, 128), 0),
        Params(exact((64, 128), 1), exact((4,), 2), exact((5,), 3), exact((6,), 4)),
        {"velocity": exact((64, 128), 5), "scales": exact((3,), 6)},
        exact((2,), 7),
    )


@pytest.mark.slow
@pytest.mark.parametrize("velocity_dtype", [None, "int8"])
@pytest.mark.parametrize("name", OWN)
def test_c11_params_named_like_the_fields_of_a_state(name, velocity_dtype):
    """Alone, in a chain with Adam, under a restart: each finds the velocity, and that alone."""
    params, tx = make_named(), OWN[name](velocity_dtype)
    plain = dict(enumerate(jax.tree.leaves(params)))

    def after(tx: Any, params) -> Any:
        state = tx.init(params)
        for _ in range(2):
            _, state = tx.update(params, state, params)
        return state

    expected = mj.read_velocity(after(tx, plain))
    state = after(tx, params)
    read = mj.read_velocity(state)
    assert jax.tree.structure(read[0] if name == "aggmo" else read) == jax.tree.structure(params)
    assert bits(read) == bits(expected)
    assert not any(np.any(x) for x in jax.tree.leaves(mj.read_velocity(mj.reset_velocity(state))))

    # The momentum is given the gradients as they are; Adam has states of its own after it.
    chained = after(optax.chain(tx, optax.scale_by_adam()), params)
    assert bits(mj.read_velocity(chained)) == bits(expected)
    reset = mj.reset_velocity(chained)
    assert bits(reset[1]) == bits(chained[1])
    assert not any(np.any(x) for x in jax.tree.leaves(mj.read_velocity(reset)))
    only = mj.reset_velocity(state, lambda path: path[-1] == jax.tree_util.GetAttrKey("count"))
    for (path, x), before in zip(
        jax.tree_util.tree_leaves_with_path(mj.read_velocity(only)),
        jax.tree.leaves(expected),
        strict=True,
    ):
        reset_here = path[-1] == jax.tree_util.GetAttrKey("count")
        np.testing.assert_array_equal(x, 0 * before if reset_here else before)

    restart = mj.adaptive_restart(tx)
    state = restart.init(params)
    _, state = restart.update(params, state, params)
    # The params moved along their gradient, uphill: the velocity starts again.
    uphill = jax.tree.map(lambda w: 2 * w, params)
    updates, _ = restart.update(params, state, uphill)
    first, _ = tx.update(params, tx.init(params))
    assert bits(updates) == bits(first)
