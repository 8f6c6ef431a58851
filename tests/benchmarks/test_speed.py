"""The benchmark's machinery: what it writes, what it finds out about contestants, and that none of them outlives it.

Nothing here depends on how fast anything is.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.benchmarks import groups, models, report, speed, turns
from tests.benchmarks.arena import Contestant, compete
from tests.launching import ROOT, clean_environment

LIMIT = 480


def begin(arguments, directory):
    """Start the benchmark with its temporary files in `directory`."""
    return subprocess.Popen(
        [sys.executable, "-m", "tests.benchmarks.speed", *arguments],
        cwd=ROOT,
        env={**clean_environment(), "TMPDIR": str(directory)},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # which a shell's & may have changed
    )


def contestants_of(directory):
    """Process numbers and states of all contestants' processes, which have their files below `directory`."""
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                ours = f"{turns.DIRECTORY}={directory}/".encode() in (entry / "environ").read_bytes()
                state = (entry / "stat").read_text().rpartition(")")[2].split()[0]
            except OSError:
                continue
            if ours and state != "Z":
                found[int(entry.name)] = state
    return found


def comes_true(condition, most):
    """Whether it does within `most` seconds."""
    limit = time.monotonic() + most
    while not condition():
        if time.monotonic() > limit:
            return False
        time.sleep(0.05)
    return True


def end(process, directory):
    """Leave nothing behind, whatever a test found."""
    process.kill()
    process.communicate()
    for pid in contestants_of(directory):
        os.kill(pid, signal.SIGKILL)


@pytest.mark.timeout(LIMIT + 60)
def test_short_form(tmp_path):
    temporary, output = tmp_path / "temporary", tmp_path / "output"
    temporary.mkdir()
    process = begin(["--short", "--output", str(output)], temporary)
    try:
        out, err = process.communicate(timeout=LIMIT)
        assert process.returncode == 0, err
        assert contestants_of(temporary) == {}
        assert list(temporary.iterdir()) == []
    finally:
        end(process, temporary)
    assert sorted(path.name for path in output.iterdir() if path.suffix != ".png") == ["results.json", "results.md"]
    results = json.loads((output / "results.json").read_text())
    (group,) = results["groups"]
    assert group["name"] == "torch:cnn:2"
    found = group["contestants"]
    assert list(found) == [contestant.name for contestant in groups.CONTESTANTS["torch"]]
    mpi = found.pop(groups.DDP_MPI)
    assert mpi["failed"].startswith("not built: ") or report.is_sound(mpi)
    for name, contestant in found.items():
        assert contestant["failed"] is None, name
        assert len(contestant["milliseconds_per_step"]) == 5, name
        assert min(contestant["milliseconds_per_step"]) > 0, name
        assert report.is_sound(contestant), name
        assert contestant["threads"] == found[groups.FLOOR]["threads"], name
        assert len(contestant["peak_megabytes"]) == 2 and min(contestant["peak_megabytes"]) > 50, name
    # The same check on one that does not average: it finds it.
    floor = found[groups.FLOOR]
    assert floor["difference"] > 0.1 and not floor["ranks_equal"]
    assert not report.is_sound({**floor, "talks": True})
    assert (output / "results.md").read_text() == out
    assert "| torch, CNN: ours against floor | 1.10 |" in out


@pytest.mark.timeout(LIMIT + 60)
@pytest.mark.parametrize(
    "number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.long), signal.SIGKILL]
)
def test_ended_early(tmp_path, number):
    process = begin(["--only", "torch:linear:2", "--turn", "0.1"], tmp_path)
    try:
        assert comes_true(lambda: "T" in contestants_of(tmp_path).values(), LIMIT)
        process.send_signal(number)
        process.communicate(timeout=LIMIT)
        assert process.returncode != 0
        if number == signal.SIGKILL:  # then the kernel ends them, stopped as they are
            assert comes_true(lambda: not contestants_of(tmp_path), 60)
        else:
            assert contestants_of(tmp_path) == {}
            assert list(tmp_path.iterdir()) == []
    finally:
        end(process, tmp_path)


