"""Which sharding each array of the state has, and checks that all arrays are on the mesh."""

import math
from typing import Any

import jax
import numpy as np
import optax
from jax.core import Tracer
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from momentum_jax._placement import axes, is_explicit
from momentum_jax._velocity import path_text

PyTree = Any
Path = tuple[Any, ...]
# One entry per dimension: None, an axis name, several names, or HIDDEN.
Entries = tuple[Any, ...]

# Inside jit, arguments on Auto axes do not show how they are sharded.
HIDDEN = PartitionSpec.UNCONSTRAINED


def check_mesh(mesh: Any, axis: str) -> None:
    """Raises unless `mesh` is a mesh of one axis type that has the axis."""
    if not isinstance(mesh, Mesh):
        raise TypeError(f"mesh={mesh!r} must be a jax.sharding.Mesh, as jax.make_mesh returns it.")
    if axis not in mesh.axis_names:
        raise ValueError(f"axis={axis!r} must be one of the axes of the mesh, {mesh.axis_names}.")
    if len(set(mesh.axis_types)) > 1:
        raise ValueError(
            f"the axes of the mesh are {mesh.axis_types}, but must be all Auto or all Explicit. "
            "Give jax.make_mesh the same axis type for all axes."
        )


def check_outside_shard_map() -> None:
    """Raises inside shard_map."""
    manual = jax.sharding.get_abstract_mesh().manual_axes
    if manual:
        raise ValueError(
            f"zero1 is called inside shard_map over {manual}, where a device has only its own "
            "shard. Leave shard_map for the loss and its gradient, and call init and update "
            "outside."
        )


def check_one_tree(params: PyTree) -> None:
    """Raises if the params contain the two trees of `optax.lookahead`."""
    if any(_is_pair(node) for node in jax.tree.leaves(params, is_leaf=_is_pair)):
        raise ValueError(
            "the params are optax.LookaheadParams, two trees, but must be the one tree to which "
            "the state belongs. Otherwise no array of the state would be sharded. Put zero1 "
            "inside: optax.lookahead(zero1(inner, mesh), sync_period, slow_step_size)."
        )


def _is_pair(node):
    return isinstance(node, optax.LookaheadParams)


def check_on_mesh(path: Path, leaf: Any, mesh: Mesh, devices: set[Any]) -> None:
    """Raises if an array of the state is not on the mesh. Traced arrays show it on Explicit axes.

    Args:
      path: the path of the array in the state.
      leaf: the array.
      mesh: the mesh.
      devices: the devices of the mesh.
    """
    if isinstance(leaf, Tracer):
        on_mesh = not is_explicit(mesh) or jax.typeof(leaf).sharding.mesh == mesh.abstract_mesh
    else:
        sharding = getattr(leaf, "sharding", None)
        on_mesh = sharding is not None and sharding.device_set == devices
    if not on_mesh:
        raise ValueError(
            f"the state {path_text(path)} is not on the mesh {mesh}, so it would not stay sharded. "
            "Give the state that init returned. After a restore, give the restoring function "
            "init(params) as its target, or put each array into the sharding that it has in "
            "init(params)."
        )


def params_by_path(params: PyTree, mesh: Mesh) -> dict[Path, tuple[tuple[int, ...], Entries]]:
    """Returns the shape and the sharding of each param, by its path."""
    return {
        path: (np.shape(param), _param_spec(path, param, mesh))
        for path, param in jax.tree_util.tree_leaves_with_path(params)
    }


def _param_spec(path, param, mesh) -> Entries:
    """Returns how a param is sharded, with one entry per dimension; raises if it is elsewhere."""
    dimensions = len(np.shape(param))
    if isinstance(param, Tracer) and not is_explicit(mesh):
        return (HIDDEN,) * dimensions
    sharding = (
        jax.typeof(param).sharding
        if isinstance(param, Tracer)
        else getattr(param, "sharding", None)
    )
    spec = PartitionSpec()
    if isinstance(sharding, NamedSharding) and sharding.mesh in (mesh, mesh.abstract_mesh):
        spec = sharding.spec
    elif isinstance(param, jax.Array) and not isinstance(param, Tracer):
        raise ValueError(
            f"the param {path_text(path)} is not on the mesh {mesh}, but on {sharding}. "
            "Put it there. To replicate all params: "
            "jax.device_put(params, NamedSharding(mesh, PartitionSpec()))."
        )
    return (*spec, *[None] * (dimensions - len(spec)))


def state_spec(param_spec: Entries, shape: tuple[int, ...], mesh: Mesh, axis: str) -> PartitionSpec:
    """Returns the sharding of an array of the state: that of its param, and the axis added.

    The axis is added to the first dimension that its devices divide. If none is divisible, the
    array stays sharded like its param.

    Args:
      param_spec: the sharding of the param to which the array belongs.
      shape: the shape of the array.
      mesh: the mesh.
      axis: the name of the axis.
    """
    entries = [
        entry if size % math.prod(mesh.shape[name] for name in axes(entry)) == 0 else None
        for size, entry in zip(shape, (*param_spec, *[None] * len(shape)), strict=False)
    ]
    if axis not in axes(*entries):
        for i, (size, entry) in enumerate(zip(shape, entries, strict=True)):
            names = (*axes(entry), axis)
            if size and size % math.prod(mesh.shape[name] for name in names) == 0:
                entries[i] = names if len(names) > 1 else axis
                break
    return PartitionSpec(*entries)


def param_path(path: Path, params: dict[Path, Any]) -> Path | None:
    """Returns the path of the param to which an array of the state belongs, or None.

    It is the longest path of a param that the array's own path contains, and of several the last.

    Args:
      path: the path of the array in the state.
      params: anything by the paths of the params.
    """
    for length in range(len(path), -1, -1):
        for start in range(len(path) - length, -1, -1):
            if path[start : start + length] in params:
                return path[start : start + length]
    return None
