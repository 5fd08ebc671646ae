"""Many runs in one program train just as each would alone, on the same weights and batches."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from compiles import count_compiles

import momentum_jax as mj
from momentum_jax.study import sweep
from momentum_jax.study.problems import Problem, digits

PLAIN = sweep.Arm("plain", mj.momentum, {"learning_rate": 0.05, "mu": 0.0})
HEAVY = sweep.Arm("heavy", mj.momentum, {"learning_rate": 0.05, "mu": 0.9})
HEAVY_AGAIN = sweep.Arm("heavy again", mj.momentum, {"learning_rate": 0.05, "mu": 0.9})
AHEAD = sweep.Arm("ahead", sweep.NESTEROV, {"learning_rate": 0.05, "mu": 0.9})


@pytest.fixture(scope="module")
def problem():
    return digits(hidden=8)


def counting(examples):
    """Each step of plain descent adds 1 to the param of each example that it sees."""

    def loss(params, batch):
        return -params[batch].sum()

    def least(params, batch):
        return params.min()

    rows = np.arange(examples)
    return Problem(
        "counting",
        lambda key: jnp.zeros(examples),
        loss,
        least,
        rows,
        rows,
        chance=1.0,
        passing=0.0,
    )


ADD = sweep.Arm("add", optax.sgd, {"learning_rate": 1.0})


def test_every_example_is_seen_once_an_epoch():
    result = sweep.run(
        counting(24), [ADD], seeds=[0, 1], init_scales=[1.0], steps=12, batch_size=6, evaluations=12
    )
    seen = np.arange(1, 13) * 6
    np.testing.assert_array_equal(-result.loss.values[0, 0], [seen, seen])
    # The example that was seen least was seen once at the end of each epoch of four steps.
    np.testing.assert_array_equal(result.metric.values[0, 0, :, 3::4], [[1, 2, 3]] * 2)
    np.testing.assert_array_equal(result.metric.values[0, 0, :, 2], [0, 0])


def test_a_run_in_the_sweep_is_the_usual_loop(problem):
    """With the whole training set as its batch, the order of the data plays no role."""
    size = len(problem.train["y"])
    result = sweep.run(
        problem, [HEAVY, AHEAD], seeds=[3], init_scales=[0.5], steps=20, batch_size=size
    )
    for arm, nesterov in (("heavy", False), ("ahead", True)):
        weights_key, _ = jax.random.split(jax.random.key(3))
        params = jax.tree.map(lambda w: 0.5 * w, problem.init(weights_key))
        tx = optax.sgd(0.05, 0.9, nesterov=nesterov)
        state = tx.init(params)
        for step in range(20):
            updates, state = tx.update(jax.grad(problem.loss)(params, problem.train), state)
            params = optax.apply_updates(params, updates)
            loss = problem.loss(params, problem.test)
            np.testing.assert_allclose(result.loss.sel(arm=arm).values[0, 0, step], loss, rtol=1e-4)


def test_arms_start_from_the_same_weights_and_see_the_same_batches(problem):
    result = sweep.run(
        problem,
        [HEAVY, PLAIN, HEAVY_AGAIN],
        seeds=[0, 1],
        init_scales=[0.5, 2.0],
        steps=20,
        batch_size=32,
    )
    heavy, again = (result.loss.sel(arm=name).values for name in ("heavy", "heavy again"))
    np.testing.assert_array_equal(heavy, again)
    assert len(np.unique(heavy[..., -1])) == 4  # yet seeds and scales differ


def test_how_runs_are_grouped_does_not_change_them(problem, monkeypatch):
    settings: dict[str, Any] = dict(seeds=range(5), init_scales=[1.0], steps=20, batch_size=32)
    together = sweep.run(problem, [PLAIN, HEAVY], **settings)
    monkeypatch.setattr(sweep, "_runs_at_once", lambda *arguments: 8)
    in_pieces = sweep.run(problem, [HEAVY, PLAIN], **settings)
    np.testing.assert_allclose(together.loss, in_pieces.loss.sel(arm=["plain", "heavy"]), rtol=1e-4)


def test_settings_share_a_program_and_a_new_structure_makes_one_more(problem):
    settings: dict[str, Any] = dict(seeds=range(3), init_scales=[1.0, 2.0], steps=20, batch_size=32)
    with count_compiles() as first:
        one = sweep.run(problem, [PLAIN, HEAVY], **settings)
    assert one.attrs["programs"] == 1
    with count_compiles() as second:
        two = sweep.run(problem, [PLAIN, HEAVY, AHEAD], **settings)
    assert two.attrs["programs"] == 2
    assert second.count - first.count <= 1


def test_work_is_split_over_the_devices_without_any_talk(problem):
    mesh = jax.make_mesh((8,), ("runs",))
    train = sweep._compile(problem, mj.momentum, 32, 2, 2, mesh)
    ones = np.ones(16, np.float32)
    arguments = np.arange(16), ones, {"learning_rate": ones, "mu": 0 * ones}
    program = str(train.lower(*arguments).compile().as_text())
    for collective in ("all-reduce", "all-gather", "all-to-all", "collective-permute"):
        assert collective not in program
    loss, _ = train(*arguments)
    assert len(loss.sharding.device_set) == 8


def test_a_diverging_run_is_recorded_and_harms_no_other(problem):
    wild = sweep.Arm("wild", mj.momentum, {"learning_rate": 1e6, "mu": 0.99})
    settings: dict[str, Any] = dict(seeds=[0, 1], init_scales=[1.0], steps=40, batch_size=32)
    result = sweep.run(problem, [HEAVY, wild], **settings)
    alone = sweep.run(problem, [HEAVY], **settings)
    assert not np.isfinite(result.loss.sel(arm="wild").values[..., -1]).any()
    np.testing.assert_allclose(result.loss.sel(arm="heavy"), alone.loss.sel(arm="heavy"), rtol=1e-4)


def test_contrasts_equal_the_rate_or_the_effective_rate():
    contrasts = sweep.contrasts(0.05)
    rates = {
        name: [(arm.settings["learning_rate"], arm.settings["mu"]) for arm in arms]
        for name, arms in contrasts.items()
    }
    assert {rate for rate, _ in rates["same learning rate"]} == {0.05}
    for rate, mu in rates["same effective learning rate"]:
        assert rate / (1 - mu) == pytest.approx(0.05)
    for arms in contrasts.values():
        assert [arm.settings["mu"] for arm in arms] == [0, 0.9, 0.99, 0.9]
        assert [arm.make_transform is sweep.NESTEROV for arm in arms] == [False] * 3 + [True]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"arms": []}, "unique names, at least one"),
        ({"arms": [PLAIN, PLAIN]}, "unique names"),
        ({"batch_size": 0}, "batch_size=0 must be between 1 and the 1437"),
        ({"batch_size": 1438}, "batch_size=1438"),
    ],
)
def test_refusals(problem, change, message):
    settings: dict[str, Any] = (
        dict(arms=[PLAIN], seeds=[0], init_scales=[1.0], steps=2, batch_size=4) | change
    )
    with pytest.raises(ValueError, match=message):
        sweep.run(problem, **settings | change)
