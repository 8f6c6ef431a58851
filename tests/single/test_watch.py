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
from types import SimpleNamespace

import pytest

from toolkit import ending, output, tuning, watch
from toolkit.errors import UsageError
from toolkit.files import write_whole
from toolkit.watching import diagnosis, lines, spoke
from toolkit.watching import hub as hub_module
from toolkit.watching import member as member_module
from toolkit.watching import verdict as verdict_module
from toolkit.watching.hub import Hub
from toolkit.watching.member import ALL_GROUPS, LAST, Here, Member, deputies
from toolkit.watching.verdict import Verdict, in_one_line, is_consequence
from toolkit.world import World

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


FROM_A_GRAPH = """Graph execution error:

Detected at node PyFunc defined at (most recent call last):
<stack traces unavailable>
{}

\t [[{{{{node PyFunc}}}}]]
\t [[IteratorGetNext]] [Op:__inference_multi_step_on_iterator_192]"""
RAISED_IN_PYTHON = (
    "OSError: the disk is gone\nTraceback (most recent call last):\n\n  File, in g\n\nOSError: the disk is gone"
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("the loss is gone\nreally", "UnknownError: the loss is gone"),
        ("", "UnknownError"),
        (FROM_A_GRAPH.format(RAISED_IN_PYTHON), "OSError: the disk is gone"),
        (FROM_A_GRAPH.format("bad : Tensor had NaN values"), "UnknownError: bad : Tensor had NaN values"),
        ("Graph execution error:", "UnknownError: Graph execution error:"),
    ],
)
def test_the_one_line_says_what_went_wrong_rather_than_where(text, expected):
    assert in_one_line("UnknownError", text) == expected


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


def test_who_was_cut_off_leaves_what_the_others_have_told(tmp_path):
    theirs = Verdict("did not come", "rank 1 on far", 1, "far")
    mine = Verdict("did not come", "rank 0 on here", 0, "here")
    theirs.write(tmp_path)
    mine.write(tmp_path, silence=10)
    assert json.loads((tmp_path / "error.json").read_text())["host"] == "far"
    old = time.time() - 60
    os.utime(tmp_path / "error.json", (old, old))  # of an earlier run
    mine.write(tmp_path, silence=10)
    assert json.loads((tmp_path / "error.json").read_text())["host"] == "here"


@pytest.mark.parametrize("hanging", ["open", "is_dir"])
def test_a_disk_that_hangs_does_not_hold_up_the_end(hanging, tmp_path, monkeypatch):
    let = threading.Event()
    if hanging == "open":
        monkeypatch.setattr(verdict_module, "write_whole", lambda *_: let.wait(60))
    else:
        monkeypatch.setattr(type(tmp_path), "is_dir", lambda _: let.wait(60))
    monkeypatch.setattr(Here, "directory", tmp_path)
    hub, began = made([0, 0]), time.monotonic()
    monkeypatch.setattr(member_module, "mute", lambda: None)
    Hub.report(hub, Verdict("failed: E: x", "rank 1 on here", 1, "here"), str(tmp_path))
    waited = time.monotonic() - began
    let.set()
    assert waited < 3
    hub.close()


def test_error_json_goes_where_there_is_a_directory(tmp_path, monkeypatch):
    def refused(path):
        if path.name == "lost":
            raise OSError("Stale file handle")
        return True

    monkeypatch.setattr(type(tmp_path), "is_dir", refused)
    Verdict("failed: E: x", "rank 1 on here", 1, "here").write(None, tmp_path / "lost", tmp_path)
    assert os.listdir(tmp_path) == ["error.json"]


def test_what_lies_in_a_files_way_is_not_written_to(tmp_path, monkeypatch):
    (tmp_path / "precious").write_text("precious")
    (tmp_path / "folds.json").symlink_to("precious")
    write_whole(tmp_path / "folds.json", b"{}")
    assert (tmp_path / "precious").read_text() == "precious" and not (tmp_path / "folds.json").is_symlink()
    (tmp_path / "error.json").mkdir()
    with pytest.raises(OSError, match="error.json"):
        write_whole(tmp_path / "error.json", b"{}")
    assert sorted(os.listdir(tmp_path)) == ["error.json", "folds.json", "precious"]
    monkeypatch.setattr(secrets, "token_hex", lambda _: "guessed")
    (tmp_path / ".folds.json.guessed.tmp").symlink_to("precious")
    with pytest.raises(FileExistsError):
        write_whole(tmp_path / "folds.json", b"{}")
    assert (tmp_path / "precious").read_text() == "precious"


