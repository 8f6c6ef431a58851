"""No communication: each process trains by itself. With one process: the bare loop."""

import torch
import torch_common as common

from tests.benchmarks.turns import place, threads

torch.set_num_threads(threads())
rank, _ = place()
model = common.build()
optimizer = common.optimizer(model)
turns = common.begin(rank, model)
for x, y in turns.of(common.batches(rank)):
    optimizer.zero_grad()
    common.loss_of(model(x), y).backward()
    optimizer.step()
