"""Every statistic against a case whose answer is known, and the study against a null."""

import dataclasses
import itertools
import json
from typing import Any

import numpy as np
import pytest
import xarray as xr
from scipy import stats
from statsmodels.stats.multitest import multipletests

from momentum_jax.study import statistics
from momentum_jax.study.statistics import Estimate, final, interquartile_mean, spread

# Whether a bound is None is for the tests to find out, not for the type checker.
bootstrap: Any = statistics.bootstrap
share: Any = statistics.share
spread_ratio: Any = statistics.spread_ratio
summarize: Any = statistics.summarize

DIMENSIONS = ("arm", "init_scale", "seed", "step")


def study(loss, metric=None, start: Any = 1.0, contrasts=None, **limits):
    """A dataset of (arm, init_scale, seed) final values; every arm against the first."""
    loss = np.asarray(loss, np.float32)
    arms = [f"arm {place}" for place in range(len(loss))]

    def variable(values, start):
        values = np.asarray(values, np.float32)
        return DIMENSIONS, np.stack([np.broadcast_to(np.float32(start), values.shape), values], -1)

    if contrasts is None:
        contrasts = [{"name": "same", "plain": arms[0], "arms": arms[1:]}]
    return xr.Dataset(
        {"loss": variable(loss, start)}
        | ({} if metric is None else {"metric": variable(metric, 0.1)}),
        coords={
            "arm": arms,
            "init_scale": 2.0 ** np.arange(loss.shape[1]),
            "seed": np.arange(loss.shape[2]),
            "step": [0, 10],
        },
        attrs={"worst": np.nan, "solved_loss": np.nan, "solved_metric": np.nan}
        | limits
        | {"contrasts": json.dumps(contrasts)},
    )


def compare(arm, plain, resamples=499, **limits):
    """The one comparison of a study of two arms at one initial scale."""
    dataset = study(np.array([plain, arm])[:, None], **{"start": 1e6, **limits})
    [comparison] = summarize(dataset, resamples=resamples).comparisons
    return comparison


def bounds(estimate):
    return estimate.low, estimate.high


def correlated(random, shape, law):
    """Pairs (..., 2, n) that share half of their variance, before a law is applied."""
    *repeats, n = shape
    normal = (random.normal(size=(*repeats, 1, n)) + random.normal(size=(*repeats, 2, n))) / 2**0.5
    if law == "lognormal":
        return np.exp(normal)
    if law == "a tenth fails":
        failed = normal > stats.norm.ppf(0.9)
        return np.where(failed, 2.3, 0.3 + 0.05 * random.normal(size=normal.shape))
    return normal


def test_estimates_print_three_digits_and_what_is_undefined():
    printed = [
        str(Estimate(v, low, 2 * v)) for v, low in [(0.5, 0.0), (1.234e-5, 1e-5), (123.0, 9.0)]
    ]
    assert printed == ["0.500 [0.00, 1.00]", "1.23e-05 [1.00e-05, 2.47e-05]", "123 [9.00, 246]"]
    assert str(Estimate(2.0)) == "2.00 [undefined]"
    assert str(Estimate(None)) == "undefined"


def test_interquartile_mean_and_spread_of_known_values():
    values = np.array([100.0, 1, 2, 3, 4, 5, 6, -100])
    assert interquartile_mean(values) == pytest.approx(3.5)
    assert spread(np.array([1.0, 3.0])) == pytest.approx(np.sqrt(2))


# The bootstrap.


def test_bootstrap_of_a_mean_agrees_with_the_t_interval():
    sample = np.random.default_rng(1).normal(5, 2, size=400)
    estimate = bootstrap(np.mean, sample, resamples=9999)
    low, high = stats.t.interval(0.95, 399, sample.mean(), stats.sem(sample))
    width = high - low
    assert estimate.value == pytest.approx(sample.mean())
    assert bounds(estimate) == pytest.approx((low, high), abs=0.05 * width)


