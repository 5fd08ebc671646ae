"""Every statistic against a case whose answer is known."""

import numpy as np
import pytest
import xarray as xr
from scipy import stats

from momentum_jax.study import statistics
from momentum_jax.study.statistics import bootstrap, interquartile_mean, share, spread


def results(loss, metric=None, arms=("plain", "heavy")):
    """A dataset of final values: arm x seed, at one initial scale and one step."""
    loss = np.asarray(loss, np.float32)
    metric = np.ones_like(loss) if metric is None else np.asarray(metric, np.float32)
    dimensions = ("arm", "init_scale", "seed", "step")
    return xr.Dataset(
        {
            "loss": (dimensions, loss[:, None, :, None]),
            "metric": (dimensions, metric[:, None, :, None]),
        },
        coords={"arm": list(arms[: len(loss)]), "init_scale": [1.0], "step": [10]},
        attrs={"chance": 2.0, "passing": 0.5},
    )


def test_interquartile_mean_and_spread_of_known_values():
    values = np.array([100.0, 1, 2, 3, 4, 5, 6, -100])
    assert interquartile_mean(values) == pytest.approx(3.5)
    assert spread(np.array([1.0, 3.0])) == pytest.approx(np.sqrt(2))


def test_bootstrap_of_a_mean_agrees_with_the_t_interval():
    sample = np.random.default_rng(1).normal(5, 2, size=400)
    estimate = bootstrap(np.mean, sample, resamples=9999)
    low, high = stats.t.interval(0.95, 399, sample.mean(), stats.sem(sample))
    width = high - low
    assert estimate.value == pytest.approx(sample.mean())
    assert estimate.low == pytest.approx(low, abs=0.05 * width)
    assert estimate.high == pytest.approx(high, abs=0.05 * width)


def test_bootstrap_of_a_spread_covers_the_truth_as_often_as_it_says():
    random = np.random.default_rng(2)
    samples = random.normal(0, 3, size=(200, 60))
    estimates = [bootstrap(spread, sample, resamples=500) for sample in samples]
    covered = sum(estimate.low <= 3 <= estimate.high for estimate in estimates)
    # 95% of 200 with binomial noise; BCa at 60 values is known to fall a little short.
    assert 0.88 <= covered / 200 <= 0.99


def test_bootstrap_of_values_that_agree_has_no_width():
    mostly = np.array([2.0] * 19 + [1.0])
    for sample in (np.full(20, 2.0), mostly):
        estimate = bootstrap(interquartile_mean, sample)
        assert (estimate.value, estimate.low, estimate.high) == (2, 2, 2)


def test_share_is_wilsons_interval():
    happened = np.arange(50) < 7
    z, n, p = stats.norm.ppf(0.975), 50, 7 / 50
    middle = (p + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * np.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    estimate = share(happened)
    assert estimate.value == p
    assert (estimate.low, estimate.high) == pytest.approx((middle - half, middle + half))


def test_a_failed_run_counts_and_makes_no_mean_infinite():
    ends = statistics.final(
        results([[0.5, 5.0, np.nan, np.inf, 0.7]], [[0.9, 0.8, 0.1, np.nan, 0.2]])
    )
    np.testing.assert_allclose(ends.loss.values.ravel(), [0.5, 2, 2, 2, 0.7])
    np.testing.assert_allclose(ends.metric.values.ravel(), [0.9, 0.8, 0.1, 0, 0.2])
    assert ends.failed.values.ravel().tolist() == [False, False, True, True, True]


def test_summary_has_a_row_for_each_arm_and_scale():
    random = np.random.default_rng(3)
    loss = random.uniform(0, 1, size=(2, 30))
    plain, heavy = statistics.summarize(results(loss))
    assert (plain["arm"], heavy["arm"]) == ("plain", "heavy")
    assert heavy["loss"]["mean"].value == pytest.approx(loss[1].mean(), rel=1e-6)
    assert heavy["loss"]["spread"].value == pytest.approx(loss[1].std(ddof=1), rel=1e-6)
    assert heavy["metric"]["mean"].value == 1
    assert plain["failed"].value == 0


def ratio(loss):
    estimate = statistics.spread_ratio(results(loss), "heavy", "plain", 1.0)
    assert estimate is not None
    return estimate


def test_spread_ratio_of_known_values():
    start = np.random.default_rng(4).uniform(0, 0.5, size=40)
    same = ratio([start, start])
    half = ratio([start, 1 + start / 2])
    assert (same.value, same.low, same.high) == (1, 1, 1)
    assert (half.value, half.low, half.high) == pytest.approx((0.5, 0.5, 0.5), rel=1e-5)
    alike = results([start, np.full(40, 0.3)])
    assert statistics.spread_ratio(alike, "heavy", "plain", 1.0) is None


def test_spread_ratio_finds_nothing_where_there_is_nothing():
    """Two arms drawn alike, correlated as paired runs are: about 5% false findings."""
    random = np.random.default_rng(5)
    repeats = 300
    shared, own = random.normal(size=(repeats, 1, 50)), random.normal(size=(repeats, 2, 50))
    found = 0
    for loss in 1 + 0.1 * (shared + own):
        estimate = ratio(loss)
        found += not estimate.low <= 1 <= estimate.high
    # 99.9% of binomials with 5% stay below 29 of 300; BCa adds a little at 50 values.
    assert 3 <= found <= 30
