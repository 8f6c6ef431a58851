"""Hostfiles and batch systems' environments: what is read, what is refused and in which words, and what is written.

A long hunt: make fuzz
"""

import itertools
import shlex
import subprocess
import sys
import time

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from tests.launching import ROOT
from toolkit import hostfile
from toolkit.cli import main
from toolkit.errors import UsageError
from toolkit.hostfile import Host

READ = {
    "Open MPI": ("node1 slots=4 max_slots=8\nnode2\n", [Host("node1", 4, 8), Host("node2")]),
    "its other words": ("a cpu=2 max-slots=3\nb count=4 slots_max=4\n", [Host("a", 2, 3), Host("b", 4, 4)]),
    "blanks around =": ("  node1\tslots = 4\f max_slots =8\v\n", [Host("node1", 4, 8)]),
    "max_slots alone": ("node1 max_slots=8\n", [Host("node1", 8, 8)]),
    "comments": ("# nodes of rack 1 – é\n\n \t\na slots=2 # 4 later\n// b\nc slots=1//x\n#", [Host("a", 2), Host("c")]),
    "several lines": ("a slots=2\nb\na slots=3\na\n", [Host("a", 6), Host("b")]),
    "a limit over several lines": ("a slots=2 max_slots=6\na slots=4\n", [Host("a", 6, 6)]),
    "users": ("b@a slots=2\nb user-name=e\nb\nc:2 user=x.y\n", [
        Host("a", 2, user="b"), Host("b", 2, user="e"), Host("c", 2, user="x.y"),
    ]),
    "IPv4": ("10.0.0.1 slots=2\nbob@10.0.0.2:3\n", [Host("10.0.0.1", 2), Host("10.0.0.2", 3, user="bob")]),
    "IPv6": ("[FE80::1]:2\nfe80:0::1 slots=3\nbob@[::1]\n2001:db8::7 slots=2\n", [
        Host("fe80::1", 5), Host("::1", user="bob"), Host("2001:db8::7", 2),
    ]),
    "MPICH": ("node1:4\nnode2:2\nnode1:1\n", [Host("node1", 5), Host("node2", 2)]),
    "PBS": ("n1.site.edu\nn1.site.edu\nn2.site.edu\nn1.site.edu\n", [Host("n1.site.edu", 3), Host("n2.site.edu")]),
    "no last newline": ("a slots=2", [Host("a", 2)]),
    "Windows": ("\ufeffa slots=2\r\nb\r\n\r\n", [Host("a", 2), Host("b")]),
    "underscores, digits": ("gpu_node-1\n1node\n_x\n", [Host("gpu_node-1"), Host("1node"), Host("_x")]),
    "most slots": ("a slots=010000\n", [Host("a", 10_000)]),
}  # fmt: skip
REFUSED = {
    "a slots=0": "a has 0 slots: expected 1 to 10000.",
    "a:0": "a has 0 slots: expected 1 to 10000.",
    "a slots=10001": "a has 10001 slots: expected 1 to 10000.",
    "a slots=-1": "'-1' is no number of slots: expected 1 to 10000.",
    "a slots=": "'' is no number of slots: expected 1 to 10000.",
    "a slots=4x": "'4x' is no number of slots: expected 1 to 10000.",
    "a slots=" + "9" * 5000: "'" + "9" * 57 + "...' is no number of slots: expected 1 to 10000.",
    "a:": "'' is no number of slots: expected 1 to 10000.",
    "a:x": "'x' is no number of slots: expected 1 to 10000.",
    "[::1]:": "'' is no number of slots: expected 1 to 10000.",
    "a slots=4 max_slots=2": "a has max_slots=2: expected 4, its slots, to 10000.",
    "a slots=4 slots=2": "'slots=2' gives slots again: expected it once a line.",
    "a:4 slots=4": "'slots=4' gives slots again: expected it once a line.",
    "a 4": "'4' follows the host: expected slots=N, max_slots=N or user=NAME.",
    "a b": "'b' follows the host: expected slots=N, max_slots=N or user=NAME.",
    "a slots": "'slots' follows the host: expected slots=N, max_slots=N or user=NAME.",
    "a = b": "'a' is set before a host is named: expected the host first.",
    "a == b": "'a' is set before a host is named",
    "a b = = c": "'b' is no setting of a host",
    "a slots = = 4": "'=' is no number of slots",
    "a sockets=2": "'sockets' is no setting of a host that is known here: expected slots=N, max_slots=N or user=NAME.",
    "a port=2222": "'port' is no setting of a host that is known here",
    "a SLOTS=2": "'SLOTS' is no setting of a host that is known here",
    "slots=4": "'slots' is set before a host is named: expected the host first.",
    "+n0": "'+n0' counts within an allocation, which a file does not have: name the host itself.",
    "+e:2 slots=3": "'+e:2' counts within an allocation",
    "^a": "'^a' excludes a host",
    "rank 0=a slot=1": "'rank' begins a line of a rank file: give a hostfile, a line a host.",
    "@a": "'' is no user: expected letters, digits, '_', '.' and '-'.",
    "-x@a": "'-x' is no user",
    "a user=$(id)": "'$(id)' is no user",
    "a@b@c": "'a@b' is no user",
    "x@a user=y": "'user=y' gives user again",
    "-oProxyCommand=x": "'-oProxyCommand' is set before a host is named",
    "-oProxyCommand": "'-oProxyCommand' is no host's name: expected letters, digits, '_' and '-', between dots",
    "a;reboot": "'a;reboot' is no host's name",
    "$(reboot)": "'$(reboot)' is no host's name",
    "`reboot`": "'`reboot`' is no host's name",
    "'a'": "\"'a'\" is no host's name",
    "a,b": "'a,b' is no host's name",
    "a*": "'a*' is no host's name",
    "a|b": "'a|b' is no host's name",
    "/*": "'/*' is no host's name",
    "a\\": "'a\\\\' is no host's name",
    "a-": "'a-' is no host's name",
    "a..b": "'a..b' is no host's name",
    "a.": "'a.' is no host's name",
    "a" * 64: "'" + "a" * 57 + "...' is no host's name",
    "a." * 126 + "aa": "...' is no host's name",
    "10.0.0.300": "'10.0.0.300' is no IP address: expected one, or a host's name.",
    "10.0.1": "'10.0.1' is no IP address",
    "4": "'4' is no IP address",
    "fe80::1%eth0": "'fe80::1%eth0' is no host's name",
    "a:b:c": "'a:b:c' is no IP address",
    "[a]": "'[a]' is no IPv6 address, which brackets are for: expected [address].",
    "[::1": "'[::1' is no IP address",
    "[::1]x": "'[::1]x' is no IP address",
    "nöde": "the character '\\xf6' is in the line: expected plain ASCII.",
    "a\u00a0slots=2": "the character '\\xa0' is in the line",
    "a\u2028b": "the character '\\u2028' is in the line",
    "a\x1b[2J": "the character '\\x1b' is in the line",
    "a\x00": "the character '\\x00' is in the line",
    "a\rb": "the character '\\r' is in the line",
}


