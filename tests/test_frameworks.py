"""Each framework's arithmetic, beside the real one and beside what was recorded of it."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference
from golden import record
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import momentum_jax as mj
from momentum_jax.frameworks import caffe_sgd, keras_sgd, optax_sgd, torch_sgd


def schedule(count):
    """The learning rate of `record.learning_rate`, traceable."""
    rates = jnp.asarray(record.LEARNING_RATES)
    return rates[count // 5 % len(record.LEARNING_RATES)]


def trajectory(tx, steps=record.STEPS):
    """The params after each step, from where the frameworks start, in float64."""
    w = jnp.asarray(record.START)
    state = tx.init(w)
    step = jax.jit(tx.update)
    params = []
    for count in range(steps):
        updates, state = step(jnp.asarray(record.gradient(np.asarray(w), count)), state, w)
        w = mj.apply_updates(w, updates)
        params.append(w)
    assert w.dtype == np.float64
    return np.array(params)


def ours(framework, case):
    """What ours does with a framework's options."""
    return trajectory({"torch": torch_sgd, "keras": keras_sgd}[framework](schedule, **case))


RECORDED = [(name, entry) for name in record.FRAMEWORKS for entry in record.load(name)]


def named(value):
    """A case as the id of its test."""
    if isinstance(value, dict):
        case = value.get("case", value)
        return " ".join(f"{key}={option}" for key, option in case.items() if option) or "plain"
    return str(value)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(("framework", "entry"), RECORDED, ids=named)
def test_recorded_trajectory(framework, entry):
    """48 steps under a learning rate that goes up and down, in float64."""
    expected = np.array(entry["trajectory"])
    np.testing.assert_allclose(ours(framework, entry["case"]), expected, rtol=1e-10, atol=1e-12)


def test_the_recorded_cases_are_the_whole_grid():
    """So that no combination is left out by a stale file."""
    for name, (cases, _) in record.FRAMEWORKS.items():
        assert [entry["case"] for entry in record.load(name)] == cases
    assert (len(record.TORCH_CASES), len(record.KERAS_CASES)) == (20, 8)


