"""Doctor's parts that need no framework: what it makes of answers, of differences, and of hosts that misbehave."""

import ast
import asyncio
import json
import os
import re
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from toolkit import launch, tuning
from toolkit.cli import main
from toolkit.doctor import all_reduce, compare, environment, hosts, local, measure, peer, probe, processes, resources
from toolkit.doctor.checks import Check, document, lines
from toolkit.doctor.login import Ssh, reason
from toolkit.doctor.peer import NoAnswer
from toolkit.errors import UsageError
from toolkit.hostfile import Host

HERE = probe.facts(os.getcwd())
TOKEN = "hvdkit-0123 "


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
        checks = hosts.judge(HERE, facts, "a", 2)
    except NoAnswer:
        return
    found, addresses = compare.interfaces({"a": facts, "b": HERE}, None)
    assert all(isinstance(check, Check) for check in [*checks, *found])
    assert all(isinstance(address, str) for address in addresses.values())
    lines([*checks, *found], plain=True)


@pytest.mark.parametrize(
    "facts", [{}, {**HERE, "cores": ["many", None]}, {**HERE, "shm": [1, 10**400]}, {**HERE, "interfaces": 1}]
)
def test_facts_of_another_form_are_refused(facts):
    with pytest.raises(NoAnswer, match="form"):
        hosts.judge(HERE, facts, "a", 2)


def test_our_own_facts_are_accepted_and_alike():
    checks = hosts.judge(HERE, json.loads(json.dumps(HERE)), "a", 1)
    assert [check.ok for check in checks[:5]] == [True] * 5
    assert HERE["cores"] == [len(tuning.physical_cores(os.sched_getaffinity(0))), tuning.usable_cores()]


def test_the_probe_runs_on_old_pythons_without_packages():
    tree = ast.parse(Path(probe.__file__).read_text(), feature_version=(3, 8))
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert {name.partition(".")[0] for name in names} <= {*sys.stdlib_module_names}
    ast.parse(probe.BOOT, feature_version=(3, 4))


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
    ("ahead", "uncertainty", "ok"),
    [(0, 0.1, True), (1.05, 0.1, None), (30, 29.5, None), (1.2, 0.1, False), (-3, 0.5, False)],
)
def test_clocks(ahead, uncertainty, ok):
    check = compare.clock(ahead, uncertainty, "node2")
    told = {
        True: "within 0.1 s",
        None: f"can't be told closer than ± {uncertainty:.2g} s",
        False: f"{abs(ahead):g} s {'ahead' if ahead > 0 else 'behind'}",
    }
    assert check.ok is ok and told[ok] in check.found


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
    assert all(check.fix and "ip link" not in check.fix for check in checks if check.ok is False)


def test_resources():
    small = changed(cores=[8, 2], shm=[64 << 20, 64 << 20], directory={"space": [1 << 40, 1 << 20], "writable": True})
    cores, shm, disk = resources.resources(small, "", 3)
    assert (cores.ok, shm.ok, disk.ok) == (False, False, False)
    assert "8 cores, of which the container's quota allows 2" in cores.found and "slots=2" in cores.fix
    assert shm.found == "64 MiB free of 64 MiB" and "--shm-size" in shm.fix
    assert disk.found == "1 MiB free of 1 TiB"
    assert not resources.resources(changed(directory={"space": None, "writable": False}), "", 2)[2].ok
    assert not resources.resources(changed(directory={"space": [1 << 40] * 2, "writable": False}), "", 2)[2].ok


