"""One step of momentum, by us, by Optax and by PyTorch, and the machine's limit for it."""

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
    """So many arrays of so many float32 values each."""

    name: str
    leaves: int
    values: int

    def arrays(self, seed: int) -> PyTree:
        """Random arrays in two levels of dicts, as the params of a model come."""
        generator = np.random.default_rng(seed)
        return {
            # A copy: JAX may else share NumPy's memory, and memory that is shared is not donated.
            f"layer_{i}": {"kernel": jnp.array(generator.standard_normal(self.values, np.float32))}
            for i in range(self.leaves)
        }


def whole_step(library: Library) -> Callable[..., tuple[PyTree, PyTree]]:
    """The step (params, state, grads) -> (params, state), the same code for both libraries."""
    tx, apply_updates = library

    def step(params, state, grads, **hyperparameters):
        updates, state = tx.update(grads, state, params, **hyperparameters)
        return apply_updates(params, updates), state

    return step


_copy = jax.jit(lambda tree: jax.tree.map(jnp.copy, tree))


class Contestant:
    """A library with params, state and gradients of its own; each step replaces the first two."""

    def __init__(self, library: Library, size: Size) -> None:
        """Every contestant starts from the same values, in other buffers."""
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
        """Calls `update` and `apply_updates` eagerly, and waits for each new params and state."""
        for _ in range(calls):
            self.params, self.state = self.step(self.params, self.state, self.grads)
            jax.block_until_ready((self.params, self.state))

    def jitted_step(self, calls: int) -> None:
        """Calls the jitted step, params and state donated, as a training loop does: one wait.

        Donated steps take no new memory, however many are under way.
        """
        for _ in range(calls):
            self.params, self.state = self.jitted(self.params, self.state, self.grads)
        jax.block_until_ready((self.params, self.state))

    def move(self) -> None:
        """Copies all buffers to new places.

        Donated buffers stay where they are, and a good place in memory (its pages, its
        alignment) would favour one library for the whole run by more than they differ.
        """
        moved = _copy((self.params, self.state, self.grads))
        self.params, self.state, self.grads = jax.block_until_ready(moved)

    def memory(self) -> dict[str, int | None]:
        """Bytes that the state holds, and what the compiled step takes besides."""
        compiled = self.jitted.lower(self.params, self.state, self.grads).compile()
        stats = compiled.memory_analysis()  # Not every backend gives it.
        return {
            "state_bytes": sum(leaf.nbytes for leaf in jax.tree.leaves(self.state)),
            "temp_bytes": getattr(stats, "temp_size_in_bytes", None),
            "output_bytes": getattr(stats, "output_size_in_bytes", None),
            "donated_bytes": getattr(stats, "alias_size_in_bytes", None),
        }


def measure(
    size: Size, rounds: int, sample_seconds: float, torch: Any
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Times and memory of one size, each with its name as soon as it is known."""
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
    # Optax beside itself: a difference smaller than this one's interval cannot be seen here.
    yield "control", paired_ratio(seconds["again"], seconds["optax"])

    yield "memory", {"ours": ours.memory(), "optax": theirs.memory()}
    if torch is not None:
        runs = {kind: torch_step(torch, size, kind) for kind in ("foreach", "fused")}
        seconds = interleave({"ours": ours.jitted_step, **runs}, rounds, sample_seconds, move)
        yield "torch", {kind: compare(seconds, kind) for kind in runs}


def measurement(
    size: Size, rounds: int, sample_seconds: float, target: float | None
) -> dict[str, Any]:
    """`diagnostics.measure`, jitted, beside our jitted step on the same arrays."""
    ours = Contestant(OURS, size)

    @jax.jit
    def measure(grads, state):
        return mj.diagnostics.measure(grads, state.velocity, learning_rate=LEARNING_RATE, mu=MU)

    def run(calls):
        jax.block_until_ready([measure(ours.grads, ours.state) for _ in range(calls)])

    runs = {"ours": run, "step": ours.jitted_step}
    return compare(interleave(runs, rounds, sample_seconds, ours.move), "step", target)


def torch_step(torch: Any, size: Size, kind: str) -> Run:
    """PyTorch's `SGD(foreach=True)` or `SGD(fused=True)`, its gradients set beforehand."""
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
    """What PyTorch calls the kind of device that JAX runs on."""
    platform = jax.devices()[0].platform
    return "cuda" if platform in ("gpu", "cuda", "rocm") else platform


def bandwidth(values: int, rounds: int, sample_seconds: float) -> float:
    """Bytes a second to and from memory: the best of many triads x <- x + s * y, in place.

    A triad reads x and y and writes x: 12 bytes a float32 value. x is donated and so written
    where it was read, like the params and the velocity of a step; an array written elsewhere
    would first be read into the cache, bytes that nobody counts.
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
    """The least time of a step: reads p, g and v, writes p and v, 20 bytes a float32 param.

    Arrays that fit in the cache can be faster than this, which is a limit of the memory.
    """
    return 20 * size.leaves * size.values / bytes_per_second
