"""`hvdkit doctor` as a user runs it on this machine: well, and with a fault planted."""

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pytest

from tests.launching import BIN, MARK, ROOT, clean_environment, kill_marked, marked, some_long
from tests.single import gpu_host
from toolkit import launch
from toolkit.doctor import measure, probe
from toolkit.tuning import usable_cores

FRAMEWORKS = [name for name in ("torch", "tensorflow") if probe.package(name, probe.PACKAGES[name])]
SHORTEST = FRAMEWORKS[0]  # to import
HOROVOD = Path(probe.package("horovod", ("horovod",))[1])


# As the script `hvdkit`, which does not look for modules in its working directory.
HVDKIT = f"import sys; sys.path[:1] = [{str(ROOT)!r}]; from toolkit.cli import main; sys.exit(main())"


def begin(*options, environment=None, cwd=ROOT):
    mark = uuid.uuid4().hex
    line = [sys.executable, "-c", HVDKIT, "doctor", *map(str, options)]
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    full = {**clean_environment(), "PYTHONPATH": path, **(environment or {}), MARK: mark}
    process = subprocess.Popen(
        line,
        env=full,
        cwd=cwd,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),  # which nohup may have changed for these tests
    )
    return process, mark


def doctor(*options, environment=None, cwd=ROOT):
    process, mark = begin(*options, environment=environment, cwd=cwd)
    try:
        out, err = process.communicate(timeout=400)
    finally:
        left = kill_marked(mark, grace=10)
    assert not left, f"still running 10 s after the end: {left}"
    assert not err.strip()
    return process.returncode, out


def checks_of(out):
    return {check["name"]: check for check in json.loads(out)["checks"]}


def wrong(checks):
    return {name for name, check in checks.items() if check["ok"] is False}


def test_this_machine_is_well(tmp_path):
    """In a directory with a package of Horovod's name."""
    (tmp_path / "horovod").mkdir()
    (tmp_path / "horovod/__init__.py").write_text("raise RuntimeError('it is not this one that is wanted')")
    code, out = doctor("--json", cwd=tmp_path)
    checks = checks_of(out)
    scarce = wrong(checks) & {"/dev/shm", "working directory"}  # a container has little of them
    assert wrong(checks) == scarce and code == bool(scarce) and json.loads(out)["ok"] is not bool(scarce), out
    for framework in FRAMEWORKS:
        assert checks[framework]["ok"] and checks[f"horovod for {framework}"]["ok"]
        assert re.match(r"right on 2 ranks \(CPU\); (1|16) MiB", checks[f"{framework} all-reduce"]["found"])
    assert all(checks[name]["ok"] for name in ("mpirun", "MPI of horovod", "MPI of mpi4py", "cores"))


@pytest.mark.long
def test_a_machine_with_gpus_and_a_horovod_for_cpus(tmp_path):
    """Whose driver is a stub."""
    gpu_host.build(tmp_path)
    environment = {"LD_LIBRARY_PATH": str(tmp_path), "STUB_GPUS": "NVIDIA Stub|NVIDIA Stub"}
    code, out = doctor("--json", "--framework", SHORTEST, environment=environment)
    checks = checks_of(out)
    assert not wrong(checks) - {"/dev/shm", "working directory"}, out
    assert checks["GPU driver"]["ok"] and checks["GPUs"]["found"] == "2 × NVIDIA Stub of 80 GiB"
    assert checks["GPUs"]["fix"] == "to train on them: make setup GPU=1" and "(CPU)" in out and "NCCL" not in out
    assert "nvcc" in checks["compilers"]["found"]


@pytest.mark.skipif(bool(probe.gpu_build()), reason="Horovod was built with NCCL here")
def test_an_all_reduce_on_gpus_without_nccl_says_so():
    mpirun = launch.find("mpirun", os.environ)
    check = asyncio.run(measure.check(SHORTEST, (), {}, mpirun, [2]))
    assert check.ok is False and check.name == f"{SHORTEST} all-reduce, GPUs"
    assert check.found.endswith("RuntimeError: Horovod was built without NCCL") and "NCCL_DEBUG=INFO" in check.fix


def program(folder, name, text):
    path = folder / name
    path.write_text(text)
    path.chmod(0o755)


