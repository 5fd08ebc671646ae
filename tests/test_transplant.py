"""States that are carried over to changed params or a changed optimizer.

What is compared is another run, which never changed: the next 20 steps, to the bit.
"""

import functools
import itertools
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest
from compiles import count_compiles
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from jobs import (
    STEPS,
    WIDE,
    assert_same,
    begun,
    grads_like,
    numbers,
    one_step,
    params_of,
    scheduled,
    train,
    types,
)
from processes import run_job

import momentum_jax

mj: Any = momentum_jax  # Optax types a state as any tree of arrays.

# Each kind of state: ours, Optax's, and wrappers around them. -------------------------------


KINDS: dict[str, Any] = {
    "momentum": lambda: mj.momentum(scheduled, 0.9),
    "bfloat16": lambda: mj.momentum(0.1, velocity_dtype="bfloat16"),
    "int8": lambda: mj.momentum(0.1, velocity_dtype="int8"),
    "trace": lambda: optax.chain(mj.trace(0.9), optax.scale_by_learning_rate(scheduled)),
    "qhm": lambda: mj.qhm(0.1),
    "aggmo": lambda: mj.aggmo(0.1, (0.0, 0.9), velocity_dtype="int8"),
    "recurrence": lambda: mj.recurrence(average, mu=0.9),
    "sgd": lambda: optax.sgd(scheduled, 0.9),
    "adam": lambda: optax.adam(0.01, mu_dtype=jnp.bfloat16),
    "adamw in a chain": lambda: optax.chain(optax.clip(1.0), optax.adamw(0.01)),
    "adafactor": lambda: optax.adafactor(0.01, min_dim_size_to_factor=8),
    "two velocities of one type": lambda: optax.chain(
        mj.trace(0.5), mj.trace(0.9), optax.scale(-0.1)
    ),
    "MultiSteps": lambda: optax.MultiSteps(mj.momentum(scheduled), 2),
    "inject_hyperparams": lambda: optax.inject_hyperparams(
        mj.momentum, static_args=("nesterov", "velocity_dtype")
    )(learning_rate=0.1, mu=lambda count: 0.9),
    "adaptive_restart": lambda: mj.adaptive_restart(mj.momentum(0.1, 0.9)),
    "kahan": lambda: mj.kahan(mj.momentum(0.1)),
    "apply_if_finite": lambda: optax.apply_if_finite(optax.sgd(0.1, 0.9), 3),
    "schedule_free": lambda: optax.contrib.schedule_free(optax.sgd(0.1, 0.9), 0.1),
    "torch_sgd": lambda: mj.frameworks.torch_sgd(0.1, 0.9, dampening=0.5),
    "partition by depth": lambda: optax.partition(
        {"w": mj.momentum(0.1), "b": optax.adam(0.01)},
        lambda params: jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key, params),
    ),
    "masked": lambda: optax.masked(
        mj.momentum(0.1),
        lambda params: jax.tree_util.tree_map_with_path(
            lambda path, _: path[-1].key == "w", params
        ),
    ),
}
each_kind = pytest.mark.parametrize("kind", KINDS)


def average(velocity, gradient, mu):
    velocity = mu * velocity + (1 - mu) * gradient
    return velocity, -0.1 * velocity


@each_kind
def test_a_renamed_module_goes_on_to_the_bit(kind):
    """Its next 20 steps are those of the model that kept its names."""
    tx = KINDS[kind]()
    params, state = begun(tx, params_of("enc", "head"))
    expected, _ = train(tx, params, state, STEPS, start=3)
    renamed = {"encoder": params["enc"], "out": {"head": params["head"]}}
    carried, report = mj.transplant(
        state,
        tx.init(renamed),
        {"['enc']": "['encoder']", "['head']": "['out']['head']"},
        strict=True,
    )
    assert types(carried) == types(tx.init(renamed))
    assert {"['encoder']['w']", "['out']['head']['w']"} <= set(report.kept)
    moved, _ = train(tx, renamed, carried, STEPS, start=3)
    assert_same((moved["encoder"], moved["out"]["head"]), (expected["enc"], expected["head"]))


@each_kind
def test_an_added_layer_leaves_the_others_as_they_were(kind):
    """And begins as in a new state; without it again, nothing has changed."""
    tx = KINDS[kind]()
    params, state = begun(tx, params_of("enc", "head"))
    expected, _ = train(tx, params, state, STEPS, start=3)
    larger = {**params, "new": params_of("new", seed=9)["new"]}
    carried, report = mj.transplant(state, tx.init(larger))
    assert set(report.fresh) <= {"['new']['w']", "['new']['b']"}
    assert report.fresh
    assert not report.dropped
    moved, _ = train(tx, larger, carried, STEPS, start=3)
    assert_same({name: moved[name] for name in params}, expected)
    back, report = mj.transplant(carried, tx.init(params))
    assert_same(back, state)
    assert set(report.dropped) <= {"['new']['w']", "['new']['b']"}
    assert not report.fresh


@each_kind
def test_under_jit_it_is_the_same(kind):
    tx = KINDS[kind]()
    params, state = begun(tx, params_of("enc", "head"))
    larger = {**params, "head": params_of("new", seed=9)["new"]}
    larger["head"]["w"] = numbers((64, 256))
    carry = lambda old, new: mj.transplant(old, new, resize=True)[0]  # noqa: E731
    assert_same(jax.jit(carry)(state, tx.init(larger)), carry(state, tx.init(larger)))


