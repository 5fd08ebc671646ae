"""Short training jobs: params, gradients, transformations, and states after a few steps."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib

import momentum_jax

mj: Any = momentum_jax  # Optax types a state as any tree of arrays.

STEPS = 20
# int8 quantizes the first in blocks, and stores the second in float32.
WIDE, NARROW = (64, 128), (3,)


def numbers(shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def params_of(*names, seed=0):
    """A dict of dicts with two arrays each."""
    return {
        name: {"w": numbers(WIDE, seed + 2 * i), "b": numbers(NARROW, seed + 2 * i + 1)}
        for i, name in enumerate(names)
    }


def grads_like(params, step):
    """Gradients that depend only on the shape of the param and on the step."""
    return jax.tree.map(lambda w: numbers(w.shape, 1000 + step + w.size).astype(w.dtype), params)


@functools.partial(jax.jit, static_argnums=0)
def one_step(tx, params, state, grads):
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state


def train(tx, params, state, steps, start=0):
    for step in range(start, start + steps):
        params, state = one_step(tx, params, state, grads_like(params, step))
    return params, state


def begun(tx, params, steps=3):
    return train(tx, params, tx.init(params), steps)


def types(tree):
    return [(x.shape, x.dtype, x.weak_type) for x in map(jnp.asarray, jax.tree.leaves(tree))]


def assert_same(left, right):
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
        assert a.dtype == b.dtype


def scheduled(count):
    return 0.1 / (1 + count)


# Transformations and states of different kinds. ---------------------------------------------


def average(velocity, gradient, mu):
    velocity = mu * velocity + (1 - mu) * gradient
    return velocity, -0.1 * velocity


KINDS: dict[str, Any] = {
    "momentum": lambda: mj.momentum(scheduled, 0.9),
    "bfloat16": lambda: mj.momentum(0.1, velocity_dtype="bfloat16"),
    "int8": lambda: mj.momentum(0.1, velocity_dtype="int8"),
    "trace": lambda: optax.chain(mj.trace(0.9), optax.scale_by_learning_rate(scheduled)),
    "qhm": lambda: mj.qhm(0.1),
    "aggmo": lambda: mj.aggmo(0.1, (0.0, 0.9), velocity_dtype="int8"),
    "recurrence": lambda: mj.recurrence(average, mu=0.9),
    "sgd": lambda: optax.sgd(scheduled, 0.9),
    "adam": lambda: optax.adam(0.01, mu_dtype=jnp.bfloat16),
    "adamw in a chain": lambda: optax.chain(optax.clip(1.0), optax.adamw(0.01)),
    "adafactor": lambda: optax.adafactor(0.01, min_dim_size_to_factor=8),
    "two velocities of one type": lambda: optax.chain(
        mj.trace(0.5), mj.trace(0.9), optax.scale(-0.1)
    ),
    "MultiSteps": lambda: optax.MultiSteps(mj.momentum(scheduled), 2),
    "inject_hyperparams": lambda: optax.inject_hyperparams(
        mj.momentum, static_args=("nesterov", "velocity_dtype")
    )(learning_rate=0.1, mu=lambda count: 0.9),
    "adaptive_restart": lambda: mj.adaptive_restart(mj.momentum(0.1, 0.9)),
    "kahan": lambda: mj.kahan(mj.momentum(0.1)),
    "apply_if_finite": lambda: optax.apply_if_finite(optax.sgd(0.1, 0.9), 3),
    "schedule_free": lambda: optax.contrib.schedule_free(optax.sgd(0.1, 0.9), 0.1),
    "torch_sgd": lambda: mj.frameworks.torch_sgd(0.1, 0.9, dampening=0.5),
    "partition by depth": lambda: optax.partition(
        {"w": mj.momentum(0.1), "b": optax.adam(0.01)},
        lambda params: jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key, params),
    ),
    "masked": lambda: optax.masked(
        mj.momentum(0.1),
        lambda params: jax.tree_util.tree_map_with_path(
            lambda path, _: path[-1].key == "w", params
        ),
    ),
}
# Each is made once, so that the tests of a module compile its step once.
KINDS = {name: functools.cache(make) for name, make in KINDS.items()}


OFF = optax.set_to_zero()
ENC_HEAD = {"enc": numbers(3), "head": numbers(4)}
BOTH = {"enc": "a", "head": "b"}  # Labels of two groups of ENC_HEAD.
ONE = {"enc": "z", "head": "z"}  # Labels of one group of it.
SCHEDULE = optax.scale_by_schedule(scheduled)


def injected(learning_rate):
    make = optax.inject_hyperparams(mj.momentum, static_args=("nesterov", "velocity_dtype"))
    return make(learning_rate=learning_rate)


def multi_steps(inner, every):
    return optax.MultiSteps(inner, every).gradient_transformation()


def plateau():
    return optax.chain(mj.momentum(0.1), optax.contrib.reduce_on_plateau())


def inject_scale(factor):
    return optax.inject_hyperparams(optax.scale)(step_size=factor)


def halved(state):
    """Returns the state with each rate and scale halved, as after some training."""
    names = ("learning_rate", "scale")
    return jax.tree_util.tree_map_with_path(
        lambda path, x: x / 2 if getattr(path[-1], "key", getattr(path[-1], "name", 0)) in names
        else x,
        state,
    )  # fmt: skip


def counts_of(state):
    return [int(count) for _, count in optax.tree.get_all_with_path(state, "count")]


class Mine(NamedTuple):
    """A state type of the user's own."""

    m: Any
    count: Any


def mine():
    """Returns a transformation whose only state is of a user's own type."""

    def init(params):
        return Mine(jax.tree.map(jnp.zeros_like, params), jnp.int32(0))

    def update(updates: Any, state: Any, params: Any = None) -> Any:
        del params
        m = jax.tree.map(lambda m, g: 0.9 * m + g, state.m, updates)
        return jax.tree.map(lambda m: -0.1 * m, m), Mine(m, state.count + 1)

    return optax.GradientTransformation(init, update)


class WithStats(NamedTuple):
    """A state with named numbers, beside its arrays per param."""

    m: Any
    stats: Any


class WithKey(NamedTuple):
    """A state with a random key."""

    m: Any
    rng: Any


def unchanged(updates: Any, state: Any, params: Any = None) -> Any:
    del params
    return updates, state


def rates(state):
    """Returns the learning rate of the group of each param."""
    found = {}
    for name, group in state.inner_states.items():
        inner = group.inner_state
        if hasattr(inner, "hyperparams"):
            for path, _ in jax.tree_util.tree_leaves_with_path(inner.inner_state.velocity):
                found[path[0].key, name] = round(float(inner.hyperparams["learning_rate"]), 4)
    return found
