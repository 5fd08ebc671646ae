"""Finds and replaces the states that are nested in a state.

A state of Optax is a tree of states: those of a chain, those of the groups of `optax.partition`,
the state inside a wrapper. Each holds counts and similar values, and trees with one array per
param.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import jax

from momentum_jax import _velocity
from momentum_jax._state_types import has_several, has_velocity, velocities_in, with_velocities
from momentum_jax._states._rules import (
    COUNT_FIELD,
    is_box,
    is_group_field,
    is_param_node,
    is_state_of_framework,
)
from momentum_jax._storage import Stored

PyTree = Any


class HeldArray(NamedTuple):
    """One array that a state holds.

    Attributes:
      field: the field of the state; "velocity[1]" where there are several velocities.
      path: the path within the tree that the field holds, as `jax.tree_util.keystr` writes it. If
        the tree is like the params, this is the path of the param.
      stored: the array; for a velocity, with its scales.
    """

    field: str
    path: str
    stored: Stored


class FoundState(NamedTuple):
    """A state within a state.

    Attributes:
      node: the state.
      ancestors: the states around it, outermost first.
      position: where it is, as `jax.tree_util.keystr` writes it.
      dict_keys: the keys of the dicts on the way to it.
      group_labels: those of the keys that are labels of groups of params.
    """

    node: Any
    ancestors: tuple[Any, ...]
    position: str
    dict_keys: tuple[Any, ...]
    group_labels: tuple[Any, ...]


def find_states(state: PyTree) -> list[Any]:
    """Returns all states within a state, each before the states within it."""
    return [found.node for found in locate_states(state)]


def locate_states(state: PyTree) -> list[FoundState]:
    """Returns the same states, each with its position."""
    all_found = []

    def note(node, ancestors, path):
        key_pairs: Iterable[Any] = itertools.pairwise(("", *path))
        steps = [
            (parent, key) for parent, key in key_pairs if isinstance(key, jax.tree_util.DictKey)
        ]
        dict_keys = tuple(key.key for _, key in steps)
        labels = tuple(key.key for parent, key in steps if is_group_field(_field_name(parent)))
        position = jax.tree_util.keystr(path)
        all_found.append(FoundState(node, ancestors, position, dict_keys, labels))
        return node

    _walk(state, note, (), ())
    return all_found


def replace_states(state: PyTree, function: Callable[[Any], Any]) -> PyTree:
    """Returns the state with `function(node)` in place of each node that `find_states` lists.

    The function must not change the states within a node.
    """
    return _walk(state, lambda node, *_: function(node), (), ())


def held_arrays(node: PyTree) -> list[HeldArray]:
    """Returns the arrays of a state, without those of the states within it."""
    return [HeldArray(field, *leaf) for field, leaves, _ in _fields(node) for leaf in leaves]


def with_held_arrays(node: PyTree, arrays: Iterable[Stored]) -> PyTree:
    """Returns the state with these arrays, in the order of `held_arrays`."""
    arrays = iter(arrays)
    parts = [rebuild([next(arrays) for _ in leaves]) for _, leaves, rebuild in _fields(node)]
    if has_velocity(node):
        return with_velocities(node, parts[0], parts[1:])
    children, treedef = _children(node)
    if not _has_fields(node):
        return parts[0]
    parts = iter(parts)
    return treedef.unflatten(
        child if _field_holds_states(key, child) else next(parts) for key, child in children
    )


def named_leaves(tree: PyTree) -> tuple[list[tuple[str, Any]], Any]:
    """Returns the leaves of a tree, each with its path as text, and the structure."""
    leaves, treedef = jax.tree_util.tree_flatten_with_path(tree)
    # A framework may keep each array in a box, whose key is not part of the param's path.
    nodes = jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_box)
    box_paths = {jax.tree_util.keystr(path) for path, node in nodes if is_box(node)}

    def name(path):
        text = jax.tree_util.keystr(path)
        box_path = text.removesuffix(".value")
        return box_path if box_path in box_paths else text

    return [(name(path), leaf) for path, leaf in leaves], treedef


def _field_name(key):
    return getattr(key, "name", "")


def _walk(state, function, ancestors, path):
    children, treedef = _children(state)
    has_fields = _has_fields(state)
    if not has_fields and not any(_is_state(child) for _, child in children):
        return function(state, ancestors, path)
    if has_fields:
        state = function(state, ancestors, path)
        children, treedef = _children(state)
        ancestors = (*ancestors, state)
    return treedef.unflatten(
        _walk(child, function, ancestors, (*path, key))
        if not has_fields or _field_holds_states(key, child)
        else child
        for key, child in children
    )


def _children(node) -> tuple[list[tuple[Any, Any]], Any]:
    """Returns the direct children of a node by their keys, and its structure; a leaf has none."""
    found, treedef = jax.tree_util.tree_flatten_with_path(node, is_leaf=lambda x: x is not node)
    return [(path[-1] if path else None, child) for path, child in found], treedef


def _has_fields(node):
    """Whether a node consists of named fields, and does not take the place of a param."""
    if hasattr(node, "_fields"):
        return not is_param_node(node)
    keys = [key for key, _ in _children(node)[0]]
    named = [isinstance(key, jax.tree_util.GetAttrKey) for key in keys]
    return bool(named) and all(named) and not is_box(node)


def _is_state(node):
    """Whether a node is a state, in a place where states are expected, such as in a chain.

    There each node with fields is one, also in a chain within the chain.
    """
    if _has_fields(node) or _contains_framework_states(node):
        return True
    is_container = isinstance(node, (tuple, list, dict)) and not hasattr(node, "_fields")
    return is_container and any(_is_state(child) for _, child in _children(node)[0])


def _field_holds_states(key, child):
    """Whether a field holds states: of a framework, or of any type if its name says so."""
    return _contains_framework_states(child) or (
        key.name.endswith(("state", "states")) and _is_state(child)
    )


def _is_framework_state(node):
    return is_state_of_framework(node) and not jax.tree_util.all_leaves([node])


def _contains_framework_states(tree):
    return any(map(_is_framework_state, jax.tree.leaves(tree, is_leaf=_is_framework_state)))


def _fields(node) -> Iterator[tuple[str, list[tuple[str, Stored]], Callable[[list[Stored]], Any]]]:
    """Yields each field without states: its name, its arrays by path, and how to rebuild it."""
    if has_velocity(node):
        yield COUNT_FIELD, *_plain_arrays(node.count)
        field, several = node._fields[1], velocities_in(node)
        for i, stored in enumerate(several):
            leaves, treedef = _velocity.leaves_of(stored)

            def rebuild(leaves, treedef=treedef, stored=stored):
                return _velocity.together(treedef, leaves, stored)

            names = [name for name, _ in named_leaves(stored.values)[0]]
            named = list(zip(names, [leaf for _, leaf in leaves], strict=True))
            yield f"{field}[{i}]" if has_several(node) else field, named, rebuild
        return
    if not _has_fields(node):
        yield "", *_plain_arrays(node)
        return
    for key, child in _children(node)[0]:
        if not _field_holds_states(key, child):
            yield key.name, *_plain_arrays(child)


def _plain_arrays(tree):
    """Returns the arrays of a tree, which no codec stores, by path, and how to rebuild the tree."""
    leaves, treedef = named_leaves(tree)
    return (
        [(name, Stored(leaf)) for name, leaf in leaves],
        lambda arrays: treedef.unflatten(stored.values for stored in arrays),
    )
