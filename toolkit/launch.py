"""One specification of a job to the one right command of mpirun, horovodrun or srun.

`command` is a pure function of what is wanted and what is installed; `find` looks at what is installed. What the
commands have in common:

- Each host is given as many slots as it is to run ranks, so that every launcher places them alike, and what a
  launcher can't read of a hostfile does not reach it.
- Ranks are bound to no core: `toolkit.tuning` gives each its share of the host's cores as threads, which Open MPI's
  default, one core a rank for two ranks or fewer, would put on one core.
- A short list of environment variables goes to other hosts: `TRAVELS`, `TRAVELLING`, and those that are asked for.
- Nothing in them needs a shell's quoting on another host, where ssh and Horovod put paths into a shell's line.

Sources: mpirun(1) and `ompi_info --all` of Open MPI 4.1; prterun(1) and `prte_info --all` of Open MPI 5; MPICH's
"Using the Hydra process manager", and `mpiexec --help`; Slurm's srun(1); Horovod's `horovodrun --help` and
horovod/runner/mpi_run.py, gloo_run.py.
"""

from __future__ import annotations

import argparse
import itertools
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from toolkit import hostfile
from toolkit.ending import FILE, Notes
from toolkit.errors import UsageError
from toolkit.forwarding import ForwardedSignals
from toolkit.hostfile import Host
from toolkit.tuning import usable_cores

TRAVELS = ("PATH", "LD_LIBRARY_PATH", "PYTHONPATH", "VIRTUAL_ENV", "KERAS_BACKEND", "OMP_NUM_THREADS")
TRAVELLING = ("HOROVOD_", "HVDKIT_", "NCCL_")  # beginnings of names
LAUNCHERS = ("mpirun", "horovodrun", "srun")

SECRET = re.compile("SECRET|TOKEN|JWT|PASSW|CREDENTIAL|PRIVATE|(?:^|_)KEY(?:_|$)", re.IGNORECASE)
# What horovodrun itself needs besides: it sends whatever it has to the other hosts, with gloo on their command lines.
_AT_HOME = ("HOME", "USER", "LOGNAME", "SHELL", "TERM", "LANG", "TMPDIR", "SSH_AUTH_SOCK")
_AT_HOME_TOO = ("LC_", "OMPI_", "PMIX_", "PRTE_", "TF_CPP_", "SLURM_", "PBS_", "LSB_")
_JOBS = ("SLURM_JOB_NODELIST", "SLURM_NODELIST", "PBS_NODEFILE", "LSB_DJOB_HOSTFILE", "LSB_MCPU_HOSTS", "LSB_HOSTS")
_LOOPBACK = re.compile(r"localhost|127\.[0-9.]+|::1")
_NO_PREFIX = ("/", "/usr", "/usr/local")  # where a remote shell finds programs by itself
_LONGEST_WORD = 100_000  # bytes; Linux takes 131,072
# Open MPI 4's daemons, when nothing comes from a host that is cut off or down: after 10 s they ask it 3 times in 30 s,
# and end the job. By their own settings they wait 8 minutes; with something under way to it, for TCP, some 15: so it is
# sooner than a fifth of the default --stall-timeout, when the lost host's worker warns.
_ALIVE = {"oob_tcp_keepalive_time": "10", "oob_tcp_keepalive_intvl": "10", "oob_tcp_keepalive_probes": "3"}
_WITH_DOMAINS = {"orte_keep_fqdn_hostnames": "1"}  # else they cut names at the first dot, and log in to what is left

_UNREACHED = 255  # Open MPI's exit code where a daemon of its own did not begin; ssh's too
_PATH = re.compile(r"/[A-Za-z0-9_@+=.,/-]*")
_DIRECTORY = re.compile(r"/[A-Za-z0-9_@+=./-]*")  # Open MPI 5 has its own use for commas, the others for : and %
_INTERFACE = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,14}")  # of at most 15 characters, as in Linux
_VARIABLE = re.compile("[A-Za-z_][A-Za-z0-9_]*")


