"""Tests of `Study`: default contrasts, storing, resuming and extending."""

import dataclasses
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_sweep import draw_pair, uneven_bowl

from momentum_jax.study import Arm, Contrast, Primary, Problem, Study, design, problems
from momentum_jax.study import arms as make

FAMILIES = [make.baseline(), *make.with_momentum(["0.9"])]


def small(**changes):
    fields: dict[str, Any] = dict(
        rates=(0.01, 0.1, 1.0), learning_rate=0.1, seeds=range(4), steps=5
    )
    arms = changes.pop("arms", FAMILIES)
    problem = changes.pop("problem", None) or problems.find("quadratic")
    return Study(problem, arms, **{**fields, **changes})


def test_families_are_trained_at_each_rate_and_compared_in_every_way():
    control = make.controls(0.1)[1]
    study = small(arms=[*FAMILIES, control], tuning_seeds=2)
    assert [arm.name for arm in study.all_arms] == [
        "mu 0 at 0.01", "mu 0 at 0.1", "mu 0 at 1",
        "mu 0.9 at 0.001", "mu 0.9 at 0.01", "mu 0.9 at 0.1", "noise at 0.1",
    ]  # fmt: skip
    assert study.all_contrasts == [
        Contrast("same effective rate", "mu 0 at 0.01", ("mu 0.9 at 0.001",), 0.01),
        Contrast("same effective rate", "mu 0 at 0.1", ("mu 0.9 at 0.01",), 0.1),
        Contrast("same effective rate", "mu 0 at 1", ("mu 0.9 at 0.1",), 1.0),
        Contrast("same rate", "mu 0 at 0.01", ("mu 0.9 at 0.01",), 0.01),
        Contrast("same rate", "mu 0 at 0.1", ("mu 0.9 at 0.1",), 0.1),
        Contrast("tuned", "mu 0", ("mu 0.9",)),
        Contrast("control", "mu 0 at 0.1", ("noise at 0.1",)),
    ]
    assert study.the_primary == Primary("mu 0.9 at 0.01", "mu 0 at 0.1")


def test_each_batch_size_is_compared_with_its_own_baseline():
    arms = [
        arm.replaced(name=f"{arm.name}, batch {size}", batch_size=size)
        for size in (8, 16)
        for arm in FAMILIES
    ]
    study = small(problem=problems.find("digits"), arms=arms, rates=(0.1, 0.2), learning_rate=0.2)
    pairs = [(each.baseline, *each.arms) for each in study.all_contrasts]
    assert pairs == [
        (f"mu 0, batch {size} at {rate:g}", f"mu 0.9, batch {size} at {rate / 10:g}")
        for size in (8, 16)
        for rate in (0.1, 0.2)
    ]


def test_without_momentum_there_are_learning_rates_and_no_effective_ones():
    arms = [Arm("Adam", optax.adam), Arm("Lion", optax.lion)]
    study = small(arms=arms)
    assert {contrast.kind for contrast in study.all_contrasts} == {"same rate"}
    assert study.the_primary == Primary("Lion at 0.1", "Adam at 0.1")
    given = small(arms=[arm.at(0.1) for arm in arms], rates=(), learning_rate=None)
    (contrast,) = given.all_contrasts
    assert (contrast.kind, contrast.baseline, contrast.arms) == (
        "arms",
        "Adam at 0.1",
        ("Lion at 0.1",),
    )
    alone = small(arms=arms[:1])
    assert (alone.all_contrasts, alone.the_primary) == ([], None)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rates": ()}, r"rates=\[\] are for arms without a learning rate"),
        ({"arms": [FAMILIES[0].at(0.1)]}, "which are .*: give both or neither"),
        ({"arms": [], "rates": ()}, r"arms=\(\) must have at least one arm"),
        ({"rates": [0.1], "tuning_seeds": 2}, "needs at least two rates to choose from"),
        ({"contrasts": [Contrast("tuned", "mu 0", ("mu 0.9",))]}, "give tuning_seeds=10"),
        ({"rates": [0.1, 0.1000001]}, "several arms have the names .*first six digits"),
        ({"arms": [FAMILIES[0], FAMILIES[0]]}, "several arms have the names"),
        ({"rates": [-0.1, 0.1]}, "must be above 0 and finite"),
        ({"margin": 0.0}, "margin=0.0 must be above 0"),
    ],
)
def test_refusals(changes, message):
    with pytest.raises(ValueError, match=message):
        _ = small(**changes).the_primary


