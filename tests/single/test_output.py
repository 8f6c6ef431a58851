"""metrics.jsonl: whole rows only, whatever the disk does, and nothing of anybody else's overwritten."""

import errno
import json
import os
import secrets
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.launching import ROOT
from toolkit import checkpoint, output
from toolkit.claim import Claim
from toolkit.errors import UsageError


def row(step):
    return json.dumps({"kind": "step", "step": step}) + "\n"


def steps(directory):
    return [found["step"] for found in output.read_metrics(directory, "step")]


def fill(metrics, *numbers):
    for step in numbers:
        metrics.write("step", {"step": step})


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("", []),
        (row(1) + row(2) + row(3) + row(4), [1, 2]),
        (row(1) + row(2) + row(3)[:-9], [1, 2]),
        (row(1) + row(2)[:-1], [1]),  # a row is whole with its line's end
        (row(1) + "\0\0\0\n" + row(2) + row(3), [1, 2]),
        (row(3) + row(1), [1]),
        ('[]\n7\n"x"\n{"step": "1"}\n{"step": null}\n{"step": -1}\n{"step": NaN}\n' + row(2), [2]),
        ("[" * 100_000 + "\n" + row(2), [2]),
        ("x" * (3 << 20) + "\n" + row(2), [2]),
        ("\ud800\n" + row(2), [2]),
    ],
)
def test_a_resumed_run_keeps_the_whole_rows_up_to_its_step(tmp_path, text, kept):
    (tmp_path / "metrics.jsonl").write_bytes(text.encode("utf-8", "surrogatepass"))
    metrics = output.Metrics(tmp_path, 2)
    fill(metrics, 3)
    metrics.close()
    assert (tmp_path / "metrics.jsonl").read_text() == "".join(map(row, [*kept, 3]))
    assert os.listdir(tmp_path) == ["metrics.jsonl"]


@pytest.fixture
def disk(monkeypatch):
    """A disk that takes so many bytes more of metrics.jsonl, then none."""

    class Disk:
        free = 10**9

        def write(self, descriptor, data, real=os.write):
            if self.free <= 0:
                raise OSError(errno.ENOSPC, "No space left on device")
            written = real(descriptor, data[: self.free])
            self.free -= written
            return written

    disk = Disk()
    monkeypatch.setattr(output.os, "write", disk.write)
    monkeypatch.setattr(output, "_RETRY_SECONDS", 0)
    return disk


def test_rows_wait_while_the_disk_is_full_and_none_is_left_in_part(tmp_path, disk, capsys):
    metrics = output.Metrics(tmp_path, 0)
    disk.free = len(row(1)) + 5
    fill(metrics, 1, 2, 3)
    assert (tmp_path / "metrics.jsonl").read_text() == row(1)
    disk.free = 10**9
    fill(metrics, 4)
    assert steps(tmp_path) == [1, 2, 3, 4]
    disk.free = 0
    fill(metrics, 5)
    metrics.close()
    warned, again, *more = capsys.readouterr().err.splitlines()
    assert "No space left on device; training goes on" in warned and "again" in again
    assert len(more) == 2 and more[1].startswith("warning: 1 row(s) of ") and steps(tmp_path) == [1, 2, 3, 4]


def test_no_row_is_lost_with_a_removed_directory(tmp_path):
    place = tmp_path / "run"
    place.mkdir()
    claim = Claim(place)
    metrics = output.Metrics(place, 0, claim.check)
    fill(metrics, 1, 2)
    shutil.rmtree(place)
    fill(metrics, 3)
    assert steps(place) == [1, 2, 3]
    place.rename(tmp_path / "moved")
    fill(metrics, 4)
    assert steps(place) == [1, 2, 3, 4]
    metrics.close()


def test_a_file_that_took_its_place_is_set_aside(tmp_path):
    metrics = output.Metrics(tmp_path, 0)
    fill(metrics, 1)
    (tmp_path / "new").write_text("somebody's")
    (tmp_path / "new").rename(tmp_path / "metrics.jsonl")
    fill(metrics, 2)
    metrics.close()
    (aside,) = tmp_path.glob("metrics.jsonl.replaced-*")
    assert aside.read_text() == "somebody's" and steps(tmp_path) == [1, 2]


@pytest.mark.parametrize("name", ["metrics.jsonl", ".metrics.jsonl.guessed.tmp"])
def test_a_link_is_not_written_through(tmp_path, name, monkeypatch):
    monkeypatch.setattr(output, "_RETRY_SECONDS", 0)
    monkeypatch.setattr(secrets, "token_hex", lambda _: "guessed")
    target = tmp_path / "precious"
    target.write_text("[]\n" + row(1) + row(9))
    before = target.read_bytes()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text("[]\n" + row(1) + row(9))  # is written anew
    (tmp_path / "run" / name).unlink(missing_ok=True)
    (tmp_path / "run" / name).symlink_to(target)
    metrics = output.Metrics(tmp_path / "run", 1)
    fill(metrics, 2)
    metrics.close()
    assert target.read_bytes() == before


