"""One specification to each launcher's command, word for word, and what is refused."""

import os
import re
import shlex
import stat
import subprocess

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests import slurm
from tests.launching import ROOT
from toolkit import ending, launch
from toolkit.cli import main
from toolkit.errors import UsageError
from toolkit.hostfile import Host
from toolkit.launch import Installed, Specification, command

PREFIX = "/shared/train/.venv"
OPENMPI_4 = Installed("mpirun", "mpirun", "Open MPI", (4, 1), PREFIX, cores=8, name="node1")
OPENMPI_5 = Installed("mpirun", "mpirun", "Open MPI", (5, 0), PREFIX, cores=8, name="node1")
MPICH = Installed("mpirun", "mpirun", "MPICH", (5, 0), PREFIX, cores=8, name="node1")
SRUN = Installed("srun", "srun", "Open MPI", (4, 1), PREFIX, cores=8, name="node1")
SRUN_MPICH = Installed("srun", "srun", "MPICH", (5, 0), PREFIX, cores=8, name="node1")
HOROVODRUN = Installed("horovodrun", "horovodrun", "Open MPI", (4, 1), PREFIX, cores=8, name="node1")
HOROVODRUN_5 = Installed("horovodrun", "horovodrun", "Open MPI", (5, 0), PREFIX, cores=8, name="node1")
HOROVODRUN_GLOO = Installed("horovodrun", "horovodrun", cores=8, name="node1")
ALL = (OPENMPI_4, OPENMPI_5, MPICH, SRUN, SRUN_MPICH, HOROVODRUN, HOROVODRUN_5, HOROVODRUN_GLOO)
IDS = ("openmpi4", "openmpi5", "mpich", "srun", "srun-mpich", "horovodrun", "horovodrun5", "horovodrun-gloo")

SCRIPT = ("python", "recipes/cnn_torch.py")
ALIVE = "--mca oob_tcp_keepalive_time 10 --mca oob_tcp_keepalive_intvl 10 --mca oob_tcp_keepalive_probes 3"
HERE = {"command": SCRIPT, "directory": "/shared/train"}
TWO = {**HERE, "hosts": (Host("node1", 4), Host("node2", 4))}
UNEVEN = {**HERE, "hosts": (Host("node1", 4), Host("node2", 2))}
PATHS = {"PATH": "/usr/bin", "VIRTUAL_ENV": PREFIX}
ASKED = {
    **TWO,
    "interface": "eth0",
    "ssh_port": 2222,
    "ssh_key": "/home/me/.ssh/id",
    "tag_output": True,
    "log_directory": "/logs",
}

