"""What belongs to no param, carried over: it goes with the params that it is about.

Counts, learning rates that are injected, scales, keys; and states of a user's own types.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest
from jobs import assert_same, begun, numbers, params_of, scheduled

import momentum_jax

mj: Any = momentum_jax  # Optax types a state as any tree of arrays.


def injected(learning_rate):
    make = optax.inject_hyperparams(mj.momentum, static_args=("nesterov", "velocity_dtype"))
    return make(learning_rate=learning_rate)


def rates(state):
    """The learning rate of each param's group."""
    found = {}
    for name, group in state.inner_states.items():
        inner = group.inner_state
        if hasattr(inner, "hyperparams"):
            for path, _ in jax.tree_util.tree_leaves_with_path(inner.inner_state.velocity):
                found[path[0].key, name] = round(float(inner.hyperparams["learning_rate"]), 4)
    return found


OFF = optax.set_to_zero()
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
    """Whatever the groups are called, and how many there are."""
    transforms, labels, expected = REGROUPED[name]
    params = {"enc": numbers(3), "head": numbers(4)}
    one = optax.partition({"a": injected(0.1), "b": injected(0.01)}, {"enc": "a", "head": "b"})
    _, state = begun(one, params)
    new = {name: params.get(name, numbers(2)) for name in labels}
    target = optax.partition(transforms, labels).init(new)
    carry = lambda old, new: mj.transplant(old, new)[0]  # noqa: E731
    assert rates((jax.jit(carry) if jitted else carry)(state, target)) == expected


def test_counts_and_sums_go_with_the_params_of_their_group():
    """Of groups that gather gradients over other numbers of steps."""
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


def test_an_empty_group_shifts_nothing():
    """Of two traces of a chain, one of which is for no param any more."""

    def make(mask):
        return optax.chain(optax.masked(mj.trace(0.5), mask), mj.trace(0.9), optax.scale(-0.1))

    params = {"enc": numbers(3), "head": numbers(4)}
    _, state = begun(make({"enc": True, "head": False}), params)
    new = make({"enc": False, "head": False}).init(params)
    carried, report = mj.transplant(state, new)
    assert_same(carried[1], state[1])
    assert report.dropped == ("['enc']",)


def test_a_count_of_adam_is_that_of_a_schedule():
    params = params_of("enc")
    _, state = begun(optax.adam(0.1), params)
    carried, _ = mj.transplant(state, optax.adam(scheduled).init(params), strict=True)
    assert [int(each.count) for each in carried] == [3, 3]


def test_counts_of_stacked_states():
    """One of several members, and more of them: their counts go on if they are alike."""
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


def test_what_a_wrapper_remembered_is_not_dropped_silently():
    """A scale of the learning rate, with the wrapper that had it."""
    params = params_of("enc")
    tx = mj.momentum(0.1)
    state: Any = optax.chain(tx, optax.contrib.reduce_on_plateau()).init(params)
    _, report = mj.transplant(state, tx.init(params), strict=True)
    assert report.dropped == ()
    reduced = (state[0], state[1]._replace(scale=jnp.float32(0.01)))
    with pytest.raises(ValueError, match=r"ReduceLROnPlateauState\.scale +dropped +0\.01"):
        mj.transplant(reduced, tx.init(params), strict=True)


def test_arrays_beside_a_state_are_known_by_their_places():
    tx, params = mj.momentum(0.1), params_of("enc")
    _, state = begun(tx, params)
    old = {"opt": state, "step": jnp.int32(7)}
    new = {"epoch": jnp.int32(0), "opt": tx.init(params), "step": jnp.int32(0)}
    for carry in (mj.transplant, jax.jit(lambda old, new: mj.transplant(old, new)[:1])):
        carried = carry(old, new)[0]
        assert (int(carried["epoch"]), int(carried["step"])) == (0, 7)
        assert_same(carried["opt"], state)


class Mine(NamedTuple):
    """A state of a user's own."""

    m: Any
    count: Any


def test_states_of_ones_own():
    """Alone in a chain, or beside one of Optax': what they hold goes by its path."""
    params = params_of("enc")
    renamed = {"encoder": params["enc"]}
    rename = {"['enc']": "['encoder']"}
    for tx in (mine(), optax.chain(mine())):
        _, state = begun(tx, params)
        for other in (mine(), optax.chain(mine()), optax.chain(optax.clip(1.0), mine())):
            carried, _ = mj.transplant(state, other.init(renamed), rename, strict=True)
            assert_same(jax.tree.leaves(carried), jax.tree.leaves(state))


