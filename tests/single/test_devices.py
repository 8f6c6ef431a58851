"""Which GPU a worker takes, and whether all workers' suit each other; the driver is a stub."""

import os
import re
import subprocess
import sys

import pytest

from tests import launching
from tests.single import gpu_host
from toolkit import devices
from toolkit.devices import Place
from toolkit.errors import UsageError
from toolkit.world import World


@pytest.mark.parametrize(
    ("asked", "local_rank", "visible", "taken"),
    [
        ("cpu", 0, 4, None),
        ("auto", 0, 0, None),
        ("auto", 2, 4, 2),
        ("gpu", 1, 4, 1),
        ("gpu", 3, 1, 0),
        ("gpu", 5, 4, 1),
    ],
)
def test_the_gpu_of_the_local_rank(asked, local_rank, visible, taken):
    assert devices.choose(asked, World(local_rank=local_rank), visible) == taken


@pytest.mark.parametrize(("asked", "said"), [("gpu", "sees no GPU: look at"), ("tpu", "'tpu': give one of auto")])
def test_no_gpu_or_no_such_device(asked, said):
    with pytest.raises(UsageError, match=said):
        devices.choose(asked, World(), 0)


def on(host, gpu="", bus=""):
    return Place(f"a worker on {host}", host, gpu, bus)


@pytest.mark.parametrize(
    ("places", "share", "why_not"),
    [
        ([on("a", "1", "01"), on("a", "2", "02"), on("b", "3", "01")], False, None),
        ([on("a", "1", "01")], False, None),
        ([on("a", "1", "01"), on("a", "2", "02")], True, None),
        ([on("a"), on("b")], False, "on CPUs"),
        ([on("a", "1", "01"), on("a", "1", "01")], True, "share a GPU"),
        ([on("a", "1", "01"), on("a", "2", "01")], False, r"parts of the same GPU \(MIG\), which NCCL refuses"),
        ([on("b", "9", "01"), on("a", "1", "01"), on("a", "2", "01")], True, "parts of the same GPU"),
    ],
)
def test_whether_nccl_serves_all_workers(places, share, why_not):
    found = devices.check(places, share)
    assert found is None if why_not is None else re.search(why_not, found)


@pytest.mark.parametrize(
    ("places", "with_nccl", "why_not"),
    [
        ([on("a", "1"), on("a", "2"), on("b", "1")], True, None),
        (
            [on("a", "1"), on("b", "1"), on("b", "1")],
            True,
            r"^2 workers on b and 1 GPU\(s\): start as many .* --share-gpus",
        ),
        ([on("a", "1"), on("a", "2"), on("a", "1")], True, r"^3 workers on a and 2 GPU\(s\)"),
        ([on("a", "1")], False, "^Horovod was built without NCCL: `make setup GPU=1`"),
        ([on("a"), on("a"), on("b")], False, None),
        ([on("a"), on("a"), on("b", "1")], True, None),  # it is for `check` to say that a host lacks its GPUs
    ],
)
def test_whether_workers_that_may_choose_take_gpus(places, with_nccl, why_not):
    found = devices.why_not_auto(places, with_nccl)
    assert found is None if why_not is None else re.search(why_not, found)


@pytest.mark.parametrize(
    ("places", "share", "said"),
    [
        ([on("a", "1", "01"), on("b")], True, "a worker on b has no GPU of its own, and other workers have"),
        ([on("a", "1", "01"), on("a", "1", "01")], False, r"2 workers on a and 1 GPU\(s\): .* --share-gpus"),
    ],
)
def test_workers_that_do_not_suit_each_other(places, share, said):
    with pytest.raises(UsageError, match=said):
        devices.check(places, share)


def test_the_driver_tells_uuid_and_place_or_is_named(tmp_path):
    gpu_host.build(tmp_path)
    asked = "from toolkit import devices\nfor n in (0, 1): print(*devices.identity(n))"

    def told(folder, **answers):
        environment = {**os.environ, "LD_LIBRARY_PATH": str(folder), **answers}
        return subprocess.run([sys.executable, "-c", asked], capture_output=True, text=True, env=environment)

    first, second = (bytes(range(begin, begin + 16)).hex() for begin in (0, 16))
    assert told(tmp_path).stdout.split() == [first, "0000:01:00.0", second, "0000:02:00.0"]
    assert told(tmp_path, STUB_BUS="0000:8a:00.0|0000:8a:00.0").stdout.count("0000:8a:00.0") == 2
    assert "UsageError: CUDA's driver does not tell of GPU 0 (error 802)" in told(tmp_path, STUB_INIT="802").stderr
    (tmp_path / "none").mkdir()
    (tmp_path / "none" / "libcuda.so.1").write_text("no library")
    assert "UsageError: CUDA's driver can't be asked for GPU 0" in told(tmp_path / "none").stderr


def test_what_the_tests_launch_sees_no_gpu_but_for_those_on_gpus(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    assert launching.clean_environment()["CUDA_VISIBLE_DEVICES"] == ""
    monkeypatch.setattr(launching, "hides_gpus", False)
    assert launching.clean_environment()["CUDA_VISIBLE_DEVICES"] == "3"
