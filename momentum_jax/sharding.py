"""An optimizer's state split over the devices that hold the same params: ZeRO's first stage.

The state itself says how it is split: `init` chooses, and `update` follows what it is given.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from momentum_jax._hyperparameters import by_value, check_flag
from momentum_jax._jax import inlined_jit
from momentum_jax._leaves import check_arrays, is_absent, path_text
from momentum_jax._placement import axes, is_explicit, reshard_like, shard_like
from momentum_jax._wrapper import check_transformation

PyTree = Any
Path = tuple[Any, ...]
# An entry a dimension: no axis, an axis, several, or UNCONSTRAINED where jit hides the axes.
Entries = tuple[Any, ...]

_HIDDEN = PartitionSpec.UNCONSTRAINED


def zero1(
    inner: optax.GradientTransformation, mesh: Mesh, axis: str = "data", *, strict: bool = False
) -> optax.GradientTransformationExtraArgs:
    """Splits the state of `inner` over a mesh axis along which the params are replicated.

        g  <- the part of the gradient's sum that belongs to this device       reduce-scatter
        state, u <- inner(g, state, the same part of w)                        1 part of n
        u  <- all parts                                                        all-gather

    The numbers are those of `inner`, the traffic is that of an all-reduce, and the state takes
    1/n of the bytes on each of the n devices. Each array of the state that belongs to a param
    is split on the first dimension that n divides, of what the param's own sharding has left of
    it: with n = 2, a param of shape (6, 8) with its rows over 2 other devices has 3 rows a
    device, so the columns are split. What is sharded over `axis` already (FSDP) stays as it is,
    and so do the params, and what nothing divides (see `unsharded_params`), counts too.

    Call `init` outside jit, where it is one compiled program that never holds a whole array of
    the state, or inside, with one limit: on axes that are not Explicit, jit hides how its
    arguments are sharded. There the dimension is chosen by the shape alone, and a param that
    has another axis on that dimension has its state split over `axis` only.

    With other wrappers, inside (`wrapper(zero1(...))`) and around (`zero1(wrapper(...))`), the
    numbers are those without `zero1`. Prefer around: then all of the above holds for the wrapper's
    own arrays too. Inside, they stay as the wrapper makes them. On Auto axes its counts are then on
    one device before the first step, and a jitted step is compiled twice, unless init is jitted.

    - `MultiSteps`: inside, the sums of the gradients are whole. Around, they are split.
    - `adaptive_restart`: inside, the copy of the last params is whole. Around, it is split.
    - `apply_if_finite`: both are equal.
    - `chain`: both are equal, at any position.
    - `conditionally_mask`: both are equal.
    - `conditionally_transform`: both are equal.
    - `inject_hyperparams`: both are equal.
    - `kahan`: inside, the compensation is whole. Around, it is split.
    - `lookahead`: inside, the slow params are sharded as the fast ones are. Around, a ValueError:
      the params are two trees, and the state belongs to one.
    - `masked`: both are equal.
    - `partition`: both are equal.
    - `schedule_free`: inside, z is whole. Around, it is split.

    Inside `MultiSteps`, `apply_if_finite`, `conditionally_mask` and `conditionally_transform`, on
    Explicit axes, the gradients must be sharded as the params are: JAX 0.10 raises a TypeError if
    the two branches of these wrappers differ.

    Args:
      inner: an Optax transformation. An array of its state belongs to the param whose path its
        own path contains, as in `(mu, nu)` of Adam, in chains and under Optax's wrappers. If its
        arithmetic is refused on Explicit axes, it is run as on Auto axes: then arrays that it
        holds, such as a learning rate, must not be on the mesh, and JAX 0.7 is too old.
      mesh: the mesh that the params are on; its axes all Auto, or all Explicit.
      axis: the name of the axis.
      strict: whether a param whose state cannot be split is an error.

    Returns:
      An Optax transformation. `init(params)` returns the state of `inner`, on the mesh; params
      may be a tree of `jax.ShapeDtypeStruct`. `update(grads, state, params, **extra_args)`
      needs the params: the updates come back in their sharding. Extra arguments go to `inner`.
      After a restore the state must be on the mesh again: give `init(params)` as the target.

    Raises:
      TypeError: a `mesh` that is not a `jax.sharding.Mesh`; a `strict` that is not a boolean.
      ValueError: an axis that is not one of the mesh's; axes of several types; a param, or at
        update an array of the state that belongs to one, that is not on the mesh; no params at
        update; with `strict`, params that cannot be split; the params of `optax.lookahead`.

    Example:
      >>> import jax, jax.numpy as jnp, momentum_jax as mj
      >>> from jax.sharding import NamedSharding, PartitionSpec
      >>> mesh = jax.make_mesh((jax.device_count(),), ("data",), (jax.sharding.AxisType.Auto,))
      >>> params = jax.device_put(jnp.zeros((16, 2)), NamedSharding(mesh, PartitionSpec()))
      >>> tx = mj.sharding.zero1(mj.momentum(0.5), mesh)
      >>> state = tx.init(params)
      >>> rows = state.velocity.sharding.shard_shape((16, 2))[0]
      >>> print(rows * jax.device_count())
      16
      >>> updates, state = tx.update(jnp.ones_like(params), state, params)
      >>> print(updates[0], updates.sharding == params.sharding)
      [-0.5 -0.5] True

    Source:
      Rajbhandari and others (2020), ZeRO: memory optimizations toward training trillion
      parameter models, section 5.1; Xu and others (2020), Automatic cross-replica sharding of
      weight update in data-parallel training.
    """
    _check(mesh, axis)
    check_transformation(inner)
    strict = check_flag("strict", strict)
    given, inner = inner, optax.with_extra_args_support(inner)
    devices = set(mesh.devices.flat)
    # Compiled programs belong to this function, and go when it goes.
    start = inlined_jit(
        functools.partial(_init, inner.init, mesh, axis),
        static_argnums=(0, 1, 2),
        keep_unused=True,
    )

    def init(params: optax.Params) -> optax.OptState:
        _check_context()
        _check_one_tree(params)
        whole = unsharded_params(params, mesh, axis)
        if strict and whole:
            raise ValueError(
                f"no dimension of these params is a multiple of the {mesh.shape[axis]} devices "
                f"of the axis {axis!r}: {', '.join(f'{k} {v}' for k, v in whole.items())}. "
                "Give them such a dimension, or strict=False, with which their state stays whole."
            )
        owners = tuple(_owners(params, mesh).items())
        arrays = jax.tree.map(lambda x: None if isinstance(x, jax.ShapeDtypeStruct) else x, params)
        check_arrays("param", arrays)
        leaves, treedef = jax.tree.flatten(params)
        abstract = tuple(x if isinstance(x, jax.ShapeDtypeStruct) else None for x in leaves)
        arrays = treedef.flatten_up_to(arrays)
        return start(owners, treedef, abstract, arrays)

    def update(
        updates: optax.Updates,
        state: optax.OptState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, optax.OptState]:
        _check_context()
        if params is None:
            raise ValueError(
                "zero1 needs the params, in whose sharding the updates come back: "
                "tx.update(grads, state, params)."
            )
        _check_one_tree(params)
        whole = dict(jax.tree_util.tree_leaves_with_path(params))
        _owners(params, mesh)  # Or they are not on the mesh.
        held: dict[Path, Any] = {}
        for path, leaf in jax.tree_util.tree_leaves_with_path(state):
            owner = _owner(path, whole)
            if owner is not None:
                _check_on_mesh(path, leaf, mesh, devices)
            if owner is not None and np.shape(leaf) == np.shape(whole[owner]):
                held.setdefault(owner, leaf)
        # The gradient may be made in parts from the start (reduce-scatter), also within a loop over
        # layers, as long as the params are not split with it.
        grads = _alike(updates, held, mesh, params=whole)
        part = _alike(params, held, mesh)
        before = dict(jax.tree_util.tree_leaves_with_path(state))
        like: tuple[dict[Path, Any], ...] = whole | held, before

        def advance(grads, state, part, extra_args):
            return inner.update(grads, state, part, **extra_args)

        def sharding(path, shape):
            return NamedSharding(mesh, _spec(like[path[0].idx].get(path[1:]), shape))

        updates, new = _run(advance, mesh, (grads, state, part, extra_args), whole, sharding)
        return _alike(updates, whole, mesh), _alike(new, before, mesh)

    tx = optax.GradientTransformationExtraArgs(init, update)
    return by_value(tx, "zero1", given, mesh, axis, strict)


def unsharded_params(params: PyTree, mesh: Mesh, axis: str = "data") -> dict[str, tuple[int, ...]]:
    """The params whose state `zero1` leaves whole on every device: no dimension can be split.

    Args:
      params: a tree of arrays on the mesh, or of `jax.ShapeDtypeStruct`.
      mesh: as for `zero1`.
      axis: as for `zero1`.

    Returns:
      The shape of each such param by its path.

    Raises:
      TypeError, ValueError: as for `zero1`.

    Example:
      >>> import jax, jax.numpy as jnp, momentum_jax as mj
      >>> mesh = jax.make_mesh((jax.device_count(),), ("data",), (jax.sharding.AxisType.Auto,))
      >>> shapes = {"kernel": jax.ShapeDtypeStruct((5, 8), jnp.float32), "scale": 1.0}
      >>> mj.sharding.unsharded_params(shapes, mesh)
      {"['scale']": ()}
    """
    _check(mesh, axis)
    return {
        jax.tree_util.keystr(path): shape
        for path, (shape, own) in _owners(params, mesh).items()
        if axis not in axes(*_split(own, shape, mesh, axis))
    }


def _check(mesh, axis):
    if not isinstance(mesh, Mesh):
        raise TypeError(f"mesh={mesh!r} must be a jax.sharding.Mesh, as jax.make_mesh returns it.")
    if axis not in mesh.axis_names:
        raise ValueError(f"axis={axis!r} must be one of the axes of the mesh, {mesh.axis_names}.")
    if len(set(mesh.axis_types)) > 1:
        raise ValueError(
            f"the axes of the mesh are {mesh.axis_types}, but must be all Auto or all Explicit: "
            "give jax.make_mesh one axis type for all."
        )


def _check_context():
    manual = jax.sharding.get_abstract_mesh().manual_axes
    if manual:
        raise ValueError(
            f"zero1 is within shard_map over {manual}, where one device sees its own part alone. "
            "Leave shard_map for the loss and its gradient, and call init and update outside."
        )


def _check_one_tree(params):
    if any(_is_pair(node) for node in jax.tree.leaves(params, is_leaf=_is_pair)):
        raise ValueError(
            "the params are optax.LookaheadParams, two trees, but must be the one tree to which "
            "the state belongs, or no array of it would be split. Put zero1 inside: "
            "optax.lookahead(zero1(inner, mesh), sync_period, slow_step_size)."
        )


def _is_pair(node):
    return isinstance(node, optax.LookaheadParams)


def _owners(params: PyTree, mesh: Mesh) -> dict[Path, tuple[tuple[int, ...], Entries]]:
    """Shape and own sharding of each param, by its path."""
    return {
        path: (np.shape(param), _own(path, param, mesh))
        for path, param in jax.tree_util.tree_leaves_with_path(params)
    }


def _own(path, param, mesh) -> Entries:
    dimensions = len(np.shape(param))
    if isinstance(param, Tracer) and not is_explicit(mesh):
        return (_HIDDEN,) * dimensions
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
            "Put it there: jax.device_put(params, NamedSharding(mesh, PartitionSpec())) replicates "
            "all."
        )
    return (*spec, *[None] * (dimensions - len(spec)))


def _check_on_mesh(path, held, mesh, devices):
    """Of an array of the state; of a traced one it is known on Explicit axes alone."""
    if isinstance(held, Tracer):
        on_mesh = not is_explicit(mesh) or jax.typeof(held).sharding.mesh == mesh.abstract_mesh
    else:
        sharding = getattr(held, "sharding", None)
        on_mesh = sharding is not None and sharding.device_set == devices
    if not on_mesh:
        raise ValueError(
            f"the state {path_text(path)} is not on the mesh {mesh}, so that it would "
            "not stay split. Give the state that init returned; after a restore, give the "
            "restoring function init(params) as its target, or put each array into the sharding it "
            "has there."
        )


def _split(own: Entries, shape: tuple[int, ...], mesh: Mesh, axis: str) -> PartitionSpec:
    """The sharding of an array of the state, of which `own` is its param's, with the axis in it."""
    entries = [
        entry if size % math.prod(mesh.shape[name] for name in axes(entry)) == 0 else None
        for size, entry in zip(shape, (*own, *[None] * len(shape)), strict=False)
    ]
    if axis not in axes(*entries):
        for i, (size, entry) in enumerate(zip(shape, entries, strict=True)):
            names = (*axes(entry), axis)
            if size and size % math.prod(mesh.shape[name] for name in names) == 0:
                entries[i] = names if len(names) > 1 else axis
                break
    return PartitionSpec(*entries)


