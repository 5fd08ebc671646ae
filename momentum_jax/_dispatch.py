"""Compiled functions for calls from Python: one dispatch, or one per group of devices.

The params of a model may be on several devices or meshes, for example the stages of a pipeline. A
compiled program cannot take arrays from two of them, so each group of leaves gets its own call.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.core import Tracer
from jax.sharding import (
    Mesh,
    NamedSharding,
    PartitionSpec,
    Sharding,
    SingleDeviceSharding,
)

from momentum_jax._jax import inlined_jit
from momentum_jax._placement import is_explicit

PyTree = Any
Path = tuple[Any, ...]
# What arrays that can be arguments of one program share: their devices in order, or their mesh if
# it has Explicit axes.
Group = tuple[jax.Device, ...] | Mesh


def jit_by_leaf(
    function: Callable[[Any, Any, Any], tuple[Any, Any]],
    *,
    combine: Callable[[Sequence[Any]], Any] = lambda results: results[0],
) -> Callable[..., tuple[Any, Any]]:
    """Compiles a function that treats the leaves of trees independently of each other.

    Args:
      function: `(static, trees, shared) -> (trees, result)`. `static` is a tuple of hashable
        values. `trees` is a tuple of trees: arrays under the same path in several of them belong
        together. If some leaves are None, the function must return the same for the others, and
        None for these. `shared` holds scalars that all leaves need.
      combine: makes one result of the results of several groups, which are on their own devices.

    Returns:
      The function. A call is one dispatch, or one dispatch per group of devices.
    """

    # jit compares static arguments with ==, and NumPy's float64 dtype equals None. Their types
    # differ, so these are static arguments too.
    def typed(static, types, trees, shared):
        del types
        return function(static, trees, shared)

    typed.__name__ = function.__name__
    # Unused arguments are kept: the results are on the devices of the arguments.
    compiled = inlined_jit(typed, static_argnums=(0, 1), keep_unused=True)

    def call(static: tuple[Any, ...], trees: PyTree, shared: PyTree = ()) -> tuple[Any, Any]:
        types = tuple(map(type, static))
        try:
            return compiled(static, types, trees, shared)
        except ValueError:
            if len(_groups_in((trees, shared))) < 2:
                raise
        # Raises the function's own errors before anything is computed.
        compiled.eval_shape(static, types, *_placeless((trees, shared)))
        group_at, groups = _groups(trees, shared)
        results = [
            compiled(static, types, _only(group, group_at, trees), _moved(shared, sharding))
            for group, sharding in groups.items()
        ]
        outputs, shared_results = zip(*results, strict=True)
        return functools.reduce(_merged, outputs), combine(shared_results)

    return call


def jit_whole(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compiles a function that calls functions made by `jit_by_leaf`.

    If its arguments are on several groups of devices, it runs as Python, and the functions that it
    calls are dispatched one by one.
    """
    compiled = inlined_jit(function)

    def call(*args: Any) -> Any:
        try:
            return compiled(*args)
        except ValueError:
            if len(_groups_in(args)) < 2:
                raise
        return function(*args)

    return call


def on_one_group(values: Sequence[Any]) -> list[Any]:
    """Trees of scalars from several groups of devices, moved to the devices of the first group."""
    bound = [x for x in jax.tree.leaves(values) if group_of(x) is not None]
    return [_moved(value, bound[0].sharding) for value in values] if bound else list(values)


def one_level(tree: PyTree) -> tuple[list[Any], Any]:
    """The children of a tree's root, and the structure that rebuilds the tree from them."""
    return jax.tree.flatten(tree, is_leaf=lambda node: node is not tree)


def _placeless(tree: PyTree) -> PyTree:
    return jax.tree.map(
        lambda x: (
            jax.ShapeDtypeStruct(x.shape, x.dtype, weak_type=x.weak_type)
            if isinstance(x, jax.Array)
            else x
        ),
        tree,
    )


def group_of(x: Any) -> Group | None:
    """The group of an array that is committed to devices, or None."""
    if not isinstance(x, jax.Array) or isinstance(x, Tracer) or not x.committed:
        return None
    return _group_with(x.sharding)


def _group_with(sharding: Any) -> Group:
    mesh: Any = getattr(sharding, "mesh", None)
    if mesh is None:
        return tuple(sorted(sharding.device_set, key=lambda device: device.id))
    return mesh if is_explicit(mesh) else tuple(mesh.devices.flat)


def _groups_in(tree: PyTree) -> list[Group]:
    """All groups, in the order of the leaves."""
    groups = dict.fromkeys(map(group_of, jax.tree.leaves(tree)))
    return [group for group in groups if group is not None]


def _groups(trees: PyTree, shared: PyTree) -> tuple[dict[Path, Group], dict[Group, Sharding]]:
    """The group of each path; and for each group the sharding of its copy of shared values.

    The group whose devices hold the shared values comes first.
    """
    group_at: dict[Path, Group] = {}
    shardings: dict[Group, Sharding] = {}
    for tree in trees:
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
            group = group_of(leaf)
            if group is None:
                continue
            if group_at.setdefault(path, group) != group:
                raise ValueError(
                    f"arrays that belong together at {jax.tree_util.keystr(path) or 'the root'} "
                    f"are on different devices, {_group_text(group_at[path])} and "
                    f"{_group_text(group)}. Move them with jax.device_put: a gradient and a "
                    "velocity must be on the devices of their param."
                )
            shardings.setdefault(group, replicated(leaf.sharding))
    if not shardings:
        raise ValueError(
            "the hyperparameters are on different devices, and no param is bound to a device. Give "
            "them as floats, or move them to one device with jax.device_put."
        )
    first = next((g for g in _groups_in(shared) if g in shardings), next(iter(shardings)))
    return group_at, {first: shardings.pop(first), **shardings}


def replicated(sharding: Any) -> Sharding:
    """The sharding of arrays that are replicated over the same devices."""
    mesh = getattr(sharding, "mesh", None)
    if mesh is not None:
        return NamedSharding(mesh, PartitionSpec())
    devices = tuple(sharding.device_set)
    if len(devices) == 1:
        return SingleDeviceSharding(devices[0])
    return NamedSharding(Mesh(np.array(_group_with(sharding)), ("devices",)), PartitionSpec())


def _only(group: Group, group_at: dict[Path, Group], trees: PyTree) -> PyTree:
    """The trees, with None in place of arrays of other groups."""
    of_unbound = next(iter(group_at.values()))

    def leaf(path, x):
        return x if group_at.get(path, of_unbound) == group else None

    return tuple(jax.tree_util.tree_map_with_path(leaf, tree) for tree in trees)


def _moved(tree: PyTree, sharding: Sharding) -> PyTree:
    """The tree, with arrays of other groups moved to the devices of this sharding."""
    stay = (None, _group_with(sharding))
    return jax.tree.map(lambda x: x if group_of(x) in stay else jax.device_put(x, sharding), tree)


def _merged(one: PyTree, other: PyTree) -> PyTree:
    """Two trees merged: of each leaf and each subtree, the one that is not None."""
    if one is None or other is None:
        return other if one is None else one
    children, treedef = one_level(one)
    if jax.tree_util.treedef_is_leaf(treedef):
        return one
    return treedef.unflatten(map(_merged, children, treedef.flatten_up_to(other)))


def _group_text(group: Group) -> str:
    if isinstance(group, Mesh):
        return str(group)
    return ", ".join(map(str, group[:4])) + (", ..." if len(group) > 4 else "")
