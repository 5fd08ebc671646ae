"""Momentum inside Optax's wrappers and in training loops of Flax and Equinox."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import flax.core
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference
from compiles import count_compiles
from flax import linen as nn
from flax import nnx
from flax.training.train_state import TrainState
from jax.sharding import AxisType

import momentum_jax as mj

SHAPES = {"dense": {"bias": (2,), "kernel": (3, 2)}, "scale": ()}
IS_DENSE = {"dense": {"bias": True, "kernel": True}, "scale": False}
STEPS = 7
ROUNDING = 1e-12  # float64, a few operations per step

both_modes = pytest.mark.parametrize("compiled", [False, True], ids=["eager", "jit"])
both_read_outs = pytest.mark.parametrize("nesterov", [False, True], ids=["plain", "nesterov"])


def decay(count):
    """A learning rate schedule; unlike Optax's, float64 if count is traced in 64-bit mode."""
    return 0.1 * 0.8**count


def warm_up(count):
    """A schedule of mu."""
    return 1 - 0.5 * 0.9**count


def normal_trees(seed, count, shapes=None, dtype=None):
    """Returns trees of normally distributed numbers, float64 in 64-bit mode."""
    rng = np.random.default_rng(seed)
    return [
        jax.tree.map(
            lambda shape: jnp.asarray(rng.normal(size=shape), dtype),
            SHAPES if shapes is None else shapes,
            is_leaf=lambda shape: isinstance(shape, tuple),
        )
        for _ in range(count)
    ]


def run(tx: Any, params: Any, grads: Any, *, compiled=True, overrides: Any = None) -> Any:
    """Returns the params after each step and the last state; traces a compiled step only once."""
    step = compiled_step if compiled else eager_step
    before = len(traces)
    state = tx.init(params)
    trajectory = []
    for count, gradient in enumerate(grads):
        override = overrides[count] if overrides else {}
        params, state = step(tx, params, state, gradient, override)
        trajectory.append(params)
    assert len(traces) - before <= (1 if compiled else len(grads))
    return trajectory, state


def eager_step(tx, params, state, grads, override):
    traces.append(tx)
    updates, state = tx.update(grads, state, params, **override)
    return optax.apply_updates(params, updates), state


traces = []
compiled_step = jax.jit(eager_step, static_argnums=0)


def by_hand(params, grads, learning_rate, mu, nesterov=False):
    """Returns the params after each step, from the NumPy loop."""
    leaves, treedef = jax.tree.flatten(params)
    columns = zip(*(map(np.asarray, jax.tree.leaves(tree)) for tree in grads), strict=True)
    paths = [
        np.asarray(leaf, np.float64)
        + np.cumsum(reference.momentum(list(column), learning_rate, mu, nesterov)[0], axis=0)
        for leaf, column in zip(leaves, columns, strict=True)
    ]
    return [treedef.unflatten([path[step] for path in paths]) for step in range(len(grads))]


def assert_close(actual, expected, rtol=ROUNDING, atol=1e-14):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(np.asarray(a, np.float64), b, rtol=rtol, atol=atol)


