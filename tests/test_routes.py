"""Where `to_params` moves each value: found exactly, in little memory, or refused."""

import tracemalloc
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoints import SETTINGS, fc, load

from momentum_jax.frameworks import dump_torch, load_torch, torch_sgd


def test_joined_and_split_weights():
    """Two weights become one param, and one weight becomes two params."""
    weights = {"q": np.zeros((2, 2)), "k": np.zeros((2, 2)), "both": np.zeros(6)}

    def to_params(weights):
        return {
            "qk": np.concatenate([weights["q"], weights["k"]], axis=1),
            "halves": list(np.split(weights["both"], 2)),
        }

    buffers = {name: np.random.default_rng(0).normal(size=w.shape) for name, w in weights.items()}
    state_dict = {
        "state": {i: {"momentum_buffer": b} for i, b in enumerate(buffers.values())},
        "param_groups": [{**SETTINGS, "params": [0, 1, 2]}],
    }
    params = jax.tree.map(jnp.asarray, to_params(weights))
    tx = torch_sgd(0.5, 0.5)
    state: Any = load_torch(tx.init(params), state_dict, names=list(weights), to_params=to_params)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6),
        state[0].trace,
        to_params(buffers),
    )
    dumped = dump_torch(state, state_dict, names=list(weights), to_params=to_params)
    for i, buffer in enumerate(buffers.values()):
        np.testing.assert_allclose(dumped["state"][i]["momentum_buffer"], buffer, rtol=1e-6)


def test_arrays_larger_than_a_chunk_are_moved_exactly():
    """Params joined from weights of several sizes, one of them empty; numbers of three bytes."""
    weights = {"a": np.zeros((300, 250)), "empty": np.zeros((0, 3)), "b": np.zeros(70_001)}

    def to_params(weights):
        joined = np.concatenate([weights["b"][::-1], weights["a"].T.ravel()])
        return {"first": joined[:100_000], "rest": joined[100_000:], "empty": weights["empty"]}

    generator = np.random.default_rng(0)
    buffers = {n: generator.standard_normal(w.shape).astype("f") for n, w in weights.items()}
    state_dict = {
        "state": {i: {"momentum_buffer": b} for i, b in enumerate(buffers.values())},
        "param_groups": [{**SETTINGS, "params": [0, 1, 2]}],
    }
    arguments: Any = dict(names=list(weights), to_params=to_params)
    tx = torch_sgd(0.5, 0.5)
    state: Any = tx.init(jax.tree.map(jnp.asarray, to_params(weights)))
    state = load_torch(state, state_dict, **arguments)
    jax.tree.map(np.testing.assert_array_equal, state[0].trace, to_params(buffers))
    dumped = dump_torch(state, state_dict, **arguments)["state"]
    for i, buffer in enumerate(buffers.values()):
        np.testing.assert_array_equal(dumped[i]["momentum_buffer"], buffer)


@pytest.mark.parametrize("copies", [False, True])
def test_carrying_over_takes_at_most_16_bytes_per_value(copies):
    """The peak of NumPy's memory, beside the arguments."""
    shapes = {"a": (1000, 700), "b": (500, 300, 2), "c": (1, 100_000)}
    generator = np.random.default_rng(0)
    buffers = [generator.standard_normal(shape, np.float32) for shape in shapes.values()]
    total = sum(buffer.size for buffer in buffers)

    def to_params(weights):
        return {name: np.ascontiguousarray(w.T) if copies else w.T for name, w in weights.items()}

    arguments: Any = dict(names=list(shapes), to_params=to_params)
    state_dict = {
        "state": {i: {"momentum_buffer": b} for i, b in enumerate(buffers)},
        "param_groups": [{**SETTINGS, "params": [0, 1, 2]}],
    }
    tx = torch_sgd(0.5, 0.5)
    weights = dict(zip(shapes, buffers, strict=True))
    state = tx.init(jax.tree.map(jnp.zeros_like, to_params(weights)))

    def peak(carry):
        carry()  # Compiles and imports first, which is not counted.
        tracemalloc.start()
        try:
            result = carry()
            return tracemalloc.get_traced_memory()[1] / total, result
        finally:
            tracemalloc.stop()

    loading, state = peak(lambda: load_torch(state, state_dict, **arguments))
    dumping, dumped = peak(lambda: dump_torch(state, state_dict, **arguments))
    for i, buffer in enumerate(buffers):
        np.testing.assert_array_equal(dumped["state"][i]["momentum_buffer"], buffer)
    # The work is done in chunks, whose temporaries do not grow with the weights.
    assert loading < 16
    assert dumping < 16


def in_place(weights):
    weights["fc.weight"] *= -1
    return fc(weights)


def by_size(weights):
    swap = weights["fc.bias"][0] > weights["fc.bias"][1]
    return {**fc(weights), "bias": weights["fc.bias"][::-1] if swap else weights["fc.bias"]}


def sometimes(weights):
    params = fc(weights)
    return params if weights["fc.bias"][0] < weights["fc.bias"][1] else {"kernel": params["kernel"]}


@pytest.mark.parametrize(
    "to_params",
    [in_place, by_size, sometimes, lambda weights: jax.tree.map(np.abs, fc(weights))],
)
def test_to_params_that_depends_on_values_is_refused(to_params):
    """Also if it moves positive integers correctly."""
    with pytest.raises(ValueError, match="does more than move values"):
        load(to_params=to_params)


def test_an_error_inside_to_params_has_a_note():
    """It keeps its type and its text."""
    with pytest.raises(AttributeError, match="permute") as error:
        load(to_params=lambda weights: weights["fc.weight"].permute(1, 0))
    assert "called with a dict of NumPy arrays" in error.value.__notes__[0]
