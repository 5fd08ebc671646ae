"""Checkpoints and states of other frameworks, as small as they can be, for several tests."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

import momentum_jax as mj
from momentum_jax.frameworks import (
    dump_keras,
    dump_optax,
    dump_torch,
    keras_sgd,
    load_keras,
    load_optax,
    load_torch,
    momentum_from_trace,
    optax_sgd,
    torch_sgd,
    trace_from_momentum,
)

PARAMS = {"a": np.array([1.0, -2.0], np.float32), "b": np.array([[3.0]], np.float32)}


def run(tx, state, steps, start=0, params=PARAMS):
    """Trains on a quadratic with a force that changes with time."""
    params = jax.tree.map(jnp.asarray, params)
    for count in range(start, start + steps):
        force = np.float32(np.cos(count))
        grads = jax.tree.map(lambda w, force=force: w + force, params)
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
    return params, state


def rate(count):
    """A learning rate that changes up and down."""
    return jnp.where(count % 3 == 0, 0.25, 0.125)


def injected(make, **options):
    return optax.inject_hyperparams(make)(**options)


SETTINGS = dict(lr=0.5, momentum=0.5, dampening=0, weight_decay=0, nesterov=False, maximize=False)
WEIGHTS = {"fc.weight": np.zeros((2, 3)), "fc.bias": np.zeros(2)}
BUFFERS = [np.arange(6.0).reshape(2, 3), np.array([6.0, 7.0])]


def torch_state_dict(buffers=(0, 1), **settings):
    """What PyTorch saves, with these buffers."""
    return {
        "state": {i: {"momentum_buffer": BUFFERS[i]} for i in buffers},
        "param_groups": [{**SETTINGS, **settings, "params": [0, 1]}],
    }


def fc(weights):
    return {"kernel": weights["fc.weight"].T, "bias": weights["fc.bias"]}


FC = {"kernel": jnp.zeros((3, 2)), "bias": jnp.zeros(2)}


def load(state_dict=None, names=tuple(WEIGHTS), to_params=fc, params=FC, tx=None, **kwargs):
    tx = torch_sgd(0.5, 0.5) if tx is None else tx
    state_dict = torch_state_dict() if state_dict is None else state_dict
    return load_torch(tx.init(params), state_dict, names=names, to_params=to_params, **kwargs)


KERAS_OF_FC = {
    "sgd/iteration": np.array(3),
    "sgd/fc.weight_momentum": BUFFERS[0],
    "sgd/fc.bias_momentum": BUFFERS[1],
}


# For each function: the transformation of the state that it reads, that of the state that it fills
# (None if that is a checkpoint of another framework), and the call.
CARRIED = {
    "load_torch": (
        None,
        torch_sgd(0.5, 0.5),
        lambda _, target: load_torch(target, torch_state_dict(), names=list(WEIGHTS), to_params=fc),
    ),
    "load_keras": (
        None,
        keras_sgd(0.5, 0.5),
        lambda _, target: load_keras(target, KERAS_OF_FC, names=list(WEIGHTS), to_params=fc),
    ),
    "load_optax": (
        optax.sgd(0.5, 0.5),
        optax_sgd(0.5, 0.5),
        lambda source, target: load_optax(target, source),
    ),
    "dump_torch": (
        torch_sgd(0.5, 0.5),
        None,
        lambda source, _: dump_torch(source, torch_state_dict(), names=list(WEIGHTS), to_params=fc),
    ),
    "dump_keras": (
        keras_sgd(0.5, 0.5),
        None,
        lambda source, _: dump_keras(source, KERAS_OF_FC, names=list(WEIGHTS), to_params=fc),
    ),
    "dump_optax": (
        optax_sgd(0.5, 0.5),
        optax.sgd(0.5, 0.5),
        lambda source, target: dump_optax(target, source),
    ),
    "momentum_from_trace": (
        mj.trace(0.5),
        mj.momentum(0.5, 0.5),
        lambda source, target: momentum_from_trace(target, source, learning_rate=0.5),
    ),
    "trace_from_momentum": (
        mj.momentum(0.5, 0.5),
        mj.trace(0.5),
        lambda source, target: trace_from_momentum(target, source, learning_rate=0.5),
    ),
}
