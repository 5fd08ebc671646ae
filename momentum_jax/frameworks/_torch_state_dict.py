"""The `state_dict` of PyTorch's SGD: its settings, its parameter groups, its momentum buffers."""

import copy
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
import optax

from momentum_jax._momentum import TraceState
from momentum_jax.frameworks import _carry, _counts
from momentum_jax.frameworks._checkpoint import (
    Checkpoint,
    Names,
    dump_velocities,
    load_velocities,
    to_numpy,
)
from momentum_jax.frameworks._routes import ToParams, join_names

PyTree = Any


def torch_hyperparameters(
    state_dict: Mapping[str, Any], *, group: int | None = None
) -> dict[str, Any]:
    """Returns the present settings of PyTorch's SGD, as keyword arguments for `torch_sgd`.

    Args:
      state_dict: the result of `optimizer.state_dict()`.
      group: the index of the parameter group; None if all groups have the same settings.

    Returns:
      A dict of lr, momentum, dampening, weight_decay, nesterov and maximize. The lr is the
      present one: if a scheduler changes it, replace it by a schedule.

    Raises:
      ValueError: the groups have different settings and `group` is None; the state is not of SGD.

    Example:
      >>> from momentum_jax.frameworks import torch_hyperparameters, torch_sgd
      >>> settings = dict(dampening=0, weight_decay=0, nesterov=False, maximize=False)
      >>> group = {"lr": 0.1, "momentum": 0.9, **settings, "params": [0, 1]}
      >>> found = torch_hyperparameters({"state": {}, "param_groups": [group]})
      >>> found["lr"], found["momentum"]
      (0.1, 0.9)
      >>> tx = torch_sgd(**found)
    """
    groups = [_settings(found) for found in _groups(state_dict)]
    if group is not None:
        if not 0 <= group < len(groups):
            raise ValueError(
                f"group={group} must be at least 0 and below {len(groups)}, the number of groups."
            )
        return groups[group]
    differing = [name for name in groups[0] if any(g[name] != groups[0][name] for g in groups)]
    if differing:
        raise ValueError(
            f"the {len(groups)} parameter groups differ in {', '.join(differing)}. Make one "
            "transformation for each:\n"
            "    tx = optax.partition(\n"
            '        {f"group_{i}": torch_sgd(**torch_hyperparameters(state_dict, group=i))'
            f" for i in range({len(groups)})}},\n"
            "        torch_labels(state_dict, names=names, to_params=to_params),\n"
            "    )"
        )
    return groups[0]


def torch_labels(state_dict: Mapping[str, Any], *, names: Names, to_params: ToParams) -> PyTree:
    """Returns the parameter group of each param as a label for `optax.partition`.

    Args:
      state_dict: the result of `optimizer.state_dict()`.
      names: as for `load_torch`.
      to_params: as for `load_torch`.

    Returns:
      A tree like the params, whose leaves are "group_0", "group_1", ...

    Raises:
      ValueError: names or shapes do not match; a param is made from weights of two groups.

    Example:
      >>> import numpy as np
      >>> from momentum_jax.frameworks import torch_labels
      >>> settings = dict(lr=0.1, momentum=0, dampening=0, weight_decay=0, nesterov=False)
      >>> groups = [{**settings, "maximize": False, "params": [i]} for i in range(2)]
      >>> torch_labels(
      ...     {"state": {}, "param_groups": groups},
      ...     names={"fc.weight": np.ones((2, 3)), "fc.bias": np.ones(2)},
      ...     to_params=lambda weights: {"w": weights["fc.weight"].T, "b": weights["fc.bias"]},
      ... )
      {'b': 'group_1', 'w': 'group_0'}
    """
    checkpoint = _TorchCheckpoint(state_dict, names)
    shapes = checkpoint.shapes()

    def label(path, leaf):
        groups = np.unique(np.asarray(leaf, np.float64))
        if groups.size != 1:
            raise ValueError(
                f"the param {jax.tree_util.keystr(path)} is made from weights of the parameter "
                f"groups {groups.astype(int).tolist()}, but must have one group. Split the param, "
                "or put the weights in one group."
            )
        return f"group_{int(groups[0])}"

    groups = {
        name: np.full(shapes[name], checkpoint.group_of[name], np.float32)
        for name in checkpoint.names
    }
    return jax.tree_util.tree_map_with_path(label, to_params(groups))


