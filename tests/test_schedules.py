"""Momentum over time: the papers' formulas, from count 0, on ints and on traced counts."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import momentum_jax
from momentum_jax import schedules

mj: Any = momentum_jax  # Optax's trees are of too many types to compute with.

COUNTS = [0, 1, 2, 99, 100, 249, 250, 251, 500, 1000, 9_999, 123_456]

# name: (schedule, the paper's formula in Python floats)
CASES = {
    "sutskever": (
        schedules.sutskever(),
        lambda t: min(1 - 2 ** (-1 - math.log2(math.floor(t / 250) + 1)), 0.99),
    ),
    "sutskever, other": (
        schedules.sutskever(mu_max=0.999, period=3),
        lambda t: min(1 - 2 ** (-1 - math.log2(math.floor(t / 3) + 1)), 0.999),
    ),
    "nesterov": (schedules.nesterov(), lambda t: t / (t + 3)),
    "demon": (
        schedules.demon(total_steps=1000),
        lambda t: 0.9 * (1 - t / 1000) / ((1 - 0.9) + 0.9 * (1 - t / 1000)) if t <= 1000 else 0.0,
    ),
}


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", CASES)
def test_the_formula(name):
    """To 1e-12 in float64, as a Python int, a NumPy int, traced and in a batch."""
    schedule, formula = CASES[name]
    expected = [formula(t) for t in COUNTS]
    batch = jnp.array(COUNTS, jnp.int32)
    for got in (
        [schedule(t) for t in COUNTS],
        [schedule(np.int32(t)) for t in COUNTS],
        [jax.jit(schedule)(jnp.int32(t)) for t in COUNTS],
        jax.vmap(schedule)(batch),
        schedule(batch),
    ):
        np.testing.assert_allclose(got, expected, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("name", CASES)
def test_as_mu_of_momentum(name):
    """Accepted as it is, counted from 0, inside a scan."""
    schedule, formula = CASES[name]
    tx = mj.momentum(0.5, schedule)
    state = tx.init(jnp.float32(0))

    def step(state, _):
        update, state = tx.update(jnp.float32(1), state)
        return state, update

    _, updates = jax.lax.scan(step, state, None, 20)
    v, expected = 0.0, []
    for t in range(20):
        v = formula(t) * v - 0.5
        expected.append(v)
    np.testing.assert_allclose(updates, expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: schedules.sutskever(mu_max=1.5), r"mu_max=1.5 must be in \[0, 1\]"),
        (lambda: schedules.sutskever(mu_max=math.nan), "mu_max=nan"),
        (lambda: schedules.sutskever(period=0), "period=0 must be a whole number, at least 1"),
        (lambda: schedules.demon(total_steps=0), "total_steps=0 must be a whole number"),
        (lambda: schedules.demon(10, mu_init=1.0), r"mu_init=1.0 must be in \[0, 1\)"),
    ],
)
def test_what_is_out_of_range_is_refused(make, message):
    """With the value and the rule."""
    with pytest.raises(ValueError, match=message):
        make()


def test_what_a_gradient_adds_in_all_falls_linearly_under_demon():
    """The sum of the powers of mu, from its own value on: mu / (1 - mu)."""
    schedule = schedules.demon(total_steps=10, mu_init=0.9)
    mu = np.array([schedule(t) for t in range(11)])
    np.testing.assert_allclose(mu / (1 - mu), 9 * (1 - np.arange(11) / 10), rtol=1e-5, atol=1e-6)
