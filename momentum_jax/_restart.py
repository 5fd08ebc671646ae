"""Adaptive restart: the velocity is set to 0 when a step went uphill."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from momentum_jax._dispatch import jit_by_leaf, jit_whole, on_one_group
from momentum_jax._inner_products import inner_product
from momentum_jax._leaves import (
    check_arrays,
    expect_pair,
    is_absent,
    map_leaves,
    materialize,
    only_where,
)
from momentum_jax._placement import (
    axes_that_differ,
    shard_like,
    to_device_memory,
    to_memory_of,
)
from momentum_jax._state_types import wrapper_state
from momentum_jax._states import states_with_velocity, zero_velocity_if
from momentum_jax._storage import compute_dtype
from momentum_jax._wrapper import wrapper


@wrapper_state("adaptive_restart", converted_with_velocity=True)
class AdaptiveRestartState(NamedTuple):
    """The state of `adaptive_restart`.

    Attributes:
      inner_state: the state of the inner transformation.
      previous_params: a copy of the params of the previous step, in their dtypes and shardings.

    Example:
      >>> import jax.numpy as jnp, momentum_jax as mj
      >>> state = mj.adaptive_restart(mj.momentum(0.1)).init(jnp.ones(2))
      >>> print(state.previous_params)
      [1. 1.]
    """

    inner_state: Any
    previous_params: Any


def adaptive_restart(
    inner: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
    """Sets the velocity to 0 whenever the last step went uphill.

        if g . (w - previous w) > 0:   v <- 0        before the step with g
        previous w <- w

    The sum is over all params. On an ill-conditioned problem, a mu that rises to 1 makes the params
    overshoot and return, again and again. A restart stops this at the turning point, without
    knowledge of the condition number. Give `inner` a mu that rises, such as
    `schedules.nesterov_convex()`: on a quadratic of condition number 100,000, started at a distance
    of 6, the loss after 10,000 steps is then 2e-12 instead of 1e-2. The best constant mu, which
    depends on the condition number, gives 6e-13. With a constant mu near 1, restarts come before
    the velocity has grown, and nothing is gained.

    `w - previous w` is the real movement of the params between two calls of `update`. It includes
    everything that happens to the updates: a change of sign, a scale or weight decay later in the
    chain, rounding, a projection. The input of `update` must be gradients. Transformations before
    this one in a chain may clip or scale them; a transformation that changes their sign belongs
    inside `inner`. A param without a gradient (None, `optax.MaskedNode`, float0) does not take part
    in the decision. If the sum is not finite, there is no restart.

    With Optax's wrappers, inside (`wrapper(adaptive_restart(...))`) and around
    (`adaptive_restart(wrapper(...))`):

    - `MultiSteps`: inside, the mean of the micro-batches decides. Around, the first micro-batch
      after each step decides alone: prefer inside.
    - `apply_if_finite`: a step that is skipped does not restart. Inside, the next step decides by
      the last movement. Around, the next step does not restart, because the params did not move.
    - `conditionally_mask`: inside, steps that are skipped do not decide. Around, they do: prefer
      inside.
    - `conditionally_transform`: inside, only transformed steps decide, by the movement since the
      previous transformed step. Around, every step decides.
    - `lookahead`: inside, the jump to the slow params is part of the movement. Around, a
      ValueError: the params are two trees, the gradients one.
    - `masked`: inside, the params under the mask decide. Around, all decide, and the velocity
      under the mask restarts.
    - `partition`: inside, each group decides for itself. Around, all decide together.
    - `schedule_free`: both work. The params that move are the points at which the gradients are
      taken.

    Cost: the state has one more array per param, in the param's dtype. Each step reads the
    gradients, the params and this array once more before it can change the velocity.

    Args:
      inner: a transformation whose state contains a velocity: `momentum`, `trace`, `qhm`, `aggmo`
        or `recurrence`, also in a chain or under Optax's wrappers.

    Returns:
      An Optax transformation whose state is an `AdaptiveRestartState`. `update` needs the params.
      A restart does not change the count, so schedules continue. Extra arguments go to `inner`.
      Within shard_map the gradients must be averaged over its axes, or each device would decide
      for itself.

    Raises:
      ValueError: at init, no velocity in the state of `inner`; at update, no params, or params
        that do not match those of init; within shard_map, gradients or params that differ per
        device, or for which JAX does not track whether they differ (`check_vma=False`). The same
        holds within `jax.pmap` of JAX 0.10, which uses shard_map; with older versions, average the
        gradients.
      TypeError: a param that is not an array, although init was given an array.

    Example:
      >>> import jax.numpy as jnp, momentum_jax as mj, optax
      >>> tx = mj.adaptive_restart(mj.momentum(learning_rate=0.5, mu=0.5))
      >>> params = jnp.zeros(1)
      >>> state = tx.init(params)
      >>> for grad in (1.0, 1.0, -1.0):  # the third points against the movement
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
    return wrapper(
        AdaptiveRestartState,
        inner,
        _init,
        _update,
        needs_params="the decision to restart depends on the movement of the params",
    )