def test_a_longer_chain_is_said_to_be_ambiguous():
    params = params_of("enc")
    _, state = begun(optax.chain(mj.momentum(0.2)), params)
    new = optax.chain(mj.momentum(0.1), mj.momentum(0.2)).init(params)
    carried, report = mj.transplant(state, new)
    assert_same(carried[0].velocity, state[0].velocity)
    assert [row.note for row in report.rows if row.path] == 4 * ["of 1 for 2"]


def test_what_a_place_cannot_hold_is_said():
    """A learning rate in an integer, a key of another kind; not one is cut off."""
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


def test_what_depends_on_the_shape_is_not_resized():
    """The factors of Adafactor are along other axes then."""
    tx = optax.adafactor(0.01, min_dim_size_to_factor=8)
    params = {"w": numbers((16, 32)), "other": numbers((8, 8))}
    _, state = begun(tx, params)
    new = tx.init({"w": numbers((64, 32)), "other": params["other"]})
    _, report = mj.transplant(state, new, resize=True)
    assert not report.resized
    assert "which means something else" in str(report)


def test_of_fewer_velocities_none_is_taken_for_another():
    params = params_of("enc")
    _, state = begun(mj.aggmo(0.1, (0.0, 0.9, 0.99)), params)
    with pytest.raises(ValueError, match="nothing of the old state can be carried"):
        mj.transplant(state, mj.aggmo(0.1, (0.9, 0.99)).init(params))


# Groups that become one, parts that move: what is not clear is never taken for known. ----------


ENC_HEAD = {"enc": numbers(3), "head": numbers(4)}
BOTH = {"enc": "a", "head": "b"}
ONE = {"enc": "z", "head": "z"}


def multi_steps(inner, every):
    return optax.MultiSteps(inner, every).gradient_transformation()


def plateau():
    return optax.chain(mj.momentum(0.1), optax.contrib.reduce_on_plateau())


def halved(state):
    """The state with every rate and scale halved, as a job might have them by then."""
    names = ("learning_rate", "scale")
    return jax.tree_util.tree_map_with_path(
        lambda path, x: x / 2 if getattr(path[-1], "key", getattr(path[-1], "name", 0)) in names
        else x,
        state,
    )  # fmt: skip


OF_GROUPS: dict[str, Any] = {
    "adam": lambda: optax.adam(0.1),
    "lion": lambda: optax.lion(0.1),
    "ema": lambda: optax.ema(0.9),
    "MultiSteps": lambda: multi_steps(mj.momentum(0.1), 4),
    "plateau": plateau,
    "injected": lambda: injected(0.05),
    "schedule": lambda: mj.momentum(scheduled),
}


@pytest.mark.parametrize("jitted", [False, True], ids=["eager", "jit"])
@pytest.mark.parametrize("kind", OF_GROUPS)
def test_groups_that_agree_become_one(kind, jitted):
    """What belongs to no param is as in both; and one group becomes two the same way."""
    tx = OF_GROUPS[kind]
    two, one = optax.partition({"a": tx(), "b": tx()}, BOTH), optax.partition({"z": tx()}, ONE)
    for before, after in ((two, one), (one, two), (two, tx()), (tx(), two)):
        steps = 0 if kind == "plateau" else 3  # It asks for the loss.
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
def test_groups_that_differ_become_one_with_what_init_made(jitted):
    """Of a rate or a scale nobody knows which; the report says both."""
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


def test_counts_of_groups_that_differ_are_refused():
    """The remedy is what it says."""
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


def inject_scale(factor):
    return optax.inject_hyperparams(optax.scale)(step_size=factor)


def scales(state):
    return [float(part.hyperparams["step_size"]) for part in state if hasattr(part, "hyperparams")]


def test_equal_parts_of_a_chain_keep_their_order():
    """Whatever comes before them, and between."""
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


def test_stacked_counts_and_rates_under_jit():
    """The same as eagerly: they go on if they are alike."""
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


@pytest.mark.parametrize("make", [lambda: injected(0.5), lambda: optax.adam(0.1)])
def test_groups_of_other_params_give_nothing(make):
    """Neither a rate nor Adam's count goes from one group to a wholly other one."""
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