@dataclass(frozen=True)
class Specification:
    """A job, as a user describes it.

    Attributes:
        command: the script's command for one worker, such as `("python", "recipes/cnn_torch.py")`.
        directory: where every rank works, an absolute path.
        hosts: each once; none: this machine, or for srun, what Slurm chooses.
        ranks: ≥ 1; None: all slots of the hosts.
        interface: the network interface for MPI, Gloo and NCCL, of one name on all hosts; None: theirs to choose.
        ssh_port: 1 to 65535; None: ssh's choice.
        ssh_key: absolute path of the private key; None: ssh's choice.
        tag_output: begin each line of output with its rank.
        log_directory: absolute path for a file a rank, in the launcher's own layout; None: none.
        variables: names of environment variables that travel besides the short list.

    Raises:
        UsageError: one of them is not that, or would be code to a shell.
    """

    command: tuple[str, ...]
    directory: str
    hosts: tuple[Host, ...] = ()
    ranks: int | None = None
    interface: str | None = None
    ssh_port: int | None = None
    ssh_key: str | None = None
    tag_output: bool = False
    log_directory: str | None = None
    variables: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.command or not re.match("[^-]", self.command[0]) or ":" in self.command:
            raise UsageError(
                f"{shlex.join(self.command)!r} is no command to launch: expected a program first, and ':' nowhere as "
                "a word of its own, which MPI takes for the end of the command."
            )
        if self.ranks is not None and not 1 <= self.ranks <= hostfile.MOST_SLOTS * max(1, len(self.hosts)):
            most = hostfile.MOST_SLOTS * max(1, len(self.hosts))
            raise UsageError(f"-np is {self.ranks}: expected 1 to {most}.")
        if self.ssh_port is not None and not 1 <= self.ssh_port <= 65535:
            raise UsageError(f"--ssh-port is {self.ssh_port}: expected 1 to 65535.")
        plain = "an absolute path of letters, digits and _ @ + = . - alone, as a shell may read it"
        _check("--ssh-key", self.ssh_key, _PATH, plain)
        _check("--log-dir", self.log_directory, _DIRECTORY, plain)
        _check("--interface", self.interface, _INTERFACE, "one name such as eth0")
        for name in self.variables:
            _check("--env", name, _VARIABLE, "the name of a variable")


@dataclass(frozen=True)
class Installed:
    """What there is to launch with.

    Attributes:
        launcher: one of `LAUNCHERS`.
        program: how to call it: its name where that is on the PATH, or else its path.
        mpi: the MPI of the `mpirun` there: Open MPI, MPICH, or nothing where there is none.
        version: its first numbers, such as (4, 1); empty without it.
        prefix: where it is installed, for hosts that don't find it by themselves; None: they do.
        root: whether this is root, whom Open MPI refuses unless told otherwise.
        cores: that this machine offers to this process, ≥ 1.
        name: this machine's.
    """

    launcher: str
    program: str
    mpi: str = ""
    version: tuple[int, ...] = ()
    prefix: str | None = None
    root: bool = False
    cores: int = 1
    name: str = "localhost"


@dataclass(frozen=True)
class Command:
    """A launcher's command.

    Attributes:
        words: program and arguments.
        environment: variables to set for the launcher.
        kept: names of the variables that the launcher gets; None: all.
    """

    words: tuple[str, ...]
    environment: Mapping[str, str] = field(default_factory=dict)
    kept: frozenset[str] | None = None

    def __str__(self) -> str:
        """The command as one types it into a shell."""
        return " ".join([*(f"{name}={shlex.quote(v)}" for name, v in self.environment.items()), shlex.join(self.words)])


@dataclass(frozen=True)
class _Job:
    """A specification with all that follows from it for every launcher alike."""

    given: Specification
    installed: Installed
    hosts: tuple[Host, ...]  # with as many slots as ranks
    ranks: int
    crowded: bool  # whether a host has more ranks than slots, or this one more than cores
    away: bool  # whether any host is not this machine
    travels: tuple[str, ...]  # names of variables, each set
    settings: Mapping[str, str]  # variables for the ranks
    cores_per_rank: int | None  # in a Slurm job that says so
    daemons: tuple[str, ...]  # options of Open MPI 4 for its own daemons; those not set already

    @property
    def ssh(self) -> list[str]:
        """ssh's options."""
        words = [] if self.given.ssh_port is None else ["-p", str(self.given.ssh_port)]
        words += [] if self.given.ssh_key is None else ["-i", self.given.ssh_key]
        users = {host.user for host in self.hosts}
        if len(users) > 1:
            raise UsageError("the hosts have several users: give one to all, or give them to ssh, in ~/.ssh/config.")
        user = users.pop() if users else None
        return words + ([] if user is None else ["-l", user])

    @property
    def interface_of_daemons(self) -> str | None:
        """Open MPI's daemons have need of one on several hosts alone, and version 5 refuses them the loopback one."""
        return self.given.interface if self.away else None

    @property
    def places(self) -> str:
        """The hosts in one word, as -H takes them."""
        return ",".join(f"{host.name}:{host.slots}" for host in self.hosts)


