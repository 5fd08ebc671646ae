"""The registry of the types of frameworks, by which states are found and carried over."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import pytest
from jobs import scheduled

import momentum_jax
import momentum_jax._states as states
from momentum_jax._states import _rules

mj: Any = momentum_jax  # Optax types a state as any tree of arrays.


class Averages(NamedTuple):
    """A state of another framework."""

    m: Any
    steps_taken: Any


@jax.tree_util.register_pytree_with_keys_class
class Box:
    """A wrapper around an array of another framework."""

    def __init__(self, value):
        self.value = value

    def tree_flatten_with_keys(self):
        return [(jax.tree_util.GetAttrKey("value"), self.value)], None

    @classmethod
    def tree_unflatten(cls, _, children):
        return cls(*children)


@pytest.fixture(autouse=True)
def registry(monkeypatch):
    monkeypatch.setattr(_rules, "_FRAMEWORKS", dict(_rules._FRAMEWORKS))


def test_a_registered_step_count_is_that_of_a_new_schedule():
    old = Averages({"w": jnp.ones(2)}, jnp.int32(3))
    new = mj.momentum(scheduled).init({"w": jnp.ones(2)})
    assert mj.transplant(old, new)[0].count == 0
    rules = states.StateRules(step_count="steps_taken")
    types = states.FrameworkTypes(states={"Averages": rules})
    states.register_framework(__name__, types)
    assert mj.transplant(old, new)[0].count == 3


def test_a_registered_box_is_not_part_of_a_path():
    tree = {"w": Box(jnp.ones(2))}
    assert [path for path, _ in states.named_leaves(tree)[0]] == ["['w'].value"]
    states.register_framework(__name__, states.FrameworkTypes(has_states=False, boxes=("Box",)))
    assert [path for path, _ in states.named_leaves(tree)[0]] == ["['w']"]
