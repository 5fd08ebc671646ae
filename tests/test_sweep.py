"""Tests of `run`: each of many runs trains as it would alone, with paired weights and batches."""

import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import xarray as xr

import momentum_jax as mj
from momentum_jax.study import Arm, Contrast, Primary, Problem, run, sweep, training
from momentum_jax.study import arms as make

pytestmark = pytest.mark.slow

BASELINE = Arm("baseline", mj.momentum, learning_rate=0.05, mu=0.0)
HEAVY = Arm("heavy", mj.momentum, learning_rate=0.05, mu=0.9)
HEAVY_AGAIN = HEAVY.replaced(name="heavy again")
AHEAD = Arm("ahead", make.nesterov, learning_rate=0.05, mu=0.9)


@pytest.fixture(scope="module")
def problem():
    """A linear regression: data, a metric, and short compile times."""
    x = np.random.default_rng(0).normal(size=(40, 3)).astype(np.float32)
    y = x @ np.array([1, -2, 3], np.float32) + x[:, 0] ** 2

    def loss(w, batch):
        return jnp.mean((batch["x"] @ w - batch["y"]) ** 2)

    def near(w, batch):
        return jnp.mean(jnp.abs(batch["x"] @ w - batch["y"]) < 1)

    train, test = ({"x": x[rows], "y": y[rows]} for rows in (slice(32), slice(32, None)))
    return Problem(
        lambda key: jax.random.normal(key, (3,)), loss, {"near": near}, train, test_data=test
    )


def draw_pair(key):
    return jax.random.normal(key, (2,))


def bowl(w):
    return jnp.sum(jnp.array([1.0, 10.0]) * w**2) / 2


def uneven_bowl() -> Problem:
    """A minimal problem: two params, no data."""
    return Problem(draw_pair, bowl, name="bowl", solved={"loss": 0.1})


def counting(examples):
    """Each step at mu 0 adds 1 to the param of each example of its batch."""
    return Problem(
        lambda key: jnp.zeros(examples),
        lambda params, batch: -params[batch].sum(),
        {"least": lambda params, batch: params.min()},
        np.arange(examples),
    )


def trained_alone(problem, arm, seed, init_scale, steps):
    """Computes the params after each step in a Python loop."""
    weights_key, _, _ = jax.random.split(jax.random.fold_in(jax.random.key(seed), 0), 3)
    params = jax.tree.map(lambda w: init_scale * w, problem.init(weights_key))
    examples = () if problem.data is None else (problem.data,)
    tx = arm.make_transform(**arm.settings)
    state = tx.init(params)
    path = [params]
    for _ in range(steps):
        updates, state = tx.update(jax.grad(problem.loss)(params, *examples), state, params)
        params = optax.apply_updates(params, updates)
        path.append(params)
    return path


def test_every_example_is_seen_once_an_epoch():
    add = Arm("add", optax.sgd, batch_size=6, learning_rate=1.0)
    result = run(counting(24), [add], seeds=[0, 1], steps=12, evaluations=12)
    seen = np.arange(13) * 6
    np.testing.assert_array_equal(-result.loss.values[0, 0], [seen, seen])
    # After each epoch of four steps, every example was seen equally often.
    np.testing.assert_array_equal(result.least.values[0, 0, :, 4::4], [[1, 2, 3]] * 2)
    np.testing.assert_array_equal(result.least.values[0, 0, :, 3], [0, 0])


def powers():
    """At mu 0 and learning rate 1, a run ends at minus the sum of the examples that it saw."""
    return Problem(
        lambda key: 0.125 * jax.random.randint(key, (), 0, 8),
        lambda w, x: w * jnp.sum(x),
        {},
        2.0 ** np.arange(16),
    )


def test_batches_of_another_size_come_from_the_same_order():
    """The first 8 examples of an epoch are the same for batches of 1 and of 4."""

    def ends(batch_size, steps):
        add = Arm("add", optax.sgd, batch_size=batch_size, learning_rate=1.0)
        return run(powers(), [add], seeds=range(3), steps=steps).params.values[0, 0, :, -1, 0]

    np.testing.assert_array_equal(ends(4, 2), ends(8, 1))
    assert len(set(ends(8, 1))) == 3


