"""Finds and replaces the states that are nested in a state: one walk.

A state of Optax is a tree of states: of a chain, of the groups of `optax.partition`, of what a
wrapper is around. Each holds counts and the like, and trees of one array a param.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import jax

from momentum_jax import _velocity
from momentum_jax._state_types import has_several, has_velocity, velocities_in, with_velocities
from momentum_jax._storage import Stored

PyTree = Any

# Types of Optax' that stand for params, and are no states.
_OF_PARAMS = ("LookaheadParams", "MaskedNode", "SplitRealAndImaginaryArrays")

# The field in which each of Optax' states counts the steps that a schedule follows.
_COUNTERS = {
    "ScaleByScheduleState": "count",
    "WrappedScheduleState": "count",
    "InjectHyperparamsState": "count",
    "InjectStatefulHyperparamsState": "count",
    "ConditionallyTransformState": "step",
    "ConditionallyMaskState": "step",
    "AddNoiseState": "count",
    "MultiStepsState": "gradient_step",
}


# What else Optax' wrappers remember: the field, its value where nothing would be lost, what is
# lost otherwise, and the remedy.
REMEMBERED = {
    "MultiStepsState": (
        "mini_step",
        0,
        "optax.MultiSteps has gathered {} gradients that no step has used",
        "Carry the state over after a whole step.",
    ),
    "ApplyEvery": (
        "count",
        0,
        "optax.apply_every has gathered {} gradients that no step has used",
        "Carry the state over after a whole step.",
    ),
    "LookaheadState": (
        "steps_since_sync",
        0,
        "optax.lookahead has taken {} fast steps since the slow params were synchronized",
        "Carry the state over after a synchronization.",
    ),
    "SAMState": (
        "steps_since_sync",
        0,
        "optax.contrib.sam has taken {} steps since it was synchronized",
        "Carry the state over after a synchronization.",
    ),
    "ApplyIfFiniteState": (
        "notfinite_count",
        0,
        "optax.apply_if_finite has counted {} gradients in a row that were not finite",
        "Carry the state over after a finite gradient.",
    ),
    "ReduceLROnPlateauState": (
        "scale",
        1,
        "optax.contrib.reduce_on_plateau has a scale of {}",
        "Multiply the learning rate by the scale, and give the state with a scale of 1.",
    ),
    "ScheduleFreeState": (
        "weight_sum",
        0,
        "optax.contrib.schedule_free has averaged params, with a sum of weights of {}",
        "Give the state of the wrapped optimizer, and the params to go on from.",
    ),
    "MechanicState": (
        "count",
        0,
        "optax.contrib.mechanize has taken {} steps from its initial params",
        "Give the state of the wrapped optimizer, and the params to go on from.",
    ),
    "GaLoreState": (
        "count",
        0,
        "optax.contrib.galore has taken {} steps in projected spaces",
        "Begin with the state that init returned.",
    ),
}


class Held(NamedTuple):
    """One array that a state holds.

    Attributes:
      field: the field of the state; "velocity[1]" where there are several velocities.
      path: the path in the tree that the field holds, as `jax.tree_util.keystr` writes it: where
        that is one of the params, the path of the param.
      stored: the array, of a velocity with its scales.
    """

    field: str
    path: str
    stored: Stored


class Found(NamedTuple):
    """A state within a state.

    Attributes:
      node: the state.
      around: those around it, outermost first.
      position: where it is, as `jax.tree_util.keystr` writes it.
      labels: the keys of the dicts on the way to it.
      group: those of them that are labels of groups of `optax.partition`.
    """

    node: Any
    around: tuple[Any, ...]
    position: str
    labels: tuple[Any, ...]
    group: tuple[Any, ...]


def find(state: PyTree) -> list[Any]:
    """All states within a state, each before those within it."""
    return [found.node for found in find_within(state)]


def find_within(state: PyTree) -> list[Found]:
    """The same, each with where it is."""
    all_found = []

    def note(node, around, path):
        pairs: Iterable[Any] = itertools.pairwise(("", *path))
        steps = [(before, key) for before, key in pairs if _is_key(key)]
        labels = tuple(key.key for _, key in steps)
        group = tuple(key.key for before, key in steps if _name(before) == "inner_states")
        all_found.append(Found(node, around, jax.tree_util.keystr(path), labels, group))
        return node

    _walk(state, note, (), ())
    return all_found


def replace(state: PyTree, function: Callable[[Any], Any]) -> PyTree:
    """The state, with `function(each)` in place of each state within it, as `find` lists them.

    The function leaves the states within each as they are.
    """
    return _walk(state, lambda node, *_: function(node), (), ())


def held_by(node: PyTree) -> list[Held]:
    """What a state holds, without what is in the states within it."""
    return [Held(field, *one) for field, leaves, _ in _fields(node) for one in leaves]


def with_held(node: PyTree, stored: Iterable[Stored]) -> PyTree:
    """The state with these in place of what it holds, in that order."""
    stored = iter(stored)
    parts = [rebuild([next(stored) for _ in leaves]) for _, leaves, rebuild in _fields(node)]
    if has_velocity(node):
        return with_velocities(node, parts[0], parts[1:])
    children, treedef = _children(node)
    if not _has_fields(node):
        return parts[0]
    parts = iter(parts)
    return treedef.unflatten(
        child if _holds_states(key, child) else next(parts) for key, child in children
    )


def optax_name(node: Any) -> str:
    """The name of a type of Optax', which not every version exports; else an empty one."""
    return type(node).__name__ if type(node).__module__.split(".")[0] == "optax" else ""


