"""Many runs in one program train just as each would alone, on the same weights and batches."""

import json
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import xarray as xr

import momentum_jax as mj
from momentum_jax.study import Arm, Problem, run, sweep, tune
from momentum_jax.study import arms as make

PLAIN = Arm("plain", mj.momentum, learning_rate=0.05, mu=0.0)
HEAVY = Arm("heavy", mj.momentum, learning_rate=0.05, mu=0.9)
HEAVY_AGAIN = HEAVY.with_settings("heavy again")
AHEAD = Arm("ahead", make.nesterov, learning_rate=0.05, mu=0.9)


@pytest.fixture(scope="module")
def problem():
    """A line through noisy points: data, a metric, and little to compile."""
    x = np.random.default_rng(0).normal(size=(40, 3)).astype(np.float32)
    y = x @ np.array([1, -2, 3], np.float32) + x[:, 0] ** 2

    def loss(w, batch):
        return jnp.mean((batch["x"] @ w - batch["y"]) ** 2)

    def metric(w, batch):
        return jnp.mean(jnp.abs(batch["x"] @ w - batch["y"]) < 1)

    train, test = ({"x": x[rows], "y": y[rows]} for rows in (slice(32), slice(32, None)))
    return Problem(lambda key: jax.random.normal(key, (3,)), loss, metric, train, test=test)


def draw_pair(key):
    return jax.random.normal(key, (2,))


def bowl(w):
    return jnp.sum(jnp.array([1.0, 10.0]) * w**2) / 2


def uneven_bowl() -> Problem:
    """Two params, no data: the least that there can be."""
    return Problem(draw_pair, bowl, name="bowl", solved_loss=0.1)


def counting(examples):
    """Each step of plain descent adds 1 to the param of each example that it sees."""
    return Problem(
        lambda key: jnp.zeros(examples),
        lambda params, batch: -params[batch].sum(),
        lambda params, batch: params.min(),
        np.arange(examples),
    )


def trained_alone(problem, arm, seed, init_scale, steps):
    """The params after each step, in the usual loop."""
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
    # The example that was seen least was seen once at the end of each epoch of four steps.
    np.testing.assert_array_equal(result.metric.values[0, 0, :, 4::4], [[1, 2, 3]] * 2)
    np.testing.assert_array_equal(result.metric.values[0, 0, :, 3], [0, 0])


def test_batches_of_another_size_come_from_the_same_order():
    """The first 8 examples of an epoch are the same, one by one or in two steps of four."""

    def losses(batch_size, steps):
        powers = Problem(
            lambda key: jnp.zeros(()), lambda w, x: w * jnp.sum(x), None, 2.0 ** np.arange(16)
        )
        add = Arm("add", optax.sgd, batch_size=batch_size, learning_rate=1.0)
        return run(powers, [add], seeds=range(3), steps=steps).params.values[0, 0, :, -1, 0]

    np.testing.assert_array_equal(losses(4, 2), losses(8, 1))
    assert len(set(losses(8, 1))) == 3


def test_a_run_with_data_is_the_usual_loop(problem):
    """With the whole training set as its batch, the order of the data plays no role."""
    size = len(problem.data["y"])
    settings: Any = HEAVY.settings
    arms = [
        Arm(arm.name, arm.make_transform, batch_size=size, **settings) for arm in (HEAVY, AHEAD)
    ]
    result = run(problem, arms, seeds=[3], init_scales=[0.5], steps=10)
    for arm in arms:
        path = trained_alone(problem, arm, 3, 0.5, 10)
        for measured, of in ((result.loss, problem.loss), (result.metric, problem.metric)):
            expected = [of(params, problem.test) for params in path]
            np.testing.assert_allclose(
                measured.sel(arm=arm.name).values[0, 0], expected, rtol=2e-4, atol=2e-3
            )


def test_a_run_without_data_is_the_usual_loop():
    """With any transform; its path, its loss and its kinetic energy."""
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


def test_the_transform_is_given_the_loss_and_a_key_of_its_own():
    """A key for each step of each run, the same for all arms; the loss is the batch's."""

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
    arms = [HEAVY, PLAIN, HEAVY_AGAIN]
    result = run(problem, arms, seeds=[0, 1], init_scales=[0.5, 2.0], steps=20)
    heavy, again = (result.loss.sel(arm=name).values for name in ("heavy", "heavy again"))
    np.testing.assert_array_equal(heavy, again)
    assert len(np.unique(heavy[..., -1])) == 4  # yet seeds and scales differ
    assert np.ptp(result.loss.values[..., 0], axis=0).max() == 0


