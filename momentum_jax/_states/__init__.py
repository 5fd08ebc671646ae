"""States: finds what a state holds, reads and resets velocities, carries states over.

A state of Optax is a tree of states. `_walk` walks through it, and `_rules` is the registry of the
types of states.
"""

from momentum_jax._states._moving import any_nonzero as any_nonzero
from momentum_jax._states._moving import any_velocity_nonzero as any_velocity_nonzero
from momentum_jax._states._moving import cast_like as cast_like
from momentum_jax._states._moving import decode as decode
from momentum_jax._states._moving import put_like as put_like
from momentum_jax._states._moving import to_host as to_host
from momentum_jax._states._reading import read_velocity as read_velocity
from momentum_jax._states._reading import states_with_velocity as states_with_velocity
from momentum_jax._states._report import TransplantReport as TransplantReport
from momentum_jax._states._report import TransplantRow as TransplantRow
from momentum_jax._states._resetting import reset_velocity as reset_velocity
from momentum_jax._states._resetting import zero_velocity_if as zero_velocity_if
from momentum_jax._states._rules import FrameworkTypes as FrameworkTypes
from momentum_jax._states._rules import Remembered as Remembered
from momentum_jax._states._rules import StateRules as StateRules
from momentum_jax._states._rules import register_framework as register_framework
from momentum_jax._states._rules import rules_of as rules_of
from momentum_jax._states._rules import schedule_count_field as schedule_count_field
from momentum_jax._states._rules import step_count_field as step_count_field
from momentum_jax._states._transplant import Conversion as Conversion
from momentum_jax._states._transplant import carry_velocities as carry_velocities
from momentum_jax._states._transplant import transplant as transplant
from momentum_jax._states._walk import find_states as find_states
from momentum_jax._states._walk import held_arrays as held_arrays
from momentum_jax._states._walk import locate_states as locate_states
from momentum_jax._states._walk import named_leaves as named_leaves
from momentum_jax._states._walk import replace_states as replace_states
from momentum_jax._states._walk import with_held_arrays as with_held_arrays
