"""Tests of the table of comparisons and the verdict, on studies with a known answer."""

import json
import math
from typing import Any

import numpy as np
import pandas as pd
import pytest
import xarray as xr
from scipy import stats
from statsmodels.stats.multitest import multipletests

from momentum_jax.study import comparisons, components, statistics
from momentum_jax.study._answers import is_ratio
from momentum_jax.study.comparisons import compare, describe, disagreements, verdict

RATES = np.array([0.1, 0.2, 0.4])


def study(loss, *, pairs=((1, 0),), primary=None, margin=0.1, metrics=None, **attrs):
    """Makes a dataset from final losses (arm, init_scale, seed[, order_seed]) and pairs of arms."""
    loss = np.asarray(loss, float)
    arms = [f"arm {place}" for place in range(len(loss))]
    dims = [*("arm", "init_scale", "seed", "order_seed")[: loss.ndim], "step"]
    variables = {"loss": loss} | {name: np.asarray(each) for name, each in (metrics or {}).items()}
    kinds = [
        {"kind": "arms", "baseline": arms[other], "arms": [arms[one]], "rate": None}
        for one, other in pairs
    ]
    one, other = primary or pairs[0]
    return xr.Dataset(
        {name: (dims, each[..., None]) for name, each in variables.items()},
        coords={"arm": arms, "init_scale": 2.0 ** np.arange(loss.shape[1])},
        attrs={
            "loss_cap": 1e6,
            "metrics": json.dumps(
                [{"name": name, "larger_is_better": True} for name in metrics or ()]
            ),
            "contrasts": json.dumps(kinds),
            "primary": json.dumps({"arm": arms[one], "baseline": arms[other], "margin": margin}),
            "design": "crossed" if loss.ndim == 4 else "paired",
        }
        | {
            name: json.dumps(each) if isinstance(each, dict) else each
            for name, each in attrs.items()
        },
    )


def correlated(random, arms, scales=1, seeds=50, correlation=0.5):
    """Draws normal losses (arm, scale, seed) with mean 10 and standard deviation 1."""
    shared = random.normal(size=(1, scales, seeds)) * correlation**0.5
    return 10 + shared + random.normal(size=(arms, scales, seeds)) * (1 - correlation) ** 0.5


def rows(table, question, **where) -> Any:
    chosen = table[table.question == question]
    for name, value in where.items():
        chosen = chosen[chosen[name].isna() if value is None else chosen[name] == value]
    return chosen


def one(table, question, **where):
    [found] = rows(table, question, **where).to_dict("records")
    return found


# Values and intervals.


def test_every_answer_is_that_of_the_final_values():
    random = np.random.default_rng(0)
    loss = np.exp(correlated(random, 2, 2, 40) - 10)
    accuracy = random.uniform(size=loss.shape)
    built = study(loss, metrics={"accuracy": accuracy}, solved={"loss": 1.0})
    table = compare(built)
    assert list(table.columns) == comparisons.COLUMNS
    assert set(table.n) == {40}
    for place, scale in enumerate([1.0, 2.0]):
        [base, arm], [few, many] = loss[:, place], accuracy[:, place]
        answers = {
            "std": arm.std() / base.std(),
            "std of log loss": np.log(arm).std() / np.log(base).std(),
            "10-90% range": np.ptp(np.quantile(arm, [0.1, 0.9]))
            / np.ptp(np.quantile(base, [0.1, 0.9])),
            "failures": np.mean(arm > 1) - np.mean(base > 1),
            "rescued": np.sum((arm <= 1) & (base > 1)),
            "lost": np.sum((arm > 1) & (base <= 1)),
            "loss": stats.trim_mean(arm, 0.25) - stats.trim_mean(base, 0.25),
            "lower loss": np.mean(arm < base),
            "accuracy": many.mean() - few.mean(),
            "accuracy std": many.std() / few.std(),
        }
        for question, value in answers.items():
            found = one(table, question, scale=scale)
            assert found["value"] == pytest.approx(value, rel=1e-5), question
            if question not in ("rescued", "lost"):
                assert found["adjusted_low"] <= found["low"] <= found["low_90"] <= value + 1e-9
                assert value - 1e-9 <= found["high_90"] <= found["high"] <= found["adjusted_high"]
                assert 0 < found["p"] <= found["p_adjusted"] <= 1
    differences = accuracy[1] - accuracy[0]
    found = one(table, "accuracy", scale=1.0)
    expected: Any = stats.ttest_1samp(differences[0], 0)
    interval = expected.confidence_interval()
    assert found["p"] == pytest.approx(expected.pvalue, abs=1e-3)
    assert (found["low"], found["high"]) == pytest.approx(tuple(interval), abs=1e-3)
    failed = (loss[1] > 1).astype(int) - (loss[0] > 1)
    found = one(table, "failures", scale=1.0)
    gained, lost = np.sum(failed[0] > 0), np.sum(failed[0] < 0)
    assert found["p"] == pytest.approx(stats.binomtest(gained, gained + lost).pvalue)
    # The formula of Bonett and Price (2012).
    more, less = (gained + 1) / 42, (lost + 1) / 42
    half = 1.96 * ((more + less - (more - less) ** 2) / 42) ** 0.5
    assert found["high"] == pytest.approx(more - less + half, abs=1e-3)
    found = one(table, "lower loss", scale=1.0)
    lower = loss[1, 0] < loss[0, 0]
    assert found["p"] == pytest.approx(stats.binomtest(int(lower.sum()), 40).pvalue)
    assert (found["low"], found["high"]) == pytest.approx(statistics.proportion(lower))


