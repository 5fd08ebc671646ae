"""Each recurrence as a plain NumPy loop in float64, easy to compare with the paper.

Each function takes the gradients of one array, a list with one entry per step. It returns two lists
of the same length: the updates and the velocities. A hyperparameter is a number or a function of
the step count, which starts at 0. The velocity starts at 0, or at `start`.
"""

from typing import Any

import numpy as np


def momentum(grads, learning_rate, mu, nesterov=False, start: Any = 0.0):
    """Momentum with the learning rate inside: v <- mu v - learning_rate g; the update is v."""
    v = start
    updates, velocities = [], []
    for count, g in enumerate(map(_wide, grads)):
        eta, mu_t = _at(learning_rate, count), _at(mu, count)
        v = mu_t * v - eta * g
        updates.append(mu_t * v - eta * g if nesterov else v)
        velocities.append(v)
    return updates, velocities


def heavy_ball(velocity, gradient, learning_rate, mu):
    """One step of `momentum`, as a function for `momentum_jax.recurrence`."""
    velocity = mu * velocity - learning_rate * gradient
    return velocity, velocity


def trace(grads, mu, dampening: Any = 0.0, nesterov=False, start: Any = 0.0):
    """Momentum without a learning rate: m <- mu m + (1 - dampening) g; the update is m."""
    m = start
    updates, velocities = [], []
    for count, g in enumerate(map(_wide, grads)):
        mu_t, damp = _at(mu, count), _at(dampening, count)
        m = mu_t * m + (1 - damp) * g
        updates.append(g + mu_t * m if nesterov else m)
        velocities.append(m)
    return updates, velocities


def sgd(grads, learning_rate, mu, dampening: Any = 0.0, nesterov=False, start: Any = 0.0):
    """Momentum with the learning rate outside: the updates of `trace` times -learning_rate."""
    updates, velocities = trace(grads, mu, dampening, nesterov, start)
    scaled = [-_at(learning_rate, count) * u for count, u in enumerate(updates)]
    return scaled, velocities


def qhm(grads, learning_rate, mu, nu, start: Any = 0.0):
    """QHM: v <- mu v + (1 - mu) g; the update is -learning_rate ((1 - nu) g + nu v)."""
    v = start
    updates, velocities = [], []
    for count, g in enumerate(map(_wide, grads)):
        eta, mu_t, nu_t = (_at(value, count) for value in (learning_rate, mu, nu))
        v = mu_t * v + (1 - mu_t) * g
        updates.append(-eta * ((1 - nu_t) * g + nu_t * v))
        velocities.append(v)
    return updates, velocities


def aggmo(grads, learning_rate, mus):
    """AggMo: the update is the mean of one velocity per mu. A step has a tuple of velocities."""
    runs = [momentum(grads, learning_rate, mu) for mu in mus]
    updates = [sum(each) / len(mus) for each in zip(*(u for u, _ in runs), strict=True)]
    return updates, list(zip(*(v for _, v in runs), strict=True))


def caffe(start, gradient, base_lr, momentum, weight_decay, steps):
    """Caffe's solver, with its sign: v <- momentum v + base_lr (g + weight_decay w), w <- w - v.

    `gradient` is a function of w and the step count. Returns the params after each step.
    """
    w, v = np.asarray(start, np.float64), 0.0
    params = []
    for count in range(steps):
        g = gradient(w, count) + weight_decay * w
        v = momentum * v + _at(base_lr, count) * g
        w = w - v
        params.append(w)
    return params


def hash_bits(values, count):
    """Returns 32 bits per value: a hash of count, position and the upper half of its float32."""
    values = np.asarray(values, np.float32)
    position = np.arange(values.size, dtype=np.uint64).reshape(values.shape)
    upper = (values.view(np.uint32) >> np.uint32(16)).astype(np.uint64)
    place = position * np.uint64(0x9E3779B1) + _hash(np.uint64(count))
    return _hash((place & np.uint64(2**32 - 1)) ^ upper)


def stochastic_round(values, dtype, bits):
    """Rounds away from 0 with a probability equal to the fraction of the gap, else toward 0."""
    mantissa, least = {"bfloat16": (7, -133), "float16": (10, -24)}[dtype]
    values = np.asarray(values, np.float64)
    gap = 2.0 ** np.maximum(np.frexp(values)[1] - 1 - mantissa, least)
    whole, rest = np.divmod(np.abs(values), gap)
    dropped = 23 - mantissa
    up = rest / gap + (bits >> np.uint64(32 - dropped)) / 2.0**dropped >= 1
    return np.copysign((whole + up) * gap, values)


def quantized(values, count, axis, length):
    """Returns the codes, the scale of each block along an axis, and the decoded values."""
    values = np.asarray(values, np.float64)
    blocks = np.moveaxis(values, axis, -1)
    blocks = blocks.reshape(*blocks.shape[:-1], -1, length)
    # The largest magnitude, rounded up to the 8 significant bits of a bfloat16.
    largest = np.maximum(np.abs(blocks).max(-1), 2.0**-100)
    gap = 2.0 ** (np.frexp(largest)[1] - 8)
    scales = np.moveaxis(np.ceil(largest / gap) * gap, -1, axis)
    each = np.repeat(scales, length, axis)

    # Code k stands for k (|k| + 127) units.
    unit = each / (2 * 127**2)
    x = np.abs(values) / unit
    below = np.floor(np.sqrt(x + 127**2 / 4) - 127 / 2)
    part = (x - below * (below + 127)) / (2 * below + 128)
    # The bits as a signed integer, plus 2^31, divided by 2^32.
    uniform = ((hash_bits(values, count) + np.uint64(2**31)) % np.uint64(2**32)) / 2.0**32
    codes = np.sign(values) * np.minimum(below + (uniform < part), 127)
    return codes, scales, codes * (np.abs(codes) + 127) * unit


def _hash(x):
    """Wellons (2018), lowbias32 without its last step; in 64 bits, of which 32 are kept."""
    low = np.uint64(2**32 - 1)
    x = x & low
    x = ((x ^ (x >> np.uint64(16))) * np.uint64(0x7FEB352D)) & low
    return ((x ^ (x >> np.uint64(15))) * np.uint64(0x846CA68B)) & low


def _at(value: Any, count):
    return np.asarray(value(count) if callable(value) else value, np.float64)


def _wide(g):
    return np.asarray(g, np.result_type(g, np.float64))  # complex128 if g is complex.