@pytest.mark.parametrize("seconds", [2, 3, 5, 7.5, 60, 299, 300, 3600])
def test_horovod_ends_a_stall_within_the_limit(seconds):
    limits = tuning.stall_limits(seconds)
    warning = int(limits["HOROVOD_STALL_CHECK_TIME_SECONDS"])
    shutdown = int(limits["HOROVOD_STALL_SHUTDOWN_TIME_SECONDS"])
    assert 1 <= warning < shutdown  # Horovod ignores a shutdown time below its warning time
    # At looks a warning's time apart: the second at most finds a wait longer than that, and begins to count.
    assert 3 * warning + shutdown <= max(seconds, 5)
    assert shutdown >= 0.6 * seconds - 1  # and does not end what others would have come to
    assert tuning.stall_limits(0) == {"HOROVOD_STALL_CHECK_DISABLE": "1"}


def made(groups, timeout=300, waits=False):
    """A rank 0 that is never to end its process: what it would say is kept, and its exit code."""
    listener = lines.listen(True)
    members = [Member(rank, f"rank {rank} on here", rank, group, "here", 0) for rank, group in enumerate(groups)]
    hub = Hub(members[0], members, b"key", timeout, listener, waits)
    hub.ends, hub.codes, hub.warnings = [], [], []
    hub.report = lambda verdict, directory: hub.ends.append(verdict)
    hub.warn = hub.warnings.append
    return hub


@pytest.fixture(autouse=True)
def idle(monkeypatch):
    """What other tests left in this process is not what a worker does here."""
    monkeypatch.setattr(Here, "doing", "")


@pytest.fixture
def hub(monkeypatch):
    """A rank 0 of three."""
    hub = made([0, 0, 0])
    monkeypatch.setattr(hub_module, "leave", lambda code: (hub.codes.append(code), hub.over.set()))
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
    assert hub.ends[0].cause.startswith("ended without a word, last heard of when training at step 3: killed")


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


def greeted(hub, *ranks):
    """Lines of these ranks, which rank 0 has heard."""
    reached = [lines.reach(address(hub), rank, b"key") for rank in ranks]
    for rank, line in zip(ranks, reached, strict=True):
        line.send(kind="beat", doing="training at step 3", doing_for=0)
        until(lambda rank=rank: hub.members[rank].met)
    return reached


@pytest.mark.parametrize(("ends", "code", "verdicts"), [(True, 143, 0), (False, 1, 1)])
def test_a_loss_after_a_signal_is_news_where_signals_are_wishes(hub, ends, code, verdicts):
    reached = greeted(hub, 1)
    hub._signalled = time.monotonic() - 2, ends
    reached[0].close()
    until(lambda: hub.codes)
    assert (hub.codes, len(hub.ends)) == ([code], verdicts)


@pytest.mark.parametrize(
    ("handler", "ends"), [(signal.SIG_DFL, True), (signal.default_int_handler, True), (lambda *_: None, False)]
)
def test_a_signal_that_a_handler_takes_does_not_end_a_worker(handler, ends):
    hub = made([0, 0])
    before = signal.signal(signal.SIGINT, handler)
    try:
        hub._wake.send(bytes([signal.SIGINT]))
        hub._rung()
        assert hub._signalled[1] is ends
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("told", [False, True])
def test_what_ended_while_rank_0_was_held_up_is_told_unless_it_was_on_its_account(hub, told):
    reached = greeted(hub, 1, 2)
    held = threading.Event()
    hub.told = lambda message: (held.set(), time.sleep(3.5))
    hub.tell()
    held.wait(10)
    if told:
        reached[1].send(kind="ended", code=7)
    reached[0].close()
    until(lambda: hub.codes)
    assert hub.codes == ([7] if told else [1]) and [v.rank for v in hub.ends] == ([] if told else [1])


def test_a_call_that_was_given_up_too_early_is_no_loss(hub):
    reached = lines.reach(address(hub), 1, b"key")
    until(lambda: hub.members[1].line is not None)
    reached.close()
    until(lambda: hub.members[1].line is None)
    again = greeted(hub, 1)
    assert again and not hub.ends


def test_a_worker_calls_again_where_rank_0_does_not_answer_at_once(monkeypatch):
    listener = lines.listen(True)
    answers = [None, None, lines.Line(socket.create_connection(listener.getsockname()))]
    monkeypatch.setattr(spoke, "reach", lambda *_: answers.pop(0))
    members = [Member(rank, f"rank {rank}", rank, 0, "here", 0) for rank in range(2)]
    worker = spoke.Spoke(members[1], members, b"key", 300, [listener.getsockname()])
    worker.start()
    until(lambda: worker._hub.line is not None)
    assert worker.alive
    worker.over.set()
    worker.join(5)


