"""Updates added to params."""

from typing import Any

import jax.numpy as jnp
import numpy as np

from momentum_jax._dispatch import jit_by_leaf
from momentum_jax._jax import inlined_jit
from momentum_jax._leaves import LEAVE_OUT, check_arrays, expect_pair, map_leaves, path_text
from momentum_jax._placement import isolate_input, to_device_memory, to_memory_of
from momentum_jax._storage import compute_dtype


def apply_updates(params: Any, updates: Any) -> Any:
    """Adds the updates to the params, `w <- w + update`, in one compiled call.

    The sum is computed at least float32 wide and rounded once to the param's dtype. Each param
    keeps its dtype, weak type and sharding. For arrays, `optax.apply_updates` gives the same
    values.

        param             accepted updates; others are refused
        floating point    floating point, integers (converted to at least float32)
        complex           complex, floating point, integers
        integer           integers whose dtype has only values that the param's dtype can hold
        bool              no update

    Args:
      params: a tree of arrays.
      updates: a tree of the same structure and shapes, as `update` returns it. Where an update is
        None, an `optax.MaskedNode` or float0, the param does not change.

    Returns:
      The new params. The old ones are not donated.

    Raises:
      ValueError: trees or shapes that do not match.
      TypeError: an update that the param's dtype would truncate or wrap around; a param that is
        not an array.

    Example:
      >>> import jax.numpy as jnp, momentum_jax as mj
      >>> print(mj.apply_updates({"w": jnp.ones(2)}, {"w": jnp.array([-0.5, 1.0])}))
      {'w': Array([0.5, 2. ], dtype=float32)}
    """
    check_arrays("param", params)
    check_arrays("update", updates)
    return _add((), (params, updates))[0]


@jit_by_leaf
def _add(_, trees, __):
    params, updates = trees

    def leaf(path, update, param):
        update, param = expect_pair(path, "update", update, "param", param)
        _check_update_dtype(path, update.dtype, param.dtype)
        return _add_leaf(param, update)

    pairs = ("updates", updates), ("params", params)
    return map_leaves(leaf, *pairs, absent=lambda update, param: param), ()


@inlined_jit
def _add_leaf(param, update):
    given = param
    param, update = to_device_memory((param, update))
    update = isolate_input(update, param)
    if jnp.issubdtype(param.dtype, jnp.inexact):
        dtype = np.promote_types(compute_dtype(param.dtype), compute_dtype(update.dtype))
        total = (param.astype(dtype) + update.astype(dtype)).astype(param.dtype)
    else:
        total = param + update.astype(param.dtype)
    if param.weak_type:  # A Python number: a strong type would be traced anew.
        total = param.at[...].set(total)
    return to_memory_of(given, total)


def _check_update_dtype(path, update, param):
    if jnp.issubdtype(param, jnp.inexact) and jnp.issubdtype(update, jnp.number):
        if jnp.issubdtype(param, jnp.complexfloating) or not jnp.issubdtype(
            update, jnp.complexfloating
        ):
            return
    elif jnp.issubdtype(param, jnp.integer) and jnp.issubdtype(update, jnp.integer):
        # Compared by range: outside 64-bit mode no dtype of JAX holds both int32 and uint32.
        held, added = jnp.iinfo(param), jnp.iinfo(update)
        if held.min <= added.min and added.max <= held.max:
            return
        raise TypeError(
            f"the update {path_text(path)} is {update}, which may be beyond {param}, the dtype of "
            f"the param, and would wrap around. Convert it: update.astype({param}), if its values "
            "fit."
        )
    raise TypeError(
        f"the update {path_text(path)} is {update}, which cannot be added to a param that is "
        f"{param} without losing part of it. {LEAVE_OUT}"
    )