def load_torch(
    opt_state: optax.OptState,
    state_dict: Mapping[str, Any],
    *,
    names: Names,
    to_params: ToParams,
    count: int | None = None,
) -> Any:
    """Resumes a checkpoint of PyTorch's SGD: fills a state with its momentum buffers.

    Args:
      opt_state: the state to fill: what init returned, from `torch_sgd` or any transformation
        that contains a `momentum_jax.trace`. It may be inside `optax.partition` or an
        `nnx.Optimizer`. To fill a state of `momentum`, pass the result to `momentum_from_trace`.
      state_dict: the result of `optimizer.state_dict()`, with its tensors on the host.
      names: the names of the optimizer's params in its order, group by group. With one group
        this is usually the order of `model.named_parameters()`; with several it is not. The
        example in the docstring of `momentum_jax.frameworks` finds the order. PyTorch can store the
        names itself, after `SGD(model.named_parameters())`: the stored names must then equal
        `names`. If a param has no buffer yet, give a dict of the weights by name, in the same
        order, in place of the names.
      to_params: the function that makes the params from the weights, a dict by name. It is called
        with NumPy arrays of these names, and must only move values: rename, reshape, transpose,
        split, join. For complex weights, PyTorch's gradient, and so its buffer, is the conjugate
        of what `jax.grad` returns: give `update` jax.tree.map(jnp.conj, grads).
      count: the number of steps taken, from which schedules continue. PyTorch's SGD does not
        save it. A scheduler does, as `last_epoch`, if it steps once per batch. Two kinds of
        schedule are not visible in the state: a schedule of the momentum coefficient, and a
        schedule of the number of gradients that `optax.MultiSteps` accumulates. With these, too,
        give the count.

    Returns:
      `opt_state` with velocity and count filled; each leaf keeps its dtype and sharding. If no
      count is given, it is 1 if there is any buffer, else 0: that is enough for constant
      settings. The peak of host memory is at most 16 bytes per value, in addition to the memory of
      the arguments (tested in float32).

    Raises:
      ValueError: names, shapes or paths do not match (the message lists both sides); there is a
        schedule but no count; a buffer is missing in a group with dampening, which PyTorch leaves
        out of the first step of each param; a buffer has values that are not finite, or too large
        for the dtype of the velocity; `opt_state` holds accumulated gradients.

    Example:
      >>> import jax.numpy as jnp, numpy as np
      >>> from momentum_jax.frameworks import load_torch, torch_hyperparameters, torch_sgd
      >>> settings = dict(dampening=0, weight_decay=0, nesterov=False, maximize=False)
      >>> state_dict = {
      ...     "state": {0: {"momentum_buffer": np.array([[1.0, 2.0]])}},
      ...     "param_groups": [{"lr": 0.1, "momentum": 0.9, **settings, "params": [0]}],
      ... }
      >>> tx = torch_sgd(**torch_hyperparameters(state_dict))
      >>> opt_state = load_torch(
      ...     tx.init({"kernel": jnp.zeros((2, 1))}),
      ...     state_dict,
      ...     names=["fc.weight"],
      ...     to_params=lambda weights: {"kernel": weights["fc.weight"].T},
      ... )
      >>> print(opt_state[0].trace["kernel"].T)
      [[1. 2.]]
    """
    checkpoint = _TorchCheckpoint(state_dict, names)
    count = _counts.steps_taken(
        count,
        None,
        opt_state,
        bool(checkpoint.buffers),
        "last_epoch of a scheduler that steps once per batch",
    )
    velocities, missing = load_velocities(opt_state, TraceState, checkpoint, to_params)
    dampened = [name for name in missing if checkpoint.dampening_of(name)]
    if dampened:
        raise ValueError(
            f"there is no momentum buffer of {join_names(dampened)}, but its group has dampening. "
            "PyTorch will leave the dampening out of the first step of this param; here only the "
            "first step of the whole optimizer has no dampening. Take one more step in PyTorch, "
            "so that every param has a buffer, or remove the param from the optimizer."
        )
    return _carry.fill(opt_state, velocities, count, TraceState)