LIVE = [(name, case) for name, (cases, _) in record.FRAMEWORKS.items() for case in cases]


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(("oracle", "case"), LIVE, ids=named, indirect=["oracle"])
def test_the_real_framework(oracle, case):
    """The same, beside the framework itself."""
    expected = np.array(record.FRAMEWORKS[oracle][1](case))
    np.testing.assert_allclose(ours(oracle, case), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("momentum", [None, 0.0, 0.9, -0.5])
@pytest.mark.parametrize("learning_rate", [schedule, 0.05], ids=["schedule", "constant"])
def test_optax(learning_rate, momentum, nesterov):
    """To the bit, under jit."""
    theirs, ours = (make(learning_rate, momentum, nesterov) for make in (optax.sgd, optax_sgd))
    np.testing.assert_array_equal(trajectory(ours), trajectory(theirs))


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("weight_decay", [0.0, 0.05])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_caffe(momentum, weight_decay):
    """Caffe is not on the registry: its documented solver, as a loop in NumPy."""
    expected = reference.caffe(
        record.START, record.gradient, record.learning_rate, momentum, weight_decay, record.STEPS
    )
    tx = caffe_sgd(schedule, momentum, weight_decay)
    np.testing.assert_allclose(trajectory(tx), np.array(expected), rtol=1e-12, atol=1e-14)


# The differences that bite, each by hand. ------------------------------------------------


def updates(tx, grads, w=1.0):
    """The updates, the params standing still."""
    w = jnp.float32(w)
    state = tx.init(w)
    result = []
    for grad in grads:
        update, state = tx.update(jnp.float32(grad), state, w)
        result.append(float(update))
    return result


def drop(count):
    """From 0.5 to 0.25 after one step: a schedule from 0."""
    return jnp.where(count < 1, 0.5, 0.25)


def test_learning_rate_inside_or_outside():
    """After it halves, what is inside keeps its speed and what is outside does not."""
    for inside in (keras_sgd(drop, 0.5), caffe_sgd(drop, 0.5)):
        assert updates(inside, [1, 0]) == [-0.5, -0.25]
    for outside in (torch_sgd(drop, 0.5), optax_sgd(drop, 0.5)):
        assert updates(outside, [1, 0]) == [-0.5, -0.125]


def test_the_first_step_is_exempt_from_dampening():
    """In PyTorch; `trace` dampens all alike."""
    assert updates(torch_sgd(1.0, 0.5, dampening=0.75), [1, 1]) == [-1.0, -0.75]
    plain = optax.chain(mj.trace(0.5, dampening=0.75), optax.scale_by_learning_rate(1.0))
    assert updates(plain, [1, 1]) == [-0.25, -0.375]


def test_decay_coupled_or_decoupled():
    """Coupled decay stays in the velocity when the param is no longer there; decoupled does not."""

    def then_at_zero(tx):
        w = jnp.float32(1)
        state = tx.init(w)
        first, state = tx.update(jnp.float32(0), state, w)
        second, _ = tx.update(jnp.float32(0), state, jnp.float32(0))
        return [float(first), float(second)]

    assert then_at_zero(torch_sgd(0.5, 0.5, weight_decay=0.5)) == [-0.25, -0.125]
    assert then_at_zero(caffe_sgd(0.5, 0.5, weight_decay=0.5)) == [-0.25, -0.125]
    assert then_at_zero(keras_sgd(0.5, 0.5, weight_decay=0.5)) == [-0.25, 0.0]


def test_maximize_flips_the_gradient_before_the_decay():
    """The params still shrink."""
    assert updates(torch_sgd(1.0, weight_decay=0.25, maximize=True), [1.0]) == [0.75]


def test_schedules_count_from_0():
    """The first step has the first value, everywhere."""
    for tx in (torch_sgd(drop), keras_sgd(drop), caffe_sgd(drop), optax_sgd(drop)):
        assert updates(tx, [1, 1]) == [-0.5, -0.25]
    assert updates(keras_sgd(drop, weight_decay=1.0), [0, 0]) == [-0.5, -0.25]


def test_nesterov_without_momentum():
    """Refused by PyTorch, without effect in Keras and Optax."""
    for momentum, dampening in ((0.0, 0.0), (0.9, 0.1)):
        with pytest.raises(ValueError, match="nesterov=True needs a momentum above 0 and no damp"):
            torch_sgd(0.5, momentum, dampening, nesterov=True)
    assert updates(keras_sgd(0.5, nesterov=True), [1]) == [-0.5]
    assert updates(optax_sgd(0.5, nesterov=True), [1]) == [-0.5]


def test_defaults_are_theirs():
    """The first step of each with no options."""
    assert updates(torch_sgd(), [1]) == [pytest.approx(-1e-3)]
    assert updates(keras_sgd(), [1]) == [pytest.approx(-0.01)]
    assert len(jax.tree.leaves(torch_sgd().init(jnp.ones(2)))) == 0
    assert len(jax.tree.leaves(optax_sgd(0.1).init(jnp.ones(2)))) == 0


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: torch_sgd(lr=-1.0), "lr=-1.0 must be finite and not negative"),
        (lambda: torch_sgd(momentum=-0.1), r"momentum=-0.1 must be in \[0, 1\]"),
        (lambda: torch_sgd(weight_decay=-0.1), "weight_decay=-0.1 must be finite and not neg"),
        (lambda: keras_sgd(momentum=1.1), r"momentum=1.1 must be in \[0, 1\]"),
        (lambda: caffe_sgd(base_lr=float("nan")), "base_lr=nan must be finite"),
        (lambda: optax_sgd(0.1, momentum=-1.0), r"momentum=-1.0 must be in \(-1, 1\]"),
    ],
)
def test_refusals_name_the_framework_s_argument(make, name):
    """With the rule."""
    with pytest.raises(ValueError, match=name):
        make()


@pytest.mark.parametrize("make", [torch_sgd, keras_sgd, caffe_sgd, optax_sgd])
def test_updates_keep_the_gradients_dtype(make):
    """Also with decay, for bfloat16 params and gradients; a frozen leaf stays frozen."""
    decay = {} if make is optax_sgd else {"weight_decay": 0.5}
    params = {"w": jnp.ones(2, jnp.bfloat16), "frozen": jnp.ones(3)}
    grads = {"w": jnp.ones(2, jnp.bfloat16), "frozen": None}
    for rate in (0.5, lambda count: jnp.float32(0.5)):
        tx = make(rate, momentum=0.5, **decay)
        update, _ = jax.jit(tx.update)(grads, tx.init(params), params)
        assert update["w"].dtype == jnp.bfloat16
        assert update["frozen"] is None


def test_options_may_be_traced():
    """A sweep over momentum and dampening in one program."""

    def second_update(momentum, dampening):
        tx = torch_sgd(0.5, momentum, dampening)
        _, state = tx.update(jnp.float32(1), tx.init(jnp.float32(0)))
        return tx.update(jnp.float32(1), state)[0]

    got = jax.vmap(second_update)(jnp.array([0.0, 0.5]), jnp.array([0.0, 0.25]))
    np.testing.assert_array_equal(got, [-0.5, -0.5 * (0.5 + 0.75)])


@pytest.mark.parametrize("make", [torch_sgd, keras_sgd, caffe_sgd, optax_sgd])
@pytest.mark.parametrize("momentum", [0.0, 0.5])
def test_under_inject_hyperparams(make, momentum):
    """The state has one structure, whether a value is known or traced."""
    rate = {torch_sgd: "lr", caffe_sgd: "base_lr"}.get(make, "learning_rate")
    tx = optax.inject_hyperparams(make)(**{rate: 0.5, "momentum": momentum})
    w = jnp.ones(2)
    update, _ = jax.jit(tx.update)(w, tx.init(w), w)
    np.testing.assert_array_equal(update, [-0.5, -0.5])


