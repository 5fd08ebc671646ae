"""Tests of `Problem`: refusals, scaling, validation split, state, and `check`."""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from momentum_jax.study.problem import Metric, Problem, check, in_one_line, path_text

KEY = jax.random.key(0)


def bowl(w):
    return jnp.sum(w**2)


def draw(key):
    return jax.random.normal(key, (2,))


def rows(count, width=2):
    return np.random.default_rng(0).normal(size=(count, width)).astype(np.float32)


def leaves(tree):
    return {path_text(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


# Fields.


def test_a_problem_needs_two_functions_only():
    problem = Problem(lambda key: jnp.ones(3), bowl)
    assert problem.data is problem.test_data is problem.validation_data is problem.test_loss is None
    assert problem.loss_cap is problem.curvature is problem.source is problem.scaled is None
    assert problem.metrics == problem.solved == problem.defaults == {}
    assert not problem.stateful
    assert problem.examples == 0
    params, state = problem.start(KEY)
    assert state is None
    assert problem.value_and_state(params, None, None) == (3, None)
    assert problem.evaluate(params, None, None) == {"loss": 3}
    assert problem.with_validation() is problem.for_tuning() is problem
    assert problem.test_examples() is None


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        (dict(test_data=np.zeros(3)), "test_data is given without data"),
        (dict(validation_data=np.zeros(3)), "validation_data is given without data"),
        (dict(solved={"accuracy": 0.5}), r"\['accuracy'\].* there is no metric"),
        (dict(solved={"acuracy": 0.5}, metrics={"accuracy": bowl}), r"metrics are \['accuracy'\]"),
        (dict(metrics={"loss": bowl}), "'loss' is reserved for the results: rename"),
        (dict(metrics={"seed": bowl}), "'seed'"),
        (dict(curvature=0.0), r"curvature=0.0 must be above 0"),
        (dict(data={"x": np.zeros(3), "y": np.zeros(4)}), r"\[3, 4\]"),
        (dict(data=np.zeros(0)), r"\[0\]"),
        (dict(data=1.0), "none"),
        (dict(data={}), "none"),
        (dict(data=np.zeros(3), test_data={"x": np.zeros(3), "y": np.zeros(2)}), "test_data must"),
        (dict(data=np.zeros(3), validation_data=np.zeros(0)), "validation_data must"),
        (dict(defaults=dict(lr=0.1)), r"\['lr'\]"),
        (dict(defaults=dict(batch_size=8)), "batch_size, but there is no data"),
    ],
)
def test_a_field_without_effect_is_refused(fields, says):
    with pytest.raises(ValueError, match=says) as refused:
        Problem(draw, lambda w, batch=None: bowl(w), **fields)
    assert "\n" not in str(refused.value)


def test_a_plain_function_is_a_metric_whose_larger_values_are_better():
    error = Metric(bowl, larger_is_better=False)
    problem = Problem(draw, bowl, {"plain": bowl, "error": error})
    assert problem.metrics == {"plain": Metric(bowl), "error": error}
    assert dataclasses.replace(problem, name="again").metrics == problem.metrics
    assert list(problem.evaluate(jnp.ones(2), None, None)) == ["loss", "plain", "error"]


# Initial scale.

LAYER = {
    "hidden": {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)},
    "norm": [jnp.ones(3), jnp.ones(3, jnp.bfloat16)],
}


def scaled(params, factor=3.0, **fields):
    after = jax.jit(Problem(lambda key: params, lambda w: 0.0, **fields).scale)(params, factor)
    assert jax.tree.map(lambda w: w.dtype, after) == jax.tree.map(lambda w: w.dtype, params)
    return {path: float(leaf.ravel()[0]) for path, leaf in leaves(after).items()}


def test_weights_are_scaled_and_biases_and_normalization_are_not():
    ones = {"hidden/bias": 1, "hidden/kernel": 1, "norm/0": 1, "norm/1": 1}
    assert scaled(LAYER) == ones | {"hidden/kernel": 3}
    assert scaled(LAYER, scaled=lambda path, leaf: True) == dict.fromkeys(ones, 3)
    assert scaled(LAYER, scaled=lambda path, leaf: path == "norm/1") == ones | {"norm/1": 3}
    assert scaled(LAYER, scaled=lambda path, leaf: leaf.shape == (3,))["hidden/kernel"] == 1


