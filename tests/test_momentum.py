"""Tests momentum, trace and apply_updates against NumPy and Optax, and on optimization problems."""

import contextlib
import hashlib
import inspect
import json
import os
import pathlib
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference
from compiles import count_compiles
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import momentum_jax as mj

UNIT_ROUNDOFF = 2.0**-24  # float32
SIGNATURES = pathlib.Path(__file__).parent / "golden" / "signatures.txt"
PUBLIC_NAMES = [
    *("AdaptiveRestartState", "AggMoState", "KahanState", "MomentumState", "QHMState"),
    *("RecurrenceState", "SeveralVelocitiesState", "TraceState"),
    *("TransplantReport", "TransplantRow"),
    *("adaptive_restart", "aggmo", "apply_updates", "diagnostics", "frameworks", "kahan"),
    *("momentum", "qhm", "read_velocity", "recurrence", "reset_velocity", "schedules"),
    *("sharding", "theory", "trace", "transplant"),
]
SHAPES = {"scalar": (), "matrix": (65, 33)}

both_read_outs = pytest.mark.parametrize("nesterov", [False, True], ids=["plain", "nesterov"])


@contextlib.contextmanager
def double_precision():
    """Enables 64-bit arrays in a part of a test, because Hypothesis does not support fixtures."""
    before = jax.config.read("jax_enable_x64")
    jax.config.update("jax_enable_x64", True)
    try:
        yield
    finally:
        jax.config.update("jax_enable_x64", before)


def normal_trees(seed, steps, dtype: Any = np.float32, shapes=SHAPES):
    """Returns one tree of normally distributed numbers per step."""
    rng = np.random.default_rng(seed)

    def draw(shape):
        numbers = rng.normal(size=shape)
        if np.issubdtype(dtype, np.complexfloating):
            numbers = numbers + 1j * rng.normal(size=shape)
        return np.asarray(numbers, dtype)

    return [{name: draw(shape) for name, shape in shapes.items()} for _ in range(steps)]


def run(tx, grads):
    """Returns the updates and velocities of every step from v = 0, compiled as a user would."""
    state = tx.init(grads[0])
    update = jax.jit(tx.update)
    updates, states = [], []
    for g in grads:
        u, state = update(g, state)
        updates.append(u)
        states.append(state)
    return updates, states


def largest(tree):
    """Returns the largest modulus of all numbers in a tree."""
    return max(np.abs(wide(leaf)).max(initial=0) for leaf in jax.tree.leaves(tree))


def largest_difference(tree, other):
    """Returns the largest modulus of the difference of two trees, in float64 or complex128."""
    return largest(jax.tree.map(lambda x, y: wide(x) - wide(y), tree, other))


def wide(x):
    """Returns a NumPy array in float64 or complex128."""
    x = np.asarray(x)
    return x.astype(np.result_type(x, np.float64))


def rounding(velocity, mu, unit_roundoff=UNIT_ROUNDOFF):
    """Returns a bound on the rounding error of a computed velocity of at most this size.

    A step rounds two products, whose sizes add up to at most `velocity`, and their sum: an error of
    2 u velocity. The next steps keep mu, mu^2, ... of it: 1 / (1 - mu) times as much in total.
    """
    return 2 * unit_roundoff * velocity / (1 - mu)