def test_moments_of_zero_have_no_count_of_an_empty_group():
    """As a group that had no params counts on, and Adam would take them for old ones."""
    tx = optax.partition({"a": optax.adam(0.1), "b": optax.adam(0.1)}, {"enc": "a", "head": "a"})
    _, state = begun(tx, ENC_HEAD)
    new = {**ENC_HEAD, "new": numbers(2)}
    other = optax.partition(
        {"a": optax.adam(0.1), "b": optax.adam(0.1)}, {"enc": "a", "head": "a", "new": "b"}
    )
    carried: Any = mj.transplant(state, other.init(new))[0]
    counts = [carried.inner_states[name].inner_state[0].count for name in ("a", "b")]
    assert list(map(int, counts)) == [3, 0]


def test_an_empty_group_has_no_say():
    """It is about no param: not about all of them."""
    tx: Any = optax.partition({"a": injected(0.1), "b": injected(0.01)}, {"enc": "a", "head": "a"})
    _, state = begun(tx, ENC_HEAD)
    labels = {"enc": "a", "head": "z"}
    new: Any = optax.partition({"a": injected(1.0), "z": injected(1.0)}, labels).init(ENC_HEAD)
    carried, _ = mj.transplant(state, new)
    assert rates(carried) == {("enc", "a"): 0.1, ("head", "z"): 0.1}
    carried, report = mj.transplant(state, optax.chain(injected(1.0)).init(ENC_HEAD))
    assert carried[0].hyperparams["learning_rate"] == np.float32(0.1)
    assert "0.1 (new state: 1)" in str(report)


@pytest.mark.parametrize("jitted", [False, True], ids=["eager", "jit"])
def test_groups_without_arrays_are_known_by_their_labels(jitted):
    """Without momentum a state does not say of which params it is."""
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


SCHEDULE = optax.scale_by_schedule(scheduled)


def counts_of(state):
    return [int(count) for _, count in optax.tree.get_all_with_path(state, "count")]


def test_a_schedule_moves_into_multi_steps():
    """There it counts steps, and outside gradients."""
    momentum = mj.trace(0.9)
    outside = optax.chain(multi_steps(momentum, 2), SCHEDULE)
    inside = optax.chain(multi_steps(optax.chain(momentum, SCHEDULE), 2))
    _, state = begun(outside, ENC_HEAD, steps=6)
    assert counts_of(state) == [3, 6]
    carried, report = mj.transplant(state, inside.init(ENC_HEAD))
    assert counts_of(carried) == [3, 3]
    assert "of the old state's other counts" in str(report)
    # The reverse is not known: how many gradients there were to a step could have changed.
    _, state = begun(inside, ENC_HEAD, steps=6)
    carried, report = mj.transplant(state, outside.init(ENC_HEAD))
    assert counts_of(carried) == [3, 0]
    row = report.rows[-1]
    assert (row.array, row.outcome) == ("ScaleByScheduleState.count", "fresh")
    assert row.note == "the old state counts steps there, not gradients"
    with pytest.raises(ValueError, match="counts steps there, not gradients"):
        mj.transplant(state, outside.init(ENC_HEAD), strict=True)
    # Where the old state had no MultiSteps, each gradient was a step.
    _, state = begun(optax.chain(momentum, SCHEDULE), ENC_HEAD, steps=6)
    for new in (inside, outside):
        carried, _ = mj.transplant(state, new.init(ENC_HEAD))
        assert counts_of(carried) == [6, 6]
    # And taken off, the steps go on.
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


def mine():
    """A transformation whose state is a single one of a user's own type."""

    def init(params):
        return Mine(jax.tree.map(jnp.zeros_like, params), jnp.int32(0))

    def update(updates: Any, state: Any, params: Any = None) -> Any:
        del params
        m = jax.tree.map(lambda m, g: 0.9 * m + g, state.m, updates)
        return jax.tree.map(lambda m: -0.1 * m, m), Mine(m, state.count + 1)

    return optax.GradientTransformation(init, update)


OWN: dict[str, Any] = {
    "alone": mine,
    "in a chain": lambda: optax.chain(mine()),
    "masked": lambda: optax.masked(mine(), True),
    "MultiSteps": lambda: multi_steps(mine(), 1),
    "apply_if_finite": lambda: optax.apply_if_finite(mine(), 2),
    "group": lambda: optax.partition({"a": mine()}, lambda params: "a"),
    "kahan": lambda: mj.kahan(mine()),
}


