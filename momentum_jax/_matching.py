"""Which array of one state goes into which place of another: by what it is, and by its param."""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer

from momentum_jax._momentum import TraceState
from momentum_jax._moving import decode
from momentum_jax._state_types import has_velocity, velocities_in
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
# Those in which whole numbers say nothing about other arrays of theirs.
_OF_NO_STEPS = ("ApplyIfFiniteState", "ReduceLROnPlateauState")
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
      position: where the state is.
      labels: the keys of the dicts on the way to it.
      group: those that are labels of `optax.partition`; None if it is in no part that is for some
        of the params only.
      depth: how many of `optax.MultiSteps` it is within; what counts there counts steps, and what
        counts outside counts gradients.
      about: of what belongs to no param, the paths of those that the state holds arrays of, or
        else one around it does, within its group; empty if there are none.
      is_beside_arrays: whether the state itself holds those arrays.
      is_of_none: whether it is in a group that no param is in.
      shapes: those of all that the state holds of the param, where they say what an array means.
      used: whether it went into a place of another state.
    """

    node: Any
    held: Held
    of_param: bool
    path: str
    position: str
    labels: tuple[Any, ...]
    group: tuple[Any, ...] | None
    depth: int
    about: frozenset[str] = frozenset()
    is_beside_arrays: bool = False
    is_of_none: bool = False
    shapes: tuple[tuple[str, tuple[int, ...]], ...] = ()
    used: bool = False

    @property
    def is_velocity(self) -> bool:
        """Whether it is stored by a codec."""
        return has_velocity(self.node) and self.of_param

    @property
    def key(self) -> tuple[Any, ...]:
        """What the array is, whichever param it belongs to."""
        kind = kind_of(self.node)
        if not self.of_param:
            # What is in no state is known by its place alone.
            where = self.held.path if self.held.field else self.position
            return kind, self.held.field, where
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
    def is_clock(self) -> bool:
        """Whether it is the number of steps that a schedule, or a velocity, has taken."""
        return is_count(self.node, self.held)

    @property
    def counts_steps(self) -> bool:
        """The same, or another count, as Adam's for its averages."""
        dtype = jnp.asarray(self.held.stored.values).dtype
        return self.is_clock or (
            not self.of_param
            and self.held.field not in ("", "hyperparams")
            and jnp.issubdtype(dtype, jnp.signedinteger)
            and optax_name(self.node) not in _OF_NO_STEPS
        )

    def decoded(self) -> jax.Array:
        """The array as floats."""
        stored = jax.tree.map(jnp.asarray, self.held.stored)
        return decode(stored) if self.is_velocity else stored.values


def kind_of(node: Any) -> type:
    """The type of a state; that of Optax' trace is ours."""
    return TraceState if isinstance(node, optax.TraceState) else type(node)


def places(state: PyTree, renamed: Callable[[str], str] = lambda path: path) -> list[Place]:
    """All arrays of a state, in the order of `find` and `held_by`."""
    each = [(found, held) for found in find_within(state) for held in held_by(found.node)]
    # A tree of params, unless all that may belong to a param is one array.
    in_trees = any(held.path and not _is_excluded(found.node, held) for found, held in each)
    most = _Most(each)
    result: list[Place] = []
    inside: dict[int, set[str]] = {}
    own: set[int] = set()
    shapes: dict[Any, list[Any]] = {}
    for found, held in each:
        of_param = _of_param(found.node, held, in_trees, most)
        nodes = [optax_name(node) for node in (*found.around, found.node)]
        place = Place(
            node=found.node,
            held=held,
            of_param=of_param,
            path=renamed(held.path) if of_param else "",
            position=found.position,
            labels=found.labels,
            group=found.group if "MaskedState" in nodes else None,
            depth=nodes.count("MultiStepsState"),
        )
        result.append(place)
        if of_param and most.is_sure(found.node, held):
            own.add(id(found.node))
            for node in (*found.around, found.node):
                inside.setdefault(id(node), set()).add(place.path)
        if of_param and optax_name(found.node) in BY_SHAPE:
            shape = np.shape(held.stored.values)
            shapes.setdefault((id(found.node), held.path), []).append((held.field, shape))
    whole = frozenset().union(*inside.values())
    about: dict[str, frozenset[str]] = {}
    for place, (found, _) in zip(result, each, strict=True):
        if not place.of_param:
            if place.position not in about:
                about[place.position] = _about(found, inside, whole)
            place.about = about[place.position]
            place.is_beside_arrays = id(place.node) in own
            place.is_of_none = not place.about and _is_of_none(found)
        place.shapes = tuple(shapes.get((id(place.node), place.held.path), ()))
    return result


