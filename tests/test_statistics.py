"""Tests of every statistic against a known answer, or another way to compute it."""

import itertools
import json
import math
from typing import Any

import numpy as np
import pytest
import xarray as xr
from scipy import stats
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.multitest import multipletests

from benchmarks import spread_tests as benchmark
from momentum_jax.study import components, spread_tests, statistics
from momentum_jax.study.statistics import final


def dataset(loss, start: Any = 1.0, accuracy=None, **attrs):
    """Makes a dataset from final losses (arm, init_scale, seed[, order_seed])."""
    loss = np.asarray(loss, np.float32)
    dims = [*("arm", "init_scale", "seed", "order_seed")[: loss.ndim], "step"]

    def variable(values, start):
        values = np.asarray(values, np.float32)
        return dims, np.stack([np.broadcast_to(np.float32(start), values.shape), values], -1)

    variables = {"loss": variable(loss, start)}
    if accuracy is not None:
        variables["accuracy"] = variable(accuracy, 0.1)
        attrs.setdefault("metrics", [{"name": "accuracy", "larger_is_better": True}])
    texts = {name: json.dumps(attrs[name]) for name in ("metrics", "solved") if name in attrs}
    return xr.Dataset(variables, attrs={"loss_cap": math.nan} | attrs | texts)


def correlated(random, shape, law="normal"):
    """Draws normal pairs (..., 2, n) with correlation 0.5, and transforms their distribution."""
    *repeats, n = shape
    normal = (random.normal(size=(*repeats, 1, n)) + random.normal(size=(*repeats, 2, n))) / 2**0.5
    if law == "lognormal":
        return np.exp(normal)
    if law == "a tenth fails":
        failed = normal > stats.norm.ppf(0.9)
        return np.where(failed, 2.3, 0.3 + 0.05 * random.normal(size=normal.shape))
    return normal


# Final values.


def test_a_diverged_run_counts_as_the_cap_and_is_not_solved():
    loss, accuracy = [[[0.5, 5.0, np.nan, np.inf, 0.7]]], [[[0.9, 0.8, 0.9, np.nan, 0.2]]]
    ends = final(dataset(loss, accuracy=accuracy, loss_cap=2.0, solved={"accuracy": 0.5}))
    np.testing.assert_allclose(ends.loss.values.ravel(), [0.5, 2, 2, 2, 0.7])
    np.testing.assert_allclose(ends.accuracy.values.ravel(), [0.9, 0.8, 0.9, 0, 0.2])
    assert ends.diverged.values.ravel().tolist() == [False, False, True, True, False]
    assert ends.solved.values.ravel().tolist() == [True, True, False, False, False]


def test_without_a_cap_a_run_ends_no_worse_than_it_started():
    ends = final(dataset([[[0.5, np.nan, 9.0, np.nan]]], start=[3.0, 4.0, 5.0, np.inf]))
    # An initial loss that is not finite is set to the largest finite one.
    np.testing.assert_allclose(ends.loss.values.ravel(), [0.5, 4, 5, 5])
    assert ends.solved.values.ravel().tolist() == [True, False, True, False]
    assert set(ends) == {"loss", "diverged", "solved"}
    assert np.isfinite(final(dataset([[[np.nan, np.nan]]], start=np.nan)).loss.values).all()


def test_solved_takes_each_limit_in_its_direction_and_the_limit_itself():
    loss, accuracy = [[[0.1, 0.1, 0.2]]], [[[0.9, 0.8, 0.9]]]
    both = final(dataset(loss, accuracy=accuracy, solved={"loss": 0.1, "accuracy": 0.9}))
    assert both.solved.values.ravel().tolist() == [True, False, False]
    error = [{"name": "accuracy", "larger_is_better": False}]
    other = final(dataset(loss, accuracy=accuracy, metrics=error, solved={"accuracy": 0.8}))
    assert other.solved.values.ravel().tolist() == [False, True, False]
    assert final(dataset(loss)).solved.values.all()


def test_a_metric_that_is_not_finite_counts_as_the_worst_seen():
    error = [{"name": "accuracy", "larger_is_better": False}]
    ends = final(dataset([[[1.0, np.nan]]], accuracy=[[[0.3, np.nan]]], metrics=error))
    np.testing.assert_allclose(ends.accuracy.values.ravel(), [0.3, 0.3])


