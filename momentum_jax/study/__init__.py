"""Measures whether training depends less on the initial weights with momentum.

Run `python -m momentum_jax.study`, or build a `Study` in Python.
"""

from momentum_jax.study.arms import Arm as Arm
from momentum_jax.study.comparisons import Verdict as Verdict
from momentum_jax.study.comparisons import compare as compare
from momentum_jax.study.comparisons import verdict as verdict
from momentum_jax.study.components import variance_components as variance_components
from momentum_jax.study.contrasts import Contrast as Contrast
from momentum_jax.study.contrasts import Primary as Primary
from momentum_jax.study.descriptions import describe as describe
from momentum_jax.study.design import Study as Study
from momentum_jax.study.problem import Metric as Metric
from momentum_jax.study.problem import Problem as Problem
from momentum_jax.study.report import report as report
from momentum_jax.study.side_by_side import compare_reports as compare_reports
from momentum_jax.study.sweep import run as run
