"""Inner products of gradients and velocities, also where a float cannot hold their squares."""

import functools
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from momentum_jax._leaves import check_gradient_dtype, expect_pair, map_leaves, path_text
from momentum_jax._placement import isolate_input, to_device_memory
from momentum_jax._storage import compute_dtype

PyTree = Any

# The largest difference between the powers of 2 by which `_products` scales its factors.
_MAX_SHIFT = 3


def inner_product(grads: PyTree, other: PyTree, name: str) -> jax.Array:
    """The sum of `grad * other` over all leaves with a gradient: real, at least float32.

    `name` is the name of `other` in error messages.
    """
    total = jnp.zeros((), jnp.float32)
    for grad, leaf in _wide_pairs(grads, other, name):
        product = jnp.sum(jnp.real(grad.conj() * leaf))
        width = np.promote_types(total.dtype, product.dtype)
        total = total.astype(width) + product.astype(width)
    return total


class Products(NamedTuple):
    """Sums of `g^2`, `g * v` and `v^2`, scaled so that floats can hold them.

    Attributes:
      gg: the sum of g^2, with the gradients g divided by 2^g_exponent.
      gv: the sum of g * v, with both divided by their powers of 2.
      vv: the sum of v^2, with the velocities v divided by 2^v_exponent.
      g_exponent: an int32 scalar; the largest gradient divided by 2^g_exponent is near 1.
      v_exponent: the same for the velocities.
    """

    gg: jax.Array
    gv: jax.Array
    vv: jax.Array
    g_exponent: jax.Array
    v_exponent: jax.Array


def products(
    grads: PyTree, velocity: PyTree, exponents: tuple[jax.Array, jax.Array] | None = None
) -> PyTree:
    """The `Products` of each leaf that has a gradient, in a tree like the gradients.

    With `exponents`, of gradients and velocities, each array is read only once.
    """

    def leaf(path, grad, one):
        grad, one = _wide("velocity", path, grad, one)
        return _products(_real_parts(grad), _real_parts(one), exponents or (None, None))

    return map_leaves(
        leaf, ("gradients", grads), ("velocity", velocity), absent=lambda grad, one: None
    )


def exponents(grads: PyTree, velocity: PyTree) -> tuple[jax.Array, jax.Array]:
    """`exponent_of` the largest gradient, and the largest velocity of a leaf with a gradient."""
    pairs = _wide_pairs(grads, velocity, "velocity")
    grads, velocities = zip(*pairs, strict=True) if pairs else ((), ())
    return _exponent_of_all(grads), _exponent_of_all(velocities)


def sum_of_products(several: Iterable[Products]) -> Products:
    """The `Products` over all leaves."""
    zero, exponent = jnp.zeros((), jnp.float32), jnp.zeros((), jnp.int32)
    several = list(several) or [Products(zero, zero, zero, exponent, exponent)]
    return functools.reduce(_sum_of_two, several)


def times_power_of_2(x: jax.Array, exponent: jax.Array) -> jax.Array:
    """`x * 2^exponent`, rounded once, also if a float cannot hold 2^exponent."""
    info = jnp.finfo(x.dtype)
    for _ in range(3):
        part = jnp.clip(exponent, info.minexp, info.maxexp - 1)
        exponent = exponent - part
        x = x * _power_of_2(part, info)
    return x


def _power_of_2(exponent, info):
    bits = (exponent.astype(f"int{info.bits}") - (info.minexp - 1)) << info.nmant
    return jax.lax.bitcast_convert_type(bits, info.dtype)


def exponent_of(x: jax.Array) -> jax.Array:
    """The integer e with 2^e <= |x| < 2^(e + 1).

    For 0, infinity and NaN it is the smallest exponent of the dtype.
    """
    x = jax.lax.stop_gradient(x)
    usual = jnp.isfinite(x) & (x != 0)
    exponent = jnp.frexp(jnp.where(usual, x, jnp.ones_like(x)))[1].astype(jnp.int32) - 1
    return jnp.where(usual, exponent, jnp.int32(jnp.finfo(x.dtype).minexp))