@pytest.mark.parametrize(
    ("installed", "built", "imported", "ok", "found"),
    [
        ("2.13.0", {"torch": "2.13.0"}, {"ok": True}, True, "the installed one"),
        ("2.11.0", {"torch": "2.11.0+cu130"}, {"ok": True}, True, "the installed one"),  # as PyPI's CUDA build tells it
        ("2.11.0+cu130", {"torch": "2.11.0"}, {"ok": True}, True, "the installed one"),
        ("2.11.0+cpu", {"torch": "2.11.0+cu130"}, {"ok": True}, False, r"2.11.0\+cu130, and 2.11.0\+cpu is installed"),
        ("2.12.0", {"torch": "2.11.0+cu130"}, {"ok": True}, False, r"2.11.0\+cu130, and 2.12.0 is installed"),
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


FINE = {"ok": True, "found": "1.0", "seconds": 0.0}
FAILS = {"ok": False, "found": "no"}


@pytest.mark.parametrize(
    ("built", "torch", "tensorflow", "wanted", "found"),
    [
        ({"torch": "1.0"}, FINE, FAILS, local.FRAMEWORKS, {"horovod": True, "torch": True, "tensorflow": None}),
        ({"torch": "1.0"}, FINE, FAILS, ("tensorflow",), {"horovod": False}),
        ({"mxnet": "1.0"}, FINE, FINE, local.FRAMEWORKS, {"horovod": False}),
        ({}, FINE, FAILS, local.FRAMEWORKS, {"horovod": True, "torch": True, "tensorflow": None}),
        ({}, FAILS, FAILS, local.FRAMEWORKS, {"horovod": False}),
        ({}, None, FINE, local.FRAMEWORKS, {"horovod": True, "torch": False, "tensorflow": True}),
    ],
)
def test_a_horovod_that_serves_none_of_the_frameworks_is_wrong(built, torch, tensorflow, wanted, found):
    packages = {**HERE["packages"], **{name: ["1.0", "/x"] for name in ("horovod", *local.FRAMEWORKS)}}
    imported = {"torch": {"horovod.torch": torch} if torch else {}, "tensorflow": {"horovod.tensorflow": tensorflow}}
    checks = local.horovod(changed(packages=packages, built_for=built), imported, wanted)
    assert {check.name.removeprefix("horovod for "): check.ok for check in checks} == found
    assert all(check.fix for check in checks if not check.ok)


@pytest.mark.parametrize(
    ("installed", "wanted", "found"),
    [
        (("torch", "tensorflow"), ("torch",), [("torch", True), ("keras", True)]),
        (("torch", "tensorflow"), ("tensorflow",), [("tensorflow", True), ("keras", True)]),
        (("torch",), ("torch", "tensorflow"), [("torch", True), ("tensorflow", None), ("keras", True)]),
        (("torch",), ("tensorflow",), [("tensorflow", False)]),
        ((), ("torch", "tensorflow"), [("torch", False), ("tensorflow", False), ("keras", False)]),
    ],
)
def test_only_the_frameworks_that_are_wanted(installed, wanted, found, monkeypatch):
    monkeypatch.delenv("KERAS_BACKEND", raising=False)
    there = {name: ["1.0", "/x"] if name in installed else None for name in local.FRAMEWORKS}
    facts = changed(packages={**HERE["packages"], **there, "keras": ["1.0", "/x"]})
    imported = {name: {name: FINE, "keras": FINE} for name in installed if name in wanted}
    checks = local.frameworks(facts, imported, wanted)
    assert [(check.name, check.ok) for check in checks] == found
    assert all("make setup" in check.fix for check in checks if not check.ok and check.name in wanted and check.fix)


def test_a_broken_framework_is_to_be_installed_as_it_was():
    """Of another version, or from another distribution, it would not be what Horovod was built for."""
    (name, distribution), *_ = [
        (name, distribution)
        for name, brought_by in probe.PACKAGES.items()
        for distribution in brought_by
        if name in local.FRAMEWORKS and probe.package(name, (distribution,))[0] != "of unknown version"
    ]
    version = HERE["packages"][name][0]
    (check, *_) = local.frameworks(HERE, {name: {name: FAILS, "keras": FINE}}, (name,))
    assert check.fix == f"pip install --force-reinstall --no-deps {distribution}=={version}"


def test_keras_on_another_backend(monkeypatch):
    packages = {**dict.fromkeys(HERE["packages"]), "keras": ["1.0", "/x"], "torch": ["1.0", "/x"]}
    monkeypatch.setenv("KERAS_BACKEND", "jax")
    torch, keras = local.frameworks(changed(packages=packages), {"torch": {"torch": FINE}}, ("torch",))
    assert torch.ok and keras.ok is False and "its backend is jax" in keras.found and "KERAS_BACKEND" in keras.fix
    monkeypatch.setenv("KERAS_BACKEND", "tensorflow")  # which --framework torch leaves out
    checks = local.frameworks(changed(packages=packages), {"torch": {"torch": FINE}}, ("torch",))
    assert [check.name for check in checks] == ["torch"]


def installed(says, program="mpirun"):
    return launch.Installed("mpirun", str(program), *launch.known(says))


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
    check = local.library("MPI of horovod", "/opt/mpi/lib/libmpi.so", says, installed(mpirun), "/usr/bin/mpirun")
    assert check.ok is ok
    assert ok is not False or "/opt/mpi/bin" in check.fix


@pytest.fixture
def port():
    """A port of 127.0.0.2, of 127.0.0.3, and of 127.0.0.4 that greets as ssh does."""

    def greet(server):
        while True:
            try:
                visitor, _ = server.accept()
            except OSError:
                return
            with visitor:
                visitor.sendall(b"SSH-2.0-x\r\n")

    with ExitStack() as stack:
        number, servers = 0, []
        for last in (2, 3, 4):
            servers.append(stack.enter_context(socket.create_server((f"127.0.0.{last}", number))))
            number = servers[0].getsockname()[1]
            threading.Thread(target=greet, args=(servers[-1],), daemon=True).start()
        yield number
        for server in servers:
            server.shutdown(socket.SHUT_RDWR)


def program(folder, name, text):
    path = folder / name
    path.write_text(text)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def all_seen_through(ssh, names, folder, monkeypatch, port, *, seconds=60.0, interface=None):
    """Hosts by name whose `ssh` is a shell script: `$remote` is the command for the host, before it stands its name."""
    words = "for word; do name=$remote; remote=$word; done"
    program(folder, "ssh", f'#!/bin/sh\n[ "$1" != -G ] || exit 0\n{words}\n{ssh}\n')
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    look = hosts.Look(Ssh(port=port), seconds, os.getcwd(), None, dict(os.environ), interface, {})
    all_seen = asyncio.run(hosts.look([Host(name) for name in names], look, HERE))
    return {seen.host.name: ({check.name: check for check in seen.checks}, seen.healthy(look)) for seen in all_seen}


def seen_through(ssh, folder, monkeypatch, port, **more):
    """The checks of 127.0.0.2, and whether it is well."""
    return all_seen_through(ssh, ["127.0.0.2"], folder, monkeypatch, port, **more)["127.0.0.2"]


def test_a_host_that_is_well(tmp_path, monkeypatch, port):
    """Its shell says more than it is asked for, as many do, and its working directory has files with modules' names."""
    place = tmp_path / "work"
    place.mkdir()
    for name in ("hashlib", "json", "platform"):
        (place / f"{name}.py").write_text("raise RuntimeError('it is not this one that is wanted')")
    monkeypatch.chdir(place)
    said = "echo welcome; printf 'a prompt> '; echo 'a motd' >&2; exec sh -c \"$remote\""
    checks, healthy = seen_through(said, tmp_path, monkeypatch, port)
    assert healthy, checks
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
        (
            "printf '@  WARNING: UNPROTECTED PRIVATE KEY FILE!  @\\nPermission denied (publickey).\\n' >&2; exit 255",
            "ssh",
            "the private key can't be used (@ WARNING: UNPROTECTED",
            "chmod 600",
        ),
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
            "it tells no facts",
            "by hand",
        ),
    ],
)
def test_a_host_that_misbehaves_is_named_in_time(ssh, name, found, fix, tmp_path, monkeypatch, port):
    checks, healthy = seen_through(ssh, tmp_path, monkeypatch, port, seconds=5 if "sleep" in ssh else 60)
    assert not healthy
    bad = [check for check in checks.values() if check.ok is False]
    assert [check.name for check in bad] == [name], checks
    assert found in bad[0].found and fix in bad[0].fix, bad[0]