def test_bootstrap_is_scipys():
    sample = np.random.default_rng(2).exponential(size=50)
    expected = stats.bootstrap(
        (sample,), spread, n_resamples=999, method="BCa", rng=np.random.default_rng(0)
    ).confidence_interval
    assert bounds(bootstrap(spread, sample, resamples=999)) == pytest.approx(tuple(expected))


def test_bootstrap_draws_pairs_together():
    sample = np.random.default_rng(3).normal(size=40)
    shift = bootstrap(
        lambda a, b, axis: np.mean(a, axis) - np.mean(b, axis), sample + 1, sample, resamples=99
    )
    assert (shift.value, *bounds(shift)) == pytest.approx((1, 1, 1))


def test_bootstrap_draws_rows_together():
    """Runs of a seed that repeat each other are no more evidence than one of them."""
    sample = np.random.default_rng(4).normal(size=40)
    repeated = bootstrap(np.mean, np.stack([sample] * 5, 1), resamples=999)
    once = bootstrap(np.mean, sample, resamples=999)
    assert dataclasses.astuple(repeated) == pytest.approx(dataclasses.astuple(once))


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


def test_bootstrap_of_few_values_has_no_interval():
    assert bootstrap(np.mean, np.array([1.0, 2, 3, 4, 5])) == Estimate(3.0)
    assert bootstrap(np.mean, np.array([1.0, 2, 3, 4, 5, 6])).low is not None


# Shares.


@pytest.mark.parametrize(
    ("count", "n", "low", "high"),
    [
        # Newcombe (1998), Two-sided confidence intervals for the single proportion, table I.
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0000, 0.1611),
        (1, 29, 0.0061, 0.1718),
        (20, 20, 0.8389, 1.0000),
    ],
)
def test_share_is_wilsons_interval(count, n, low, high):
    estimate = share(np.arange(n) < count)
    assert estimate.value == pytest.approx(count / n)
    assert bounds(estimate) == pytest.approx((low, high), abs=5e-5)


def test_share_of_runs_that_fail_together_counts_seeds():
    happened = np.arange(30) < 7
    together = np.stack([happened] * 5, 1).mean(1)
    assert dataclasses.astuple(share(together)) == pytest.approx(
        dataclasses.astuple(share(happened))
    )


def test_share_of_ties_has_no_interval():
    assert share(np.full(10, 0.5)) == Estimate(0.5)


@pytest.mark.parametrize("chances", [(0.3, 0.5, 0.2), (0.1, 0.8, 0.1), (0.05, 0.05, 0.9)])
def test_share_with_ties_covers_the_truth_as_often_as_it_says(chances):
    random = np.random.default_rng(5)
    scores = random.choice([0, 0.5, 1], p=chances, size=(1000, 60))
    truth = chances[1] / 2 + chances[2]
    intervals = [bounds(share(sample)) for sample in scores]
    covered = sum(low <= truth <= high for low, high in intervals)
    assert 0.93 <= covered / 1000 <= 0.99


# How runs end.


def test_a_diverged_run_counts_as_the_worst_and_is_not_solved():
    loss = [[[0.5, 5.0, np.nan, np.inf, 0.7]]]
    ends = final(study(loss, [[[0.9, 0.8, 0.9, np.nan, 0.2]]], worst=2.0, solved_metric=0.5))
    np.testing.assert_allclose(ends.loss.values.ravel(), [0.5, 2, 2, 2, 0.7])
    np.testing.assert_allclose(ends.metric.values.ravel(), [0.9, 0.8, 0.9, 0, 0.2])
    assert ends.diverged.values.ravel().tolist() == [False, False, True, True, False]
    assert ends.solved.values.ravel().tolist() == [True, True, False, False, False]


