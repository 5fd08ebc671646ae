"""SGD as PyTorch, Keras, Caffe and Optax define it, and the import and export of its checkpoints.

`torch_sgd`, `keras_sgd`, `caffe_sgd` and `optax_sgd` reproduce each framework's SGD with
momentum. A training recipe does not carry over from one framework to another, because they differ
in:

    =========================  =============  =============  =============  =============
    setting                    torch_sgd      keras_sgd      caffe_sgd      optax_sgd
    =========================  =============  =============  =============  =============
    learning rate              outside        inside         inside         outside
    default learning rate      1e-3           0.01           none           none
    default momentum           0              0              0              None
    dampening                  not in the     no option      no option      no option
                               first step
    weight decay               coupled        decoupled      coupled        no option
    maximize                   flips the      no option      no option      no option
                               gradient, not
                               the decay
    nesterov without momentum  error          ignored        no option      ignored
    schedules count            from 0         from 0         from 0         from 0
    =========================  =============  =============  =============  =============

The learning rate is inside or outside the velocity: see `momentum_jax.momentum`. Coupled decay
adds weight_decay * w to the gradient, and so to the velocity. Decoupled decay multiplies w by
1 - learning_rate * weight_decay and does not change the velocity. A learning rate may be a
schedule: a function of the number of steps taken, from 0.

`update` of all four takes `learning_rate` and `mu` as keywords that override the values for that
call; `update` of `torch_sgd` also takes `dampening`. A learning rate given to `update` is also used
for decoupled decay. If there is no velocity (momentum=0, or None in `optax_sgd`), a `mu` other than
0 is a ValueError.

A gradient that is None, an `optax.MaskedNode` or float0 means no update, no decay and an
unchanged velocity. The arithmetic is at least float32 wide, and the updates are rounded once, to
the gradients' dtypes.

In float64 the results equal those of the real PyTorch and Keras to 1e-10 over 48 steps, and those
of Caffe's documented solver. With 16-bit params they differ, because here the velocity is stored in
float32 and there in 16 bits.

`load_torch`, `load_keras` and `load_optax` fill a state with the velocity of another optimizer;
`dump_torch`, `dump_keras` and `dump_optax` export it. `momentum_from_trace` and
`trace_from_momentum` convert between states of `momentum` and `trace`. PyTorch and Keras are not
imported: arrays are read through `__array__` and returned as NumPy arrays.

All eight functions carry over velocities, and the counts on which schedules depend. If a state, the
source or the target, holds anything else that affects later steps, they raise a ValueError and drop
nothing:

- gradients accumulated by `optax.MultiSteps` or `optax.apply_every`;
- an unfinished period of `optax.lookahead` or `optax.contrib.sam`;
- consecutive gradients that `optax.apply_if_finite` has rejected;
- a scale other than 1 in `optax.contrib.reduce_on_plateau`;
- a compensation of `momentum_jax.kahan`;
- steps of `schedule_free`, `mechanize` or `galore` of `optax.contrib`.

They also raise a ValueError if counts within a state differ, or if velocities are not finite.

States may be sharded over several processes. Then every process must make the call, and every
process gets the complete NumPy arrays of an export. If a function fills one state from another and
both are on the same devices, no array passes through the host.

Example:
  A checkpoint of PyTorch, `{"model": model.state_dict(), "optimizer": optimizer.state_dict()}`::

    checkpoint = torch.load("checkpoint.pt", map_location="cpu")
    name_of = {id(w): name for name, w in model.named_parameters()}
    names = [name_of[id(w)] for group in optimizer.param_groups for w in group["params"]]
    weights = {name: checkpoint["model"][name].detach().float().numpy() for name in names}

    def to_params(weights):  # your function from weights by name to params
        return {
            "conv": {"kernel": np.transpose(weights["conv.weight"], (2, 3, 1, 0))},
            "head": {"kernel": np.transpose(weights["head.weight"]), "bias": weights["head.bias"]},
        }

    params = jax.tree.map(jnp.asarray, to_params(weights))
    settings = torch_hyperparameters(checkpoint["optimizer"])
    tx = torch_sgd(**{**settings, "lr": schedule})  # or **settings, for the present lr
    opt_state = load_torch(
        tx.init(params), checkpoint["optimizer"], names=weights, to_params=to_params, count=30_000
    )
"""

from momentum_jax.frameworks import _flax_states, _optax_states
from momentum_jax.frameworks._caffe import caffe_sgd as caffe_sgd
from momentum_jax.frameworks._convert import momentum_from_trace as momentum_from_trace
from momentum_jax.frameworks._convert import trace_from_momentum as trace_from_momentum
from momentum_jax.frameworks._keras import dump_keras as dump_keras
from momentum_jax.frameworks._keras import keras_sgd as keras_sgd
from momentum_jax.frameworks._keras import load_keras as load_keras
from momentum_jax.frameworks._optax import dump_optax as dump_optax
from momentum_jax.frameworks._optax import load_optax as load_optax
from momentum_jax.frameworks._optax import optax_sgd as optax_sgd
from momentum_jax.frameworks._torch import torch_sgd as torch_sgd
from momentum_jax.frameworks._torch_state_dict import dump_torch as dump_torch
from momentum_jax.frameworks._torch_state_dict import load_torch as load_torch
from momentum_jax.frameworks._torch_state_dict import torch_hyperparameters as torch_hyperparameters
from momentum_jax.frameworks._torch_state_dict import torch_labels as torch_labels

# Makes the types of states of each framework known to the code that finds and carries over states.
_optax_states.register()
_flax_states.register()