def test_no_ssh_there_and_something_else_there(tmp_path, monkeypatch):
    with socket.socket() as closed, socket.create_server(("127.0.0.2", 0)) as other:
        closed.bind(("127.0.0.2", 0))
        checks, _ = seen_through("exit 1", tmp_path, monkeypatch, closed.getsockname()[1])
        assert checks["ssh port"].ok is False and "Connection refused" in checks["ssh port"].found
        threading.Thread(target=lambda: other.accept()[0].sendall(b"HTTP/1.1 200\r\n"), daemon=True).start()
        checks, _ = seen_through("exit 1", tmp_path, monkeypatch, other.getsockname()[1])
        assert "not ssh's greeting" in checks["ssh port"].found


def test_each_address_has_its_reason():
    with socket.socket() as closed, socket.create_server(("127.0.0.3", 0)) as other:
        port = other.getsockname()[1]
        closed.bind(("127.0.0.2", port))
        threading.Thread(target=lambda: other.accept()[0].sendall(b"HTTP/1.1 200\r\n"), daemon=True).start()
        seen = hosts.Seen(Host("node2"), "ssh port")
        with pytest.raises(hosts._Failed):
            asyncio.run(hosts._ssh_port(seen, ["127.0.0.2", "127.0.0.3"], port))
    (check,) = seen.checks
    assert check.found.startswith(f"127.0.0.2 port {port}: Connection refused; 127.0.0.3 port {port}: it says b'HTTP")


