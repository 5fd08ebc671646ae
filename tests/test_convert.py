"""Conversions between the states of `momentum` and `trace`."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from checkpoints import PARAMS, run

import momentum_jax as mj
from momentum_jax.frameworks import momentum_from_trace, optax_sgd, trace_from_momentum


def test_training_continues_with_the_other_form():
    """At a constant learning rate, in both directions, with the count."""
    momentum, trace = mj.momentum(0.25, 0.5), optax_sgd(0.25, 0.5)
    kinds = (mj.MomentumState, mj.TraceState)
    expected, _ = run(momentum, momentum.init(PARAMS), 12)
    for source, target, convert in (
        (momentum, trace, trace_from_momentum),
        (trace, momentum, momentum_from_trace),
    ):
        params, state = run(source, source.init(PARAMS), 6)
        state = convert(target.init(PARAMS), state, learning_rate=0.25)
        moved, after = run(target, state, 6, 6, params)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), moved, expected)
        assert {
            int(part.count)
            for part in jax.tree.leaves(after, is_leaf=lambda node: isinstance(node, kinds))
            if isinstance(part, kinds)
        } == {12}


def test_previous_params_of_adaptive_restart_are_carried_over():
    """They decide whether the first step restarts."""
    params: Any = {"w": jnp.ones(3)}
    scale = optax.scale_by_learning_rate(0.25)
    outside: Any = mj.adaptive_restart(optax.chain(mj.trace(0.5), scale))
    inside: Any = mj.adaptive_restart(mj.momentum(0.25, 0.5))
    state = outside.init(params)
    for _ in range(2):
        updates, state = outside.update({"w": jnp.array([1.0, -2.0, 0.5])}, state, params)
        params = optax.apply_updates(params, updates)
    carried = momentum_from_trace(inside.init(params), state, learning_rate=0.25)
    assert np.any(carried.previous_params["w"] != params["w"])
    back = trace_from_momentum(outside.init(params), carried, learning_rate=0.25)
    for each in (carried, back):
        np.testing.assert_array_equal(each.previous_params["w"], state.previous_params["w"])
    for sign in (1.0, -1.0):  # One direction continues, the other restarts.
        grads = {"w": sign * jnp.array([1.0, -2.0, 0.5])}
        expected, _ = outside.update(grads, state, params)
        found, _ = inside.update(grads, carried, params)
        np.testing.assert_array_equal(found["w"], expected["w"])
