"""Velocities that start anew: where the gradient asks for it, or where the user does."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from jax import export

from momentum_jax import _velocity
from momentum_jax._hyperparameters import check_inner, check_value
from momentum_jax._reading import has_velocity, velocities

PyTree = Any
Predicate = Callable[[tuple[Any, ...]], bool]


class AdaptiveRestartState(NamedTuple):
    """What `adaptive_restart` carries from step to step.

    Attributes:
      inner_state: the state of the transformation around which it is.
      last_updates: the updates of the last step, a tree like the params, at least float32.

    Example:
      >>> import jax.numpy as jnp, momentum_jax as mj
      >>> state = mj.adaptive_restart(mj.momentum(0.1)).init(jnp.ones(2))
      >>> print(state.last_updates)
      [0. 0.]
    """

    inner_state: Any
    last_updates: Any


export.register_namedtuple_serialization(
    AdaptiveRestartState, serialized_name="momentum_jax.AdaptiveRestartState"
)


def adaptive_restart(
    inner: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
    """Lets the velocity start anew whenever the last step went uphill.

        if g . (last update) > 0:   v <- 0        before the step that g is for

    On an ill-conditioned problem a mu that rises to 1 overshoots and comes back, again and
    again; this stops it where it turns, without knowing the condition number. The sum is over
    all params. Give `inner` a mu that rises, such as `schedules.nesterov()`: on a quadratic of
    condition number 100,000, 10,000 steps from a distance of 6 then end at 2e-12 instead of
    1e-2, and with the best constant mu, for which one has to know that number, at 6e-13. A
    constant mu near 1 restarts before it has built up speed, and gains nothing.

    Args:
      inner: a transformation whose state has a velocity anywhere in it: `momentum`, `trace`,
        `qhm`, `aggmo`, also in a chain or under Optax's wrappers.

    Returns:
      An Optax transformation whose state is an `AdaptiveRestartState`: one more array a param.
      The count goes on, and with it the schedules; extra arguments go to `inner`.

    Raises:
      ValueError: at init, no velocity in the state of `inner`.

    Example:
      >>> import jax.numpy as jnp, momentum_jax as mj
      >>> tx = mj.adaptive_restart(mj.momentum(learning_rate=0.5, mu=0.5))
      >>> state = tx.init(jnp.zeros(1))
      >>> for grad in (1.0, 1.0, -1.0):  # the third is against the way it came
      ...     updates, state = tx.update(jnp.array([grad]), state)
      ...     print(updates)
      [-0.5]
      [-0.75]
      [0.5]

    Source:
      O'Donoghue and Candes (2015), Adaptive restart for accelerated gradient schemes,
      section 3.2, the gradient scheme.
    """
    check_inner(inner)
    inner = optax.with_extra_args_support(inner)

    def init(params: optax.Params) -> AdaptiveRestartState:
        inner_state = inner.init(params)
        velocities(inner_state)
        return AdaptiveRestartState(inner_state, _at_rest(_velocity.concrete(params)))

    def update(
        updates: optax.Updates,
        state: optax.OptState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, AdaptiveRestartState]:
        if not isinstance(state, AdaptiveRestartState):
            raise TypeError(
                f"the state is {type(state).__name__}, but must be the AdaptiveRestartState that "
                "init or the last update returned."
            )
        inner_state = _restarted(updates, state)
        updates, inner_state = inner.update(updates, inner_state, params, **extra_args)
        return updates, AdaptiveRestartState(inner_state, _kept(state.last_updates, updates))

    return optax.GradientTransformationExtraArgs(init, update)


def reset_velocity(
    state: optax.OptState,
    where: PyTree | Predicate | None = None,
    scale: jax.typing.ArrayLike = 0.0,
) -> Any:
    """Multiplies velocities by `scale`, wherever they are in a state: at 0 they start anew.

    For layers that are reset or pruned, tasks that change, a schedule that ends. Counts and all
    else stay as they are.

    Args:
      state: a state with a velocity anywhere in it, of `momentum`, `trace`, `qhm` or `aggmo`,
        in a chain or under Optax's wrappers.
      where: None for all; a tree of booleans that is a prefix of the velocity, whose leaves may
        be boolean arrays of the param's shape, for single values; or a function of the path of
        a leaf, as `jax.tree_util` gives it, that says whether. The velocity of `aggmo` is a
        tuple of trees, one a mu, and its paths begin with the number of the mu.
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
    masks = [_masks(where, velocity) for velocity in velocities(state)]
    return _scaled(state, masks, scale)


def _masks(where, velocity):
    """A mask, or a boolean, for each leaf of the velocity, in a list."""
    leaves = jax.tree_util.tree_leaves_with_path(velocity, is_leaf=_velocity.is_quantized)
    if callable(where):
        return [_check_mask(path, leaf, where(path)) for path, leaf in leaves]
    try:
        spread = jax.tree.map(
            lambda mask, part: jax.tree.map(lambda _: mask, part, is_leaf=_velocity.is_quantized),
            where,
            velocity,
        )
    except ValueError as error:
        raise ValueError(
            f"where must be a prefix of the velocity, but is {jax.tree.structure(where)}, and "
            f"the velocity is {jax.tree.structure(velocity)}. Give None for all, a tree of "
            "booleans like the params, or a function of a leaf's path that says whether."
        ) from error
    return [
        _check_mask(path, leaf, mask)
        for (path, leaf), mask in zip(leaves, jax.tree.leaves(spread), strict=True)
    ]


def _check_mask(path, leaf, mask):
    if not isinstance(mask, bool) and getattr(mask, "dtype", None) != np.bool_:
        raise TypeError(
            f"where {_velocity.at(path)} is {mask!r}, but must be boolean: True scales, False "
            "keeps."
        )
    shape = _velocity.shape_of(leaf)
    if np.shape(mask) not in ((), shape):
        raise ValueError(
            f"where {_velocity.at(path)} has shape {np.shape(mask)}, but the velocity there has "
            f"shape {shape}. They must be equal, or where be one boolean."
        )
    return mask


@_velocity.inlined_jit
def _scaled(state, masks, scale):
    masks = iter(masks)

    def part(node):
        if not has_velocity(node):
            return node
        leaves, treedef = jax.tree.flatten(node.velocity, is_leaf=_velocity.is_quantized)
        scaled = [
            _velocity.scale(leaf, scale, mask)
            for leaf, mask in zip(leaves, next(masks), strict=True)
        ]
        return node._replace(velocity=treedef.unflatten(scaled))

    return jax.tree.map(part, state, is_leaf=has_velocity)


@_velocity.inlined_jit
def _at_rest(params):
    return _velocity.zeros(params, None)


@_velocity.inlined_jit
def _restarted(grads, state):
    turns = _velocity.inner_product(grads, state.last_updates) > 0
    return reset_velocity(state.inner_state, turns)


@_velocity.inlined_jit
def _kept(last_updates, updates):
    return _velocity.replaced(last_updates, updates)