def assert_same_bits(actual, expected):
    """Asserts equal structures, and equal dtype, shape and bytes of each leaf."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    pairs = zip(jax.tree_util.tree_leaves_with_path(actual), jax.tree.leaves(expected), strict=True)
    for (path, leaf), other in pairs:
        leaf, other, at = np.asarray(leaf), np.asarray(other), jax.tree_util.keystr(path)
        assert (leaf.dtype, leaf.shape) == (other.dtype, other.shape), at
        assert leaf.tobytes() == other.tobytes(), (at, leaf, other)


# The recurrence against a NumPy loop.

LEAVES = st.none() | hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=3).map(np.zeros)
TREES = st.recursive(
    LEAVES,
    lambda tree: (
        st.lists(tree, max_size=3)
        | st.lists(tree, max_size=3).map(tuple)
        | st.dictionaries(st.sampled_from("abc"), tree, max_size=3)
    ),
    max_leaves=4,
)
MOST_STEPS = 8
SEEDS = st.integers(0, 2**32 - 1)


def constant_or_scheduled(least, most, *, exclude_min=False):
    """Draws a number, or one number per step."""
    numbers = st.floats(least, most, exclude_min=exclude_min)
    return numbers | st.lists(numbers, min_size=MOST_STEPS, max_size=MOST_STEPS)


def as_schedule(value, array=jnp.asarray):
    """Returns a number unchanged, and one number per step as a function of the count."""
    return (lambda count: array(value)[count]) if isinstance(value, list) else value


def assert_equals_reference(tx, recurrence, tree, seed, steps):
    """Compares every leaf with the reference after each step with random gradients like `tree`."""
    rng = np.random.default_rng(seed)
    grads = [jax.tree.map(lambda x: rng.uniform(-1, 1, x.shape), tree) for _ in range(steps)]
    expected = [recurrence(leaf) for leaf in zip(*map(jax.tree.leaves, grads), strict=True)]
    state = tx.init(tree)
    for step, g in enumerate(grads):
        updates, state = tx.update(g, state)
        for result in (updates, state[1]):
            assert jax.tree.structure(result) == jax.tree.structure(tree)
        for u, v, (all_updates, all_velocities) in zip(
            jax.tree.leaves(updates), jax.tree.leaves(state[1]), expected, strict=True
        ):
            assert u.dtype == v.dtype == np.float64
            # All numbers are below 20, so the rounding error of 8 steps is below 1e-13.
            np.testing.assert_allclose(u, all_updates[step], rtol=0, atol=1e-12)
            np.testing.assert_allclose(v, all_velocities[step], rtol=0, atol=1e-12)


@both_read_outs
@settings(max_examples=20, deadline=None)
@given(
    tree=TREES,
    seed=SEEDS,
    steps=st.integers(1, MOST_STEPS),
    learning_rate=constant_or_scheduled(0, 1),
    mu=constant_or_scheduled(-1, 1, exclude_min=True),
)
def test_momentum_equals_the_numpy_loop(nesterov, tree, seed, steps, learning_rate, mu):
    """Learning rate inside: to 1e-12 in float64, over random trees and schedules."""
    assume(not (nesterov and mu == 0))  # refused
    with double_precision():
        assert_equals_reference(
            mj.momentum(as_schedule(learning_rate), as_schedule(mu), nesterov=nesterov),
            lambda grads: reference.momentum(
                grads, as_schedule(learning_rate, np.array), as_schedule(mu, np.array), nesterov
            ),
            tree,
            seed,
            steps,
        )


@both_read_outs
@settings(max_examples=20, deadline=None)
@given(
    tree=TREES,
    seed=SEEDS,
    steps=st.integers(1, MOST_STEPS),
    mu=constant_or_scheduled(-1, 1, exclude_min=True),
    dampening=constant_or_scheduled(-1, 1),
)
def test_trace_equals_the_numpy_loop(nesterov, tree, seed, steps, mu, dampening):
    """No learning rate, with dampening: to 1e-12 in float64, over random trees and schedules."""
    assume(not (nesterov and mu == 0))  # refused
    with double_precision():
        assert_equals_reference(
            mj.trace(as_schedule(mu), nesterov=nesterov, dampening=as_schedule(dampening)),
            lambda grads: reference.trace(
                grads, as_schedule(mu, np.array), as_schedule(dampening, np.array), nesterov
            ),
            tree,
            seed,
            steps,
        )


@both_read_outs
@pytest.mark.parametrize("dtype", [np.complex64, np.complex128])
def test_complex_leaves_equal_the_numpy_loop(dtype, nesterov):
    """The same recurrence holds with complex gradients and real hyperparameters."""
    learning_rate, mu, dampening = 0.125, 0.875, 0.25  # Exact in float32.
    grads = normal_trees(0, 20, dtype, {"scalar": (), "matrix": (3, 4), "empty": (0,)})
    trajectories = []
    with double_precision() if dtype == np.complex128 else contextlib.nullcontext():
        for tx, recurrence, coefficient in (
            (
                mj.momentum(learning_rate, mu, nesterov=nesterov),
                lambda g: reference.momentum(g, learning_rate, mu, nesterov),
                learning_rate,
            ),
            (
                mj.trace(mu, nesterov=nesterov, dampening=dampening),
                lambda g: reference.trace(g, mu, dampening, nesterov),
                1.0,  # Nesterov's update uses the whole gradient.
            ),
        ):
            updates, states = run(tx, grads)
            trajectories.append((updates, states, recurrence, coefficient))
    for updates, states, recurrence, coefficient in trajectories:
        bound = rounding(coefficient * largest(grads) / (1 - mu), mu)
        for name in grads[0]:
            expected_updates, expected_velocities = recurrence([g[name] for g in grads])
            ours = [u[name] for u in updates], [s[1][name] for s in states]
            assert all(x.dtype == dtype for x in jax.tree.leaves(ours))
            assert largest_difference(ours, (expected_updates, expected_velocities)) <= (
                bound if dtype == np.complex64 else 1e-12
            )


@pytest.mark.parametrize(
    "tx",
    [
        pytest.param(mj.momentum(0.1, 0.9), id="momentum"),
        pytest.param(mj.momentum(0.1, 0.9, nesterov=True), id="momentum, nesterov"),
        pytest.param(mj.trace(0.9, dampening=0.5), id="trace"),
        pytest.param(mj.trace(0.9, dampening=0.5, nesterov=True), id="trace, nesterov"),
    ],
)
@settings(max_examples=20, deadline=None)
@given(a=st.floats(-2, 2), b=st.floats(-2, 2), seed=SEEDS)
def test_from_rest_the_updates_are_linear_in_the_gradients(tx, a, b, seed):
    """The updates for a g + b h are a times those for g plus b times those for h."""
    with double_precision():
        g, h = np.random.default_rng(seed).uniform(-1, 1, (2, 4, 3, 2))
        of_sum, of_g, of_h = (np.stack(run(tx, list(x))[0]) for x in (a * g + b * h, g, h))
    np.testing.assert_allclose(of_sum, a * of_g + b * of_h, rtol=0, atol=1e-12)


# Against Optax.

RATES = {
    "constant": 0.1,
    "drop and rise": optax.piecewise_constant_schedule(0.1, {15: 0.1, 30: 10.0}),
    "up and down": optax.warmup_cosine_decay_schedule(0.0, 0.3, 10, 50),
}


@jax.jit
def gradient(params, noise):
    """Returns the gradient of |params + noise|^2 / 2."""
    return jax.tree.map(jnp.add, params, noise)


def descend(tx, apply_updates, noise, *, whole_step):
    """Returns the updates and params of each step; the gradients depend on the params."""
    update, apply = jax.jit(tx.update), jax.jit(apply_updates)

    @jax.jit
    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return updates, apply_updates(params, updates), state

    params = jax.device_put(noise[0])
    state = tx.init(params)
    trajectory = []
    for shift in noise[1:]:
        grads = gradient(params, shift)
        if whole_step:
            updates, params, state = step(params, state, grads)
        else:
            updates, state = update(grads, state, params)
            params = apply(params, updates)
        trajectory.append((updates, params))
    return trajectory


@pytest.mark.parametrize("rate", ["constant", "up and down"])
@both_read_outs
@pytest.mark.parametrize("whole_step", [False, True], ids=["jit(update)", "jit(step)"])
def test_trace_then_learning_rate_is_optax_sgd_to_the_bit(whole_step, nesterov, rate):
    """In float32 under jit, for updates and params of 50 steps."""
    learning_rate, noise = RATES[rate], normal_trees(1, 51)
    ours = optax.chain(
        mj.trace(0.9, nesterov=nesterov), optax.scale_by_learning_rate(learning_rate)
    )
    theirs = optax.sgd(learning_rate, 0.9, nesterov=nesterov)
    assert_same_bits(
        descend(ours, mj.apply_updates, noise, whole_step=whole_step),
        descend(theirs, optax.apply_updates, noise, whole_step=whole_step),
    )


NUMBERS = np.random.default_rng(13).normal(size=(32, 12)).astype(np.float32)
# name: (a loss, the shapes of its params). In most, the gradient ends in a product, which a
# compiler fuses with the operations after it in the same step.
LOSSES = {
    "square": (lambda w: jnp.sum((w - 2) ** 2), (500,)),
    "scaled": (lambda w: 0.37 * jnp.sum(NUMBERS[0, 0] * w * (w - 1)), (500,)),
    "quartic": (lambda w: jnp.mean((w**2 - 1) ** 2), (500,)),
    "scalar": (lambda w: 0.7 * (w - 2) ** 2, ()),
    "decay": (lambda w: jnp.sum(jax.nn.softplus(3 * w)) + 0.05 * jnp.sum(w**2), (500,)),
    "layers": (
        lambda w: jnp.mean((jnp.tanh(NUMBERS[:, :7] @ w["a"] + w["b"]) @ w["c"]) ** 2),
        {"a": (7, 16), "b": (16,), "c": (16, 3)},
    ),
}


def train(tx, apply_updates, name, dtype, in_scan):
    """Returns params and losses of 20 steps, with the gradient compiled into the step."""
    loss, shapes = LOSSES[name]
    rng = np.random.default_rng(14)
    params = jax.tree.map(
        lambda shape: jnp.asarray(rng.normal(size=shape) / 3, dtype),
        shapes,
        is_leaf=lambda shape: isinstance(shape, tuple),
    )

    def step(carry, _):
        params, state = carry
        value, grads = jax.value_and_grad(loss)(params)
        updates, state = tx.update(grads, state, params)
        params = apply_updates(params, updates)
        return (params, state), (params, value)

    if in_scan:
        return jax.jit(lambda p: jax.lax.scan(step, (p, tx.init(p)), length=20)[1])(params)
    carry, step, found = (params, tx.init(params)), jax.jit(step), []
    for _ in range(20):
        carry, each = step(carry, None)
        found.append(each)
    return found


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("rate", ["constant", "up and down"])
@pytest.mark.parametrize("weight_decay", [0.0, 0.01])
@both_read_outs
@pytest.mark.parametrize("in_scan", [False, True], ids=["step", "scan"])
@pytest.mark.parametrize("name", LOSSES)
def test_trace_is_optax_sgd_to_the_bit_with_the_gradient_in_the_step(
    name, in_scan, nesterov, weight_decay, rate, dtype, request
):
    """The bits are equal even if the compiler fuses gradient and step."""
    if dtype == "float64":
        request.getfixturevalue("x64")
    decay = optax.add_decayed_weights(weight_decay) if weight_decay else optax.identity()
    expected = train(
        optax.chain(decay, optax.sgd(RATES[rate], 0.9, nesterov=nesterov)),
        optax.apply_updates,
        name,
        dtype,
        in_scan,
    )
    frameworks = mj.frameworks
    for tx in (
        optax.chain(
            decay, mj.trace(0.9, nesterov=nesterov), optax.scale_by_learning_rate(RATES[rate])
        ),
        optax.chain(decay, frameworks.optax_sgd(RATES[rate], 0.9, nesterov=nesterov)),
        frameworks.torch_sgd(RATES[rate], 0.9, weight_decay=weight_decay, nesterov=nesterov),
    ):
        assert_same_bits(train(tx, mj.apply_updates, name, dtype, in_scan), expected)


@both_read_outs
@pytest.mark.parametrize("mu", [0.5, 0.9, 0.99])
def test_momentum_at_a_constant_learning_rate_is_optax_sgd_to_rounding(mu, nesterov):
    """They round in different places; the difference stays within a proven bound."""
    learning_rate, grads = 0.1, normal_trees(2, 50, shapes={"w": (500,)})
    ours, _ = run(mj.momentum(learning_rate, mu, nesterov=nesterov), grads)
    theirs, _ = run(optax.sgd(learning_rate, mu, nesterov=nesterov), grads)
    velocity = learning_rate * largest(grads) / (1 - mu)  # Bounds v and -learning_rate m.
    # Both use the same rounded learning_rate and mu. Optax's scaling rounds once more.
    bound = 2 * rounding(velocity, mu) + UNIT_ROUNDOFF * velocity
    assert largest_difference(ours, theirs) <= bound * (1 + 1e-4)  # Allows for terms of u^2.


@pytest.mark.parametrize("rate", ["drop and rise", "up and down"])
@both_read_outs
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_momentum_under_a_schedule_scales_before_it_accumulates(dtype, nesterov, rate):
    """It equals Optax's trace of scaled gradients and differs from optax.sgd, which scales last."""
    mu, learning_rate, grads = 0.9, RATES[rate], normal_trees(3, 50, dtype, {"w": (500,)})
    with double_precision() if dtype == np.float64 else contextlib.nullcontext():
        ours, states = run(mj.momentum(learning_rate, mu, nesterov=nesterov), grads)
        inside, _ = run(
            optax.chain(
                optax.scale_by_learning_rate(learning_rate), optax.trace(mu, nesterov=nesterov)
            ),
            grads,
        )
        outside, _ = run(optax.sgd(learning_rate, mu, nesterov=nesterov), grads)
        velocity = largest(grads) * max(float(learning_rate(k)) for k in range(50)) / (1 - mu)
    bound = 1e-12 if dtype == np.float64 else 2 * rounding(velocity, mu) * (1 + 1e-4)
    assert largest_difference(ours, inside) <= bound
    assert largest_difference(ours, outside) > 1e3 * bound
    assert int(states[-1].count) == 50