def test_a_dataset_from_disk_ends_alike(tmp_path):
    built = dataset([[[[0.1, np.nan]]], [[[0.2, 0.3]]]], solved={"loss": 0.1})
    built.to_netcdf(tmp_path / "results.nc", engine="scipy")
    read = xr.load_dataset(tmp_path / "results.nc", engine="scipy")
    xr.testing.assert_equal(final(read), final(built))


@pytest.mark.parametrize(
    ("sizes", "expected"), [((5,), (5, 1)), ((5, 1), (5, 1)), ((1, 4), (4, 1)), ((5, 4), (5, 4))]
)
def test_units_are_what_varies(sizes, expected):
    values = np.random.default_rng(0).normal(size=(2, 3, *sizes))
    dims = ["arm", "init_scale", "seed", "order_seed"][: values.ndim]
    found = statistics.units(xr.DataArray(values, dims=dims).transpose(*dims[::-1]))
    np.testing.assert_array_equal(found, values.reshape(2, 3, *expected))


def test_units_have_a_name():
    with_data = xr.Dataset(coords={"batch_size": ("arm", [32])}, attrs={"design": "paired"})
    assert statistics.unit_name(with_data) == "initial weights and data order together"
    assert statistics.unit_name(with_data.drop_vars("batch_size")) == "initial weights"
    assert statistics.unit_name(with_data.assign_attrs(design="crossed")) == "initial weights"
    assert statistics.unit_name(with_data.assign_attrs(design="order")) == "data orders"


# Estimators.


def test_interquartile_mean_of_known_values():
    values = np.array([100.0, 1, 2, 3, 4, 5, 6, -100])
    assert statistics.interquartile_mean(values) == pytest.approx(3.5)


def by_anova(values):
    """Computes (MS_units - MS_interaction) / replicates directly."""
    units, replicates = values.shape
    mean, rows, columns = values.mean(), values.mean(1), values.mean(0)
    of_units = replicates * sum((row - mean) ** 2 for row in rows) / (units - 1)
    rest = sum(
        (values[i, j] - rows[i] - columns[j] + mean) ** 2
        for i in range(units)
        for j in range(replicates)
    )
    return (of_units - rest / ((units - 1) * (replicates - 1))) / replicates


@pytest.mark.parametrize("replicates", [2, 5])
def test_variances_add_up_to_two_way_random_effects(replicates):
    random = np.random.default_rng(1)
    values = random.normal(size=(3, 12, 1)) + random.normal(size=(3, 12, replicates))
    values += random.normal(size=(3, 1, replicates))  # The effect of the order does not enter.
    found = statistics.variances(values).sum(-1)
    np.testing.assert_allclose(found, [by_anova(each) for each in values])
    # Noise does not enter either: without an effect of the weights, the mean estimate is 0.
    noise = statistics.variances(random.normal(size=(2000, 10, replicates))).sum(-1)
    assert abs(noise.mean()) < 4 * noise.std() / 2000**0.5
    assert (noise < 0).mean() > 0.3


def test_std_of_known_values():
    values = np.random.default_rng(2).normal(size=(2, 3, 20, 1))
    found = statistics.log_std(values)
    np.testing.assert_allclose(np.exp(found.value), values.std(2, ddof=1)[..., 0])
    assert np.isnan(statistics.log_std(np.full((8, 1), 0.1)).value)
    alone = np.array([[1.0, -1.0], [-1.0, 1.0], [2.0, -2.0], [-2.0, 2.0]])
    assert np.isnan(statistics.log_std(alone).value)  # The estimated variance is negative.


@pytest.mark.parametrize(
    "statistic",
    [statistics.log_std, statistics.mean, statistics.middle],
    ids=lambda f: f.__name__,
)
@pytest.mark.parametrize("replicates", [1, 3])
def test_influences_are_what_a_unit_more_or_less_changes(statistic, replicates):
    random = np.random.default_rng(3)
    values = random.normal(size=(400, 1)) + 0.3 * random.normal(size=(400, replicates))
    value, influence = statistic(values)
    left_out = [statistic(np.delete(values, unit, 0)).value for unit in range(400)]
    jackknife = 399 * (value - np.array(left_out))
    assert influence.mean() == pytest.approx(0, abs=1e-9)
    assert np.corrcoef(influence, jackknife)[0, 1] > 0.98
    assert influence.std() == pytest.approx(jackknife.std(), rel=0.06)


