"""Tests of stored runs: complete files, keys, damage, and one process per folder."""

import multiprocessing
import re
import warnings
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
import pytest
import xarray as xr
from test_sweep import AHEAD, BASELINE, HEAVY, bowl, counting, draw_pair, uneven_bowl

from momentum_jax.study import Arm, Problem, run, storing, training

pytestmark = pytest.mark.slow

SETTINGS: dict[str, Any] = dict(seeds=range(20), init_scales=[1.0, 2.0], steps=5)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(training, "_runs_at_once", lambda *arguments: 8)


def test_what_is_there_is_not_trained_again_and_the_rest_is_the_same_to_the_bit(tmp_path, trained):
    whole = run(uneven_bowl(), [BASELINE, AHEAD], **SETTINGS, folder=tmp_path)
    chunks = sorted(tmp_path.glob("*.npz"))
    assert len(chunks) == 10
    for path in chunks[3:6]:
        path.unlink()
    trained.clear()
    again = run(uneven_bowl(), [BASELINE, AHEAD], **SETTINGS, folder=tmp_path)
    assert sum(trained) == 24
    xr.testing.assert_equal(again, whole)


def test_a_folder_takes_more_seeds_arms_scales_and_orders(tmp_path, trained):
    problem, add = counting(24), Arm("add", optax.sgd, batch_size=6, learning_rate=1.0)
    fast = add.replaced(name="fast", learning_rate=2.0)
    few = run(problem, [add], range(2), [0, 1], steps=2, folder=tmp_path)
    trained.clear()
    more = run(problem, [add, fast], range(3), range(3), steps=2, folder=tmp_path)
    assert sum(trained) == 9 - 4 + 9
    shared = more.sel(arm=["add"], seed=[0, 1], order_seed=[0, 1])
    np.testing.assert_array_equal(shared.loss, few.loss)
    renamed = fast.replaced(name="renamed")  # The name is not part of the key.
    trained.clear()
    run(problem, [renamed], range(3), range(3), steps=2, folder=tmp_path)
    assert sum(trained) == 0


def test_a_file_that_was_being_written_is_no_chunk(tmp_path):
    whole = run(uneven_bowl(), [BASELINE], **SETTINGS, folder=tmp_path)
    path = next(tmp_path.glob("*.npz"))
    path.with_suffix(".0.part").write_bytes(path.read_bytes()[:100])
    path.unlink()
    xr.testing.assert_equal(run(uneven_bowl(), [BASELINE], **SETTINGS, folder=tmp_path), whole)
    assert not list(tmp_path.glob("*.part"))


