"""Resets of the velocity: adaptive_restart and reset_velocity."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest
from compiles import count_compiles
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from tables import rows

import momentum_jax

mj: Any = momentum_jax  # Avoids casts: Optax types its trees too widely.


def moving(tx, params, grad=1.0):
    """Returns the state after a step under a constant gradient."""
    grads = jax.tree.map(lambda w: jnp.full_like(w, grad), params)
    return tx.update(grads, tx.init(params), params)[1]


# adaptive_restart ------------------------------------------------------------------------

RISING = mj.schedules.nesterov_convex()
CURVATURES = np.geomspace(1e-5, 1.0, 40)


def distance(tx, steps=10_000):
    """Returns the final distance from the minimum of an ill-conditioned quadratic."""
    start = jnp.ones(len(CURVATURES))

    def step(carry, _):
        w, state = carry
        updates, state = tx.update(CURVATURES * w, state, w)
        return (w + updates, state), None

    w, _ = jax.jit(lambda: jax.lax.scan(step, (start, tx.init(start)), None, steps)[0])()
    return float(jnp.linalg.norm(w))


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    "inner",
    [
        lambda: mj.momentum(1.0, RISING, nesterov=True),
        lambda: optax.chain(mj.trace(RISING, nesterov=True), optax.scale_by_learning_rate(1.0)),
        lambda: mj.qhm(lambda t: 1.0 / (1 - RISING(t)), RISING, RISING),
    ],
    ids=["momentum", "trace, in a chain", "qhm"],
)
def test_restart_beats_the_unrestarted_method_by_orders_of_magnitude(inner):
    """At condition number 100,000; it is nearly as good as the best constant mu."""
    restarted = distance(mj.adaptive_restart(inner()))
    assert restarted < 1e-6 * distance(inner())
    best = mj.theory.nesterov(1.0, CURVATURES[0])
    assert restarted < 100 * distance(mj.momentum(best.learning_rate, best.mu, nesterov=True))


def test_restart_is_the_papers_by_hand():
    """It restarts before a step whose gradient opposes the last step, over all params together."""
    tx = mj.adaptive_restart(mj.momentum(0.5, 0.5))
    params: Any = {"a": jnp.zeros(1), "b": jnp.zeros(1)}
    state, v = tx.init(params), np.zeros(2)
    last = np.zeros(2)
    for grads in ([1, 1], [-1.5, 2], [-4, 1], [1, 1], [0, 0], [-3, 3]):
        g = np.array(grads, float)
        if g @ last > 0:
            v = np.zeros(2)
        v = last = 0.5 * v - 0.5 * g
        grads = {"a": jnp.array(g[:1]), "b": jnp.array(g[1:])}
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        np.testing.assert_array_equal([updates["a"][0], updates["b"][0]], v)
    assert int(state.inner_state.count) == 6


@pytest.mark.parametrize(
    "inner",
    [
        lambda: mj.momentum(0.5),
        lambda: mj.qhm(0.5),
        lambda: mj.aggmo(0.5),
        lambda: optax.chain(optax.clip(1.0), mj.trace(0.9), optax.scale(-0.5)),
        lambda: optax.masked(mj.momentum(0.5), {"w": True, "b": True, "frozen": False}),
    ],
    ids=["momentum", "qhm", "aggmo", "chain", "masked"],
)
def test_restart_keeps_the_contract(inner):
    """The state keeps its types; eager equals jitted; bfloat16, no gradient, one trace."""
    params = {"w": jnp.ones(3, jnp.bfloat16), "b": 1.0, "frozen": jnp.ones(2)}
    grads = {"w": jnp.ones(3, jnp.bfloat16), "b": jnp.ones(()), "frozen": None}
    tx = mj.adaptive_restart(inner())
    state = tx.init(params)
    eager, jitted = tx.update(grads, state, params), jax.jit(tx.update)(grads, state, params)
    for a, b in zip(jax.tree.leaves(eager), jax.tree.leaves(jitted), strict=True):
        np.testing.assert_array_equal(a, b)
        assert a.dtype == b.dtype
    for after in (eager[1], jitted[1]):
        for a, b in zip(jax.tree.leaves(after), jax.tree.leaves(state), strict=True):
            assert (a.dtype, a.shape, a.weak_type) == (b.dtype, b.shape, b.weak_type)
        assert jax.tree.structure(after) == jax.tree.structure(state)
    assert eager[0]["frozen"] is None
    traces = 0

    @jax.jit
    def step(params, state):
        nonlocal traces
        traces += 1
        updates, state = tx.update(grads, state, params)
        return mj.apply_updates(params, updates), state

    for _ in range(3):
        params, state = step(params, state)
    assert traces == 1


def test_restart_passes_extra_arguments_on():
    """It passes them to the inner transformation."""
    tx = mj.adaptive_restart(mj.momentum(0.5))
    w = jnp.float32(0)
    update, _ = tx.update(jnp.float32(1), tx.init(w), w, learning_rate=0.25)
    assert float(update) == -0.25


@pytest.mark.parametrize("shape", [(), (1000,)])
def test_restart_donates_safely(shape):
    """The stored params share no buffer with the params or the updates."""
    tx = mj.adaptive_restart(mj.momentum(0.5))
    w = jnp.ones(shape)
    state = start = tx.init(w)
    updates, state = tx.update(w, start, w)
    jitted, after = jax.jit(tx.update)(w, state, w)
    stored = [x for s in (start, state, after) for x in (s.previous_params, s.inner_state.velocity)]
    pointers = [x.unsafe_buffer_pointer() for x in (w, updates, jitted, *stored)]
    assert len(set(pointers)) == len(pointers)


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_restart_and_reset_keep_shardings(axis_type):
    """Eager and jitted."""
    mesh = jax.make_mesh((4, 2), ("d", "m"), axis_types=(axis_type,) * 2)
    sharding = NamedSharding(mesh, P("d", "m"))
    w = jax.device_put(np.ones((8, 16), np.float32), sharding)
    tx = mj.adaptive_restart(mj.momentum(0.5))
    for wrap in (jax.jit, lambda f: f):
        state = wrap(tx.update)(w, wrap(tx.init)(w), w)[1]
        state = wrap(lambda state: mj.reset_velocity(state))(state)
        for leaf in (state.previous_params, state.inner_state.velocity):
            assert leaf.sharding.is_equivalent_to(sharding, 2)


def trajectory(tx, grads, params):
    """Returns the params after each step."""
    state = tx.init(params)
    moved = []
    for g in grads:
        updates, state = tx.update(g, state, params)
        params = optax.apply_updates(params, updates)
        moved.append(params)
    return moved


SIGNS: dict[str, Any] = {
    "trace, scaled outside": lambda r: optax.chain(
        r(mj.trace(0.9)), optax.scale_by_learning_rate(0.1)
    ),
    "trace, scaled inside": lambda r: r(
        optax.chain(mj.trace(0.9), optax.scale_by_learning_rate(0.1))
    ),
    "scaled before, inside": lambda r: r(optax.chain(optax.scale(-0.1), mj.trace(0.9))),
    "momentum": lambda r: r(mj.momentum(0.1, 0.9)),
    "turned twice": lambda r: optax.chain(
        r(optax.chain(optax.scale(-1.0), mj.momentum(0.1, 0.9))), optax.scale(-1.0)
    ),
}


@pytest.mark.parametrize("name", SIGNS)
def test_restart_does_not_depend_on_the_sign_of_the_updates(name):
    """Downhill the velocity grows; it resets when the gradient says the last step went uphill."""
    grads = [jnp.full(1, g) for g in (1.0, 1.0, 1.0, -1.0, -1.0)]
    w = 0.0
    expected = []
    for step in (-0.1, -0.19, -0.271, 0.1, 0.19):
        expected.append(w := w + step)
    found = trajectory(SIGNS[name](mj.adaptive_restart), grads, jnp.zeros(1))
    np.testing.assert_allclose(np.concatenate(found), expected, rtol=1e-5)


@pytest.mark.parametrize("absent", [None, optax.MaskedNode(), np.zeros(1, jax.dtypes.float0)])
def test_a_param_without_a_gradient_does_not_decide_by_an_older_step(absent):
    """In the last step only b moved, downhill; a moved in the step before."""
    tx = mj.adaptive_restart(mj.momentum(0.1, 0.9))
    params: Any = {"a": jnp.zeros(1), "b": jnp.zeros(1)}
    state = tx.init(params)
    one, updates = jnp.ones(1), {}
    steps: list[Any] = [{"a": one, "b": absent}, {"a": absent, "b": one}]
    for grads in [*steps, {"a": -one, "b": 0.5 * one}]:
        updates, state = tx.update(grads, state, params)
        params = mj.apply_updates(params, updates)
    assert float(updates["b"][0]) == pytest.approx(-0.9 * 0.1 - 0.05)


def test_a_gradient_that_is_not_finite_does_not_restart():
    """As around `apply_if_finite`, which skips the step."""
    tx = mj.adaptive_restart(optax.apply_if_finite(mj.momentum(0.1, 0.9), 5))
    grads = [jnp.full(1, g) for g in (1.0, -np.inf, np.nan, 1.0)]
    found = trajectory(tx, grads, jnp.zeros(1))
    np.testing.assert_allclose(np.concatenate(found), [-0.1, -0.1, -0.1, -0.29], rtol=1e-6)


def test_restart_with_a_whole_model_as_params():
    """Leaves that are not arrays, which init did not get, are ignored."""
    tx = mj.adaptive_restart(mj.momentum(0.5, 0.5))
    state = tx.init({"w": jnp.ones(1), "activation": None})
    params = {"w": jnp.ones(1), "activation": jnp.tanh}
    updates, after = tx.update({"w": jnp.ones(1), "activation": None}, state, params)
    assert float(updates["w"][0]) == -0.5
    assert jax.tree.structure(after) == jax.tree.structure(state)


def even(step, **_):
    return step % 2 == 0


def by_name(make):
    return optax.partition({"a": make(), "b": make()}, {"a": "a", "b": "b"})


def both(a, b):
    return [{"a": x, "b": y} for x, y in zip(a, b, strict=True)]


M, A_ALONE = mj.momentum(0.1, 0.9), {"a": True, "b": False}
R = mj.adaptive_restart
PAIRS = [1, 1, 3, -1, -1, 3]  # Micro-batches whose means are 1.
# The transformation, the gradients, the params after each step. From v = 0, momentum takes steps of
# -0.1, -0.19, -0.271 under gradients of 1, and a step of -0.1 after a restart.
ROWS: dict[str, Any] = {
    "MultiSteps, inside": (
        optax.MultiSteps(R(M), 2).gradient_transformation(),
        [*PAIRS, -1, -1],
        [0, -0.1, -0.1, -0.29, -0.29, -0.561, -0.561, -0.461],
    ),
    "MultiSteps, around": (
        R(optax.MultiSteps(M, 2).gradient_transformation()),
        PAIRS,
        [0, -0.1, -0.1, -0.29, -0.29, -0.39],
    ),
    "apply_if_finite, inside": (
        optax.apply_if_finite(R(M), 5),
        [1, -np.inf, np.nan, 1, -np.inf, -1],
        [-0.1, -0.1, -0.1, -0.29, -0.29, -0.19],
    ),
    "apply_if_finite, around": (
        R(optax.apply_if_finite(M, 5)),
        [1, -np.inf, np.nan, 1, -1, -np.inf, 1, np.nan, -1],
        [-0.1, -0.1, -0.1, -0.29, -0.19, -0.19, -0.2, -0.2, -0.109],
    ),
    "conditionally_mask, inside": (
        optax.conditionally_mask(R(M), even),
        [1, -1, 1, -1, -1],
        [-0.1, -0.1, -0.29, -0.29, -0.19],
    ),
    "conditionally_mask, around": (
        R(optax.conditionally_mask(M, even)),
        [1, -1, 1],
        [-0.1, -0.1, -0.2],
    ),
    "conditionally_transform, inside": (
        optax.conditionally_transform(R(M), even),
        [1, -0.5, 1, 2, 1],
        [-0.1, -0.6, -0.79, 1.21, 1.11],
    ),
    "conditionally_transform, around": (
        R(optax.conditionally_transform(M, even)),
        [1, -0.5, 1],
        [-0.1, -0.6, -0.7],
    ),
    "masked, inside": (
        optax.masked(R(M), A_ALONE),
        both([1, 1], [1, 1]),
        both([-0.1, -0.29], [1, 2]),
    ),
    "masked, around": (
        R(optax.masked(M, A_ALONE)),
        both([1, 1], [1, 1]),
        both([-0.1, -0.2], [1, 2]),
    ),
    "partition, inside": (
        by_name(lambda: R(M)),
        both([1, 1], [1, -0.5]),
        both([-0.1, -0.29], [-0.1, -0.05]),
    ),
    "partition, around": (
        R(by_name(lambda: M)),
        both([1, 1], [1, -0.5]),
        both([-0.1, -0.29], [-0.1, -0.14]),
    ),
}


def test_each_row_of_the_table_is_tested():
    """Two rows have separate tests: test_restart_and_lookahead, ..._and_schedule_free."""
    tested = {name.split(", ")[0] for name in ROWS} | {"lookahead", "schedule_free"}
    assert set(rows(mj.adaptive_restart)) == tested
    assert {name.split(", ")[1] for name in ROWS} == {"inside", "around"}


@pytest.mark.parametrize("name", ROWS)
def test_restart_and_wrappers(name):
    """Tests each row of the docstring's table."""
    tx, grads, expected = ROWS[name]
    grads, expected = (jax.tree.map(jnp.float32, each) for each in (grads, expected))
    compiled = optax.GradientTransformationExtraArgs(tx.init, jax.jit(tx.update))
    found = trajectory(compiled, grads, jax.tree.map(jnp.zeros_like, grads[0]))
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5)


