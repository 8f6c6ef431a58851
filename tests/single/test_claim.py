"""One run a directory, whatever becomes of the directory."""

import errno
import fcntl
import json
import os
import shutil
import subprocess
import sys
import threading

import pytest

from tests.launching import ROOT
from toolkit import output
from toolkit.claim import LOCK, Claim, claim_patiently
from toolkit.errors import UsageError


def test_the_second_is_refused_with_process_host_and_time(tmp_path):
    first = Claim(tmp_path)
    owner = json.loads((tmp_path / LOCK).read_text())
    for resume in (False, True):
        with pytest.raises(UsageError) as refused:
            output.claim(tmp_path, resume)
        assert str(refused.value) == (
            f"{tmp_path}: another run has it, process {os.getpid()} on {owner['host']}, since {owner['since']}: "
            "wait for that run, or end it, or choose another --output."
        )
    with pytest.raises(UsageError, match="another run has it"):  # rather than that it is not empty
        (tmp_path / "metrics.jsonl").touch()
        output.choose("x", tmp_path, False)
    first.release()
    assert not (tmp_path / LOCK).exists()
    Claim(tmp_path).release()


def test_a_lost_runs_lock_can_be_waited_for(tmp_path, capsys):
    lost = Claim(tmp_path)
    with pytest.raises(UsageError, match="another run has it"):
        output.claim(tmp_path, True, patience=0.1)
    with pytest.raises(OSError, match="another run has it"):
        claim_patiently(tmp_path, 600, given_up=lambda: True)
    assert capsys.readouterr().err.count("waiting up to 0 s for its end") == 1
    threading.Timer(0.3, lost.release).start()
    output.claim(tmp_path, True, patience=60).release()
    assert capsys.readouterr().err.count("waiting up to 60 s for its end") == 1


HOLDING = """
import os, sys, time
from pathlib import Path
from toolkit.claim import Claim
claim = Claim(Path(sys.argv[1]))
if os.fork() == 0:  # as a data loader's worker, which may outlive its run for a while
    print("held", flush=True)
    time.sleep(600)
time.sleep(600)
"""


def test_a_killed_runs_hold_ends_with_it(tmp_path):
    command = [sys.executable, "-c", HOLDING, tmp_path]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, cwd=ROOT, start_new_session=True)
    try:
        assert process.stdout.readline() == b"held\n"
        with pytest.raises(OSError, match=f"process {process.pid} ") as refused:
            Claim(tmp_path)
        assert refused.value.errno == errno.EBUSY
        process.kill()
        process.wait()
        Claim(tmp_path).release()
    finally:
        os.killpg(process.pid, 9)
        process.wait()


@pytest.mark.parametrize(
    "text", [b"", b"{}", b"[" * 4000, b'{"host": "\\u001b[2J", "process": 1, "since": 2}', b"\xff"]
)
def test_a_lock_without_its_text_is_one_all_the_same(tmp_path, text):
    claim = Claim(tmp_path)
    (tmp_path / LOCK).write_bytes(text)
    with pytest.raises(OSError, match=f"of which its {LOCK} says nothing"):
        Claim(tmp_path)
    claim.release()


def test_a_file_system_without_locks_is_warned_of(tmp_path, monkeypatch, capsys):
    def none(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", none)
    (tmp_path / ".step-00000003.1.tmp").mkdir()
    (tmp_path / "metrics.jsonl").touch()
    claims = [output.claim(tmp_path, True), output.claim(tmp_path, True)]
    warnings = capsys.readouterr().err.splitlines()
    assert len(warnings) == 2 and "has no locks (No locks available)" in warnings[0]
    assert (tmp_path / ".step-00000003.1.tmp").exists(), "it may be of a run that is at work"
    for claim in claims:
        claim.check()
        claim.release()


def test_a_removed_directory_is_made_again_and_held(tmp_path):
    place = tmp_path / "a" / "run"
    place.mkdir(parents=True)
    claim = Claim(place)
    claim.check()
    shutil.rmtree(tmp_path / "a")
    claim.check()
    with pytest.raises(OSError, match="another run has it"):
        Claim(place)
    (place / LOCK).unlink()  # as by `rm run/*`
    claim.check()
    with pytest.raises(OSError, match="another run has it"):
        Claim(place)
    claim.release()


def test_what_has_taken_its_place_is_not_touched(tmp_path):
    place = tmp_path / "run"
    place.mkdir()
    claim = Claim(place)
    place.rename(tmp_path / "moved")
    place.write_text("somebody's file")
    with pytest.raises(OSError, match="something else is there now"):
        claim.check()
    place.unlink()
    place.mkdir()
    (place / "notes").write_text("somebody's directory")
    with pytest.raises(OSError, match="something else is there now"):
        claim.check()
    assert os.listdir(place) == ["notes"]
    (place / "notes").unlink()
    other = Claim(place)
    with pytest.raises(OSError, match="something else is there now"):
        claim.check()
    other.release()
    claim.check()
    claim.release()
    assert os.listdir(tmp_path / "moved") == [LOCK]


@pytest.mark.parametrize("kind", ["link", "pipe"])
def test_a_lock_that_is_no_plain_file_is_refused(tmp_path, kind):
    (tmp_path / "target").write_text("precious")
    if kind == "link":
        (tmp_path / LOCK).symlink_to("target")
    else:
        os.mkfifo(tmp_path / LOCK)
    with pytest.raises(UsageError, match="can't be written to"):
        output.claim(tmp_path, True)
    assert (tmp_path / "target").read_text() == "precious"


def test_leftovers_of_killed_runs_are_removed_and_nothing_else(tmp_path):
    (tmp_path / ".step-00000003.77.tmp").mkdir()
    (tmp_path / ".step-00000003.77.tmp" / "state.safetensors").write_text("half")
    (tmp_path / ".metrics.jsonl.0123456789abcdef.tmp").write_text("half")
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "file").touch()
    (tmp_path / ".step-00000004.77.tmp").symlink_to("outside")
    kept = {"outside", "step-00000002", "step-00000001.damaged-5", "mine.tmp", ".step-x.tmp", "metrics.jsonl"}
    for name in kept - {"outside"}:
        (tmp_path / name).mkdir()
    claim = output.claim(tmp_path, True)
    assert set(os.listdir(tmp_path)) - {".step-00000004.77.tmp"} == kept | {LOCK}
    assert (tmp_path / "outside" / "file").exists()
    claim.release()


RACING = """
import sys, time
from pathlib import Path
from toolkit.claim import Claim
try:
    Claim(Path(sys.argv[1]))
    print("won", flush=True)
except OSError as error:
    print(error.errno, flush=True)
time.sleep(600)
"""


def test_a_race_of_many_has_one_winner(tmp_path):
    line = [sys.executable, "-c", RACING, tmp_path]
    racers = [subprocess.Popen(line, stdout=subprocess.PIPE, text=True, cwd=ROOT) for _ in range(6)]
    try:
        said = sorted(racer.stdout.readline().strip() for racer in racers)
        assert said == [str(errno.EBUSY)] * 5 + ["won"]
    finally:
        for racer in racers:
            racer.kill()
            racer.communicate()
