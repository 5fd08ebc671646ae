"""The recurrence: `momentum`, with the learning rate in the velocity, and `trace`, without it.

v <- mu * v - learning_rate * g        v starts at 0, mu is usually 0.9
w <- w + v
"""

from typing import Any, NamedTuple

import jax
import optax

from momentum_jax._hyperparameters import Hyperparameter, check, check_flag, is_zero
from momentum_jax._recurrence import transformation
from momentum_jax._state_types import holds_velocity


def _momentum_step(v, g, learning_rate, mu):
    v = mu * v - learning_rate * g
    return v, v


def _nesterov_momentum_step(v, g, learning_rate, mu):
    v = mu * v - learning_rate * g
    return v, mu * v - learning_rate * g


# The order of the sums is the order in Optax. A compiler fuses one of the two products with the
# sum, and the order decides which one: in another order the result can differ in the last bit.
def _trace_step(m, g, mu, dampening):
    m = _damped(g, dampening) + mu * m
    return m, m


def _nesterov_trace_step(m, g, mu, dampening):
    m = _damped(g, dampening) + mu * m
    return m, g + mu * m


def _damped(g, dampening):
    # The select keeps this product from being fused with the sum. So the bits are the same if the
    # dampening is an argument of the program, as in a single step, or a constant, as in a loop.
    return jax.lax.select_n(dampening == 0, (1 - dampening) * g, g)


@holds_velocity("momentum")
class MomentumState(NamedTuple):
    """The state of `momentum`.

    Attributes:
      count: the number of steps taken, an int32 scalar; schedules are functions of it.
      velocity: a tree like the params, each leaf with its param's shape and sharding. With
        velocity_dtype int8 the leaves are codes, which `read_velocity` decodes.
      scales: None, or with velocity_dtype int8 a tree like the params, each leaf with its param's
        number of dimensions: one bfloat16 for each block of codes. Where the velocity is not
        quantized, the leaf holds int8 ones of the param's shape.

    Example:
      >>> import jax.numpy as jnp, momentum_jax as mj
      >>> state = mj.momentum(0.1).init({"w": jnp.ones(2)})
      >>> print(state.count, state.velocity)
      0 {'w': Array([0., 0.], dtype=float32)}
      >>> state = mj.momentum(0.1, velocity_dtype=jnp.int8).init(jnp.ones((64, 128)))
      >>> print(state.velocity.shape, state.velocity.dtype, state.scales.shape)
      (64, 128) int8 (2, 128)
    """

    count: jax.Array  # pyright: ignore[reportIncompatibleMethodOverride]  (a tuple has one too)
    velocity: Any
    scales: Any = None


@holds_velocity("trace")
class TraceState(NamedTuple):
    """The state of `trace`.

    Attributes:
      count: the number of steps taken, an int32 scalar; schedules are functions of it.
      trace: the velocity without a learning rate, stored like the velocity of
        `MomentumState`.
      scales: as in `MomentumState`.

    Example:
      >>> import jax.numpy as jnp, momentum_jax as mj
      >>> print(mj.trace(0.9).init({"w": jnp.ones(2)}).trace)
      {'w': Array([0., 0.], dtype=float32)}
    """

    count: jax.Array  # pyright: ignore[reportIncompatibleMethodOverride]
    trace: Any
    scales: Any = None


