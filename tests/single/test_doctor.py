"""Doctor's parts that need no framework: what it makes of answers, of differences, and of hosts that misbehave."""

import ast
import asyncio
import json
import os
import re
import signal
import socket
import stat
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from toolkit import launch
from toolkit.cli import main
from toolkit.doctor import all_reduce, compare, environment, hosts, local, measure, peer, probe, processes, resources
from toolkit.doctor.checks import Check, document, lines
from toolkit.doctor.login import Ssh, reason
from toolkit.doctor.peer import NoAnswer
from toolkit.hostfile import Host

HERE = probe.facts(os.getcwd())
TOKEN = "hvdkit-0123 "


# --- what other hosts say

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=10,
)


@settings(max_examples=500)
@given(st.binary(), st.booleans())
def test_any_bytes_are_an_answer_none_or_refused(said, marked):
    try:
        answer = peer.understood(TOKEN.encode() + said if marked else said, TOKEN)
    except NoAnswer as error:
        assert marked and "\n" not in str(error)
    else:
        assert isinstance(answer, dict) if marked else answer is None


def test_an_answer_nested_without_end_is_refused():
    with pytest.raises(NoAnswer):
        peer.understood(TOKEN.encode() + b"[" * 100_000, TOKEN)


def mutated(draw, facts):
    """Facts of which one thing, somewhere, is another value, or missing."""
    facts = json.loads(json.dumps(facts))
    place = facts
    key = draw(st.sampled_from(sorted(place)))
    while isinstance(place[key], dict) and place[key] and draw(st.booleans()):
        place = place[key]
        key = draw(st.sampled_from(sorted(place)))
    if draw(st.booleans()):
        place[key] = draw(json_values)
    else:
        del place[key]
    return facts


@settings(max_examples=500)
@given(st.data())
def test_facts_are_refused_or_can_be_compared(data):
    facts = mutated(data.draw, HERE)
    try:
        there = peer.checked_facts({"facts": facts})
    except NoAnswer:
        return
    checks = [*compare.same(HERE, there, "a"), *resources.resources(there, "a", 2)]
    found, _ = compare.interfaces({"a": there, "b": HERE}, None)
    assert all(isinstance(check, Check) for check in [*checks, *found])
    lines([*checks, *found], plain=True)


@pytest.mark.parametrize("answer", [{}, {"facts": None}, {"facts": {}}, {"facts": {**HERE, "cores": ["many", None]}}])
def test_facts_of_another_form_are_refused(answer):
    with pytest.raises(NoAnswer, match="form"):
        peer.checked_facts(answer)


def test_our_own_facts_are_accepted_and_alike():
    facts = peer.checked_facts({"facts": json.loads(json.dumps(HERE))})
    assert [check.ok for check in compare.same(HERE, facts, "a")] == [True] * 5


def test_the_probe_runs_on_old_pythons_without_packages():
    tree = ast.parse(Path(probe.__file__).read_text(), feature_version=(3, 8))
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert {name.partition(".")[0] for name in names} <= {*sys.stdlib_module_names}
    ast.parse(probe.BOOT, feature_version=(3, 4))


# --- differences between hosts


def changed(**new):
    return {**HERE, **new}


@pytest.mark.parametrize(
    ("name", "there", "found"),
    [
        ("python", changed(python=["3.9.2", HERE["python"][1]]), "3.9.2 at .*; here 3"),
        ("packages", changed(packages={**HERE["packages"], "numpy": None}), "numpy none, here .* in "),
        ("packages", changed(packages={**HERE["packages"], "numpy": ["1.0", "/x"]}), "numpy 1.0, here "),
        (
            "packages",
            changed(packages={**HERE["packages"], "numpy": [HERE["packages"]["numpy"][0], "/x"]}),
            "numpy /x, here /",
        ),
        ("packages", changed(built_for={"torch": "0.1"}), "horovod built for torch 0.1, here for "),
        ("toolkit", changed(toolkit=None), "can't be imported"),
        ("toolkit", changed(toolkit=["0", HERE["toolkit"][1]]), "other source files than here: 0 in"),
        ("toolkit", changed(toolkit=[HERE["toolkit"][0], "/x"]), "the same files, but in /x"),
        ("mpirun", changed(mpirun=["/x/mpirun", "mpirun (Open MPI) 5.0.1\n"]), r"mpirun \(Open MPI\) 5.0.1, here "),
        ("mpirun", changed(mpirun=None), "none, here "),
        ("data", changed(data={}), "missing: diabetes"),
        ("data", changed(data={**HERE["data"], "digits.csv.gz": "0"}), "differs .*: digits.csv.gz$"),
    ],
)
def test_a_difference_is_told_where_it_is(name, there, found):
    bad = [check for check in compare.same(HERE, there, "node2") if check.ok is False]
    assert [(check.name, check.host) for check in bad] == [(name, "node2")]
    assert bad[0].fix and re.search(found, bad[0].found), bad[0]


