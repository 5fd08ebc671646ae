"""Tests of arms: names, effective learning rates, refusals, and storage as JSON."""

import functools
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import momentum_jax as mj
from momentum_jax.study import Arm
from momentum_jax.study import arms as make

no_function: Any = "momentum"


def warmup(peak, decay_steps):
    """A transformation that branches on its settings."""
    return optax.sgd(optax.warmup_cosine_decay_schedule(0.0, peak, 2, decay_steps))


def test_arms_at_one_effective_rate_differ_in_their_learning_rates():
    families = [make.baseline(), *make.with_momentum(["0.9", "0.99", "nesterov-0.9"])]
    arms = [family.at(0.05) for family in families]
    for arm in arms:
        settings: Any = arm.settings
        assert settings["learning_rate"] / (1 - settings["mu"]) == pytest.approx(0.05)
        assert make.effective_rate(arm) == 0.05
    assert [arm.name for arm in arms] == [
        "mu 0 at 0.05", "mu 0.9 at 0.005", "mu 0.99 at 0.0005", "Nesterov 0.9 at 0.005"
    ]  # fmt: skip
    assert [arm.family for arm in arms] == [family.name for family in families]
    assert [arm.make_transform is make.nesterov for arm in arms] == [False] * 3 + [True]
    assert [arm.is_family for arm in (families[0], arms[0])] == [True, False]


def test_without_friction_there_is_no_effective_rate():
    endless = Arm("endless", mj.momentum, mu=1.0)
    with pytest.raises(ValueError, match=r"mu=1\.0 of the arm 'endless' must be a number below 1"):
        endless.at(0.1)
    assert make.effective_rate(endless.replaced(learning_rate=0.1)) is None
    assert make.effective_rate(Arm("a", optax.adam, learning_rate=(0.1, 0.2))) is None


def test_an_arm_is_replaced_with_all_that_it_has():
    arm = Arm(
        "a", warmup, batch_size=8, restarts=4, steps=9, static=["peak"], peak=1, decay_steps=5
    )
    other = arm.replaced(name="b", decay_steps=7)
    assert (other.name, other.batch_size, other.restarts, other.steps) == ("b", 8, 4, 9)
    assert (other.static, other.settings) == (("peak",), {"peak": 1, "decay_steps": 7})


@pytest.mark.slow
def test_the_noise_is_as_long_as_it_says_and_its_mean_is_the_gradient():
    tx = make.noisy_descent(0.5, noise=2.0)
    grads = {"a": jnp.full((50, 40), 3.0), "b": jnp.full(500, -1.0)}
    keys = jax.random.split(jax.random.key(0), 200)
    updates, _ = jax.vmap(lambda key: tx.update(grads, optax.EmptyState(), key=key))(keys)
    noise = jax.tree.map(lambda u, g: u / -0.5 - g, updates, grads)
    lengths = jax.vmap(optax.tree.norm)(noise)
    np.testing.assert_allclose(lengths, 2 * float(optax.tree.norm(grads)), rtol=0.1)
    mean = jax.tree.map(lambda x: x.mean(), noise)
    assert abs(mean["a"]) < 0.1
    assert abs(mean["b"]) < 0.1


@pytest.mark.parametrize(
    "arm",
    [
        make.baseline(),
        make.with_momentum(["nesterov-0.9"])[0].at(0.1),
        *make.controls(0.1),
        Arm("part", functools.partial(mj.momentum, velocity_dtype="bfloat16"), learning_rate=0.1),
        Arm("by scale", optax.adam, learning_rate=(0.1, 0.2), steps=7),
        Arm("static", warmup, peak=0.1, decay_steps=9, static=["peak", "decay_steps"]),
    ],
    ids=lambda arm: arm.name,
)
def test_an_arm_survives_json(arm):
    again = make.from_json(json.loads(json.dumps(make.to_json(arm))))
    function: Any = arm.make_transform
    other: Any = again.make_transform
    if isinstance(function, functools.partial):
        assert (function.func, function.keywords) == (other.func, other.keywords)
        again = again.replaced(make_transform=function)
    assert again == arm


def test_an_arm_that_cannot_be_imported_says_so():
    local = make.to_json(Arm("local", lambda: optax.sgd(0.1)))
    assert local["make_transform"] is None
    with pytest.raises(ValueError, match="of the arm 'local' cannot be imported"):
        make.from_json(local)
    gone = make.to_json(make.baseline()) | {"make_transform": "momentum_jax:no_such_thing"}
    with pytest.raises(ValueError, match="of the arm 'mu 0' cannot be imported"):
        make.from_json(gone)


@pytest.mark.parametrize(
    ("make_arm", "error", "message"),
    [
        (lambda: Arm("a", no_function), TypeError, "must be a function that returns an Optax"),
        (lambda: Arm("a", mj.momentum, batch_size=0), ValueError, "batch_size=0 of the arm 'a'"),
        (lambda: Arm("a", mj.momentum, restarts=0), ValueError, "restarts=0 of the arm 'a'"),
        (lambda: Arm("a", mj.momentum, steps=0), ValueError, "steps=0 of the arm 'a'"),
        (
            lambda: Arm("a", mj.momentum, static=["mu"]),
            ValueError,
            r"names \['mu'\], but must name",
        ),
        (lambda: Arm("a", mj.momentum, static=["mu"], mu=[0.9]), TypeError, "must be hashable"),
    ],
)
@pytest.mark.usefixtures("as_shipped")
def test_refusals(make_arm, error, message):
    with pytest.raises(error, match=message):
        make_arm()


@pytest.mark.parametrize("setting", [True, np.array([True, False]), np.ones((1, 1)), "0.1"])
def test_a_setting_that_is_not_a_number_is_refused_with_the_remedy(setting):
    odd: Any = setting
    with pytest.raises(TypeError, match=r"rate=.* must be a number.*give static=\['rate'\]"):
        Arm("a", mj.momentum, rate=odd)


def test_settings_may_come_from_numpy_and_jax():
    values: Any = {"a": np.float32(0.5), "b": jnp.ones(2), "c": [1.0, 2.0], "d": np.array([0.5])}
    assert Arm("a", mj.momentum, **values).settings == {
        "a": 0.5, "b": (1.0, 1.0), "c": (1.0, 2.0), "d": (0.5,)
    }  # fmt: skip


def test_rates_that_differ_have_different_names():
    one, other = (make.baseline().at(rate) for rate in (0.1, 0.1001))
    assert one.name != other.name
    assert make.with_momentum(["0.99"])[0].at(0.1).name.endswith(" at 0.001")