def test_combined_rows_are_geometric_means_of_ratios_and_means_of_differences():
    random = np.random.default_rng(1)
    loss = np.exp(correlated(random, 2, 3, 30) - 10)
    table = compare(study(loss, metrics={"accuracy": random.uniform(size=loss.shape)}))
    for question in table.question.unique():
        combined = one(table, question, scale=None)["value"]
        single = table[(table.question == question) & table.scale.notna()].value
        if question in ("rescued", "lost"):
            assert combined == single.sum()
        elif is_ratio(question):
            assert combined == pytest.approx(np.exp(np.log(single).mean()))
        else:
            assert combined == pytest.approx(single.mean())


def test_differences_between_scales_do_not_enter_the_combined_ratio():
    """At each scale the standard deviations are equal; the mean of one arm depends on the scale."""
    random = np.random.default_rng(2)
    loss = correlated(random, 2, 2, 50)
    apart = loss.copy()
    apart[1, 1] += 100
    before, after = (one(compare(study(x)), "std", scale=None) for x in (loss, apart))
    for name in ("value", "low", "high", "p"):
        assert after[name] == pytest.approx(before[name], rel=1e-6)
    assert 0.8 < after["value"] < 1.25


def test_units_of_one_seed_are_not_independent_over_scales():
    """Five copies of a scale give the same interval as one."""
    loss = correlated(np.random.default_rng(3), 2, 1, 40)
    once, five = (compare(study(np.repeat(loss, n, 1))) for n in (1, 5))
    for question in ("std", "10-90% range", "loss", "failures", "lower loss"):
        a, b = (one(table, question, scale=None) for table in (once, five))
        for name in ("value", "low", "high"):
            assert a[name] == pytest.approx(b[name], rel=0.02), (question, name)


def test_the_crossed_standard_deviation_is_the_weights_component():
    random = np.random.default_rng(4)
    loss = 10 + random.normal(size=(2, 1, 40, 1)) + 2 * random.normal(size=(2, 1, 40, 4))
    built = study(loss)
    table = components.variance_components(built)
    variance = table[table.source == "weights"].variance.to_numpy()
    found = one(compare(built), "std", scale=1.0)
    assert found["value"] == pytest.approx((variance[1] / variance[0]) ** 0.5)


def test_swapping_the_arms_turns_every_answer_around():
    loss = correlated(np.random.default_rng(5), 2, 2, 30) * [[[1]], [[1.3]]]
    there, back = (compare(study(loss, pairs=[pair])) for pair in ((1, 0), (0, 1)))
    for scale in (1.0, None):
        for question in ("std", "10-90% range", "std of log loss"):
            a, b = (one(table, question, scale=scale) for table in (there, back))
            assert a["value"] * b["value"] == pytest.approx(1)
            assert a["low"] * b["high"] == pytest.approx(1)
            assert a["p"] == pytest.approx(b["p"])
        a, b = (one(table, "loss", scale=scale) for table in (there, back))
        assert (a["value"], a["low"]) == pytest.approx((-b["value"], -b["high"]))