def test_a_pipe_in_its_place_hangs_nothing(tmp_path, capsys):
    os.mkfifo(tmp_path / "metrics.jsonl")
    metrics = output.Metrics(tmp_path, 0)
    fill(metrics, 1)
    metrics.close()
    assert "no plain file" in capsys.readouterr().err


LIMITED = """
import resource, signal, sys
from pathlib import Path
import numpy as np
from toolkit import checkpoint, output
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
place = Path(sys.argv[1])
metrics, writer = output.Metrics(place, 0), checkpoint.Writer()
output._RETRY_SECONDS = 0
state = {"x": np.arange(5000)}
writer.write(place, 1, state, {}, 3)
assert writer.finish() is None
_, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (1500, hard))
for step in range(1, 100):
    metrics.write("step", {"step": step})
writer.write(place, 2, state, {}, 3)
assert "too large" in writer.finish(tries=1, seconds=0.01)
resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
writer.write(place, 3, state, {}, 3)
assert writer.finish() is None
metrics.close()
writer.close()
"""


def test_the_systems_own_refusal_needs_no_root(tmp_path):
    """RLIMIT_FSIZE cuts writes short as a full disk does."""
    result = subprocess.run(
        [sys.executable, "-c", LIMITED, tmp_path], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr
    assert steps(tmp_path) == list(range(1, 100)) and len(result.stderr.splitlines()) == 4, result.stderr
    assert sorted(os.listdir(tmp_path)) == ["metrics.jsonl", "step-00000001", "step-00000003"]
    assert checkpoint.read(tmp_path / "step-00000003")


def test_the_rows_of_a_run_whose_checkpoints_lie_elsewhere_are_set_aside(tmp_path):
    rows = row(1) + json.dumps({"kind": "epoch", "epoch": 1, "step": 1}) + "\n"
    (tmp_path / "metrics.jsonl").write_text(rows)
    assert output.to_resume(tmp_path) is None
    (aside,) = tmp_path.iterdir()
    assert aside.name.startswith("metrics.jsonl.replaced-") and aside.read_text() == rows


FULL = """
import sys
from pathlib import Path
from toolkit import output
from toolkit.progress import Progress
from toolkit.world import World
Progress(World(), 3, 0).line("to a full disk")
place = Path(sys.argv[1])
(place / "metrics.jsonl").mkdir()
output._RETRY_SECONDS = 0
metrics = output.Metrics(place, 0)
metrics.write("step", {"step": 1})
(place / "metrics.jsonl").rmdir()
metrics.write("step", {"step": 2})
metrics.close()
"""


def test_training_needs_no_place_for_what_it_says(tmp_path):
    with open("/dev/full", "w") as full:
        subprocess.run([sys.executable, "-c", FULL, tmp_path], cwd=ROOT, stdout=full, stderr=full, timeout=120)
    assert steps(tmp_path) == [1, 2]


@pytest.mark.parametrize(
    ("files", "begins"),
    [
        ([], True),
        (["run.lock"], True),
        (["metrics.jsonl", "slurm-1.out", "error.json"], True),
        (["error.json"], True),
        (["error.json", "notes.txt"], False),
        (["notes.txt"], False),
        (["metrics.jsonl", "step-00000004/manifest.json"], False),
        (["metrics.jsonl", "fold-1/metrics.jsonl"], False),
    ],
)
def test_a_run_without_a_checkpoint_begins_anew(tmp_path, files, begins):
    for name in files:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    if begins:
        assert output.to_resume(tmp_path) is None
    else:
        with pytest.raises(UsageError):
            output.to_resume(tmp_path)


@pytest.mark.parametrize("place", ["/proc/run", "file/run", "file"])
@pytest.mark.parametrize("resume", [False, True])
def test_where_nothing_can_be_written_is_one_line(tmp_path, monkeypatch, place, resume):
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    with pytest.raises(UsageError) as refused:
        output.claim(output.choose("x", Path(place), resume), resume)
    assert place in str(refused.value) and len(str(refused.value).splitlines()) == 1
    assert os.listdir() == ["file"]


@pytest.mark.parametrize(
    ("made", "text"),
    [
        ("file", "x is a file: give --output a directory"),
        ("other", "x is not an empty directory, and no run's (it has 'thesis.tex'): choose another --output."),
        ("metrics.jsonl", "choose another --output, or add --resume."),
        ("step-00000003", "choose another --output, or add --resume."),
        ("fold-1", "choose another --output, or add --resume."),
    ],
)
def test_resume_is_advised_for_a_run_alone(tmp_path, made, text):
    place = tmp_path / "x"
    if made == "file":
        place.touch()
    else:
        (place / ("thesis.tex" if made == "other" else made)).mkdir(parents=True)
    with pytest.raises(UsageError) as raised:
        output.choose("mine", place, resume=False)
    assert text in str(raised.value) and ("--resume" in str(raised.value)) == (made not in ("file", "other"))
