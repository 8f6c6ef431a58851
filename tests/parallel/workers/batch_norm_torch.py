"""Synchronised BatchNorm in torch, run by every rank, against the closed form, and against one process.

Each case prints `passed <case>` on rank 0 once every rank has come through it.
"""

import copy
import functools
import io
import os
import sys

import numpy as np
import torch

import toolkit.adapters.torch as dp
from tests.parallel.workers.batch_norm_common import BETA, EPSILON, GAMMA, SAMPLES, closed_form, part, samples
from tests.parallel.workers.cases import case, run_cases
from toolkit.adapters import _job
from toolkit.errors import UsageError
from toolkit.sharding import Sharding

WORLD = dp.start(
    device=os.environ.get("HVDKIT_TEST_DEVICE", "cpu"),
    share_gpus=True,
    groups=int(os.environ.get("HVDKIT_TEST_GROUPS", "1")),
)
DEVICE = torch.device(WORLD.device)
KINDS = {2: torch.nn.BatchNorm1d, 3: torch.nn.BatchNorm1d, 4: torch.nn.BatchNorm2d, 5: torch.nn.BatchNorm3d}


def layer(dimensions, dtype=torch.float64, affine=True, **options):
    made = KINDS[dimensions](3, eps=EPSILON, affine=affine, **options).to(DEVICE, dtype)
    if affine:
        with torch.no_grad():
            made.weight.copy_(torch.tensor(GAMMA))
            made.bias.copy_(torch.tensor(BETA))
    return made


def total(array):
    """The sum over all ranks."""
    return dp.average({"": array.detach().double().cpu().numpy()})[""] * WORLD.size


def numpy(tensor):
    return tensor.detach().double().cpu().numpy()


def check(shape, dtype=torch.float64, tolerance=1e-12, empty=False, affine=True, change=lambda tensor: tensor):
    x, d_y = samples(shape)
    x, d_y = (torch.tensor(array).to(DEVICE, dtype) for array in (x, d_y))
    expected = closed_form(numpy(x), numpy(d_y), 1, *(() if affine else (np.ones(3), np.zeros(3))))
    norm = dp.synchronize_batch_norm(layer(len(shape), max(dtype, torch.float32, key=lambda d: d.itemsize), affine))
    mine = part(WORLD, empty)
    own = change(x[mine]).requires_grad_()
    y = norm(own)
    y.backward(change(d_y[mine]))
    assert y.dtype == own.grad.dtype == dtype and y.stride() == own.stride()
    found = {"y": numpy(y), "x": numpy(own.grad)}
    expected = {**expected, "y": expected["y"][mine], "x": expected["x"][mine]}
    if affine:
        found |= {"gamma": total(norm.weight.grad), "beta": total(norm.bias.grad)}
    for name, array in found.items():
        np.testing.assert_allclose(array, expected[name], tolerance, 10 * tolerance, err_msg=f"{name} {shape} {dtype}")


@case
def equals_the_closed_form():
    for shape in ((SAMPLES, 3), (SAMPLES, 3, 2), (SAMPLES, 3, 2, 4), (SAMPLES, 3, 2, 2, 2)):
        for affine in (True, False):
            check(shape, affine=affine)
        check(shape, torch.float32, 2e-6)


@case
def a_rank_without_samples_takes_part():
    for shape in ((SAMPLES, 3), (SAMPLES, 3, 2, 4)):
        check(shape, empty=True)


@case
def horovod_adds_up_where_mpi_does_not():
    wire, _job.mpi_wire = _job.mpi_wire, lambda *_: None
    try:
        check((SAMPLES, 3, 2, 4))
    finally:
        _job.mpi_wire = wire


@case
def channels_last_stays_so():
    check((SAMPLES, 3, 2, 4), change=lambda tensor: tensor.contiguous(memory_format=torch.channels_last))


@case
def half_precision_is_normalised_by_statistics_of_float32():
    for dtype, digits in ((torch.bfloat16, 2**-8), (torch.float16, 2**-11)):
        check((SAMPLES, 3, 2, 4), dtype, 2 * digits)
    x, _ = samples((SAMPLES, 3, 8, 8))
    x = torch.tensor(x + 1000).to(DEVICE, torch.float16)  # of which a sum of squares overflows
    norm = dp.synchronize_batch_norm(layer(4, torch.float32))
    norm(x[part(WORLD)])
    expected = x.double().var((0, 2, 3), correction=1).cpu() * 0.1 + 0.9
    np.testing.assert_allclose(numpy(norm.running_var), expected, rtol=1e-5)