@each_kind
def test_nothing_is_shared_with_the_old_state(kind):
    """So that the old one can be kept, and the new one donated."""
    tx = KINDS[kind]()
    params, state = begun(tx, params_of("enc"))
    carried, _ = mj.transplant(state, tx.init(params))
    before = jax.tree.map(np.array, state)
    jax.jit(lambda state: jax.tree.map(lambda x: x * x, state), donate_argnums=0)(carried)
    assert_same(jax.tree.map(np.array, state), before)


# The changes of a model. ---------------------------------------------------------------------


def test_a_frozen_layer_is_unfrozen():
    """As if it had been there all the time with gradients of 0."""
    params = params_of("enc", "head")
    frozen = optax.partition(
        {"on": mj.momentum(scheduled), "off": optax.set_to_zero()}, {"enc": "off", "head": "on"}
    )
    moved, state = begun(frozen, params)
    tx = mj.momentum(scheduled)
    carried, report = mj.transplant(state, tx.init(params))
    assert report.fresh == ("['enc']['b']", "['enc']['w']")
    assert report.kept == ("['head']['b']", "['head']['w']")
    whole, expected = params, tx.init(params)
    for step in range(3):
        grads = grads_like(params, step)
        grads["enc"] = jax.tree.map(jnp.zeros_like, grads["enc"])
        whole, expected = one_step(tx, whole, expected, grads)
    assert_same((moved, carried), (whole, expected))
    assert_same(train(tx, moved, carried, STEPS, 3), train(tx, whole, expected, STEPS, 3))


@pytest.mark.parametrize("dtype", [None, "int8"])
def test_params_change_their_groups(dtype):
    """The velocity goes with the param, whatever its group is called and where it is."""
    params = params_of("enc", "head", "neck")
    make = functools.partial(mj.momentum, velocity_dtype=dtype)
    one = optax.partition({"a": make(0.1), "b": make(0.2)}, {"enc": "a", "head": "b", "neck": "a"})
    other = optax.chain(
        optax.clip(1e6),
        optax.partition(
            {"x": make(0.3), "y": make(0.1), "z": make(0.2)},
            {"enc": "z", "head": "x", "neck": "x"},
        ),
    )
    params, state = begun(one, params)
    carried, report = mj.transplant(state, other.init(params), strict=True)
    assert not report.dropped
    assert_same(mj.read_velocity(carried), mj.read_velocity(state))
    counts = [x for x in jax.tree.leaves(carried) if x.dtype == jnp.int32]
    assert list(map(int, counts)) == [3, 3, 3]
    back, _ = mj.transplant(carried, one.init(params), strict=True)
    assert_same(back, state)


def regression(params, batch):
    x, y = batch
    # Unit by unit: without one that is 0, the others are summed in the same order.
    y_hat = jnp.zeros_like(y)
    for j in range(len(params["out"])):
        hidden = jax.nn.relu(jnp.sum(x * params["in"][:, j], axis=1))
        y_hat = y_hat + hidden[:, None] * params["out"][j]
    return jnp.sum((y_hat - y) ** 2) / len(y)


def descend(tx, params, state, steps, classes, start=0):
    @jax.jit
    def step(params, state, batch):
        updates, state = tx.update(jax.grad(regression)(params, batch), state, params)
        return optax.apply_updates(params, updates), state

    for i in range(start, start + steps):
        x, y = numbers((8, 4), i), numbers((8, 3), 100 + i)
        y = jnp.pad(y, ((0, 0), (0, classes - 3)))
        params, state = step(params, state, (x, y))
    return params, state


def test_a_class_is_added_to_the_head():
    """Zero-initialised, and with targets of 0: the others do not see it."""
    tx = mj.momentum(0.02, 0.9)
    first: Any = {"in": numbers((4, 6)), "out": numbers((6, 3), 1)}
    params, state = descend(tx, first, tx.init(first), 5, 3)
    expected, _ = descend(tx, params, state, STEPS, 3, start=5)
    wider = {**params, "out": jnp.pad(params["out"], ((0, 0), (0, 1)))}
    carried, report = mj.transplant(state, tx.init(wider), resize=True)
    assert (report.kept, report.resized) == (("['in']",), ("['out']",))
    moved, _ = descend(tx, wider, carried, STEPS, 4, start=5)
    assert_same({**moved, "out": moved["out"][:, :3]}, expected)
    assert not np.any(moved["out"][:, 3])


def test_what_resize_does_not_read_is_dropped():
    """To ask whether a path is there is not to read it."""
    old = mj.MomentumState(jnp.int32(1), {"a": jnp.ones(3), "gone": jnp.ones(2)})
    new = mj.momentum(0.1).init({"a": jnp.ones(4)})

    def resize(path, old, shape):
        assert "['gone']" in old
        assert set(old) == {"['a']", "['gone']"}
        return jnp.pad(old[path], (0, 1))

    _, report = mj.transplant(old, new, resize=resize)
    assert (report.resized, report.dropped) == (("['a']",), ("['gone']",))


