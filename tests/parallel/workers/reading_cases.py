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


for case in (whole_epochs, left_by_break, left_by_max_steps, left_by_an_error, two_at_a_time, says_where_it_waits):
    if world.rank == 0:
        print(case.__name__, flush=True)
    case()
if world.rank == 0:
    print("all cases passed")
dp.stop()
