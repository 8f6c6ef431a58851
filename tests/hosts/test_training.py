"""Each recipe on two and three hosts, by each launcher, against the same number of workers on this machine alone."""

import functools
import itertools

import pytest

from tests.hosts import jobs, results
from tests.hosts.jobs import LAUNCHERS, THREE, TWO

RECIPES = [f"{example}_{f}" for example in ("linear_regression", "cnn") for f in ("torch", "tensorflow", "keras")]
# An epoch that ends with a smaller batch, of unequal parts; at this rate training does not amplify rounding.
ARGUMENTS = ("--epochs", "1", "--global-batch-size", "50", "--learning-rate", "0.01")
TABLE = "Largest relative difference of a weight to the run on one machine, and seconds from start to end"
SHORT = {(launcher, "linear_regression_torch", THREE) for launcher in LAUNCHERS}
SHORT.add(("hvdkit launch", "linear_regression_tensorflow", THREE))


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """The same on this machine alone, once for each recipe and number of workers."""
    return functools.cache(lambda *what: jobs.train_here(tmp_path_factory.mktemp("here") / "run", *what))


COMBINATIONS = [
    pytest.param(*what, marks=() if what in SHORT else pytest.mark.long)
    for what in itertools.product(LAUNCHERS, RECIPES, (TWO, THREE))
]


@pytest.mark.parametrize(("launcher", "recipe", "places"), COMBINATIONS, ids=str)
def test_the_same_on_several_hosts_as_on_one(cluster, here, launcher, recipe, places):
    cell = (TABLE, f"{recipe}, {places}", launcher)
    results.note(*cell, "failed")
    trained = jobs.train(cluster, launcher, places, recipe, ARGUMENTS)
    assert trained.workers == {name: places.slots if name in places.names else 0 for name in cluster.names}
    loss, weight = trained.difference(here(places.workers, recipe, ARGUMENTS))
    assert len(trained.losses) > 5 and loss < 1e-4 and weight < 1e-4, (loss, weight)
    results.note(*cell, f"{weight:.2g}, {trained.seconds:.0f} s")
