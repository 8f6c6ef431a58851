"""Hostfiles as mpirun and horovodrun themselves read them, against what we read."""

import re
import socket
import subprocess
import sys

import pytest

from tests.launching import BIN, ROOT, clean_environment
from toolkit import hostfile
from toolkit.hostfile import Host

FILES = sorted((ROOT / "hostfiles").iterdir())
HERE = socket.gethostname().split(".")[0]  # what Open MPI makes of localhost


def run(*command, environment=None, timeout=120):
    """What a command prints, and its exit code."""
    result = subprocess.run(
        [str(part) for part in command],
        env={**clean_environment(), **(environment or {})},
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout,
    )
    return result.stdout, result.returncode


def allocated(slots, *options, environment=None):
    """Each host's name, slots and limit as mpirun allocates them, without starting anything there."""
    look = ("--display-allocation", "--do-not-launch", "true")
    printed, _ = run(BIN / "mpirun", *options, "-np", slots, *look, environment=environment)
    nodes = re.findall(r"Data for node: (\S+)\tNum slots: (\d+)\tMax slots: (\d+)", printed)
    assert nodes, printed
    return [(name, int(slots), int(limit)) for name, slots, limit in nodes]


def expected(hosts):
    return [(HERE if host.name == "localhost" else host.name, host.slots, host.max_slots or 0) for host in hosts]


def slots(hosts):
    return sum(host.slots for host in hosts)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_our_hostfiles_are_the_same_to_all(path):
    hosts = hostfile.read(path)
    assert allocated(slots(hosts), "--hostfile", path) == expected(hosts)
    script = "import sys; from horovod.runner.common.util import hosts; text = hosts.parse_host_files(sys.argv[1]); "
    script += "print(hosts.parse_hosts_and_slots(text)[1])"
    printed, code = run(sys.executable, "-c", script, path)
    assert (code, printed.strip()) == (0, str({host.name: host.slots for host in hosts}))


@pytest.mark.parametrize("launcher", ["mpirun", "horovodrun", pytest.param("horovodrun -H", marks=pytest.mark.long)])
def test_local_ranks_start_by_a_hostfile(launcher):
    path = ROOT / "hostfiles" / "localhost"
    hosts = hostfile.write(hostfile.read(path), "horovodrun")
    options = ["-H", hosts] if launcher == "horovodrun -H" else ["--hostfile", path]
    script = "import os; e = os.environ; "
    script += 'os.write(1, f\'rank {e["OMPI_COMM_WORLD_RANK"]} of {e["OMPI_COMM_WORLD_SIZE"]}\\n\'.encode())'
    printed, code = run(BIN / launcher.split()[0], "-np", 3, *options, sys.executable, "-c", script)
    assert code == 0 and sorted(re.findall(r"rank \d of \d", printed)) == [f"rank {r} of 3" for r in range(3)], printed


MIXED = [Host("node1", 4, 8), Host("node-2", 2, None, "bob"), Host("10.0.0.7", 3), Host("n3", 1, 1), Host("fe80::1", 2)]


def test_mpirun_reads_what_is_written_for_it(tmp_path):
    path = tmp_path / "hosts"
    path.write_text(hostfile.write(MIXED, "openmpi"))
    assert allocated(slots(MIXED), "--hostfile", path) == expected(MIXED)


@pytest.mark.parametrize(
    "text",
    [
        "# one\n\na slots = 4 max-slots=8 # more\n \tb\tslots=2 // more\n",
        "a\nb\na\na\nb\n",
        "a slots=2\nb\nb\na\n",
        "a max_slots=3\nb cpu=2\nbob@c count=2",
    ],
)
def test_mpirun_reads_what_we_read(text, tmp_path):
    path = tmp_path / "hosts"
    path.write_text(text)
    hosts = hostfile.read(path)
    assert allocated(slots(hosts), "--hostfile", path) == expected(hosts)


@pytest.mark.parametrize("text", ["a slots=2\na slots=3\n", "[fe80::1] slots=2\n", "a slots=2\r\n"])
def test_what_mpirun_refuses_of_it_is_written_so_that_it_is_read(text, tmp_path):
    path = tmp_path / "hosts"
    path.write_bytes(text.encode())
    printed, _ = run(BIN / "mpirun", "--hostfile", path, "--display-allocation", "--do-not-launch", "true")
    assert "Data for node" not in printed
    hosts = hostfile.read(path)
    path.write_text(hostfile.write(hosts, "openmpi"))
    assert allocated(slots(hosts), "--hostfile", path) == expected(hosts)


@pytest.mark.parametrize(
    ("nodes", "tasks"),
    [
        ("gpu[01-04,07],login1", "2(x5),1"),
        ("n[8-11,099-101]", "1,2(x2),3(x4)"),
        ("a", "16"),
        ("n[2,1],m[09-11],10.0.0.[1-2]", "4(x7)"),
    ],
)
def test_mpirun_reads_slurms_environment_alike(nodes, tasks):
    environment = {"SLURM_NODELIST": nodes, "SLURM_TASKS_PER_NODE": tasks}
    hosts = hostfile.from_environment(environment)
    assert allocated(slots(hosts), environment={**environment, "SLURM_JOBID": "1"}) == expected(hosts)
    assert hostfile.write(hosts, "slurm") == nodes