def drop_after_400_steps(count):
    """A learning rate of 0.1, then 0.01."""
    return jnp.where(count < 400, 0.1, 0.01)


@pytest.mark.parametrize(
    ("tx", "next_update"),
    [
        pytest.param(mj.momentum(drop_after_400_steps, 0.9), -0.91, id="momentum"),
        pytest.param(optax.sgd(drop_after_400_steps, 0.9), -0.1, id="optax.sgd"),
        pytest.param(
            optax.chain(mj.trace(0.9), optax.scale_by_learning_rate(drop_after_400_steps)),
            -0.1,
            id="trace",
        ),
    ],
)
def test_after_a_drop_of_the_learning_rate_the_velocity_stays_inside(x64, tx, next_update):
    """After many gradients of 1 the update is -1; the update after the drop shows the form."""

    def step(state, _):
        update, state = tx.update(jnp.ones(()), state)
        return state, update

    updates = jax.lax.scan(step, tx.init(jnp.zeros(())), length=401)[1]
    np.testing.assert_allclose(updates[-2:], [-1.0, next_update], rtol=0, atol=1e-12)


@both_read_outs
def test_scaling_the_velocity_with_the_learning_rate_turns_inside_into_outside(x64, nesterov):
    """If it is multiplied by new / old learning rate at each change, momentum equals optax.sgd."""
    learning_rate = RATES["drop and rise"]
    grads = normal_trees(4, 40, np.float64, {"w": (5,)})
    theirs, _ = run(optax.sgd(learning_rate, 0.9, nesterov=nesterov), grads)
    tx = mj.momentum(learning_rate, 0.9, nesterov=nesterov)
    state = tx.init(grads[0])
    for step, (g, expected) in enumerate(zip(grads, theirs, strict=True)):
        assert isinstance(state, mj.MomentumState)
        if step in (15, 30):
            change = learning_rate(step) / learning_rate(step - 1)
            state = state._replace(velocity={"w": change * state.velocity["w"]})
        updates, state = tx.update(g, state)
        assert largest_difference(updates, expected) <= 1e-12


