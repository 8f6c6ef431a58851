"""Doctor on hosts with GPUs, whose driver and NCCL are stubs: what it says of each fault."""

import ctypes
import json
import os
import re
import sys
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.single import gpu_host
from tests.single.test_doctor import mutated
from toolkit.doctor import all_reduce, environment, gpu_probe, gpus, hosts, imports, measure, nccl, on_gpus, probe
from toolkit.doctor.checks import lines
from toolkit.doctor.peer import NoAnswer

FACTS = probe.facts(os.getcwd())
STUBS = ("STUB_", "NCCL_", "CUDA_VISIBLE_DEVICES")


@pytest.fixture(scope="module")
def libraries(tmp_path_factory):
    folder = tmp_path_factory.mktemp("libraries")
    gpu_host.build(folder)
    return folder


@pytest.fixture
def look(libraries, monkeypatch):
    """The facts of a host whose Horovod has NCCL, with the stubs' answers in its environment."""
    for name in [name for name in os.environ if name.startswith(STUBS)]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("LD_LIBRARY_PATH", str(libraries))

    def looked(built=("torch",), **answers):
        for name, value in answers.items():
            monkeypatch.setenv(name, value)
        found = {**FACTS, "gpu_build": list(built), "gpus": probe.gpus(), "interfaces": {"eth0": ["10.0.0.1/24"]}}
        return json.loads(json.dumps(found))

    return looked


def wrong(checks):
    return {check.name: check for check in checks if check.ok is False}


FOUR = "|".join(["NVIDIA Stub 80GB"] * 4)


def test_a_host_that_is_well(look):
    facts = look(STUB_GPUS=FOUR)
    driver, count, peers, network = gpus.of_host(facts, "", 4)
    assert driver.ok and driver.found == "580.1.2, which serves CUDA 13.0"
    assert count.ok and count.found == "4 × NVIDIA Stub 80GB of 80 GiB for 4 ranks"
    assert peers.ok and network.ok and network.found == "sockets over eth0"
    assert facts["gpus"]["nccl"] == ["2.28.9"]


@pytest.mark.parametrize(
    ("answers", "ranks", "name", "found", "fix"),
    [
        ({"STUB_INIT": "802"}, 1, "GPU driver", r"can't be used: CUDA_ERROR_OF_THE_STUB \(802\)", "fabricmanager"),
        ({"STUB_INIT": "803"}, 1, "GPU driver", r"\(803\)", "restart the host after an upgrade"),
        ({"STUB_INIT": "804"}, 1, "GPU driver", r"\(804\)", "compatibility package"),
        ({"STUB_INIT": "34"}, 1, "GPU driver", r"\(34\)", "out of LD_LIBRARY_PATH"),
        ({"STUB_INIT": "999"}, 1, "GPU driver", r"\(999\)", "nvidia_uvm"),
        ({"STUB_INIT": "214"}, 1, "GPU driver", r"\(214\)", "dmesg"),
        ({"STUB_CRASH": "1"}, 1, "GPU driver", "can't be asked: exit code -6", "dmesg"),
        ({"STUB_HANG": "1"}, 1, "GPU driver", "can't be asked: no answer in 1 s", "dmesg"),
        ({"STUB_INIT": "100", "CUDA_VISIBLE_DEVICES": "9"}, 1, "GPUs", "CUDA_VISIBLE_DEVICES is '9'", "nvidia-smi -L"),
        ({"STUB_INIT": "100"}, 1, "GPUs", "none is visible here", "--gpus-per-node"),
        ({"STUB_MODE": "2"}, 1, "GPUs", "compute mode of 0: Prohibited", "nvidia-smi -i 0 -c DEFAULT"),
        ({}, 2, "GPUs", "1 × NVIDIA Stub 80GB of 80 GiB for 2 ranks", "plan 1 there, by .* --share-gpus$"),
        ({"STUB_MODE": "3"}, 2, "GPUs", "for 2 ranks", "once .nvidia-smi -c DEFAULT"),
        (
            {"NCCL_SOCKET_IFNAME": "ib0"},
            1,
            "NCCL network",
            "no interface of NCCL_SOCKET_IFNAME=ib0: .* eth0",
            "--interface",
        ),
    ],
)
def test_each_fault_is_named_and_nothing_else(answers, ranks, name, found, fix, look, monkeypatch):
    monkeypatch.setattr(probe, "_GPU_SECONDS", 1 if "STUB_HANG" in answers else 60)
    facts = look(**answers)
    bad = wrong(gpus.of_host(facts, "", ranks))
    assert list(bad) == [name], bad
    assert re.search(found, bad[name].found) and re.search(fix, bad[name].fix), bad[name]
    facts["gpu_build"] = []  # who trains on CPUs is not bothered
    assert not wrong(gpus.of_host(facts, "", ranks))