def test_an_interval_excludes_1_where_p_is_below_5_percent():
    random = np.random.default_rng(6)
    loss = correlated(random, 12, 2, 25) * np.linspace(0.6, 1.6, 12)[:, None, None]
    table = compare(study(loss, pairs=[(place, 0) for place in range(1, 12)]))
    found = table[table.question.isin(["std", "std of log loss", "10-90% range"])]
    outside = (found.low > 1) | (found.high < 1)
    assert 10 < outside.sum() < len(found)
    np.testing.assert_array_equal(outside, found.p < 0.05)


# Adjustment for several comparisons.


@pytest.mark.slow
def test_holm_counts_each_pair_once_and_spares_the_primary():
    random = np.random.default_rng(7)
    loss = correlated(random, 4, 2, 30) * np.array([1, 1.2, 1.4, 1.6])[:, None, None]
    table = compare(study(loss, pairs=[(1, 0), (2, 0), (3, 0), (1, 0)], primary=(2, 0)))
    copies = rows(table, "std", arm="arm 1")
    assert len(copies) == 2 * 3
    assert copies.iloc[:3].equals(copies.iloc[3:].set_axis(copies.index[:3]))
    for question in ("std", "loss", "failures"):
        for combined in (False, True):
            found = rows(table, question).drop_duplicates(["arm", "scale"])
            found = found[found.scale.isna() == combined]
            first = (found.arm == "arm 2") & combined & (question == "std")
            adjusted = multipletests(found.p[~first], method="holm")[1]
            np.testing.assert_allclose(found.p_adjusted[~first], np.asarray(adjusted))
            assert (found.p_adjusted[first] == found.p[first]).all()
            assert (found.adjusted_low[first] == found.low[first]).all()


def test_adjusted_intervals_hold_together():
    loss = correlated(np.random.default_rng(8), 5, 2, 40)
    table = compare(study(loss, pairs=[(place, 0) for place in range(1, 5)], primary=(1, 0)))
    found = one(table, "loss", arm="arm 4", scale=1.0)
    # Bonferroni adjustment for 4 arms x 2 scales.
    half = (found["high"] - found["low"]) / 2
    wide = (found["adjusted_high"] - found["adjusted_low"]) / 2
    degrees = 40 - 2 * 10 - 1
    ratio = stats.t.ppf(1 - 0.025 / 8, degrees) / stats.t.ppf(0.975, degrees)
    assert wide / half == pytest.approx(ratio, rel=0.01)


@pytest.mark.slow
def test_one_of_300_comparisons_can_still_be_clear():
    random = np.random.default_rng(9)
    # Losses below 0 have no log, which saves time.
    loss = correlated(random, 101, 3, 30) - 10
    loss[7] = loss[7] / 8
    table = compare(study(loss, pairs=[(place, 0) for place in range(1, 101)]))
    single = rows(table, "std")
    single = single[single.scale.notna()]
    assert len(single) == 300
    clear = single[single.p_adjusted < 0.05]
    assert set(clear.arm) == {"arm 7"}
    assert (clear.p_adjusted < 0.01).all()
    assert (clear.adjusted_high < 1).all()


# Tuned arms.


def families(seeds=50, scales=2, noise=0.05, tuning=None):
    """Makes two equal families whose standard deviation equals the effective learning rate."""
    random = np.random.default_rng(10)
    names = [f"{family} at {rate}" for family in ("mu 0", "mu 0.9") for rate in RATES]
    rates = np.tile(RATES, 2)[:, None, None]
    shared = random.normal(size=(1, scales, seeds))
    own = random.normal(size=(6, scales, seeds))
    loss = 10 + rates * (shared + noise * own)
    # Tuning chooses 0.4 for "mu 0" and 0.1 for the other family.
    best = np.array([0.4] * 3 + [0.1] * 3)
    if tuning is None:
        tuning = np.abs(np.log(rates[:, :, 0] / best[:, None])) + np.zeros((6, scales))
        tuning = tuning[..., None] + 0.01 * random.normal(size=(6, scales, 10))
    tuned = {"kind": "tuned", "baseline": "mu 0", "arms": ["mu 0.9"], "rate": None}
    return xr.Dataset(
        {
            "loss": (["arm", "init_scale", "seed", "step"], loss[..., None]),
            "tuning_loss": (["arm", "init_scale", "tuning_seed"], tuning),
        },
        coords={
            "arm": names,
            "family": ("arm", ["mu 0"] * 3 + ["mu 0.9"] * 3),
            "effective_rate": ("arm", rates.ravel()),
            "init_scale": 2.0 ** np.arange(scales),
        },
        attrs={
            "loss_cap": 1e6,
            "contrasts": json.dumps([tuned]),
            "primary": json.dumps({"arm": names[4], "baseline": names[1], "margin": 0.1}),
        },
    )


