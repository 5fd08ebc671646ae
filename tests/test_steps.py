"""All recipes with all their options: decay, overrides of one call, dtypes, missing gradients."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import momentum_jax as mj
from momentum_jax.frameworks import caffe_sgd, keras_sgd, optax_sgd, torch_sgd


@pytest.mark.parametrize("make", [torch_sgd, keras_sgd, caffe_sgd, optax_sgd])
@pytest.mark.parametrize("momentum", [0.0, 0.5])
def test_gradients_that_do_not_match_the_params_are_refused(make, momentum):
    tx = make(0.5, momentum)
    params = {"w": jnp.ones((2, 3)), "ids": jnp.arange(2)}
    state = tx.init(params)
    bad: dict[str, Any] = {
        r"\['w'\] has shape \(3,\)": {"w": jnp.ones(3), "ids": None},
        "must be trees of one structure": {"w": jnp.ones((2, 3))},
        r"the param at \['ids'\] is int32": {"w": jnp.ones((2, 3)), "ids": jnp.ones(2)},
        "a real and a complex": {"w": jnp.ones((2, 3), "complex64"), "ids": None},
    }
    for message, grads in bad.items():
        with pytest.raises((TypeError, ValueError), match=message):
            tx.update(grads, state, params)
    tx.update({"w": jnp.ones((2, 3)), "ids": None}, state, params)


# The options of each recipe beside the learning rate, with and without a velocity.
OPTIONS = {
    torch_sgd: [
        {},
        {"weight_decay": 0.5},
        {"maximize": True, "weight_decay": 0.5},
        {"momentum": 0.75},
        {"momentum": 0.75, "weight_decay": 0.5},
        {"momentum": 0.75, "nesterov": True, "weight_decay": 0.5},
        {"momentum": 0.75, "dampening": 0.25, "maximize": True, "weight_decay": 0.5},
    ],
    keras_sgd: [
        {},
        {"weight_decay": 0.5},
        {"momentum": 0.75},
        {"momentum": 0.75, "weight_decay": 0.0},
        {"momentum": 0.75, "weight_decay": 0.5},
        {"momentum": 0.75, "nesterov": True, "weight_decay": 0.5},
    ],
    caffe_sgd: [
        {},
        {"weight_decay": 0.5},
        {"momentum": 0.75},
        {"momentum": 0.75, "weight_decay": 0.5},
    ],
    optax_sgd: [{}, {"momentum": 0.75}, {"momentum": 0.75, "nesterov": True}],
}


CASES = {
    f"{make.__name__} {' '.join(f'{key}={value}' for key, value in case.items())}": (make, case)
    for make, cases in OPTIONS.items()
    for case in cases
}
each_case = pytest.mark.parametrize(("make", "case"), CASES.values(), ids=CASES)


def second_update(tx, params, *grads, **overrides):
    """The update and the state of the second step, at constant params."""
    state = tx.init(params)
    _, state = tx.update(grads[0], state, params)
    return tx.update(grads[1], state, params, **overrides)


def assert_same(left, right):
    """Equal to the bit, and of the same structure."""
    jax.tree.map(np.testing.assert_array_equal, left, right)


def velocities(state):
    """All velocities in a state."""
    kinds = (mj.MomentumState, mj.TraceState)
    nodes = jax.tree.leaves(state, is_leaf=lambda node: isinstance(node, kinds))
    return [node[1] for node in nodes if isinstance(node, kinds)]


@pytest.mark.parametrize("kind", ["constant", "schedule"])
@each_case
def test_learning_rate_override_in_one_call(make, case, kind):
    """The override changes the step, the velocity and the decay, as a schedule would."""
    w, g = jnp.array([1.0, -2.0]), jnp.array([0.5, 0.25])
    tx = make(0.25 if kind == "constant" else lambda count: 0.25, **case)
    update, state = second_update(tx, w, g, -g, learning_rate=0.5)
    scheduled = make(lambda count: jnp.where(count == 0, 0.25, 0.5), **case)
    expected, after = second_update(scheduled, w, g, -g)
    assert_same(update, expected)
    if kind == "schedule":
        assert_same(state, after)
    with pytest.raises(ValueError, match=r"learning_rate=-1\.0 must be finite and not negative"):
        second_update(tx, w, g, g, learning_rate=-1.0)


@each_case
def test_mu_override_in_one_call(make, case):
    """As in a recipe created with this mu; without a velocity it is refused."""
    w, g = jnp.array([1.0, -2.0]), jnp.array([0.5, 0.25])
    tx = make(0.25, **case)
    if "momentum" not in case and make is not caffe_sgd:
        with pytest.raises(ValueError, match=r"mu=0\.5 has no effect, because without momentum"):
            second_update(tx, w, g, -g, mu=0.5)
        assert_same(second_update(tx, w, g, -g, mu=0), second_update(tx, w, g, -g))
        return
    _, state = tx.update(g, tx.init(w), w)
    expected = make(0.25, **{**case, "momentum": 0.5}).update(-g, state, w)
    assert_same(tx.update(-g, state, w, mu=0.5), expected)
    jitted = jax.jit(tx.update)(-g, state, w, mu=0.5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), jitted, expected)


def test_dampening_override_exempts_the_first_step():
    """As in PyTorch, and like the dampening that `torch_sgd` is created with."""
    tx: Any = torch_sgd(1.0, 0.5)
    w = jnp.zeros(())
    first, state = tx.update(jnp.float32(1), tx.init(w), w, dampening=0.75)
    second, _ = tx.update(jnp.float32(1), state, w, dampening=0.75)
    assert [float(first), float(second)] == [-1.0, -0.75]
    with pytest.raises(ValueError, match="dampening=nan must be finite"):
        tx.update(w, state, w, dampening=np.nan)


ABSENT = {
    "None": None,
    "MaskedNode": optax.MaskedNode(),
    "float0": np.zeros(3, jax.dtypes.float0),
}


@each_case
def test_no_gradient_means_no_update_and_an_unchanged_velocity(make, case):
    """Also no decay. The other params are updated as usual. Integer params have no gradient."""
    tx = make(lambda count: 0.25, **case)
    params = {"here": jnp.array([1.0, -2.0])}
    for name in ABSENT:
        params |= {name: jnp.ones(3), f"{name}, integer": jnp.arange(3)}
    absent = {name: ABSENT[name.removesuffix(", integer")] for name in params if name != "here"}
    integers = {name: g for name, g in absent.items() if "integer" in name}
    grads = {**jax.tree.map(lambda w: w.astype("float32"), params), **integers}
    # In the first step all floating-point params get a gradient, so that there is a velocity.
    _, state = tx.update(grads, tx.init(params), params)
    grads |= {name: jnp.full(3, 2.0) for name in ABSENT}
    straight, moved = tx.update(grads, state, params)
    given = {"here": grads["here"], **absent}
    for step in (tx.update, jax.jit(tx.update)):
        update, after = step(given, state, params)
        np.testing.assert_allclose(update["here"], straight["here"], rtol=1e-6)
        for name, kind in absent.items():
            assert jax.tree.structure(update[name]) == jax.tree.structure(kind)
            assert getattr(update[name], "dtype", None) == getattr(kind, "dtype", None)
        moved_params = mj.apply_updates(params, update)
        assert_same({**moved_params, "here": 0}, {**params, "here": 0})
        for before, new, other in zip(*map(velocities, (state, after, moved)), strict=True):
            np.testing.assert_allclose(new["here"], other["here"], rtol=1e-6)
            assert_same({**new, "here": 0}, {**before, "here": 0})
            assert np.all(np.asarray(other["None"]) != np.asarray(before["None"]))


@each_case
def test_updates_are_computed_wide_and_rounded_once(make, case):
    """The updates equal those of the same numbers in float32, rounded once."""
    rng = np.random.default_rng(0)
    kinds = ["float32", "bfloat16", "float16"]
    pairs = [(of_param, given) for of_param in kinds for given in kinds]
    w = [jnp.asarray(rng.normal(size=64), of_param) for of_param, _ in pairs]
    grads = [[jnp.asarray(rng.normal(size=64), given) for _, given in pairs] for _ in range(2)]
    tx = make(0.1, **case)
    # Strict promotion allows no implicit conversion between two dtypes.
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        update, state = second_update(tx, w, *grads)
    wide = jax.tree.map(lambda x: x.astype("float32"), (w, *grads))
    expected, wide_state = second_update(tx, *wide)
    assert [str(u.dtype) for u in update] == [given for _, given in pairs]
    assert_same(update, [u.astype(given) for u, (_, given) in zip(expected, pairs, strict=True)])
    assert_same(velocities(state), velocities(wide_state))
    safe: Any = optax.apply_if_finite(tx, 2)
    finite = jax.eval_shape(safe.update, grads[0], safe.init(w), w)[0]
    assert [str(u.dtype) for u in finite] == [given for _, given in pairs]


@each_case
def test_integer_gradients_and_decay_without_params_are_refused(make, case):
    """Integer gradients, and decay without params, are refused."""
    tx = make(0.25, **case)
    w = {"w": jnp.ones(2)}
    with pytest.raises(TypeError, match=r"the gradient at \['w'\] is int32"):
        tx.update({"w": jnp.arange(2)}, tx.init(w), w)
    if case.get("weight_decay"):
        with pytest.raises(ValueError, match="weight_decay needs the params: update"):
            tx.update(w, tx.init(w))


@pytest.mark.parametrize("momentum", [0.0, 0.5])
@pytest.mark.parametrize("make", [torch_sgd, keras_sgd, caffe_sgd])
def test_decay_with_gradients_sharded_differently_from_params(make, momentum):
    """On Explicit axes, arrays with different shardings cannot be added directly."""
    mesh = jax.make_mesh((8,), ("d",), axis_types=(AxisType.Explicit,))
    w, g = jnp.ones((8, 8)), jnp.full((8, 8), 0.5)
    tx: Any = make(0.25, momentum, weight_decay=0.5)
    expected, _ = tx.update(g, tx.init(w), w)
    w, g = (jax.device_put(x, NamedSharding(mesh, P(*s))) for x, s in ((w, "d"), (g, (None, "d"))))
    for step in (tx.update, jax.jit(tx.update)):
        update, _ = step(g, tx.init(w), w)
        assert_same(update, expected)
        assert update.sharding.is_equivalent_to(w.sharding, 2)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("make", [torch_sgd, keras_sgd, caffe_sgd])
def test_decay_of_float64_params_is_not_rounded(make):
    """Also if the gradients have a narrower dtype."""
    w = jnp.asarray(1 + 2.0**-40)
    tx = make(1.0, 0.5, weight_decay=1.0)
    _, state = tx.update(jnp.float32(0), tx.init(w), w)
    expected = {torch_sgd: w, caffe_sgd: -w, keras_sgd: 0.0}[make]
    assert_same(velocities(state), [expected])
