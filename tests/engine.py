"""Draws cases over every axis of the contract, takes two steps, and checks the promises together.

A case is one value of each axis: the transformation, how its velocity is stored, the tree of
params, the dtypes, which gradient is missing, the shardings, the kind of the hyperparameters, and
the carrier, which is how the steps are run. `check_invariants` checks C2 to C7 and C10 of a case.
"""

import dataclasses
import functools
import itertools
import math
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import reference
from jax.sharding import AxisType, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

import momentum_jax

mj: Any = momentum_jax  # Avoids casts: Optax types its trees too widely.

# One value per step; none is exact in a bfloat16, so that arithmetic in 16 bits would be noticed.
LEARNING_RATES, MUS = (0.3, 0.2), (0.9, 0.8)
NU, DAMPENING, WEIGHT_DECAY = 0.7, 0.1, 0.01
STEPS = 2


# The axes. -------------------------------------------------------------------------------


class Method(NamedTuple):
    """A transformation and the equations of its step.

    Attributes:
      make: (learning rate, mu, velocity dtype) -> the transformation.
      step: (v, g, w, learning rate, mu) -> (new v, update), of one leaf in float64.
      overrides: the hyperparameters that `update` takes.
      whole: it decides by all leaves together, so its gradients must not vary within shard_map.
    """

    make: Callable[..., Any]
    step: Callable[..., Any]
    overrides: tuple[str, ...] = ("learning_rate", "mu")
    whole: bool = False


def _last(loop):
    """The last update and velocity of a loop of `reference`."""
    updates, velocities = loop
    return velocities[-1], updates[-1]


def _momentum(nesterov):
    return lambda v, g, w, lr, mu: _last(reference.momentum([g], lr, mu, nesterov, start=v))


def _trace(nesterov, dampening):
    return lambda v, g, w, lr, mu: _last(reference.trace([g], mu, dampening, nesterov, start=v))


def _aggmo(velocities, g, w, lr, mu):
    pairs = zip((0.0, mu), velocities, strict=True)
    steps = [_last(reference.momentum([g], lr, m, start=v)) for m, v in pairs]
    return tuple(v for v, _ in steps), sum(u for _, u in steps) / 2


METHODS = {
    "momentum": Method(
        lambda lr, mu, dtype: mj.momentum(lr, mu, velocity_dtype=dtype), _momentum(False)
    ),
    "momentum, nesterov": Method(
        lambda lr, mu, dtype: mj.momentum(lr, mu, nesterov=True, velocity_dtype=dtype),
        _momentum(True),
    ),
    "trace": Method(
        lambda lr, mu, dtype: mj.trace(mu, velocity_dtype=dtype), _trace(False, 0.0), ("mu",)
    ),
    "trace, nesterov": Method(
        lambda lr, mu, dtype: mj.trace(
            mu, nesterov=True, dampening=DAMPENING, velocity_dtype=dtype
        ),
        _trace(True, DAMPENING),
        ("mu",),
    ),
    "qhm": Method(
        lambda lr, mu, dtype: mj.qhm(lr, mu, NU, velocity_dtype=dtype),
        lambda v, g, w, lr, mu: _last(reference.qhm([g], lr, mu, NU, start=v)),
    ),
    "aggmo": Method(
        lambda lr, mu, dtype: mj.aggmo(lr, (0.0, mu), velocity_dtype=dtype),
        _aggmo,
        ("learning_rate",),
    ),
    "recurrence": Method(
        lambda lr, mu, dtype: mj.recurrence(
            reference.heavy_ball, learning_rate=lr, mu=mu, velocity_dtype=dtype
        ),
        _momentum(False),
    ),
    "torch_sgd": Method(
        lambda lr, mu, dtype: mj.frameworks.torch_sgd(lr, mu, weight_decay=WEIGHT_DECAY),
        lambda v, g, w, lr, mu: _last(reference.sgd([g + WEIGHT_DECAY * w], lr, mu, start=v)),
        (),
    ),
    "kahan": Method(
        lambda lr, mu, dtype: mj.kahan(mj.momentum(lr, mu, velocity_dtype=dtype)),
        _momentum(False),
    ),
    "adaptive_restart": Method(
        lambda lr, mu, dtype: mj.adaptive_restart(mj.momentum(lr, mu, velocity_dtype=dtype)),
        _momentum(False),
        whole=True,
    ),
    "record": Method(
        lambda lr, mu, dtype: mj.diagnostics.record(
            mj.momentum(lr, mu, velocity_dtype=dtype), lr, mu
        ),
        _momentum(False),
        whole=True,
    ),
    "zero1": Method(
        lambda lr, mu, dtype: mj.momentum(lr, mu, velocity_dtype=dtype), _momentum(False)
    ),
}