def test_without_a_worst_loss_a_run_ends_no_worse_than_it_started():
    dataset = study([[[0.5, np.nan, 9.0, np.nan]]], start=[3.0, 4.0, 5.0, np.inf])
    ends = final(dataset)
    # A start that is not finite counts as the worst of the others.
    np.testing.assert_allclose(ends.loss.values.ravel(), [0.5, 4, 5, 5])
    assert ends.solved.values.ravel().tolist() == [True, False, True, False]
    assert "metric" not in ends
    nowhere = final(study([[[np.nan, np.nan]]], start=np.nan))
    assert np.isfinite(nowhere.loss.values).all()


def test_solved_takes_both_limits_and_the_threshold_itself():
    loss, metric = [[[0.1, 0.1, 0.2]]], [[[0.9, 0.8, 0.9]]]
    both = final(study(loss, metric, solved_loss=0.1, solved_metric=0.9))
    assert both.solved.values.ravel().tolist() == [True, False, False]
    assert final(study(loss, metric)).solved.values.all()


def test_a_dataset_from_disk_ends_alike(tmp_path):
    dataset = study([[[0.1, np.nan]], [[0.2, 0.3]]], solved_loss=0.1)
    dataset.to_netcdf(tmp_path / "results.nc", engine="scipy")
    read = xr.load_dataset(tmp_path / "results.nc", engine="scipy")
    xr.testing.assert_equal(final(read), final(dataset))
    assert summarize(read, resamples=99) == summarize(dataset, resamples=99)


# Rescued and lost.


def test_rescued_and_lost_by_hand():
    plain = [0, 0, 0, 0, 1, 1, 1, np.nan, 1, 0]
    arm = [0, 0, 1, np.nan, 0, 0, 0, 0, 1, 0]
    escape = compare(arm, plain, solved_loss=0.5).escape
    assert (escape.rescued, escape.lost) == (4, 2)


@pytest.mark.parametrize(("rescued", "lost"), [(9, 1), (1, 9), (86, 150), (0, 5), (3, 3), (0, 0)])
def test_escape_is_mcnemars_exact_test(rescued, lost):
    plain = np.r_[np.ones(rescued), np.zeros(lost), np.zeros(4), np.ones(4)]
    arm = np.r_[np.zeros(rescued), np.ones(lost), np.zeros(4), np.ones(4)]
    escape = compare(arm, plain, resamples=9, solved_loss=0.5).escape
    assert (escape.rescued, escape.lost) == (rescued, lost)
    # The discordant pairs are fair coins under the null.
    coins = stats.binomtest(rescued, rescued + lost).pvalue if rescued + lost else 1.0
    assert escape.p == pytest.approx(coins)
    if {rescued, lost} == {1, 9}:
        assert escape.p == pytest.approx(2 * (1 + 10) / 2**10)


# Improvement.


def test_improvement_is_the_sign_test():
    arm = np.r_[np.zeros(8), np.full(2, 2.0)]
    improvement = compare(arm, np.ones(10)).improvement
    assert improvement.probability == share(np.arange(10) < 8)
    assert improvement.p == pytest.approx(2 * (1 + 10 + 45) / 2**10)


def test_ties_count_half_and_say_nothing_to_the_test():
    plain = np.ones(14)
    arm = np.r_[np.zeros(8), np.full(2, 2.0), np.ones(4)]
    improvement = compare(arm, plain).improvement
    assert improvement.probability.value == pytest.approx(10 / 14)
    assert improvement.p == pytest.approx(2 * (1 + 10 + 45) / 2**10)


def test_two_runs_at_the_cap_tie():
    improvement = compare([np.nan, 9, 0.5], [9, np.inf, 1.0], worst=2.0).improvement
    assert improvement.probability.value == pytest.approx(2 / 3)


# The ratio of spreads.


def ratio(arm, plain, resamples=999):
    return spread_ratio(np.asarray(arm)[:, None], np.asarray(plain)[:, None], resamples)