@pytest.mark.parametrize(
    ("ahead", "uncertainty", "ok"), [(0, 0.1, True), (1.05, 0.1, True), (1.2, 0.1, False), (-3, 0.5, False)]
)
def test_clocks(ahead, uncertainty, ok):
    check = compare.clock(ahead, uncertainty, "node2")
    assert check.ok is ok and (ok or (f"{abs(ahead):g} s {'ahead' if ahead > 0 else 'behind'}" in check.found))


def of(**interfaces):
    return changed(interfaces={name: [address] if address else [] for name, address in interfaces.items()})


@pytest.mark.parametrize(
    ("facts", "wanted", "ok", "addresses"),
    [
        ((of(eth0="10.0.0.1/24"), of(eth0="10.0.0.2/24")), None, [True, True], ["10.0.0.1", "10.0.0.2"]),
        # docker0 has one address on all hosts
        (
            (of(docker0="172.17.0.1/16", ib0="10.0.0.1/24"), of(docker0="172.17.0.1/16", ib0="10.0.0.2/24")),
            None,
            [True, True],
            ["10.0.0.1", "10.0.0.2"],
        ),
        (
            (of(eth0="10.0.0.1/24"), of(enp3s0="10.0.0.2/24"), of(eth0="10.0.0.3/24")),
            None,
            [True, False, True],
            ["10.0.0.1", "10.0.0.2", "10.0.0.3"],
        ),
        # pods are routed to each other
        ((of(eth0="10.1.1.5/24"), of(eth0="10.1.2.7/24")), None, [True, True], ["10.1.1.5", "10.1.2.7"]),
        (
            (of(eth0="10.0.0.1/24", ib0="10.9.0.1/24"), of(eth0="10.0.0.2/24", ib0="10.9.0.2/24")),
            "ib0",
            [True, True],
            ["10.9.0.1", "10.9.0.2"],
        ),
        ((of(eth0="10.0.0.1/24"), of()), "eth0", [True, False], ["10.0.0.1", None]),
        ((of(eth0="nonsense"), of(eth0=None)), None, [False, False], [None, None]),
    ],
)
def test_interfaces(facts, wanted, ok, addresses):
    names = [f"node{number}" for number in range(1, len(facts) + 1)]
    checks, found = compare.interfaces(dict(zip(names, facts, strict=True)), wanted)
    assert [check.ok for check in checks] == ok
    assert [found.get(name) for name in names] == addresses
    assert all(check.fix for check in checks if check.ok is False)


def test_resources():
    small = changed(cores=[8, 1.5], shm=[64 << 20, 64 << 20], directory={"space": [1 << 40, 1 << 20], "writable": True})
    cores, shm, disk = resources.resources(small, "", 2)
    assert (cores.ok, shm.ok, disk.ok) == (False, False, False)
    assert "8 cores, of which the container's quota allows 1.5" in cores.found and "slots=1" in cores.fix
    assert shm.found == "64 MiB free of 64 MiB" and "--shm-size" in shm.fix
    assert disk.found == "1 MiB free of 1 TiB"
    assert not resources.resources(changed(directory={"space": None, "writable": False}), "", 2)[2].ok
    assert not resources.resources(changed(directory={"space": [1 << 40] * 2, "writable": False}), "", 2)[2].ok


# --- this machine


@pytest.mark.parametrize(
    ("installed", "built", "imported", "ok", "found"),
    [
        ("2.13.0", {"torch": "2.13.0"}, {"ok": True}, True, "the installed one"),
        ("2.14.0", {"torch": "2.13.0"}, {"ok": True}, False, "built for torch 2.13.0, and 2.14.0 .* by luck"),
        ("2.14.0", {"torch": "2.13.0"}, {"ok": False, "found": "undefined symbol: x"}, False, "undefined symbol: x"),
        ("2.13.0", {"torch": "2.13.0"}, {"ok": False, "found": "no"}, False, "can't be imported: no"),
        ("2.13.0", {"torch": "2.13.0"}, None, False, "torch itself"),
        ("2.13.0", {"tensorflow": "2.21.0"}, None, None, "not built for it"),
    ],
)
def test_what_horovod_was_built_for(installed, built, imported, ok, found):
    outcome = {} if imported is None else {"horovod.torch": imported}
    check = local.horovod_for("torch", installed, built, outcome)
    assert check.ok is ok and re.search(found, check.found), check
    assert check.fix or ok


