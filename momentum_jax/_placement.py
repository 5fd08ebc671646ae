"""The sharding, the memory and the devices of results, under every kind of mesh.

On Explicit axes the sharding is part of an array's type, and arrays are moved to the sharding that
is wanted. On Auto axes the partitioner chooses: it propagates shardings between all arrays of a
program, also from arrays that come from outside (gradients, updates) to the state to which they
are added. A propagation barrier (`_jax.propagation_barrier`) prevents that.
"""

import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from momentum_jax._jax import default_device, memory_space, propagation_barrier, varying_axes


def isolate_input(value: jax.Array, like: jax.Array) -> jax.Array:
    """`value`, to be combined with `like`: its sharding does not propagate to the result.

    The sharding of the result propagates to `value`, if the partitioner may choose that.
    """
    return _barrier(reshard_like(value, like), "BACKWARD")


def isolate_output(value: jax.Array) -> jax.Array:
    """`value`; the shardings of its uses do not propagate to the arrays it was computed from."""
    return _barrier(value, "FORWARD")


def isolate(value: jax.Array) -> jax.Array:
    """`value`; no sharding propagates from its uses to its sources, or from sources to uses."""
    return _barrier(value, "NONE")


def shard_like(
    value: jax.Array, like: jax.Array, *, backward: bool | jax.Array = False
) -> jax.Array:
    """`value`, in the sharding of `like`, which has the same shape.

    Args:
      value: an array.
      like: an array.
      backward: whether the sharding of `like` also propagates to the arrays from which `value` is
        computed. An array stands for "if this array is an argument of the program": then it has a
        sharding already, and cannot take the sharding of `like` from its other uses.

    Returns:
      An array equal to `value`.
    """
    value = reshard_like(value, like)
    if not _is_open(like) or like.ndim == 0:
        return value
    given = value
    value, like = to_device_memory((value, like))
    condition = () if isinstance(backward, bool) else (backward,)
    direction = "NONE" if backward is False else "BACKWARD"
    once = _barrier(value, direction, *condition)
    twice = _barrier(once, direction, *condition)
    # The result of a choice that depends on `like` takes the sharding of `like`. The compiler sees
    # that both alternatives are equal only after the shardings are chosen and the barriers are
    # removed; then it removes the comparison and the choice too.
    return to_memory_of(given, jnp.where(like == jnp.zeros((), like.dtype), once, twice))


def reshard_like(value: jax.Array, like: jax.Array) -> jax.Array:
    """`value`, on Explicit axes in the sharding that the type of `like` has."""
    held = jax.typeof(like).sharding
    if not is_explicit(held.mesh) or jax.typeof(value).sharding == held:
        return value
    return jax.sharding.reshard(value, held)


def replicate(value: jax.Array) -> jax.Array:
    """`value`, on Explicit axes replicated, so that it can be sliced anywhere."""
    mesh = jax.typeof(value).sharding.mesh
    return jax.sharding.reshard(value, NamedSharding(mesh, P())) if is_explicit(mesh) else value