@case
def running_statistics_are_those_of_one_worker():
    for options in ({}, {"momentum": 0.3}, {"momentum": None}, {"track_running_stats": False}):
        norm, reference = layer(4, **options), layer(4, **options)
        dp.synchronize_batch_norm(norm)
        for step in range(4):
            x = torch.tensor(samples((SAMPLES, 3, 2, 2), step)[0]).to(DEVICE)
            norm(x[part(WORLD, empty=step == 2)])
            reference(x)
        assert norm.state_dict().keys() == reference.state_dict().keys()
        for name, tensor in norm.state_dict().items():
            np.testing.assert_allclose(numpy(tensor), numpy(reference.state_dict()[name]), 1e-12, err_msg=name)
        statistics = dp.gather({name: array.tobytes() for name, array in dp.export_state(norm).items()})
        assert all(other == statistics[0] for other in statistics), "not the same bits on all ranks"
        norm.eval(), reference.eval()
        if norm.track_running_stats:  # in evaluation each rank is on its own
            mine = x[: 2 + WORLD.rank]
            np.testing.assert_allclose(numpy(norm(mine)), numpy(reference(mine)), 1e-12)


class Residual(torch.nn.Module):
    """Two branches that meet, each with BatchNorm, as in ResNet."""

    def __init__(self):
        super().__init__()
        self.first = torch.nn.Sequential(torch.nn.Conv2d(1, 3, 3, bias=False), torch.nn.BatchNorm2d(3))
        self.deep = torch.nn.Sequential(
            torch.nn.Conv2d(3, 4, 3, padding=1, stride=2, bias=False),
            torch.nn.BatchNorm2d(4),
            torch.nn.ReLU(),
            torch.nn.Conv2d(4, 4, 3, padding=1, bias=False),
            torch.nn.BatchNorm2d(4),
        )
        self.short = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1, stride=2, bias=False), torch.nn.BatchNorm2d(4))
        self.last = torch.nn.Linear(4, 2)

    def forward(self, x):
        x = torch.relu(self.first(x))
        return self.last(torch.relu(self.deep(x) + self.short(x)).mean((2, 3)))


def batch(step):
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(SAMPLES, 1, 6, 6, generator=generator, dtype=torch.float64)
    return x.to(DEVICE), torch.randint(2, (SAMPLES,), generator=generator).to(DEVICE)


def whole(step):
    yield (*batch(step), 1.0)


def parts(step, passes=1):
    x, y = batch(step)
    sharding = Sharding(SAMPLES, SAMPLES, WORLD.size, accumulation_steps=passes)
    for number in range(passes):
        mine = sharding.part(np.arange(SAMPLES), WORLD.rank, number)
        yield x[mine.indices], y[mine.indices], mine.weight


def train(model, optimizer, data, steps):
    losses = []
    for step in steps:
        for x, y, weight in data(step):
            optimizer.zero_grad()
            loss = torch.nn.functional.cross_entropy(model(x), y) * weight
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    return losses


def plain():
    torch.manual_seed(3)
    model = Residual().to(DEVICE, torch.float64)
    return model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def synchronized(**options):
    model, optimizer = plain()
    assert dp.synchronize_batch_norm(model) is model
    return model, dp.distribute(optimizer, model, **options)


def difference(one, other):
    return max(np.abs(one[name] - 1.0 * other[name]).max() for name in one)


@case
def training_is_that_of_one_worker():
    reference, optimizer = plain()
    expected = train(reference, optimizer, whole, range(20))
    model, optimizer = synchronized()
    found = [dp.average({"": loss})[""] for loss in train(model, optimizer, parts, range(20))]
    np.testing.assert_allclose(found, expected, rtol=1e-10)
    assert difference(dp.export_state(model), dp.export_state(reference)) < 1e-10
    apart, optimizer = plain()
    train(apart, dp.distribute(optimizer, apart), parts, range(20))
    if WORLD.size > 1:
        assert difference(dp.export_state(apart), dp.export_state(reference)) > 1e-3, "the test can't fail"


@case
def it_goes_on_after_a_checkpoint():
    model, optimizer = synchronized()
    train(model, optimizer, parts, range(3))
    saved, local = dp.export_state(model, optimizer), dp.export_local(model, optimizer)
    train(model, optimizer, parts, range(3, 6))
    again, fresh = synchronized()
    dp.import_state(again, fresh, saved)
    dp.import_local(again, local, fresh)
    train(again, fresh, parts, range(3, 6))
    assert difference(dp.export_state(model, optimizer), dp.export_state(again, fresh)) == 0
    other, _ = plain()
    other.load_state_dict(model.state_dict())
    x, _ = batch(0)
    assert torch.equal(other.eval()(x), model.eval()(x))


