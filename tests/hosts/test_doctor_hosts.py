"""`hvdkit doctor` on three hosts: well, and with one fault at a time."""

import getpass
import json
import sys
import sysconfig
from pathlib import Path

import pytest

from tests.hosts.cluster import INTERFACE, NAMES
from tests.launching import BIN, ROOT
from tests.single import gpu_host

SITE = Path(sysconfig.get_path("purelib"))


def doctor(cluster, *options, hosts=(), timeout=240, environment=None):
    """Exit code, and checks by name and host; of one framework, as the other would only take longer."""
    which = hosts or ("--hostfile", cluster.hostfile)
    line = [sys.executable, "-m", "toolkit.cli", "doctor", *which, "--json", *options]
    told = cluster.run("node1", [*line, "--framework", "torch"], timeout=timeout, environment=environment)
    checks = json.loads(told.stdout)["checks"]
    assert not told.stderr.strip()
    return told.returncode, {(check["name"], check["host"]): check for check in checks}


def wrong(checks):
    return {key for key, check in checks.items() if check["ok"] is False}


def test_all_is_well(cluster):
    code, checks = doctor(cluster, "--interface", INTERFACE)
    assert code == 0 and not wrong(checks), [checks[key] for key in wrong(checks)]
    assert "right on 3 ranks" in checks["torch over hosts", ""]["found"]
    for name in ("name resolution", "python", "packages", "toolkit", "data", "clock", "interface", "connections"):
        assert all(checks[name, host]["ok"] for host in NAMES), name
    assert [checks["ssh", host]["ok"] for host in NAMES] == [None, True, True]
    assert f"{INTERFACE} in 192.0.2.0/24" in checks["interface", "node3"]["found"]
    assert checks["connections", "node3"]["found"] == "reached by 2 other hosts on free ports"


@pytest.mark.long
def test_one_host_that_is_another_machine(cluster):
    """The all-reduce runs there, and not only here."""
    hosts = ("-H", f"{getpass.getuser()}@node2:2")
    key = cluster.directory / "node1/home/.ssh/id_ed25519"
    key = key.rename(key.with_name("of-another-name"))
    code, checks = doctor(cluster, "-np", "2", "--ssh-port", "22", "--ssh-key", key, hosts=hosts)
    assert code == 0 and not wrong(checks), [checks[key] for key in wrong(checks)]
    assert checks["cores", "node2"]["found"].endswith(" for 2 ranks")
    assert "right on 2 ranks" in checks["torch over hosts", ""]["found"]
    code, checks = doctor(cluster, "-np", "1", hosts=("-H", "node1"))
    assert code == 0 and "the one host is this machine" in checks["torch over hosts", ""]["found"]
    cluster.cut("node2")
    code, checks = doctor(cluster, "--timeout", "5", hosts=("-H", "node2"))
    assert code == 1 and "too few are well" in checks["torch over hosts", ""]["found"]


def test_an_all_reduce_that_fails_has_its_reason(cluster, tmp_path):
    """Open MPI's daemon can't be run on one host, which no check before looks at."""
    nothing = tmp_path / "orted"
    nothing.write_text("")
    cluster.bind("node2", nothing, (BIN / "orted").resolve())
    code, checks = doctor(cluster)
    assert code == 1 and wrong(checks) == {("torch over hosts", "")}, [checks[key] for key in wrong(checks)]
    check = checks["torch over hosts", ""]
    assert "orted: Permission denied" in check["found"] and check["fix"].endswith("all_reduce torch 3 cpu"), check


@pytest.mark.long
def test_hosts_whose_gpus_differ(cluster, tmp_path):
    """Their drivers are stubs, and Horovod's library is one for CPUs to which a symbol of NCCL was added."""
    gpu_host.build(tmp_path)
    other, named = tmp_path / "other", tmp_path / "named"
    other.mkdir()
    gpu_host.build(other, {"libnccl.so.2": gpu_host.LIBRARIES["libnccl.so.2"].replace("22809", "22703")})
    (library,) = (SITE / "horovod/torch").glob("mpi_lib*.so")
    named.write_bytes(library.read_bytes() + b"ncclAllReduce")
    for host in NAMES:
        cluster.bind(host, named, library)
    cluster.bind("node2", other / "libnccl.so.2", tmp_path / "libnccl.so.2")
    code, checks = doctor(cluster, environment={"LD_LIBRARY_PATH": str(tmp_path)})
    over = checks["torch over hosts, GPUs", ""]
    expected = {("GPUs alike", "node2"), ("torch on GPUs", ""), ("torch over hosts, GPUs", "")}
    assert code == 1 and wrong(checks) == expected, [checks[key] for key in wrong(checks)]
    assert checks["GPUs alike", "node2"]["found"] == "NCCL 2.27.3, most others 2.28.9"
    assert all(checks["NCCL network", host]["found"] == f"sockets over {INTERFACE}" for host in NAMES)
    assert checks["GPUs", "node3"]["found"] == "1 × NVIDIA Stub 80GB of 80 GiB for 1 rank"
    assert "Horovod was built without NCCL" in over["found"] and over["found"].endswith("; without node2"), over