def _init(inner, params):
    inner_state = inner.init(params)
    states_with_velocity(inner_state)  # Raises if there is none.
    return AdaptiveRestartState(inner_state, _copied((), (materialize(params),))[0])


def _update(inner, updates, state, params, extra_args):
    check_arrays("gradient", updates)
    arrays = only_where("params of the last step", state.previous_params, params)
    _check_one_decision(updates, arrays, state.previous_params)
    inner_state, previous_params = _restarted(updates, arrays, state)
    updates, inner_state = inner.update(updates, inner_state, params, **extra_args)
    return updates, AdaptiveRestartState(inner_state, previous_params)


def _check_one_decision(*trees):
    apart = axes_that_differ(*trees)
    if apart:
        raise ValueError(
            f"adaptive_restart is within shard_map (or pmap) over {sorted(apart)}, along which "
            "the gradients, the params or the state differ per device, or can differ: each device "
            "would decide for itself whether to restart. Use shard_map for the loss and its "
            "gradient only, and call init and update outside; or, if the params are replicated, "
            "average the gradients with jax.lax.pmean first, in shard_map with check_vma=True."
        )


@jit_whole
def _restarted(grads, params, state):
    params, uphill = _moved((), (grads, params, state.previous_params))
    restarts = (uphill > 0) & jnp.isfinite(uphill)
    return zero_velocity_if(state.inner_state, restarts), params


def _sum(values):
    return functools.reduce(jnp.add, on_one_group(values))


@functools.partial(jit_by_leaf, combine=_sum)
def _moved(_, trees, __):
    """Copies of the params, and the sum of gradient times movement."""
    grads, params, previous_params = trees

    def leaf(path, previous, param):
        if is_absent(param):
            return None, previous
        param, previous = expect_pair(path, "param", param, "param of the last step", previous)
        given = previous
        param, previous = to_device_memory((param, previous))
        # The params are not part of the state: neither takes the sharding of the other.
        param = shard_like(param, previous)
        copy = to_memory_of(given, jnp.copy(param.astype(previous.dtype)))
        if not jnp.issubdtype(previous.dtype, jnp.inexact):
            return previous, copy
        dtype = compute_dtype(previous.dtype)
        return param.astype(dtype) - previous.astype(dtype), copy

    movement, params = map_leaves(
        leaf,
        ("params of the last step", previous_params),
        ("params", params),
        absent=lambda previous, param: (None, previous),
        outputs=2,
    )
    return params, inner_product(grads, movement, "params")


@jit_by_leaf
def _copied(_, trees, __):
    """The params in new buffers, in their dtypes and shardings, without weak types."""

    def leaf(param):
        given = jnp.asarray(param)
        param = to_device_memory(given)
        copy = jnp.copy(param.astype(param.dtype))
        return to_memory_of(given, shard_like(copy, param, backward=True))

    return jax.tree.map(leaf, *trees), ()