def test_ssh_never_asks_and_never_writes():
    words = Ssh(2222, "/key").command(Host("node2", user="bob"), 9.6)
    assert words[-2:] == ["--", "node2"] and words[-8:-2] == ["-p", "2222", "-i", "/key", "-l", "bob"]
    assert {"BatchMode=yes", "ConnectTimeout=10", "UpdateHostKeys=no", "ControlMaster=no"} <= set(words)
    assert "StrictHostKeyChecking" not in " ".join(words)
    assert Ssh(2222, "/key").copy_by_hand(Host("node2", user="bob")) == "ssh-copy-id -p 2222 -i /key bob@node2"
    assert Ssh().copy_by_hand(Host("node2")) == "ssh-copy-id node2"


def test_what_ssh_says_can_not_steer_the_terminal():
    found, _ = reason(Ssh(), Host("node2"), 255, "\x1b]0;owned\x07 \x1b[2Jkex failed\r\n")
    check = Check("ssh", "node2", False, found, "x\ny")
    assert check.found.isprintable() and check.fix == "x y"


def test_a_door_tells_itself_from_other_programs():
    door = probe.Door("127.0.0.1", TOKEN)
    with socket.create_server(("127.0.0.1", 0)) as other, socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        threading.Thread(target=lambda: other.accept()[0].sendall(b"x" * 99), daemon=True).start()
        ports = [door.port, other.getsockname()[1], closed.getsockname()[1]]
        reasons = probe.knock([["127.0.0.1", port, TOKEN] for port in ports], 5)
    assert reasons == [None, "another program answers there", "Connection refused"]


@pytest.mark.parametrize(
    ("pairs", "blamed"),
    [
        ([], ""),
        (["ab"], "ab"),  # who is to say which
        (["ab", "ba"], "ab"),
        (["ab", "ac", "ba"], "a"),
        (["ab", "cb", "db", "ef"], "bef"),
        (["ab", "ac", "ad", "bc", "bd", "ba"], "ab"),  # two of four are cut off
        (["ac", "ad", "bc", "bd"], "abcd"),
    ],
)
def test_the_hosts_that_are_to_blame(pairs, blamed):
    assert hosts.to_blame(tuple(pair) for pair in pairs) == set(blamed)


def test_one_host_that_is_cut_off_is_not_the_fault_of_the_others(tmp_path, monkeypatch, port):
    """Its probe runs in a network namespace of its own, with an address that to the others is their own."""
    name = next(
        (name for name, addresses in HERE["interfaces"].items() if any("." in each for each in addresses)), None
    )
    apart = f"ip link add {name} type veth peer name peer; ip address add 127.9.9.9/8 dev {name}; ip link set {name} up"
    if name is None or subprocess.run(["unshare", "-n", "sh", "-ec", apart], capture_output=True).returncode:
        pytest.skip("no network namespace with an interface can be made here, or this machine has no network")
    cut_off = f'[ $name = 127.0.0.3 ] || exec sh -c "$remote"\nexec unshare -n sh -c "{apart}; $remote"'
    names = ["127.0.0.2", "127.0.0.3", "127.0.0.4"]
    found = all_seen_through(cut_off, names, tmp_path, monkeypatch, port, seconds=20, interface=name)
    assert [found[one][1] for one in names] == [True, False, True], found
    check = found["127.0.0.3"][0]["connections"]
    assert check.ok is False and "not reached at 127.9.9.9 by 127.0.0.2, 127.0.0.4" in check.found
    assert found["127.0.0.2"][0]["connections"].found == "reached by 1 other host on free ports"


def test_a_host_that_dies_in_between_is_not_the_fault_of_the_others(tmp_path, monkeypatch, port):
    # The probe of one host ends when it is asked to connect to the others.
    dies = f"""[ $name = 127.0.0.3 ] || exec sh -c "$remote"
{sys.executable} -c 'import sys
for line in iter(sys.stdin.readline, ""):
    if "knock" in line and len(line) < 1000: break
    print(line, end="", flush=True)' | sh -c "$remote" """
    names = ["127.0.0.2", "127.0.0.3", "127.0.0.4"]
    found = all_seen_through(dies, names, tmp_path, monkeypatch, port)
    assert [found[one][1] for one in names] == [True, False, True], found
    assert found["127.0.0.3"][0]["connections"].found == "it does not answer any more"