def command(given: Specification, installed: Installed, environment: Mapping[str, str]) -> Command:
    """The one right command for a job.

    Args:
        given: the job.
        installed: what it is launched with.
        environment: of the launcher; of its variables' values only SLURM_CPUS_PER_TASK is read.

    Raises:
        UsageError: the launcher can't do what is asked; names what, and what to do.
    """
    job = _job(given, installed, environment)
    for host in job.hosts:
        if ":" in host.name:
            raise UsageError(f"{host.name}: {installed.launcher} has no place for an IPv6 address: give a name.")
    if installed.launcher == "mpirun":
        made = _OF_MPI[_kind(installed)](job)
    else:
        made = _horovodrun(job) if installed.launcher == "horovodrun" else _srun(job)
    longest = max(made.words, key=lambda word: len(os.fsencode(word)))
    if len(os.fsencode(longest)) > _LONGEST_WORD:
        raise UsageError(
            f"{longest[:30]!r}… has over {_LONGEST_WORD} bytes, more than a command's word may: give less."
        )
    if installed.launcher == "horovodrun":
        kept = {name for name in environment if name in _AT_HOME or name.startswith(_AT_HOME_TOO)}
        return replace(made, kept=frozenset({*job.travels, *(name for name in kept if not SECRET.search(name))}))
    return made


def find(launcher: str, environment: Mapping[str, str]) -> Installed:
    """What is installed here: on the PATH, or else beside this Python.

    Raises:
        UsageError: the launcher is not there, or of a kind that is not known here.
    """
    program = _program(launcher, environment)
    if program is None:
        raise UsageError(
            f"{launcher} is not on the PATH: activate its environment or load its module, or choose another --launcher."
        )
    mpirun = _program("mpirun", environment)
    mpi, version = _version(mpirun, environment, needed=launcher == "mpirun")
    prefix = "/" if mpirun is None else os.path.dirname(os.path.dirname(os.path.abspath(mpirun)))
    on_path = shutil.which(launcher, path=environment.get("PATH")) is not None
    return Installed(
        launcher=launcher,
        program=launcher if on_path else program,
        mpi=mpi,
        version=version,
        prefix=None if prefix in _NO_PREFIX else prefix,
        root=os.geteuid() == 0,
        cores=usable_cores(),
        name=socket.gethostname(),
    )


def known(text: str) -> tuple[str, tuple[int, ...]]:
    """MPI and version of what `mpirun --version` prints.

    Raises:
        UsageError: it is none that is known here.
    """
    found = re.search(r"\((Open MPI)\) (\d+)\.(\d+)|(HYDRA) build details:\s+Version:\s+(\d+)\.(\d+)", text)
    if found:
        name, *numbers = (part for part in found.groups() if part)
        kind, version = "MPICH" if name == "HYDRA" else name, tuple(map(int, numbers))
        if kind == "MPICH" or version[0] in (4, 5):
            return kind, version
    first = (text.strip().splitlines() or ["nothing"])[0][:100]
    raise UsageError(f"mpirun says {ascii(first)} of its version: expected Open MPI 4 or 5, or MPICH.")


def run(made: Command, log_directory: str | None = None) -> int:
    """Run a job's command to its end, with the signals that end jobs handed on to it.

    Returns:
        Its exit code; 128 and the signal's number where a signal ended it. Where that is 1, what a worker has noted,
        or else 128 and the number of a signal that was handed on.

    Raises:
        UsageError: it can't be started, or the directory for logs can't be made.
    """
    if log_directory is not None:
        try:
            os.makedirs(log_directory, exist_ok=True)
        except OSError as error:
            raise UsageError(
                f"--log-dir {log_directory}: {error.strerror}: name a directory that can be made."
            ) from None
    kept = {name: value for name, value in os.environ.items() if made.kept is None or name in made.kept}
    with ForwardedSignals() as signals, Notes() as notes:
        code = signals.follow(made.words, {**kept, **made.environment, **notes.environment})
        return notes.unhidden(code, signals.number)


