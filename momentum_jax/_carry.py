"""How a running job is carried over: velocities by path, out of one state and into another.

A velocity is named by its path in the params. Whatever maps another framework's weights to the
params, by name, maps its buffers to velocities: which value goes where is found by sending
numbered arrays through it, and used both ways.
"""

import math
import operator
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from momentum_jax import _velocity
from momentum_jax._mixtures import AggMoState, QHMState
from momentum_jax._momentum import MomentumState, TraceState
from momentum_jax._storage import Stored

PyTree = Any
# From {name: weights} of another framework to the params.
ToParams = Callable[[dict[str, np.ndarray]], PyTree]

# What makes the states of each type.
_MAKERS = {
    MomentumState: "momentum",
    TraceState: "trace",
    QHMState: "qhm",
    AggMoState: "aggmo",
}
_INJECTED = (optax.InjectHyperparamsState, optax.InjectStatefulHyperparamsState)


def velocities(state: PyTree, kind: type) -> dict[str, Any]:
    """The velocity of each param by its path, from all states of a kind within a state.

    A masked or partitioned transformation holds some of the leaves only; together they may
    not hold one twice.
    """
    found: dict[str, Any] = {}
    of_kind = parts(state, kind)
    others = [other for other in _MAKERS if other is not kind and parts(state, other)]
    if others and not of_kind:
        raise ValueError(
            f"the state is {others[0].__name__}, of {_MAKERS[others[0]]}, but must be "
            f"{kind.__name__}, of {_MAKERS.get(kind, 'optax.trace')}: what they store differs in "
            "sign and scale. momentum_jax.frameworks.inside_from_outside and outside_from_inside "
            "convert."
        )
    for held in of_kind:
        for path, leaf in _leaves_of(held):
            name = _name(path)
            if name in found:
                raise ValueError(
                    f"the state holds two velocities of the param {name or 'at the root'}, so that "
                    "it is not clear which is meant. Carry over the parts of the chain one by one."
                )
            found[name] = leaf.values if leaf.scales is None else _decode(leaf)
    return found


# Outside jit nothing new can be made on an Explicit mesh, as decoding 8 bits does.
_decode = _velocity.inlined_jit(_velocity.decode)


def _stored_in(state):
    return Stored(state.trace) if isinstance(state, optax.TraceState) else Stored(*state[1:])


def _with_stored(state, stored):
    if isinstance(state, optax.TraceState):
        return state._replace(trace=stored.values)
    return type(state)(state.count, *stored)


def _leaves_of(state):
    return _velocity.leaves_of(_stored_in(state))[0]


def fill(state: PyTree, values: Mapping[str, Any], count: int | None, kind: type) -> PyTree:
    """The state with these velocities and, unless it is None, this count, in all its parts.

    Each leaf keeps its dtype and sharding.
    """

    def tree(node):
        return jax.tree.map(part, node, is_leaf=lambda node: isinstance(node, parts_filled))

    def part(node):
        if not isinstance(node, parts_filled):
            return node
        if isinstance(node, kind):
            stored = _stored_in(node)
            leaves, treedef = _velocity.leaves_of(stored)
            filled = [
                jax.tree.map(_like, one, _velocity.with_value(one, values[_name(path)]))
                for path, one in leaves
            ]
            node = _with_stored(node, _velocity.together(treedef, filled, stored))
        if isinstance(node, _INJECTED):
            node = node._replace(inner_state=tree(node.inner_state))
            if isinstance(node, optax.InjectStatefulHyperparamsState):
                node = node._replace(hyperparams_states=_count_up(node.hyperparams_states, count))
        if count is not None and "count" in node._fields:
            # Within another library's own wrapper of an array, if it is in one.
            counted = jax.tree.map(lambda held: _like(held, count), node.count)
            node = node._replace(count=counted)
        return node

    parts_filled = (kind, optax.ScaleByScheduleState, *_INJECTED)
    return tree(state)


def follows_a_schedule(state: PyTree) -> bool:
    """Whether the state has a count that is not momentum's own."""
    return bool(_scheduled(state))


def scheduled_count(state: PyTree) -> int | None:
    """The count of the state's schedules, if there are any."""
    return _common_count(_scheduled(state))


def taken_count(state: PyTree) -> int | None:
    """How many steps the velocities have taken, or the schedules where there are none."""
    found = [part for kind in _MAKERS for part in parts(state, kind)]
    return _common_count(found or _scheduled(state))


