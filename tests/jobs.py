"""Short jobs: params, gradients, and states after a few steps."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

STEPS = 20
WIDE, NARROW = (64, 128), (3,)  # int8 has blocks for the first, and keeps the second wide.


def numbers(shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def params_of(*names, seed=0):
    """A dict of dicts with two arrays each."""
    return {
        name: {"w": numbers(WIDE, seed + 2 * i), "b": numbers(NARROW, seed + 2 * i + 1)}
        for i, name in enumerate(names)
    }


def grads_like(params, step):
    """Gradients of each param by its shape and the step alone, whatever else there is."""
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