def test_momentum_is_not_credited_for_a_learning_rate():
    """Two families are equal at each effective rate; one of them is tuned to a smaller rate."""
    built = families()
    table = compare(built)
    for scale in (1.0, 2.0, None):
        found = {kind: one(table, "std", contrast=kind, scale=scale) for kind in comparisons.TUNED}
        whole, rate, method = found.values()
        assert whole["high"] < 0.5
        assert rate["high"] < 0.5
        assert method["low"] < 1 < method["high"]
        assert method["value"] == pytest.approx(1, abs=0.05)
        assert method["p_adjusted"] > 0.05
        assert whole["value"] == pytest.approx(rate["value"] * method["value"])
        assert whole["effective_rate"] == pytest.approx(0.1)
    assert verdict(built, table).word == "equivalent"


def test_the_error_of_tuning_is_inside_the_interval():
    """With a flat tuning loss, most of the uncertainty is which rate ten seeds choose."""
    random = np.random.default_rng(11)
    undecided = random.normal(size=(6, 2, 10))
    sure = undecided + np.where(np.arange(3) == 1, -9, 0)[[0, 1, 2, 0, 1, 2]][:, None, None]
    widths = {}
    for name, tuning in (("sure", sure), ("undecided", undecided)):
        found = one(compare(families(tuning=tuning)), "std", contrast="tuned", scale=1.0)
        widths[name] = math.log(found["high"] / found["low"])
        assert found["low"] <= 1 <= found["high"]
    assert widths["undecided"] > math.log(4) > 10 * widths["sure"]
    # If the choice of rates is certain, it is the interval of two fixed arms.
    arms = json.dumps([{"kind": "arms", "baseline": "mu 0 at 0.2", "arms": ["mu 0.9 at 0.2"]}])
    built = families(tuning=sure)
    fixed = compare(built.assign_attrs(contrasts=arms.replace("}]", ', "rate": null}]')))
    a = one(compare(built), "std", contrast="tuned", scale=None)
    b = one(fixed, "std", scale=None)
    assert a["value"] == pytest.approx(b["value"])
    assert math.log(a["high"] / a["low"]) == pytest.approx(math.log(b["high"] / b["low"]), rel=0.1)


def test_a_baseline_without_the_arms_rate_leaves_the_split_undefined():
    built = families()
    kept = built.isel(arm=[1, 2, 3, 4, 5])
    table = compare(kept)
    assert one(table, "std", contrast="tuned", scale=1.0)["value"] < 0.5
    for kind in comparisons.TUNED[1:]:
        found = one(table, "std", contrast=kind, scale=1.0)
        assert math.isnan(found["value"])
        assert "effective learning rate" in found["note"]


# The verdict.


@pytest.mark.parametrize(
    ("ratio", "correlation", "word"),
    [
        (0.5, 0.5, "narrower"),
        (2.0, 0.5, "wider"),
        (1.0, 0.99, "equivalent"),
        (1.0, 0.5, "inconclusive"),
    ],
)
def test_verdict_says_what_the_interval_says(ratio, correlation, word):
    loss = correlated(np.random.default_rng(12), 2, 2, 60, correlation)
    loss[1] = 10 + (loss[1] - 10) * ratio
    built = study(loss)
    table = compare(built)
    found = verdict(built, table)
    row = one(table, "std", scale=None)
    assert found.word == word
    assert found.sentence.startswith(word.capitalize())
    for name in ("value", "low", "high"):
        assert getattr(found, name) == row[name]
        assert f"{row[name]:.3g}" in found.sentence
    assert found == verdict(built)