def test_a_unit_is_pruned_by_its_index():
    """Whose weights were 0: what is left goes on as it did."""
    tx = mj.momentum(0.02, 0.9)
    first: Any = {"in": numbers((4, 6)).at[:, 2].set(0), "out": numbers((6, 3), 1).at[2].set(0)}
    params, state = descend(tx, first, tx.init(first), 5, 3)
    expected, _ = descend(tx, params, state, STEPS, 3, start=5)
    kept = np.array([0, 1, 3, 4, 5])
    axis = {"['in']": 1, "['out']": 0}

    def prune(path, old, shape):
        assert old[path].shape != shape
        return jnp.take(old[path], kept, axis[path])

    pruned = {"in": params["in"][:, kept], "out": params["out"][kept]}
    carried, report = mj.transplant(state, tx.init(pruned), resize=prune, strict=True)
    assert report.resized == ("['in']", "['out']")
    moved, _ = descend(tx, pruned, carried, STEPS, 3, start=5)
    assert_same(moved, {"in": expected["in"][:, kept], "out": expected["out"][kept]})


@pytest.mark.parametrize("name", ["momentum", "int8", "adaptive_restart", "adam"])
def test_layers_are_stacked_for_a_scan_and_back(name):
    tx = KINDS[name]()
    layers = params_of("layer_0", "layer_1", "layer_2")
    layers, state = begun(tx, layers)
    stacked = {"layers": jax.tree.map(lambda *each: jnp.stack(each), *layers.values())}

    def stack(path, old, shape):
        if not path.startswith("['layers']"):
            return None
        rest = path.removeprefix("['layers']")
        return jnp.stack([old[f"['layer_{i}']{rest}"] for i in range(3)])

    def unstack(path, old, shape):
        ((number, rest),) = re.findall(r"^\['layer_(\d)'\](.*)$", path)
        return old[f"['layers']{rest}"][int(number)]

    carried, report = mj.transplant(state, tx.init(stacked), resize=stack, strict=True)
    assert report.resized == ("['layers']['b']", "['layers']['w']")
    row = next(row for row in report.rows if row.path == "['layers']['b']")
    assert "['layer_0']['b'], ['layer_1']['b'], ['layer_2']['b']" in row.note
    back, report = mj.transplant(carried, tx.init(layers), resize=unstack, strict=True)
    assert len(report.resized) == 6
    if name == "int8":  # Rounded once more on each way.
        for a, b in zip(*map(jax.tree.leaves, map(mj.read_velocity, (back, state))), strict=True):
            assert np.max(np.abs(a - b)) <= 0.03 * np.max(np.abs(b))
    else:
        assert_same(back, state)


# Another optimizer. --------------------------------------------------------------------------

DTYPES = [None, "float32", "bfloat16", "float16", "int8"]


@pytest.mark.parametrize("pair", list(itertools.permutations(DTYPES, 2)), ids=str)
@pytest.mark.parametrize("make", [mj.momentum, mj.qhm, mj.aggmo], ids=["momentum", "qhm", "aggmo"])
def test_the_velocity_dtype_changes(make, pair):
    """To what the new one can hold; back from a wider one it is what it was."""
    one, other = (make(0.1, velocity_dtype=dtype) for dtype in pair)
    params, state = begun(one, params_of("enc"))
    carried, report = mj.transplant(state, other.init(params), strict=True)
    assert report.kept
    assert types(carried) == types(other.init(params))
    assert carried.count == state.count == 3
    bound = {"bfloat16": 2**-7, "float16": 2**-10, "int8": 0.03}.get(pair[1], 0)
    old, new = (jax.tree.leaves(mj.read_velocity(each)) for each in (state, carried))
    for a, b in zip(old, new, strict=True):
        a, b = (np.asarray(x, np.float64) for x in (a, b))
        limit = np.max(np.abs(a)) if pair[1] == "int8" else np.abs(a)
        # Below its normal numbers float16 counts in units of 2^-24.
        assert np.all(np.abs(a - b) <= bound * limit + (2**-24 if pair[1] == "float16" else 0))
    if bound == 0:
        back, _ = mj.transplant(carried, one.init(params))
        if pair[0] != "int8":
            assert_same(back, state)
    one_step(other, params, carried, grads_like(params, 3))


def test_wrappers_are_put_around_and_taken_off():
    params, state = begun(mj.momentum(0.1), params_of("enc"))
    for wrap in (
        lambda tx: optax.chain(optax.clip_by_global_norm(1.0), tx),
        mj.adaptive_restart,
        mj.kahan,
        lambda tx: optax.apply_if_finite(tx, 2),
        lambda tx: optax.masked(tx, {"enc": True}),
        lambda tx: optax.MultiSteps(tx, 2),
    ):
        tx = wrap(mj.momentum(0.1))
        carried, report = mj.transplant(state, tx.init(params))
        assert report.kept == ("['enc']['b']", "['enc']['w']")
        assert types(carried) == types(tx.init(params))
        assert_same(mj.read_velocity(carried), state.velocity)
        back, _ = mj.transplant(carried, mj.momentum(0.1).init(params))
        assert_same(back, state)


def test_optax_and_back():
    """Its trace is ours; its count, if it has none, is known to be at least 1."""
    params = params_of("enc")
    for make in (lambda rate: optax.sgd(rate, 0.9), lambda rate: optax.chain(optax.sgd(rate, 0.9))):
        moved, state = begun(make(scheduled), params)
        ours = optax.chain(mj.trace(0.9), optax.scale_by_learning_rate(scheduled))
        carried, _ = mj.transplant(state, ours.init(params), strict=True)
        assert [int(x.count) for x in carried] == [3, 3]
        expected, _ = train(make(scheduled), moved, state, STEPS, 3)
        assert_same(train(ours, moved, carried, STEPS, 3)[0], expected)
    constant = optax.sgd(0.1, 0.9)
    for steps, count in ((0, 0), (3, 1)):
        _, state = begun(constant, params, steps)
        carried, report = mj.transplant(state, mj.trace(0.9).init(params), strict=True)
        assert int(carried.count) == count
        assert "does not count its steps" in str(report)
    _, state = begun(constant, params)
    new = optax.sgd(scheduled, 0.9).init(params)
    with pytest.raises(ValueError, match=r"ScaleByScheduleState\.count +fresh"):
        mj.transplant(state, new, strict=True)


