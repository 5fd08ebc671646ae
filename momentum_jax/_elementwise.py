"""Functions that treat the values of their arrays one by one, as found in what JAX traces of them.

Such a function may be computed in any arrangement of the values, for example with an axis that is
split in blocks. What it was traced to is then evaluated again, and not the function called again:
it may have read the shapes.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax import lax
from jax.extend.core import Literal

from momentum_jax._placement import reshard_like

# Primitives of JAX whose results have, at each place, a value made of the arguments' values there.
# fmt: off
_PRIMITIVES = frozenset((
    "abs", "add", "add_any", "and", "atan2", "cbrt", "ceil", "clamp", "convert_element_type",
    "copy", "copy_p", "cos", "cosh", "div", "eq", "erf", "erf_inv", "erfc", "exp", "exp2",
    "expm1", "floor", "ge", "gt", "integer_pow", "is_finite", "le", "log", "log1p", "logistic",
    "lt", "max", "min", "mul", "ne", "neg", "nextafter", "not", "or", "pcast", "pow",
    "pvary", "reduce_precision", "rem", "round", "rsqrt", "select_n", "sign", "sin", "sinh",
    "sqrt", "square", "stop_gradient", "sub", "tan", "tanh", "xor",
))
# fmt: on
# Those that call a function that was traced too.
_CALLS = frozenset(("jit", "pjit", "closed_call"))


def elementwise(function: Callable[..., Any], *args: Any) -> Callable[..., Any] | None:
    """The function of these arguments, for arrays of any shape; None if it is not elementwise.

    Args:
      function: of trees of arrays.
      *args: what to trace it with: arrays of one shape that is not (), and scalars.

    Returns:
      A function that does the same with arrays of another shape in the place of these.
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
    """Whether all that is computed has this shape, or is a scalar that the arrays meet as one."""
    if any(jax.numpy.ndim(x) for x in traced.consts):
        return False
    return all(_is_one_by_one(equation, shape) for equation in traced.jaxpr.eqns)


def _is_one_by_one(equation, shape):
    name, values = equation.primitive.name, (*equation.invars, *equation.outvars)
    if any(value.aval.shape not in ((), shape) for value in values):
        return False
    if name in _CALLS:
        return _is_elementwise(equation.params[_called(equation)], shape)
    if name == "broadcast_in_dim":
        return equation.invars[0].aval.shape == ()
    return name in _PRIMITIVES


def _called(equation):
    return "jaxpr" if "jaxpr" in equation.params else "call_jaxpr"


def _evaluated(
    jaxpr: Any, consts: Sequence[Any], args: Sequence[Any], like: jax.Array
) -> list[Any]:
    values = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *args], strict=True))

    def read(variable):
        return variable.val if isinstance(variable, Literal) else values[variable]

    for equation in jaxpr.eqns:
        operands = [read(variable) for variable in equation.invars]
        if equation.primitive.name in _CALLS:
            inner = equation.params[_called(equation)]
            results = _evaluated(inner.jaxpr, inner.consts, operands, like)
        elif equation.primitive.name == "broadcast_in_dim":
            results = [reshard_like(lax.broadcast(operands[0], like.shape), like)]
        else:
            found = equation.primitive.bind(*operands, **equation.params)
            results = found if equation.primitive.multiple_results else [found]
        values.update(zip(equation.outvars, results, strict=True))
    return [read(variable) for variable in jaxpr.outvars]