def clock_of(node: Any) -> str | None:
    """The field in which a state counts the steps that a schedule follows, if it does."""
    name = optax_name(node)
    # Without states of its own, what is injected are constants.
    if name.startswith("Inject") and not getattr(node, "hyperparams_states", True):
        return None
    return _COUNTERS.get(name)


def is_count(node: Any, held: Held) -> bool:
    """Whether an array that a state holds is the number of steps taken."""
    return held.field == ("count" if has_velocity(node) else _COUNTERS.get(optax_name(node)))


def named_leaves(tree: PyTree) -> tuple[list[tuple[str, Any]], Any]:
    """The leaves of a tree, each with its path as text, and the structure."""
    leaves, treedef = jax.tree_util.tree_flatten_with_path(tree)
    # Flax keeps each array in a variable, or a box, of its own, whose key says nothing.
    boxed = jax.tree_util.tree_leaves_with_path(tree, is_leaf=_is_box)
    boxes = {jax.tree_util.keystr(path) for path, each in boxed if _is_box(each)}

    def name(path):
        text = jax.tree_util.keystr(path)
        inner = text.removesuffix(".value")
        return inner if inner in boxes else text

    return [(name(path), leaf) for path, leaf in leaves], treedef


def _is_box(node):
    return any(
        base.__name__ in ("Variable", "VariableState", "AxisMetadata")
        and base.__module__.split(".")[0] == "flax"
        for base in type(node).__mro__
    )


def _is_key(key):
    return isinstance(key, jax.tree_util.DictKey)


def _name(key):
    return getattr(key, "name", "")


def _walk(state, function, around, path):
    children, treedef = _children(state)
    is_state = _has_fields(state)
    if not is_state and not any(_is_state(child) for _, child in children):
        return function(state, around, path)
    if is_state:
        state = function(state, around, path)
        children, treedef = _children(state)
        around = (*around, state)
    return treedef.unflatten(
        _walk(child, function, around, (*path, key))
        if not is_state or _holds_states(key, child)
        else child
        for key, child in children
    )


def _children(node) -> tuple[list[tuple[Any, Any]], Any]:
    """What it is made of, each part with its key, and how; a leaf is made of nothing."""
    found, treedef = jax.tree_util.tree_flatten_with_path(node, is_leaf=lambda x: x is not node)
    return [(path[-1] if path else None, child) for path, child in found], treedef


def _has_fields(node):
    """Whether it is made of named fields, and is not what stands for a param."""
    if hasattr(node, "_fields"):
        return optax_name(node) not in _OF_PARAMS
    keys = [key for key, _ in _children(node)[0]]
    named = [isinstance(key, jax.tree_util.GetAttrKey) for key in keys]
    return bool(named) and all(named) and not _is_box(node)


def _is_state(node):
    """Where states are expected, as in a chain: what has fields is one, also within a chain."""
    if _has_fields(node) or _contains_states(node):
        return True
    plain = isinstance(node, (tuple, list, dict)) and not hasattr(node, "_fields")
    return plain and any(_is_state(child) for _, child in _children(node)[0])


def _holds_states(key, child):
    """Whether a field of a state holds states: those that are known, or by its name others."""
    return _contains_states(child) or (key.name.endswith(("state", "states")) and _is_state(child))


def _is_known(node):
    return (
        type(node).__module__.split(".")[0] in ("optax", "momentum_jax")
        and optax_name(node) not in _OF_PARAMS
        and not jax.tree_util.all_leaves([node])
    )


def _contains_states(tree):
    return any(map(_is_known, jax.tree.leaves(tree, is_leaf=_is_known)))


def _fields(node) -> Iterator[tuple[str, list[tuple[str, Stored]], Callable[[list[Stored]], Any]]]:
    """Each field that holds no states: its name, what is in it by path, how it is made."""
    if has_velocity(node):
        yield "count", *_plain(node.count)
        name, several = node._fields[1], velocities_in(node)
        for i, stored in enumerate(several):
            leaves, treedef = _velocity.leaves_of(stored)

            def rebuild(leaves, treedef=treedef, stored=stored):
                return _velocity.together(treedef, leaves, stored)

            names = [name for name, _ in named_leaves(stored.values)[0]]
            named = list(zip(names, [one for _, one in leaves], strict=True))
            yield f"{name}[{i}]" if has_several(node) else name, named, rebuild
        return
    if not _has_fields(node):
        yield "", *_plain(node)
        return
    for key, child in _children(node)[0]:
        if not _holds_states(key, child):
            yield key.name, *_plain(child)


def _plain(tree):
    leaves, treedef = named_leaves(tree)
    return (
        [(name, Stored(leaf)) for name, leaf in leaves],
        lambda stored: treedef.unflatten(one.values for one in stored),
    )