def test_how_runs_are_grouped_does_not_change_them(problem, monkeypatch):
    together = run(problem, [PLAIN, HEAVY], range(5), steps=20)
    monkeypatch.setattr(sweep, "_runs_at_once", lambda *arguments: 8)
    in_pieces = run(problem, [HEAVY, PLAIN], range(5), steps=20)
    np.testing.assert_allclose(together.loss, in_pieces.loss.sel(arm=["plain", "heavy"]), rtol=1e-4)


def test_arms_that_differ_in_numbers_share_a_program():
    arms = [PLAIN, HEAVY, AHEAD, HEAVY.with_settings("light", mu=0.1)]
    assert run(uneven_bowl(), arms, range(3), steps=2).attrs["programs"] == 2


def test_settings_are_coordinates_also_one_for_each_scale():
    by_scale = HEAVY.with_settings("by scale", learning_rate=(0.05, 0.01))
    noisy = Arm("noisy", make.noisy_descent, learning_rate=0.1, noise=0.0)
    result = run(uneven_bowl(), [HEAVY, by_scale, noisy], [0], init_scales=[1.0, 2.0], steps=5)
    np.testing.assert_array_equal(result.mu, [0.9, 0.9, np.nan])
    np.testing.assert_array_equal(result.learning_rate, [[0.05, 0.05], [0.05, 0.01], [0.1, 0.1]])
    heavy, other = (result.loss.sel(arm=name) for name in ("heavy", "by scale"))
    np.testing.assert_array_equal(heavy.sel(init_scale=1), other.sel(init_scale=1))
    assert float(np.abs(heavy - other).sel(init_scale=2).max()) > 0.01


def test_the_best_of_several_tries_starts_anew_on_the_same_number_of_gradients():
    """The first try is the run of the other arms; the last point is the best's."""
    many = Arm("many", mj.momentum, tries=4, learning_rate=0.05, mu=0.0)
    result = run(uneven_bowl(), [PLAIN, many], seeds=range(6), steps=40)
    one, curves = (result.loss.sel(arm=name).values[0] for name in ("plain", "many"))
    np.testing.assert_allclose(curves[:, :10], one[:, :10], rtol=1e-5)
    ends = [curves[:, at] for at in (10, 20, 30)]
    # All that a try of 10 steps leaves of a bowl of curvature 1 and 10 is known.
    left = (result.params.sel(arm="many").values[0, :, -1]) / [0.95**10, 0.5**10]
    np.testing.assert_allclose(
        curves[:, -1], (0.95**20 * left[:, 0] ** 2 + 10 * 0.5**20 * left[:, 1] ** 2) / 2, rtol=1e-3
    )
    assert all((curves[:, -1] <= end + 1e-9).all() for end in ends)
    assert (curves[:, -1] < ends[0]).any()


def test_work_is_split_over_the_devices_without_any_talk(problem):
    program = sweep._Program(problem, HEAVY, evaluations=2, interval=2, runs=16)
    inputs = program._inputs([HEAVY], range(16), [1.0], [(0, 0, seed) for seed in range(16)])
    text = str(program.compiled.lower(*inputs).compile().as_text())
    for collective in ("all-reduce", "all-gather", "all-to-all", "collective-permute"):
        assert collective not in text
    shards = program.compiled(*inputs)["loss"].addressable_shards
    assert [shard.data.shape for shard in shards] == [(2, 3)] * 8


def test_the_loss_on_the_bar_is_that_of_runs_that_diverge_too():
    """Without a warning of an overflow in the middle of the bar."""
    assert sweep._typical(np.array([3e38, 3e38], np.float32)) == np.float32(3e38)
    assert sweep._typical(np.array([np.inf, np.nan, 1], np.float32)) == np.inf


def test_a_diverging_run_is_recorded_and_harms_no_other(problem):
    wild = HEAVY.with_settings("wild", learning_rate=1e6)
    result = run(problem, [HEAVY, wild], seeds=[0, 1], steps=20)
    alone = run(problem, [HEAVY], seeds=[0, 1], steps=20)
    assert not np.isfinite(result.loss.sel(arm="wild").values[..., -1]).any()
    np.testing.assert_allclose(result.loss.sel(arm="heavy"), alone.loss.sel(arm="heavy"), rtol=1e-4)


def test_the_dataset_survives_a_file(tmp_path):
    result = run(uneven_bowl(), [PLAIN, HEAVY], range(3), steps=5)
    result.to_netcdf(tmp_path / "results.nc", engine="scipy")
    xr.testing.assert_identical(xr.load_dataset(tmp_path / "results.nc", engine="scipy"), result)
    assert json.loads(result.attrs["contrasts"]) == [
        {"name": "all arms", "plain": "plain", "arms": ["heavy"]}
    ]
    np.testing.assert_allclose(
        result.landscape.interp(landscape_0=0.5, landscape_1=-0.25), bowl(np.array([0.5, -0.25])),
        rtol=0.05,
    )  # fmt: skip


