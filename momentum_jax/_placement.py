"""Which sharding a result has, where the partitioner would be free to choose.

On Explicit axes it is part of an array's type, and arrays are moved to the one that is wanted. On
Auto axes the partitioner propagates shardings between all arrays of a program, also from what
comes from outside (gradients, updates) to the state that they are added to. There they pass a
propagation barrier of the partitioner. JAX has no function for it; this is its primitive.
"""

import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import jet
from jax.extend.core import Primitive
from jax.extend.mlir.dialects import sdy
from jax.interpreters import ad, batching, mlir
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P


def take_in(value: jax.Array, like: jax.Array) -> jax.Array:
    """`value`, to be combined with `like`: its sharding does not propagate to the result.

    The other way it does: where the sharding of `value` is open, it is the result's.
    """
    return _barrier(reshard_like(value, like), "BACKWARD")


def give_out(value: jax.Array) -> jax.Array:
    """`value`, in its sharding; how others use it does not propagate to what it is made of."""
    return _barrier(value, "FORWARD")


def set_apart(value: jax.Array) -> jax.Array:
    """`value`; no sharding propagates between what it is made of and what is made of it."""
    return _barrier(value, "NONE")


def hold_like(
    value: jax.Array, like: jax.Array, *, backward: bool | jax.Array = False
) -> jax.Array:
    """`value`, in the sharding of `like`. Shapes must be equal.

    No sharding propagates between the two. With `backward` that of `like` does, to `value` and to
    what it is computed from. If `backward` is an array, it does where that is an argument of the
    program: then it has a sharding already, and cannot get that of `like` from its other uses.
    """
    value = reshard_like(value, like)
    if not _is_open(like) or like.ndim == 0:
        return value
    given = value
    value, like = on_device((value, like))
    condition = () if isinstance(backward, bool) else (backward,)
    direction = "NONE" if backward is False else "BACKWARD"
    once = _barrier(value, direction, *condition)
    twice = _barrier(once, direction, *condition)
    # Chosen by `like`, it takes its sharding. Until the shardings are known, no compiler sees that
    # both choices are equal; then the barriers go, and with them the comparison and the choice.
    return in_memory_of(given, jnp.where(like == jnp.zeros((), like.dtype), once, twice))


def reshard_like(value: jax.Array, like: jax.Array) -> jax.Array:
    """`value`, in the sharding that is part of the type of `like`: on Explicit axes alone."""
    held = jax.typeof(like).sharding
    if not is_explicit(held.mesh) or jax.typeof(value).sharding == held:
        return value
    return jax.sharding.reshard(value, held)


def whole(value: jax.Array) -> jax.Array:
    """`value`, on Explicit axes whole on each device: so its parts may be cut anywhere."""
    mesh = jax.typeof(value).sharding.mesh
    return jax.sharding.reshard(value, NamedSharding(mesh, P())) if is_explicit(mesh) else value


def split_axis(value: jax.Array, axis: int, length: int) -> jax.Array:
    """`value` with an axis split in two: parts of this length, and places in them.

    On Explicit axes the parts are sharded as the axis was, or whole where that cuts a part.
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
    """`value` with an axis and the one after it, which is whole, made one."""
    size = value.shape[axis] * value.shape[axis + 1]
    shape = (*value.shape[:axis], size, *value.shape[axis + 2 :])
    held = jax.typeof(value).sharding
    if not is_explicit(held.mesh):
        return value.reshape(shape)
    spec = P(*held.spec[: axis + 1], *held.spec[axis + 2 :])
    return jnp.reshape(value, shape, out_sharding=NamedSharding(held.mesh, spec))


def zeros_like(param: jax.Array, dtype: np.dtype) -> jax.Array:
    """Zeros of the param's shape, in its sharding and its memory."""
    given, param = param, on_device(param)
    # Under jit, fresh zeros would be whole on each device, and invariant within shard_map.
    zero = jnp.zeros((), dtype)
    zeros = jnp.where(param == jnp.zeros((), param.dtype), zero, zero)
    return in_memory_of(given, hold_like(zeros, param, backward=True))


def on_device(tree: Any) -> Any:
    """The tree, with what is in the memory of the host brought to that of the device.

    No program computes with arrays of two memories, nor on every device with those of the host.
    """
    return jax.tree.map(
        lambda x: jax.device_put(x, jax.memory.Space.Device) if _is_on_host(x) else x, tree
    )


