"""The recipes, compared with the real frameworks and with recorded trajectories of them."""

import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference
from golden import record

import momentum_jax as mj
from momentum_jax.frameworks import caffe_sgd, keras_sgd, optax_sgd, torch_sgd


def schedule(count):
    """`record.learning_rate` as a traceable schedule."""
    rates = jnp.asarray(record.LEARNING_RATES)
    return rates[count // 5 % len(record.LEARNING_RATES)]


def trajectory(tx, steps=record.STEPS):
    """The params after each step, in float64, from the start of the recorded trajectories."""
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
    """The trajectory of our recipe with a framework's options."""
    return trajectory({"torch": torch_sgd, "keras": keras_sgd}[framework](schedule, **case))


RECORDED = [(name, entry) for name in record.FRAMEWORKS for entry in record.load(name)]


def named(value):
    """The id of a test case."""
    if isinstance(value, dict):
        case = value.get("case", value)
        return " ".join(f"{key}={option}" for key, option in case.items() if option) or "plain"
    return str(value)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(("framework", "entry"), RECORDED, ids=named)
def test_recorded_trajectory(framework, entry):
    """48 steps in float64, with a learning rate that rises and falls."""
    expected = np.array(entry["trajectory"])
    np.testing.assert_allclose(ours(framework, entry["case"]), expected, rtol=1e-10, atol=1e-12)


def test_all_combinations_of_options_are_recorded():
    """A stale file could lack combinations of options."""
    for name, (cases, _) in record.FRAMEWORKS.items():
        assert [entry["case"] for entry in record.load(name)] == cases
    assert (len(record.TORCH_CASES), len(record.KERAS_CASES)) == (20, 8)


LIVE = [(name, case) for name, (cases, _) in record.FRAMEWORKS.items() for case in cases]


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(("oracle", "case"), LIVE, ids=named, indirect=["oracle"])
def test_the_real_framework(oracle, case):
    """The same comparison with the installed framework."""
    expected = np.array(record.FRAMEWORKS[oracle][1](case))
    np.testing.assert_allclose(ours(oracle, case), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("momentum", [None, 0.0, 0.9, -0.5])
@pytest.mark.parametrize("learning_rate", [schedule, 0.05], ids=["schedule", "constant"])
def test_optax(learning_rate, momentum, nesterov):
    """Equal to the bit under jit."""
    theirs, ours = (make(learning_rate, momentum, nesterov) for make in (optax.sgd, optax_sgd))
    np.testing.assert_array_equal(trajectory(ours), trajectory(theirs))


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("weight_decay", [0.0, 0.05])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_caffe(momentum, weight_decay):
    """Caffe cannot be installed: compared with its documented solver as a loop in NumPy."""
    expected = reference.caffe(
        record.START, record.gradient, record.learning_rate, momentum, weight_decay, record.STEPS
    )
    tx = caffe_sgd(schedule, momentum, weight_decay)
    np.testing.assert_allclose(trajectory(tx), np.array(expected), rtol=1e-12, atol=1e-14)


def updates(tx, grads, w=1.0):
    """The updates at constant params."""
    w = jnp.float32(w)
    state = tx.init(w)
    result = []
    for grad in grads:
        update, state = tx.update(jnp.float32(grad), state, w)
        result.append(float(update))
    return result


def drop(count):
    """A schedule that drops from 0.5 to 0.25 after one step."""
    return jnp.where(count < 1, 0.5, 0.25)


def test_learning_rate_inside_or_outside():
    """When the learning rate halves, the step of the inside form decays only by the momentum."""
    for inside in (keras_sgd(drop, 0.5), caffe_sgd(drop, 0.5)):
        assert updates(inside, [1, 0]) == [-0.5, -0.25]
    for outside in (torch_sgd(drop, 0.5), optax_sgd(drop, 0.5)):
        assert updates(outside, [1, 0]) == [-0.5, -0.125]


def test_the_first_step_is_exempt_from_dampening():
    """In PyTorch. `trace` dampens all steps."""
    assert updates(torch_sgd(1.0, 0.5, dampening=0.75), [1, 1]) == [-1.0, -0.75]
    plain = optax.chain(mj.trace(0.5, dampening=0.75), optax.scale_by_learning_rate(1.0))
    assert updates(plain, [1, 1]) == [-0.25, -0.375]


def test_decay_coupled_or_decoupled():
    """Coupled decay enters the velocity and acts in later steps; decoupled decay does not."""

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
    """Weight decay still shrinks the params."""
    assert updates(torch_sgd(1.0, weight_decay=0.25, maximize=True), [1.0]) == [0.75]


def test_schedules_count_from_0():
    """The first step uses the first value of the schedule in all recipes."""
    for tx in (torch_sgd(drop), keras_sgd(drop), caffe_sgd(drop), optax_sgd(drop)):
        assert updates(tx, [1, 1]) == [-0.5, -0.25]
    assert updates(keras_sgd(drop, weight_decay=1.0), [0, 0]) == [-0.5, -0.25]


def test_nesterov_without_momentum():
    """An error in PyTorch, ignored in Keras and Optax."""
    for momentum, dampening in ((0.0, 0.0), (0.9, 0.1)):
        with pytest.raises(ValueError, match="nesterov=True needs a momentum above 0 and no damp"):
            torch_sgd(0.5, momentum, dampening, nesterov=True)
    assert updates(keras_sgd(0.5, nesterov=True), [1]) == [-0.5]
    assert updates(optax_sgd(0.5, nesterov=True), [1]) == [-0.5]


def test_defaults_are_theirs():
    """The first step of each recipe without options."""
    assert updates(torch_sgd(), [1]) == [pytest.approx(-1e-3)]
    assert updates(keras_sgd(), [1]) == [pytest.approx(-0.01)]
    assert len(jax.tree.leaves(torch_sgd().init(jnp.ones(2)))) == 0
    assert len(jax.tree.leaves(optax_sgd(0.1).init(jnp.ones(2)))) == 0


@pytest.mark.parametrize("make", [torch_sgd, keras_sgd, caffe_sgd, optax_sgd])
def test_updates_keep_the_gradients_dtype(make):
    """Also with decay and bfloat16; a leaf without gradient gets no update."""
    decay = {} if make is optax_sgd else {"weight_decay": 0.5}
    params = {"w": jnp.ones(2, jnp.bfloat16), "frozen": jnp.ones(3)}
    grads = {"w": jnp.ones(2, jnp.bfloat16), "frozen": None}
    for rate in (0.5, lambda count: jnp.float32(0.5)):
        tx = make(rate, momentum=0.5, **decay)
        update, _ = jax.jit(tx.update)(grads, tx.init(params), params)
        assert update["w"].dtype == jnp.bfloat16
        assert update["frozen"] is None


def test_options_may_be_traced():
    """Vmap over momentum and dampening works."""

    def second_update(momentum, dampening):
        tx = torch_sgd(0.5, momentum, dampening)
        _, state = tx.update(jnp.float32(1), tx.init(jnp.float32(0)))
        return tx.update(jnp.float32(1), state)[0]

    got = jax.vmap(second_update)(jnp.array([0.0, 0.5]), jnp.array([0.0, 0.25]))
    np.testing.assert_array_equal(got, [-0.5, -0.5 * (0.5 + 0.75)])


@pytest.mark.parametrize("make", [torch_sgd, keras_sgd, caffe_sgd, optax_sgd])
@pytest.mark.parametrize("momentum", [0.0, 0.5])
def test_under_inject_hyperparams(make, momentum):
    """The state has the same structure for known and traced values."""
    rate = {torch_sgd: "lr", caffe_sgd: "base_lr"}.get(make, "learning_rate")
    tx = optax.inject_hyperparams(make)(**{rate: 0.5, "momentum": momentum})
    w = jnp.ones(2)
    update, _ = jax.jit(tx.update)(w, tx.init(w), w)
    np.testing.assert_array_equal(update, [-0.5, -0.5])


def test_neither_pytorch_nor_keras_is_imported():
    """Importing the package does not import them, even if they are installed."""
    code = (
        "import sys, momentum_jax.frameworks;"
        "assert not {'torch', 'keras', 'tensorflow'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_recorded_files_have_the_version_of_the_framework():
    """Each file has a version, and no path or address."""
    for name in record.FRAMEWORKS:
        text = (Path(record.__file__).parent / f"{name}.json").read_text()
        assert json.loads(text)["version"].count(".") >= 1
        assert "/" not in text
