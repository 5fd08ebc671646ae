"""Closed-form results about momentum: on quadratics, in gradient noise, and for the energy.

The recurrence is v <- mu * v - learning_rate * g, w <- w + v. The curvatures of the function lie
between `strong_convexity` and `smoothness`: m and L in the literature, with the condition number
k = L / m. A rate is the factor that multiplies the distance to the minimum in each step.

All functions run on the host and take a known real number of any type, such as a NumPy scalar;
traced values are refused. Results are Python floats, accurate to a few units in the last place. A
value that is below 1 is never rounded to 1. This holds for the `rate` and the `mu` of a `Tuning`,
and for the spectral radius of an iteration that converges.
"""

from momentum_jax.theory._physics import StationaryVariance as StationaryVariance
from momentum_jax.theory._physics import effective_learning_rate as effective_learning_rate
from momentum_jax.theory._physics import friction as friction
from momentum_jax.theory._physics import stationary_variance as stationary_variance
from momentum_jax.theory._qhm import QHMSettings as QHMSettings
from momentum_jax.theory._qhm import qhm_from_accsgd as qhm_from_accsgd
from momentum_jax.theory._qhm import qhm_from_pid as qhm_from_pid
from momentum_jax.theory._qhm import qhm_from_robust_momentum as qhm_from_robust_momentum
from momentum_jax.theory._qhm import qhm_from_synthesized_nesterov as qhm_from_synthesized_nesterov
from momentum_jax.theory._qhm import qhm_from_triple_momentum as qhm_from_triple_momentum
from momentum_jax.theory._stability import no_escape_bound as no_escape_bound
from momentum_jax.theory._stability import spectral_radius as spectral_radius
from momentum_jax.theory._stability import stability_limit as stability_limit
from momentum_jax.theory._tuning import TripleMomentumTuning as TripleMomentumTuning
from momentum_jax.theory._tuning import Tuning as Tuning
from momentum_jax.theory._tuning import gradient_descent as gradient_descent
from momentum_jax.theory._tuning import heavy_ball as heavy_ball
from momentum_jax.theory._tuning import nesterov as nesterov
from momentum_jax.theory._tuning import triple_momentum as triple_momentum