class Layer(NamedTuple):
    """A named tuple as a container."""

    kernel: Any
    bias: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Block:
    """A container with a field that is not a leaf."""

    layer: Layer
    scale: Any
    activation: str = dataclasses.field(default="relu", metadata={"static": True})


def _shape(*shape):
    return jax.ShapeDtypeStruct(shape, np.float32)


TREES = {
    # Blocks of int8 that are whole, and shapes that they do not divide.
    "blocks": {"first": _shape(33, 8), "large": _shape(64, 128), "odd": _shape(33, 8)},
    "array": _shape(128, 64),
    "dict": {"w": _shape(4, 8), "b": _shape(8), "scale": _shape(), "empty": _shape(0, 3)},
    "nested": {
        "block": Block(Layer(_shape(8, 16), None), _shape(16)),
        "list": [_shape(3), (_shape(2, 1, 3), ())],
        "masked": optax.MaskedNode(),
    },
}

# Dtypes of the params and of their gradients, which the leaves of a tree take in turn.
DTYPES = {
    "float32": [("float32", "float32")],
    "bfloat16": [("bfloat16", "bfloat16")],
    "float16": [("float16", "float16")],
    "bfloat16, float32 gradients": [("bfloat16", "float32")],
    "float32, bfloat16 gradients": [("float32", "bfloat16")],
    "complex64": [("complex64", "complex64")],
    "64 bits": [("float64", "float64"), ("float64", "float32"), ("float32", "float64")],
    "mixed": [("float32", "float32"), ("bfloat16", "float32"), ("float16", "float16")],
    "weak, Python, NumPy": [("weak", "float32"), ("numpy", "numpy"), ("python", "float32")],
}
STORAGE = [None, "float32", "bfloat16", "float16", "int8"]

# What stands for the gradient of the last leaf; "subtree" is None for the first child of the root.
MISSING: dict[str, Any] = {
    "nothing missing": (),
    "None": None,
    "MaskedNode": optax.MaskedNode(),
    "float0": "float0",
    "subtree": None,
}

# By name: the type of a mesh's axes, and whether params and gradients are sharded, and alike.
MESHES = {
    "auto": (AxisType.Auto, "same"),
    "auto, gradients otherwise": (AxisType.Auto, "transposed"),
    "auto, params replicated": (AxisType.Auto, "replicated"),
    "explicit": (AxisType.Explicit, "same"),
    "explicit, gradients otherwise": (AxisType.Explicit, "transposed"),
}
PLACES = ["default device", "device 3", *MESHES]

HYPERPARAMETERS: dict[str, Callable[[float], Any]] = {
    "python": float,
    "numpy float32": np.float32,
    "numpy float64": np.float64,
    "weak array": jnp.asarray,
    "float32 array": jnp.float32,
    "bfloat16 array": jnp.bfloat16,
    "schedule": float,
    "override": float,
}


class Case(NamedTuple):
    """One value of each axis."""

    method: str
    storage: str | None
    tree: str
    dtypes: str
    missing: str
    place: str
    hyperparameters: str
    carrier: str

    def __str__(self):
        return "; ".join(map(str, self))


AXES: dict[str, list[Any]] = {
    "method": list(METHODS),
    "storage": STORAGE,
    "tree": list(TREES),
    "dtypes": list(DTYPES),
    "missing": list(MISSING),
    "place": PLACES,
    "hyperparameters": list(HYPERPARAMETERS),
    "carrier": ["eager", "jit", "jit, donated", "scan", "fori_loop", "vmap", "shard_map"],
}