def test_schedules_go_on_in_a_state_that_counts_elsewhere():
    """Each count that is new is that of the others."""
    params, state = begun(mj.momentum(0.1), params_of("enc"))
    tx = optax.chain(mj.momentum(0.1), optax.scale_by_schedule(lambda count: 1.0))
    carried, report = mj.transplant(state, tx.init(params), strict=True)
    assert [int(each.count) for each in carried] == [3, 3]
    assert "ScaleByScheduleState.count" in str(report)


def test_gathered_gradients_are_carried_in_the_middle_of_a_step():
    tx = optax.MultiSteps(mj.momentum(0.1), 4)
    params, state = begun(tx, params_of("enc"), steps=6)
    assert int(state.mini_step) == 2
    renamed = {"encoder": params["enc"]}
    carried, _ = mj.transplant(state, tx.init(renamed), {"['enc']": "['encoder']"}, strict=True)
    expected, _ = train(tx, params, state, STEPS, 6)
    assert_same(train(tx, renamed, carried, STEPS, 6)[0]["encoder"], expected["enc"])


def test_injected_hyperparams_go_on():
    """One that was set by hand stays so, and the report says it."""
    make = optax.inject_hyperparams(mj.momentum, static_args=("nesterov", "velocity_dtype"))
    tx = make(learning_rate=0.1, mu=lambda count: jnp.minimum(0.1 * count, 0.9))
    params, state = begun(tx, params_of("enc"))
    state.hyperparams["learning_rate"] = jnp.float32(0.001)
    carried, report = mj.transplant(state, tx.init(params), strict=True)
    assert_same(carried, state)
    (row,) = (row for row in report.rows if row.outcome == "noted" and "learning_rate" in row.array)
    assert (row.path, row.note) == (None, "0.001 (new state: 0.1)")


def test_flax_nnx():
    """A head of another size, in the state of a new optimizer."""
    make = lambda classes, seed: nnx.Sequential(  # noqa: E731
        nnx.Linear(64, 128, rngs=nnx.Rngs(seed)), nnx.Linear(128, classes, rngs=nnx.Rngs(seed))
    )
    for velocity_dtype in (None, "int8"):
        tx = mj.momentum(0.1, velocity_dtype=velocity_dtype)
        model, wider = make(5, 0), make(7, 1)
        optimizer, other = (nnx.Optimizer(each, tx, wrt=nnx.Param) for each in (model, wider))
        grads = nnx.grad(lambda model: jnp.sum(model(jnp.ones((2, 64))) ** 2))
        optimizer.update(model, grads(model))
        before = mj.read_velocity(optimizer.opt_state)
        other.opt_state, report = mj.transplant(
            optimizer.opt_state, other.opt_state, resize=True, strict=True
        )
        assert set(report.kept) == {"['layers'][0]['bias']", "['layers'][0]['kernel']"}
        assert set(report.resized) == {"['layers'][1]['bias']", "['layers'][1]['kernel']"}
        after = mj.read_velocity(other.opt_state)
        for path, each in jax.tree_util.tree_leaves_with_path(after):
            old = dict(jax.tree_util.tree_leaves_with_path(before))[path]
            same = tuple(slice(n) for n in old.shape)
            np.testing.assert_array_equal(each[same], old)
            assert np.sum(each != 0) == np.sum(old != 0)
        other.update(wider, grads(wider))
        assert int(jax.tree.leaves(other.opt_state.count)[0]) == 2


def test_a_compensation_and_the_last_params_are_carried():
    params = jax.tree.map(lambda w: w.astype(jnp.bfloat16), params_of("enc"))
    tx = mj.kahan(mj.adaptive_restart(mj.momentum(1e-3)))
    params, state = begun(tx, params)
    assert any(map(np.any, jax.tree.leaves(state.compensation)))
    carried, report = mj.transplant(
        state, tx.init({"encoder": params["enc"]}), {"['enc']": "['encoder']"}, strict=True
    )
    assert_same(carried.compensation["encoder"], state.compensation["enc"])
    assert_same(
        carried.inner_state.previous_params["encoder"], state.inner_state.previous_params["enc"]
    )
    assert {row.array for row in report.rows} == {
        "KahanState.compensation",
        "AdaptiveRestartState.previous_params",
        "MomentumState.velocity",
    }


def test_a_nan_does_not_hide_what_is_too_large(x64):
    params = jnp.ones(3, jnp.float64)
    tx = mj.momentum(0.1)
    state = tx.init(params)._replace(velocity=jnp.array([1e300, 1.0, jnp.nan]))
    with pytest.raises(ValueError, match="has 1 of 3 values that are too large for float32"):
        mj.transplant(state, mj.momentum(0.1, velocity_dtype="float32").init(params))


# Names. ----------------------------------------------------------------------------------------