# On problems, with momentum on.


def minimize(tx, loss, start, steps):
    """Returns the params after these steps, all in one compiled program."""

    def step(carry, _):
        w, state = carry
        # For complex w, the conjugate of JAX's gradient is the direction of steepest ascent.
        grads = jax.tree.map(jnp.conj, jax.grad(loss)(w))
        updates, state = tx.update(grads, state, w)
        return (mj.apply_updates(w, updates), state), None

    return jax.jit(lambda w: jax.lax.scan(step, (w, tx.init(w)), length=steps)[0][0])(start)


def inside(learning_rate, mu, nesterov):
    """Momentum with the learning rate inside."""
    return mj.momentum(learning_rate, mu, nesterov=nesterov)


def outside(learning_rate, mu, nesterov):
    """Momentum with the learning rate outside."""
    return optax.chain(mj.trace(mu, nesterov=nesterov), optax.scale_by_learning_rate(learning_rate))


each_form = pytest.mark.parametrize("form", [inside, outside])


@each_form
@both_read_outs
@pytest.mark.parametrize("dtype", [np.float32, np.complex64])
def test_momentum_finds_the_bottom_of_a_long_valley(dtype, form, nesterov):
    """A parabola 100 times steeper in one direction; without momentum it is not reached."""
    bottom = np.array([1.5, -0.25, 3.0], dtype) * (1 if dtype == np.float32 else 1 - 2j)
    steepness = np.array([1.0, 10.0, 100.0], np.float32)

    def loss(w):
        return (steepness * jnp.abs(w - bottom) ** 2).sum() / 2

    start = jnp.full(3, 10, dtype)
    found = minimize(form(0.01, 0.9, nesterov), loss, start, 400)
    # The slowest direction shrinks by sqrt(0.9) per step: to 7e-10 in total.
    np.testing.assert_allclose(found, bottom, rtol=0, atol=1e-4)
    without = minimize(form(0.01, 0.0, False), loss, start, 400)
    np.testing.assert_allclose(  # A factor 1 - 0.01 per step.
        abs(without[0] - bottom[0]), abs(10 - bottom[0]) * 0.99**400, rtol=1e-2
    )


