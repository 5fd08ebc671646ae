"""Measures how long the jitted step takes to compile, and what causes a new compilation."""

import gc
import random
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.monitoring
import numpy as np
import optax

import momentum_jax as mj
from benchmarks.step import LEARNING_RATE, MU, OPTAX, OURS, Size, whole_step
from benchmarks.timing import compare, timed


def times(size: Size, repeats: int) -> dict[str, Any]:
    """Measures seconds to trace, lower and compile the donated step, with cold JAX caches.

    Python's garbage collector is off: a full collection takes as long as a stage, and could run
    during one library's tracing and another library's lowering.
    """
    libraries = {"ours": OURS, "optax": OPTAX}
    params, grads = size.arrays(seed=0), size.arrays(seed=1)
    states = {name: tx.init(params) for name, (tx, _) in libraries.items()}
    stages = ("trace", "lower", "compile", "total")
    seconds = {stage: {name: [] for name in libraries} for stage in stages}

    def once(name):
        jax.clear_caches()
        gc.collect()
        step = jax.jit(whole_step(libraries[name]), donate_argnums=(0, 1))
        trace_seconds, traced = timed(step.trace, params, states[name], grads)
        lower_seconds, lowered = timed(traced.lower)
        compile_seconds, _ = timed(lowered.compile)
        took = (trace_seconds, lower_seconds, compile_seconds)
        for stage, value in zip(stages, (*took, sum(took)), strict=True):
            seconds[stage][name].append(value)

    order = list(libraries)
    shuffle = random.Random(0).shuffle
    gc.disable()
    try:
        for _ in range(repeats):
            shuffle(order)
            for name in order:
                once(name)
    finally:
        gc.enable()
    return {stage: compare(seconds[stage], "optax", target=1.0) for stage in stages}


_compiled: list[str] = []


def _listen(event: str, duration_secs: float, **kwargs: str | int) -> None:
    del duration_secs, kwargs
    if event == "/jax/core/compile/backend_compile_duration":
        _compiled.append(event)


def counts() -> dict[str, dict[str, Any]]:
    """Counts the programs that XLA compiles when learning_rate or mu gets a new value.

    The last situation, a new instance inside a new jitted function, causes one compilation with any
    library. It shows that the counter works.
    """
    jax.monitoring.register_event_duration_secs_listener(_listen)
    params = Size("", leaves=2, values=8).arrays(seed=0)

    def new_instance(make, apply_updates, jit):
        def run(learning_rate, mu):
            tx = make(learning_rate, mu)
            jit(whole_step((tx, apply_updates)))(params, tx.init(params), params)

        return run

    def new_instances(jit):
        return {
            "ours": new_instance(mj.momentum, mj.apply_updates, jit),
            "optax": new_instance(optax.sgd, optax.apply_updates, jit),
        }

    def ours_jitted():
        step, state = jax.jit(whole_step(OURS)), OURS[0].init(params)
        return lambda learning_rate, mu: step(
            params, state, params, learning_rate=learning_rate, mu=mu
        )

    def optax_jitted():
        tx = optax.inject_hyperparams(optax.sgd)(LEARNING_RATE, MU)
        step = jax.jit(whole_step((tx, optax.apply_updates)))
        state: Any = tx.init(params)

        def run(learning_rate, mu):
            values = {"learning_rate": np.float32(learning_rate), "momentum": np.float32(mu)}
            step(params, state._replace(hyperparams=state.hyperparams | values), params)

        return run

    return {
        "eager, new instance": _count_each(new_instances(lambda step: step), target=0),
        # We pass the value to update; Optax keeps it in the state with inject_hyperparams.
        "jitted, value as argument": _count_each(
            {"ours": ours_jitted(), "optax": optax_jitted()}, target=0
        ),
        "jitted, new instance inside": _count_each(new_instances(jax.jit)),
    }


def _count_each(
    runs: Mapping[str, Callable[[float, float], object]], target: int | None = None
) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for name, run in runs.items():
        run(LEARNING_RATE, MU)
        before = len(_compiled)
        run(2 * LEARNING_RATE, MU)
        between = len(_compiled)
        run(2 * LEARNING_RATE, MU / 2)
        result[name] = {"learning_rate": between - before, "mu": len(_compiled) - between}
    if target is not None:
        result["target"] = target
        result["reached"] = max(result["ours"].values()) <= target
    return result
