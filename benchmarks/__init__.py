"""momentum_jax side by side with Optax, PyTorch and the machine's own limit."""
