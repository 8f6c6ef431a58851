"""torch's DistributedDataParallel: `torch_ddp.py gloo|mpi fast|plain`.

fast: what torch's documentation offers for speed. gradient_as_bucket_view saves a copy of the gradients, static_graph
the search for unused parameters; without
broadcast_buffers BatchNorm's statistics stay each rank's own, as Horovod's do.
plain: torch's own defaults.
"""

import sys

import torch
import torch.distributed
import torch_common as common

from tests.benchmarks.turns import place, threads

backend, settings = sys.argv[1:]
options = {"fast": {"gradient_as_bucket_view": True, "static_graph": True, "broadcast_buffers": False}, "plain": {}}
if not torch.distributed.is_backend_available(backend):
    raise SystemExit(f"not built: this torch has no {backend} in torch.distributed")
rank, _ = place()
torch.distributed.init_process_group(backend)  # MASTER_ADDR, MASTER_PORT, RANK and WORLD_SIZE are set
torch.set_num_threads(threads())
module = common.build()
model = torch.nn.parallel.DistributedDataParallel(module, **options[settings])
optimizer = common.optimizer(model)
turns = common.begin(rank, module)
for x, y in turns.of(common.batches(rank)):
    optimizer.zero_grad()
    common.loss_of(model(x), y).backward()
    optimizer.step()
torch.distributed.destroy_process_group()
