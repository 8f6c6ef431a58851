"""The cluster of three hosts, anew for each test; skipped with the reason where this machine permits none."""

import os

import pytest

from tests.hosts import results
from tests.hosts.cluster import Cluster, missing


@pytest.fixture
def cluster(tmp_path_factory):
    if (reason := missing()) is not None:
        pytest.skip(reason)
    with Cluster(tmp_path_factory.mktemp("cluster")) as entered:
        yield entered


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session, exitstatus):
    """What `make test-hosts` is for: results, and an error where nothing at all was tried."""
    wanted = os.environ.get(results.WANTED)
    if wanted is None:
        return
    terminal = session.config.pluginmanager.get_plugin("terminalreporter")
    if exitstatus == pytest.ExitCode.OK and not terminal.stats.get("passed"):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
        terminal.write_line("\nnone of the tests on several hosts could run here: see why below", red=True)
    to_the_end = exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED)
    written = results.write(wanted if to_the_end else results.TERMINAL)
    if written:
        terminal.write_line(f"\n\n{written}")
