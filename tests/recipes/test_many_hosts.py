"""The scripts and commands of the README's "From one machine to many": read by bash, by sbatch, by hvdkit, and run."""

import re
import shlex
import subprocess
import uuid

import pytest
import yaml

from tests import slurm
from tests.launching import BIN, MARK, ROOT, clean_environment, kill_marked
from toolkit import cli

GUIDE = re.search(r"\n## From one machine to many\n(.*?)\n## ", (ROOT / "README.md").read_text(), re.DOTALL)[1]
SLURM, PBS = re.findall(r"```bash\n(.*?)```", GUIDE, re.DOTALL)
GPUS = (ROOT / "docs" / "gpus.md").read_text()
(SLURM_GPUS,) = re.findall(r"```bash\n(.*?)```", GPUS, re.DOTALL)
COMMANDS, COMMANDS_GPUS = (re.findall(r"^(?:    )?(hvdkit .*)$", text, re.MULTILINE) for text in (GUIDE, GPUS))
NODES = "node1\n" * 4 + "node2\n" * 4
DRY = """hvdkit() { command hvdkit "$1" --dry-run "${@:2}"; }; export -f hvdkit; exec bash script"""


@pytest.fixture
def site(tmp_path):
    """A directory as a site's users have it: the recipes, and an environment to activate; srun is only looked for."""
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / ".venv" / "bin" / "activate").write_text(f"PATH={shlex.quote(f'{tmp_path}/site:{BIN}')}:$PATH\n")
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "srun").write_text("#!/bin/sh\nexit 9\n")
    (tmp_path / "site" / "srun").chmod(0o755)
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    return tmp_path


def run(site, *command, environment=None):
    """What a command prints in the site's directory, and its exit code; no process of it is left."""
    mark = uuid.uuid4().hex
    full = {k: v for k, v in clean_environment().items() if not k.startswith(("SLURM_", "PBS_", "LSB_"))}
    try:
        result = subprocess.run(
            command,
            cwd=site,
            env={**full, **(environment or {}), MARK: mark},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=300,
        )
    finally:
        left = kill_marked(mark, grace=10)
    assert not left
    return result.stdout, result.returncode


def dry(site, script, environment):
    """The command that a job's script would launch."""
    (site / "script").write_text(script)
    printed, code = run(site, "bash", "-c", DRY, environment=environment)
    assert code == 0, printed
    return shlex.split(printed)


TRAINS = ["python", "recipes/cnn_torch.py", "--output", "runs/cnn", "--resume", "--checkpoint-steps", "100"]


@pytest.mark.parametrize("script", [SLURM, PBS, SLURM_GPUS], ids=["Slurm", "PBS", "Slurm with GPUs"])
def test_bash_reads_the_scripts(script, tmp_path):
    (tmp_path / "script").write_text(script)
    assert run(tmp_path, "bash", "-n", "script") == ("", 0)
    assert script.startswith("#!/bin/bash\n#")  # else its directives are comments


def test_what_the_slurm_script_launches(site):
    job = {"SLURM_JOB_NODELIST": "node[1-2]", "SLURM_TASKS_PER_NODE": "4(x2)", "SLURM_CPUS_PER_TASK": "2"}
    words = dry(site, SLURM, job)
    expected = ["srun", "--ntasks=8", "--nodes=2", "--nodelist=node[1-2]", "--ntasks-per-node=4", "--cpus-per-task=2"]
    assert words[:6] == expected and words[-7:] == TRAINS and f"--chdir={site}" in words
    without = dry(site, SLURM.replace("--launcher srun ", ""), job)
    assert without[:5] == ["mpirun", "-np", "8", "-H", "node1:4,node2:4"]


def test_what_the_slurm_script_with_gpus_launches(site):
    job = {"SLURM_JOB_NODELIST": "node[1-2]", "SLURM_TASKS_PER_NODE": "4(x2)", "SLURM_CPUS_PER_TASK": "8"}
    words = dry(
        site, SLURM_GPUS, {**job, "SLURM_GPUS_PER_NODE": "4", "NCCL_DEBUG": "INFO", "CUDA_VISIBLE_DEVICES": "9"}
    )
    assert (
        words[0] == "srun"
        and "--ntasks-per-node=4" in words
        and words[words.index("python") :][2:4] == ["--device", "gpu"]
    )
    (export,) = (word for word in words if word.startswith("--export="))
    assert "NCCL_DEBUG" in export and "CUDA_VISIBLE_DEVICES" not in export  # which Slurm sets for each task


def test_what_the_pbs_script_launches(site):
    (site / "nodes").write_text(NODES)
    (site / "home").mkdir()
    script = f"cd home\n{PBS}"  # as PBS starts it, not where it was submitted
    words = dry(site, script, {"PBS_NODEFILE": str(site / "nodes"), "PBS_O_WORKDIR": str(site)})
    assert words[:5] == ["mpirun", "-np", "8", "-H", "node1:4,node2:4"]
    assert words[words.index("--wdir") + 1] == str(site) and words[words.index("python") :][:7] == TRAINS