@each_form
@both_read_outs
def test_momentum_finds_the_minimum_of_the_rosenbrock_function(form, nesterov):
    """It follows the curved valley to (1, 1)."""

    def loss(w):
        return (1 - w["x"]) ** 2 + 100 * (w["y"] - w["x"] ** 2) ** 2

    start = {"x": jnp.zeros(()), "y": jnp.zeros(())}
    found = minimize(form(1e-3, 0.9, nesterov), loss, start, 6000)
    np.testing.assert_allclose([found["x"], found["y"]], 1, rtol=0, atol=1e-3)
    without = minimize(form(1e-3, 0.0, False), loss, start, 6000)
    assert abs(without["y"] - 1) > 0.05


@each_form
def test_a_training_loop_compiles_its_step_once(form):
    """Fifty steps under jit, each with different numbers."""
    tx, grads = (
        form(RATES["up and down"], 0.9, True),
        normal_trees(5, 50, shapes={"w": (11,), "b": ()}),
    )
    params = jax.device_put(grads[0])
    state = tx.init(params)

    @jax.jit
    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return mj.apply_updates(params, updates), state

    with count_compiles() as compiles:
        for g in grads:
            params, state = step(params, state, g)
    assert compiles.count == 1, compiles


@pytest.mark.parametrize("tx", [mj.momentum(0.1, 0.9), mj.trace(0.9, nesterov=True)])
def test_steps_outside_jit_compile_nothing_after_the_first(tx):
    """The first call of init, update and apply_updates compiles each, later calls nothing."""
    grads = normal_trees(6, 50, shapes={"w": (13,), "b": ()})
    params = jax.device_put(grads[0])

    def steps(params, grads):
        state = tx.init(params)
        for g in grads:
            updates, state = tx.update(g, state, params)
            params = mj.apply_updates(params, updates)

    steps(params, grads[:1])
    with count_compiles() as compiles:
        steps(params, grads)
    assert compiles.count == 0, compiles


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
@both_read_outs
@pytest.mark.parametrize("jitted", [False, True], ids=["eager", "jit"])
def test_params_and_state_keep_their_avals_on_eight_devices(jitted, nesterov, axis_type):
    """Shape, dtype, weak type and sharding do not change over three steps with momentum."""
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(axis_type,) * 2)
    specs = {"kernel": P("data", "model"), "bias": P("model"), "table": P(None, "data"), "one": P()}
    shapes = {"kernel": (8, 4), "bias": (4,), "table": (3, 8), "one": ()}
    shardings = {name: NamedSharding(mesh, spec) for name, spec in specs.items()}
    params = jax.device_put(normal_trees(7, 1, shapes=shapes)[0], shardings)
    tx = mj.momentum(0.1, 0.9, nesterov=nesterov)

    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return mj.apply_updates(params, updates), state

    step = jax.jit(step) if jitted else step
    before = after = (params, tx.init(params))
    for g in normal_trees(8, 3, shapes=shapes):
        after = step(*after, jax.device_put(g, shardings))
        for (path, x), y in zip(
            jax.tree_util.tree_leaves_with_path(before), jax.tree.leaves(after), strict=True
        ):
            at = jax.tree_util.keystr(path)
            assert (x.shape, x.dtype, x.weak_type) == (y.shape, y.dtype, y.weak_type), at
            assert y.sharding.is_equivalent_to(x.sharding, x.ndim), (at, x.sharding, y.sharding)
    state = after[1]
    assert isinstance(state, mj.MomentumState)
    for name, velocity in state.velocity.items():
        assert velocity.sharding.is_equivalent_to(shardings[name], velocity.ndim), name