@pytest.mark.parametrize("name", READ)
def test_what_is_read(name):
    text, hosts = READ[name]
    assert hostfile.parse(text.encode(), "f") == hosts


@pytest.mark.parametrize("line", REFUSED, ids=ascii)
def test_what_is_refused_is_named_with_file_and_line(line):
    with pytest.raises(UsageError) as refused:
        hostfile.parse(f"# one\nb slots=2\n{line}\nc\n".encode(), "my hosts")
    text = str(refused.value)
    assert text.startswith("my hosts:3: ") and REFUSED[line] in text and text.isprintable() and len(text) < 250, text


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a slots=2\n\na slots=9999\n", "f:3: a has 10001 slots: expected 1 to 10000."),
        ("bob@a\neve@a\n", "f:2: a has user=eve, and user=bob before: expected the same."),
        ("a max_slots=4\na max_slots=3\n", "f:2: a has max_slots=3, and max_slots=4 before: expected the same."),
        ("a slots=2 max_slots=3\na slots=2\n", "f:2: a has max_slots=3: expected 4, its slots, to 10000."),
        ("a slots=2 max_slots=3\n" * 2, "f:1: a has max_slots=3: expected 4, its slots, to 10000."),
        ("", "f: names no host: expected lines such as 'node1 slots=4'."),
        (" \n# a\n", "f: names no host: expected lines such as 'node1 slots=4'."),
        ("a\n" * 10_001, "f:1: a has 10001 slots: expected 1 to 10000."),
        ("\n".join(f"n{i}" for i in range(65_537)), "f:65537: n65536 is one more than the 65536 hosts"),
        ("#" * (4 << 20) + "\n", "f: has more than 4194304 bytes: expected a hostfile."),
    ],
)  # fmt: skip
def test_what_lines_say_together_is_checked(text, said):
    with pytest.raises(UsageError) as refused:
        hostfile.parse(text.encode(), "f")
    assert str(refused.value).startswith(said), refused.value


