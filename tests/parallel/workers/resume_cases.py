"""Stop at every step, resume, and be at the end what the uninterrupted run is; with all that draws random numbers."""

import random
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

import toolkit.adapters.torch as dp
from toolkit import checkpoint, output
from toolkit.options import RunOptions
from toolkit.run import Run
from toolkit.sharding import KINDS

base = Path(sys.argv[1])
world = dp.start(seed=3)
generator = np.random.default_rng(0)
X, Y = generator.normal(size=(50, 6)).astype(np.float32), generator.normal(size=(50, 1)).astype(np.float32)


class Data:
    x, y = X, Y


def train(options):
    torch.manual_seed(1)
    layers = [torch.nn.BatchNorm1d(8), torch.nn.Dropout(0.4), torch.nn.Linear(8, 1)]
    model = torch.nn.Sequential(torch.nn.Linear(6, 8), *layers)
    optimizer = dp.distribute(torch.optim.Adam(model.parameters(), lr=0.01), model, accumulation_steps=2)
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [3, 6, 11], 0.5)
    with Run(options, world, dp, model, optimizer, len(X), extra={"scheduler": scheduler}) as run:
        for _ in run.epochs():
            for batch in run.batches(Data):
                optimizer.zero_grad()
                x = batch.x + random.gauss(0, 0.1) + np.random.normal(0, 0.1, batch.x.shape)
                x += [g.normal(0, 0.1, 6) for g in batch.generators()]
                x, y = torch.from_numpy(x.astype(np.float32)), torch.from_numpy(batch.y)
                # Part of a batch is a single sample on some ranks, of which BatchNorm can't take statistics.
                x, y = torch.cat([x, x * 0.5]), torch.cat([y, y])
                loss = torch.nn.functional.mse_loss(model(x), y) * batch.weight
                loss.backward()
                optimizer.step()
                scheduler.step()
                run.log(loss=loss)
            run.end_epoch(
                noise=dp.average({"noise": random.gauss(0, 1) + np.random.normal() + torch.rand(1).item()})["noise"]
            )
    return dp.export_local(model)


def rows(directory):
    return [
        {k: v for k, v in row.items() if k != "seconds"}
        for kind in ("step", "epoch")
        for row in output.read_metrics(directory, kind)
    ]


def main(kind):
    options = RunOptions(
        epochs=2, global_batch_size=16, accumulation_steps=2, seed=3, check_sync=1, audit=True, sharding=kind
    )
    straight = base / kind / "straight"
    end = train(replace(options, output=straight))
    dp.gather(None)  # rank 0 has written it
    expected = checkpoint.newest(straight)
    assert expected.manifest["step"] == 8 and len(rows(straight)) == 10
    statistics = dp.gather(end)
    mean = np.mean([state["model/1.running_var"] for state in statistics], axis=0, dtype=np.float64)
    assert np.array_equal(expected.state["model/1.running_var"], mean.astype(np.float32))
    if world.size > 1:
        assert not np.array_equal(statistics[0]["model/1.running_var"], statistics[1]["model/1.running_var"])
    for stop in range(9):
        place = base / kind / f"stop{stop}"
        train(replace(options, output=place, max_steps=stop))
        train(replace(options, output=place, resume=True))
        dp.gather(None)
        found = checkpoint.newest(place)
        assert found.state.keys() == expected.state.keys()
        for name, array in expected.state.items():
            assert found.state[name].tobytes() == array.tobytes(), f"stopped at {stop}: {name}"
        assert rows(place) == rows(straight), stop
        assert {**found.manifest, "sha256": 0} == {**expected.manifest, "sha256": 0}


for kind in KINDS:
    main(kind)
if world.rank == 0:
    print("every stop resumed to the same bits")
dp.stop()
