"""Optax's types of states: their counts, their arrays per param, what may be lost."""

from momentum_jax._momentum import TraceState
from momentum_jax._states import FrameworkTypes, Remembered, StateRules, register_framework

_AFTER_A_STEP = "Carry the state over after a whole step."
_AFTER_SYNC = "Carry the state over after a synchronization."
_INNER_STATE = "Give the state of the wrapped optimizer, and the params to continue from."

_INJECT = StateRules(
    step_count="count",
    schedules="hyperparams_states",
    not_per_param=("count", "hyperparams"),
)
_CONDITIONAL = StateRules(step_count="step")
_SCHEDULE = StateRules(step_count="count")
_PER_PARAM = StateRules(is_per_param=True)

_STATES = {
    # Schedules and hyperparameters.
    "ScaleByScheduleState": _SCHEDULE,
    "WrappedScheduleState": _SCHEDULE,
    "AddNoiseState": _SCHEDULE,
    "InjectHyperparamsState": _INJECT,
    "InjectStatefulHyperparamsState": _INJECT,
    "ReduceLROnPlateauState": StateRules(
        has_step_counts=False,
        remembered=Remembered(
            "scale",
            1,
            "optax.contrib.reduce_on_plateau has a scale of {}",
            "Multiply the learning rate by the scale, and give the state with a scale of 1.",
        ),
    ),
    # Wrappers.
    "MaskedState": StateRules(selects_params=True),
    "ConditionallyTransformState": _CONDITIONAL,
    "ConditionallyMaskState": _CONDITIONAL,
    "MultiStepsState": StateRules(
        step_count="gradient_step",
        accumulates_gradients=True,
        is_per_param=True,
        not_per_param=("mini_step", "gradient_step", "skip_state"),
        remembered=Remembered(
            "mini_step",
            0,
            "optax.MultiSteps has accumulated {} gradients that no step has used",
            _AFTER_A_STEP,
        ),
    ),
    "ApplyEvery": StateRules(
        is_per_param=True,
        remembered=Remembered(
            "count",
            0,
            "optax.apply_every has accumulated {} gradients that no step has used",
            _AFTER_A_STEP,
        ),
    ),
    "ApplyIfFiniteState": StateRules(
        has_step_counts=False,
        remembered=Remembered(
            "notfinite_count",
            0,
            "optax.apply_if_finite has counted {} gradients in a row that were not finite",
            "Carry the state over after a finite gradient.",
        ),
    ),
    "LookaheadState": StateRules(
        remembered=Remembered(
            "steps_since_sync",
            0,
            "optax.lookahead has taken {} fast steps since the slow params were synchronized",
            _AFTER_SYNC,
        )
    ),
    "SAMState": StateRules(
        remembered=Remembered(
            "steps_since_sync",
            0,
            "optax.contrib.sam has taken {} steps since it was synchronized",
            _AFTER_SYNC,
        )
    ),
    "ScheduleFreeState": StateRules(
        running_sums=("z", "weight_sum", "max_lr"),
        remembered=Remembered(
            "weight_sum",
            0,
            "optax.contrib.schedule_free has averaged params, with a sum of weights of {}",
            _INNER_STATE,
        ),
    ),
    "MechanicState": StateRules(
        remembered=Remembered(
            "count",
            0,
            "optax.contrib.mechanize has taken {} steps from its initial params",
            _INNER_STATE,
        )
    ),
    "MonitorState": StateRules(not_per_param=("measurements",)),
    # Methods.
    "TraceState": StateRules(is_per_param=True, same_as=TraceState),
    "EmaState": _PER_PARAM,
    "ScaleByAdaDeltaState": _PER_PARAM,
    "ScaleByAdamState": _PER_PARAM,
    "ScaleByAdanState": _PER_PARAM,
    "ScaleByAmsgradState": _PER_PARAM,
    "ScaleByBeliefState": _PER_PARAM,
    "ScaleByLionState": _PER_PARAM,
    "ScaleByRStdDevState": _PER_PARAM,
    "ScaleByRmsState": _PER_PARAM,
    "ScaleByRpropState": _PER_PARAM,
    "ScaleByRssState": _PER_PARAM,
    "ScaleByLBFGSState": StateRules(is_per_param=True, not_per_param=("count", "weights_memory")),
    "MuonState": StateRules(not_per_param=("count", "ns_coeffs")),
    "FactoredState": StateRules(shapes_have_meaning=True),
    "GaLoreState": StateRules(
        shapes_have_meaning=True,
        remembered=Remembered(
            "count",
            0,
            "optax.contrib.galore has taken {} steps in projected spaces",
            "Start from the state that init returned.",
        ),
    ),
}


def register() -> None:
    """Registers Optax's types."""
    optax_types = FrameworkTypes(
        states=_STATES,
        param_nodes=("LookaheadParams", "MaskedNode", "SplitRealAndImaginaryArrays"),
        masked_nodes=("MaskedNode",),
        param_copies=("LookaheadParams",),
        group_fields=("inner_states",),
        hyperparameter_fields=("hyperparams",),
        has_global_scalars=True,
    )
    register_framework("optax", optax_types)