def in_memory_of(like: Any, tree: Any) -> Any:
    """The tree, with each array in the memory of its counterpart in `like`."""
    return jax.tree.map(
        lambda given, x: jax.device_put(x, _memory_of(given)) if _is_on_host(given) else x,
        like,
        tree,
    )


def _is_on_host(x):
    space = _memory_of(x)
    return space is not None and space != jax.memory.Space.Device


def _memory_of(x):
    """None where JAX does not say it in the array's type, as before 0.8."""
    return getattr(jax.typeof(x), "memory_space", None)


def is_explicit(mesh: Mesh | AbstractMesh) -> bool:
    """Whether shardings over the mesh are part of types."""
    return AxisType.Explicit in mesh.axis_types


def is_split(value: jax.Array, axis: int) -> bool:
    """Whether its type says that an axis of it is sharded: on Explicit axes alone."""
    held = jax.typeof(value).sharding
    return is_explicit(held.mesh) and held.spec[axis] is not None


def axes_that_differ(*trees: Any) -> set[str]:
    """The manual axes, as within shard_map, along which a device may have values of its own.

    Where shard_map does not track that (`check_vma=False`, `jax.pmap` of JAX 0.10), these are all.
    """
    mesh = jax.sharding.get_abstract_mesh()
    manual = {name for name in mesh.manual_axes if mesh.shape[name] > 1}
    # The index along an axis differs, so its type says so if any type does.
    if all(name in _varying(jax.lax.axis_index(name)) for name in manual):
        leaves = [x for x in jax.tree.leaves(trees) if isinstance(x, jax.Array)]
        manual &= set().union(*map(_varying, leaves))
    return manual


def _varying(x):
    kind = jax.typeof(x)
    # JAX 0.10 and later; `vma` before.
    manual = getattr(kind, "manual_axis_type", None)
    return kind.vma if manual is None else manual.varying | manual.unreduced


def axes(*entries: Any) -> Iterator[str]:
    """The names of the axes in the entries of a PartitionSpec."""
    for entry in entries:
        if isinstance(entry, str):
            yield entry
        elif isinstance(entry, tuple):
            yield from entry


def _is_open(x):
    """Whether the partitioner chooses a sharding: there are axes neither Explicit nor Manual."""
    mesh = jax.typeof(x).sharding.mesh
    return mesh.empty or AxisType.Auto in mesh.axis_types


def _barrier(x, direction, *given):
    return _barrier_p.bind(x, *given, direction=direction) if x.ndim and _is_open(x) else x


_barrier_p = Primitive("momentum_jax_propagation_barrier")
_barrier_p.def_impl(lambda x, *given, direction: x)
_barrier_p.def_abstract_eval(lambda x, *given, direction: x)


def _lower(ctx, x, *given, direction):
    # By the devices of the program, not of the process, which may compile for others. Without
    # Shardy, JAX's partitioner from 0.7 on, the choice is left to its predecessor.
    one = getattr(ctx.module_context.axis_context, "num_devices", None) == 1
    if one or not jax.config.values.get("jax_use_shardy_partitioner", True):
        return [x]
    if not all(_is_argument(value, ctx.module_context.module) for value in given):
        direction = "NONE"
    return [sdy.PropagationBarrierOp(x, getattr(sdy.PropagationDirection, direction)).result]


def _is_argument(value, module):
    """Whether a value is an argument of the whole program, not of a loop or function within it."""
    return any(
        value.owner == operation.regions[0].blocks[0]
        for operation in module.body.operations
        if "sym_name" in operation.attributes and str(operation.attributes["sym_name"]) == '"main"'
    )


def _batch(arguments, dimensions, *, direction):
    return _barrier_p.bind(*arguments, direction=direction), dimensions[0]


def _transpose(cotangent, x, *given, direction):
    return [cotangent, *[None] * len(given)]


# Not cached, as a lowering that is cached sees no arguments but its own.
mlir.register_lowering(_barrier_p, _lower, cacheable=False)
batching.primitive_batchers[_barrier_p] = _batch
ad.deflinear2(_barrier_p, _transpose)
jet.deflinear(_barrier_p)
