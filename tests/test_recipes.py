"""The recipes of docs/recipes.md, compared with the implementations that the page names."""

import json
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference
from processes import run_job

import momentum_jax
from benchmarks.recipes import PROGRAMS, RECURRENCES, makers, run

mj: Any = momentum_jax  # Optax declares trees as unions of types that have no arithmetic.
STEPS = 5
VELOCITY_DTYPES = ("bfloat16", "int8")


def numbers(shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def updates_of(tx: Any, params) -> Any:
    """The updates of several steps, with gradients that do not depend on the params."""
    state, found, update = tx.init(params), [], jax.jit(tx.update)
    for i in range(STEPS):
        grads = jax.tree.map(lambda w, i=i: numbers(w.shape, 1 + i), params)
        updates, state = update(grads, state, params)
        found.append(updates)
    return found


def check(tx, theirs, shape: Any = (64, 128), rtol=1e-5, atol=1e-7):
    params = {"w": numbers(shape)}
    for ours, expected in zip(updates_of(tx, params), updates_of(theirs, params), strict=True):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol, atol), ours, expected)


def test_each_recipe_is_tested_and_short():
    assert PROGRAMS.keys() == {
        *("Lion", "Signum", "An average of the gradients", "Two velocities: Adam"),
        *("Quasi-hyperbolic momentum", "Nesterov's method in the paper's variables"),
        *("STORM: less variance from two gradients", "Muon"),
        "SlowMo and DiLoCo: momentum over a slow network",
    }
    for name, program in PROGRAMS.items():
        lines = [line for line in program.splitlines() if line and "import" not in line]
        assert len(lines) <= 15, name


def test_lion():
    check(run("Lion")["tx"], optax.lion(1e-4, 0.9, 0.99, weight_decay=0.0))


def test_signum():
    check(run("Signum")["tx"], optax.chain(optax.ema(0.9, debias=False), optax.sign_sgd(1e-3)))


def test_averages():
    names = run("An average of the gradients")
    check(names["tx"], optax.ema(0.9, debias=False))
    check(names["unbiased_tx"], optax.ema(0.9))


def test_adam():
    check(run("Two velocities: Adam")["tx"], optax.adam(1e-3), atol=1e-8)


def test_qhm():
    tx, grads = (
        run("Quasi-hyperbolic momentum")["tx"],
        [np.asarray(numbers(7, 1 + i)) for i in range(STEPS)],
    )
    expected, _ = reference.qhm(grads, 1.0, 0.999, 0.7)
    for ours, theirs in zip(updates_of(tx, {"w": jnp.zeros(7)}), expected, strict=True):
        np.testing.assert_allclose(ours["w"], theirs, rtol=1e-5, atol=1e-7)


CURVATURES = np.array([0.5, 3.0, 8.0])


def quadratic(w):
    return jnp.sum(jnp.asarray(CURVATURES, jnp.float32) * w["w"] ** 2) / 2


def test_nesterov_in_the_variables_of_the_paper():
    """Its look-ahead point equals the params of `momentum(nesterov=True)`."""
    names = run("Nesterov's method in the paper's variables")
    params = moved = {"w": jnp.ones(3)}
    state, nesterov = names["tx"].init(params), mj.momentum(0.1, 0.9, nesterov=True)
    moved_state = nesterov.init(moved)
    w, v = np.ones(3), np.zeros(3)
    for _ in range(20):
        v = 0.9 * v - 0.1 * CURVATURES * (w + 0.9 * v)
        w = w + v
        params, state = names["step"](quadratic, params, state)
        np.testing.assert_allclose(params["w"], w, rtol=1e-5, atol=1e-6)
        updates, moved_state = nesterov.update(jax.grad(quadratic)(moved), moved_state)
        moved = mj.apply_updates(moved, updates)
        np.testing.assert_allclose(moved["w"], w + 0.9 * v, rtol=1e-5, atol=1e-6)


