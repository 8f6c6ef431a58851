"""`hvdkit plan` on the recipes, as a user runs it: what it measures is what the recipe is."""

import json
import re
import sys

import pytest

from tests.launching import ROOT, launch

pytestmark = pytest.mark.timeout(1000)  # each starts frameworks several times, also on a machine with other work
PLAN = ["-m", "toolkit.cli", "plan", "--steps", "20", "--max-workers", "8"]
LINKS = ["--latency-us", "20", "--gbit", "10"]


def plan(tmp_path, *arguments, recipe, cwd=ROOT):
    file = tmp_path / "plan.json"
    command = [*PLAN, "--json", file, *arguments, "--", sys.executable, *recipe]
    result = launch(1, command, launcher="none", cwd=cwd, timeout=900)  # which checks that nothing is left
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout, json.loads(file.read_text())


def test_a_recipe_and_links_between_workers_here(tmp_path):
    out, found = plan(tmp_path, "--workers-per-host", "2", recipe=["recipes/linear_regression_torch.py"])
    assert found["gradient_bytes"] == 4 * 11
    assert found["compute"]["samples"] == found["compute"]["global_batch"] == 442, "as the recipe itself does it"
    assert 0 < found["compute"]["seconds"] < 1 and 0 <= found["compute"]["fixed"] <= found["compute"]["seconds"]
    assert 0 < found["links"]["local"]["latency"] < 0.1 and found["links"]["local"]["seconds_per_byte"] > 0
    assert {step["workers"] for step in found["steps"]} == {1, 2, 4, 8}
    assert re.search(r"compressing costs a step, measured here: fp16 [\d.e-]+ ms, bf16 .* powersgd [\d.e-]+ ms\n", out)
    assert "Between hosts it pays on 4 workers where a host's link reaches: fp16 " in out
    assert (
        " if it costs less than " not in out
        and "2 at a time" in out
        and "measured on this machine" in out
        and "Without overlap" in out
    )
    assert not (ROOT / "runs").exists() or all("plan" not in path.name for path in (ROOT / "runs").iterdir())


@pytest.mark.parametrize("recipe", ["cnn_torch", pytest.param("cnn_keras", marks=pytest.mark.long)])
def test_the_gradients_of_a_recipe(recipe, tmp_path):
    _, found = plan(tmp_path, *LINKS, recipe=[f"recipes/{recipe}.py", "--batch-size", "16"])
    assert found["gradient_bytes"] == 4 * 21_840
    assert found["compute"]["samples"] == 16 and found["compute"]["global_batch"] is None


FROZEN = """
import torch
import toolkit.adapters.torch as dp
from toolkit import datasets
from toolkit.options import RunOptions, parse
from toolkit.run import Run

options = parse(RunOptions, "A layer that is not trained, and statistics.")
world = dp.start(**options.start)
train = datasets.diabetes()
model = torch.nn.Sequential(torch.nn.Linear(10, 7), torch.nn.BatchNorm1d(7), torch.nn.Linear(7, 1))
model[0].requires_grad_(False)
optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
optimizer = dp.distribute(optimizer, model)
with Run(options, world, dp, model, optimizer, len(train)) as run:
    for _ in run.epochs():
        for batch in run.batches(train):
            optimizer.zero_grad()
            loss = (model(torch.from_numpy(batch.x)) - torch.from_numpy(batch.y)).square().mean() * batch.weight
            loss.backward()
            optimizer.step()
            run.log(loss=loss)
        run.end_epoch()
dp.stop()
"""


def test_what_is_not_trained_does_not_travel(tmp_path):
    script = tmp_path / "frozen.py"
    script.write_text(FROZEN)
    out, found = plan(tmp_path, *LINKS, recipe=[script])
    assert found["gradient_bytes"] == 4 * (2 * 7 + 7 + 1), "BatchNorm's weight and bias, and the last layer's"
    assert "in 4 tensors" in out


@pytest.mark.parametrize(
    ("script", "text"),
    [
        ("import sys; sys.exit(3)", "exit code 3"),
        ("pass", "no checkpoint"),
        ("raise RuntimeError('of its own')", "of its own"),
    ],
)
def test_a_script_that_is_no_recipe_is_one_line(script, text, tmp_path):
    command = [*PLAN, *LINKS, "--", sys.executable, "-c", script]
    result = launch(1, command, launcher="none")
    assert result.returncode == 2
    assert text in result.stderr and result.stderr.count("\n") == 1, result.stderr


def test_a_recipe_that_hangs_is_ended_with_those_beside_it(tmp_path):
    (tmp_path / "hangs.py").write_text("import time; time.sleep(600)")
    command = [*PLAN, *LINKS, "--workers-per-host", "2", "--local-latency-us", "1", "--local-gbit", "10"]
    result = launch(1, [*command, "--timeout", "3", "--", sys.executable, tmp_path / "hangs.py"], launcher="none")
    assert result.returncode == 2 and "did not end within 3 s" in result.stderr, result.stderr