@pytest.mark.parametrize("name", ["-x", "a b", "a\n", "", "[::1]", "é", "a$b"])
def test_no_host_is_made_of_what_is_no_name(name):
    with pytest.raises(UsageError):
        Host(name)


def slurm(nodes, tasks):
    return {"SLURM_JOB_NODELIST": nodes, "SLURM_TASKS_PER_NODE": tasks}


GPUS = [Host("gpu01", 2), Host("gpu02", 2), Host("gpu03", 2), Host("gpu04", 2), Host("gpu07", 2), Host("login1")]


@pytest.mark.parametrize(
    ("environment", "hosts"),
    [
        (slurm("gpu[01-04,07],login1", "2(x5),1"), GPUS),
        ({"SLURM_NODELIST": "gpu[01-04,07],login1", "SLURM_TASKS_PER_NODE": "2(x3),2,2,1"}, GPUS),
        ({**slurm("a,b", ""), "SLURM_NTASKS_PER_NODE": "4"}, [Host("a", 4), Host("b", 4)]),
        ({**slurm("a,b", ""), "SLURM_JOB_CPUS_PER_NODE": "8,4"}, [Host("a", 8), Host("b", 4)]),
        ({**slurm("a", "1"), "SLURM_NTASKS_PER_NODE": "4"}, [Host("a")]),
        (slurm("r[1-2]n[08-10]", "1(x6)"), [Host(f"r{r}n{n}") for r in (1, 2) for n in ("08", "09", "10")]),
        (slurm("n[99-101],n[099-100]", "1(x5)"), [Host("n99"), Host("n100", 2), Host("n101"), Host("n099")]),
        (slurm("a,a,n[1,1]", "1,2,3,4"), [Host("a", 3), Host("n1", 7)]),
        ({"LSB_MCPU_HOSTS": "hostA 2 hostB 16 hostA 1 "}, [Host("hostA", 3), Host("hostB", 16)]),
        ({"LSB_HOSTS": "hostA hostA hostB"}, [Host("hostA", 2), Host("hostB")]),
        ({"LSB_MCPU_HOSTS": "a 2", "LSB_HOSTS": "b b"}, [Host("a", 2)]),
        ({**slurm("a", "1"), "LSB_HOSTS": "b b"}, [Host("a")]),
    ],
)  # fmt: skip
def test_environments(environment, hosts):
    assert hostfile.from_environment(environment) == hosts