@each_form
@both_read_outs
def test_complex_params_want_the_conjugate_of_the_gradient(form, nesterov):
    """With jax.grad's own result, the imaginary part moves uphill."""

    def loss(w):
        return jnp.abs(w - (3 - 2j)) ** 2 / 2

    def run(convert):
        tx, w = form(0.1, 0.9, nesterov), jnp.complex64(1 + 1j)
        state = tx.init(w)
        for _ in range(300):
            updates, state = tx.update(convert(jax.grad(loss)(w)), state, w)
            w = mj.apply_updates(w, updates)
        return w

    np.testing.assert_allclose(run(jnp.conj), 3 - 2j, atol=1e-4)
    assert not abs(run(lambda g: g) - (3 - 2j)) < 1e3


@pytest.mark.slow
def test_the_conjugate_is_what_pytorch_gives():
    """So a momentum buffer from PyTorch continues with it."""
    torch = pytest.importorskip("torch")
    w = torch.tensor(1 + 1j, requires_grad=True)
    (((w - (3 - 2j)).abs() ** 2) / 2).backward()
    ours = jax.grad(lambda w: jnp.abs(w - (3 - 2j)) ** 2 / 2)(jnp.complex64(1 + 1j))
    np.testing.assert_allclose(jnp.conj(ours), complex(w.grad), rtol=1e-5)


def test_a_learning_rate_of_0_lets_the_velocity_coast_and_none_freezes():
    """With learning rate 0, a param moves mu / (1 - mu) of its last step further; None stops it."""
    tx: Any = mj.momentum(0.5, 0.75)
    g = jnp.ones(2)
    updates, state = tx.update(g, tx.init(g))
    further = 0
    for _ in range(200):
        update, state = tx.update(g, state, learning_rate=0.0)
        further = further + update
    np.testing.assert_allclose(further, 0.75 / 0.25 * updates, rtol=1e-5)
    _, state = tx.update(g, tx.init(g))
    frozen, after = tx.update(None, state)
    assert frozen is None
    assert_same_bits(after, state._replace(count=state.count + 1))
    stopped = tx.update(g, mj.reset_velocity(state), learning_rate=0.0)[0]
    np.testing.assert_array_equal(stopped, 0)


def test_c4_what_bfloat16_gradients_cost_float32_params():
    """Updates are off by up to 1 / 256, velocities are exact; converted first, both are exact."""
    grads = normal_trees(15, 100, shapes={"w": (500,)})
    bfloat16_grads = [jax.tree.map(lambda g: jnp.asarray(g, jnp.bfloat16), g) for g in grads]
    wide_grads = [jax.tree.map(lambda g: g.astype(jnp.float32), g) for g in bfloat16_grads]
    exact, velocities = reference.momentum([wide(g["w"]) for g in bfloat16_grads], 0.1, 0.9)
    for each, dtype, error in (
        (bfloat16_grads, jnp.bfloat16, 2**-8),
        (wide_grads, np.float32, 1e-4),
    ):
        updates, states = run(mj.momentum(0.1, 0.9), each)
        assert {u["w"].dtype for u in updates} == {np.dtype(dtype)}
        found = np.stack([wide(u["w"]) for u in updates])
        worst = np.max(np.abs(found - exact) / np.maximum(np.abs(exact), 0.01))
        assert worst <= 1.01 * error
        assert (worst > error / 2) == (dtype == jnp.bfloat16)
        stored = np.stack([wide(s.velocity["w"]) for s in states])
        np.testing.assert_allclose(stored, velocities, rtol=0, atol=1e-5)


# apply_updates.


def awkward(dtype, seed):
    """Returns numbers of very different magnitudes, and the extreme ones."""
    rng = np.random.default_rng(seed)
    info = jnp.finfo(dtype)  # For complex dtypes, of the real part.
    numbers = rng.choice([-1, 1], 500) * 2.0 ** rng.uniform(-12, 12, 500)
    special = [0.0, -0.0, np.inf, -np.inf, info.max, info.tiny, info.smallest_subnormal, 1.0]
    numbers = np.concatenate([numbers.astype(info.dtype), np.array(special, info.dtype)])
    if jnp.issubdtype(dtype, jnp.complexfloating):
        return np.stack([numbers, numbers[::-1]], axis=1).view(dtype)[:, 0]
    return numbers


