"""A state carried over to another one: what belongs to a param goes where the param went."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.core import Tracer
from jax.experimental import multihost_utils

from momentum_jax import _velocity
from momentum_jax._dispatch import by_leaf, group_of, inlined_jit, replicated
from momentum_jax._hyperparameters import check_flag
from momentum_jax._momentum import MomentumState, TraceState
from momentum_jax._placement import hold_like, in_memory_of, on_device, whole
from momentum_jax._recurrence import STATE_TYPES, has_velocity
from momentum_jax._states import (
    Held,
    find,
    held_by,
    is_count,
    optax_name,
    replace,
    with_held,
)
from momentum_jax._storage import Stored, codec_of, compute_dtype, decoded_dtype

PyTree = Any
# From the path of a param in the old state to that in the new one.
Rename = Mapping[str, str] | Callable[[str], str]
# (path, old arrays by path, new shape) -> the array, or None to leave it as it is in the new state.
Resize = Callable[[str, Mapping[str, jax.Array], tuple[int, ...]], Any]

KEPT, RESIZED, FRESH, DROPPED, NOTED = "kept", "resized", "fresh", "dropped", "noted"


class TransplantRow(NamedTuple):
    """What became of one array of a state.

    Attributes:
      path: the path of the param: in the new state, and if it was dropped in the old one. Empty for
        what belongs to no param, and at the root.
      held: what the array is, such as "MomentumState.velocity".
      outcome: "kept", "resized", "fresh", "dropped" or "noted".
      note: what else is to be known: the old path, dtypes, shapes, values.

    Example:
      >>> import jax.numpy as jnp, momentum_jax as mj
      >>> tx = mj.momentum(0.1)
      >>> params, wider = {"w": jnp.ones(2)}, {"w": jnp.ones(2), "b": jnp.ones(1)}
      >>> _, report = mj.transplant(tx.init(params), tx.init(wider))
      >>> report.rows[-1].path, report.rows[-1].outcome
      ("['w']", 'kept')
    """

    path: str
    held: str
    outcome: str
    note: str = ""


@dataclasses.dataclass(frozen=True)
class TransplantReport:
    """What `transplant` did with each array that belongs to a param.

    Printed, it is a table.

    Attributes:
      rows: a `TransplantRow` for each.

    Example:
      >>> import jax.numpy as jnp, momentum_jax as mj
      >>> tx = mj.momentum(0.1)
      >>> params, wider = {"w": jnp.ones(2)}, {"w": jnp.ones(2), "b": jnp.ones(1)}
      >>> _, report = mj.transplant(tx.init(params), tx.init(wider))
      >>> print(report)
      param  array                   outcome
      ['b']  MomentumState.velocity  fresh
      ['w']  MomentumState.velocity  kept
      >>> report.fresh
      ("['b']",)
    """

    rows: tuple[TransplantRow, ...]

    @property
    def kept(self) -> tuple[str, ...]:
        """The paths of params of which an array was carried as it is, or in another dtype."""
        return self._paths(KEPT)

    @property
    def resized(self) -> tuple[str, ...]:
        """Those of which one was carried in another shape."""
        return self._paths(RESIZED)

    @property
    def fresh(self) -> tuple[str, ...]:
        """Those of which one is as `init` made it: a velocity of 0."""
        return self._paths(FRESH)

    @property
    def dropped(self) -> tuple[str, ...]:
        """Those in the old state of which one is not in the new one."""
        return self._paths(DROPPED)

    def _paths(self, outcome):
        return tuple(dict.fromkeys(row.path for row in self.rows if row.outcome == outcome))

    def __str__(self) -> str:
        """The rows as a table."""
        return _table(self.rows)


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
    the sums of `MultiSteps` and `last_params` of `adaptive_restart`. It is found in chains, groups
    of `optax.partition`, under wrappers, and in an `nnx.Optimizer`'s `opt_state`, wherever it is in
    either state. Counts and schedules go on, and so do hyperparameters that
    `optax.inject_hyperparams` holds.

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
        renamed paths, as floats. So it can select by an index, split, stack.
      strict: whether it is an error if anything is fresh or dropped.

    Returns:
      The state, and a `TransplantReport` that says of each array what became of it. Under jit
      return the state alone: the report is not an array. What keeps its dtype and shape keeps its
      bits; 8 bits that are resized are rounded once more. A count that the old state does not have
      is that of its other counts, or if it has none 1, unless every velocity is 0.

    Raises:
      ValueError: nothing can be carried; a velocity that means something else in the new state,
        such as that of `momentum` for `trace`, which differ by the learning rate: see
        `frameworks.outside_from_inside`; a rename that fits no path, or gives two arrays one path;
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
    state, rows = carried(old_state, new_state, rename=rename, resize=resize)
    report = TransplantReport(rows)
    outcomes = {row.outcome for row in rows}
    if {FRESH, DROPPED} <= outcomes and not outcomes & {KEPT, RESIZED}:
        raise ValueError(
            "nothing of the old state can be carried: no array has its path and its shape in the "
            f"new one. Give rename, or resize.\n{report}"
        )
    if strict and outcomes & {FRESH, DROPPED}:
        lost = TransplantReport(tuple(row for row in rows if row.outcome in (FRESH, DROPPED)))
        raise ValueError(f"strict=True, but not everything was carried:\n{lost}")
    return state, report


def carried(
    old_state: PyTree,
    new_state: PyTree,
    *,
    rename: Rename | None = None,
    resize: bool | Resize = False,
    converts: Mapping[type, type] | None = None,
    factor: jax.typing.ArrayLike | None = None,
    count: int | None = None,
) -> tuple[PyTree, tuple[TransplantRow, ...]]:
    """What `transplant` does, and the rows of its report.

    With `converts`, velocities of a type of state, its keys, are those of another one, its values,
    times the factor. With a count, all counts of steps are that.
    """
    converts = converts or {}
    old, new = _Old(old_state, rename, converts), find(new_state)
    _check_kinds(old, new, converts)
    plan = [
        entry
        for node, number in _numbered(new)
        for entry in _planned(node, number, old, resize, converts)
    ]
    plan = _counted(plan, old, count)
    filled = iter(_filled(plan, factor))

    def part(node):
        return with_held(node, [next(filled) for _ in held_by(node)])

    state = replace(new_state, part)
    rows = [entry.row for entry in plan if entry.row is not None]
    return state, tuple(rows + old.dropped())


# What the old state holds. ---------------------------------------------------------------


@dataclasses.dataclass
class _Source:
    """An array of the old state that belongs to a param."""

    stored: Stored
    path: str
    held: str
    is_velocity: bool
    used: bool = False

    def decoded(self):
        """The array as floats."""
        return _decode(self.stored) if self.is_velocity else jnp.asarray(self.stored.values)


class _Arrays(Mapping):
    """The arrays of one kind by their renamed paths, which notes what is read."""

    def __init__(self, sources: dict[str, _Source]) -> None:
        self._sources = sources
        self.read: list[_Source] = []

    def __getitem__(self, path: str) -> jax.Array:
        source = self._sources[path]
        self.read.append(source)
        return source.decoded()

    def __iter__(self) -> Iterator[str]:
        return iter(self._sources)

    def __len__(self) -> int:
        return len(self._sources)


class _Old:
    """What the old state holds: by kind and path of a param, and besides in order."""

    def __init__(self, state, rename, converts):
        self.nodes = find(state)
        self.sources: dict[Any, dict[str, _Source]] = {}
        self.others: dict[Any, list[Any]] = {}
        renamed = _Renaming(rename)
        for node, number in _numbered(self.nodes):
            for held in held_by(node):
                key = (_kind(node), _field(node, held))
                if not _of_param(node, held):
                    self.others.setdefault((*key, held.path), []).append(held.stored.values)
                    continue
                path = renamed(held.path)
                of_kind = self.sources.setdefault((*key, number), {})
                if path in of_kind:
                    raise ValueError(
                        f"rename gives two arrays the path {path}: {of_kind[path].path} and "
                        f"{held.path} of {_label(node, held)}. Give each a path of its own."
                    )
                of_kind[path] = _Source(
                    held.stored, held.path, _label(node, held), has_velocity(node)
                )
        renamed.check()

    def dropped(self) -> list[TransplantRow]:
        """A row for each array that went nowhere."""
        return [
            TransplantRow(source.path, source.held, DROPPED)
            for of_kind in self.sources.values()
            for source in of_kind.values()
            if not source.used
        ]

    def counts(self) -> list[Any]:
        """All counts of steps."""
        return [
            held.stored.values
            for node in self.nodes
            for held in held_by(node)
            if is_count(node, held)
        ]

    def has_moved(self) -> jax.Array:
        """Whether a velocity is not 0."""
        moved = [
            _any(source.stored.values)
            for (kind, *_), of_kind in self.sources.items()
            for source in of_kind.values()
            if kind in STATE_TYPES
        ]
        return jnp.any(jnp.asarray([False, *moved]))


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
        self.paths: dict[str, None] = {}

    def __call__(self, path):
        self.paths[path] = None
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

    def check(self):
        if self.unused:
            raise ValueError(
                f"rename has {', '.join(map(repr, self.unused))}, with which no path of a param in "
                f"the old state begins. There are: {', '.join(self.paths) or 'none'}."
            )

    def _text(self, path):
        if not isinstance(path, str):
            raise TypeError(f"rename must give paths as text, but gave {path!r}.")
        return path


def _starts_with(path, prefix):
    return isinstance(prefix, str) and (
        path == prefix or (path.startswith(prefix) and path[len(prefix)] in "[.")
    )


def _numbered(nodes):
    """Each state, and which one it is of those of its kind that hold the same params.

    Groups hold different params, and are one.
    """
    taken: dict[Any, list[set[tuple[str, str]]]] = {}
    for node in nodes:
        paths = {(held.field, held.path) for held in held_by(node) if _of_param(node, held)}
        of_kind = taken.setdefault(_kind(node), [])
        number = next((i for i, have in enumerate(of_kind) if not paths & have), len(of_kind))
        if number == len(of_kind):
            of_kind.append(set())
        of_kind[number] |= paths
        yield node, number


def _kind(node):
    return TraceState if isinstance(node, optax.TraceState) else type(node)


def _is_velocity(node, held):
    return (has_velocity(node) and held.field != "count") or isinstance(node, optax.TraceState)


def _field(node, held):
    """The field, by one name for the velocities of all types."""
    if not _is_velocity(node, held):
        return held.field
    return "velocity" + held.field[held.field.find("[") :] * ("[" in held.field)


def _label(node, held):
    return f"{type(node).__name__}.{held.field}" if held.field else "the state"


def _of_param(node, held: Held) -> bool:
    """Whether an array belongs to a param, and is not a count, a scale or a key."""
    if has_velocity(node):
        return held.field != "count"
    if optax_name(node).startswith("Inject"):
        return False
    values = held.stored.values
    dtype = getattr(values, "dtype", np.dtype(type(values)))
    if jnp.issubdtype(dtype, jax.dtypes.extended):
        return False
    return bool(held.path) or (np.shape(values) != () and jnp.issubdtype(dtype, jnp.inexact))


def _check_kinds(old, new, converts):
    """Raises where the velocities of both mean different things."""
    theirs = {kind: None for kind, *_ in old.sources if kind in STATE_TYPES}
    ours = {converts.get(kind, kind): kind for kind in map(_kind, new) if kind in STATE_TYPES}
    if not theirs or not ours or theirs.keys() & ours.keys():
        return
    one, other = next(iter(theirs)), next(iter(ours.values()))
    convert = {
        (TraceState, MomentumState): " momentum_jax.frameworks.inside_from_outside converts.",
        (MomentumState, TraceState): " momentum_jax.frameworks.outside_from_inside converts.",
    }
    raise ValueError(
        f"the old state is {one.__name__}, of {STATE_TYPES[one]}, and the new one is "
        f"{other.__name__}, of {STATE_TYPES[other]}: what their velocities mean differs, as in "
        f"sign and scale.{convert.get((one, other), '')}"
    )


# What goes where. ------------------------------------------------------------------------


class _Entry(NamedTuple):
    """What is to be in a place of the new state."""

    node: Any
    held: Held
    # None where it stays as it is.
    source: Any = None
    is_velocity: bool = False
    is_converted: bool = False
    row: TransplantRow | None = None


def _planned(node, number, old, resize, converts):
    kind = converts.get(_kind(node), _kind(node))
    for held in held_by(node):
        key = (kind, _field(node, held))
        if _of_param(node, held):
            sources = old.sources.get((*key, number), {})
            entry = _of_a_param(node, held, sources, resize)
            yield entry._replace(is_converted=kind is not _kind(node))
        else:
            yield _Entry(node, held, old.others.get((*key, held.path)))


def _of_a_param(node, held, sources, resize):
    target, source = held.stored, sources.get(held.path)
    shape = np.shape(target.values)
    row = TransplantRow(held.path, _label(node, held), KEPT)
    is_velocity = has_velocity(node)
    if source is not None and np.shape(source.stored.values) == shape:
        if not _check_dtypes(row, source, target, is_velocity):
            note = f"{_dtype_of(source.stored)} is now {_dtype_of(target)}"
            return _Entry(node, held, row=row._replace(outcome=FRESH, note=note))
        source.used = True
        note = ", ".join(_changes(source, target, row))
        return _Entry(node, held, source, is_velocity, row=row._replace(note=note))
    if callable(resize):
        arrays = _Arrays(sources)
        made = resize(held.path, arrays, shape)
        if made is not None:
            array = _check_made(held.path, made, shape, target, is_velocity)
            for each in arrays.read:
                each.used = True
            read = dict.fromkeys(each.path for each in arrays.read)
            note = f"resize made {shape} of {', '.join(read) or 'nothing'}"
            made_source = _Source(Stored(array), held.path, row.held, False)
            row = row._replace(outcome=RESIZED, note=note)
            return _Entry(node, held, made_source, is_velocity, row=row)
    if source is None:
        return _Entry(node, held, row=row._replace(outcome=FRESH))
    note = f"{np.shape(source.stored.values)} -> {shape}"
    overlaps = resize is True and np.ndim(source.stored.values) == len(shape)
    if not overlaps or not _check_dtypes(row, source, target, is_velocity):
        return _Entry(node, held, row=row._replace(outcome=FRESH, note=note))
    source.used = True
    note = ", ".join([note, *_changes(source, target, row)])
    return _Entry(node, held, source, is_velocity, row=row._replace(outcome=RESIZED, note=note))


def _check_dtypes(row, source, target, is_velocity):
    """Whether the one can be stored as the other; raises where only a part of it could."""
    held = decoded_dtype(source.stored) if source.is_velocity else source.stored.values.dtype
    wanted = decoded_dtype(target) if is_velocity else target.values.dtype
    if jnp.issubdtype(held, jnp.inexact) and jnp.issubdtype(wanted, jnp.inexact):
        complex_now, complex_then = (jnp.issubdtype(x, jnp.complexfloating) for x in (held, wanted))
        if complex_now != complex_then:
            raise TypeError(
                f"{row.held} {_at(row.path)} is {held} in the old state, but {wanted} in the new "
                "one: a real and a complex array do not mix. Give the state of init for params of "
                "the same kind, or leave the param out."
            )
        return True
    return held == wanted


def _changes(source, target, row):
    """Notes of what is not as it was."""
    before, after = _dtype_of(source.stored), _dtype_of(target)
    if before != after:
        yield f"{before} -> {after}"
    if source.path != row.path:
        yield f"was {source.path or 'at the root'}"


def _dtype_of(stored):
    return str(stored.values.dtype)


def _check_made(path, made, shape, target, is_velocity):
    array = jnp.asarray(made)
    wanted = decoded_dtype(target) if is_velocity else target.values.dtype
    if array.shape != shape:
        raise ValueError(
            f"resize must return an array of shape {shape} for {path or 'the root'}, or None, but "
            f"returned one of shape {array.shape}."
        )
    if jnp.issubdtype(array.dtype, jnp.complexfloating) != jnp.issubdtype(
        wanted, jnp.complexfloating
    ):
        raise TypeError(
            f"resize must return an array for {path or 'the root'} that can be stored as {wanted}, "
            f"but returned one of {array.dtype}: a real and a complex array do not mix."
        )
    return array


def _at(path):
    return f"at {path}" if path else "at the root"


# Counts, schedules and all else that belongs to no param. -----------------------------------


def _counted(plan, old, count):
    """The plan, with what is to be in the places that belong to no param."""
    seen: dict[Any, int] = {}
    numbers: dict[Any, int] = {}
    for entry in plan:
        if entry.row is None:
            key = (_kind(entry.node), entry.held.field, entry.held.path)
            numbers[key] = numbers.get(key, 0) + 1

    def entry_of(entry):
        if entry.row is not None:
            return entry
        node, held = entry.node, entry.held
        key = (_kind(node), held.field, held.path)
        index = seen[key] = seen.get(key, -1) + 1
        if is_count(node, held) and count is not None:
            return entry._replace(source=count)
        olds = entry.source
        if olds:
            if len(olds) != numbers[key]:
                _check_alike(olds, node, held)
            return _of_no_param(entry, olds[min(index, len(olds) - 1)])
        if not is_count(node, held):
            return entry._replace(source=None)
        return _of_other_counts(entry, old)

    return [entry_of(entry) for entry in plan]


def _of_no_param(entry, source):
    node, held = entry.node, entry.held
    shape = np.shape(held.stored.values)
    if np.shape(source) not in (shape, ()):
        return entry._replace(source=None)
    row = None
    if optax_name(node).startswith("Inject") and held.field == "hyperparams":
        before, after = source, held.stored.values
        readable = all(_can_be_read(x) and np.shape(x) == () for x in (before, after))
        if readable and np.asarray(before) != np.asarray(after):
            note = f"{float(before):.7g}, which was to be {float(after):.7g}"
            row = TransplantRow("", f"{_label(node, held)}{held.path}", NOTED, note)
    return entry._replace(source=source, row=row)


def _of_other_counts(entry, old):
    """A count that the old state does not have, from those that it has."""
    counts = old.counts()
    label = _label(entry.node, entry.held)
    if counts:
        _check_alike(counts, entry.node, entry.held)
        note = "of the old state's other counts"
        return entry._replace(source=counts[0], row=TransplantRow("", label, NOTED, note))
    if not has_velocity(entry.node):
        note = "the old state does not count its steps"
        return entry._replace(source=None, row=TransplantRow("", label, FRESH, note))
    note = "1 if a velocity is not 0: the old state does not count its steps"
    row = TransplantRow("", label, NOTED, note)
    return entry._replace(source=old.has_moved(), row=row)


def _check_alike(counts, node, held):
    known = {
        int(number)
        for values in counts
        if _can_be_read(values) and jnp.issubdtype(values.dtype, jnp.integer)
        for number in np.ravel(np.asarray(values))
    }
    if len(known) > 1:
        raise ValueError(
            f"the parts of the old state have counted {sorted(known)}, not alike, so that it is "
            f"not clear which is meant for {_label(node, held)}. Carry over the parts one by one."
        )


def _can_be_read(x):
    return not isinstance(x, Tracer) and getattr(x, "is_fully_addressable", True)


# The arrays. ---------------------------------------------------------------------------------

_decode = inlined_jit(_velocity.decode)
_any = inlined_jit(jnp.any)


def _filled(plan, factor):
    """What is to be in each place: one program for all, or one per group of devices."""
    results: list[Any] = [entry.held.stored for entry in plan]
    places, targets, sources, modes = [], [], [], []
    for i, entry in enumerate(plan):
        source, target = entry.source, entry.held.stored
        if source is None:
            continue
        if not isinstance(source, _Source):
            results[i] = Stored(like(target.values, source))
            continue
        places.append(i)
        targets.append(jax.tree.map(jnp.asarray, target))
        sources.append(_beside(jax.tree.map(jnp.asarray, source.stored), targets[-1]))
        modes.append((source.is_velocity, entry.is_velocity, entry.is_converted))
    if places:
        (stored, lost), _ = _carried((tuple(modes),), (targets, sources), factor)
        for i, one in zip(places, stored, strict=True):
            results[i] = one
        _check_lost([plan[i] for i in places], lost)
    return results


def _check_lost(entries, lost):
    for entry, bad in zip(entries, lost, strict=True):
        if bad is not None and _can_be_read(bad) and int(bad):
            target = entry.held.stored
            raise ValueError(
                f"{_label(entry.node, entry.held)} {_at(entry.held.path)} has {int(bad)} of "
                f"{np.size(target.values)} values that are too large for {_dtype_of(target)}. Give "
                "a state with wider velocities."
            )


def like(target: Any, value: Any) -> Any:
    """A value of no param, in the dtype, the shape and the sharding of what it replaces."""
    target = jnp.asarray(target)
    if jnp.issubdtype(target.dtype, jax.dtypes.extended):
        return value
    if isinstance(value, Tracer) or isinstance(target, Tracer):
        return jnp.broadcast_to(value, target.shape).astype(target.dtype)
    value = np.broadcast_to(to_host(value), target.shape).astype(target.dtype)
    return placed_like(target, value)


def placed_like(target: jax.Array, value: np.ndarray) -> jax.Array:
    """A value from the host, in the sharding of what it replaces."""
    if not target.committed:  # What is bound to no device stays free to follow others.
        return jnp.asarray(value)
    if target.is_fully_addressable:
        return jax.device_put(value, target.sharding)
    return jax.make_array_from_callback(value.shape, target.sharding, value.__getitem__)


def to_host(array: Any) -> np.ndarray:
    """An array whole, as NumPy; in every process, if it is sharded over several."""
    if isinstance(array, jax.Array) and not (
        array.is_fully_addressable or array.is_fully_replicated
    ):
        array = multihost_utils.process_allgather(array, tiled=True)
    return np.asarray(array)


def _beside(source, target):
    """The source where the target is: on its devices, on its mesh."""
    if isinstance(source.values, Tracer) or isinstance(target.values, Tracer):
        return source
    if group_of(source.values) == group_of(target.values):
        return source
    scales = source.scales
    if scales is not None:
        scales = _put(scales, target.values if target.scales is None else target.scales)
    return Stored(_put(source.values, target.values), scales)


def _put(x, beside):
    sharding = beside.sharding if x.shape == beside.shape else replicated(beside.sharding)
    on_same = x.sharding.device_set == sharding.device_set
    if not beside.committed:
        return x if on_same else jnp.asarray(to_host(x))
    if on_same or (x.is_fully_addressable and sharding.is_fully_addressable):
        return jax.device_put(x, sharding)
    x = to_host(x)
    return jax.make_array_from_callback(x.shape, sharding, x.__getitem__)


@by_leaf
def _carried(static, trees, factor):
    (modes,), (targets, sources) = static, trees
    results = [
        (Stored(None), None)
        if target.values is None
        else _carried_leaf(target, source, mode, factor)
        for target, source, mode in zip(targets, sources, modes, strict=True)
    ]
    stored, lost = zip(*results, strict=True)
    return (list(stored), list(lost)), ()


def _carried_leaf(target, source, mode, factor):
    was_velocity, is_velocity, is_converted = mode
    given = target
    target, source = on_device((target, source))
    same = was_velocity == is_velocity and not is_converted
    if same and _types(source) == _types(target):
        return in_memory_of(given, jax.tree.map(_copied_like, source, target)), None
    value = codec_of(source).decode(source) if was_velocity else source.values
    before = value
    if is_converted:
        wide = compute_dtype(value.dtype)
        value = jnp.asarray(factor, wide) * value.astype(wide)
    if value.shape != target.values.shape:
        value = _overlapping(
            value, codec_of(target).decode(target) if is_velocity else target.values
        )
    if is_velocity:
        stored = _velocity.encoded(value, target)
    else:
        stored = Stored(value.astype(target.values.dtype))
    stored = jax.tree.map(_copied_like, stored, target)
    lost = None
    if is_converted or _narrows(value.dtype, stored.values.dtype):
        read = codec_of(stored).decode(stored) if is_velocity else stored.values
        lost = jnp.where(jnp.all(jnp.isfinite(before)), jnp.sum(~jnp.isfinite(read)), 0)
    return in_memory_of(given, stored), lost


def _types(stored):
    return [(x.shape, x.dtype) for x in jax.tree.leaves(stored)]


def _copied_like(x, other):
    return hold_like(jnp.copy(x), other)


def _narrows(before, after):
    return jnp.issubdtype(before, jnp.inexact) and jnp.promote_types(before, after) != after


def _overlapping(value, base):
    """The base, with the value where both shapes overlap."""
    dtype = jnp.promote_types(value.dtype, base.dtype)
    sizes = [min(pair) for pair in zip(value.shape, base.shape, strict=True)]
    value = lax.slice(whole(value.astype(dtype)), [0] * len(sizes), sizes)
    return lax.dynamic_update_slice(whole(base.astype(dtype)), value, [0] * len(sizes))


# The report. ---------------------------------------------------------------------------------


def _table(rows: Sequence[TransplantRow]) -> str:
    lines = [("param", "array", "outcome", "")]
    lines += [(row.path or "-", row.held, row.outcome, row.note) for row in rows]
    widths = [max(len(line[i]) for line in lines) for i in range(3)]
    return "\n".join(
        "  ".join(
            [*(text.ljust(width) for text, width in zip(line, widths, strict=False)), line[3]]
        ).rstrip()
        for line in lines
    )
