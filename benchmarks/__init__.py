"""Compares momentum_jax with Optax, PyTorch and the memory bandwidth of the machine."""
