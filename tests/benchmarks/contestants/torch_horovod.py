"""Horovod by hand, as its documentation for PyTorch says (docs/pytorch.rst), with its own settings."""

import horovod.torch as hvd
import torch
import torch_common as common

from tests.benchmarks.turns import threads

hvd.init()
torch.set_num_threads(threads())
model = common.build()
optimizer = hvd.DistributedOptimizer(common.optimizer(model), named_parameters=model.named_parameters())
hvd.broadcast_parameters(model.state_dict(), root_rank=0)
hvd.broadcast_optimizer_state(optimizer, root_rank=0)
turns = common.begin(hvd.rank(), model)
for x, y in turns.of(common.batches(hvd.rank())):
    optimizer.zero_grad()
    common.loss_of(model(x), y).backward()
    optimizer.step()
