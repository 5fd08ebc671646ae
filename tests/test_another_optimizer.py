"""States that are carried over to another optimizer: other dtypes, wrappers, Optax, Flax."""

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jobs import (
    STEPS,
    assert_same,
    begun,
    grads_like,
    one_step,
    params_of,
    scheduled,
    train,
    types,
)

import momentum_jax

mj: Any = momentum_jax  # Optax types a state as any tree of arrays.

DTYPES = [None, "float32", "bfloat16", "float16", "int8"]


@functools.cache
def stored_in(make, dtype):
    """Made once for a dtype, so that its step is compiled once."""
    return make(0.1, velocity_dtype=dtype)


@pytest.mark.slow
@pytest.mark.parametrize("pair", list(itertools.permutations(DTYPES, 2)), ids=str)
@pytest.mark.parametrize("make", [mj.momentum, mj.qhm, mj.aggmo], ids=["momentum", "qhm", "aggmo"])
def test_the_velocity_dtype_changes(make, pair):
    """Values are rounded to the new dtype. To float32 and back, they are equal."""
    one, other = (stored_in(make, dtype) for dtype in pair)
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
        # Below the normal numbers, float16 values are multiples of 2^-24.
        assert np.all(np.abs(a - b) <= bound * limit + (2**-24 if pair[1] == "float16" else 0))
    if bound == 0:
        back, _ = mj.transplant(carried, one.init(params))
        if pair[0] != "int8":
            assert_same(back, state)
    one_step(other, params, carried, grads_like(params, 3))


def test_wrappers_are_added_and_removed():
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


def test_optax_trace_to_ours_and_back():
    """If Optax's state has no count, the new count is 1 where a velocity is not 0."""
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


def test_a_new_count_is_taken_from_the_other_counts():
    params, state = begun(mj.momentum(0.1), params_of("enc"))
    tx = optax.chain(mj.momentum(0.1), optax.scale_by_schedule(lambda count: 1.0))
    carried, report = mj.transplant(state, tx.init(params), strict=True)
    assert [int(each.count) for each in carried] == [3, 3]
    assert "ScaleByScheduleState.count" in str(report)


def test_accumulated_gradients_are_carried_over_within_a_step():
    tx = optax.MultiSteps(mj.momentum(0.1), 4)
    params, state = begun(tx, params_of("enc"), steps=6)
    assert int(state.mini_step) == 2
    renamed = {"encoder": params["enc"]}
    carried, _ = mj.transplant(state, tx.init(renamed), {"['enc']": "['encoder']"}, strict=True)
    expected, _ = train(tx, params, state, STEPS, 6)
    assert_same(train(tx, renamed, carried, STEPS, 6)[0]["encoder"], expected["enc"])


def test_injected_hyperparams_are_carried_over():
    """A value that was set by hand stays, and the report says so."""
    make = optax.inject_hyperparams(mj.momentum, static_args=("nesterov", "velocity_dtype"))
    tx = make(learning_rate=0.1, mu=lambda count: jnp.minimum(0.1 * count, 0.9))
    params, state = begun(tx, params_of("enc"))
    state.hyperparams["learning_rate"] = jnp.float32(0.001)
    carried, report = mj.transplant(state, tx.init(params), strict=True)
    assert_same(carried, state)
    (row,) = (row for row in report.rows if row.outcome == "noted" and "learning_rate" in row.array)
    assert (row.path, row.note) == (None, "0.001 (new state: 0.1)")


@pytest.mark.slow
def test_flax_nnx():
    """The new model has a head of another size."""
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


def test_the_compensation_and_the_previous_params_are_carried_over():
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


def test_a_nan_does_not_hide_a_value_that_is_too_large(x64):
    params = jnp.ones(3, jnp.float64)
    tx = mj.momentum(0.1)
    state = tx.init(params)._replace(velocity=jnp.array([1e300, 1.0, jnp.nan]))
    with pytest.raises(ValueError, match="has 1 of 3 values that are too large for float32"):
        mj.transplant(state, mj.momentum(0.1, velocity_dtype="float32").init(params))
