"""Momentum for JAX, done exactly: a pure init/update pair that composes with Optax."""

import sys as _sys

# While Python looks for the module that it is to run, sys.argv[0] is "-m" (documentation of
# Python, Command line). If that is ours, a command of this package is starting.
if _sys.argv[:1] == ["-m"] and any(word.startswith("momentum_jax.") for word in _sys.orig_argv):
    from momentum_jax import _command

    _command.start()

from momentum_jax import diagnostics as diagnostics
from momentum_jax import frameworks as frameworks
from momentum_jax import schedules as schedules
from momentum_jax import sharding as sharding
from momentum_jax import theory as theory
from momentum_jax._apply_updates import apply_updates as apply_updates
from momentum_jax._kahan import KahanState as KahanState
from momentum_jax._kahan import kahan as kahan
from momentum_jax._mixtures import AggMoState as AggMoState
from momentum_jax._mixtures import QHMState as QHMState
from momentum_jax._mixtures import aggmo as aggmo
from momentum_jax._mixtures import qhm as qhm
from momentum_jax._momentum import MomentumState as MomentumState
from momentum_jax._momentum import TraceState as TraceState
from momentum_jax._momentum import momentum as momentum
from momentum_jax._momentum import trace as trace
from momentum_jax._recurrence import RecurrenceState as RecurrenceState
from momentum_jax._recurrence import SeveralVelocitiesState as SeveralVelocitiesState
from momentum_jax._recurrence import recurrence as recurrence
from momentum_jax._restart import AdaptiveRestartState as AdaptiveRestartState
from momentum_jax._restart import adaptive_restart as adaptive_restart
from momentum_jax._states import TransplantReport as TransplantReport
from momentum_jax._states import TransplantRow as TransplantRow
from momentum_jax._states import read_velocity as read_velocity
from momentum_jax._states import reset_velocity as reset_velocity
from momentum_jax._states import transplant as transplant

__all__ = [
    "AdaptiveRestartState",
    "AggMoState",
    "KahanState",
    "MomentumState",
    "QHMState",
    "RecurrenceState",
    "SeveralVelocitiesState",
    "TraceState",
    "TransplantReport",
    "TransplantRow",
    "adaptive_restart",
    "aggmo",
    "apply_updates",
    "diagnostics",
    "frameworks",
    "kahan",
    "momentum",
    "qhm",
    "read_velocity",
    "recurrence",
    "reset_velocity",
    "schedules",
    "sharding",
    "theory",
    "trace",
    "transplant",
]
__version__ = "0.1.0"
