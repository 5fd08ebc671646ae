"""All uses of JAX below its documented interface, each with the reason for it.

tests/test_jax.py checks each of them, on the oldest and on the newest supported JAX.
"""

import functools
from typing import Any

import jax
from jax.experimental import jet
from jax.extend.core import Primitive
from jax.extend.mlir.dialects import sdy
from jax.interpreters import ad, batching, mlir

# A function that is compiled when Python calls it and inlined when another program calls it. From
# JAX 0.11 on, `inline=True` makes a separate function in the program, lowered once for equal
# calls, and `jax.Inline.JAX_EARLY` is what `inline=True` was before.
_inline = getattr(jax, "Inline", None)
inlined_jit = functools.partial(jax.jit, inline=_inline.JAX_EARLY if _inline else True)

# Primitives that compute each value of the result from the values at the same position of the
# arguments. JAX documents how to read a jaxpr, but not the names of its primitives.
# fmt: off
ELEMENTWISE_PRIMITIVES = frozenset((
    "abs", "add", "add_any", "and", "atan2", "cbrt", "ceil", "clamp", "convert_element_type",
    "copy", "copy_p", "cos", "cosh", "div", "eq", "erf", "erf_inv", "erfc", "exp", "exp2",
    "expm1", "floor", "ge", "gt", "integer_pow", "is_finite", "le", "log", "log1p", "logistic",
    "lt", "max", "min", "mul", "ne", "neg", "nextafter", "not", "or", "pcast", "pow",
    "pvary", "reduce_precision", "rem", "round", "rsqrt", "select_n", "sign", "sin", "sinh",
    "sqrt", "square", "stop_gradient", "sub", "tan", "tanh", "xor",
))
# fmt: on
_CALLING_PRIMITIVES = frozenset(("jit", "pjit", "closed_call"))


def called_jaxpr(equation: Any) -> Any:
    """The jaxpr that an equation calls, or None if the equation calls none."""
    if equation.primitive.name not in _CALLING_PRIMITIVES:
        return None
    return equation.params["jaxpr" if "jaxpr" in equation.params else "call_jaxpr"]


def memory_space(x: Any) -> Any:
    """The memory space in an array's type; None before JAX 0.8, whose types do not have it."""
    return getattr(jax.typeof(x), "memory_space", None)


def varying_axes(x: Any) -> frozenset[str]:
    """The manual axes of shard_map along which an array's type says that its values differ."""
    array_type = jax.typeof(x)
    # `manual_axis_type` from JAX 0.10 on, `vma` before.
    manual = getattr(array_type, "manual_axis_type", None)
    return array_type.vma if manual is None else manual.varying | manual.unreduced


def is_x64_enabled() -> bool:
    """Whether JAX has 64-bit types. `jax.config` documents how to set this, not how to read it."""
    return jax.config.read("jax_enable_x64")


def default_device() -> Any:
    """The device of arrays that are made without naming one."""
    config: Any = jax.config
    device = config.jax_default_device
    if isinstance(device, str):
        return jax.local_devices(backend=device)[0]
    return device or jax.local_devices()[0]


def propagation_barrier(x: jax.Array, direction: str, *conditions: jax.Array) -> jax.Array:
    """`x`, past which the partitioner propagates shardings in one direction only.

    JAX has no function for this operation of Shardy, its partitioner from JAX 0.7 on. With another
    partitioner, and in programs for one device, it does nothing.

    Args:
      x: an array of at least one dimension.
      direction: "FORWARD" (from `x` to the result), "BACKWARD" (from the result to `x`) or "NONE".
      *conditions: arrays. Unless all of them are arguments of the whole program, the direction
        is "NONE".

    Returns:
      An array equal to `x`.
    """
    return _barrier_p.bind(x, *conditions, direction=direction)


_barrier_p = Primitive("momentum_jax_propagation_barrier")
_barrier_p.def_impl(lambda x, *conditions, direction: x)
_barrier_p.def_abstract_eval(lambda x, *conditions, direction: x)


def _lower(ctx, x, *conditions, direction):
    # The number of devices of the program: the process may compile for devices it does not have.
    one = getattr(ctx.module_context.axis_context, "num_devices", None) == 1
    if one or not jax.config.values.get("jax_use_shardy_partitioner", True):
        return [x]
    if not all(_is_program_argument(value, ctx.module_context.module) for value in conditions):
        direction = "NONE"
    return [sdy.PropagationBarrierOp(x, getattr(sdy.PropagationDirection, direction)).result]


def _is_program_argument(value, module):
    """Whether a value is an argument of the whole program, not of a loop or function within it."""
    return any(
        value.owner == operation.regions[0].blocks[0]
        for operation in module.body.operations
        if "sym_name" in operation.attributes and str(operation.attributes["sym_name"]) == '"main"'
    )


def _batch(arguments, dimensions, *, direction):
    return _barrier_p.bind(*arguments, direction=direction), dimensions[0]


def _transpose(cotangent, x, *conditions, direction):
    return [cotangent, *[None] * len(conditions)]


# Not cached: a lowering that is cached sees its own arguments only, not those of the program.
mlir.register_lowering(_barrier_p, _lower, cacheable=False)
batching.primitive_batchers[_barrier_p] = _batch
ad.deflinear2(_barrier_p, _transpose)
jet.deflinear(_barrier_p)