# What holds of each framework with each of its options. ------------------------------------


@pytest.mark.parametrize("make", [torch_sgd, keras_sgd, caffe_sgd, optax_sgd])
@pytest.mark.parametrize("momentum", [0.0, 0.5])
def test_what_does_not_match_the_params_is_refused_also_without_a_velocity(make, momentum):
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


# The options of each besides the learning rate, with and without a velocity.
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
CASES = [(make, case) for make, cases in OPTIONS.items() for case in cases]
each_case = pytest.mark.parametrize(
    ("make", "case"), CASES, ids=[f"{make.__name__} {named(case)}" for make, case in CASES]
)


def second_update(tx, params, *grads, **overrides):
    """The update and the state of the second step, the params standing still."""
    state = tx.init(params)
    _, state = tx.update(grads[0], state, params)
    return tx.update(grads[1], state, params, **overrides)


def assert_same(left, right):
    """Bit for bit, and of one structure."""
    jax.tree.map(np.testing.assert_array_equal, left, right)


@pytest.mark.parametrize("kind", ["constant", "schedule"])
@each_case
def test_a_learning_rate_of_one_call_reaches_all_that_use_it(make, case, kind):
    """As a schedule of the same values does: the step, the velocity and the decay."""
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
def test_a_mu_of_one_call_reaches_the_velocity(make, case):
    """As one that is made with it would, or is refused where there is no velocity."""
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


def test_a_dampening_of_one_call_exempts_the_first_step():
    """As PyTorch does, and as the dampening does that `torch_sgd` is made with."""
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
def test_no_gradient_means_no_update_and_an_untouched_velocity(make, case):
    """No decay either; the others move as if they were alone. Integers have no other gradient."""
    tx = make(lambda count: 0.25, **case)
    params = {"here": jnp.array([1.0, -2.0])}
    for name in ABSENT:
        params |= {name: jnp.ones(3), f"{name}, integer": jnp.arange(3)}
    absent = {name: ABSENT[name.removesuffix(", integer")] for name in params if name != "here"}
    integers = {name: g for name, g in absent.items() if "integer" in name}
    grads = {**jax.tree.map(lambda w: w.astype("float32"), params), **integers}
    # First all params that can move do, so that there is a velocity.
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


def velocities(state):
    """Those of all momentum in a state."""
    kinds = (mj.MomentumState, mj.TraceState)
    nodes = jax.tree.leaves(state, is_leaf=lambda node: isinstance(node, kinds))
    return [node[1] for node in nodes if isinstance(node, kinds)]


@each_case
def test_wide_arithmetic_narrowed_once_to_the_gradients_dtype(make, case):
    """The updates are those of the same numbers in float32, rounded once."""
    rng = np.random.default_rng(0)
    kinds = ["float32", "bfloat16", "float16"]
    pairs = [(held, given) for held in kinds for given in kinds]
    w = [jnp.asarray(rng.normal(size=64), held) for held, _ in pairs]
    grads = [[jnp.asarray(rng.normal(size=64), given) for _, given in pairs] for _ in range(2)]
    tx = make(0.1, **case)
    # Strictly, no two dtypes meet but where one is converted.
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
def test_what_cannot_be_decayed_or_moved_is_named(make, case):
    """A gradient of integers, and a step with decay that is not given the params."""
    tx = make(0.25, **case)
    w = {"w": jnp.ones(2)}
    with pytest.raises(TypeError, match=r"the gradient at \['w'\] is int32"):
        tx.update({"w": jnp.arange(2)}, tx.init(w), w)
    if case.get("weight_decay"):
        with pytest.raises(ValueError, match="weight_decay needs the params: update"):
            tx.update(w, tx.init(w))


@pytest.mark.parametrize("momentum", [0.0, 0.5])
@pytest.mark.parametrize("make", [torch_sgd, keras_sgd, caffe_sgd])
def test_decay_where_gradients_are_sharded_unlike_the_params(make, momentum):
    """On Explicit axes, where two arrays of different shardings cannot be added."""
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
def test_decay_of_wide_params_reaches_the_velocity_unrounded(make):
    """Also where the gradients are narrower."""
    w = jnp.asarray(1 + 2.0**-40)
    tx = make(1.0, 0.5, weight_decay=1.0)
    _, state = tx.update(jnp.float32(0), tx.init(w), w)
    expected = {torch_sgd: w, caffe_sgd: -w, keras_sgd: 0.0}[make]
    assert_same(velocities(state), [expected])


def test_neither_pytorch_nor_keras_is_imported():
    """By importing the module, whether they are installed or not."""
    code = (
        "import sys, momentum_jax.frameworks;"
        "assert not {'torch', 'keras', 'tensorflow'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_recorded_files_say_what_recorded_them():
    """A version each, and no path or address."""
    for name in record.FRAMEWORKS:
        text = (Path(record.__file__).parent / f"{name}.json").read_text()
        assert json.loads(text)["version"].count(".") >= 1
        assert "/" not in text