def mixed_trees(pairs):
    """Returns params and updates with one leaf per pair of dtypes."""
    params = {f"{p} + {u}": awkward(p, 10) for p, u in pairs}
    # Reversed, so that no inf meets -inf: a NaN has many bit patterns.
    updates = {f"{p} + {u}": awkward(u, 11)[::-1].copy() for p, u in pairs}
    return jax.device_put((params, updates))  # With NumPy arrays, Optax would add in NumPy.


REALS = ["float32", "bfloat16", "float16"]


@pytest.mark.parametrize("theirs", [optax.apply_updates, jax.jit(optax.apply_updates)])
def test_apply_updates_is_that_of_optax_to_the_bit(theirs):
    """Over all pairs of dtypes in one tree, nested, with Python numbers and integers."""
    pairs = [(p, u) for p in REALS for u in REALS]
    pairs += [("complex64", u) for u in (*REALS, "complex64")]
    params, updates = mixed_trees(pairs)
    params = {"arrays": (params, [None]), "numbers": [0.1, 3.0, -7], "ints": np.arange(3)}
    updates = {
        "arrays": (updates, [None]),
        "numbers": [jnp.float32(0.7), jnp.float32(1.7), jnp.int32(5)],
        "ints": np.array([3, -4, 5]),
    }
    assert_same_bits(mj.apply_updates(params, updates), theirs(params, updates))


@pytest.mark.parametrize("theirs", [optax.apply_updates, jax.jit(optax.apply_updates)])
def test_apply_updates_is_that_of_optax_to_the_bit_in_64_bits(x64, theirs):
    """The same with float64 and complex128 on either side."""
    doubles = ["float64", "complex128"]
    pairs = [("float64", u) for u in (*REALS, "float64")] + [(p, "float64") for p in REALS]
    pairs += [("complex128", u) for u in (*REALS, "complex64", *doubles)]
    pairs += [("complex64", u) for u in doubles]
    params, updates = mixed_trees(pairs)
    assert_same_bits(mj.apply_updates(params, updates), theirs(params, updates))


INTEGERS = [f"{kind}{bits}" for kind in ("int", "uint") for bits in (8, 16, 32, 64)]
FLOATS = ["bfloat16", "float16", "float32", "float64"]
COMPLEX = ["complex64", "complex128"]
DTYPES = ["bool", *INTEGERS, *FLOATS, *COMPLEX]


@pytest.mark.slow
@pytest.mark.parametrize("update", DTYPES)
@pytest.mark.parametrize("param", DTYPES)
def test_c4_apply_updates_of_every_pair_of_dtypes(x64, param, update):
    """If the param's dtype can hold the sum, it is exact; else it is refused, never wrapped."""
    added = (
        (param in COMPLEX and update != "bool")
        or (param in FLOATS and update in INTEGERS + FLOATS)
        or (param in INTEGERS and update in INTEGERS and np.can_cast(update, param, "safe"))
    )
    params, updates = {"w": jnp.asarray([1, 2], param)}, {"w": jnp.asarray([1, 3], update)}
    for apply in (mj.apply_updates, jax.jit(mj.apply_updates)):
        if not added:
            with pytest.raises(TypeError, match=r"the update at \['w'\] is") as error:
                apply(params, updates)
            assert f"is {update}" in str(error.value)
            assert param in str(error.value)
            continue
        moved = apply(params, updates)["w"]
        assert moved.dtype == param
        np.testing.assert_array_equal(np.asarray(moved, complex), [2, 5])


@pytest.mark.parametrize(("param", "update"), [("int32", "uint32"), ("uint32", "int32")])
def test_c4_a_sign_is_not_lost_outside_64_bit_mode(param, update):
    """Covers pairs for which JAX has no common dtype."""
    with pytest.raises(TypeError, match="would wrap around"):
        mj.apply_updates(jnp.ones(2, param), jnp.ones(2, update))


@pytest.mark.parametrize("param", [1.5, 1.5 + 2j, 3, jnp.float32(1.5), jnp.bfloat16(1.5)], ids=repr)
@pytest.mark.parametrize("update", [1, jnp.int32(1)], ids=["weak", "strong"])
def test_c2_apply_updates_keeps_dtype_and_weak_type(param, update):
    """A Python number stays weakly typed in jit, so no step is traced twice."""
    moved, before = mj.apply_updates(param, update), jnp.asarray(param)
    assert isinstance(moved, jax.Array)
    assert (moved.dtype, moved.weak_type) == (before.dtype, before.weak_type)
    assert moved == param + 1


