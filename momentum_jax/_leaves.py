"""One walk over trees: leaves paired by path, missing gradients, and the errors of both."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from momentum_jax._placement import zeros_of

PyTree = Any
Path = tuple[Any, ...]

ARRAYS = (jax.Array, np.ndarray, np.generic, bool, int, float, complex)

LEAVE_OUT = (
    "To leave the param out, give None as its gradient or update, or give it "
    "optax.set_to_zero() with optax.partition (optax.masked alone would pass the gradient on "
    "as its update)."
)
SAME_PARAMS = "Call update with the params that init was given, or init again if they change."

# The remedy if a tree with this name does not match the others.
_HINTS = {
    "params": SAME_PARAMS,
    "params of the last step": SAME_PARAMS,
    "gradients": "Call init with the params that are differentiated and updated, again if "
    "they change, and give None where a param has no gradient.",
    "updates": "Give the first value that update returned for these params: "
    "`updates, state = tx.update(grads, state, params)`.",
}
# The remedy if a tree of the state does not match.
_STATE_HINTS = {
    "compensation": SAME_PARAMS,
    "scales": "Give the state that init or the last update returned.",
}


def map_leaves(
    function: Callable[..., Any],
    *trees: tuple[str, PyTree],
    absent: Callable[..., Any] = lambda leaf, *others: leaf,
    outputs: int | None = None,
) -> Any:
    """Maps a function over the leaves of the first tree and their counterparts in the others.

    Args:
      function: `(path, leaf, *others)`, with the leaf of the first tree, and the array or subtree
        that each other tree has under the same path.
      *trees: pairs of a name for error messages, such as "gradients", and a tree.
      absent: `(leaf, *others)`, called in place of `function` where `is_absent(leaf)`.
      outputs: None if both functions return one value, or how many values they return.

    Returns:
      A tree like the first one, or a tuple of `outputs` such trees.

    Raises:
      ValueError: trees of different structures; the paths that only one of them has are listed.
    """
    (name, first), *others = trees
    leaves, treedef = jax.tree_util.tree_flatten_with_path(first, is_leaf=is_absent)
    columns = []
    for other_name, other in others:
        try:
            columns.append(treedef.flatten_up_to(other))
        except (ValueError, TypeError) as error:
            raise _structure_error(name, first, other_name, other) from error
    results = [
        absent(leaf, *row) if is_absent(leaf) else function(path, leaf, *row)
        for (path, leaf), *row in zip(leaves, *columns, strict=True)
    ]
    if outputs is None:
        return treedef.unflatten(results)
    each = zip(*results, strict=True) if results else [()] * outputs
    return tuple(treedef.unflatten(values) for values in each)


def is_absent(leaf: Any) -> bool:
    """Whether there is no gradient: None, a masked node, or JAX's float0 for an integer input."""
    return (
        leaf is None
        or isinstance(leaf, optax.MaskedNode)
        or getattr(leaf, "dtype", None) == jax.dtypes.float0
    )


def expect_pair(
    path: Path, name: str, leaf: Any, other_name: str, other: Any
) -> tuple[jax.Array, Any]:
    """Both as arrays of the same shape; raises a ValueError that names the path if they are not."""
    if not jax.tree_util.all_leaves([other]) or other is None:
        raise ValueError(
            f"the {name} {path_text(path)} is an array, but the {other_name} there is "
            f"{type(other).__name__}. {_hint(name)}"
        )
    leaf, other = jnp.asarray(leaf), jnp.asarray(other)
    if leaf.shape != other.shape:
        raise ValueError(
            f"the {name} {path_text(path)} has shape {leaf.shape}, but the {other_name} there has "
            f"shape {other.shape}. They must be equal. {_hint(name)}"
        )
    return leaf, other


def only_where(name: str, tree: PyTree, params: PyTree) -> PyTree:
    """The params, but the leaf of the tree where that is absent.

    Params without a leaf in the tree need not be arrays. They can be the activation functions of a
    model that is a tree, for example.
    """
    params = map_leaves(lambda path, leaf, param: param, (name, tree), ("params", params))
    check_arrays("param", params)
    return params