# Chunks of runs are kept as they end, and a sweep goes on from them.
SETTINGS: dict[str, Any] = dict(seeds=range(20), init_scales=[1.0, 2.0], steps=5)


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(sweep, "_runs_at_once", lambda *arguments: 8)


@pytest.mark.usefixtures("small_chunks")
def test_what_is_there_is_not_trained_again_and_the_rest_is_the_same_to_the_bit(
    tmp_path, monkeypatch
):
    whole = run(uneven_bowl(), [PLAIN, AHEAD], **SETTINGS, folder=tmp_path)
    chunks = sorted(tmp_path.glob("*.npz"))
    assert len(chunks) == 10
    for path in chunks[3:6]:
        path.unlink()
    trained = []
    train = sweep._Program.train
    monkeypatch.setattr(
        sweep._Program, "train", lambda self, *a: trained.append(1) or train(self, *a)
    )
    again = run(uneven_bowl(), [PLAIN, AHEAD], **SETTINGS, folder=tmp_path)
    assert len(trained) == 3
    xr.testing.assert_equal(again, whole)


@pytest.mark.usefixtures("small_chunks")
def test_a_file_that_was_being_written_is_no_chunk(tmp_path):
    whole = run(uneven_bowl(), [PLAIN], **SETTINGS, folder=tmp_path)
    path = tmp_path / "00001.npz"
    (tmp_path / "00001.0.part").write_bytes(path.read_bytes()[:100])
    path.unlink()
    xr.testing.assert_equal(run(uneven_bowl(), [PLAIN], **SETTINGS, folder=tmp_path), whole)
    assert not list(tmp_path.glob("*.part"))


@pytest.mark.usefixtures("small_chunks")
def test_on_fewer_devices_it_goes_on(tmp_path, monkeypatch):
    whole = run(uneven_bowl(), [PLAIN], **SETTINGS, folder=tmp_path)
    (tmp_path / "00002.npz").unlink()
    monkeypatch.setattr(jax, "local_device_count", lambda: 2)
    rest = run(uneven_bowl(), [PLAIN], **SETTINGS, folder=tmp_path)
    np.testing.assert_allclose(rest.loss, whole.loss, rtol=1e-5)


@pytest.mark.parametrize(
    ("change", "differs"),
    [
        ({"arms": [HEAVY]}, "arms"),
        ({"seeds": range(1, 21)}, "seeds"),
        ({"init_scales": [1.0, 3.0]}, "init_scales"),
        ({"steps": 6}, "the functions of the problem and the arms, or steps"),
        (
            {"problem": Problem(draw_pair, lambda w: 2 * bowl(w), name="bowl")},
            "functions of the problem",
        ),
    ],
)
@pytest.mark.usefixtures("small_chunks")
def test_another_sweep_is_refused(tmp_path, change, differs):
    settings = {"problem": uneven_bowl(), "arms": [PLAIN], **SETTINGS}
    run(**settings, folder=tmp_path)
    message = rf"{re.escape(str(tmp_path))} holds chunks of another sweep, .*{differs}"
    with pytest.raises(ValueError, match=message):
        run(**settings | change, folder=tmp_path)


@pytest.mark.usefixtures("small_chunks")
def test_other_data_is_another_sweep(tmp_path):
    problem = counting(24)
    add = Arm("add", optax.sgd, batch_size=6, learning_rate=1.0)
    run(problem, [add], seeds=[0], steps=2, folder=tmp_path)
    problem.data[:2] = problem.data[1::-1]
    with pytest.raises(ValueError, match="differs in data"):
        run(problem, [add], seeds=[0], steps=2, folder=tmp_path)


@pytest.mark.usefixtures("small_chunks")
def test_a_folder_that_cannot_be_written_to():
    with pytest.raises(OSError, match="Not a directory"):
        run(uneven_bowl(), [PLAIN], **SETTINGS, folder=Path("/dev/null/chunks"))


def test_tuning_finds_the_best_rate_of_each_arm_at_each_scale():
    """On a quadratic of curvature 1 the best learning rate after a step is 1, at any scale."""
    flat = Problem(draw_pair, lambda w: jnp.sum(w**2) / 2, name="flat")
    arms = [make.plain(), *make.with_momentum(["0.5"])]
    tuned, found = tune(flat, arms, [0.25, 0.5, 1.0, 1.5], 4, init_scales=[1.0, 3.0], steps=1)
    assert [arm.name for arm in tuned] == ["mu 0, tuned", "mu 0.5, tuned"]
    assert tuned[0].settings == {"mu": 0.0, "learning_rate": (1.0, 1.0)}
    assert tuned[1].settings == {"mu": 0.5, "learning_rate": (0.75, 0.75)}
    assert [row["edge"] for row in found] == [None, None, "highest", "highest"]
    assert found[1] == {"arm": "mu 0", "init_scale": 3.0, "learning_rate": 1.0, "edge": None}


