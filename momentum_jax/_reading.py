"""Where in a state the velocities are, and what they are as floats."""

import functools
from typing import Any

import jax
import optax

from momentum_jax import _velocity
from momentum_jax._dispatch import jit_by_leaf, one_level
from momentum_jax._state_types import STATE_TYPES, has_several, has_velocity, velocities_in
from momentum_jax._states import find
from momentum_jax._storage import Stored

PyTree = Any


def read_velocity(state: optax.OptState) -> Any:
    """The velocity in a state as floats, in whatever dtype it is stored.

    Args:
      state: a state with a velocity anywhere in it, of `momentum`, `trace`, `qhm`, `aggmo`
        or `recurrence`, in a chain or under Optax's wrappers, also one whose arrays were stacked by
        vmap or scan.

    Returns:
      A tree like the params; a tuple of such trees where there are several, as of `aggmo`.
      Velocities of 8 bits come in float32, the others as they are held. What several
      transformations hold between them, as with `optax.partition`, is put together; what none holds
      is `optax.MaskedNode`.

    Raises:
      ValueError: no velocity, or two of one param; one velocity of some params and several of
        others.

    Example:
      >>> import jax.numpy as jnp, momentum_jax as mj
      >>> tx = mj.momentum(0.5, velocity_dtype=jnp.int8)
      >>> grads = {"w": jnp.ones((64, 128))}
      >>> _, state = tx.update(grads, tx.init(grads))
      >>> print(state.velocity["w"].dtype, mj.read_velocity(state)["w"][0, :3].round(2))
      int8 [-0.5 -0.5 -0.5]
    """
    found = velocities(state)
    each = [velocities_in(part) for part in found]
    if len({len(several) for several in each}) > 1 or len(set(map(has_several, found))) > 1:
        made_by = ", ".join(dict.fromkeys(STATE_TYPES[type(part)] for part in found))
        raise ValueError(
            f"the state holds velocities of {made_by}, which have not one number of them a param. "
            "Give the state of each alone."
        )
    columns = [list(zip(*several, strict=True)) for several in each]
    values, scales = zip(*columns, strict=True)
    read = [
        decoded if has_several(found[0]) else decoded[0]
        for decoded in _read((), (values, scales))[0]
    ]
    return functools.reduce(_put_together, read)


def velocities(state: Any) -> list[Any]:
    """All states with a velocity within a state; raises a ValueError if there is none."""
    found = [node for node in find(state) if has_velocity(node)]
    if not found:
        raise ValueError(
            "there is no velocity in the state. Give the state of a transformation with "
            "momentum: momentum, trace, qhm, aggmo or recurrence, in a chain or alone."
        )
    return found


@jit_by_leaf
def _read(_, trees, __):
    return [
        tuple(_velocity.decode(Stored(*pair)) for pair in zip(*each, strict=True))
        for each in zip(*trees, strict=True)
    ], ()


def _put_together(one, other):
    for a, b in ((one, other), (other, one)):
        if isinstance(a, optax.MaskedNode):
            return b
    parts, treedef = one_level(one)
    others, other_treedef = one_level(other)
    if treedef != other_treedef or jax.tree_util.treedef_is_leaf(treedef):
        raise ValueError(
            "the state holds two velocities, so that it is not clear which is meant. Give the "
            "part of the chain's state whose velocity it is."
        )
    return treedef.unflatten(map(_put_together, parts, others))
