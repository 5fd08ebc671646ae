"""Finds where a `to_params` function moves each value of each named weight.

`to_params` maps the weights of another framework, a dict by name, to a tree of params. Momentum
buffers must move in the same way. To find out how, numbered arrays are sent through the function
once. The result is used in both directions: from weights to params, and back.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from momentum_jax._states import named_leaves

PyTree = Any
# From {name: weight} of another framework to the params.
ToParams = Callable[[dict[str, np.ndarray]], PyTree]

# Number of values that are processed at once: temporaries stay small beside the weights.
_CHUNK = 1 << 16


class Routes:
    """For each value of the params, the weight and the position that it comes from.

    `to_params` must only rename, reshape, transpose, split or join: every value of a weight goes
    to at most one place, and every value of the params comes from a weight.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], to_params: ToParams) -> None:
        """Sends the number of each value through `to_params`, one byte at a time.

        A byte is exact in every floating-point dtype to which `to_params` may convert.
        """
        self.shapes = dict(shapes)
        self.names = list(shapes)
        self.sizes = [math.prod(shape) for shape in shapes.values()]
        self.total = sum(self.sizes)
        self.starts = np.cumsum([0, *self.sizes[:-1]])[: len(self.sizes)]
        dtype = np.uint32 if self.total < 2**32 - 1 else np.uint64
        # For each path of the params: the numbers of the values that arrive there.
        self.places: dict[str, np.ndarray] = {}
        values = np.empty(self.total, np.float32)
        top = 8 * ((max(self.total.bit_length(), 1) - 1) // 8)
        for shift in range(top, -8, -8):  # From the highest byte down.
            # Numbers start at 1, because a constant that to_params adds may be 0.
            self._refill(values, lambda index, shift=shift: ((index + 1) >> shift) & 255)
            self._take_digits(self._send(values, to_params), first=shift == top, dtype=dtype)
        self._check()
        # Once more with unordered values, in case to_params depends on the values.
        self._refill(values, _scrambled)
        for path, leaf in self._same_leaves(self._send(values, to_params)):
            for at, digits in chunks(leaf):
                digits = self._whole(path, digits, -127, 127)
                if not np.array_equal(digits, _scrambled(self.places[path][at].astype(np.int64))):
                    raise _more_than_moves(path)

    def forward(
        self, buffers: Mapping[str, np.ndarray], paths: Iterable[str]
    ) -> dict[str, np.ndarray]:
        """Moves arrays by name to arrays by path; values without a source are 0."""
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

    def backward(self, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Moves arrays by path to arrays by name; weights without any value are left out."""
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

    def reached(self, names: Iterable[str]) -> set[str]:
        """The paths that receive a value from one of these weights."""
        names = set(names)
        return {
            path for path in self.places if any(name in names for _, name, _ in self._pieces(path))
        }

    def covered(self, paths: Iterable[str]) -> list[str]:
        """The weights whose values all go to these paths.

        Raises a ValueError if only some values of a weight do.
        """
        counts = dict.fromkeys(self.names, 0)
        for path in paths:
            for _, name, index in self._pieces(path):
                counts[name] += index.size
        sizes = dict(zip(self.names, self.sizes, strict=True))
        for name, size in sizes.items():
            if 0 < counts[name] < size:
                raise ValueError(
                    f"the state has velocities for only {counts[name]} of the {size} values of "
                    f"the weight {name}. Keep all params that are made from it, or leave out all."
                )
        return [name for name, size in sizes.items() if counts[name] == size]

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
                    f"to_params reads the weight {error}, but it is given only the params of the "
                    f"optimizer: {join_names(self.shapes)}. Change it so that these are enough."
                ) from error
            error.add_note("Raised in to_params, which is called with a dict of NumPy arrays.")
            raise
        leaves = named_leaves(params)[0]
        return {name: np.asarray(leaf) for name, leaf in leaves}

    def _take_digits(self, sent, first, dtype):
        """Appends one byte to the number of each value."""
        if first:
            self.places = {path: np.zeros(leaf.shape, dtype) for path, leaf in sent.items()}
        for path, leaf in self._same_leaves(sent):
            for at, digits in chunks(leaf):
                digits = self._whole(path, digits, 0, 255)
                places = self.places[path][at]
                places <<= dtype(0 if first else 8)
                places |= digits.astype(dtype)

    def _same_leaves(self, sent):
        """The leaves, if their paths and shapes are the same as in the first call."""
        shapes = {path: places.shape for path, places in self.places.items()}
        for path in {**shapes, **sent}:
            if path not in sent or sent[path].shape != shapes.get(path):
                raise _more_than_moves(path)
        return sent.items()

    def _whole(self, path, digits, low, high):
        """The values as integers, if they are integers from low to high."""
        digits = digits.astype(np.float64)
        whole = (digits == np.rint(digits)) & (digits >= low) & (digits <= high)
        if not whole.all():
            raise _more_than_moves(path)
        return digits.astype(np.int64)

    def _check(self):
        """Turns numbers into positions, and checks that each is in range and used only once."""
        used = np.zeros(self.total, bool)
        for path, places in self.places.items():
            for _, chunk in chunks(places):
                chunk -= chunk.dtype.type(1)  # 0 wraps around, out of range.
                if np.any(chunk >= self.total):
                    raise _more_than_moves(path)
                used[chunk] = True
        if np.count_nonzero(used) == sum(places.size for places in self.places.values()):
            return
        # A position is used twice: find the path for the message.
        used[:] = False
        count = 0
        for path, places in self.places.items():
            for _, chunk in chunks(places):
                used[chunk] = True
            count += places.size
            if np.count_nonzero(used) != count:
                raise _more_than_moves(path)

    def _pieces(self, path):
        """Yields (positions in the flat leaf at a path, weight, positions in the flat weight)."""
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


def chunks(array: np.ndarray) -> Iterator[tuple[Any, np.ndarray]]:
    """Yields views of small parts of an array, each with its index."""
    if not array.ndim or array.size <= _CHUNK:
        yield ..., array[...]
        return
    axis = int(np.argmax(array.shape))
    step = max(1, _CHUNK * array.shape[axis] // array.size)
    for start in range(0, array.shape[axis], step):
        at = (slice(None),) * axis + (slice(start, start + step),)
        yield at, array[at]


def join_names(names: Iterable[str]) -> str:
    """Sorted names or paths, as text for a message."""
    return ", ".join(sorted(name or "the root" for name in names)) or "none"


def _scrambled(index):
    """An integer in [-127, 127] for each index, in pseudo-random order."""
    return (((index + 1) * 2654435761 % 2**32) >> 13) % 255 - 127


def _more_than_moves(path):
    return ValueError(
        f"to_params does more than move values to {path or 'the root'}: it changes, repeats or "
        "creates values there (for example a tied weight, padding or running statistics). For "
        "velocities that may be wrong. Let to_params only rename, reshape, transpose, split and "
        "join."
    )
