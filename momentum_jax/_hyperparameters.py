"""Hyperparameters: numbers, scalar arrays or schedules, checked where their value is known.

Python and NumPy numbers become Python floats, so that the type of a number never causes a new
compilation. JAX arrays are passed on unchanged.
"""

import functools
import math
import operator
from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer

from momentum_jax._jax import is_x64_enabled

# A number of any type.
Number: TypeAlias = jax.typing.ArrayLike | np.generic
Hyperparameter: TypeAlias = Number | optax.Schedule


_LARGEST_FLOAT32 = float(np.finfo(np.float32).max)


def _is_finite_and_not_negative(x):
    return math.isfinite(x) and x >= 0


# name: (test, rule, remedy)
_RULES = {
    "learning_rate": (
        _is_finite_and_not_negative,
        "must be finite and not negative",
        "0.1 is an example, 0 adds no gradient to the velocity; to climb instead of descend, "
        "negate the gradients",
    ),
    "mu": (
        lambda x: -1 < x <= 1,
        "must be in (-1, 1]",
        "0.9 is usual, 0 is plain gradient descent, 1 has no friction",
    ),
    "dampening": (
        math.isfinite,
        "must be finite",
        "0 adds the whole gradient, mu makes the velocity an average of gradients",
    ),
    "nu": (math.isfinite, "must be finite", "0.7 is usual, 0 is plain gradient descent"),
    "scale": (math.isfinite, "must be finite", "0 lets the velocity start anew, 1 keeps it"),
    "weight_decay": (
        _is_finite_and_not_negative,
        "must be finite and not negative",
        "0 is no decay, 1e-4 is usual",
    ),
}
# Each of several mus has an index in its name: mus[0].
_RULES["mus"] = _RULES["mu"]
# The names and the ranges of other frameworks.
_RULES["lr"] = _RULES["base_lr"] = _RULES["learning_rate"]
_RULES["momentum"] = (lambda x: 0 <= x <= 1, "must be in [0, 1]", _RULES["mu"][2])


def _rule(name):
    """The rule of a hyperparameter; for unknown names, the rule of any number."""
    unknown = (math.isfinite, "must be finite", f"Give {name} a number or a schedule")
    return _RULES.get(name.partition("[")[0], unknown)


def require(name: str, value: Any, fits: Callable[[float], bool], rule: str) -> float:
    """A number of any type as a Python float; raises with the value and the rule.

    For computations on the host: a traced value is refused.
    """
    _refuse_traced(name, value)
    _check_type(name, value, "a real number", "a float")
    number = _as_float(value)
    if not (math.isfinite(number) and fits(number)):
        raise ValueError(f"{name}={number} must be {rule}.")
    return number + 0.0  # 0 for -0


def require_whole(name: str, value: Any, least: int) -> int:
    """An integer of any type as a Python int; raises with the value and the rule."""
    _refuse_traced(name, value)
    try:
        whole = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        whole = None
    if whole is None or whole < least or math.isinf(_as_float(whole)):
        raise ValueError(f"{name}={value} must be a whole number, at least {least}.")
    return whole


def check(name: str, given: Any, *, display_name: str = "") -> Any:
    """Checks a factory's argument, unless it is a schedule, and returns it.

    `display_name` is the name in error messages, if it is not `name`, whose rule is applied.
    """
    return given if callable(given) else check_value(name, given, display_name=display_name)


def resolve(name: str, given: Any, override: Any, count: Any, *, display_name: str = "") -> Any:
    """The value for this step: the override, or else the factory's argument."""
    if override is not None:
        return check_value(name, override, display_name=display_name)
    if callable(given):
        # Reading an array that depends on the count would wait for the step that is running.
        display_name = f"the schedule's {display_name or name}"
        return check_value(name, given(count), display_name=display_name, read_arrays=False)
    return given