@pytest.mark.slow
def test_tuning_sees_other_weights_and_other_examples_than_the_study(monkeypatch):
    seen = []
    run = design.run

    def watched(problem, arms, seeds, *rest, **settings):
        seen.append((problem, list(seeds)))
        return run(problem, arms, seeds, *rest, **settings)

    monkeypatch.setattr(design, "run", watched)
    rows = np.arange(60, dtype=np.float32)[:, None]
    problem = Problem(
        draw_pair, lambda w, x: jnp.sum(w**2) + x.mean(), {}, rows, test_data=rows[:6] + 100
    )
    arms = [arm.replaced(batch_size=10) for arm in FAMILIES]
    study = small(problem=problem, arms=arms, rates=(0.01, 0.1), tuning_seeds=3, order_seeds=[0])
    results = study.run()
    (tuned, tuning_seeds), (main, seeds) = seen
    assert min(tuning_seeds) > max(seeds)
    train, test, held_out = (
        {float(x) for x in np.ravel(x)} for x in (main.data, main.test_data, tuned.test_data)
    )
    assert len(held_out) == 10
    assert len(train) == 50
    assert train | held_out == {float(x) for x in rows[:, 0]}
    assert not test & (train | held_out)
    np.testing.assert_array_equal(tuned.data, main.data)
    assert results.tuning_loss.dims == ("arm", "init_scale", "tuning_seed")
    assert results.tuning_loss.sizes["tuning_seed"] == 3
    # The final loss on the held-out examples is known, because its noise-free part is near 0.
    mean = np.mean(sorted(held_out))
    loss = results.tuning_loss.sel(arm="mu 0 at 0.1").values
    assert np.all((loss >= mean - 1e-3) & (loss < mean + 10))


@pytest.mark.slow
def test_the_edge_is_that_of_the_problem_or_measured():
    curvatures = np.array([4.0, 1.0])
    known = small(seeds=range(3), init_scales=[1.0, 2.0]).run()
    np.testing.assert_array_equal(known.initial_sharpness, [[1.0], [1.0]])
    bowl = Problem(draw_pair, lambda w: jnp.sum(jnp.asarray(curvatures) * w**2) / 2)
    measured = small(problem=bowl, init_scales=[1.0, 2.0]).run()
    np.testing.assert_allclose(measured.initial_sharpness, np.full((2, 4), 4.0), rtol=1e-4)


def test_a_study_survives_json(tmp_path):
    study = small(
        arms=[*FAMILIES, *make.controls(0.1)],
        tuning_seeds=2,
        primary=Primary("mu 0 at 1", "mu 0 at 0.1"),
        contrasts=[Contrast("arms", "mu 0 at 0.1", ("mu 0 at 1",))],
        record=("gradient_norm",),
    )
    study.save(tmp_path)
    again = Study.load(tmp_path)
    assert again.problem.source == "quadratic"
    for field in dataclasses.fields(Study):
        if field.name not in ("problem", "contrasts"):
            assert getattr(again, field.name) == getattr(study, field.name), field.name
    assert [dataclasses.astuple(c)[:3] for c in again.all_contrasts] == [
        ("arms", "mu 0 at 0.1", ("mu 0 at 1",))
    ]
    assert again.to_json() == study.to_json()


@pytest.mark.slow
def test_a_study_is_resumed_and_extended_without_training_again(tmp_path, trained):
    small().run(tmp_path)
    assert sum(trained) == 2 * 3 * 4
    trained.clear()
    loaded = Study.load(tmp_path)
    loaded.run(tmp_path)
    assert trained == []
    more = dataclasses.replace(loaded, seeds=range(6))
    results = more.run(tmp_path)
    assert sum(trained) == 2 * 3 * 2
    trained.clear()
    wider = dataclasses.replace(
        more, arms=[*more.arms, *make.with_momentum(["0.5"])], init_scales=(1.0, 2.0)
    )
    wide = wider.run(tmp_path)
    assert sum(trained) == 3 * 3 * 6 * 2 - 2 * 3 * 6
    shared = wide.sel(arm=results.arm, init_scale=[1.0])
    np.testing.assert_array_equal(shared.loss, results.loss)
    assert [arm.name for arm in Study.load(tmp_path).arms] == ["mu 0", "mu 0.9", "mu 0.5"]
    assert json.loads(wide.attrs["notes"]) == []
    (tmp_path / "summary.json").write_text("{}")  # As if a report had been written.
    late = dataclasses.replace(wider, seeds=range(7), init_scales=(1.0, 2.0, 3.0)).run(tmp_path)
    (note,) = json.loads(late.attrs["notes"])
    assert note.startswith("This study was extended in seeds, init_scales after a report had been")
    assert json.loads(Study.load(tmp_path).run(tmp_path).attrs["notes"]) == [note]


def test_the_primary_comparison_cannot_change(tmp_path):
    first = small()
    first.save(tmp_path)
    other = [FAMILIES[0], *make.with_momentum(["0.5"]), FAMILIES[1]]
    with pytest.raises(ValueError, match="holds another study, which differs in primary"):
        small(arms=other).save(tmp_path)
    more = dataclasses.replace(Study.load(tmp_path), arms=other)
    more.save(tmp_path)
    assert more.the_primary == first.the_primary


@pytest.mark.usefixtures("as_shipped")
def test_a_study_may_be_made_of_numpy_numbers_and_static_types(tmp_path):
    typed = Arm("typed", optax.sgd, learning_rate=0.1, accumulator_dtype=jnp.bfloat16,
                static=["accumulator_dtype"])  # fmt: skip
    seeds: Any = np.arange(3)
    scales: Any = np.ones(1)
    study = small(arms=[*FAMILIES, typed], seeds=seeds, init_scales=scales)
    results = study.run(tmp_path)
    assert results.sizes["arm"] == 7
    with pytest.raises(ValueError, match="of the arm 'typed' cannot be imported"):
        Study.load(tmp_path)


