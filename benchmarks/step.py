"""Measures one step of momentum with this package, Optax and PyTorch, and its minimum time."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import momentum_jax as mj
from benchmarks.timing import Run, compare, interleave, paired_ratio

LEARNING_RATE = 1e-3
MU = 0.9

PyTree = Any
# A transformation, and the function that applies its updates.
Library = tuple[optax.GradientTransformation, Callable[[PyTree, PyTree], PyTree]]

OURS: Library = (mj.momentum(LEARNING_RATE, MU), mj.apply_updates)
OPTAX: Library = (optax.sgd(LEARNING_RATE, MU), optax.apply_updates)


@dataclasses.dataclass(frozen=True)
class Size:
    """A size: `leaves` arrays of `values` float32 values each."""

    name: str
    leaves: int
    values: int

    def arrays(self, seed: int) -> PyTree:
        """Returns random arrays in two levels of dicts, like the params of a model."""
        generator = np.random.default_rng(seed)
        return {
            # Copies: JAX may share memory with NumPy, and shared memory is not donated.
            f"layer_{i}": {"kernel": jnp.array(generator.standard_normal(self.values, np.float32))}
            for i in range(self.leaves)
        }


def whole_step(library: Library) -> Callable[..., tuple[PyTree, PyTree]]:
    """Returns the step (params, state, grads) -> (params, state), with any library."""
    tx, apply_updates = library

    def step(params, state, grads, **hyperparameters):
        updates, state = tx.update(grads, state, params, **hyperparameters)
        return apply_updates(params, updates), state

    return step


_copy = jax.jit(lambda tree: jax.tree.map(jnp.copy, tree))


class Contestant:
    """A library with its own params, state and gradients. A step replaces params and state."""

    def __init__(self, library: Library, size: Size) -> None:
        """Creates the arrays. All contestants start from equal values in separate buffers."""
        self.tx = library[0]
        self.params, self.grads = size.arrays(seed=0), size.arrays(seed=1)
        self.state = self.tx.init(self.params)
        self.step = whole_step(library)
        self.jitted = jax.jit(self.step, donate_argnums=(0, 1))

    def init(self, calls: int) -> None:
        """Calls `init` eagerly."""
        for _ in range(calls):
            jax.block_until_ready(self.tx.init(self.params))

    def eager_step(self, calls: int) -> None:
        """Calls `update` and `apply_updates` eagerly, and waits for the result of each call."""
        for _ in range(calls):
            self.params, self.state = self.step(self.params, self.state, self.grads)
            jax.block_until_ready((self.params, self.state))

    def jitted_step(self, calls: int) -> None:
        """Calls the jitted step with donated params and state, then waits once, as training does.

        Donated steps need no new memory, even with many steps in flight.
        """
        for _ in range(calls):
            self.params, self.state = self.jitted(self.params, self.state, self.grads)
        jax.block_until_ready((self.params, self.state))

    def move(self) -> None:
        """Copies all buffers to new addresses.

        Donated buffers keep their address. A favourable address (pages, alignment) would give one
        library an advantage in the whole run that is larger than the difference between libraries.
        """
        moved = _copy((self.params, self.state, self.grads))
        self.params, self.state, self.grads = jax.block_until_ready(moved)

    def memory(self) -> dict[str, int | None]:
        """Returns the bytes of the state, and the memory that the compiled step uses."""
        compiled = self.jitted.lower(self.params, self.state, self.grads).compile()
        stats = compiled.memory_analysis()  # None on some backends.
        return {
            "state_bytes": sum(leaf.nbytes for leaf in jax.tree.leaves(self.state)),
            "temp_bytes": getattr(stats, "temp_size_in_bytes", None),
            "output_bytes": getattr(stats, "output_size_in_bytes", None),
            "donated_bytes": getattr(stats, "alias_size_in_bytes", None),
        }


def measure(
    size: Size, rounds: int, sample_seconds: float, torch: Any
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Measures times and memory for one size. Yields each result with its name."""
    ours, theirs, again = (Contestant(library, size) for library in (OURS, OPTAX, OPTAX))

    def move():
        for contestant in (ours, theirs, again):
            contestant.move()

    seconds = interleave({"ours": ours.init, "optax": theirs.init}, rounds, sample_seconds, move)
    yield "init", compare(seconds, "optax", target=1.0)

    runs = {"ours": ours.eager_step, "optax": theirs.eager_step}
    seconds = interleave(runs, rounds, sample_seconds, move)
    target = 1 / 5 if size.name in ("60x10k", "300x3k") else None
    yield "eager_step", compare(seconds, "optax", target)

    runs = {"ours": ours.jitted_step, "optax": theirs.jitted_step, "again": again.jitted_step}
    seconds = interleave(runs, rounds, sample_seconds, move)
    yield "jitted_step", compare(seconds, "optax", target=1.02)
    # Control: Optax vs itself. Differences smaller than this interval cannot be detected.
    yield "control", paired_ratio(seconds["again"], seconds["optax"])

    yield "memory", {"ours": ours.memory(), "optax": theirs.memory()}
    if torch is not None:
        runs = {kind: torch_step(torch, size, kind) for kind in ("foreach", "fused")}
        seconds = interleave({"ours": ours.jitted_step, **runs}, rounds, sample_seconds, move)
        yield "torch", {kind: compare(seconds, kind) for kind in runs}


