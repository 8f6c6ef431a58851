"""`hvdkit verify` passes what is right and finds, and names, what is not."""

import contextlib
import os
import signal
import sys
import time

import numpy as np
import pytest

from tests.launching import WORKERS, begin, kill_marked, launch, seconds_until_gone, some_long
from toolkit import verify

FOUND = {
    "": "pass",
    "no distribute": "after step 1, ranks 1, 2, 3 differ from rank 0 in model/weight",
    "no broadcast": "before the first step, ranks 1, 2, 3 differ from rank 0",
    "augmentation by rank": "(augmentation, dropout;",
    "same data on every rank": "(sharding)",
    "unweighted tail": "losses part at step 14, an epoch's last batch",  # 442 = 13 · 32 + 26
    "rate scaled twice": "the first update is 4 times one worker's",
}


SHORT = ["", "no distribute", "unweighted tail"]


@pytest.mark.parametrize("bug", some_long(FOUND, short=SHORT), ids=lambda bug: bug or "no bug")
def test_planted_bug(bug):
    command = [
        "-m",
        "toolkit.cli",
        "verify",
        "-np",
        "1,4",
        "--steps",
        "20",
        *([] if bug == "" else ["--once"]),
    ]
    command += ["--", sys.executable, WORKERS / "planted.py"]
    result = launch(1, command, launcher="none", environment={"PLANTED": bug})
    assert result.returncode == (1 if bug else 0), result.stdout + result.stderr
    assert FOUND[bug] in result.stdout, result.stdout
    assert ("FAIL" in result.stdout) == bool(bug)
    if not bug:
        assert result.stdout.count(" yes ") == 2, "each size repeats to the bit"


def test_runs_are_on_cpus_unless_the_environment_says_otherwise(monkeypatch):
    recipe = verify.Recipe([sys.executable, "-c", "import os; raise SystemExit(os.environ['HVDKIT_DEVICE'])"])
    monkeypatch.delenv("HVDKIT_DEVICE", raising=False)
    assert recipe.run(1, 1).error == "cpu"
    monkeypatch.setenv("HVDKIT_DEVICE", "gpu")
    assert recipe.run(1, 1).error == "gpu"


def test_against_another_framework():
    recipe = [sys.executable, "recipes/linear_regression_torch.py"]
    other = f"{sys.executable} recipes/linear_regression_tensorflow.py"
    command = [
        "-m",
        "toolkit.cli",
        "verify",
        "-np",
        "1",
        "--once",
        "--steps",
        "20",
        "--against",
        other,
        "--",
        *recipe,
    ]
    result = launch(1, command, launcher="none")
    assert result.returncode == 0 and "against" in result.stdout, result.stdout + result.stderr


@pytest.mark.parametrize(
    ("recipe", "text"),
    [
        (["nowhere-to-be-found"], "nowhere-to-be-found is not found"),
        ([sys.executable, "-c", "pass"], "no checkpoint"),
        ([sys.executable, "x.py", "--batch-size=3"], "--batch-size"),
        ([sys.executable, "nope.py"], "nope.py fails before it trains: "),
    ],
)
def test_a_mistake_is_one_line(recipe, text):
    result = launch(1, ["-m", "toolkit.cli", "verify", "-np", "1", "--", *recipe], launcher="none")
    assert result.returncode == 2
    assert text in result.stderr and result.stderr.count("\n") == 1, result.stderr
    assert "verdict" not in result.stdout, "a table of results"


def test_a_run_that_hangs_is_ended_with_its_workers(tmp_path):
    (tmp_path / "hangs.py").write_text("import time; time.sleep(600)")
    command = ["-m", "toolkit.cli", "verify", "-np", "2", "--timeout", "3", "--", sys.executable, tmp_path / "hangs.py"]
    result = launch(1, command, launcher="none")  # which checks that nothing is left
    assert result.returncode == 1 and "did not end within 3 s" in result.stdout, result.stdout + result.stderr