def split_axis(value: jax.Array, axis: int, length: int) -> jax.Array:
    """`value` with one axis split into two: blocks, and positions within a block of this length.

    On Explicit axes the blocks are sharded as the axis was, or replicated if that cut a block.
    """
    shape = (*value.shape[:axis], value.shape[axis] // length, length, *value.shape[axis + 1 :])
    held = jax.typeof(value).sharding
    if not is_explicit(held.mesh):
        return value.reshape(shape)
    names = held.spec[axis]
    if shape[axis] % math.prod(held.mesh.shape[name] for name in axes(names)):
        names = None
    before, after = held.spec[:axis], held.spec[axis + 1 :]
    value = jax.sharding.reshard(value, NamedSharding(held.mesh, P(*before, names, *after)))
    spec = P(*before, names, None, *after)
    return jnp.reshape(value, shape, out_sharding=NamedSharding(held.mesh, spec))


def merge_axes(value: jax.Array, axis: int) -> jax.Array:
    """`value` with an axis and the next one, which is not sharded, merged into one."""
    size = value.shape[axis] * value.shape[axis + 1]
    shape = (*value.shape[:axis], size, *value.shape[axis + 2 :])
    held = jax.typeof(value).sharding
    if not is_explicit(held.mesh):
        return value.reshape(shape)
    spec = P(*held.spec[: axis + 1], *held.spec[axis + 2 :])
    return jnp.reshape(value, shape, out_sharding=NamedSharding(held.mesh, spec))


def zeros_like(param: jax.Array, dtype: np.dtype) -> jax.Array:
    """Zeros of the param's shape, in its sharding and its memory."""
    given, param = param, to_device_memory(param)
    # Under jit, zeros that depend on nothing would be replicated, and invariant within shard_map.
    zero = jnp.zeros((), dtype)
    zeros = jnp.where(param == jnp.zeros((), param.dtype), zero, zero)
    return to_memory_of(given, shard_like(zeros, param, backward=True))


def zeros_of(abstract: jax.ShapeDtypeStruct) -> jax.Array:
    """Zeros in place of an abstract array: of its shape and dtype, in its sharding and memory."""
    sharding: Any = abstract.sharding
    # `jax.eval_shape` gives an array that is not committed to a device the sharding of one that
    # is. On the default device it is taken as not committed.
    if sharding is None or sharding == SingleDeviceSharding(default_device()):
        return jnp.zeros(abstract.shape, abstract.dtype)
    # Outside jit, `jnp.zeros` accepts no memory kind of a single device.
    device = sharding.with_memory_kind(None) if sharding.memory_kind else sharding
    zeros = jnp.zeros(abstract.shape, abstract.dtype, device=device)
    if isinstance(zeros, Tracer):
        # Under jit, `device` alone is no constraint, and a constraint accepts no memory kind.
        mesh = getattr(sharding, "mesh", None)
        explicit = mesh is not None and is_explicit(mesh)
        put = jax.sharding.reshard if explicit else jax.lax.with_sharding_constraint
        zeros = put(zeros, device)
    return zeros if device == sharding else jax.device_put(zeros, sharding)


def to_device_memory(tree: Any) -> Any:
    """The tree, with arrays in host memory copied to device memory.

    A program cannot compute with arrays of two memories, nor every device with host memory.
    """
    return jax.tree.map(
        lambda x: jax.device_put(x, jax.memory.Space.Device) if _is_on_host(x) else x, tree
    )


def to_memory_of(like: Any, tree: Any) -> Any:
    """The tree, with each array in the memory of its counterpart in `like`."""
    return jax.tree.map(
        lambda given, x: jax.device_put(x, memory_space(given)) if _is_on_host(given) else x,
        like,
        tree,
    )


def _is_on_host(x):
    space = memory_space(x)
    return space is not None and space != jax.memory.Space.Device


def is_explicit(mesh: Mesh | AbstractMesh) -> bool:
    """Whether shardings over the mesh are part of types."""
    return AxisType.Explicit in mesh.axis_types


def is_split(value: jax.Array, axis: int) -> bool:
    """Whether the type of `value` says that this axis is sharded (on Explicit axes only)."""
    held = jax.typeof(value).sharding
    return is_explicit(held.mesh) and held.spec[axis] is not None


def axes_that_differ(*trees: Any) -> set[str]:
    """The manual axes, as within shard_map, along which devices may hold different values.

    These are all of them where shard_map does not track it: with `check_vma=False`, and in the
    `jax.pmap` of JAX 0.10.
    """
    mesh = jax.sharding.get_abstract_mesh()
    manual = {name for name in mesh.manual_axes if mesh.shape[name] > 1}
    # The index along an axis differs by definition: if its type does not say so, no type does.
    if all(name in varying_axes(jax.lax.axis_index(name)) for name in manual):
        leaves = [x for x in jax.tree.leaves(trees) if isinstance(x, jax.Array)]
        manual &= set().union(*map(varying_axes, leaves))
    return manual


def axes(*entries: Any) -> Iterator[str]:
    """The names of the mesh axes in the entries of a PartitionSpec."""
    for entry in entries:
        if isinstance(entry, str):
            yield entry
        elif isinstance(entry, tuple):
            yield from entry


def _is_open(x):
    """Whether the partitioner chooses the sharding: some axes are neither Explicit nor Manual."""
    mesh = jax.typeof(x).sharding.mesh
    return mesh.empty or AxisType.Auto in mesh.axis_types


def _barrier(x, direction, *conditions):
    return propagation_barrier(x, direction, *conditions) if x.ndim and _is_open(x) else x