def test_the_error_of_an_interquartile_mean_is_yuens():
    """Computes Yuen's test for dependent samples from winsorized sums of squares."""
    one, other = correlated(np.random.default_rng(4), (30,))
    found = [statistics.middle(values[:, None]) for values in (one, other)]
    away = found[0].influence - found[1].influence
    error = away.std(ddof=1) / 30**0.5
    cut, kept = 7, 16
    clipped = [np.clip(x, np.sort(x)[cut], np.sort(x)[-cut - 1]) for x in (one, other)]
    square = np.cov(clipped) * 29
    by_hand = ((square[0, 0] + square[1, 1] - 2 * square[0, 1]) / (kept * (kept - 1))) ** 0.5
    assert error == pytest.approx(by_hand)
    assert found[0].value == pytest.approx(stats.trim_mean(one, 0.25))


def test_log_range_has_the_error_of_a_bootstrap():
    random = np.random.default_rng(5)
    values = random.normal(size=(60, 2))
    value, influence = statistics.log_range(values)
    low, high = np.quantile(values, [0.1, 0.9])
    assert value == pytest.approx(math.log(high - low))
    drawn = np.quantile(values[random.integers(0, 60, (4000, 60))], [0.1, 0.9], axis=(1, 2))
    error = influence.std() / len(influence) ** 0.5
    assert error == pytest.approx(np.log(drawn[1] - drawn[0]).std(), rel=0.1)
    assert np.isnan(statistics.log_range(np.r_[np.ones(19), 2.0][:, None]).value)


def test_a_diverged_run_has_the_worst_metric_whatever_its_sign():
    ends = {"loss": [[[[np.nan]], [[1.0]], [[1.0]]]], "r2": [[[[np.nan]], [[-3.0]], [[0.5]]]]}
    dims = ["arm", "init_scale", "seed", "step"]
    metrics = '[{"name": "r2", "larger_is_better": true}]'
    built = xr.Dataset({n: (dims, np.swapaxes(v, 1, 2)) for n, v in ends.items()})
    found = statistics.final(built.assign_attrs(metrics=metrics, loss_cap=5.0)).r2.values.ravel()
    np.testing.assert_array_equal(found, [-3.0, -3.0, 0.5])


# Tests of a ratio of standard deviations.


def brute_t(parts, weights):
    """Computes T from resampled contributions to variances (std, unit) that are all positive."""
    variances = parts.mean(1)
    value = weights @ np.log(variances) / 2
    influence = weights @ (parts / variances[:, None]) / 2
    return abs(value) / (influence.std(ddof=1) / parts.shape[1] ** 0.5)


@pytest.mark.parametrize("scales", [1, 3])
def test_bootstrap_reference_is_that_of_units_drawn_one_by_one(scales):
    values = np.random.default_rng(6).normal(size=(2, scales, 15, 1)) ** 3
    influences = statistics.log_std(values).influence.reshape(-1, 15)
    weights = np.repeat([1.0, -1.0], scales) / scales
    counts = spread_tests.resampled(15, 40)
    brute = []
    for drawn in counts:
        units = np.repeat(np.arange(15), drawn.astype(int))
        brute.append(brute_t(1 + 2 * influences[:, units], weights))
    found = spread_tests.bootstrap_reference(influences, weights, counts)
    np.testing.assert_allclose(found, np.sort(brute), rtol=1e-6)


def test_bootstrap_reference_is_finite_where_a_component_vanishes():
    random = np.random.default_rng(7)
    values = 0.4 * random.normal(size=(2, 20, 1)) + random.normal(size=(2, 20, 2))
    influences = statistics.log_std(values).influence
    counts = spread_tests.resampled(20, 999)
    assert (counts @ (1 + 2 * influences.T) <= 0).any()
    found = spread_tests.bootstrap_reference(influences, np.array([1.0, -1.0]), counts)
    assert np.isfinite(found).all()
    back = spread_tests.bootstrap_reference(influences[::-1], np.array([1.0, -1.0]), counts)
    np.testing.assert_allclose(found, back)


