"""Trains while the disk under it fails in one way or another, as the second argument says, and heals, or not."""

import shutil
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

import toolkit.adapters.torch as dp
from toolkit import checkpoint, output
from toolkit.options import RunOptions
from toolkit.run import Run

place, case = Path(sys.argv[1]), sys.argv[2]
checkpoint.RETRY_SECONDS = 0.1
output._RETRY_SECONDS = 0.1
world = dp.start()
X, Y = np.ones((40, 6), np.float32), np.ones((40, 1), np.float32)


class Data:
    x, y = X, Y


def fill():
    with open(place / "filler", "wb", buffering=0) as file:
        try:
            while file.write(b"x" * 4096):
                pass
        except OSError:
            return


def remove():
    shutil.rmtree(place / "run")


def replace_by_file():
    (place / "run").rename(place / "moved")
    (place / "run").write_text("somebody's")


def heal():
    if case.startswith("full"):
        (place / "filler").unlink()
    elif case == "replaced for a while":
        (place / "run").unlink()


BREAK = {"full": fill, "full to the end": fill, "removed": remove}.get(case, replace_by_file)
options = RunOptions(output=place / "run", epochs=4, global_batch_size=8, checkpoint_steps=2, check_sync=0)
model = torch.nn.Linear(6, 1)
optimizer = dp.distribute(torch.optim.SGD(model.parameters(), lr=0.1), model)
with Run(replace(options), world, dp, model, optimizer, len(X)) as run:
    for _ in run.epochs():
        for batch in run.batches(Data):
            optimizer.zero_grad()
            loss = (model(torch.from_numpy(batch.x)) - torch.from_numpy(batch.y)).square().mean() * batch.weight
            loss.backward()
            optimizer.step()
            run.log(loss=loss)
            if world.rank == 0 and run.step in (7, 15):
                run._writer.wait()
                if run.step == 7:
                    BREAK()
                elif "end" not in case:
                    heal()
                    time.sleep(0.2)
        run.end_epoch()
dp.stop()