def test_spread_ratio_of_known_values():
    start = np.random.default_rng(4).uniform(0, 0.5, size=40)
    same, half = ratio(start, start), ratio(1 + start / 2, start)
    assert dataclasses.astuple(same.ratio) == pytest.approx((1, 1, 1))
    assert same.ratio.low <= 1 <= same.ratio.high
    assert same.p == 1
    assert dataclasses.astuple(half.ratio) == pytest.approx((0.5, 0.5, 0.5))
    assert half.p == pytest.approx(2 / 1000)


def test_spread_ratio_needs_variation_in_both_arms():
    values = np.arange(10.0)
    for arm, plain in [(values, np.ones(10)), (np.ones(10), values), (np.ones(10), np.ones(10))]:
        undefined = ratio(arm, plain)
        assert (str(undefined.ratio), undefined.p) == ("undefined", None)


def test_spread_ratio_tests_all_swaps_of_a_few_pairs():
    random = np.random.default_rng(6)
    arm, plain = random.normal(size=7), 3 * random.normal(size=7)
    a, b = arm - np.median(arm), plain - np.median(plain)

    def inequality(swap):
        return np.log(np.where(swap, b, a).std() / np.where(swap, a, b).std())

    swaps = [inequality(swap) for swap in itertools.product([False, True], repeat=7)]
    below = np.mean(np.array(swaps) <= inequality(np.zeros(7, bool)) + 1e-12)
    assert ratio(arm, plain).p == pytest.approx(2 * below)


def test_spread_ratio_excludes_what_its_test_rejects():
    random = np.random.default_rng(7)
    arm, plain = random.normal(size=60), random.normal(size=60)
    estimate = ratio(arm, plain, 9999).ratio
    for bound in bounds(estimate):
        assert ratio(arm / bound, plain, 9999).p == pytest.approx(0.05, abs=0.01)


def test_spread_ratio_agrees_with_pitman_and_morgan_on_normal_pairs():
    """Their test is exact there: the spreads are equal if sum and difference do not correlate."""
    random = np.random.default_rng(8)
    for scale in (1.0, 1.3):
        plain, arm = correlated(random, (200,), "normal") * [[1], [scale]]
        _, exact = stats.pearsonr(arm + plain, arm - plain)
        assert ratio(arm, plain, 4999).p == pytest.approx(exact, abs=0.03)


def test_spread_ratio_follows_units_and_shifts_and_turns_around():
    plain, arm = correlated(np.random.default_rng(9), (40,), "lognormal")
    forth, moved, back = ratio(arm, plain), ratio(7 * arm - 2, plain + 5), ratio(plain, arm)
    of_forth = np.array(dataclasses.astuple(forth.ratio))
    assert dataclasses.astuple(moved.ratio) == pytest.approx(tuple(7 * of_forth))
    assert dataclasses.astuple(back.ratio) == pytest.approx(tuple(1 / of_forth[[0, 2, 1]]))
    assert back.p == pytest.approx(forth.p)


@pytest.mark.parametrize("pairs", [2, 8])
def test_spread_ratio_of_arms_that_mirror_each_other(pairs):
    """Some swaps leave no spread in either arm."""
    arm = np.arange(pairs) % 2.0
    found = ratio(arm, 1 - arm)
    assert (found.ratio.value, found.p) == (1, 1)


def test_spread_ratio_of_one_outlier_has_no_interval():
    """Which arm the outlier falls to is one coin: no ratio can be excluded."""
    outlier = np.r_[1e6, np.arange(19)]
    estimate = ratio(outlier, np.arange(20.0)).ratio
    assert bounds(estimate) == (None, None)


@pytest.mark.parametrize("law", ["normal", "lognormal", "a tenth fails"])
def test_spread_ratio_misses_the_truth_no_oftener_than_it_says(law):
    random = np.random.default_rng(10)
    repeats = 200
    found = [ratio(arm, plain, 199) for plain, arm in correlated(random, (repeats, 25), law)]
    most = stats.binom.ppf(0.999, repeats, 0.05)
    assert sum(one.p < 0.05 for one in found) <= most
    known = [bounds(one.ratio) for one in found if one.ratio.low is not None]
    assert len(known) > 0.9 * repeats
    assert sum(not low <= 1 <= high for low, high in known) <= most


