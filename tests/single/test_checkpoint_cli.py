"""`hvdkit checkpoint …`: what it prints, and every mistake one line."""

import os
import subprocess
import sys

import numpy as np
import pytest

from tests.launching import ROOT
from toolkit import checkpoint, export
from toolkit.cli import main

POSITION = {"epoch": 2, "step": 45, "step_in_epoch": 5, "loss_sum": 1.0, "not_finite": 0}
MANIFEST = {
    "framework": "torch",
    "versions": {"torch": "2.13.0", "numpy": "2.4.6"},
    "recipe": "mine",
    "world_size": 2,
    "samples": 100,
    "global_batch_size": 10,
    "momentum": 0.9,
    "position": POSITION,
}
STATE = {
    "model/w": np.arange(6, dtype=np.float32).reshape(2, 3),
    "model/norm.running_mean": np.full(3, 1.5, np.float32),
    "optimizer/group0/lr#": np.asarray(0.25),
    "rank0/random/torch": np.zeros(9, np.uint8),
    "rank1/random/torch": np.ones(9, np.uint8),
    "rank0/model/norm.running_mean": np.full(3, 1, np.float32),
    "rank1/model/norm.running_mean": np.array([1, 2, 3.5], np.float32),
    "rank0/model/norm.num_batches_tracked": np.asarray(4),
    "rank1/model/norm.num_batches_tracked": np.asarray(40),
}


@pytest.fixture
def run(tmp_path):
    for step in (30, 45):
        checkpoint.write(tmp_path / "run", step, STATE, {**MANIFEST, "position": {**POSITION, "step": step}}, 9)
    return tmp_path / "run"


def damage(path):
    (path / "state.safetensors").write_bytes(b"torn")


def hvdkit(capsys, *arguments):
    code = main(["checkpoint", *map(str, arguments)])
    out, err = capsys.readouterr()
    return code, out.splitlines(), err.splitlines()


def test_list_is_a_line_each(run, capsys):
    code, out, err = hvdkit(capsys, "list", run)
    assert (code, err, len(out)) == (0, [], 2)
    for text in (f"{run}/step-00000045", "step 45 ", "epoch 2 ", "torch", " 2 worker(s)", " 0.00 MB", "  whole"):
        assert text in out[1]
    damage(run / "step-00000030")
    code, out, err = hvdkit(capsys, "list", run)
    assert code == 1 and out[1].endswith("whole") and "MB" in out[0]
    assert "DAMAGED: state.safetensors is not what its manifest says" in out[0]


def test_verify_checks_all_of_a_run_or_one(run, capsys):
    assert hvdkit(capsys, "verify", run)[0] == 0
    damage(run / "step-00000030")
    code, out, _ = hvdkit(capsys, "verify", run)
    assert code == 1 and len(out) == 2
    assert out[0].startswith(f"{run}/step-00000030  DAMAGED: ") and out[1] == f"{run}/step-00000045  whole"
    assert hvdkit(capsys, "verify", run / "step-00000030")[0] == 1
    assert hvdkit(capsys, "verify", run / "step-00000045")[0] == 0
    (run / "step-00000045/manifest.json").unlink()
    code, out, _ = hvdkit(capsys, "verify", run / "step-00000045")
    assert code == 1 and "DAMAGED: can't be read" in out[0]


def test_show_says_what_it_is_and_groups_the_tensors(run, capsys):
    code, out, err = hvdkit(capsys, "show", run)
    assert (code, err, out[0]) == (0, [], f"{run}/step-00000045")
    text = "\n".join(out)
    for line in (
        "torch (torch 2.13.0, numpy 2.4.6)",
        "step 45, 2 epoch(s) done, and 5 step(s) of the next",
        "workers   2",
        "100, 10 a step",
        "momentum 0.9",
        "model: 2 tensors, 9 values",
        "w                  float32[2, 3]",
        "group0/lr#  float64[]  0.25",
    ):
        assert line in text, text
    assert out[-1] == (
        "each rank's own: 2 rank(s); random states of torch; BatchNorm statistics, 2 tensors, "
        "most apart in model/norm.running_mean: 2.5 (the model's are their mean)"
    )
    damage(run / "step-00000045")
    code, out, err = hvdkit(capsys, "show", run)
    assert code == 0 and out[0].endswith("step-00000030") and len(err) == 1 and err[0].startswith("warning: damaged")
    damage(run / "step-00000030")
    code, out, err = hvdkit(capsys, "show", run)
    assert (code, out, len(err)) == (1, [], 1) and err[0].startswith("error: ") and "step-00000045" in err[0]