@pytest.fixture
def worker(monkeypatch):
    """A rank 2 of three that speaks for nobody, on a clock of its own; what it would say is kept, and its exit code."""
    members = [Member(rank, f"rank {rank} on here", rank, 0, "here", 0) for rank in range(3)]
    worker = spoke.Spoke(members[2], members, b"key", 20, [])
    worker.now, worker.ends, worker.codes, worker.warnings = 1000.0, [], [], []
    worker.report, worker.warn = lambda verdict, silence: worker.ends.append(verdict), worker.warnings.append
    monkeypatch.setattr(spoke, "time", SimpleNamespace(monotonic=lambda: worker.now, sleep=lambda _: None))
    monkeypatch.setattr(spoke, "leave", worker.codes.append)
    ends = socket.socketpair()
    members[0].line, members[0].heard, worker.rank_0 = lines.Line(ends[0]), worker.now, lines.Line(ends[1])
    worker.selector.register(ends[0], 1, worker._heard)
    yield worker
    worker.close()
    worker.rank_0.close()


def after(worker, seconds):
    """What it ends with when these have passed, a tick after the other."""
    for _ in range(round(4 * seconds)):
        worker.now += 0.25
        worker.look(worker.now)
    return worker.codes


def test_a_worker_that_does_not_speak_ends_soon_after_rank_0_fell_silent(worker):
    assert not after(worker, 20 + worker.beat + LAST - 0.25)
    assert after(worker, 0.75)[0] == 1
    assert not worker.ends and not worker.warnings


@pytest.mark.parametrize("gone_first", [False, True])
def test_rank_0_that_left_and_is_gone_is_blamed_by_who_failed_on_account_of_it(worker, gone_first):
    worker._deputies = [2]
    worker.rank_0.send(kind="left", how="called stop()")
    worker._heard()
    if not gone_first:
        worker.told({"kind": "consequence", "text": SHUT_DOWN})
    worker.rank_0.close()
    worker._heard()
    assert bool(worker.ends) is not gone_first
    if gone_first:
        worker.told({"kind": "consequence", "text": SHUT_DOWN})
    assert [(v.rank, v.cause[:27]) for v in worker.ends] == [(0, "left early: it called stop(")]
    assert worker.codes == [1]


@pytest.mark.parametrize("who", [0, 1])
def test_a_rank_that_left_early_is_blamed_and_none_that_is_slow(hub, who):
    reached = dict(zip((1, 2), greeted(hub, 1, 2), strict=True))
    reached[0] = SimpleNamespace(send=hub.tell)
    began = time.monotonic()
    reached[who].send(kind="left", how="called stop()")
    reached[1 - who].send(kind="consequence", text=SHUT_DOWN)
    until(lambda: hub.ends)
    assert (hub.ends[0].rank, hub.ends[0].cause[:27]) == (who, "left early: it called stop(")
    assert time.monotonic() - began < LAST  # in which a rank 0 that failed would be gone


def test_only_workers_that_rank_0_hears_speak_for_it():
    members = made([0, 0, 0, 0]).members
    members[2].line = members[3].line = lines.Line(socket.socket())
    assert deputies(members) == [2]
    members[2].left = "called stop()"
    assert deputies(members) == [3]
    members[2].waiting = watch.LEAVING
    assert deputies(members) == [2]


@pytest.mark.parametrize("blocked", [False, True])
def test_a_worker_that_has_left_needs_rank_0_only_to_end(worker, blocked):
    worker._deputies = [2]
    worker.told({"kind": "left", "how": "called stop()"})
    worker.me.waiting = watch.LEAVING if blocked else ""
    assert bool(after(worker, 25)) is blocked
    assert [v.cause.partition("; ")[2] for v in worker.ends[:1]] == (
        ["rank 2 on here waited for it in the job's end."] if blocked else []
    )


@pytest.mark.parametrize(("waiting", "left", "tells"), [("", "", 0), (watch.LEAVING, "", 1), (watch.LEAVING, "so", 0)])
def test_a_worker_that_has_left_tells_of_rank_0s_loss_while_it_needs_it(worker, waiting, left, tells):
    worker._deputies = [2]
    worker.told({"kind": "left", "how": "called stop()"})
    worker.me.waiting, worker._hub.left = waiting, left
    worker.rank_0.close()
    worker._heard()
    assert len(worker.ends) == tells and worker.over.is_set() is not bool(tells)