# Pairs of values that do not go together: the reason, and a rule for the values of two axes.
IMPOSSIBLE: list[tuple[str, tuple[str, str], Callable[[Any, Any], bool]]] = [
    (
        "a velocity_dtype of real numbers is refused for complex params",
        ("storage", "dtypes"),
        lambda storage, dtypes: storage not in (None, "int8") and dtypes == "complex64",
    ),
    (
        "PyTorch's recipe has no velocity_dtype",
        ("method", "storage"),
        lambda method, storage: method == "torch_sgd" and storage is not None,
    ),
    (
        "zero1 needs a mesh",
        ("method", "place"),
        lambda method, place: method == "zero1" and place not in MESHES,
    ),
    (
        "shard_map needs a mesh, and gradients that are sharded as the params are",
        ("carrier", "place"),
        lambda carrier, place: carrier == "shard_map" and place not in ("auto", "explicit"),
    ),
    (
        "what decides by all params is refused within shard_map, and zero1 shards by itself",
        ("carrier", "method"),
        lambda carrier, method: (
            carrier == "shard_map" and (METHODS[method].whole or method == "zero1")
        ),
    ),
    (
        "zero1 shards no batch of models",
        ("carrier", "method"),
        lambda carrier, method: carrier == "vmap" and method == "zero1",
    ),
    (
        "a block of int8 is of one device",
        ("carrier", "storage"),
        lambda carrier, storage: carrier == "shard_map" and storage == "int8",
    ),
    (
        "numbers of Python and NumPy are on no mesh, and have no second model",
        ("dtypes", "place"),
        lambda dtypes, place: dtypes.startswith("weak") and place != "default device",
    ),
    (
        "numbers of Python and NumPy are arrays after the first step",
        ("dtypes", "carrier"),
        lambda dtypes, carrier: dtypes.startswith("weak") and carrier not in ("eager", "jit"),
    ),
    (
        "zero1 needs a mesh, on which are no numbers of Python",
        ("method", "dtypes"),
        lambda method, dtypes: method == "zero1" and dtypes.startswith("weak"),
    ),
    (
        "an array alone has no other leaf",
        ("tree", "missing"),
        lambda tree, missing: tree == "array" and missing != "nothing missing",
    ),
    (
        "an array alone has one dtype",
        ("tree", "dtypes"),
        lambda tree, dtypes: tree == "array" and len(DTYPES[dtypes]) > 1,
    ),
]


def possible_pairs() -> list[frozenset[tuple[str, Any]]]:
    """Returns the pairs of values of two axes that go together."""
    return [
        frozenset({(a, value), (b, other)})
        for a, b in itertools.combinations(AXES, 2)
        for value, other in itertools.product(AXES[a], AXES[b])
        if not any(
            {a, b} == set(names) and rule(*({a: value, b: other}[name] for name in names))
            for _, names, rule in IMPOSSIBLE
        )
    ]


def pairwise() -> list[Case]:
    """Returns a few cases in which any two values of two axes that go together occur together."""
    left = dict.fromkeys(possible_pairs())
    possible = frozenset(left)

    def completed(case):
        name = next((name for name in AXES if name not in case), None)
        if name is None:
            return case
        pairs = {
            value: [frozenset({(name, value), item}) for item in case.items()]
            for value in AXES[name]
        }
        usable = [value for value in pairs if possible.issuperset(pairs[value])]
        # The value that makes the most new pairs; if it leads nowhere, the next one.
        for value in sorted(usable, key=lambda value: -sum(pair in left for pair in pairs[value])):
            found = completed({**case, name: value})
            if found:
                return found
        return None

    cases = []
    while left:
        case = completed(dict(next(iter(left))))
        assert case, f"no case has the pair {sorted(next(iter(left)))}: say so in IMPOSSIBLE"
        cases.append(Case(**case))
        for pair in itertools.combinations(case.items(), 2):
            left.pop(frozenset(pair), None)
    return cases


# What is given. --------------------------------------------------------------------------


class Given(NamedTuple):
    """What a case is given: params, the gradients of each step, and what is missing of them.

    The gradients are lists of arrays, one per leaf, without those that are missing. `complete`
    makes the tree of them, within the step, because JAX takes no float0 as an argument.
    """

    params: Any
    grads: list[list[Any]]
    missing: frozenset[int]
    complete: Callable[[list[Any]], Any]


