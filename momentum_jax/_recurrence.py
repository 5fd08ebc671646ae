"""The transformation of a recurrence: anybody's method, with everything the contract promises."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import optax
from jax import export

from momentum_jax import _velocity
from momentum_jax._dispatch import by_leaf
from momentum_jax._hyperparameters import Hyperparameter, by_value, check, resolve
from momentum_jax._storage import Stored

# What makes the states of each type that holds a velocity: a count, the values, the scales.
STATE_TYPES: dict[type, str] = {}
# Those of them in which values and scales are tuples, an entry for each of several velocities.
_OF_SEVERAL: set[type] = set()
_T = TypeVar("_T", bound=type)


def holds_velocity(made_by: str, *, several: bool = False) -> Callable[[_T], _T]:
    """Marks a type of state as one that holds a velocity, and registers it for `jax.export`."""

    def mark(state_type: _T) -> _T:
        STATE_TYPES[state_type] = made_by
        if several:
            _OF_SEVERAL.add(state_type)
        export.register_namedtuple_serialization(
            state_type, serialized_name=f"momentum_jax.{state_type.__name__}"
        )
        return state_type

    return mark


def has_velocity(node: Any) -> bool:
    """Whether it is a state with a velocity of its own."""
    return isinstance(node, tuple(STATE_TYPES))


def has_several(state: Any) -> bool:
    """Whether one of the `STATE_TYPES` has a tuple of velocities in place of one."""
    return type(state) in _OF_SEVERAL


def velocities_in(state: Any) -> list[Stored]:
    """The velocities of one of the `STATE_TYPES`: one, or several."""
    _, values, scales = state
    if not has_several(state):
        return [Stored(values, scales)]
    return [Stored(*pair) for pair in zip(values, scales or [None] * len(values), strict=True)]


def with_velocities(state: Any, count: Any, several: Sequence[Stored]) -> Any:
    """A state of the same type."""
    return _state_of(type(state), count, several)


def _state_of(state_type, count, several):
    values, scales = zip(*several, strict=True)
    if state_type not in _OF_SEVERAL:
        return state_type(count, *values, *scales)
    return state_type(count, values, None if scales[0] is None else scales)


@holds_velocity("recurrence")
class RecurrenceState(NamedTuple):
    """What `recurrence` carries from step to step.

    Attributes:
      count: the number of steps taken, an int32 scalar; schedules are functions of it.
      velocity: stored as that of `MomentumState`.
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
    """What a `recurrence` of several velocities carries from step to step.

    Attributes:
      count: as in `RecurrenceState`.
      velocity: a tuple of trees, each stored as the velocity of `MomentumState`.
      scales: None; with velocity_dtype int8 a tuple of trees, each as in `MomentumState`.

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
    """A method of your own, from the function that advances one array.

        velocity, update = function(velocity, gradient, **hyperparameters)

    The function is written for one array of the params, and knows nothing of trees, dtypes,
    devices or schedules. What it makes keeps every promise of `momentum`: the same dtypes in each
    step, missing gradients, shardings, one dispatch outside jit, hyperparameters that may be
    schedules and are never compiled in, `read_velocity`, `reset_velocity` and the wrappers.

    Args:
      function: `(velocity, gradient, **hyperparameters) -> (new velocity, update)`. All are arrays
        of one dtype, at least float32 wide; velocity, gradient and results have the param's shape,
        and hyperparameters are scalars. The velocity is 0 at first. The update is what is added to
        the params. Hyperparameters are given by their names in the signature; its defaults are
        theirs. It is compiled once for each function: define it in a module, or once in a
        notebook. One that is made anew, such as a lambda in a loop, is compiled anew.

        It need not be elementwise: a norm over the array, or a product of matrices, is that of the
        whole param under jit, also where the param is sharded, with the communication that this
        takes. Within `jax.shard_map` the array is the device's own part of the param. Under vmap
        it is one member's.
      velocities: None, or how many there are, if the method has several, such as the two averages
        of Adam. The function is then given a tuple of arrays in place of one, and returns one.
      velocity_dtype: as for `momentum`; there the update is computed before the velocity is
        rounded. For a function that is not elementwise, or that calls one with a derivative of its
        own, such as `jax.nn.relu`, int8 is compiled in another way, which TPUs take longer for.
      **hyperparameters: each a float, a scalar array (traced or not) or a schedule: a function of
        the number of steps taken, from 0. `learning_rate`, `mu`, `dampening`, `nu`,
        `weight_decay`, `lr`, `momentum` and `scale` are checked as everywhere in this package,
        others must be finite.

    Returns:
      An Optax transformation like that of `momentum`, whose state is a `RecurrenceState`, or with
      `velocities` a `SeveralVelocitiesState`; `update` takes each hyperparameter as an overriding
      keyword. The states of two functions have one type: giving one the state of the other is not
      noticed.

    Raises:
      TypeError: a function that does not take these hyperparameters, or, in the first step, does
        not return two arrays of the right shape and dtype; otherwise as for `momentum`.
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
    """All hyperparameters of a function, in its order: those that are given, and its defaults."""
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

    Its states are a count, the values and the scales of what is stored; of several velocities both
    are tuples. `by_name` makes of the extra arguments of `update` the hyperparameters among them.
    It is equal to others of the same type of state that are made of equal parts.
    """
    velocity_dtype = _velocity.check_dtype(velocity_dtype)
    given = {name: check(name, value) for name, value in hyperparameters.items()}
    number, is_tuple = velocities or 1, velocities is not None

    def init(params):
        trees, count = _init((velocity_dtype, number), (_velocity.materialize(params),))
        return _state_of(state_type, count, _several(trees))

    def update(
        updates: optax.Updates,
        state: optax.OptState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, Any]:
        # Optax hands each transform of a chain the same params and extra arguments.
        del params
        held: Any = state
        _check_state(updates, held, state_type)
        _velocity.check_arrays("gradient", updates)
        if is_tuple:
            _check_number(held[1], number)
        overrides = by_name(extra_args)
        coefficients = {
            name: resolve(name, value, overrides.get(name), held.count)
            for name, value in given.items()
        }
        trees, count = _update(
            (function, is_tuple, velocity_dtype),
            (updates, *_columns(velocities_in(held))),
            (held.count, coefficients),
        )
        return trees[0], _state_of(state_type, count, _several(trees[1:]))

    parts = state_type, function, velocity_dtype, velocities, *given, *given.values()
    return by_value(optax.GradientTransformationExtraArgs(init, update), *parts)


def _check_state(updates: Any, state: Any, state_type: type) -> None:
    """Raises a TypeError that says what was given in the state's place."""
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
    if isinstance(state, optax.TraceState):  # There is one of ours of the same name.
        origin = " of Optax"
        remedy = " To continue a job of Optax, see momentum_jax.frameworks.load_optax."
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


def incremented(count: jax.Array) -> jax.Array:
    """The count of the next step; it stops at its largest value."""
    return jnp.asarray(optax.safe_increment(count))


# Compiled once for all instances: a hyperparameter is an argument, not part of the program. Trees
# are like the params, so that what belongs to one of them is under its path: `by_leaf`.
@by_leaf
def _init(static, trees, _):
    (velocity_dtype, number), (params,) = static, trees
    several = [_velocity.zeros(params, velocity_dtype) for _ in range(number)]
    return _columns(several), jnp.zeros([], jnp.int32)


@by_leaf
def _update(static, trees, shared):
    (function, is_tuple, velocity_dtype), (grads, *columns) = static, trees
    count, hyperparameters = shared
    updates, several = _velocity.advance(
        function, is_tuple, grads, _several(columns), hyperparameters, count, velocity_dtype
    )
    return (updates, *_columns(several)), incremented(count)


def _columns(several):
    """The values of each velocity, then the scales of each."""
    values, scales = zip(*several, strict=True)
    return *values, *scales


def _several(columns):
    """The same, back."""
    number = len(columns) // 2
    return [Stored(*pair) for pair in zip(columns[:number], columns[number:], strict=True)]
