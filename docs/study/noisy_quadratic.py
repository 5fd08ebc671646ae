"""An ill-conditioned quadratic with noisy gradients, for the option `--problem`."""

from momentum_jax.study.problems import quadratic

problem = quadratic(condition=1000.0, noise=0.3)