@pytest.mark.parametrize("stopped", [False, True])
@pytest.mark.parametrize("last", ["leaves", "is killed"])
def test_rank_0_stays_to_the_end_of_all(hub, monkeypatch, stopped, last):
    monkeypatch.setattr(watch, "_watch", hub)
    monkeypatch.setattr(Here, "stopped", stopped)
    reached = greeted(hub, 1, 2)
    hub.tell(kind="left", how="called stop()")
    leaving = threading.Thread(target=watch.at_exit, args=[lambda: None])
    leaving.start()
    reached[0].send(kind="left", how="called stop()")
    reached[0].close()
    leaving.join(0.5)
    assert leaving.is_alive()
    if last == "leaves":
        reached[1].send(kind="left", how="called stop()")
    reached[1].close()
    leaving.join(LAST)
    assert not leaving.is_alive()
    assert [v.rank for v in hub.ends] == ([] if last == "leaves" else [2])


def stalled(hub, monkeypatch, now=1000.0, **states):
    """Who is said to have not come; `states` are ranks to what they do or wait for, and for how long."""
    monkeypatch.setattr(hub_module, "leave", hub.codes.append)
    for rank, (kind, what, seconds) in states.items():
        member = hub.members[int(rank[1:])]
        setattr(member, kind, what)
        setattr(member, f"{kind}_since", now - seconds)
    for member in hub.members:
        member.heard = now
    hub._until = now + 10
    hub.look(now)
    hub.close()
    return [v.ranks for v in hub.ends]


def test_a_group_that_waits_for_all_groups_hides_no_stall_of_another(monkeypatch):
    waits = {"r0": ("waiting", "gather()" + ALL_GROUPS, 90), "r1": ("waiting", "gather()" + ALL_GROUPS, 80)}
    found = stalled(
        made([0, 0, 1, 1], 20, True), monkeypatch, **waits, r2=("waiting", "gradients0", 21), r3=("doing", "stuck", 25)
    )
    assert found == [(3,)]
    assert not stalled(made([0, 0, 1, 1], 20, True), monkeypatch, **waits, r2=("waiting", "gradients0", 19))


@pytest.mark.parametrize(
    ("of_0", "of_1", "found"),
    [
        (("training at step 9", 21), ("loading the batch of step 9", 30), [(1,)]),
        (("training at step 9", 30), ("training at step 10", 21), [(0,)]),  # stuck between two steps
        (("training at step 9", 19), ("loading the batch of step 9", 30), []),
        (("training at step 9", 30), ("training at step 9", 21), []),
    ],
)
def test_a_compiled_step_that_others_do_not_come_to_is_a_stall(monkeypatch, of_0, of_1, found):
    hub = made([0, 0], 20, True)
    assert stalled(hub, monkeypatch, r0=("doing", *of_0), r1=("doing", *of_1)) == found
    assert found or hub.warnings
    hub = made([0, 0], 20)  # Horovod looks itself
    assert not stalled(hub, monkeypatch, r0=("doing", *of_0), r1=("doing", *of_1))


LOADS = "loading the batch of step 9"


@pytest.mark.parametrize(
    ("of_0", "of_1", "found", "warned"),
    [
        (("waiting", "gather()" + ALL_GROUPS, 21), ("doing", LOADS, 25), [(1,)], "waits for rank 1"),
        (("waiting", "gather()" + ALL_GROUPS, 25), ("doing", LOADS, 21), [(1,)], "waits for rank 1"),
        (("waiting", "gather()" + ALL_GROUPS, 19), ("doing", LOADS, 25), [], "waits for rank 1"),
        (("waiting", "gather()" + ALL_GROUPS, 25), ("doing", LOADS, 3), [], ""),
        (("waiting", "gather()" + ALL_GROUPS, 25), ("waiting", "", 3), [], ""),  # it was in an operation of its group
        (("waiting", "gather()" + ALL_GROUPS, 21), ("doing", "training at step 9", 25), [(1,)], "waits for rank 1"),
        (("waiting", "gradients0", 0), ("doing", "training at step 9", 25), [], "are training at step 9: a slow"),
        (("waiting", "gather()" + ALL_GROUPS, 21), ("doing", "ending epoch 9", 25), [], "s rank 1 on here: ending"),
        (("waiting", "gather()" + ALL_GROUPS, 21), ("doing", "", 25), [], "s rank 1 on here: at work; rank 0 on here"),
        (("waiting", "gather()" + ALL_GROUPS, 19), ("doing", "ending epoch 9", 25), [], ""),
        (("left", "called stop()", 0), ("doing", LOADS, 25), [], "rank 0 on here called stop()."),
    ],
)
def test_a_group_in_which_nothing_moves_and_others_wait_for_it(monkeypatch, of_0, of_1, found, warned):
    hub = made([0, 1], 20, True)
    for member in hub.members:
        member.doing_since = 900.0
    assert stalled(hub, monkeypatch, r0=of_0, r1=of_1) == found
    assert warned in "".join(hub.warnings) and bool(hub.warnings) is bool(warned)