def test_the_longest_prefix_counts_and_a_name_that_only_begins_alike_does_not():
    tx = mj.momentum(0.1)
    tree = lambda: numbers(3)  # noqa: E731
    old = {"a": {"b": tree(), "c": tree()}, "ab": tree()}
    new = {"x": {"c": tree()}, "y": tree(), "ab": tree()}
    _, state = begun(tx, old)
    carried, _ = mj.transplant(
        state, tx.init(new), {"['a']": "['x']", "['a']['b']": "['y']"}, strict=True
    )
    expected = {"x": {"c": state.velocity["a"]["c"]}, "y": state.velocity["a"]["b"]}
    assert_same(carried.velocity, expected | {"ab": state.velocity["ab"]})
    rename = lambda path: path.replace("['a']['b']", "['y']").replace("['a']", "['x']")  # noqa: E731
    assert_same(mj.transplant(state, tx.init(new), rename, strict=True)[0], carried)


def test_labels_of_groups_and_fields_are_no_part_of_a_path():
    """A group, a param and a field may have one name."""
    params = {"velocity": numbers(3), "count": numbers(2), "a": numbers(4)}
    tx = optax.partition(
        {"a": mj.momentum(0.1), "velocity": mj.momentum(0.2)},
        {"velocity": "a", "count": "velocity", "a": "velocity"},
    )
    params, state = begun(tx, params)
    new = {"count": params["count"], "b": params["a"], "trace": params["velocity"]}
    other = mj.momentum(0.1)
    rename = {"['a']": "['b']", "['velocity']": "['trace']"}
    carried, _ = mj.transplant(state, other.init(new), rename, strict=True)
    before = mj.read_velocity(state)
    expected = {"count": before["count"], "b": before["a"], "trace": before["velocity"]}
    assert_same(carried.velocity, expected)


def test_a_single_array_and_a_tuple_as_params():
    for params in (numbers(3), (numbers(3), numbers(4)), [numbers(3)]):
        for tx in (mj.momentum(0.1), mj.aggmo(0.1), optax.sgd(0.1, 0.9), optax.adam(0.1)):
            _, state = begun(tx, params)
            assert_same(mj.transplant(state, tx.init(params), strict=True)[0], state)


class Attention(NamedTuple):
    query: Any
    key: Any
    value: Any


def test_a_field_that_is_called_value_keeps_its_name():
    params = Attention(numbers(2), numbers(3), numbers(4))
    for tx in (mj.momentum(0.1), optax.adam(0.1)):
        _, state = begun(tx, params)
        new = {"q": params.query, "k": params.key, "v": params.value}
        names = {".query": "['q']", ".key": "['k']", ".value": "['v']"}
        carried, report = mj.transplant(state, tx.init(new), names, strict=True)
        assert set(report.kept) == {"['q']", "['k']", "['v']"}
        part = optax.masked(tx, Attention(False, False, True))
        inside, _ = mj.transplant(state, part.init(params))
        assert_same(jax.tree.leaves(inside)[-1], jax.tree.leaves(state)[-1])
        back = {new: old for old, new in names.items()}
        assert_same(mj.transplant(carried, tx.init(params), back, strict=True)[0], state)


@pytest.mark.parametrize("kind", ["adam", "lbfgs", "muon", "sgd", "kahan", "MultiSteps"])
def test_a_model_becomes_a_part_of_another(kind):
    """And comes out of it again: what belongs to no param keeps its place."""
    tx = {
        "lbfgs": lambda: optax.lbfgs(linesearch=None),
        "muon": lambda: optax.contrib.muon(0.1),
        "MultiSteps": lambda: optax.MultiSteps(
            optax.sgd(0.1, 0.9), 2, should_skip_update_fn=optax.skip_not_finite
        ),
        **KINDS,
    }[kind]()
    for params in ({"w": numbers((4, 4))}, numbers((4, 4)), jnp.float32(2.0)):
        if kind == "muon" and jnp.ndim(jax.tree.leaves(params)[0]) == 0:
            continue
        _, state = begun(tx, params)
        nested, _ = mj.transplant(state, tx.init({"m": params}), {"": "['m']"}, strict=True)
        leaves = [jax.tree.leaves(each) for each in (nested, state)]
        assert_same(*leaves)
        back, _ = mj.transplant(nested, tx.init(params), {"['m']": ""}, strict=True)
        assert_same(back, state)


# What is refused. ----------------------------------------------------------------------------

