"""What others may have written: nothing of it does more than be refused in one line.

A long hunt: make fuzz EXAMPLES=20000 ARGS=tests/single/test_hostile.py
"""

import copy
import hashlib
import io
import json
import os
import shutil
import struct
import time
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import example, given
from hypothesis import strategies as st

from toolkit import checkpoint, cli, output, plain
from toolkit.errors import UsageError
from toolkit.options import RunOptions, option, parse

STATE = {
    "model/w": np.arange(6, dtype=np.float32).reshape(2, 3),
    "optimizer/step#": np.asarray(7),
    "rank0/random/python": np.zeros(5, np.uint32),
    "rank0/model/norm.running_mean": np.zeros(2, np.float32),
}
MANIFEST = {
    "framework": "torch",
    "versions": {"torch": "2.13.0"},
    "backend": "torch",
    "architecture": None,
    "bfloat16": ["w"],
    "recipe": "mine",
    "samples": 100,
    "global_batch_size": 10,
    "world_size": 1,
    "position": {"epoch": 0, "step": 3, "step_in_epoch": 3, "loss_sum": 1.5, "not_finite": 0},
    "reference_batch_size": 10,
    "extra": {"scheduler": {"last_lr": [0.1]}},
}
HOSTILE = st.sampled_from([None, True, -1, 0, 2**53 + 1, 2**63, 10**400, 1.5, float("nan"), float("inf"), "", "x\ny"])
HOSTILE |= st.sampled_from(["\x1b[2J", "\ud800", "../../etc", "x" * 5000, [], {}, [[]], {"a": {}}, [1, "x"], "#pairs"])
ANY_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A directory with a checkpoint in it, made anew by `forge`."""
    place = tmp_path_factory.mktemp("hostile") / "run"
    checkpoint.write(place, 3, STATE, MANIFEST, 1)
    return place


def forge(path: Path, manifest, state: bytes | None = None) -> None:
    """Write a manifest, and a state, with hashes that are right."""
    if state is not None:
        (path / "state.safetensors").write_bytes(state)
    if isinstance(manifest, dict):
        digest = hashlib.sha256((path / "state.safetensors").read_bytes()).hexdigest()
        manifest = {**manifest, "sha256": {"state.safetensors": digest}}
        own = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
        manifest["sha256"]["manifest.json"] = own
    (path / "manifest.json").write_text(json.dumps(manifest, indent=1))


def outcome(path: Path) -> checkpoint.Checkpoint | None:
    """A checkpoint, or None where it is refused, in one line of printable text."""
    try:
        return checkpoint.read(path)
    except checkpoint.DamagedCheckpoint as damage:
        assert str(damage).isprintable() and len(str(damage)) < 600, str(damage)
        return None


def hvdkit(*arguments) -> tuple[int, str, str]:
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        try:
            code = cli.main([str(argument) for argument in arguments])
        except SystemExit as end:
            code = end.code
    return code, out.getvalue(), err.getvalue()


@st.composite
def manifests(draw):
    """A right manifest with some of its values exchanged, taken out or put in."""
    content = {"format_version": 1, **copy.deepcopy(MANIFEST), "step": 3}
    for _ in range(draw(st.integers(1, 3))):
        at = content
        while True:
            keys = sorted(at) if isinstance(at, dict) else list(range(len(at)))
            key = draw(st.sampled_from(keys)) if keys and draw(st.integers(0, 9)) else "new"
            if key == "new" and isinstance(at, list):
                break
            if key in keys and isinstance(at[key], dict | list) and draw(st.booleans()):
                at = at[key]
                continue
            if key in keys and draw(st.integers(0, 4)) == 0:
                del at[key]
            else:
                at[key] = draw(HOSTILE | ANY_JSON)
            break
    return content


def with_value(**changes):
    return {"format_version": 1, **MANIFEST, "step": 3, **changes}


REFUSED = [
    with_value(versions={"torch": 3}),
    with_value(position={"epoch": 2}),
    with_value(position={"epoch": 0, "step": True, "step_in_epoch": 0, "loss_sum": 0.0, "not_finite": 0}),
    with_value(world_size=0),
    with_value(reducer="auto"),
    with_value(bfloat16=[["w"]]),
    with_value(step=10**400),
]


def test_each_of_these_is_refused(place):
    for content in REFUSED:
        forge(place / "step-00000003", content)
        assert outcome(place / "step-00000003") is None, content


@given(manifests() | ANY_JSON)
@example(with_value(framework="\x1b[2J"))
def test_no_manifest_does_more_than_be_refused(place, content):
    path = place / "step-00000003"
    forge(path, content)
    found = outcome(path)
    if found is not None:
        position = found.manifest.get("position", {"step": 3})
        assert found.manifest["step"] == position["step"] == 3
    for action in ("list", "show", "verify"):
        code, out, err = hvdkit("checkpoint", action, place)
        assert code == (0 if found else 1), (action, out, err)
        assert all(line.isprintable() for line in (out + err).splitlines()), out + err


@st.composite
def states(draw):
    """A safetensors file with some bytes changed, cut out or put in, or with a header made of nothing true."""
    good = safetensors.numpy.save(STATE)
    if draw(st.booleans()):
        at = draw(st.integers(0, 400) | st.integers(0, len(good)))
        return good[:at] + draw(st.binary(max_size=8)) + good[at + draw(st.sampled_from([0, 1, 4, len(good)])) :]
    offsets = st.integers(-1, 64) | st.sampled_from([2**31, 2**63, 2**64, 2**64 - 1, 10**30])
    tensor = st.fixed_dictionaries(
        {
            "dtype": st.sampled_from(["F32", "F64", "U8", "BOOL", "BF16", "F8_E4M3", "F4", "I64", "C64", "X\n", "f32"]),
            "shape": st.lists(offsets, max_size=4),
            "data_offsets": st.lists(offsets, min_size=1, max_size=3),
        }
    )
    header = draw(st.dictionaries(st.text(max_size=6) | st.just("__metadata__"), tensor | ANY_JSON, max_size=3))
    text = json.dumps(header).encode()
    length = draw(st.just(len(text)) | st.sampled_from([0, 2**40, 2**63, 2**64 - 1]))
    return struct.pack("<Q", length) + text + draw(st.binary(max_size=64))


def one_tensor(dtype, shape, begin, end, data=b""):
    header = json.dumps({"x": {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}}).encode()
    return struct.pack("<Q", len(header)) + header + data


@given(states())
@example(b"")
@example(struct.pack("<Q", 2**63))
@example(one_tensor("F32", [2**62], 0, 4, b"1234"))
@example(one_tensor("F32", [2**32, 2**32], 0, 0))
@example(one_tensor("U8", [4], 2, 6, b"1234"))
@example(one_tensor("BF16", [2], 0, 4, b"1234"))  # known to safetensors, not to numpy
@example(one_tensor("F8_E4M3", [4], 0, 4, b"1234"))
@example(one_tensor("U8", [4] * 70, 0, 4, b"1234"))
@example(one_tensor("U8", [1] * 70, 0, 1, b"1"))  # more dimensions than numpy has
def test_no_state_does_more_than_be_refused(place, content):
    path = place / "step-00000003"
    forge(path, with_value(), content)
    try:
        found = outcome(path)
        if found is not None:
            assert sum(array.nbytes for array in found.state.values()) <= len(content)
            assert hvdkit("checkpoint", "show", path)[0] == 0
    finally:
        forge(path, with_value(), safetensors.numpy.save(STATE))


def replaced(path: Path, kind: str) -> None:
    """Something else in a file's place."""
    path.rename(path.with_name("aside"))
    if kind == "link":
        path.symlink_to("aside")
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "directory":
        path.mkdir()
    elif kind == "hole":
        with path.open("wb") as file:
            file.truncate(1 << 43)


