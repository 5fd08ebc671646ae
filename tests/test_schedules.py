"""Schedules of mu: the formulas of the papers, from count 0, for ints and traced counts."""

import math
from fractions import Fraction
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import momentum_jax

mj: Any = momentum_jax  # Any: Optax's types of trees are too wide for arithmetic.
schedules = mj.schedules

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
    "nesterov": (schedules.nesterov_convex(), lambda t: t / (t + 3)),
    "demon": (
        schedules.demon(total_steps=1000),
        lambda t: 0.9 * (1 - t / 1000) / ((1 - 0.9) + 0.9 * (1 - t / 1000)) if t <= 1000 else 0.0,
    ),
}


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", CASES)
def test_the_formula(name):
    """To 1e-12 in float64, for a Python int, a NumPy int, a traced count and a batch."""
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
    """It is accepted as mu inside a scan, and counts from 0."""
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


def test_what_a_gradient_adds_in_all_falls_linearly_under_demon():
    """The contribution is the sum of the powers of mu: mu / (1 - mu)."""
    schedule = schedules.demon(total_steps=10, mu_init=0.9)
    mu = np.array([schedule(t) for t in range(11)])
    np.testing.assert_allclose(mu / (1 - mu), 9 * (1 - np.arange(11) / 10), rtol=1e-5, atol=1e-6)


LAST = 2**31 - 1
ENDS = [0, 1, 2, 3, 2**24 - 1, 2**24 + 1, 2**30, LAST - 3, LAST - 2, LAST - 1, LAST]


def demon(total, start, t):
    left = max(1 - Fraction(t, total), 0)
    return start * left / (1 - start + start * left)


# name: (schedule, the paper's formula in exact fractions)
AT_THE_ENDS = {
    "sutskever, period 1": (
        schedules.sutskever(mu_max=1.0, period=1),
        lambda t: 1 - Fraction(1, 2 * (t + 1)),
    ),
    "sutskever, longest": (schedules.sutskever(period=LAST), lambda t: Fraction(2 + t // LAST, 4)),
    "sutskever, longer": (schedules.sutskever(period=10**20), lambda t: Fraction(1, 2)),
    "sutskever, mu_max 0": (schedules.sutskever(mu_max=0, period=1), lambda t: Fraction(0)),
    "nesterov": (schedules.nesterov_convex(), lambda t: Fraction(t, t + 3)),
    "demon, 1": (schedules.demon(1), lambda t: demon(1, Fraction(0.9), t)),
    "demon, 3": (schedules.demon(3), lambda t: demon(3, Fraction(0.9), t)),
    "demon, longest": (schedules.demon(LAST), lambda t: demon(LAST, Fraction(0.9), t)),
    "demon, longer": (schedules.demon(LAST + 2), lambda t: demon(LAST + 2, Fraction(0.9), t)),
    "demon, far longer": (schedules.demon(10**50), lambda t: demon(10**50, Fraction(0.9), t)),
    "demon, near 1": (
        schedules.demon(LAST, mu_init=1 - 1e-12),
        lambda t: demon(LAST, Fraction(1 - 1e-12), t),
    ),
}


@pytest.mark.parametrize("wide", [False, True], ids=["float32", "float64"])
@pytest.mark.parametrize("name", AT_THE_ENDS)
def test_at_the_ends_of_the_counts(name, wide, request):
    """Each mu is accurate to the last digits and in [0, 1], up to the largest count."""
    if wide:
        request.getfixturevalue("x64")
    schedule, formula = AT_THE_ENDS[name]
    rtol = 1e-14 if wide else 5e-7
    counts = jnp.array(ENDS, jnp.int32)
    expected = [float(formula(t)) for t in ENDS]
    for got in ([schedule(t) for t in ENDS], jax.jit(schedule)(counts), jax.vmap(schedule)(counts)):
        np.testing.assert_allclose(got, expected, rtol=rtol)
        assert all(0 <= float(mu) <= 1 for mu in got)


@pytest.mark.parametrize("dtype", ["uint8", "int8", "uint32", "float32"])
def test_counts_of_other_dtypes(dtype):
    """A schedule may be longer than the largest count of the dtype."""
    count = jnp.array(100, dtype)
    for schedule in (
        schedules.demon(1000),
        schedules.nesterov_convex(),
        schedules.sutskever(period=30),
    ):
        np.testing.assert_allclose(schedule(count), schedule(100), rtol=1e-6)


WHOLES = [1000, np.int16(1000), np.int64(1000), np.uint32(1000), np.array(1000), jnp.int32(1000)]


@pytest.mark.parametrize("whole", WHOLES, ids=lambda whole: type(whole).__name__)
def test_a_whole_number_may_be_of_any_integer_type(as_shipped, whole):
    """For example the result of epochs * len(x) // batch."""
    assert float(schedules.demon(whole)(500)) == float(schedules.demon(1000)(500))
    assert float(schedules.sutskever(period=whole)(1000)) == 0.75