# The summary.


def random_study(seed=11, arms=3, scales=2, seeds=12, **limits):
    random = np.random.default_rng(seed)
    loss = random.uniform(0, 1, size=(arms, scales, seeds))
    loss[random.uniform(size=loss.shape) < 0.1] = np.nan
    return study(loss, 1 - loss, solved_loss=0.6, **limits)


def test_summary_has_a_row_for_each_arm_and_scale():
    dataset = random_study()
    summary = summarize(dataset, resamples=99)
    ends = final(dataset)
    assert [(cell.arm, cell.init_scale) for cell in summary.cells] == list(
        itertools.product(["arm 0", "arm 1", "arm 2"], [1.0, 2.0])
    )
    assert [(row.contrast, row.arm, row.plain, row.init_scale) for row in summary.comparisons] == [
        ("same", arm, "arm 0", scale) for arm in ("arm 1", "arm 2") for scale in (1.0, 2.0)
    ]
    for cell in summary.cells:
        runs = ends.sel(arm=cell.arm, init_scale=cell.init_scale)
        assert cell.n == 12
        assert cell.diverged == int(runs.diverged.sum())
        assert cell.failed == share(~runs.solved.values)
        assert cell.failed.value >= cell.diverged / 12
        for name in ("loss", "metric"):
            values, told = runs[name].values, getattr(cell, name)
            assert told.mean.value == pytest.approx(values.mean())
            assert told.interquartile_mean.value == pytest.approx(interquartile_mean(values))
            assert told.spread.value == pytest.approx(values.std(ddof=1))
    for row in summary.comparisons:
        arm, plain = (
            ends.sel(arm=name, init_scale=row.init_scale).loss.values
            for name in (row.arm, row.plain)
        )
        difference = interquartile_mean(arm) - interquartile_mean(plain)
        assert row.difference.value == pytest.approx(difference)
        assert row.spread.ratio.value == pytest.approx(arm.std() / plain.std())


def test_pooled_rows_count_all_runs_but_only_the_seeds_as_evidence():
    one = random_study(scales=1, seeds=40)
    five = xr.concat([one.assign_coords(init_scale=[2.0**k]) for k in range(5)], "init_scale")
    once, pooled = (summarize(dataset, resamples=999) for dataset in (one, five))
    for cell, single in zip(pooled.pooled_cells, once.cells, strict=True):
        assert (cell.arm, cell.init_scale, cell.n) == (single.arm, None, 40)
        assert cell.diverged == 5 * single.diverged
        assert bounds(cell.failed) == pytest.approx(bounds(single.failed))
        assert bounds(cell.loss.mean) == pytest.approx(bounds(single.loss.mean))
    for row, single in zip(pooled.pooled_comparisons, once.comparisons, strict=True):
        assert row.escape.rescued == 5 * single.escape.rescued
        assert row.escape.lost == 5 * single.escape.lost
        assert row.escape.p == pytest.approx(single.escape.p, abs=0.1)
        assert row.improvement.p == pytest.approx(single.improvement.p, abs=0.1)
        assert bounds(row.improvement.probability) == pytest.approx(
            bounds(single.improvement.probability)
        )
        assert bounds(row.spread.ratio) == pytest.approx(bounds(single.spread.ratio))
        assert row.spread.p == pytest.approx(single.spread.p)


def test_pooled_spread_includes_what_the_initial_scale_makes():
    """An arm that ends alike within each scale, but not across scales, has a pooled spread."""
    noise = np.random.default_rng(12).normal(0, 0.01, size=(2, 2, 30))
    loss = noise + np.array([[[1.0], [3.0]], [[2.0], [2.0]]])
    summary = summarize(study(loss, start=9.0), resamples=499)
    [pooled] = summary.pooled_comparisons
    assert pooled.spread.ratio.value == pytest.approx(0.01, rel=0.2)
    assert pooled.spread.p < 0.01
    assert all(row.spread.ratio.value > 0.5 for row in summary.comparisons)


