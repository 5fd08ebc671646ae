"""Learning rates, scales and random keys that are carried over with the params they concern."""

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
    ONE,
    WithKey,
    assert_same,
    begun,
    halved,
    injected,
    multi_steps,
    numbers,
    params_of,
    plateau,
    rates,
    scheduled,
    unchanged,
)

import momentum_jax

mj: Any = momentum_jax  # Optax types a state as any tree of arrays.

REGROUPED: dict[str, Any] = {
    "renamed": (
        {"z": injected(0.1), "b": injected(0.01)},
        {"enc": "z", "head": "b"},
        {("enc", "z"): 0.1, ("head", "b"): 0.01},
    ),
    "frozen": (
        {"b": injected(0.01), "off": OFF},
        {"enc": "off", "head": "b"},
        {("head", "b"): 0.01},
    ),
    "one param moved to the other group": (
        {"a": injected(0.1), "b": injected(0.01)},
        {"enc": "b", "head": "b"},
        {("enc", "b"): 0.01, ("head", "b"): 0.01},
    ),
    "exchanged": (
        {"a": injected(0.01), "b": injected(0.1)},
        {"enc": "b", "head": "a"},
        {("head", "a"): 0.01, ("enc", "b"): 0.1},
    ),
    "another one before": (
        {"Adapter": injected(1.0), "a": injected(0.1), "b": injected(0.01)},
        {"enc": "a", "head": "b", "new": "Adapter"},
        {("enc", "a"): 0.1, ("head", "b"): 0.01, ("new", "Adapter"): 1.0},
    ),
}


@pytest.mark.parametrize("jitted", [False, True], ids=["eager", "jit"])
@pytest.mark.parametrize("name", REGROUPED)
def test_a_learning_rate_goes_with_the_params_of_its_group(name, jitted):
    """Whatever the labels and the number of the groups."""
    transforms, labels, expected = REGROUPED[name]
    params = {"enc": numbers(3), "head": numbers(4)}
    one = optax.partition({"a": injected(0.1), "b": injected(0.01)}, {"enc": "a", "head": "b"})
    _, state = begun(one, params)
    new = {name: params.get(name, numbers(2)) for name in labels}
    target = optax.partition(transforms, labels).init(new)
    carry = lambda old, new: mj.transplant(old, new)[0]  # noqa: E731
    assert rates((jax.jit(carry) if jitted else carry)(state, target)) == expected


def test_counts_and_accumulated_gradients_go_with_the_params_of_their_group():
    """The groups accumulate gradients over different numbers of steps."""
    params = {"enc": numbers(3), "head": numbers(4)}
    two, four = (optax.MultiSteps(mj.momentum(0.1), n).gradient_transformation() for n in (2, 4))
    _, state = begun(optax.partition({"a": two, "b": four}, {"enc": "a", "head": "b"}), params, 5)
    other = optax.partition({"z": two, "b": four}, {"enc": "z", "head": "b"})
    carried, _ = mj.transplant(state, other.init(params), strict=True)
    for before, after in (("a", "z"), ("b", "b")):
        assert_same(carried.inner_states[after].inner_state, state.inner_states[before].inner_state)


def test_a_scale_of_a_frozen_group_does_not_pass_to_another():
    params = {"enc": numbers(3), "head": numbers(4)}
    tx = lambda: optax.chain(mj.momentum(0.1), optax.contrib.reduce_on_plateau())  # noqa: E731
    both: Any = optax.partition({"a": tx(), "b": tx()}, {"enc": "a", "head": "b"})
    state = both.init(params)
    momentum, plateau = state.inner_states["a"].inner_state
    reduced = (momentum, plateau._replace(scale=jnp.float32(0.01)))
    state.inner_states["a"] = state.inner_states["a"]._replace(inner_state=reduced)
    frozen: Any = optax.partition({"b": tx(), "off": OFF}, {"enc": "off", "head": "b"})
    carried, _ = mj.transplant(state, frozen.init(params))
    assert float(carried.inner_states["b"].inner_state[1].scale) == 1
    carried, report = mj.transplant(state, optax.chain(tx()).init({"enc": params["enc"]}))
    assert float(carried[0][1].scale) == pytest.approx(0.01)
    assert "0.01 (new state: 1)" in str(report)


def test_a_scale_that_is_dropped_with_its_wrapper_is_reported():
    params = params_of("enc")
    tx = mj.momentum(0.1)
    state: Any = optax.chain(tx, optax.contrib.reduce_on_plateau()).init(params)
    _, report = mj.transplant(state, tx.init(params), strict=True)
    assert report.dropped == ()
    reduced = (state[0], state[1]._replace(scale=jnp.float32(0.01)))
    with pytest.raises(ValueError, match=r"ReduceLROnPlateauState\.scale +dropped +0\.01"):
        mj.transplant(reduced, tx.init(params), strict=True)


