"""The reducer of a run that goes on: reducer_resume.py ADAPTER DIRECTORY CASE, with a clock that is played.

The two reducers' sums of these gradients differ on 3 ranks, in their last bits: 3 MB are added up, then the rest, for
whose size Open MPI 4.1 takes a ring, in which a value's place decides the order; Horovod has it add up all at once.
"""

import hashlib
import sys
from pathlib import Path

import numpy as np

if sys.argv[1] == "torch":
    from reducer_torch import Trial, dp
else:
    from reducer_keras import Trial, dp

from toolkit import checkpoint
from toolkit.adapters import _reduction
from toolkit.options import RunOptions
from toolkit.run import Run

SHAPES = [(1020, 800), (17,)]  # 3 MB and 118 kB
OTHER = {"mpi": "horovod", "horovod": "mpi"}
base, case = Path(sys.argv[2]), sys.argv[3]
world = dp.start(deterministic=case == "deterministic")
trials = []


class Data:
    x = y = np.zeros((4 * world.size, 1), np.float32)


def train(place, quicker, reducer="auto", **options):
    """Four steps, or what is left of them; the weights' hash, who added up, and how often both were tried."""

    def played(add_up, numbers):
        trials.append(numbers.size)
        return float((add_up.__name__ == "by_horovod") == (quicker == "mpi"))

    trials.clear()
    _reduction._seconds = played
    trial = Trial(SHAPES, reducer=reducer)
    options = RunOptions(epochs=1, global_batch_size=world.size, output=base / place, **options)
    with Run(options, world, dp, trial.model, trial.optimizer, len(Data.x)) as run:
        for _ in run.epochs():
            for _ in run.batches(Data):
                generator = np.random.default_rng([run.step, world.rank])
                trial.step([generator.normal(size=shape).astype(np.float32) for shape in SHAPES])
                run.log(loss=0.0)
            run.end_epoch()
    dp.gather(None)  # rank 0 has written it
    weights = b"".join(value.tobytes() for value in trial.values())
    return hashlib.sha256(weights).hexdigest(), trial.averager().reducer, len(trials) // 2


def resumed():
    found = {}
    for quicker, other in OTHER.items():
        found[quicker], reducer, tried = train(f"straight-{quicker}", quicker)
        assert (reducer, tried) == (quicker, 1)
        train(f"stopped-{quicker}", quicker, max_steps=2)
        assert checkpoint.newest(base / f"stopped-{quicker}").manifest["reducer"] == quicker
        assert train(f"stopped-{quicker}", other, resume=True) == (found[quicker], quicker, 0)
        train(f"told-{quicker}", quicker, max_steps=2)
        train(f"left-{quicker}", quicker, max_steps=2)
        assert train(f"told-{quicker}", quicker, other, resume=True)[1:] == (other, 0), "the user's word comes first"
    assert world.size < 3 or found["mpi"] != found["horovod"], "these numbers don't show who has added them up"


def deterministic():
    found = {train(f"deterministic-{quicker}", quicker) for quicker in OTHER}
    assert {(reducer, tried) for _, reducer, tried in found} == {("mpi", 0)} and len(found) == 1, found


def without_mpi():
    """After `resumed`, by a launcher without MPI."""
    assert train("left-mpi", "mpi", resume=True)[1:] == ("horovod", 0)


{"resumed": resumed, "deterministic": deterministic, "without_mpi": without_mpi}[case]()
if world.rank == 0:
    print(f"passed {case}")
dp.stop()