def _about(found, inside, whole):
    for node in (found.node, *reversed(found.around)):
        if id(node) in inside:
            return frozenset(inside[id(node)])
        if optax_name(node) == "MaskedState":
            return frozenset()
    return whole


def _is_of_none(found):
    """Whether it is in a group in which there would be arrays, but of no param."""
    groups = [node for node in found.around if optax_name(node) == "MaskedState"]
    return bool(groups) and any(map(_is_masked, jax.tree.leaves(groups[-1], is_leaf=_is_masked)))


def _is_masked(node):
    return isinstance(node, optax.MaskedNode)


def _is_excluded(node, held):
    return held.field in _NOT_OF_PARAMS.get(optax_name(node), ()) or (
        has_velocity(node) and held.field == "count"
    )


def _of_param(node, held, in_trees, most):
    if _is_excluded(node, held):
        return False
    if has_velocity(node):
        return True
    values = held.stored.values
    if jnp.issubdtype(values.dtype, jax.dtypes.extended):
        return False
    name = optax_name(node)
    of_one = not held.path and (name in _OF_ONE_PARAM or most.is_one_param(node, held))
    if in_trees and not of_one:
        return bool(held.path)
    if not jnp.issubdtype(values.dtype, jnp.inexact):
        return False
    return np.shape(values) != () or not name or name in _OF_ONE_PARAM


def _is_of_a_library(node):
    return type(node).__module__.split(".")[0] in ("optax", "momentum_jax")


class _Most:
    """In each state of a user's own the field that holds the most."""

    def __init__(self, each):
        sizes: dict[int, dict[str, int]] = {}
        self.paths: dict[Any, set[str]] = {}
        for found, held in each:
            if not _is_of_a_library(found.node):
                of_node = sizes.setdefault(id(found.node), {})
                size = np.size(held.stored.values)
                of_node[held.field] = of_node.get(held.field, 0) + size
                self.paths.setdefault((id(found.node), held.field), set()).add(held.path)
        self.fields = {node: max(of, key=lambda field: of[field]) for node, of in sizes.items()}

    def is_one_param(self, node, held):
        """Whether it is all that this field holds."""
        is_scalar = np.shape(held.stored.values) == ()
        return not is_scalar and self.fields.get(id(node)) == held.field

    def is_sure(self, node, held):
        """Whether what the path leads to is surely a param: numbers by their names are not."""
        field = self.fields.get(id(node))
        return field is None or held.path in self.paths[id(node), field]


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


def matched(
    there: dict[Any, ByPath], here: dict[Any, ByPath], same_parts: bool
) -> dict[Place, Place]:
    """For each new place the old one of its kind and path, if there is one."""
    return {
        place: one
        for key, of_kind in here.items()
        for path, wanting in of_kind.items()
        for place, one in _paired(wanting, there.get(key, {}).get(path, []), same_parts)
    }


def has_same_parts(old: PyTree, new: PyTree) -> bool:
    """Whether both states are made of states of the same types in the same places."""
    parts = [
        [(found.position, kind_of(found.node)) for found in find_within(state)]
        for state in (old, new)
    ]
    return parts[0] == parts[1]


def _paired(wanting, having, same_parts):
    """Of several of a kind those under the same labels, or else those in the same order."""
    pairs = []
    for key_of in (lambda place: place.labels, lambda place: place.group):
        theirs, ours = _grouped(having, key_of), _grouped(wanting, key_of)
        for key in ours.keys() & theirs.keys():
            pairs += _in_order(ours[key], theirs[key], same_parts)
        gone = {id(place) for pair in pairs for place in pair}
        wanting, having = (
            [each for each in several if id(each) not in gone] for several in (wanting, having)
        )
    return pairs + _in_order(wanting, having, same_parts)


def _grouped(several, key_of):
    found: dict[Any, list[Place]] = {}
    for place in several:
        found.setdefault(key_of(place), []).append(place)
    return found


def _in_order(wanting, having, same_parts):
    """Where one is gone from parts that are as they were, those in the same position are left."""
    pairs = []
    if same_parts and len(wanting) != len(having):
        by_position = {place.position: place for place in having}
        pairs = [
            (place, by_position[place.position])
            for place in wanting
            if place.position in by_position
        ]
        gone = {place.position for place, _ in pairs}
        having = [place for place in having if place.position not in gone]
        wanting = [place for place in wanting if place.position not in gone]
    return pairs + list(zip(wanting, having, strict=False))