def test_all_params_are_scaled_where_there_are_no_weights():
    assert scaled({"w": jnp.ones(2), "x": jnp.ones(())}) == {"w": 3, "x": 3}


def test_scaling_by_1_changes_no_bit_and_is_rounded_once():
    params = {"w": jax.random.normal(KEY, (4, 4)).astype(jnp.bfloat16)}
    problem = Problem(lambda key: params, lambda w: 0.0)
    assert (problem.scale(params, 1.0)["w"] == params["w"]).all()
    expected = (params["w"].astype(jnp.float32) * jnp.float32(1.7)).astype(jnp.bfloat16)
    for factor in 1.7, np.float32(1.7), jnp.float32(1.7):
        assert (problem.scale(params, factor)["w"] == expected).all()


def test_a_choice_of_no_params_is_refused():
    problem = Problem(lambda key: LAYER, lambda w: 0.0, scaled=lambda path, leaf: False, name="odd")
    for refuse in problem.scale, lambda params, factor: check(problem):
        with pytest.raises(ValueError, match=r"scaled of odd is false for all params: .*norm/0"):
            refuse(LAYER, 2.0)


# Validation.


def test_validation_rows_are_held_out_of_the_training_rows_alone():
    data = {"x": np.arange(60), "y": jnp.arange(60.0)}
    test_data = {"x": np.arange(3), "y": rows(3)}
    problem = Problem(draw, lambda w, batch: 0.0, data=data, test_data=test_data)
    split = problem.with_validation()
    train, validation = split.data["x"], split.validation_data["x"]
    assert split.examples == len(train) == 50
    assert sorted([*train, *validation]) == list(range(60))
    assert not (np.diff(validation) == 1).all()  # The held-out rows are not the last rows.
    np.testing.assert_array_equal(split.data["y"], train)  # Inputs and targets stay together.
    np.testing.assert_array_equal(problem.with_validation().data["x"], train)
    assert split.test_data is problem.test_data
    tuned = split.for_tuning()
    assert tuned.test_examples() is split.validation_data
    assert tuned.data is split.data
    assert split.with_validation() is split
    assert problem.with_validation(0.5).examples == 30


def test_tuning_never_falls_back_on_test_rows():
    problem = Problem(draw, lambda w, b: 0.0, data=rows(6), test_data=rows(3), name="six")
    with pytest.raises(ValueError, match=r"six has no validation_data, .* with_validation\(\)"):
        problem.for_tuning()
    for fraction in 0.0, 1.0, -1.0, 0.01:
        with pytest.raises(ValueError, match=f"fraction={fraction} holds out"):
            problem.with_validation(fraction)


# State that is not trained, in Linen and NNX.