def test_a_wrong_sum_is_no_success():
    def forgets(data, name):
        return data if name == "right" else data * 1

    with pytest.raises(RuntimeError, match="the sum over 2 ranks is wrong"):
        all_reduce.measure(forgets, 0, 2)


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        ([0.004], all_reduce.LARGE),
        ([0.004, 0.2, 0.004, 0.2], all_reduce.LARGE),  # the machine was busy with something else for a while
        ([0.2], all_reduce.SMALL),
    ],
)
def test_the_message_suits_the_link(seconds, expected, monkeypatch):
    now, taken = [0.0], []

    def reduce(data, name):
        if name == "small":
            now[0] += seconds[len(taken) % len(seconds)]
            taken.append(name)
        return data

    monkeypatch.setattr(all_reduce, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    assert all_reduce.measure(reduce, 0, 1)["bytes"] == expected


def test_bandwidths_are_those_of_nccl_tests():
    said = measure.described({"bytes": 16 << 20, "seconds": 0.02, "latency": 0.0005, "ranks": 4})
    expected = "16 MiB in 20 ms: algorithm bandwidth 0.84 GB/s, bus bandwidth 1.3 GB/s; 4 bytes in 0.5 ms"
    assert said.startswith(f"right on 4 ranks (CPU); {expected}")
    said = measure.described({"bytes": 1 << 20, "seconds": 0.02, "latency": 0.0005, "ranks": 4})
    assert "1 MiB, as 16 MiB would take over 0.5 s, in 20 ms" in said


NOTHING_GIVEN = {"interface": None, "ssh_port": None, "ssh_key": None}


def test_an_all_reduce_over_hosts_that_fails_has_its_reason_and_its_command(tmp_path):
    """What Open MPI 4.1 says where its daemon is not on a host."""
    said = (
        "bash: line 1: /opt/openmpi/bin/orted: No such file or directory",
        "-" * 74,
        "ORTE was unable to reliably start one or more daemons.",
        "This usually is caused by:",
        *(f"* {number}. please check your system type." for number in range(20)),
    )
    script = "#!/bin/sh\nprintf '%s\\n' " + " ".join(f"'{line}'" for line in said) + " >&2\nexit 1\n"
    mpirun = installed("mpirun (Open MPI) 4.1.8", program(tmp_path, "mpirun", script))
    names = [Host(f"node{number}.a-cluster-of-long-names.example.org", user="bob") for number in range(20)]
    check = asyncio.run(measure.check("torch", names, {**NOTHING_GIVEN, "interface": "eth0"}, mpirun))
    assert check.ok is False and check.found.startswith(f"exit code 1: {said[0]} ORTE was unable to reliably")
    assert check.fix.startswith(f"by hand: {mpirun.program} -np 20 ") and check.fix.endswith(" torch 20 cpu")


@pytest.mark.parametrize(
    ("names", "found", "fix"),
    [
        ([Host("a", user="x"), Host("b", user="y")], "the hosts have several users", "give one to all, or"),
        ([Host("fe80::1"), Host("b")], "fe80::1: mpirun has no place for an IPv6 address", "give a name."),
    ],
)
def test_an_all_reduce_that_has_no_command(names, found, fix):
    check = asyncio.run(measure.check("torch", names, NOTHING_GIVEN, installed("mpirun (Open MPI) 4.1.8")))
    assert check.ok is False and check.found == found and check.fix.startswith(fix)
    check = asyncio.run(measure.check("torch", names, NOTHING_GIVEN, UsageError("mpirun is not there")))
    assert check.ok is False and "no mpirun" in check.found


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
    long = "x" * 5000
    assert Check("a", "", False, long, long).fix == long and len(Check("a", "", False, long, long).found) == 400


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
    assert found["horovod"] == HERE["packages"]["horovod"][0]
    assert environment.without_names(HERE["mpirun"][0], environ) in found["mpirun"]


def test_the_command_env(capsys, monkeypatch):
    monkeypatch.setenv("HVDKIT_JWT", "sesame")
    assert main(["env"]) == 0
    printed = capsys.readouterr().out
    assert "sesame" not in printed and "horovod built for" in printed
    assert main(["env", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["numpy"] == np.__version__
    assert launch.SECRET.search("HVDKIT_JWT")
