"""The largest and smallest eigenvalue of a loss's Hessian, from Hessian-vector products."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from momentum_jax._hyperparameters import require_whole
from momentum_jax._jax import inlined_jit
from momentum_jax._leaves import check_arrays
from momentum_jax._placement import shard_like
from momentum_jax._storage import compute_dtype

PyTree = Any


class Curvature(NamedTuple):
    """The curvature of a loss at the params: scalars in float32, or float64 for float64 params.

    Attributes:
      largest: the largest eigenvalue of the Hessian, with its sign: the sharpness.
      smallest: the smallest eigenvalue, with its sign; below 0 at a saddle.
      largest_error: an error bound. Some eigenvalue is at most this far from `largest`.
      smallest_error: the same bound for `smallest`.
      along_gradient: g^T H g / |g|^2, the curvature along the gradient; 0 if the gradient is 0.
      converged: whether both errors are at most 0.1% of the larger magnitude of the two
        eigenvalues.

    Example:
      >>> from momentum_jax.diagnostics import Curvature
      >>> Curvature._fields[:2]
      ('largest', 'smallest')
    """

    largest: jax.Array
    smallest: jax.Array
    largest_error: jax.Array
    smallest_error: jax.Array
    along_gradient: jax.Array
    converged: jax.Array


def curvature(
    loss: Callable[..., jax.Array],
    params: PyTree,
    *batch: Any,
    steps: int = 48,
    key: jax.Array | None = None,
    model: Callable[..., Any] | None = None,
) -> Curvature:
    """Measures the largest and the smallest curvature of a loss.

    Lanczos' method: each step computes one product of the Hessian with a vector, which is the
    directional derivative of the gradient. The vectors are trees like the params and have their
    shardings. No array is flattened or gathered.

    Cost: the gradient, and `steps` + 1 products, each about two to three gradients. Memory: seven
    copies of the params in float32, in addition to the memory of a second derivative.

    Args:
      loss: `(params, *batch) -> scalar`, real. It is compiled once for each function and each
        combination of shapes.
      params: a tree of arrays. Arrays that are not floating-point or complex are held fixed. Arrays
        of lower precision than float32 are widened, because the Hessian would be inaccurate.
      *batch: further arguments of the loss.
      steps: the number of products, at least 2; 48 by default. More products give smaller errors.
      key: a key for the random start vector; by default the same in each call.
      model: if given, the Gauss-Newton matrix J^T H J is measured instead. It has no negative
        eigenvalues if the loss is convex. The model is a function `(params, *batch) -> outputs`,
        and the loss is then `(outputs, *batch) -> scalar`. J is the derivative of the model and H
        the Hessian of the loss.

    Returns:
      A `Curvature`. The small eigenvalue problem is solved in float64 outside jit, and in the
      precision of the params inside jit.

    Raises:
      TypeError: the loss is not a real scalar, or no param can be differentiated.
      ValueError: `steps` is not a whole number of at least 2.

    Example:
      >>> import jax.numpy as jnp, momentum_jax as mj
      >>> def loss(w):
      ...     return jnp.sum(jnp.array([10.0, 2.0, -1.0]) * w**2) / 2
      >>> found = mj.diagnostics.curvature(loss, jnp.ones(3))
      >>> print(f"{found.largest:.3f} {found.smallest:.3f} {found.along_gradient:.3f}")
      10.000 -1.000 9.590

    Source:
      Lanczos (1950), An iteration method for the solution of the eigenvalue problem of linear
      differential and integral operators; Paige (1980), Accuracy and effectiveness of the Lanczos
      algorithm for the symmetric eigenproblem, for the errors without reorthogonalization;
      Pearlmutter (1994), Fast exact multiplication by the Hessian.
    """
    steps = require_whole("steps", steps, 2)
    check_arrays("param", params)
    key = jax.random.key(0) if key is None else key
    diagonal, off_diagonal, along_gradient = _lanczos(loss, model, steps, params, batch, key)
    return _ritz(diagonal, off_diagonal, along_gradient)


@functools.partial(inlined_jit, static_argnums=(0, 1, 2))
def _lanczos(loss, model, steps, params, batch, key):
    """Returns the tridiagonal matrix of the Hessian in the Krylov basis of a random vector."""
    varied, treedef, fixed = _varied(params)

    def of_varied(function):
        return lambda leaves, *args: function(_joined(treedef, leaves, fixed), *args)

    if model is None:
        gradient, product = _hessian(of_varied(loss), varied, batch)
    else:
        gradient, product = _gauss_newton(loss, of_varied(model), varied, batch)
    keys = jax.random.split(key, len(varied))
    start = [_normal_like(*each) for each in zip(keys, varied, strict=True)]
    first = _scaled(start, 1 / _norm(start))
    zeros = [jnp.zeros_like(x) for x in first]
    dtype = _dot(first, first).dtype
    least = jnp.finfo(dtype).eps

    def step(carry, _):
        last, now, off_diagonal, size = carry
        image = product(now)
        diagonal = _dot(now, image)
        rest = [
            w - diagonal * v - off_diagonal * u for w, v, u in zip(image, now, last, strict=True)
        ]
        # Orthogonalize once more, to remove what rounding left along the vector.
        again = _dot(now, rest)
        rest = [w - again * v for w, v in zip(rest, now, strict=True)]
        size = jnp.maximum(size, jnp.abs(diagonal) + off_diagonal)
        norm = _norm(rest)
        # The basis spans an invariant subspace, so Lanczos' method ends. The rest of the diagonal
        # is filled with copies of its first element, which lies between the extremes.
        done = norm <= 8 * least * size
        norm = jnp.where(done, 0, norm)
        following = _scaled(rest, jnp.where(done, 0, 1 / jnp.where(done, 1, norm)))
        return (now, following, norm, size), (diagonal + again, norm)

    zero = jnp.zeros((), dtype)
    _, (diagonal, off_diagonal) = jax.lax.scan(step, (zeros, first, zero, zero), length=steps)
    ended = jnp.cumsum(off_diagonal == 0) - (off_diagonal == 0) > 0
    diagonal = jnp.where(ended, diagonal[0], diagonal)
    length = _norm(gradient)
    direction = _scaled(gradient, 1 / jnp.where(length == 0, 1, length))
    return diagonal, off_diagonal, _dot(direction, product(direction))


def _ritz(diagonal, off_diagonal, along_gradient):
    """Returns the extreme eigenvalues of the tridiagonal matrix, with error bounds."""
    traced = isinstance(diagonal, Tracer)
    xp: Any = jnp if traced else np
    dtype = diagonal.dtype
    if not traced:
        diagonal, off_diagonal = (np.asarray(x, np.float64) for x in (diagonal, off_diagonal))
    largest = xp.max(xp.maximum(xp.abs(diagonal), off_diagonal))
    unit = xp.where(largest > 0, largest, 1)
    beside = off_diagonal[:-1] / unit
    matrix = xp.diag(diagonal / unit) + xp.diag(beside, 1) + xp.diag(beside, -1)
    values, vectors = xp.linalg.eigh(matrix)
    values = values * unit
    size = xp.maximum(xp.abs(values[0]), xp.abs(values[-1]))
    rounding = len(diagonal) * float(jnp.finfo(dtype).eps) * size
    # The residual of a Ritz vector: the last element of its coefficients, times the last norm.
    errors = xp.abs(vectors[-1]) * off_diagonal[-1] + rounding
    converged = xp.maximum(errors[0], errors[-1]) <= 1e-3 * size
    numbers = (jnp.asarray(x, dtype) for x in (values[-1], values[0], errors[-1], errors[0]))
    return Curvature(*numbers, along_gradient, jnp.asarray(converged))


def _hessian(loss, varied, batch):
    """Returns the gradient, and a function that multiplies the Hessian by a vector.

    For complex params both refer to the real and imaginary parts, stored as complex numbers.
    """
    gradient_of = jax.grad(lambda leaves: _checked(loss(leaves, *batch)))
    return jax.linearize(lambda leaves: [x.conj() for x in gradient_of(leaves)], varied)


def _gauss_newton(loss, model, varied, batch):
    outputs, push = jax.linearize(lambda leaves: model(leaves, *batch), varied)
    transposed = jax.linear_transpose(push, varied)
    gradient_of = jax.grad(lambda outputs: _checked(loss(outputs, *batch)))
    slope, bend = jax.linearize(
        lambda outputs: jax.tree.map(jnp.conj, gradient_of(outputs)), outputs
    )

    def pull(outputs):
        (leaves,) = transposed(jax.tree.map(jnp.conj, outputs))
        return [x.conj() for x in leaves]

    return pull(slope), lambda leaves: pull(bend(push(leaves)))


def _checked(value):
    value = jnp.asarray(value)
    if value.shape != () or not jnp.issubdtype(value.dtype, jnp.floating):
        raise TypeError(
            f"the loss is {value.dtype}{list(value.shape)}, but must be a real scalar. Return, for "
            "example, the mean over the batch."
        )
    return value


def _varied(params):
    """Returns the params to differentiate with respect to, widened; the treedef; the others."""
    leaves, treedef = jax.tree.flatten(params)
    leaves = [jnp.asarray(x) for x in leaves]
    moves = [jnp.issubdtype(x.dtype, jnp.inexact) for x in leaves]
    varied = [
        x.astype(compute_dtype(x.dtype)) for x, each in zip(leaves, moves, strict=True) if each
    ]
    if not varied:
        raise TypeError(
            "params has no floating-point array, but the loss must be differentiated with respect "
            "to at least one. Give the params as floating-point arrays."
        )
    fixed = [None if each else x for x, each in zip(leaves, moves, strict=True)]
    return varied, treedef, fixed


def _joined(treedef, varied, fixed):
    varied = iter(varied)
    return treedef.unflatten(next(varied) if x is None else x for x in fixed)


def _normal_like(key, x):
    return shard_like(jax.random.normal(key, x.shape, x.dtype), x, backward=True)


def _dot(xs, ys):
    """Returns the real inner product over all arrays."""
    products = [jnp.sum(jnp.real(x.conj() * y)) for x, y in zip(xs, ys, strict=True)]
    dtype = functools.reduce(jnp.promote_types, [x.dtype for x in products])
    return functools.reduce(jnp.add, [x.astype(dtype) for x in products])


def _norm(xs):
    """Returns the root of the sum of squares, also if the squares overflow or underflow."""
    largest = functools.reduce(jnp.maximum, [jnp.max(jnp.abs(x), initial=0) for x in xs])
    scale = jnp.where(largest > 0, largest, 1)
    parts = _scaled(xs, 1 / scale)
    return scale * jnp.sqrt(_dot(parts, parts))


def _scaled(xs, factor):
    return [x * factor.astype(jnp.finfo(x.dtype).dtype) for x in xs]