def _values(rng, shape, kind):
    draw = rng.normal(size=shape)
    if kind.startswith("complex"):
        draw = draw + 1j * rng.normal(size=shape)
    if kind == "weak":
        return jnp.full(shape, float(draw.flat[0]) if draw.size else 0.0)
    if kind == "numpy":
        return np.asarray(draw, np.float32)
    if kind == "python":
        return float(draw) if shape == () else np.asarray(draw, np.float32)
    return draw.astype(jnp.dtype(kind))


def _spec(shape, axes):
    """Shards each dimension over an axis of the mesh that divides it; each axis is used once."""
    left, spec = dict(axes), []
    for size in shape:
        name = next((name for name, n in left.items() if size and size % n == 0), None)
        left.pop(name, None)
        spec.append(name)
    return P(*spec)


AXES_OF_MESH = {"data": 4, "model": 2}


def mesh_of(case: Case):
    """The mesh of a case, or None."""
    if case.place not in MESHES:
        return None
    kind = MESHES[case.place][0]
    return jax.make_mesh(tuple(AXES_OF_MESH.values()), tuple(AXES_OF_MESH), axis_types=(kind, kind))


def _sharding(case, mesh, shape, of):
    if case.place == "default device":
        return None
    if case.place == "device 3":
        return SingleDeviceSharding(jax.devices()[3])
    how = MESHES[case.place][1]
    axes = AXES_OF_MESH
    if how == "transposed" and of == "grads":
        axes = dict(reversed(AXES_OF_MESH.items()))
    spec = P() if how == "replicated" and of == "params" else _spec(shape, axes)
    if case.carrier == "vmap":
        spec = P(None, *spec)
    return NamedSharding(mesh, spec)


def given(case: Case, mesh: Any) -> Given:
    """Draws the params and gradients of a case."""
    rng = np.random.default_rng(0)
    template = TREES[case.tree]
    shapes, treedef = jax.tree.flatten(template)
    kinds = [DTYPES[case.dtypes][i % len(DTYPES[case.dtypes])] for i in range(len(shapes))]
    missing = frozenset()
    if case.missing == "subtree":
        first = min(template)  # The leaves of a dict are in the order of its keys.
        missing = frozenset(range(len(jax.tree.leaves(template[first]))))
    elif case.missing != "nothing missing":
        missing = frozenset({len(shapes) - 1})

    def array(i, shape, of, kind):
        models = [_values(rng, shape, kind) for _ in range(2 if case.carrier == "vmap" else 1)]
        if case.missing == "float0" and i in missing and of == "params":
            models = [np.asarray(np.real(x), np.int32) for x in models]
        elif kind in ("weak", "numpy", "python"):
            return models[0]
        x = np.stack(models) if case.carrier == "vmap" else models[0]
        return jax.device_put(x, _sharding(case, mesh, shape, of))

    leaves = list(enumerate(zip(shapes, kinds, strict=True)))
    params = [array(i, x.shape, "params", k) for i, (x, (k, _)) in leaves]
    grads = [
        [array(i, x.shape, "grads", k) for i, (x, (_, k)) in leaves if i not in missing]
        for _ in range(STEPS)
    ]

    def complete(arrays):
        left = iter(arrays)
        nothing = MISSING[case.missing]
        if case.missing == "float0":
            last = np.shape(params[-1])
            nothing = np.zeros(last[1:] if case.carrier == "vmap" else last, jax.dtypes.float0)
        tree = treedef.unflatten(
            [nothing if i in missing else next(left) for i in range(len(shapes))]
        )
        return {**tree, min(template): None} if case.missing == "subtree" else tree

    return Given(treedef.unflatten(params), grads, missing, complete)


def make(case: Case, mesh: Any) -> tuple[Any, Callable[[Any], dict[str, Any]]]:
    """Returns the transformation, and what `update` is given in step i besides."""
    convert = HYPERPARAMETERS[case.hyperparameters]
    lr, mu = convert(LEARNING_RATES[0]), convert(MUS[0])
    if case.hyperparameters == "schedule":
        lr, mu = (lambda count, of=of: jnp.asarray(of)[count] for of in (LEARNING_RATES, MUS))
    tx = METHODS[case.method].make(lr, mu, case.storage)
    if case.method == "zero1":
        tx = mj.sharding.zero1(tx, mesh, "data")
    if case.hyperparameters != "override":
        return tx, lambda i: {}
    values = {"learning_rate": LEARNING_RATES, "mu": MUS}
    return tx, lambda i: {
        name: jnp.asarray(values[name])[i] for name in METHODS[case.method].overrides
    }


