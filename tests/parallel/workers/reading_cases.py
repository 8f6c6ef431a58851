"""A thread that cuts batches ahead ends with its loop, however that ends, and says where training waits for it."""

import itertools
import sys
import threading
import time
from pathlib import Path

import numpy as np
import torch

import toolkit.adapters.torch as dp
from toolkit import reading
from toolkit.adapters import _torch_ops
from toolkit.datasets import Split
from toolkit.options import RunOptions
from toolkit.run import Run
from toolkit.watching.member import Here

SAMPLES = 60
DATA = Split(np.arange(SAMPLES, dtype=np.float32)[:, None], np.ones((SAMPLES, 1), np.float32))
reading._SLOW = -1.0  # every cut counts as slow
world = dp.start(seed=0)
numbers = itertools.count()


def threads():
    return [thread for thread in threading.enumerate() if thread.name == "hvdkit-reader"]


def run(**options):
    model = torch.nn.Linear(1, 1)
    optimizer = dp.distribute(torch.optim.SGD(model.parameters(), lr=1e-4), model)
    output = Path(sys.argv[1]) / str(next(numbers))
    options = RunOptions(epochs=2, global_batch_size=4, output=output, **options)
    return Run(options, world, dp, model, optimizer, SAMPLES)


def step(run, batch):
    x, y = torch.from_numpy(batch.x), torch.from_numpy(batch.y)
    run.optimizer.zero_grad()
    loss = torch.nn.functional.mse_loss(run.model(x), y) * batch.weight
    loss.backward()
    run.optimizer.step()
    run.log(loss=loss)


def train(run, batches, most=None):
    """Take up to `most` steps; the thread is there from the third on."""
    for i, batch in enumerate(batches, 1):
        assert len(threads()) == (i > 2) or i > run.sharding.steps_per_epoch - 3, i
        step(run, batch)
        if i == most:
            break


def whole_epochs():
    with run() as r:
        for _ in r.epochs():
            train(r, r.batches(DATA))
            assert not threads()
            r.end_epoch()


def left_by_break():
    with run() as r:
        train(r, r.batches(DATA), most=5)
        assert not threads()
        r.stop()
        while not r.finished:
            train(r, r.batches(DATA), most=1)
        r.end_epoch()


def left_by_max_steps():
    with run(max_steps=7) as r:
        for _ in r.epochs():
            train(r, r.batches(DATA))
            assert not threads()
            r.end_epoch()
    assert r.step == 7


def left_by_an_error():
    held = []  # so that nothing but the run's end closes it
    try:
        with run() as r:
            held.append(r.batches(DATA))
            train(r, held[0], most=5)
            assert len(threads()) == 1
            raise KeyError("the loop's own")
    except KeyError:
        assert not threads()
    else:
        raise AssertionError("no error")


def two_at_a_time():
    with run(max_steps=8) as r:
        first = r.batches(DATA)
        train(r, first, most=4)
        second = r.batches(DATA)  # from here on
        assert not threads()
        train(r, second)
        r.end_epoch()


def says_where_it_waits():
    """The thread makes each of its cuts only when training says that it waits for that one."""
    cut, said = reading.Rows.cut_again, []

    def when_waited_for(rows, indices):
        if threading.current_thread().name == "hvdkit-reader":
            step, end = 3 + len(said) // 2, time.monotonic() + 120
            while Here.doing != f"loading the batch of step {step}" and time.monotonic() < end:
                time.sleep(0.001)
            said.append(Here.doing)
        return cut(rows, indices)

    reading.Rows.cut_again = when_waited_for
    try:
        with run(max_steps=9) as r:
            for _ in r.epochs():
                for batch in r.batches(DATA):
                    step(r, batch)
                r.end_epoch()
    finally:
        reading.Rows.cut_again = cut
    expected = [f"loading the batch of step {step}" for step in range(3, 10) for _ in "xy"]
    assert said[: len(expected)] == expected, said


def tensors_are_the_batches():
    makers = []

    def doubled(batch):
        makers.append(threading.current_thread().name)
        return 2 * batch.x + [[g.random(dtype=np.float32)] for g in batch.generators()]

    with run() as r, run() as other:
        for batch, (x, y, *rest) in zip(r.batches(DATA), other.tensors(DATA, doubled), strict=True):
            noise = [[g.random(dtype=np.float32)] for g in batch.generators()]
            assert torch.equal(x, torch.from_numpy(2 * batch.x + noise)) and torch.equal(y, torch.from_numpy(batch.y))
            assert [np.array_equal(a, b) for a, b in zip(rest, batch[2:], strict=True)] == [True] * 4
            step(r, batch)
            other.log(loss=0.0)
        assert len(makers) == 15 and makers.count("hvdkit-reader") == 13
        r.end_epoch()
        other.end_epoch()
        for x, *_ in other.tensors(DATA):
            assert x.dtype == torch.float32 and x.device.type == "cpu"
            other.log(loss=0.0)
        other.end_epoch()


class Copies:
    """Plays the stream on which arrays are copied to a GPU, and notes what is done there."""

    def __init__(self):
        self.done = []

    def __enter__(self):
        self.done.append("begin")

    def __exit__(self, *_):
        self.done.append("end")

    def synchronize(self):
        self.done.append("wait")


def arrays_are_on_a_gpu_when_they_are_handed_on():
    """With the CPU in its place: by way of pinned memory, on their own stream, and safe on the one that computes."""
    stream, to = Copies(), torch.Tensor.to
    played = {
        "pin_memory": lambda self: stream.done.append("pin") or self.clone(),
        "to": lambda self, *a, **options: stream.done.append(options) or to(self, *a, **options),
        "record_stream": lambda self, on: stream.done.append(on),
    }
    before = {name: getattr(torch.Tensor, name) for name in played}
    cuda = {"stream": lambda it: it, "default_stream": lambda device: f"computes on {device}"}
    _torch_ops._copies = stream
    try:
        for name, function in played.items():
            setattr(torch.Tensor, name, function)
        for name, function in cuda.items():
            cuda[name] = getattr(torch.cuda, name)
            setattr(torch.cuda, name, function)
        x, y = dp.on_device(DATA.x, DATA.y[:, 0])
    finally:
        _torch_ops._copies = None
        for name, function in before.items():
            setattr(torch.Tensor, name, function)
        for name, function in cuda.items():
            setattr(torch.cuda, name, function)
    assert x.numpy().tobytes() == DATA.x.tobytes() and y.shape == (SAMPLES,)
    one = ["pin", {"non_blocking": True}]
    assert stream.done == ["begin", *one, *one, "end", "wait", "computes on cpu", "computes on cpu"], stream.done


CASES = (
    *(whole_epochs, left_by_break, left_by_max_steps, left_by_an_error, two_at_a_time, says_where_it_waits),
    *(tensors_are_the_batches, arrays_are_on_a_gpu_when_they_are_handed_on),
)
for case in CASES:
    if world.rank == 0:
        print(case.__name__, flush=True)
    case()
if world.rank == 0:
    print("all cases passed")
dp.stop()
