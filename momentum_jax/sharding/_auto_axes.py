"""Runs a transformation on Auto axes if its arithmetic is refused on Explicit axes.

A sum or a product of arrays with different shardings may leave the sharding of the result open. On
Explicit axes JAX then requires the caller to state it, but a transformation written by others does
not. On Auto axes the partitioner decides.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.core import Tracer
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from momentum_jax._placement import is_explicit
from momentum_jax.sharding._specs import Path

PyTree = Any


def run(
    function: Callable[..., Any],
    mesh: Mesh,
    arguments: tuple[Any, ...],
    params: dict[Path, Any],
    sharding: Callable[[Path, tuple[int, ...]], NamedSharding],
) -> Any:
    """Returns `function(*arguments)`; if it is refused on Explicit axes, then run on Auto axes.

    Args:
      function: `init` or `update` of the inner transformation.
      mesh: the mesh of the arguments.
      arguments: trees of arrays; may contain functions, such as that of a line search.
      params: the params by path, for functions among the arguments.
      sharding: `(path, shape) -> sharding` of a result, if run on Auto axes.
    """
    try:
        return function(*arguments)
    # The types of these errors are not public, and there are several.
    except Exception as error:
        if not is_explicit(mesh):
            raise
        try:
            return _run_as_auto(function, mesh, arguments, params, sharding)
        except Exception as other:
            if str(other) != str(error):
                error.add_note(
                    "zero1 then ran the inner transformation as on Auto axes, which failed too: "
                    f"{type(other).__name__}: {other}\nIf the transformation holds arrays, such as "
                    "a learning rate made within jax.set_mesh, give it Python or NumPy numbers. "
                    "Otherwise use a mesh whose axes are AxisType.Auto."
                )
            raise error from None


def _run_as_auto(function, mesh, arguments, params, sharding):
    """Returns `function(*arguments)`, run on a mesh of the same devices with Auto axes.

    Results are returned in `sharding(path, shape)`. Functions among the arguments are called as
    their caller wrote them: on Explicit axes, with the params in their own shardings.
    """
    auto = Mesh(mesh.devices, mesh.axis_names, axis_types=(AxisType.Auto,) * mesh.devices.ndim)

    def enter(x):
        if isinstance(x, jax.ShapeDtypeStruct):
            on_auto = NamedSharding(auto, getattr(x.sharding, "spec", PartitionSpec()))
            return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=on_auto)
        if isinstance(x, jax.Array):
            return _move(x, NamedSharding(auto, spec_of_type(x, x.shape)))
        return functools.partial(call_outside, x) if callable(x) else x

    def leave(path, x):
        return _move(x, sharding(path, np.shape(x))) if isinstance(x, jax.Array) else x

    def to_explicit(path, x):
        if not isinstance(x, jax.Array):
            return x
        return _move(x, NamedSharding(mesh, spec_of_type(params.get(path[1:]), x.shape)))

    def call_outside(called, *args, **kwargs):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            args = jax.tree_util.tree_map_with_path(to_explicit, args)
            kwargs = jax.tree_util.tree_map_with_path(to_explicit, kwargs)
            result = called(*args, **kwargs)
        return jax.tree.map(enter, result)

    with jax.sharding.use_abstract_mesh(auto.abstract_mesh):
        result = function(*jax.tree.map(enter, arguments, is_leaf=callable))
    return jax.tree_util.tree_map_with_path(leave, result)


def _move(x, sharding):
    """Returns the array on another mesh of the same devices."""
    if not isinstance(x, Tracer):
        return jax.device_put(x, sharding)
    if is_explicit(sharding.mesh):
        return jax.sharding.reshard(x, sharding)
    x = jax.sharding.reshard(x, NamedSharding(sharding.mesh, PartitionSpec()))
    return jax.lax.with_sharding_constraint(x, sharding)


def spec_of_type(x: Any, shape: tuple[int, ...]) -> PartitionSpec:
    """Returns the sharding in the type of `x`, on Explicit axes, if it has this shape.

    If `x` is no array, or has another shape, the result is replicated.
    """
    if not isinstance(x, jax.Array) or x.shape != shape:
        return PartitionSpec()
    return jax.typeof(x).sharding.spec
