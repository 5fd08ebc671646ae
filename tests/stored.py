"""What the tests of stored velocities share: arrays, a transformation, and the bits of trees."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import momentum_jax

mj: Any = momentum_jax  # Avoids casts: Optax types its trees too widely.

LOW = ["bfloat16", "float16", "int8"]
SHAPE = (64, 128)  # Blocks of 32 rows: scales of shape (2, 128).
every_dtype = pytest.mark.parametrize("velocity_dtype", LOW)


def numbers(shape=SHAPE, seed=0):
    """Returns multiples of 1/64: the arithmetic on them is exact for some steps."""
    return jnp.asarray(np.random.default_rng(seed).integers(-255, 256, shape) / 64, jnp.float32)


def normal(shape=SHAPE, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def bits(tree):
    leaves, treedef = jax.tree.flatten(tree)
    return treedef, [(x.shape, x.dtype, np.asarray(x).tobytes()) for x in leaves]


def make(velocity_dtype, mu=0.75):
    return mj.momentum(0.375, mu, velocity_dtype=velocity_dtype)


def moving(tx, grads, steps=2):
    """Returns the state after some steps."""
    state = tx.init(grads)
    for _ in range(steps):
        _, state = tx.update(grads, state, grads)
    return state