def test_an_old_driver_for_the_environments_cuda(look):
    facts = look(STUB_VERSION="12080")
    facts["gpus"]["runtimes"] = ["12.8.90", "13.0.96"]
    bad = wrong(gpus.of_host(facts, "", 1))
    assert bad["GPU driver"].found == "580.1.2, which serves CUDA 12.8; the environment's CUDA is 13.0.96"
    assert "driver 580 or later" in bad["GPU driver"].fix and "built for CUDA 12" in bad["GPU driver"].fix
    facts["gpus"]["runtimes"] = ["12.9.79"]  # newer than the driver, of the same major version: it serves that
    assert not wrong(gpus.of_host(facts, "", 1))


def test_pairs_without_peer_access(look):
    (check,) = (check for check in gpus.of_host(look(STUB_GPUS=FOUR, STUB_APART="01"), "", 4) if "peer" in check.name)
    assert check.ok is None and check.found == "not between 1 of 6 pairs of GPUs: 0-1" and "topo -m" in check.fix


def test_without_a_gpu_there_is_no_check():
    none = {**FACTS, "gpus": {}, "gpu_build": ["torch"]}
    assert gpus.of_host({**none, "gpu_build": []}, "", 4) == [] == gpus.alike({"a": {**none, "gpu_build": []}}, None)
    (check,) = gpus.of_host(none, "", 4)  # the build was for GPUs: one quiet line
    assert check.ok is None and "on the CPU" in check.found


def kernel(folder, **files):
    """A /sys with these files."""
    for path, text in files.items():
        file = folder / path.replace("__", "/")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text + "\n")
    return str(folder)


def test_hardware_without_a_driver(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_probe.ctypes, "CDLL", lambda name: (_ for _ in ()).throw(OSError(f"{name}: no such file")))
    pci = "bus__pci__devices__"
    system = kernel(tmp_path, **{f"{pci}0__vendor": "0x10de", f"{pci}0__class": "0x030200"})
    kernel(tmp_path, **{f"{pci}1__vendor": "0x10de", f"{pci}1__class": "0x068000"})  # a bridge of NVIDIA's
    kernel(tmp_path, **{f"{pci}2__vendor": "0x1af4", f"{pci}2__class": "0x030000"})  # another's graphics
    facts = {**FACTS, "gpus": gpu_probe.facts(system), "gpu_build": ["torch"]}
    (check,) = gpus.of_host(facts, "", 1)
    assert check.ok is False and "none, and 1 of NVIDIA's GPUs on the PCI bus (libcuda.so.1: no such" in check.found
    assert "docker run --gpus all" in check.fix
    assert gpus.of_host({**facts, "gpu_build": []}, "", 1)[0].ok is None
    assert gpu_probe.facts(kernel(tmp_path / "other")) == {}


@pytest.mark.parametrize(
    ("names", "wanted", "taken"),
    [
        (["eth0", "docker0"], "", ["eth0"]),
        (["eth0", "eth1", "virbr0"], "", ["eth0", "eth1"]),
        (["eth0", "ib0"], "", ["ib0"]),
        (["docker0"], "", ["docker0"]),
        ([], "", ["lo"]),
        (["eth0", "eth1", "ib0"], "eth", ["eth0", "eth1"]),
        (["eth0", "eth01"], "=eth0", ["eth0"]),
        (["eth0", "docker0"], "^docker,lo", ["eth0"]),
        (["eth0", "eth01"], "^=eth0", ["eth01", "lo"]),
        (["eth0"], "ib", []),
    ],
)
def test_the_sockets_that_nccl_takes(names, wanted, taken):
    """Against its documentation of NCCL_SOCKET_IFNAME, whose examples these are."""
    assert nccl.sockets(names, wanted) == taken


