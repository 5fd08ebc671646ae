"""How a job of another framework is carried over: velocities by path, as NumPy arrays by name.

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

from momentum_jax import _velocity
from momentum_jax._dispatch import inlined_jit
from momentum_jax._kahan import KahanState
from momentum_jax._recurrence import STATE_TYPES, has_velocity
from momentum_jax._states import (
    any_nonzero,
    cast_like,
    decode,
    find_states,
    held_arrays,
    locate_states,
    named_leaves,
    put_like,
    replace_states,
    rules_of,
    schedule_count_field,
    step_count_field,
    to_host,
    with_held_arrays,
)
from momentum_jax._storage import CAST, WIDE, Stored, codec_of, decoded_dtype

PyTree = Any
# From {name: weights} of another framework to the params.
ToParams = Callable[[dict[str, np.ndarray]], PyTree]

# Values that are worked on at once: the temporaries are small beside the weights.
_CHUNK = 1 << 16


def velocities(state: PyTree, kind: type) -> dict[str, Any]:
    """The velocity of each param by its path, from all states of a kind within a state.

    A masked or partitioned transformation holds some of the leaves only; together they may
    not hold one twice.
    """
    found: dict[str, Any] = {}
    of_kind = parts(state, kind)
    others = [other for other in STATE_TYPES if other is not kind and parts(state, other)]
    if others and not of_kind:
        raise ValueError(
            f"the state is {others[0].__name__}, of {STATE_TYPES[others[0]]}, but must be "
            f"{kind.__name__}, of {STATE_TYPES.get(kind, 'optax.trace')}: what they store differs "
            "in sign and scale. momentum_jax.frameworks.momentum_from_trace and "
            "trace_from_momentum convert."
        )
    for node in of_kind:
        for field, name, stored in held_arrays(node):
            if field == "count":
                continue
            if name in found:
                raise ValueError(
                    f"the state holds two velocities of the param {name or 'at the root'}, so that "
                    "it is not clear which is meant. Carry over the parts of the chain one by one."
                )
            found[name] = stored.values if stored.scales is None else decode(stored)
    return found


@inlined_jit
def _count_not_finite(x):
    return jnp.sum(~jnp.isfinite(x))


def fill(state: PyTree, values: Mapping[str, np.ndarray], count: int | None, kind: type) -> PyTree:
    """The state with these velocities and, unless it is None, this count, in all its parts.

    Each leaf keeps its dtype and sharding.
    """
    check_count_fits(state, count, kind)

    def part(node):
        return with_held_arrays(node, [filled(node, held) for held in held_arrays(node)])

    def filled(node, held):
        if held.field == step_count_field(node):
            return held.stored if count is None else Stored(cast_like(held.stored.values, count))
        if isinstance(node, kind):
            return _with_velocity(held.path, held.stored, values[held.path])
        return held.stored

    return replace_states(state, part)


def check_count_fits(state: PyTree, count: int | None, kind: type) -> None:
    """Raises a ValueError if one count cannot be given to all parts of the state."""
    if not count:
        return
    depths = set()
    for node, around, *_ in locate_states(state):
        for held in held_arrays(node):
            if held.field != step_count_field(node):
                continue
            if schedule_count_field(node) or isinstance(node, kind):
                # What counts within optax.MultiSteps counts steps, and so does MultiSteps.
                around_it = (*around, node)
                depths.add(sum(rules_of(each).accumulates_gradients for each in around_it))
            limit = np.iinfo(held.stored.values.dtype).max
            if count > limit:
                raise ValueError(
                    f"count={count} must be at most {limit}: the state counts in "
                    f"{held.stored.values.dtype}. Give a smaller count, with schedules that are "
                    "shifted by the difference."
                )
    if len(depths) > 1:
        raise ValueError(
            "the state counts steps within optax.MultiSteps and gradients outside it, so that "
            "one count cannot be right for both. Put every schedule and momentum within "
            "MultiSteps, or none."
        )


def check_whole(state: PyTree, name: str) -> None:
    """Raises a ValueError if a part of the state would be lost.

    Both what is carried over and what it is carried over to must pass.
    """
    for part in find_states(state):
        if isinstance(part, KahanState):
            of_part = [held for held in held_arrays(part) if held.field == "compensation"]
            short = [held.path for held in of_part if any_nonzero(held.stored.values)]
            if short:
                raise ValueError(
                    f"in {name}, momentum_jax.kahan has updates of {join_names(short)} that "
                    "rounding has kept from the params. They are not carried over. Add them, "
                    "state.compensation, to the params in float32 and give state.inner_state; or "
                    "to keep them, fill state.inner_state alone and put it back with _replace."
                )
        remembered = rules_of(part).remembered
        if remembered is None:
            continue
        for leaf in jax.tree.leaves(getattr(part, remembered.field)):
            numbers = np.ravel(to_host(leaf))
            others = numbers[numbers != remembered.start]
            if others.size:
                raise ValueError(
                    f"in {name}, {remembered.loss.format(others[0])}. That is not carried over. "
                    f"{remembered.remedy}"
                )


def check_finite(values: Mapping[str, Any], what: str, remedy: str) -> None:
    """Raises a ValueError if a value is infinite or no number."""
    for name, array in values.items():
        if isinstance(array, jax.Array):
            bad = int(_count_not_finite(array))
        else:
            chunks = (chunk for _, chunk in _chunks(np.asarray(array)))
            bad = sum(chunk.size - np.count_nonzero(np.isfinite(chunk)) for chunk in chunks)
        if bad:
            raise ValueError(
                f"{what} {name or 'at the root'} has {bad} of {array.size} values that are not "
                f"finite. The steps to come would spread them to the params. {remedy}"
            )


# For `check_finite` on states.
NOT_FINITE_HERE = (
    "Go back to an earlier checkpoint, or set the velocity to 0 with momentum_jax.reset_velocity."
)


def follows_a_schedule(state: PyTree) -> bool:
    """Whether the state has a count that is not momentum's own.

    That of `optax.MultiSteps` matters only where the number of gradients follows a schedule,
    which the state does not show.
    """
    return any(not label.startswith("MultiStepsState") for label, _ in _scheduled(state))


def scheduled_count(state: PyTree) -> int | None:
    """The count of the state's schedules, if there are any."""
    return _common_count(_scheduled(state))