def test_tuning_begins_anew_as_often_as_the_study():
    """At a quarter of the steps the best learning rate is another than at all of them."""

    def loss(w):  # what a step changes by learning_rate: 4 steps of 1/4, or 16 of 1/16
        return w[0]

    def sprint(learning_rate):
        """Is at -1 after 1 / learning_rate steps, and falls back from there."""

        def update(updates, state, params=None):
            forth = jnp.where(state < 1 / learning_rate, -1.0, 1.0)
            return jax.tree.map(lambda g: g * forth * learning_rate, updates), state + 1

        return optax.GradientTransformation(lambda params: 0, update)

    line = Problem(lambda key: jnp.zeros(1), loss, name="line")
    arms = [Arm("once", sprint), Arm("four times", sprint, tries=4)]
    _, found = tune(line, arms, [1 / 16, 1 / 4], 2, steps=16)
    assert [row["learning_rate"] for row in found] == [1 / 16, 1 / 4]


def test_each_try_has_an_equal_part_of_the_steps_however_many_they_are():
    seen = Arm("seen", lambda: optax.scale(-1.0), tries=4)
    line = Problem(lambda key: jnp.zeros(2), lambda w: w.sum(), name="line")
    result = run(line, [seen], seeds=[0], steps=6, evaluations=3)
    assert sweep.rounded(line, [seen], 6) == 8
    np.testing.assert_array_equal(result.step, [0, 2, 4, 6, 8])
    np.testing.assert_array_equal(result.loss.squeeze(), [0, -4, -4, -4, -4])


def test_params_keep_their_dtype():
    def loss(w):
        assert w.dtype == jnp.bfloat16
        return jnp.sum(w**2)

    half = Problem(lambda key: jax.random.normal(key, (3,), jnp.bfloat16), loss, name="half")
    result = run(half, [HEAVY, Arm("sgd", optax.sgd, learning_rate=0.1)], seeds=[0, 1], steps=4)
    assert result.loss.dtype == np.float32
    assert np.isfinite(result.loss).all()


def test_tuning_sees_no_weights_of_the_study(monkeypatch):
    seen = []

    def watched(problem, arms, seeds, **settings):
        seen.extend(seeds)
        return run(problem, arms, seeds, **settings)

    monkeypatch.setattr(sweep, "run", watched)
    tune(uneven_bowl(), [make.plain()], [0.1, 0.2], 5, steps=2)
    assert len(seen) == 5
    assert min(seen) >= sweep.FIRST_TUNING_SEED


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"arms": []}, "unique names, at least one"),
        ({"arms": [PLAIN, PLAIN]}, "unique names"),
        ({"seeds": []}, "must be a sequence of different numbers"),
        ({"seeds": [0, 1, 0]}, "seeds=.* must be a sequence of different numbers"),
        ({"seeds": [-1]}, "must be at least 0"),
        ({"init_scales": [1.0, 1.0]}, "init_scales=.* must be a sequence of different numbers"),
        ({"steps": 0}, "steps=0 must be at least 1"),
        ({"evaluations": -3}, "evaluations=-3 must be at least 1"),
        ({"arms": [Arm("odd", mj.momentum, learning_rat=0.1)]}, "the arm 'odd' fails: TypeError"),
        ({"arms": [Arm("big", mj.momentum, batch_size=33)]}, "at most the number of training"),
        ({"arms": [PLAIN.with_settings("p", mu=(0.1, 0.2))]}, "or one for each of the 1 initial"),
        ({"contrasts": {"odd": ["plain", "other"]}}, "the contrast 'odd' compares"),
        ({"contrasts": {"alone": ["plain"]}}, "must name two or more of the arms"),
    ],
)
def test_refusals(problem, change, message):
    settings: dict[str, Any] = dict(arms=[PLAIN], seeds=[0], steps=2)
    with pytest.raises(ValueError, match=message):
        run(problem, **settings | change)


def test_tuning_needs_a_grid():
    for rates in ([], [0.1], [0.2, 0.1], [0.1, 0.1]):
        with pytest.raises(ValueError, match="two or more different numbers, in rising order"):
            tune(uneven_bowl(), [PLAIN], rates)
