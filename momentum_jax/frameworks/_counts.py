"""How many steps the velocities and the schedules of a state have counted."""

import operator
from typing import Any

import numpy as np

from momentum_jax._state_types import has_velocity
from momentum_jax._states import (
    find_states,
    held_arrays,
    locate_states,
    rules_of,
    schedule_count_field,
    step_count_field,
    to_host,
)

PyTree = Any


def check_count_fits(state: PyTree, count: int | None, state_type: type) -> None:
    """Raises a ValueError if one count is not right, or too large, for all parts of the state."""
    if not count:
        return
    depths = set()
    for node, around, *_ in locate_states(state):
        for held in held_arrays(node):
            if held.field != step_count_field(node):
                continue
            if schedule_count_field(node) or isinstance(node, state_type):
                # Counts inside optax.MultiSteps, and its own, are steps; outside, gradients.
                with_node = (*around, node)
                depths.add(sum(rules_of(each).accumulates_gradients for each in with_node))
            limit = np.iinfo(held.stored.values.dtype).max
            if count > limit:
                raise ValueError(
                    f"count={count} must be at most {limit}: the state counts in "
                    f"{held.stored.values.dtype}. Give a smaller count, and shift the schedules by "
                    "the difference."
                )
    if len(depths) > 1:
        raise ValueError(
            "the state counts steps inside optax.MultiSteps and gradients outside it, so one "
            "count cannot be right for both. Put all schedules and momentum inside MultiSteps, "
            "or all outside."
        )


def taken_count(state: PyTree) -> int | None:
    """The number of steps that the velocities and the schedules have counted, if there are any.

    Raises a ValueError if the counts differ.
    """
    return _common_count(_velocity_counts(state) + _schedule_counts(state))


def scheduled_count(state: PyTree) -> int | None:
    """The number of steps that the schedules have counted, if there are any."""
    return _common_count(_schedule_counts(state))


def has_stepped(state: PyTree) -> bool:
    """Whether the velocities, or without velocities the schedules, have counted a step."""
    counts = _velocity_counts(state) or _schedule_counts(state)
    return any(any(_numbers(count)) for _, count in counts)


def steps_taken(
    count: int | None, known: int | None, state: PyTree, has_moved: bool, hint: str
) -> int:
    """The number of steps taken: what the caller gives, what is known, or a guess of 0 or 1.

    Args:
      count: the caller's argument; None if it was not given.
      known: the count that the source saves; None if it saves none.
      state: the state to fill. If it has a schedule, no guess is made.
      has_moved: whether the source has a velocity other than 0.
      hint: where the caller finds the count, for messages.
    """
    if count is not None:
        count = _check_count(count)
        if has_moved and not count:
            raise ValueError(
                f"count={count}, but there is a velocity, so at least one step was taken. Give "
                f"the number of steps, not of epochs ({hint})."
            )
        return count
    if known is not None:
        return known
    # The count of optax.MultiSteps matters only if the number of gradients follows a schedule,
    # which the state does not show.
    if any(not label.startswith("MultiStepsState") for label, _ in _schedule_counts(state)):
        raise ValueError(
            "the optimizer has a schedule that depends on the number of steps taken, but the "
            f"source does not contain this number. Give it: count=... ({hint})."
        )
    return int(has_moved)


def _check_count(count):
    try:
        whole = operator.index(count)
    except TypeError:
        whole = -1
    if whole < 0 or isinstance(count, bool):
        raise ValueError(f"count={count!r} must be the number of steps taken: 0, 1, 2, ...")
    return whole


def _schedule_counts(state):
    return _counts(state, schedule_count_field)


def _velocity_counts(state):
    return _counts(state, has_velocity)


def _counts(state, is_wanted):
    """The counts of the states that are wanted, each with a label for messages."""
    return [
        (f"{type(node).__name__}.{held.field}", held.stored.values)
        for node in find_states(state)
        if is_wanted(node)
        for held in held_arrays(node)
        if held.field == step_count_field(node)
    ]


def _numbers(count):
    """A set: the states of several runs may be stacked by vmap."""
    return {int(number) for number in np.ravel(to_host(count))}


def _common_count(labelled):
    counts = [(label, number) for label, count in labelled for number in _numbers(count)]
    found = sorted({number for _, number in counts})
    if len(found) > 1:
        each = ", ".join(dict.fromkeys(f"{label} {number}" for label, number in counts))
        raise ValueError(
            f"the parts of the state have counted different numbers of steps, {found} ({each}), "
            "so it is not clear which count is meant. If the function has an argument count, "
            "give it."
        )
    return found[0] if found else None