@pytest.mark.parametrize(
    "no_update",
    [None, optax.MaskedNode(), np.zeros((2,), jax.dtypes.float0)],
    ids=["None", "MaskedNode", "float0"],
)
@pytest.mark.parametrize(
    "param",
    [
        pytest.param(np.array([np.nan, -0.0], np.float32), id="float32"),
        pytest.param(np.array([np.inf, 1e-3]).astype(jnp.bfloat16), id="bfloat16"),
        pytest.param(np.array([1 + 2j, -0.0j], np.complex64), id="complex64"),
        pytest.param(np.array([2**31 - 1, -1], np.int32), id="int32"),
        pytest.param(np.array([True, False]), id="bool"),
    ],
)
def test_c5_no_update_leaves_the_param_untouched(param, no_update):
    """It keeps its bits, in a tree with a param that moves."""
    params = {"still": param, "moving": np.ones(2, np.float32)}
    updates = {"still": no_update, "moving": np.ones(2, np.float32)}
    expected = {"still": param, "moving": np.full(2, 2, np.float32)}
    assert_same_bits(mj.apply_updates(params, updates), expected)


# The package as a whole.


def in_a_fresh_process(code, **environment):
    """Returns the JSON that the code prints, in a process without the tests' configuration."""
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        cwd=pathlib.Path(__file__).parent,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


@pytest.fixture(scope="module")
def after_import():
    """Returns the public names and the loaded modules after only `import momentum_jax`."""
    return in_a_fresh_process(
        "import json, sys, momentum_jax as mj\n"
        "names = [name for name in dir(mj) if not name.startswith('_')]\n"
        "print(json.dumps({'names': names, 'modules': list(sys.modules)}))"
    )


def test_the_public_names_are_these(after_import):
    """A new name must be added here too, on purpose."""
    assert after_import["names"] == PUBLIC_NAMES


@pytest.mark.parametrize(
    "module", ["flax", "sklearn", "matplotlib", "scipy", "momentum_jax.study", "jaxtyping"]
)
def test_importing_the_package_does_not_import_what_only_the_study_needs(after_import, module):
    """So the import is fast, and works with only JAX and Optax installed."""
    assert "momentum_jax" in after_import["modules"]
    assert module not in after_import["modules"]


def public_functions():
    """Returns all public functions by the names that users type."""
    for name in PUBLIC_NAMES:
        value = getattr(mj, name)
        if not inspect.ismodule(value):
            yield pytest.param(value, id=f"mj.{name}")
            continue
        for inner, function in inspect.getmembers(value, callable):
            if function.__module__.startswith(value.__name__) and not inner.startswith("_"):
                yield pytest.param(function, id=f"mj.{name}.{inner}")


@pytest.mark.parametrize("documented", list(public_functions()))
def test_every_public_name_is_documented_with_an_example(documented):
    """Each docstring has a doctest and mentions each parameter."""
    doc = inspect.getdoc(documented) or ""
    assert "Example:\n" in doc
    assert ">>> " in doc
    for name, parameter in inspect.signature(documented).parameters.items():
        stars = {parameter.VAR_POSITIONAL: "*", parameter.VAR_KEYWORD: "**"}.get(parameter.kind, "")
        assert f"  {stars}{name}: " in doc, name


def test_the_signatures_are_these():
    """Names, order, kinds and defaults of all parameters; to change one is to change this file."""
    lines = []
    for param in public_functions():
        function: Any = param.values[0]
        signature = inspect.signature(function)
        parameters = [
            parameter.replace(annotation=parameter.empty)
            for parameter in signature.parameters.values()
        ]
        lines.append(f"{param.id}{inspect.Signature(parameters)}")
    assert "\n".join(lines) + "\n" == SIGNATURES.read_text()


def digests():
    """Returns digests of the bits of updates, velocities and params after some steps, by method."""
    result = {}
    for name, tx in {
        "momentum, nesterov": mj.momentum(0.1, 0.99, nesterov=True),
        "trace": mj.trace(0.9, dampening=0.3),
    }.items():
        for wrap in (jax.jit, lambda update: update):
            update = wrap(tx.update)
            bits = hashlib.sha256()
            params, *grads = jax.device_put(normal_trees(9, 6), jax.devices()[0])
            state = tx.init(params)
            for g in grads:
                updates, state = update(g, state, params)
                params = mj.apply_updates(params, updates)
                for leaf in jax.tree.leaves((updates, state, params)):
                    bits.update(np.asarray(leaf).tobytes())
            result[f"{name}, {'jit' if wrap is jax.jit else 'eager'}"] = bits.hexdigest()
    return result


@pytest.fixture(scope="module")
def on_one_device():
    """Returns the same digests from a process with one device."""
    flags = os.environ["XLA_FLAGS"].replace("--xla_force_host_platform_device_count=8", "").strip()
    return in_a_fresh_process(
        "import jax, json, test_momentum as t\n"
        "print(json.dumps([jax.device_count(), t.digests()]))",
        XLA_FLAGS=flags,
    )


@pytest.mark.slow
def test_one_device_of_one_gives_the_bits_of_one_device_of_eight(on_one_device):
    """Sharding constraints do not change any number."""
    assert (on_one_device[0], jax.device_count()) == (1, 8)
    assert on_one_device[1] == digests()