def _cut(content):
    return content[: len(content) // 2]


def _flip(content):
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


@pytest.mark.parametrize("damage", [_cut, _flip, lambda content: b"", lambda content: b"\0" * 999])
def test_a_damaged_chunk_is_named_and_trained_again(tmp_path, trained, damage):
    whole = run(uneven_bowl(), [BASELINE], **SETTINGS, folder=tmp_path)
    path = sorted(tmp_path.glob("*.npz"))[2]
    path.write_bytes(damage(path.read_bytes()))
    trained.clear()
    with pytest.warns(UserWarning, match=re.escape(f"{path} is damaged (")):
        again = run(uneven_bowl(), [BASELINE], **SETTINGS, folder=tmp_path)
    assert trained == [8]
    xr.testing.assert_equal(again, whole)
    run(uneven_bowl(), [BASELINE], **SETTINGS, folder=tmp_path)  # It is complete: no warning.
    assert path.with_suffix(".damaged").exists()


def test_whatever_bit_flips_a_chunk_is_missing_or_whole(tmp_path):
    store = storing.Store(tmp_path, {})
    store.add(["a"], {"loss": np.arange(4.0)})
    path = next(tmp_path.glob("*.npz"))
    content = path.read_bytes()
    random = np.random.default_rng(0)
    for place, bit in zip(
        random.integers(0, len(content), 300), random.integers(0, 8, 300), strict=True
    ):
        path.write_bytes(
            content[:place] + bytes([content[place] ^ (1 << bit)]) + content[place + 1 :]
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            again = storing.Store(tmp_path, {})
        if "a" in again:
            np.testing.assert_array_equal(again["a"]["loss"], np.arange(4.0))


def test_a_damaged_fingerprint_is_one_line_with_its_name(tmp_path):
    run(uneven_bowl(), [BASELINE], **SETTINGS, folder=tmp_path)
    (tmp_path / storing.FINGERPRINT).write_text("{oh")
    with pytest.raises(ValueError, match=r"fingerprint\.json is damaged: it is not JSON"):
        run(uneven_bowl(), [BASELINE], **SETTINGS, folder=tmp_path)
    (tmp_path / storing.FINGERPRINT).write_text("[]")
    with pytest.raises(ValueError, match=r"fingerprint\.json is damaged: it is not a JSON object"):
        run(uneven_bowl(), [BASELINE], **SETTINGS, folder=tmp_path)
    (tmp_path / storing.FINGERPRINT).write_bytes(b"\xff\xfe\xfd")
    with pytest.raises(ValueError, match=r"fingerprint\.json is damaged"):
        run(uneven_bowl(), [BASELINE], **SETTINGS, folder=tmp_path)


def test_on_fewer_devices_it_resumes(tmp_path, monkeypatch):
    whole = run(uneven_bowl(), [BASELINE], **SETTINGS, folder=tmp_path)
    next(tmp_path.glob("*.npz")).unlink()
    monkeypatch.setattr(jax, "local_device_count", lambda: 2)
    rest = run(uneven_bowl(), [BASELINE], **SETTINGS, folder=tmp_path)
    np.testing.assert_allclose(rest.loss, whole.loss, rtol=1e-5)


def test_other_functions_or_data_are_another_study(tmp_path):
    run(uneven_bowl(), [BASELINE], **SETTINGS, folder=tmp_path / "a")
    other = Problem(draw_pair, lambda w: 2 * bowl(w), name="bowl", solved={"loss": 0.1})
    message = r"holds runs of another study, which differs in the functions of the problem:"
    with pytest.raises(ValueError, match=message):
        run(other, [BASELINE], **SETTINGS, folder=tmp_path / "a")
    problem, add = counting(24), Arm("add", optax.sgd, batch_size=6, learning_rate=1.0)
    run(problem, [add], seeds=[0], steps=2, folder=tmp_path / "b")
    problem.data[:2] = problem.data[1::-1]
    with pytest.raises(ValueError, match="differs in data"):
        run(problem, [add], seeds=[0], steps=2, folder=tmp_path / "b")


def test_runs_of_other_lengths_or_functions_of_arms_have_other_keys(tmp_path, trained):
    run(uneven_bowl(), [HEAVY], **SETTINGS, folder=tmp_path)
    trained.clear()
    longer: dict[str, Any] = {**SETTINGS, "steps": 6}
    run(uneven_bowl(), [HEAVY], **longer, folder=tmp_path)
    run(uneven_bowl(), [AHEAD], **SETTINGS, folder=tmp_path)
    assert sum(trained) == 80


def test_a_folder_that_cannot_be_written_to():
    with pytest.raises(OSError, match="Not a directory"):
        run(uneven_bowl(), [BASELINE], **SETTINGS, folder=Path("/dev/null/chunks"))


def _hold(folder, ready, done):
    with storing.locked(Path(folder)):
        ready.set()
        done.wait(60)


def test_a_second_process_on_one_folder_is_refused(tmp_path):
    context = multiprocessing.get_context("spawn")
    ready, done = context.Event(), context.Event()
    other = context.Process(target=_hold, args=(str(tmp_path), ready, done))
    other.start()
    try:
        assert ready.wait(60)
        with pytest.raises(ValueError, match=f"{re.escape(str(tmp_path))} is in use by another"):
            run(uneven_bowl(), [BASELINE], **SETTINGS, folder=tmp_path)
    finally:
        done.set()
        other.join(60)
    run(uneven_bowl(), [BASELINE], seeds=[0], steps=1, folder=tmp_path)


def test_chunks_whose_arrays_do_not_fit_are_damaged(tmp_path):
    store = storing.Store(tmp_path, {})
    store.add(["a", "b"], {"loss": np.zeros(3)})
    with pytest.warns(UserWarning, match="is damaged"):
        assert "a" not in storing.Store(tmp_path, {})


def test_a_digest_tells_parts_apart():
    assert storing.digest("ab", "c") != storing.digest("a", "bc")
    assert storing.digest("a") == storing.digest(b"a")
