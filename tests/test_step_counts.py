"""Counts in states that are carried over: of schedules, of methods, of accumulated gradients."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jobs import (
    BOTH,
    ENC_HEAD,
    ONE,
    SCHEDULE,
    assert_same,
    begun,
    counts_of,
    halved,
    injected,
    mine,
    multi_steps,
    numbers,
    params_of,
    scheduled,
)

import momentum_jax

mj: Any = momentum_jax  # Optax types a state as any tree of arrays.


def test_a_new_schedule_takes_the_count_of_adam():
    params = params_of("enc")
    _, state = begun(optax.adam(0.1), params)
    carried, _ = mj.transplant(state, optax.adam(scheduled).init(params), strict=True)
    assert [int(each.count) for each in carried] == [3, 3]


def test_counts_of_stacked_states():
    """To one member, and to more members: counts are carried over if they are equal."""
    params = {"w": numbers((2, 3))}
    tx = mj.momentum(scheduled)
    state = jax.vmap(tx.init)(params)
    for _ in range(3):
        _, state = jax.vmap(tx.update)(params, state)
    carried, _ = mj.transplant(
        state, tx.init({"w": params["w"][0]}), resize=lambda path, old, shape: old[path][0]
    )
    assert (carried.count.shape, int(carried.count)) == ((), 3)
    more = jax.vmap(tx.init)({"w": numbers((4, 3))})
    carried, _ = mj.transplant(state, more, resize=True, strict=True)
    assert list(map(int, carried.count)) == [3, 3, 3, 3]
    apart = state._replace(count=jnp.array([3, 4]))
    with pytest.raises(ValueError, match=r"MomentumState\.count +fresh +\(2,\) -> \(\)"):
        mj.transplant(
            apart, tx.init({"w": params["w"][0]}), resize=lambda p, old, n: old[p][0], strict=True
        )


def test_stacked_counts_and_rates_under_jit():
    """As without jit, they are carried over if they are equal."""
    tx = optax.chain(injected(0.1), mj.momentum(scheduled))
    params = {"w": numbers((2, 3))}
    state = jax.vmap(tx.init)(params)
    for _ in range(3):
        _, state = jax.vmap(tx.update)(params, state)
    state = halved(state)
    for new in (jax.vmap(tx.init)({"w": numbers((4, 3))}), tx.init({"w": numbers(3)})):
        carry = lambda old, new: mj.transplant(  # noqa: E731
            old, new, resize=lambda path, old, shape: jnp.resize(old[path], shape)
        )[0]
        eager, jitted = carry(state, new), jax.jit(carry)(state, new)
        assert_same(eager, jitted)
        assert np.all(np.asarray(eager[1].count) == 3)
        assert np.all(np.asarray(eager[0].hyperparams["learning_rate"]) == np.float32(0.05))
    apart = (state[0], state[1]._replace(count=jnp.array([3, 4])))
    new = tx.init({"w": numbers(3)})
    for carried in (carry(apart, new), jax.jit(carry)(apart, new)):
        assert carried[1].count == 0


def test_counts_that_differ_between_merged_groups_are_refused():
    """The remedy works."""
    two: Any = optax.partition({"a": optax.adam(0.1), "b": optax.adam(0.1)}, BOTH)
    _, state = begun(two, ENC_HEAD)
    older = begun(two, ENC_HEAD, steps=7)[1].inner_states["b"]
    state.inner_states["b"] = older
    target = optax.partition({"z": optax.adam(0.1)}, ONE).init(ENC_HEAD)
    with pytest.raises(ValueError, match=r"(?s)counted \[3, 7\].*ScaleByAdamState\.count"):
        mj.transplant(state, target)
    alike = optax.tree.set(state, count=jnp.int32(7))
    carried, _ = mj.transplant(alike, target, strict=True)
    assert carried.inner_states["z"].inner_state[0].count == 7
    back = optax.partition({"b": optax.adam(0.1)}, {"enc": "b", "head": "b"}).init(ENC_HEAD)
    carried, report = mj.transplant(state, back)
    assert carried.inner_states["b"].inner_state[0].count == 7
    assert "of 3 and 7" in str(report)


COUNTING: dict[str, Any] = {
    "rms": lambda: optax.scale_by_rms(bias_correction=True),
    "adan": lambda: optax.adan(0.1),
    "own": mine,
}


@pytest.mark.parametrize("kind", COUNTING)
def test_counts_of_other_methods_are_treated_as_that_of_adam(kind):
    """They are refused if they differ, and not taken from an empty group."""
    tx = COUNTING[kind]
    two: Any = optax.partition({"a": tx(), "b": tx()}, BOTH)
    _, state = begun(two, ENC_HEAD)
    state.inner_states["b"] = begun(two, ENC_HEAD, steps=7)[1].inner_states["b"]
    with pytest.raises(ValueError, match=r"counted \[3, 7\]"):
        mj.transplant(state, optax.partition({"z": tx()}, ONE).init(ENC_HEAD))
    empty: Any = optax.partition({"a": tx(), "b": tx()}, {"enc": "a", "head": "a"})
    _, state = begun(empty, ENC_HEAD)
    filled: Any = optax.partition(
        {"a": tx(), "b": tx()}, {"enc": "a", "head": "a", "new": "b"}
    ).init({**ENC_HEAD, "new": numbers(2)})
    carried: Any = mj.transplant(state, filled)[0]
    assert_same(carried.inner_states["b"], filled.inner_states["b"])


def test_accumulated_gradients_of_different_numbers_are_refused():
    two: Any = optax.partition(dict.fromkeys("ab", multi_steps(mj.momentum(0.1), 4)), BOTH)
    _, state = begun(two, ENC_HEAD, steps=5)
    state.inner_states["b"] = begun(two, ENC_HEAD, steps=6)[1].inner_states["b"]
    one = optax.partition({"z": multi_steps(mj.momentum(0.1), 4)}, ONE).init(ENC_HEAD)
    with pytest.raises(
        ValueError, match=r"counted \[1, 2\].*MultiStepsState\.mini_step.*mini_step="
    ):
        mj.transplant(state, one)


def test_a_schedule_moves_into_multi_steps():
    """Inside it counts steps, outside gradients."""
    momentum = mj.trace(0.9)
    outside = optax.chain(multi_steps(momentum, 2), SCHEDULE)
    inside = optax.chain(multi_steps(optax.chain(momentum, SCHEDULE), 2))
    _, state = begun(outside, ENC_HEAD, steps=6)
    assert counts_of(state) == [3, 6]
    carried, report = mj.transplant(state, inside.init(ENC_HEAD))
    assert counts_of(carried) == [3, 3]
    assert "of the old state's other counts" in str(report)
    # Not the reverse: the number of gradients per step may have changed during training.
    _, state = begun(inside, ENC_HEAD, steps=6)
    carried, report = mj.transplant(state, outside.init(ENC_HEAD))
    assert counts_of(carried) == [3, 0]
    row = report.rows[-1]
    assert (row.array, row.outcome) == ("ScaleByScheduleState.count", "fresh")
    assert row.note == "the old state counts steps there, not gradients"
    with pytest.raises(ValueError, match="counts steps there, not gradients"):
        mj.transplant(state, outside.init(ENC_HEAD), strict=True)
    # If the old state had no MultiSteps, each gradient was a step.
    _, state = begun(optax.chain(momentum, SCHEDULE), ENC_HEAD, steps=6)
    for new in (inside, outside):
        carried, _ = mj.transplant(state, new.init(ENC_HEAD))
        assert counts_of(carried) == [6, 6]
    # If MultiSteps is removed, the count of steps continues.
    _, state = begun(inside, ENC_HEAD, steps=6)
    carried, _ = mj.transplant(state, optax.chain(momentum, SCHEDULE).init(ENC_HEAD))
    assert counts_of(carried) == [3, 3]


def test_injected_schedules_around_and_inside_multi_steps():
    def around(learning_rate):
        return multi_steps(mj.momentum(learning_rate), 2)

    outside = optax.inject_hyperparams(around)(learning_rate=scheduled)
    inside = multi_steps(
        optax.inject_hyperparams(mj.momentum, static_args=("nesterov", "velocity_dtype"))(
            learning_rate=scheduled
        ),
        2,
    )
    _, state = begun(outside, ENC_HEAD, steps=6)
    carried, _ = mj.transplant(state, inside.init(ENC_HEAD))
    assert set(counts_of(carried)) == {3}
    _, state = begun(inside, ENC_HEAD, steps=6)
    carried, report = mj.transplant(state, outside.init(ENC_HEAD))
    assert sorted(counts_of(carried)) == [0, 0, 3]
    assert str(report).count("counts steps there, not gradients") == 2


@pytest.mark.parametrize("jitted", [False, True], ids=["eager", "jit"])
def test_a_new_count_is_taken_from_the_counts_of_its_params(jitted):
    two: Any = optax.partition(dict.fromkeys("ab", mj.momentum(0.1)), BOTH)
    _, state = begun(two, ENC_HEAD)
    state.inner_states["b"] = begun(two, ENC_HEAD, steps=7)[1].inner_states["b"]
    after: dict[Any, Any] = {"a": mj.momentum(0.1), "b": optax.chain(mj.momentum(0.1), SCHEDULE)}
    carry = lambda old, new: mj.transplant(old, new)[0]  # noqa: E731
    carry = jax.jit(carry) if jitted else carry
    carried = carry(state, optax.partition(after, BOTH).init(ENC_HEAD))
    assert counts_of(carried) == [3, 7, 7]
    after["b"] = multi_steps(mj.momentum(0.1), 2)
    carried = carry(state, optax.partition(after, BOTH).init(ENC_HEAD))
    assert carried.inner_states["b"].inner_state.gradient_step == 7


def test_a_count_of_moments_goes_with_them_into_multi_steps():
    outside = optax.chain(multi_steps(mj.trace(0.9), 2), optax.scale_by_adam())
    inside = multi_steps(optax.chain(mj.trace(0.9), optax.scale_by_adam()), 2)
    _, state = begun(outside, ENC_HEAD, steps=6)
    carried: Any = mj.transplant(state, inside.init(ENC_HEAD))[0]
    assert_same(carried.inner_opt_state[1], state[1])


def test_another_method_takes_only_the_count():
    """No array has the same meaning in it, but the schedule continues."""
    _, state = begun(optax.adam(scheduled), ENC_HEAD)
    carried, report = mj.transplant(state, mj.momentum(scheduled).init(ENC_HEAD))
    assert carried.count == 3
    assert report.fresh == ("['enc']", "['head']")
