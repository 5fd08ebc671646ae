"""The problems are what their docstrings say."""

import jax
import numpy as np
import pytest

from momentum_jax.study.problems import digits


@pytest.fixture(scope="module")
def problem():
    return digits(hidden=16)


def test_digits_are_split_and_standardized(problem):
    train, test = problem.train["x"], problem.test["x"]
    assert train.shape == (1437, 64)
    assert test.shape == (360, 64)
    deviation = train.std(axis=0)
    np.testing.assert_allclose(train.mean(axis=0), 0, atol=1e-5)
    np.testing.assert_allclose(deviation[deviation > 0], 1, atol=1e-4)
    assert set(problem.train["y"]) == set(problem.test["y"]) == set(range(10))
    together = {row.tobytes() for row in np.concatenate([train, test])}
    assert len(together) == 1797  # no image is in both parts


def test_loss_and_accuracy_are_those_of_the_network_by_hand(problem):
    params = problem.init(jax.random.key(0))
    layers = jax.tree.map(np.float64, params["params"])
    x, y = np.float64(problem.test["x"]), problem.test["y"]
    hidden = np.maximum(x @ layers["hidden_layer"]["kernel"] + layers["hidden_layer"]["bias"], 0)
    logits = hidden @ layers["logits"]["kernel"] + layers["logits"]["bias"]
    log_sum = np.log(np.exp(logits).sum(-1))
    loss = (log_sum - logits[np.arange(len(y)), y]).mean()
    assert float(problem.loss(params, problem.test)) == pytest.approx(loss, rel=1e-5)
    assert float(problem.metric(params, problem.test)) == pytest.approx(
        (logits.argmax(-1) == y).mean()
    )


def test_guessing_costs_what_the_problem_says(problem):
    params = jax.tree.map(np.zeros_like, problem.init(jax.random.key(0)))
    assert float(problem.loss(params, problem.test)) == pytest.approx(problem.chance)