def hyperparameters(case: Case) -> list[tuple[float, float]]:
    """The learning rate and mu of each step, as numbers."""
    if case.hyperparameters == "schedule":
        return list(zip(LEARNING_RATES, MUS, strict=True))
    overrides = METHODS[case.method].overrides if case.hyperparameters == "override" else ()
    convert = HYPERPARAMETERS[case.hyperparameters]
    return [
        (
            LEARNING_RATES[i if "learning_rate" in overrides else 0],
            MUS[i if "mu" in overrides else 0],
        )
        if overrides
        else (float(convert(LEARNING_RATES[0])), float(convert(MUS[0])))
        for i in range(STEPS)
    ]


# Two steps. ------------------------------------------------------------------------------


class Snapshot(NamedTuple):
    """Params and state at one time.

    Attributes:
      layout: by path, what must not change from step to step; None if it was not looked at.
      params, state: the values, as NumPy arrays.
      velocity: the velocity as floats.
    """

    layout: Any
    params: Any
    state: Any
    velocity: Any


def layout(tree: Any) -> dict[str, Any]:
    """Returns, by path, the shape, dtype, weak type, slices per device and type of its mesh."""
    return {
        jax.tree_util.keystr(path): (
            x.shape,
            x.dtype,
            x.weak_type,
            x.sharding.devices_indices_map(x.shape),
            getattr(getattr(x.sharding, "mesh", None), "axis_types", None),
        )
        for path, x in jax.tree.leaves_with_path(tree)
    }


def snapshot(params: Any, state: Any, *, placed: bool = True) -> Snapshot:
    """Copies the values to the host, so that the arrays may be donated."""
    both = {"params": jax.tree.map(jnp.asarray, params), "state": state}
    host = jax.tree.map(np.array, both)
    velocity = jax.tree.map(np.array, mj.read_velocity(state))
    return Snapshot(layout(both) if placed else None, host["params"], host["state"], velocity)


def buffers(tree: Any) -> list[int]:
    """Returns the address of each device's part of each array; an empty array has none."""
    return [
        shard.data.unsafe_buffer_pointer()
        for leaf in jax.tree.leaves(tree)
        if isinstance(leaf, jax.Array)
        for shard in leaf.addressable_shards
        if shard.data.size
    ]


class Step(NamedTuple):
    """What one step returned.

    Attributes:
      updates: the updates that are not missing, on the host.
      after: the params and the state.
      shared: whether two arrays of the updates and the state have one buffer; None within a loop.
    """

    updates: list[Any]
    after: Snapshot
    shared: bool | None = None


def is_nothing(x: Any) -> bool:
    """Whether this stands for no gradient; for `is_leaf`."""
    return x is None or isinstance(x, optax.MaskedNode)