@pytest.mark.parametrize("kind", ["link", "pipe", "device", "directory", "hole"])
@pytest.mark.parametrize("name", ["manifest.json", "state.safetensors", "."])
def test_what_is_no_plain_file_is_damage(tmp_path, name, kind):
    for step in (1, 2):
        checkpoint.write(tmp_path, step, STATE, {}, 2)
    newest = tmp_path / "step-00000002"
    if name == "." and kind == "link":
        newest.rename(tmp_path / "elsewhere")
        newest.symlink_to("elsewhere")
    elif name == ".":
        pytest.skip("a name that is no directory is no checkpoint")
    else:
        replaced(newest / name, kind)
    start = time.monotonic()
    found, damages = checkpoint.newest_whole(checkpoint.steps(tmp_path))
    assert found.path.name == "step-00000001" and len(damages) == 1 and outcome(newest) is None
    assert time.monotonic() - start < 60 and str(damages[0]).isprintable()
    assert hvdkit("checkpoint", "show", tmp_path)[0] == 0
    checkpoint.write(tmp_path, 2, STATE, {}, 2)  # sets aside what is there
    assert outcome(newest) is not None
    checkpoint.write(tmp_path, 3, STATE, {}, 1)
    shutil.rmtree(tmp_path / "step-00000003")
    assert name != "." or (tmp_path / "elsewhere" / "manifest.json").exists()


def test_a_linked_checkpoint_is_not_removed_through_its_link(tmp_path):
    checkpoint.write(tmp_path / "other", 1, STATE, {}, 1)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "step-00000001").symlink_to("../other/step-00000001")
    checkpoint.write(tmp_path / "run", 2, STATE, {}, 1)
    assert outcome(tmp_path / "other" / "step-00000001") is not None