def add_to(commands: Any) -> None:
    """Add the command `launch` to what `argparse.ArgumentParser.add_subparsers` gave."""
    parser = commands.add_parser(
        "launch",
        help="launch a script on this machine or many: prints the plain command, and runs it",
        usage="hvdkit launch [options] -- python recipes/cnn_torch.py [its options]",
    )
    parser.add_argument("-np", type=int, metavar="N", help="workers (default: all slots of the hosts)")
    source = parser.add_mutually_exclusive_group()
    source.add_argument(
        "--hostfile", metavar="FILE", help="default: the hosts of the Slurm, PBS or LSF job, or this one"
    )
    source.add_argument("-H", "--hosts", metavar="HOSTS", help="hosts and slots, such as node1:4,node2:4")
    parser.add_argument("--launcher", choices=LAUNCHERS, default="mpirun", help="default: mpirun")
    parser.add_argument("--dry-run", action="store_true", help="print the command, and don't run it")
    parser.add_argument("--interface", metavar="NAME", help="network interface, of the same name on all hosts")
    parser.add_argument("--ssh-port", type=int, metavar="PORT")
    parser.add_argument("--ssh-key", metavar="FILE", help="private key")
    parser.add_argument("--env", action="append", default=[], metavar="NAME", help="a variable that travels too")
    parser.add_argument("--tag-output", action="store_true", help="begin each line with its rank")
    parser.add_argument("--log-dir", metavar="DIR", help="for files by rank: DIR, or DIR-2, … where that has some")
    parser.add_argument("command", nargs="+", metavar="-- python script.py …", help="the command for one worker")
    parser.set_defaults(function=_command)


def _unused(directory: str) -> str:
    """The directory, or DIR-2, DIR-3 …: the first that is empty or not there, as a job may be started again."""
    places = itertools.chain([directory], (f"{directory}-{number}" for number in itertools.count(2)))
    return next(place for place in places if not _has_files(place))


def _has_files(directory: str) -> bool:
    try:
        return bool(os.listdir(directory))
    except OSError:  # `run` makes it, or says why it can't be
        return False


def _command(options: argparse.Namespace) -> int:
    given = Specification(
        command=tuple(options.command),
        directory=os.getcwd(),
        hosts=tuple(hosts_of(options, os.environ)),
        ranks=options.np,
        interface=options.interface,
        ssh_port=options.ssh_port,
        ssh_key=None if options.ssh_key is None else os.path.abspath(os.path.expanduser(options.ssh_key)),
        tag_output=options.tag_output,
        log_directory=None if options.log_dir is None else _unused(os.path.abspath(options.log_dir)),
        variables=tuple(options.env),
    )
    made = command(given, find(options.launcher, os.environ), os.environ)
    if not options.dry_run and shutil.which(given.command[0]) is None:
        raise UsageError(f"{given.command[0]} is no program here: expected one on the PATH after --, or its path.")
    for note in _notes(given, os.environ):
        print(f"note: {note}", file=sys.stderr)
    print(made, flush=True)
    if options.dry_run:
        return 0
    code = run(made, given.log_directory)
    if code == _UNREACHED and given.hosts:
        told = f"{options.launcher} ended with {code}, as it does where it can't reach a host"
        print(f"hvdkit launch: {told}: `{_doctor(options)}` says which, and why.", file=sys.stderr)
    return code


def _doctor(options: argparse.Namespace) -> str:
    """The command that looks at the same hosts in the same way."""
    shared = {
        "--hostfile": options.hostfile,
        "-H": options.hosts,
        "--interface": options.interface,
        "--ssh-port": options.ssh_port,
        "--ssh-key": options.ssh_key,
    }
    given = ((option, str(value)) for option, value in shared.items() if value is not None)
    return shlex.join(["hvdkit", "doctor", *itertools.chain.from_iterable(given)])


def _notes(given: Specification, environment: Mapping[str, str]) -> list[str]:
    """What may not be meant, and is done all the same."""
    slots = sum(host.slots for host in given.hosts)
    notes = [
        f"--env {name}: it is not set here, so it does not travel"
        for name in given.variables
        if name not in environment
    ]
    if given.ranks and given.hosts and given.ranks > slots:
        notes.append(f"{given.ranks} workers on {slots} slots: some hosts get more than their share")
    return notes