# What is installed, what is wanted, the environment, and the one right command.
COMMANDS = [
    (OPENMPI_4, {**HERE, "ranks": 2}, {}, (
        "mpirun -np 2 -H localhost:2 --bind-to none --map-by slot --wdir /shared/train python recipes/cnn_torch.py"
    )),
    (OPENMPI_4, HERE, {}, (
        "mpirun -np 8 -H localhost:8 --bind-to none --map-by slot --wdir /shared/train python recipes/cnn_torch.py"
    )),
    (OPENMPI_4, {**TWO, "ranks": 10}, PATHS, (
        "mpirun -np 10 -H node1:5,node2:5 --bind-to none --map-by slot --oversubscribe --prefix /shared/train/.venv "
        f"{ALIVE} --wdir /shared/train -x PATH -x VIRTUAL_ENV python recipes/cnn_torch.py"
    )),
    (OPENMPI_4, {**TWO, "ranks": 3}, {}, (
        "mpirun -np 3 -H node1:3 --bind-to none --map-by slot --wdir /shared/train python recipes/cnn_torch.py"
    )),
    (OPENMPI_4, ASKED, PATHS, (
        "mpirun -np 8 -H node1:4,node2:4 --bind-to none --map-by slot --prefix /shared/train/.venv "
        "--mca plm_rsh_args '-p 2222 -i /home/me/.ssh/id' --mca btl_tcp_if_include eth0 --mca oob_tcp_if_include eth0 "
        f"{ALIVE} --tag-output --output-filename /logs --wdir /shared/train -x PATH -x VIRTUAL_ENV "
        "-x HOROVOD_GLOO_IFACE=eth0 -x NCCL_SOCKET_IFNAME=eth0 python recipes/cnn_torch.py"
    )),
    (OPENMPI_5, {**HERE, "ranks": 16, "interface": "lo"}, {}, (
        "mpirun -np 16 -H localhost:16 --bind-to none --map-by slot:OVERSUBSCRIBE --mca btl_tcp_if_include lo "
        "--wdir /shared/train -x HOROVOD_GLOO_IFACE=lo -x NCCL_SOCKET_IFNAME=lo python recipes/cnn_torch.py"
    )),
    (OPENMPI_5, ASKED, PATHS, (
        "mpirun -np 8 -H node1:4,node2:4 --bind-to none --map-by slot --prefix /shared/train/.venv "
        "--prtemca plm_ssh_args '-p 2222 -i /home/me/.ssh/id' --mca btl_tcp_if_include eth0 "
        "--prtemca prte_if_include eth0 --output tag,dir=/logs --wdir /shared/train -x PATH -x VIRTUAL_ENV "
        "-x HOROVOD_GLOO_IFACE=eth0 -x NCCL_SOCKET_IFNAME=eth0 python recipes/cnn_torch.py"
    )),
    (MPICH, ASKED, PATHS, (
        "HYDRA_LAUNCHER_EXTRA_ARGS='-p 2222 -i /home/me/.ssh/id' mpirun -np 8 -hosts node1:4,node2:4 -bind-to none "
        "-iface eth0 -prepend-rank -outfile-pattern /logs/rank.%r.stdout -errfile-pattern /logs/rank.%r.stderr "
        "-wdir /shared/train -genvlist PATH,VIRTUAL_ENV -genv HOROVOD_GLOO_IFACE eth0 -genv NCCL_SOCKET_IFNAME eth0 "
        "-genv FI_TCP_IFACE eth0 -genv UCX_NET_DEVICES eth0 python recipes/cnn_torch.py"
    )),
    (SRUN, {**HERE, "ranks": 4}, {"SLURM_CPUS_PER_TASK": "6"}, (
        "srun --ntasks=4 --cpus-per-task=6 --mpi=pmix --cpu-bind=none --kill-on-bad-exit=1 --chdir=/shared/train "
        "--export=NONE python recipes/cnn_torch.py"
    )),
    (SRUN, {**TWO, "interface": "eth0", "tag_output": True, "log_directory": "/logs"}, PATHS, (
        "srun --ntasks=8 --nodes=2 '--nodelist=node[1-2]' --ntasks-per-node=4 --mpi=pmix --cpu-bind=none "
        "--kill-on-bad-exit=1 --label --output=/logs/rank.%t.stdout --error=/logs/rank.%t.stderr "
        "--chdir=/shared/train --export=PATH,VIRTUAL_ENV,HOROVOD_GLOO_IFACE=eth0,NCCL_SOCKET_IFNAME=eth0,"
        "OMPI_MCA_btl_tcp_if_include=eth0 python recipes/cnn_torch.py"
    )),
    (SRUN_MPICH, {**UNEVEN, "ranks": 8}, PATHS, (
        "srun --ntasks=8 --distribution=arbitrary --nodelist=node1,node1,node1,node1,node1,node2,node2,node2 "
        "--overcommit --mpi=pmi2 --cpu-bind=none --kill-on-bad-exit=1 --chdir=/shared/train --export=PATH,VIRTUAL_ENV "
        "python recipes/cnn_torch.py"
    )),
    (HOROVODRUN, {**ASKED, "ranks": 9}, PATHS, (
        "horovodrun -np 9 -H node1:5,node2:4 --mpi '--mpi-args=--prefix /shared/train/.venv --oversubscribe "
        f"--mca oob_tcp_if_include eth0 {ALIVE} --wdir /shared/train' --network-interface eth0 --ssh-port 2222 "
        "--ssh-identity-file /home/me/.ssh/id --output-filename /logs python recipes/cnn_torch.py"
    )),
    (HOROVODRUN_5, {**HERE, "ranks": 9, "directory": "/my train"}, {}, (
        "horovodrun -np 9 -H localhost:9 --mpi '--mpi-args=--wdir '\"'\"'/my train'\"'\"'' "
        "'--binding-args=--bind-to none --map-by slot:OVERSUBSCRIBE' python recipes/cnn_torch.py"
    )),
    (HOROVODRUN_GLOO, {**TWO, "interface": "eth0"}, PATHS, (
        "horovodrun -np 8 -H node1:4,node2:4 --gloo --network-interface eth0 python recipes/cnn_torch.py"
    )),
]  # fmt: skip


