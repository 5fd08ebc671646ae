"""Stores runs on disk, in chunks. A chunk is one file, which is written completely or not at all.

The key of a run is a digest of everything that its result depends on. A folder can therefore be
used again with more seeds or arms: only the missing runs are trained.
"""

import contextlib
import hashlib
import io
import json
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from filelock import FileLock, Timeout
from jax.experimental import multihost_utils

Arrays = dict[str, np.ndarray]
FINGERPRINT = "fingerprint.json"


class Store:
    """The finished runs: in memory, and in a folder if one is given.

    Args:
      folder: the folder of the chunks; None keeps the runs only in memory.
      fingerprint: what must be equal for all runs of a folder, by name.

    Raises:
      ValueError: the runs in the folder have another fingerprint; or there are several processes
        but no folder.

    Warns:
      UserWarning: names each damaged chunk. Its runs count as missing and are trained again.

    Example:
      >>> store = Store(None, {})
      >>> store.add(["a", "b"], {"loss": np.array([[3.0, 1.0], [3.0, 2.0]])})
      >>> "a" in store, store["b"]["loss"].tolist()
      (True, [3.0, 2.0])
    """

    def __init__(self, folder: Path | None, fingerprint: Mapping[str, Any]) -> None:
        """Reads the runs that the folder has."""
        self._folder = folder
        self._rows: dict[str, tuple[Arrays, int]] = {}
        if folder is None:
            if jax.process_count() > 1:
                raise ValueError(
                    f"there are {jax.process_count()} processes, which need a common folder: give "
                    "a folder that all of them can access."
                )
            return
        if jax.process_index() == 0:
            folder.mkdir(parents=True, exist_ok=True)
            for unfinished in folder.glob("*.part"):
                unfinished.unlink()
            if not (folder / FINGERPRINT).exists():
                write_whole(folder / FINGERPRINT, json.dumps(fingerprint).encode())
        wait_for_all()
        stored = read_json(folder / FINGERPRINT)
        if not isinstance(stored, Mapping):
            raise ValueError(f"{folder / FINGERPRINT} is damaged: it is not a JSON object.")
        other = [name for name, value in fingerprint.items() if stored.get(name) != value]
        if other:
            raise ValueError(
                f"{folder} holds runs of another study, which differs in {', '.join(other)}: "
                "use the same as that study, or give another folder."
            )
        self.read()

    def read(self) -> None:
        """Waits until all processes have written their chunks, and reads all chunks."""
        if self._folder is None:
            return
        wait_for_all()
        for path in sorted(self._folder.glob("*.npz")):
            try:
                self._keep(*_read_chunk(path))
            except Exception as error:  # Damaged files raise errors that are not documented.
                path.rename(path.with_suffix(".damaged"))
                warnings.warn(
                    f"{path} is damaged ({type(error).__name__}): its runs will be trained again.",
                    stacklevel=2,
                )
        wait_for_all()

    def _keep(self, keys, arrays):
        self._rows |= {str(key): (arrays, row) for row, key in enumerate(keys)}

    def __contains__(self, key: str) -> bool:
        """Whether the run with this key is finished."""
        return key in self._rows

    def __getitem__(self, key: str) -> Arrays:
        """Returns the results of one run."""
        arrays, row = self._rows[key]
        return {name: values[row] for name, values in arrays.items()}

    def add(self, keys: Sequence[str], arrays: Arrays) -> None:
        """Stores a chunk: arrays with one row per key."""
        self._keep(keys, arrays)
        if self._folder is not None:
            buffer = io.BytesIO()
            named: dict[str, Any] = {"keys": np.array(keys), **arrays}
            np.savez(buffer, **named)
            write_whole(self._folder / f"{digest(*keys)[:16]}.npz", buffer.getvalue())


def _read_chunk(path):
    with open(path, "rb") as file, np.load(file, allow_pickle=False) as chunk:
        arrays = dict(chunk)
    keys = arrays.pop("keys")
    if any(len(values) != len(keys) for values in arrays.values()):
        raise ValueError("the arrays have different lengths")
    return keys, arrays


def digest(*parts: str | bytes) -> str:
    """Returns a short hash of the parts.

    Example:
      >>> digest("a", "b") == digest("ab")
      False
    """
    found = hashlib.sha256()
    for part in parts:
        raw = part.encode() if isinstance(part, str) else part
        found.update(len(raw).to_bytes(8, "big") + raw)
    return found.hexdigest()


def write_whole(path: Path, content: bytes) -> None:
    """Writes a file completely or not at all, even if the power fails.

    Example:
      >>> import tempfile
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     write_whole(Path(folder) / "file", b"content")
      ...     print((Path(folder) / "file").read_bytes())
      b'content'
    """
    unfinished = path.with_suffix(f".{jax.process_index()}.part")
    with open(unfinished, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(unfinished, path)


def read_json(path: Path) -> Any:
    """Reads a JSON file.

    Raises:
      ValueError: the file is damaged. The message is one line that names the file.

    Example:
      >>> import tempfile
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     _ = (Path(folder) / "study.json").write_text("{")
      ...     read_json(Path(folder) / "study.json")  # doctest: +ELLIPSIS
      Traceback (most recent call last):
      ...
      ValueError: ...study.json is damaged: it is not JSON (line 1, column 2).
    """
    try:
        return json.loads(path.read_bytes())
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{path} is damaged: it is not JSON (line {error.lineno}, column {error.colno})."
        ) from None
    except UnicodeDecodeError:
        raise ValueError(f"{path} is damaged: it is not text.") from None


@contextlib.contextmanager
def locked(folder: Path | None) -> Iterator[None]:
    """Locks a folder against other processes; with several hosts, the first process locks it.

    Raises:
      ValueError: another process has locked the folder.

    Example:
      >>> import tempfile
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     with locked(Path(folder)):
      ...         print("mine")
      mine
    """
    if folder is None or jax.process_index() != 0:
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise ValueError(
            f"{folder} is in use by another process: wait until it ends, or give another folder."
        ) from None
    try:
        yield
    finally:
        lock.release()


def wait_for_all() -> None:
    """Waits until all processes have called this; does nothing with one process."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("momentum_jax.study")
