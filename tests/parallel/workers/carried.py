"""What NCCL does, done in the host's memory by Horovod for CPUs: two workers can share a GPU so, which NCCL refuses.

All that the toolkit does around it is as with NCCL: which gradients travel in which bucket, when, what waits for it.
"""

import horovod.torch as hvd

from toolkit.adapters import _job


def carry():
    """Have Horovod's operations on torch's tensors bring these to the host's memory and back."""
    begin, wait, under_way = hvd.allreduce_async_, hvd.synchronize, {}

    def allreduce_async_(tensor, **options):
        host = tensor.to("cpu", copy=True)  # waits for the GPU; a copy on a CPU too, so that tests there show something
        handle = begin(host, **options)
        under_way[handle] = tensor, host
        return handle

    def synchronize(handle):
        found = wait(handle)
        if handle not in under_way:
            return found
        tensor, host = under_way.pop(handle)
        tensor.data.copy_(host)  # by way of .data, as torch counts no changes that NCCL makes either
        return tensor

    def through_host(function):
        def called(tensor, *arguments, **options):
            return function(tensor.cpu(), *arguments, **options).to(tensor.device)

        return called

    in_place = hvd.broadcast_

    def broadcast_(tensor, *arguments, **options):
        return tensor.copy_(in_place(tensor.cpu(), *arguments, **options))

    hvd.allreduce_async_, hvd.synchronize, hvd.broadcast_ = allreduce_async_, synchronize, broadcast_
    for name in ("allreduce", "allgather"):
        setattr(hvd, name, through_host(getattr(hvd, name)))
    _job.reduces_on_gpu = lambda: True
