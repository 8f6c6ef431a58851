"""The toolkit: a plain loop, as README's "Your own script" has it, without `Run`."""

import torch_common as common

import toolkit.adapters.torch as dp

world = dp.start()
model = common.build()
optimizer = dp.distribute(common.optimizer(model), model)
dp.broadcast_state(model, optimizer)
turns = common.begin(world.rank, model)
for x, y in turns.of(common.batches(world.rank)):
    optimizer.zero_grad()
    common.loss_of(model(x), y).backward()
    optimizer.step()
dp.stop()