def test_a_manifest_too_large_to_be_read_is_not_written(tmp_path):
    with pytest.raises(UsageError, match="manifest"):
        checkpoint.write(tmp_path, 1, STATE, {"extra": "x" * (17 << 20)}, 1)
    assert not list(tmp_path.iterdir())


rows = st.builds(lambda value: json.dumps(value).encode() + b"\n", ANY_JSON)
rows |= st.builds(lambda step: json.dumps({"kind": "step", "step": step}).encode() + b"\n", HOSTILE | ANY_JSON)
rows |= st.binary(max_size=30)


@given(st.lists(rows, max_size=8), st.integers(0, 5))
@example([b'{"kind": "step", "step": 1}\r{"kind": "step", "step": 1}\n'], 3)
@example([b'{"kind": "step", "step": 1e400}\n', b"[" * 5000 + b"\n"], 3)
def test_no_metrics_do_more_than_be_left_out(place, lines, step):
    place = place.parent
    (place / "metrics.jsonl").write_bytes(b"".join(lines))
    before = output.read_metrics(place, "step")
    metrics = output.Metrics(place, step)
    metrics.write("step", {"step": step + 1})
    metrics.close()
    found = output.read_metrics(place, "step")
    assert (
        found[-1]["step"] == step + 1
        and all(row["step"] <= step for row in found[:-1])
        and len(found) - 1 <= len(before)
    )


saved = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.just("#pairs") | st.text(max_size=3), inner),
    max_leaves=10,
)


@given(saved)
@example({"#pairs": 1})
@example({"#pairs": [1]})
@example({"#pairs": [[[1], 2]]})
@example({"#pairs": [[1, 2, 3]]})
@example({"#pairs": [[]]})
def test_no_saved_value_does_more_than_be_refused(value):
    try:
        plain.decode(value)
    except UsageError as error:
        assert str(error).isprintable()


@dataclass(frozen=True)
class Options(RunOptions):
    momentum: float = option(0.9, "of SGD", minimum=0, below=1)
    data_dir: Path | None = option(None, "of the data")


FLAGS = [f"--{name.replace('_', '-')}" for name in Options.__dataclass_fields__]
# As a command line holds them: no NUL; bytes that are no UTF-8 come as surrogates.
WORDS = st.text(st.characters(exclude_characters="\0"), max_size=12)
WORDS |= st.sampled_from(
    ["nan", "-1", "1e999", "9" * 5000, "0x1", "１", "1_0", "--", "-", "=", "--=", "a\nb", "-v", "%s"]
)
arguments = st.lists(
    WORDS | st.sampled_from(FLAGS) | st.builds("{}={}".format, st.sampled_from(FLAGS), WORDS), max_size=5
)


@given(arguments)
@example(["a\nb"])
@example(["--epochs=9" + "9" * 5000])
@example(["--epo\nchs"])
@example(["--resume=\n"])
@example(["%(prog)s"])
@example(["\ud800"])
def test_no_flags_do_more_than_be_refused(given_arguments):
    err = io.TextIOWrapper(io.BytesIO(), "utf-8", "backslashreplace")
    with redirect_stderr(err), redirect_stdout(io.StringIO()):
        try:
            parse(Options, None, given_arguments)
        except SystemExit as end:
            err.flush()
            text = err.buffer.getvalue().decode()
            assert end.code == 0 or (end.code == 2 and text.count("\n") == 1 and text.startswith("error: ")), text


COMMANDS = st.sampled_from(
    ["checkpoint", "list", "show", "verify", "export", "--output", "-np", "--steps", "x.pt", "-h"]
)


@given(st.lists(COMMANDS | WORDS, max_size=5))
@example(["checkpoint", "show", "\ud800"])
@example(["checkpoint", "list", "x" * 5000])
@example(["verify", "-np", "0"])
@example(["verify", "-np", "9" * 5000, "--", "x"])
@example(["verify", "-np", "²", "--", "x"])
def test_no_command_does_more_than_be_refused(tmp_path_factory, given_arguments):
    if given_arguments[:1] == ["verify"] and given_arguments[1:2] != ["-np"]:
        return  # it would run what it is given
    before = os.getcwd()
    os.chdir(tmp_path_factory.getbasetemp())
    try:
        err = io.TextIOWrapper(io.BytesIO(), "utf-8", "backslashreplace")
        with redirect_stderr(err), redirect_stdout(io.TextIOWrapper(io.BytesIO(), "utf-8", "backslashreplace")):
            try:
                code = cli.main(given_arguments)
            except SystemExit as end:
                code = end.code
        assert code in (0, 1, 2)
    finally:
        os.chdir(before)