STATE = mj.MomentumState(jnp.int32(2), {"a": jnp.ones(3), "b": jnp.ones((2, 2))})
FRESH = mj.momentum(0.1).init({"a": jnp.ones(3), "b": jnp.ones((2, 2))})
CASES: dict[str, Any] = {
    "inside to outside": (
        lambda: mj.transplant(STATE, mj.trace(0.9).init(STATE.velocity)),
        ValueError,
        r"is MomentumState, of momentum, and the new one is TraceState, .*trace_from_momentum",
    ),
    "outside to inside": (
        lambda: mj.transplant(optax.trace(0.9).init(STATE.velocity), STATE),
        ValueError,
        r"is TraceState, of trace, and the new one is MomentumState, .*momentum_from_trace",
    ),
    "another method": (
        lambda: mj.transplant(STATE, mj.qhm(0.1).init(STATE.velocity)),
        ValueError,
        "is MomentumState, of momentum, and the new one is QHMState, of qhm",
    ),
    "nothing in common": (
        lambda: mj.transplant(STATE, mj.momentum(0.1).init({"c": jnp.ones(3)})),
        ValueError,
        r"nothing of the old state can be carried.*\['c'\].*fresh.*\['a'\].*dropped",
    ),
    "strict": (
        lambda: mj.transplant(STATE, mj.momentum(0.1).init({"a": jnp.ones(3)}), strict=True),
        ValueError,
        r"strict=True, but not everything was carried:.*\['b'\] +MomentumState\.velocity +dropped",
    ),
    "a name that is not there": (
        lambda: mj.transplant(STATE, FRESH, {"['c']": "['d']"}),
        ValueError,
        r"rename has \"\['c'\]\", but no path .* starts with it\..* paths: \['a'\], \['b'\]\.",
    ),
    "one name for two": (
        lambda: mj.transplant(STATE, FRESH, {"['a']": "['b']"}),
        ValueError,
        r"rename gives two arrays the path \['b'\]: \['a'\] and \['b'\] of MomentumState\.velocity",
    ),
    "rename of another type": (
        lambda: mj.transplant(STATE, FRESH, "['a']"),
        TypeError,
        "rename=.* must be a dict of prefixes",
    ),
    "rename to no text": (
        lambda: mj.transplant(STATE, FRESH, lambda path: None),
        TypeError,
        "rename must return paths as text, but returned None",
    ),
    "resize of another type": (
        lambda: mj.transplant(STATE, FRESH, resize="yes"),
        TypeError,
        "resize='yes' must be True or False",
    ),
    "a resize of another shape": (
        lambda: mj.transplant(
            STATE,
            mj.momentum(0.1).init({"a": jnp.ones(5)}),
            resize=lambda path, old, shape: old[path],
        ),
        ValueError,
        r"resize returned an array of shape \(3,\) for \['a'\], but must .* shape \(5,\), or None",
    ),
    "real for complex": (
        lambda: mj.transplant(STATE, mj.momentum(0.1).init({"a": jnp.ones(3, "complex64")})),
        TypeError,
        r"\['a'\] is float32 in the old state, but complex64 .* do not mix",
    ),
    "complex for real": (
        lambda: mj.transplant(mj.momentum(0.1).init({"a": jnp.ones(3, "complex64")}), STATE),
        TypeError,
        r"\['a'\] is complex64 in the old state, but float32 .* do not mix",
    ),
    "values that do not fit": (
        lambda: mj.transplant(
            STATE._replace(velocity={"a": jnp.full(3, 1e6), "b": STATE.velocity["b"]}),
            mj.momentum(0.1, velocity_dtype="float16").init(STATE.velocity),
        ),
        ValueError,
        r"velocity at \['a'\] has 3 of 3 values that are too large for float16",
    ),
    "a transformation": (
        lambda: mj.transplant(mj.momentum(0.1), FRESH),
        TypeError,
        r"old_state at \.init is Function, not an array",
    ),
    "nothing": (lambda: mj.transplant(None, FRESH), TypeError, "old_state=None is not a state"),
    "shapes alone": (
        lambda: mj.transplant(STATE, jax.eval_shape(mj.momentum(0.1).init, {"a": jnp.ones(3)})),
        TypeError,
        r"new_state at \.count is ShapeDtypeStruct, not an array",
    ),
    "a resize to no array": (
        lambda: mj.transplant(
            STATE, mj.momentum(0.1).init({"a": jnp.ones(5)}), resize=lambda *_: "ab"
        ),
        TypeError,
        r"resize returned str for \['a'\], but must return an array or None",
    ),
    "counts that differ": (
        lambda: mj.transplant(
            (STATE, optax.ScaleByScheduleState(jnp.int32(5))),
            (STATE, optax.scale_by_schedule(scheduled).init({}), FRESH_INJECTED),
        ),
        ValueError,
        r"have counted \[2, 5\], but \S+ needs one count",
    ),
}
FRESH_INJECTED = optax.inject_hyperparams(optax.scale)(step_size=scheduled).init({})


@pytest.mark.parametrize("case", CASES)
def test_bad_input_is_refused(as_shipped, case):
    call, error, message = CASES[case]
    with pytest.raises(error, match=f"(?s){message}"):
        call()


def test_a_state_in_another_dtype_is_refused_with_the_way_to_carry_it():
    """The remedy is what it says."""
    params, state = begun(mj.momentum(0.1), params_of("enc"))
    tx = mj.momentum(0.1, velocity_dtype="int8")
    with pytest.raises(TypeError, match=r"momentum_jax\.transplant\(state, tx\.init\(params\)\)"):
        tx.update(params, state)
    tx.update(params, mj.transplant(state, tx.init(params))[0])


# Where arrays are. ---------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["momentum", "int8", "aggmo", "adam", "adaptive_restart"])
@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("jitted", [False, True], ids=["eager", "jit"])
def test_each_array_is_sharded_as_the_new_state_has_it(kind, axis_type, jitted):
    """From rows to columns, from no mesh to one, with another shape; the values are the same."""
    mesh = jax.make_mesh((4, 2), ("d", "m"), axis_types=(axis_type,) * 2)

    def put(params, spec):
        return jax.tree.map(
            lambda w: jax.device_put(w, NamedSharding(mesh, spec if w.ndim == 2 else P())), params
        )

    tx = KINDS[kind]()
    params, state = begun(tx, params_of("enc"))
    wider = {"enc": {"w": numbers((96, 128)), "b": params["enc"]["b"]}}
    for to, resize in ((params, False), (wider, True)):
        carry = functools.partial(mj.transplant, resize=resize)
        expected, _ = carry(state, tx.init(to))
        for old_spec, new_spec in ((None, P("d")), (P("d"), P(None, "m")), (P("d", "m"), P())):
            old = state
            if old_spec is not None:
                old = jax.tree.map(
                    lambda x, like: jax.device_put(x, like.sharding) if like.committed else x,
                    state,
                    tx.init(put(params, old_spec)),
                )
            if jitted and old_spec is None and axis_type == AxisType.Explicit:
                continue  # What is on no mesh cannot be in a program with what is.
            target = tx.init(put(to, new_spec))
            if jitted:
                carried = jax.jit(lambda old, new, carry=carry: carry(old, new)[0])(old, target)
            else:
                carried, _ = carry(old, target)
            assert_same(carried, expected)
            for x, y in zip(jax.tree.leaves(carried), jax.tree.leaves(target), strict=True):
                if y.committed and x.ndim:
                    assert x.sharding.is_equivalent_to(y.sharding, x.ndim), (x.sharding, y.sharding)