def test_a_command_that_is_held_against_the_recipe_and_does_not_train():
    other = f"{sys.executable} nope.py"
    command = ["-np", "1", "--once", "--steps", "1", "--against", other, "--", sys.executable, WORKERS / "planted.py"]
    result = launch(1, ["-m", "toolkit.cli", "verify", *command], launcher="none", environment={"PLANTED": ""})
    assert result.returncode == 2 and "nope.py fails before it trains: " in result.stderr, result.stderr
    assert "FAIL" not in result.stdout


WRITES_ON = """
import os, sys, time
place = sys.argv[sys.argv.index("--output") + 1]
while True:
    os.makedirs(place, exist_ok=True)  # as a run makes its directory again
    open(f"{place}/{os.getpid()}", "w").close()
    time.sleep(0.01)
"""


@pytest.mark.parametrize(
    ("size", "numbers", "code"),
    [(1, [signal.SIGINT], 130), (2, [signal.SIGINT, signal.SIGINT], 130), (2, [signal.SIGTERM], 143)],
    ids=["one worker", "two, pressed twice", "SIGTERM"],
)
def test_a_signal_ends_the_run_and_leaves_nothing(tmp_path, size, numbers, code):
    (tmp_path / "writes.py").write_text(WRITES_ON)
    command = ["-c", "import os, sys; os.setpgrp(); from toolkit.cli import main; sys.exit(main())", "verify"]
    command += ["-np", str(size), "--", sys.executable, tmp_path / "writes.py"]
    process, mark = begin(1, command, launcher="none", environment={"TMPDIR": str(tmp_path)})
    try:
        end = time.monotonic() + 60
        while len(list(tmp_path.glob("hvdkit-verify-*/run/*"))) < size and time.monotonic() < end:
            time.sleep(0.05)
        for number in numbers:
            with contextlib.suppress(ProcessLookupError):  # that is gone already at the first
                os.killpg(process.pid, number)  # a terminal's Ctrl-C is for the whole group
            time.sleep(0.2)
        _, said = process.communicate(timeout=60)
        assert process.returncode == code and said == ""
        assert seconds_until_gone(mark, 10) < 10
        assert list(tmp_path.glob("hvdkit-verify-*")) == [], "its directory is left"
    finally:
        kill_marked(mark)
        process.kill()
        process.communicate()


def outcome(losses, **weights):
    return verify.Outcome(np.array(losses), {f"model/{name}": np.array(v) for name, v in weights.items()}, 10)


def test_comparison_of_figures_worked_out_by_hand():
    reference = outcome([1.0, 2.0, 4.0], w=[1.0, -2.0], b=[0.0])
    found = verify.compare(reference, outcome([1.0, 2.002, 4.0], w=[1.0, -2.004], b=[0.0]), 1e-4)
    assert found.loss == pytest.approx(1e-3) and found.first_step == 2
    assert found.weight == pytest.approx(2e-3) and found.tensor == "model/w"
    assert not found.passes(1e-4) and found.passes(1e-2)
    assert verify.compare(reference, reference, 0.0).passes(0.0)
    assert not verify.compare(reference, outcome([1.0, float("nan"), 4.0], w=[1.0, -2.0], b=[0.0]), 1.0).passes(1.0)
    assert not verify.compare(reference, outcome([1.0, 2.0], w=[1.0, -2.0], b=[0.0]), 1.0).passes(1.0)


def test_tensors_of_another_framework_are_compared_whatever_their_layout():
    kernel = np.arange(6.0).reshape(2, 3)
    torch, keras = outcome([1.0], weight=kernel, bias=[7.0]), outcome([1.0], kernel=kernel.T, beta=[7.0])
    assert verify.compare(torch, keras, 1e-6).passes(1e-6)
    assert not verify.compare(torch, outcome([1.0], kernel=kernel.T + 1, beta=[7.0]), 1e-2).passes(1e-2)
    assert not verify.compare(torch, outcome([1.0], kernel=kernel[:1], beta=[7.0]), 1e-2).passes(1e-2)