def take(case: Case, tx: Any, extra: Any, what: Given, mesh: Any) -> tuple[Snapshot, list[Step]]:
    """Makes the state and takes the steps, as the carrier says."""
    traces = []

    def step(params, state, arrays, i):
        traces.append(i)
        grads = what.complete(arrays)
        updates, state = tx.update(grads, state, params, **extra(i))
        like, found = (
            jax.tree.leaves_with_path(tree, is_leaf=is_nothing) for tree in (grads, updates)
        )
        assert [path for path, _ in found] == [path for path, _ in like]
        for (path, u), (_, g) in zip(found, like, strict=True):
            assert not is_nothing(g) or type(u) is type(g), path
            assert is_nothing(g) or u.dtype == g.dtype or case.method == "kahan", path
        present = [u for u in jax.tree.leaves(updates) if u.dtype != jax.dtypes.float0]
        return mj.apply_updates(params, updates), state, present

    # zero1 shards its state only outside jit.
    init = (
        jax.jit(tx.init) if case.carrier in ("jit", "scan") and case.method != "zero1" else tx.init
    )
    params, state = what.params, init(what.params)
    if case.carrier == "vmap":
        state = jax.vmap(tx.init)(params)
        step = jax.vmap(step, in_axes=(0, 0, 0, None))
    state = _moving(state)
    before = snapshot(params, state)
    if case.carrier in ("scan", "fori_loop"):
        return before, _in_a_loop(case, step, params, state, what.grads)
    if case.carrier == "shard_map":
        specs = jax.tree.map(lambda x: x.sharding.spec, (params, state, what.grads[0]))
        step = jax.shard_map(
            step, mesh=mesh, in_specs=(*specs, P()), out_specs=(*specs[:2], specs[2])
        )
    if case.carrier != "eager":
        donated = (0, 1) if case.carrier == "jit, donated" else ()
        step = jax.jit(step, donate_argnums=donated)
    steps = []
    for i, grads in enumerate(what.grads):
        params, state, updates = step(params, state, grads, jnp.int32(i))
        addresses = buffers((updates, state))
        steps.append(
            Step(
                jax.tree.map(np.array, updates),
                snapshot(params, state),
                len(set(addresses)) < len(addresses),
            )
        )
    # What Python and NumPy gave are JAX arrays after the first step.
    assert len(traces) == 1 or case.carrier == "eager" or "weak" in case.dtypes, "C2"
    return before, steps


def _moving(state):
    """The state with nonzero velocities, so that mu and missing gradients matter in each step."""

    def leaf(path, x):
        is_velocity = re.search(r"\.(velocity|trace)\b", jax.tree_util.keystr(path))
        is_scale = re.search(r"\.scales\b", jax.tree_util.keystr(path))
        moves = is_velocity and (jnp.issubdtype(x.dtype, np.inexact) or x.dtype == np.int8)
        if not (moves or is_scale):
            return x
        # On the host, where the sum is not compiled.
        return jax.device_put(np.asarray(x) + x.dtype.type(1), x.sharding if x.committed else None)

    return jax.tree_util.tree_map_with_path(leaf, state)


def _in_a_loop(case, step, params, state, grads):
    """Steps of one program; the types are those of the last params and state."""
    stacked = [
        jax.device_put(np.stack(each), _of_stack(each[0])) for each in zip(*grads, strict=True)
    ]

    def body(carry, given):
        params, state, updates = step(*carry, *given)
        return (params, state), (params, state, updates)

    def loop(carry):
        if case.carrier == "scan":
            return jax.lax.scan(body, carry, (stacked, jnp.arange(STEPS)))
        like = jax.eval_shape(lambda c: body(c, (grads[0], 0))[1], carry)
        history = jax.tree.map(lambda x: jnp.zeros((STEPS, *x.shape), x.dtype), like)

        def at(i, both):
            carry, history = both
            carry, found = body(carry, ([x[i] for x in stacked], i))
            here = jnp.arange(STEPS) == i
            return carry, jax.tree.map(
                lambda steps, x: jnp.where(here.reshape(-1, *[1] * x.ndim), x, steps),
                history,
                found,
            )

        return jax.lax.fori_loop(0, STEPS, at, (carry, history))

    last, history = jax.jit(loop)((params, state))
    steps = []
    for i in range(STEPS):
        params, state, updates = jax.tree.map(lambda x, i=i: np.asarray(x)[i], history)
        after = snapshot(params, state, placed=False)
        steps.append(Step(jax.tree.map(np.array, updates), after))
    steps[-1] = steps[-1]._replace(after=snapshot(*last))
    return steps


def _of_stack(x):
    """The sharding of a stack of arrays that are sharded like this one."""
    if isinstance(x.sharding, NamedSharding):
        return NamedSharding(x.sharding.mesh, P(None, *x.sharding.spec))
    return x.sharding


# What must hold. -------------------------------------------------------------------------