def _owner(path: Path, params: dict[Path, Any]) -> Path | None:
    """The path of the param to which an array of the state belongs: the longest, then the last."""
    for length in range(len(path), -1, -1):
        for start in range(len(path) - length, -1, -1):
            if path[start : start + length] in params:
                return path[start : start + length]
    return None


def _init(inner_init, mesh, axis, owners, treedef, abstract, arrays):
    owners = dict(owners)

    def sharding(path, shape):
        owner = _owner(path, owners)
        own = () if owner is None else owners[owner][1]
        spec = PartitionSpec() if owner is None else _split(own, shape, mesh, axis)
        return NamedSharding(mesh, spec)

    def place(path, leaf):
        put = jax.sharding.reshard if is_explicit(mesh) else jax.lax.with_sharding_constraint
        return put(leaf, sharding(path, np.shape(leaf)))

    def place_like_param(path, leaf):
        owner = _owner(path, owners)
        shape, own = ((), ()) if owner is None else owners[owner]
        if owner is not None and _HIDDEN in own and np.shape(leaf) == shape:
            # It takes from the param the axes that are hidden here.
            leaf = shard_like(leaf, parts[owner], backward=True)
        return place(path, leaf)

    parts: dict[Path, Any] = {
        path: place(path, array)
        if shape is None
        else jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding(path, shape.shape))
        for path, shape, array in zip(owners, abstract, arrays, strict=True)
    }
    arguments = (treedef.unflatten(parts.values()),)
    state = _run(inner_init, mesh, arguments, parts, sharding)
    return jax.tree_util.tree_map_with_path(place_like_param, state)


