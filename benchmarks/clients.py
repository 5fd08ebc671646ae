"""Trains through libraries that take long to install: `python -m benchmarks.clients`.

Each installed library trains a few steps with `optax.sgd`, then with the package's transformations
instead. The params must move, and must end at the same values as with `sgd`: in float32 up to
float32 rounding, in bfloat16 and int8 to within 5% of the largest change. The state must keep its
dtypes. Libraries may be installed in separate environments: the JSON file keeps the results of
libraries that are not installed.
"""

import argparse
import datetime
import importlib.metadata
import json
import pathlib
import platform
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import momentum_jax

mj: Any = momentum_jax  # Avoids casts: Optax types its trees too widely for arithmetic.
RESULT = pathlib.Path(__file__).parent / "results" / "clients.json"
LEARNING_RATE, MU, STEPS = 0.01, 0.5, 5
# By dtype of the velocity: the largest difference of a param / the largest change of any param.
TOLERANCE = {"float32": 1e-4, "bfloat16": 0.05, "int8": 0.05}

TRANSFORMATIONS: dict[str, Callable[[], Any]] = {
    "momentum, float32": lambda: mj.momentum(LEARNING_RATE, MU, velocity_dtype="float32"),
    "trace, float32": lambda: optax.chain(
        mj.trace(MU, velocity_dtype="float32"), optax.scale_by_learning_rate(LEARNING_RATE)
    ),
    "momentum, bfloat16": lambda: mj.momentum(LEARNING_RATE, MU, velocity_dtype="bfloat16"),
    "momentum, int8": lambda: mj.momentum(LEARNING_RATE, MU, velocity_dtype="int8"),
}


def netket(tx: Any) -> tuple[Any, Any]:
    """Finds the ground state of an Ising chain with NetKet.

    Sums over all states: with sampling, the last bit of a param could change the sample.
    """
    import netket as nk  # pyright: ignore[reportMissingImports]

    hilbert = nk.hilbert.Spin(0.5, 8)
    hamiltonian = nk.operator.IsingJax(hilbert, nk.graph.Chain(8), h=1.0)
    model = nk.models.RBM(alpha=64, param_dtype=jnp.float32)
    state = nk.vqs.FullSumState(hilbert, model, seed=0)
    start = state.parameters
    nk.driver.VMC(hamiltonian, tx, variational_state=state).run(
        STEPS, out=nk.logging.RuntimeLog(), show_progress=False
    )
    return start, state.parameters


def tunix(tx: Any) -> tuple[Any, Any]:
    """Trains a bigram model with the PeftTrainer of Tunix."""
    from flax import nnx
    from tunix.sft import peft_trainer  # pyright: ignore[reportMissingImports]

    class Bigrams(nnx.Module):
        def __init__(self, rngs: nnx.Rngs):
            self.embed = nnx.Embed(64, 64, rngs=rngs)
            self.head = nnx.Linear(64, 64, rngs=rngs)

        def __call__(self, tokens: jax.Array) -> jax.Array:
            return self.head(self.embed(tokens))

    def loss(model: Any, tokens: jax.Array, mask: jax.Array) -> jax.Array:
        losses = optax.softmax_cross_entropy_with_integer_labels(
            model(tokens[:, :-1]), tokens[:, 1:]
        )
        return jnp.mean(losses * mask[:, 1:])

    random = np.random.default_rng(0)
    examples = [
        peft_trainer.TrainingInput(random.integers(0, 64, (8, 17)), np.ones((8, 17), np.float32))
        for _ in range(STEPS)
    ]
    model = Bigrams(nnx.Rngs(0))
    start = jax.tree.map(np.array, nnx.to_pure_dict(nnx.state(model, nnx.Param)))
    config = peft_trainer.TrainingConfig(eval_every_n_steps=10 * STEPS, max_steps=STEPS)
    trainer = peft_trainer.PeftTrainer(model, tx, config).with_loss_fn(loss)
    trainer = trainer.with_gen_model_input_fn(
        lambda example: {"tokens": example.input_tokens, "mask": example.input_mask}
    )
    trainer.train(examples)
    return start, nnx.to_pure_dict(nnx.state(model, nnx.Param))