class Function:
    """A function that equals another one if both were made of equal parts.

    So schedules and transformations with equal arguments are equal, and can be static arguments of
    jit.
    """

    def __init__(self, function: Callable[..., Any], *parts: Any) -> None:
        """Parts are compared by value; arrays and functions by identity."""
        functools.update_wrapper(self, function)
        self._function = function
        self._parts = tuple(map(_comparable, parts))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the function."""
        return self._function(*args, **kwargs)

    def __eq__(self, other: object) -> bool:
        """Whether the parts are equal."""
        return isinstance(other, Function) and self._parts == other._parts

    def __hash__(self) -> int:
        """By the parts."""
        return hash(self._parts)


def by_value(
    tx: optax.GradientTransformationExtraArgs, *parts: Any
) -> optax.GradientTransformationExtraArgs:
    """The transformation, which equals others that are made of equal parts."""
    return optax.GradientTransformationExtraArgs(
        Function(tx.init, "init", *parts), Function(tx.update, "update", *parts)
    )


class _Identity:
    """Compares an object without a hash by identity, and keeps it alive."""

    def __init__(self, value):
        self._value = value

    def __eq__(self, other):
        return isinstance(other, _Identity) and self._value is other._value

    def __hash__(self):
        return id(self._value)


def _comparable(part):
    try:
        hash(part)
    except TypeError:
        return _Identity(part)
    # 0.0 == -0.0 == False and 1 == 1.0 == True, but they are different hyperparameters.
    return (type(part), repr(part) if isinstance(part, float) else part)


def check_flag(name: str, value: Any) -> bool:
    """The value as a bool; raises a TypeError unless it is a boolean of Python or NumPy."""
    if not isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{name}={value!r} must be True or False.")
    return bool(value)


def is_known(value: Any) -> bool:
    """Whether a checked hyperparameter is a number whose value can be read now."""
    return isinstance(value, float) or (isinstance(value, jax.Array) and _can_be_read(value))


def is_zero(value: Any) -> bool:
    """Whether a checked hyperparameter is known to be 0 in every step."""
    return is_known(value) and float(value) == 0


def check_value(name: str, value: Any, *, display_name: str = "", read_arrays: bool = True) -> Any:
    """A Python float or a scalar JAX array; raises if no step could use the value.

    Of a traced value only the dtype and the shape are checked.
    """
    display_name = display_name or name
    _check_type(
        display_name,
        value,
        "a real number, a scalar array or (when the transform is made) a schedule: a function of "
        "the step's count",
        f"a float: {_rule(name)[2]}",
    )
    if isinstance(value, jax.Array) and not (read_arrays and _can_be_read(value)):
        return value
    number = _as_float(value)
    fits, rule, remedy = _rule(name)
    if not fits(number):
        raise ValueError(f"{display_name}={number} {rule}. {remedy}.")
    if abs(number) > _LARGEST_FLOAT32 and not is_x64_enabled():
        raise ValueError(
            f"{display_name}={number} is beyond float32, in which it would be infinite. Give at "
            f"most {_LARGEST_FLOAT32:.7g}, or set jax.config.update('jax_enable_x64', True) first."
        )
    return value if isinstance(value, jax.Array) else number


def _can_be_read(array):
    return not isinstance(array, Tracer) and array.is_fully_replicated


def _check_type(display_name, value, wanted, remedy):
    """Raises unless it is a real scalar, by its type, dtype and shape."""
    if not isinstance(value, (int, float, np.generic, np.ndarray, jax.Array)):
        raise TypeError(f"{display_name}={value!r} must be {wanted}.")
    dtype = getattr(value, "dtype", None) or np.dtype(type(value))
    if not (jnp.issubdtype(dtype, jnp.floating) or jnp.issubdtype(dtype, jnp.integer)):
        raise TypeError(
            f"{display_name}={value} is {dtype}, but must be a real number. Give {remedy}."
        )
    if np.shape(value) != ():
        raise ValueError(
            f"{display_name} must be a scalar, but has shape {np.shape(value)}. Use jax.vmap for a "
            "sweep, optax.partition for groups of params with their own values."
        )


def _refuse_traced(name, value):
    if isinstance(value, Tracer):
        raise TypeError(
            f"{name}={value} is traced, but must be known: it is used outside JAX. Give a float, "
            "and do not pass it as an argument of jit, grad or vmap."
        )


def _as_float(value):
    try:
        return float(value)
    except OverflowError:  # An integer beyond the floats.
        return math.inf if int(value) > 0 else -math.inf
