"""The types of states: of transformations with a velocity, and of wrappers."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from jax import export

from momentum_jax._storage import Stored

# Each type of state with a velocity, with the name of the function that makes such states. Their
# fields are a count, the values and the scales.
STATE_TYPES: dict[type, str] = {}
# The types of states of wrappers, which have a field `inner_state`.
WRAPPER_STATES: dict[type, "WrapperState"] = {}
# The types whose values and scales are tuples, with one entry per velocity.
_OF_SEVERAL: set[type] = set()
_T = TypeVar("_T", bound=type)


@dataclasses.dataclass(frozen=True)
class WrapperState:
    """What is known of the type of a wrapper's state.

    Attributes:
      made_by: the name of the function that makes such states.
      reset_with_velocity: the field that is set to 0 where the velocity is.
      converted_with_velocity: whether the state goes along when velocities alone are carried over.
    """

    made_by: str
    reset_with_velocity: str | None = None
    converted_with_velocity: bool = False


def holds_velocity(made_by: str, *, several: bool = False) -> Callable[[_T], _T]:
    """Marks a type of state as one that holds a velocity, and registers it for `jax.export`."""

    def mark(state_type: _T) -> _T:
        STATE_TYPES[state_type] = made_by
        if several:
            _OF_SEVERAL.add(state_type)
        return register_export(state_type)

    return mark


def wrapper_state(made_by: str, **rules: Any) -> Callable[[_T], _T]:
    """Marks a type of state as one of a wrapper, and registers it for `jax.export`.

    `rules` are the other attributes of `WrapperState`.
    """

    def mark(state_type: _T) -> _T:
        WRAPPER_STATES[state_type] = WrapperState(made_by, **rules)
        return register_export(state_type)

    return mark


def register_export(node_type: _T) -> _T:
    """Registers a NamedTuple for `jax.export`."""
    export.register_namedtuple_serialization(
        node_type, serialized_name=f"momentum_jax.{node_type.__name__}"
    )
    return node_type


def has_velocity(node: Any) -> bool:
    """Whether this is a state with a velocity of its own."""
    return isinstance(node, tuple(STATE_TYPES))


def has_several(state: Any) -> bool:
    """Whether this state, of one of the `STATE_TYPES`, holds a tuple of velocities."""
    return type(state) in _OF_SEVERAL


def velocities_in(state: Any) -> list[Stored]:
    """The velocities in a state of one of the `STATE_TYPES`."""
    _, values, scales = state
    if not has_several(state):
        return [Stored(values, scales)]
    return [Stored(*pair) for pair in zip(values, scales or [None] * len(values), strict=True)]


def state_of(state_type: type, count: Any, several: Sequence[Stored]) -> Any:
    """A state of one of the `STATE_TYPES` with this count and these velocities."""
    values, scales = zip(*several, strict=True)
    if state_type not in _OF_SEVERAL:
        return state_type(count, *values, *scales)
    return state_type(count, values, None if scales[0] is None else scales)


def with_velocities(state: Any, count: Any, several: Sequence[Stored]) -> Any:
    """A state of the same type with this count and these velocities."""
    return state_of(type(state), count, several)
