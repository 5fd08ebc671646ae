"""The momentum buffers of a checkpoint of another framework, and their way into a state and back.

`_torch_state_dict.py` and `_keras.py` read their formats into a `Checkpoint`: buffers by the names
of the weights. `load_velocities` and `dump_velocities` move them along the routes of `to_params`.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from momentum_jax._states import to_host
from momentum_jax.frameworks import _carry
from momentum_jax.frameworks._routes import Routes, ToParams, join_names

PyTree = Any
# The names of the weights in the optimizer's order, or the weights by name in that order.
Names = Sequence[str] | Mapping[str, Any]


class Checkpoint:
    """Momentum buffers by the names of their weights, and the shapes of all named weights.

    Attributes:
      names: the names of all weights, in the optimizer's order.
      weights: the weights by name, if the user gave them.
      buffers: the momentum buffers by name, as NumPy arrays; some weights may have none.
    """

    # How a user of the framework gets the weights by name, for messages.
    weights_by_name = ""

    def __init__(self, names: Names) -> None:
        """A checkpoint without buffers; subclasses add them."""
        self.names = check_names(names)
        self.weights = names if isinstance(names, Mapping) else {}
        self.buffers: dict[str, np.ndarray] = {}

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of each weight, from its buffer or from the weight itself."""
        shapes = {name: tuple(np.shape(buffer)) for name, buffer in self.buffers.items()}
        for name in self.names:
            if name not in self.weights:
                continue
            shape = tuple(self.weights[name].shape)
            if shapes.setdefault(name, shape) != shape:
                raise ValueError(
                    f"the weight {name} has shape {shape}, but its momentum has shape "
                    f"{shapes[name]}. Give names in the order of the optimizer's params."
                )
        unknown = [name for name in self.names if name not in shapes]
        if unknown:
            raise ValueError(
                f"the shape of {join_names(unknown)} is not known, because the checkpoint has no "
                "momentum of it yet. Give the weights by name in place of the names: "
                f"{self.weights_by_name}."
            )
        return {name: shapes[name] for name in self.names}


def load_velocities(
    opt_state: PyTree, state_type: type, checkpoint: Checkpoint, to_params: ToParams
) -> tuple[dict[str, np.ndarray], list[str]]:
    """The buffers as velocities by path, and the names of the weights without a buffer."""
    _carry.check_nothing_lost(opt_state, "opt_state")
    _carry.check_finite(
        checkpoint.buffers,
        "the momentum of",
        "Go back to an earlier checkpoint, or set them to 0: np.nan_to_num(buffer, posinf=0, "
        "neginf=0).",
    )
    routes = Routes(checkpoint.shapes(), to_params)
    ours = _carry.velocities(opt_state, state_type)
    # A weight that never had a gradient has no buffer, and may have no velocity in the state.
    reached = routes.reached(checkpoint.buffers)
    wanted = [path for path in routes.places if path in ours or path in reached]
    _carry.check_same_params(ours, {path: routes.places[path] for path in wanted})
    missing = [name for name in routes.covered(wanted) if name not in checkpoint.buffers]
    return routes.forward(checkpoint.buffers, wanted), missing


def dump_velocities(
    opt_state: PyTree, state_type: type, checkpoint: Checkpoint, to_params: ToParams
) -> dict[str, np.ndarray]:
    """The velocities of a state as momentum buffers by name."""
    ours = _carry.source_velocities(opt_state, "opt_state", state_type)
    routes = Routes(checkpoint.shapes(), to_params)
    _carry.check_same_params(ours, {path: p for path, p in routes.places.items() if path in ours})
    return routes.backward({path: to_host(leaf) for path, leaf in ours.items()})


def check_names(names: Iterable[str]) -> list[str]:
    """The names as a list; raises if they are not different strings."""
    if isinstance(names, str):
        raise TypeError(f"names={names!r} must be a list of names, here [{names!r}].")
    names = list(names)
    if not all(isinstance(name, str) for name in names):
        raise TypeError(f"names={names[:5]} must be strings, one for each weight.")
    if len(set(names)) != len(names):
        repeated = sorted({name for name in names if names.count(name) > 1})
        raise ValueError(
            f"names must be unique, but these repeat: {repeated}. A weight that the model uses "
            "twice is one param of the optimizer: name it once."
        )
    return names


def to_numpy(what: str, array: Any) -> np.ndarray:
    """Anything with `__array__` as a NumPy array, at least float32 wide."""
    if str(getattr(array, "dtype", "")) == "torch.bfloat16":
        array = array.float()  # NumPy has no bfloat16, and float32 holds all its values.
    if hasattr(array, "detach"):
        array = array.detach()
    try:
        array = np.asarray(array)
    except (TypeError, RuntimeError) as error:
        raise TypeError(
            f"{what} cannot be read as an array ({error}). Move it to the host first: "
            "torch.load(path, map_location='cpu')."
        ) from error
    if not jnp.issubdtype(array.dtype, jnp.inexact):
        raise TypeError(
            f"{what} is {array.dtype}, but must be floating-point. If it is the right array, "
            "convert it to float32."
        )
    return array.astype(np.result_type(array.dtype, np.float32), copy=False)
