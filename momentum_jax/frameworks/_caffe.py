"""Caffe's SGD solver."""

import jax
import optax

from momentum_jax import _momentum
from momentum_jax._hyperparameters import Hyperparameter, by_value, check, check_value
from momentum_jax.frameworks._steps import chain, coupled_decay


def caffe_sgd(
    base_lr: Hyperparameter,
    momentum: Hyperparameter = 0.0,
    weight_decay: jax.typing.ArrayLike = 0.0,
) -> optax.GradientTransformationExtraArgs:
    """Caffe's SGD solver.

        v <- momentum * v - base_lr * (g + weight_decay * w)
        w <- w + v

    Args:
      base_lr: the learning rate, or a schedule of it (Caffe's lr_policy).
      momentum: the momentum coefficient, in [0, 1].
      weight_decay: coupled decay; `update` then needs the params.

    Returns:
      An Optax transformation.

    Raises:
      ValueError: a value is out of range.

    Example:
      >>> import jax.numpy as jnp
      >>> from momentum_jax.frameworks import caffe_sgd
      >>> tx = caffe_sgd(base_lr=0.1, momentum=0.9, weight_decay=0.5)
      >>> w = jnp.ones(1)
      >>> updates, state = tx.update(jnp.ones(1), tx.init(w), w)
      >>> print(updates)
      [-0.15]

    Source:
      Jia and others (2014), Caffe: convolutional architecture for fast feature embedding;
      its tutorial on the solver.
    """
    base_lr, momentum = check("base_lr", base_lr), check("momentum", momentum)
    weight_decay = check_value("weight_decay", weight_decay)
    tx = chain(*coupled_decay(weight_decay), _momentum.momentum(base_lr, momentum))
    return by_value(tx, "caffe_sgd", base_lr, momentum, weight_decay)
