"""Which array of one state goes into which place of another: by what it is, and by its param."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer

from momentum_jax._momentum import TraceState
from momentum_jax._moving import decode
from momentum_jax._recurrence import has_velocity, velocities_in
from momentum_jax._states import Held, find_within, held_by, is_count, optax_name

PyTree = Any

# What else Optax' states hold in a tree that is not one of params.
_NOT_OF_PARAMS = {
    "InjectHyperparamsState": ("count", "hyperparams"),
    "InjectStatefulHyperparamsState": ("count", "hyperparams"),
    "MultiStepsState": ("mini_step", "gradient_step", "skip_state"),
    "MonitorState": ("measurements",),
    "MuonState": ("count", "ns_coeffs"),
    "ScaleByLBFGSState": ("count", "weights_memory"),
}
# Those whose other fields hold one array a param, also if the params are one scalar.
_OF_ONE_PARAM = (
    *("ApplyEvery", "EmaState", "MultiStepsState", "ScaleByAdaDeltaState", "ScaleByAdamState"),
    *("ScaleByAdanState", "ScaleByAmsgradState", "ScaleByBeliefState", "ScaleByLBFGSState"),
    *("ScaleByLionState", "ScaleByRStdDevState", "ScaleByRmsState", "ScaleByRpropState"),
    *("ScaleByRssState", "TraceState"),
)
# Those whose count, which no schedule follows, is the number of steps too.
_COUNT_STEPS = (
    *("EmaState", "ScaleByAdamState", "ScaleByAmsgradState", "ScaleByBeliefState"),
    *("ScaleByLionState", "ScaleByNovogradState"),
)
# Those in which an array says something else if its param has another shape.
BY_SHAPE = ("FactoredState", "GaLoreState")


@dataclasses.dataclass(eq=False)
class Place:
    """One array of a state.

    Attributes:
      node: the state that holds it.
      held: the array, with the field and the path.
      of_param: whether it belongs to a param, and is not a count, a scale or a key.
      path: if so the path of the param, renamed.
      around: the paths of the params that the state holds arrays of, or else one around it does.
      position: where the state is.
      used: whether it went into a place of another state.
    """

    node: Any
    held: Held
    of_param: bool
    path: str
    position: str
    around: frozenset[str] = frozenset()
    used: bool = False

    @property
    def is_velocity(self) -> bool:
        """Whether it is stored by a codec."""
        return has_velocity(self.node) and self.of_param

    @property
    def key(self) -> tuple[Any, ...]:
        """What the array is, whichever param it belongs to."""
        kind = kind_of(self.node)
        if not self.held.field:  # It is in no state: known by its place alone.
            return self.position, self.held.path
        if not self.of_param:
            return kind, self.held.field, self.held.path
        if kind is TraceState or has_velocity(self.node):
            # Of several velocities the same ones, of as many.
            number = self.held.field.partition("[")[1:]
            return kind, number, len(velocities_in(self.node)) if has_velocity(self.node) else 1
        return kind, self.held.field

    @property
    def label(self) -> str:
        """What the array is, for a person."""
        field = self.held.field + ("" if self.of_param else self.held.path)
        return f"{type(self.node).__name__}.{field}" if field else "the state"

    @property
    def is_count(self) -> bool:
        """Whether it is the number of steps taken."""
        return is_count(self.node, self.held)

    def decoded(self) -> jax.Array:
        """The array as floats."""
        stored = jax.tree.map(jnp.asarray, self.held.stored)
        return decode(stored) if self.is_velocity else stored.values


def kind_of(node: Any) -> type:
    """The type of a state; that of Optax' trace is ours."""
    return TraceState if isinstance(node, optax.TraceState) else type(node)


def places(state: PyTree, renamed: Callable[[str], str] = lambda path: path) -> list[Place]:
    """All arrays of a state, in the order of `find` and `held_by`."""
    found = find_within(state)
    each = [(found_, held) for found_ in found for held in held_by(found_.node)]
    # A tree of params, unless all that may belong to a param is one array.
    in_trees = any(held.path and not _is_excluded(node, held) for (node, *_), held in each)
    result, inside = [], {}
    for (node, around, position), held in each:
        of_param = _of_param(node, held, in_trees)
        path = renamed(held.path) if of_param else ""
        result.append(Place(node, held, of_param, path, position))
        if of_param:
            for outer in (*around, node):
                inside.setdefault(id(outer), set()).add(path)
    whole = frozenset().union(*inside.values())
    outer_of = {id(node): around for node, around, _ in found}
    for place in result:
        chain = (*outer_of[id(place.node)], place.node)
        near = next((inside[id(each)] for each in reversed(chain) if id(each) in inside), whole)
        place.around = frozenset(near)
    return result


