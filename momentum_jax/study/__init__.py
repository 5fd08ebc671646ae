"""Does momentum take the luck out of the initial weights? Run `python -m momentum_jax.study`."""

from momentum_jax.study.arms import Arm as Arm
from momentum_jax.study.problems import Problem as Problem
from momentum_jax.study.report import report as report
from momentum_jax.study.statistics import summarize as summarize
from momentum_jax.study.sweep import run as run
from momentum_jax.study.sweep import tune as tune