def test_another_mpirun_first_on_the_path(tmp_path):
    """Told in plain ASCII, as this terminal has no other characters."""
    program(tmp_path, "mpirun", "#!/bin/sh\necho 'mpirun (Open MPI) 5.0.11'\n[ $# = 1 ] || exit 213\n")
    environment = {"PATH": f"{tmp_path}{os.pathsep}{BIN}{os.pathsep}{os.environ['PATH']}", "PYTHONIOENCODING": "ascii"}
    code, out = doctor("--framework", SHORTEST, environment=environment)
    assert code == 1 and out.isascii()
    lines = out.splitlines()
    for name in ("MPI of horovod", "MPI of mpi4py"):
        (at,) = [number for number, line in enumerate(lines) if line.startswith(f"FAIL {name}")]
        assert f"mpirun is Open MPI 5.0 at {tmp_path}/mpirun" in lines[at]
        assert lines[at + 1].startswith("    fix: ") and f"{BIN}" in lines[at + 1]
    assert any(line.startswith(f"FAIL {SHORTEST} all-reduce") and "exit code 213" in line for line in lines)


def test_an_mpirun_of_another_kind(tmp_path):
    program(tmp_path, "mpirun", "#!/bin/sh\necho 'mpirun (Other MPI) 1.0'\n")
    environment = {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
    code, out = doctor("--json", "--framework", SHORTEST, environment=environment)
    checks = checks_of(out)
    assert code == 1 and {"mpirun", f"{SHORTEST} all-reduce"} == wrong(checks)
    assert "expected Open MPI 4 or 5, or MPICH" in checks["mpirun"]["found"]


def horovod_with(place, change):
    """The installed Horovod, of links, but telling of another build."""
    copy = place / "horovod"
    copy.mkdir()
    for entry in HOROVOD.iterdir():
        (copy / entry.name).symlink_to(entry)
    told = json.loads((HOROVOD / "metadata.json").read_text())
    (copy / "metadata.json").unlink()
    (copy / "metadata.json").write_text(json.dumps({**told, **change} if change else {}))
    return copy


KEY = {"torch": "pytorch", "tensorflow": "tensorflow"}[SHORTEST]
# What Horovod's library finds beside itself where it is not a link's target.
LIBRARIES = os.pathsep.join(filter(None, [str(Path(sys.prefix, "lib")), os.environ.get("LD_LIBRARY_PATH", "")]))


@pytest.mark.parametrize("loads", [True, pytest.param(False, marks=pytest.mark.long)])
def test_a_framework_upgraded_after_the_build(loads, tmp_path):
    copy = horovod_with(tmp_path, {KEY: "0.0.1"})
    if not loads:  # as with a symbol that the framework no longer has
        inner = copy / SHORTEST
        inner.unlink()
        inner.mkdir()
        for entry in (HOROVOD / SHORTEST).iterdir():
            (inner / entry.name).symlink_to(entry)
        (library,) = inner.glob("mpi_lib_v2.*" if SHORTEST == "torch" else "mpi_lib.*")
        library.unlink()
        library.write_bytes(b"")
    path = {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}", "LD_LIBRARY_PATH": LIBRARIES}
    code, out = doctor("--json", "--framework", SHORTEST, environment=path)
    checks = checks_of(out)
    check = checks[f"horovod for {SHORTEST}"]
    assert code == 1 and check["ok"] is False, out
    assert f"built for {SHORTEST} 0.0.1, and " in check["found"] and "python -m toolkit.horovod_build" in check["fix"]
    assert ("by luck it can be imported" if loads else "can't be imported: ") in check["found"]
    assert checks[f"{SHORTEST} all-reduce"]["ok"] is loads, checks[f"{SHORTEST} all-reduce"]


@pytest.mark.long
def test_a_build_that_does_not_tell_what_it_is_for(tmp_path):
    horovod_with(tmp_path, {})
    path = {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}", "LD_LIBRARY_PATH": LIBRARIES}
    code, out = doctor("--json", "--framework", SHORTEST, environment=path)
    checks = checks_of(out)
    assert not wrong(checks) - {"/dev/shm", "working directory"}, out
    assert "it does not tell" in checks[f"horovod for {SHORTEST}"]["found"]
    assert checks[f"{SHORTEST} all-reduce"]["ok"]


@pytest.mark.long
def test_more_ranks_than_cores():
    cores = usable_cores()
    code, out = doctor("--json", "--framework", SHORTEST, "-np", cores + 1)
    check = checks_of(out)["cores"]
    assert code == 1 and not check["ok"] and f"for {cores + 1} ranks" in check["found"]


@pytest.mark.parametrize("number", some_long([signal.SIGTERM, signal.SIGHUP, signal.SIGINT], short=[signal.SIGTERM]))
def test_told_to_stop_it_leaves_nothing(number):
    process, mark = begin("--framework", SHORTEST)
    try:
        end = time.monotonic() + 300
        while not (begun := any("all_reduce" in line for line in marked(mark).values())) and time.monotonic() < end:
            time.sleep(0.05)
        assert begun and process.poll() is None
        process.send_signal(number)
        _, err = process.communicate(timeout=60)
    finally:
        left = kill_marked(mark, grace=10)
    assert not left and process.returncode == 128 + number and not err.strip(), err
