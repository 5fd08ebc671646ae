"""Decides the new global values: counts, scales, hyperparameters and random keys."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from momentum_jax._state_types import has_velocity
from momentum_jax._states._moving import any_velocity_nonzero
from momentum_jax._states._places import Place, step_counts, stored_velocities
from momentum_jax._states._report import DROPPED, FRESH, NOTED, TransplantRow
from momentum_jax._states._rules import is_hyperparameter_field, rules_of


def global_values(
    matches: Mapping[Place, list[Place]], old: list[Place], sources: Mapping[str, Iterable[str]]
) -> tuple[dict[Place, Any], dict[Place, TransplantRow]]:
    """Returns the new values by place, and the rows of the report on those that need a note.

    A place without a new value stays as `init` made it.
    """
    values: dict[Place, Any] = {}
    rows: dict[Place, TransplantRow] = {}
    old_meanings = {place.meaning for place in old if not place.is_per_param}
    for place, old_places in matches.items():
        outcome = FRESH
        if old_places:
            value, note = _common_value(place, old_places)
            if value is not None and note:
                outcome = NOTED
        elif place.is_step_count:
            value, note = _inferred_count(place, old, sources)
            if value is not None:
                outcome = NOTED
        elif place.meaning in old_meanings:
            value, note = None, "the old state has none for these params"
        elif not place.held.field:
            value, note = None, "known by its position alone, where the old state has nothing"
        else:
            continue
        if value is not None:
            values[place] = value
        if note:
            rows[place] = TransplantRow(None, place.label, outcome, note)
    return values, rows


def dropped_globals(
    place: Place, new: list[Place], matches: Mapping[Place, list[Place]]
) -> Iterator[TransplantRow]:
    """Yields a row for an old global value that is lost, if that would change the training."""
    remembered = rules_of(place.node).remembered
    if remembered is not None:
        is_reported, start = place.held.field == remembered.field, remembered.start
    else:
        is_reported, start = is_hyperparameter_field(place.held.field), None
    if not is_reported or not can_be_read(place.values):
        return
    changed = [float(x) for x in np.ravel(place.values) if x != start]
    if not changed:
        return
    value = f"{changed[0]:.7g}"
    destinations = [other for other, old_places in matches.items() if place in old_places]
    if not destinations:
        # It is not known which hyperparameters the new optimizer was made with.
        yield TransplantRow(None, place.label, NOTED if start is None else DROPPED, value)
        return
    new_paths = {other.param_path for other in new if other.is_per_param}
    carried_for = frozenset().union(*(other.concerns for other in destinations))
    lost_for = place.concerns & new_paths - carried_for
    if lost_for and start is not None and all(other.concerns for other in destinations):
        note = f"{value} of {', '.join(sorted(lost_for))}"
        yield TransplantRow(None, place.label, DROPPED, note)


def can_be_read(x: Any) -> bool:
    """Whether this process can read the value: it is not traced, nor sharded over processes."""
    if isinstance(x, Tracer):
        return False
    return getattr(x, "is_fully_addressable", True) or x.is_fully_replicated


def _common_value(place, old_places):
    """Returns the value that the old places agree on, or None, and a note."""
    target = place.values
    # Where groups become one, the group that keeps its label decides.
    same_group = [
        old
        for old in old_places
        if place.group_labels is not None and old.group_labels == place.group_labels
    ]
    deciding = same_group if same_group and len(old_places) > 1 else old_places
    first = deciding[0].values
    note = _type_mismatch(first, target)
    if note:
        return None, note
    fallback = first if place.is_count and len(deciding) > 1 else target
    value = _agreed(deciding, target, fallback)
    if value is None and place.is_count and len(old_places) > 1:
        raise _counts_differ(place, old_places)
    if value is None:
        return None, _shown(old_places, target)
    if np.shape(first) not in ((), np.shape(target)) and not can_be_read(value):
        return value, f"{np.shape(first)} -> {np.shape(target)}, if all are equal"
    if deciding is not old_places and _agreed(old_places, target, target) is None:
        return value, f"of {_shown(old_places, target)}"
    if _is_other_number(value, target):
        return value, f"{float(value):.7g} (new state: {float(target):.7g})"
    return value, ""


def _agreed(places, target, fallback):
    """Returns the value of all places, as a scalar or in the shape of the target.

    If the values differ, returns None; or the fallback where that is only known at run time.
    """
    values = [place.values for place in places]
    first, shape = values[0], np.shape(target)
    if len(values) == 1 and np.shape(first) in ((), shape):
        return first
    if any(np.shape(x) != shape for x in values):
        if any(np.size(x) == 0 for x in values):
            return None
        first = first.ravel()[0]
    is_equal = [_key_data(x) == _key_data(first) for x in values]
    if all(map(can_be_read, values)):
        return first if all(map(np.all, is_equal)) else None
    return jnp.where(jnp.stack([jnp.all(x) for x in is_equal]).all(), first, fallback)


def _key_data(x):
    return jax.random.key_data(x) if _is_key(x) else x


def _is_key(x):
    return jnp.issubdtype(x.dtype, jax.dtypes.extended)


def _shown(places, target):
    """Returns the old values as text, or their shapes."""
    values = [place.values for place in places]
    if any(map(_is_key, values)):
        return "several keys that differ"
    if len(values) == 1 or not all(can_be_read(x) and np.shape(x) == () for x in values):
        return f"{' and '.join(dict.fromkeys(str(np.shape(x)) for x in values))} -> {target.shape}"
    return " and ".join(dict.fromkeys(f"{x.item():.7g}" for x in values))


def _inferred_count(place, old, sources):
    """Returns a step count that the old state does not hold, from its other counts; and a note."""
    paths = {source for path in place.concerns for source in sources.get(path, (path,))}
    of_these_params = [other for other in old if other.concerns & paths]
    if step_counts(of_these_params):
        old = of_these_params
    # Within a state that accumulates gradients, counts are of steps; outside, of gradients.
    max_depth = max((other.accumulation_depth for other in old), default=0)
    counts = step_counts(
        [
            other
            for other in old
            if not max_depth or other.accumulation_depth == place.accumulation_depth
        ]
    )
    if not counts and max_depth and step_counts(old):
        if place.accumulation_depth:
            return None, "the old state counts gradients there, not steps"
        return None, "the old state counts steps there, not gradients"
    if counts:
        value = _agreed(counts, place.values, counts[0].values)
        if value is None:
            raise _counts_differ(place, counts)
        return value, "of the old state's other counts"
    if has_velocity(place.node):
        value = any_velocity_nonzero(stored_velocities(old))
        return value, "1 if a velocity is not 0: the old state does not count its steps"
    return None, "the old state does not count its steps"


def _type_mismatch(value, target):
    """Says why a place cannot hold a value; empty if it can."""
    value, target = jnp.asarray(value), jnp.asarray(target)
    if _is_key(value) or _is_key(target):
        fits = value.dtype == target.dtype
    else:
        target_is_inexact = jnp.issubdtype(target.dtype, jnp.inexact)
        fits = target_is_inexact or not jnp.issubdtype(value.dtype, jnp.inexact)
    return "" if fits else f"{value.dtype} is now {target.dtype}"


def _is_other_number(value, target):
    """Whether both are known floating-point scalars that differ; counts are integers."""
    return (
        all(can_be_read(x) and np.shape(x) == () for x in (value, target))
        and all(jnp.issubdtype(x.dtype, jnp.floating) for x in (value, target))
        and float(value) != float(target)
    )


def _counts_differ(place, places):
    counts = sorted({int(x) for other in places for x in np.ravel(other.values)})
    return ValueError(
        f"the parts of the old state have counted {counts}, but {place.label} needs one count, so "
        "all must be equal. Keep the parts separate; or set one count first, for example with "
        f"optax.tree.set(old_state, {place.held.field}=...)."
    )