@pytest.mark.parametrize(
    ("says", "mpirun", "ok"),
    [
        ("Open MPI v4.1.8, package: Open MPI user@host", "mpirun (Open MPI) 4.1.8", True),
        ("Open MPI v4.1.8, package", "mpirun (Open MPI) 4.1.6", True),
        ("Open MPI v4.1.8, package", "mpirun (Open MPI) 5.0.11", False),
        ("Open MPI v4.1.8, package", "HYDRA build details:\n    Version:           4.1.8\n", False),
        ("MPICH Version:      5.0.2\nMPICH Release date", "HYDRA build details:\n    Version:       5.0.2\n", True),
        ("Intel(R) MPI Library 2021.10", "mpirun (Open MPI) 4.1.8", None),
    ],
)
def test_a_library_against_mpirun(says, mpirun, ok):
    check = local.library("MPI of horovod", "/opt/mpi/lib/libmpi.so", says, local.mpi_of(mpirun), "/usr/bin/mpirun")
    assert check.ok is ok
    assert ok is not False or "/opt/mpi/bin" in check.fix


# --- hosts that misbehave, behind an ssh that is ours


@pytest.fixture
def port():
    """A port of 127.0.0.2 that greets as ssh does."""
    with socket.create_server(("127.0.0.2", 0)) as server:

        def greet():
            while True:
                try:
                    visitor, _ = server.accept()
                except OSError:
                    return
                with visitor:
                    visitor.sendall(b"SSH-2.0-x\r\n")

        threading.Thread(target=greet, daemon=True).start()
        yield server.getsockname()[1]
        server.shutdown(socket.SHUT_RDWR)


def program(folder, name, text):
    path = folder / name
    path.write_text(text)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def seen_through(ssh, folder, monkeypatch, port, *, seconds=60.0):
    """The checks of 127.0.0.2 whose `ssh` is a shell script that gets the remote command as its last word."""
    program(folder, "ssh", f'#!/bin/sh\n[ "$1" != -G ] || exit 0\nfor remote; do :; done\n{ssh}\n')
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    look = hosts.Look(Ssh(port=port), seconds, os.getcwd(), None, dict(os.environ), None, {})
    checks, healthy = asyncio.run(hosts.look([Host("127.0.0.2")], look, HERE))
    return {check.name: check for check in checks}, healthy


def test_a_host_that_is_well(tmp_path, monkeypatch, port):
    """Its shell says more than it is asked for, as many do."""
    said = "echo welcome; echo 'a motd' >&2; exec sh -c \"$remote\""
    checks, healthy = seen_through(said, tmp_path, monkeypatch, port)
    assert [host.name for host in healthy] == ["127.0.0.2"], checks
    assert all(check.ok for check in checks.values()), checks
    assert re.fullmatch(r"without a password, in \d+\.\d\d s", checks["ssh"].found)


# A Python there that finds the token, says something, and ends.
ANSWERS = f"""exec {sys.executable} -c '
import re, sys
token = re.search("hvdkit-[0-9a-f]* ", sys.stdin.readline())[0]
for said in sys.argv[1:]:
    sys.stdout.write(token + said + chr(10)); sys.stdout.flush(); sys.stdin.readline()
' """
# The answers of a Python like this one until it is to be the probe.
SAME_PYTHON = f"""'{{"python": "{HERE["python"][0]}"}}' """ + """'{"time": 1e9}' """ * probe.CLOCK_ROUNDS