def gpjax(tx: Any) -> tuple[Any, Any]:
    """Fits a sparse Gaussian process by its evidence lower bound, in float64 as GPJax requires."""
    import equinox as eqx
    import gpjax as gpx  # pyright: ignore[reportMissingImports]

    def arrays(model: Any) -> Any:
        return eqx.filter(model, eqx.is_inexact_array)

    with jax.enable_x64(True):
        x = jnp.linspace(-3, 3, 256).reshape(-1, 1)
        prior = gpx.gps.Prior(
            kernel=gpx.kernels.RBF(lengthscale=0.1), mean_function=gpx.mean_functions.Zero()
        )
        family = gpx.variational_families.VariationalGaussian(
            prior * gpx.likelihoods.Gaussian(),
            inducing_inputs=jnp.linspace(-3, 3, 96).reshape(-1, 1),
        )
        fitted, _ = gpx.fit(
            model=family,
            objective=lambda q, data: -1e-4 * gpx.objectives.elbo(q, data),
            train_data=gpx.Dataset(X=x, y=jnp.sin(2 * x)),
            optim=tx,
            num_iters=STEPS,
            verbose=False,
        )
        return arrays(family), arrays(fitted)


def blackjax(tx: Any) -> tuple[Any, Any]:
    """Approximates a normal distribution by mean-field variational inference with BlackJAX."""
    import blackjax as bj  # pyright: ignore[reportMissingImports]

    def log_density(position: Any) -> jax.Array:
        return -0.5 * jnp.sum((position["w"] - 1) ** 2)

    inference = bj.meanfield_vi(log_density, tx, num_samples=4)
    state = inference.init({"w": jnp.zeros((64, 64))})
    start, step = (state.mu, state.rho), jax.jit(inference.step)
    for key in jax.random.split(jax.random.key(0), STEPS):
        state, _ = step(key, state)
    return start, (state.mu, state.rho)


def jax_privacy(tx: Any) -> tuple[Any, Any]:
    """Trains with DP-SGD: per-example clipped gradients, then noise, then the transformation."""
    from jax_privacy import clipped_grad, noise_addition  # pyright: ignore[reportMissingImports]

    def loss(params: Any, x: jax.Array, y: jax.Array) -> jax.Array:
        return jnp.mean((x @ params["kernel"] - y) ** 2)

    random = np.random.default_rng(0)
    x, y = (jnp.asarray(random.normal(size=(16, 64)), jnp.float32) for _ in range(2))
    grads_of = clipped_grad(loss, l2_clip_norm=1.0, batch_argnums=(1, 2), normalize_by=16.0)
    noise = noise_addition.gaussian_privatizer(stddev=0.01, prng_key=jax.random.key(0))
    chain = optax.chain(noise, tx)
    start = params = {"kernel": jnp.asarray(random.normal(size=(64, 64)), jnp.float32)}
    state = chain.init(params)

    @jax.jit
    def step(params: Any, state: Any) -> Any:
        updates, state = chain.update(grads_of(params, x, y), state, params)
        return optax.apply_updates(params, updates), state

    for _ in range(STEPS):
        params, state = step(params, state)
    return start, params


# By distribution: the label in the table, and the function that trains.
CLIENTS: dict[str, tuple[str, Callable[[Any], tuple[Any, Any]]]] = {
    "netket": ("NetKet, `VMC` with `FullSumState`", netket),
    "google-tunix": ("Tunix, `PeftTrainer`", tunix),
    "gpjax": ("GPJax, `fit`", gpjax),
    "blackjax": ("BlackJAX, `meanfield_vi`", blackjax),
    "jax-privacy": ("jax-privacy, DP-SGD", jax_privacy),
}


def watched(tx: Any) -> tuple[Any, list[list[Any]]]:
    """Returns the transformation, and a list of the dtypes of each state that it returns."""
    tx, seen = optax.with_extra_args_support(tx), []

    def noted(state: Any) -> Any:
        seen.append([jnp.asarray(x).dtype for x in jax.tree.leaves(state)])
        return state

    def init(params: Any) -> Any:
        return noted(tx.init(params))

    def update(updates: Any, state: Any, params: Any = None, **extra_args: Any) -> Any:
        updates, state = tx.update(updates, state, params, **extra_args)
        return updates, noted(state)

    return optax.GradientTransformationExtraArgs(init, update), seen