def test_params_on_several_devices():
    """One program for each group of them."""
    first, second = jax.devices()[:2]
    params = {"a": jax.device_put(numbers(WIDE), first), "b": jax.device_put(numbers(5), second)}
    tx = mj.momentum(0.1, velocity_dtype="int8")
    _, state = tx.update(params, tx.init(params))
    exchanged = {"b": jax.device_put(params["b"], first), "a": jax.device_put(params["a"], second)}
    for target in (tx.init(params), tx.init(exchanged)):
        carried, _ = mj.transplant(state, target, strict=True)
        assert_same(carried, state)
        for x, y in zip(jax.tree.leaves(carried), jax.tree.leaves(target), strict=True):
            assert x.devices() == y.devices()


def test_the_trace_of_optax_on_several_devices():
    """Whether it has moved is asked of all of them."""
    params = {str(i): jax.device_put(numbers(3), jax.devices()[i]) for i in range(2)}
    tx = optax.trace(0.9)
    _, state = tx.update(params, tx.init(params))
    carried, _ = mj.transplant(state, mj.trace(0.9).init(params), strict=True)
    assert int(carried.count) == 1


def test_a_state_that_is_bound_to_no_device_stays_so():
    """Also if the old one is bound to one: it follows params that are on a mesh."""
    params, tx = params_of("enc"), mj.momentum(0.1)
    _, state = begun(tx, jax.device_put(params, jax.devices()[0]))
    carried, _ = mj.transplant(state, tx.init(params), strict=True)
    assert not any(x.committed for x in jax.tree.leaves(carried))
    mesh = jax.make_mesh((8,), ("d",), axis_types=(AxisType.Auto,))
    on_mesh = jax.device_put(params, NamedSharding(mesh, P()))
    jax.jit(tx.update)(on_mesh, carried, on_mesh)
    with jax.default_device(jax.devices()[5]):
        target = tx.init(params_of("enc"))
    carried, _ = mj.transplant(state, target, strict=True)
    assert {d for x in jax.tree.leaves(carried) for d in x.devices()} == {jax.devices()[5]}


def test_restored_states_of_numpy_and_python():
    params, tx = {"a": numbers(3), "b": jnp.float32(2.0)}, mj.momentum(0.1)
    _, state = begun(tx, params)
    restored = jax.tree.map(lambda x: np.asarray(x) if x.ndim else x.item(), state)
    assert_same(mj.transplant(restored, tx.init(params), strict=True)[0], state)


def test_a_model_of_many_arrays_is_one_program():
    tx = mj.momentum(0.1)
    params = {str(i): numbers((i + 1, 7)) for i in range(50)}
    _, state = begun(tx, params, 1)
    new = tx.init(params)
    with count_compiles() as compiles:
        mj.transplant(state, new)
    assert compiles.count <= 1


def test_donated_the_old_state_makes_room_for_the_result():
    tx, params = mj.momentum(0.1, velocity_dtype="int8"), params_of("enc", "head")
    state, target = tx.init(params), tx.init({**params, "new": numbers(3)})
    carry = jax.jit(lambda old, new: mj.transplant(old, new)[0], donate_argnums=0)
    memory: Any = carry.lower(state, target).compile().memory_analysis()
    assert memory.alias_size_in_bytes >= sum(x.nbytes for x in jax.tree.leaves(state))
    assert memory.temp_size_in_bytes <= 1024


def test_a_state_of_zero1_stays_split():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    tx = mj.sharding.zero1(mj.momentum(0.1, velocity_dtype="int8"), mesh)
    params = jax.device_put(params_of("enc"), NamedSharding(mesh, P()))
    params, state = begun(tx, params)
    larger = {**params, "new": params["enc"]}
    carried, _ = mj.transplant(state, tx.init(larger))
    assert len(carried.velocity["enc"]["w"].sharding.device_set) == 8
    assert carried.velocity["enc"]["w"].addressable_shards[0].data.size == 64 * 128 // 8
    one_step(tx, larger, carried, grads_like(larger, 3))


