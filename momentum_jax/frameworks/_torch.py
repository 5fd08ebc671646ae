"""PyTorch's SGD: `torch_sgd`."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from momentum_jax._hyperparameters import (
    Hyperparameter,
    by_value,
    check,
    check_flag,
    check_value,
    is_known,
    is_zero,
    resolve,
)
from momentum_jax._momentum import TraceState, trace
from momentum_jax.frameworks._steps import chain, coupled_decay, is_static_zero, negate, scale


def torch_sgd(
    lr: Hyperparameter = 1e-3,
    momentum: Hyperparameter = 0.0,
    dampening: jax.typing.ArrayLike = 0.0,
    weight_decay: jax.typing.ArrayLike = 0.0,
    nesterov: bool = False,
    *,
    maximize: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """PyTorch's `torch.optim.SGD`.

        g <- -g                                        with maximize
        g <- g + weight_decay * w
        m <- g                                         in the first step: no dampening
        m <- momentum * m + (1 - dampening) * g        in all later steps
        w <- w - lr * m
        w <- w - lr * (g + momentum * m)               with nesterov: the new m

    The first step is defined differently. In PyTorch each param has its own first step: the
    first one with a gradient. Here it is the first step of the optimizer. The results differ if
    dampening is used and a param is unfrozen later. They also differ if a schedule sets momentum
    to 0 for some steps: PyTorch then leaves m unchanged.

    Args:
      lr: the learning rate, or a schedule of it.
      momentum: the momentum coefficient, in [0, 1]. At 0 there is no velocity.
      dampening: the fraction of each gradient that is left out, except in the first step.
      weight_decay: coupled decay; `update` then needs the params.
      nesterov: whether the update looks one step ahead.
      maximize: whether to maximize the objective in place of minimizing it.

    Returns:
      An Optax transformation.

    Raises:
      ValueError: a value is out of range; nesterov is used without momentum or with dampening,
        which PyTorch refuses too.

    Example:
      >>> import jax.numpy as jnp
      >>> from momentum_jax.frameworks import torch_sgd
      >>> tx = torch_sgd(lr=0.1, momentum=0.9, dampening=0.5)
      >>> w = jnp.ones(1)
      >>> state = tx.init(w)
      >>> for _ in range(2):
      ...     updates, state = tx.update(jnp.ones(1), state, w)
      ...     print(updates)
      [-0.1]
      [-0.14]

    Source:
      PyTorch's documentation of torch.optim.SGD.
    """
    lr, momentum = check("lr", lr), check("momentum", momentum)
    dampening = check_value("dampening", dampening)
    weight_decay = check_value("weight_decay", weight_decay)
    nesterov, maximize = check_flag("nesterov", nesterov), check_flag("maximize", maximize)
    # Traced values cannot be checked.
    dampened = is_known(dampening) and not is_zero(dampening)
    if nesterov and (is_zero(momentum) or dampened):
        values: tuple[Any, ...] = momentum, dampening
        numbers = (float(x) if is_known(x) else x for x in values)
        raise ValueError(
            "nesterov=True needs a momentum above 0 and no dampening, but "
            "momentum={} and dampening={}. PyTorch refuses this too.".format(*numbers)
        )
    steps: list[Any] = [negate()] if maximize else []
    steps += coupled_decay(weight_decay)
    has_velocity = not is_static_zero(momentum)
    if has_velocity:
        steps.append(_torch_trace(momentum, nesterov, dampening))
    tx = chain(*steps, scale(lr), has_velocity=has_velocity)
    return by_value(tx, "torch_sgd", lr, momentum, dampening, weight_decay, nesterov, maximize)


def _torch_trace(momentum, nesterov, dampening):
    """`trace` without dampening in the first step, also if a call of update gives the dampening."""
    tx = trace(momentum, nesterov=nesterov, dampening=_exempt_first_step(dampening))

    def update(updates, state, params=None, **extra_args):
        given = extra_args.get("dampening")
        if given is not None and isinstance(state, TraceState):
            exempt = _exempt_first_step(check_value("dampening", given))
            extra_args["dampening"] = resolve("dampening", exempt, None, state.count)
        return tx.update(updates, state, params, **extra_args)

    return optax.GradientTransformationExtraArgs(tx.init, update)


def _exempt_first_step(dampening):
    if is_static_zero(dampening):
        return dampening
    return lambda count: jnp.where(count == 0, 0.0, dampening)
