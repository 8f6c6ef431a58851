"""SIGTERM and SIGINT end a run with a checkpoint and the command that resumes it."""

import contextlib
import os
import resource
import shlex
import signal
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest

from tests.drills import stops
from tests.drills.report import table
from tests.launching import begin, kill_marked, launch
from toolkit import checkpoint, stopping

BOTH = (signal.SIGTERM, signal.SIGINT)


@pytest.mark.parametrize(
    ("recipe", "launcher"),
    [
        ("linear_regression_torch", "mpirun"),
        pytest.param("linear_regression_torch", "horovodrun", marks=pytest.mark.long),
        pytest.param("linear_regression_torch", "horovodrun-gloo", marks=pytest.mark.long),
        pytest.param("cnn_torch", "none", marks=pytest.mark.long),
        pytest.param("linear_regression_tensorflow", "mpirun", marks=pytest.mark.long),
        pytest.param("linear_regression_keras", "mpirun", marks=pytest.mark.long),
    ],
)
def test_a_run_told_to_stop_and_resumed_is_the_undisturbed_one(recipe, launcher):
    drills = list(stops.drills(2, recipes=[recipe], launcher=launcher, signals=BOTH, seed=3))
    assert not drills[0].failures and drills[0].times == 2, table(drills)


AT_A_STEP = """
import os, signal, sys, time
import torch
import toolkit.adapters.torch as dp
from toolkit.datasets import Split
from toolkit.options import RunOptions, parse
from toolkit.run import Run
moment = sys.argv.pop(1)
options = parse(RunOptions, None)
world = dp.start(**options.start)
model = torch.nn.Linear(1, 1)
optimizer = dp.distribute(torch.optim.SGD(model.parameters()), model)
data = Split(torch.rand(16, 1).numpy(), torch.rand(16, 1).numpy())

def told(now):
    if now == moment:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.2)

with Run(options, world, dp, model, optimizer, 16) as run:
    told("before the first step")
    for _ in run.epochs():
        for batch in run.batches(data):
            optimizer.zero_grad()
            torch.nn.functional.mse_loss(model(torch.from_numpy(batch.x)), torch.from_numpy(batch.y)).backward()
            optimizer.step()
            told(f"step {run.step}")
            run.log(loss=0.0)
        told(f"evaluation {run.epoch}")
        run.end_epoch()
dp.stop()
"""


@pytest.mark.parametrize(
    ("moment", "step"),
    [
        ("before the first step", 0),
        ("step 2", 4),  # so that the agreement falls on the epoch's last step
        ("evaluation 0", 4),
        pytest.param("step 0", 2, marks=pytest.mark.long),
        pytest.param("step 3", 4, marks=pytest.mark.long),
        pytest.param("evaluation 2", 12, marks=pytest.mark.long),  # nothing is left to stop
    ],
)
def test_whenever_it_is_told(moment, step, tmp_path):
    (tmp_path / "script.py").write_text(AT_A_STEP)
    options = ["--epochs", "3", "--global-batch-size", "4", "--output", tmp_path / "run"]
    result = launch(1, [tmp_path / "script.py", moment, *options], launcher="none")
    assert result.returncode == (0 if step == 12 else 143), result.stderr
    assert (f"after step {step}; to go on: " in result.stdout) == (step < 12), result.stdout
    found = checkpoint.newest(tmp_path / "run")
    assert found is not None and found.manifest["step"] == step


STUCK = """
import time
import torch
import toolkit.adapters.torch as dp
from toolkit.options import RunOptions, parse
from toolkit.run import Run
options = parse(RunOptions, None)
world = dp.start(**options.start)
model = torch.nn.Linear(1, 1)
optimizer = dp.distribute(torch.optim.SGD(model.parameters()), model)
with Run(options, world, dp, model, optimizer, 8) as run:
    print("in the loop", flush=True)
    time.sleep(200)
"""


def test_a_second_signal_ends_at_once(tmp_path):
    (tmp_path / "script.py").write_text(STUCK)
    with tempfile.TemporaryFile("w+") as printed:
        command = [tmp_path / "script.py", "--output", tmp_path / "run"]
        process, mark = begin(1, command, launcher="none", printed=printed)
        try:
            while "in the loop" not in os.pread(printed.fileno(), 10000, 0).decode():
                assert process.poll() is None
                time.sleep(0.05)
            process.send_signal(signal.SIGTERM)
            time.sleep(1.5)
            assert process.poll() is None
            process.send_signal(signal.SIGTERM)
            assert process.wait(60) == 143
        finally:
            kill_marked(mark)
            process.wait(60)
        printed.seek(0)
        assert "a second signal" in printed.read()


def test_the_command_that_resumes_begins_with_the_launcher(tmp_path):
    (tmp_path / "script.py").write_text(
        "from pathlib import Path; from toolkit import stopping; print(stopping.resume_command(Path('x y'), 2))"
    )
    script = str(tmp_path / "script.py")
    found = launch(1, [script, "--epochs", "3"]).stdout.split()
    assert found[0] == "mpirun" and found[-6:] == ["--epochs", "3", "--resume", "--output", "'x", "y'"]
    assert found[1:5] == ["-np", "1", "--oversubscribe", "--bind-to"]
    found = launch(1, [script, "--output=z"], launcher="none").stdout.split()
    assert found[-3:] == [script, "--output=z", "--resume"] and Path(found[0]).name.startswith("python")


