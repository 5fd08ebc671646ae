"""Where in a state what is: one walk over all states within it, to find and to replace.

A state of Optax is a tree of states: of a chain, of the groups of `optax.partition`, of what a
wrapper is around. Each holds counts and the like, and trees of one array a param.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax

from momentum_jax import _velocity
from momentum_jax._recurrence import has_several, has_velocity, velocities_in, with_velocities
from momentum_jax._storage import Stored

PyTree = Any

# Types of Optax' that stand for params, and are no states.
_OF_PARAMS = ("LookaheadParams", "MaskedNode", "SplitRealAndImaginaryArrays")

# The field in which each of Optax' states counts the steps that a schedule follows.
COUNTERS = {
    "ScaleByScheduleState": "count",
    "WrappedScheduleState": "count",
    "InjectHyperparamsState": "count",
    "InjectStatefulHyperparamsState": "count",
    "ConditionallyTransformState": "step",
    "ConditionallyMaskState": "step",
    "AddNoiseState": "count",
    "MultiStepsState": "gradient_step",
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


def find(state: PyTree) -> list[Any]:
    """All states within a state, each before those within it."""
    return [node for node, _ in find_within(state)]


def find_within(state: PyTree) -> list[tuple[Any, tuple[Any, ...]]]:
    """The same, each with those around it."""
    found = []

    def note(node, around):
        found.append((node, around))
        return node

    _walk(state, note, ())
    return found


def replace(state: PyTree, function: Callable[[Any], Any]) -> PyTree:
    """The state, with `function(each)` in place of each state within it, as `find` lists them.

    The function leaves the states within each as they are.
    """
    return _walk(state, lambda node, _: function(node), ())


def held_by(node: PyTree) -> list[Held]:
    """What a state holds, without what is in the states within it."""
    return [Held(field, *one) for field, leaves, _ in _fields(node) for one in leaves]


def with_held(node: PyTree, stored: Iterable[Stored]) -> PyTree:
    """The state with these in place of what it holds, in that order."""
    stored = iter(stored)
    parts = [rebuild([next(stored) for _ in leaves]) for _, leaves, rebuild in _fields(node)]
    if has_velocity(node):
        return with_velocities(node, parts[0], parts[1:])
    names, children, treedef = _children(node)
    if names is None:
        return parts[0]
    parts = iter(parts)
    return treedef.unflatten(
        child if _contains_states(child) else next(parts) for child in children
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
    return COUNTERS.get(name)


def is_count(node: Any, held: Held) -> bool:
    """Whether an array that a state holds is the number of steps taken."""
    return held.field == ("count" if has_velocity(node) else clock_of(node))


def name_of(path: Sequence[Any]) -> str:
    """A path as text."""
    # Flax NNX keeps each array in a variable of its own, whose key says nothing.
    return jax.tree_util.keystr(tuple(path)).removesuffix(".value")


def _walk(state, function, around):
    names, children, treedef = _children(state)
    if names is None:
        if not _contains_states(state):
            return function(state, around)
        return treedef.unflatten(_walk(child, function, around) for child in children)
    state = function(state, around)
    _, children, treedef = _children(state)
    around = (*around, state)
    return treedef.unflatten(
        _walk(child, function, around) if _contains_states(child) else child for child in children
    )


def _children(node):
    """The names of the fields, if it is a state; what it is made of, and how."""
    found, treedef = jax.tree_util.tree_flatten_with_path(node, is_leaf=lambda x: x is not node)
    children = [child for _, child in found]
    keys = [path[-1] for path, _ in found if path]
    is_state = hasattr(node, "_fields") or (
        len(keys) > 0 and all(isinstance(key, jax.tree_util.GetAttrKey) for key in keys)
    )
    return ([key.name for key in keys] if is_state else None), children, treedef


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

            named = [(name_of(path), one) for path, one in leaves]
            yield f"{name}[{i}]" if has_several(node) else name, named, rebuild
        return
    names, children, _ = _children(node)
    if names is None:
        yield "", *_plain(node)
        return
    for name, child in zip(names, children, strict=True):
        if not _contains_states(child):
            yield name, *_plain(child)


def _plain(tree):
    leaves, treedef = jax.tree_util.tree_flatten_with_path(tree)
    return (
        [(name_of(path), Stored(leaf)) for path, leaf in leaves],
        lambda stored: treedef.unflatten(one.values for one in stored),
    )