def network(ports=(("mlx5_0", "InfiniBand", "400 Gb/sec (4X NDR)"),), **settings):
    told = {"interfaces": ("eth0",), "verbs": True, "plugin": False, "lockable": -1}
    for name in [name for name in settings if name in told]:
        told[name] = settings.pop(name)
    return nccl.Network(ports=tuple(ports), settings=settings, **told)


ROCE = (("mlx5_0", "Ethernet", "100 Gb/sec"), ("mlx5_1", "Ethernet", "100 Gb/sec"))


@pytest.mark.parametrize(
    ("there", "host", "kind", "ok", "found"),
    [
        (network(), "a", "InfiniBand", True, "mlx5_0 (InfiniBand, 400 Gb/sec (4X NDR)); NCCL's ranks meet over eth0"),
        (network(ROCE), "a", "RoCE", True, "mlx5_0 (Ethernet, 100 Gb/sec), mlx5_1"),
        (network(ROCE, NCCL_IB_HCA="=mlx5_1:1"), "a", "RoCE", True, "mlx5_1 (Ethernet, 100 Gb/sec); "),
        (network(NCCL_IB_DISABLE="1"), "a", "sockets", True, "sockets over eth0; NCCL's variables leave mlx5_0 out"),
        (network(NCCL_NET="Socket"), "a", "sockets", True, "leave mlx5_0 out"),
        (network(verbs=False), "a", "sockets", None, "left out for want of libibverbs.so.1"),
        (network(lockable=8 << 20), "a", "InfiniBand", None, "only 8192 KiB of memory may be locked"),
        (network(plugin=True), "a", "plugin", True, "the plugin libnccl-net.so"),
        (network(plugin=True, NCCL_NET_PLUGIN="none"), "a", "InfiniBand", True, "mlx5_0"),
        (network((), interfaces=("docker0",)), "a", "sockets", False, "only docker0, which no other host reaches"),
        (network((), interfaces=("docker0",)), "", "sockets", True, "sockets over docker0"),
        (network((), NCCL_SOCKET_IFNAME="ib"), "", "none", False, "NCCL_SOCKET_IFNAME=ib: there is eth0"),
    ],
)
def test_the_network_that_nccl_takes(there, host, kind, ok, found):
    check = nccl.check(there, host, None)
    assert nccl.kind(there, None) == kind and check.ok is ok and found in check.found, check
    assert check.fix or ok


def test_the_interface_that_a_user_names_comes_first():
    there = network((), interfaces=("eth0", "eth1"), NCCL_SOCKET_IFNAME="eth0")
    assert nccl.check(there, "a", "eth1").found == "sockets over eth1"


def test_rdma_ports_and_nccls_files(tmp_path, monkeypatch):
    monkeypatch.setenv("NCCL_IB_DISABLE", "0")
    rdma = "class__infiniband__"
    told = {"state": "4: ACTIVE", "link_layer": "InfiniBand", "rate": "400 Gb/sec (4X NDR)"}
    system = kernel(tmp_path, **{f"{rdma}mlx5_0__ports__1__{name}": text for name, text in told.items()})
    kernel(tmp_path, **{f"{rdma}mlx5_1__ports__1__state": "1: DOWN"})
    (tmp_path / "etc").write_text("NCCL_SOCKET_IFNAME=eth7\nNCCL_IB_DISABLE=1\nNCCL_DEBUG=INFO\n")
    assert gpu_probe._ports(system) == [["mlx5_0", "InfiniBand", "400 Gb/sec (4X NDR)"]]
    monkeypatch.delenv("NCCL_SOCKET_IFNAME", raising=False)
    found = gpu_probe._settings((str(tmp_path / "none"), str(tmp_path / "etc")))
    assert found == {"NCCL_SOCKET_IFNAME": "eth7", "NCCL_IB_DISABLE": "0"}