def test_seeds_draw_the_weights_and_order_seeds_the_order():
    add = Arm("add", optax.sgd, batch_size=8, learning_rate=1.0)
    crossed = run(powers(), [add], range(6), range(5), steps=1).params.isel(arm=0, init_scale=0)
    start, seen = crossed.isel(step=0, param=0), crossed.isel(step=0) - crossed.isel(step=1)
    assert dict(start.sizes) == {"seed": 6, "order_seed": 5}
    assert np.ptp(start.values, axis=1).max() == 0  # The order seed does not change the weights.
    assert np.ptp(seen.values, axis=0).max() == 0  # The seed does not change the order.
    assert len(np.unique(start.values)) > 3
    assert len(np.unique(seen.values)) == 5
    # Paired runs are the diagonal of the crossed runs; a single (order) seed is a row or column.
    paired = run(powers(), [add], range(5), steps=1).params.values[0, 0, :, -1, 0]
    np.testing.assert_array_equal(paired, np.diagonal(crossed.values[:5, :, -1, 0]))
    row = run(powers(), [add], [3], range(5), steps=1).params.values[0, 0, 0, :, -1, 0]
    np.testing.assert_array_equal(row, crossed.values[3, :, -1, 0])
    column = run(powers(), [add], range(6), [2], steps=1).params.values[0, 0, :, 0, -1, 0]
    np.testing.assert_array_equal(column, crossed.values[:, 2, -1, 0])


@pytest.mark.parametrize(
    ("seeds", "order_seeds", "design"),
    [
        (range(3), None, "paired"),
        (range(3), range(2), "crossed"),
        (range(3), [0], "weights"),
        ([0], range(3), "order"),
    ],
)
def test_the_design_is_recorded(problem, seeds, order_seeds, design):
    arm = BASELINE.replaced(batch_size=8)
    assert run(problem, [arm], seeds, order_seeds, steps=1).attrs["design"] == design


def test_a_run_with_data_is_the_usual_loop(problem):
    """If a batch is the whole training set, the data order has no effect."""
    size = len(problem.data["y"])
    arms = [arm.replaced(batch_size=size) for arm in (HEAVY, AHEAD)]
    result = run(problem, arms, seeds=[3], init_scales=[0.5], steps=10)
    for arm in arms:
        path = trained_alone(problem, arm, 3, 0.5, 10)
        near = problem.metrics["near"]
        for measured, of in ((result.loss, problem.loss), (result.near, near)):
            expected = [of(params, problem.test_data) for params in path]
            np.testing.assert_allclose(
                measured.sel(arm=arm.name).values[0, 0], expected, rtol=2e-4, atol=2e-3
            )