def test_a_family_beside_an_arm_of_its_own_rate_is_compared_with_it():
    adam = Arm("Adam", optax.adam, learning_rate=0.1)
    assert small(arms=[FAMILIES[0], adam]).the_primary == Primary("Adam", "mu 0 at 0.1")


@pytest.mark.slow
def test_tuning_takes_the_steps_of_each_family(monkeypatch):
    seen = []
    run = design.run

    def watched(problem, arms, seeds, *rest, **settings):
        seen.append([arm.steps for arm in arms])
        return run(problem, arms, seeds, *rest, **settings)

    monkeypatch.setattr(design, "run", watched)
    long = Arm("long", optax.sgd, learning_rate=0.1, steps=40)
    small(arms=[*FAMILIES, long], tuning_seeds=2).run()
    assert seen[0] == [5] * 6


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"steps": 6}, "steps"),
        ({"seeds": range(3)}, "seeds"),
        ({"arms": FAMILIES[:1]}, "arms, primary"),
        ({"order_seeds": [0, 1]}, "order_seeds"),
        ({"learning_rate": 1.0, "margin": 0.2}, "learning_rate, primary, margin"),
        ({"problem": problems.find("safran-shamir")}, "problem"),
        ({"tuning_seeds": 2}, "tuning_seeds"),
    ],
)
def test_a_folder_with_another_study_is_refused(tmp_path, changes, names):
    small().save(tmp_path)
    with pytest.raises(
        ValueError, match=f"holds another study, which differs in {names}: only arms"
    ):
        small(**changes).save(tmp_path)
    assert Study.load(tmp_path).to_json() == small().to_json()


@pytest.mark.parametrize("content", ["{", "", "[]", "{}", '{"problem": "quadratic", "arms": 3}'])
def test_a_damaged_study_is_one_line_with_its_name(tmp_path, content):
    (tmp_path / design.FILE).write_text(content)
    with pytest.raises(ValueError, match=r"study\.json is damaged: ") as raised:
        Study.load(tmp_path)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [("steps", "x", "is damaged: Type"), ("extended", 3, "is damaged: Type"),
     ("seeds", ["a"], "is damaged: Type"), ("rates", [-1.0], "must be above 0")],
)  # fmt: skip
def test_a_study_with_a_wrong_value_is_one_line_with_its_name(tmp_path, name, value, says):
    small().save(tmp_path)
    fields = json.loads((tmp_path / design.FILE).read_text())
    (tmp_path / design.FILE).write_text(json.dumps({**fields, name: value}))
    with pytest.raises(ValueError, match=says) as raised:
        Study.load(tmp_path)
    assert design.FILE in str(raised.value)


def test_a_study_that_is_not_there_or_made_in_a_program(tmp_path):
    with pytest.raises(ValueError, match=r"holds no study, because it has no study\.json"):
        Study.load(tmp_path)
    small(problem=uneven_bowl()).save(tmp_path)
    with pytest.raises(ValueError, match=r"was made in a program .*: give problem="):
        Study.load(tmp_path)
    assert Study.load(tmp_path, uneven_bowl()).problem.name == "bowl"


@pytest.mark.slow
def test_the_counts_are_those_of_what_is_trained(trained):
    study = small(tuning_seeds=2, init_scales=[1.0, 2.0], arms=[*FAMILIES, *make.controls(0.1)])
    counts = study.counts
    results = study.run()
    assert counts["runs"] + counts["tuning_runs"] == sum(trained)
    assert counts["arms"] == results.sizes["arm"] == 8
    assert counts["steps"] == int(results.step[-1])
    assert json.loads(results.attrs["primary"])["arm"] == "mu 0.9 at 0.01"
    assert results.tuning_loss.sel(arm="noise at 0.1").isnull().all()
    assert not results.tuning_loss.sel(arm="mu 0 at 1").isnull().any()


@pytest.mark.slow
def test_restarts_are_tuned_with_their_share_of_the_steps():
    """With a quarter of the steps, a different learning rate would be best."""

    def sprint(learning_rate):
        """Reaches -1 after 1 / learning_rate steps, and then gets worse again."""

        def update(updates, state, params=None):
            forth = jnp.where(state < 1 / learning_rate, -1.0, 1.0)
            return jax.tree.map(lambda g: g * forth * learning_rate, updates), state + 1

        return optax.GradientTransformation(lambda params: 0, update)

    line = Problem(lambda key: 1e-3 * jax.random.normal(key, (2,)), lambda w: w[0], name="line")
    arms = [Arm("once", sprint), Arm("four times", sprint, restarts=4)]
    study = Study(
        line, arms, rates=(1 / 16, 1 / 4), seeds=[0, 1], order_seeds=None, steps=16, tuning_seeds=2
    )
    loss = study.run().tuning_loss.mean(["init_scale", "tuning_seed"])
    once, four_times = loss.values.reshape(2, 2)
    assert once.argmin() == 0
    assert four_times.argmin() == 1
