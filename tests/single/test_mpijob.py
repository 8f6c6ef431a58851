"""docs/mpijob.yaml and docs/Dockerfile: what the MPI Operator accepts, and what a job needs there.

Against the operator's own definition, which has all of a pod's fields:
HVDKIT_MPIJOB_CRD=kubeflow.org_mpijobs.yaml pytest tests/single/test_mpijob.py
"""

import copy
import os
import re
import shlex
from pathlib import Path

import pytest
import yaml

from tests.launching import ROOT
from toolkit import cli, hostfile

JOB = yaml.safe_load((ROOT / "docs" / "mpijob.yaml").read_text())
OURS = yaml.safe_load((ROOT / "tests" / "single" / "mpijob_schema.yaml").read_text())
TYPES = {"object": dict, "array": list, "string": str, "integer": int, "boolean": bool}


def mistakes(value, schema, where="MPIJob"):
    """Where a value is not of an OpenAPI v3 schema, such as Kubernetes checks objects against; unknown fields too."""
    if schema.get("x-kubernetes-int-or-string"):
        return [] if type(value) in (int, str) else [f"{where} is {value!r}: expected a number or a string"]
    if schema.get("x-kubernetes-preserve-unknown-fields"):
        return []
    if type(value) is not TYPES[schema["type"]]:
        return [f"{where} is {value!r}: expected {schema['type']}"]
    if value not in schema.get("enum", [value]):
        return [f"{where} is {value!r}: expected one of {schema['enum']}"]
    found = []
    if isinstance(value, dict) and ("properties" in schema or "additionalProperties" in schema):
        found += [f"{where}.{name} is missing" for name in schema.get("required", ()) if name not in value]
        for name, part in value.items():
            inner = schema.get("properties", {}).get(name, schema.get("additionalProperties"))
            found += mistakes(part, inner, f"{where}.{name}") if inner else [f"{where}.{name} is no field"]
    for number, part in enumerate(value if isinstance(value, list) else ()):
        found += mistakes(part, schema["items"], f"{where}[{number}]")
    return found


def pod(role, job=JOB):
    return job["spec"]["mpiReplicaSpecs"][role]["template"]["spec"]


def container(role, job=JOB):
    return pod(role, job)["containers"][0]


def test_the_operator_accepts_the_manifest():
    assert mistakes(JOB, OURS) == []


def test_the_operators_own_definition_accepts_the_manifest():
    path = os.environ.get("HVDKIT_MPIJOB_CRD")
    if not path:
        pytest.skip("HVDKIT_MPIJOB_CRD names no file with the operator's definition of MPIJob")
    (definition,) = (
        version["schema"]["openAPIV3Schema"]
        for version in yaml.safe_load(Path(path).read_text())["spec"]["versions"]
        if version["name"] == "v2beta1"
    )
    assert mistakes(JOB, {**definition, "required": ["apiVersion", "kind"]}) == []


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda job: job.update(apiVersion="kubeflow.org/v1"), "MPIJob.apiVersion is 'kubeflow.org/v1': expected one"),
        (lambda job: job["spec"].pop("mpiReplicaSpecs"), "MPIJob.spec.mpiReplicaSpecs is missing"),
        (lambda job: job["spec"].update(slotsPerWorker="2"), "MPIJob.spec.slotsPerWorker is '2': expected integer"),
        (lambda job: job["spec"].update(backoffLimit=3), "MPIJob.spec.backoffLimit is no field"),
        (lambda job: container("Worker", job).update(command="sshd"), ".command is 'sshd': expected array"),
        (lambda job: container("Worker", job)["command"].append(1), ".command[2] is 1: expected string"),
        (lambda job: container("Launcher", job)["env"][0].update(value=2), ".env[0].value is 2: expected string"),
        (lambda job: container("Worker", job)["resources"]["limits"].update(cpu=0.5), ".limits.cpu is 0.5: expected a"),
        (lambda job: pod("Worker", job)["volumes"][0].pop("name"), ".volumes[0].name is missing"),
        (lambda job: job["spec"]["mpiReplicaSpecs"].pop("Launcher"), "mpiReplicaSpecs.Launcher is missing"),
        (lambda job: job["spec"]["mpiReplicaSpecs"]["Worker"].update(restartPolicy="Always"), "is 'Always': expected"),
    ],
)
def test_a_spoilt_manifest_is_refused(spoil, said):
    job = copy.deepcopy(JOB)
    spoil(job)
    (found,) = mistakes(job, OURS)
    assert said in found


def test_what_the_controller_refuses_beside_types():
    replicas = JOB["spec"]["mpiReplicaSpecs"]
    assert replicas["Launcher"]["replicas"] == 1 and replicas["Worker"]["replicas"] >= 1
    last = f"{JOB['metadata']['name']}-worker-{replicas['Worker']['replicas'] - 1}"
    assert re.fullmatch("[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?", last)
    for role in replicas:
        volumes = [volume["name"] for volume in pod(role)["volumes"]]
        assert sorted(volumes) == sorted(mount["name"] for mount in container(role)["volumeMounts"])
        assert "restartPolicy" not in pod(role)  # the operator takes that of the replicas


