"""Elementwise functions, recognized by the jaxpr that JAX traces of them.

An elementwise function can be computed on its arrays in any arrangement, for example with an axis
split into blocks. The jaxpr is then evaluated on the rearranged arrays. The function itself is not
called again, because it may have read the shapes.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax import lax
from jax.extend.core import Literal

from momentum_jax._jax import ELEMENTWISE_PRIMITIVES, called_jaxpr
from momentum_jax._placement import reshard_like


def elementwise(function: Callable[..., Any], *args: Any) -> Callable[..., Any] | None:
    """A form of `function` that accepts arrays of any shape; None if it is not elementwise.

    Args:
      function: a function of trees of arrays.
      *args: arguments to trace it with: scalars, and arrays of one shape other than ().

    Returns:
      A function that computes the same on arrays of another shape.
    """
    traced, result = jax.make_jaxpr(function, return_shape=True)(*args)
    (shape,) = {leaf.shape for leaf in jax.tree.leaves(args) if leaf.shape}
    if not _is_elementwise(traced, shape):
        return None
    treedef = jax.tree.structure(result)

    def arranged(*others):
        leaves = jax.tree.leaves(others)
        like = next(x for x in leaves if x.ndim)
        return treedef.unflatten(_evaluated(traced.jaxpr, traced.consts, leaves, like))

    return arranged


def _is_elementwise(traced, shape):
    """Whether every value has this shape, or is a scalar."""
    if any(jax.numpy.ndim(x) for x in traced.consts):
        return False
    return all(_is_elementwise_equation(equation, shape) for equation in traced.jaxpr.eqns)


def _is_elementwise_equation(equation, shape):
    if any(x.aval.shape not in ((), shape) for x in (*equation.invars, *equation.outvars)):
        return False
    inner = called_jaxpr(equation)
    if inner is not None:
        return _is_elementwise(inner, shape)
    if equation.primitive.name == "broadcast_in_dim":
        return equation.invars[0].aval.shape == ()
    return equation.primitive.name in ELEMENTWISE_PRIMITIVES


def _evaluated(
    jaxpr: Any, consts: Sequence[Any], args: Sequence[Any], like: jax.Array
) -> list[Any]:
    values = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *args], strict=True))

    def read(variable):
        return variable.val if isinstance(variable, Literal) else values[variable]

    for equation in jaxpr.eqns:
        operands = [read(variable) for variable in equation.invars]
        inner = called_jaxpr(equation)
        if inner is not None:
            results = _evaluated(inner.jaxpr, inner.consts, operands, like)
        elif equation.primitive.name == "broadcast_in_dim":
            results = [reshard_like(lax.broadcast(operands[0], like.shape), like)]
        else:
            result = equation.primitive.bind(*operands, **equation.params)
            results = result if equation.primitive.multiple_results else [result]
        values.update(zip(equation.outvars, results, strict=True))
    return [read(variable) for variable in jaxpr.outvars]
