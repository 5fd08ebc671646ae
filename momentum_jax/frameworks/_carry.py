"""Reads, checks and fills the velocities of a state.

A velocity is identified by the path of its param. The functions here take any state that contains
states of one type, such as `TraceState`: of a chain, of `optax.partition`, of a wrapper.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from momentum_jax import _velocity
from momentum_jax._jax import inlined_jit
from momentum_jax._kahan import KahanState
from momentum_jax._state_types import STATE_TYPES
from momentum_jax._states import (
    any_nonzero,
    cast_like,
    decode,
    find_states,
    held_arrays,
    put_like,
    replace_states,
    rules_of,
    step_count_field,
    to_host,
    with_held_arrays,
)
from momentum_jax._storage import CAST, WIDE, Stored, codec_of, decoded_dtype
from momentum_jax.frameworks._counts import check_count_fits
from momentum_jax.frameworks._routes import chunks, join_names

PyTree = Any


def states_of_type(state: PyTree, state_type: type) -> list[Any]:
    """All states of a type within a state."""
    return [node for node in find_states(state) if isinstance(node, state_type)]


def velocities(state: PyTree, state_type: type) -> dict[str, Any]:
    """The velocity of each param by its path, from all states of a type within a state.

    A masked or partitioned transformation holds some of the leaves only. Raises a ValueError if
    two states hold a velocity of the same param.
    """
    found: dict[str, Any] = {}
    nodes = states_of_type(state, state_type)
    others = [
        other for other in STATE_TYPES if other is not state_type and states_of_type(state, other)
    ]
    if others and not nodes:
        raise ValueError(
            f"the state is {others[0].__name__} of {STATE_TYPES[others[0]]}, but must be "
            f"{state_type.__name__} of {STATE_TYPES.get(state_type, 'optax.trace')}: their "
            "velocities differ in sign and scale. Convert with "
            "momentum_jax.frameworks.momentum_from_trace or trace_from_momentum."
        )
    for node in nodes:
        for field, path, stored in held_arrays(node):
            if field == "count":
                continue
            if path in found:
                raise ValueError(
                    f"the state holds two velocities of the param {path or 'at the root'}, so it "
                    "is not clear which one is meant. Carry over the parts of the chain one by one."
                )
            found[path] = stored.values if stored.scales is None else decode(stored)
    return found


def source_velocities(state: PyTree, name: str, state_type: type) -> dict[str, Any]:
    """The velocities by path of a state that is carried over, checked.

    `name` is the argument's name, for messages.
    """
    check_nothing_lost(state, name)
    found = velocities(state, state_type)
    check_finite(
        found,
        "the velocity",
        "Go back to an earlier checkpoint, or set the velocity to 0 with "
        "momentum_jax.reset_velocity.",
    )
    return found


def fill(
    state: PyTree, values: Mapping[str, np.ndarray], count: int | None, state_type: type
) -> PyTree:
    """The state with these velocities and, unless it is None, this count everywhere.

    Each leaf keeps its dtype and sharding.
    """
    check_count_fits(state, count, state_type)

    def filled_node(node):
        return with_held_arrays(node, [filled(node, held) for held in held_arrays(node)])

    def filled(node, held):
        if held.field == step_count_field(node):
            return held.stored if count is None else Stored(cast_like(held.stored.values, count))
        if isinstance(node, state_type):
            return _with_velocity(held.path, held.stored, values[held.path])
        return held.stored

    return replace_states(state, filled_node)


def check_nothing_lost(state: PyTree, name: str) -> None:
    """Raises a ValueError if the state holds something that carrying over would drop.

    Both the source and the target must pass. `name` is the argument's name, for messages.
    """
    for node in find_states(state):
        if isinstance(node, KahanState):
            compensation = [held for held in held_arrays(node) if held.field == "compensation"]
            paths = [held.path for held in compensation if any_nonzero(held.stored.values)]
            if paths:
                raise ValueError(
                    f"in {name}, momentum_jax.kahan holds a compensation for {join_names(paths)}. "
                    "It is not carried over. Add state.compensation to the params in float32 and "
                    "give state.inner_state. Or, to keep the compensation, fill only "
                    "state.inner_state and put it back: state._replace(inner_state=...)."
                )
        remembered = rules_of(node).remembered
        if remembered is None:
            continue
        for leaf in jax.tree.leaves(getattr(node, remembered.field)):
            numbers = np.ravel(to_host(leaf))
            others = numbers[numbers != remembered.start]
            if others.size:
                raise ValueError(
                    f"in {name}, {remembered.loss.format(others[0])}. This is not carried over. "
                    f"{remembered.remedy}"
                )


def check_finite(values: Mapping[str, Any], what: str, remedy: str) -> None:
    """Raises a ValueError if an array has infinite or NaN values."""
    for name, array in values.items():
        if isinstance(array, jax.Array):
            bad = int(_count_not_finite(array))
        else:
            parts = (chunk for _, chunk in chunks(np.asarray(array)))
            bad = sum(part.size - np.count_nonzero(np.isfinite(part)) for part in parts)
        if bad:
            raise ValueError(
                f"{what} {name or 'at the root'} has {bad} of {array.size} values that are not "
                f"finite. The next steps would spread them to the params. {remedy}"
            )


def check_same_params(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> None:
    """Raises a ValueError if the paths or the shapes differ; it lists the paths of both sides.

    `ours` are the velocities of a state by path, `theirs` the values to carry over.
    """
    if theirs and not ours:
        raise ValueError(
            f"the state has no velocity, but there are values to carry over for "
            f"{join_names(theirs)}. Give the state that init returned, from a transformation with "
            "momentum above 0."
        )
    if ours and not theirs:
        raise ValueError(
            "there is no velocity to carry over, but the state has velocities of "
            f"{join_names(ours)}. Give the state of an optimizer with momentum."
        )
    if ours.keys() != theirs.keys():
        raise ValueError(
            "the velocities of the state and the values to carry over must belong to the same "
            f"params, but only in the state: {join_names(ours.keys() - theirs.keys())}; "
            f"only in the values to carry over: {join_names(theirs.keys() - ours.keys())}. "
            "Give the state that init returned for these params, and a to_params that returns a "
            "tree with the same paths."
        )
    for path, held in ours.items():
        if np.shape(held) != np.shape(theirs[path]):
            raise ValueError(
                f"the velocity {path or 'at the root'} has shape {np.shape(held)}, but the values "
                f"to carry over have shape {np.shape(theirs[path])}. Both must have the shape of "
                "the param: check the state, and the shapes that to_params returns."
            )


@inlined_jit
def _count_not_finite(x):
    return jnp.sum(~jnp.isfinite(x))


def _with_velocity(path, stored, value):
    """The stored velocity with another value, in the same dtype and sharding."""
    stored = jax.tree.map(jnp.asarray, stored)
    dtype = decoded_dtype(stored)
    if np.iscomplexobj(value) and not jnp.issubdtype(dtype, jnp.complexfloating):
        raise TypeError(
            f"the velocity {path or 'at the root'} is {dtype}, but the value to carry over is "
            f"{value.dtype}: a real and a complex array do not mix. Give the state that init "
            "returned for complex params, or carry over the real and the imaginary part as two "
            "params."
        )
    if codec_of(stored) in (CAST, WIDE):
        # In NumPy, because JAX would compile once for each shape.
        with np.errstate(over="ignore"):  # Overflow is an error below.
            converted = value.astype(stored.values.dtype)
        _check_converted(path, converted)
        return stored._replace(values=put_like(stored.values, converted))
    with np.errstate(over="ignore"):
        value = value.astype(jax.dtypes.canonicalize_dtype(value.dtype), copy=False)
    shardings = jax.tree.map(lambda x: x.sharding if x.committed else None, stored)
    encode = jax.jit(_velocity.encode, out_shardings=shardings)
    encoded = encode(put_like(stored.values, value), stored)
    for leaf in jax.tree.leaves(encoded):
        if jnp.issubdtype(leaf.dtype, jnp.inexact):
            _check_converted(path, leaf)
    return encoded


def _check_converted(path, array):
    remedy = f"They are too large for {array.dtype}: give a state with a wider velocity_dtype."
    check_finite({path: array}, f"after conversion to {array.dtype}, the velocity", remedy)