@pytest.mark.parametrize("name", ["PBS_NODEFILE", "LSB_DJOB_HOSTFILE"])
def test_files_of_batch_systems(name, tmp_path):
    path = tmp_path / "nodes"
    path.write_text("n2\nn1\nn2\n")
    assert hostfile.from_environment({name: str(path), "LSB_HOSTS": "other"}) == [Host("n2", 2), Host("n1")]
    path.write_text("n2\nn2;x\n")
    with pytest.raises(UsageError, match=f"^{name}: {path}:2: 'n2;x' is no host's name"):
        hostfile.from_environment({name: str(path)})


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({}, "the environment is of no Slurm, PBS or LSF job: none of SLURM_JOB_NODELIST, "),
        ({"SLURM_JOB_NODELIST": "a"}, "SLURM_JOB_NODELIST is set, but none of SLURM_TASKS_PER_NODE, "),
        (slurm("a[1-3]", "2,1"), "SLURM_TASKS_PER_NODE: has slots for 2 hosts: expected 3, as SLURM_JOB_NODELIST "),
        (slurm("a[3-1]", "1"), "SLURM_JOB_NODELIST: '3-1' is no range of numbers in brackets: expected such as 01-04"),
        (slurm("a[1-]", "1"), "SLURM_JOB_NODELIST: '1-' is no range"),
        (slurm("a[]", "1"), "SLURM_JOB_NODELIST: '' is no range"),
        (slurm("b,a[1", "1"), "SLURM_JOB_NODELIST: 'a[1' is no node list: expected such as gpu[01-04,07],login1."),
        (slurm("a1]", "1"), "SLURM_JOB_NODELIST: 'a1]' is no node list"),
        (slurm("a[[1]]", "1"), "SLURM_JOB_NODELIST: 'a[[1]]' is no node list"),
        (slurm("a,,b", "1"), "SLURM_JOB_NODELIST: ',b' is no node list"),
        (slurm("a,", "1"), "SLURM_JOB_NODELIST: '' is no node list"),
        (slurm("a[1-2:1]", "1"), "SLURM_JOB_NODELIST: '1-2:1' is no range"),
        (slurm("a[1-999999999]", "1"), "SLURM_JOB_NODELIST: '[1-999999999]' makes more than 65536 hosts"),
        (slurm("a[1-999999999999]", "1"), "SLURM_JOB_NODELIST: '1-999999999999' is no range"),
        (slurm("a" + "[1-9]" * 50, "1"), "SLURM_JOB_NODELIST: 'a[1-9]"),
        (slurm("a[1-40000],a[1-40000]", "1"), "SLURM_JOB_NODELIST: 'a[1-40000]' makes more than 65536 hosts"),
        (slurm("a", "1(x999999999)"), "SLURM_TASKS_PER_NODE: '1(x999999999)' makes more than 65536 hosts"),
        (slurm("a", "0"), "SLURM_TASKS_PER_NODE: a has 0 slots: expected 1 to 10000."),
        (slurm("a", "2(3)"), "SLURM_TASKS_PER_NODE: '2(3)' is no number of slots: expected such as 2(x3),1."),
        (slurm("$(x)", "1"), "SLURM_JOB_NODELIST: '$(x)' is no host's name"),
        ({"LSB_MCPU_HOSTS": "a 2 b"}, "LSB_MCPU_HOSTS: 'b' has no number of slots: expected 'host slots' in pairs."),
        ({"LSB_MCPU_HOSTS": "a b"}, "LSB_MCPU_HOSTS: 'b' is no number of slots"),
        ({"LSB_HOSTS": " "}, "LSB_HOSTS: names no host"),
        ({"PBS_NODEFILE": "/no/such"}, "PBS_NODEFILE: /no/such: No such file or directory: expected a hostfile."),
    ],
)  # fmt: skip
def test_what_is_wrong_in_an_environment_is_named(environment, said):
    with pytest.raises(UsageError) as refused:
        hostfile.from_environment(environment)
    assert str(refused.value).startswith(said), refused.value


HOSTILE = [
    b"a " + b"=" * 4_000_000,
    b"a " + b"slots=1 " * 500_000,
    b"\n" * 4_000_000,
    b"@" * 4_000_000,
    b"a-" * 2_000_000,
    b"9" * 4_000_000,
    b"[" * 4_000_000,
    b"".join(b"n%d\n" % (i % 60_000) for i in range(500_000)),
    slurm("[" * 1_000_000, "1"),
    slurm("a[" * 1_000_000, "1"),
    slurm("," * 1_000_000, "1"),
    slurm("[" + "1," * 1_000_000 + "1]", "1"),
    slurm("a[1-65536]", "1(x65536)"),
    slurm(",".join(["a[1-60000]"] * 9999), "1"),
    slurm("a", "9" * 4_000_000),
    {**slurm("a[1-65536]", ""), "SLURM_NTASKS_PER_NODE": "1(x65530)"},
]


