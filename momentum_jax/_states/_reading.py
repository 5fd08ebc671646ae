"""Reads the velocity in any state, as floats."""

import functools
from typing import Any

import jax
import optax

from momentum_jax import _velocity
from momentum_jax._dispatch import jit_by_leaf, one_level
from momentum_jax._state_types import STATE_TYPES, has_several, has_velocity, velocities_in
from momentum_jax._states._rules import is_masked_node
from momentum_jax._states._walk import find_states
from momentum_jax._storage import Stored

PyTree = Any


def read_velocity(state: optax.OptState) -> Any:
    """Returns the velocity in a state as floats, whatever dtype it is stored in.

    Args:
      state: a state with a velocity anywhere in it: of `momentum`, `trace`, `qhm`, `aggmo` or
        `recurrence`, in a chain or inside Optax's wrappers. Its arrays may have been stacked by
        vmap or scan.

    Returns:
      A tree like the params. If each param has several velocities, as with `aggmo`, a tuple of
      such trees. An 8-bit velocity is returned in float32, any other velocity in its own dtype. If
      several transformations hold the velocity, as with `optax.partition`, their parts are joined
      into one tree. A param for which no transformation holds a velocity is `optax.MaskedNode`.

    Raises:
      ValueError: the state has no velocity, or two velocities of one param; or some params have
        one velocity and others have several.

    Example:
      >>> import jax.numpy as jnp, momentum_jax as mj
      >>> tx = mj.momentum(0.5, velocity_dtype=jnp.int8)
      >>> grads = {"w": jnp.ones((64, 128))}
      >>> _, state = tx.update(grads, tx.init(grads))
      >>> print(state.velocity["w"].dtype, mj.read_velocity(state)["w"][0, :3].round(2))
      int8 [-0.5 -0.5 -0.5]
    """
    found = states_with_velocity(state)
    velocities = [velocities_in(node) for node in found]
    if len({len(several) for several in velocities}) > 1 or len(set(map(has_several, found))) > 1:
        makers = ", ".join(dict.fromkeys(STATE_TYPES[type(node)] for node in found))
        raise ValueError(
            f"the state holds velocities of {makers}, which do not have the same number of "
            "velocities per param. Give the state of each transformation separately."
        )
    columns = [list(zip(*several, strict=True)) for several in velocities]
    values, scales = zip(*columns, strict=True)
    trees = [
        decoded if has_several(found[0]) else decoded[0]
        for decoded in _decoded((), (values, scales))[0]
    ]
    return functools.reduce(_joined, trees)


def states_with_velocity(state: Any) -> list[Any]:
    """Returns all states with a velocity within a state; raises a ValueError if there is none."""
    found = [node for node in find_states(state) if has_velocity(node)]
    if not found:
        raise ValueError(
            "there is no velocity in the state. Give the state of a transformation with "
            "momentum: momentum, trace, qhm, aggmo or recurrence, in a chain or alone."
        )
    return found


@jit_by_leaf
def _decoded(_, trees, __):
    return [
        tuple(_velocity.decode(Stored(*pair)) for pair in zip(*columns, strict=True))
        for columns in zip(*trees, strict=True)
    ], ()


def _joined(first, second):
    """Joins two trees. Each has masked nodes in the places where the other has arrays."""
    for tree, other in ((first, second), (second, first)):
        if is_masked_node(tree):
            return other
    parts, treedef = one_level(first)
    other_parts, other_treedef = one_level(second)
    if treedef != other_treedef or jax.tree_util.treedef_is_leaf(treedef):
        raise ValueError(
            "the state holds two velocities of one param, so it is not clear which one to read. "
            "Give the part of the chain's state that holds the velocity you want."
        )
    return treedef.unflatten(map(_joined, parts, other_parts))