def test_a_run_without_data_is_the_usual_loop():
    """For any transformation: its path, loss and kinetic energy."""
    adam = Arm("adam", optax.adam, learning_rate=0.1)
    result = run(uneven_bowl(), [HEAVY, adam], seeds=[0, 7], init_scales=[2.0], steps=15)
    assert result.step.values.tolist() == list(range(16))
    for arm in (HEAVY, adam):
        path = np.array(trained_alone(uneven_bowl(), arm, 7, 2.0, 15))
        found = result.sel(arm=arm.name, seed=7, init_scale=2.0)
        np.testing.assert_allclose(found.params, path, rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(found.loss, [bowl(w) for w in path], rtol=1e-4, atol=1e-6)
        rate: Any = arm.settings["learning_rate"]
        kinetic = np.sum(np.diff(path, axis=0) ** 2, axis=1) / (2 * rate)
        np.testing.assert_allclose(found.kinetic_energy, [0, *kinetic], rtol=1e-3, atol=1e-6)


def test_model_state_is_carried_along_and_not_trained():
    """The state is a running mean of the batches, which is known after each step."""
    rows = np.arange(8, dtype=np.float32)

    def loss(w, state, batch):
        return jnp.sum(w**2), 0.5 * state + 0.5 * jnp.mean(batch)

    stateful = Problem(
        lambda key: (jax.random.normal(key, (2, 2)), jnp.zeros(())),
        loss,
        {"running_mean": lambda w, state, batch: state},
        rows,
        test_loss=lambda w, state, batch: jnp.sum(w**2) + state,
        stateful=True,
    )
    arm = BASELINE.replaced(batch_size=8)
    result = run(stateful, [arm], seeds=[0, 1], init_scales=[1.0, 2.0], steps=3)
    means = 3.5 * (1 - 0.5 ** np.arange(4))
    np.testing.assert_allclose(result.running_mean.values, np.broadcast_to(means, (1, 2, 2, 4)))
    weights = result.loss.values - means
    np.testing.assert_allclose(weights[0, 1], 4 * weights[0, 0], rtol=1e-5)
    np.testing.assert_allclose(weights[..., 1], 0.9**2 * weights[..., 0], rtol=1e-5)


def test_the_transform_is_given_the_loss_and_a_key_of_its_own():
    """Each step of a run has its own key, equal for all arms; `value` is the batch loss."""

    def keep(learning_rate):
        def update(updates, state, params=None, **given):
            bits = jax.random.uniform(given["key"])
            return jax.tree.map(lambda g: jnp.stack([given["value"], bits]), updates), state

        return optax.GradientTransformationExtraArgs(lambda params: (), update)

    arms = [Arm(name, keep, learning_rate=1.0) for name in "ab"]
    result = run(uneven_bowl(), arms, seeds=[0, 1], steps=3)
    a, b = (np.diff(result.params.sel(arm=name).values[0], axis=1) for name in "ab")
    np.testing.assert_array_equal(a, b)
    np.testing.assert_allclose(a[..., 0], result.loss.values[0, 0, :, :-1], rtol=1e-4)
    assert len(np.unique(np.round(a[..., 1], 5))) == 6


def test_arms_start_from_the_same_weights_and_see_the_same_batches(problem):
    arms = [HEAVY, BASELINE, HEAVY_AGAIN]
    result = run(problem, arms, seeds=[0, 1], init_scales=[0.5, 2.0], steps=20)
    heavy, again = (result.loss.sel(arm=name).values for name in ("heavy", "heavy again"))
    np.testing.assert_array_equal(heavy, again)
    assert len(np.unique(heavy[..., -1])) == 4  # Seeds and scales still differ.
    assert np.ptp(result.loss.values[..., 0], axis=0).max() == 0


def test_how_runs_are_grouped_does_not_change_them(problem, monkeypatch):
    together = run(problem, [BASELINE, HEAVY], range(5), steps=20)
    monkeypatch.setattr(training, "_runs_at_once", lambda *arguments: 8)
    in_pieces = run(problem, [HEAVY, BASELINE], range(5), steps=20)
    np.testing.assert_allclose(
        together.loss, in_pieces.loss.sel(arm=["baseline", "heavy"]), rtol=1e-4
    )


def test_a_program_that_needs_too_much_memory_trains_fewer_runs_at_once(problem, monkeypatch):
    usual = run(problem, [BASELINE], range(40), steps=5)
    monkeypatch.setattr(training, "MEMORY", 1)
    added = []
    monkeypatch.setattr(sweep.storing.Store, "add", _noting(sweep.storing.Store.add, added))
    spare = run(problem, [BASELINE], range(40), steps=5)
    np.testing.assert_allclose(usual.loss, spare.loss, rtol=1e-4)
    assert max(added) <= 40


def _noting(add, counts):
    def noted(self, keys, arrays):
        counts.append(len(keys))
        return add(self, keys, arrays)

    return noted


def test_arms_that_differ_in_numbers_share_a_program():
    arms = [BASELINE, HEAVY, AHEAD, HEAVY.replaced(name="light", mu=0.1)]
    assert run(uneven_bowl(), arms, range(3), steps=2).attrs["programs"] == 2


def test_a_schedule_that_branches_on_its_settings_needs_them_static():
    def warmup(learning_rate, warmup_steps):
        schedule = optax.warmup_cosine_decay_schedule(0.0, learning_rate, warmup_steps, 20)
        return optax.sgd(schedule)

    traced = Arm("warmup", warmup, learning_rate=0.1, warmup_steps=5)
    with pytest.raises(ValueError, match=r"'warmup' branches on the value.*give static=\(\.\.\.\)"):
        run(uneven_bowl(), [traced], seeds=[0], steps=20)
    static = traced.replaced(static=["learning_rate", "warmup_steps"])
    slow = static.replaced(name="slow", warmup_steps=10)
    result = run(uneven_bowl(), [static, slow], seeds=[0, 1], steps=20)
    assert result.attrs["programs"] == 2  # One program per value.
    np.testing.assert_array_equal(result.warmup_steps, [5, 10])
    path = trained_alone(uneven_bowl(), slow, 1, 1.0, 20)
    np.testing.assert_allclose(result.params.sel(arm="slow", seed=1)[0], path, rtol=1e-4, atol=1e-6)


def test_a_static_learning_rate_may_be_a_schedule():
    schedule = optax.cosine_decay_schedule(0.1, 10)
    arm = Arm("cosine", optax.sgd, static=["learning_rate"], learning_rate=schedule)
    result = run(uneven_bowl(), [arm], seeds=[0, 1], steps=10)
    path = trained_alone(uneven_bowl(), arm, 1, 1.0, 10)
    np.testing.assert_allclose(result.params.sel(seed=1)[0, 0], path, rtol=1e-4, atol=1e-6)
    assert result.kinetic_energy.isnull().all()  # A schedule has no single learning rate.


def test_an_arm_may_take_steps_of_its_own_number():
    """With a linear loss, twice the steps at half the rate end equally, at other steps."""
    line = Problem(draw_pair, lambda w: w.sum(), name="line")
    one = Arm("one", optax.sgd, learning_rate=1.0)
    two = Arm("two", optax.sgd, steps=20, learning_rate=0.5)
    result = run(line, [one, two], seeds=[0], steps=10)
    np.testing.assert_allclose(result.loss[0], result.loss[1], rtol=1e-5)
    np.testing.assert_array_equal(result.step, np.arange(11))
    np.testing.assert_array_equal(result.steps_taken, [np.arange(11), 2 * np.arange(11)])


def test_settings_are_coordinates_also_one_for_each_scale():
    by_scale = HEAVY.replaced(name="by scale", learning_rate=(0.05, 0.01))
    noisy = Arm("noisy", make.noisy_descent, learning_rate=0.1, noise=0.0)
    ahead = make.with_momentum(["nesterov-0.5"])[0].at(0.4)
    arms = [HEAVY, by_scale, noisy, ahead]
    result = run(uneven_bowl(), arms, [0], init_scales=[1.0, 2.0], steps=5)
    np.testing.assert_array_equal(result.mu, [0.9, 0.9, np.nan, 0.5])
    np.testing.assert_array_equal(
        result.learning_rate, [[0.05, 0.05], [0.05, 0.01], [0.1, 0.1], [0.2, 0.2]]
    )
    np.testing.assert_array_equal(result.effective_rate, [0.5, np.nan, 0.1, 0.4])
    np.testing.assert_array_equal(result.nesterov, [0, 0, 0, 1])
    assert result.family.values.tolist() == ["heavy", "by scale", "noisy", "Nesterov 0.5"]
    heavy, other = (result.loss.sel(arm=name) for name in ("heavy", "by scale"))
    np.testing.assert_array_equal(heavy.sel(init_scale=1), other.sel(init_scale=1))
    assert float(np.abs(heavy - other).sel(init_scale=2).max()) > 0.01


def test_the_best_of_several_restarts_takes_the_same_number_of_gradients():
    """The first restart equals the run of the other arms; the last value is the best restart."""
    many = Arm("many", mj.momentum, restarts=4, learning_rate=0.05, mu=0.0)
    result = run(uneven_bowl(), [BASELINE, many], seeds=range(6), steps=40)
    one, curves = (result.loss.sel(arm=name).values[0] for name in ("baseline", "many"))
    np.testing.assert_allclose(curves[:, :10], one[:, :10], rtol=1e-5)
    ends = [curves[:, at] for at in (10, 20, 30)]
    # The result of a restart of 10 steps on this quadratic is known.
    left = (result.params.sel(arm="many").values[0, :, -1]) / [0.95**10, 0.5**10]
    np.testing.assert_allclose(
        curves[:, -1], (0.95**20 * left[:, 0] ** 2 + 10 * 0.5**20 * left[:, 1] ** 2) / 2, rtol=1e-3
    )
    assert all((curves[:, -1] <= end + 1e-9).all() for end in ends)
    assert (curves[:, -1] < ends[0]).any()


def test_each_restart_has_an_equal_part_of_the_steps_however_many_they_are():
    seen = Arm("seen", lambda: optax.scale(-1.0), restarts=4)
    line = Problem(lambda key: 0 * jax.random.normal(key, (2,)), lambda w: w.sum(), name="line")
    result = run(line, [seen], seeds=[0], steps=6, evaluations=3)
    np.testing.assert_array_equal(result.step, [0, 2, 4, 6, 8])
    np.testing.assert_array_equal(result.loss.squeeze(), [0, -4, -4, -4, -4])


def test_what_is_recorded_is_that_of_the_last_weights():
    """On a quadratic with curvatures 1 and 10, all values are known."""
    record = ("gradient_norm", "sharpness", "final_params")
    result = run(uneven_bowl(), [HEAVY], seeds=[0, 1], steps=12, record=record)
    w = result.params.values[0, 0]
    np.testing.assert_allclose(result.sharpness.values, 10.0, rtol=1e-4)
    gradients = np.sqrt(w[..., 0] ** 2 + 100 * w[..., 1] ** 2)
    np.testing.assert_allclose(result.gradient_norm.values[0, 0], gradients, rtol=1e-4)
    np.testing.assert_array_equal(result.final_params.values[0, 0], w[:, -1])
    assert "sharpness" not in run(uneven_bowl(), [HEAVY], seeds=[0], steps=1)


def test_sharpness_is_the_largest_eigenvalue_and_signed():
    """Also if a negative eigenvalue has a larger magnitude, as at a saddle."""
    eigenvalues = jnp.array([-7.0, 1.0, 3.0])
    basis = jnp.linalg.qr(jax.random.normal(jax.random.key(1), (3, 3)))[0]
    matrix = basis @ jnp.diag(eigenvalues) @ basis.T
    found = training.sharpness(lambda w: w["a"] @ matrix @ w["a"] / 2, {"a": jnp.zeros(3)})
    assert float(found) == pytest.approx(3, rel=1e-4)


def test_work_is_split_over_the_devices_without_any_talk(problem):
    program = training.Program(problem, HEAVY, {}, training.Timetable(2, 2), (), 16)
    compiled: Any = program._compile()
    runs = [training.Run(seed, seed, 1.0, HEAVY.settings) for seed in range(16)]
    inputs = (program._examples, *program._inputs(runs))
    text = str(compiled.lower(*inputs).compile().as_text())
    for collective in ("all-reduce", "all-gather", "all-to-all", "collective-permute"):
        assert collective not in text
    shards = compiled(*inputs)["loss"].addressable_shards
    assert [shard.data.shape for shard in shards] == [(2, 3)] * 8


def test_the_loss_on_the_bar_is_that_of_runs_that_diverge_too():
    """The progress bar shows no overflow warning."""
    assert sweep._typical(np.array([3e38, 3e38], np.float32)) == np.float32(3e38)
    assert sweep._typical(np.array([np.inf, np.nan, 1], np.float32)) == np.inf


def test_a_diverging_run_is_recorded_and_harms_no_other(problem):
    wild = HEAVY.replaced(name="wild", learning_rate=1e6)
    result = run(problem, [HEAVY, wild], seeds=[0, 1], steps=20)
    alone = run(problem, [HEAVY], seeds=[0, 1], steps=20)
    assert not np.isfinite(result.loss.sel(arm="wild").values[..., -1]).any()
    np.testing.assert_allclose(result.loss.sel(arm="heavy"), alone.loss.sel(arm="heavy"), rtol=1e-4)


def test_the_dataset_survives_a_file(tmp_path):
    result = run(uneven_bowl(), [BASELINE, HEAVY], range(3), [0, 1][:1], steps=5)
    result.to_netcdf(tmp_path / "results.nc", engine="scipy")
    xr.testing.assert_identical(xr.load_dataset(tmp_path / "results.nc", engine="scipy"), result)
    assert json.loads(result.attrs["contrasts"]) == [
        {"kind": "arms", "baseline": "baseline", "arms": ["heavy"], "rate": None}
    ]
    assert json.loads(result.attrs["primary"]) == {
        "arm": "heavy", "baseline": "baseline", "margin": 0.1
    }  # fmt: skip
    np.testing.assert_allclose(
        result.landscape.interp(landscape_0=0.5, landscape_1=-0.25),
        bowl(np.array([0.5, -0.25])),
        rtol=0.05,
    )


def test_a_metric_that_is_not_finite_is_said(problem):
    def odd(w, batch):
        return jnp.where(w[0] > 0, jnp.nan, 1.0)

    odd_one = Problem(problem.init, problem.loss, {"odd": odd}, problem.data, name="odd")
    result = run(odd_one, [BASELINE.replaced(learning_rate=0.0)], range(8), steps=1)
    count = int(np.isnan(result.odd.isel(step=-1)).sum())
    assert 0 < count < 8
    (note,) = json.loads(result.attrs["notes"])
    assert note.startswith(
        f"The metric odd is not finite in {count} of 8 runs, although their loss"
    )


def test_one_arm_has_no_primary_comparison():
    assert run(uneven_bowl(), [BASELINE], [0], steps=1).attrs["primary"] == "null"
    both = run(uneven_bowl(), [BASELINE, HEAVY], [0], steps=1, contrasts=[])
    assert both.attrs["primary"] == "null"


def test_params_keep_their_dtype():
    def loss(w):
        assert w.dtype == jnp.bfloat16
        return jnp.sum(w**2)

    half = Problem(lambda key: jax.random.normal(key, (3,), jnp.bfloat16), loss, name="half")
    result = run(half, [HEAVY, Arm("sgd", optax.sgd, learning_rate=0.1)], seeds=[0, 1], steps=4)
    assert result.loss.dtype == np.float32
    assert np.isfinite(result.loss).all()


def test_an_init_that_ignores_its_key_is_refused_or_said(problem):
    fixed = Problem(lambda key: jnp.ones(3), problem.loss, {}, problem.data, name="fixed")
    whole, part = BASELINE, BASELINE.replaced(batch_size=8)
    for arm, orders in ((whole, None), (part, [0])):
        with pytest.raises(ValueError, match="same weights for different keys, and there is no"):
            run(fixed, [arm], range(3), orders, steps=1)
    said = json.loads(run(fixed, [part], range(3), steps=1).attrs["notes"])
    assert said == [
        "init(key) of fixed returns the same weights for different keys: only the data order "
        "varies in this study."
    ]
    for seeds in ([0], range(3)):
        with pytest.raises(
            ValueError, match="vary the data order, but problem has no data order: give"
        ):
            run(problem, [whole], seeds, range(3), steps=1)
    assert json.loads(run(problem, [part], range(3), steps=1).attrs["notes"]) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"arms": []}, r"arms=\[\] must be at least one arm"),
        ({"arms": [BASELINE, BASELINE]}, "names must differ"),
        ({"seeds": []}, "must be a sequence of one or more different numbers"),
        ({"seeds": [0, 1, 0]}, "seeds=.* must be a sequence of one or more different numbers"),
        ({"seeds": [-1]}, "must be at least 0"),
        ({"order_seeds": [2**32]}, "order_seeds=.* must be at least 0 and below"),
        ({"order_seeds": []}, "order_seeds=.* must be a sequence of one or more different numbers"),
        ({"init_scales": [0.0]}, "init_scales=.* must be finite and not 0"),
        (
            {"init_scales": [1.0, 1.0]},
            "init_scales=.* must be a sequence of one or more different numbers",
        ),
        ({"steps": 0}, "steps=0 must be at least 1"),
        ({"evaluations": -3}, "evaluations=-3 must be at least 1"),
        (
            {"record": ["loss", "weights"]},
            r"record=\['loss', 'weights'\] is unknown: it may contain",
        ),
        ({"arms": [Arm("odd", mj.momentum, learning_rat=0.1)]}, "the arm 'odd' fails: TypeError"),
        ({"arms": [Arm("big", mj.momentum, batch_size=33)]}, "at most the number of training"),
        ({"arms": [BASELINE.replaced(mu=(0.1, 0.2))]}, "with one number for each of the 1 initial"),
        ({"contrasts": [Contrast("arms", "baseline", ("other",))]}, 'the contrast "arms" names'),
        ({"primary": Primary("baseline", "other")}, "the primary comparison names"),
    ],
)
def test_refusals(problem, change, message):
    settings: dict[str, Any] = dict(arms=[BASELINE], seeds=[0], steps=2)
    with pytest.raises(ValueError, match=message):
        run(problem, **settings | change)
