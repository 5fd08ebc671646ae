"""`python docs/study/start_up.py FOLDER`: does the slow start of momentum explain its effect?

Under a constant gradient, momentum lags behind plain gradient descent at the same effective
learning rate: after n steps by mu (1 - mu^n) / (1 - mu) steps. After 200 steps these are 9 steps
with mu 0.9, and 86 with mu 0.99. This study on digits compares momentum with plain gradient descent
that takes that many steps fewer.
"""

import sys
from pathlib import Path

import momentum_jax as mj
from momentum_jax import study
from momentum_jax.study import Arm, Contrast, Primary, problems

STEPS = 200
RATES = (0.0356, 0.0632, 0.112, 0.2, 0.356)
DELAYS = {mu: round(mu * (1 - mu**STEPS) / (1 - mu)) for mu in (0.9, 0.99)}


def main(folder):
    """Trains the study and writes its report."""
    arms, contrasts = [], []
    for rate in RATES:
        for mu, delay in DELAYS.items():
            late = Arm(f"mu {mu}", mj.momentum, mu=mu).at(rate)
            early = Arm(f"mu 0, {STEPS - delay} steps", mj.momentum, mu=0.0, steps=STEPS - delay)
            early = early.at(rate)
            arms += [early, late]
            contrasts.append(Contrast("arms", early.name, (late.name,), rate))
    plan = study.Study(
        problems.find("digits"),
        arms,
        seeds=range(40),
        order_seeds=range(4),
        init_scales=(0.5, 1.0, 2.0, 4.0),
        steps=STEPS,
        evaluations=1,  # So that the steps are not rounded up.
        contrasts=contrasts,
        primary=Primary("mu 0.99 at 0.002", "mu 0, 114 steps at 0.2"),
    )
    study.report(plan.run(folder, progress=True), folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