def test_one_that_fails_does_not_stop_the_others(tmp_path):
    floor = groups.CONTESTANTS["torch"][-1]
    script = tmp_path / "fails.py"
    text = (ROOT / "tests/benchmarks/contestants/torch_floor.py").read_text()
    begun = "    optimizer.zero_grad()\n"
    assert begun in text
    counted = text.replace("model = common.build()", "model, steps = common.build(), iter(range(10**9))")
    script.write_text(
        "import sys\nsys.path.append(sys.argv[1])\n"
        + counted.replace(
            begun, begun + '    if rank == 1 and next(steps) > 22:\n        raise ValueError("out of luck")\n'
        )
    )
    scripts = str(ROOT / "tests/benchmarks/contestants")
    said = []
    place = tmp_path / "arena"
    place.mkdir()
    contestants = [
        Contestant("fails", (str(script), scripts), talks=False),
        Contestant("no script", ("is_not_there.py",)),
        floor,
    ]
    found = compete(
        contestants, "linear", 2, rounds=2, turn_seconds=0.05, warm_steps=20, directory=place, say=said.append
    )
    assert found["fails"].failed == "ValueError: out of luck"
    assert "is_not_there.py" in found["no script"].failed
    assert found[floor.name].failed is None and len(found[floor.name].milliseconds_per_step) == 2
    assert len(said) == 2
    assert contestants_of(place) == {}
    assert all(path.suffix in (".weights", ".initial") for path in place.iterdir())


def contestant(*milliseconds, **more):
    return {
        "failed": None,
        "milliseconds_per_step": list(milliseconds),
        "talks": True,
        "ranks_equal": True,
        "difference": 0.0,
        **more,
    }


def results(found):
    return {"groups": [{"name": "torch:cnn:2", "contestants": found}]}


TARGET = groups.Target("torch", "cnn", (groups.DDP, groups.DDP_PLAIN), 0.95)


def test_target_is_of_medians_and_tells_the_worst_round():
    ours = contestant(1.0, 2.0, 3.0)
    found = {groups.OURS: ours, groups.DDP: contestant(9.0, 9.0, 9.0), groups.DDP_PLAIN: contestant(4.0, 2.0, 8.0)}
    assert report.measured(results(found), TARGET) == (groups.DDP_PLAIN, 0.5, 1.0)
    assert report.verdict(0.5, 0.95) == "met"
    assert report.verdict(1.14, 0.95) == "missed by 20 %"


@pytest.mark.parametrize(
    "unsound", [{"failed": "an error"}, {"ranks_equal": False}, {"difference": 0.5}, {"milliseconds_per_step": []}]
)
def test_one_that_computes_something_else_counts_for_nothing(unsound):
    quick = {**contestant(0.1), **unsound}
    found = {groups.OURS: contestant(1.0), groups.DDP: quick, groups.DDP_PLAIN: contestant(2.0)}
    assert report.measured(results(found), TARGET) == (groups.DDP_PLAIN, 0.5, 0.5)
    assert report.measured(results({**found, groups.OURS: quick}), TARGET) is None


def test_selection():
    assert groups.selected([]) == groups.ALL
    assert [group.name for group in groups.selected(["torch:cnn:2", "torch:cnn"])] == [
        "torch:cnn:2",
        "torch:cnn:1",
        "torch:cnn:4",
    ]
    assert {group.framework for group in groups.selected(["keras"])} == {"keras"}


@pytest.mark.parametrize("word", ["jax", "torch:cnn:3", "cnn", "torch:cnn:2:1", ""])
def test_selection_of_nothing_is_one_line(word, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["speed", "--only", word])
    with pytest.raises(SystemExit) as ended:
        speed.main()
    assert ended.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1].endswith("from the right, parts may be left out.")


def test_parameters_are_those_that_are_told():
    assert [models.MODELS[name].parameters for name in ("linear", "cnn", "mlp")] == [11, 21_840, 551_610]