def test_the_report_shows_values_that_a_place_cannot_hold():
    """A learning rate in an integer, a key of another kind. No value is truncated."""
    params = params_of("enc")
    _, state = begun(injected(0.1), params)
    carried, report = mj.transplant(state, injected(1).init(params))
    assert int(carried.hyperparams["learning_rate"]) == 1
    assert "float32 is now int32" in str(report)
    make = lambda key: optax.chain(optax.add_noise(0.1, 0.5, key), optax.trace(0.9))  # noqa: E731
    _, state = begun(make(jax.random.key(7)), params)
    target = make(jax.random.key(1, impl="rbg")).init(params)
    carried, report = mj.transplant(state, target)
    assert types_of_keys(carried) == types_of_keys(target)
    assert "AddNoiseState.rng_key  fresh" in str(report)
    carried, _ = mj.transplant(state, make(jax.random.key(1)).init(params), strict=True)
    before = jax.random.key_data(state[0].rng_key)
    jax.jit(lambda state: state, donate_argnums=0)(carried)
    np.testing.assert_array_equal(jax.random.key_data(state[0].rng_key), before)


def types_of_keys(state):
    return [x.dtype for x in jax.tree.leaves(state[0])]


OF_GROUPS: dict[str, Any] = {
    "adam": lambda: optax.adam(0.1),
    "lion": lambda: optax.lion(0.1),
    "ema": lambda: optax.ema(0.9),
    "MultiSteps": lambda: multi_steps(mj.momentum(0.1), 4),
    "plateau": plateau,
    "injected": lambda: injected(0.05),
    "schedule": lambda: mj.momentum(scheduled),
}


