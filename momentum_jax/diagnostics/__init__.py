"""Measures what momentum does during training, and how close it is to diverging.

- `measure` and `measure_by_leaf`: energies, alignment and gain of a step, from the gradient and the
  velocity.
- `curvature`: the largest and the smallest eigenvalue of the Hessian, from Hessian-vector products.
- `edge`: compares the learning rate with the stability limit at that curvature.
- `record`: a wrapper that keeps the last measurement in the state of the optimizer, and measures
  the curvature once per `every` steps.

All of them work inside and outside jit, except `edge`, which works only outside. In an Optax chain,
`optax.monitor` after `momentum` can call `measure` too: the updates that it receives are the
velocity (without nesterov), and the gradient must be passed as an extra argument.
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