def hosts_of(options: argparse.Namespace, environment: Mapping[str, str]) -> list[Host]:
    """The hosts that --hostfile or --hosts give, or else the Slurm, PBS or LSF job; none: this machine."""
    if options.hostfile is not None:
        return hostfile.read(options.hostfile)
    if options.hosts is not None:
        return hostfile.parse(os.fsencode(options.hosts.replace(",", "\n")), "-H")
    return hostfile.from_environment(environment) if any(environment.get(name) for name in _JOBS) else []


def _check(option: str, value: str | None, pattern: re.Pattern[str], expected: str) -> None:
    if value is not None and not pattern.fullmatch(value):
        raise UsageError(f"{option} is {ascii(value)}: expected {expected}.")


def _program(name: str, environment: Mapping[str, str]) -> str | None:
    beside = os.path.dirname(sys.executable)
    return shutil.which(name, path=environment.get("PATH")) or shutil.which(name, path=beside)


def _version(mpirun: str | None, environment: Mapping[str, str], *, needed: bool) -> tuple[str, tuple[int, ...]]:
    """What `known` makes of it; where it isn't needed, nothing for one that is not known or not there."""
    if mpirun is None:
        return "", ()
    asked: dict[str, Any] = {"env": dict(environment), "stdin": subprocess.DEVNULL, "timeout": 30}
    try:
        told = subprocess.run([mpirun, "--version"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **asked).stdout
        return known(told.decode(errors="replace"))
    except (OSError, subprocess.TimeoutExpired, UsageError) as error:
        if not needed:
            return "", ()
        if isinstance(error, UsageError):
            raise
        reason = getattr(error, "strerror", None) or "no answer in 30 s"
        raise UsageError(f"{mpirun} --version: {reason}: expected Open MPI 4 or 5, or MPICH.") from None


def _kind(installed: Installed) -> str:
    return f"{installed.mpi} {installed.version[0]}" if installed.mpi == "Open MPI" else installed.mpi


def _job(given: Specification, installed: Installed, environment: Mapping[str, str]) -> _Job:
    hosts = given.hosts
    if not hosts and installed.launcher == "srun":
        if given.ranks is None:
            raise UsageError("neither -np, nor hosts, nor a Slurm job say how many workers to launch: give -np.")
        slots = ranks = given.ranks
    else:
        hosts = hosts or (Host("localhost", min(installed.cores, hostfile.MOST_SLOTS)),)
        slots = sum(host.slots for host in hosts)
        ranks = given.ranks or slots
        hosts = placed(hosts, ranks)
    names = {installed.name, installed.name.partition(".")[0]}
    here = [host for host in hosts if _LOOPBACK.fullmatch(host.name) or host.name in names]
    settings = {}
    if given.interface:
        settings = {"HOROVOD_GLOO_IFACE": given.interface, "NCCL_SOCKET_IFNAME": given.interface}
    cores = environment.get("SLURM_CPUS_PER_TASK", "")
    return _Job(
        given=given,
        installed=installed,
        hosts=hosts,
        ranks=ranks,
        crowded=ranks > slots or any(host.slots > installed.cores for host in here),
        away=len(here) < len(hosts),
        travels=travelling(given.variables, environment, settings),
        settings=settings,
        cores_per_rank=int(cores) if re.fullmatch("[1-9][0-9]{0,5}", cores) else None,
        daemons=_daemons(hosts, environment) if len(here) < len(hosts) else (),
    )


def placed(hosts: Sequence[Host], ranks: int) -> tuple[Host, ...]:
    """The hosts in their order with as many slots as ranks: to the brim, then one more for each in turn."""
    counts, left = [], ranks
    for host in hosts:
        counts.append(min(host.slots, left))
        left -= counts[-1]
    while left:
        before = left
        for number, host in enumerate(hosts):
            if left and counts[number] < (host.max_slots or hostfile.MOST_SLOTS):
                counts[number] += 1
                left -= 1
        if left == before:
            raise UsageError(f"-np is {ranks}: expected at most {ranks - left}, which the hosts' max_slots allow.")
    return tuple(replace(host, slots=n, max_slots=None) for host, n in zip(hosts, counts, strict=True) if n)


def travelling(asked: Iterable[str], environment: Mapping[str, str], settings: Mapping[str, str]) -> tuple[str, ...]:
    """Names of the variables that are to travel and are set, but for those that this launch sets."""
    listed = [name for name in TRAVELS if name in environment]
    listed += sorted(name for name in environment if name.startswith(TRAVELLING) and not SECRET.search(name))
    plain = (name for name in [*listed, *asked] if name in environment and _VARIABLE.fullmatch(name))
    return tuple(name for name in dict.fromkeys(plain) if name not in settings and name != FILE)


def _daemons(hosts: Sequence[Host], environment: Mapping[str, str]) -> tuple[str, ...]:
    domains = any("." in host.name and not re.fullmatch("[0-9.]+", host.name) for host in hosts)
    wanted = _ALIVE | (_WITH_DOMAINS if domains else {})
    settings = ((name, value) for name, value in wanted.items() if f"OMPI_MCA_{name}" not in environment)
    return tuple(word for setting in settings for word in ("--mca", *setting))


def _prefix(job: _Job) -> list[str]:
    """Where Open MPI's daemons find themselves on other hosts."""
    if not job.away or job.installed.prefix is None:
        return []
    expected = "letters, digits and _ @ + = . - alone in its path, which a shell reads on every host: install it there"
    _check("Open MPI's directory", job.installed.prefix, _PATH, expected)
    return ["--prefix", job.installed.prefix]


def _openmpi_4(job: _Job) -> Command:
    words = [job.installed.program, "-np", str(job.ranks), "-H", job.places, "--bind-to", "none", "--map-by", "slot"]
    words += ["--oversubscribe"] if job.crowded else []
    words += _prefix(job)
    words += ["--allow-run-as-root"] if job.installed.root else []
    words += ["--mca", "plm_rsh_args", " ".join(job.ssh)] if job.away and job.ssh else []
    if job.given.interface:
        words += [
            "--mca",
            "btl_tcp_if_include",
            job.given.interface,
            "--mca",
            "oob_tcp_if_include",
            job.given.interface,
        ]
    words += job.daemons
    words += ["--tag-output"] if job.given.tag_output else []
    words += ["--output-filename", job.given.log_directory] if job.given.log_directory else []
    return Command((*words, *_openmpi_tail(job)))


def _openmpi_5(job: _Job) -> Command:
    mapping = "slot:OVERSUBSCRIBE" if job.crowded else "slot"
    words = [job.installed.program, "-np", str(job.ranks), "-H", job.places, "--bind-to", "none", "--map-by", mapping]
    words += _prefix(job)
    words += ["--allow-run-as-root"] if job.installed.root else []
    words += ["--prtemca", "plm_ssh_args", " ".join(job.ssh)] if job.away and job.ssh else []
    words += ["--mca", "btl_tcp_if_include", job.given.interface] if job.given.interface else []
    words += ["--prtemca", "prte_if_include", job.interface_of_daemons] if job.interface_of_daemons else []
    output = ["tag"] if job.given.tag_output else []
    output += [f"dir={job.given.log_directory}"] if job.given.log_directory else []
    words += ["--output", ",".join(output)] if output else []
    return Command((*words, *_openmpi_tail(job)))


def _openmpi_tail(job: _Job) -> list[str]:
    words = ["--wdir", job.given.directory]
    for text in (*job.travels, *(f"{name}={value}" for name, value in job.settings.items())):
        words += ["-x", text]
    return [*words, *job.given.command]


def _mpich(job: _Job) -> Command:
    words = [job.installed.program, "-np", str(job.ranks), "-hosts", job.places, "-bind-to", "none"]
    settings = dict(job.settings)
    if job.given.interface:
        words += ["-iface", job.given.interface]
        settings |= {"FI_TCP_IFACE": job.given.interface, "UCX_NET_DEVICES": job.given.interface}
    words += ["-prepend-rank"] if job.given.tag_output else []
    if job.given.log_directory:
        logs = f"{job.given.log_directory}/rank.%r"
        words += ["-outfile-pattern", f"{logs}.stdout", "-errfile-pattern", f"{logs}.stderr"]
    words += ["-wdir", job.given.directory]
    words += ["-genvlist", ",".join(job.travels)] if job.travels else ["-genvnone"]
    for name, value in settings.items():
        words += ["-genv", name, value]
    ssh = {"HYDRA_LAUNCHER_EXTRA_ARGS": " ".join(job.ssh)} if job.away and job.ssh else {}
    return Command((*words, *job.given.command), ssh)


def _srun(job: _Job) -> Command:
    if job.given.ssh_port or job.given.ssh_key or any(host.user for host in job.hosts):
        raise UsageError("srun does not log in by ssh: leave out port, key and user, or choose --launcher mpirun.")
    words = [job.installed.program, f"--ntasks={job.ranks}"]
    slots = {host.slots for host in job.hosts}
    if len(slots) == 1:
        nodes = hostfile.write(job.hosts, "slurm")
        words += [f"--nodes={len(job.hosts)}", f"--nodelist={nodes}", f"--ntasks-per-node={slots.pop()}"]
    elif slots:
        nodes = ",".join(name for host in job.hosts for name in [host.name] * host.slots)  # 22.05 knows no name*count
        words += ["--distribution=arbitrary", f"--nodelist={nodes}"]
    words += ["--overcommit"] if job.crowded else []
    words += [] if job.cores_per_rank is None else [f"--cpus-per-task={job.cores_per_rank}"]
    words += [f"--mpi={'pmi2' if job.installed.mpi == 'MPICH' else 'pmix'}", "--cpu-bind=none", "--kill-on-bad-exit=1"]
    words += ["--label"] if job.given.tag_output else []
    if job.given.log_directory:
        logs = f"{job.given.log_directory}/rank.%t"
        words += [f"--output={logs}.stdout", f"--error={logs}.stderr"]
    settings = dict(job.settings)
    if job.given.interface:
        tcp = {"Open MPI": ("OMPI_MCA_btl_tcp_if_include",), "MPICH": ("FI_TCP_IFACE", "UCX_NET_DEVICES")}
        settings |= dict.fromkeys(tcp.get(job.installed.mpi, ()), job.given.interface)
    export = ",".join([*job.travels, *(f"{name}={value}" for name, value in settings.items())])
    return Command((*words, f"--chdir={job.given.directory}", f"--export={export or 'NONE'}", *job.given.command))


def _horovodrun(job: _Job) -> Command:
    if any(host.user for host in job.hosts):
        raise UsageError("horovodrun has no place for a user: give it to ssh, in ~/.ssh/config.")
    words = [job.installed.program, "-np", str(job.ranks), "-H", job.places]
    if job.installed.mpi == "Open MPI":
        words += ["--mpi", *_through_horovodrun(job)]
    else:  # of MPICH's mpirun it uses options that are Intel's, and hosts alone that have equal slots
        _check("the working directory", job.given.directory, _PATH, "letters, digits and _ @ + = . - alone for gloo")
        words += ["--gloo"]
    words += ["--network-interface", job.given.interface] if job.given.interface else []
    words += ["--ssh-port", str(job.given.ssh_port)] if job.given.ssh_port else []
    words += ["--ssh-identity-file", job.given.ssh_key] if job.given.ssh_key else []
    words += ["--output-filename", job.given.log_directory] if job.given.log_directory else []
    return Command((*words, *job.given.command))


def _through_horovodrun(job: _Job) -> list[str]:
    """What horovodrun puts into Open MPI's command, through a shell, so quoted for that."""
    words = _prefix(job)
    if job.installed.version[0] == 4:
        words += ["--oversubscribe"] if job.crowded else []
        words += ["--mca", "oob_tcp_if_include", job.interface_of_daemons] if job.interface_of_daemons else []
        words += job.daemons
    else:
        words += ["--prtemca", "prte_if_include", job.interface_of_daemons] if job.interface_of_daemons else []
    made = [f"--mpi-args={shlex.join([*words, '--wdir', job.given.directory])}"]
    if job.installed.version[0] == 4:
        return made
    mapping = "slot:OVERSUBSCRIBE" if job.crowded else "slot"  # its own -bind-to none is taken for a program there
    return [*made, f"--binding-args=--bind-to none --map-by {mapping}"]


_OF_MPI: dict[str, Callable[[_Job], Command]] = {"Open MPI 4": _openmpi_4, "Open MPI 5": _openmpi_5, "MPICH": _mpich}