@pytest.mark.parametrize(("installed", "wanted", "environment", "expected"), COMMANDS)
def test_the_command(installed, wanted, environment, expected):
    made = command(Specification(**wanted), installed, environment)
    assert [*(f"{n}={v}" for n, v in made.environment.items()), *made.words] == shlex.split(expected)
    assert shlex.split(str(made)) == shlex.split(expected)


def test_how_soon_a_lost_host_is_noticed_is_the_users_where_it_is_set():
    environment = {"OMPI_MCA_oob_tcp_keepalive_time": "5", "OMPI_MCA_oob_tcp_keepalive_intvl": "2"}
    for installed in (OPENMPI_4, HOROVODRUN):
        made = str(command(Specification(**TWO), installed, environment))
        assert re.findall(r"oob_tcp_keepalive_\w+ \d+", made) == ["oob_tcp_keepalive_probes 3"]


def test_names_with_a_domain_stay_whole():
    for name, keeps in (("node2.example", True), ("10.0.0.2", False), ("node2", False)):
        for installed in (OPENMPI_4, HOROVODRUN):
            wanted = Specification(**{**HERE, "hosts": (Host("node1", 4), Host(name, 4))})
            assert ("--mca orte_keep_fqdn_hostnames 1" in str(command(wanted, installed, {}))) == keeps
            set_otherwise = command(wanted, installed, {"OMPI_MCA_orte_keep_fqdn_hostnames": "0"})
            assert "fqdn" not in str(set_otherwise)


def test_root_and_a_path():
    installed = Installed("mpirun", "/opt/my mpi/bin/mpirun", "Open MPI", (4, 1), root=True, cores=1)
    made = command(Specification(("python", "a b.py", "$x"), "/"), installed, {})
    assert str(made) == (
        "'/opt/my mpi/bin/mpirun' -np 1 -H localhost:1 --bind-to none --map-by slot --allow-run-as-root --wdir / "
        "python 'a b.py' '$x'"
    )


@pytest.mark.parametrize("installed", (OPENMPI_4, OPENMPI_5, MPICH))
def test_one_user_for_all_goes_to_ssh(installed):
    hosts = (Host("node8", 1, user="bob"), Host("node9", 1, user="bob"))
    made = command(Specification(**{**HERE, "hosts": hosts}), installed, {})
    assert "-l bob" in [*made.words, *made.environment.values()]
    assert "node8:1,node9:1" in made.words
    two = (Host("node8", 1, user="bob"), Host("node9", 1))
    with pytest.raises(UsageError, match=r"^the hosts have several users: give one to all"):
        command(Specification(**{**HERE, "hosts": two}), installed, {})


@pytest.mark.parametrize("installed", ALL, ids=IDS)
def test_every_launcher_places_as_many_ranks(installed):
    hosts = (Host("a", 2, 3), Host("b", 1), Host("c", 4, 4))
    placed = {1: "1", 3: "2,1", 7: "2,1,4", 8: "3,1,4", 11: "3,4,4"}
    for ranks, expected in placed.items():
        words = command(Specification(**{**HERE, "hosts": hosts, "ranks": ranks}), installed, {}).words
        counts = [int(text) for text in expected.split(",")]
        if installed.launcher != "srun":
            assert ",".join(f"{n}:{c}" for n, c in zip("abc", counts, strict=False)) in words
        elif len(counts) > 1:
            assert "--nodelist=" + ",".join(n for n, c in zip("abc", counts, strict=False) for _ in range(c)) in words
        assert str(ranks) in words or f"--ntasks={ranks}" in words
    full = (Host("a", 2, 3), Host("c", 4, 4))
    with pytest.raises(UsageError, match=r"^-np is 8: expected at most 7, which the hosts' max_slots allow\.$"):
        command(Specification(**{**HERE, "hosts": full, "ranks": 8}), installed, {})