@pytest.mark.parametrize("given_to", HOSTILE, ids=range(len(HOSTILE)))
def test_nothing_takes_long(given_to):
    start = time.process_time()
    try:
        hosts = hostfile.from_environment(given_to) if isinstance(given_to, dict) else hostfile.parse(given_to, "f")
        assert len(hosts) in (60_000, 65_536)
    except UsageError:
        pass
    assert time.process_time() - start < 20


# --- what is written is read again as the same

LETTERS = "abzAZ019_"
labels = st.text(LETTERS + "-", max_size=5).map(lambda text: f"x{text}0")
names = st.lists(labels, min_size=1, max_size=3).map(".".join)
stems = st.sampled_from(["n", "n-", "gpu", "r1n"])
names |= st.builds("{}{:0{}d}".format, stems, st.integers(0, 120), st.integers(1, 4))
names |= st.ip_addresses(v=4).map(str)
users = st.none() | st.text(LETTERS + "-", max_size=8).map(lambda text: f"u{text}")


@st.composite
def lists_of_hosts(draw, names=names, users=users, limits=True):
    chosen = draw(st.lists(names, min_size=1, max_size=12, unique=True))
    hosts = []
    for name in chosen:
        slots = draw(st.integers(1, 9) | st.integers(1, 10_000))
        limit = draw(st.none() | st.integers(slots, 10_000)) if limits else None
        hosts.append(Host(name, slots, limit, draw(users)))
    return hosts


@given(lists_of_hosts(names | st.ip_addresses(v=6).map(str)))
def test_open_mpi_as_written_is_read(hosts):
    assert hostfile.parse(hostfile.write(hosts, "openmpi").encode(), "f") == hosts


@given(lists_of_hosts(limits=False))
def test_mpich_as_written_is_read(hosts):
    assert hostfile.parse(hostfile.write(hosts, "mpich").encode(), "f") == hosts


@given(lists_of_hosts(users=st.none(), limits=False))
def test_horovodrun_as_written_is_read(hosts):
    option = hostfile.write(hosts, "horovodrun")
    assert hostfile.parse(option.replace(",", "\n").encode(), "f") == hosts


counted = st.builds("n{:0{}d}".format, st.integers(0, 120), st.integers(1, 3)) | names


@given(lists_of_hosts(names=counted, users=st.none(), limits=False), st.booleans())
@example([Host(f"n{i}") for i in (8, 9, 10, 11, 99, 100)], False)
@example([Host(n) for n in ("n08", "n09", "n10", "n099", "n100", "n", "n0", "n00")], False)
@example([Host("n999999999"), Host("n1000000000"), Host("n12345678901"), Host("n12345678902")], False)
def test_slurm_as_written_is_read(hosts, in_order):
    hosts = sorted(hosts, key=lambda host: (len(host.name), host.name)) if in_order else hosts
    tasks = ",".join(f"{slots}(x{len(list(same))})" for slots, same in itertools.groupby(host.slots for host in hosts))
    assert hostfile.from_environment(slurm(hostfile.write(hosts, "slurm"), tasks)) == hosts


def test_node_lists_are_compressed():
    hosts = hostfile.from_environment(slurm("gpu[01-04,07],login1,n[9-11],m,10.0.0.[1-2],n5", "1(x13)"))
    assert hostfile.write(hosts, "slurm") == "gpu[01-04,07],login1,n[9-11],m,10.0.0.[1-2],n5"


