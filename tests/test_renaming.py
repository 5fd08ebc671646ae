"""Paths in states that are carried over: which arrays a new path stands for."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
import optax.contrib
import pytest
from jobs import KINDS, assert_same, begun, numbers

import momentum_jax

mj: Any = momentum_jax  # Optax types a state as any tree of arrays.


def test_the_longest_prefix_is_used_and_only_whole_names_match():
    tx = mj.momentum(0.1)
    tree = lambda: numbers(3)  # noqa: E731
    old = {"a": {"b": tree(), "c": tree()}, "ab": tree()}
    new = {"x": {"c": tree()}, "y": tree(), "ab": tree()}
    _, state = begun(tx, old)
    carried, _ = mj.transplant(
        state, tx.init(new), {"['a']": "['x']", "['a']['b']": "['y']"}, strict=True
    )
    expected = {"x": {"c": state.velocity["a"]["c"]}, "y": state.velocity["a"]["b"]}
    assert_same(carried.velocity, expected | {"ab": state.velocity["ab"]})
    rename = lambda path: path.replace("['a']['b']", "['y']").replace("['a']", "['x']")  # noqa: E731
    assert_same(mj.transplant(state, tx.init(new), rename, strict=True)[0], carried)


def test_group_labels_and_fields_are_not_part_of_a_path():
    """A group, a param and a field may have the same name."""
    params = {"velocity": numbers(3), "count": numbers(2), "a": numbers(4)}
    tx = optax.partition(
        {"a": mj.momentum(0.1), "velocity": mj.momentum(0.2)},
        {"velocity": "a", "count": "velocity", "a": "velocity"},
    )
    params, state = begun(tx, params)
    new = {"count": params["count"], "b": params["a"], "trace": params["velocity"]}
    other = mj.momentum(0.1)
    rename = {"['a']": "['b']", "['velocity']": "['trace']"}
    carried, _ = mj.transplant(state, other.init(new), rename, strict=True)
    before = mj.read_velocity(state)
    expected = {"count": before["count"], "b": before["a"], "trace": before["velocity"]}
    assert_same(carried.velocity, expected)


@pytest.mark.slow
def test_a_single_array_and_a_tuple_as_params():
    for params in (numbers(3), (numbers(3), numbers(4)), [numbers(3)]):
        for tx in (mj.momentum(0.1), mj.aggmo(0.1), optax.sgd(0.1, 0.9), optax.adam(0.1)):
            _, state = begun(tx, params)
            assert_same(mj.transplant(state, tx.init(params), strict=True)[0], state)


class Attention(NamedTuple):
    query: Any
    key: Any
    value: Any


def test_a_field_that_is_called_value_keeps_its_name():
    params = Attention(numbers(2), numbers(3), numbers(4))
    for tx in (mj.momentum(0.1), optax.adam(0.1)):
        _, state = begun(tx, params)
        new = {"q": params.query, "k": params.key, "v": params.value}
        names = {".query": "['q']", ".key": "['k']", ".value": "['v']"}
        carried, report = mj.transplant(state, tx.init(new), names, strict=True)
        assert set(report.kept) == {"['q']", "['k']", "['v']"}
        part = optax.masked(tx, Attention(False, False, True))
        inside, _ = mj.transplant(state, part.init(params))
        assert_same(jax.tree.leaves(inside)[-1], jax.tree.leaves(state)[-1])
        back = {new: old for old, new in names.items()}
        assert_same(mj.transplant(carried, tx.init(params), back, strict=True)[0], state)


@pytest.mark.parametrize("kind", ["adam", "lbfgs", "muon", "sgd", "kahan", "MultiSteps"])
def test_a_model_becomes_a_part_of_another_model(kind):
    """And is taken out again. Global values keep their places."""
    tx = {
        "lbfgs": lambda: optax.lbfgs(linesearch=None),
        "muon": lambda: optax.contrib.muon(0.1),
        "MultiSteps": lambda: optax.MultiSteps(
            optax.sgd(0.1, 0.9), 2, should_skip_update_fn=optax.skip_not_finite
        ),
        **KINDS,
    }[kind]()
    for params in ({"w": numbers((4, 4))}, numbers((4, 4)), jnp.float32(2.0)):
        if kind == "muon" and jnp.ndim(jax.tree.leaves(params)[0]) == 0:
            continue
        _, state = begun(tx, params)
        nested, _ = mj.transplant(state, tx.init({"m": params}), {"": "['m']"}, strict=True)
        leaves = [jax.tree.leaves(each) for each in (nested, state)]
        assert_same(*leaves)
        back, _ = mj.transplant(nested, tx.init(params), {"['m']": ""}, strict=True)
        assert_same(back, state)
