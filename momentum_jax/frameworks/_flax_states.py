"""Flax's types that wrap one array of a state."""

from momentum_jax._states import FrameworkTypes, register_framework


def register() -> None:
    """Registers Flax's types."""
    boxes = ("Variable", "VariableState", "AxisMetadata")
    register_framework("flax", FrameworkTypes(has_states=False, boxes=boxes))