@pytest.mark.parametrize(
    ("ssh", "name", "found", "fix"),
    [
        ('sleep 40; exec sh -c "$remote"', "ssh", "no answer in 5 s", "hangs"),
        ('sleep 1000 & sleep 40; exec sh -c "$remote"', "ssh", "no answer in 5 s", "hangs"),
        ("echo 'a@b: Permission denied (publickey).' >&2; exit 255", "ssh", "no login without a", "ssh-copy-id -p"),
        ("echo 'Host key verification failed.' >&2; exit 255", "ssh", "its host key is unknown", "accept it"),
        ("echo 'kex: something new' >&2; exit 255", "ssh", "ssh fails (kex: something new)", "by hand"),
        ("echo 'sh: 1: exec: python: not found' >&2; exit 127", "python", "none that runs", "the same environment"),
        ("echo 'account expired' >&2; exit 1", "ssh", "exit code 1 (account expired)", "by hand"),
        ("head -c 3000000 /dev/zero", "ssh", "it says a line of over", "look at what"),
        (ANSWERS + "garbage", "ssh", "it answers 'garbage", "look at what"),
        (ANSWERS + """'{"python": "2.7.18"}' '{"time": "noon"}'""", "python", "2.7.18 at ", "the same environment"),
        (
            ANSWERS + SAME_PYTHON + """'{}' '{"facts": 1}'""",
            "probe",
            "its facts are incomplete",
            "by hand",
        ),
    ],
)
def test_a_host_that_misbehaves_is_named_in_time(ssh, name, found, fix, tmp_path, monkeypatch, port):
    checks, healthy = seen_through(ssh, tmp_path, monkeypatch, port, seconds=5 if "sleep" in ssh else 60)
    assert healthy == []
    bad = [check for check in checks.values() if check.ok is False]
    assert [check.name for check in bad] == [name], checks
    assert any(words in bad[0].found for words in found.split("|")), bad[0]
    assert any(words in bad[0].fix for words in fix.split("|")), bad[0]


def test_no_ssh_there_and_something_else_there(tmp_path, monkeypatch):
    with socket.socket() as closed, socket.create_server(("127.0.0.2", 0)) as other:
        closed.bind(("127.0.0.2", 0))
        checks, _ = seen_through("exit 1", tmp_path, monkeypatch, closed.getsockname()[1])
        assert checks["ssh port"].ok is False and "Connection refused" in checks["ssh port"].found
        threading.Thread(target=lambda: other.accept()[0].sendall(b"HTTP/1.1 200\r\n"), daemon=True).start()
        checks, _ = seen_through("exit 1", tmp_path, monkeypatch, other.getsockname()[1])
        assert "not ssh's greeting" in checks["ssh port"].found


def test_ssh_never_asks_and_never_writes():
    words = Ssh(2222, "/key").command(Host("node2", user="bob"), 9.6)
    assert words[-2:] == ["--", "node2"] and words[-8:-2] == ["-p", "2222", "-i", "/key", "-l", "bob"]
    assert {"BatchMode=yes", "ConnectTimeout=10", "UpdateHostKeys=no", "ControlMaster=no"} <= set(words)
    assert "StrictHostKeyChecking" not in " ".join(words)


def test_what_ssh_says_can_not_steer_the_terminal():
    found, _ = reason(Ssh(), Host("node2"), 255, "\x1b]0;owned\x07 \x1b[2Jkex failed\r\n")
    check = Check("ssh", "node2", False, found, "x\ny")
    assert check.found.isprintable() and check.fix == "x y"


# --- connections


def test_a_door_tells_itself_from_other_programs():
    door = probe.Door("127.0.0.1", TOKEN)
    with socket.create_server(("127.0.0.1", 0)) as other, socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        threading.Thread(target=lambda: other.accept()[0].sendall(b"x" * 99), daemon=True).start()
        ports = [door.port, other.getsockname()[1], closed.getsockname()[1]]
        reasons = probe.knock([["127.0.0.1", port, TOKEN] for port in ports], 5)
    assert reasons == [None, "another program answers there", "Connection refused"]


# --- the all-reduce's figures


def test_a_wrong_sum_is_no_success():
    def forgets(data, name):
        return data if name == "right" else data * 1

    with pytest.raises(RuntimeError, match="the sum over 2 ranks is wrong"):
        all_reduce.measure(forgets, 0, 2)
    assert all_reduce.measure(lambda data, name: np.copy(data), 0, 1)["bytes"] == all_reduce.LARGE


def test_bandwidths_are_those_of_nccl_tests():
    said = measure.described({"bytes": 8_000_000, "seconds": 0.01, "latency": 0.0005, "ranks": 4, "hosts": []})
    assert "algorithm bandwidth 0.8 GB/s, bus bandwidth 1.2 GB/s; 4 bytes in 0.5 ms" in said


# --- what is shown


