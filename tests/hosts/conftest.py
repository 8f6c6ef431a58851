"""The cluster of three hosts, anew for each test; skipped with the reason where this machine permits none."""

import pytest

from tests.hosts import results
from tests.hosts.cluster import Cluster, Unavailable


@pytest.fixture
def cluster(tmp_path_factory):
    try:
        entered = Cluster(tmp_path_factory.mktemp("cluster"))
        entered.__enter__()
    except Unavailable as missing:
        pytest.skip(str(missing))
    try:
        yield entered
    finally:
        entered.__exit__()


def pytest_sessionfinish():
    results.write()
