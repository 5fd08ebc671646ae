"""Defines a study as one record that can be run, stored, resumed and extended."""

import dataclasses
import functools
import json
import math
import operator
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import xarray as xr

from momentum_jax.study import problems, storing
from momentum_jax.study.arms import Arm, from_json, one_minus_mu, to_json
from momentum_jax.study.contrasts import Contrast, Primary, as_json, contrast_from_json
from momentum_jax.study.problem import Problem
from momentum_jax.study.statistics import final
from momentum_jax.study.sweep import run
from momentum_jax.study.training import MEASURED_ROWS, keys, sharpness, timetable

# The first seed of tuning. The study's own seeds start at 0, so tuning uses separate seeds.
FIRST_TUNING_SEED = 1_000_000

# At how many initial weights the sharpness is measured, for the edge of stability.
PROBES = 8

FILE = "study.json"
# The key in that file that lists what was added after a report had been written.
EXTENDED = "extended"
# The fields that may be extended in a study that has runs; all others must stay unchanged.
EXTENDABLE = ("arms", "rates", "seeds", "order_seeds", "init_scales", "tuning_seeds")


@dataclasses.dataclass(frozen=True, eq=False)
class Study:
    """A study of how much the result of training depends on the initial weights or data order.

    Arms without a learning rate are families: each is trained at every effective learning rate
    of the grid `rates`. An effective learning rate is learning_rate / (1 - mu). The first arm is
    the baseline.

    Attributes:
      problem: what is trained. If learning rates are tuned and the problem has no validation
        data, a sixth of its training rows is held out.
      arms: families, and arms with their own learning rates.
      rates: the grid of effective learning rates of the families.
      learning_rate: the effective learning rate of the primary comparison; it is added to
        `rates`. By default the problem's own, or the middle one of `rates`.
      seeds: the seeds of the initial weights; default range(40).
      order_seeds: the seeds of the data order, crossed with `seeds`; None pairs them (see `run`).
      init_scales: factors that multiply the initial weights; default (1.0,).
      steps: steps per run of arms without their own number; default 200.
      evaluations: see `run`.
      tuning_seeds: number of separate seeds used only for tuning the learning rates; 0, the
        default, means no tuned contrast.
      contrasts: which arms are compared. By default: the families at each effective learning
        rate; the families at each learning rate that the baseline has in common with another
        family; each family at its tuned rate; the other arms against the baseline at the primary
        rate. Only arms with the same batch size are compared.
      primary: the comparison that decides the verdict. By default the second family against the
        first at `learning_rate`; without families, the second arm against the first.
      margin: the margin of equivalence of the default primary comparison; default 0.1.
      record: see `run`.

    Raises:
      ValueError: families without rates, or rates without families; tuning over fewer than
        two rates; no arms; two arms with the same name.

    Example:
      >>> from momentum_jax.study.arms import baseline, with_momentum
      >>> arms = [baseline(), *with_momentum(["0.9"])]
      >>> study = Study(problems.digits(), arms, rates=(0.02, 0.2), seeds=range(6))
      >>> [arm.name for arm in study.all_arms]
      ['mu 0 at 0.02', 'mu 0 at 0.2', 'mu 0.9 at 0.002', 'mu 0.9 at 0.02']
      >>> study.the_primary
      Primary(arm='mu 0.9 at 0.02', baseline='mu 0 at 0.2', margin=0.1)
    """

    problem: Problem
    arms: Sequence[Arm]
    _: dataclasses.KW_ONLY
    rates: Sequence[float] = ()
    learning_rate: float | None = None
    seeds: Sequence[int] = range(40)
    order_seeds: Sequence[int] | None = None
    init_scales: Sequence[float] = (1.0,)
    steps: int = 200
    evaluations: int | None = None
    tuning_seeds: int = 0
    contrasts: Sequence[Contrast] | None = None
    primary: Primary | None = None
    margin: float = 0.1
    record: Sequence[str] = ()

    def __post_init__(self):
        """Completes the rates and the problem, and refuses fields that would have no effect."""

        def put(name, value):
            object.__setattr__(self, name, value)

        put("arms", tuple(self.arms))
        put("record", tuple(self.record))
        put("seeds", tuple(map(operator.index, self.seeds)))
        put("init_scales", tuple(map(float, self.init_scales)))
        orders = self.order_seeds
        put("order_seeds", None if orders is None else tuple(map(operator.index, orders)))
        put("contrasts", None if self.contrasts is None else tuple(self.contrasts))
        rates = sorted(set(self.rates))
        families = [arm for arm in self.arms if arm.is_family]
        if bool(families) != bool(rates):
            raise ValueError(
                f"rates={rates} are for arms without a learning rate, which are "
                f"{[arm.name for arm in families]}: give both or neither."
            )
        if not self.arms:
            raise ValueError("arms=() must have at least one arm.")
        if rates:
            usual = self.problem.defaults.get("learning_rate", rates[len(rates) // 2])
            rate = float(self.learning_rate or usual)
            put("learning_rate", rate)
            rates = sorted({*rates, rate})
        put("rates", tuple(float(rate) for rate in rates))
        if not all(0 < rate < math.inf for rate in self.rates):
            raise ValueError(f"rates={self.rates} must be above 0 and finite.")
        names = [arm.name for arm in self.all_arms]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(
                f"several arms have the names {twice}: names must differ, and so must the first "
                "six digits of the rates."
            )
        if self.tuning_seeds and len(rates) < 2:
            raise ValueError(
                f"tuning_seeds={self.tuning_seeds} needs at least two rates to choose from, but "
                f"rates={rates}: give more rates, or tuning_seeds=0."
            )
        if not self.tuning_seeds and any(each.kind == "tuned" for each in self.contrasts or ()):
            raise ValueError(
                "tuning_seeds=0, but a tuned contrast needs tuning seeds: give tuning_seeds=10, "
                "for example."
            )
        has_none = self.problem.data is not None and self.problem.validation_data is None
        if self.tuning_seeds and has_none:
            put("problem", self.problem.with_validation())

    @functools.cached_property
    def all_arms(self) -> list[Arm]:
        """All arms to train: each family at each rate, then the arms with their own rates."""
        return self._at_rates + [arm for arm in self.arms if not arm.is_family]

    @functools.cached_property
    def _at_rates(self):
        return [arm.at(rate) for arm in self.arms if arm.is_family for rate in self.rates]

    @functools.cached_property
    def all_contrasts(self) -> list[Contrast]:
        """The contrasts: those given, or the default ones."""
        if self.contrasts is not None:
            return list(self.contrasts)
        found = []
        for size in dict.fromkeys(arm.batch_size for arm in self.arms):
            group = [arm for arm in self.arms if arm.batch_size == size]
            families = [arm for arm in group if arm.is_family]
            others = tuple(arm.name for arm in group if not arm.is_family)
            if not families:
                found += [Contrast("arms", others[0], others[1:])] if len(others) > 1 else []
                continue
            found += list(self._contrasts_of(families))
            if others:
                found.append(Contrast("control", self._primary_arm(families[0]).name, others))
        return found

    def _primary_arm(self, family):
        assert self.learning_rate is not None  # __post_init__ sets it if there are families.
        return family.at(self.learning_rate)

    def _contrasts_of(self, families):
        first, *rest = families
        if not rest:
            return
        with_mu = any("mu" in arm.settings for arm in families)
        for rate in self.rates:
            kind = "same effective rate" if with_mu else "same rate"
            yield Contrast(kind, first.at(rate).name, tuple(a.at(rate).name for a in rest), rate)
        for rate in self.rates if with_mu else ():
            wanted = rate * one_minus_mu(first)
            same = [
                arm.at(other).name
                for arm in rest
                for other in self.rates
                if other != rate and math.isclose(other * one_minus_mu(arm), wanted, rel_tol=1e-6)
            ]
            if same:
                yield Contrast("same rate", first.at(rate).name, tuple(same), wanted)
        if self.tuning_seeds:
            yield Contrast("tuned", first.name, tuple(arm.name for arm in rest))

    @functools.cached_property
    def the_primary(self) -> Primary | None:
        """The primary comparison: the one given, or the default; None if there is one arm."""
        if self.primary is not None:
            return self.primary
        families = [self._primary_arm(arm) for arm in self.arms if arm.is_family]
        pair = families + [arm for arm in self.arms if not arm.is_family]
        return Primary(pair[1].name, pair[0].name, self.margin) if len(pair) > 1 else None

    @property
    def counts(self) -> dict[str, int]:
        """The numbers of arms, of runs, of tuning runs and of steps per run."""
        orders = 1 if self.order_seeds is None else len(self.order_seeds)
        times = timetable(self.problem, self.all_arms, self.steps, self.evaluations)
        return {
            "arms": len(self.all_arms),
            "runs": len(self.all_arms) * len(self.init_scales) * len(self.seeds) * orders,
            "tuning_runs": len(self._at_rates) * len(self.init_scales) * self.tuning_seeds,
            "steps": max(each.steps for each in times),
        }

    def run(self, folder: str | Path | None = None, *, progress: bool = False) -> xr.Dataset:
        """Trains all runs that the folder does not have yet.

        Args:
          folder: where the study is stored. It may already hold this study, or a study that this
            one extends by seeds, arms, rates or scales: finished runs are not trained again.
          progress: whether to show progress bars.

        Returns:
          The dataset of `study.run`. It also has `tuning_loss` (arm, init_scale, tuning_seed),
          the final loss on the validation data, and `initial_sharpness` (init_scale, probe), the
          largest Hessian eigenvalue at some initial weights.

        Raises:
          ValueError: as for `study.run`; or the folder holds another study or a damaged one.
          OSError: the folder cannot be written to.

        Example:
          >>> from momentum_jax.study.arms import baseline
          >>> few = dict(rates=(0.1, 1.0), seeds=range(2), steps=5)
          >>> Study(problems.quadratic(), [baseline()], **few).run().sizes["arm"]
          2
        """
        folder = None if folder is None else Path(folder)
        with storing.locked(folder):
            if folder is not None and jax.process_index() == 0:
                self.save(folder)
            common: dict[str, Any] = {"init_scales": self.init_scales}
            tuning = None
            if self.tuning_seeds:
                tuning = run(
                    self.problem.for_tuning(),
                    self._for_tuning(),
                    range(FIRST_TUNING_SEED, FIRST_TUNING_SEED + self.tuning_seeds),
                    **common,
                    evaluations=1,
                    folder=None if folder is None else folder / "tuning",
                    progress="tuning" if progress else None,
                )
            results = run(
                self.problem,
                self.all_arms,
                self.seeds,
                self.order_seeds,
                **common,
                steps=self.steps,
                evaluations=self.evaluations,
                contrasts=self.all_contrasts,
                primary=self.the_primary,
                record=self.record,
                folder=None if folder is None else folder / "runs",
                progress="training" if progress else None,
            )
        if folder is not None:
            notes = json.loads(results.attrs["notes"]) + [
                f"This study was extended in {grown} after a report had been written. A choice "
                "made after seeing results is exploratory."
                for grown in storing.read_json(folder / FILE)[EXTENDED]
            ]
            results.attrs["notes"] = json.dumps(notes)
        if tuning is not None:
            loss = final(tuning).loss.rename(seed="tuning_seed")
            results["tuning_loss"] = loss.reindex(arm=results.arm.values)
        results["initial_sharpness"] = ("init_scale", "probe"), self._initial_sharpness()
        return results

    def _for_tuning(self):
        """The families at all rates, with the same numbers of steps as in the study."""
        times = timetable(self.problem, self.all_arms, self.steps, self.evaluations)
        return [
            arm.replaced(steps=time.steps) for arm, time in zip(self._at_rates, times, strict=False)
        ]

    def _initial_sharpness(self):
        """The largest Hessian eigenvalue of the training loss at some initial weights."""
        problem = self.problem
        if problem.curvature is not None:
            return np.full((len(self.init_scales), 1), problem.curvature)
        rows = jax.tree.map(lambda x: x[:MEASURED_ROWS], problem.data)

        def of_one(seed, scale):
            params, state = problem.start(keys(seed, seed, 0)[0])
            return sharpness(
                lambda w: problem.value_and_state(w, state, rows)[0], problem.scale(params, scale)
            )

        seeds = jnp.array(self.seeds[:PROBES], jnp.uint32)
        by_seed = jax.jit(lambda scale: jax.lax.map(lambda seed: of_one(seed, scale), seeds))
        found = [by_seed(jnp.float32(scale)) for scale in self.init_scales]
        return np.array(found).astype(np.float32)

    def to_json(self) -> dict[str, Any]:
        """Converts the study for `json.dumps`. Of the problem only its `source` is kept."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        fields["problem"] = self.problem.source
        fields["arms"] = [to_json(arm) for arm in self.arms]
        fields["contrasts"] = self.contrasts and [as_json(each) for each in self.contrasts]
        fields["primary"] = self.the_primary and as_json(self.the_primary)
        return json.loads(json.dumps(fields))

    def check_folder(self, folder: Path) -> None:
        """Checks that the folder holds no study, this study, or one that this study extends.

        Raises:
          ValueError: the folder holds another study, and the message names what differs; or the
            file is damaged.
        """
        if not (folder / FILE).exists():
            return
        stored = storing.read_json(folder / FILE)
        mine = self.to_json()
        changed = [name for name, value in mine.items() if not _extends(name, stored, value)]
        if changed:
            raise ValueError(
                f"{folder} holds another study, which differs in {', '.join(changed)}: only "
                f"{', '.join(EXTENDABLE)} can be extended (and tuning cannot be added later); "
                "nothing else can change. Give another folder."
            )

    def save(self, folder: Path) -> None:
        """Writes study.json.

        Raises:
          ValueError: the folder holds a study that this one does not extend.
        """
        folder.mkdir(parents=True, exist_ok=True)
        self.check_folder(folder)
        mine = self.to_json()
        stored = storing.read_json(folder / FILE) if (folder / FILE).exists() else mine
        grown = [name for name, value in mine.items() if value != stored[name]]
        mine[EXTENDED] = stored.get(EXTENDED, [])
        if grown and (folder / "summary.json").exists():
            mine[EXTENDED].append(", ".join(grown))
        storing.write_whole(folder / FILE, json.dumps(mine, indent=1).encode())

    @staticmethod
    def load(folder: str | Path, problem: Problem | None = None) -> "Study":
        """Loads the study that a folder holds.

        Args:
          folder: the folder that was given to `run`.
          problem: the problem of the study. Needed only if it was made in a program, and not
            found by name or file.

        Raises:
          ValueError: the folder holds no study, the file is damaged, or the problem or an arm
            cannot be found.
        """
        path = Path(folder) / FILE
        if not path.exists():
            raise ValueError(
                f"{folder} holds no study, because it has no {FILE}: give the folder of a study."
            )
        fields = storing.read_json(path)
        try:
            source = fields.pop("problem")
            if not isinstance(fields.pop(EXTENDED, []), list) or type(fields["steps"]) is not int:
                raise TypeError(f"{EXTENDED} or steps has a wrong type")
            if problem is None and source is None:
                raise ValueError(
                    "the problem was made in a program and cannot be loaded: give problem=."
                )
            fields["arms"] = [from_json(arm) for arm in fields["arms"]]
            fields["contrasts"] = fields["contrasts"] and [
                contrast_from_json(each) for each in fields["contrasts"]
            ]
            fields["primary"] = fields["primary"] and Primary(**fields["primary"])
            return Study(problem or problems.find(source), **fields)
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} is damaged: {type(error).__name__}: {error}.") from None
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error


def _extends(name: str, stored: Any, value: Any) -> bool:
    """Whether a field equals or extends the field of the stored study."""
    if not isinstance(stored, Mapping) or name not in stored:
        return False
    before = stored[name]
    if name not in EXTENDABLE or before is None or value is None:
        return before == value
    if name == "tuning_seeds":
        return value >= before if before else value == before
    return all(each in value for each in before)
