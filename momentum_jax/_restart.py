"""Sets the velocity to 0 whenever the last step went uphill."""

import functools
from typing import Any, NamedTuple

import jax.numpy as jnp
import optax
from jax import export

from momentum_jax import _velocity
from momentum_jax._dispatch import at_once, by_leaf, gathered
from momentum_jax._hyperparameters import by_value, check_state, check_transformation
from momentum_jax._placement import axes_that_differ
from momentum_jax._states import states_with_velocity, zero_velocity_if


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
        states_with_velocity(inner_state)  # Raises if there is none.
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


@by_leaf
def _copied(_, trees, __):
    return _velocity.copies(*trees), ()


@at_once
def _restarted(grads, params, state):
    params, uphill = _moved((), (grads, params, state.previous_params))
    restarts = (uphill > 0) & jnp.isfinite(uphill)
    return zero_velocity_if(state.inner_state, restarts), params


def _sum(values):
    return functools.reduce(jnp.add, gathered(values))


@functools.partial(by_leaf, combine=_sum)
def _moved(_, trees, __):
    grads, params, previous_params = trees
    moved, params = _velocity.movement(params, previous_params)
    return params, _velocity.inner_product(grads, moved, "params")