SECRETS = (
    "AWS_SECRET_ACCESS_KEY",
    "HOROVOD_SECRET_KEY",
    "HVDKIT_TOKEN",
    "NCCL_password",
    "WANDB_API_KEY",
    "DATABASE_URL",
)
LISTED = (*launch.TRAVELS, "HOROVOD_CYCLE_TIME", "HVDKIT_X", "NCCL_DEBUG")


@pytest.mark.parametrize("installed", ALL, ids=IDS)
def test_a_short_list_of_variables_travels_and_no_secret(installed):
    environment = dict.fromkeys((*SECRETS, *LISTED, "BASH_FUNC_x%%", "HOROVOD_x%%", ending.FILE), "value-of-it")
    made = command(
        Specification(**{**TWO, "variables": ("MINE", "DATA", "DATA")}), installed, {**environment, "DATA": "x"}
    )
    if installed.launcher == "horovodrun":
        assert made.kept == {*LISTED, "DATA"}
        return
    assert made.kept is None
    text = str(made)
    sent = set(re.findall(r"-x (\S+)", text)) or set(re.search(r"(?:-genvlist |--export=)(\S+)", text)[1].split(","))
    assert sent == {*LISTED, "DATA"}
    assert "value-of-it" not in text


def test_horovodrun_keeps_what_it_needs_itself():
    needed = {"HOME", "SSH_AUTH_SOCK", "LC_ALL", "SLURM_JOB_ID", "OMPI_MCA_x"}
    environment = dict.fromkeys((*SECRETS, "SLURM_JWT", "OMPI_MCA_password", "OTHER", *needed), "")
    assert command(Specification(**TWO), HOROVODRUN, environment).kept == needed


REFUSED = [
    ({"command": ("--epochs", "3")}, "'--epochs 3' is no command to launch: expected a program first"),
    ({"command": ("python", "x.py", ":", "rm")}, "'python x.py : rm' is no command to launch"),
    ({"command": ()}, "'' is no command to launch"),
    ({"ranks": 0}, "-np is 0: expected 1 to 10000."),
    ({"ranks": 10_001}, "-np is 10001: expected 1 to 10000."),
    ({"interface": "eth0;id"}, "--interface is 'eth0;id': expected one name such as eth0."),
    ({"interface": "eth0,eth1"}, "--interface is 'eth0,eth1': expected one name such as eth0."),
    ({"ssh_port": 65536}, "--ssh-port is 65536: expected 1 to 65535."),
    ({"ssh_key": "/home/me/my key"}, "--ssh-key is '/home/me/my key': expected an absolute path of letters, digits"),
    ({"ssh_key": "id"}, "--ssh-key is 'id': expected an absolute path"),
    ({"log_directory": "/logs/$(id)"}, "--log-dir is '/logs/$(id)': expected an absolute path"),
    ({"log_directory": "/logs:nocopy"}, "--log-dir is '/logs:nocopy': expected an absolute path"),
    ({"variables": ("A=1",)}, "--env is 'A=1': expected the name of a variable."),
]


@pytest.mark.parametrize(("wrong", "words"), REFUSED)
def test_what_is_no_specification(wrong, words):
    with pytest.raises(UsageError) as told:
        Specification(**{**HERE, **wrong})
    assert str(told.value).startswith(words)


def refusal(installed, **wanted):
    with pytest.raises(UsageError) as told:
        command(Specification(**{**HERE, **wanted}), installed, {})
    assert "\n" not in str(told.value)
    return str(told.value)