class Linen(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        x = nn.Dense(16)(x)
        x = nn.BatchNorm(use_running_average=not train, momentum=0.9)(x)
        return nn.Dense(1)(nn.relu(x))[..., 0]


class NNX(nnx.Module):
    def __init__(self, rngs):
        self.hidden = nnx.Linear(4, 16, rngs=rngs)
        self.norm = nnx.BatchNorm(16, momentum=0.9, rngs=rngs)
        self.out = nnx.Linear(16, 1, rngs=rngs)

    def __call__(self, x, train):
        return self.out(nnx.relu(self.norm(self.hidden(x), use_running_average=not train)))[..., 0]


def in_linen():
    def init(key):
        made = Linen().init(key, jnp.zeros((1, 4)), train=False)
        return made["params"], made["batch_stats"]

    def loss(params, state, batch):
        variables = {"params": params, "batch_stats": state}
        found, new = Linen().apply(variables, batch["x"], train=True, mutable=["batch_stats"])
        return optax.squared_error(found, batch["y"]).mean(), new["batch_stats"]

    def test_loss(params, state, batch):
        variables = {"params": params, "batch_stats": state}
        found: Any = Linen().apply(variables, batch["x"], train=False)
        return optax.squared_error(found, batch["y"]).mean()

    return init, loss, test_loss


def in_nnx():
    def init(key):
        return nnx.split(NNX(nnx.Rngs(key)), nnx.Param, ...)[1:]

    graph = nnx.graphdef(NNX(nnx.Rngs(0)))

    def loss(params, state, batch, train=True):
        net = nnx.merge(graph, params, state)
        value = optax.squared_error(net(batch["x"], train), batch["y"]).mean()
        return value, nnx.state(net, nnx.Not(nnx.Param))

    return init, loss, lambda *args: loss(*args, train=False)[0]


@pytest.mark.slow
@pytest.mark.parametrize("make", [in_linen, in_nnx])
def test_batch_statistics_follow_the_batches_and_are_not_trained(make):
    init, loss, test_loss = make()
    x = 2 + 3 * rows(600, 4)
    data = {"x": x, "y": np.sin(x).sum(axis=1)}
    problem = Problem(init, loss, data=data, test_loss=test_loss, stateful=True)
    check(problem)

    @jax.jit
    @jax.vmap
    def run(key, factor):
        params, state = problem.start(key)
        params = problem.scale(params, factor)

        def step(carry, start):
            batch = jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, start, 60), data)
            slope = jax.value_and_grad(problem.value_and_state, has_aux=True)
            (value, state), grads = slope(carry[0], carry[1], batch)
            return (jax.tree.map(lambda w, g: w - 0.05 * g, carry[0], grads), state), value

        starts = jnp.tile(60 * jnp.arange(10), 8)
        (params, state), losses = jax.lax.scan(step, (params, state), starts)
        return losses, problem.evaluate(params, state, data)["loss"], state, params

    losses, ends, state, params = run(jax.random.split(KEY, 3), jnp.array([0.5, 1.0, 2.0]))
    assert (losses[:, -10:].mean(axis=1) < losses[:, :10].mean(axis=1)).all()
    assert np.isfinite(ends).all()
    # The running statistics approach the statistics of the first layer over all rows.
    first = "hidden" if make is in_nnx else "Dense_0"
    kernel, bias = (leaves(params)[f"{first}/{name}"] for name in ("kernel", "bias"))
    outputs = np.einsum("ni,rio->rno", x, kernel) + bias[:, None]
    mean, variance = (next(w for p, w in leaves(state).items() if n in p) for n in ("mean", "var"))
    np.testing.assert_allclose(mean, outputs.mean(axis=1), atol=0.5)
    np.testing.assert_allclose(variance, outputs.var(axis=1), rtol=0.4)


def test_the_paths_of_linen_and_nnx_read_alike():
    in_linen_, _ = in_linen()[0](KEY)
    params, state = in_nnx()[0](KEY)
    assert "Dense_0/kernel" in leaves(in_linen_)
    assert {"hidden/kernel", "hidden/bias", "norm/scale"} < set(leaves(params))
    assert set(leaves(state)) == {"norm/mean", "norm/var"}


def test_a_stateful_problem_without_a_test_loss_reports_the_training_loss():
    def loss(params, state, batch):
        return params * batch.mean() + state, state + 1

    metrics = {"state": lambda params, state, batch: state}
    problem = Problem(lambda key: (1.0, 2.0), loss, metrics, rows(3), stateful=True)
    found = problem.evaluate(1.0, 2.0, np.ones(3))
    assert found == {"loss": 3.0, "state": 2.0}
    assert problem.value_and_state(1.0, 2.0, np.ones(3)) == (3.0, 3.0)
    without_data = Problem(lambda key: (1.0, 2.0), lambda p, s: (p * s, s), stateful=True)
    assert without_data.evaluate(3.0, 2.0, None) == {"loss": 6.0}


# The function `check`.