def test_storm():
    """D <- g + mu (d - g of the previous params on this batch), w <- w - rate d; first d is g."""
    names = run("STORM: less variance from two gradients")
    targets = np.random.default_rng(0).normal(size=(20, 3))

    def loss(w, target):
        return jnp.sum(jnp.asarray(CURVATURES, jnp.float32) / 8 * (w["w"] - target) ** 2) / 2

    params = last = {"w": jnp.ones(3)}
    state = names["tx"].init(params)
    w = before = np.ones(3)
    d: Any = None
    for target in targets:
        g, old = (CURVATURES / 8 * (x - target) for x in (w, before))
        d = g if d is None else g + 0.9 * (d - old)
        before, w = w, w - 0.1 * d
        batch = jnp.asarray(target, jnp.float32)
        params, last, state = names["step"](loss, params, last, state, batch)
        np.testing.assert_allclose(params["w"], w, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", [(64, 128), (128, 64)])
def test_muon(shape):
    params = {"w": numbers(shape), "bias": numbers(5)}
    ours, theirs = (updates_of(tx, params) for tx in (run("Muon")["tx"], optax.contrib.muon(0.02)))
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a["w"], b["w"], rtol=1e-3, atol=1e-5)
        np.testing.assert_allclose(a["bias"], b["bias"], rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("velocity_dtype", VELOCITY_DTYPES)
@pytest.mark.parametrize("section", RECURRENCES)
def test_a_low_precision_recipe_is_close_to_float32(section, velocity_dtype):
    """Compares the velocities after several steps."""
    make, params = makers()[section], numbers((64, 128))
    states = []
    for dtype in (None, velocity_dtype):
        tx: Any = make(velocity_dtype=dtype)
        state, update = tx.init(params), jax.jit(tx.update)
        for i in range(STEPS):
            _, state = update(numbers(params.shape, 1 + i), state, params)
        states.append(mj.read_velocity(state))
    for exact, read in zip(*map(jax.tree.leaves, states), strict=True):
        error = np.linalg.norm(np.asarray(read - exact, np.float64)) / np.linalg.norm(exact)
        assert 0 < error < 0.03


# SlowMo and DiLoCo. -----------------------------------------------------------------------

# A program for one or several processes: `train(mesh)` returns the params after each outer step,
# and the compiled programs of both steps.
DILOCO = (
    PROGRAMS["SlowMo and DiLoCo: momentum over a slow network"]
    + """
import functools
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P


def loss(params, batch):
    return jnp.mean((batch["x"] @ params - batch["y"]) ** 2)


def batches(replicas, outer_steps, inner_steps):
    random = np.random.default_rng(0)
    draw = lambda *shape: random.normal(size=shape).astype(np.float32)
    return [
        [{"x": draw(replicas, 8, 3), "y": draw(replicas, 8, 2)} for _ in range(inner_steps)]
        for _ in range(outer_steps)
    ]


def train(mesh, outer_steps=3, inner_steps=4):
    replicas = mesh.shape["replica"]

    def put(x, *spec):
        sharding = NamedSharding(mesh, P(*spec))
        return jax.make_array_from_callback(np.shape(x), sharding, np.asarray(x).__getitem__)

    def stacked(params):
        copies = jax.tree.map(lambda w: jnp.broadcast_to(w, (replicas, *w.shape)), params)
        return jax.lax.with_sharding_constraint(copies, NamedSharding(mesh, P("replica")))

    start = put(np.ones((3, 2), "f"))
    outer_state = jax.jit(outer.init)(start)
    inner_state = jax.jit(jax.vmap(inner.init))(jax.jit(stacked)(start))
    step = jax.jit(jax.vmap(functools.partial(inner_step, loss)))
    found = []
    for several in batches(replicas, outer_steps, inner_steps):
        copies = jax.jit(stacked)(start)
        for batch in several:
            batch = jax.tree.map(lambda x: put(x, "replica", "data"), batch)
            programs = [step.lower(copies, inner_state, batch)]
            copies, inner_state = step(copies, inner_state, batch)
        programs.append(jax.jit(outer_step).lower(start, copies, outer_state))
        start, outer_state = jax.jit(outer_step)(start, copies, outer_state)
        found.append(np.asarray(start))
    return found, [program.compile().as_text() for program in programs]
"""
)


def diloco(replicas, names, outer_steps=3, inner_steps=4):
    """The same training in float64, one replica after the other."""
    start, outer_velocity = np.ones((3, 2)), np.zeros((3, 2))
    velocities = np.zeros((replicas, 3, 2))
    found = []
    for several in names["batches"](replicas, outer_steps, inner_steps):
        copies = np.stack([start] * replicas)
        for batch in several:
            for i, (x, y) in enumerate(zip(batch["x"], batch["y"], strict=True)):
                gradient = 2 * x.astype(np.float64).T @ (x @ copies[i] - y) / y.size
                velocities[i] = 0.9 * velocities[i] - 0.05 * gradient
                copies[i] += velocities[i]
        moved = start - copies.mean(0)
        outer_velocity = 0.9 * outer_velocity - 0.7 * moved
        start = start + 0.9 * outer_velocity - 0.7 * moved
        found.append(start)
    return found


def collectives(text):
    """The groups of devices of each collective in a compiled program."""
    kinds = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute"
    lines = re.findall(rf"^.* (?:{kinds})(?:-start)?\(.*$", text, re.MULTILINE)
    return [re.findall(r"replica_groups=(.*?), [a-z_]+=", line)[0] for line in lines]


def groups(text):
    """Parses groups of devices, which XLA writes in one of three formats."""
    if text.startswith("{"):
        return {frozenset(map(int, each.split(","))) for each in re.findall(r"\{([\d,]+)\}", text)}
    if text.startswith("mesh"):
        axes, over = (re.findall(r"'(\w+)'", part) for part in text.split("] "))
        sizes = [int(size) for size in re.findall(r"=(\d+)", text)]
        last = [axes.index(name) for name in over]
        order = [*(i for i in range(len(axes)) if i not in last), *last]
        devices = np.arange(np.prod(sizes)).reshape(sizes).transpose(order)
        return set(map(frozenset, devices.reshape(-1, np.prod([sizes[i] for i in last])).tolist()))
    ((shape, sizes, order),) = re.findall(r"^\[(.*)\]<=\[(.*?)\](?:T\((.*)\))?$", text)
    shape, sizes = ([int(n) for n in each.split(",")] for each in (shape, sizes))
    devices = np.arange(np.prod(sizes)).reshape(sizes)
    devices = devices.transpose([int(n) for n in order.split(",")]) if order else devices
    return set(map(frozenset, devices.reshape(shape).tolist()))


@pytest.mark.parametrize("shape", [(8, 1), (2, 4)])
def test_diloco_on_several_devices(shape):
    """The inner step has no collective over the slow axis, the outer step has one."""
    names: dict[str, Any] = {}
    exec(DILOCO, names)
    mesh = jax.make_mesh(shape, ("replica", "data"), axis_types=(names["AxisType"].Auto,) * 2)
    found, (inner, outer) = names["train"](mesh)
    np.testing.assert_allclose(found, diloco(shape[0], names), rtol=1e-5, atol=1e-6)
    devices = np.arange(8).reshape(shape)
    assert [groups(each) for each in collectives(outer)] == [
        set(map(frozenset, devices.T.tolist()))
    ]
    if shape == (8, 1):
        assert collectives(inner) == []
    else:
        within = set(map(frozenset, devices.tolist()))
        assert [groups(each) for each in collectives(inner)] == [within]


JOB = """
import json
import sys

import jax

coordinator, processes, index = sys.argv[1:]
jax.distributed.initialize(coordinator, int(processes), int(index))
"""


@pytest.mark.slow
def test_diloco_in_two_processes(tmp_path):
    """The slow axis connects the two processes."""
    script = tmp_path / "job.py"
    printed = """
mesh = jax.make_mesh((2, 2), ("replica", "data"), axis_types=(AxisType.Auto,) * 2)
assert {d.process_index for d in mesh.devices[0]} == {0}
found, _ = train(mesh)
print(json.dumps([params.tolist() for params in found]))
"""
    script.write_text(JOB + DILOCO + printed)
    names: dict[str, Any] = {}
    exec(DILOCO, names)
    for output in run_job(str(script)):
        found = json.loads(output.splitlines()[-1])
        np.testing.assert_allclose(found, diloco(2, names), rtol=1e-5, atol=1e-6)