def test_what_a_launcher_can_not_do():
    assert refusal(OPENMPI_4, hosts=(Host("::1"),)) == "::1: mpirun has no place for an IPv6 address: give a name."
    assert refusal(SRUN).startswith("neither -np, nor hosts, nor a Slurm job say how many workers")
    assert refusal(SRUN, ranks=1, ssh_port=22).startswith("srun does not log in by ssh: leave out port, key and user")
    assert refusal(HOROVODRUN, hosts=(Host("a", user="bob"),)).startswith("horovodrun has no place for a user")
    assert refusal(HOROVODRUN_GLOO, directory="/my train").startswith("the working directory is '/my train': expected")
    many = tuple(Host(f"{'n' * 50}{number}") for number in range(2000))
    assert "has over 100000 bytes" in refusal(OPENMPI_4, hosts=many)
    strange = Installed("mpirun", "mpirun", "Open MPI", (4, 1), "/opt/$(id)")
    assert refusal(strange, hosts=(Host("a"),)).startswith("Open MPI's directory is '/opt/$(id)': expected letters")


# What a shell of another host reads: the words of mpirun that make ssh's line, and all of horovodrun's own but its
# command's, which it quotes. Nothing of them may mean more to a shell than itself.
PLAIN = re.compile(r"[A-Za-z0-9_@%+=:,./ \[\]*-]*")
TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=20) | st.sampled_from(
    ["$(id)", "`id`", "a;id", "a b", "a\nb", '"', "'", "-oProxyCommand=id", "/a", "/a;id", "/$(id)", "eth0", "a&&id"]
)


def read_by_shells(made, installed):
    end = len(made.words) - len(SCRIPT)
    words = list(made.words[1:end])
    if installed.launcher == "srun" or installed.mpi == "MPICH":
        words = [word for word in words if not word.startswith("--chdir=")]
    for option in ("--wdir", "-wdir"):  # goes to the daemons in a message, and into no shell's line
        if option in words:
            del words[words.index(option) : words.index(option) + 2]
    for_mpi = [word for word in words if word.startswith("--mpi-args=")]
    words = [word for word in words if word not in for_mpi]
    for word in for_mpi:
        parts = shlex.split(word.removeprefix("--mpi-args="))
        assert shlex.join(parts) == word.removeprefix("--mpi-args=")
        words += parts[: parts.index("--wdir")]
    return [*words, *made.environment.values()]


@settings(max_examples=500)
@given(st.sampled_from(ALL), TEXT, TEXT, TEXT, TEXT, TEXT, TEXT, TEXT)
@example(HOROVODRUN, "node9", "eth0", "/k", "/l", "/a'b;id", "A", "/p")
def test_nothing_is_code_to_a_shell(installed, host, interface, key, logs, directory, variable, prefix):
    for words in (
        {"hosts": (host,)},
        {"interface": interface},
        {"ssh_key": key, "variables": (variable,)},
        {"log_directory": logs},
        {"directory": directory},
        {"hosts": (host,), "interface": interface, "directory": directory, "log_directory": logs},
    ):
        there = Installed(**{**vars(installed), "prefix": prefix})
        try:
            wanted = {**HERE, "ranks": 3, **words, "hosts": tuple(Host(name) for name in words.get("hosts", ["node9"]))}
            made = command(Specification(**wanted), there, {variable: "x", "PATH": "/usr/bin"})
        except UsageError as error:
            assert "\n" not in str(error)
            continue
        assert made.words[-len(SCRIPT) :] == SCRIPT
        for word in read_by_shells(made, installed):
            assert PLAIN.fullmatch(word), word
        assert shlex.split(str(made))[-len(made.words) :] == list(made.words)


VERSIONS = {
    "mpirun (Open MPI) 4.1.8\n\nReport bugs": ("Open MPI", (4, 1)),
    "mpirun (Open MPI) 5.0.11": ("Open MPI", (5, 0)),
    "HYDRA build details:\n    Version:                                 4.0.2\n": ("MPICH", (4, 0)),
}