def test_functions_that_cannot_be_trained_are_refused_in_one_line():
    def broken(w):
        return jnp.sum(w @ jnp.ones(3))

    counted = {"init": lambda key: {"w": draw(key), "n": jnp.arange(3)}, "loss": lambda p: 0.0}
    for change, message in [
        (
            {"loss": lambda w: w**2},
            r"loss\(params\) of odd must return one float, but returns shape \(2,\) of float32",
        ),
        ({"loss": lambda w: jnp.int32(1)}, r"one float, but returns shape \(\) of int32"),
        ({"loss": lambda w: None}, "one float, but returns NoneType"),
        ({"loss": lambda w: (bowl(w), w)}, "one float, but returns 2 values"),
        ({"loss": broken}, r"loss\(params\) of odd fails: TypeError: dot.*test_problem.py, line"),
        ({"loss": lambda w, batch: bowl(w)}, "fails: TypeError: .* missing 1 required"),
        ({"metrics": {"size": lambda w: w}}, r"size\(params\) of odd must return one number"),
        ({"metrics": {"size": broken}}, r"size\(params\) of odd fails: .*test_problem.py, line"),
        ({"test_loss": lambda w: w}, r"test_loss\(params\) of odd must return one float"),
        ({"data": np.ones((3, 1))}, r"loss\(params, batch\) of odd fails: TypeError"),
        ({"init": lambda key, size: key}, r"init\(key\) of odd fails: TypeError"),
        ({"init": lambda key: ()}, r"init\(key\) of odd must return params, but returns \(\)"),
        (
            counted,
            r"must return floats, but returns int32 at n: numbers that are not trained belong in",
        ),
        ({"scaled": lambda path: True}, r"scaled\(path, leaf\) of odd fails: TypeError"),
    ]:
        odd: Any = Problem(**{"init": draw, "loss": bowl, "name": "odd"} | change)
        with pytest.raises(ValueError, match=message) as refused:
            check(odd)
        assert "\n" not in str(refused.value)
        assert "study/problem.py" not in str(refused.value)  # It is not the user's code.


@pytest.mark.parametrize(
    ("state", "loss", "says"),
    [
        (None, lambda w, s: (bowl(w), s), r"init\(key\) of odd must return \(params, state\)"),
        (1.0, lambda w, s: bowl(w), r"must return \(loss, new_state\) because the problem is"),
        (1.0, lambda w, s: (w, s), "must return one float, but returns shape"),
        (
            {"mean": jnp.ones(2), "var": jnp.ones(2)},
            lambda w, s: (bowl(w), s | {"var": jnp.ones(3)}),
            r"at var it is shape \(3,\) of float32 and was shape \(2,\) of float32",
        ),
        (
            {"mean": jnp.ones(2)},
            lambda w, s: (bowl(w), {"mean": s["mean"].astype(jnp.bfloat16)}),
            "at mean it is .* bfloat16 and was .* float32",
        ),
        (
            {"norm": {"mean": jnp.ones(2)}},
            lambda w, s: (bowl(w), {}),
            r"at norm/mean it is absent and was shape",
        ),
        ([jnp.ones(2)], lambda w, s: (bowl(w), tuple(s)), "its structure is PyTreeDef"),
    ],
)
def test_a_new_state_must_be_like_the_old_one(state, loss, says):
    def init(key):
        return draw(key) if state is None else (draw(key), state)

    with pytest.raises(ValueError, match=says) as refused:
        check(Problem(init, loss, stateful=True, name="odd"))
    assert "\n" not in str(refused.value)


def test_test_and_validation_rows_are_tried_too():
    def loss(w, batch):
        return (batch @ w).sum()

    check(Problem(draw, loss, data=rows(5), test_data=rows(3), validation_data=rows(4)))
    odd: Any
    for odd in {"test_data": rows(5, width=3)}, {"validation_data": rows(5, width=3)}:
        with pytest.raises(ValueError, match=r"loss\(params, batch\) of problem fails"):
            check(Problem(draw, loss, data=rows(5), **odd))


def test_an_error_of_many_lines_is_made_one():
    assert in_one_line(KeyError("a\n\nb")) == r"KeyError: 'a\n\nb'"
    assert in_one_line(ValueError("a\n\n b")) == "ValueError: a b"
    assert len(in_one_line(ValueError("word " * 1000))) < 320