@pytest.mark.parametrize("kind", OWN)
def test_a_state_of_ones_own_within_a_wrapper(kind):
    tx = OWN[kind]()
    params = params_of("enc")
    _, state = begun(tx, params)
    renamed, rename = {"encoder": params["enc"]}, {"['enc']": "['encoder']"}
    carried, _ = mj.transplant(state, tx.init(renamed), rename, strict=True)
    assert_same(jax.tree.leaves(carried), jax.tree.leaves(state))
    chain = optax.chain(optax.clip(1.0), mine()).init(renamed)
    if kind != "kahan":
        own: Any = mj.transplant(state, chain, rename)[0][1]
        assert own.count == 3
        assert np.any(own.m["encoder"]["w"])


def test_states_of_ones_own_in_groups():
    """Each goes with its params, whatever the groups are called."""
    two: Any = optax.partition({"a": mine(), "b": mine()}, BOTH)
    _, state = begun(two, ENC_HEAD)
    state.inner_states["b"] = begun(two, ENC_HEAD, steps=7)[1].inner_states["b"]
    other: Any = optax.partition({"z": mine(), "b": mine()}, {"enc": "z", "head": "b"})
    carried, _ = mj.transplant(state, other.init(ENC_HEAD), strict=True)
    assert_same(carried.inner_states["z"].inner_state, state.inner_states["a"].inner_state)
    assert_same(carried.inner_states["b"].inner_state, state.inner_states["b"].inner_state)


class Factors(NamedTuple):
    """A state with a momentum, and two factors a param, which are larger or smaller."""

    m: Any
    factors: Any


@pytest.mark.parametrize("shape", [(3, 4), (40, 2)])
def test_factors_of_ones_own_are_carried_beside_the_momentum(shape):
    def init(params):
        square = lambda w: {"l": jnp.eye(len(w)), "r": jnp.zeros((w.shape[1],))}  # noqa: E731
        return Factors(jax.tree.map(jnp.zeros_like, params), jax.tree.map(square, params))

    old = init({"enc": jnp.ones(shape)})._replace(m={"enc": jnp.full(shape, 7.0)})
    new = init({"encoder": jnp.ones(shape)})
    carried: Any = mj.transplant(old, new, {"['enc']": "['encoder']"}, strict=True)[0]
    assert_same(jax.tree.leaves(carried), jax.tree.leaves(old))
    wider = init({"enc": jnp.ones((shape[0] + 1, shape[1]))})
    carried = mj.transplant(old, wider, resize=True)[0]
    np.testing.assert_array_equal(carried.m["enc"][:-1], 7.0)
    np.testing.assert_array_equal(carried.m["enc"][-1], 0.0)


def test_one_array_as_params_beside_numbers_by_their_names():
    old = WithStats(jnp.full((3, 2), 7.0), {"loss": jnp.float32(2)})
    new = WithStats({"w": jnp.zeros((3, 2))}, {"loss": jnp.float32(0)})
    carried: Any = mj.transplant(old, new, {"": "['w']", "['loss']": "['loss']"}, strict=True)[0]
    np.testing.assert_array_equal(carried.m["w"], 7.0)
    assert carried.stats["loss"] == 2


class WithStats(NamedTuple):
    """A state with numbers by their names, beside what it holds of the params."""

    m: Any
    stats: Any


def test_numbers_by_their_names_are_no_params():
    def init(params):
        return WithStats(jax.tree.map(jnp.zeros_like, params), {"loss": jnp.float32(0)})

    def update(updates: Any, state: Any, params: Any = None) -> Any:
        del params
        loss = sum(jnp.sum(g**2) for g in jax.tree.leaves(updates))
        return updates, WithStats(updates, {"loss": loss})

    tx = optax.GradientTransformation(init, update)
    two: Any = optax.partition({"a": tx, "b": tx}, BOTH)
    _, state = begun(two, ENC_HEAD)
    other: Any = optax.partition({"z": tx, "b": tx}, {"enc": "z", "head": "b"})
    carried, report = mj.transplant(state, other.init(ENC_HEAD), strict=True)
    assert_same(carried.inner_states["z"].inner_state, state.inner_states["a"].inner_state)
    assert_same(carried.inner_states["b"].inner_state, state.inner_states["b"].inner_state)
    assert set(report.kept) == {"['head']", "['enc']", "['loss']"}


