"""Decides which array goes into each place of a per-param array, if any."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from momentum_jax._leaves import ARRAYS, path_text
from momentum_jax._states._matching import PlacesByPath
from momentum_jax._states._places import Place
from momentum_jax._states._report import FRESH, KEPT, RESIZED, TransplantRow
from momentum_jax._states._rules import rules_of
from momentum_jax._storage import Stored, decoded_dtype

# (path, old arrays by path, new shape) -> the array, or None to leave it as it is in the new state.
Resize = Callable[[str, Mapping[str, jax.Array], tuple[int, ...]], Any]


class Transfer(NamedTuple):
    """What goes into the place of a per-param array, and the row of the report.

    Attributes:
      place: the place in the new state.
      row: the row of the report.
      source: the array that goes there; None if the place stays as it is.
      was_velocity: whether the source is stored by a codec.
      made_from: the paths of the params that `resize` made the array from.
    """

    place: Place
    row: TransplantRow
    source: Stored | None = None
    was_velocity: bool = False
    made_from: tuple[str, ...] = ()


class OldArrays(Mapping[str, jax.Array]):
    """The old arrays of one kind by the paths of their params; it notes which ones are read."""

    def __init__(self, places: Mapping[str, Place]) -> None:
        self._places = places
        self.read: list[Place] = []

    def __getitem__(self, path: str) -> jax.Array:
        place = self._places[path]
        self.read.append(place)
        return place.decoded()

    def __contains__(self, path: object) -> bool:
        return path in self._places

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


def transfers_to(
    new_groups: dict[Any, PlacesByPath],
    old_groups: dict[Any, PlacesByPath],
    matches: Mapping[Place, Place],
    resize: bool | Resize,
) -> list[Transfer]:
    """Returns the transfer into each new place of a per-param array."""
    transfers = []
    for meaning, by_path in new_groups.items():
        old_by_path = old_groups.get(meaning, {})
        for path, places in by_path.items():
            old_number = len(old_by_path.get(path, ()))
            for i, place in enumerate(places):
                transfer = _transfer(place, matches.get(place), old_by_path, i, resize)
                if old_number not in (0, len(places)):
                    transfer = _with_note(transfer, f"of {old_number} for {len(places)}")
                transfers.append(transfer)
    return transfers


def keep(new: Place, old: Place) -> Transfer:
    """Returns the transfer of the old array into the new place."""
    old.used = True
    before, after = str(old.values.dtype), str(new.values.dtype)
    notes = [f"{before} -> {after}"] if before != after else []
    if old.held.path != new.param_path:
        notes.append(f"was {old.held.path or 'at the root'}")
    row = TransplantRow(new.param_path, new.label, KEPT, ", ".join(notes))
    return Transfer(new, row, old.held.stored, old.is_velocity)


def can_store(new: Place, old: Place) -> bool:
    """Whether the new place can store the old array.

    Raises:
      TypeError: one is real and the other is complex.
    """
    before, after = _float_dtype(old), _float_dtype(new)
    if jnp.issubdtype(before, jnp.inexact) and jnp.issubdtype(after, jnp.inexact):
        if _is_complex(before) != _is_complex(after):
            raise TypeError(
                f"{new.label} {path_text(new.param_path)} is {before} in the old state, but "
                f"{after} in the new one: a real and a complex array do not mix. Give the state of "
                "init for params of the same kind, or leave the param out."
            )
        return True
    return before == after


def sources_of(transfers: list[Transfer]) -> dict[str, dict[str, None]]:
    """Returns the old paths of what `resize` made each array from, by the new path."""
    sources: dict[str, dict[str, None]] = {}
    for transfer in transfers:
        if transfer.made_from:
            of_path = sources.setdefault(transfer.place.param_path, {})
            of_path.update(dict.fromkeys(transfer.made_from))
    return sources


def _transfer(new, old, old_by_path, index, resize):
    shape = np.shape(new.values)
    row = TransplantRow(new.param_path, new.label, FRESH)
    old_shape = () if old is None else np.shape(old.values)
    if old is not None and old_shape == shape and new.param_shapes == old.param_shapes:
        if can_store(new, old):
            return keep(new, old)
        return Transfer(new, row._replace(note=f"{old.values.dtype} is now {new.values.dtype}"))
    if callable(resize):
        arrays = OldArrays(
            {path: places[min(index, len(places) - 1)] for path, places in old_by_path.items()}
        )
        array = resize(new.param_path, arrays, shape)
        if array is not None:
            return _made_by_resize(new, _check_resized(new, array), arrays.read)
    if old is None:
        return Transfer(new, row)
    note = f"{old_shape} -> {shape}"
    if rules_of(new.node).shapes_have_meaning:
        return Transfer(new, row._replace(note=f"{note}, which means something else"))
    if resize is not True or len(old_shape) != len(shape) or not can_store(new, old):
        return Transfer(new, row._replace(note=note))
    transfer = keep(new, old)
    notes = ", ".join(filter(None, [note, transfer.row.note]))
    return transfer._replace(row=transfer.row._replace(outcome=RESIZED, note=notes))


def _with_note(transfer, note):
    notes = ", ".join(filter(None, [transfer.row.note, note]))
    return transfer._replace(row=transfer.row._replace(note=notes))


def _made_by_resize(new, array, read):
    for place in read:
        place.used = True
    paths = ", ".join(dict.fromkeys(place.held.path for place in read)) or "nothing"
    note = f"resize made {array.shape} from {paths}"
    row = TransplantRow(new.param_path, new.label, RESIZED, note)
    made_from = tuple(place.param_path for place in read)
    return Transfer(new, row, Stored(array), made_from=made_from)


def _check_resized(new, returned):
    """Returns what `resize` returned as an array, or raises an error."""
    where, shape = new.param_path or "the root", np.shape(new.values)
    dtype = _float_dtype(new)
    if not isinstance(returned, ARRAYS):
        raise TypeError(
            f"resize returned {type(returned).__name__} for {where}, but must return an array or "
            f"None. Return an array of shape {shape}, or None to leave it as init made it."
        )
    array = jnp.asarray(returned)
    if array.shape != shape:
        raise ValueError(
            f"resize returned an array of shape {array.shape} for {where}, but must return one of "
            f"shape {shape}, or None to leave it as init made it."
        )
    if _is_complex(array.dtype) != _is_complex(dtype):
        raise TypeError(
            f"resize returned an array of {array.dtype} for {where}, but it is stored as {dtype}: "
            "a real and a complex array do not mix. Return an array of the same kind, or None."
        )
    return array


def _float_dtype(place):
    stored = place.held.stored
    return decoded_dtype(stored) if place.is_velocity else stored.values.dtype


def _is_complex(dtype):
    return jnp.issubdtype(dtype, jnp.complexfloating)