def matched_without_params(
    old: list[Place], new: list[Place], made_of: Mapping[str, Iterable[str]], same_parts: bool
) -> dict[Place, list[Place]]:
    """For each new place that belongs to no param the old ones of its kind that it goes on with.

    For each param that it is about that is the one that an array of the param would come from.
    Where it is not known of both which params they are about, it is the one of the same group; or
    where one is in a group and one is not, one that went to no other place. `made_of` are the old
    paths of what was carried from others than the param's own.
    """
    there, here = (_grouped(_of_no_param(each), lambda place: place.key) for each in (old, new))
    depths = _depths(old), _depths(new)

    def fits(place, one, of_old, of_new):
        return (
            place.depth == one.depth or not depths[0].get(of_old, 0) or not depths[1].get(of_new, 0)
        )

    def pairs(wanting, having, of_old=None, of_new=None):
        if not wanting[0].is_clock:
            yield from _paired(wanting, having, same_parts)
            return
        for depth in dict.fromkeys(place.depth for place in wanting):
            alike = [place for place in wanting if place.depth == depth]
            fitting = [one for one in having if fits(alike[0], one, of_old, of_new)]
            found = _paired(alike, fitting, same_parts)
            yield from found
            taken = {one for _, one in found}
            having = [one for one in having if one not in taken]

    result: dict[Place, dict[Place, None]] = {place: {} for place in _of_no_param(new)}
    for key, wanting in here.items():
        having = there.get(key, [])
        theirs, ours = _by_path(having), _by_path(wanting)
        for path, about_it in ours.items():
            for of_old in made_of.get(path, (path,)):
                for place, one in pairs(about_it, theirs.get(of_old, []), of_old, path):
                    result[place][one] = None
        for is_of_one in (_are_of_one_group, _is_one_in_a_group):
            taken = {one for place in wanting for one in result[place]}
            rest = [one for one in having if one not in taken]
            # A state beside whose arrays there are none of these params is another one.
            lost = [
                place
                for place in wanting
                if not result[place] and not (place.about and place.is_beside_arrays)
            ]
            for several in _grouped(lost, _scope).values():
                for of_one in _grouped(rest, _scope).values():
                    if is_of_one(several[0], of_one[0]):
                        for place, one in pairs(several, of_one):
                            result[place][one] = None
    return {place: list(found) for place, found in result.items()}


def _scope(place):
    return place.group, not place.about, place.is_of_none


def _are_of_one_group(place, one):
    return place.group == one.group and _may_be_of_the_same(place, one)


def _is_one_in_a_group(place, one):
    in_groups = [each.group is not None for each in (place, one)]
    return in_groups[0] != in_groups[1] and _may_be_of_the_same(place, one)


def _may_be_of_the_same(place, one):
    return not (place.about and one.about) and (place.is_of_none or not one.is_of_none)


def _of_no_param(several):
    return [place for place in several if not place.of_param]


def _by_path(several):
    found: dict[str, list[Place]] = {}
    for place in several:
        for path in sorted(place.about):  # In one order in all processes.
            found.setdefault(path, []).append(place)
    return found


def _depths(several):
    """How deep what belongs to each param is within `optax.MultiSteps`; at None the deepest."""
    found: dict[str | None, int] = {}
    for place in several:
        for path in (place.path if place.of_param else None, None):
            found[path] = max(found.get(path, 0), place.depth)
    return found


def agreed(several: list[Place], target: Any, otherwise: Any) -> Any:
    """The value of all of them, in the shape of the target if it has to be another.

    Where they differ None; or if they are traced, `otherwise` then.
    """
    values = [place.held.stored.values for place in several]
    first, shape = values[0], np.shape(target)
    if len(values) == 1 and np.shape(first) in ((), shape):
        return first
    if any(np.shape(x) != shape for x in values):
        if any(np.size(x) == 0 for x in values):
            return None
        first = first.ravel()[0]
    same = [_data(x) == _data(first) for x in values]
    if all(map(can_be_read, values)):
        return first if all(map(np.all, same)) else None
    return jnp.where(jnp.stack([jnp.all(x) for x in same]).all(), first, otherwise)


def _data(x):
    return jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.extended) else x


def can_be_read(x: Any) -> bool:
    """Whether a value is known here."""
    if isinstance(x, Tracer):
        return False
    return getattr(x, "is_fully_addressable", True) or x.is_fully_replicated


def clocks_in(several: list[Place]) -> list[Place]:
    """The counts of steps; if there are none that schedules follow, those of Optax' methods."""
    return [place for place in several if place.is_clock] or [
        place
        for place in several
        if place.held.field == "count" and place.counts_steps and place.is_beside_arrays
    ]


def velocities_of(several: list[Place]) -> list[Any]:
    """The velocities, as they are stored."""
    return [
        place.held.stored.values
        for place in several
        if place.is_velocity or (place.of_param and kind_of(place.node) is TraceState)
    ]
