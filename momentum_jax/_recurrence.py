"""The transformation of a recurrence: any momentum method, with every promise of the contract."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import optax

from momentum_jax import _velocity
from momentum_jax._hyperparameters import Hyperparameter, by_value, check, resolve
from momentum_jax._leaves import check_arrays, materialize
from momentum_jax._state_types import holds_velocity, state_of, velocities_in
from momentum_jax._storage import check_dtype


@holds_velocity("recurrence")
class RecurrenceState(NamedTuple):
    """The state of `recurrence` with one velocity per param.

    Attributes:
      count: the number of steps taken, an int32 scalar; schedules are functions of it.
      velocity: stored like the velocity of `MomentumState`.
      scales: as in `MomentumState`.

    Example:
      >>> import jax.numpy as jnp, momentum_jax as mj
      >>> def average(velocity, gradient, mu):
      ...     velocity = mu * velocity + (1 - mu) * gradient
      ...     return velocity, velocity
      >>> print(mj.recurrence(average, mu=0.9).init({"w": jnp.ones(2)}).velocity)
      {'w': Array([0., 0.], dtype=float32)}
    """

    count: jax.Array  # pyright: ignore[reportIncompatibleMethodOverride]  (a tuple has one too)
    velocity: Any
    scales: Any = None


@holds_velocity("recurrence", several=True)
class SeveralVelocitiesState(NamedTuple):
    """The state of `recurrence` with several velocities per param.

    Attributes:
      count: as in `RecurrenceState`.
      velocity: a tuple of trees, each stored like the velocity of `MomentumState`.
      scales: None, or with velocity_dtype int8 a tuple of trees, each as in `MomentumState`.

    Example:
      >>> import jax.numpy as jnp, momentum_jax as mj
      >>> def moments(averages, gradient, mu, nu):
      ...     first = mu * averages[0] + (1 - mu) * gradient
      ...     second = nu * averages[1] + (1 - nu) * gradient**2
      ...     return (first, second), -first / (jnp.sqrt(second) + 1e-8)
      >>> print(mj.recurrence(moments, velocities=2, mu=0.9, nu=0.99).init(jnp.ones(2)).velocity)
      (Array([0., 0.], dtype=float32), Array([0., 0.], dtype=float32))
    """

    count: jax.Array  # pyright: ignore[reportIncompatibleMethodOverride]
    velocity: Any
    scales: Any = None


def recurrence(
    function: _velocity.Recurrence,
    *,
    velocities: int | None = None,
    velocity_dtype: Any = None,
    **hyperparameters: Hyperparameter,
) -> optax.GradientTransformationExtraArgs:
    """Makes a transformation from your own recurrence, a function of one array.

        velocity, update = function(velocity, gradient, **hyperparameters)

    The function handles one array of the params. It need not handle trees, dtypes, devices or
    schedules. The transformation keeps every promise of `momentum`: dtypes that do not change from
    step to step, missing gradients, shardings, one dispatch outside jit, hyperparameters that can
    be schedules and never cause a new compilation, `read_velocity`, `reset_velocity` and the
    wrappers.

    Args:
      function: `(velocity, gradient, **hyperparameters) -> (new velocity, update)`. All arguments
        and results are arrays of one dtype, at least float32 wide. The velocity, the gradient and
        the results have the param's shape; hyperparameters are scalars. The first velocity is 0.
        The update is added to the params. Hyperparameters are passed by their names in the
        signature. One that is not given has the default in the signature. The step is compiled once
        for each function object: define the function in a module, or once in a notebook. A new
        function object, such as a lambda in a loop, is compiled again.

        It need not be elementwise. Under jit, a norm or a matrix product over the array is over
        the whole param, also if the param is sharded, with the communication that this requires.
        Within `jax.shard_map` the array is the device's part of the param. Under vmap it is one
        element of the batch.
      velocities: None for one velocity per param, or the number of velocities, such as 2 for the
        two averages of Adam. With a number, the function takes and returns a tuple of arrays in
        place of one velocity.
      velocity_dtype: as for `momentum`. The update is computed before the new velocity is rounded.
        For a function that is not elementwise, or that calls a function with a custom derivative
        such as `jax.nn.relu`, int8 is compiled in another way, which is slower on TPUs.
      **hyperparameters: each a float, a scalar array (traced or not) or a schedule: a function of
        the number of steps taken, from 0. `learning_rate`, `mu`, `dampening`, `nu`,
        `weight_decay`, `lr`, `momentum` and `scale` are checked as everywhere in this package;
        others must be finite.

    Returns:
      An Optax transformation like that of `momentum`. Its state is a `RecurrenceState`, or with
      `velocities` a `SeveralVelocitiesState`. `update` takes each hyperparameter as an overriding
      keyword. The states of two functions have the same type: `update` cannot detect that it is
      given the state of another function.

    Raises:
      TypeError: a function that does not take these hyperparameters, or that, in the first step,
        does not return two arrays of the right shape and dtype; otherwise as for `momentum`.
      ValueError: as for `momentum`.

    Example:
      >>> import jax.numpy as jnp, momentum_jax as mj
      >>> def lion(velocity, gradient, learning_rate, b1, b2):
      ...     update = -learning_rate * jnp.sign(b1 * velocity + (1 - b1) * gradient)
      ...     return b2 * velocity + (1 - b2) * gradient, update
      >>> tx = mj.recurrence(lion, learning_rate=0.25, b1=0.9, b2=0.5)
      >>> w = jnp.array([1.0, -2.0])
      >>> updates, state = tx.update(w, tx.init(w), w)
      >>> print(updates, state.velocity)
      [-0.25  0.25] [ 0.5 -1. ]

    Source:
      The example: Chen and others (2023), Symbolic discovery of optimization algorithms,
      algorithm 2, without weight decay.
    """
    if velocities is not None and (
        isinstance(velocities, bool) or not isinstance(velocities, int) or velocities < 1
    ):
        raise ValueError(
            f"velocities={velocities!r} must be a whole number, at least 1, or None for a function "
            "of one array."
        )
    given = _of_signature(function, hyperparameters)
    state_type = RecurrenceState if velocities is None else SeveralVelocitiesState
    return transformation(state_type, function, velocity_dtype, given, velocities=velocities)


_WANTED = "(velocity, gradient, hyperparameter, ...) -> (new velocity, update)"


def _of_signature(function, given):
    """All hyperparameters of a function, in its order: the given values, and its defaults."""
    if not callable(function):
        raise TypeError(f"function={function!r} must be a function: {_WANTED}.")
    name = _velocity.name_of(function)
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError) as error:
        raise TypeError(f"{name} must have a signature: {_WANTED}. Define it with def.") from error
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    if len(parameters) < 2 or any(each.kind not in positional for each in parameters[:2]):
        raise TypeError(f"{name} must take a velocity and a gradient first: {_WANTED}.")
    rest = parameters[2:]
    if any(each.kind in (positional[0], inspect.Parameter.VAR_POSITIONAL) for each in rest):
        raise TypeError(f"{name} must take its hyperparameters by name: {_WANTED}.")
    is_open = any(each.kind is inspect.Parameter.VAR_KEYWORD for each in rest)
    named = [each for each in rest if each.kind is not inspect.Parameter.VAR_KEYWORD]
    known = [each.name for each in named]
    unknown = [each for each in given if each not in known and not is_open]
    if unknown:
        raise TypeError(
            f"{name} has no hyperparameter called {unknown[0]}. It has: "
            f"{', '.join(known) or 'none'}."
        )
    reserved = {"updates", "state", "params", "velocity_dtype", "velocities"}
    for each in [*known, *given]:
        if each in reserved:
            raise TypeError(
                f"{name} has a hyperparameter called {each}, which is an argument of update or of "
                "recurrence. Give it another name."
            )
    missing = [
        each.name
        for each in named
        if each.default is inspect.Parameter.empty and each.name not in given
    ]
    if missing:
        raise TypeError(
            f"{name} needs {', '.join(missing)}. Give each: "
            f"recurrence({name}, {', '.join(f'{each}=...' for each in missing)})."
        )
    return {each.name: each.default for each in named} | given


def transformation(
    state_type: type,
    function: _velocity.Recurrence,
    velocity_dtype: Any,
    hyperparameters: Mapping[str, Hyperparameter],
    *,
    velocities: int | None = None,
    by_name: Callable[[dict[str, Any]], dict[str, Any]] = lambda overrides: overrides,
) -> optax.GradientTransformationExtraArgs:
    """The Optax transformation of a recurrence.

    It equals other transformations of the same state type that are made of equal arguments.

    Args:
      state_type: one of the `STATE_TYPES`.
      function: the recurrence.
      velocity_dtype: as for `momentum`.
      hyperparameters: values or schedules by name.
      velocities: None for one velocity per param, or the number of velocities.
      by_name: takes the extra arguments of `update`, returns the overriding hyperparameters.
    """
    velocity_dtype = check_dtype(velocity_dtype)
    given = {name: check(name, value) for name, value in hyperparameters.items()}
    number, is_tuple = velocities or 1, velocities is not None

    def init(params):
        columns, count = _velocity.start((velocity_dtype, number), (materialize(params),))
        return state_of(state_type, count, _velocity.stored_in(columns, number))

    def update(
        updates: optax.Updates,
        state: optax.OptState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, Any]:
        # Optax passes the params and all extra arguments to every transformation of a chain.
        del params
        held: Any = state
        _check_state(updates, held, state_type)
        check_arrays("gradient", updates)
        if is_tuple:
            _check_number(held[1], number)
        overrides = by_name(extra_args)
        coefficients = {
            name: resolve(name, value, overrides.get(name), held.count)
            for name, value in given.items()
        }
        columns = _velocity.columns_of(velocities_in(held))
        (updates, *columns), count = _velocity.advance(
            (function, is_tuple, velocity_dtype), (updates, *columns), (held.count, coefficients)
        )
        return updates, state_of(state_type, count, _velocity.stored_in(columns, number))

    parts = state_type, function, velocity_dtype, velocities, *given, *given.values()
    return by_value(optax.GradientTransformationExtraArgs(init, update), *parts)


def _check_state(updates: Any, state: Any, state_type: type) -> None:
    """Raises a TypeError that says what was given in place of the state."""
    if isinstance(state, state_type):
        return
    if isinstance(updates, state_type):
        raise TypeError(
            "the gradients and the state are swapped: it is update(grads, state, params)."
        )
    if state is None:
        raise TypeError(
            "the state is None. Call `state = tx.init(params)` before the first update."
        )
    origin = remedy = ""
    if isinstance(state, optax.TraceState):  # Our state type has the same name.
        origin = " of Optax"
        remedy = " To resume a run of Optax, see momentum_jax.frameworks.load_optax."
    raise TypeError(
        f"the state is {type(state).__name__}{origin}, but must be the {state_type.__name__} that "
        "init or the last update of this transformation returned. In a chain, call the chain's "
        "update; after a restore, give the restoring function tx.init(params) as its target."
        + remedy
    )


def _check_number(values, number):
    held = len(values) if isinstance(values, tuple) else 1
    if held != number or not isinstance(values, tuple):
        raise ValueError(
            f"the state must have {number} velocities, but has {held}. Give the state that this "
            "transformation's init returned."
        )