def match(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> None:
    """Raises a ValueError that lists the paths on both sides if they differ, or the shapes."""
    if theirs and not ours:
        raise ValueError(
            "the state has no velocity to carry anything over to or from: give the state that "
            "init returned, of a transformation with momentum above 0. What is carried over is "
            f"of {listed(theirs)}."
        )
    if ours and not theirs:
        raise ValueError(
            "there is no velocity in what is carried over, but in the state are those of "
            f"{listed(ours)}. Give the state of an optimizer with momentum."
        )
    if ours.keys() != theirs.keys():
        raise ValueError(
            "the velocities and what is carried over must be of the same params, but "
            f"only in the state: {listed(ours.keys() - theirs.keys())}; "
            f"only in what is carried over: {listed(theirs.keys() - ours.keys())}. "
            "Give the state that init returned for the very params, and a to_params that "
            "returns a tree like them."
        )
    for name, held in ours.items():
        if np.shape(held) != np.shape(theirs[name]):
            raise ValueError(
                f"the velocity {name or 'at the root'} has shape {np.shape(held)}, but what is "
                f"carried over to it has shape {np.shape(theirs[name])}. The function that maps "
                "the weights must give them the shapes of the params."
            )


class Routes:
    """Which value of which named array each value of the params comes from.

    `to_params` must only rename, reshape, transpose, split or join: every value of the named
    arrays arrives in at most one place, and nothing else does.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], to_params: ToParams) -> None:
        """Sends the number of each value through `to_params`, a byte at a time.

        A byte is exact in every floating dtype that weights may be converted to on the way.
        """
        self.shapes = dict(shapes)
        sizes = [math.prod(shape) for shape in shapes.values()]
        self.starts = dict(zip(shapes, np.cumsum([0, *sizes[:-1]]).tolist(), strict=True))
        self.total = sum(sizes)
        numbers = np.arange(1, self.total + 1)  # 0 is what a constant may be.
        sums: dict[str, Any] = {}
        for shift in range(0, max(self.total.bit_length(), 1), 8):
            for path, digits in self._send((numbers >> shift) & 255, to_params).items():
                sums[path] = sums.get(path, 0) + (digits << shift)
        self.places = {path: number - 1 for path, number in sums.items()}
        self._check()
        values = np.random.default_rng(0).integers(-127, 128, self.total)
        for path, sent in self._send(values, to_params).items():
            if not np.array_equal(sent, values[self.places[path]]):
                raise self._changes(path)

    def _send(self, values, to_params):
        values = values.astype(np.float32)
        arrays = {name: self._of_name(values, name) for name in self.shapes}
        try:
            params = to_params(arrays)
        except Exception as error:
            if isinstance(error, KeyError) and error.args[0] not in self.shapes:
                raise ValueError(
                    f"to_params asked for {error}, but was given {listed(self.shapes)}: the "
                    "params of the optimizer alone. Let it do without the others."
                ) from error
            error.add_note("This was within to_params, which is called with NumPy arrays by name.")
            raise
        leaves = jax.tree_util.tree_leaves_with_path(params)
        sent = {_name(path): np.asarray(leaf, np.float64) for path, leaf in leaves}
        for path, leaf in sent.items():
            if not np.array_equal(leaf, np.rint(leaf)):
                raise self._changes(path)
        return {path: leaf.astype(np.int64) for path, leaf in sent.items()}

    def _of_name(self, values, name):
        start, shape = self.starts[name], self.shapes[name]
        return values[start : start + math.prod(shape)].reshape(shape)

    def _check(self):
        used = np.zeros(self.total, bool)
        count = 0
        for path, places in self.places.items():
            if np.any(places < 0) or np.any(places >= self.total):
                raise self._changes(path)
            used[places] = True
            count += places.size
            if np.count_nonzero(used) != count:
                raise self._changes(path)

    @staticmethod
    def _changes(path):
        return ValueError(
            f"to_params does more than move values to {path or 'the root'}: it changes, repeats "
            "or invents them there (a tied weight, a padding, running statistics?). What it does "
            "to weights is then not what must be done to velocities. Let it rename, reshape, "
            "transpose, split and join only."
        )

    def forward(self, buffers: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Named arrays, as arrays by the path in the params."""
        flat = np.concatenate([np.ravel(buffers[name]) for name in self.shapes])
        return {path: flat[places] for path, places in self.places.items()}

    def backward(self, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Arrays by path as named arrays; without those of which no value is there."""
        dtype = np.result_type(np.float32, *(array.dtype for array in arrays.values()))
        flat, there = np.zeros(self.total, dtype), np.zeros(self.total, bool)
        for path, array in arrays.items():
            flat[self.places[path]], there[self.places[path]] = array, True
        named = {}
        for name in self.shapes:
            here = self._of_name(there, name)
            if here.all():
                named[name] = self._of_name(flat, name).copy()
            elif here.any():
                raise ValueError(
                    f"the state has velocities of a part of {name} only. Leave a param out as a "
                    "whole, or keep it."
                )
        return named


def to_numpy(name: str, array: Any) -> np.ndarray:
    """Anything with `__array__` as a NumPy array, at least float32 wide."""
    if str(getattr(array, "dtype", "")) == "torch.bfloat16":
        array = array.float()  # NumPy has no such dtype, and float32 holds all its values.
    if hasattr(array, "detach"):
        array = array.detach()
    try:
        array = np.asarray(array)
    except (TypeError, RuntimeError) as error:
        raise TypeError(
            f"{name} cannot be read as an array ({error}). Bring it to the host first: "
            "torch.load(path, map_location='cpu')."
        ) from error
    if not jnp.issubdtype(array.dtype, jnp.inexact):
        raise TypeError(
            f"{name} is {array.dtype}, but must hold floating-point numbers. If it is the right "
            "array, convert it to float32."
        )
    return array.astype(np.result_type(array.dtype, np.float32), copy=False)


def check_names(names: Iterable[str]) -> list[str]:
    """Names are text, and no two are equal."""
    if isinstance(names, str):
        raise TypeError(f"names={names!r} must be a list of names, here [{names!r}].")
    names = list(names)
    if not all(isinstance(name, str) for name in names):
        raise TypeError(f"names must be text, one a weight, but are {names[:5]}.")
    if len(set(names)) != len(names):
        repeated = sorted({name for name in names if names.count(name) > 1})
        raise ValueError(
            f"names must differ from one another, but these repeat: {repeated}. A weight that is "
            "used twice is one param of the optimizer: name it once."
        )
    return names


def check_count(count: Any) -> int:
    """A whole number of steps."""
    try:
        whole = operator.index(count)
    except TypeError:
        whole = -1
    if whole < 0 or isinstance(count, bool):
        raise ValueError(f"count={count!r} must be the number of steps taken: 0, 1, 2, ...")
    return whole


def parts(state: PyTree, kind: type) -> list[Any]:
    """All states of a kind within a state."""
    leaves = jax.tree.leaves(state, is_leaf=lambda node: isinstance(node, kind))
    return [leaf for leaf in leaves if isinstance(leaf, kind)]


def _scheduled(state):
    found = parts(state, optax.ScaleByScheduleState)
    for kind in _INJECTED:
        # Without states of its own, what is injected are constants.
        found += [part for part in parts(state, kind) if getattr(part, "hyperparams_states", True)]
    return found


def _count_up(states, count):
    def at(path, held):
        named = path and getattr(path[-1], "name", None) == "count"
        return _like(held, count) if named and count is not None else held

    return jax.tree_util.tree_map_with_path(at, states)


def _name(path):
    # Flax NNX keeps each array in a variable of its own, whose key says nothing.
    return jax.tree_util.keystr(path).removesuffix(".value")


def _common_count(counting):
    counts = {int(leaf) for part in counting for leaf in jax.tree.leaves(part.count)}
    if len(counts) > 1:
        raise ValueError(
            f"the parts of the state have counted {sorted(counts)} steps, not alike, so that it "
            "is not clear which count is meant. Where there is an argument count, give it."
        )
    return counts.pop() if counts else None


def _like(held, value):
    value = np.asarray(value).astype(held.dtype)
    # What was bound to no device stays free to follow others.
    bound = getattr(held, "committed", False)
    return jax.device_put(value, held.sharding) if bound else jnp.asarray(value)


def listed(names: Iterable[str]) -> str:
    """Names for a message."""
    return ", ".join(sorted(name or "the root" for name in names)) or "none"