# Parts beside groups, and what is lost. ---------------------------------------------------------


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
def test_a_part_of_all_params_and_one_of_some_are_two(kind, jitted):
    make = PARTS[kind]
    carry = lambda old, new: mj.transplant(old, new, strict=True)[0]  # noqa: E731
    carried = (jax.jit(carry) if jitted else carry)(
        make(0.5, 2.0).init(ENC_HEAD), make(1.0, 1.0).init(ENC_HEAD)
    )
    assert sorted(steps_of(carried)) == [0.5, 2.0]


def test_what_is_of_all_params_does_not_go_to_a_new_group_too():
    """Whose params would have it twice."""
    old: Any = optax.chain(mj.momentum(0.1), inject_scale(0.5))
    group = optax.partition({"z": inject_scale(1.0), "off": OFF}, {"enc": "z", "head": "off"})
    new: Any = optax.chain(mj.momentum(0.1), inject_scale(1.0), group)
    carried, _ = mj.transplant(old.init(ENC_HEAD), new.init(ENC_HEAD))
    assert steps_of(carried) == [0.5, 1.0]
    # And one that was of all is that of each group, if there is none of all any more.
    every = optax.partition({"a": inject_scale(1.0), "b": inject_scale(1.0)}, BOTH)
    carried, _ = mj.transplant(inject_scale(0.5).init(ENC_HEAD), every.init(ENC_HEAD), strict=True)
    assert steps_of(carried) == [0.5, 0.5]


COUNTING: dict[str, Any] = {
    "rms": lambda: optax.scale_by_rms(bias_correction=True),
    "adan": lambda: optax.adan(0.1),
    "own": mine,
}


@pytest.mark.parametrize("kind", COUNTING)
def test_every_count_is_as_that_of_adam(kind):
    """Refused where they differ, and not that of an empty group."""
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


def test_gathered_gradients_of_other_numbers_are_refused():
    two: Any = optax.partition(dict.fromkeys("ab", multi_steps(mj.momentum(0.1), 4)), BOTH)
    _, state = begun(two, ENC_HEAD, steps=5)
    state.inner_states["b"] = begun(two, ENC_HEAD, steps=6)[1].inner_states["b"]
    one = optax.partition({"z": multi_steps(mj.momentum(0.1), 4)}, ONE).init(ENC_HEAD)
    with pytest.raises(
        ValueError, match=r"counted \[1, 2\].*MultiStepsState\.mini_step.*mini_step="
    ):
        mj.transplant(state, one)


def test_a_scale_that_some_params_lose_is_said():
    def reduced(state):
        return (state[0], state[1]._replace(scale=jnp.float32(0.01)))

    state = reduced(plateau().init(ENC_HEAD))
    some = optax.partition({"a": plateau(), "b": mj.momentum(0.1)}, BOTH).init(ENC_HEAD)
    _, report = mj.transplant(state, some)
    assert "ReduceLROnPlateauState.scale  dropped  0.01 of ['head']" in str(report)
    _, report = mj.transplant(state, plateau().init({"enc": ENC_HEAD["enc"]}))
    assert "['head']" in report.dropped
    assert "of ['head']" not in str(report)  # Which is no param any more.


def test_a_rate_that_is_lost_is_said():
    state: Any = injected(0.001).init(ENC_HEAD)
    _, report = mj.transplant(state, mj.momentum(0.1).init(ENC_HEAD), strict=True)
    rows = [row for row in report.rows if row.outcome == "noted"]
    assert [row.note for row in rows if "learning_rate" in row.array] == ["0.001"]


@pytest.mark.parametrize("jitted", [False, True], ids=["eager", "jit"])
def test_a_new_count_is_that_of_its_params(jitted):
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


def test_states_that_are_bare_trees_go_by_their_order():
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


@pytest.mark.parametrize(
    "wrap",
    [
        lambda: optax.chain(optax.chain(mine())),
        lambda: optax.chain(optax.named_chain(("a", mine()))),
        lambda: multi_steps(optax.chain(optax.chain(mine())), 1),
    ],
)
def test_a_state_of_ones_own_deep_in_chains(wrap):
    _, state = begun(wrap(), {"enc": ENC_HEAD["enc"]})
    new = wrap().init({"encoder": ENC_HEAD["enc"]})
    carried, _ = mj.transplant(state, new, {"['enc']": "['encoder']"}, strict=True)
    assert_same(jax.tree.leaves(carried), jax.tree.leaves(state))


