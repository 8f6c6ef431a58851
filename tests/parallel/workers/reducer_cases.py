"""Cases for `distribute(…, reducer=…, compression=…)`, run by every rank: reducer_cases.py ADAPTER [GROUPS] [CASE …].

Expected values come from numpy, and for compression from the same schemes on ranks that are threads of one process.
"""

import functools
import hashlib
import os
import sys
import traceback
from unittest import mock

import numpy as np

if sys.argv[1] == "torch":
    from reducer_torch import Trial, dp, own_cases
else:
    from reducer_keras import Trial, dp, own_cases

from tests.rank_threads import Ranks
from toolkit import compression
from toolkit.adapters import _job
from toolkit.adapters._mpi import MpiWire
from toolkit.errors import UsageError

WORLD = dp.start(seed=1, groups=int(sys.argv[2]))
LARGE = [(401, 401), (17,)]  # above the adapters' limits from which they take other ways through memory
SHAPES = [(60, 50), (17,), (20, 10, 3, 3), (), (1000,)]
SMALL = [(6, 5), (5,), (3,)]
SCHEMES = ["fp16", "bf16", "int8", "topk", "powersgd"]
CASES = []


def case(function, name=None):
    CASES.append((name or function.__name__, function))
    return function


def gradients(step, shapes, rank):
    generator = np.random.default_rng([step, rank, WORLD.group])
    return [generator.normal(size=shape).astype(np.float32) for shape in shapes]


def given(step, shapes):
    return gradients(step, shapes, WORLD.rank)


def by_numpy(step, shapes):
    """The mean over all ranks, in float64."""
    every = [gradients(step, shapes, rank) for rank in range(WORLD.size)]
    return [np.mean([np.float64(g) for g in each], axis=0) for each in zip(*every, strict=True)]


def same_bits(one, other):
    return all(a.tobytes() == b.tobytes() for a, b in zip(one, other, strict=True))


def same_everywhere(arrays):
    mine = hashlib.sha256(b"".join(array.tobytes() for array in arrays)).digest()
    return all(other == mine for other in dp.gather(mine))


def raises(function, *texts):
    try:
        function()
    except UsageError as error:
        assert "\n" not in str(error)
        assert all(text in str(error) for text in texts), str(error)
        return
    raise AssertionError(f"no UsageError with {texts}")


def by_mpi(trial):
    return isinstance(trial.averager()._wire, MpiWire)


def train(trial, shapes=SHAPES, steps=3):
    """The weights after each step."""
    found = []
    for step in range(steps):
        trial.step(given(step, shapes))
        found += trial.values()
    return found


@case
def both_reducers_give_numpys_mean():
    for shapes in (SHAPES, LARGE):
        found = {reducer: train(Trial(shapes, reducer=reducer), shapes) for reducer in ("mpi", "horovod")}
        means = [by_numpy(step, shapes) for step in range(3)]
        expected = [-np.sum(each, axis=0) for end in range(1, 4) for each in zip(*means[:end], strict=True)]
        for reducer, values in found.items():
            assert same_everywhere(values), reducer
            for value, mean in zip(values, expected, strict=True):
                np.testing.assert_allclose(value, mean, rtol=1e-5, atol=3e-6, err_msg=reducer)
        # Of two numbers there is one sum. Of more, TensorFlow's go through Horovod one by one, in another order.
        if WORLD.size == 2 or sys.argv[1] == "torch":
            assert same_bits(found["mpi"], found["horovod"])


@case
def the_one_that_is_asked_for_adds_up():
    for reducer in ("mpi", "horovod"):
        trial = Trial(SMALL, reducer=reducer)
        trial.step(given(0, SMALL))
        assert by_mpi(trial) == (reducer == "mpi")
    trial = Trial(SMALL)
    trial.step(given(0, SMALL))
    assert len(set(dp.gather(by_mpi(trial)))) == 1, "auto chose another one on another rank"


@case
def the_environment_is_heard_where_nothing_is_asked_for():
    try:
        for reducer in ("mpi", "horovod"):
            os.environ["HVDKIT_REDUCER"] = reducer
            for asked in ("auto", "mpi", "horovod"):
                trial = Trial(SMALL, reducer=asked)
                trial.step(given(0, SMALL))
                assert by_mpi(trial) == ((reducer if asked == "auto" else asked) == "mpi")
                with mock.patch.object(_job, "reduces_on_gpu", lambda: True):
                    assert trial.averager()._adds_up_on_gpu() != by_mpi(trial)
        os.environ["HVDKIT_REDUCER"] = "pigeons"
        raises(lambda: Trial(SMALL).step(given(0, SMALL)), "'pigeons'", "auto, horovod, mpi")
    finally:
        del os.environ["HVDKIT_REDUCER"]