def measurement(
    size: Size, rounds: int, sample_seconds: float, target: float | None
) -> dict[str, Any]:
    """Compares jitted `diagnostics.measure` with our jitted step on the same arrays."""
    ours = Contestant(OURS, size)

    @jax.jit
    def measure(grads, state):
        return mj.diagnostics.measure(grads, state.velocity, learning_rate=LEARNING_RATE, mu=MU)

    def run(calls):
        jax.block_until_ready([measure(ours.grads, ours.state) for _ in range(calls)])

    runs = {"ours": run, "step": ours.jitted_step}
    return compare(interleave(runs, rounds, sample_seconds, ours.move), "step", target)


def torch_step(torch: Any, size: Size, kind: str) -> Run:
    """Returns a run of PyTorch's `SGD(foreach=True)` or `SGD(fused=True)` with fixed gradients."""
    device = torch_device()
    generator = torch.Generator(device).manual_seed(0)

    def normal():
        return torch.randn(size.values, generator=generator, device=device)

    params = [torch.nn.Parameter(normal()) for _ in range(size.leaves)]
    for param in params:
        param.grad = normal()
    optimizer = torch.optim.SGD(params, lr=LEARNING_RATE, momentum=MU, **{kind: True})

    def run(calls):
        for _ in range(calls):
            optimizer.step()
        if device == "cuda":
            torch.cuda.synchronize()

    return run


def torch_device() -> str:
    """Returns PyTorch's name for the kind of device that JAX runs on."""
    platform = jax.devices()[0].platform
    return "cuda" if platform in ("gpu", "cuda", "rocm") else platform


def bandwidth(values: int, rounds: int, sample_seconds: float) -> float:
    """Measures the memory bandwidth in bytes per second: the best of many triads x <- x + s * y.

    A triad reads x and y and writes x: 12 bytes per float32 value. x is donated, so it is written
    in place, like the params and the velocity of a step. An array written to another address would
    first be read into the cache, and these bytes would not be counted.
    """
    triad = jax.jit(lambda x, y: x + 0.5 * y, donate_argnums=0)
    x, y = jnp.zeros(values), jnp.ones(values)

    def run(calls):
        nonlocal x
        for _ in range(calls):
            x = triad(x, y)
        jax.block_until_ready(x)

    return 12 * values / min(interleave({"triad": run}, rounds, sample_seconds)["triad"])


def limit_seconds(size: Size, bytes_per_second: float) -> float:
    """Returns the minimum time of a step, limited by the memory bandwidth.

    A step reads params, gradients and velocity, and writes params and velocity: 20 bytes per
    float32 param. If the arrays fit in the cache, a step can be faster than this.
    """
    return 20 * size.leaves * size.values / bytes_per_second
