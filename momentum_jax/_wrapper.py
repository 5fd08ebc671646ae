"""How a wrapper is made: a transformation around any other transformation.

A wrapper is a type of state, marked with `wrapper_state`, a function that makes it, and a step.
`wrapper` adds what all wrappers need: the checks of their arguments, extra arguments for the inner
transformation, and equality by value. The docstring of a wrapper has a table of Optax's wrappers
that says what happens inside and around each of them. tests/test_wrapper.py checks all of this for
each marked type of state.
"""

from collections.abc import Callable
from typing import Any

import optax

from momentum_jax._hyperparameters import by_value


def wrapper(
    state_type: type | None,
    inner: optax.GradientTransformation,
    make_state: Callable[..., Any],
    step: Callable[..., tuple[Any, Any]],
    *parts: Any,
    needs_params: str = "",
) -> optax.GradientTransformationExtraArgs:
    """The transformation of a wrapper.

    Args:
      state_type: the type of its states, marked with `wrapper_state`; None if it has the states of
        the inner transformation.
      inner: the transformation that the user gave.
      make_state: `(inner, params) -> state`.
      step: `(inner, updates, state, params, extra_args) -> (updates, state)`. The inner
        transformation that both functions get accepts extra arguments.
      *parts: the other arguments of the wrapper, and its name if it has no state type. Two wrappers
        are equal if their state types, their inner transformations and their parts are equal.
      needs_params: if update needs the params, the end of the sentence "params=None, but ...".

    Raises:
      TypeError: an `inner` that is not an Optax transformation.
    """
    check_transformation(inner)
    extended = optax.with_extra_args_support(inner)

    def init(params: optax.Params) -> Any:
        return make_state(extended, params)

    def update(
        updates: optax.Updates,
        state: optax.OptState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, Any]:
        if state_type is not None and not isinstance(state, state_type):
            raise TypeError(
                f"the state is {type(state).__name__}, but must be the {state_type.__name__} that "
                "init or the last update returned."
            )
        if params is None and needs_params:
            raise ValueError(f"params=None, but {needs_params}. Call update(grads, state, params).")
        return step(extended, updates, state, params, extra_args)

    tx = optax.GradientTransformationExtraArgs(init, update)
    return by_value(tx, state_type, inner, *parts)


def check_transformation(inner: Any) -> None:
    """Raises a TypeError unless it is an Optax transformation."""
    if not (callable(getattr(inner, "init", None)) and callable(getattr(inner, "update", None))):
        raise TypeError(
            f"inner={inner!r} must be an Optax transformation, for example "
            "momentum_jax.momentum(0.1)."
        )
