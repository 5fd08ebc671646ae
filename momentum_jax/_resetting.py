"""Velocities that are reset."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from momentum_jax import _velocity
from momentum_jax._dispatch import jit_by_leaf, one_level
from momentum_jax._hyperparameters import check_value
from momentum_jax._kahan import KahanState
from momentum_jax._leaves import is_absent, path_text
from momentum_jax._reading import velocities
from momentum_jax._state_types import has_velocity, velocities_in, with_velocities
from momentum_jax._states import find, replace
from momentum_jax._storage import Stored

PyTree = Any
Predicate = Callable[[tuple[Any, ...]], bool]


def reset_velocity(
    state: optax.OptState,
    where: PyTree | Predicate | None = None,
    scale: jax.typing.ArrayLike = 0.0,
) -> Any:
    """Multiplies velocities by `scale`, wherever they are in a state: at 0 they start anew.

    For layers that are reset or pruned, tasks that change, a schedule that ends. At a scale of 0
    the compensation of `kahan` is 0 too, or it would move a weight that was set by hand, such
    as a pruned one. Counts and all else stay as they are.

    Args:
      state: a state with a velocity anywhere in it, of `momentum`, `trace`, `qhm`, `aggmo` or
        `recurrence`, in a chain or under Optax's wrappers.
      where: None for all; a tree of booleans that is a prefix of the params, whose leaves may
        be boolean arrays of the param's shape, for single values; or a function of the path of
        a param, as `jax.tree_util` gives it, that says whether. Where a param has several
        velocities, as with `aggmo`, it holds for each. In the state of an `nnx.Optimizer` give a
        function: a tree of booleans has other variables than the state.
      scale: a finite number, or a scalar array, traced or not.

    Returns:
      The new state, each leaf in its dtype and sharding. At a scale of 0 also what was not
      finite is 0. In 8 bits the blocks in which anything is scaled are stored anew.

    Raises:
      ValueError: no velocity; a `where` that does not fit it.
      TypeError: a `where` that is not boolean.

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
    masks = masks_of_velocities(state, where)
    of_compensations = tuple(
        _masks_of_compensation(where, node.compensation) for node in _compensations(state)
    )
    return scaled(state, masks, scale, masks_of_compensations=of_compensations)


def masks_of_velocities(state, where):
    """For each state with a velocity the masks of each of its velocities."""
    return [
        [_masks(where, stored.values) for stored in velocities_in(part)]
        for part in velocities(state)
    ]


def _masks_of_compensation(where, compensation):
    if isinstance(compensation, optax.LookaheadParams):  # Two trees of the same params.
        return type(compensation)(*(_masks(where, each, "compensation") for each in compensation))
    return _masks(where, compensation, "compensation")


def _compensations(state):
    return [node for node in find(state) if isinstance(node, KahanState)]


def _masks(where, tree, name="velocity"):
    """A mask, or a boolean, for each leaf of the tree, in a tree like it."""
    if _is_predicate(where):
        return jax.tree_util.tree_map_with_path(
            lambda path, leaf: _check_mask(path, leaf, where(path), name), tree
        )
    try:
        spread = _spread(where, tree)
    except ValueError as error:
        raise ValueError(
            f"where must be a prefix of the {name}, but is {jax.tree.structure(where)}, and "
            f"the {name} is {jax.tree.structure(tree)}. Give None for all, a tree of "
            "booleans like the params, or a function of a leaf's path that says whether."
        ) from error
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf, mask: _check_mask(path, leaf, mask, name), tree, spread
    )


def _is_predicate(where):
    """Whether it is a function. A tree of booleans may be callable too, such as a model."""
    leaves = jax.tree.leaves(where)
    return callable(where) and not (leaves and all(map(_is_boolean, leaves)))


def _is_boolean(mask):
    return isinstance(mask, bool) or getattr(mask, "dtype", None) == np.bool_


def _spread(where, tree):
    """A prefix of the tree, as a tree like it; what is absent there, as under a mask, stays so."""
    if is_absent(tree):
        return tree
    parts, treedef = one_level(where)
    if jax.tree_util.treedef_is_leaf(treedef):
        return jax.tree.map(lambda _: where, tree)
    others, other_treedef = one_level(tree)
    # A state may have the params' arrays in nodes of its own types, as of Flax NNX.
    if treedef != other_treedef and _keys(where) != _keys(tree):
        raise ValueError(f"{treedef} and {other_treedef}")
    return other_treedef.unflatten(map(_spread, parts, others))


def _keys(tree):
    """Of each part of a tree."""
    paths = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda node: node is not tree)
    return [path for path, _ in paths]


def _check_mask(path, leaf, mask, name):
    if not _is_boolean(mask):
        raise TypeError(
            f"where {path_text(path)} is {mask!r}, but must be boolean: True scales, False keeps."
        )
    shape = np.shape(leaf)
    if np.shape(mask) not in ((), shape):
        raise ValueError(
            f"where {path_text(path)} has shape {np.shape(mask)}, but the {name} there "
            f"has shape {shape}. They must be equal, or where be one boolean."
        )
    return mask


def scaled(state, masks, scale, *, when=None, masks_of_compensations=()):
    """The state with its velocities scaled; its compensations too, if there are masks for them."""
    held = velocities(state)
    columns = [list(zip(*velocities_in(part), strict=True)) for part in held]
    values, scales = zip(*columns, strict=True)
    # Within another library's own wrapper of an array, if it is in one.
    counts = [jax.tree.leaves(part.count)[0] for part in held]
    compensations = (
        [node.compensation for node in _compensations(state)] if masks_of_compensations else []
    )
    trees = values, scales, masks, compensations, masks_of_compensations
    (stored, compensations), _ = _rescaled((), trees, (scale, counts, when))
    stored, compensations = iter(stored), iter(compensations)

    def part(node):
        if has_velocity(node):
            return with_velocities(node, node.count, next(stored))
        if isinstance(node, KahanState):
            return node._replace(compensation=next(compensations, node.compensation))
        return node

    return replace(state, part)


@jit_by_leaf
def _rescaled(_, trees, shared):
    values, scales, masks, compensations, masks_of_compensations = trees
    scale, counts, when = shared
    if when is not None:
        masks = jax.tree.map(lambda mask: mask & when, masks)
    stored = [
        [
            _velocity.rescale(Stored(*one), scale, mask, count)
            for *one, mask in zip(*several, strict=True)
        ]
        for *several, count in zip(values, scales, masks, counts, strict=True)
    ]
    # At any other scale they stay: they are part of the params.
    factor = jnp.asarray(scale) != 0
    compensations = [
        _velocity.rescale(Stored(compensation), factor, mask, jnp.uint32(0)).values
        for compensation, mask in zip(compensations, masks_of_compensations, strict=True)
    ]
    return (stored, compensations), ()