def test_one_initial_scale_pools_to_itself():
    summary = summarize(random_study(scales=1), resamples=99)
    for rows, pooled in [
        (summary.cells, summary.pooled_cells),
        (summary.comparisons, summary.pooled_comparisons),
    ]:
        assert [dataclasses.replace(row, init_scale=None) for row in rows] == pooled


def test_swapping_the_arms_turns_every_answer_around():
    dataset = random_study(arms=2, scales=1, seeds=30)
    back = dataset.assign_attrs(
        contrasts=json.dumps([{"name": "same", "plain": "arm 1", "arms": ["arm 0"]}])
    )
    [forth], [back] = summarize(dataset).comparisons, summarize(back).comparisons
    assert (forth.escape.rescued, forth.escape.lost) == (back.escape.lost, back.escape.rescued)
    assert forth.escape.p == pytest.approx(back.escape.p)
    assert forth.difference.value == pytest.approx(-back.difference.value)
    assert forth.difference.low == pytest.approx(-back.difference.high, abs=0.02)
    value, low, high = dataclasses.astuple(back.improvement.probability)
    assert dataclasses.astuple(forth.improvement.probability) == pytest.approx(
        (1 - value, 1 - high, 1 - low)
    )
    assert forth.improvement.p == pytest.approx(back.improvement.p)
    assert forth.spread.ratio.value == pytest.approx(1 / back.spread.ratio.value)
    assert forth.spread.p == pytest.approx(back.spread.p)


def test_holm_adjusts_over_all_comparisons_that_ask_the_same():
    summary = summarize(random_study(arms=4), resamples=99)
    for rows in (summary.comparisons, summary.pooled_comparisons):
        for question in ("escape", "improvement", "spread"):
            answers = [getattr(row, question) for row in rows]
            ps = np.array([answer.p for answer in answers])
            adjusted = np.array([answer.p_holm for answer in answers])
            np.testing.assert_allclose(adjusted, np.asarray(multipletests(ps, method="holm")[1]))


def test_what_two_contrasts_ask_is_asked_once():
    contrast = {"plain": "arm 0", "arms": ["arm 0", "arm 1", "arm 2"]}
    once = summarize(random_study(contrasts=[{"name": "a", **contrast}]), resamples=99)
    twice = summarize(
        random_study(contrasts=[{"name": name, **contrast} for name in "ab"]), resamples=99
    )
    first, second = twice.comparisons[:4], twice.comparisons[4:]
    assert first == once.comparisons
    assert [dataclasses.replace(row, contrast="a") for row in second] == first


def test_a_summary_repeats_itself_and_is_valid_json():
    dataset = random_study()
    summary = summarize(dataset, resamples=99)
    assert summarize(dataset, resamples=99) == summary
    read = json.loads(json.dumps(summary, default=dataclasses.asdict, allow_nan=False))
    assert read["comparisons"][0]["spread"]["ratio"].keys() == {"value", "low", "high"}


@pytest.mark.parametrize("seeds", [1, 2, 3, 5])
def test_few_seeds_give_values_without_intervals(seeds):
    summary = summarize(random_study(seeds=seeds, scales=2), resamples=99)
    json.dumps(summary, default=dataclasses.asdict, allow_nan=False)
    for cell in summary.cells:
        assert np.isfinite(cell.loss.mean.value)
        assert bounds(cell.loss.mean) == bounds(cell.loss.spread) == (None, None)
        assert (cell.loss.spread.value is None) == (seeds == 1)
    for row in summary.comparisons + summary.pooled_comparisons:
        assert bounds(row.spread.ratio) == (None, None)
        # No two-sided test of so few pairs reaches 5%.
        assert all(
            answer.p is None or answer.p > 0.05
            for answer in (row.escape, row.improvement, row.spread)
        )


