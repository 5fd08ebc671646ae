"""What momentum is doing, and how far it is from diverging.

- `measure` and `measure_by_leaf`: energies, alignment and gain of a step, from the gradient and the
  velocity.
- `curvature`: the largest and the smallest eigenvalue of the Hessian, from products with vectors.
- `edge`: how near a step is to the largest that is stable at that curvature.
- `record`: a wrapper that keeps the last measurement, and now and then the curvature, in the state
  of the optimizer.

All but `edge` works inside jit or outside. In a chain of Optax's, `optax.monitor` can measure
behind `momentum` too: its updates are the velocity, the gradient is an extra argument.
"""

from momentum_jax.diagnostics._curvature import Curvature as Curvature
from momentum_jax.diagnostics._curvature import curvature as curvature
from momentum_jax.diagnostics._edge import Edge as Edge
from momentum_jax.diagnostics._edge import edge as edge
from momentum_jax.diagnostics._measure import Measurement as Measurement
from momentum_jax.diagnostics._measure import measure as measure
from momentum_jax.diagnostics._measure import measure_by_leaf as measure_by_leaf
from momentum_jax.diagnostics._record import RecordState as RecordState
from momentum_jax.diagnostics._record import record as record