def test_show_does_not_print_a_long_architecture(tmp_path, capsys):
    path = checkpoint.write(tmp_path, 1, STATE, {"framework": "keras", "backend": "jax", "architecture": "x" * 999}, 1)
    text = "\n".join(hvdkit(capsys, "show", path)[1])
    assert "xxx" not in text and "jax; the architecture is in the manifest" in text


@pytest.mark.parametrize("action", ["show", "list"])
def test_a_reader_that_has_seen_enough_ends_it_silently(run, action):
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "toolkit.cli", "checkpoint", action, run]
    result = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, cwd=ROOT, timeout=60)
    os.close(write)
    assert (result.returncode, result.stderr) == (141, b"")


def test_the_command_without_arguments_names_what_there_is(capsys):
    for arguments, named in (([], "verify|checkpoint|restart"), (["checkpoint"], "list|show|verify|export")):
        with pytest.raises(SystemExit) as end:
            main(arguments)
        assert end.value.code == 2 and f"required: {named}" in capsys.readouterr().err


MISTAKES = {
    "a file that exists": ("run", "here.pt", "here.pt exists already"),
    "a dangling link": ("run", "link.pt", "link.pt exists already"),
    "another framework's format": ("run", "new.keras", "does not fit a torch run: give a name that ends in .pt"),
    "keras as torch": ("keras", "new.pt", "does not fit a keras run: give a name that ends in .keras or .weights.h5"),
    "no known format": ("run", "new.onnx", ".pt or .keras or .weights.h5"),
    "a suffix alone": ("run", ".pt", "no known format"),
    "a directory that is missing": ("run", "no/new.pt", "there is no directory"),
    "no such run": ("nowhere", "new.pt", "nowhere is no directory"),
    "no checkpoint": ("empty", "new.pt", "empty holds no checkpoint"),
    "no framework": ("foreign", "new.pt", "names no framework"),
    "no model": ("bare", "new.pt", "holds no model"),
    "no architecture": ("keras", "new.keras", "architecture is not in the checkpoint"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_of_export_is_one_line_and_nothing_is_written(mistake, run, capsys):
    place = run.parent
    (place / "here.pt").write_text("mine")
    (place / "link.pt").symlink_to(place / "gone")
    (place / "empty").mkdir()
    checkpoint.write(place / "keras", 1, STATE, {"framework": "keras", "backend": "torch", "architecture": None}, 1)
    checkpoint.write(place / "foreign", 1, STATE, {}, 1)
    checkpoint.write(place / "bare", 1, {"other": np.zeros(1)}, {"framework": "torch"}, 1)
    source, file, named = MISTAKES[mistake]
    before = sorted(place.rglob("*"))
    code, out, err = hvdkit(capsys, "export", place / source, "--output", place / file)
    assert (code, out, len(err)) == (2, [], 1) and err[0].startswith("error: ") and named in err[0], err
    assert sorted(place.rglob("*")) == before and (place / "here.pt").read_text() == "mine"


def test_a_damaged_checkpoint_is_not_exported(run, capsys):
    damage(run / "step-00000045")
    file = run.parent / "new.pt"
    code, out, err = hvdkit(capsys, "export", run / "step-00000045", "--output", file)
    assert (code, out, len(err)) == (1, [], 1) and "SHA-256" in err[0] and not file.exists()


def test_a_framework_that_is_not_installed_is_named(run, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.delitem(sys.modules, "toolkit.adapters._torch_file", raising=False)
    code, _, err = hvdkit(capsys, "export", run, "--output", run.parent / "new.pt")
    assert code == 2 and len(err) == 1 and "torch is not installed" in err[0]


def test_a_failed_write_leaves_no_file(run, capsys, monkeypatch):
    pytest.importorskip("torch")
    place, before = run.parent, sorted(run.parent.rglob("*"))

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "flush", full)
    code, _, err = hvdkit(capsys, "export", run, "--output", place / "new.pt")
    assert code == 2 and len(err) == 1 and "No space left" in err[0] and sorted(place.rglob("*")) == before


def test_a_file_that_comes_meanwhile_is_not_replaced(run, monkeypatch):
    pytest.importorskip("torch")
    file = run.parent / "new.pt"
    monkeypatch.setattr(checkpoint, "flush", lambda _: file.write_text("another's"))
    with pytest.raises(export.UsageError, match="exists already"):
        export.export(checkpoint.newest(run), file)
    assert file.read_text() == "another's" and [p.name for p in run.parent.iterdir() if p.is_file()] == ["new.pt"]
