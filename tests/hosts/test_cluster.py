"""The test cluster itself: hosts apart from each other and from this machine, and nothing left of it."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.hosts.cluster import NAMES, _in_namespace


def test_hosts_log_in_to_each_other_and_reach_nothing_else(cluster):
    for name, other in zip(NAMES, (*NAMES[1:], NAMES[0]), strict=True):
        told = cluster.run(name, ["ssh", other, "hostname; ip -o -4 address show dev eth0; echo $TMPDIR"], timeout=30)
        assert told.stdout.split()[0] == other and cluster.addresses[other] in told.stdout, told.stderr
        assert told.stdout.split()[-1] == str(cluster.directory / other / "tmp")
        assert cluster.on(name, "ip", "route", "show", "default") == ""
    assert socket.gethostname() not in NAMES


@pytest.mark.parametrize("launcher", ["mpirun", pytest.param("horovodrun", marks=pytest.mark.long)])
def test_hosts_that_have_no_name_without_its_domain(cluster, launcher):
    hosts = ",".join(f"{name}-alone.example:1" for name in NAMES[:2])
    line = [sys.executable, "-m", "toolkit.cli", "launch", "--launcher", launcher, "-H", hosts, "--", "hostname"]
    told = cluster.run("node1", line, timeout=60)
    assert sorted(re.findall(r"(node\d)$", told.stdout, re.MULTILINE)) == ["node1", "node2"], told.stdout + told.stderr


def test_a_cut_cable_is_silent(cluster):
    login = ["ssh", "-o", "ConnectTimeout=3", "node2", "true"]
    assert cluster.run("node1", login, timeout=30).returncode == 0
    cluster.cut("node2")
    told = cluster.run("node1", login, timeout=30)
    assert told.returncode == 255 and ("timed out" in told.stderr or "No route" in told.stderr), told.stderr
    cluster.join("node2")
    assert cluster.run("node1", login, timeout=30).returncode == 0


def test_what_is_left_on_another_host_is_found_and_ended(cluster):
    with pytest.raises(AssertionError, match="sleep 1000"):
        cluster.run("node1", ["ssh", "node3", "nohup sleep 1000 > /dev/null 2>&1 &"], timeout=30, grace=1)
    assert not any(cluster.processes(name) for name in NAMES)


def test_what_is_started_while_all_is_killed_is_ended_too(cluster):
    process, _ = cluster.begin("node1", ["sh", "-c", "while :; do setsid sleep 1000 & sleep 0.001; done"])
    end = time.monotonic() + 30
    while len(cluster.processes("node1")) < 20 and time.monotonic() < end:
        time.sleep(0.01)
    assert len(cluster.kill_all()["node1"]) >= 20
    assert not any(cluster.processes(name) for name in NAMES)
    process.communicate(timeout=30)


HOLD = """
import sys, time
from pathlib import Path
from tests.hosts.cluster import Cluster
cluster = Cluster(Path(sys.argv[1]))
cluster.__enter__()
cluster.begin("node1", ["ssh", "node2", "sleep 1000"])
print(*cluster._namespaces.values(), flush=True)
time.sleep(1000)
"""


def test_nothing_outlives_tests_that_are_killed(cluster, tmp_path):
    """`cluster` is here for the skip alone."""
    holder = subprocess.Popen([sys.executable, "-c", HOLD, tmp_path], stdout=subprocess.PIPE, text=True)
    links = holder.stdout.readline().split()
    assert len(links) == 3 and all(len(_in_namespace(link)) >= 2 for link in links)
    os.kill(holder.pid, signal.SIGKILL)
    holder.communicate()
    end = time.monotonic() + 20
    while any(map(_in_namespace, links)) and time.monotonic() < end:
        time.sleep(0.1)
    assert not any(map(_in_namespace, links))
    assert str(tmp_path) not in Path("/proc/mounts").read_text()