def test_a_table_from_disk_gives_the_same_verdict(tmp_path):
    built = study(correlated(np.random.default_rng(29), 2, 2, 30))
    table = compare(built)
    table.to_csv(tmp_path / "table.csv", index=False)
    read = pd.read_csv(tmp_path / "table.csv")
    found, expected = verdict(built, read), verdict(built, table)
    assert found.sentence == expected.sentence
    assert found.value == pytest.approx(expected.value)


def test_a_difference_inside_the_margin_is_equivalent_though_significant():
    loss = correlated(np.random.default_rng(13), 2, 1, 100, 0.9999)
    loss[1] = 10 + (loss[1] - 10) * 1.05
    found = verdict(study(loss))
    assert found.word == "equivalent"
    assert found.p < 0.05
    assert found.low > 1
    assert found.high < 1.1
    assert verdict(study(loss, margin=0.02)).word == "wider"


@pytest.mark.slow
def test_equivalence_is_two_one_sided_tests_at_5_percent():
    """If the true ratio is at the margin, "equivalent" is declared in about 5% of studies."""
    random, studies, declared = np.random.default_rng(14), 80, 0
    for _ in range(studies):
        loss = correlated(random, 2, 1, 50, 0.95)
        loss[1] *= 1.25
        declared += verdict(study(loss, margin=0.25)).word == "equivalent"
    assert declared <= stats.binom.ppf(0.999, studies, 0.06)


@pytest.mark.slow
def test_the_detectable_ratio_is_detected_in_80_percent():
    random = np.random.default_rng(15)
    ratio = verdict(study(correlated(random, 2, 1, 60))).detectable
    assert 0.5 < ratio < 0.9
    found = 0
    for _ in range(60):
        loss = correlated(random, 2, 1, 60)
        loss[1] = 10 + (loss[1] - 10) * ratio
        found += verdict(study(loss)).word == "narrower"
    assert 0.65 < found / 60 < 0.95


def test_the_sentence_speaks_of_the_design():
    random = np.random.default_rng(16)
    paired = correlated(random, 2)
    crossed = paired[..., None] + 0.1 * random.normal(size=(2, 1, 50, 2))
    data = {"batch_size": ("arm", [32, 32]), "effective_rate": ("arm", [0.2, 0.2])}
    mu = {**data, "mu": ("arm", [0.0, 0.9])}
    said = [
        (study(crossed), "due to the initial weights alone (the weights' variance component)"),
        (study(paired).assign_coords(data), "across initial weights and data orders together"),
        (study(paired).assign_coords(data), "(both at learning rate 0.2)"),
        (study(paired).assign_coords(mu), "(both at effective learning rate 0.2)"),
        (study(paired), "across initial weights was"),
        (study(paired, design="weights"), "across initial weights, all with one data order"),
        (study(paired, design="order"), "across data orders, all from the same initial weights"),
        (study(correlated(random, 2, 3)), "geometric mean over initial scales 1, 2, 4"),
        (study(paired), "at initial scale 1 ("),
    ]
    for built, words in said:
        sentence = verdict(built).sentence
        assert words in sentence
        assert "arm 1" in sentence
        assert "arm 0" in sentence


def test_why_a_verdict_is_undefined():
    random = np.random.default_rng(17)
    loss = correlated(random, 2, 1, 20)
    diverged, equal = loss.copy(), loss.copy()
    diverged[1], equal[0] = np.nan, 3.0
    noise = 10 + random.normal(size=(2, 1, 20, 1)) * [[[[1]]], [[[0]]]]
    noise = noise + np.tile([1.0, -1.0], 10)[:, None] * [1, -1]
    for values, why in (
        (diverged, "all runs of the arm diverged"),
        (equal, "all runs of the baseline end with the same loss"),
        (loss[..., :5], "fewer than 6 units"),
        (noise, "no variance due to the initial weights"),
    ):
        found = verdict(study(values))
        assert found.word == "undefined"
        assert why in found.sentence
        assert math.isnan(found.low)
        assert math.isnan(found.detectable)
    assert verdict(study(loss).assign_attrs(primary="null")).word == "undefined"


