"""Matches the arrays of an old state with the places of a new one."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from momentum_jax._states._places import Place
from momentum_jax._states._rules import kind_of
from momentum_jax._states._walk import locate_states

PyTree = Any
PlacesByPath = dict[str, list[Place]]


def has_same_structure(old_state: PyTree, new_state: PyTree) -> bool:
    """Whether both states consist of states of the same types in the same positions."""
    structures = [
        [(found.position, kind_of(found.node)) for found in locate_states(state)]
        for state in (old_state, new_state)
    ]
    return structures[0] == structures[1]


# Arrays that belong to a param. -----------------------------------------------------------


def group_by_meaning(
    places: list[Place], meaning_of: Callable[[Place], Any] = lambda place: place.meaning
) -> dict[Any, PlacesByPath]:
    """Groups the places of per-param arrays by what the arrays are, and by the params' paths."""
    groups: dict[Any, PlacesByPath] = {}
    for place in places:
        if place.is_per_param:
            of_meaning = groups.setdefault(meaning_of(place), {})
            of_meaning.setdefault(place.param_path, []).append(place)
    return groups


def match_arrays(
    old_groups: dict[Any, PlacesByPath],
    new_groups: dict[Any, PlacesByPath],
    same_structure: bool,
) -> dict[Place, Place]:
    """Returns for each new place the old one of the same meaning and path, if there is one."""
    return {
        new: old
        for meaning, by_path in new_groups.items()
        for path, new_places in by_path.items()
        for new, old in _pair(new_places, old_groups.get(meaning, {}).get(path, []), same_structure)
    }


def _pair(new_places, old_places, same_structure):
    """Pairs places of one meaning: those under the same labels, then the others in their order."""
    pairs = []
    for key in (lambda place: place.dict_keys, lambda place: place.group_labels):
        old_groups, new_groups = _group_by(old_places, key), _group_by(new_places, key)
        for label in new_groups.keys() & old_groups.keys():
            pairs += _pair_in_order(new_groups[label], old_groups[label], same_structure)
        paired = {id(place) for pair in pairs for place in pair}
        new_places, old_places = (
            [place for place in places if id(place) not in paired]
            for places in (new_places, old_places)
        )
    return pairs + _pair_in_order(new_places, old_places, same_structure)


def _group_by(places, key):
    groups: dict[Any, list[Place]] = {}
    for place in places:
        groups.setdefault(key(place), []).append(place)
    return groups


def _pair_in_order(new_places, old_places, same_structure):
    """Pairs places in their order.

    If the structure is the same but the numbers differ, places in equal positions are paired first.
    """
    pairs = []
    if same_structure and len(new_places) != len(old_places):
        old_by_position = {place.position: place for place in old_places}
        pairs = [
            (place, old_by_position[place.position])
            for place in new_places
            if place.position in old_by_position
        ]
        paired = {place.position for place, _ in pairs}
        old_places = [place for place in old_places if place.position not in paired]
        new_places = [place for place in new_places if place.position not in paired]
    return pairs + list(zip(new_places, old_places, strict=False))


# Global values. ---------------------------------------------------------------------------


def match_globals(
    old: list[Place],
    new: list[Place],
    sources: Mapping[str, Iterable[str]],
    same_structure: bool,
) -> dict[Place, list[Place]]:
    """Returns for the place of each new global value the old places that its value comes from.

    For each param that the new value concerns, that is the old value of the same meaning that
    concerned the param. If the params are not known on both sides, it is the old value of the same
    group; or if only one of the two is in a group, an old value that went to no other place.

    Args:
      old: all places of the old state.
      new: all places of the new state.
      sources: for a new path whose arrays were made from arrays of other params, the old paths of
        these params.
      same_structure: what `has_same_structure` returned.
    """
    old_globals, new_globals = (
        _group_by([place for place in places if not place.is_per_param], lambda p: p.meaning)
        for places in (old, new)
    )
    pairing = _Pairing(old, new, same_structure)
    # Dicts with None as values: sets that keep their order.
    found = {place: {} for places in new_globals.values() for place in places}
    for meaning, new_places in new_globals.items():
        old_places = old_globals.get(meaning, [])
        _match_by_params(found, new_places, old_places, sources, pairing)
        for are_related in (_are_of_one_group, _is_one_in_a_group):
            _match_by_groups(found, new_places, old_places, are_related, pairing)
    return {place: list(found[place]) for place in new if not place.is_per_param}


class _Pairing:
    """Pairs global values, but never a count of steps with a count of gradients."""

    def __init__(self, old, new, same_structure):
        self.old_depths, self.new_depths = _accumulation_depths(old), _accumulation_depths(new)
        self.same_structure = same_structure

    def __call__(self, new_places, old_places, new_path=None, old_path=None):
        """Yields pairs; the paths are those of the param that both concern, if it is known."""
        if not new_places[0].is_step_count:
            yield from _pair(new_places, old_places, self.same_structure)
            return
        accumulates = self.old_depths.get(old_path, 0) and self.new_depths.get(new_path, 0)
        for depth in dict.fromkeys(place.accumulation_depth for place in new_places):
            candidates = [
                place
                for place in old_places
                if not accumulates or place.accumulation_depth == depth
            ]
            of_depth = [place for place in new_places if place.accumulation_depth == depth]
            pairs = _pair(of_depth, candidates, self.same_structure)
            yield from pairs
            taken = {place for _, place in pairs}
            old_places = [place for place in old_places if place not in taken]


def _match_by_params(found, new_places, old_places, sources, pairing):
    """Matches values that concern the same param, for each param."""
    old_by_path, new_by_path = _by_concerned_path(old_places), _by_concerned_path(new_places)
    for new_path, new_concerned in new_by_path.items():
        for old_path in sources.get(new_path, (new_path,)):
            old_concerned = old_by_path.get(old_path, [])
            for new, old in pairing(new_concerned, old_concerned, new_path, old_path):
                found[new][old] = None


def _match_by_groups(found, new_places, old_places, are_related, pairing):
    """Matches the remaining values by their groups of params."""
    taken = {old for place in new_places for old in found[place]}
    unused = [place for place in old_places if place not in taken]
    unmatched = [
        place
        for place in new_places
        # If its state holds arrays, but the old value concerns other params, it is another value.
        if not found[place] and not (place.concerns and place.is_beside_arrays)
    ]
    for new_group in _group_by(unmatched, _scope).values():
        for old_group in _group_by(unused, _scope).values():
            if are_related(new_group[0], old_group[0]):
                for new, old in pairing(new_group, old_group):
                    found[new][old] = None


def _scope(place):
    return place.group_labels, not place.concerns, place.is_of_empty_group


def _are_of_one_group(new, old):
    return new.group_labels == old.group_labels and _may_correspond(new, old)


def _is_one_in_a_group(new, old):
    return (new.group_labels is None) != (old.group_labels is None) and _may_correspond(new, old)


def _may_correspond(new, old):
    params_are_known = new.concerns and old.concerns
    return not params_are_known and (new.is_of_empty_group or not old.is_of_empty_group)


def _by_concerned_path(places):
    groups: PlacesByPath = {}
    for place in places:
        for path in sorted(place.concerns):  # In the same order in all processes.
            groups.setdefault(path, []).append(place)
    return groups


def _accumulation_depths(places):
    """Returns the largest accumulation depth of what belongs to each param; at None of all."""
    depths: dict[str | None, int] = {}
    for place in places:
        for path in (place.param_path if place.is_per_param else None, None):
            depths[path] = max(depths.get(path, 0), place.accumulation_depth)
    return depths
