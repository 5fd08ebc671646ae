"""The wrapper: `zero1`, and the list of the params whose state it cannot shard."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from momentum_jax._hyperparameters import check_flag
from momentum_jax._jax import inlined_jit
from momentum_jax._leaves import check_arrays, is_absent
from momentum_jax._placement import axes, is_explicit, reshard_like, shard_like
from momentum_jax._wrapper import check_transformation, wrapper
from momentum_jax.sharding._auto_axes import run, spec_of_type
from momentum_jax.sharding._specs import (
    HIDDEN,
    Path,
    check_mesh,
    check_on_mesh,
    check_one_tree,
    check_outside_shard_map,
    param_path,
    params_by_path,
    state_spec,
)

PyTree = Any


def zero1(
    inner: optax.GradientTransformation, mesh: Mesh, axis: str = "data", *, strict: bool = False
) -> optax.GradientTransformationExtraArgs:
    """Shards the state of `inner` over a mesh axis along which the params are replicated.

        g  <- this device's shard of the summed gradient            reduce-scatter
        state, u <- inner(g, state, the same shard of w)            1/n of the work
        u  <- all shards                                            all-gather

    The numbers are those of `inner`. The traffic is as large as that of an all-reduce. On each of
    the n devices, the state takes 1/n of the bytes.

    Each array of the state that belongs to a param is sharded over `axis` along one dimension: the
    first one that n divides, after the param's own sharding is applied. For example, with n = 2, a
    param of shape (6, 8) whose rows are sharded over 2 other devices has 3 rows per device, so its
    state is sharded along the columns. Params keep their sharding, and so do counts, arrays that
    are already sharded over `axis` (FSDP), and arrays without such a dimension (see
    `unsharded_params`).

    Call `init` outside jit. It is then one compiled program that never holds a whole array of the
    state. Inside jit the same holds, with one limit: on axes that are not Explicit, jit hides how
    its arguments are sharded. Then the dimension is chosen by the shape alone. If a param has
    another axis on that dimension, its state is sharded over `axis` only.

    With other wrappers, inside (`wrapper(zero1(...))`) and around (`zero1(wrapper(...))`), the
    numbers are those without `zero1`. In the list, "both are equal" means that both shard the same
    arrays. Prefer around: then all of the above also holds for the arrays of the wrapper. Inside,
    the arrays of the wrapper stay as the wrapper makes them. On Auto axes its counts are then on
    one device before the first step, and a jitted step is compiled twice, unless init is jitted.

    - `MultiSteps`: inside, the sums of the gradients are replicated. Around, they are sharded.
    - `adaptive_restart`: inside, the copy of the last params is replicated. Around, it is sharded.
    - `apply_if_finite`: both are equal.
    - `chain`: both are equal, at any position.
    - `conditionally_mask`: both are equal.
    - `conditionally_transform`: both are equal.
    - `inject_hyperparams`: both are equal.
    - `kahan`: inside, the compensation is replicated. Around, it is sharded.
    - `lookahead`: inside, the slow params are sharded as the fast ones are. Around, a ValueError:
      the params are two trees, and the state belongs to one.
    - `masked`: both are equal.
    - `partition`: both are equal.
    - `schedule_free`: inside, z is replicated. Around, it is sharded.

    Inside `MultiSteps`, `apply_if_finite`, `conditionally_mask` and `conditionally_transform`, on
    Explicit axes, the gradients must be sharded as the params are: JAX 0.10 raises a TypeError if
    the two branches of these wrappers differ.

    Args:
      inner: an Optax transformation. An array of its state belongs to the param whose path is part
        of the array's path, as in `(mu, nu)` of Adam, in chains and in Optax's wrappers. If JAX
        refuses the arithmetic of `inner` on Explicit axes, `inner` is run on Auto axes. In this
        case, arrays that `inner` was made with, such as a learning rate, must not be on the mesh,
        and JAX 0.7 is too old.
      mesh: the mesh of the params. Its axes must be all Auto or all Explicit.
      axis: the name of the axis; "data" by default.
      strict: whether a param whose state cannot be sharded is an error; False by default.

    Returns:
      An Optax transformation. `init(params)` returns the state of `inner`, on the mesh; params
      may be a tree of `jax.ShapeDtypeStruct`. `update(grads, state, params, **extra_args)`
      requires the params and returns the updates in the shardings of the params. Extra arguments
      are passed to `inner`. After a checkpoint is restored, the state must be on the mesh again:
      give `init(params)` as the target of the restore.

    Raises:
      TypeError: `mesh` is not a `jax.sharding.Mesh`, or `strict` is not a boolean.
      ValueError: the mesh does not have the axis, or has axes of several types; a param, or at
        update an array of the state that belongs to a param, is not on the mesh; the params are
        missing at update; params cannot be sharded, with `strict`; the params are those of
        `optax.lookahead`; init or update is called inside shard_map.

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
    check_mesh(mesh, axis)
    check_transformation(inner)
    strict = check_flag("strict", strict)
    devices = set(mesh.devices.flat)
    # Compiled programs belong to this function, and are freed with it.
    start = inlined_jit(
        functools.partial(_init, inner.init, mesh, axis),
        static_argnums=(0, 1, 2),
        keep_unused=True,
    )

    def make_state(inner, params):
        del inner
        check_outside_shard_map()
        check_one_tree(params)
        unsharded = unsharded_params(params, mesh, axis)
        if strict and unsharded:
            raise ValueError(
                f"no dimension of these params is a multiple of the {mesh.shape[axis]} devices "
                f"of the axis {axis!r}: {', '.join(f'{k} {v}' for k, v in unsharded.items())}. "
                "Give them such a dimension, or use strict=False, which replicates their state."
            )
        specs = tuple(params_by_path(params, mesh).items())
        arrays = jax.tree.map(lambda x: None if isinstance(x, jax.ShapeDtypeStruct) else x, params)
        check_arrays("param", arrays)
        leaves, treedef = jax.tree.flatten(params)
        abstract = tuple(x if isinstance(x, jax.ShapeDtypeStruct) else None for x in leaves)
        arrays = treedef.flatten_up_to(arrays)
        return start(specs, treedef, abstract, arrays)

    def step(inner, updates, state, params, extra_args):
        check_outside_shard_map()
        check_one_tree(params)
        params_at = dict(jax.tree_util.tree_leaves_with_path(params))
        params_by_path(params, mesh)  # Raises if a param is not on the mesh.
        # For each param, an array of the state that is sharded as its gradient has to be.
        sharded_at: dict[Path, Any] = {}
        for path, leaf in jax.tree_util.tree_leaves_with_path(state):
            of_param = param_path(path, params_at)
            if of_param is None:
                continue
            check_on_mesh(path, leaf, mesh, devices)
            if np.shape(leaf) == np.shape(params_at[of_param]):
                sharded_at.setdefault(of_param, leaf)
        # The gradient may be sharded where it is computed (reduce-scatter), also within a loop over
        # layers, but the params must not be sharded with it.
        grads = _match_shardings(updates, sharded_at, mesh, params=params_at)
        sharded_params = _match_shardings(params, sharded_at, mesh)
        state_at = dict(jax.tree_util.tree_leaves_with_path(state))
        like: tuple[dict[Path, Any], ...] = params_at | sharded_at, state_at

        def advance(grads, state, sharded_params, extra_args):
            return inner.update(grads, state, sharded_params, **extra_args)

        def sharding(path, shape):
            return NamedSharding(mesh, spec_of_type(like[path[0].idx].get(path[1:]), shape))

        arguments = grads, state, sharded_params, extra_args
        updates, new = run(advance, mesh, arguments, params_at, sharding)
        return _match_shardings(updates, params_at, mesh), _match_shardings(new, state_at, mesh)

    return wrapper(
        None,
        inner,
        make_state,
        step,
        "zero1",
        mesh,
        axis,
        strict,
        needs_params="the updates are returned in the shardings of the params",
    )