@pytest.mark.parametrize(
    ("change", "ok", "found"),
    [
        ({}, True, "NCCL 2.28.9, network sockets, driver 580.1.2, GPUs 1 × NVIDIA Stub 80GB of 80 GiB"),
        ({"nccl": ["2.27.3"]}, False, "NCCL 2.27.3, most others 2.28.9"),
        ({"ports": [["mlx5_0", "InfiniBand", "1"]], "verbs": True}, False, "network InfiniBand, most others sockets"),
        ({"driver": "570.1"}, None, "driver 570.1, most others 580.1.2"),
        ({"driver": "570.1", "nccl": []}, False, "NCCL none, most others 2.28.9; driver 570.1"),
        ({"gpus": [{"name": "Old", "memory": 1 << 34, "mode": 0}]}, None, "GPUs 1 × Old of 16 GiB"),
        ({"gpus": []}, False, "none that can be used, and other hosts have"),
        (None, False, "none that can be used, and other hosts have"),
    ],
)
def test_hosts_that_differ(change, ok, found, look):
    facts = look()
    other = {**facts, "gpus": {} if change is None else {**facts["gpus"], **change}}
    one, two, three = gpus.alike({"a": facts, "b": other, "c": facts}, None)
    assert one.ok and three.ok and two.host == "b" and two.ok is ok and found in two.found, two
    assert two.fix or ok


def test_facts_of_another_form_are_refused(look):
    facts = look()
    assert not wrong(hosts.judge(facts, facts, "b", 1))
    for name in ("on_bus", "serves", "error", "gpus", "apart", "ports", "lockable", "settings"):
        with pytest.raises(NoAnswer, match="form"):
            hosts.judge(facts, {**facts, "gpus": {**facts["gpus"], name: [[1]]}}, "b", 1)


TOLD = {
    **dict.fromkeys(("on_bus", "serves", "lockable"), 1),
    **dict.fromkeys(("driver", "visible"), "x"),
    **dict.fromkeys(("verbs", "plugin"), True),
    "error": [999, "x"],
    "gpus": [{"name": "x", "memory": 1, "mode": 0}] * 2,
    "apart": [[0, 1]],
    "runtimes": ["13.0"],
    "nccl": ["2.28.9"],
    "ports": [["x", "y", "z"]],
    "settings": {"NCCL_NET": "IB"},
}


@settings(max_examples=300)
@given(st.data())
def test_any_facts_of_gpus_are_refused_or_can_be_compared(data):
    facts = {**FACTS, "gpu_build": ["torch"], "gpus": mutated(data.draw, {**TOLD, "error": None})}
    here = {**FACTS, "gpu_build": ["torch"], "gpus": TOLD}
    try:
        checks = hosts.judge(here, facts, "a", 2)
    except NoAnswer:
        return
    lines([*checks, *gpus.alike({"a": facts, "b": here, "c": here}, None)], plain=True)


def test_a_horovod_with_nccl_by_its_library(tmp_path, monkeypatch):
    for name, symbol in (("torch", b"\0ncclAllReduce\0"), ("tensorflow", b"\0NCCL_ALLREDUCE\0")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "mpi_lib.x.so").write_bytes(symbol)
    monkeypatch.setattr(probe, "_place", lambda name: str(tmp_path))
    assert probe.gpu_build() == ["torch"]
    here, there = {**FACTS, "gpu_build": []}, {**FACTS, "gpu_build": ["torch"]}
    (check,) = (check for check in hosts.judge(here, there, "b", 1) if check.name == "packages")
    assert check.ok is False and "horovod with NCCL for torch, here for nothing" in check.found


WELL = {"version": "13.0", "gpus": 1, "wrong": ""}
NCCL = {"built": 22809, "loaded": {"/x/libnccl.so.2": 22809}}


@pytest.mark.parametrize(
    ("cuda", "with_nccl", "bad", "found"),
    [
        (WELL, NCCL, "", "built for CUDA 13.0, adds up right on 1 of 1"),
        ({**WELL, "version": None, "gpus": 0}, NCCL, "torch on GPUs", "a build without CUDA"),
        ({**WELL, "gpus": 0}, NCCL, "torch on GPUs", "built for CUDA 13.0, and sees 0 of 1 GPUs"),
        ({**WELL, "wrong": "RuntimeError: no kernel image"}, NCCL, "torch on GPUs", "no kernel image"),
        (WELL, {**NCCL, "loaded": {"/x/n": 22703}}, "NCCL for torch", "2.27.3 in /x/n; built with 2.28.9"),
        (WELL, {**NCCL, "loaded": {}}, "NCCL for torch", "none is loaded; built with 2.28.9"),
        (WELL, {**NCCL, "loaded": {"/x/n": 23004, "/y/n": 22809}}, "", "2.30.4 in /x/n and 2.28.9 in /y/n"),
    ],
)
def test_frameworks_on_gpus(cuda, with_nccl, bad, found, look):
    facts = look()
    checks = on_gpus.checks(facts, {"torch": {"cuda": cuda, "horovod.torch": {"ok": True}, "nccl": with_nccl}})
    assert list(wrong(checks)) == ([bad] if bad else []) and any(found in check.found for check in checks), checks
    assert on_gpus.ready("torch", facts, checks) == (0 if bad else 1)