def test_a_study_in_which_everything_diverged_says_so():
    summary = summarize(study(np.full((2, 2, 10), np.nan), start=2.0), resamples=99)
    json.dumps(summary, default=dataclasses.asdict, allow_nan=False)
    for cell in summary.cells:
        assert (cell.diverged, cell.failed.value, cell.loss.mean) == (
            10,
            1,
            Estimate(2.0, 2.0, 2.0),
        )
    for row in summary.comparisons:
        assert (row.escape.p, row.improvement.p, row.spread.p) == (1, 1, None)
        assert row.improvement.probability == Estimate(0.5)


def test_without_contrasts_nothing_is_compared():
    summary = summarize(random_study(contrasts=[]), resamples=99)
    assert summary.comparisons == summary.pooled_comparisons == []
    assert len(summary.cells) == 6


# What a study finds.


def test_identical_arms_find_exactly_nothing():
    dataset = random_study(arms=1, seeds=20)
    same = xr.concat([dataset.assign_coords(arm=[f"arm {place}"]) for place in range(3)], "arm")
    same.attrs["contrasts"] = json.dumps(
        [{"name": "same", "plain": "arm 0", "arms": ["arm 1", "arm 2"]}]
    )
    summary = summarize(same, resamples=499)
    for row in summary.comparisons + summary.pooled_comparisons:
        assert (row.escape.rescued, row.escape.lost) == (0, 0)
        assert row.difference == Estimate(0.0, 0.0, 0.0)
        assert row.improvement.probability == Estimate(0.5)
        assert dataclasses.astuple(row.spread.ratio) == pytest.approx((1, 1, 1))
        for answer in (row.escape, row.improvement, row.spread):
            assert (answer.p, answer.p_holm) == (1, 1)


def test_a_study_of_arms_alike_finds_something_no_oftener_than_it_says(monkeypatch):
    """Two arms and the plain one, alike in law: any adjusted p below 5% is a false finding."""
    # What describes an arm alone is not at stake, and takes time.
    cell = summarize(random_study(), resamples=9).cells[0]
    monkeypatch.setattr(statistics, "_cell", lambda *_: cell)
    random = np.random.default_rng(13)
    repeats, found = 200, dict.fromkeys(("escape", "improvement", "spread"), 0)
    for _ in range(repeats):
        shared, own = random.normal(size=(1, 1, 20)), random.normal(size=(3, 1, 20))
        summary = summarize(study(np.exp(shared + own), start=1e6, solved_loss=1.5), resamples=99)
        for question in found:
            answers = [getattr(row, question) for row in summary.comparisons]
            found[question] += any(answer.p_holm < 0.05 for answer in answers)
    for question, times in found.items():
        assert times <= stats.binom.ppf(0.999, repeats, 0.05), question


def test_a_study_finds_a_spread_that_is_halved():
    random = np.random.default_rng(14)
    plain, narrow = correlated(random, (100,), "normal")
    loss = 5 + np.stack([plain, narrow / 2, *correlated(random, (100,), "normal")])[:, None]
    summary = summarize(study(loss, start=1e6), resamples=999)
    row = summary.comparisons[0]
    assert row.spread.p_holm < 0.01
    assert row.spread.ratio.low < 0.5 < row.spread.ratio.high < 1


def test_a_study_finds_runs_that_are_rescued_and_improved():
    random = np.random.default_rng(15)
    plain = np.where(random.uniform(size=100) < 0.4, 1.0, 0.1) + 0.01 * random.normal(size=100)
    arm = 0.1 + 0.01 * random.normal(size=100)
    row = compare(arm, plain, solved_loss=0.5)
    assert row.escape.rescued > 25
    assert row.escape.lost == 0
    assert row.escape.p_holm < 1e-6
    assert row.difference.high < 0
    assert row.improvement.probability.low > 0.5
    assert row.spread.ratio.high < 0.2
