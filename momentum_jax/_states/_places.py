"""The places of a state: one per array, with what the array is and which params it concerns.

An array is either per-param (a velocity, a moment, a compensation) or a global value, which belongs
to no single param: a count, a scale, a hyperparameter, a random key.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from momentum_jax._momentum import TraceState
from momentum_jax._state_types import has_velocity, velocities_in
from momentum_jax._states._moving import decode
from momentum_jax._states._rules import (
    COUNT_FIELD,
    has_global_scalars,
    is_hyperparameter_field,
    is_masked_node,
    is_type_of_framework,
    kind_of,
    rules_of,
    step_count_field,
)
from momentum_jax._states._walk import HeldArray, held_arrays, locate_states

PyTree = Any


@dataclasses.dataclass(eq=False)
class Place:
    """One array of a state.

    Attributes:
      node: the state that holds the array.
      held: the array, with its field and path.
      is_per_param: whether the array belongs to a param; otherwise it is a global value.
      param_path: the path of that param, renamed; empty for a global value.
      position: where the state is.
      dict_keys: the keys of the dicts on the way to the state.
      group_labels: those that are labels of groups of params; None if the state is not for a part
        of the params only.
      accumulation_depth: how many states that accumulate gradients are around the array. Counts
        within them count steps, counts outside count gradients.
      concerns: for a global value, the paths of the params that it concerns. These are the params
        for which its state holds arrays. If it holds none, they are those for which the nearest
        state around it holds arrays, within its group. Empty if there are none.
      is_beside_arrays: for a global value, whether its own state holds arrays of these params.
      is_of_empty_group: for a global value, whether it is in a group without params.
      param_shapes: the shapes of all that the state holds of the param, if its type gives shapes a
        meaning.
      used: whether the array was carried over to another state.
    """

    node: Any
    held: HeldArray
    is_per_param: bool
    param_path: str
    position: str
    dict_keys: tuple[Any, ...]
    group_labels: tuple[Any, ...] | None
    accumulation_depth: int
    concerns: frozenset[str] = frozenset()
    is_beside_arrays: bool = False
    is_of_empty_group: bool = False
    param_shapes: tuple[tuple[str, tuple[int, ...]], ...] = ()
    used: bool = False

    @property
    def values(self) -> Any:
        """The array as it is stored."""
        return self.held.stored.values

    @property
    def is_velocity(self) -> bool:
        """Whether the array is stored by a codec."""
        return has_velocity(self.node) and self.is_per_param

    @property
    def meaning(self) -> tuple[Any, ...]:
        """What the array is, whichever param it belongs to: equal for arrays that correspond."""
        kind = kind_of(self.node)
        if not self.is_per_param:
            # A value that no state with fields holds is known by its position alone.
            where = self.held.path if self.held.field else self.position
            return kind, self.held.field, where
        if kind is TraceState or has_velocity(self.node):
            # With several velocities: the one of the same index, among the same number of them.
            index = self.held.field.partition("[")[1:]
            return kind, index, len(velocities_in(self.node)) if has_velocity(self.node) else 1
        return kind, self.held.field

    @property
    def label(self) -> str:
        """The type and the field of the state, for messages."""
        field = self.held.field + ("" if self.is_per_param else self.held.path)
        return f"{type(self.node).__name__}.{field}" if field else "the state"

    @property
    def is_step_count(self) -> bool:
        """Whether this is the number of steps that a schedule, or a velocity, has taken."""
        return self.held.field == step_count_field(self.node)

    @property
    def is_count(self) -> bool:
        """Whether this is a step count or another count, such as that of Adam for its averages."""
        dtype = jnp.asarray(self.values).dtype
        return self.is_step_count or (
            not self.is_per_param
            and bool(self.held.field)
            and not is_hyperparameter_field(self.held.field)
            and jnp.issubdtype(dtype, jnp.signedinteger)
            and rules_of(self.node).has_step_counts
        )

    def decoded(self) -> jax.Array:
        """Returns the array as floats."""
        stored = jax.tree.map(jnp.asarray, self.held.stored)
        return decode(stored) if self.is_velocity else stored.values


def places_of(state: PyTree, renamed: Callable[[str], str] = lambda path: path) -> list[Place]:
    """Returns the place of each array, in the order of `find_states` and `held_arrays`."""
    pairs = [(found, held) for found in locate_states(state) for held in held_arrays(found.node)]
    # What may be per-param is in trees of params, unless the params are a single array.
    params_are_tree = any(
        held.path and not _is_global_field(found.node, held) for found, held in pairs
    )
    largest_fields = _LargestFields(pairs)
    places: list[Place] = []
    # By the identity of a state: the paths of the params it, or a state within it, has arrays of.
    paths_within: dict[int, set[str]] = {}
    nodes_with_arrays: set[int] = set()
    shapes: dict[Any, list[Any]] = {}
    for found, held in pairs:
        is_per_param = _is_per_param(found.node, held, params_are_tree, largest_fields)
        lineage = (*found.ancestors, found.node)
        rules = [rules_of(node) for node in lineage]
        place = Place(
            node=found.node,
            held=held,
            is_per_param=is_per_param,
            param_path=renamed(held.path) if is_per_param else "",
            position=found.position,
            dict_keys=found.dict_keys,
            group_labels=found.group_labels if any(r.selects_params for r in rules) else None,
            accumulation_depth=sum(r.accumulates_gradients for r in rules),
        )
        places.append(place)
        if is_per_param and largest_fields.is_certain(found.node, held):
            nodes_with_arrays.add(id(found.node))
            for node in lineage:
                paths_within.setdefault(id(node), set()).add(place.param_path)
        if is_per_param and rules_of(found.node).shapes_have_meaning:
            shape = np.shape(place.values)
            shapes.setdefault((id(found.node), held.path), []).append((held.field, shape))
    all_paths = frozenset().union(*paths_within.values())
    concerns: dict[str, frozenset[str]] = {}
    for place, (found, held) in zip(places, pairs, strict=True):
        if not place.is_per_param:
            if place.position not in concerns:
                concerns[place.position] = _concerned_params(found, paths_within, all_paths)
            place.concerns = concerns[place.position]
            place.is_beside_arrays = id(place.node) in nodes_with_arrays
            place.is_of_empty_group = not place.concerns and _is_in_empty_group(found)
        place.param_shapes = tuple(shapes.get((id(place.node), held.path), ()))
    return places


def step_counts(places: list[Place]) -> list[Place]:
    """Returns the step counts; if there are none, the counts that methods keep for themselves."""
    return [place for place in places if place.is_step_count] or [
        place
        for place in places
        if place.held.field == COUNT_FIELD and place.is_count and place.is_beside_arrays
    ]


def stored_velocities(places: list[Place]) -> list[Any]:
    """Returns the velocities, as they are stored."""
    return [
        place.values
        for place in places
        if place.is_velocity or (place.is_per_param and kind_of(place.node) is TraceState)
    ]


def _concerned_params(found, paths_within, all_paths):
    for node in (found.node, *reversed(found.ancestors)):
        if id(node) in paths_within:
            return frozenset(paths_within[id(node)])
        if rules_of(node).selects_params:
            return frozenset()
    return all_paths


def _is_in_empty_group(found):
    """Whether the innermost group around a state would hold arrays, but has no params."""
    groups = [node for node in found.ancestors if rules_of(node).selects_params]
    if not groups:
        return False
    return any(map(is_masked_node, jax.tree.leaves(groups[-1], is_leaf=is_masked_node)))


def _is_global_field(node, held):
    return held.field in rules_of(node).not_per_param or (
        has_velocity(node) and held.field == COUNT_FIELD
    )


def _is_per_param(node, held, params_are_tree, largest_fields):
    if _is_global_field(node, held):
        return False
    if has_velocity(node):
        return True
    values = held.stored.values
    if jnp.issubdtype(values.dtype, jax.dtypes.extended):
        return False
    is_only_param = not held.path and (
        rules_of(node).is_per_param or largest_fields.is_only_param(node, held)
    )
    if params_are_tree and not is_only_param:
        return bool(held.path)
    if not jnp.issubdtype(values.dtype, jnp.inexact):
        return False
    return np.shape(values) != () or not has_global_scalars(node)


class _LargestFields:
    """The field with the most values, in each state of a type that no framework registered."""

    def __init__(self, pairs):
        sizes: dict[int, dict[str, int]] = {}
        self.paths: dict[Any, set[str]] = {}
        for found, held in pairs:
            if not is_type_of_framework(found.node):
                field_sizes = sizes.setdefault(id(found.node), {})
                size = np.size(held.stored.values)
                field_sizes[held.field] = field_sizes.get(held.field, 0) + size
                self.paths.setdefault((id(found.node), held.field), set()).add(held.path)
        self.fields = {
            node: max(of_node, key=of_node.__getitem__) for node, of_node in sizes.items()
        }

    def is_only_param(self, node, held):
        """Whether the array, which is all that its field holds, is that of a single param."""
        is_scalar = np.shape(held.stored.values) == ()
        return not is_scalar and self.fields.get(id(node)) == held.field

    def is_certain(self, node, held):
        """Whether the path is certainly that of a param; named numbers, such as losses, are not."""
        field = self.fields.get(id(node))
        return field is None or held.path in self.paths[id(node), field]