def _is_excluded(node, held):
    return held.field in _NOT_OF_PARAMS.get(optax_name(node), ()) or (
        has_velocity(node) and held.field == "count"
    )


def _of_param(node, held, in_trees):
    if _is_excluded(node, held):
        return False
    if has_velocity(node):
        return True
    values = held.stored.values
    if jnp.issubdtype(values.dtype, jax.dtypes.extended):
        return False
    if in_trees:
        return bool(held.path)
    if not jnp.issubdtype(values.dtype, jnp.inexact):
        return False
    name = optax_name(node)
    return np.shape(values) != () or not name or name in _OF_ONE_PARAM


class Arrays(Mapping[str, jax.Array]):
    """The old arrays of one kind by the paths of their params, which notes what is read."""

    def __init__(self, of_kind: Mapping[str, Place]) -> None:
        self._places = of_kind
        self.read: list[Place] = []

    def __getitem__(self, path: str) -> jax.Array:
        place = self._places[path]
        self.read.append(place)
        return place.decoded()

    def __contains__(self, path: object) -> bool:
        return path in self._places

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


ByPath = dict[str, list[Place]]


def by_key(several: list[Place], key_of: Callable[[Place], Any]) -> dict[Any, ByPath]:
    """Those that belong to params, by what they are and by the paths of the params."""
    found: dict[Any, ByPath] = {}
    for place in several:
        if place.of_param:
            found.setdefault(key_of(place), {}).setdefault(place.path, []).append(place)
    return found


def matched(there: dict[Any, ByPath], here: dict[Any, ByPath]) -> dict[Place, Place]:
    """For each new place the old one of its kind and path, if there is one.

    Of several, such as in a chain of two, those in one position belong together, or those in the
    same order.
    """
    return {
        place: one
        for key, of_kind in here.items()
        for path, wanting in of_kind.items()
        for place, one in _paired(wanting, there.get(key, {}).get(path, []))
    }


def _paired(wanting, having):
    if len(wanting) != len(having):
        by_position = {place.position: place for place in having}
        for place in wanting:
            if place.position in by_position:
                yield place, by_position[place.position]
        used = {place.position for place in wanting}
        having = [place for place in having if place.position not in used]
        wanting = [place for place in wanting if place.position not in by_position]
    yield from zip(wanting, having, strict=False)


def matched_without_params(old: list[Place], new: list[Place]) -> dict[Place, list[Place]]:
    """For each new place that belongs to no param the old ones that it may go on with.

    It goes with the params that it is about, as those of a group: with the old place of its kind
    and position if that is about one of them, or else with the one that is about the most. Without
    such, a count may be any of its kind.
    """
    there, here = _by_kind(old), _by_kind(new)
    return {
        place: list(having)
        for key, wanting in here.items()
        for place, having in _going_on(wanting, there.get(key, []))
    }


def _by_kind(several):
    found: dict[Any, list[Place]] = {}
    for place in several:
        if not place.of_param:
            found.setdefault(place.key, []).append(place)
    return found


def _going_on(wanting, having):
    turn: dict[Any, int] = {}
    for place in wanting:
        # Of two of a kind in a chain, one after the other.
        index = turn[place.around] = turn.get(place.around, -1) + 1
        shares = [len(place.around & each.around) for each in having]
        here = [
            each
            for each, share in zip(having, shares, strict=True)
            if each.position == place.position and (share or not place.around)
        ]
        most = max(shares, default=0)
        best = [each for each, share in zip(having, shares, strict=True) if share == most]
        if here:
            yield place, here
        elif most or not place.around:
            about = {each.around for each in best}
            yield place, best[min(index, len(best) - 1) :][:1] if len(about) == 1 else []
        elif place.is_count or len(wanting) == len(having) == 1:
            yield place, having
        else:
            yield place, []


def alike(several: list[Place]) -> Any:
    """The value of all of them, or None if they differ; of traced ones the first."""
    values = [place.held.stored.values for place in several]
    if len(values) > 1 and all(map(can_be_read, values)):
        known = np.concatenate([np.ravel(value) for value in values])
        return values[0] if np.all(known == known[0]) else None
    return values[0]


def can_be_read(x: Any) -> bool:
    """Whether a value is known here."""
    if isinstance(x, Tracer):
        return False
    return getattr(x, "is_fully_addressable", True) or x.is_fully_replicated


def counts_in(several: list[Place]) -> list[Place]:
    """The counts of steps; if there are none that schedules follow, those of Optax' methods."""
    found = [place for place in several if place.is_count]
    return found or [
        place
        for place in several
        if place.held.field == "count" and optax_name(place.node) in _COUNT_STEPS
    ]


def velocities_of(several: list[Place]) -> list[Any]:
    """The velocities, as they are stored."""
    return [
        place.held.stored.values
        for place in several
        if place.is_velocity or (place.of_param and kind_of(place.node) is TraceState)
    ]
