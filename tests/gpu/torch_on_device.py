"""Cases for torch on this worker's device, a GPU or a CPU; each prints `passed <case>`. Run by test_torch_gpu.py."""

import math
import sys

import torch

import toolkit.adapters.torch as dp
from tests.parallel.workers.cases import case, run_cases
from toolkit.adapters import _job, _torch_average, _torch_buckets
from toolkit.sharding import Sharding

WORLD = dp.start(device="auto", share_gpus=True)
DEVICE = torch.device(WORLD.device)
SAMPLES = 24


def new():
    torch.manual_seed(0)
    layers = [torch.nn.Linear(16, 32), torch.nn.Tanh(), torch.nn.Linear(32, 32), torch.nn.Tanh()]
    return torch.nn.Sequential(*layers, torch.nn.Linear(32, 1)).to(DEVICE)


def batch(step, whole=False):
    generator = torch.Generator().manual_seed(step)
    x, y = torch.randn(SAMPLES, 16, generator=generator), torch.randn(SAMPLES, 1, generator=generator)
    part = Sharding(SAMPLES, SAMPLES, 1 if whole else WORLD.size).part(range(SAMPLES), 0 if whole else WORLD.rank)
    return x[part.indices].to(DEVICE), y[part.indices].to(DEVICE), part.weight


def step(model, optimizer, scaler, dtype, data, clip=0.5):
    x, y, weight = data
    optimizer.zero_grad()
    with torch.autocast(DEVICE.type, dtype, enabled=dtype != torch.float32):
        loss = (model(x).float() - y).square().mean() * weight
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
    scaler.step(optimizer)
    scaler.update()


def assert_close(model, reference, tolerance):
    for p, q in zip(model.parameters(), reference.parameters(), strict=True):
        assert torch.allclose(p, q, rtol=tolerance, atol=tolerance), (p - q).abs().max()
    digests = dp.gather(dp.digest(model))
    assert all(other == digests[0] for other in digests)


@case
def mixed_precision():
    """An overflow on one rank leaves out the step on all."""
    for dtype in (torch.bfloat16, torch.float16):
        scaled = dtype == torch.float16
        scalers = [torch.amp.GradScaler(DEVICE.type, init_scale=1024.0, enabled=scaled) for _ in range(2)]
        reference, model = new(), new()
        plain = torch.optim.SGD(reference.parameters(), lr=0.5)
        optimizer = dp.distribute(torch.optim.SGD(model.parameters(), lr=0.5), model)
        for number in range(6):
            data, spoilt = batch(number), scaled and number == 3
            if spoilt and WORLD.rank == WORLD.size - 1:
                data[0].mul_(1e6)
            before = model[0].weight.detach().clone()
            step(model, optimizer, scalers[0], dtype, data)
            assert torch.equal(before, model[0].weight) == spoilt
            if not spoilt:
                step(reference, plain, scalers[1], dtype, batch(number, whole=True))
        assert not scaled or dp.gather(scalers[0].get_scale()) == [512.0] * WORLD.size
        assert_close(model, reference, 3e-2)


@case
def compiled_before_and_after():
    off = torch.amp.GradScaler(DEVICE.type, enabled=False)
    for before in (True, False):
        reference, model = new(), new()
        plain = torch.optim.SGD(reference.parameters(), lr=0.1)
        compiled = torch.compile(model) if before else model
        optimizer = dp.distribute(torch.optim.SGD(model.parameters(), lr=0.1), compiled)
        compiled = compiled if before else torch.compile(model)
        for number in range(4):
            step(compiled, optimizer, off, torch.float32, batch(number))
            step(reference, plain, off, torch.float32, batch(number, whole=True))
        assert_close(model, reference, 1e-4)


@case
def buckets_of_one_worker():
    """Through Horovod's NCCL while the backward pass goes on: a worker that takes itself for one of two."""

    class OfTwo(_torch_average.GradientAverager):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            self._size = 2

    dp.GradientAverager, _torch_buckets.BYTES = OfTwo, 2**11
    if DEVICE.type == "cpu":
        _job.reduces_on_gpu = lambda: True
    reference, model = new(), new()
    plain = torch.optim.SGD(reference.parameters(), lr=0.05)
    optimizer = dp.distribute(torch.optim.SGD(model.parameters(), lr=0.1), model)  # of half the gradient
    off, sent = torch.amp.GradScaler(DEVICE.type, enabled=False), []

    def look(*_):
        if optimizer._averager._buckets is not None:
            sent.append([bucket.is_sent for bucket in optimizer._averager._buckets._buckets])

    model[1].register_full_backward_hook(look)
    for number in range(20):
        dp.exchange_flag(number == 7)
        step(model, optimizer, off, torch.float32, batch(number), clip=math.inf)
        step(reference, plain, off, torch.float32, batch(number), clip=math.inf)
        assert dp.exchange_flag(None) == (number == 7, None)
    assert sent and all(any(each) and not all(each) for each in sent), sent
    assert_close(model, reference, 1e-5)


if __name__ == "__main__":
    run_cases(dp, WORLD, sys.argv[1:])