def test_a_scale_with_equal_losses_is_left_out_and_named():
    loss = correlated(np.random.default_rng(18), 2, 2, 30)
    loss[:, 1] = 7.0
    table = compare(study(loss))
    found, single = (one(table, "std", scale=scale) for scale in (None, 1.0))
    assert found["value"] == pytest.approx(single["value"])
    assert "initial scale 2 is left out" in found["note"]
    assert "initial scale 2 is left out" in verdict(study(loss)).sentence


def test_disagreeing_loss_and_metric_are_reported():
    random = np.random.default_rng(19)
    loss = correlated(random, 2, 2, 50)
    loss[1] -= 1
    accuracy = 0.5 + 0.01 * random.normal(size=loss.shape)
    accuracy[1, 1] -= 0.1
    built = study(loss, metrics={"accuracy": accuracy})
    said = disagreements(compare(built), built)
    assert any("initial scale 2" in each and "loss" in each and "accuracy" in each for each in said)
    assert not any("initial scale 1" in each for each in said)


def test_disagreeing_measures_of_spread_are_reported():
    """One run in twenty fails, so the range is smaller but the standard deviation is larger."""
    random = np.random.default_rng(20)
    loss = correlated(random, 2, 1, 100)
    loss[1] = 10 + (loss[1] - 10) / 4
    loss[1, 0, ::20] += 30
    built = study(loss)
    [said] = disagreements(compare(built), built)
    assert "compared with arm 0, arm 1 is lower in 10-90% range (" in said
    assert "but higher in standard deviation (" in said
    agreed = study(correlated(random, 2, 1, 50))
    assert disagreements(compare(agreed), agreed) == []


# Unusual studies.


def test_arms_that_are_identical_differ_in_nothing():
    loss = correlated(np.random.default_rng(21), 1, 2, 20)
    table = compare(study(np.concatenate([loss, loss])))
    for row in table.to_dict("records"):
        if row["question"] in ("rescued", "lost"):
            assert row["value"] == 0
        else:
            null = {"lower loss": 0.5}.get(row["question"], float(is_ratio(row["question"])))
            assert row["value"] == null
            assert row["p"] == row["p_adjusted"] == 1


def test_an_exact_multiple_has_an_interval_of_no_width():
    loss = correlated(np.random.default_rng(22), 1, 1, 20) - 9
    found = one(compare(study(np.concatenate([loss, loss * 2]))), "std", scale=1.0)
    assert (found["value"], found["low"], found["high"]) == pytest.approx((2, 2, 2), rel=1e-4)
    assert found["p"] < 0.01


@pytest.mark.parametrize("seeds", [1, 2, 5])
def test_few_seeds_give_values_without_intervals(seeds):
    loss = correlated(np.random.default_rng(23), 2, 2, seeds)
    table = compare(study(loss))
    assert table[["low", "high"]].isna().to_numpy().all()
    assert not (table.p < 0.05).any()
    assert table[table.question == "loss"].value.notna().all()
    found = describe(study(loss))
    assert found[found.measure == "mean loss"].low.isna().all()


def test_losses_below_0_have_no_std_of_log_loss():
    loss = correlated(np.random.default_rng(24), 2) - 12
    assert "std of log loss" not in set(compare(study(loss)).question)
    assert "std of log loss" not in set(describe(study(loss)).measure)


def test_without_contrasts_only_the_primary_is_compared():
    loss = correlated(np.random.default_rng(25), 2)
    built = study(loss).assign_attrs(contrasts="[]")
    assert set(compare(built).contrast) == {"arms"}
    nothing = compare(built.assign_attrs(primary="null"))
    assert len(nothing) == 0
    assert list(nothing.columns) == comparisons.COLUMNS


def test_the_same_dataset_gives_the_same_numbers():
    loss = correlated(np.random.default_rng(26), 3, 2, 30)
    built = study(loss, pairs=[(1, 0), (2, 0)])
    assert compare(built).equals(compare(built))
    assert describe(built).equals(describe(built))
    assert compare(families()).equals(compare(families()))