@pytest.mark.parametrize("last", [1.0, -1.0])
def test_restart_and_lookahead(last):
    """Inside, the jump to the slow params counts as movement; around, it is refused."""
    tx = optax.lookahead(R(M), sync_period=2, slow_step_size=0.5)
    start = jnp.zeros(1)
    params: Any = optax.LookaheadParams(start, start)
    grads = [jnp.full(1, g) for g in (1.0, 1.0, last)]
    found = [float(w.fast[0]) for w in trajectory(tx, grads, params)]
    third = -0.145 + (-0.271 if last > 0 else 0.1)
    np.testing.assert_allclose(found, [-0.1, -0.145, third], rtol=1e-5)
    tx = R(optax.lookahead(M, sync_period=2, slow_step_size=0.5))
    for tree in (params, optax.LookaheadParams({"w": start}, {"w": start})):
        with pytest.raises(ValueError, match=r"the params .*LookaheadParams|only in the params"):
            tx.update(tree.fast, tx.init(tree), tree)


@pytest.mark.parametrize("inside", [True, False])
def test_restart_and_schedule_free(inside):
    """The gradients are taken at the params, and z takes the steps."""
    make = functools.partial(optax.contrib.schedule_free, learning_rate=0.1, b1=0.9)
    tx: Any = make(R(M)) if inside else R(make(M))
    params = jnp.zeros(1)
    state = tx.init(params)
    found = []
    for grad in (1.0, 1.0, -1.0):
        updates, state = tx.update(jnp.full(1, grad), state, params)
        params = optax.apply_updates(params, updates)
        found.append(float((state if inside else state.inner_state).z[0]))
    np.testing.assert_allclose(found, [-0.1, -0.29, -0.19], rtol=1e-5)