def _run(function, mesh, arguments, params, sharding):
    """`function(*arguments)`: if its arithmetic is refused on Explicit axes, then as on Auto axes.

    Where the two shardings of a sum or a product leave that of the result open, JAX wants to be
    told which it is, on Explicit axes, and a transformation cannot. The partitioner decides.
    """
    try:
        return function(*arguments)
    # The types of these errors are not public, nor is it one type.
    except Exception as error:
        if not is_explicit(mesh):
            raise
        try:
            return _run_as_auto(function, mesh, arguments, params, sharding)
        except Exception as other:
            if str(other) != str(error):
                error.add_note(
                    "zero1 then ran the inner transformation as on Auto axes, where it failed too: "
                    f"{type(other).__name__}: {other}\nIf the transformation holds arrays, such as "
                    "a learning rate made within jax.set_mesh, give it Python or NumPy numbers. "
                    "Otherwise use a mesh whose axes are AxisType.Auto."
                )
            raise error from None


def _run_as_auto(function, mesh, arguments, params, sharding):
    """`function(*arguments)`, with all arrays on a mesh of the same devices, whose axes are Auto.

    The results come back in `sharding(path, shape)`. Functions among the arguments (of a line
    search) are called as the caller wrote them: on Explicit axes, with the params in their own
    shardings.
    """
    auto = Mesh(mesh.devices, mesh.axis_names, axis_types=(AxisType.Auto,) * mesh.devices.ndim)

    def enter(x):
        if isinstance(x, jax.ShapeDtypeStruct):
            on_auto = NamedSharding(auto, getattr(x.sharding, "spec", PartitionSpec()))
            return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=on_auto)
        if isinstance(x, jax.Array):
            return _move(x, NamedSharding(auto, _spec(x, x.shape)))
        return functools.partial(call_outside, x) if callable(x) else x

    def leave(path, x):
        return _move(x, sharding(path, np.shape(x))) if isinstance(x, jax.Array) else x

    def own(path, x):
        if not isinstance(x, jax.Array):
            return x
        return _move(x, NamedSharding(mesh, _spec(params.get(path[1:]), x.shape)))

    def call_outside(called, *args, **kwargs):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            args = jax.tree_util.tree_map_with_path(own, args)
            kwargs = jax.tree_util.tree_map_with_path(own, kwargs)
            result = called(*args, **kwargs)
        return jax.tree.map(enter, result)

    with jax.sharding.use_abstract_mesh(auto.abstract_mesh):
        result = function(*jax.tree.map(enter, arguments, is_leaf=callable))
    return jax.tree_util.tree_map_with_path(leave, result)