def test_bootstrap_reference_agrees_with_pitman_and_morgan_on_normal_pairs():
    """That test is exact here: equal variances mean that sum and difference are uncorrelated."""
    random = np.random.default_rng(8)
    for scale in (1.0, 1.2):
        baseline, arm = correlated(random, (300,)) * [[1], [scale]]
        _, exact = stats.pearsonr(arm + baseline, arm - baseline)
        value, influence = statistics.log_std(np.stack([arm, baseline])[..., None])
        error = (influence[0] - influence[1]).std(ddof=1) / 300**0.5
        law = spread_tests.bootstrap_reference(
            influence, np.array([1.0, -1]), spread_tests.resampled(300, 4999)
        )
        p = np.mean(law >= abs(value[0] - value[1]) / error)
        assert p == pytest.approx(exact, abs=0.06)


def test_exchange_p_is_that_of_units_swapped_one_by_one():
    random = np.random.default_rng(9)
    arm, baseline = random.normal(size=(2, 2, 9, 1)) * np.array([2, 1])[:, None, None, None]
    swapped = spread_tests.swaps(9, 60)
    away = [values - np.median(values, 1, keepdims=True) for values in (arm, baseline)]

    def ratio(swap):
        moved = swap[None, :, None] > 0
        a, b = np.where(moved, away[1], away[0]), np.where(moved, away[0], away[1])
        return abs(np.log(a.std(1) / b.std(1)).mean())

    extreme = sum(ratio(swap) >= ratio(np.zeros(9)) - 1e-9 for swap in swapped)
    found = spread_tests.exchange_p(arm, baseline, swapped)
    assert found == pytest.approx((1 + extreme) / 61)


def test_exchange_p_of_several_replicates_swaps_the_weights_component():
    random = np.random.default_rng(10)
    arm, baseline = 3 * random.normal(size=(2, 1, 12, 1)) + random.normal(size=(2, 1, 12, 4))
    swapped = spread_tests.swaps(12, 60)
    away = [values - np.median(values, 1, keepdims=True) for values in (arm, baseline)]

    def ratio(swap):
        moved = swap[:, None] > 0
        a, b = np.where(moved, away[1], away[0]), np.where(moved, away[0], away[1])
        each = [max(by_anova(x[0]), 1e-300) for x in (a, b)]
        return abs(np.log(each[0] / each[1]) / 2)

    extreme = sum(ratio(swap) >= ratio(np.zeros(12)) - 1e-9 for swap in swapped)
    assert spread_tests.exchange_p(arm, baseline, swapped) == pytest.approx((1 + extreme) / 61)


@pytest.mark.parametrize("law", ["normal", "lognormal", "a tenth fails"])
def test_the_tests_find_something_in_equal_laws_no_oftener_than_they_say(law):
    random = np.random.default_rng(11)
    studies, units = 200, 50
    counts, swapped = spread_tests.resampled(units, 199), spread_tests.swaps(units, 199)
    found = np.zeros(2)
    for values in correlated(random, (studies, units), law)[..., None]:
        value, influence = statistics.log_std(values)
        error = (influence[0] - influence[1]).std(ddof=1) / units**0.5
        reference = spread_tests.bootstrap_reference(influence, np.array([1.0, -1]), counts)
        found[0] += abs(value[0] - value[1]) > reference[189] * error
        found[1] += spread_tests.exchange_p(values[:1], values[1:], swapped) < 0.05
    # benchmarks/results/spread-tests.json has up to 10% for the first test.
    assert found[0] <= stats.binom.ppf(0.999, studies, 0.1)
    assert found[1] <= stats.binom.ppf(0.999, studies, 0.06)


def test_t_reference_is_students_law():
    reference = spread_tests.t_reference(7.0, 9999)
    assert np.mean(reference >= 2.0) == pytest.approx(2 * stats.t.sf(2.0, 7), abs=2e-4)


# Rescued and lost runs.


@pytest.mark.parametrize(("rescued", "lost"), [(9, 1), (1, 9), (86, 150), (0, 5), (3, 3), (0, 0)])
def test_swap_test_is_mcnemars_exact_test(rescued, lost):
    scores = np.r_[np.ones(rescued), -np.ones(lost), np.zeros(8)]
    exact: Any = mcnemar([[0, rescued], [lost, 0]], exact=True)
    assert statistics.swap_test(scores) == pytest.approx(exact.pvalue)


