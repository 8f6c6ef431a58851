"""The parts of the watch that need no launcher: whose error it is, what is told, and who may talk to it."""

import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest

from toolkit import tuning
from toolkit.files import write_whole
from toolkit.watching import diagnosis, lines
from toolkit.watching.hub import Hub
from toolkit.watching.member import Member
from toolkit.watching.verdict import Verdict, is_consequence

SHUT_DOWN = "Horovod has been shut down. This was caused by an exception on one of the ranks"


class HorovodInternalError(RuntimeError):
    """Of Horovod's name, which is what is looked at: the frameworks' are two classes."""


class UnknownError(Exception):
    """As TensorFlow raises it."""


def chained(error, cause=None, context=None):
    error.__cause__, error.__context__ = cause, context
    return error


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (HorovodInternalError(SHUT_DOWN), True),
        (UnknownError("{{function_node x}} " + SHUT_DOWN), True),
        (HorovodInternalError("gloo/transport/tcp/pair.cc:589 Read error: Connection reset by peer"), True),
        (chained(ValueError("no loss"), context=HorovodInternalError(SHUT_DOWN)), True),
        (chained(ValueError("no loss"), cause=RuntimeError(SHUT_DOWN)), True),
        (HorovodInternalError("Mismatched ALLREDUCE tensor shapes: One or more ranks sent tensors of shape"), False),
        (ConnectionResetError(104, "Connection reset by peer"), False),  # such as of the data's own server
        (RuntimeError("DataLoader worker: Connection reset by peer"), False),
        (OSError("the disk is gone"), False),
    ],
)
def test_consequences_of_anothers_end_are_told_from_failures(error, expected):
    assert is_consequence(error) is expected


def test_an_endless_chain_of_errors_ends():
    first, second = ValueError("a"), ValueError("b")
    first.__context__, second.__context__ = second, first
    assert not is_consequence(first)


def test_the_verdict_has_the_cause_last_and_every_line_named():
    verdict = Verdict(
        "failed: E: x", "rank 3 on far", 3, "far", "E: x", "Traceback\n  File\n", stacks={"rank 1": "f()"}
    )
    assert verdict.text.splitlines() == [
        "[rank 3 on far] | Traceback",
        "[rank 3 on far] |   File",
        "[rank 1] | f()",
        "[rank 3 on far] failed: E: x",
    ]


def test_error_json_is_whole_or_not_there(tmp_path):
    verdict = Verdict("failed: E: x", "rank 3 on far", 3, "far", "E: x", "Traceback", code=7)
    verdict.write(tmp_path / "none")
    verdict.write(None)
    assert not list(tmp_path.iterdir())
    (tmp_path / "error.json").write_text("of an earlier failure")
    verdict.write(tmp_path)
    found = json.loads((tmp_path / "error.json").read_text())
    assert [found[k] for k in ("rank", "host", "exception", "traceback", "exit_code")] == [
        *(3, "far", "E: x", "Traceback", 7)
    ]
    assert found["time"].endswith("+00:00") and os.listdir(tmp_path) == ["error.json"]


def test_what_lies_in_a_files_way_is_not_written_to(tmp_path, monkeypatch):
    (tmp_path / "precious").write_text("precious")
    (tmp_path / "folds.json").symlink_to("precious")
    write_whole(tmp_path / "folds.json", "{}")
    assert (tmp_path / "precious").read_text() == "precious" and not (tmp_path / "folds.json").is_symlink()
    (tmp_path / "error.json").mkdir()
    with pytest.raises(OSError, match="error.json"):
        write_whole(tmp_path / "error.json", "{}")
    assert sorted(os.listdir(tmp_path)) == ["error.json", "folds.json", "precious"]
    monkeypatch.setattr(secrets, "token_hex", lambda _: "guessed")
    (tmp_path / ".folds.json.guessed.tmp").symlink_to("precious")
    with pytest.raises(FileExistsError):
        write_whole(tmp_path / "folds.json", "{}")
    assert (tmp_path / "precious").read_text() == "precious"