def _move(x, sharding):
    """The array on another mesh of the same devices."""
    if not isinstance(x, Tracer):
        return jax.device_put(x, sharding)
    if is_explicit(sharding.mesh):
        return jax.sharding.reshard(x, sharding)
    x = jax.sharding.reshard(x, NamedSharding(sharding.mesh, PartitionSpec()))
    return jax.lax.with_sharding_constraint(x, sharding)


def _spec(x, shape):
    """How an array of this shape is split by its type, on Explicit axes; whole if there is none."""
    if not isinstance(x, jax.Array) or x.shape != shape:
        return PartitionSpec()
    return jax.typeof(x).sharding.spec


def _alike(tree: PyTree, held: dict[Path, Any], mesh: Mesh, *, params: Any = ()) -> PyTree:
    """The tree with each array in the sharding of what is held under its path, if anything is."""

    def leaf(path, x):
        if path not in held or np.shape(x) != np.shape(held[path]) or is_absent(x):
            return x
        like = held[path]
        if not isinstance(x, Tracer) and not isinstance(like, Tracer):
            sharding = getattr(like, "sharding", NamedSharding(mesh, PartitionSpec()))
            if isinstance(x, jax.Array) and x.sharding.memory_kind:
                sharding = sharding.with_memory_kind(x.sharding.memory_kind)
            return jax.device_put(x, sharding)
        x, like = jnp.asarray(x), jnp.asarray(like)
        if is_explicit(mesh):
            return reshard_like(x, like)
        if any(jnp.issubdtype(array.dtype, jax.dtypes.extended) for array in (x, like)):
            return x  # Keys of random numbers.
        return shard_like(x, like, backward=jnp.asarray(params[path]) if path in params else False)

    return jax.tree_util.tree_map_with_path(leaf, tree)