def test_lines_join_what_is_alike():
    checks = [Check("python", f"node{n}", True, "3.11") for n in range(1, 4)]
    checks += [Check("ssh", f"node{n}", True, f"{n} s") for n in range(1, 7)]
    checks += [Check("ssh", "node7", False, "no", "do")]
    assert lines(checks) == [
        "✓ python                   node1, node2, node3: 3.11",
        "✓ ssh                      node1: 1 s",
        "✓ ssh                      node2: 2 s",
        "✓ ssh                      node3: 3 s",
        "✓ ssh                      3 more hosts",
        "✗ ssh                      node7: no",
        "    fix: do",
    ]
    assert lines(checks[-1:], plain=True)[0].startswith("FAIL ssh")
    many = [Check("python", f"node{n}", True, "3.11") for n in range(100)]
    assert lines(many) == ["✓ python                   100 hosts, node0 to node99: 3.11"]


def test_the_document():
    told = json.loads(document([Check("a", "", None, "x"), Check("b", "n", True, "y")], 1.23))
    assert told == {
        "schema": 1,
        "ok": True,
        "seconds": 1.2,
        "checks": [
            {"name": "a", "host": "", "ok": None, "found": "x", "fix": ""},
            {"name": "b", "host": "n", "ok": True, "found": "y", "fix": ""},
        ],
    }
    assert not json.loads(document([Check("a", "", False, "x", "y")], 0))["ok"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--timeout", "0"], "--timeout is 0: expected seconds"),
        (["--timeout", "nan"], "--timeout is nan"),
        (["-np", "0"], "-np is 0: expected 1 to"),
        (["-H", "a$(touch x)"], "-H:1: "),
        (["-H-oProxyCommand=x"], "-H:1: "),
        (["--hostfile", "/no/such"], "expected a hostfile"),
        (["--ssh-key", "/no/such"], "--ssh-key /no/such is not there"),
        (["--ssh-port", "70000"], "--ssh-port is 70000"),
        (["--interface", "a b"], "--interface is 'a b'"),
        (["--data-dir", "/no/such"], "--data-dir /no/such holds none"),
    ],
)
def test_what_is_refused(arguments, said, capsys):
    assert main(["doctor", *arguments]) == 2
    assert said in capsys.readouterr().err


def test_a_program_that_is_too_slow_is_ended_with_its_children(tmp_path):
    script = f"sleep 100 & echo $! > {tmp_path}/child; sleep 100"
    ended = asyncio.run(processes.run(["sh", "-c", script], 1))
    assert ended.code is None
    child = int((tmp_path / "child").read_text())
    try:
        end = time.monotonic() + 10
        while (there := os.path.exists(f"/proc/{child}/exe")) and time.monotonic() < end:
            time.sleep(0.05)
        assert not there
    finally:
        if there:
            os.kill(child, signal.SIGKILL)


# --- hvdkit env


def test_env_has_no_secrets_and_no_names(monkeypatch):
    monkeypatch.setattr(environment, "_SHOWN", (*environment._SHOWN, "SLURM_JWT"))
    environ = {
        "SLURM_JWT": "sesame-0",
        "HOME": "/srv/alice",
        "USER": "alice",
        "PATH": "/srv/alice/bin:/home/bob/bin:/scratch/alice/x:/usr/bin",
        "HOROVOD_SECRET_KEY": "sesame-1",
        "NCCL_AUTH_TOKEN": "sesame-2",
        "HVDKIT_CACHE": "https://alice:sesame-3@host/x",
        "AWS_PROFILE": "sesame-4",
        "HOROVOD_CYCLE_TIME": "0.2",
    }
    found = environment.report(environ)
    text = json.dumps(found)
    assert "sesame" not in text and "alice" not in text and "bob" not in text and "SECRET" not in text
    assert found["$PATH"] == "~/bin:/home/…/bin:/scratch/<user>/x:/usr/bin"
    assert found["$HOROVOD_CYCLE_TIME"] == "0.2" and found["python"] == HERE["python"][0]
    assert found["horovod"] == HERE["packages"]["horovod"][0] and HERE["mpirun"][0] in found["mpirun"]


def test_the_command_env(capsys, monkeypatch):
    monkeypatch.setenv("HVDKIT_JWT", "sesame")
    assert main(["env"]) == 0
    printed = capsys.readouterr().out
    assert "sesame" not in printed and "horovod built for" in printed
    assert main(["env", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["numpy"] == np.__version__
    assert launch.SECRET.search("HVDKIT_JWT")
