"""Which array of an old state goes into which place of a new one: by meaning, params and order."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest
from jobs import (
    BOTH,
    ENC_HEAD,
    OFF,
    assert_same,
    begun,
    halved,
    inject_scale,
    injected,
    multi_steps,
    numbers,
    params_of,
    rates,
)

import momentum_jax

mj: Any = momentum_jax  # Optax types a state as any tree of arrays.


def test_a_transformation_of_no_params_does_not_shift_the_others():
    """One of two traces in a chain has no params any more."""

    def make(mask):
        return optax.chain(optax.masked(mj.trace(0.5), mask), mj.trace(0.9), optax.scale(-0.1))

    params = {"enc": numbers(3), "head": numbers(4)}
    _, state = begun(make({"enc": True, "head": False}), params)
    new = make({"enc": False, "head": False}).init(params)
    carried, report = mj.transplant(state, new)
    assert_same(carried[1], state[1])
    assert report.dropped == ("['enc']",)


def test_arrays_beside_a_state_are_matched_by_their_position():
    tx, params = mj.momentum(0.1), params_of("enc")
    _, state = begun(tx, params)
    old = {"opt": state, "step": jnp.int32(7)}
    new = {"epoch": jnp.int32(0), "opt": tx.init(params), "step": jnp.int32(0)}
    for carry in (mj.transplant, jax.jit(lambda old, new: mj.transplant(old, new)[:1])):
        carried = carry(old, new)[0]
        assert (int(carried["epoch"]), int(carried["step"])) == (0, 7)
        assert_same(carried["opt"], state)


def test_the_report_says_that_a_longer_chain_is_ambiguous():
    params = params_of("enc")
    _, state = begun(optax.chain(mj.momentum(0.2)), params)
    new = optax.chain(mj.momentum(0.1), mj.momentum(0.2)).init(params)
    carried, report = mj.transplant(state, new)
    assert_same(carried[0].velocity, state[0].velocity)
    assert [row.note for row in report.rows if row.path] == 4 * ["of 1 for 2"]


def test_factored_moments_are_not_resized():
    """The factors of Adafactor are along other axes after a change of shape."""
    tx = optax.adafactor(0.01, min_dim_size_to_factor=8)
    params = {"w": numbers((16, 32)), "other": numbers((8, 8))}
    _, state = begun(tx, params)
    new = tx.init({"w": numbers((64, 32)), "other": params["other"]})
    _, report = mj.transplant(state, new, resize=True)
    assert not report.resized
    assert "which means something else" in str(report)


def test_a_factor_is_not_carried_over_to_another_axis():
    tx = optax.scale_by_factored_rms()
    params = {"w": numbers((256, 256)), "other": numbers((256, 256))}
    state = begun(tx, params)[1]
    _, report = mj.transplant(state, tx.init({**params, "w": jnp.ones((512, 256))}))
    assert report.kept == ("['other']",)
    assert set(report.fresh) == {"['w']"}
    assert set(mj.transplant(state, tx.init(params), strict=True)[1].kept) == set(report.kept) | {
        "['w']"
    }


def scales(state):
    return [float(part.hyperparams["step_size"]) for part in state if hasattr(part, "hyperparams")]


def test_equal_parts_of_a_chain_keep_their_order():
    """Whatever parts are before them and between them."""
    clip = optax.clip(1.0)
    for momentum in (mj.momentum(0.1), optax.identity()):
        old = optax.chain(inject_scale(0.5), momentum, inject_scale(2.0)).init(ENC_HEAD)
        for chain in (
            (clip, clip, inject_scale(1.0), momentum, inject_scale(1.0)),
            (inject_scale(1.0), clip, momentum, clip, inject_scale(1.0)),
            (momentum, inject_scale(1.0), inject_scale(1.0)),
        ):
            carried, _ = mj.transplant(old, optax.chain(*chain).init(ENC_HEAD), strict=True)
            assert scales(carried) == [0.5, 2.0]


def test_traces_of_a_longer_chain_keep_their_order():
    _, state = begun(optax.chain(mj.trace(0.5), mj.trace(0.9)), ENC_HEAD)
    longer = optax.chain(optax.clip(1.0), mj.trace(0.5), mj.trace(0.9), mj.trace(0.99))
    carried, report = mj.transplant(state, longer.init(ENC_HEAD))
    assert_same(carried[1:3], state)
    assert not np.any(carried[3].trace["enc"])
    rows = [(row.outcome, row.note) for row in report.rows if row.path == "['enc']"]
    assert rows == [("kept", "of 2 for 3"), ("kept", "of 2 for 3"), ("fresh", "of 2 for 3")]


@pytest.mark.parametrize("make", [lambda: injected(0.5), lambda: optax.adam(0.1)])
def test_values_do_not_go_to_a_group_of_other_params(make):
    """Neither a learning rate nor the count of Adam."""
    old, new = (
        optax.chain(mj.trace(0.9), optax.partition({name: make(), "off": OFF}, labels))
        for name, labels in (
            ("a", {"enc": "a", "head": "off"}),
            ("b", {"enc": "off", "head": "b"}),
        )
    )
    state = halved(begun(old, ENC_HEAD)[1])
    carried, report = mj.transplant(state, new.init(ENC_HEAD))
    assert np.any(carried[0].trace["head"])
    group = carried[1].inner_states["b"].inner_state
    if hasattr(group, "hyperparams"):
        assert group.hyperparams["learning_rate"] == 0.5
    else:
        assert group[0].count == 0
    assert "the old state has none for these params" in str(report)


def test_the_count_of_an_empty_group_is_not_used():
    """An empty group keeps counting. Adam would treat its new moments of 0 as old ones."""
    tx = optax.partition({"a": optax.adam(0.1), "b": optax.adam(0.1)}, {"enc": "a", "head": "a"})
    _, state = begun(tx, ENC_HEAD)
    new = {**ENC_HEAD, "new": numbers(2)}
    other = optax.partition(
        {"a": optax.adam(0.1), "b": optax.adam(0.1)}, {"enc": "a", "head": "a", "new": "b"}
    )
    carried: Any = mj.transplant(state, other.init(new))[0]
    counts = [carried.inner_states[name].inner_state[0].count for name in ("a", "b")]
    assert list(map(int, counts)) == [3, 0]


def test_an_empty_group_concerns_no_param():
    """It does not concern all params."""
    tx: Any = optax.partition({"a": injected(0.1), "b": injected(0.01)}, {"enc": "a", "head": "a"})
    _, state = begun(tx, ENC_HEAD)
    labels = {"enc": "a", "head": "z"}
    new: Any = optax.partition({"a": injected(1.0), "z": injected(1.0)}, labels).init(ENC_HEAD)
    carried, _ = mj.transplant(state, new)
    assert rates(carried) == {("enc", "a"): 0.1, ("head", "z"): 0.1}
    carried, report = mj.transplant(state, optax.chain(injected(1.0)).init(ENC_HEAD))
    assert carried[0].hyperparams["learning_rate"] == np.float32(0.1)
    assert "0.1 (new state: 1)" in str(report)


def test_the_scale_of_an_empty_group_is_not_used():
    make = lambda: optax.chain(injected(0.1), optax.contrib.reduce_on_plateau())  # noqa: E731
    transforms: dict[Any, Any] = {"a": make(), "b": make()}
    enc = {"enc": numbers(3)}
    state = halved(optax.partition(transforms, {"enc": "a"}).init(enc))
    new: Any = optax.partition(transforms, {"enc": "a", "new": "b"}).init(
        {**enc, "new": numbers(2)}
    )
    carried: Any = mj.transplant(state, new)[0]
    assert carried.inner_states["a"].inner_state[1].scale == 0.5
    assert_same(carried.inner_states["b"].inner_state[1], new.inner_states["b"].inner_state[1])


@pytest.mark.parametrize("jitted", [False, True], ids=["eager", "jit"])
def test_groups_without_arrays_are_matched_by_their_labels(jitted):
    """Without momentum, a state does not show which params it has."""
    sgd = optax.inject_hyperparams(optax.sgd)
    old: Any = optax.partition({"a": sgd(0.1), "b": sgd(0.01)}, BOTH).init(ENC_HEAD)
    transforms: dict[Any, Any] = {"Adapter": sgd(1.0), "a": sgd(1.0), "b": sgd(1.0)}
    new = optax.partition(transforms, {**BOTH, "new": "Adapter"}).init(
        {**ENC_HEAD, "new": numbers(2)}
    )
    carry = lambda old, new: mj.transplant(old, new)[0]  # noqa: E731
    carried: Any = (jax.jit(carry) if jitted else carry)(old, new)
    found = {
        label: round(float(group.inner_state.hyperparams["learning_rate"]), 4)
        for label, group in carried.inner_states.items()
    }
    assert found == {"Adapter": 1.0, "a": 0.1, "b": 0.01}


def test_group_labels_are_found_inside_named_chains():
    sgd = optax.inject_hyperparams(optax.sgd)
    old = optax.partition({"a": sgd(0.1), "b": sgd(0.01)}, BOTH).init(ENC_HEAD)
    new = optax.partition({"a": sgd(0.5), "b": sgd(0.5)}, BOTH)
    carried, _ = mj.transplant(old, optax.named_chain(("opt", new)).init(ENC_HEAD), strict=True)
    found = [float(x) for _, x in optax.tree.get_all_with_path(carried, "learning_rate")]
    np.testing.assert_allclose(found, [0.1, 0.01])


def steps_of(state):
    return [float(x) for _, x in optax.tree.get_all_with_path(state, "step_size")]


MASK = {"enc": True, "head": False}


PARTS: dict[str, Any] = {
    "masked": lambda a, b: optax.chain(
        mj.momentum(0.1), inject_scale(a), optax.masked(inject_scale(b), MASK)
    ),
    "group": lambda a, b: optax.chain(
        inject_scale(a),
        optax.partition({"a": inject_scale(b), "off": OFF}, {"enc": "a", "head": "off"}),
    ),
}


@pytest.mark.parametrize("jitted", [False, True], ids=["eager", "jit"])
@pytest.mark.parametrize("kind", PARTS)
def test_a_part_for_all_params_and_a_part_for_some_are_kept_apart(kind, jitted):
    make = PARTS[kind]
    carry = lambda old, new: mj.transplant(old, new, strict=True)[0]  # noqa: E731
    carried = (jax.jit(carry) if jitted else carry)(
        make(0.5, 2.0).init(ENC_HEAD), make(1.0, 1.0).init(ENC_HEAD)
    )
    assert sorted(steps_of(carried)) == [0.5, 2.0]


def test_a_value_for_all_params_does_not_also_go_to_a_new_group():
    """Otherwise the params of the group would get it twice."""
    old: Any = optax.chain(mj.momentum(0.1), inject_scale(0.5))
    group = optax.partition({"z": inject_scale(1.0), "off": OFF}, {"enc": "z", "head": "off"})
    new: Any = optax.chain(mj.momentum(0.1), inject_scale(1.0), group)
    carried, _ = mj.transplant(old.init(ENC_HEAD), new.init(ENC_HEAD))
    assert steps_of(carried) == [0.5, 1.0]
    # If the new state has no part for all params, each group gets the value.
    every = optax.partition({"a": inject_scale(1.0), "b": inject_scale(1.0)}, BOTH)
    carried, _ = mj.transplant(inject_scale(0.5).init(ENC_HEAD), every.init(ENC_HEAD), strict=True)
    assert steps_of(carried) == [0.5, 0.5]


def test_states_that_are_bare_trees_are_matched_in_their_order():
    def bare(decay):
        def update(updates: Any, state: Any, params: Any = None) -> Any:
            return updates, jax.tree.map(lambda v, g: decay * v + g, state, updates)

        return optax.GradientTransformation(
            lambda params: jax.tree.map(jnp.zeros_like, params), update
        )

    _, state = begun(optax.chain(mj.trace(0.9), bare(0.0), bare(1.0)), ENC_HEAD)
    longer = optax.chain(mj.trace(0.9), optax.clip(1.0), bare(0.0), bare(1.0))
    carried, _ = mj.transplant(state, longer.init(ENC_HEAD), strict=True)
    assert_same((carried[0], *carried[2:]), state)


def test_equal_parts_inside_and_outside_multi_steps_are_kept_apart():
    parts = lambda: (multi_steps(optax.ema(0.9), 2), optax.ema(0.9))  # noqa: E731
    _, state = begun(optax.chain(*parts()), ENC_HEAD, steps=6)
    longer = optax.chain(optax.clip(1.0), *parts()).init(ENC_HEAD)
    carried, _ = mj.transplant(state, longer, strict=True)
    assert_same(carried[1:], state)
    rates_of = lambda state: [  # noqa: E731
        float(x) for _, x in optax.tree.get_all_with_path(state, "learning_rate")
    ]
    of = lambda a, b: (multi_steps(injected(a), 2), injected(b))  # noqa: E731
    state = optax.chain(*of(0.1, 0.01)).init(ENC_HEAD)
    longer = optax.chain(optax.clip(1.0), *of(1.0, 1.0)).init(ENC_HEAD)
    np.testing.assert_allclose(rates_of(mj.transplant(state, longer, strict=True)[0]), [0.1, 0.01])