def test_describe_has_a_row_for_each_arm_scale_and_measure():
    random = np.random.default_rng(27)
    loss = np.exp(correlated(random, 2, 2, 40) - 10)
    loss[0, 0, :3] = np.nan
    accuracy = random.uniform(size=loss.shape)
    built = study(loss, metrics={"accuracy": accuracy}, solved={"loss": 1.0}, loss_cap=9.0)
    table = describe(built)
    assert list(table.columns) == [
        *("arm", "family", "effective_rate", "scale", "measure", "value", "low", "high", "n")
    ]
    ends = np.where(np.isfinite(loss), np.minimum(loss, 9), 9)
    assert len(table) == 2 * 2 * 8
    for row in table.to_dict("records"):
        place = int(row["arm"][-1]), int(math.log2(row["scale"]))
        values = ends[place]
        expected = {
            "mean loss": values.mean(),
            "interquartile mean loss": stats.trim_mean(values, 0.25),
            "std": values.std(ddof=1),
            "10-90% range": np.ptp(np.quantile(values, [0.1, 0.9])),
            "std of log loss": np.log(values).std(ddof=1),
            "failed": np.mean(values > 1),
            "diverged": np.mean(~np.isfinite(loss[place])),
            "mean accuracy": accuracy[place].mean(),
        }[row["measure"]]
        assert row["value"] == pytest.approx(expected, rel=1e-5)
        assert row["low"] <= row["value"] <= row["high"]


def test_the_interval_of_a_standard_deviation_covers_the_truth_of_normal_values():
    random = np.random.default_rng(28)
    table = describe(study(3 * random.normal(size=(100, 1, 40)) + 50, pairs=[(1, 0)]))
    found = table[table.measure == "std"]
    covered = ((found.low <= 3) & (found.high >= 3)).mean()
    assert 0.87 <= covered <= 0.99


def test_noise_that_is_not_due_to_the_weights_is_only_in_the_total_std():
    """Equal variance between units, but three times the noise within units in one arm."""
    random = np.random.default_rng(31)
    units = random.normal(size=(1, 1, 400, 1))
    noise = random.normal(size=(2, 1, 400, 4)) * np.array([0.3, 3.0])[:, None, None, None]
    table = compare(study(50 + units + noise))
    weights, total, ranges = (
        one(table, question, scale=1.0) for question in ("std", "total std", "10-90% range")
    )
    expected = math.sqrt((1 + 9) / (1 + 0.09))
    assert total["low"] < expected < total["high"]
    assert ranges["value"] == pytest.approx(expected, rel=0.2)
    assert weights["low"] < 1 < weights["high"]
    flat = (50 + units + noise).reshape(2, -1)
    ratio = flat[1].std() / flat[0].std()
    assert total["value"] == pytest.approx(ratio, rel=1e-9)
    # With one run per unit there is only one standard deviation.
    assert "total std" not in set(compare(study(50 + units + noise[..., :1])).question)


def test_disagreeing_scales_are_reported():
    random = np.random.default_rng(32)
    loss = correlated(random, 2, 2, 100)
    loss[1, 0] = 10 + (loss[1, 0] - 10) / 3
    loss[1, 1] = 10 + (loss[1, 1] - 10) * 3
    built = study(loss)
    said = disagreements(compare(built), built)
    assert said[0] == (
        "The initial scales disagree: compared with arm 0, the standard deviation of arm 1 is "
        "lower at initial scale 1, but higher at 2."
    )


def test_if_all_runs_of_an_arm_diverged_the_ratio_is_undefined():
    """Without a loss cap, diverged runs get their initial losses, which vary between runs."""
    loss = correlated(np.random.default_rng(34), 2, 1, 20)
    start = study(loss)
    ends = loss.copy()
    ends[1] = np.nan
    both = xr.concat([start, study(ends)], "step", combine_attrs="override")
    found = verdict(both.assign_attrs(loss_cap=math.nan))
    assert found.word == "undefined"
    assert "all runs of the arm diverged" in found.sentence


def test_few_units_have_no_interval_and_no_p():
    loss = correlated(np.random.default_rng(33), 2, 1, 5)
    table = compare(study(loss, solved={"loss": 10.0}))
    found: Any = table[~table.question.isin(["rescued", "lost"])]
    assert found[["low", "high", "p", "p_adjusted"]].isna().values.all()
    assert set(found.note) == {"there are fewer than 6 units, so no interval is computed"}
