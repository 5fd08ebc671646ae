"""Carries a state over to changed params or to a changed optimizer."""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from momentum_jax._hyperparameters import check_flag
from momentum_jax._leaves import ARRAYS, path_text
from momentum_jax._momentum import MomentumState, TraceState
from momentum_jax._state_types import STATE_TYPES
from momentum_jax._states._globals import can_be_read, dropped_globals, global_values
from momentum_jax._states._matching import (
    group_by_meaning,
    has_same_structure,
    match_arrays,
    match_globals,
)
from momentum_jax._states._moving import Move, cast_like, move_arrays
from momentum_jax._states._per_param import (
    Resize,
    Transfer,
    can_store,
    keep,
    sources_of,
    transfers_to,
)
from momentum_jax._states._places import Place, places_of
from momentum_jax._states._renaming import Rename, Renaming
from momentum_jax._states._report import (
    DROPPED,
    FRESH,
    KEPT,
    RESIZED,
    TransplantReport,
    TransplantRow,
)
from momentum_jax._states._rules import kind_of, rules_of
from momentum_jax._states._walk import held_arrays, replace_states, with_held_arrays
from momentum_jax._storage import Stored

PyTree = Any


def transplant(
    old_state: optax.OptState,
    new_state: optax.OptState,
    rename: Rename | None = None,
    resize: bool | Resize = False,
    *,
    strict: bool = False,
) -> tuple[Any, TransplantReport]:
    """Carries a state over to changed params or to a changed optimizer, with its velocities.

    Use it when layers are added, frozen, unfrozen, renamed, widened, pruned or moved between
    groups; when `velocity_dtype` changes; and when a wrapper is added or removed.

    **Arrays that belong to a param** go to the same path in the new state: velocities, and every
    other array that a state of Optax holds per param, such as the moments of Adam, the accumulated
    gradients of `MultiSteps` and the `previous_params` of `adaptive_restart`. They are found
    anywhere in either state: in chains, in groups of `optax.partition`, inside wrappers, and in the
    `opt_state` of an `nnx.Optimizer`.

    **Global values** go with the params that they concern. These are counts (on which
    schedules depend), scales of the loss or of the gradients, and the hyperparameters that
    `optax.inject_hyperparams` holds. For example, a learning rate goes with the params of its
    group. In detail:

    - Groups are merged: if one of them keeps its label, its values are used. Otherwise the groups
      must agree: counts that differ raise an error; where other values differ, those of
      `new_state` stay.
    - A group that has no param of an old group starts as `init` made it. Only the counts of
      schedules and velocities are taken from the old state.
    - If no array shows which params a group has, as with `optax.sgd` without momentum, groups are
      matched by their labels.
    - `optax.MultiSteps` counts steps within it and gradients around it. A schedule that moves into
      it continues from the number of steps. A schedule that moves out of it starts again, because
      the number of gradients is not known.
    - Parts of a chain that look alike in the state are matched in their order. So are optimizers of
      params with equal paths, if the keys of their states change.
    - A wrapper's own counts start as `init` made them if the wrapper is new.
    - If `optax.flatten` made one array of all params, it is carried over as one array, even if the
      order of the params has changed.

    A state type of your own is found if it has named fields (a NamedTuple, a registered dataclass):
    in chains and groups, and in those fields of wrappers whose names end in "state" or "states".

    Args:
      old_state: the state of the training so far.
      new_state: the state that `init` of the new optimizer returned for the new params. It gives
        the structure, the dtypes and the shardings.
      rename: the paths of params that changed, as a dict from old to new prefixes of paths, written
        as `jax.tree_util.keystr` writes them: {"['enc']": "['encoder']"}. The longest prefix that
        fits is used. Or a function from the old path to the new one. Default: no path changed.
      resize: what to do with an array whose shape changed. One of:

        - False, the default: it stays as `init` made it, which is 0 for a velocity.
        - True: it is carried over where both shapes overlap. Elsewhere it stays as `init` made it.
        - A function `(path, old, new_shape)` that returns the array for a new path, or None to
          leave it as `init` made it. It is called where the old state has no array of this path
          and shape. `old` maps the renamed paths to all old arrays of the same kind, as floats;
          those that the function reads count as carried over. It can select by an index, split or
          stack.
      strict: whether to raise an error if an array is fresh or dropped. This includes a count, a
        scale or a hyperparameter that has a counterpart in the old state. Default False.

    Returns:
      The state, and a `TransplantReport` that says what happened to each array. Under jit return
      the state alone, because the report is not an array.

      - An array whose dtype and shape stay the same keeps its bits. An 8-bit velocity that is
        resized is rounded once more.
      - A count that the old state does not have is taken from its other counts. If the old state
        has no count, it is 1, or 0 if every velocity is 0.
      - Under jit values are not known: of several counts the first is used, other values that
        differ stay those of `new_state`, and `strict` sees only shapes and dtypes.

    Raises:
      ValueError: nothing can be carried over; or no velocity has the same meaning in the new state:
        for example the velocities of `momentum` and `trace` differ by the learning rate (see
        `frameworks.trace_from_momentum`); or a prefix in `rename` fits no path, or two arrays get
        one path; or counts differ where one is needed; or values are too large for their new
        dtype; or with `strict` something is fresh or dropped.
      TypeError: a real array would go to a complex one, or the reverse; or an argument has a wrong
        type.

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
    state, rows = _carry_over(old_state, new_state, rename, resize)
    report = TransplantReport(rows)
    outcomes = {row.outcome for row in rows}
    if not outcomes & {KEPT, RESIZED} and _has_counterparts(rows):
        raise ValueError(
            "nothing of the old state can be carried over: the new state has no array of the same "
            "kind, path and shape. Give rename or resize; or if nothing is meant to be carried "
            f"over, use new_state as it is.\n{report}"
        )
    if strict and outcomes & {FRESH, DROPPED}:
        lost = TransplantReport(tuple(row for row in rows if row.outcome in (FRESH, DROPPED)))
        raise ValueError(
            "strict=True, but not everything was carried over. Give rename or resize for the rows "
            f"below, or strict=False to accept them:\n{lost}"
        )
    return state, report


class Conversion(NamedTuple):
    """Converts velocities of one type of state to those of another.

    Attributes:
      new_type: the type of the new state.
      old_type: the type of the old state.
      factor: the number that the velocities are multiplied by.
    """

    new_type: type
    old_type: type
    factor: float


def carry_velocities(
    old_state: PyTree, new_state: PyTree, count: int | None, conversion: Conversion | None = None
) -> PyTree:
    """Returns the new state with the velocities of the old one, for the same params.

    The `previous_params` of `adaptive_restart` are carried over too. Everything else stays as it is
    in the new state, except for the step counts, which become `count` unless it is None.
    """

    def is_carried(place):
        is_velocity = kind_of(place.node) in STATE_TYPES
        return place.is_per_param and (is_velocity or rules_of(place.node).converted_with_velocity)

    def meaning_in_old(place):
        if conversion is None or kind_of(place.node) is not conversion.new_type:
            return place.meaning
        return conversion.old_type, *place.meaning[1:]

    old, new = places_of(jax.tree.map(_as_array, old_state)), places_of(new_state)
    old_groups = group_by_meaning([place for place in old if is_carried(place)])
    new_groups = group_by_meaning([place for place in new if is_carried(place)], meaning_in_old)
    matches = match_arrays(old_groups, new_groups, has_same_structure(old_state, new_state))
    transfers = [keep(place, other) for place, other in matches.items() if can_store(place, other)]
    counts = {} if count is None else {place: count for place in new if place.is_step_count}
    return _filled(new_state, new, transfers, counts, conversion)


def _carry_over(old_state, new_state, rename, resize):
    """Returns the state, and the rows of the report."""
    _check_state("old_state", old_state)
    _check_state("new_state", new_state)
    renaming = Renaming(rename)
    new_state = jax.tree.map(_as_array, new_state)
    old, new = places_of(jax.tree.map(_as_array, old_state), renaming), places_of(new_state)
    renaming.check(old)
    _check_methods(old, new)
    old_groups, new_groups = group_by_meaning(old), group_by_meaning(new)
    same_structure = has_same_structure(old_state, new_state)
    matches = match_arrays(old_groups, new_groups, same_structure)
    transfers = transfers_to(new_groups, old_groups, matches, resize)
    sources = sources_of(transfers)
    global_matches = match_globals(old, new, sources, same_structure)
    values, rows = global_values(global_matches, old, sources)
    state = _filled(new_state, new, [each for each in transfers if each.source], values)
    rows |= {transfer.place: transfer.row for transfer in transfers}
    rows_of_new = [rows[place] for place in new if place in rows]
    return state, (*rows_of_new, *_dropped_rows(old, new, global_matches))


def _filled(
    state: PyTree,
    places: list[Place],
    transfers: list[Transfer],
    values: Mapping[Place, Any],
    conversion: Conversion | None = None,
) -> PyTree:
    """Returns the state with the transferred arrays, and the global values, in its places."""
    converted_type = None if conversion is None else conversion.new_type
    factor = None if conversion is None else conversion.factor
    moves = [
        Move(
            source=transfer.source,
            target=transfer.place.held.stored,
            was_velocity=transfer.was_velocity,
            is_velocity=transfer.place.is_velocity,
            is_converted=kind_of(transfer.place.node) is converted_type,
        )
        for transfer in transfers
        if transfer.source is not None
    ]
    arrays, no_longer_finite = move_arrays(moves, factor)
    for transfer, number in zip(transfers, no_longer_finite, strict=True):
        _check_finite(transfer, number)
    filled = {transfer.place: x for transfer, x in zip(transfers, arrays, strict=True)}
    for place, value in values.items():
        filled[place] = Stored(cast_like(place.values, value))
    contents = iter([filled.get(place, place.held.stored) for place in places])

    def replaced(node):
        return with_held_arrays(node, [next(contents) for _ in held_arrays(node)])

    return replace_states(state, replaced)


def _dropped_rows(
    old: list[Place], new: list[Place], global_matches: Mapping[Place, list[Place]]
) -> Iterator[TransplantRow]:
    """Yields a row for each old array that is lost, and for each lost global value that matters."""
    for place in old:
        if not place.is_per_param:
            yield from dropped_globals(place, new, global_matches)
        elif not place.used:
            yield TransplantRow(place.held.path, place.label, DROPPED)


def _has_counterparts(rows):
    """Whether an array of the same kind is fresh in the new state and dropped from the old one."""
    fresh, dropped = (
        {row.array for row in rows if row.path is not None and row.outcome == outcome}
        for outcome in (FRESH, DROPPED)
    )
    return bool(fresh & dropped)


def _as_array(x):
    return jnp.asarray(x) if isinstance(x, (int, float, complex)) else x


def _check_state(name, state):
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        if not isinstance(leaf, ARRAYS):
            raise TypeError(
                f"{name} {path_text(path)} is {type(leaf).__name__}, not an array. Give "
                "a state that init or update returned."
            )
    if type(state) in (tuple, list, dict, type(None)) and not state:
        raise TypeError(f"{name}={state!r} is not a state. Give one that init or update returned.")


def _check_methods(old, new):
    """Raises a ValueError if the velocities of both states have different meanings."""
    old_types, new_types = (
        dict.fromkeys(kind_of(place.node) for place in places if kind_of(place.node) in STATE_TYPES)
        for places in (old, new)
    )
    if not old_types or not new_types or old_types.keys() & new_types.keys():
        return
    old_type, new_type = next(iter(old_types)), next(iter(new_types))
    remedies = {
        (TraceState, MomentumState): "momentum_jax.frameworks.momentum_from_trace converts it.",
        (MomentumState, TraceState): "momentum_jax.frameworks.trace_from_momentum converts it.",
    }
    remedy = remedies.get((old_type, new_type), "Start from new_state as it is.")
    raise ValueError(
        f"the old state is {old_type.__name__}, of {STATE_TYPES[old_type]}, and the new one is "
        f"{new_type.__name__}, of {STATE_TYPES[new_type]}: their velocities differ in meaning, "
        f"such as in sign and scale. {remedy}"
    )


def _check_finite(transfer, no_longer_finite):
    """Raises a ValueError if values became infinite in their new dtype, where that is known."""
    if no_longer_finite is None or not can_be_read(no_longer_finite) or not int(no_longer_finite):
        return
    target = transfer.place.values
    raise ValueError(
        f"{transfer.row.array} {path_text(transfer.row.path)} has {int(no_longer_finite)} of "
        f"{np.size(target)} values that are too large for {target.dtype}. Give a new_state of a "
        "wider dtype."
    )