@pytest.mark.parametrize("seconds", [2, 3, 5, 7.5, 60, 299, 300, 3600])
def test_horovod_ends_a_stall_within_the_limit(seconds):
    limits = tuning.stall_limits(seconds)
    warning = int(limits["HOROVOD_STALL_CHECK_TIME_SECONDS"])
    shutdown = int(limits["HOROVOD_STALL_SHUTDOWN_TIME_SECONDS"])
    assert 1 <= warning < shutdown  # Horovod ignores a shutdown time below its warning time
    assert warning + shutdown <= max(seconds, 3)  # it looks once in a warning time
    assert tuning.stall_limits(0) == {"HOROVOD_STALL_CHECK_DISABLE": "1"}


@pytest.fixture
def hub():
    """A rank 0 of three that is never to end its process: what it would say is kept."""
    listener = lines.listen(True)
    members = [Member(rank, f"rank {rank} on here", rank, 0, "here", 0) for rank in range(3)]
    hub = Hub(members[0], members, b"key", 300, listener, False)
    hub.ends = []
    hub._end = lambda verdict, member: hub.ends.append(verdict)
    hub.start()
    yield hub
    hub.over.set()
    hub.join(5)


def address(hub):
    return [("127.0.0.1", hub._listener.getsockname()[1])]


def until(condition):
    end = time.monotonic() + 20
    while not condition() and time.monotonic() < end:
        time.sleep(0.02)
    assert condition()


def test_a_worker_without_the_key_is_not_heard(hub):
    assert lines.reach(address(hub), 1, b"another key") is None
    assert hub.members[1].line is None
    assert lines.reach(address(hub), 7, b"key") is None  # no such rank
    line = lines.reach(address(hub), 1, b"key")
    assert line is not None
    assert lines.reach(address(hub), 1, b"key") is None  # it is there already
    line.send(kind="failure", cause="failed: E: x", exception="E: x", code=3)
    until(lambda: hub.ends)
    assert (hub.ends[0].rank, hub.ends[0].exception, hub.ends[0].code) == (1, "E: x", 3)


@pytest.mark.parametrize(
    "data",
    [
        b"\n",
        b"{}\n",
        b"[]\n",
        b"x" * 5000,
        b"[" * 900 + b"\n",
        b'{"rank": 1, "proof": [], "challenge": {}}\n',
        b"\xff\n",
    ],
)
def test_a_strangers_bytes_do_no_harm(hub, data):
    with socket.create_connection(address(hub)[0], timeout=10) as stranger:
        stranger.sendall(data)
        while stranger.recv(4096):  # the challenge, then the end
            pass
    assert lines.reach(address(hub), 1, b"key") is not None and not hub.ends


def test_a_host_that_is_not_rank_0_is_not_believed():
    listener = lines.listen(True)

    def pretend():
        connection, _ = listener.accept()
        connection.sendall(b'{"challenge": "1"}\n')
        connection.recv(4096)
        connection.sendall(b'{"welcome": "2"}\n')
        connection.recv(1)

    threading.Thread(target=pretend, daemon=True).start()
    assert lines.reach([("127.0.0.1", listener.getsockname()[1])], 1, b"key") is None


def test_a_worker_that_is_lost_is_named_but_not_one_that_said_goodbye(hub):
    reached = [lines.reach(address(hub), rank, b"key") for rank in (1, 2)]
    reached[0].send(kind="left", how="called stop()")
    until(lambda: hub.members[1].left)
    reached[0].close()
    until(lambda: hub.members[1].line is None)
    assert not hub.ends
    reached[1].send(kind="beat", doing="training at step 3", doing_for=0)
    reached[1].close()
    until(lambda: hub.ends)
    assert hub.ends[0].rank == 2
    assert hub.ends[0].cause.startswith("ended without a word when training at step 3: killed")


def test_stacks_are_of_the_main_thread_first():
    found = []
    thread = threading.Thread(target=lambda: found.append(diagnosis.stacks()))
    thread.start()
    thread.join()
    assert found[0].startswith("Stack of the main thread") and "in test_stacks_are_of" in found[0]


def test_a_stopped_process_is_seen_and_woken():
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]) as process:
        try:
            os.kill(process.pid, signal.SIGSTOP)
            until(lambda: diagnosis.process_state(process.pid) == ": it is stopped (SIGSTOP)")
            diagnosis.go_on(process.pid)
            until(lambda: "stopped" not in diagnosis.process_state(process.pid))
        finally:
            process.kill()
    assert diagnosis.process_state(process.pid) == ""
