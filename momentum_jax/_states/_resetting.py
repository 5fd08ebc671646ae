"""Scales velocities in any state, or sets them to 0."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from momentum_jax import _velocity
from momentum_jax._dispatch import jit_by_leaf, one_level
from momentum_jax._hyperparameters import check_value
from momentum_jax._leaves import is_absent, path_text
from momentum_jax._state_types import has_velocity, velocities_in, with_velocities
from momentum_jax._states._reading import states_with_velocity
from momentum_jax._states._rules import is_param_copies, rules_of
from momentum_jax._states._walk import find_states, replace_states
from momentum_jax._storage import Stored

PyTree = Any
Predicate = Callable[[tuple[Any, ...]], bool]


def reset_velocity(
    state: optax.OptState,
    where: PyTree | Predicate | None = None,
    scale: jax.typing.ArrayLike = 0.0,
) -> Any:
    """Multiplies all velocities in a state by `scale`; the default scale sets them to 0.

    Use it when layers are reset or pruned, when the task changes, or when a schedule ends. At a
    scale of 0 the compensation of `kahan` is set to 0 too; otherwise it would move a weight that
    was set by hand, such as a pruned one. Counts and all other values stay as they are.

    Args:
      state: a state with a velocity anywhere in it: of `momentum`, `trace`, `qhm`, `aggmo` or
        `recurrence`, in a chain or inside Optax's wrappers.
      where: which velocities to scale. One of:

        - None: all of them.
        - A tree of booleans that is a prefix of the params. A leaf may be a boolean array of the
          param's shape, to select single values.
        - A function that takes the path of a param, as `jax.tree_util` gives it, and returns a
          boolean.

        If a param has several velocities, as with `aggmo`, `where` applies to each of them. For the
        state of an `nnx.Optimizer`, the tree may be an `nnx.State` like that of the params, nested
        dicts with the same keys, or a prefix of one of them.
      scale: a finite number or a scalar array, traced or not. Default 0.

    Returns:
      The new state, each leaf in its dtype and sharding. At a scale of 0 values that were not
      finite become 0 too. With 8-bit velocities, each quantization block in which a value is
      scaled is quantized again.

    Raises:
      ValueError: the state has no velocity; or `where` does not fit the velocity.
      TypeError: `where` is not boolean.

    Example:
      >>> import jax, jax.numpy as jnp, momentum_jax as mj
      >>> tx = mj.momentum(0.5)
      >>> params = {"head": jnp.zeros(2), "body": jnp.zeros(1)}
      >>> _, state = tx.update(jax.tree.map(jnp.ones_like, params), tx.init(params))
      >>> where = {"head": jnp.array([True, False]), "body": False}
      >>> print(mj.reset_velocity(state, where).velocity)
      {'body': Array([-0.5], dtype=float32), 'head': Array([ 0. , -0.5], dtype=float32)}
      >>> print(mj.reset_velocity(state, lambda path: path[0].key == "body", scale=0.5).velocity)
      {'body': Array([-0.25], dtype=float32), 'head': Array([-0.5, -0.5], dtype=float32)}
    """
    scale = check_value("scale", scale)
    where = True if where is None else where
    masks = _velocity_masks(state, where)
    extra_masks = [_extra_masks(where, tree, field) for field, tree in _extra_fields(state)]
    return _scaled(state, masks, scale, extra_masks=extra_masks)


def zero_velocity_if(state: PyTree, flag: jax.Array) -> PyTree:
    """Sets all velocities in a state to 0 if a flag, which may be traced, is true.

    The compensation of `kahan` stays as it is.
    """
    return _scaled(state, _velocity_masks(state, True), 0.0, flag=flag)


def _velocity_masks(state, where):
    """Returns the masks of each velocity of each state that has velocities."""
    return [
        [_masks(where, stored.values) for stored in velocities_in(node)]
        for node in states_with_velocity(state)
    ]


def _extra_fields(state):
    """Returns the fields, by name, that are set to 0 where the velocity is."""
    fields = [(rules_of(node).reset_with_velocity, node) for node in find_states(state)]
    return [(field, getattr(node, field)) for field, node in fields if field is not None]


def _extra_masks(where, tree, field):
    if is_param_copies(tree):
        return type(tree)(*(_masks(where, copy, field) for copy in tree))
    return _masks(where, tree, field)


def _masks(where, tree, name="velocity"):
    """Returns a tree like this one with a mask, an array or a boolean, for each leaf."""
    if _is_predicate(where):
        return jax.tree_util.tree_map_with_path(
            lambda path, leaf: _check_mask(path, leaf, where(path), name), tree
        )
    try:
        masks = _broadcast_prefix(where, tree)
    except ValueError as error:
        raise ValueError(
            f"where must be a prefix of the {name}, but is {jax.tree.structure(where)}, and "
            f"the {name} is {jax.tree.structure(tree)}. Give None for all velocities, a tree of "
            "booleans like the params, or a function that takes the path of a leaf and returns a "
            "boolean."
        ) from error
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf, mask: _check_mask(path, leaf, mask, name), tree, masks
    )


def _is_predicate(where):
    """Whether it is a function. A tree of booleans may be callable too, such as a model."""
    leaves = jax.tree.leaves(where)
    return callable(where) and not (leaves and all(map(_is_boolean, leaves)))


def _is_boolean(mask):
    return isinstance(mask, bool) or getattr(mask, "dtype", None) == np.bool_


def _broadcast_prefix(where, tree):
    """Returns a prefix of the tree as a tree like it; nodes that stand for absent params stay."""
    if is_absent(tree):
        return tree
    prefix_parts, prefix_treedef = one_level(where)
    if jax.tree_util.treedef_is_leaf(prefix_treedef):
        return jax.tree.map(lambda _: where, tree)
    parts, treedef = one_level(tree)
    # A state may hold the params' arrays in nodes of other types, as with Flax NNX.
    if prefix_treedef != treedef and _keys(where) != _keys(tree):
        raise ValueError(f"{prefix_treedef} and {treedef}")
    return treedef.unflatten(map(_broadcast_prefix, prefix_parts, parts))


def _keys(tree):
    """Returns the key of each direct child of a tree."""
    paths = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda node: node is not tree)
    return [path for path, _ in paths]


def _check_mask(path, leaf, mask, name):
    if not _is_boolean(mask):
        raise TypeError(
            f"where {path_text(path)} is {mask!r}, but must be boolean: True scales the "
            "values, False keeps them."
        )
    shape = np.shape(leaf)
    if np.shape(mask) not in ((), shape):
        raise ValueError(
            f"where {path_text(path)} has shape {np.shape(mask)}, but the {name} there "
            f"has shape {shape}. Give an array of the same shape, or a single boolean."
        )
    return mask


def _scaled(state, masks, scale, *, flag=None, extra_masks=()):
    """Returns the state with its velocities scaled, and its extra fields if they have masks."""
    found = states_with_velocity(state)
    columns = [list(zip(*velocities_in(node), strict=True)) for node in found]
    values, scales = zip(*columns, strict=True)
    # The count may be in another framework's box around an array.
    counts = [jax.tree.leaves(node.count)[0] for node in found]
    extra_fields = [tree for _, tree in _extra_fields(state)] if extra_masks else []
    trees = values, scales, masks, extra_fields, extra_masks
    (velocities, extra_fields), _ = _rescaled((), trees, (scale, counts, flag))
    velocities, extra_fields = iter(velocities), iter(extra_fields)

    def replaced(node):
        if has_velocity(node):
            return with_velocities(node, node.count, next(velocities))
        field = rules_of(node).reset_with_velocity if extra_masks else None
        return node if field is None else node._replace(**{field: next(extra_fields)})

    return replace_states(state, replaced)


@jit_by_leaf
def _rescaled(_, trees, shared):
    values, scales, masks, extra_fields, extra_masks = trees
    scale, counts, flag = shared
    if flag is not None:
        masks = jax.tree.map(lambda mask: mask & flag, masks)
    velocities = [
        [
            _velocity.rescale(Stored(*pair), scale, mask, count)
            for *pair, mask in zip(*columns, strict=True)
        ]
        for *columns, count in zip(values, scales, masks, counts, strict=True)
    ]
    # At any other scale the compensations stay, because they are part of the params.
    factor = jnp.asarray(scale) != 0
    extra_fields = [
        _velocity.rescale(Stored(tree), factor, mask, jnp.uint32(0)).values
        for tree, mask in zip(extra_fields, extra_masks, strict=True)
    ]
    return (velocities, extra_fields), ()