@pytest.mark.parametrize("letter", ["x", "\u2603", "\x00", "\ud800"])
def test_a_message_of_any_length_arrives(letter):
    ends = [lines.Line(connection) for connection in socket.socketpair()]
    ends[1].known = True
    text = "first" + letter * 3_000_000 + "last"
    sending = threading.Thread(target=lambda: ends[0].send(kind="failure", cause=text, exception=text, code=3))
    sending.start()
    found = []
    while not found:
        found = ends[1].receive()
    sending.join()
    assert (found[0]["kind"], found[0]["code"]) == ("failure", 3)
    assert found[0]["cause"].startswith("first") and found[0]["exception"].endswith("last")


def test_a_second_start_hears_signals():
    before = signal.getsignal(signal.SIGTERM), signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        first, second = made([0, 0]), made([0, 0])
        first.hear_signals()
        first.leave_signals()
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
        second.hear_signals()
        first.leave_signals()  # it is not its any more
        assert signal.getsignal(signal.SIGTERM) == second._terminated
        assert signal.set_wakeup_fd(-1) == second._wake.fileno()
    finally:
        signal.signal(signal.SIGTERM, before[0])
        signal.set_wakeup_fd(before[1])


@pytest.mark.parametrize("fails", [False, True])
def test_a_worker_told_to_end_that_hears_of_no_signal_ends(monkeypatch, fails):
    before = signal.getsignal(signal.SIGTERM), signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    hub, codes = made([0, 0]), []
    now = time.monotonic()
    monkeypatch.setattr(member_module, "time", SimpleNamespace(monotonic=lambda: now))
    monkeypatch.setattr(member_module, "leave", codes.append)
    try:
        hub.hear_signals()  # which the main thread, here, does not come to
        for _ in range(3):
            hub._wake.send(bytes([signal.SIGTERM]))
            hub._rung()
            hub.members[1].error = SHUT_DOWN if fails else ""
            hub._tick()
            assert not codes
            now += 0.9
        hub._tick()
        assert codes == ([] if fails else [143])  # else the failure's own end comes
    finally:
        signal.signal(signal.SIGTERM, before[0])
        signal.set_wakeup_fd(before[1])
        hub.close()


TERMINATED = """
import os, signal, sys
from types import SimpleNamespace
from toolkit.watching import member
worker = SimpleNamespace(alive=True, over=SimpleNamespace(wait=lambda _: None), _failing=lambda: sys.argv[1] == "fails")
signal.signal(signal.SIGTERM, lambda *got: member.Watch._terminated(worker, *got))
os.kill(os.getpid(), signal.SIGTERM)
"""


@pytest.mark.parametrize(("how", "noted"), [("fails", None), ("told", 143)])
def test_restart_hears_of_a_worker_that_was_told_to_end(how, noted):
    with ending.Notes() as notes:
        ended = subprocess.run([sys.executable, "-c", TERMINATED, how], env={**os.environ, **notes.environment})
        assert (ended.returncode, notes.last()) == (-signal.SIGTERM, noted)


def test_waits_for_all_groups_are_named_so():
    with watch.waiting("gather()", all_groups=True):
        assert Here.waiting[0] == "gather() of all groups"
    assert Here.waiting[0] == "" and 0 <= time.monotonic() - Here.waiting[1] < 5


def test_rank_0_hears_since_when_a_worker_has_been_in_no_operation(worker, monkeypatch):
    monkeypatch.setattr(Here, "waiting", ("", worker.now - 7))
    worker._look_at_myself(worker.now)
    worker.beat_now(worker.now)
    hub = made([0, 0, 0])
    hub._take(hub.members[2], worker.rank_0.receive()[0])
    assert hub.members[2].waiting == "" and 7 <= time.monotonic() - hub.members[2].waiting_since < 9


def test_ranks_wait_for_a_slow_disk_in_short_operations():
    told = []

    class Adapter:
        def gather(self, value, all_groups):
            told.append(value)
            return [value]

    def decide():
        time.sleep(1.2)
        return 7

    def refuse():
        raise UsageError("no")

    assert output.decided_by_rank_0(World(), Adapter(), decide) == 7
    assert told == [(False, None), (False, None), (True, 7)]
    with pytest.raises(UsageError, match="no"):
        output.decided_by_rank_0(World(), Adapter(), refuse)