@case
def accumulated_passes_are_those_of_one_worker():
    """A pass is normalised by the mean and variance of all ranks' samples of this pass."""
    reference, optimizer = plain()
    for step in range(3):
        optimizer.zero_grad()
        x, y = batch(step)
        for number in range(2):
            mine = Sharding(SAMPLES, SAMPLES, 1, accumulation_steps=2).part(np.arange(SAMPLES), 0, number)
            loss = torch.nn.functional.cross_entropy(reference(x[mine.indices]), y[mine.indices])
            (loss * mine.weight / 2).backward()
        optimizer.step()
    model, optimizer = synchronized(accumulation_steps=2)
    train(model, optimizer, lambda step: parts(step, 2), range(3))
    assert difference(dp.export_state(model), dp.export_state(reference)) < 1e-10


@case
def a_compiled_model_is_normalised_alike():
    model, optimizer = synchronized()
    expected = train(model, optimizer, parts, range(2))
    model, optimizer = synchronized()
    compiled = torch.compile(model, backend="eager")
    np.testing.assert_allclose(train(compiled, optimizer, parts, range(2)), expected, rtol=1e-12)


@case
def layers_stay_what_they_are():
    model = torch.nn.Sequential(torch.nn.Linear(4, 3), layer(2, torch.float32))
    norm = model[1]
    held, names = [*model.parameters(), *model.buffers()], list(model.state_dict())
    dp.synchronize_batch_norm(dp.synchronize_batch_norm(model))
    assert all(a is b for a, b in zip(held, [*model.parameters(), *model.buffers()], strict=True))
    assert list(model.state_dict()) == names and model[1] is norm and isinstance(norm, torch.nn.BatchNorm1d)
    assert repr(norm).startswith("BatchNorm1d(3, eps=0.001")
    file = io.BytesIO()
    torch.save(norm, file)
    file.seek(0)
    x = torch.tensor(samples((SAMPLES, 3))[0], dtype=torch.float32, device=DEVICE)
    norm(x[part(WORLD)])
    for other in (copy.deepcopy(norm), torch.load(file, weights_only=False)):
        other.load_state_dict(norm.state_dict())
        assert torch.equal(other(x[part(WORLD)]), norm(x[part(WORLD)])), "a copy is synchronised too"


@case
def one_worker_is_left_alone():
    if WORLD.size > 1:
        return
    norm, reference = dp.synchronize_batch_norm(layer(2, torch.float32)), layer(2, torch.float32)
    for step in range(3):
        x = torch.tensor(samples((SAMPLES, 3), step)[0], dtype=torch.float32, device=DEVICE)
        assert torch.equal(norm(x), reference(x))
    assert torch.equal(norm.running_var, reference.running_var)


def raises(function, *texts):
    try:
        function()
    except UsageError as error:
        assert "\n" not in str(error) and all(text in str(error) for text in texts), str(error)
        return
    raise AssertionError(f"no UsageError with {texts}")


@case
def mistakes_get_one_clear_line():
    class Own(torch.nn.BatchNorm1d):
        def forward(self, x):
            return x

    raises(lambda: dp.synchronize_batch_norm("model"), "str", "torch.nn.Module")
    raises(lambda: dp.synchronize_batch_norm(torch.nn.Linear(1, 1)), "this Linear has no BatchNorm layer")
    for kind, text in ((Own, "forward() of its own"), (torch.nn.SyncBatchNorm, "SyncBatchNorm")):
        usual = torch.nn.BatchNorm1d(2)
        raises(functools.partial(dp.synchronize_batch_norm, torch.nn.Sequential(usual, kind(2))), "1 is a", text)
        assert type(usual) is torch.nn.BatchNorm1d
    lazy = torch.nn.Sequential(torch.nn.LazyBatchNorm1d())
    raises(lambda: dp.synchronize_batch_norm(lazy), "0 is a LazyBatchNorm1d", "call the model once")
    if WORLD.size > 1:
        norm = dp.synchronize_batch_norm(layer(2))
        x = torch.ones(1 if WORLD.rank == 0 else 0, 3, dtype=torch.float64, device=DEVICE)
        raises(lambda: norm(x), "one value a channel", "at least two")


run_cases(dp, WORLD, sys.argv[1:])
