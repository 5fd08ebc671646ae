"""The registry of the types that states consist of, for each framework.

The code that walks, resets and transplants states names no framework. Each framework registers its
types with `register_framework`; types are known by the framework's package and their own name,
because not every version of a framework exports them. A state type that is not registered, such as
a user's own, follows the defaults of `StateRules`.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from momentum_jax._state_types import WRAPPER_STATES, has_velocity

# The field in which the states of this package, and most other states, count their steps.
COUNT_FIELD = "count"


@dataclasses.dataclass(frozen=True)
class Remembered:
    """A value that a wrapper remembers. To lose it would change the training.

    Attributes:
      field: the field of the state that holds the value.
      start: the value that `init` sets. While the field has this value, nothing can be lost.
      loss: what would be lost otherwise; `{}` stands for the value.
      remedy: what the user can do to lose nothing.
    """

    field: str
    start: int
    loss: str
    remedy: str


@dataclasses.dataclass(frozen=True)
class StateRules:
    """What is known of a type of state. The defaults hold for types that are not registered.

    Attributes:
      step_count: the field that counts the steps that a schedule follows.
      schedules: the field that holds the schedules that follow `step_count`. While this field is
        empty, no schedule follows the count. None if a schedule always does.
      remembered: a value that must be reported if it is lost.
      not_per_param: the fields that do not hold one array per param.
      is_per_param: whether all other fields hold one array per param, even where the params are a
        single scalar.
      has_step_counts: whether the integers of the state may count steps.
      shapes_have_meaning: whether an array means something else if its param has another shape.
      selects_params: whether the state holds the state of a transformation of some params only,
        with a masked node for each of the others.
      accumulates_gradients: whether counts within this state count steps, while counts around it
        count gradients.
      same_as: another type, used in place of this one because its arrays mean the same.
      running_sums: the fields that add up small terms, which 16 bits would lose.
      reset_with_velocity: the field that is set to 0 where the velocity is.
      converted_with_velocity: whether the state goes along when velocities alone are carried over.
    """

    step_count: str | None = None
    schedules: str | None = None
    remembered: Remembered | None = None
    not_per_param: tuple[str, ...] = ()
    is_per_param: bool = False
    has_step_counts: bool = True
    shapes_have_meaning: bool = False
    selects_params: bool = False
    accumulates_gradients: bool = False
    same_as: type | None = None
    running_sums: tuple[str, ...] = ()
    reset_with_velocity: str | None = None
    converted_with_velocity: bool = False


@dataclasses.dataclass(frozen=True)
class FrameworkTypes:
    """The types of one framework, by their names.

    Attributes:
      states: the rules of its types of states, where they are not the defaults.
      has_states: whether its types are states, apart from those named below. If False, they are
        treated as types of the user's own.
      boxes: its types, with their subclasses, that wrap one array. The path of the array is that
        of the box.
      param_nodes: its types that take the place of params in a tree, and are not states.
      masked_nodes: the types among `param_nodes` that stand for a param that is left out.
      param_copies: the types among `param_nodes` that hold several trees like the params.
      group_fields: the names of fields that hold one state per group of params, by the label of
        the group. They hold in states of any type.
      hyperparameter_fields: the names of fields that hold hyperparameters, in states of any type.
      has_global_scalars: whether a floating-point scalar in one of its states belongs to no param,
        unless the rules of the type have `is_per_param`.
    """

    states: Mapping[str, StateRules] = dataclasses.field(default_factory=dict)
    has_states: bool = True
    boxes: tuple[str, ...] = ()
    param_nodes: tuple[str, ...] = ()
    masked_nodes: tuple[str, ...] = ()
    param_copies: tuple[str, ...] = ()
    group_fields: tuple[str, ...] = ()
    hyperparameter_fields: tuple[str, ...] = ()
    has_global_scalars: bool = False


# This package's own states are those of its transformations and wrappers.
_FRAMEWORKS: dict[str, FrameworkTypes] = {"momentum_jax": FrameworkTypes()}
_DEFAULTS = StateRules()
_NO_FRAMEWORK = FrameworkTypes(has_states=False)


def register_framework(package: str, framework: FrameworkTypes) -> None:
    """Makes the types of a framework known; `package` is the name of its top-level package."""
    _FRAMEWORKS[package] = framework


def rules_of(node: Any) -> StateRules:
    """The rules of a state, by its exact type."""
    return _rules_of_type(type(node))


def kind_of(node: Any) -> type:
    """The type of a state, or the type that its rules use in its place."""
    same = (_rules_of_type(base).same_as for base in type(node).__mro__)
    return next(filter(None, same), type(node))


def is_state_of_framework(node: Any) -> bool:
    """Whether the type belongs to a framework with states, and does not take a param's place."""
    framework = _framework_of(type(node))
    return framework.has_states and type(node).__name__ not in framework.param_nodes


def is_type_of_framework(node: Any) -> bool:
    """Whether the type belongs to a framework with states."""
    return _framework_of(type(node)).has_states


def has_global_scalars(node: Any) -> bool:
    """Whether a floating-point scalar in the state belongs to no param."""
    return _framework_of(type(node)).has_global_scalars and not rules_of(node).is_per_param


def is_param_node(node: Any) -> bool:
    """Whether the node takes the place of params in a tree."""
    return type(node).__name__ in _framework_of(type(node)).param_nodes


def is_masked_node(node: Any) -> bool:
    """Whether the node stands for a param that is left out."""
    return type(node).__name__ in _framework_of(type(node)).masked_nodes


def is_param_copies(node: Any) -> bool:
    """Whether the node holds several trees like the params."""
    return type(node).__name__ in _framework_of(type(node)).param_copies


def is_box(node: Any) -> bool:
    """Whether the node wraps one array."""
    return any(base.__name__ in _framework_of(base).boxes for base in type(node).__mro__)


def is_group_field(name: str) -> bool:
    """Whether a field of this name holds one state per group of params."""
    return any(name in framework.group_fields for framework in _FRAMEWORKS.values())


def is_hyperparameter_field(name: str) -> bool:
    """Whether a field of this name holds hyperparameters."""
    return any(name in framework.hyperparameter_fields for framework in _FRAMEWORKS.values())


def step_count_field(node: Any) -> str | None:
    """The field in which a state counts the steps taken, if it does."""
    return COUNT_FIELD if has_velocity(node) else rules_of(node).step_count


def schedule_count_field(node: Any) -> str | None:
    """The field of the step count that a schedule follows, if one follows it."""
    rules = rules_of(node)
    if rules.schedules is not None and not getattr(node, rules.schedules, True):
        return None
    return rules.step_count


def _framework_of(state_type: type) -> FrameworkTypes:
    return _FRAMEWORKS.get(state_type.__module__.partition(".")[0], _NO_FRAMEWORK)


def _rules_of_type(state_type: type) -> StateRules:
    wrapper = WRAPPER_STATES.get(state_type)
    if wrapper is not None:
        return StateRules(
            reset_with_velocity=wrapper.reset_with_velocity,
            converted_with_velocity=wrapper.converted_with_velocity,
        )
    return _framework_of(state_type).states.get(state_type.__name__, _DEFAULTS)