def dump_torch(
    opt_state: optax.OptState,
    state_dict: Mapping[str, Any],
    *,
    names: Names,
    to_params: ToParams,
    to_tensor: Callable[[np.ndarray], Any] = np.asarray,
) -> dict[str, Any]:
    """Exports the velocity as the momentum buffers of PyTorch's SGD.

    Args:
      opt_state: the state of `torch_sgd`, or of any transformation that contains a
        `momentum_jax.trace`.
      state_dict: `optimizer.state_dict()` of the optimizer that will continue, new or old. Its
        parameter groups are kept, including the lr; its buffers are replaced.
      names: as for `load_torch`. A new optimizer has no buffers yet: give the weights by name.
      to_params: as for `load_torch`; it is applied backwards.
      to_tensor: converts each NumPy array for the result. Give `torch.from_numpy` for
        `optimizer.load_state_dict`, which takes only tensors.

    Returns:
      A new dict for `optimizer.load_state_dict`. Params without a velocity here have no buffer;
      before the first step no param has one.

    Raises:
      ValueError: names, shapes or paths do not match (the message lists both sides); the state
        has no velocity but the optimizer has momentum; the state holds what
        `momentum_jax.frameworks` refuses to drop.

    Example:
      >>> import jax.numpy as jnp, numpy as np
      >>> from momentum_jax.frameworks import dump_torch, torch_sgd
      >>> settings = dict(dampening=0, weight_decay=0, nesterov=False, maximize=False)
      >>> group = {"lr": 0.1, "momentum": 0.9, **settings, "params": [0]}
      >>> tx = torch_sgd(0.1, 0.9)
      >>> params = {"kernel": jnp.zeros((2, 1))}
      >>> _, opt_state = tx.update({"kernel": jnp.array([[1.0], [2.0]])}, tx.init(params))
      >>> dumped = dump_torch(
      ...     opt_state,
      ...     {"state": {}, "param_groups": [group]},
      ...     names={"fc.weight": np.zeros((1, 2))},
      ...     to_params=lambda weights: {"kernel": weights["fc.weight"].T},
      ... )
      >>> print(dumped["state"][0]["momentum_buffer"])
      [[1. 2.]]
    """
    checkpoint = _TorchCheckpoint(state_dict, names)
    buffers = dump_velocities(opt_state, TraceState, checkpoint, to_params)
    momentums = [group["momentum"] for group in checkpoint.groups if group["momentum"]]
    if momentums and not _carry.states_of_type(opt_state, TraceState):
        raise ValueError(
            f"the state has no velocity, but PyTorch's optimizer has momentum={momentums[0]}. Give "
            "the state of torch_sgd, or of any transformation that contains a trace."
        )
    if not _counts.has_stepped(opt_state):
        buffers = {}
    return {
        **state_dict,
        "state": {
            number: {"momentum_buffer": to_tensor(buffers[name])}
            for name, number in checkpoint.number_of.items()
            if name in buffers
        },
        "param_groups": copy.deepcopy(checkpoint.groups),
    }


class _TorchCheckpoint(Checkpoint):
    """PyTorch's `optimizer.state_dict()`, which numbers the params, with their names.

    Attributes:
      groups: the parameter groups.
      number_of: the number of each param, by name.
      group_of: the index of each param's group, by name.
    """

    weights_by_name = "{name: weight} in the optimizer's order"

    def __init__(self, state_dict: Mapping[str, Any], names: Names) -> None:
        super().__init__(names)
        self.groups = _groups(state_dict)
        numbers = [number for group in self.groups for number in group["params"]]
        if len(numbers) != len(self.names):
            raise ValueError(
                f"the optimizer has {len(numbers)} params, but names has {len(self.names)}: "
                f"{', '.join(self.names)}. Give the names of all params that the optimizer was "
                "created with, frozen ones too, in its order."
            )
        known = [name for group in self.groups for name in group.get("param_names", ())]
        if known and known != self.names:
            raise ValueError(
                f"the optimizer's own names are {', '.join(known)}, but names has "
                f"{', '.join(self.names)}. Both must be equal, in the same order: give the "
                "optimizer's."
            )
        self.number_of = dict(zip(self.names, numbers, strict=True))
        name_of = {number: name for name, number in self.number_of.items()}
        self.group_of = {
            name_of[number]: i for i, group in enumerate(self.groups) for number in group["params"]
        }
        unknown = [number for number in state_dict["state"] if number not in name_of]
        if unknown:
            raise ValueError(
                f"the state has params {unknown} that are in no parameter group. Give the "
                "complete result of optimizer.state_dict()."
            )
        for number, held in state_dict["state"].items():
            if held.get("momentum_buffer") is not None:
                name = name_of[number]
                what = f"the momentum buffer of {name}"
                self.buffers[name] = to_numpy(what, held["momentum_buffer"])

    def dampening_of(self, name):
        return _settings(self.groups[self.group_of[name]])["dampening"]


def _groups(state_dict):
    """The parameter groups, if the dict is of `torch.optim.SGD`."""
    if not isinstance(state_dict, Mapping) or not {"state", "param_groups"} <= state_dict.keys():
        keys = list(state_dict) if isinstance(state_dict, Mapping) else type(state_dict).__name__
        raise ValueError(
            f"state_dict is {keys}, but must be what optimizer.state_dict() returned, with state "
            "and param_groups. Of a checkpoint, give the entry that holds the optimizer."
        )
    for group in state_dict["param_groups"]:
        missing = [
            name for name in ("lr", "momentum", "dampening", "nesterov") if name not in group
        ]
        if missing:
            raise ValueError(
                f"a parameter group has {', '.join(group)}, but no {', '.join(missing)}: it is "
                "not of torch.optim.SGD. The state of another optimizer cannot be carried over: "
                "start with the state that init returned."
            )
    return list(state_dict["param_groups"])


def _settings(group):
    return {
        "lr": float(group["lr"]),
        "momentum": float(group["momentum"]),
        "dampening": float(group["dampening"]),
        "weight_decay": float(group.get("weight_decay", 0.0)),
        "nesterov": bool(group["nesterov"]),
        "maximize": bool(group.get("maximize", False)),
    }