@pytest.mark.parametrize(
    ("host", "syntax", "said"),
    [
        (Host("::1"), "mpich", "::1: MPICH's hostfile has no place for an IPv6 address: give the host's name."),
        (Host("::1"), "horovodrun", "::1: horovodrun has no place for an IPv6 address"),
        (Host("::1"), "slurm", "::1: Slurm's node list has no place for an IPv6 address"),
        (Host("a", user="bob"), "horovodrun", "bob@a: horovodrun has no place for a user: give it to ssh"),
        (Host("a", user="bob"), "slurm", "bob@a: Slurm's node list has no place for a user"),
        (Host("a", user="bob.x"), "openmpi", "bob.x@a: Open MPI would take bob for the host: give the user to ssh."),
    ],
)
def test_what_a_program_cannot_be_told_is_refused(host, syntax, said):
    with pytest.raises(UsageError) as refused:
        hostfile.write([Host("b"), host], syntax)
    assert str(refused.value).startswith(said)


# --- whatever a file or an environment holds, it is read or refused in one line

NAMES = ["node1", "node1", "node2", "gpu01.site.edu", "n_3", "10.0.0.1", "::1", "[::1]", "localhost"]
SETTINGS = ["slots=4", "slots = 2", "cpu=1", "max_slots=9", "max-slots = 9", "user=bob", ":3", "# more", "//", "\r", ""]
BAD = [
    "[a]", "n[1-3]", "10.0.0.300", "fe80::1%eth0", "@", "bob@", ":", ":0", "=", "slots", "slots=0", "max_slots=1", "4",
    "99999999999", "-1", "+n0", "+e:1", "^", "rank", "sockets=2", "port=22", "/*", "*/", '"', "'", "`", "$(id)", "${x}",
    ";", "|", "&", ">", "\\", "-", "-x", "-oProxyCommand=", ",", "*", "~", "%", ".", "\t", "\f", "\x0b", "\x1c", "\x85",
    "\xa0", "\u2028", "\ufeff", "\0", "\x1b[2J", "é", "²", "１", "\ud800", "\n",
]  # fmt: skip


@st.composite
def spoiled(draw, right, bad):
    """Something right, sometimes with a piece put in or cut out."""
    text = draw(right)
    for _ in range(draw(st.sampled_from([0, 0, 1, 1, 2]))):
        at = draw(st.integers(0, len(text)))
        piece = draw(st.sampled_from(["", *bad]) | st.text(max_size=3))
        text = text[:at] + piece + text[at + draw(st.integers(0, 2)) :]
    return text


line = st.builds(
    "{}{} {}".format,
    st.sampled_from(["", "", "bob@"]),
    st.sampled_from(NAMES),
    st.lists(st.sampled_from(SETTINGS), max_size=2, unique=True).map(" ".join),
).map(lambda text: text.replace(" :", ":"))
files = spoiled(st.lists(line, max_size=6).map("\n".join), BAD).map(lambda text: text.encode("utf-8", "surrogatepass"))
files |= st.binary(max_size=60)
IN_LISTS = ["[", "]", "-", ",", "1-3", "[1-9]", "99999999", "01", "(x3)", "(x", ")", "²", "\n", " ", "$x", "\0"]
node_lists = st.sampled_from(["n[1-3]", "gpu[01-04,07],login1", "r[1-2]n[08-10]", "n,m", "10.0.0.[1-2]", "n[1,1]"])
counts = st.sampled_from(["2(x3)", "2(x4),3,1", "1(x6)", "4,8", "1(x2)", "2", "n 1 m 2", "n m n"])
variables = st.fixed_dictionaries(
    {},
    optional={
        "SLURM_JOB_NODELIST": spoiled(node_lists, IN_LISTS),
        "SLURM_NODELIST": spoiled(node_lists, IN_LISTS),
        "SLURM_TASKS_PER_NODE": spoiled(counts, IN_LISTS),
        "SLURM_NTASKS_PER_NODE": spoiled(st.sampled_from(["1", "4"]), IN_LISTS),
        "SLURM_JOB_CPUS_PER_NODE": spoiled(counts, IN_LISTS),
        "LSB_MCPU_HOSTS": spoiled(counts, IN_LISTS),
        "LSB_HOSTS": spoiled(counts, IN_LISTS),
    },
)


