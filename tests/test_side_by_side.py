"""Tests of the comparison of two finished studies."""

import pytest
import synthetic

from momentum_jax.study import figures
from momentum_jax.study.report import write
from momentum_jax.study.side_by_side import compare_reports, compare_studies

OPTIONS = {"rates": (0.1, 0.5), "scales": (1.0, 2.0), "control": False}
FAMILIES = {"mu 0": 0.0, "mu 0.9": 0.9}


@pytest.fixture(scope="module")
def studies(tmp_path_factory):
    """Folders and tables of two studies with the same arms, and of one with other arms."""
    folder = tmp_path_factory.mktemp("studies")
    found = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(figures.Picture, "render", lambda _: (b"", "<svg></svg>"))
        for name, design, families in (
            ("one", "crossed", FAMILIES),
            ("two", "paired", FAMILIES),
            ("nan", "paired", {"nan": 0.0, "NA": 0.9}),
        ):
            dataset = synthetic.dataset(design, families=families, **OPTIONS)
            found.append((folder / name, write(dataset, folder / name)[1]))
    return found


def test_the_values_of_both_stand_side_by_side(studies):
    (one, table), (two, other), _ = studies
    found = compare_reports([one, two])
    assert len(found) == len(other) < len(table)  # The second has no total std.
    for scale in (1.0, 2.0, -1.0):  # -1 stands for all scales combined.
        row, first, second = (
            each.fillna({"scale": -1.0})
            .set_index(["arm", "contrast", "question", "scale"])
            .loc[("mu 0.9 at 0.01", "same effective rate", "std", scale)]
            for each in (found, table, other)
        )
        for number, source in ((1, first), (2, second)):
            for name in ("value", "low", "high", "n"):
                assert row[f"{name}_{number}"] == pytest.approx(source[name], rel=1e-5)


def test_the_text_has_the_verdicts_and_the_csv_the_whole_table(studies):
    (one, _), (two, table), (other, _) = studies
    text = compare_studies([one, two])
    assert text.startswith(f"(1) {one}, synthetic: ")
    assert f"\n(2) {two}, synthetic: " in text
    assert f"{len(table)} comparisons are in both studies" in text
    assert compare_studies([one, two], csv=True).count("\n") == len(table) + 1
    assert "\n0 comparisons are in both" in compare_studies([one, other])


def test_an_arm_may_be_called_nan(studies):
    *_, (other, table) = studies
    found = compare_reports([other, other])
    assert len(found) == len(table)
    assert {"nan", "NA at 0.01"} <= {*found.baseline, *found.arm}


def test_a_folder_without_a_finished_study_is_refused_in_one_line(studies, tmp_path):
    (folder, _), *_ = studies
    for function in (compare_reports, compare_studies):
        with pytest.raises(
            ValueError, match=r"holds no finished study, because it has no \S+: give"
        ):
            function([folder, tmp_path])
    (tmp_path / "summary.json").write_text("{")
    with pytest.raises(ValueError, match=r"summary.json is damaged: [^\n]+$"):
        compare_studies([tmp_path, folder])
    (tmp_path / "comparisons.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match=r"comparisons.csv is damaged: [^\n]+$"):
        compare_reports([folder, tmp_path])
