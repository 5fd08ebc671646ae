"""A state carried over to another one: what belongs to a param goes where the param went."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from momentum_jax._hyperparameters import check_flag
from momentum_jax._leaves import ARRAYS, path_text
from momentum_jax._matching import (
    BY_SHAPE,
    Arrays,
    Place,
    agreed,
    by_key,
    can_be_read,
    clocks_in,
    has_same_parts,
    kind_of,
    matched,
    matched_without_params,
    places,
    velocities_of,
)
from momentum_jax._momentum import MomentumState, TraceState
from momentum_jax._moving import Move, has_moved, like, moved
from momentum_jax._report import (
    DROPPED,
    FRESH,
    KEPT,
    NOTED,
    RESIZED,
    TransplantReport,
    TransplantRow,
)
from momentum_jax._restart import AdaptiveRestartState
from momentum_jax._state_types import STATE_TYPES, has_velocity
from momentum_jax._states import REMEMBERED, held_by, optax_name, replace, with_held
from momentum_jax._storage import Stored, decoded_dtype

PyTree = Any
# From the path of a param in the old state to that in the new one.
Rename = Mapping[str, str] | Callable[[str], str]
# (path, old arrays by path, new shape) -> the array, or None to leave it as it is in the new state.
Resize = Callable[[str, Mapping[str, jax.Array], tuple[int, ...]], Any]


def transplant(
    old_state: optax.OptState,
    new_state: optax.OptState,
    rename: Rename | None = None,
    resize: bool | Resize = False,
    *,
    strict: bool = False,
) -> tuple[Any, TransplantReport]:
    """Carries a state over to changed params or a changed optimizer, so that no velocity is lost.

    For layers that are added, frozen or not, renamed, widened, pruned, split into groups; for
    another velocity_dtype, wrappers put around or taken off. What belongs to a param goes with its
    path: velocities, and all else that a state of Optax holds of it, such as the moments of Adam,
    the sums of `MultiSteps` and `previous_params` of `adaptive_restart`. It is found in chains,
    groups of `optax.partition`, under wrappers, and in an `nnx.Optimizer`'s `opt_state`, wherever
    it is in either state.

    Counts, schedules, scales and the hyperparameters that `optax.inject_hyperparams` holds go on
    with the params that they are about, as a learning rate with the params of its group:

    - Of groups that become one, a group that keeps its label gives what it has. Else they must
      agree: counts that differ are an error, and where others differ those of `new_state` stay.
    - A group none of whose params was in an old one begins as `init` made it. Only counts of
      schedules and velocities are then those of the job.
    - Where no array shows of which params a group is, as of `optax.sgd` without momentum, its label
      counts.
    - `optax.MultiSteps` counts steps within and gradients around it: a schedule that moves into it
      goes on with its steps; one that moves out begins anew, as the gradients are not known.
    - Parts of a chain that look alike in the state go by their order. So do optimizers of params
      with the same paths, if the keys of their states change.
    - What a wrapper counts for itself begins as `init` made it where the wrapper is new.
    - What `optax.flatten` made one array of is carried as one, whatever order the params have.

    A state of a type of your own is found if it has named fields (a NamedTuple, a registered
    dataclass): in chains and groups, and in fields of wrappers whose names end in "state" or
    "states".

    Args:
      old_state: the state of the job so far.
      new_state: what `init` of the optimizer to go on with returned for the new params. It gives
        the structure, the dtypes and the shardings.
      rename: where the path of a param changed: a dict of prefixes of paths, old to new, as
        `jax.tree_util.keystr` writes them, {"['enc']": "['encoder']"}, of which the longest that
        fits counts; or a function from the old path to the new one.
      resize: whether an array whose shape changed is carried where both shapes overlap. Elsewhere
        it stays as `init` made it: 0 for a velocity. Or a function `(path, old, new_shape)` that
        returns the array for a new path, or None for what `init` made. It is called where there is
        no old array of this path and shape; `old` are all old arrays of the same kind by their
        renamed paths, as floats, and those that it reads count as carried. So it can select by an
        index, split, stack.
      strict: whether it is an error if anything is fresh or dropped, also a count, a scale or a
        hyperparameter that has its like in the old state.

    Returns:
      The state, and a `TransplantReport` that says of each array what became of it. Under jit
      return the state alone: the report is not an array. What keeps its dtype and shape keeps its
      bits; 8 bits that are resized are rounded once more. A count that the old state does not have
      is that of its other counts, or if it has none 1, unless every velocity is 0. Under jit, where
      values are not known, the first of several counts is taken, where other values differ those
      of `new_state`, and `strict` sees what shapes and dtypes show.

    Raises:
      ValueError: nothing can be carried; velocities none of which means the same in the new state,
        such as that of `momentum` for `trace`, which differ by the learning rate: see
        `frameworks.trace_from_momentum`; a rename that fits no path, or gives two arrays one path;
        counts that differ where one is needed; values too large for their new dtype; with
        `strict` what is fresh or dropped.
      TypeError: a real array for a complex one or the reverse; arguments of other types.

    Example:
      >>> import jax.numpy as jnp, momentum_jax as mj
      >>> tx = mj.momentum(0.5)
      >>> grads = {"enc": {"w": jnp.ones(2)}}
      >>> _, state = tx.update(grads, tx.init(grads))
      >>> params = {"encoder": {"w": jnp.zeros(3)}, "head": jnp.zeros(1)}
      >>> state, report = mj.transplant(
      ...     state, tx.init(params), rename={"['enc']": "['encoder']"}, resize=True
      ... )
      >>> print(state.count, state.velocity["encoder"]["w"])
      1 [-0.5 -0.5  0. ]
      >>> print(report)
      param             array                   outcome
      ['encoder']['w']  MomentumState.velocity  resized  (2,) -> (3,), was ['enc']['w']
      ['head']          MomentumState.velocity  fresh
    """
    strict = check_flag("strict", strict)
    if not callable(resize):
        resize = check_flag("resize", resize)
    state, rows = carried(old_state, new_state, rename, resize)
    report = TransplantReport(rows)
    outcomes = {row.outcome for row in rows}
    if not outcomes & {KEPT, RESIZED} and _is_missed(rows):
        raise ValueError(
            "nothing of the old state can be carried: no array has its kind, path and shape in the "
            "new one. Give rename or resize; or if nothing is to be carried, go on with "
            f"new_state as it is.\n{report}"
        )
    if strict and outcomes & {FRESH, DROPPED}:
        lost = TransplantReport(tuple(row for row in rows if row.outcome in (FRESH, DROPPED)))
        raise ValueError(f"strict=True, but not everything was carried:\n{lost}")
    return state, report


def _is_missed(rows):
    """Whether arrays of the same kind are on both sides, but of other params."""
    fresh, dropped = (
        {row.held for row in rows if row.path is not None and row.outcome == outcome}
        for outcome in (FRESH, DROPPED)
    )
    return bool(fresh & dropped)


class Conversion(NamedTuple):
    """Velocities of one type of state as those of another.

    Attributes:
      to: the type of the new state.
      of: that of the old one.
      factor: what they are multiplied by.
    """

    to: type
    of: type
    factor: float


class _Entry(NamedTuple):
    """What goes into a place that belongs to a param, and what is said of it."""

    place: Place
    row: TransplantRow
    # None where the place stays as it is.
    source: Stored | None = None
    was_velocity: bool = False
    # The paths of what it was made of, if it is not its own.
    made_of: tuple[str, ...] = ()


def carried_velocities(
    old_state: PyTree, new_state: PyTree, count: int | None, conversion: Conversion | None = None
) -> PyTree:
    """The new state with the velocities of the old one, of the same params, and this count.

    And `previous_params` of `adaptive_restart`. All else stays as it is in the new state.
    """

    def goes(place):
        is_velocity = kind_of(place.node) in STATE_TYPES
        return place.of_param and (is_velocity or isinstance(place.node, AdaptiveRestartState))

    def key_in_old(place):
        if conversion is None or kind_of(place.node) is not conversion.to:
            return place.key
        return conversion.of, *place.key[1:]

    old, new = places(jax.tree.map(_as_array, old_state)), places(new_state)
    there = by_key([place for place in old if goes(place)], lambda place: place.key)
    here = by_key([place for place in new if goes(place)], key_in_old)
    pairs = matched(there, here, has_same_parts(old_state, new_state))
    entries = [_kept(place, one) for place, one in pairs.items() if _fits(place, one)]
    counts = {} if count is None else {place: count for place in new if place.is_clock}
    return _with(new_state, new, entries, counts, conversion)


def carried(
    old_state: PyTree, new_state: PyTree, rename: Rename | None, resize: bool | Resize
) -> tuple[PyTree, tuple[TransplantRow, ...]]:
    """What `transplant` does, and the rows of its report."""
    _check_state("old_state", old_state)
    _check_state("new_state", new_state)
    renamed = _Renaming(rename)
    new_state = jax.tree.map(_as_array, new_state)
    old, new = places(jax.tree.map(_as_array, old_state), renamed), places(new_state)
    renamed.check(old)
    _check_kinds(old, new)
    there, here = (by_key(each, lambda place: place.key) for each in (old, new))
    same_parts = has_same_parts(old_state, new_state)
    pairs = matched(there, here, same_parts)
    entries = [
        _entry(place, pairs.get(place), there.get(key, {}), i, len(wanting), resize)
        for key, of_kind in here.items()
        for wanting in of_kind.values()
        for i, place in enumerate(wanting)
    ]
    made_of = _made_of(entries)
    pairs = matched_without_params(old, new, made_of, same_parts)
    values, rows = _of_no_param(pairs, old, made_of)
    state = _with(new_state, new, [entry for entry in entries if entry.source], values)
    rows |= {entry.place: entry.row for entry in entries}
    dropped = [row for place in old for row in _dropped(place, new, pairs)]
    return state, tuple([rows[place] for place in new if place in rows] + dropped)


def _with(state, new, entries, values, conversion=None):
    """The state with what goes into its places."""
    moves = [
        Move(
            source=entry.source,
            target=entry.place.held.stored,
            was_velocity=entry.was_velocity,
            is_velocity=entry.place.is_velocity,
            is_converted=conversion is not None and kind_of(entry.place.node) is conversion.to,
        )
        for entry in entries
    ]
    stored, lost = moved(moves, None if conversion is None else conversion.factor)
    _check_lost(entries, lost)
    filled = {entry.place: one for entry, one in zip(entries, stored, strict=True)}
    for place, value in values.items():
        filled[place] = Stored(like(place.held.stored.values, value))
    following = iter([filled.get(place) or place.held.stored for place in new])

    def part(node):
        return with_held(node, [next(following) for _ in held_by(node)])

    return replace(state, part)


def _check_lost(entries, lost):
    for entry, bad in zip(entries, lost, strict=True):
        if bad is not None and can_be_read(bad) and int(bad):
            target = entry.place.held.stored.values
            raise ValueError(
                f"{entry.row.held} {_at(entry.row.path)} has {int(bad)} of {np.size(target)} "
                f"values that are too large for {target.dtype}. Give a new_state of a wider dtype."
            )


# What is given. --------------------------------------------------------------------------


def _check_state(name, state):
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        if not isinstance(leaf, ARRAYS):
            raise TypeError(
                f"{name} {path_text(path)} is {type(leaf).__name__}, not an array. Give "
                "a state that init or update returned."
            )
    if type(state) in (tuple, list, dict, type(None)) and not state:
        raise TypeError(f"{name}={state!r} is no state. Give one that init or update returned.")


def _as_array(x):
    return jnp.asarray(x) if isinstance(x, (int, float, complex)) else x


class _Renaming:
    """From old paths to new ones, as `rename` says."""

    def __init__(self, rename):
        if rename is not None and not callable(rename) and not isinstance(rename, Mapping):
            raise TypeError(
                f"rename={rename!r} must be a dict of prefixes of paths, such as "
                "{\"['enc']\": \"['encoder']\"}, or a function of a path."
            )
        self.rename = rename
        self.unused = dict.fromkeys(rename) if isinstance(rename, Mapping) else {}

    def __call__(self, path):
        if self.rename is None:
            return path
        if callable(self.rename):
            return self._text(self.rename(path))
        fitting = [prefix for prefix in self.rename if _starts_with(path, prefix)]
        if not fitting:
            return path
        longest = max(fitting, key=len)
        self.unused.pop(longest, None)
        return self._text(self.rename[longest]) + path[len(longest) :]

    def check(self, old):
        """Raises if a prefix fits nothing, or two arrays of one state get one path."""
        if self.unused:
            paths = dict.fromkeys(place.held.path for place in old if place.of_param)
            raise ValueError(
                f"rename has {', '.join(map(repr, self.unused))}, with which no path of a param in "
                f"the old state begins. There are: {', '.join(paths) or 'none'}."
            )
        seen: dict[str, Place] = {}
        for place in old if self.rename is not None else ():
            if not place.of_param:
                continue
            other = seen.setdefault(place.path, place)
            if other.held.path != place.held.path:
                raise ValueError(
                    f"rename gives two arrays the path {place.path}: {other.held.path} and "
                    f"{place.held.path} of {place.label}. Give each a path of its own."
                )

    @staticmethod
    def _text(path):
        if not isinstance(path, str):
            raise TypeError(f"rename must give paths as text, but gave {path!r}.")
        return path


def _starts_with(path, prefix):
    return isinstance(prefix, str) and (
        path == prefix or (path.startswith(prefix) and path[len(prefix)] in "[.")
    )


def _check_kinds(old, new):
    """Raises where the velocities of both mean different things."""
    theirs, ours = (
        dict.fromkeys(kind_of(place.node) for place in each if kind_of(place.node) in STATE_TYPES)
        for each in (old, new)
    )
    if not theirs or not ours or theirs.keys() & ours.keys():
        return
    one, other = next(iter(theirs)), next(iter(ours))
    convert = {
        (TraceState, MomentumState): " momentum_jax.frameworks.momentum_from_trace converts.",
        (MomentumState, TraceState): " momentum_jax.frameworks.trace_from_momentum converts.",
    }
    raise ValueError(
        f"the old state is {one.__name__}, of {STATE_TYPES[one]}, and the new one is "
        f"{other.__name__}, of {STATE_TYPES[other]}: what their velocities mean differs, as in "
        f"sign and scale.{convert.get((one, other), '')}"
    )


# What belongs to a param. ----------------------------------------------------------------


def _entry(place, one, of_kind, index, number, resize):
    """What goes into a place: `one`, if there is one, or what is made of all of its kind."""
    entry = _entry_alone(place, one, of_kind, index, resize)
    having = of_kind.get(place.path, ())
    if having and len(having) != number:
        note = f"of {len(having)} for {number}"
        note = ", ".join(filter(None, [entry.row.note, note]))
        entry = entry._replace(row=entry.row._replace(note=note))
    return entry


def _entry_alone(place, one, of_kind, index, resize):
    shape = np.shape(place.held.stored.values)
    row = TransplantRow(place.path, place.label, FRESH)
    before = () if one is None else np.shape(one.held.stored.values)
    if one is not None and before == shape and place.shapes == one.shapes:
        if _fits(place, one):
            return _kept(place, one)
        dtypes = (str(each.held.stored.values.dtype) for each in (one, place))
        return _Entry(place, row._replace(note=f"{' is now '.join(dtypes)}"))
    if callable(resize):
        arrays = Arrays({path: each[min(index, len(each) - 1)] for path, each in of_kind.items()})
        made = resize(place.path, arrays, shape)
        if made is not None:
            return _made(place, _check_made(place, made), arrays.read)
    if one is None:
        return _Entry(place, row)
    note = f"{before} -> {shape}"
    overlaps = resize is True and len(before) == len(shape)
    if optax_name(place.node) in BY_SHAPE:
        return _Entry(place, row._replace(note=f"{note}, which means something else"))
    if not overlaps or not _fits(place, one):
        return _Entry(place, row._replace(note=note))
    entry = _kept(place, one)
    notes = ", ".join(filter(None, [note, entry.row.note]))
    return entry._replace(row=entry.row._replace(outcome=RESIZED, note=notes))


def _kept(place, one):
    one.used = True
    before, after = (str(each.held.stored.values.dtype) for each in (one, place))
    notes = [f"{before} -> {after}"] if before != after else []
    if one.held.path != place.path:
        notes.append(f"was {one.held.path or 'at the root'}")
    row = TransplantRow(place.path, place.label, KEPT, ", ".join(notes))
    return _Entry(place, row, one.held.stored, one.is_velocity)


def _made(place, array, read):
    for each in read:
        each.used = True
    paths = ", ".join(dict.fromkeys(each.held.path for each in read)) or "nothing"
    row = TransplantRow(place.path, place.label, RESIZED, f"resize made {array.shape} of {paths}")
    return _Entry(place, row, Stored(array), made_of=tuple(each.path for each in read))


def _made_of(entries):
    """The old paths of what `resize` made of others, by the new path."""
    found: dict[str, dict[str, None]] = {}
    for entry in entries:
        if entry.made_of:
            found.setdefault(entry.place.path, {}).update(dict.fromkeys(entry.made_of))
    return found


def _dropped(place, new, pairs):
    """A row for what is lost with an old array: all that belongs to a param, and what matters."""
    if place.of_param:
        if not place.used:
            yield TransplantRow(place.held.path, place.label, DROPPED)
        return
    values = place.held.stored.values
    field, start, *_ = REMEMBERED.get(optax_name(place.node), ("hyperparams", None))
    if field != place.held.field or not can_be_read(values):
        return
    others = [float(x) for x in np.ravel(values) if x != start]
    if not others:
        return
    value = f"{others[0]:.7g}"
    takers = [one for one, having in pairs.items() if place in having]
    if not takers:
        # Of a hyperparameter nobody knows what the new optimizer was made with.
        yield TransplantRow(None, place.label, NOTED if start is None else DROPPED, value)
        return
    there = {one.path for one in new if one.of_param}
    rest = place.about & there - frozenset().union(*(one.about for one in takers))
    if rest and start is not None and all(one.about for one in takers):
        yield TransplantRow(None, place.label, DROPPED, f"{value} of {', '.join(sorted(rest))}")


def _fits(place, one):
    """Whether the one can be stored as the other; raises where only a part of it could."""
    held, wanted = _dtype_of(one), _dtype_of(place)
    if jnp.issubdtype(held, jnp.inexact) and jnp.issubdtype(wanted, jnp.inexact):
        if _is_complex(held) != _is_complex(wanted):
            raise TypeError(
                f"{place.label} {_at(place.path)} is {held} in the old state, but {wanted} in the "
                "new one: a real and a complex array do not mix. Give the state of init for params "
                "of the same kind, or leave the param out."
            )
        return True
    return held == wanted


def _dtype_of(place):
    stored = place.held.stored
    return decoded_dtype(stored) if place.is_velocity else stored.values.dtype


def _is_complex(dtype):
    return jnp.issubdtype(dtype, jnp.complexfloating)


def _check_made(place, made):
    where, shape = place.path or "the root", np.shape(place.held.stored.values)
    wanted = _dtype_of(place)
    if not isinstance(made, ARRAYS):
        raise TypeError(
            f"resize must return an array for {where}, or None, but returned {type(made).__name__}."
        )
    array = jnp.asarray(made)
    if array.shape != shape:
        raise ValueError(
            f"resize must return an array of shape {shape} for {where}, or None, but returned one "
            f"of shape {array.shape}."
        )
    if _is_complex(array.dtype) != _is_complex(wanted):
        raise TypeError(
            f"resize must return an array for {where} that can be stored as {wanted}, but returned "
            f"one of {array.dtype}: a real and a complex array do not mix."
        )
    return array


def _at(path):
    return f"at {path}" if path else "at the root"


# What belongs to no param: counts, scales, keys. -------------------------------------------


def _of_no_param(pairs, old, made_of):
    """The values, and the rows of what is to be known, by place."""
    values: dict[Place, Any] = {}
    rows: dict[Place, TransplantRow] = {}
    kinds = {place.key for place in old if not place.of_param}
    for place, having in pairs.items():
        outcome = FRESH
        if having:
            value, note = _value_of(place, having)
            if value is not None and note:
                outcome = NOTED
        elif place.is_clock:
            value, note = _clock(place, old, made_of)
            if value is not None:
                outcome = NOTED
        elif place.key in kinds:
            value, note = None, "there is none of these params"
        elif not place.held.field:
            value, note = None, "known by its place alone, where there was none"
        else:
            continue
        if value is not None:
            values[place] = value
        if note:
            rows[place] = TransplantRow(None, place.label, outcome, note)
    return values, rows


def _value_of(place, having):
    """That of the old places, and what to know of it; None if there is no one value."""
    target = place.held.stored.values
    # Of groups that become one the one that goes on under its labels.
    same = [one for one in having if place.group is not None and one.group == place.group]
    chosen = same if same and len(having) > 1 else having
    first = chosen[0].held.stored.values
    note = _of_another_type(first, target)
    if note:
        return None, note
    value = agreed(chosen, target, first if place.counts_steps and len(chosen) > 1 else target)
    if value is None and place.counts_steps and len(having) > 1:
        raise _counts_differ(place, having)
    if value is None:
        return None, _shown(having, target)
    if np.shape(first) not in ((), np.shape(target)) and not can_be_read(value):
        return value, f"{np.shape(first)} -> {np.shape(target)}, if all are alike"
    if chosen is not having and agreed(having, target, target) is None:
        return value, f"of {_shown(having, target)}"
    if _differs(value, target):
        return value, f"{float(value):.7g} (new state: {float(target):.7g})"
    return value, ""


def _shown(several, target):
    """What the old places have."""
    values = [place.held.stored.values for place in several]
    if any(jnp.issubdtype(x.dtype, jax.dtypes.extended) for x in values):
        return "several keys that differ"
    if len(values) == 1 or not all(can_be_read(x) and np.shape(x) == () for x in values):
        return f"{' and '.join(dict.fromkeys(str(np.shape(x)) for x in values))} -> {target.shape}"
    return " and ".join(dict.fromkeys(f"{x.item():.7g}" for x in values))


def _clock(place, old, made_of):
    """The count that is not in the old state, from its other counts, and what to know of it."""
    paths = {before for path in place.about for before in made_of.get(path, (path,))}
    of_these = [one for one in old if one.about & paths]
    if clocks_in(of_these):
        old = of_these
    # What is within MultiSteps counts steps, what is not counts gradients.
    deep = max((one.depth for one in old), default=0)
    counts = clocks_in([one for one in old if not deep or one.depth == place.depth])
    if not counts and deep and clocks_in(old):
        units = ("gradients", "steps")
        has, lacks = units if place.depth else units[::-1]
        return None, f"the old state counts {has} there, not {lacks}"
    if counts:
        value = agreed(counts, place.held.stored.values, counts[0].held.stored.values)
        if value is None:
            raise _counts_differ(place, counts)
        return value, "of the old state's other counts"
    if has_velocity(place.node):
        moved = has_moved(velocities_of(old))
        return moved, "1 if a velocity is not 0: the old state does not count its steps"
    return None, "the old state does not count its steps"


def _of_another_type(value, target):
    """Why a place cannot hold a value, or an empty text."""
    before, after = jnp.asarray(value).dtype, jnp.asarray(target).dtype
    if jnp.issubdtype(before, jax.dtypes.extended) or jnp.issubdtype(after, jax.dtypes.extended):
        fits = before == after
    else:
        fits = jnp.issubdtype(after, jnp.inexact) or not jnp.issubdtype(before, jnp.inexact)
    return "" if fits else f"{before} is now {after}"


def _differs(value, target):
    """Whether a value that is no count is not that of the new state."""
    return (
        all(can_be_read(x) and np.shape(x) == () for x in (value, target))
        and all(jnp.issubdtype(x.dtype, jnp.floating) for x in (value, target))
        and float(value) != float(target)
    )


def _counts_differ(place, several):
    found = sorted({int(x) for each in several for x in np.ravel(each.held.stored.values)})
    return ValueError(
        f"the parts of the old state have counted {found}, not alike, so that it is not clear "
        f"which is meant for {place.label}. Keep the parts apart; or give them one count first, as "
        f"optax.tree.set(old_state, {place.held.field}=...) does."
    )
