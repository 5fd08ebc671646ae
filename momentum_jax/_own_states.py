"""What is known of the states of this package's own wrappers."""

from momentum_jax._states import FrameworkTypes, StateRules, register_framework


def register() -> None:
    """Registers the states of `kahan` and `adaptive_restart`."""
    states = {
        "KahanState": StateRules(reset_with_velocity="compensation"),
        "AdaptiveRestartState": StateRules(converted_with_velocity=True),
    }
    register_framework("momentum_jax", FrameworkTypes(states=states))
