"""ZeRO-1: shards the optimizer state over the devices that hold the same params.

This is the first stage of ZeRO. The shardings are stored nowhere else than in the state: `init`
chooses them, and `update` keeps the sharding of each array that it is given.
"""

from momentum_jax.sharding._zero1 import unsharded_params as unsharded_params
from momentum_jax.sharding._zero1 import zero1 as zero1
