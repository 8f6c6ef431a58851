"""Training over links of 100 Mbit/s and 20 ms: what they cost, and that the weights are the same."""

import json

import pytest

from tests.hosts import jobs, results
from tests.hosts.cluster import NAMES
from tests.hosts.jobs import THREE

RATE, DELAY = 100e6, 0.020  # bits per second and seconds, of what each host sends
ARGUMENTS = ("--epochs", "2", "--global-batch-size", "50", "--learning-rate", "0.01")
TABLE = "Links of 100 Mbit/s and 20 ms: seconds for a step of `cnn_torch` on 3 hosts, in its second epoch"
# Seconds for a connection to be made, and for 3 MB there and an answer back.
MEASURE = """
import socket, sys, threading, time
if sys.argv[1] == "serve":
    listener = socket.create_server(("", 5000))
    print("ready", flush=True)
    connection, _ = listener.accept()
    while len(data := connection.recv(1 << 16)):
        pass
    connection.sendall(b"!")
else:
    began = time.monotonic()
    connection = socket.create_connection((sys.argv[1], 5000))
    print(time.monotonic() - began)
    began = time.monotonic()
    connection.sendall(bytes(3_000_000))
    connection.shutdown(socket.SHUT_WR)
    connection.recv(1)
    print(time.monotonic() - began)
"""


def measured(cluster):
    """Seconds for a connection from node1 to node2, and for 3 MB over it."""
    server, _ = cluster.begin("node2", ["python", "-c", MEASURE, "serve"])
    try:
        assert server.stdout.readline() == "ready\n"
        client, _ = cluster.begin("node1", ["python", "-c", MEASURE, "node2"])
        return [float(text) for text in client.communicate(timeout=60)[0].split()]
    finally:
        cluster.kill_all()
        server.communicate(timeout=30)


def are_slow(cluster):
    """Whether the links are; the limits are from below, which no busy machine undercuts."""
    connecting, sending = measured(cluster)
    return connecting >= 2 * DELAY and sending >= 2 * DELAY + 8 * 3e6 / RATE


def test_links_are_slow(cluster):
    for name in NAMES:
        cluster.shape(name, RATE, DELAY)
    assert are_slow(cluster)


def seconds_per_step(trained):
    rows = [json.loads(line) for line in (trained.output / "metrics.jsonl").read_text().splitlines()]
    *_, last = [row["seconds"] for row in rows if row["kind"] == "epoch"]
    return last / (len(trained.losses) / 2)


def sent(cluster, host):
    """Bytes that have left a host by its slow link."""
    (link,) = json.loads(cluster.on("switch", "ip", "-json", "-statistics", "link", "show", f"{host}-far"))
    return link["stats64"]["tx"]["bytes"]


@pytest.mark.long
@pytest.mark.parametrize("launcher", ["hvdkit launch", "horovodrun --gloo"])
def test_the_same_weights_by_slow_links(cluster, launcher):
    plain = jobs.train(cluster, launcher, THREE, "cnn_torch", ARGUMENTS)
    for name in NAMES:
        cluster.shape(name, RATE, DELAY)
    slow = jobs.train(cluster, launcher, THREE, "cnn_torch", ARGUMENTS)
    loss, weight = slow.difference(plain)
    before, after = seconds_per_step(plain), seconds_per_step(slow)
    results.note(TABLE, launcher, "plain", f"{before:.3f}")
    results.note(TABLE, launcher, "slow links", f"{after:.3f}")
    results.note(TABLE, launcher, "largest relative difference of a weight", f"{weight:.2g}")
    assert loss < 1e-4 and weight < 1e-4, (loss, weight)
    # A step's seconds are the machine's as well. But all gradients went by those links, and they are slow to the end.
    gradients = len(slow.losses) * sum(array.nbytes for array in slow.weights.values())
    assert all(sent(cluster, name) >= gradients for name in NAMES), (gradients, [sent(cluster, n) for n in NAMES])
    assert are_slow(cluster)