@case
def missing_gradients_count_as_zero_or_stay():
    for eager in (False, True) if sys.argv[1] == "tensorflow" else (None,):
        more = {} if eager is None else {"eager": eager}
        trial = Trial(SMALL, options={"weight_decay": 0.5}, begin=1.0, reducer="mpi", **more)
        first, _, third = given(0, SMALL)
        for _ in range(2):
            trial.step([first, None, third if WORLD.rank == 0 else None])
        mean, third = by_numpy(0, SMALL)[0], np.float64(gradients(0, SMALL, 0)[2]) / WORLD.size
        values = trial.values()
        assert (values[1] == 1).all(), "no gradient on any rank: not even weight decay"
        for value, each in ((values[0], mean), (values[2], third)):
            np.testing.assert_allclose(value, 0.25 - 1.5 * each, rtol=1e-4, atol=1e-5)  # of the weights half decays
        assert same_everywhere(values)


@case
def a_flag_is_heard_by_all():
    trial = Trial(SMALL, reducer="mpi")
    dp.exchange_flag(False)
    for up in (False, True, False):
        trial.step(given(0, SMALL))
        heard, broken = dp.exchange_flag(up and WORLD.rank == WORLD.size - 1)
        assert (heard, broken) == (False, None)
        if up:
            trial.step(given(0, SMALL))
            assert dp.exchange_flag(False) == (True, None)
    dp.exchange_flag(None)


@case
def a_step_with_a_nan_is_left_out_on_all_ranks():
    trial = Trial(SMALL, reducer="mpi")
    dp.exchange_flag(False)
    trial.step(given(0, SMALL))
    before = trial.values()
    for wrong in (np.nan, np.inf):
        mine = given(1, SMALL)
        if WORLD.rank == WORLD.size - 1:
            mine[1][2] = wrong
        trial.step(mine)
        assert dp.exchange_flag(False)[1] == (trial.name(1) if WORLD.rank == WORLD.size - 1 else "")
        assert same_bits(trial.values(), before)
    trial.step(given(2, SMALL))
    assert dp.exchange_flag(None) == (False, None)
    for value, last, mean in zip(trial.values(), before, by_numpy(2, SMALL), strict=True):
        np.testing.assert_allclose(value, last - mean, rtol=1e-5, atol=1e-6)
    mine[1][2] = np.nan  # nobody asks any more
    trial.step(mine)
    assert np.isnan(trial.values()[1][2])


@case
def accumulation_is_a_mean():
    trial = Trial(SMALL, accumulation_steps=3, reducer="mpi")
    for step in range(6):
        trial.step(given(step, SMALL))
        if step < 2:
            assert not any(value.any() for value in trial.values())
    means = [by_numpy(step, SMALL) for step in range(6)]
    for value, each in zip(trial.values(), zip(*means, strict=True), strict=True):
        np.testing.assert_allclose(value, -sum(each) / 3, rtol=1e-4, atol=1e-5)
    assert same_everywhere(trial.values())


@case
def clipping_acts_on_the_mean():
    trial = Trial(SMALL, clip_norm=0.5, reducer="mpi")
    trial.step(given(0, SMALL))
    mean = by_numpy(0, SMALL)
    norm = np.sqrt(sum(np.square(each).sum() for each in mean))
    assert norm > 1
    for value, each in zip(trial.values(), mean, strict=True):
        np.testing.assert_allclose(value, -each * 0.5 / norm, rtol=1e-4, atol=1e-5)


@case
def optimizers_that_take_turns_do_not_mix():
    trials = [Trial(SMALL, reducer=reducer) for reducer in ("mpi", "mpi", "horovod")]
    for step in range(3):
        for i, trial in enumerate(trials):
            trial.step(given(10 * i + step, SMALL))
    for i, trial in enumerate(trials):
        means = [by_numpy(10 * i + step, SMALL) for step in range(3)]
        for value, each in zip(trial.values(), zip(*means, strict=True), strict=True):
            np.testing.assert_allclose(value, -sum(each), rtol=1e-4, atol=1e-5)


@case
def other_shapes_on_one_rank_are_refused_on_all():
    shapes = SMALL[::-1] if WORLD.rank == 1 else SMALL
    trial = Trial(shapes, reducer="mpi")
    raises(lambda: trial.step(given(0, shapes)), "rank 1", "other shapes")


@case
def parameters_of_all_types():
    precision = {"float64": 1e-12, "float32": 1e-6, "float16": 2e-3, "bfloat16": 2e-2}
    kinds = [[dtype] * 3 for dtype in precision] + [
        ["bfloat16", "float64", "float16"],
        ["float16", "float32", "float64"],
    ]
    for dtypes in kinds:
        trial = Trial(SMALL, dtypes, reducer="mpi")
        trial.step(given(0, SMALL))
        assert by_mpi(trial)
        for value, mean, dtype in zip(trial.values(), by_numpy(0, SMALL), dtypes, strict=True):
            np.testing.assert_allclose(value, -mean, rtol=precision[dtype], atol=precision[dtype], err_msg=dtype)
        assert same_everywhere(trial.values())