def momentum(
    learning_rate: Hyperparameter,
    mu: Hyperparameter = 0.9,
    *,
    nesterov: bool = False,
    velocity_dtype: Any = None,
) -> optax.GradientTransformationExtraArgs:
    """Momentum with the learning rate in the velocity (Sutskever, Keras, Caffe).

        v <- mu * v - learning_rate * g
        update = v
        update = mu * v - learning_rate * g        with nesterov, where v is the new velocity

    At a constant learning rate this equals `optax.sgd` and PyTorch's SGD. When the learning rate
    changes, it differs: here the old gradients in the velocity keep the old learning rate. Example:
    after many gradients of 1 at learning_rate 0.1 and mu 0.9, the update is -1. If the learning
    rate then drops to 0.01, the next update is 0.9 * -1 - 0.01 * 1 = -0.91 here, and
    0.01 * -10 = -0.1 in Optax and PyTorch. For their form, see `trace`.

    Args:
      learning_rate: a float, a scalar array (traced or not), or a schedule: a function of the
        number of steps taken, from 0. Finite, at least 0. A learning rate of 0 does not stop the
        params: the velocity continues to decay, v <- mu * v. To freeze a param, give None as its
        gradient: its velocity is kept. To stop a param, set its velocity to 0 with
        `reset_velocity`.
      mu: the momentum coefficient, in (-1, 1]: like the learning rate, a float, an array or a
        schedule. Under `optax.inject_hyperparams`, also give `hyperparam_dtype=jnp.float32`, or
        Optax rounds both hyperparameters to the params' dtype, in which 0.999 can become 1.
        `inject_hyperparams` also needs `static_args=("nesterov", "velocity_dtype")`. Otherwise it
        treats a type such as `jnp.bfloat16` as a schedule, because a type is callable.
      nesterov: whether the update looks one step ahead.
      velocity_dtype: the dtype in which the velocities of real params are stored: float32, float64,
        bfloat16, float16 or int8. With None it is the param's dtype, widened to at least float32.

        The 16-bit dtypes and int8 use stochastic rounding, which is right on average. With rounding
        to nearest, a bfloat16 velocity at mu 0.999 stops at a quarter of its limit. The random bits
        are a hash of the count, the position of the value and its upper 16 bits. They are the same
        in each run, on any backend and under any sharding. (Within shard_map, the position is the
        position in the device's part of the array.) The arithmetic can still differ in the last bit
        between compilers, as it does in float32.

        int8 takes 1.06 bytes per parameter: codes in `velocity`, and in `scales` one bfloat16 for
        each block of 32 values along the last axis but one, or along another axis if 32 does not
        divide that. Three kinds of array are not quantized: arrays with fewer than 4096 values,
        arrays that no block length from 16 to 128 divides, and complex arrays. int8 velocities are
        not differentiable. `read_velocity` returns all velocities as floats.

    Returns:
      An Optax transformation. Both of its functions are compiled.

      `init(params)` returns a `MomentumState` of zeros.

      `update(grads, state, params=None, *, learning_rate=None, mu=None)` returns the updates, in
      the gradients' dtypes, and the next state. The keywords override the hyperparameters for that
      call and never cause a new compilation. Traced values (under jit or vmap) are used unchecked.

      A gradient that is None, an `optax.MaskedNode` or float0 means no update and an unchanged
      velocity. For complex params give the conjugate of what `jax.grad` returns,
      `jax.tree.map(jnp.conj, grads)`, which is the direction of ascent. bfloat16 gradients have
      bfloat16 updates, which can differ from the exact update by 1 / 256 of its size; the velocity
      is not affected. To avoid that, convert the gradients first:
      `jax.tree.map(lambda g: g.astype(jnp.float32), grads)`.

      Each velocity has the sharding of its param and keeps it, also in loops, for any sharding of
      the gradients.

    Raises:
      ValueError: a value out of range; trees or shapes that do not match; nesterov at mu 0.
      TypeError: a value that is not a real number; a param that is not an array of numbers or
        booleans; a gradient whose dtype does not fit its param, such as any gradient of an integer
        param.

    Example:
      >>> import jax, jax.numpy as jnp, momentum_jax as mj
      >>> tx = mj.momentum(learning_rate=0.25, mu=0.5)
      >>> w = jnp.array([1.0, -2.0])
      >>> state = tx.init(w)
      >>> for _ in range(2):
      ...     grads = jax.grad(lambda w: (w**2).sum() / 2)(w)
      ...     updates, state = tx.update(grads, state, w)
      ...     w = mj.apply_updates(w, updates)
      >>> print(w, state.count)
      [ 0.4375 -0.875 ] 2

    Source:
      Polyak (1964), Some methods of speeding up the convergence of iteration methods;
      Sutskever, Martens, Dahl and Hinton (2013), On the importance of initialization and
      momentum in deep learning, equations 1 to 4. The Nesterov form is theirs after the
      change of variable by Bengio, Boulanger-Lewandowski and Pascanu (2013), Advances in
      optimizing recurrent networks, equations 6 and 7.
    """
    return transformation(
        MomentumState,
        _nesterov_momentum_step if _check_nesterov(nesterov, mu) else _momentum_step,
        velocity_dtype,
        {"learning_rate": learning_rate, "mu": mu},
    )


def trace(
    mu: Hyperparameter = 0.9,
    *,
    nesterov: bool = False,
    dampening: Hyperparameter = 0.0,
    velocity_dtype: Any = None,
) -> optax.GradientTransformationExtraArgs:
    """Momentum without a learning rate: a later transformation applies it (PyTorch, Optax).

        m <- mu * m + (1 - dampening) * g
        update = m
        update = g + mu * m        with nesterov, where m is the new velocity

    `optax.chain(mj.trace(mu), optax.scale_by_learning_rate(learning_rate))` equals `optax.sgd`: in
    float32 and float64 under jit to the last bit, also if the gradient is computed in the same
    program (tested on CPU). A change of the learning rate acts on the whole velocity at once; with
    `momentum` it acts on new gradients only. The states of `trace` and `momentum` differ in sign
    and scale, and each refuses the state of the other: see `frameworks.momentum_from_trace`.

    Args:
      mu: the momentum coefficient, in (-1, 1]: a float, a scalar array (traced or not), or a
        schedule: a function of the number of steps taken, from 0.
      nesterov: whether the update looks one step ahead.
      dampening: the fraction of each gradient that is left out: like mu, a float, an array or a
        schedule. With dampening equal to mu, the velocity is an exponential average of the
        gradients. PyTorch does not dampen its first step:
        `lambda count: jnp.where(count == 0, 0.0, dampening)` does the same.
      velocity_dtype: as for `momentum`.

    Returns:
      An Optax transformation like that of `momentum`, whose state is a `TraceState`. `update`
      takes `mu` and `dampening` as overriding keywords. `update` ignores a `learning_rate`, because
      a chain passes all keywords to all of its transformations. The learning rate is that of
      `scale_by_learning_rate`; `optax.inject_hyperparams` makes it adjustable.

    Raises:
      ValueError, TypeError: as for `momentum`.

    Example:
      >>> import jax.numpy as jnp, momentum_jax as mj
      >>> tx = mj.trace(mu=0.5)
      >>> state = tx.init(jnp.zeros(1))
      >>> for _ in range(3):
      ...     updates, state = tx.update(jnp.ones(1), state)
      >>> print(updates)
      [1.75]

    Source:
      PyTorch's documentation of torch.optim.SGD; Sutskever and others (2013), as above.
    """
    return transformation(
        TraceState,
        _nesterov_trace_step if _check_nesterov(nesterov, mu) else _trace_step,
        velocity_dtype,
        {"mu": mu, "dampening": dampening},
    )


def _check_nesterov(nesterov, mu) -> bool:
    nesterov = check_flag("nesterov", nesterov)
    if nesterov and is_zero(check("mu", mu)):
        raise ValueError(
            "nesterov=True has no effect at mu=0: there is no velocity to look ahead with. "
            "Give a mu above 0, or leave nesterov out."
        )
    return nesterov
