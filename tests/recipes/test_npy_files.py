"""A recipe trains from .npy files, read ahead by a thread, as from memory without one: to the bit, resumed as well."""

import json
import re
import signal

import numpy as np
import pytest

from tests.launching import WORKERS, launch, some_long
from toolkit import checkpoint, datasets

FLAVOURS = {
    "torch": ("torch", {}),
    "tensorflow": ("tensorflow", {}),
    "keras on tensorflow": ("keras", {"KERAS_BACKEND": "tensorflow"}),
    "keras on torch": ("keras", {"KERAS_BACKEND": "torch"}),
}
ARGUMENTS = ("--epochs", "2", "--dropout", "0.3", "--shift", "2", "--batch-size", "20", "--audit")
READS_AHEAD = {"torch": True, "tensorflow": True, "keras on tensorflow": False, "keras on torch": True}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The recipe's own data in .npy files."""
    directory = tmp_path_factory.mktemp("data")
    for part, split in zip(("train", "test"), datasets.digits(), strict=True):
        np.save(directory / f"{part}_x.npy", split.x)
        np.save(directory / f"{part}_y.npy", split.y)
    return directory


def train(flavour, output, *arguments, ahead=False, code=0):
    framework, environment = FLAVOURS[flavour]
    command = [f"recipes/cnn_{framework}.py", *ARGUMENTS, "--output", output, *arguments]
    if ahead:
        command.insert(0, WORKERS / "reads_ahead.py")
    result = launch(2, command, environment=environment, timeout=500)
    assert result.returncode == code, result.stdout[-2000:] + result.stderr[-3000:]
    assert "UserWarning" not in result.stderr  # such as torch's, of arrays that are not writable
    return result.stdout


def metrics(output):
    rows = map(json.loads, (output / "metrics.jsonl").read_text().splitlines())
    return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]


@pytest.mark.parametrize("flavour", some_long(FLAVOURS, short=["torch", "keras on tensorflow"]))
def test_from_files_as_from_memory(flavour, files, tmp_path):
    train(flavour, tmp_path / "memory")
    stopped = train(flavour, tmp_path / "files", "--data-dir", files, "--max-steps", "17", ahead=True)
    resumed = train(flavour, tmp_path / "files", "--data-dir", files, "--resume", ahead=True)
    assert "resumed at epoch 0, step 17" in resumed and resumed.count(" 0 missed, 0 repeated") == 2
    for printed in (stopped, resumed):
        threads = re.findall(r"reading threads: (\d+) began, (\d+) left", printed)
        assert len(threads) == 2 and {left for _, left in threads} == {"0"}
        assert {int(began) > 0 for began, _ in threads} == {READS_AHEAD[flavour]}
    expected, found = (checkpoint.newest(tmp_path / name) for name in ("memory", "files"))
    assert expected is not None and found is not None and found.path.name == expected.path.name == "step-00000072"
    assert found.state.keys() == expected.state.keys()
    for name, array in expected.state.items():
        assert found.state[name].tobytes() == array.tobytes(), name
    assert metrics(tmp_path / "files") == metrics(tmp_path / "memory")


def test_bad_files_are_one_line(files, tmp_path):
    (tmp_path / "train_x.npy").write_bytes(b"\x93NUMPY")
    result = launch(2, ["recipes/cnn_torch.py", "--data-dir", tmp_path, "--output", tmp_path / "run"])
    assert result.returncode == 2
    lines = [line for line in result.stderr.splitlines() if "error: " in line]
    assert len(lines) == 1 and "train_x.npy' is no whole .npy file of numbers" in lines[0], result.stderr
    assert "Traceback" not in result.stderr


KILLS = """
import os, signal
from toolkit.run import Run
log, moment = Run.log, {moment}
def logged(run, **arguments):
    if run.step == moment and run.world.rank == 1:
        os.kill(os.getpid(), signal.{signal})
    log(run, **arguments)
Run.log = logged
import runpy, sys
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize("name", ["SIGTERM", "SIGKILL"])
def test_told_to_stop_or_killed_while_a_thread_reads(name, files, tmp_path):
    (tmp_path / "kills.py").write_text(KILLS.format(moment=10, signal=name))
    command = [WORKERS / "reads_ahead.py", tmp_path / "kills.py", "recipes/cnn_torch.py", "--data-dir", files]
    result = launch(2, [*command, "--output", tmp_path / "run"], timeout=500)  # which finds nothing left
    assert result.returncode == (143 if name == "SIGTERM" else 128 + signal.SIGKILL), result.stderr
    if name == "SIGTERM":
        assert re.search(r"stopped by SIGTERM on rank 1 .*after step \d+; to go on: ", result.stdout), result.stdout
        assert re.findall(r"reading threads: (\d+) began, (\d+) left", result.stdout) == [("1", "0")] * 2
    else:
        assert "rank 1" in result.stderr and "killed" in result.stderr.lower(), result.stderr