@functools.cache
def by_threads(scheme, steps, left_out=()):
    """The sum of the means of some steps, by the same scheme on ranks that are threads."""

    def work(wire):
        compressor, total = compression.make(scheme, SHAPES), np.float32(0)
        for step in range(steps):
            if step not in left_out:
                flat = np.concatenate([g.ravel() for g in gradients(step, SHAPES, wire.rank)])
                compressor.average(flat, wire)
                total = total - flat
        return total

    return Ranks(WORLD.size).run(work)[0]


def flat(trial):
    return np.concatenate([value.ravel() for value in trial.values()])


def reducers():
    return ("mpi", "horovod") if os.environ.get("HOROVOD_CONTROLLER") != "gloo" else ("horovod", "auto")


# What follows holds under every launcher, and for one worker without any.


@case
def compression_gives_the_schemes_own_mean():
    """By both reducers what the scheme itself gives on threads; to the bit, where it has one order of adding up."""
    for reducer in reducers():
        for scheme in [*SCHEMES, "topk:0.1", "powersgd:1"]:
            trial = Trial(SHAPES, compression=scheme, reducer=reducer)
            train(trial)
            found = flat(trial)
            assert same_everywhere([found]), (scheme, reducer)
            if WORLD.size == 1:
                expected = -sum(np.concatenate([g.ravel() for g in gradients(s, SHAPES, 0)]) for s in range(3))
                np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)
                continue
            expected = by_threads(scheme, 3)
            if scheme.startswith("powersgd"):
                np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-3)
            else:
                assert np.array_equal(found, expected), (scheme, reducer, np.abs(found - expected).max())


@case
def a_nan_leaves_the_step_out_and_the_compressions_memory_alone():
    for reducer in reducers():
        for scheme in SCHEMES:
            trial = Trial(SHAPES, compression=scheme, reducer=reducer)
            dp.exchange_flag(False)
            for step in range(3):
                mine = given(step, SHAPES)
                before, memory = trial.values(), dp.export_local(trial.model, trial.optimizer)
                memory = [array for name, array in sorted(memory.items()) if name.startswith("compression/")]
                if step == 1 and WORLD.rank == 0:
                    mine[4][7] = np.nan
                trial.step(mine)
                broken = (trial.name(4) if WORLD.rank == 0 else "") if step == 1 else None
                assert dp.exchange_flag(False)[1] == broken, (scheme, reducer, step)
                if step == 1:
                    assert same_bits(trial.values(), before), (scheme, reducer)
                    after = dp.export_local(trial.model, trial.optimizer)
                    after = [array for name, array in sorted(after.items()) if name.startswith("compression/")]
                    assert len(after) == (WORLD.size > 1) * {"int8": 1, "topk": 1, "powersgd": 2}.get(scheme, 0)
                    assert same_bits(after, memory), (scheme, reducer)
            dp.exchange_flag(None)
            if WORLD.size > 1 and scheme != "powersgd":
                assert np.array_equal(flat(trial), by_threads(scheme, 3, (1,))), (scheme, reducer)


@case
def the_memory_goes_through_export_and_import():
    for scheme in ("int8", "topk", "powersgd"):
        straight = Trial(SHAPES, compression=scheme)
        train(straight)
        first, second = (Trial(SHAPES, compression=scheme) for _ in range(2))
        train(first, steps=2)
        dp.import_state(second.model, second.optimizer, dp.export_state(first.model, first.optimizer))
        dp.import_local(second.model, dp.export_local(first.model, first.optimizer), second.optimizer)
        second.step(given(2, SHAPES))
        assert same_bits(straight.values(), second.values()), scheme


@case
def mistakes_get_one_clear_line():
    raises(lambda: Trial(SMALL, reducer="pigeons"), "'pigeons'", "auto, horovod, mpi")
    for scheme in ("zip", "topk:2", "powersgd:0", "fp16:3"):
        raises(lambda scheme=scheme: Trial(SMALL, compression=scheme), scheme)
    if os.environ.get("HOROVOD_CONTROLLER") == "gloo" and WORLD.size > 1:
        raises(lambda: Trial(SMALL, reducer="mpi").step(given(0, SMALL)), "mpirun", 'use reducer="horovod"')


if __name__ == "__main__":
    own_cases(case, WORLD, given, by_numpy, same_everywhere)
    for name, function in CASES:
        if sys.argv[3:] and name not in sys.argv[3:]:
            continue
        try:
            function()
            problem = None
        except Exception:
            problem = traceback.format_exc()
        problems = [p for p in dp.gather(problem, all_groups=True) if p]
        if WORLD.rank == WORLD.group == 0:
            print("\n".join(problems) or f"passed {name}", flush=True)
    dp.stop()
