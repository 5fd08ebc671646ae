"""Finds a problem by name, or in a Python file of the user."""

import dataclasses
import importlib.util
import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

from momentum_jax.study.landscapes import double_well as double_well
from momentum_jax.study.landscapes import quadratic as quadratic
from momentum_jax.study.landscapes import safran_shamir as safran_shamir
from momentum_jax.study.networks import deep_mlp as deep_mlp
from momentum_jax.study.networks import digits as digits
from momentum_jax.study.networks import mnist1d as mnist1d
from momentum_jax.study.networks import mnist_conv as mnist_conv
from momentum_jax.study.networks import sequence as sequence
from momentum_jax.study.problem import Problem as Problem
from momentum_jax.study.problem import check as check
from momentum_jax.study.problem import in_one_line as in_one_line

PROBLEMS: dict[str, Callable[..., Problem]] = {
    "digits": digits,
    "mnist1d": mnist1d,
    "mnist-conv": mnist_conv,
    "deep-mlp": deep_mlp,
    "sequence": sequence,
    "double-well": double_well,
    "safran-shamir": safran_shamir,
    "quadratic": quadratic,
}


def find(text: str) -> Problem:
    """Finds a problem by name, or in a Python file.

    Args:
      text: a key of `PROBLEMS`, or "path/to/file.py:object", where the object is a `Problem`
        or a function without arguments that returns one. While the file is imported, its folder
        is on the import path, as when Python runs a script.

    Returns:
      The problem, with its `source` set.

    Raises:
      ValueError: there is no such problem. The message is one line that lists what can be given.

    Example:
      >>> find("quadratic").name
      'quadratic'
    """
    if text in PROBLEMS:
        try:
            return dataclasses.replace(PROBLEMS[text](), source=text)
        except ModuleNotFoundError as error:
            raise ValueError(
                f"the problem {text} needs a package that is not installed "
                f"({in_one_line(error)}): pip install 'momentum_jax[study]'."
            ) from error
    path, colon, name = text.rpartition(":")
    if not colon or not path.endswith(".py"):
        hint = f"; here: {text}:object" if text.endswith(".py") else ""
        raise ValueError(
            f"there is no problem {text!r}: give one of {', '.join(PROBLEMS)}, "
            f"or your own as path/to/file.py:object{hint}."
        )
    if not Path(path).is_file():
        raise ValueError(
            f"there is no file {path!r}: give path/to/file.py:object with the path of an existing "
            "file."
        )
    file = Path(path).resolve()
    module = _imported(file)
    found = getattr(module, name, None)
    if found is None:
        offered = ", ".join(_offered(module)) or "no Problem and no function that could return one"
        raise ValueError(f"{path} has no object {name!r}: it has {offered}.")
    made = found
    if callable(found) and not isinstance(found, type):
        try:
            made = found()
        except Exception as error:
            raise ValueError(f"{name}() in {path} fails: {in_one_line(error)}") from error
    if not isinstance(made, Problem):
        what = f"{name}()" if made is not found else name
        raise ValueError(
            f"{what} in {path} must be a momentum_jax.study.Problem, or a function without "
            f"arguments that returns one, but is of type {type(made).__name__}."
        )
    return dataclasses.replace(made, source=f"{file}:{name}")


def _imported(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"_problem_in_{path.stem}", path)
    assert spec is not None  # A .py file always has a spec and a loader.
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # Dataclasses and pickle look up the module of a class there.
    sys.path.insert(0, str(path.parent))
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[spec.name]
        raise ValueError(f"{path} cannot be imported: {in_one_line(error)}") from error
    finally:
        sys.path.remove(str(path.parent))
    return module


def _offered(module: ModuleType) -> list[str]:
    """The names of the Problems of a module, and of its functions that need no arguments."""

    def fits(value):
        if inspect.isfunction(value) and value.__module__ == module.__name__:
            parameters = inspect.signature(value).parameters.values()
            return all(p.default is not p.empty or p.kind in (2, 4) for p in parameters)
        return isinstance(value, Problem)

    return sorted(n for n, value in vars(module).items() if n[0] != "_" and fits(value))