def check(read, named):
    """What is refused is so in one line that says where; what is read is safe, and the same when written and read."""
    try:
        hosts = read()
    except UsageError as error:
        text = str(error)
        assert text.isascii() and text.isprintable() and len(text) < 400 and text.startswith(named), text
        return
    assert hosts and len({host.name for host in hosts}) == len(hosts)
    for host in hosts:
        assert shlex.quote(host.name) == host.name and host.name[0] != "-" and 1 <= host.slots <= 10_000
        assert host.user is None or (shlex.quote(host.user) == host.user and host.user[0] != "-")
    for syntax in ("openmpi", "mpich", "horovodrun", "slurm"):
        try:
            written = hostfile.write(hosts, syntax)
        except UsageError as error:
            assert str(error).isprintable()
            continue
        if syntax == "openmpi":
            assert hostfile.parse(written.encode(), "f") == hosts
        assert written.isascii() and not set(written) & set(" '\"`$;|&<>\\*?~\t") - {" "}


@given(files)
@settings(suppress_health_check=[HealthCheck.too_slow])
@example(b"\xff\xfe\n")
@example(b"a\x00b")
def test_no_file_does_more_than_be_refused(content):
    check(lambda: hostfile.parse(content, "f"), "f:")


@given(variables)
def test_no_environment_does_more_than_be_refused(environment):
    check(lambda: hostfile.from_environment(environment), ("SLURM_", "LSB_", "the environment is of no"))


# --- the command


def hvdkit(capsys, *arguments):
    code = main(["hosts", *map(str, arguments)])
    out, err = capsys.readouterr()
    return code, out, err


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "hosts"
    path.write_text("# rack 1\nnode1 slots=4 max_slots=8\nnode2.site.edu:2\nnode1 slots=2\n")
    return path


