"""Checks of what the functions of a problem return, made on shapes without computing values."""

import textwrap
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

PyTree = Any


def in_one_line(error: BaseException) -> str:
    r"""Formats an exception for a message of one line.

    Example:
      >>> in_one_line(ValueError("first\nsecond"))
      'ValueError: first second'
    """
    return f"{type(error).__name__}: {textwrap.shorten(str(error), 300, placeholder=' ...')}"


def path_text(path: tuple[Any, ...]) -> str:
    """Formats a JAX key path as "hidden/kernel", for dictionaries, Flax Linen and Flax NNX.

    Example:
      >>> path_text((jax.tree_util.DictKey("hidden"), jax.tree_util.SequenceKey(0)))
      'hidden/0'
    """
    # In NNX a variable is a node that holds its array as the attribute `value`.
    if len(path) > 1 and getattr(path[-1], "name", None) == "value":
        path = path[:-1]
    return jax.tree_util.keystr(path, simple=True, separator="/")


def shapes(call: str, function: Callable[..., Any], *arguments: PyTree) -> PyTree:
    """Returns the shapes and dtypes that a function returns, without computing values.

    Args:
      call: the call as it appears in messages, such as "loss(params)".
      function: the function.
      *arguments: its arguments, as arrays or shapes.

    Raises:
      ValueError: the function fails. The message is one line that names the call and, for the
        user's own code, the file and line.

    Example:
      >>> print(shapes("f(x)", lambda x: x.sum(), jnp.ones(3)).shape)
      ()
    """
    try:
        return jax.eval_shape(function, *arguments)
    except Exception as error:
        function = getattr(function, "function", function)
        file = getattr(getattr(function, "__code__", None), "co_filename", __file__)
        frames = traceback.extract_tb(error.__traceback__)
        lines = [frame.lineno for frame in frames if frame.filename == file]
        own = Path(file).parent == Path(__file__).parent  # A line of this package helps no user.
        at = f" ({file}, line {lines[-1]})" if lines and not own else ""
        raise ValueError(f"{call} fails: {in_one_line(error)}{at}") from error


def _described(found: Any) -> str:
    if hasattr(found, "dtype"):
        return f"shape {found.shape} of {found.dtype}"
    return f"{len(found)} values" if isinstance(found, tuple) else type(found).__name__


def expect_pair(call: str, what: str, found: Any) -> tuple[Any, Any]:
    """Returns `found`, which must be a tuple of two.

    Raises:
      ValueError: it is anything else.

    Example:
      >>> expect_pair("f(x)", "loss, new_state", (1, 2))
      (1, 2)
    """
    if not (isinstance(found, tuple) and len(found) == 2):
        raise ValueError(
            f"{call} must return ({what}) because the problem is stateful, but returns "
            f"{_described(found)}."
        )
    return found


def expect_number(call: str, found: Any, what: str, kind: Any) -> None:
    """Checks that a function returns one number of a dtype.

    Args:
      call: the call as it appears in messages.
      found: what it returns.
      what: what it must return, in words.
      kind: the NumPy or JAX scalar type, such as `jnp.floating`.

    Raises:
      ValueError: it returns anything else.

    Example:
      >>> expect_number("f(x)", jax.ShapeDtypeStruct((3,), "float32"), "one float", jnp.floating)
      Traceback (most recent call last):
      ...
      ValueError: f(x) must return one float, but returns shape (3,) of float32.
    """
    if getattr(found, "shape", None) != () or not jnp.issubdtype(found.dtype, kind):
        raise ValueError(f"{call} must return {what}, but returns {_described(found)}.")


def expect_same_state(call: str, old: PyTree, new: PyTree) -> None:
    """Checks that a new state has the structure, shapes and dtypes of the old one.

    Raises:
      ValueError: they differ; the message names the first path where they do.

    Example:
      >>> mean = jax.ShapeDtypeStruct((3,), "float32")
      >>> expect_same_state("f(x)", {"mean": mean}, {"mean": mean})
    """
    olds, news = (
        {path_text(path): _described(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(s)}
        for s in (old, new)
    )
    for path in {**olds, **news}:
        if olds.get(path) != news.get(path):
            where = path or "its root"
            raise ValueError(
                f"{call} must return a new state of the same shapes and dtypes as init, but at "
                f"{where} it is {news.get(path, 'absent')} and was {olds.get(path, 'absent')}."
            )
    if jax.tree.structure(old) != jax.tree.structure(new):
        was, now = (textwrap.shorten(str(jax.tree.structure(s)), 200) for s in (old, new))
        raise ValueError(
            f"{call} must return a new state of the same structure as init, but its structure is "
            f"{now} and was {was}."
        )