def assert_rounded(
    actual: Any, exact: Any, dtype: Any, slack: Any, what: str, *, gaps: float = 0.5
) -> None:
    """Checks that each number is the exact one, but for the slack and a part of the dtype's gap."""
    info = jnp.finfo(dtype)
    pairs = [(np.real(actual), np.real(exact))]
    if np.iscomplexobj(exact):
        pairs.append((np.imag(actual), np.imag(exact)))
    for found, part in pairs:
        exponent = np.frexp(np.abs(part) + slack)[1] - 1
        gap = 2.0 ** (np.maximum(exponent, info.minexp) - info.nmant)
        distance = np.abs(np.asarray(found, np.float64) - part)
        assert np.all(distance <= gaps * gap + slack), f"{what}: {found} for {part}"


def check_invariants(case: Case, what: Given, before: Snapshot, steps: list[Step]) -> None:
    """Checks promises C2 to C7 and C10 of one case, beside the equations in float64."""
    assert what.grads[0], "there is no gradient"
    check_mirror(case, before)
    state, previous_params = before, before.params
    for i, step in enumerate(steps):
        structures = [jax.tree.structure(each[1:3]) for each in (step.after, before)]
        assert structures[0] == structures[1], "C2: the structure changed"
        found = step.after.layout
        if found is None:
            assert case.carrier in ("scan", "fori_loop")
            assert i < STEPS - 1
            found = before.layout
        changed = {k: (found[k], v) for k, v in before.layout.items() if found[k] != v}
        assert not changed, "C2: a shape, dtype or sharding changed"
        assert not step.shared, "C10: the updates and the state share a buffer"
        check_values(case, what, i, state, step, previous_params)
        state, previous_params = step.after, state.params


def check_mirror(case: Case, before: Snapshot) -> None:
    """C4, C6, C7: each velocity is under its param's path, in its shape and sharding."""
    for path, (shape, dtype, _, *place) in before.layout.items():
        if not path.startswith("['params']"):
            continue
        name = re.escape(path.removeprefix("['params']"))
        stored = re.compile(rf"\['state'\].*\.(velocity|trace)(\[\d\])?{name}")
        found = [value for key, value in before.layout.items() if stored.fullmatch(key)]
        assert len(found) == (2 if case.method == "aggmo" else 1), f"C6: {path}"
        for its_shape, its_dtype, weak, *its_place in found:
            assert its_shape == shape, f"C6: {path}"
            assert its_dtype == stored_dtype(case, shape, dtype), f"C4: {path}"
            assert not weak, f"C2: {path}"
            if case.method == "zero1":
                parts = len(set(map(str, its_place[0].values())))
                assert parts % 4 == 0 or not any(n and n % 4 == 0 for n in shape), f"C7: {path}"
            else:
                assert its_place == place, f"C7: {path}"
        scales = re.compile(stored.pattern.replace("velocity|trace", "scales"))
        ranks = {len(value[0]) for key, value in before.layout.items() if scales.fullmatch(key)}
        assert ranks == ({len(shape)} if case.storage == "int8" else set()), f"C6: {path}"