def test_swap_test_of_several_runs_a_unit_counts_all_swaps():
    scores = np.array([3.0, -1, 2, 0, 2, -4, 1, 3])
    sums = [signs @ scores for signs in np.array(list(itertools.product([-1, 1], repeat=8)))]
    by_hand = np.mean(np.abs(sums) >= abs(scores.sum()))
    assert statistics.swap_test(scores) == pytest.approx(by_hand)


# Bootstrap, proportions and Holm's method.


def test_bootstrap_is_scipys():
    sample = np.random.default_rng(12).exponential(size=50)
    expected = stats.bootstrap(
        (sample,), np.mean, n_resamples=20000, method="BCa", rng=np.random.default_rng(0)
    ).confidence_interval
    found = statistics.bootstrap(np.mean, sample, 20000)
    assert found == pytest.approx(tuple(expected), abs=0.02 * (expected.high - expected.low))


def test_bootstrap_draws_rows_together():
    """Identical runs of a unit count as one run."""
    sample = np.random.default_rng(13).normal(size=40)
    repeated = statistics.bootstrap(np.mean, np.stack([sample] * 5, 1))
    assert repeated == pytest.approx(statistics.bootstrap(np.mean, sample))


def test_bootstrap_of_few_or_equal_values():
    assert np.isnan(statistics.bootstrap(np.mean, np.array([1.0, 2, 3, 4, 5]))).all()
    mostly = np.array([2.0] * 19 + [1.0])
    assert statistics.bootstrap(statistics.interquartile_mean, mostly) == (2, 2)


@pytest.mark.parametrize(
    ("count", "n", "low", "high"),
    [
        # From Newcombe (1998), Two-sided confidence intervals for the single proportion, table I.
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0000, 0.1611),
        (1, 29, 0.0061, 0.1718),
        (20, 20, 0.8389, 1.0000),
    ],
)
def test_proportion_is_wilsons_interval(count, n, low, high):
    assert statistics.proportion(np.arange(n) < count) == pytest.approx((low, high), abs=5e-5)


def test_proportion_of_runs_that_fail_together_counts_units():
    happened = np.arange(30) < 7
    together = np.stack([happened] * 5, 1).mean(1)
    assert statistics.proportion(together) == pytest.approx(statistics.proportion(happened))
    assert np.isnan(statistics.proportion(np.full(10, 0.5))).all()


@pytest.mark.parametrize("chances", [(0.3, 0.5, 0.2), (0.1, 0.8, 0.1), (0.05, 0.05, 0.9)])
def test_proportion_with_ties_covers_the_truth_as_often_as_it_says(chances):
    random = np.random.default_rng(14)
    scores = random.choice([0, 0.5, 1], p=chances, size=(1000, 60))
    truth = chances[1] / 2 + chances[2]
    covered = sum(low <= truth <= high for low, high in map(statistics.proportion, scores))
    assert 0.93 <= covered / 1000 <= 0.99


def test_holm_is_statsmodels():
    ps = np.random.default_rng(15).uniform(size=30) ** 3
    np.testing.assert_allclose(statistics.holm(ps), np.asarray(multipletests(ps, method="holm")[1]))


def test_the_measured_error_rates_in_docstrings_are_those_of_the_benchmark():
    measured = json.loads(benchmark.RESULT.read_text())
    for documented, lines in (
        (spread_tests.bootstrap_reference, benchmark.short_table(measured["tests"])),
        (components.proportions, benchmark.short_components(measured["components"])),
    ):
        for line in lines:
            assert line in str(documented.__doc__)


def test_the_benchmark_measures_what_is_known():
    """Distributions have standard deviation 1, pairs have their ratio, a large gap is found."""
    random = np.random.default_rng(16)
    for law in benchmark.LAWS:
        if law != "t3":
            values = benchmark.of_law(random.normal(size=400_000), law, random)
            assert values.std() == pytest.approx(1, rel=0.03)
    cell = ("normal", "normal", 0.2)
    found = benchmark.chosen_tests(benchmark.study(random, cell, 50, benchmark.ONE, 0.5), 0.2)
    found |= benchmark.other_tests(benchmark.study(random, cell, 50, benchmark.ONE, 0.5), 0.2)
    assert len(found) == 6
    assert all(finds for finds, _ in found.values())