def down(cluster, place):
    cluster.cut("node2")


def no_key(cluster, place):
    (cluster.directory / "node2/home/.ssh/authorized_keys").write_text("")


def unknown_key(cluster, place):
    known = cluster.directory / "node1/home/.ssh/known_hosts"
    known.write_text("".join(line for line in known.read_text().splitlines(keepends=True) if "node2" not in line))


def other_key(cluster, place):
    known = cluster.directory / "node1/home/.ssh/known_hosts"
    known.write_text(known.read_text().replace("node2,", "").replace("node3,", "node3,node2,"))


def no_python(cluster, place):
    cluster.bind("node2", place, BIN)


def other_toolkit(cluster, place):
    changed = place / "world.py"
    changed.write_text((ROOT / "toolkit/world.py").read_text() + "# changed\n")
    cluster.bind("node2", changed, ROOT / "toolkit/world.py")


def other_torch(cluster, place):
    (folder,) = SITE.glob("torch-*.dist-info")
    changed = place / "METADATA"
    changed.write_text((folder / "METADATA").read_text().replace("\nVersion: 2.", "\nVersion: 1.", 1))
    cluster.bind("node2", changed, folder / "METADATA")


def clock_ahead(cluster, place):
    # A host has no clock of its own here: its Pythons are started with a `time.time` that is ahead.
    (hook,) = SITE.glob("distutils-precedence.pth")
    changed = place / hook.name
    changed.write_text(
        "import time; time.true = getattr(time, 'true', time.time); time.time = lambda t=time: t.true() + 90\n"
    )
    cluster.bind("node2", changed, hook)


def other_data(cluster, place):
    changed = place / "digits.csv.gz"
    changed.write_bytes(b"other")
    cluster.bind("node2", changed, SITE / "sklearn/datasets/data/digits.csv.gz")


def other_interface(cluster, place):
    for change in (["down"], ["name", "ib0"]):
        cluster.on("node2", "ip", "link", "set", INTERFACE, *change)
    cluster.on("node2", "ip", "link", "set", "ib0", "up")


def no_way_between(cluster, place):
    cluster.on("node2", "ip", "route", "add", "blackhole", f"{cluster.addresses['node3']}/32")


WITHOUT = "right on 2 ranks"  # and with "without node2"
ALL = "right on 3 ranks"
# The fault; which checks find it, and on which hosts; what they say; what they advise; what becomes of the all-reduce.
FAULTS = [
    (down, "ssh port", ["node2"], "no answer in 20 s|No route to host", "firewall", WITHOUT),
    (no_key, "ssh", ["node2"], "no login without a password", "ssh-copy-id node2", WITHOUT),
    (unknown_key, "ssh", ["node2"], "its host key is unknown", "`ssh node2`", WITHOUT),
    (other_key, "ssh", ["node2"], "its host key is not the one in known_hosts", "ssh-keygen -R node2", WITHOUT),
    (no_python, "python", ["node2"], "none that runs at", "the same environment", WITHOUT),
    (other_toolkit, "toolkit", ["node2"], "other source files", "the same commit", WITHOUT),
    (other_torch, "packages", ["node2"], "torch 1.", "pip freeze", WITHOUT),
    (clock_ahead, "clock", ["node2"], "90 s ahead of", "chronyc", ALL),
    (other_data, "data", ["node2"], "differs from this machine's: digits.csv.gz", "copy the files", ALL),
    (
        other_interface,
        "interface",
        ["node2"],
        "has ib0 (192.0.2.2/24); the others eth0",
        "btl_tcp_if_include 192.0.2.0/24",
        ALL,
    ),
    (no_way_between, "connections", ["node2", "node3"], "not reached at 192.0.2", "open all TCP ports", "too few"),
]
SHORT = (no_key, clock_ahead)


EACH = [
    pytest.param(*fault, id=fault[0].__name__, marks=[] if fault[0] in SHORT else [pytest.mark.long])
    for fault in FAULTS
]


@pytest.mark.parametrize(("fault", "name", "hosts", "found", "fix", "reduced"), EACH)
def test_a_fault_is_found_and_told(fault, name, hosts, found, fix, reduced, cluster, tmp_path):
    fault(cluster, tmp_path)
    known = (cluster.directory / "node1/home/.ssh/known_hosts").read_text()
    code, checks = doctor(cluster, "--timeout", "20")
    assert code == 1 and wrong(checks) == {(name, host) for host in hosts}, [checks[key] for key in wrong(checks)]
    for host in hosts:
        assert any(words in checks[name, host]["found"] for words in found.split("|")), checks[name, host]
        assert fix in checks[name, host]["fix"]
    over = checks["torch over hosts", ""]["found"]
    assert reduced in over and ("without node2" in over) == (reduced == WITHOUT), over
    assert (cluster.directory / "node1/home/.ssh/known_hosts").read_text() == known
    assert checks["ssh", "node3"]["ok"] and checks["toolkit", "node3"]["ok"]  # the others are looked at all the same