def assert_same_bits(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    assert jax.tree.map(jax.typeof, actual) == jax.tree.map(jax.typeof, expected)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def two_of_three(step: Any, **extra_args):
    del extra_args
    return step % 3 != 1


def always(step: Any, **extra_args):
    del extra_args
    return step >= 0


# Wrappers that change the gradients, the params or the steps that the inner one gets.
WRAPPERS: dict[str, Callable[[Any], Any]] = {
    "chain": lambda tx: optax.chain(
        optax.clip_by_global_norm(1.0), optax.add_decayed_weights(0.1), tx
    ),
    "chain around": lambda tx: optax.chain(optax.clip(0.5), tx, optax.scale(0.5)),
    "named_chain": lambda tx: optax.named_chain(("clip", optax.clip(0.5)), ("momentum", tx)),
    "masked": lambda tx: optax.masked(tx, IS_DENSE),
    "partition": lambda tx: optax.partition(
        {"moved": tx, "frozen": optax.set_to_zero()}, {"dense": "moved", "scale": "frozen"}
    ),
    "MultiSteps": lambda tx: optax.MultiSteps(tx, every_k_schedule=3),
    "apply_if_finite": lambda tx: optax.apply_if_finite(tx, max_consecutive_errors=2),
    "conditionally_mask": lambda tx: optax.conditionally_mask(tx, two_of_three),
    "conditionally_transform": lambda tx: optax.conditionally_transform(tx, two_of_three),
    "flatten": optax.flatten,
}


def in_both_modes(wrappers):
    """Runs each wrapper compiled, and eager unless it branches: an eager branch always compiles."""
    branching = {"MultiSteps", "apply_if_finite", "conditionally_mask", "conditionally_transform"}
    return pytest.mark.parametrize(
        ("wrapper", "compiled"),
        [pytest.param(name, True, id=f"{name}-jit") for name in wrappers]
        + [
            pytest.param(name, False, id=f"{name}-eager")
            for name in wrappers
            if name not in branching
        ],
    )


@in_both_modes(WRAPPERS)
@pytest.mark.usefixtures("x64")
def test_a_wrapper_does_with_momentum_what_it_does_with_optax_trace(wrapper, compiled):
    """With the learning rate inside, the reference is Optax's trace after Optax's scaling."""
    params, *grads = normal_trees(0, STEPS + 1)
    theirs = optax.chain(optax.scale_by_learning_rate(decay), optax.trace(0.9, nesterov=True))
    wrap = WRAPPERS[wrapper]
    ours = wrap(mj.momentum(decay, 0.9, nesterov=True))
    actual, _ = run(ours, params, grads, compiled=compiled)
    expected, _ = run(wrap(theirs), params, grads, compiled=compiled)
    assert_close(actual, expected)


@both_read_outs
@pytest.mark.usefixtures("x64")
def test_chained_trace_is_optax_sgd(nesterov):
    params, *grads = normal_trees(1, STEPS + 1)
    before = (optax.clip_by_global_norm(1.0), optax.add_decayed_weights(0.1))
    after = optax.scale_by_learning_rate(decay)
    ours = optax.chain(*before, mj.trace(0.9, nesterov=nesterov), after)
    theirs = optax.chain(*before, optax.sgd(decay, 0.9, nesterov=nesterov))
    actual, _ = run(ours, params, grads)
    expected, _ = run(theirs, params, grads)
    assert_close(actual, expected)


@pytest.mark.parametrize("reset_state", [False, True])
@pytest.mark.usefixtures("x64")
def test_lookahead_does_with_momentum_what_it_does_with_optax_sgd(reset_state):
    start, *grads = normal_trees(2, STEPS + 1)
    params = optax.LookaheadParams.init_synced(start)

    def wrap(tx):
        return optax.lookahead(tx, sync_period=3, slow_step_size=0.5, reset_state=reset_state)

    actual, state = run(wrap(mj.momentum(0.1, 0.9)), params, grads)
    expected, _ = run(wrap(optax.sgd(0.1, 0.9)), params, grads)
    assert_close(actual, expected)
    assert optax.tree.get(state, "count") == (STEPS % 3 if reset_state else STEPS)


# Wrappers that pass every gradient on unchanged.
TRANSPARENT: dict[str, Callable[[Any], Any]] = {
    "chain": lambda tx: optax.chain(optax.identity(), tx, optax.clip(1e6)),
    "named_chain": lambda tx: optax.named_chain(("first", optax.identity()), ("momentum", tx)),
    "masked": lambda tx: optax.masked(tx, True),
    "partition": lambda tx: optax.partition({"all": tx}, "all"),
    "MultiSteps": lambda tx: optax.MultiSteps(tx, every_k_schedule=1),
    "apply_if_finite": lambda tx: optax.apply_if_finite(tx, max_consecutive_errors=2),
    "conditionally_mask": lambda tx: optax.conditionally_mask(tx, always),
    "flatten": optax.flatten,
    "inject_hyperparams": lambda _: optax.inject_hyperparams(mj.momentum)(0.3, 0.3),
}


@in_both_modes(TRANSPARENT)
@pytest.mark.usefixtures("x64")
def test_extra_arguments_reach_momentum_through(wrapper, compiled):
    """A learning_rate and a mu for one call override the factory's values."""
    params, *grads = normal_trees(3, STEPS + 1)
    tx = TRANSPARENT[wrapper](mj.momentum(0.3, 0.3))
    overrides = [{"learning_rate": decay(count), "mu": warm_up(count)} for count in range(STEPS)]
    actual, _ = run(tx, params, grads, compiled=compiled, overrides=overrides)
    assert_close(actual, by_hand(params, grads, decay, warm_up))


@both_modes
def test_masked_leaves_no_trace_of_what_it_masks(compiled):
    """Other leaves move as if the masked leaf did not exist; it takes no memory."""
    params, *grads = normal_trees(4, STEPS + 1)
    tx = mj.momentum(decay, 0.9)
    wrapped = optax.chain(
        optax.masked(tx, IS_DENSE),
        optax.masked(optax.set_to_zero(), jax.tree.map(lambda dense: not dense, IS_DENSE)),
    )
    actual, state = run(wrapped, params, grads, compiled=compiled)
    dense, dense_state = run(
        tx, params["dense"], [gradient["dense"] for gradient in grads], compiled=compiled
    )
    assert_same_bits([step["dense"] for step in actual], dense)
    assert_same_bits([step["scale"] for step in actual], [params["scale"]] * STEPS)
    velocity = optax.tree.get(state, "velocity")
    assert_same_bits(velocity["dense"], dense_state.velocity)
    assert velocity["scale"] == optax.MaskedNode()


@both_modes
@pytest.mark.usefixtures("x64")
def test_partition_gives_each_group_its_own_hyperparameters(compiled):
    params, *grads = normal_trees(5, STEPS + 1)
    tx = optax.partition(
        {
            "kernels": mj.momentum(decay, 0.9, nesterov=True),
            "biases": mj.momentum(0.5, 0.99),
            "frozen": optax.set_to_zero(),
        },
        {"dense": {"kernel": "kernels", "bias": "biases"}, "scale": "frozen"},
    )
    actual, state = run(tx, params, grads, compiled=compiled)
    kernels = by_hand(params, grads, decay, 0.9, nesterov=True)
    biases = by_hand(params, grads, 0.5, 0.99)
    for step, kernel, bias in zip(actual, kernels, biases, strict=True):
        assert_close(step["dense"]["kernel"], kernel["dense"]["kernel"])
        assert_close(step["dense"]["bias"], bias["dense"]["bias"])
        assert_same_bits(step["scale"], params["scale"])
    # Two counts, the kernel's velocity and the bias's: no array for the other group's params.
    assert sorted(np.shape(leaf) for leaf in jax.tree.leaves(state)) == [(), (), (2,), (3, 2)]


@pytest.mark.usefixtures("x64")
def test_multi_steps_is_momentum_on_the_averaged_gradient():
    period, rounds = 2, 4
    params, *grads = normal_trees(6, period * rounds + 1)
    # Halves of integers: exact in float32, in which Optax averages.
    grads = jax.tree.map(jnp.round, grads)
    tx = optax.MultiSteps(mj.momentum(decay, 0.9), every_k_schedule=period)
    actual, state = run(tx, params, grads)
    averages = [
        jax.tree.map(lambda *leaves: np.mean(leaves, axis=0), *grads[start : start + period])
        for start in range(0, len(grads), period)
    ]
    assert_close(actual[period - 1 :: period], by_hand(params, averages, decay, 0.9))
    still = [params, *actual[period - 1 :: period]]
    for count, step in enumerate(actual):
        if (count + 1) % period:
            assert_same_bits(step, still[count // period])
    assert optax.tree.get(state, "count") == rounds  # The schedule counts real steps.


@pytest.mark.parametrize(("velocity_dtype", "bad"), [(None, -np.inf), ("bfloat16", np.nan)])
def test_a_non_finite_gradient_leaves_no_trace_in_apply_if_finite(velocity_dtype, bad):
    """Velocity and count do not change; later steps are as if the bad step had not occurred."""
    params = {
        "half": jnp.ones(3, jnp.bfloat16),
        "mixed": jnp.ones((2, 2), jnp.bfloat16),  # Its gradients are float32.
        "single": jnp.ones(4),
    }
    dtypes = {"half": jnp.bfloat16, "mixed": jnp.float32, "single": jnp.float32}
    shapes = {name: param.shape for name, param in params.items()}
    good = [
        {name: leaf.astype(dtypes[name]) for name, leaf in tree.items()}
        for tree in normal_trees(7, 5, shapes, jnp.float32)
    ]
    broken = good[2] | {"mixed": good[2]["mixed"].at[0, 1].set(bad)}
    tx: Any = optax.apply_if_finite(
        mj.momentum(decay, 0.9, velocity_dtype=velocity_dtype), max_consecutive_errors=3
    )

    _, before = run(tx, params, good[:2])
    for update in (tx.update, jax.jit(tx.update)):
        updates, after = update(broken, before, params)
        assert_same_bits(after.inner_state, before.inner_state)
        assert_same_bits(updates, jax.tree.map(jnp.zeros_like, broken))

    interrupted, last = run(tx, params, [*good[:2], broken, *good[2:]])
    smooth, expected = run(tx, params, good)
    assert_same_bits(interrupted[-1], smooth[-1])
    assert_same_bits(last.inner_state, expected.inner_state)
    assert last.total_notfinite == 1


@pytest.mark.parametrize(("nesterov", "compiled"), [(False, False), (True, True)])
@pytest.mark.usefixtures("x64")
def test_injected_hyperparams_can_be_changed_between_steps(nesterov, compiled):
    """New values in state.hyperparams apply from the next step and compile nothing."""
    params, *grads = normal_trees(8, STEPS + 1)
    tx: Any = optax.inject_hyperparams(mj.momentum)(learning_rate=0.3, mu=0.3, nesterov=nesterov)
    learning_rates, mus = np.linspace(0.1, 0.02, STEPS), np.linspace(0.5, 0.95, STEPS)
    update = jax.jit(tx.update) if compiled else tx.update
    expected = by_hand(
        params, grads, learning_rates.__getitem__, mus.__getitem__, nesterov=nesterov
    )
    state = tx.init(params)
    for count, gradient in enumerate(grads):
        state.hyperparams["learning_rate"] = jnp.asarray(learning_rates[count])
        state.hyperparams["mu"] = jnp.asarray(mus[count])
        with count_compiles() as compiles:
            updates, state = update(gradient, state, params)
        if count > 0:
            assert compiles.names == []
        params = mj.apply_updates(params, updates)
        assert_close(params, expected[count])


@both_modes
@pytest.mark.usefixtures("x64")
def test_injected_schedules_are_followed(compiled):
    params, *grads = normal_trees(9, STEPS + 1)
    tx = optax.inject_hyperparams(mj.momentum)(learning_rate=decay, mu=warm_up)
    actual, state = run(tx, params, grads, compiled=compiled)
    assert_close(actual, by_hand(params, grads, decay, warm_up))
    assert_close(state.hyperparams["mu"], warm_up(STEPS - 1))


@both_modes
def test_injection_with_a_static_velocity_dtype_changes_no_bit(compiled):
    params, *grads = normal_trees(10, STEPS + 1)
    inject = optax.inject_hyperparams(mj.momentum, static_args="velocity_dtype")
    injected = inject(learning_rate=0.1, mu=0.9, velocity_dtype=jnp.bfloat16)
    plain = mj.momentum(0.1, 0.9, velocity_dtype=jnp.bfloat16)
    actual, state = run(injected, params, grads, compiled=compiled)
    expected, expected_state = run(plain, params, grads, compiled=compiled)
    assert_same_bits(actual, expected)
    assert_same_bits(state.inner_state, expected_state)
    assert expected_state.velocity["scale"].dtype == jnp.bfloat16


@pytest.mark.parametrize("factory", [mj.momentum, mj.trace])
@pytest.mark.parametrize("hyperparam_dtype", [None, jnp.float32])
def test_injection_refuses_a_velocity_dtype_that_it_would_call_as_a_schedule(
    factory, hyperparam_dtype
):
    """inject_hyperparams would call jnp.bfloat16 with the count, and may cast the result."""
    inject = optax.inject_hyperparams(factory, hyperparam_dtype=hyperparam_dtype)
    with pytest.raises(TypeError, match="name it in static_args"):
        inject(0.1, velocity_dtype=jnp.bfloat16).init(jnp.ones(3))


@pytest.mark.parametrize(("hyperparam_dtype", "mu"), [(None, 1.0), (jnp.float32, 0.999)])
def test_injected_mu_is_as_exact_as_hyperparam_dtype(hyperparam_dtype, mu):
    """By default Optax rounds mu=0.999 to bfloat16 with bfloat16 params; we do not."""
    params, *grads = normal_trees(11, STEPS + 1, dtype=jnp.bfloat16)
    inject = optax.inject_hyperparams(mj.momentum, hyperparam_dtype=hyperparam_dtype)
    _, state = run(inject(learning_rate=0.125, mu=0.999), params, grads)
    assert float(state.hyperparams["mu"]) == np.float32(mu)
    exact = by_hand(jax.tree.map(jnp.zeros_like, params), grads, 0.125, mu)
    last = jax.tree.map(lambda now, before: now - before, exact[-1], exact[-2])
    assert_close(state.inner_state.velocity, last, rtol=1e-6, atol=1e-6)
    _, plain = run(mj.momentum(0.125, mu=mu), params, grads)
    assert_same_bits(state.inner_state, plain)


@pytest.mark.usefixtures("x64")
def test_optax_tree_get_and_set_find_velocity_and_count_in_a_chain():
    params, *grads = normal_trees(12, 4)
    tx = optax.chain(optax.clip(1e6), mj.momentum(decay, 0.9))
    _, state = run(tx, params, grads[:3])
    assert_same_bits(optax.tree.get(state, "velocity"), state[1].velocity)
    assert optax.tree.get(state, "count") == 3

    stopped = optax.tree.set(
        state, velocity=optax.tree.zeros_like(params), count=jnp.asarray(5, jnp.int32)
    )
    assert jax.tree.map(jax.typeof, stopped) == jax.tree.map(jax.typeof, state)
    updates, state = jax.jit(tx.update)(grads[0], stopped, params)
    by_schedule = jax.tree.map(lambda g: -decay(5) * np.asarray(g), grads[0])
    assert_close(updates, by_schedule)
    assert optax.tree.get(state, "count") == 6


@pytest.mark.usefixtures("x64")
def test_optax_tree_map_params_maps_the_velocity_and_nothing_else():
    params, *grads = normal_trees(13, 4)
    factors = {"dense": {"bias": 0.0, "kernel": 0.5}, "scale": 2.0}
    tx = optax.chain(optax.clip(1e6), mj.momentum(0.1, 0.9))
    _, state = run(tx, params, grads[:2])
    scaled = optax.tree.map_params(tx, lambda v, factor: factor * v, state, factors)
    assert_same_bits(optax.tree.get(scaled, "count"), optax.tree.get(state, "count"))
    updates, _ = tx.update(grads[2], scaled, params)
    expected = jax.tree.map(
        lambda first, second, third, factor: (
            0.9 * factor * (0.9 * -0.1 * np.asarray(first) - 0.1 * np.asarray(second))
            - 0.1 * np.asarray(third)
        ),
        *grads,
        factors,
    )
    assert_close(updates, expected)
    labels: Any = optax.tree.map_params(
        tx, lambda _: "velocity", state, transform_non_params=lambda _: "other"
    )
    assert labels[1].velocity == jax.tree.map(lambda _: "velocity", params)
    assert labels[1].count == "other"


@both_modes
def test_flatten_changes_no_bit(compiled):
    params, *grads = normal_trees(14, STEPS + 1)
    tx = mj.momentum(decay, 0.9, nesterov=True)
    flat, state = run(optax.flatten(tx), params, grads, compiled=compiled)
    assert_same_bits(flat, run(tx, params, grads, compiled=compiled)[0])
    assert optax.tree.get(state, "velocity").shape == (2 + 3 * 2 + 1,)


# One small network with a float32 and a bfloat16 layer, in four libraries.


class NnxNetwork(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Linear(4, 8, rngs=rngs)
        self.second = nnx.Linear(8, 1, param_dtype=jnp.bfloat16, rngs=rngs)
        self.calls = nnx.BatchStat(jnp.zeros(()))  # Not a param.

    def __call__(self, x):
        return self.second(jnp.tanh(self.first(x)))


class LinenNetwork(nn.Module):
    kernel_init: Any = nn.initializers.lecun_normal()

    @nn.compact
    def __call__(self, x):
        hidden = jnp.tanh(nn.Dense(8, name="first", kernel_init=self.kernel_init)(x))
        return nn.Dense(1, name="second", param_dtype=jnp.bfloat16)(hidden)


class EquinoxNetwork(eqx.Module):
    layers: dict[str, dict[str, jax.Array]]
    table: jax.Array  # Integers: not a param.
    activation: Callable[[jax.Array], jax.Array]

    def __call__(self, x):
        return plain_network(self.layers, x, self.activation)


def plain_network(params, x, activation=jnp.tanh):
    first, second = params["first"], params["second"]
    hidden = activation(x @ first["kernel"] + first["bias"])
    return hidden @ second["kernel"].astype(x.dtype) + second["bias"].astype(x.dtype)


def batches():
    return normal_trees(15, STEPS, {"x": (16, 4), "y": (16, 1)}, jnp.float32)


def mean_squares(predict, batch):
    return jnp.mean((predict(batch["x"]) - batch["y"]) ** 2)


def plain_loop(params, learning_rate, mu):
    """Clipping, momentum and the step in plain JAX: float32 inside, rounded once at the end."""

    @jax.jit
    def step(params, velocity, batch, learning_rate):
        def loss(params):
            return mean_squares(lambda x: plain_network(params, x), batch)

        grads = jax.tree.map(lambda g: jnp.clip(g, -0.5, 0.5), jax.grad(loss)(params))
        velocity = jax.tree.map(
            lambda v, g: mu * v - learning_rate * g.astype(jnp.float32), velocity, grads
        )
        moved = jax.tree.map(
            lambda w, v: (w.astype(jnp.float32) + v.astype(w.dtype)).astype(w.dtype),
            params,
            velocity,
        )
        return moved, velocity

    velocity = jax.tree.map(lambda w: jnp.zeros(w.shape, jnp.float32), params)
    for count, batch in enumerate(batches()):
        params, velocity = step(params, velocity, batch, learning_rate(count))
    return params, velocity


def assert_trained_as_by_plain_loop(params, velocity, start):
    expected_params, expected_velocity = plain_loop(start, decay, 0.9)
    assert jax.tree.map(lambda w: w.dtype, params) == jax.tree.map(lambda w: w.dtype, start)
    assert_close(params, expected_params, rtol=1e-6, atol=1e-7)
    assert_close(velocity, expected_velocity, rtol=1e-6, atol=1e-7)


def clipped_momentum(learning_rate=decay):
    return optax.chain(optax.clip(0.5), mj.momentum(learning_rate, 0.9))


@pytest.mark.slow
@pytest.mark.parametrize(("overriding", "compiled"), [(False, False), (False, True), (True, True)])
def test_nnx_optimizer_trains_as_a_plain_loop(overriding, compiled):
    model = NnxNetwork(nnx.Rngs(0))
    tx = clipped_momentum(0.3 if overriding else decay)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    start = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    differentiate = nnx.jit(nnx.grad(mean_squares))
    calls = []

    def step(model, optimizer, batch, override):
        calls.append(batch)
        grads = differentiate(model, batch)
        optimizer.update(model, grads, **override)

    step_once = nnx.jit(step) if compiled else step
    for count, batch in enumerate(batches()):
        override = {"learning_rate": decay(count)} if overriding else {}
        step_once(model, optimizer, batch, override)
    state = nnx.to_pure_dict(nnx.state(optimizer))["opt_state"][1]
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    assert_trained_as_by_plain_loop(params, state["velocity"], start)
    assert state["count"] == STEPS
    assert len(calls) == (1 if compiled else STEPS)


def test_nnx_gradients_of_another_filter_are_named():
    """nnx.grad may differentiate fewer params than the optimizer holds; the error names them."""
    model = NnxNetwork(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, mj.momentum(0.1), wrt=nnx.Param)
    kernels = nnx.DiffState(0, nnx.PathContains("kernel"))
    grads = nnx.grad(lambda model: mean_squares(model, batches()[0]), argnums=kernels)(model)
    message = (
        r"only in the gradients: none; "
        r"only in the velocity: \['first'\]\['bias'\], \['second'\]\['bias'\]\. Call init"
    )
    with pytest.raises(ValueError, match=message):
        optimizer.update(model, grads)


@pytest.mark.parametrize("container", [dict, flax.core.freeze], ids=["dict", "FrozenDict"])
def test_flax_train_state_trains_as_a_plain_loop(container):
    network = LinenNetwork()
    start = network.init(jax.random.key(0), batches()[0]["x"])["params"]
    train_state = TrainState.create(
        apply_fn=network.apply, params=container(start), tx=clipped_momentum()
    )
    calls = []

    @jax.jit
    def step(train_state, batch):
        calls.append(batch)

        def loss(params):
            return mean_squares(lambda x: train_state.apply_fn({"params": params}, x), batch)

        return train_state.apply_gradients(grads=jax.grad(loss)(train_state.params))

    for batch in batches():
        train_state = step(train_state, batch)
    velocity = optax.tree.get(train_state.opt_state, "velocity")
    assert type(velocity) is type(train_state.params)
    assert_trained_as_by_plain_loop(
        flax.core.unfreeze(train_state.params), flax.core.unfreeze(velocity), start
    )
    assert len(calls) == 1


def test_flax_partition_metadata_shards_the_velocity_like_the_params():
    """The velocity has the boxes of nn.with_partitioning, so they give its specs too."""
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    kernel_init = nn.with_partitioning(nn.initializers.lecun_normal(), ("data", "model"))
    network = LinenNetwork(kernel_init)
    x = batches()[0]["x"]

    def create(key):
        params = network.init(key, x)["params"]
        return TrainState.create(apply_fn=network.apply, params=params, tx=clipped_momentum())

    abstract = jax.eval_shape(create, jax.random.key(0))
    specs = nn.get_partition_spec(abstract)
    assert specs.opt_state[1].velocity == specs.params
    assert specs.params["first"]["kernel"] == jax.sharding.PartitionSpec("data", "model")
    assert specs.opt_state[1].count == jax.sharding.PartitionSpec()

    shardings = jax.tree.map(lambda spec: jax.sharding.NamedSharding(mesh, spec), specs)
    train_state = jax.jit(create, out_shardings=shardings)(jax.random.key(0))
    start = nn.meta.unbox(train_state.params)

    @jax.jit
    def step(train_state, batch):
        def loss(params):
            return mean_squares(lambda x: network.apply({"params": params}, x), batch)

        return train_state.apply_gradients(grads=jax.grad(loss)(train_state.params))

    for batch in batches():
        train_state = step(train_state, batch)
        velocity = train_state.opt_state[1].velocity
        assert isinstance(velocity["first"]["kernel"], nn.Partitioned)
        leaves = zip(*map(jax.tree.leaves, (velocity, shardings.params)), strict=True)
        for leaf, sharding in leaves:
            assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim)
    assert_trained_as_by_plain_loop(
        nn.meta.unbox(train_state.params),
        nn.meta.unbox(train_state.opt_state[1].velocity),
        start,
    )


def equinox_network() -> Any:
    dtypes = {"first": jnp.float32, "second": jnp.bfloat16}
    shapes = {
        "first": {"bias": (8,), "kernel": (4, 8)},
        "second": {"bias": (1,), "kernel": (8, 1)},
    }
    (numbers,) = normal_trees(16, 1, shapes, jnp.float32)
    layers = {
        name: {key: (0.5 * leaf).astype(dtypes[name]) for key, leaf in layer.items()}
        for name, layer in numbers.items()
    }
    return EquinoxNetwork(layers, jnp.arange(3), jnp.tanh)


def equinox_step(tx, is_param, model, state, batch):
    grads = equinox_gradients(model, batch)
    updates, state = tx.update(grads, state, eqx.filter(model, is_param))
    return eqx.apply_updates(model, updates), state


# Kept alive: if one is garbage-collected, JAX 0.7.0 corrupts memory when Python exits.
equinox_gradients = eqx.filter_jit(eqx.filter_grad(mean_squares))
compiled_equinox_step = eqx.filter_jit(equinox_step)


@pytest.mark.parametrize(
    ("is_param", "compiled"), [(eqx.is_inexact_array, True), (eqx.is_array, False)]
)
def test_equinox_model_trains_as_a_plain_loop(is_param, compiled):
    """In the filtered model, leaves that are not params are None, as is an integer's gradient."""
    model = equinox_network()
    start, table = model.layers, model.table
    tx: Any = clipped_momentum()
    state = tx.init(eqx.filter(model, is_param))
    step = compiled_equinox_step if compiled else equinox_step
    for batch in batches():
        model, state = step(tx, is_param, model, state, batch)
    velocity = state[1].velocity
    assert_trained_as_by_plain_loop(model.layers, velocity.layers, start)
    assert_same_bits(model.table, table)
    assert velocity.activation is None
    if is_param is eqx.is_inexact_array:
        assert velocity.table is None
    else:
        assert_same_bits(velocity.table, jnp.zeros_like(table))


@pytest.mark.parametrize("function", ["init", "apply_updates"])
def test_a_whole_equinox_model_is_refused_with_the_way_out(function):
    model = equinox_network()
    grads = eqx.filter_grad(mean_squares)(model, batches()[0])
    given = {
        "init": lambda: mj.momentum(0.1).init(model),
        "apply_updates": lambda: mj.apply_updates(model, grads),
    }
    message = r"the param at \.activation is .*, not an array\. .*equinox\.filter"
    with pytest.raises(TypeError, match=message):
        given[function]()