JOB = """
import sys
import jax
import jax.numpy as jnp
import numpy as np

jax.distributed.initialize(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
import momentum_jax as mj
from jax.experimental import multihost_utils
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

mesh = jax.make_mesh((4,), ("d",), axis_types=(AxisType[sys.argv[4]],))
gather = multihost_utils.process_allgather
def refused(*args, **kwargs): raise AssertionError("gathered")
multihost_utils.process_allgather = refused


def sharded(x, spec):
    x = np.asarray(x, np.float32)
    return jax.make_array_from_callback(x.shape, NamedSharding(mesh, spec), x.__getitem__)


w = np.random.default_rng(0).normal(size=(64, 128))
for dtype, other in ((None, "int8"), ("int8", None), (None, None), ("int8", "int8")):
    old = mj.momentum(0.5, velocity_dtype=dtype)
    params = {"enc": sharded(w, P("d"))}
    _, state = old.update(params, old.init(params))
    new = mj.momentum(0.5, velocity_dtype=other)
    for shape, spec in (((64, 128), P(None, "d")), ((96, 128), P("d"))):
        target = new.init({"encoder": sharded(np.zeros(shape), spec), "new": sharded(w, P())})
        carried, report = mj.transplant(
            state, target, {"['enc']": "['encoder']"}, resize=shape != (64, 128)
        )
        for x, y in zip(jax.tree.leaves(carried), jax.tree.leaves(target), strict=True):
            assert x.dtype == y.dtype
            if y.committed:
                assert x.sharding.is_equivalent_to(y.sharding, x.ndim), (x.sharding, y.sharding)
        assert report.fresh == ("['new']",), report
        read = gather(mj.read_velocity(carried)["encoder"], tiled=True)
        before = gather(mj.read_velocity(state)["enc"], tiled=True)
        close = 0.05 if "int8" in (dtype, other) else 0
        assert np.max(np.abs(read[:64] - before)) <= close
        assert not np.any(read[64:])
        assert int(carried.count) == 1
print("done")
"""


@pytest.mark.parametrize("axis_type", ["Auto", "Explicit"])
def test_two_processes_carry_over_without_gathering(axis_type, tmp_path):
    (tmp_path / "job.py").write_text(JOB)
    for printed in run_job(tmp_path / "job.py", axis_type, timeout=240):
        assert printed.splitlines()[-1] == "done"


# Random trees and edits. ---------------------------------------------------------------------

NAMES = st.sampled_from(["a", "b", "c", "velocity", "count"])
SHAPES = st.sampled_from([(), (2,), (3, 2)])
TREES = st.dictionaries(NAMES, SHAPES | st.dictionaries(NAMES, SHAPES, min_size=1), min_size=1)


def zeros_of(tree):
    return jax.tree.map(jnp.zeros, tree, is_leaf=lambda x: isinstance(x, tuple))


@settings(max_examples=60, deadline=None)
@given(TREES, TREES, st.booleans(), st.sampled_from(["momentum", "aggmo", "sgd"]))
def test_any_tree_to_any_other(old, new, resize, kind):
    """Each array is the old one of its path and shape, or overlaps with it, or is 0."""
    tx = {"momentum": mj.momentum(1.0), "aggmo": mj.aggmo(1.0), "sgd": optax.sgd(1.0, 0.9)}[kind]
    read = mj.read_velocity if kind != "sgd" else lambda state: state[0].trace
    params = zeros_of(old)
    grads = jax.tree.map(lambda w: 1.0 + jnp.arange(w.size, dtype=w.dtype).reshape(w.shape), params)
    _, state = tx.update(grads, tx.init(params), params)
    before = {
        jax.tree_util.keystr(path): np.asarray(x)
        for path, x in jax.tree_util.tree_leaves_with_path(read(state))
    }
    target = tx.init(zeros_of(new))
    shapes = {
        jax.tree_util.keystr(path): x.shape
        for path, x in jax.tree_util.tree_leaves_with_path(read(target))
    }
    if not any(
        path in shapes and (x.shape == shapes[path] or (resize and x.ndim == len(shapes[path])))
        for path, x in before.items()
    ):
        with pytest.raises(ValueError, match="nothing of the old state"):
            mj.transplant(state, target, resize=resize)
        return
    carried, report = mj.transplant(state, target, resize=resize)
    used = set()
    for path, x in jax.tree_util.tree_leaves_with_path(read(carried)):
        name = jax.tree_util.keystr(path)
        expected = np.zeros(x.shape)
        found = before.get(name)
        if found is not None and (found.shape == x.shape or (resize and found.ndim == x.ndim)):
            same = tuple(slice(min(pair)) for pair in zip(found.shape, x.shape, strict=True))
            expected[same] = found[same]
            used.add(name)
        np.testing.assert_array_equal(x, expected)
    rows = dict.fromkeys(("kept", "resized", "fresh", "dropped"), 0)
    for row in report.rows:
        if row.outcome != "noted":
            rows[row.outcome] += 1
    assert rows["kept"] + rows["resized"] == len(used)
    assert rows["dropped"] == len(before) - len(used)
    assert rows["fresh"] == len(jax.tree.leaves(read(carried))) - len(used)


# The report. ---------------------------------------------------------------------------------


def test_the_report_is_a_table():
    state, report = mj.transplant(
        STATE,
        mj.momentum(0.1, velocity_dtype="bfloat16").init(
            {"aa": jnp.ones(3), "b": jnp.ones((2, 3)), "c": jnp.ones(1)}
        ),
        {"['a']": "['aa']"},
        resize=True,
    )
    assert str(report).splitlines() == [
        "param   array                   outcome",
        "['aa']  MomentumState.velocity  kept     float32 -> bfloat16, was ['a']",
        "['b']   MomentumState.velocity  resized  (2, 2) -> (2, 3), float32 -> bfloat16",
        "['c']   MomentumState.velocity  fresh",
    ]
    assert (report.kept, report.resized, report.fresh, report.dropped) == (
        ("['aa']",),
        ("['b']",),
        ("['c']",),
        (),
    )
    assert state.velocity["b"].dtype == jnp.bfloat16