def _exponent_of_all(leaves):
    parts = [part for x in leaves for part in _real_parts(x) if part.size]
    width = jnp.result_type(jnp.float32, *parts)
    largest = [jnp.max(jnp.abs(part)).astype(width) for part in parts]
    return exponent_of(functools.reduce(jnp.maximum, largest, jnp.zeros((), width)))


def _sum_of_two(first, second):
    width = np.promote_types(first.gg.dtype, second.gg.dtype)
    g = jnp.maximum(first.g_exponent, second.g_exponent)
    v = jnp.maximum(first.v_exponent, second.v_exponent)
    least = jnp.int32(jnp.finfo(width).minexp)

    def powers(each):
        # The factors are applied one by one, so that infinity stays infinity and is not NaN.
        by_g, by_v = (
            times_power_of_2(jnp.ones((), width), jnp.maximum(exponent, least))
            for exponent in (each.g_exponent - g, each.v_exponent - v)
        )
        gg, gv, vv = (x.astype(width) for x in each[:3])
        return gg * by_g * by_g, gv * by_g * by_v, vv * by_v * by_v

    gg, gv, vv = (a + b for a, b in zip(powers(first), powers(second), strict=True))
    return Products(gg, gv, vv, g, v)


def _products(grad_parts, velocity_parts, exponents):
    info = jnp.finfo(grad_parts[0].dtype)

    def exponent_for(parts, exponent):
        if exponent is None:
            largest = [jnp.max(jnp.abs(x), initial=0) for x in parts]
            exponent = exponent_of(functools.reduce(jnp.maximum, largest))
        # Then each factor below is a normal number. What the clip leaves out is at most 2^5.
        limit = -info.minexp - _MAX_SHIFT
        return jnp.clip(exponent, -limit, limit)

    g, v = map(exponent_for, (grad_parts, velocity_parts), exponents)

    def summed(shift, *pair):
        # The two arrays of a sum are shifted in opposite directions, by a different power of 2 in
        # each sum. Without that, XLA would write the scaled array that two sums share to memory.
        (first, e), (second, f) = pair
        by = _power_of_2(shift - e, info), _power_of_2(-shift - f, info)
        sums = [jnp.sum(a * by[0] * (b * by[1])) for a, b in zip(first, second, strict=True)]
        return functools.reduce(jnp.add, sums)

    grads, velocities = (grad_parts, g), (velocity_parts, v)
    gg = summed(1, grads, grads)
    gv = summed(2, grads, velocities)
    vv = summed(_MAX_SHIFT, velocities, velocities)
    return Products(gg, gv, vv, g, v)


def _real_parts(x):
    return [jnp.real(x), jnp.imag(x)] if jnp.iscomplexobj(x) else [x]


def _wide_pairs(grads, other, name):
    """Each gradient with its counterpart, in one wide dtype."""
    pairs = []

    def leaf(path, grad, one):
        pairs.append(_wide(name, path, grad, one))

    map_leaves(leaf, ("gradients", grads), (name, other))
    return pairs


def _wide(name, path, grad, leaf):
    grad, leaf = expect_pair(path, "gradient", grad, name, leaf)
    if leaf.dtype == np.int8 and jnp.issubdtype(grad.dtype, jnp.inexact):
        raise TypeError(
            f"the {name} {path_text(path)} is int8: codes, which have no meaning without their "
            "scales. Give momentum_jax.read_velocity(state)."
        )
    check_gradient_dtype(path, grad.dtype, leaf.dtype)
    dtype = np.promote_types(compute_dtype(grad.dtype), compute_dtype(leaf.dtype))
    grad, leaf = to_device_memory((grad, leaf))
    return isolate_input(grad.astype(dtype), leaf), leaf.astype(dtype)
