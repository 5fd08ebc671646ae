"""An ill-conditioned quadratic whose gradients are mostly noise, for `--problem`."""

from momentum_jax.study.problems import quadratic

problem = quadratic(condition=1000.0, noise=0.3)
