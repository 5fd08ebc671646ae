"""Counts of steps in states that are carried over."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from checkpoints import (
    FC,
    KERAS_OF_FC,
    PARAMS,
    WEIGHTS,
    fc,
    injected,
    load,
    rate,
    run,
    torch_state_dict,
)

import momentum_jax as mj
from momentum_jax.frameworks import (
    dump_keras,
    dump_optax,
    load_optax,
    momentum_from_trace,
    optax_sgd,
    torch_sgd,
)


def always(step, **extra):
    del step, extra
    return True


COUNTED = {
    "MultiSteps": lambda inner: optax.MultiSteps(inner, 2).gradient_transformation(),
    "conditionally_transform": lambda inner: optax.conditionally_transform(inner, always),
    "conditionally_mask": lambda inner: optax.conditionally_mask(inner, always),
    "add_noise": lambda inner: optax.chain(optax.add_noise(0.0, 0.5, 0), inner),
    "scale_by_schedule": lambda inner: optax.chain(inner, optax.scale_by_schedule(rate)),
    "inject_hyperparams": lambda inner: injected(
        lambda factor: optax.chain(inner, optax.scale(factor)), factor=rate
    ),
    "both": lambda inner: optax.conditionally_transform(
        optax.MultiSteps(optax.conditionally_mask(inner, always), 2).gradient_transformation(),
        always,
    ),
}


def counts_of(state):
    """All counts in a state, by path."""
    return {
        jax.tree_util.keystr(path): int(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(state)
        if getattr(path[-1], "name", None) in ("count", "step", "gradient_step")
    }


@pytest.mark.parametrize("case", [case for case in COUNTED if case != "both"])
def test_every_count_is_set(case):
    """Each function that fills a state sets the counts of all wrappers."""
    tx = COUNTED[case](torch_sgd(0.5, 0.5))
    filled = load(tx=tx, count=7)
    assert len(counts_of(filled)) >= 2
    assert set(counts_of(filled).values()) == {7}
    back = dump_optax(COUNTED[case](optax.sgd(0.5, 0.5)).init(FC), filled)
    assert set(counts_of(back).values()) == {7}
    assert set(counts_of(load_optax(tx.init(FC), back)).values()) == {7}
    inside = COUNTED[case](mj.momentum(0.5, 0.5)).init(FC)
    inside = momentum_from_trace(inside, filled, learning_rate=0.5)
    assert set(counts_of(inside).values()) == {7}
    dumped = dump_keras(inside, KERAS_OF_FC, names=list(WEIGHTS), to_params=fc)
    assert dumped["sgd/iteration"] == 7
    # If no count is given, it is not guessed for a schedule.
    if case == "MultiSteps":
        assert set(counts_of(load(tx=tx)).values()) == {1}
    else:
        with pytest.raises(ValueError, match="a schedule that depends on the number of steps"):
            load(tx=tx)


def test_schedules_inside_and_outside_multisteps_are_refused():
    """One count cannot be right inside MultiSteps and outside it."""
    tx = COUNTED["both"](torch_sgd(0.5, 0.5))
    with pytest.raises(ValueError, match=r"counts steps inside optax\.MultiSteps and gradients"):
        load(tx=tx, count=7)
    assert set(counts_of(load(torch_state_dict([]), WEIGHTS, tx=tx, count=0)).values()) == {0}


@pytest.mark.slow
def test_after_a_whole_step_multisteps_is_carried_over():
    """Training continues in both directions, with the count."""
    theirs = optax.MultiSteps(optax.sgd(rate, 0.5), 2).gradient_transformation()
    ours = optax.MultiSteps(optax_sgd(rate, 0.5), 2).gradient_transformation()
    end: Any
    expected, end = run(theirs, theirs.init(PARAMS), 12)
    params, state = run(theirs, theirs.init(PARAMS), 6)
    there: Any = load_optax(ours.init(PARAMS), state)
    assert int(there.gradient_step) == 3
    moved, there = run(ours, there, 6, 6, params)
    jax.tree.map(np.testing.assert_allclose, moved, expected)
    back = dump_optax(theirs.init(PARAMS), there)
    assert int(back.gradient_step) == 6
    end = end._replace(
        acc_grads=back.acc_grads
    )  # Gradients that a step has used are not read again.
    jax.tree.map(np.testing.assert_allclose, back, end)


def test_states_stacked_by_vmap_are_carried_over():
    """Each member has a count, and all are compared."""
    params = jnp.ones((4, 3))
    ours = optax.chain(mj.trace(0.9), optax.scale_by_learning_rate(lambda count: 0.1))
    theirs = optax.sgd(lambda count: 0.1, 0.9)
    grads = jnp.arange(12.0).reshape(4, 3)

    def stepped(tx) -> Any:
        state = jax.vmap(tx.init)(params)
        for _ in range(3):
            _, state = jax.vmap(tx.update)(grads, state)
        return state

    loaded = load_optax(jax.vmap(ours.init)(params), stepped(theirs))
    expected = stepped(ours)
    for a, b in zip(jax.tree.leaves(loaded), jax.tree.leaves(expected), strict=True):
        assert a.shape == b.shape
        np.testing.assert_allclose(a, b, rtol=1e-6)
    dumped = dump_optax(jax.vmap(theirs.init)(params), expected)
    for a, b in zip(jax.tree.leaves(dumped), jax.tree.leaves(stepped(theirs)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)
    apart = (expected[0]._replace(count=jnp.array([3, 3, 2, 3])), expected[1])
    with pytest.raises(ValueError, match=r"have counted different numbers of steps, \[2, 3\]"):
        dump_optax(jax.vmap(theirs.init)(params), apart)
