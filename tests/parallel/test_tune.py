"""`hvdkit tune` on a real recipe: what it prints, writes and leaves; the statistics are tested by themselves."""

import json
import re
import signal
import sys
import time

import pytest

from tests.launching import ROOT, begin, kill_marked, launch, marked, seconds_until_gone
from toolkit import tuned, tuning

RECIPE = [sys.executable, ROOT / "recipes/linear_regression_torch.py"]
TUNE = ["-m", "toolkit.cli", "tune"]
BY_HOROVOD = {tuned.REDUCER: "horovod"}  # whose own settings are tried here


def tune(place, *arguments, environment=None, timeout=1900):
    """Run it in `place`, where nothing else than what it writes may be left, and no temporary file at all."""
    (place / "tmp").mkdir()
    environment = {**(environment or {}), "TMPDIR": str(place / "tmp")}
    result = launch(1, [*TUNE, *arguments], launcher="none", environment=environment, cwd=place, timeout=timeout)
    assert [path.name for path in (place / "tmp").iterdir() if path.name.startswith(".hvdkit")] == []
    assert {path.name for path in place.iterdir()} <= {"tmp", "runs"}
    return result


@pytest.mark.long
@pytest.mark.timeout(2000)  # half a minute where the machine has nothing else to do
def test_a_search_tells_its_ratios_and_writes_what_it_found_or_nothing(tmp_path):
    short = ["-np", "2", "--steps", "40", "--minutes", "60", "--settings", "cache"]
    result = tune(tmp_path, *short, "--", *RECIPE, environment=BY_HOROVOD)
    assert result.returncode == 0, result.stdout + result.stderr
    head, runs, *candidates, end = result.stdout.splitlines()
    assert head.endswith(f"linear_regression_torch.py: 2 worker(s), {tuning.host_cores()} core(s)")
    assert re.fullmatch(r"[\d.e+]+ ms a step, 40 steps a run of [\d.]+ s", runs)
    ratios = r"HOROVOD_CACHE_CAPACITY=0: (\d+\.\d\d ){2,8}of the time(, kept)?"
    assert re.fullmatch(ratios, candidates[0]), result.stdout
    path = tmp_path / tuned.path_for("linear_regression_torch", tuned.Job("torch", 2, 2, 1))
    if path.exists():  # by chance, or not
        assert end.startswith(f"wrote {path.relative_to(tmp_path)}; later runs") and "kept" in candidates[0]
        assert tuned.read(path).environment == {"HOROVOD_CACHE_CAPACITY": "0"}
    else:
        assert end.startswith("no gain found") and end.endswith("nothing is written")


def test_where_mpi_adds_up_horovods_own_settings_are_not_tried(tmp_path):
    by_mpi = {tuned.REDUCER: "mpi"}
    short = ["-np", "2", "--steps", "10", "--minutes", "60", "--settings", "cycle-time,cache"]
    result = tune(tmp_path, *short, "--", *RECIPE, environment=by_mpi)
    assert result.returncode == 0, result.stdout + result.stderr
    names = ("HOROVOD_CYCLE_TIME=1", "HOROVOD_CYCLE_TIME=5", "HOROVOD_CACHE_CAPACITY=0")
    told = [f"{name}: not tried, as MPI adds up the gradients" for name in names]
    assert result.stdout.splitlines()[2:] == [*told, "no gain found; nothing is written"]


@pytest.mark.long
@pytest.mark.timeout(3600)  # two minutes
def test_a_bad_setting_is_found_and_the_next_run_is_without_it(tmp_path):
    """Horovod looks at its queue each 0.1 s, which is some 50 times a step's time: hardly any noise hides that."""
    bad = {"HOROVOD_CYCLE_TIME": "100", **BY_HOROVOD}
    recipe = [*RECIPE, "--global-batch-size", "40"]
    short = ["-np", "2", "--steps", "12", "--minutes", "60", "--settings", "cycle-time"]
    result = tune(tmp_path, *short, "--", *recipe, environment=bad, timeout=3500)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "HOROVOD_CYCLE_TIME=0.2: " in result.stdout and "of the time, kept" in result.stdout
    gained, low, high = re.search(
        r"([\d.]+) % less time a step \(\d+ % interval ([\d.]+) to ([\d.]+) %", result.stdout
    ).groups()
    assert float(low) <= float(gained) <= float(high) and float(low) > 10
    assert "unset HOROVOD_CYCLE_TIME: it is set in this environment, which comes first" in result.stdout
    path = tuned.path_for("linear_regression_torch", tuned.Job("torch", 2, 2, 1, options="--global-batch-size 40"))
    written = json.loads((tmp_path / path).read_text())
    assert float(written["environment"]["HOROVOD_CYCLE_TIME"]) <= 5
    assert written["gain"]["pairs"] >= 5 and written["gain"]["interval"][1] < 0.9
    assert "linear_regression_torch.py" in written["command"] and written["job"]["cores"] == tuning.host_cores()
    again = launch(2, [*recipe[1:], "--max-steps", "2", "-v"], cwd=tmp_path)
    assert again.returncode == 0 and f"found by hvdkit tune, in {path}" in again.stdout, again.stdout + again.stderr


MISTAKES = {
    "unknown": (["--settings", "color"], RECIPE, "'color': give some of reducer,threads,"),
    "output": ([], [*RECIPE, "--output=x"], "the recipe's command has --output: leave it out"),
    "no tuning": ([], [*RECIPE, "--no-tuning"], "the recipe's command has --no-tuning: leave it out"),
    "program": ([], ["nowhere-to-be-found"], "nowhere-to-be-found is no program here"),
    "option": ([], [*RECIPE, "--learning-rate", "x"], "fails by itself: --learning-rate is 'x': give a number above 0"),
    "no recipe": ([], [sys.executable, "-c", "pass"], "it left no times of its steps: it must train through"),
    "hangs": (["--timeout", "3"], [sys.executable, "-c", "import time; time.sleep(600)"], "it did not end within 3 s"),
    "too short": (["--minutes", "0.01"], RECIPE, r"too long: give --minutes of at least \d+\.\d"),
    "minutes": (["--minutes", "nan"], RECIPE, "'nan': give a number above 0"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line(tmp_path, mistake):
    options, recipe, text = MISTAKES[mistake]
    result = tune(tmp_path, "-np", "1", *options, "--", *recipe)
    assert result.returncode == 2 and result.stdout == ""
    last = result.stderr.splitlines()[-1]
    assert re.search(text if mistake == "too short" else re.escape(text), last), result.stderr
    assert "Traceback" not in result.stderr and not (tmp_path / "runs").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.long)])
def test_a_signal_ends_the_run_and_leaves_nothing(tmp_path, number):
    command = [*TUNE, "-np", "2", "--steps", "1000000", "--timeout", "1000", "--", *RECIPE]
    process, mark = begin(1, command, launcher="none", environment={"TMPDIR": str(tmp_path)}, cwd=tmp_path)
    try:
        end = time.monotonic() + 400
        while not (begun := list(tmp_path.glob(".hvdkit-tune-*/run/metrics.jsonl"))) and time.monotonic() < end:
            time.sleep(0.2)
        assert begun and len(marked(mark)) >= 3
        process.send_signal(number)
        _, printed = process.communicate(timeout=60)
        assert process.returncode == (143 if number == signal.SIGTERM else 130), printed
        assert "Traceback" not in printed
        assert seconds_until_gone(mark, 30) < 30
        assert list(tmp_path.glob(".hvdkit-tune-*")) == [], "its directory is left"
    finally:
        kill_marked(mark)
        process.kill()
        process.communicate()