def materialize(params: PyTree) -> PyTree:
    """The params, with zeros in place of each `jax.ShapeDtypeStruct`, in its sharding.

    Raises a TypeError that names the first leaf for which there can be no velocity.
    """

    def leaf(path, param):
        dtype = getattr(param, "dtype", None)
        if dtype is not None and not jnp.issubdtype(dtype, jnp.number) and dtype != np.bool_:
            raise TypeError(
                f"the param {path_text(path)} has dtype {dtype}, which no velocity can have. Leave "
                "it out with optax.masked, or give None in its place."
            )
        return zeros_of(param) if isinstance(param, jax.ShapeDtypeStruct) else param

    params = jax.tree_util.tree_map_with_path(leaf, params)
    check_arrays("param", params)
    return params


def check_arrays(name: str, tree: PyTree) -> None:
    """Raises a TypeError that names the first leaf that is not an array."""
    if all(isinstance(leaf, ARRAYS) for leaf in jax.tree.leaves(tree)):
        return
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        if not isinstance(leaf, ARRAYS):
            remedy = (
                "Call it: the array that it returns is the gradient"
                if name == "gradient" and callable(leaf)
                else "Give arrays only, for example equinox.filter(model, "
                "equinox.is_inexact_array), and join the result with equinox.combine"
            )
            raise TypeError(
                f"the {name} {path_text(path)} is {type(leaf).__name__}, not an array. {remedy}."
            )


def check_gradient_dtype(path: Path, grad: Any, held: Any, name: str = "velocity") -> None:
    """Raises a TypeError unless a gradient of dtype `grad` can change an array of dtype `held`."""
    if not jnp.issubdtype(held, jnp.inexact):
        raise TypeError(
            f"the param {path_text(path)} is {held}, and a step of momentum cannot move an integer "
            f"or a boolean. {LEAVE_OUT}"
        )
    if not jnp.issubdtype(grad, jnp.inexact):
        raise TypeError(
            f"the gradient {path_text(path)} is {grad}, but a gradient is a floating-point or "
            f"complex array. Convert it. {LEAVE_OUT}"
        )
    if jnp.issubdtype(grad, jnp.complexfloating) != jnp.issubdtype(held, jnp.complexfloating):
        raise TypeError(
            f"the gradient {path_text(path)} is {grad}, but its {name} is {held}: a real and a "
            "complex array do not mix. Give the gradient of the param that init was called with."
        )


def path_text(path: Path | str) -> str:
    """A path, or its text, for an error message: "at ['dense']['kernel']"."""
    text = path if isinstance(path, str) else jax.tree_util.keystr(path)
    return f"at {text}" if text else "at the root of the tree"


def _hint(name):
    """The remedy, by the name of one leaf."""
    return next((_HINTS[key] for key in (name, f"{name}s") if key in _HINTS), SAME_PARAMS)


def _structure_error(name, tree, other_name, other):
    def leaves_by_path(tree):
        leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_absent)
        return {jax.tree_util.keystr(path): leaf for path, leaf in leaves}

    def only(here, there):
        missing = [path or "the root" for path in here if path not in there]
        return ", ".join(missing[:5]) + (", ..." if len(missing) > 5 else "") or "none"

    leaves, others = leaves_by_path(tree), leaves_by_path(other)
    if leaves.keys() == others.keys():
        what = f"the containers differ: {jax.tree.structure(tree)} and {jax.tree.structure(other)}"
    else:
        what = (
            f"only in the {name}: {only(leaves, others)}; "
            f"only in the {other_name}: {only(others, leaves)}"
        )
    return ValueError(
        f"the {name} and the {other_name} must be trees of one structure, but {what}. "
        f"{_STATE_HINTS.get(other_name) or _hint(name)}"
    )
