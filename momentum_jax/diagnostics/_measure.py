"""Measures one step of momentum in a few scalars: energies, alignment, gain.

Everything is computed from the gradient and the velocity, inside or outside jit. The arrays are
read twice: once for their largest values, and once for sums that are scaled by these. So no result
is 0 or infinite only because the square of a value underflows or overflows.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from momentum_jax import _inner_products
from momentum_jax._dispatch import jit_by_leaf, jit_whole, on_one_group
from momentum_jax._hyperparameters import check_value
from momentum_jax._jax import inlined_jit
from momentum_jax._leaves import check_arrays
from momentum_jax.theory import _formulas

PyTree = Any


class Measurement(NamedTuple):
    """The measurements of one step: scalars, at least float32.

    The mass is 1 and a step takes the time sqrt(learning_rate). So energies are in the unit of the
    loss.

    Attributes:
      kinetic_energy: |v|^2 / (2 learning_rate).
      potential_energy: the loss; None if it was not given.
      total_energy: the sum of both; None without the loss.
      alignment: the cosine of the angle between v and -g, from -1 to 1. It is above 0 if the
        velocity points downhill, and 0 if v or g is 0.
      gain: |v| / (learning_rate |g|), the length of this step in steps of plain gradient descent.
        Under a constant gradient it rises to 1 / (1 - mu). It is 0 if g is 0.
      speed: |v| / sqrt(learning_rate).
      effective_learning_rate: learning_rate / (1 - mu). It is infinite at mu 1, but 0 at a
        learning rate of 0.
      friction: (1 - mu) / sqrt(learning_rate).

    Example:
      >>> from momentum_jax.diagnostics import Measurement
      >>> Measurement._fields[:3]
      ('kinetic_energy', 'potential_energy', 'total_energy')
    """

    kinetic_energy: jax.Array
    potential_energy: jax.Array | None
    total_energy: jax.Array | None
    alignment: jax.Array
    gain: jax.Array
    speed: jax.Array
    effective_learning_rate: jax.Array
    friction: jax.Array


def measure(
    grads: PyTree,
    velocity: PyTree,
    *,
    learning_rate: jax.typing.ArrayLike,
    mu: jax.typing.ArrayLike,
    loss: jax.typing.ArrayLike | None = None,
) -> Measurement:
    """Measures the motion of all params together.

    Args:
      grads: the gradients of the step, a tree of arrays. A param with None, an `optax.MaskedNode`
        or float0 is left out.
      velocity: the velocity after the step, with the learning rate inside. This is the `velocity`
        in the state of `momentum`; if it is stored in int8, give `read_velocity(state)`. For
        `trace`, give its updates times -learning_rate.
      learning_rate: the learning rate of the step, at least 0. If it is 0, every result that
        divides by it is 0.
      mu: the momentum coefficient of the step, in (-1, 1].
      loss: the loss, for the energies; None by default.

    Returns:
      A `Measurement`.

    Raises:
      ValueError, TypeError: as for `momentum`.

    Example:
      >>> import jax, jax.numpy as jnp, momentum_jax as mj
      >>> tx = mj.momentum(learning_rate=0.5, mu=0.5)
      >>> w = jnp.array([2.0])
      >>> state = tx.init(w)
      >>> for _ in range(2):
      ...     loss, grads = jax.value_and_grad(lambda w: (w**2).sum() / 2)(w)
      ...     updates, state = tx.update(grads, state)
      ...     found = mj.diagnostics.measure(
      ...         grads, state.velocity, learning_rate=0.5, mu=0.5, loss=loss
      ...     )
      ...     w = w + updates
      >>> print(found.gain, found.alignment, found.total_energy)
      2.0 1.0 1.5

    Source:
      Qian (1999), On the momentum term in gradient descent learning algorithms, for momentum as a
      ball with mass and friction.
    """
    learning_rate, one_minus_mu = _check(learning_rate, mu)
    check_arrays("gradient", grads)
    return _measure(grads, velocity, learning_rate, one_minus_mu, loss)


def measure_by_leaf(
    grads: PyTree,
    velocity: PyTree,
    *,
    learning_rate: jax.typing.ArrayLike,
    mu: jax.typing.ArrayLike,
) -> dict[str, Measurement]:
    """Measures the motion of each param separately, for example to find a layer that diverges.

    Args:
      grads: as for `measure`.
      velocity: as for `measure`.
      learning_rate: as for `measure`.
      mu: as for `measure`.

    Returns:
      A dict from the path of each param that has a gradient to its `Measurement`, without a loss.

    Raises:
      ValueError, TypeError: as for `momentum`.

    Example:
      >>> import jax.numpy as jnp, momentum_jax as mj
      >>> tx = mj.momentum(learning_rate=0.5, mu=0.5)
      >>> grads = {"body": jnp.ones(2), "head": 100 * jnp.ones(2)}
      >>> _, state = tx.update(grads, tx.init(grads))
      >>> found = mj.diagnostics.measure_by_leaf(
      ...     grads, state.velocity, learning_rate=0.5, mu=0.5
      ... )
      >>> max(found, key=lambda path: found[path].kinetic_energy)
      "['head']"
    """
    learning_rate, one_minus_mu = _check(learning_rate, mu)
    check_arrays("gradient", grads)
    found, _ = _measure_by_leaf((), (grads, velocity), (learning_rate, one_minus_mu))
    leaves = jax.tree_util.tree_leaves_with_path(
        found, is_leaf=lambda node: isinstance(node, Measurement)
    )
    return {jax.tree_util.keystr(path): leaf for path, leaf in leaves}


def _check(learning_rate, mu):
    """Returns the learning rate and 1 - mu."""
    learning_rate, mu = check_value("learning_rate", learning_rate), check_value("mu", mu)
    of = _formulas.one_minus_mu if isinstance(mu, float) else _one_minus_mu
    return learning_rate, of(mu)


_one_minus_mu = inlined_jit(_formulas.one_minus_mu)


def measure_near(
    exponents: tuple[jax.Array, jax.Array],
    grads: PyTree,
    velocity: PyTree,
    *,
    learning_rate: jax.typing.ArrayLike,
    mu: jax.typing.ArrayLike,
    loss: jax.typing.ArrayLike | None,
) -> tuple[Measurement, tuple[jax.Array, jax.Array]]:
    """Measures as `measure` does, but scales by the given exponents, so arrays are read once.

    The result is accurate up to rounding if the largest gradient and the largest velocity have not
    changed by more than a factor of 1e12.

    Args:
      exponents: the second result of the previous call.
      grads: as for `measure`.
      velocity: as for `measure`.
      learning_rate: as for `measure`.
      mu: as for `measure`.
      loss: as for `measure`.

    Returns:
      A `Measurement`, and the exponents for the next call.
    """
    learning_rate, one_minus_mu = _check(learning_rate, mu)
    found = _measure(grads, velocity, learning_rate, one_minus_mu, loss, exponents)
    least = jnp.finfo(found.gain.dtype).minexp
    now = _exponents((), (grads, velocity))[1]
    # After a step whose gradients are 0 or not finite, the old exponents predict the next better.
    g, v = (jnp.where(x > least, x, e) for x, e in zip(now, exponents, strict=True))
    return found, (g, v)


def _largest(several):
    # If all values of a group are 0, its exponent is the smallest: another group decides.
    return tuple(
        functools.reduce(jnp.maximum, each) for each in zip(*on_one_group(several), strict=True)
    )


@functools.partial(jit_by_leaf, combine=_largest)
def _exponents(_, trees, __):
    return (), _inner_products.exponents(*trees)


@jit_whole
def _measure(grads, velocity, learning_rate, one_minus_mu, loss, exponents=None):
    exponents = exponents or _exponents((), (grads, velocity))[1]
    _, products = _products((), (grads, velocity), exponents)
    return _of_products(*on_one_group([products, learning_rate, one_minus_mu, loss]))


def _sum(several):
    return _inner_products.sum_of_products(on_one_group(several))


@functools.partial(jit_by_leaf, combine=_sum)
def _products(_, trees, exponents):
    found = _inner_products.products(trees[0], trees[1], exponents)
    return (), _inner_products.sum_of_products(jax.tree.leaves(found, is_leaf=_is_products))


@jit_by_leaf
def _measure_by_leaf(_, trees, shared):
    found = _inner_products.products(*trees)
    return jax.tree.map(
        lambda one: _of_products(one, *shared, None), found, is_leaf=_is_products
    ), ()


def _is_products(node):
    return isinstance(node, _inner_products.Products)


@inlined_jit
def _of_products(products, learning_rate, one_minus_mu, loss):
    gg, gv, vv, g_exponent, v_exponent = products
    learning_rate = jnp.asarray(learning_rate, vv.dtype)
    one_minus_mu = jnp.asarray(one_minus_mu, vv.dtype)
    g, v = jnp.sqrt(gg), jnp.sqrt(vv)
    # All powers of 2 are applied last and at once, as intermediate results may overflow.
    exponent = _inner_products.exponent_of(learning_rate)
    rate = _inner_products.times_power_of_2(learning_rate, -exponent)
    energy = _formulas.kinetic_energy(rate, vv)
    kinetic = _inner_products.times_power_of_2(energy, 2 * v_exponent - exponent)
    gain = _formulas.divide(_formulas.divide(v, rate), g)
    alignment = _formulas.divide(_formulas.divide(-gv, g), v)
    speed = _formulas.speed(learning_rate, v)
    if loss is not None:
        loss = jnp.asarray(loss)
        kinetic, loss = (
            x.astype(jnp.promote_types(kinetic.dtype, loss.dtype)) for x in (kinetic, loss)
        )
    return Measurement(
        kinetic_energy=kinetic,
        potential_energy=loss,
        total_energy=None if loss is None else kinetic + loss,
        alignment=jnp.clip(alignment, -1, 1),
        gain=_inner_products.times_power_of_2(gain, v_exponent - g_exponent - exponent),
        speed=_inner_products.times_power_of_2(speed, v_exponent),
        effective_learning_rate=_formulas.effective_learning_rate(learning_rate, one_minus_mu),
        friction=_formulas.friction(learning_rate, one_minus_mu),
    )