def test_labels_are_those_of_groups_whatever_is_around_them():
    sgd = optax.inject_hyperparams(optax.sgd)
    old = optax.partition({"a": sgd(0.1), "b": sgd(0.01)}, BOTH).init(ENC_HEAD)
    new = optax.partition({"a": sgd(0.5), "b": sgd(0.5)}, BOTH)
    carried, _ = mj.transplant(old, optax.named_chain(("opt", new)).init(ENC_HEAD), strict=True)
    found = [float(x) for _, x in optax.tree.get_all_with_path(carried, "learning_rate")]
    np.testing.assert_allclose(found, [0.1, 0.01])


def test_numbers_of_python_in_the_new_state():
    """As a person sets them."""
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


class WithKey(NamedTuple):
    """A state with a key of random numbers."""

    m: Any
    rng: Any


def test_another_method_goes_on_with_the_count_alone():
    """No array means the same in it; the schedule goes on."""
    _, state = begun(optax.adam(scheduled), ENC_HEAD)
    carried, report = mj.transplant(state, mj.momentum(scheduled).init(ENC_HEAD))
    assert carried.count == 3
    assert report.fresh == ("['enc']", "['head']")


# Found by programs against an oracle. -----------------------------------------------------------


def unchanged(updates: Any, state: Any, params: Any = None) -> Any:
    del params
    return updates, state


def noisy(seed):
    return optax.chain(optax.add_noise(0.1, 0.5, jax.random.key(seed)), optax.trace(0.9))


@pytest.mark.parametrize("jitted", [False, True], ids=["eager", "jit"])
def test_keys_are_carried_and_of_several_none_is(jitted):
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


def test_a_rate_goes_on_where_momentum_is_added():
    sgd = optax.inject_hyperparams(optax.sgd)
    state: Any = sgd(0.001).init(ENC_HEAD)
    carried: Any = mj.transplant(state, sgd(0.1, momentum=0.9).init(ENC_HEAD))[0]
    assert carried.hyperparams["learning_rate"] == np.float32(0.001)
    two = optax.partition({"a": sgd(0.001), "b": sgd(0.002)}, BOTH).init(ENC_HEAD)
    after = optax.partition({"a": sgd(0.1, momentum=0.9), "b": sgd(0.1, momentum=0.9)}, BOTH)
    carried = mj.transplant(two, after.init(ENC_HEAD))[0]
    found = [float(x) for _, x in optax.tree.get_all_with_path(carried, "learning_rate")]
    np.testing.assert_allclose(found, [0.001, 0.002])


def test_the_same_inside_and_outside_multi_steps():
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


@pytest.mark.parametrize("jitted", [False, True], ids=["eager", "jit"])
def test_whole_numbers_that_are_no_counts(jitted):
    """A rate that was given as one, and the words of a key."""
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


def test_a_factor_whose_own_shape_stays_is_not_carried_to_another_axis():
    tx = optax.scale_by_factored_rms()
    params = {"w": numbers((256, 256)), "other": numbers((256, 256))}
    state = begun(tx, params)[1]
    _, report = mj.transplant(state, tx.init({**params, "w": jnp.ones((512, 256))}))
    assert report.kept == ("['other']",)
    assert set(report.fresh) == {"['w']"}
    assert set(mj.transplant(state, tx.init(params), strict=True)[1].kept) == set(report.kept) | {
        "['w']"
    }


def test_a_scale_of_an_empty_group_is_no_more_than_its_rate():
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


def test_one_array_as_params_beside_a_state_of_ones_own():
    own = optax.GradientTransformation(
        lambda params: WithStats(jnp.zeros_like(params), {"loss": jnp.zeros(())}),  # pyright: ignore[reportArgumentType]
        unchanged,
    )
    tx = optax.chain(optax.adam(0.1), own)
    _, state = tx.update(jnp.ones(3), tx.init(jnp.ones(3)))
    carried: Any = mj.transplant(state, tx.init(jnp.ones(5)), resize=True)[0]
    np.testing.assert_allclose(carried[0][0].mu, [0.1, 0.1, 0.1, 0, 0])
