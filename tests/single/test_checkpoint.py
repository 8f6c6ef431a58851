"""Checkpoints: whole or not at all, damage found, the one before used."""

import json
import os
import shutil
import threading
import time
import weakref

import numpy as np
import pytest

from toolkit import checkpoint

STATE = {
    "model/w": np.arange(6, dtype=np.float32).reshape(2, 3),
    "optimizer/step#": np.asarray(7),
    "empty": np.zeros((0, 2)),
}


def written(directory, *steps, keep=10):
    return [
        checkpoint.write(directory, step, {**STATE, "step": np.asarray(step)}, {"epoch": step}, keep) for step in steps
    ]


def test_round_trip_is_exact(tmp_path):
    (path,) = written(tmp_path / "new", 120)
    assert path.name == "step-00000120"
    assert sorted(p.name for p in path.iterdir()) == ["manifest.json", "state.safetensors"]
    found = checkpoint.newest(tmp_path / "new")
    assert found.path == path and found.manifest["epoch"] == 120 and found.manifest["step"] == 120
    for name, array in STATE.items():
        assert found.state[name].dtype == array.dtype and found.state[name].shape == array.shape
        assert np.array_equal(found.state[name], array)


def test_only_the_newest_are_kept(tmp_path):
    written(tmp_path, 1, 2, 10, keep=2)
    assert [p.name for p in checkpoint.steps(tmp_path)] == ["step-00000002", "step-00000010"]


def test_a_damaged_later_one_costs_no_whole_one(tmp_path):
    _, late = written(tmp_path, 10, 20)
    flip_bit(late / "state.safetensors")
    (path,) = written(tmp_path, 12, keep=1)  # by a run that was resumed from step 10
    with pytest.warns(UserWarning, match="step-00000020"):
        assert checkpoint.newest(tmp_path).path == path


def test_a_killed_runs_leftover_of_the_same_process_id_is_no_hindrance(tmp_path):
    (tmp_path / f".step-00000003.{os.getpid()}.tmp" / "state.safetensors").mkdir(parents=True)
    assert checkpoint.newest(tmp_path) is None
    assert checkpoint.read(written(tmp_path, 3)[0])
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000003"]


def test_one_that_exists_is_not_written_again(tmp_path):
    (path,) = written(tmp_path, 5)
    before = (path / "manifest.json").stat().st_mtime_ns
    checkpoint.write(tmp_path, 5, {}, {"epoch": 99}, 1)
    assert (path / "manifest.json").stat().st_mtime_ns == before
    assert checkpoint.read(path).manifest["epoch"] == 5


def test_a_damaged_one_is_set_aside_and_written_anew(tmp_path):
    (path,) = written(tmp_path, 5)
    (path / "state.safetensors").write_bytes(b"torn")
    written(tmp_path, 5)
    assert checkpoint.read(path).manifest["epoch"] == 5
    (aside,) = tmp_path.glob("step-00000005.damaged-*")
    assert (aside / "state.safetensors").read_bytes() == b"torn"
    assert checkpoint.steps(tmp_path) == [path]


def flip_bit(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("file", ["state.safetensors", "manifest.json"])
@pytest.mark.parametrize(
    "damage",
    [
        flip_bit,
        lambda p: p.unlink(),
        lambda p: p.write_bytes(p.read_bytes()[:-1]),
        lambda p: p.write_bytes(b""),
    ],
    ids=["bit flip", "deletion", "truncation", "emptied"],
)
def test_damage_is_named_and_the_one_before_used(tmp_path, file, damage):
    _, path = written(tmp_path, 1, 2)
    damage(path / file)
    with pytest.warns(UserWarning, match="step-00000002"):
        found = checkpoint.newest(tmp_path)
    assert found.manifest["epoch"] == 1


def test_a_hostile_manifest_is_damage(tmp_path):
    (path,) = written(tmp_path, 1)
    for text in [
        "[]",
        "null",
        "[" * 100_000,
        '{"format_version": 99}',
        json.dumps({"format_version": 1, "sha256": {"../x": "0"}}),
    ]:
        (path / "manifest.json").write_text(text)
        with pytest.raises(checkpoint.DamagedCheckpoint):
            checkpoint.read(path)


def test_leftovers_of_a_killed_run_are_no_checkpoints(tmp_path):
    (path,) = written(tmp_path, 1)
    shutil.copytree(path, tmp_path / ".step-00000002.123.tmp")
    (tmp_path / "step-00000003").write_text("a file")
    (tmp_path / "step-x").mkdir()
    assert checkpoint.newest(tmp_path).path == path


def test_a_failed_write_leaves_the_last_one_alone(tmp_path, monkeypatch):
    (path,) = written(tmp_path, 1)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint.os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        written(tmp_path, 2, keep=1)
    monkeypatch.undo()
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    assert checkpoint.newest(tmp_path).path == path


def test_nothing_to_find(tmp_path):
    assert checkpoint.newest(tmp_path) is None
    assert checkpoint.newest(tmp_path / "nowhere") is None


def test_it_is_written_while_training_goes_on(tmp_path, monkeypatch):
    disk_is_ready = threading.Event()
    fsync = os.fsync
    monkeypatch.setattr(checkpoint.os, "fsync", lambda descriptor: (disk_is_ready.wait(60), fsync(descriptor)))
    writer = checkpoint.Writer()
    writer.write(tmp_path, 1, STATE, {}, 3)  # comes back though the disk is not ready
    assert checkpoint.newest(tmp_path) is None
    disk_is_ready.set()
    writer.write(tmp_path, 2, STATE, {}, 3)  # the first is whole by now
    assert checkpoint.read(tmp_path / "step-00000001")
    writer.wait()
    assert [path.name for path in checkpoint.steps(tmp_path)] == ["step-00000001", "step-00000002"]


@pytest.fixture
def full(monkeypatch):
    """A disk that is full until told otherwise."""
    fsync, is_full = os.fsync, threading.Event()
    is_full.set()

    def refuse(descriptor):
        if is_full.is_set():
            raise OSError(28, "No space left on device")
        fsync(descriptor)

    monkeypatch.setattr(checkpoint.os, "fsync", refuse)
    return is_full


def test_what_could_not_be_written_is_told_once_and_tried_again(tmp_path, full, capsys, monkeypatch):
    monkeypatch.setattr(checkpoint, "RETRY_SECONDS", 0.01)
    writer = checkpoint.Writer()
    writer.write(tmp_path, 2, STATE, {}, 1)
    time.sleep(0.3)  # of many attempts
    full.clear()
    while not checkpoint.steps(tmp_path):
        time.sleep(0.01)
    assert writer.finish() is None and [path.name for path in tmp_path.iterdir()] == ["step-00000002"]
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and "No space left on device; training goes on" in lines[0] and "again" in lines[1], lines


def test_a_newer_state_replaces_one_that_could_not_be_written(tmp_path, full):
    writer = checkpoint.Writer()
    state = {"x": np.zeros(3)}
    alive = weakref.ref(state["x"])
    writer.write(tmp_path, 2, state, {}, 1)
    del state
    writer.wait()  # as before another copy of the state is made
    assert alive() is None, "two copies of the state in memory"
    writer.write(tmp_path, 3, STATE, {}, 1)
    full.clear()
    assert writer.finish(seconds=0.01) is None
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000003"]


def test_what_can_not_be_written_at_the_end_is_told_after_a_few_tries(tmp_path, full):
    writer = checkpoint.Writer()
    writer.write(tmp_path, 2, STATE, {}, 1)
    assert writer.finish(tries=3, seconds=0.01) == "No space left on device"
    writer.close()
    assert not list(tmp_path.iterdir())