def test_table(path, capsys, monkeypatch):
    code, out, err = hvdkit(capsys, path)
    assert (code, err) == (0, "")
    assert [line.split() for line in out.splitlines()] == [
        ["host", "slots", "max"],
        ["node1", "6", "8"],
        ["node2.site.edu", "2", "-"],
        ["total", "8", "on", "2", "hosts"],
    ]
    for name in ("SLURM_JOB_NODELIST", "SLURM_NODELIST", "PBS_NODEFILE", "LSB_DJOB_HOSTFILE", "LSB_MCPU_HOSTS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("LSB_HOSTS", "node7")
    code, out, err = hvdkit(capsys, "--from-env")
    assert code == 0 and out.split() == ["host", "slots", "node7", "1", "total", "1", "on", "1", "host"]


@pytest.mark.parametrize(
    ("syntax", "printed"),
    [
        ("openmpi", "node1 slots=6 max_slots=8\nnode2.site.edu slots=2\n"),
        ("mpich", "node1:6\nnode2.site.edu:2\n"),
        ("horovodrun", "node1:6,node2.site.edu:2\n"),
        ("slurm", "node1,node2.site.edu\n"),
    ],
)
def test_formats(syntax, printed, path, capsys):
    code, out, err = hvdkit(capsys, path, "--format", syntax)
    assert (code, out) == (0, printed)
    lost = (
        ["slots, which differ between these hosts: `hvdkit launch --launcher srun`"] if syntax == "slurm" else []
    ) + (["max_slots: start no more workers"] if syntax != "openmpi" else [])
    assert len(err.splitlines()) == len(lost)
    for line, words in zip(err.splitlines(), lost, strict=True):
        assert line.startswith("note: ") and f" has no place for {words}" in line


COUNTS = "Slurm's node list has no place for slots: give srun --ntasks=8 --ntasks-per-node=4 too."
LIMITS = "has no place for max_slots: start no more workers on a host than it allows."


@pytest.mark.parametrize(
    ("hosts", "syntax", "said"),
    [
        ("a:4\nb:4\n", "slurm", f"note: {COUNTS}\n"),
        ("a:4\nb:4\n", "mpich", ""),
        ("a:4\nb:4\n", "horovodrun", ""),
        ("a:4\nb:4 max_slots=5\n", "openmpi", ""),
        ("a:4\nb:4 max_slots=5\n", "mpich", f"note: mpich {LIMITS}\n"),
    ],
)
def test_what_a_format_leaves_out_is_told(hosts, syntax, said, path, capsys):
    path.write_text(hosts)
    assert hvdkit(capsys, path, "--format", syntax)[2] == said


def test_mistakes_are_one_line_and_exit_code_2(path, tmp_path, capsys):
    path.write_text("node1 slots=4\nnode2 slot=2\n")
    said = "'slot' is no setting of a host that is known here: expected slots=N, max_slots=N or user=NAME."
    assert hvdkit(capsys, path) == (2, "", f"error: {path}:2: {said}\n")
    assert hvdkit(capsys, tmp_path) == (2, "", f"error: {tmp_path}: Is a directory: expected a hostfile.\n")
    strange = tmp_path / "a\nb"
    said = "No such file or directory: expected a hostfile."
    assert hvdkit(capsys, strange) == (2, "", f"error: {str(strange)!r}: {said}\n")
    said = "has more than 4194304 bytes: expected a hostfile."
    assert hvdkit(capsys, "/dev/zero") == (2, "", f"error: /dev/zero: {said}\n")


def test_every_mistake_of_a_file_is_told(path, capsys, monkeypatch):
    path.write_text("node1 slot=4\nnode2 slots=2\nnode3 slots=0\nnode1 slot=4\nnode2 slots=9999\n")
    code, out, err = hvdkit(capsys, path)
    assert (code, out) == (2, "")
    assert [line.split(": ")[:3] for line in err.splitlines()] == [
        ["error", f"{path}:1", "'slot' is no setting of a host that is known here"],
        ["error", f"{path}:3", "node3 has 0 slots"],
        ["error", f"{path}:5", "node2 has 10001 slots"],
    ]
    monkeypatch.setenv("PBS_NODEFILE", str(path))
    for name in ("SLURM_JOB_NODELIST", "SLURM_NODELIST"):
        monkeypatch.delenv(name, raising=False)
    code, out, err = hvdkit(capsys, "--from-env")
    assert code == 2 and [line.split(": ")[1:3] for line in err.splitlines()] == [
        ["PBS_NODEFILE", f"{path}:{line}"] for line in (1, 3, 5)
    ]
    with pytest.raises(UsageError) as refused:
        hostfile.read(path)
    assert "\n" not in str(refused.value) and str(refused.value).startswith(f"{path}:1: 'slot' is no setting")


@pytest.mark.parametrize("many", [20, 21, 5000])
def test_mistakes_beyond_a_number_are_not_told(many, path, capsys):
    path.write_text("".join(f"n{i} slots=0\n" for i in range(many)))
    code, _, err = hvdkit(capsys, path)
    *told, last = err.splitlines()
    assert code == 2 and [line.split(": ")[1] for line in told] == [f"{path}:{i + 1}" for i in range(20)]
    assert last == "error: these are 20 mistakes: there may be more after them."


def test_too_many_hosts_are_told_once(path, capsys):
    path.write_text("".join(f"n{i}\n" for i in range(65_540)))
    code, _, err = hvdkit(capsys, path)
    assert code == 2 and err.count("\n") == 1 and err.startswith(f"error: {path}:65537: n65536 is one more than")


@pytest.mark.parametrize(
    ("redirect", "code", "said"),
    [("printf 'a slots=2\\n' |", 0, "a:2\n"), ("", 2, "error: -:1: 'b' follows the host"), ("<&-", 2, "error: -: ")],
)
def test_standard_input(redirect, code, said, tmp_path):
    (tmp_path / "input").write_text("a b\n")
    command = f'"{sys.executable}" -m toolkit.cli hosts - --format mpich'
    command = f"{redirect} {command}" if "|" in redirect else f"{command} {redirect or f'< {tmp_path}/input'}"
    result = subprocess.run(["sh", "-c", command], capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert result.returncode == code and (result.stdout + result.stderr).startswith(said), result
    assert (result.stdout + result.stderr).count("\n") == 1