def test_a_variables_value_is_not_printed(monkeypatch):
    monkeypatch.setattr(stopping, "_horovodrun_shell", stopping._horovodrun_shell.__wrapped__)  # that remembers nothing
    monkeypatch.setattr(sys, "argv", ["s.py", "-x", "a=b"])
    line = ["/usr/bin/mpirun", "-H", "a:2", "-x", "API_KEY=secret", "-x", "PATH", "python", "s.py", "-x", "a=b"]
    for above in ([], [["/bin/bash", "-c", shlex.join(line)]]):  # a script of the user's is not horovodrun
        found = [stopping._Process(1, words) for words in (line, *above)]
        monkeypatch.setattr(stopping, "_ancestors", lambda found=found: iter(found))
        printed = stopping.resume_command(Path("x"), 2)
        assert printed == "mpirun -H a:2 -x API_KEY -x PATH python s.py -x a=b --resume --output x"
    horovods = stopping._Process(
        1, ["/bin/sh", "-c", f"mpirun --allow-run-as-root --tag-output {shlex.join(line[1:])}"]
    )
    monkeypatch.setattr(stopping, "_ancestors", lambda: iter([found[0], horovods]))
    assert stopping.resume_command(Path("x"), 2).startswith("horovodrun --mpi -np 2 -H a:2 ")


@pytest.mark.parametrize(
    ("above", "begin"),
    [
        ("hvdkit restart --restarts 2 -- mpirun -np 2", "hvdkit restart --restarts 2 -- mpirun -np 2"),
        ("hvdkit launch -np 2 --hostfile h --", "hvdkit launch -np 2 --hostfile h --"),
        ("hvdkit verify", "mpirun -np 2"),  # which gives each of its jobs an --output of its own
    ],
)
def test_the_outermost_launcher_is_what_resumes(above, begin, monkeypatch):
    monkeypatch.setattr(stopping, "_horovodrun_shell", lambda: None)
    monkeypatch.setattr(sys, "argv", ["s.py"])
    lines = ["/v/bin/mpirun -np 2 python s.py", f"/v/bin/python3 /v/bin/{above} python s.py", "/bin/bash"]
    monkeypatch.setattr(stopping, "_ancestors", lambda: (stopping._Process(1, line.split()) for line in lines))
    assert stopping.resume_command(Path("x"), 2) == f"{begin} python s.py --resume --output x"


def test_mpichs_variables_and_keras_backend(monkeypatch):
    monkeypatch.setattr(stopping, "_horovodrun_shell", lambda: None)
    monkeypatch.setattr(sys, "argv", ["s.py", "-env", "a", "b"])
    line = ["mpiexec", "-genv", "API_KEY", "secret", "-env", "B", "secret", "-n", "2", "python", *sys.argv]
    monkeypatch.setattr(stopping, "_ancestors", lambda: iter([stopping._Process(1, line)]))
    monkeypatch.setenv("KERAS_BACKEND", "torch")
    shown = "KERAS_BACKEND=torch mpiexec -genvlist API_KEY -envlist B -n 2 python s.py -env a b --resume --output x"
    assert stopping.resume_command(Path("x"), 2) == shown


def test_a_signal_that_comes_when_nobody_acts_on_it_any_more_is_the_next_runs():
    for answered in (False, True):
        with contextlib.ExitStack() as stack:
            signals = stopping.Signals()
            signals.install()
            stack.callback(signals.restore, answered)
            os.kill(os.getpid(), signal.SIGTERM)
            end = time.monotonic() + 20
            while signals.received is None and time.monotonic() < end:
                time.sleep(0.01)
        with stopping.listening() as following:
            assert following.received == (None if answered else signal.SIGTERM)
    with stopping.listening() as following:
        assert following.received is None


def forked():
    """A child that has come past what Python does after a fork."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(writing, b"1")
        time.sleep(60)
        os._exit(0)
    os.read(reading, 1)
    os.close(reading)
    os.close(writing)
    return child


@pytest.mark.parametrize("descriptors", [0, 1024])
def test_signals_in_a_forked_child_are_its_own(descriptors):
    """With more open files than select() takes, too; and a child holds nothing up when the listening ends."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, descriptors + 100), hard))
    opened = [os.open(os.devnull, os.O_RDONLY) for _ in range(descriptors)]
    before = signal.getsignal(signal.SIGINT)  # a background job's is ignored
    signals = stopping.Signals()
    signals.install()
    child = None
    try:
        child = forked()
        os.kill(child, signal.SIGINT)  # which a group's Ctrl-C sends to it too
        os.kill(child, signal.SIGTERM)
        _, status = os.waitpid(child, 0)
        assert os.WTERMSIG(status) == signal.SIGTERM
        for _ in range(200):  # at once, as process pools do
            child = os.fork()
            if child == 0:
                time.sleep(60)
                os._exit(0)
            os.kill(child, signal.SIGTERM)
            assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGTERM
        assert signals.received is None
        os.kill(os.getpid(), signal.SIGINT)
        end = time.monotonic() + 20
        while signals.received is None and time.monotonic() < end:
            time.sleep(0.01)
        assert signals.received == signal.SIGINT
        (listening,) = [thread for thread in threading.enumerate() if thread.name == "signals"]
        child = forked()
    finally:
        signals.restore()
        for descriptor in opened:
            os.close(descriptor)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    listening.join(10)
    ended = not listening.is_alive()
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert ended
    assert signal.getsignal(signal.SIGINT) is before
