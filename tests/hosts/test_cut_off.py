"""A host's cable is pulled in mid-training: the job ends in time, says which host, and leaves no process anywhere."""

import json
import re
import time

import pytest

from tests.hosts import jobs, results
from tests.hosts.cluster import NAMES
from tests.hosts.jobs import THREE

# Open MPI's daemons notice within 11 s; without this, by what `hvdkit launch` sets, within 40, else after many minutes.
SOON = {"OMPI_MCA_oob_tcp_keepalive_time": "5", "OMPI_MCA_oob_tcp_keepalive_intvl": "2"}
SOON["OMPI_MCA_oob_tcp_keepalive_probes"] = "3"
STALL = 10  # seconds of --stall-timeout, where the workers' own watch is to notice
SLACK = 60  # seconds that a busy machine may take beyond the time promised; what does not notice takes at least 300
LOST = 205  # exit code of an mpirun that has lost a host
TABLE = (
    "A host cut off in mid-training: seconds until the launcher had ended, and until no process was left on any host"
)
LONG = pytest.mark.long


def endless(cluster, launcher, recipe):
    script = [f"recipes/{recipe}.py", "--output", str(cluster.directory / "run"), "--epochs", "1000000"]
    script += ["--global-batch-size", "50", "--print-every", "100000", "--checkpoint-every", "100000"]
    script += ["--stall-timeout", str(STALL if launcher == "horovodrun --gloo" else 300)]
    return jobs.words(launcher, THREE, cluster.hostfile, script)


def limit(launcher, environment):
    """Seconds until the job is to have ended."""
    return SLACK + (STALL if launcher == "horovodrun --gloo" else 11 if environment else 40)


def until(true, most):
    end = time.monotonic() + most
    while not true() and time.monotonic() < end:
        time.sleep(0.1)
    return true()


def cut_off(cluster, host, command, environment, most):
    """Cut the host off when training goes on, until the launcher has ended, in `most` seconds, and 30 s later all else.

    Returns:
        The launcher's exit code, what it printed, seconds to its end, and to that of all processes on all hosts.
    """
    metrics = cluster.directory / "run" / "metrics.jsonl"
    with (cluster.directory / "printed").open("w+") as printed:
        process, _ = cluster.begin(NAMES[0], command, printed=printed, environment=environment)
        try:
            assert until(lambda: metrics.exists() or process.poll() is not None, 120) and process.poll() is None
            before = metrics.stat().st_size
            assert until(lambda: metrics.stat().st_size > before, 60)
            assert all(jobs.workers(cluster, name) for name in NAMES)
            cluster.cut(host)
            began = time.monotonic()
            ended = until(lambda: process.poll() is not None, most)
            seconds = time.monotonic() - began
            until(lambda: not any(map(cluster.processes, NAMES)), 30)
            gone = time.monotonic() - began
        finally:
            left = cluster.kill_all()
            process.wait(30)
            printed.seek(0)
            text = printed.read()
    assert ended and not left, (ended, left, text[-2000:])
    return process.returncode, text, seconds, gone


@pytest.mark.parametrize(
    ("launcher", "recipe", "environment"),
    [
        ("horovodrun --gloo", "linear_regression_torch", {}),
        pytest.param("horovodrun --gloo", "cnn_tensorflow", {}, marks=LONG),
        ("hvdkit launch", "linear_regression_torch", SOON),
        pytest.param("hvdkit launch", "linear_regression_torch", {}, marks=LONG),
        pytest.param("hvdkit launch", "cnn_keras", SOON, marks=LONG),
        pytest.param("mpirun", "linear_regression_torch", SOON, marks=LONG),
        pytest.param("horovodrun --mpi", "linear_regression_torch", SOON, marks=LONG),
    ],
)
def test_the_job_ends_and_names_the_host(cluster, launcher, recipe, environment):
    row = f"{launcher}, {recipe}{', told to notice in 11 s' if environment else ''}"
    results.note(TABLE, row, "ended", "failed")
    gloo = launcher == "horovodrun --gloo"
    command = endless(cluster, launcher, recipe)
    code, text, seconds, gone = cut_off(cluster, "node2", command, environment, limit(launcher, environment))
    assert code != 0 if gloo else code == LOST, (code, text[-3000:])
    if gloo:  # the workers' own watch is the first to notice
        named = re.findall(r"\[rank \d on (\w+)\] did not come: it gave no sign of life", text)
        assert named == ["node2"], text[-3000:]
        assert json.loads((cluster.directory / "run" / "error.json").read_text())["host"] == "node2"
    else:
        assert re.findall(r"Remote daemon: \S+ on node (\w+)", text[-3000:]) == ["node2"], text[-3000:]
    results.note(TABLE, row, "ended", f"{seconds:.0f}")
    results.note(TABLE, row, "none left", f"{gone:.0f}")


@pytest.mark.long
@pytest.mark.parametrize("launcher", ["horovodrun --gloo", "hvdkit launch"])
def test_the_job_ends_where_the_launchers_own_host_is_cut_off(cluster, launcher):
    command = endless(cluster, launcher, "linear_regression_torch")
    code, text, *_ = cut_off(cluster, "node1", command, SOON, limit(launcher, SOON))
    assert code != 0 and re.search(r"node[23]", text[-3000:]), text[-3000:]
