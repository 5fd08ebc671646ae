"""States of a user's own types, carried over."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jobs import (
    BOTH,
    ENC_HEAD,
    WithStats,
    assert_same,
    begun,
    mine,
    multi_steps,
    params_of,
    unchanged,
)

import momentum_jax

mj: Any = momentum_jax  # Optax types a state as any tree of arrays.


def test_states_of_a_users_type():
    """Alone, in a chain, and beside a state of Optax: their arrays are matched by path."""
    params = params_of("enc")
    renamed = {"encoder": params["enc"]}
    rename = {"['enc']": "['encoder']"}
    for tx in (mine(), optax.chain(mine())):
        _, state = begun(tx, params)
        for other in (mine(), optax.chain(mine()), optax.chain(optax.clip(1.0), mine())):
            carried, _ = mj.transplant(state, other.init(renamed), rename, strict=True)
            assert_same(jax.tree.leaves(carried), jax.tree.leaves(state))


OWN: dict[str, Any] = {
    "alone": mine,
    "in a chain": lambda: optax.chain(mine()),
    "masked": lambda: optax.masked(mine(), True),
    "MultiSteps": lambda: multi_steps(mine(), 1),
    "apply_if_finite": lambda: optax.apply_if_finite(mine(), 2),
    "group": lambda: optax.partition({"a": mine()}, lambda params: "a"),
    "kahan": lambda: mj.kahan(mine()),
}


@pytest.mark.parametrize("kind", OWN)
def test_a_state_of_a_users_type_within_a_wrapper(kind):
    tx = OWN[kind]()
    params = params_of("enc")
    _, state = begun(tx, params)
    renamed, rename = {"encoder": params["enc"]}, {"['enc']": "['encoder']"}
    carried, _ = mj.transplant(state, tx.init(renamed), rename, strict=True)
    assert_same(jax.tree.leaves(carried), jax.tree.leaves(state))
    chain = optax.chain(optax.clip(1.0), mine()).init(renamed)
    if kind != "kahan":
        own: Any = mj.transplant(state, chain, rename)[0][1]
        assert own.count == 3
        assert np.any(own.m["encoder"]["w"])


def test_states_of_a_users_type_in_groups():
    """Each goes with its params, whatever the labels of the groups."""
    two: Any = optax.partition({"a": mine(), "b": mine()}, BOTH)
    _, state = begun(two, ENC_HEAD)
    state.inner_states["b"] = begun(two, ENC_HEAD, steps=7)[1].inner_states["b"]
    other: Any = optax.partition({"z": mine(), "b": mine()}, {"enc": "z", "head": "b"})
    carried, _ = mj.transplant(state, other.init(ENC_HEAD), strict=True)
    assert_same(carried.inner_states["z"].inner_state, state.inner_states["a"].inner_state)
    assert_same(carried.inner_states["b"].inner_state, state.inner_states["b"].inner_state)


class Factors(NamedTuple):
    """A state with a momentum, and two factors per param, which may be larger or smaller."""

    m: Any
    factors: Any


@pytest.mark.parametrize("shape", [(3, 4), (40, 2)])
def test_factors_in_a_users_state_are_carried_over_with_the_momentum(shape):
    def init(params):
        square = lambda w: {"l": jnp.eye(len(w)), "r": jnp.zeros((w.shape[1],))}  # noqa: E731
        return Factors(jax.tree.map(jnp.zeros_like, params), jax.tree.map(square, params))

    old = init({"enc": jnp.ones(shape)})._replace(m={"enc": jnp.full(shape, 7.0)})
    new = init({"encoder": jnp.ones(shape)})
    carried: Any = mj.transplant(old, new, {"['enc']": "['encoder']"}, strict=True)[0]
    assert_same(jax.tree.leaves(carried), jax.tree.leaves(old))
    wider = init({"enc": jnp.ones((shape[0] + 1, shape[1]))})
    carried = mj.transplant(old, wider, resize=True)[0]
    np.testing.assert_array_equal(carried.m["enc"][:-1], 7.0)
    np.testing.assert_array_equal(carried.m["enc"][-1], 0.0)


def test_a_single_param_beside_named_numbers():
    old = WithStats(jnp.full((3, 2), 7.0), {"loss": jnp.float32(2)})
    new = WithStats({"w": jnp.zeros((3, 2))}, {"loss": jnp.float32(0)})
    carried: Any = mj.transplant(old, new, {"": "['w']", "['loss']": "['loss']"}, strict=True)[0]
    np.testing.assert_array_equal(carried.m["w"], 7.0)
    assert carried.stats["loss"] == 2


def test_named_numbers_are_not_params():
    def init(params):
        return WithStats(jax.tree.map(jnp.zeros_like, params), {"loss": jnp.float32(0)})

    def update(updates: Any, state: Any, params: Any = None) -> Any:
        del params
        loss = sum(jnp.sum(g**2) for g in jax.tree.leaves(updates))
        return updates, WithStats(updates, {"loss": loss})

    tx = optax.GradientTransformation(init, update)
    two: Any = optax.partition({"a": tx, "b": tx}, BOTH)
    _, state = begun(two, ENC_HEAD)
    other: Any = optax.partition({"z": tx, "b": tx}, {"enc": "z", "head": "b"})
    carried, report = mj.transplant(state, other.init(ENC_HEAD), strict=True)
    assert_same(carried.inner_states["z"].inner_state, state.inner_states["a"].inner_state)
    assert_same(carried.inner_states["b"].inner_state, state.inner_states["b"].inner_state)
    assert set(report.kept) == {"['head']", "['enc']", "['loss']"}


@pytest.mark.parametrize(
    "wrap",
    [
        lambda: optax.chain(optax.chain(mine())),
        lambda: optax.chain(optax.named_chain(("a", mine()))),
        lambda: multi_steps(optax.chain(optax.chain(mine())), 1),
    ],
)
def test_a_state_of_a_users_type_deep_in_chains(wrap):
    _, state = begun(wrap(), {"enc": ENC_HEAD["enc"]})
    new = wrap().init({"encoder": ENC_HEAD["enc"]})
    carried, _ = mj.transplant(state, new, {"['enc']": "['encoder']"}, strict=True)
    assert_same(jax.tree.leaves(carried), jax.tree.leaves(state))


def test_a_single_param_beside_a_state_of_a_users_type():
    own = optax.GradientTransformation(
        lambda params: WithStats(jnp.zeros_like(params), {"loss": jnp.zeros(())}),  # pyright: ignore[reportArgumentType]
        unchanged,
    )
    tx = optax.chain(optax.adam(0.1), own)
    _, state = tx.update(jnp.ones(3), tx.init(jnp.ones(3)))
    carried: Any = mj.transplant(state, tx.init(jnp.ones(5)), resize=True)[0]
    np.testing.assert_allclose(carried[0][0].mu, [0.1, 0.1, 0.1, 0, 0])


class Best(NamedTuple):
    """The lowest loss so far, which is of no param."""

    loss: Any


def test_a_number_alone_in_a_users_state_belongs_to_no_param():
    """It goes with the params; without them, nothing is carried over."""
    make: Any = optax.GradientTransformation
    tx: Any = optax.chain(
        make(lambda _: Best(jnp.inf), lambda u, s, _=None: (u, s)),
        mj.momentum(0.1),
    )
    params, other = {"a": jnp.ones(3)}, {"b": jnp.ones(3)}
    state: Any = (Best(jnp.float32(0.25)), tx.init(params)[1])
    carried: Any = mj.transplant(state, tx.init(other), {"['a']": "['b']"})[0]
    assert carried[0].loss == 0.25
    with pytest.raises(ValueError, match="nothing of the old state can be carried over"):
        mj.transplant(state, tx.init(other))
