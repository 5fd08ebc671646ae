"""Promises C2 to C7 and C10 together, over pairs of values of every axis (`engine.py`)."""

import itertools

import engine
import pytest

CASES = engine.pairwise()


@pytest.mark.parametrize(engine.Case._fields, CASES, ids=map(str, CASES))
def test_c2_c3_c4_c5_c6_c7_c10_hold_together(
    method, storage, tree, dtypes, missing, place, hyperparameters, carrier, request
):
    case = engine.Case(method, storage, tree, dtypes, missing, place, hyperparameters, carrier)
    if case.dtypes == "64 bits":
        request.getfixturevalue("x64")
    mesh = engine.mesh_of(case)
    what = engine.given(case, mesh)
    tx, extra = engine.make(case, mesh)
    engine.check_invariants(case, what, *engine.take(case, tx, extra, what, mesh))


def test_each_possible_pair_of_values_occurs():
    found = {
        frozenset(pair)
        for case in CASES
        for pair in itertools.combinations(case._asdict().items(), 2)
    }
    assert found == set(engine.possible_pairs())
