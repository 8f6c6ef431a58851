"""The build for GPUs, for real, in an environment of its own: `make test-gpu-build`; no GPU is needed.

Downloads some GB once and takes some minutes. It is in `build/gpu-<framework>`; a second run builds there anew, and
downloads nothing.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
RANKS = 2


def parse_arguments():
    parser = argparse.ArgumentParser(prog="make test-gpu-build", description=__doc__)
    parser.add_argument("--framework", choices=("torch", "tensorflow"), default="torch")
    parser.add_argument("--arch", default="90", help="compute capabilities to build for")
    return parser.parse_args()


def run(command, environment, shown=False):
    """Run `command` and return its exit code and output, which is shown meanwhile if `shown`."""
    lines = []
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ) as process:
        for line in process.stdout:
            lines.append(line)
            if shown:
                print(f"  {line}", end="", flush=True)
    return process.returncode, "".join(lines)


def checked(command, environment, what):
    """Return the output of `command`; end with it where it failed."""
    code, output = run(["timeout", "1800", *command], environment)
    if code != 0:
        sys.exit(f"{what} ended with {code}:\n{output}")
    return output


def tell(holds, what):
    """Print what holds, or end with what does not."""
    if not holds:
        sys.exit(f"✗ {what}")
    print(f"✓ {what}", flush=True)


def set_up(setup, environment):
    """Set up as a user does, doing what a refusal of the framework's CPU build says."""
    code, output = run(setup, environment, shown=True)
    advice = re.search(r"was built without CUDA.* run `([^`]+)`", output)
    if code != 0 and advice:
        print(f"  {advice[1]}", flush=True)
        checked(["bash", "-c", advice[1]], environment, "What the refusal says to run")
        code, output = run(setup, environment, shown=True)
    tell(code == 0, " ".join(setup))


def main():
    """Set up, then look at what was built, each thing in a line."""
    options = parse_arguments()
    folder = ROOT / "build" / f"gpu-{options.framework}"
    venv, cache = folder / "venv", folder / "cache"
    shutil.rmtree(cache, ignore_errors=True)
    left_out = ("LD_LIBRARY_PATH", "MAKEFLAGS", "MFLAGS", "MAKELEVEL", "MAKEOVERRIDES", "PYTHONPATH", "VIRTUAL_ENV")
    environment = {name: value for name, value in os.environ.items() if name not in left_out}
    environment |= {"HVDKIT_CACHE": str(cache), "CUDA_VISIBLE_DEVICES": "", "TF_CPP_MIN_LOG_LEVEL": "3"}
    for stamp in (*venv.glob("hvdkit-setup-*"), *venv.glob("etc/hvdkit-horovod.json")):
        stamp.unlink()
    chosen = [f"FRAMEWORKS={options.framework}", f"GPU_ARCH={options.arch}", f"VENV={venv}"]
    set_up(["make", "setup", "GPU=1", *chosen], environment)

    def activated(command):
        return ["bash", "-c", f'source "{venv}/bin/activate" && {command}']

    wheels = list(cache.glob("wheels/*/horovod-*.whl"))
    tell(len(wheels) == 1, f"one wheel was built: {wheels[0].name}, {wheels[0].stat().st_size / 1e6:.1f} MB")
    report = checked(activated("horovodrun --check-build"), environment, "horovodrun --check-build")
    for name in ("NCCL", "MPI", "Gloo", {"torch": "PyTorch", "tensorflow": "TensorFlow"}[options.framework]):
        tell(f"[X] {name}" in report, f"horovodrun --check-build shows {name}")
    (library,) = venv.glob(f"lib/python*/site-packages/horovod/{options.framework}/mpi_lib*.so")
    dynamic = subprocess.check_output(["readelf", "-d", library], text=True)
    tell("[libnccl.so.2]" in dynamic and str(folder) not in dynamic, "its library needs NCCL and names no path of here")
    loaded = f"import horovod.{options.framework}; print(open('/proc/self/maps').read())"
    maps = checked(activated(f'python -c "{loaded}"'), environment, "The import")
    found = set(re.findall(r"/\S+/libnccl\.so\S*", maps))
    tell(len(found) == 1 and str(venv) in found.pop(), "it finds one NCCL, this environment's, without LD_LIBRARY_PATH")
    worker = f"python -m tests.gpu_build.worker {options.framework}"
    for launcher in ("mpirun", "horovodrun --mpi", "horovodrun --gloo"):
        output = checked(activated(f"{launcher} -np {RANKS} {worker}"), environment, launcher)
        tell(output.count("as numpy") == RANKS, f"{RANKS} ranks of {launcher} reduce CPU tensors as numpy does")
    command = f"python -m toolkit.horovod_build --frameworks {options.framework} --gpu --gpu-arch {options.arch}"
    again = checked(activated(command), environment, "The second build")
    tell("is installed and checked" in again, "a second run builds nothing")


if __name__ == "__main__":
    main()