def test_a_horovod_without_nccl_on_a_host_with_gpus(look):
    facts = look(built=())
    assert on_gpus.checks(facts, {"torch": {"cuda": WELL, "horovod.torch": {"ok": True}}}) == []
    facts["gpu_build"] = ["torch"]
    (check,) = on_gpus.checks(facts, {"tensorflow": {"cuda": {"version": None, "gpus": 0, "wrong": ""}}})
    assert check.ok is None and check.found == "a build without CUDA" and not on_gpus.ready("torch", facts, [check])
    facts["gpu_build"] = []
    (count,) = (check for check in gpus.of_host(facts, "", 4) if check.name == "GPUs")
    assert count.ok and count.fix == "to train on them: make setup GPU=1"


def test_nothing_is_said_of_gpus_where_there_are_none():
    told = {"torch": {"cuda": {"version": "13.0", "gpus": 0, "wrong": ""}, "horovod.torch": {"ok": True}}}
    assert on_gpus.checks({**FACTS, "gpus": {}, "gpu_build": []}, told) == []


def test_the_library_that_is_loaded(libraries, monkeypatch):
    library = ctypes.CDLL(str(libraries / "libnccl.so.2"))
    assert imports._loaded(r"libnccl\.so\S*") == [str(libraries / "libnccl.so.2")] and library
    monkeypatch.setitem(sys.modules, "horovod.torch", SimpleNamespace(nccl_built=lambda: 22703))
    told = imports._nccl("torch")["nccl"]
    assert told == {"built": 22703, "loaded": {str(libraries / "libnccl.so.2"): 22809}}
    monkeypatch.setitem(sys.modules, "horovod.torch", SimpleNamespace(nccl_built=lambda: 0))
    assert imports._nccl("torch") == {}


def test_messages_lie_where_they_are_put():
    """A device of one's own: arrays go there and back, and nothing but its tensors are summed."""
    largest = []

    def reduce(data, name):
        assert list(data) == ["there"]
        largest.append(data["there"].nbytes)
        return {"there": data["there"] * (3 if name == "right" else 1)}

    memory = all_reduce.Memory(lambda array: {"there": array}, lambda it: it["there"], all_reduce.LARGE_ON_GPU)
    assert all_reduce.measure(reduce, 0, 2, memory)["bytes"] == max(largest) == 256 << 20


def test_bandwidths_on_gpus():
    told = {"bytes": 256 << 20, "seconds": 0.002, "latency": 0.0005, "device": "gpu"}
    said = measure.described({**told, "ranks": 4})
    assert said.startswith("right on 4 ranks (GPU, by NCCL); 256 MiB in 2 ms: algorithm bandwidth 1.3e+02 GB/s, bus")
    assert "bus bandwidth 0 GB/s" in measure.described({**told, "ranks": 1})


def test_env_tells_of_gpus(look, monkeypatch):
    facts = look(STUB_GPUS=FOUR)
    monkeypatch.setattr(probe, "facts", lambda directory: facts)
    found = environment.report({"CUDA_VISIBLE_DEVICES": "0,1"})
    assert found["GPU driver"] == "580.1.2, serves CUDA 13.0" and found["NCCL"] == "2.28.9"
    assert found["GPUs"] == "4 × NVIDIA Stub 80GB of 80 GiB" and found["$CUDA_VISIBLE_DEVICES"] == "0,1"
    monkeypatch.setattr(probe, "facts", lambda directory: {**facts, "gpus": {}})
    assert not {"GPUs", "NCCL", "GPU driver"} & set(environment.report({}))
