"""The measurement in the optimizer state equals one made outside the optimizer."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from compiles import count_compiles
from jax import export
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from tables import rows

import momentum_jax

mj: Any = momentum_jax
record, measure = mj.diagnostics.record, mj.diagnostics.measure
SCALE = {"a": jnp.linspace(1, 10, 6).reshape(2, 3), "b": jnp.array([0.5, 2.0])}
PARAMS = jax.tree.map(jnp.ones_like, SCALE)


def loss(params):
    return sum(jnp.sum(s * w**2) for s, w in zip(SCALE.values(), params.values(), strict=True)) / 2


def stepper(tx):
    def step(params, state):
        value, grads = jax.value_and_grad(loss)(params)
        updates, state = tx.update(grads, state, params, value=value, value_fn=loss)
        return optax.apply_updates(params, updates), state

    return step


INNER: dict[str, Any] = {
    "momentum": mj.momentum(0.1, 0.9),
    "nesterov": mj.momentum(0.1, 0.9, nesterov=True),
    "trace": optax.chain(mj.trace(0.9), optax.scale_by_learning_rate(0.1)),
    "sgd": optax.sgd(0.1, 0.9),
    "adam": optax.adam(0.1),
}


@pytest.mark.parametrize("name", INNER)
def test_it_holds_what_is_measured_by_hand(name: str):
    """The steps are not changed."""
    alone, tx = INNER[name], record(INNER[name], 0.1, 0.9)
    step = jax.jit(stepper(tx))
    params, state = PARAMS, tx.init(PARAMS)
    expected: Any = PARAMS
    state_alone = alone.init(PARAMS)
    for _ in range(5):
        value, grads = jax.value_and_grad(loss)(expected)
        updates, state_alone = alone.update(grads, state_alone, expected)
        params, state = step(params, state)
        found = measure(grads, updates, learning_rate=0.1, mu=0.9, loss=value)
        expected = optax.apply_updates(expected, updates)
        np.testing.assert_allclose(state.measurement, found, rtol=1e-4)
        np.testing.assert_allclose(params["a"], expected["a"], rtol=1e-5, atol=1e-6)
    assert optax.tree.get(state, "measurement") is state.measurement
    assert int(state.count) == 5


@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_gradients_whose_squares_are_beyond_the_floats(size):
    """They are accurate from the second step, whose size is known from the first."""
    tx = record(mj.momentum(1.0, 0.0), 1.0, 0.0)
    params = {"w": jnp.zeros(3)}
    state = tx.init(params)
    for step in range(3):
        grads = {"w": jnp.float32(size) * jnp.array([3.0, -1.0, 2.0])}
        updates, state = tx.update(grads, state, params)
        found = measure(grads, updates, learning_rate=1.0, mu=0.0)
        if step:
            np.testing.assert_allclose(state.measurement.speed, found.speed, rtol=1e-6)
            np.testing.assert_allclose(state.measurement.gain, 1, rtol=1e-6)
            np.testing.assert_allclose(state.measurement.alignment, 1, rtol=1e-6)
        grown = {"w": grads["w"] * (1e6 if size < 1 else 1e-6)}
        updates, state = tx.update(grown, state, params)
        found = measure(grown, updates, learning_rate=1.0, mu=0.0)
        if step:
            np.testing.assert_allclose(state.measurement.speed, found.speed, rtol=1e-6)


@pytest.mark.slow
def test_the_curvature_is_measured_every_so_many_steps():
    """Starting with the first step; the fraction uses the learning rate of that step."""
    schedule = lambda count: 0.1 / (1 + count)  # noqa: E731
    tx = record(mj.momentum(schedule, 0.9), schedule, 0.9, every=3)
    step = jax.jit(stepper(tx))
    params, state = PARAMS, tx.init(PARAMS)
    assert np.isnan(state.fraction)
    seen = []
    for _ in range(7):
        params, state = step(params, state)
        seen.append(float(state.fraction))
    expected = [schedule(count) * 10 / (2 * 1.9) for count in (0, 0, 0, 3, 3, 3, 6)]
    np.testing.assert_allclose(seen, expected, rtol=1e-4)
    assert float(state.curvature.largest) == pytest.approx(10, rel=1e-4)
    assert float(state.curvature.smallest) == pytest.approx(0.5, abs=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("mu", [-0.5, 0.0, 0.9])
def test_the_fraction_is_that_of_edge(nesterov, mu):
    tx = record(mj.momentum(0.1, mu), 0.1, mu, every=1, nesterov=nesterov)
    _, state = jax.jit(stepper(tx))(PARAMS, tx.init(PARAMS))
    found = mj.diagnostics.edge(state.curvature, 0.1, mu, nesterov=nesterov)
    assert float(state.fraction) == pytest.approx(found.fraction, rel=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("every", [None, 2])
def test_c2_the_state_is_stable(every, dtype):
    """In a loop, with and without a loss, and for 16-bit params."""
    params = jax.tree.map(lambda w: w.astype(dtype), PARAMS)
    tx = record(mj.momentum(0.1), 0.1, every=every)
    step, state = stepper(tx), tx.init(params)
    (_, after), _ = jax.lax.scan(lambda carry, _: (step(*carry), None), (params, state), length=4)
    before = [(x.shape, x.dtype, x.weak_type) for x in jax.tree.leaves(state)]
    assert [(x.shape, x.dtype, x.weak_type) for x in jax.tree.leaves(after)] == before
    assert jax.tree.structure(after) == jax.tree.structure(state)


def test_without_a_loss_the_energies_are_not_known():
    tx = record(mj.momentum(0.1), 0.1)
    _, state = tx.update(PARAMS, tx.init(PARAMS))
    assert np.isnan(state.measurement.total_energy)
    assert np.isfinite(state.measurement.gain)


def test_a_step_between_measurements_does_not_compute_the_curvature():
    """The Hessian-vector products are in a branch that is not taken."""
    tx = record(mj.momentum(0.1), 0.1, every=100)
    lowered = jax.jit(stepper(tx)).lower(PARAMS, tx.init(PARAMS)).as_text()
    assert lowered.count("stablehlo.case") + lowered.count("stablehlo.if") == 1
    step = jax.jit(stepper(tx))
    params, state = step(PARAMS, tx.init(PARAMS))
    with count_compiles() as compiles:
        for _ in range(3):
            params, state = step(params, state)
    assert compiles.count == 0


def test_overrides_reach_the_measurement_and_the_optimizer():
    tx = record(mj.momentum(0.1, 0.9), 0.1, 0.9)
    updates, state = tx.update(PARAMS, tx.init(PARAMS), PARAMS, learning_rate=0.5, mu=0.0)
    np.testing.assert_array_equal(updates["b"], -0.5)
    assert float(state.measurement.effective_learning_rate) == 0.5


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_on_a_mesh(axis_type):
    mesh = jax.make_mesh((2,), ("d",), axis_types=(axis_type,))
    sharding = NamedSharding(mesh, P("d"))
    tx = record(mj.momentum(0.1), 0.1, every=2)
    scale = jax.device_put(SCALE["a"], sharding)

    def sharded_loss(w):
        return jnp.sum(scale * w**2) / 2

    @jax.jit
    def step(w, state):
        value, grads = jax.value_and_grad(sharded_loss)(w)
        updates, state = tx.update(grads, state, w, value=value, value_fn=sharded_loss)
        return mj.apply_updates(w, updates), state

    w = jax.device_put(PARAMS["a"], sharding)
    w, state = step(w, tx.init(w))
    assert float(state.curvature.largest) == pytest.approx(10, rel=1e-4)
    assert state.inner_state.velocity.sharding.is_equivalent_to(sharding, 2)


@pytest.mark.slow
def test_exports_and_back():
    tx = record(mj.momentum(0.1), 0.1, every=2)
    step = jax.jit(stepper(tx))
    exported = export.export(step)(PARAMS, tx.init(PARAMS))
    back = export.deserialize(exported.serialize())
    found, expected = back.call(PARAMS, tx.init(PARAMS)), step(PARAMS, tx.init(PARAMS))
    assert jax.tree.structure(found) == jax.tree.structure(expected)


def test_a_step_of_zeros_does_not_set_the_scale_of_the_next_step():
    """For example after a skipped step: small gradients are measured as before it."""
    tx = mj.diagnostics.record(mj.momentum(0.1, 0.0), 0.1, 0.0)
    state = tx.init(jnp.ones(2))
    for size in (1e-12, 1e-20, 0.0, 1e-20):
        _, state = tx.update(jnp.full(2, size), state)
    measured: Any = optax.tree.get(state, "measurement")
    assert measured.alignment == pytest.approx(1)
    assert measured.gain == pytest.approx(1)


# With the wrappers of Optax. --------------------------------------------------------------

RATE = 0.5
TREE = {"a": jnp.array([3.0, 0.0]), "b": jnp.array([4.0])}
NOT_FINITE = jax.tree.map(lambda x: x * jnp.nan, TREE)


def first_step(step: Any, **_):
    return step == 0


def of_step(factor=1.0, paths="ab"):
    """The kinetic energy of an update of -RATE * factor * TREE, of the params at these paths."""
    parts = [TREE[path] for path in paths]
    return sum(float(jnp.sum((RATE * factor * part) ** 2)) for part in parts) / (2 * RATE)


def of_gradient(paths):
    """The same of an update that is the gradient."""
    return of_step(1 / RATE, paths)


# By the name of the wrapper: how it is made, two gradients, and the kinetic energies that are
# recorded after each of both, inside and around.
ROWS = {
    "MultiSteps": (
        lambda tx: optax.MultiSteps(tx, 2).gradient_transformation(),
        [TREE, jax.tree.map(lambda x: 3 * x, TREE)],
        [[np.nan, of_step(2)], [0, of_step(2)]],
    ),
    "apply_if_finite": (
        lambda tx: optax.apply_if_finite(tx, 3),
        [TREE, NOT_FINITE],
        [[of_step(), of_step()], [of_step(), 0]],
    ),
    "conditionally_mask": (
        lambda tx: optax.conditionally_mask(tx, first_step),
        [TREE, TREE],
        [[of_step(), of_step()], [of_step(), 0]],
    ),
    "conditionally_transform": (
        lambda tx: optax.conditionally_transform(tx, first_step),
        [TREE, TREE],
        [[of_step(), of_step()], [of_step(), of_gradient("ab")]],
    ),
    "masked": (
        lambda tx: optax.masked(tx, {"a": True, "b": False}),
        [TREE, TREE],
        [[of_step(1, "a")] * 2, [of_step(1, "a") + of_gradient("b")] * 2],
    ),
    "partition": (
        lambda tx: optax.partition({"one": tx, "other": tx}, {"a": "one", "b": "other"}),
        [TREE, TREE],
        [[of_step(1, "a")] * 2, [of_step()] * 2],
    ),
}


def descent(learning_rate: Any = RATE):
    return mj.momentum(learning_rate, 0.0)


def recorded(inner):
    return mj.diagnostics.record(inner, RATE, 0.0)


def energies(tx, gradients):
    """The kinetic energy in the state after each step, of the first of several measurements."""
    params, state, found = TREE, tx.init(TREE), []
    for grads in gradients:
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        measured: Any = optax.tree.get_all_with_path(state, "measurement")
        found.append(float(measured[0][1].kinetic_energy))
    return found


def test_each_row_of_the_table_is_tested():
    """Two rows have tests of their own."""
    assert set(rows(mj.diagnostics.record)) == ROWS.keys() | {"lookahead", "schedule_free"}


@pytest.mark.parametrize("name", ROWS)
def test_record_and_wrappers(name):
    """The table of the docstring, row by row."""
    wrap, gradients, (inside, around) = ROWS[name]
    np.testing.assert_allclose(energies(wrap(recorded(descent())), gradients), inside, rtol=1e-6)
    np.testing.assert_allclose(energies(recorded(wrap(descent())), gradients), around, rtol=1e-6)


def test_record_and_lookahead():
    """The jump to the slow params, a quarter of two steps back, is not measured."""
    params: Any = optax.LookaheadParams.init_synced(TREE)
    tx = optax.lookahead(recorded(descent()), 2, 0.75)
    state = tx.init(params)
    for _ in range(2):
        _, state = tx.update(TREE, state, params)
    measured: Any = optax.tree.get(state, "measurement")
    assert measured.kinetic_energy == pytest.approx(of_step())
    tx = recorded(optax.lookahead(descent(), 2, 0.75))
    with pytest.raises(ValueError, match="must be trees of one structure"):
        tx.update(TREE, tx.init(params), params)


def test_record_and_schedule_free():
    """Inside, z moves by the whole update; the params, a mean of z and its average, by less."""
    inside = energies(optax.contrib.schedule_free(recorded(descent()), RATE, b1=0.5), [TREE] * 2)
    around = energies(recorded(optax.contrib.schedule_free(descent(), RATE, b1=0.5)), [TREE] * 2)
    np.testing.assert_allclose(inside, [of_step()] * 2, rtol=1e-5)
    assert around[1] < 0.9 * inside[1]