def taken_count(state: PyTree) -> int | None:
    """How many steps the velocities and the schedules have taken, all of them alike."""
    return _common_count(_taken(state) + _scheduled(state))


def has_stepped(state: PyTree) -> bool:
    """Whether the velocities have taken a step, or the schedules where there are none."""
    return any(any(_numbers(count)) for _, count in _taken(state) or _scheduled(state))


def match(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> None:
    """Raises a ValueError that lists the paths on both sides if they differ, or the shapes."""
    if theirs and not ours:
        raise ValueError(
            "the state has no velocity to carry anything over to or from: give the state that "
            "init returned, of a transformation with momentum above 0. What is carried over is "
            f"of {join_names(theirs)}."
        )
    if ours and not theirs:
        raise ValueError(
            "there is no velocity in what is carried over, but in the state are those of "
            f"{join_names(ours)}. Give the state of an optimizer with momentum."
        )
    if ours.keys() != theirs.keys():
        raise ValueError(
            "the velocities and what is carried over must be of the same params, but "
            f"only in the state: {join_names(ours.keys() - theirs.keys())}; "
            f"only in what is carried over: {join_names(theirs.keys() - ours.keys())}. "
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
        self.names = list(shapes)
        self.sizes = [math.prod(shape) for shape in shapes.values()]
        self.total = sum(self.sizes)
        self.starts = np.cumsum([0, *self.sizes[:-1]])[: len(self.sizes)]
        dtype = np.uint32 if self.total < 2**32 - 1 else np.uint64
        self.places: dict[str, np.ndarray] = {}
        values = np.empty(self.total, np.float32)
        top = 8 * ((max(self.total.bit_length(), 1) - 1) // 8)
        for shift in range(top, -8, -8):  # From the highest byte down.
            # Numbers from 1: 0 is what a constant may be.
            self._refill(values, lambda index, shift=shift: ((index + 1) >> shift) & 255)
            self._take_digits(self._send(values, to_params), first=shift == top, dtype=dtype)
        self._check()
        # And once more with values that are not in order.
        self._refill(values, _scrambled)
        for path, leaf in self._same_leaves(self._send(values, to_params)):
            for at, digits in _chunks(leaf):
                digits = self._whole(path, digits, -127, 127)
                if not np.array_equal(digits, _scrambled(self.places[path][at].astype(np.int64))):
                    raise self._changes(path)

    def _take_digits(self, sent, first, dtype):
        if first:
            self.places = {path: np.zeros(leaf.shape, dtype) for path, leaf in sent.items()}
        for path, leaf in self._same_leaves(sent):
            for at, digits in _chunks(leaf):
                digits = self._whole(path, digits, 0, 255)
                places = self.places[path][at]
                places <<= dtype(0 if first else 8)
                places |= digits.astype(dtype)

    def _refill(self, values, of_index):
        for start in range(0, self.total, _CHUNK):
            end = min(start + _CHUNK, self.total)
            values[start:end] = of_index(np.arange(start, end))

    def _send(self, values, to_params):
        arrays = {
            name: values[start : start + size].reshape(self.shapes[name])
            for name, start, size in zip(self.names, self.starts, self.sizes, strict=True)
        }
        try:
            params = to_params(arrays)
        except Exception as error:
            if isinstance(error, KeyError) and error.args[0] not in self.shapes:
                raise ValueError(
                    f"to_params asked for {error}, but was given {join_names(self.shapes)}: the "
                    "params of the optimizer alone. Let it do without the others."
                ) from error
            error.add_note("This was within to_params, which is called with NumPy arrays by name.")
            raise
        leaves = named_leaves(params)[0]
        return {name: np.asarray(leaf) for name, leaf in leaves}

    def _same_leaves(self, sent):
        """What was sent; it may not depend on the values which leaves there are."""
        shapes = {path: places.shape for path, places in self.places.items()}
        for path in {**shapes, **sent}:
            if path not in sent or sent[path].shape != shapes.get(path):
                raise self._changes(path)
        return sent.items()

    def _whole(self, path, digits, low, high):
        digits = digits.astype(np.float64)
        whole = (digits == np.rint(digits)) & (digits >= low) & (digits <= high)
        if not whole.all():
            raise self._changes(path)
        return digits.astype(np.int64)

    def _check(self):
        """Numbers become places, each in the range and there only once."""
        used = np.zeros(self.total, bool)
        for path, places in self.places.items():
            for _, chunk in _chunks(places):
                chunk -= chunk.dtype.type(1)  # 0 wraps around, out of the range.
                if np.any(chunk >= self.total):
                    raise self._changes(path)
                used[chunk] = True
        if np.count_nonzero(used) == sum(places.size for places in self.places.values()):
            return
        used[:] = False
        count = 0
        for path, places in self.places.items():
            for _, chunk in _chunks(places):
                used[chunk] = True
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

    def _pieces(self, path):
        """Which values of the flat array at the path are which values of which flat weight."""
        places = self.places[path].reshape(-1)
        for start in range(0, places.size, _CHUNK):
            chunk = places[start : start + _CHUNK].astype(np.int64)
            ends = np.array([chunk.min(), chunk.max()])
            first, last = np.searchsorted(self.starts, ends, "right") - 1
            if first == last:
                here = slice(start, start + chunk.size)
                yield here, self.names[first], chunk - self.starts[first]
                continue
            owners = np.searchsorted(self.starts, chunk, "right") - 1
            for owner in np.unique(owners):
                of = np.flatnonzero(owners == owner)
                yield start + of, self.names[owner], chunk[of] - self.starts[owner]

    def forward(
        self, buffers: Mapping[str, np.ndarray], paths: Iterable[str]
    ) -> dict[str, np.ndarray]:
        """Named arrays, as arrays by these paths in the params, 0 where there is none."""
        flat = {name: np.ravel(buffer) for name, buffer in buffers.items()}
        arrays = {}
        for path in paths:
            found = {name for _, name, _ in self._pieces(path)} & buffers.keys()
            dtype = np.result_type(np.float32, *(buffers[name].dtype for name in found))
            array = arrays[path] = np.zeros(self.places[path].shape, dtype)
            for here, name, index in self._pieces(path):
                if name in flat:
                    array.reshape(-1)[here] = flat[name][index]
        return arrays

    def reached(self, names: Iterable[str]) -> set[str]:
        """The paths to which a value of the named arrays goes."""
        names = set(names)
        return {
            path for path in self.places if any(name in names for _, name, _ in self._pieces(path))
        }

    def covered(self, paths: Iterable[str]) -> list[str]:
        """The names of which every value goes to one of the paths; a part only is refused."""
        counts = dict.fromkeys(self.names, 0)
        for path in paths:
            for _, name, index in self._pieces(path):
                counts[name] += index.size
        for name, size in zip(self.names, self.sizes, strict=True):
            if 0 < counts[name] < size:
                raise ValueError(
                    f"the state has velocities of a part of {name} only. Leave a param out as a "
                    "whole, or keep it."
                )
        sizes = zip(self.names, self.sizes, strict=True)
        return [name for name, size in sizes if counts[name] == size]

    def backward(self, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Arrays by path as named arrays; without those of which no value is there."""
        dtypes = dict.fromkeys(self.covered(arrays), np.dtype(np.float32))
        for path, array in arrays.items():
            for _, name, _ in self._pieces(path):
                dtypes[name] = np.result_type(dtypes[name], array.dtype)
        named = {name: np.empty(self.shapes[name], dtype) for name, dtype in dtypes.items()}
        for path, array in arrays.items():
            flat = array.reshape(-1)
            for here, name, index in self._pieces(path):
                named[name].reshape(-1)[index] = flat[here]
        return named


def _chunks(array):
    """Small parts of an array, without a copy of it, and where each is."""
    if not array.ndim or array.size <= _CHUNK:
        yield ..., array[...]
        return
    axis = int(np.argmax(array.shape))
    step = max(1, _CHUNK * array.shape[axis] // array.size)
    for start in range(0, array.shape[axis], step):
        at = (slice(None),) * axis + (slice(start, start + step),)
        yield at, array[at]


def _scrambled(index):
    """A whole number in [-127, 127] for each index, in no order."""
    return (((index + 1) * 2654435761 % 2**32) >> 13) % 255 - 127


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
    return [node for node in find_states(state) if isinstance(node, kind)]


def _counts(state, wanted):
    """The counts of the states that are wanted, with where they are."""
    return [
        (f"{type(node).__name__}.{held.field}", held.stored.values)
        for node in find_states(state)
        if wanted(node)
        for held in held_arrays(node)
        if held.field == step_count_field(node)
    ]


def _scheduled(state):
    """The counts that schedules follow."""
    return _counts(state, schedule_count_field)


def _taken(state):
    """The counts of the velocities."""
    return _counts(state, has_velocity)


def _numbers(count):
    return {int(number) for number in np.ravel(to_host(count))}


def _common_count(counting):
    counts = [(label, number) for label, count in counting for number in _numbers(count)]
    found = sorted({number for _, number in counts})
    if len(found) > 1:
        where = ", ".join(dict.fromkeys(f"{label} {number}" for label, number in counts))
        raise ValueError(
            f"the parts of the state have counted {found} steps, not alike ({where}), so that it "
            "is not clear which count is meant. Where there is an argument count, give it."
        )
    return found[0] if found else None


def _with_velocity(name, one, value):
    """A leaf with another velocity, of the same dtype and sharding."""
    one = jax.tree.map(jnp.asarray, one)
    held = decoded_dtype(one)
    if np.iscomplexobj(value) and not jnp.issubdtype(held, jnp.complexfloating):
        raise TypeError(
            f"the velocity {name or 'at the root'} is {held}, but what is carried over to it is "
            f"{value.dtype}: a real and a complex array do not mix. Give the state of init for "
            "complex params, or the parts as two params."
        )
    if codec_of(one) in (CAST, WIDE):
        # Without JAX, which would compile for each shape.
        with np.errstate(over="ignore"):  # Refused once it is stored.
            stored = value.astype(one.values.dtype)
        _check_stored(name, stored)
        return one._replace(values=put_like(one.values, stored))
    with np.errstate(over="ignore"):
        value = value.astype(jax.dtypes.canonicalize_dtype(value.dtype), copy=False)
    shardings = jax.tree.map(lambda x: x.sharding if x.committed else None, one)
    encode = jax.jit(_velocity.encoded, out_shardings=shardings)
    filled = encode(put_like(one.values, value), one)
    for leaf in jax.tree.leaves(filled):
        if jnp.issubdtype(leaf.dtype, jnp.inexact):
            _check_stored(name, leaf)
    return filled


def _check_stored(name, array):
    remedy = f"They are too large for {array.dtype}: give a state with wider velocities."
    check_finite({name: array}, "once stored, the velocity", remedy)


def join_names(names: Iterable[str]) -> str:
    """Names for a message."""
    return ", ".join(sorted(name or "the root" for name in names)) or "none"
