"""Resume from a checkpoint whose values another has chosen, its hashes right: taken, or refused in one line."""

import contextlib
import copy
import io
import resource
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import safetensors.numpy
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import toolkit.adapters.torch as dp
from tests.single.test_hostile import ANY_JSON, HOSTILE, forge
from toolkit import checkpoint
from toolkit.errors import UsageError
from toolkit.options import RunOptions
from toolkit.run import Run

place, examples = Path(sys.argv[1]), int(sys.argv[2])
world = dp.start()
X, Y = np.ones((50, 6), np.float32), np.ones((50, 1), np.float32)
refused = taken = 0


class Data:
    x, y = X, Y


def train(options, steps, only_begin=False):
    torch.manual_seed(1)
    model = torch.nn.Sequential(torch.nn.Linear(6, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 1))
    optimizer = dp.distribute(torch.optim.Adam(model.parameters(), lr=0.01), model)
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [3, 6], 0.5)
    options = replace(options, max_steps=steps)
    with Run(options, world, dp, model, optimizer, len(X), extra={"scheduler": scheduler}) as run:
        for _ in run.epochs() if not only_begin else ():
            for batch in run.batches(Data):
                optimizer.zero_grad()
                loss = model(torch.from_numpy(batch.x)).mean() * batch.weight + np.random.normal() * 0
                loss.backward()
                optimizer.step()
                scheduler.step()
                run.log(loss=loss)
            run.end_epoch()


options = RunOptions(output=place / "run", epochs=3, global_batch_size=10, audit=True)
with contextlib.redirect_stdout(io.StringIO()):
    train(options, 7)
options = replace(options, resume=True)
good = checkpoint.newest(place / "run")
GOOD_MANIFEST = {key: value for key, value in good.manifest.items() if key != "sha256"}


class Forgery(tuple):
    """(manifest, state), shown as what is another than in the good checkpoint."""

    def __repr__(self):
        manifest, state = self
        names = sorted(name for name in {*state, *good.state} if state.get(name) is not good.state.get(name))
        keys = sorted(key for key in {*manifest, *GOOD_MANIFEST} if manifest.get(key) != GOOD_MANIFEST.get(key))
        return f"manifest { ({key: manifest.get(key) for key in keys}) }, state { ({n: state.get(n) for n in names}) }"


@st.composite
def forgeries(draw):
    """(manifest, state) with one to three of their values exchanged, taken out, put in or renamed."""
    manifest, state = copy.deepcopy(GOOD_MANIFEST), dict(good.state)
    for _ in range(draw(st.integers(1, 3))):
        if draw(st.booleans()):
            at = manifest
            key = draw(st.sampled_from(sorted(at)))
            while isinstance(at[key], dict) and at[key] and draw(st.integers(0, 3)):
                at = at[key]
                key = draw(st.sampled_from(sorted(at)))
            at[key] = draw(HOSTILE | ANY_JSON | st.integers(-3, 30))
            continue
        if not state:
            continue
        name = draw(st.sampled_from(sorted(state)))
        array = state.pop(name)
        change = draw(st.sampled_from(["drop", "rename", "shape", "dtype", "value", "value", "value"]))
        if change == "rename":
            end = draw(st.sampled_from(["x", "#", "[]#", "[7]", "[-1]#", "/a/b", "[x]", "[9999999]#"]))
            state[draw(st.sampled_from([name + end, end, f"optimizer/state/0.weight/{end}", f"rank1/{name}"]))] = array
        elif change == "shape":
            state[name] = np.zeros(draw(st.lists(st.integers(0, 4), max_size=3)), array.dtype)
        elif change == "dtype":
            state[name] = array.astype(draw(st.sampled_from(["f2", "f8", "i8", "u1", "?"])))
        elif change == "value":
            number = draw(st.sampled_from([0, 1, 2, 255, 624, 625, 2**31 - 1, -1, 1e30, np.nan, np.inf]))
            with np.errstate(invalid="ignore"):
                changed = np.asarray(np.array(number, np.float64).astype(array.dtype))
            if draw(st.booleans()) or array.ndim == 0:
                state[name] = np.full_like(array, changed)
            else:
                at = draw(st.integers(0, max(array.size - 1, 0)))
                state[name] = array.copy()
                state[name].reshape(-1)[at : at + 1] = changed
    return Forgery((manifest, state))


def with_state(name, value):
    return Forgery((GOOD_MANIFEST, {**good.state, name: np.asarray(value)}))


def with_manifest(**changes):
    return Forgery(({**GOOD_MANIFEST, **changes}, good.state))


HUGE = 10**11  # items of a list
# What asks for much more memory than a small run has fails there and then.
_, hard = resource.getrlimit(resource.RLIMIT_DATA)
(held,) = (int(line.split()[1]) for line in Path("/proc/self/status").read_text().splitlines() if "VmData" in line)
resource.setrlimit(resource.RLIMIT_DATA, ((held << 10) + 500_000_000, hard))


REFUSED = [
    with_state("rank0/random/numpy/position", np.array([10**9, 0])),  # numpy reads there without a look
    with_state("rank0/random/numpy/position", np.array([-5, 0])),
    with_state("rank0/random/python", np.full(625, 700, np.uint32)),
    with_state("rank0/random/torch", np.zeros_like(good.state["rank0/random/torch"])),
    with_state("optimizer/state/0.weight/list[]#", HUGE),
    with_state("optimizer/group0/betas[]#", HUGE),
    with_state("optimizer/group0/betas[]#", -1),
    with_state("audit/counts", np.full(50, -1)),
    with_state("audit/counts", np.zeros(7, np.int64)),
    with_state("rankx/y", 1),
    with_manifest(position={"epoch": 1, "step": 7, "step_in_epoch": 40, "loss_sum": 0.0}),
    with_manifest(position={"epoch": 10**15, "step": 7, "step_in_epoch": 2, "loss_sum": 0.0}),
    with_manifest(extra={}),
    with_manifest(extra={"scheduler": {"milestones": {"#pairs": [[[], 1]]}}}),
    with_manifest(extra={"scheduler": None}),
    with_manifest(world_size=2**50),
    with_manifest(reference_batch_size=2**50),
    with_manifest(recipe="x\n\x1b[2J"),
    Forgery(({k: v for k, v in GOOD_MANIFEST.items() if k != "position"}, good.state)),
]


@settings(
    max_examples=examples,
    deadline=None,
    database=None,
    derandomize=examples < 1000,
    suppress_health_check=list(HealthCheck),
)
@given(forgeries())
def take_up(forgery):
    global refused, taken
    manifest, state = forgery
    path = place / "run" / good.path.name
    for other in checkpoint.steps(place / "run"):
        if other != path:
            for file in other.iterdir():
                file.unlink()
            other.rmdir()
    forge(path, manifest, safetensors.numpy.save(dict(state)))
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as said:
            train(options, 8, only_begin=True)
        taken += 1
    except UsageError as error:
        assert str(error).isprintable() and len(str(error)) < 2000, str(error)
        refused += 1
    assert "Traceback" not in said.getvalue()


take_up()
for forgery in REFUSED:
    before = refused
    take_up.hypothesis.inner_test(forgery)
    assert refused == before + 1, forgery
assert taken > 0 and refused > 0
print(f"{taken} taken, {refused} refused in one line")
dp.stop()