def unsharded_params(params: PyTree, mesh: Mesh, axis: str = "data") -> dict[str, tuple[int, ...]]:
    """Lists the params whose state `zero1` does not shard over `axis`: no dimension is divisible.

    Args:
      params: a tree of arrays on the mesh, or of `jax.ShapeDtypeStruct`.
      mesh: as for `zero1`.
      axis: as for `zero1`.

    Returns:
      The shape of each such param, by its path.

    Raises:
      TypeError, ValueError: as for `zero1`.

    Example:
      >>> import jax, jax.numpy as jnp, momentum_jax as mj
      >>> mesh = jax.make_mesh((jax.device_count(),), ("data",), (jax.sharding.AxisType.Auto,))
      >>> shapes = {"kernel": jax.ShapeDtypeStruct((5, 8), jnp.float32), "scale": 1.0}
      >>> mj.sharding.unsharded_params(shapes, mesh)
      {"['scale']": ()}
    """
    check_mesh(mesh, axis)
    return {
        jax.tree_util.keystr(path): shape
        for path, (shape, spec) in params_by_path(params, mesh).items()
        if axis not in axes(*state_spec(spec, shape, mesh, axis))
    }


def _init(inner_init, mesh, axis, specs, treedef, abstract, arrays):
    """Returns the state of the inner transformation, initialized from sharded params."""
    params = dict(specs)

    def sharding(path, shape):
        of_param = param_path(path, params)
        if of_param is None:
            return NamedSharding(mesh, PartitionSpec())
        return NamedSharding(mesh, state_spec(params[of_param][1], shape, mesh, axis))

    def place(path, leaf):
        put = jax.sharding.reshard if is_explicit(mesh) else jax.lax.with_sharding_constraint
        return put(leaf, sharding(path, np.shape(leaf)))

    def place_like_param(path, leaf):
        of_param = param_path(path, params)
        shape, spec = ((), ()) if of_param is None else params[of_param]
        if of_param is not None and HIDDEN in spec and np.shape(leaf) == shape:
            # The axes that are hidden here are taken from the param.
            leaf = shard_like(leaf, sharded[of_param], backward=True)
        return place(path, leaf)

    sharded: dict[Path, Any] = {
        path: place(path, array)
        if shape is None
        else jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding(path, shape.shape))
        for path, shape, array in zip(params, abstract, arrays, strict=True)
    }
    arguments = (treedef.unflatten(sharded.values()),)
    state = run(inner_init, mesh, arguments, sharded, sharding)
    return jax.tree_util.tree_map_with_path(place_like_param, state)


def _match_shardings(
    tree: PyTree, like: dict[Path, Any], mesh: Mesh, *, params: Any = ()
) -> PyTree:
    """Returns the tree, each array in the sharding of the array under its path in `like`.

    An array stays as it is if `like` has no array of its shape under its path.
    """

    def match(path, x):
        if path not in like or np.shape(x) != np.shape(like[path]) or is_absent(x):
            return x
        other = like[path]
        if not isinstance(x, Tracer) and not isinstance(other, Tracer):
            sharding = getattr(other, "sharding", NamedSharding(mesh, PartitionSpec()))
            if isinstance(x, jax.Array) and x.sharding.memory_kind:
                sharding = sharding.with_memory_kind(x.sharding.memory_kind)
            return jax.device_put(x, sharding)
        x, other = jnp.asarray(x), jnp.asarray(other)
        if is_explicit(mesh):
            return reshard_like(x, other)
        if any(jnp.issubdtype(array.dtype, jax.dtypes.extended) for array in (x, other)):
            return x  # Random keys.
        backward = jnp.asarray(params[path]) if path in params else False
        return shard_like(x, other, backward=backward)

    return jax.tree_util.tree_map_with_path(match, tree)