@pytest.mark.slow
@pytest.mark.parametrize("jitted", [False, True], ids=["eager", "jit"])
@pytest.mark.parametrize("kind", OF_GROUPS)
def test_groups_with_equal_values_are_merged(kind, jitted):
    """The merged group has their common values. Splitting a group works the same way."""
    tx = OF_GROUPS[kind]
    two, one = optax.partition({"a": tx(), "b": tx()}, BOTH), optax.partition({"z": tx()}, ONE)
    for before, after in ((two, one), (one, two), (two, tx()), (tx(), two)):
        steps = 0 if kind == "plateau" else 3  # Its update needs the loss.
        state = halved(begun(before, ENC_HEAD, steps)[1])
        carry = lambda old, new: mj.transplant(old, new, strict=not jitted)[0]  # noqa: E731
        carried = (jax.jit(carry) if jitted else carry)(state, after.init(ENC_HEAD))
        expected = halved(begun(after, ENC_HEAD, steps)[1])
        for here, there in zip(jax.tree.leaves(carried), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(here, there, rtol=1e-6)


def with_scale(state, group, scale):
    momentum, reduced = state.inner_states[group].inner_state
    state.inner_states[group] = state.inner_states[group]._replace(
        inner_state=(momentum, reduced._replace(scale=jnp.float32(scale)))
    )
    return state


@pytest.mark.parametrize("jitted", [False, True], ids=["eager", "jit"])
def test_a_scale_that_differs_between_merged_groups_stays_as_init_made_it(jitted):
    """The report shows both old values."""
    two: Any = optax.partition({"a": plateau(), "b": plateau()}, BOTH)
    state = with_scale(with_scale(two.init(ENC_HEAD), "a", 0.25), "b", 0.5)
    target: Any = optax.partition({"z": plateau()}, ONE).init(ENC_HEAD)
    reports = []

    def carry(old, new):
        carried, report = mj.transplant(old, new)
        reports.append(str(report))
        return carried

    carried = (jax.jit(carry) if jitted else carry)(state, target)
    assert carried.inner_states["z"].inner_state[1].scale == 1
    if not jitted:
        assert "ReduceLROnPlateauState.scale  fresh    0.25 and 0.5" in reports[0]
        with pytest.raises(ValueError, match=r"(?s)strict=True.*0\.25 and 0\.5"):
            mj.transplant(state, target, strict=True)


def test_the_report_shows_a_scale_that_some_params_lose():
    def reduced(state):
        return (state[0], state[1]._replace(scale=jnp.float32(0.01)))

    state = reduced(plateau().init(ENC_HEAD))
    some = optax.partition({"a": plateau(), "b": mj.momentum(0.1)}, BOTH).init(ENC_HEAD)
    _, report = mj.transplant(state, some)
    assert "ReduceLROnPlateauState.scale  dropped  0.01 of ['head']" in str(report)
    _, report = mj.transplant(state, plateau().init({"enc": ENC_HEAD["enc"]}))
    assert "['head']" in report.dropped
    assert "of ['head']" not in str(report)  # It is not a param any more.


def test_the_report_shows_a_learning_rate_that_is_lost():
    state: Any = injected(0.001).init(ENC_HEAD)
    _, report = mj.transplant(state, mj.momentum(0.1).init(ENC_HEAD), strict=True)
    rows = [row for row in report.rows if row.outcome == "noted"]
    assert [row.note for row in rows if "learning_rate" in row.array] == ["0.001"]


def test_python_numbers_in_the_new_state():
    """A user may have set them."""
    old, new = injected(0.1).init(ENC_HEAD), injected(0.2).init(ENC_HEAD)
    new.hyperparams["learning_rate"] = 0.3  # pyright: ignore[reportAttributeAccessIssue]
    carried: Any = mj.transplant(old, new)[0]
    assert carried.hyperparams["learning_rate"] == np.float32(0.1)


@pytest.mark.parametrize("jitted", [False, True], ids=["eager", "jit"])
def test_keys_of_two_kinds_do_not_mix(jitted):
    state = lambda key: WithKey({"w": jnp.ones(2)}, key)  # noqa: E731
    carry = lambda old, new: mj.transplant(old, new)[0]  # noqa: E731
    carry = jax.jit(carry) if jitted else carry
    new = state(jax.random.key(1))
    carried: Any = carry(state(jax.random.PRNGKey(7)), new)
    assert jax.random.key_data(carried.rng).tolist() == jax.random.key_data(new.rng).tolist()


def noisy(seed):
    return optax.chain(optax.add_noise(0.1, 0.5, jax.random.key(seed)), optax.trace(0.9))


@pytest.mark.parametrize("jitted", [False, True], ids=["eager", "jit"])
def test_a_key_is_carried_over_but_not_one_of_several_that_differ(jitted):
    carry = lambda old, new: mj.transplant(old, new)[0]  # noqa: E731
    carry = jax.jit(carry) if jitted else carry
    state: Any = noisy(1).init(ENC_HEAD)
    target: Any = noisy(5).init(ENC_HEAD)
    same = lambda a, b: bool(jnp.all(jax.random.key_data(a) == jax.random.key_data(b)))  # noqa: E731
    carried: Any = carry(state, target)
    assert same(carried[0].rng_key, state[0].rng_key)
    two = optax.partition({"a": noisy(1), "b": noisy(2)}, BOTH).init(ENC_HEAD)
    carried = carry(two, target)
    assert same(carried[0].rng_key, target[0].rng_key)
    if not jitted:
        assert "AddNoiseState.rng_key  fresh    several keys" in str(mj.transplant(two, target)[1])
    equal = optax.partition({"a": noisy(1), "b": noisy(1)}, BOTH).init(ENC_HEAD)
    assert same(carry(equal, target)[0].rng_key, state[0].rng_key)


def test_a_learning_rate_is_carried_over_where_momentum_is_added():
    sgd = optax.inject_hyperparams(optax.sgd)
    state: Any = sgd(0.001).init(ENC_HEAD)
    carried: Any = mj.transplant(state, sgd(0.1, momentum=0.9).init(ENC_HEAD))[0]
    assert carried.hyperparams["learning_rate"] == np.float32(0.001)
    two = optax.partition({"a": sgd(0.001), "b": sgd(0.002)}, BOTH).init(ENC_HEAD)
    after = optax.partition({"a": sgd(0.1, momentum=0.9), "b": sgd(0.1, momentum=0.9)}, BOTH)
    carried = mj.transplant(two, after.init(ENC_HEAD))[0]
    found = [float(x) for _, x in optax.tree.get_all_with_path(carried, "learning_rate")]
    np.testing.assert_allclose(found, [0.001, 0.002])


@pytest.mark.parametrize("jitted", [False, True], ids=["eager", "jit"])
def test_integers_that_are_not_counts(jitted):
    """A learning rate that was given as an integer, and the words of a random key."""
    carry = lambda old, new: mj.transplant(old, new)[0]  # noqa: E731
    carry = jax.jit(carry) if jitted else carry
    sgd = lambda rate: optax.inject_hyperparams(optax.sgd)(rate, momentum=0.9)  # noqa: E731
    two = optax.partition({"a": sgd(1), "b": sgd(2)}, BOTH).init(ENC_HEAD)
    carried: Any = carry(two, sgd(3).init(ENC_HEAD))
    assert carried.hyperparams["learning_rate"] == 3

    def keyed(seed):
        init = lambda params: WithKey(params, jax.random.PRNGKey(seed))  # noqa: E731
        return optax.GradientTransformation(init, unchanged)

    two = optax.partition({"a": keyed(1), "b": keyed(2)}, BOTH).init(ENC_HEAD)
    target: Any = keyed(5).init(ENC_HEAD)
    carried = carry(two, target)
    np.testing.assert_array_equal(carried.rng, target.rng)
