"""States that are carried over to changed params.

The reference is another run whose params never changed: the next 20 steps are equal to the last
bit.
"""

import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jobs import (
    KINDS,
    STEPS,
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

import momentum_jax

mj: Any = momentum_jax  # Optax types a state as any tree of arrays.

each_kind = pytest.mark.parametrize("kind", KINDS)


@each_kind
def test_a_renamed_module_continues_to_the_last_bit(kind):
    """Its next 20 steps equal those of the model that kept its names."""
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


@pytest.mark.slow
@each_kind
def test_an_added_layer_does_not_change_the_others(kind):
    """The layer starts as in a new state. After it is removed, the state is as before."""
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


@pytest.mark.slow
@each_kind
def test_the_result_is_the_same_under_jit(kind):
    tx = KINDS[kind]()
    params, state = begun(tx, params_of("enc", "head"))
    larger = {**params, "head": params_of("new", seed=9)["new"]}
    larger["head"]["w"] = numbers((64, 256))
    carry = lambda old, new: mj.transplant(old, new, resize=True)[0]  # noqa: E731
    assert_same(jax.jit(carry)(state, tx.init(larger)), carry(state, tx.init(larger)))


@pytest.mark.slow
@each_kind
def test_no_buffer_is_shared_with_the_old_state(kind):
    """The old state can be kept while the new one is donated."""
    tx = KINDS[kind]()
    params, state = begun(tx, params_of("enc"))
    carried, _ = mj.transplant(state, tx.init(params))
    before = jax.tree.map(np.array, state)
    jax.jit(lambda state: jax.tree.map(lambda x: x * x, state), donate_argnums=0)(carried)
    assert_same(jax.tree.map(np.array, state), before)


def test_a_frozen_layer_is_unfrozen():
    """The result is that of a layer that was trained with gradients of 0 from the start."""
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
def test_params_move_to_other_groups(dtype):
    """The velocity goes with the param, whatever the label of its group and its position."""
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
    # Unit by unit, so that the others are summed in the same order if a unit is left out.
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


@pytest.mark.slow
def test_a_class_is_added_to_the_head():
    """Its weights and targets are 0, so it does not change the other classes."""
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


def test_an_array_that_resize_does_not_read_is_dropped():
    """Asking whether a path exists does not read the array."""
    old = mj.MomentumState(jnp.int32(1), {"a": jnp.ones(3), "gone": jnp.ones(2)})
    new = mj.momentum(0.1).init({"a": jnp.ones(4)})

    def resize(path, old, shape):
        assert "['gone']" in old
        assert set(old) == {"['a']", "['gone']"}
        return jnp.pad(old[path], (0, 1))

    _, report = mj.transplant(old, new, resize=resize)
    assert (report.resized, report.dropped) == (("['a']",), ("['gone']",))


@pytest.mark.slow
def test_a_unit_is_pruned_by_its_index():
    """Its weights are 0, so the other units continue unchanged."""
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


@pytest.mark.slow
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
    if name == "int8":  # Each way rounds once more.
        for a, b in zip(*map(jax.tree.leaves, map(mj.read_velocity, (back, state))), strict=True):
            assert np.max(np.abs(a - b)) <= 0.03 * np.max(np.abs(b))
    else:
        assert_same(back, state)


NAMES = st.sampled_from(["a", "b", "c", "velocity", "count"])


SHAPES = st.sampled_from([(), (2,), (3, 2)])


TREES = st.dictionaries(NAMES, SHAPES | st.dictionaries(NAMES, SHAPES, min_size=1), min_size=1)


def zeros_of(tree):
    return jax.tree.map(jnp.zeros, tree, is_leaf=lambda x: isinstance(x, tuple))


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(TREES, TREES, st.booleans(), st.sampled_from(["momentum", "aggmo", "sgd"]))
def test_any_tree_to_any_other(old, new, resize, kind):
    """Each array equals the old one of its path and shape, or overlaps with it, or is 0."""
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


def test_the_report_is_a_table():
    state, report = mj.transplant(
        mj.MomentumState(jnp.int32(2), {"a": jnp.ones(3), "b": jnp.ones((2, 2))}),
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


def test_the_error_for_a_state_in_another_dtype_names_transplant():
    """The remedy works."""
    params, state = begun(mj.momentum(0.1), params_of("enc"))
    tx = mj.momentum(0.1, velocity_dtype="int8")
    with pytest.raises(TypeError, match=r"momentum_jax\.transplant\(state, tx\.init\(params\)\)"):
        tx.update(params, state)
    tx.update(params, mj.transplant(state, tx.init(params))[0])
