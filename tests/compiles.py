"""Counting XLA compilations, for every test that promises a number of them."""

import contextlib
import dataclasses
import itertools
from collections.abc import Iterator

import jax
import jax.monitoring


@dataclasses.dataclass
class Compiles:
    """What XLA compiled: the name of each function, where JAX tells it."""

    names: list[str] = dataclasses.field(default_factory=list)

    @property
    def count(self) -> int:
        """How many programs were compiled."""
        return len(self.names)


_counting: list[Compiles] = []
_sizes = itertools.count(101)


def new_size() -> int:
    """A size that no array has had in this process: what takes one must be compiled."""
    return next(_sizes)


def clear_caches() -> None:
    """Forgets what is compiled; except with JAX 0.7, which corrupts memory after Equinox's jit."""
    if jax.__version_info__ >= (0, 8):
        jax.clear_caches()


def _listen(event: str, duration_secs: float, **kwargs: str | int) -> None:
    del duration_secs
    if event == "/jax/core/compile/backend_compile_duration":
        for compiles in _counting:
            compiles.names.append(str(kwargs.get("fun_name", "")))


# Once and for good: not every supported JAX can take a listener away again.
jax.monitoring.register_event_duration_secs_listener(_listen)


@contextlib.contextmanager
def count_compiles() -> Iterator[Compiles]:
    """Counts what is compiled inside the `with` block.

    Example:
      >>> import jax, numpy as np
      >>> with count_compiles() as compiles:
      ...     twice = jax.jit(lambda x: 2 * x)
      ...     y = twice(np.float32(1)), twice(np.float32(3))
      >>> compiles.count
      1
    """
    compiles = Compiles()
    _counting.append(compiles)
    try:
        yield compiles
    finally:
        _counting[:] = [other for other in _counting if other is not compiles]