def changes(trained: tuple[Any, Any]) -> list[np.ndarray]:
    """Returns the change of each param."""
    first, last = ([np.asarray(x, np.float64) for x in jax.tree.leaves(tree)] for tree in trained)
    return [b - a for a, b in zip(first, last, strict=True)]


def cell(train: Callable[[Any], tuple[Any, Any]], name: str, by_sgd: list[np.ndarray]) -> str:
    """Trains with this transformation. Returns "ok", or what is wrong."""
    tx, seen = watched(TRANSFORMATIONS[name]())
    try:
        moved = changes(train(tx))
    except Exception as error:
        said = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        return f"refused: {said}" if isinstance(error, TypeError | ValueError) else f"error: {said}"
    if len(seen) < 2 or any(dtypes != seen[0] for dtypes in seen):
        return "error: the state changes its dtypes"
    stored = name.split(", ")[1]
    if not any(dtype == stored for dtype in seen[0]):
        return f"error: no array of the state is {stored}"
    largest = max(np.max(np.abs(x), initial=0) for x in by_sgd)
    apart = max(np.max(np.abs(a - b), initial=0) for a, b in zip(moved, by_sgd, strict=True))
    if largest == 0:
        return "error: no param moved with optax.sgd"
    if not all(map(np.all, map(np.isfinite, moved))):
        return "error: some params are not finite"
    if not any(map(np.any, moved)):
        return "error: no param moved"
    if apart > TOLERANCE[stored] * largest:
        return f"error: differs from optax.sgd by {apart / largest:.1e} of the largest change"
    return "ok"


def measure(distribution: str) -> dict[str, Any]:
    """Returns the results of one installed library."""
    name, train = CLIENTS[distribution]
    try:
        by_sgd = changes(train(optax.sgd(LEARNING_RATE, MU)))
        cells = {each: cell(train, each, by_sgd) for each in TRANSFORMATIONS}
    except Exception as error:
        said = f"error: with optax.sgd: {type(error).__name__}: {error}".splitlines()[0][:200]
        cells = dict.fromkeys(TRANSFORMATIONS, said)
    versions = {each: importlib.metadata.version(each) for each in (distribution, "jax", "optax")}
    return {
        "name": name,
        "date": str(datetime.date.today()),
        "versions": {"python": platform.python_version(), **versions},
        "cells": cells,
    }


def is_installed(distribution: str) -> bool:
    """Returns whether the distribution is installed."""
    try:
        importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def absent(distribution: str) -> dict[str, Any]:
    """Returns the results of a library that was never installed."""
    cells = dict.fromkeys(TRANSFORMATIONS, "not installed")
    return {"name": CLIENTS[distribution][0], "date": None, "versions": {}, "cells": cells}


def table(results: dict[str, Any]) -> str:
    """Returns the second table of docs/works_with.md."""
    lines = [
        "| library | version | JAX, Optax | date | " + " | ".join(TRANSFORMATIONS) + " |",
        "| --- " * (4 + len(TRANSFORMATIONS)) + "|",
    ]
    for distribution, of in results.items():
        has = of["versions"].get
        row = [
            of["name"],
            has(distribution, "-"),
            f"{has('jax', '-')}, {has('optax', '-')}",
            of["date"] or "-",
            *of["cells"].values(),
        ]
        lines.append(f"| {' | '.join(row)} |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    """Trains through each installed library, prints the table and writes the JSON."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.clients", description=__doc__)
    parser.add_argument(
        "--out",
        type=pathlib.Path,
        default=RESULT,
        metavar="FILE",
        help=f"JSON file to update (default: benchmarks/results/{RESULT.name})",
    )
    args = parser.parse_args(arguments)
    before = json.loads(args.out.read_text()) if args.out.exists() else {}
    results = {
        each: measure(each) if is_installed(each) else before.get(each, absent(each))
        for each in CLIENTS
    }
    print(table(results))
    args.out.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
