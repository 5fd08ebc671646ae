"""Does momentum take the luck out of the initial weights? Run `python -m momentum_jax.study`."""