@pytest.mark.parametrize(("text", "expected"), VERSIONS.items())
def test_versions(text, expected):
    assert launch.known(text) == expected


@pytest.mark.parametrize("text", ["", "mpirun (Open MPI) 3.1.2", "Intel(R) MPI Library for Linux* OS, Version 2021.19"])
def test_versions_that_are_not_known(text):
    first = ascii(text or "nothing")
    with pytest.raises(UsageError) as told:
        launch.known(text)
    assert str(told.value) == f"mpirun says {first} of its version: expected Open MPI 4 or 5, or MPICH."


def pretend(directory, name, lines):
    directory.mkdir(exist_ok=True)
    path = directory / name
    path.write_text(f"#!/bin/sh\n{lines}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


def test_what_is_installed_is_found(tmp_path):
    pretend(tmp_path / "bin", "mpirun", "echo 'mpirun (Open MPI) 5.0.11'")
    found = launch.find("mpirun", {"PATH": f"{tmp_path}/bin:/usr/bin:/bin"})
    assert (found.program, found.mpi, found.version, found.prefix) == ("mpirun", "Open MPI", (5, 0), str(tmp_path))
    assert (found.cores, found.root) == (len(os.sched_getaffinity(0)), os.geteuid() == 0)


@pytest.fixture
def job(tmp_path, monkeypatch):
    """A directory with an mpirun that says it is Open MPI, and otherwise runs its last word on this machine."""
    says = '[ "$1" = --version ] && echo "(Open MPI) 4.1.8" && exit'
    pretend(tmp_path / "bin", "mpirun", f'{says}\nfor last; do :; done\neval "$last"')
    for name in os.environ:
        if name.startswith(("SLURM_", "PBS_", "LSB_", "HVDKIT_", "HOROVOD_", "NCCL_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:/usr/bin:/bin")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_dry_run_prints_and_runs_nothing(job, capfd):
    (job / "hosts").write_text("a slots=2\na\nb:1\n")
    assert main(["launch", "--hostfile", "hosts", "--dry-run", "--", "touch", "made"]) == 0
    assert capfd.readouterr().out.startswith("mpirun -np 4 -H a:3,b:1 --bind-to none")
    assert not (job / "made").exists()
    assert main(["launch", "-H", "a:2,b", "-np", "2", "--dry-run", "--", "true"]) == 0
    assert capfd.readouterr().out.startswith("mpirun -np 2 -H a:2 --bind-to none")


def test_the_hosts_are_the_batch_systems(job, capfd, monkeypatch):
    monkeypatch.setenv("LSB_MCPU_HOSTS", "a 2 b 1")
    assert main(["launch", "--dry-run", "--", "true"]) == 0
    assert capfd.readouterr().out.startswith("mpirun -np 3 -H a:2,b:1 ")


def test_the_command_is_printed_then_run_and_its_exit_code_returned(job, capfd):
    assert main(["launch", "-np", "1", "--log-dir", "logs", "--", "sh", "echo ran; exit 7"]) == 7
    printed = capfd.readouterr().out.splitlines()
    assert printed[0].startswith("mpirun -np 1 -H localhost:1") and printed[0].endswith("sh 'echo ran; exit 7'")
    assert printed[1] == "ran" and (job / "logs").is_dir()


def test_what_may_not_be_meant_is_noted(job, capfd):
    assert main(["launch", "--dry-run", "-H", "a:2,b", "-np", "4", "--env", "NOT_SET", "--", "true"]) == 0
    notes = ["--env NOT_SET: it is not set here, so it does not travel", "4 workers on 3 slots: some hosts get more"]
    found = capfd.readouterr().err.splitlines()
    assert len(found) == 2 and all(line.startswith(f"note: {n}") for line, n in zip(found, notes, strict=True)), found


def test_a_program_that_is_not_there_is_not_launched(job, capfd):
    assert main(["launch", "-np", "1", "--", "pyton", "a.py"]) == 2
    printed = capfd.readouterr()
    assert printed.out == "" and printed.err.startswith("error: pyton is no program here: expected one on the PATH")


def test_logs_overwrite_nothing(job, capfd):
    (job / "logs").mkdir()
    (job / "logs" / "mine").touch()
    for number in (2, 3):  # such as by `hvdkit restart`
        assert main(["launch", "-np", "1", "--log-dir", "logs", "--", "sh", "echo told"]) == 0
        assert f"--output-filename {job}/logs-{number} " in capfd.readouterr().out
        (job / f"logs-{number}" / "rank.0").touch()
    assert [path.name for path in (job / "logs").iterdir()] == ["mine"]
    assert main(["launch", "-np", "1", "--log-dir", "logs/mine/x", "--", "true"]) == 2
    assert "Not a directory" in capfd.readouterr().err


def test_an_exit_code_that_the_launcher_hides(job):
    assert main(["launch", "-np", "1", "--", "sh", 'echo 143 >>"$HVDKIT_EXIT_CODE_FILE"; exit 1']) == 143
    assert main(["launch", "-np", "1", "--", "sh", "exit 1"]) == 1


def test_horovodrun_gets_no_secret(job, capfd, monkeypatch):
    pretend(job / "bin", "horovodrun", "env")
    monkeypatch.setenv("MY_SECRET", "x")
    monkeypatch.setenv("ASKED", "y")
    assert main(["launch", "-np", "1", "--launcher", "horovodrun", "--env", "ASKED", "--", "true"]) == 0
    printed = capfd.readouterr().out
    assert "ASKED=y" in printed and "PATH=" in printed and "MY_SECRET" not in printed


def test_no_launcher(job, capfd, monkeypatch):
    assert main(["launch", "--launcher", "srun", "-np", "1", "--", "true"]) == 2
    assert capfd.readouterr().err.startswith("error: srun is not on the PATH: ")
    pretend(job / "bin", "mpirun", "echo my own")
    assert main(["launch", "-np", "1", "--", "true"]) == 2
    assert capfd.readouterr().err == "error: mpirun says 'my own' of its version: expected Open MPI 4 or 5, or MPICH.\n"


README = {"Open MPI 4.1": OPENMPI_4, "Open MPI 5": OPENMPI_5, "MPICH": MPICH, "Slurm": SRUN, "horovodrun": HOROVODRUN}


def test_the_readme_shows_these_commands():
    rows = dict(re.findall(r"^\| (.+?) \| `([^`]+)` \|$", (ROOT / "README.md").read_text(), re.MULTILINE))
    for name, installed in README.items():
        made = command(Specification(**{**TWO, "interface": "eth0"}), installed, {"PATH": "/usr/bin"})
        assert rows[name] == str(made)


def test_other_launchers_do_without_a_known_mpirun(job, capfd):
    pretend(job / "bin", "mpirun", "echo my own")
    pretend(job / "bin", "srun", "true")
    pretend(job / "bin", "horovodrun", "true")
    for launcher, word in (("srun", "--mpi=pmix"), ("horovodrun", "--gloo")):
        assert main(["launch", "--launcher", launcher, "-np", "1", "--dry-run", "--", "true"]) == 0
        assert word in capfd.readouterr().out


def test_srun_takes_the_options(tmp_path):
    """srun reads all options before it asks the controller, which there is none of here."""
    srun, needed = slurm.needed("srun", tmp_path)

    def told(*words):
        environment = {**os.environ, **needed}
        return subprocess.run([srun, *words], env=environment, capture_output=True, text=True, timeout=60).stderr

    if slurm.REACHED not in (bare := told("--ntasks=1", "true")):
        pytest.skip(f"srun does not begin here: {bare.strip().splitlines()[-1:]}")
    assert "unrecognized option" in told("--no-such-option", "true")
    whole = {"interface": "eth0", "tag_output": True, "log_directory": "/logs"}
    for wanted in ({**TWO, **whole}, {**UNEVEN, "ranks": 9}):
        made = command(Specification(**wanted), SRUN_MPICH, {"PATH": "", "SLURM_CPUS_PER_TASK": "2"})
        said = told(*made.words[1:])
        assert slurm.REACHED in said and "option" not in said and "nvalid" not in said