def launcher_of_kubernetes(site):
    """The launcher's command of docs/mpijob.yaml, with this site's paths for the pod's."""
    job = yaml.safe_load((ROOT / "docs" / "mpijob.yaml").read_text())
    (container,) = job["spec"]["mpiReplicaSpecs"]["Launcher"]["template"]["spec"]["containers"]
    text = container["args"][0].replace("/etc/mpi/", f"{site}/").replace("/shared/", f"{site}/")
    assert container["command"] == ["bash", "-c"] and text.count(str(site)) == 3
    return f"source .venv/bin/activate\n{text}"


@pytest.mark.parametrize("kind", ["PBS", pytest.param("Kubernetes", marks=pytest.mark.long)])
def test_the_job_runs_as_it_stands_and_goes_on_when_submitted_again(kind, site):
    """With this machine as the job's only host."""
    (site / "nodes").write_text("localhost\n" * 2)
    (site / "hostfile").write_text("localhost slots=2\n")
    (site / "script").write_text(PBS if kind == "PBS" else launcher_of_kubernetes(site))
    job = {"PBS_NODEFILE": str(site / "nodes"), "PBS_O_WORKDIR": str(site)} if kind == "PBS" else {}
    printed, code = run(site, "bash", "script", environment=job)
    assert code == 0 and "2 worker(s)" in printed and "epoch 10/10" in printed, printed
    assert (site / "runs" / "cnn" / "step-00000450").is_dir()
    printed, code = run(site, "bash", "script", environment=job)
    assert code == 0 and "resumed at epoch 10, step 450" in printed, printed


def test_sbatch_takes_the_directives(tmp_path):
    """sbatch reads them all before it asks the controller, which there is none of here."""
    sbatch, needed = slurm.needed("sbatch", tmp_path)

    def told(script):
        (tmp_path / "script").write_text(script)
        return run(tmp_path, sbatch, "script", environment=needed)[0]

    if slurm.REACHED not in (bare := told("#!/bin/bash\ntrue\n")):
        pytest.skip(f"sbatch does not begin here: {bare.strip().splitlines()[-1:]}")
    assert "unrecognized option" in told(SLURM.replace("--requeue", "--no-such-option"))
    for script in (SLURM, SLURM_GPUS):
        said = told(script)
        assert slurm.REACHED in said and "option" not in said and "nvalid" not in said


def parser_of(name):
    """hvdkit's parser of a command, or None."""
    (commands,) = (action for action in cli._parser()._actions if action.choices)
    return commands.choices.get(name)


@pytest.mark.parametrize("line", [*COMMANDS, *COMMANDS_GPUS])
def test_hvdkit_has_the_options(line):
    words = shlex.split(line)
    parser = parser_of(words[1])
    assert parser is not None
    options = parser.parse_args(words[2:])
    path = getattr(options, "hostfile", None) or getattr(options, "file", None)
    assert path is None or (ROOT / path).is_file()


def test_what_the_commands_of_ssh_hosts_say(site):
    (site / "hostfiles").symlink_to(ROOT / "hostfiles")
    (check,) = (shlex.split(line) for line in COMMANDS if line.startswith("hvdkit hosts "))
    printed, code = run(site, *check)
    assert code == 0 and printed.split()[-5:] == ["total", "10", "on", "3", "hosts"]
    (given,) = (shlex.split(line) for line in COMMANDS if "--hostfile" in line and line.startswith("hvdkit launch "))
    printed, code = run(site, *given[:2], "--dry-run", *given[2:])
    words = shlex.split(printed)
    assert code == 0 and words[:5] == ["mpirun", "-np", "10", "-H", "node1:4,node2:4,node3:2"]
    assert words[-4:] == ["python", "recipes/cnn_torch.py", "--output", "/shared/runs/1"]
    assert f"{site}/logs/1" in words and not (site / "logs").exists()


def test_the_guide_has_the_commands():
    assert [line.split()[1] for line in COMMANDS] == ["hosts", "doctor", "launch", "launch", "launch"]
    assert [line.split()[1] for line in COMMANDS_GPUS] == ["doctor", "launch", "launch", "launch", "launch"]


@pytest.mark.parametrize("file", ["README.md", "docs/many_hosts.md", "docs/gpus.md"])
def test_links_lead_to_files(file):
    text = (ROOT / file).read_text() if file != "README.md" else GUIDE
    links = re.findall(r"\]\(([^)#:]+)\)", text)
    assert links and all(((ROOT / file).parent / link).is_file() for link in links)


def test_pbs_gives_each_rank_its_share_of_the_cores():
    """PBS sets OMP_NUM_THREADS itself, which nothing of ours changes."""
    chunk = dict(re.findall(r"(ncpus|mpiprocs|ompthreads)=(\d+)", PBS))
    assert int(chunk["mpiprocs"]) * int(chunk["ompthreads"]) == int(chunk["ncpus"])


def test_the_table_of_several_hosts_is_the_one_that_the_tests_wrote():
    table = (ROOT / "README.md").read_text().split("\nOn several hosts: ")[1].split("\n\n")[1].strip()
    assert table.count("\n") > 10 and table in (ROOT / "tests" / "hosts" / "results.md").read_text()