def check_values(case, what, i, state, step, previous_params):
    """C3, C4, C5: one step beside its equations in float64, from the velocity that was stored."""
    leaves = [jax.tree.leaves(tree) for tree in (state.params, step.after.params, previous_params)]
    velocities = [_per_leaf(case, each.velocity) for each in (state, step.after)]
    compensations: Any = [_compensations(each.state, leaves[0]) for each in (state, step.after)]
    missing = what.missing
    grads, updates = iter(what.grads[i]), iter(step.updates)
    present = [k for k in range(len(leaves[0])) if k not in missing]
    rate, mu = hyperparameters(case)[i]
    wide = {k: _wide(g) for k, g in zip(present, grads, strict=True)}
    dtypes = {k: np.asarray(g).dtype for k, g in zip(present, what.grads[i], strict=True)}
    keeps = _keeps(case, wide, leaves)
    for k in missing:
        assert _bits(leaves[0][k]) == _bits(leaves[1][k]), "C5: the param changed"
        # A restart sets every velocity to 0.
        kept = [((keeps * v.T).T).astype(v.dtype) for v in velocities[0][k]]
        assert _bits(kept) == _bits(velocities[1][k]), "C5: the velocity changed"
    for k in present:
        w, moved = leaves[0][k], leaves[1][k]
        stored = stored_dtype(case, w.shape, w.dtype)
        arithmetic = functools.reduce(
            np.promote_types, (dtypes[k], np.float32 if stored == np.int8 else stored), np.float32
        )
        eps = 16 * jnp.finfo(arithmetic).eps
        v, g = [(keeps * _wide(each).T).T for each in velocities[0][k]], wide[k]
        exact, exact_update = METHODS[case.method].step(
            v if case.method == "aggmo" else v[0], g, _wide(w), rate, mu
        )
        exact = exact if case.method == "aggmo" else (exact,)
        size = sum(map(np.abs, v)) + np.abs(g) + WEIGHT_DECAY * np.abs(_wide(w))
        for found, each in zip(velocities[1][k], exact, strict=True):
            if stored == np.int8:
                # Code k stands for k (|k| + 127) units; the next one is 2 |k| + 128 units away.
                unit = np.max(np.abs(each)) * (1 + 2**-7) / (2 * 127**2)
                gap = unit * (2 * np.sqrt(np.abs(each) / unit + 127**2 / 4) + 1)
                assert np.all(np.abs(found - each) <= gap + eps * size), "C4: the velocity"
            else:
                # 16 bits are rounded up or down at random.
                gaps = 1.0 if stored.itemsize == 2 else 0.5
                assert_rounded(found, each, stored, eps * size, "C4: the velocity", gaps=gaps)
        update, w = next(updates), _wide(w)
        add = (
            16
            * jnp.finfo(
                np.promote_types(np.promote_types(moved.dtype, np.float32), update.dtype)
            ).eps
        )
        if case.method == "kahan" and moved.dtype.itemsize == 2:
            lost = np.abs(compensations[1][k]) * 2.0**-8 + eps * (np.abs(w) + size)
            lost = lost + np.abs(exact_update) * float(jnp.finfo(dtypes[k]).eps)
            before, after = (
                _wide(x) + _wide(c[k]) for x, c in zip((w, moved), compensations, strict=True)
            )
            assert np.all(np.abs(after - before - exact_update) <= lost), "kahan: the sum"
            continue
        assert_rounded(update, exact_update, dtypes[k], eps * size, "C3, C4: the update")
        update = _wide(update)
        slack = add * (np.abs(w) + np.abs(update))
        assert_rounded(moved, w + update, moved.dtype, slack, "the param")


def stored_dtype(case: Case, shape: tuple[int, ...], dtype: Any) -> Any:
    """The dtype in which the velocity of a param is stored, as the docstring of `momentum` says."""
    if not jnp.issubdtype(dtype, np.inexact):
        return dtype  # It has no gradient.
    if case.carrier == "vmap":
        shape = shape[1:]
    is_complex = jnp.issubdtype(dtype, np.complexfloating)
    whole = is_complex or math.prod(shape) < 4096 or not any(_blocks(shape))
    if case.storage is None or (case.storage == "int8" and whole):
        return np.promote_types(dtype, np.float32)
    return jnp.dtype(case.storage)


def _blocks(shape):
    return (size % length == 0 for size in shape for length in (16, 32, 64, 128))


def _wide(x):
    return np.asarray(x, np.result_type(np.asarray(x), np.float64))


def _bits(tree):
    return [(x.dtype, x.tobytes()) for x in map(np.asarray, jax.tree.leaves(tree))]


def _per_leaf(case, velocity):
    """The velocities of each leaf, as tuples."""
    trees = velocity if case.method == "aggmo" else (velocity,)
    return list(zip(*map(jax.tree.leaves, trees), strict=True))


def _compensations(state, params):
    if not isinstance(state, mj.KahanState):
        return None
    left = iter(jax.tree.leaves(state.compensation))
    return [next(left) if w.dtype.itemsize == 2 else 0.0 for w in params]


def _keeps(case, grads, leaves):
    """Of adaptive_restart, 0 where the last step went uphill; else 1."""
    if case.method != "adaptive_restart":
        return 1.0
    models = 2 if case.carrier == "vmap" else 1
    uphill = sum(
        (g * (_wide(leaves[0][k]) - _wide(leaves[2][k]))).reshape(models, -1).sum(1)
        for k, g in grads.items()
    )
    keeps = np.where(uphill > 0, 0.0, 1.0)
    return keeps if models > 1 else float(np.reshape(keeps, (-1,))[0])
