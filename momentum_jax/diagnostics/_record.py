"""A wrapper that keeps the last measurement in its state, and the last curvature."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from momentum_jax._dispatch import jit_by_leaf
from momentum_jax._hyperparameters import (
    Hyperparameter,
    check,
    check_flag,
    require_whole,
    resolve,
)
from momentum_jax._leaves import materialize
from momentum_jax._state_types import register_export, wrapper_state
from momentum_jax._storage import compute_dtype
from momentum_jax._velocity import incremented
from momentum_jax._wrapper import wrapper
from momentum_jax.diagnostics._curvature import Curvature, curvature
from momentum_jax.diagnostics._measure import Measurement, measure_near
from momentum_jax.theory import _formulas

PyTree = Any


@wrapper_state("diagnostics.record")
class RecordState(NamedTuple):
    """The state of `record`.

    Attributes:
      count: the number of steps taken, an int32 scalar.
      measurement: the `Measurement` of the last step. All values are NaN before the first step;
        the energies that need the loss are NaN if no loss was given.
      curvature: the last `Curvature` that was measured; NaN before the first one. None without
        `every`.
      fraction: the fraction of the stability limit in use when the curvature was measured; NaN
        before. None without `every`.
      exponents: the exponents (powers of 2) of the largest gradient and the largest update, two
        int32 scalars. With them the next step reads each array only once.
      inner_state: the state of the inner transformation.

    Example:
      >>> import jax.numpy as jnp, momentum_jax as mj
      >>> tx = mj.diagnostics.record(mj.momentum(0.1), learning_rate=0.1)
      >>> print(tx.init(jnp.ones(2)).measurement.gain)
      nan
    """

    count: jax.Array  # pyright: ignore[reportIncompatibleMethodOverride]  (a tuple has one too)
    measurement: Any
    curvature: Any
    fraction: Any
    exponents: Any
    inner_state: Any


register_export(Measurement)
register_export(Curvature)


def record(
    inner: optax.GradientTransformation,
    learning_rate: Hyperparameter,
    mu: Hyperparameter = 0.9,
    *,
    every: int | None = None,
    nesterov: bool = False,
    steps: int = 24,
) -> optax.GradientTransformationExtraArgs:
    """Keeps the last measurement in the optimizer state, so that a training loop can log it.

    Each step reads the gradients and the updates once. The measurement is accurate if the largest
    gradient and the largest update did not change by more than a factor of 1e12 since the last
    step; in the first step, if both are between 1e-12 and 1e12.

    The measured velocity is the update that `inner` returns. It is the movement of the params if
    the update is applied unchanged, so this wrapper should be the outermost one.
    `optax.tree.get(state, "measurement")` returns the measurement.

    With Optax's wrappers, inside (`wrapper(record(...))`) and around (`record(wrapper(...))`):

    - `MultiSteps`: inside, each measurement is of a whole step, with the mean gradient. Around,
      each is of one micro-batch, and the update is 0 in most of them: prefer inside.
    - `apply_if_finite`: inside, a step that is skipped keeps the measurement of the last step.
      Around, it is measured with an update of 0, and the values that need the gradient are NaN.
    - `conditionally_mask`: inside, a step that is skipped keeps the measurement of the last step.
      Around, it is measured with an update of 0.
    - `conditionally_transform`: inside, only transformed steps are measured. Around, all are, and
      in the others the update is the gradient.
    - `lookahead`: inside, the jump to the slow params is not measured. Around, a ValueError: the
      updates are two trees, the gradients one.
    - `masked`: inside, the params under the mask are measured. Around, all are measured,
      and the update of the params outside the mask is their gradient.
    - `partition`: inside, each group has its own measurement. Around, all groups have one.
    - `schedule_free`: inside, the movement of z is measured. Around, the movement of the params.

    Args:
      inner: any Optax transformation.
      learning_rate: the learning rate of `inner`: a float, a scalar array or a schedule, counted
        from 0. Like mu, it is used only for the measurement. `update` takes both as keyword
        arguments that override the values here; they are passed to `inner` too.
      mu: the momentum coefficient of `inner`, in the same forms; 0.9 by default.
      every: measure the curvature in every `every`-th step, starting with the first. With None, the
        default, it is never measured. Otherwise `update` needs the params and `value_fn`, a
        function of the params that returns the loss. Steps in between only pay for the
        measurement. Under jit the curvature is compiled once. Under vmap every step pays for it.
      nesterov: whether `inner` uses the Nesterov form, for the stability limit; False by default.
      steps: as for `curvature`; 24 by default.

    Returns:
      An Optax transformation whose state is a `RecordState`. `update` takes `value`, the loss, for
      the energies, and `value_fn`. Both are passed to `inner` too.

    Raises:
      ValueError: the params or `value_fn` are missing although `every` is given; a value is out of
        range.
      TypeError: as for `curvature` and `momentum`.

    Example:
      >>> import jax, jax.numpy as jnp, momentum_jax as mj, optax
      >>> def loss(w):
      ...     return jnp.sum(jnp.array([10.0, 1.0]) * w**2) / 2
      >>> tx = mj.diagnostics.record(mj.momentum(0.2, 0.9), 0.2, 0.9, every=10)
      >>> @jax.jit
      ... def step(w, state):
      ...     value, grads = jax.value_and_grad(loss)(w)
      ...     updates, state = tx.update(grads, state, w, value=value, value_fn=loss)
      ...     return mj.apply_updates(w, updates), state
      >>> w, state = step(jnp.ones(2), tx.init(jnp.ones(2)))
      >>> print(f"{state.fraction:.3f} {optax.tree.get(state, 'measurement').gain:.1f}")
      0.526 1.0
    """
    learning_rate, mu = check("learning_rate", learning_rate), check("mu", mu)
    every = None if every is None else require_whole("every", every, 1)
    nesterov, steps = check_flag("nesterov", nesterov), require_whole("steps", steps, 2)

    def make_state(inner, params):
        inner_state = inner.init(params)
        params = materialize(params)
        leaves = [jnp.asarray(x) for x in jax.tree.leaves(params)]
        kinds = [compute_dtype(x.dtype) for x in leaves if jnp.issubdtype(x.dtype, jnp.inexact)]
        width = jnp.finfo(jnp.result_type(jnp.float32, *kinds)).dtype
        first = _unknown((width, every is not None), (params,))[1]
        return RecordState(**first, inner_state=inner_state)

    def step(inner, updates, state, params, extra_args):
        rate, momentum = (
            resolve(name, value, extra_args.get(name), state.count)
            for name, value in (("learning_rate", learning_rate), ("mu", mu))
        )
        moved, inner_state = inner.update(updates, state.inner_state, params, **extra_args)
        found, exponents = measure_near(
            state.exponents,
            updates,
            moved,
            learning_rate=rate,
            mu=momentum,
            loss=extra_args.get("value"),
        )
        found = Measurement(
            *(
                jnp.full_like(last, jnp.nan) if x is None else x.astype(last.dtype)
                for x, last in zip(found, state.measurement, strict=True)
            )
        )
        last_curvature, fraction = state.curvature, state.fraction
        if every is not None:
            last_curvature, fraction = curvature_if_due(
                state, params, extra_args.get("value_fn"), rate, momentum
            )
        count = incremented(state.count)
        return moved, RecordState(count, found, last_curvature, fraction, exponents, inner_state)

    def curvature_if_due(state, params, loss, rate, momentum):
        last = state.curvature, state.fraction
        if params is None or loss is None:
            raise ValueError(
                f"every={every} needs the params and the loss. Call update(grads, state, params, "
                "value_fn=loss), where loss is a function of the params."
            )

        def measured(params):
            found = curvature(loss, params, steps=steps)
            limit = _formulas.stability_limit(momentum, nesterov=nesterov)
            limit = jnp.asarray(limit, found.largest.dtype)
            fraction = _formulas.fraction_of_limit(rate, found.largest, limit)
            return jax.tree.map(lambda x, like: x.astype(like.dtype), (found, fraction), last)

        return jax.lax.cond(state.count % every == 0, measured, lambda params: last, params)

    parts = learning_rate, mu, every, nesterov, steps
    return wrapper(RecordState, inner, make_state, step, *parts)


@jit_by_leaf
def _unknown(static, trees, _):
    """The fields of the state before the first step, on the devices of the params."""
    del trees
    width, with_curvature = static
    unknown, zero = jnp.full((), jnp.nan, width), jnp.zeros([], jnp.int32)
    flag = jnp.zeros((), bool)
    return (), {
        "count": zero,
        "measurement": Measurement(*[unknown] * len(Measurement._fields)),
        "curvature": Curvature(unknown, unknown, unknown, unknown, unknown, flag)
        if with_curvature
        else None,
        "fraction": unknown if with_curvature else None,
        "exponents": (zero, zero),
    }