def test_with_gpus_there_is_one_for_each_rank():
    """As the manifest's comment has it."""
    text = (ROOT / "docs" / "mpijob.yaml").read_text()
    text, count = re.subn(r"\n +limits: [^\n]*\n +# With GPUs[^\n]*\n( +)# (limits: )", r"\n\1\2", text)
    job = yaml.safe_load(text)
    limits = container("Worker", job)["resources"]["limits"]
    assert count == 1 and mistakes(job, OURS) == []
    assert limits.pop("nvidia.com/gpu") == job["spec"]["slotsPerWorker"]
    assert limits == container("Worker")["resources"]["limits"]


def written_by_the_operator(job=JOB):
    """/etc/mpi/hostfile, as the operator's controller writes it for Open MPI."""
    name, spec = job["metadata"]["name"], job["spec"]
    count = spec["mpiReplicaSpecs"]["Worker"]["replicas"]
    lines = (f"{name}-worker-{n}.{name}.default.svc slots={spec['slotsPerWorker']}\n" for n in range(count))
    return "".join(lines)


def words():
    """The launcher's last command, as a shell splits it."""
    (text,) = container("Launcher")["args"]
    made, last = text.split(" && ")
    assert shlex.split(made)[:2] == ["mkdir", "-p"] and last.startswith("exec hvdkit ")
    return shlex.split(made)[2], shlex.split(last)[2:]


def test_the_launchers_command_starts_a_rank_for_each_slot(tmp_path, capsys, monkeypatch):
    made, given = words()
    assert given[given.index("--hostfile") + 1] == "/etc/mpi/hostfile"
    (tmp_path / "hostfile").write_text(written_by_the_operator())
    given[given.index("--hostfile") + 1] = str(tmp_path / "hostfile")
    says = '#!/bin/sh\necho "mpirun (Open MPI) 4.1.8"\n'
    (tmp_path / "mpirun").write_text(says)
    (tmp_path / "mpirun").chmod(0o755)
    for variable in container("Launcher")["env"]:
        monkeypatch.setenv(variable["name"], variable["value"])
    monkeypatch.setenv("PATH", str(tmp_path))
    assert cli.main([given[0], "--dry-run", *given[1:]]) == 0
    printed = shlex.split(capsys.readouterr().out)
    places = "train-worker-0.train.default.svc:2,train-worker-1.train.default.svc:2"
    assert printed[:5] == ["mpirun", "-np", "4", "-H", places] and "-x" in printed and "OMP_NUM_THREADS" in printed
    assert "plm_rsh_args" not in printed  # the operator's own, in the environment, would be without effect
    script = printed[printed.index("python") + 1 :]
    assert (ROOT / script[0]).is_file()
    assert script[script.index("--output") + 1] == made and "--resume" in script  # which wants the directory to exist
    mounts = [mount["mountPath"] for role in ("Launcher", "Worker") for mount in container(role)["volumeMounts"]]
    assert mounts.count("/" + Path(made).parts[1]) == 2


def test_threads_fit_the_workers_cores():
    (threads,) = (v["value"] for v in container("Launcher")["env"] if v["name"] == "OMP_NUM_THREADS")
    cores = container("Worker")["resources"]["limits"]["cpu"]
    assert int(threads) * JOB["spec"]["slotsPerWorker"] == cores


def test_the_hostfile_is_read(tmp_path):
    hosts = hostfile.parse(written_by_the_operator().encode(), "f")
    assert [(host.name, host.slots) for host in hosts] == [
        ("train-worker-0.train.default.svc", 2),
        ("train-worker-1.train.default.svc", 2),
    ]


def test_the_image_has_what_the_manifest_calls():
    text = (ROOT / "docs" / "Dockerfile").read_text().replace("\\\n", " ")
    lines = [line.split(maxsplit=1) for line in text.splitlines() if line and line[0] != "#"]
    assert lines[0][0] == "FROM" and {kind for kind, _ in lines} <= {"FROM", "RUN", "WORKDIR", "COPY", "ENV"}
    copied = [source for kind, rest in lines if kind == "COPY" for source in rest.split()[:-1]]
    assert copied and all((ROOT / source).exists() for source in copied)
    _, script = words()
    assert Path(script[script.index("python") + 1]).parts[0] in copied
    (directory,) = (rest for kind, rest in lines if kind == "WORKDIR")
    assert ["ENV", f"PATH={directory}/.venv/bin:$PATH"] in lines  # where `hvdkit` is, and on the workers `python`
    assert "openssh-server" in text and container("Worker")["command"][0] == "/usr/sbin/sshd"