def in_shard_map(tx, specs, mean, **options):
    """Runs two steps within shard_map; three of eight parts of the gradients turn."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))

    def two_steps(w, first, second):
        if mean:
            first, second = (jax.lax.pmean(g, "data") for g in (first, second))
        updates, state = tx.update(first, tx.init(w), w)
        w = w + updates
        return w + tx.update(second, state, w)[0]

    step = jax.shard_map(
        two_steps, mesh=mesh, in_specs=(specs, P("data"), P("data")), out_specs=specs, **options
    )
    w = jnp.zeros(1 if specs == P() else 8)
    return jax.jit(step)(w, jnp.ones(8), jnp.array([-1.0] * 3 + [1.0] * 5))


def test_restart_within_shard_map_is_one_decision_or_is_refused():
    """Replicated params with averaged gradients make one decision; all else is an error."""
    tx = mj.adaptive_restart(mj.momentum(0.1, 0.9))
    np.testing.assert_allclose(in_shard_map(tx, P(), mean=True), -0.1 - 0.09 - 0.025, rtol=1e-6)
    apart = r"within shard_map \(or pmap\) over \['data'\], .*call init and update outside"
    with pytest.raises(ValueError, match=apart):
        in_shard_map(tx, P("data"), mean=False)
    with pytest.raises(ValueError, match=apart):
        in_shard_map(tx, P("data"), mean=True)
    with pytest.raises(ValueError, match=apart):
        in_shard_map(tx, P(), mean=True, check_vma=False)


def test_restart_within_shard_map_over_an_axis_of_one_device():
    """With one device, there is only one decision."""
    mesh = jax.make_mesh((1,), ("data",), axis_types=(AxisType.Auto,))
    tx = mj.adaptive_restart(mj.momentum(0.5))
    step = jax.shard_map(
        lambda w: tx.update(w, tx.init(w), w)[0],
        mesh=mesh,
        in_specs=P("data"),
        out_specs=P("data"),
    )
    np.testing.assert_array_equal(step(jnp.ones(2)), -0.5)


# reset_velocity --------------------------------------------------------------------------

PARAMS = {"body": {"w": jnp.zeros((2, 2)), "b": jnp.zeros(2)}, "head": jnp.zeros(3)}


def velocities(state):
    """Returns the values of each leaf."""
    return {
        jax.tree_util.keystr(path): np.asarray(v).ravel().tolist()
        for path, v in jax.tree_util.tree_leaves_with_path(state.velocity)
    }


def test_reset_all():
    """Also resets values that are not finite; the count stays."""
    state = moving(mj.momentum(0.5), PARAMS)
    state.velocity["head"] = jnp.array([jnp.nan, jnp.inf, 1.0])
    after = mj.reset_velocity(state)
    assert int(after.count) == 1
    assert all(not any(values) for values in velocities(after).values())
    halved = mj.reset_velocity(moving(mj.momentum(0.5), PARAMS), scale=0.5)
    assert velocities(halved)["['head']"] == [-0.25] * 3


@pytest.mark.parametrize(
    "where",
    [
        {"body": True, "head": False},
        {"body": {"w": True, "b": np.True_}, "head": jnp.array([False] * 3)},
        lambda path: path[0].key == "body",
    ],
    ids=["prefix", "tree", "predicate"],
)
def test_reset_a_part(where):
    """Selects by a prefix, by a tree and by the path."""
    after = velocities(mj.reset_velocity(moving(mj.momentum(0.5), PARAMS), where))
    assert after == {
        "['body']['b']": [0, 0],
        "['body']['w']": [0] * 4,
        "['head']": [-0.5] * 3,
    }


def test_reset_single_values():
    """As needed for pruning and for resetting layers."""
    mask = {"body": False, "head": np.array([True, False, True])}
    after = velocities(mj.reset_velocity(moving(mj.momentum(0.5), PARAMS), mask, scale=-1.0))
    assert after["['head']"] == [0.5, -0.5, 0.5]
    assert after["['body']['b']"] == [-0.5, -0.5]


@pytest.mark.parametrize(
    "make",
    [
        lambda tx: optax.chain(optax.clip(1.0), tx, optax.identity()),
        lambda tx: optax.MultiSteps(tx, 1),
        lambda tx: optax.apply_if_finite(tx, 2),
        lambda tx: optax.masked(tx, {"body": True, "head": False}),
        lambda tx: optax.partition({0: tx, 1: tx}, {"body": 0, "head": 1}),
        mj.adaptive_restart,
    ],
    ids=["chain", "MultiSteps", "apply_if_finite", "masked", "partition", "adaptive_restart"],
)
def test_reset_finds_the_velocity_wherever_it_is(make):
    """It leaves everything else unchanged."""
    state = moving(make(mj.momentum(0.5)), PARAMS)
    after = jax.jit(mj.reset_velocity)(state)
    assert jax.tree.structure(after) == jax.tree.structure(state)
    before = jax.tree_util.tree_leaves_with_path(state)
    for (path, a), b in zip(before, jax.tree.leaves(after), strict=True):
        reset = ".velocity" in jax.tree_util.keystr(path)
        np.testing.assert_array_equal(b, np.zeros_like(a) if reset else a)


@pytest.mark.parametrize(
    "where",
    [
        {"body": False, "head": True},
        lambda path: path[0].key == "head",
        optax.MaskedNode,  # Gets the tree below.
    ],
    ids=["tree", "predicate", "a tree that can be called"],
)
def test_reset_of_several_velocities_is_by_the_params(where):
    """The meaning of `where` does not depend on the number of velocities per param."""
    if where is optax.MaskedNode:
        where = _CallableTree(body={"w": False, "b": False}, head=True)
        params: Any = _CallableTree(**PARAMS)
    else:
        params = PARAMS
    for tx in (mj.aggmo(0.5, (0.5, 0.9)), mj.momentum(0.5)):
        after = mj.reset_velocity(moving(tx, params), where)
        for path, each in jax.tree_util.tree_leaves_with_path(after.velocity):
            assert bool(np.any(each)) == ("head" not in jax.tree_util.keystr(path))


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class _CallableTree:
    """A callable tree, like an Equinox model."""

    body: Any
    head: Any

    def __call__(self, x):
        return x


def test_reset_a_tuple_of_params():
    """It is distinguished from a tuple of velocities by the type of the state."""
    params = (jnp.ones(2), jnp.ones(2))
    for tx in (
        mj.recurrence(lambda v, g: (v - g, v - g)),
        mj.recurrence(lambda v, g: ((v[0] - g,), -g), velocities=1),
    ):
        after = mj.reset_velocity(moving(tx, params), (True, False))
        for path, each in jax.tree_util.tree_leaves_with_path(after.velocity):
            assert bool(np.any(each)) == (path[-1].idx == 1)


def test_reset_a_tree_like_the_params_where_groups_are_masked_by_a_prefix():
    """In the velocity, a whole subtree is then one `optax.MaskedNode`."""
    tx = optax.partition(
        {0: mj.momentum(0.5), 1: mj.aggmo(0.5, (0.0, 0.5))}, {"body": 0, "head": 1}
    )
    state = moving(tx, PARAMS)
    after = mj.reset_velocity(state, {"body": {"w": True, "b": False}, "head": True})
    for path, each in jax.tree_util.tree_leaves_with_path(after):
        name = jax.tree_util.keystr(path)
        if "velocity" in name:
            assert bool(np.any(each)) == ("['b']" in name)


def test_reset_under_jit_with_a_traced_scale_and_mask():
    """One program is compiled for all values."""
    state = moving(mj.momentum(0.5), PARAMS)

    @jax.jit
    def reset(state, mask, scale):
        return mj.reset_velocity(state, {"body": False, "head": mask}, scale)

    reset(state, jnp.array([True] * 3), 0.5)
    with count_compiles() as compiles:
        after = reset(state, jnp.array([True, False, False]), 0.25)
    assert compiles.count == 0
    assert velocities(after)["['head']"] == [-0.125, -0.5, -0.5]


def test_reset_keeps_dtypes_and_integers():
    """A bfloat16 velocity stays bfloat16; the velocity of an integer param never changes."""
    tx = mj.momentum(0.5, velocity_dtype="bfloat16")
    state = tx.init({"w": jnp.ones(2), "ids": jnp.arange(2)})
    after = mj.reset_velocity(state, scale=0.5)
    assert [v.dtype for v in jax.tree.leaves(after.velocity)] == [jnp.int32, jnp.bfloat16]


@pytest.mark.parametrize("velocity_dtype", [None, "int8"])
def test_where_is_like_the_params_of_an_nnx_module(velocity_dtype):
    """Its state holds nnx variables; `where` is a State, a dict, a prefix, or selects by path."""
    model = nnx.Sequential(
        nnx.Linear(64, 128, rngs=nnx.Rngs(0)), nnx.Linear(128, 3, rngs=nnx.Rngs(1))
    )
    tx = mj.momentum(0.1, velocity_dtype=velocity_dtype)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    optimizer.update(model, nnx.grad(lambda model: jnp.sum(model(jnp.ones((2, 64)))))(model))
    params = nnx.state(model, nnx.Param)
    where: Any = jax.tree_util.tree_map_with_path(lambda path, _: path[1].key == 1, params)
    prefix = {"layers": {0: False, 1: True}}
    for each in (where, nnx.to_pure_dict(where), prefix, lambda path: path[1].key == 1):
        state: Any = mj.reset_velocity(optimizer.opt_state, each)
        assert jax.tree.structure(state) == jax.tree.structure(optimizer.opt_state)
        for path, velocity in jax.tree_util.tree_leaves_with_path(mj.read_velocity(state)):
            assert np.any(velocity) == (path[1].key == 0)
    with pytest.raises(ValueError, match="where must be a prefix of the velocity"):
        mj.reset_velocity(optimizer.opt_state, {"layers": {0: False, 2: True}})
