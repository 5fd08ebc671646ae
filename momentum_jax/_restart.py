"""Velocities that start anew: where the gradient asks for it, or where the user does."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import export

from momentum_jax import _velocity
from momentum_jax._dispatch import at_once, by_leaf, gathered, one_level
from momentum_jax._hyperparameters import by_value, check_state, check_transformation, check_value
from momentum_jax._kahan import KahanState
from momentum_jax._placement import axes_that_differ
from momentum_jax._reading import velocities
from momentum_jax._recurrence import has_velocity, velocities_in, with_velocities
from momentum_jax._states import find, replace
from momentum_jax._storage import Stored

PyTree = Any
Predicate = Callable[[tuple[Any, ...]], bool]


class AdaptiveRestartState(NamedTuple):
    """What `adaptive_restart` carries from step to step.

    Attributes:
      inner_state: the state of the transformation around which it is.
      previous_params: a copy of the params of the last step, in their dtypes and shardings.

    Example:
      >>> import jax.numpy as jnp, momentum_jax as mj
      >>> state = mj.adaptive_restart(mj.momentum(0.1)).init(jnp.ones(2))
      >>> print(state.previous_params)
      [1. 1.]
    """

    inner_state: Any
    previous_params: Any


export.register_namedtuple_serialization(
    AdaptiveRestartState, serialized_name="momentum_jax.AdaptiveRestartState"
)


def adaptive_restart(
    inner: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
    """Lets the velocity start anew whenever the last step went uphill.

        if g . (w - last w) > 0:   v <- 0        before the step that g is for
        last w <- w

    On an ill-conditioned problem a mu that rises to 1 overshoots and comes back, again and
    again; this stops it where it turns, without knowing the condition number. The sum is over
    all params. Give `inner` a mu that rises, such as `schedules.nesterov_convex()`: on a quadratic
    of condition number 100,000, 10,000 steps from a distance of 6 then end at 2e-12 instead of
    1e-2, and with the best constant mu, for which one has to know that number, at 6e-13. A
    constant mu near 1 restarts before it has built up speed, and gains nothing.

    `w - last w` is how the params really moved between two calls of `update`, whatever was done
    to the updates on the way: their sign, a scale or weight decay later in the chain, rounding,
    a projection. What `update` is given must be gradients: what comes before in a chain may clip
    or scale them, but what turns their sign belongs inside `inner`. A param without a gradient
    (None, `optax.MaskedNode`, float0) has no part in the decision, and a sum that is not finite
    does not restart.

    With Optax's wrappers, inside (`wrapper(adaptive_restart(...))`) and around
    (`adaptive_restart(wrapper(...))`):

    - `MultiSteps`: inside, the mean of the micro-batches decides. Around, the first micro-batch
      after each step decides alone: prefer inside.
    - `apply_if_finite`: a step that is left out does not restart. Inside, the step after it is
      decided by the last movement. Around, it does not restart, as the params stood still.
    - `conditionally_mask`: inside, steps that are left out do not decide. Around, they do: prefer
      inside.
    - `conditionally_transform`: inside, the movement is that since the last step that was
      transformed, and only these decide. Around, every step decides.
    - `lookahead`: inside, the jump to the slow params is part of the movement. Around, a
      ValueError: the params are two trees, the gradients one.
    - `masked`: inside, the params under the mask decide. Around, all decide, and the velocity
      under the mask restarts.
    - `partition`: inside, each group decides for itself. Around, all decide together.
    - `schedule_free`: both; the params that move are the points at which the gradients are taken.

    Cost: the state has one more array per param, in the param's dtype. Each step reads the
    gradients, the params and that array once more, before the velocity can move.

    Args:
      inner: a transformation whose state has a velocity anywhere in it: `momentum`, `trace`,
        `qhm`, `aggmo`, also in a chain or under Optax's wrappers.

    Returns:
      An Optax transformation whose state is an `AdaptiveRestartState`. `update` needs the params.
      The count goes on, and with it the schedules; extra arguments go to `inner`. Within
      shard_map the gradients must be averaged over its axes, or the devices would decide apart.

    Raises:
      ValueError: at init, no velocity in the state of `inner`; at update, no params, or params
        unlike those of init; within shard_map, gradients or params that differ per device, or
        for which JAX does not track whether they do (`check_vma=False`). So within `jax.pmap`
        where JAX makes it of shard_map, as 0.10 does; with older ones average the gradients.
      TypeError: a param that is not an array, where init was given one.

    Example:
      >>> import jax.numpy as jnp, momentum_jax as mj, optax
      >>> tx = mj.adaptive_restart(mj.momentum(learning_rate=0.5, mu=0.5))
      >>> params = jnp.zeros(1)
      >>> state = tx.init(params)
      >>> for grad in (1.0, 1.0, -1.0):  # the third is against the way it came
      ...     updates, state = tx.update(jnp.array([grad]), state, params)
      ...     params = optax.apply_updates(params, updates)
      ...     print(updates)
      [-0.5]
      [-0.75]
      [0.5]

    Source:
      O'Donoghue and Candes (2015), Adaptive restart for accelerated gradient schemes,
      section 3.2, the gradient scheme.
    """
    check_transformation(inner)
    given, inner = inner, optax.with_extra_args_support(inner)

    def init(params: optax.Params) -> AdaptiveRestartState:
        inner_state = inner.init(params)
        velocities(inner_state)
        return AdaptiveRestartState(inner_state, _copied((), (_velocity.materialize(params),))[0])

    def update(
        updates: optax.Updates,
        state: optax.OptState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, AdaptiveRestartState]:
        state = check_state(state, AdaptiveRestartState)
        if params is None:
            raise ValueError(
                "params=None, but whether to restart depends on how the params moved. Call "
                "update(grads, state, params)."
            )
        _velocity.check_arrays("gradient", updates)
        arrays = _velocity.only_where("params of the last step", state.previous_params, params)
        _check_one_decision(updates, arrays, state.previous_params)
        inner_state, previous_params = _restarted(updates, arrays, state)
        updates, inner_state = inner.update(updates, inner_state, params, **extra_args)
        return updates, AdaptiveRestartState(inner_state, previous_params)

    tx = optax.GradientTransformationExtraArgs(init, update)
    return by_value(tx, "adaptive_restart", given)


def _check_one_decision(*trees):
    apart = axes_that_differ(*trees)
    if apart:
        raise ValueError(
            f"adaptive_restart is within shard_map (or pmap) over {sorted(apart)}, along which "
            "the gradients, the params or the state differ per device, or may: each device would "
            "decide by its own part whether to restart. Leave shard_map for the loss and its "
            "gradient, and call init and update outside; or, where the params are replicated, "
            "average the gradients with jax.lax.pmean first, in shard_map with check_vma=True."
        )


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
    masks = _masks_of_velocities(state, where)
    of_compensations = tuple(
        _masks_of_compensation(where, node.compensation) for node in _compensations(state)
    )
    return _scaled(state, masks, scale, masks_of_compensations=of_compensations)


def _masks_of_velocities(state, where):
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
    if _velocity.is_absent(tree):
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
            f"where {_velocity.path_text(path)} is {mask!r}, but must be boolean: True scales, "
            "False keeps."
        )
    shape = np.shape(leaf)
    if np.shape(mask) not in ((), shape):
        raise ValueError(
            f"where {_velocity.path_text(path)} has shape {np.shape(mask)}, but the {name} there "
            f"has shape {shape}. They must be equal, or where be one boolean."
        )
    return mask


def _scaled(state, masks, scale, *, when=None, masks_of_compensations=()):
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


@by_leaf
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


@by_leaf
def _copied(_, trees, __):
    return _velocity.copies(*trees), ()


@at_once
def _restarted(grads, params, state):
    params, uphill = _moved((), (grads, params, state.previous_params))
    turns = (uphill > 0) & jnp.isfinite(uphill)
    # The compensations stay: no param was set by hand.
    masks = _masks_of_velocities(state.inner_state, True)
    return _scaled(state.inner_state, masks, 0.0, when=turns), params


def _sum(values):
    return functools.reduce(jnp.add, gathered(values))


@functools.partial(by_leaf, combine=_sum)
def _moved(_, trees, __):
    grads, params, previous_params = trees
    moved, params = _velocity.movement(params, previous_params)
    return params, _velocity.inner_product(grads, moved, "params")
