"""Cases for the torch adapter, run by every rank; the reference is plain torch on the whole batch.

Each prints `passed <case>` on rank 0 once every rank has come through it. Arguments: the cases; none: all.
"""

import copy
import inspect
import os
import sys
import warnings

import numpy as np
import torch

import toolkit.adapters.torch as dp
from tests.parallel.workers.cases import case, run_cases
from toolkit.adapters._torch_buffer import are_finite
from toolkit.errors import UsageError
from toolkit.sharding import Sharding

WORLD = dp.start(seed=1, device=os.environ.get("HVDKIT_TEST_DEVICE", "cpu"), share_gpus=True)
DEVICE = torch.device(WORLD.device)
OPTIMIZERS = [
    kind
    for _, kind in inspect.getmembers(torch.optim, inspect.isclass)
    if issubclass(kind, torch.optim.Optimizer) and kind is not torch.optim.Optimizer
]
SAMPLES = 7  # not a multiple of the ranks: unequal parts


class Net(torch.nn.Module):
    """Only matrices where Muon needs it; a sparse embedding where SparseAdam does."""

    def __init__(self, kind=None):
        super().__init__()
        bias = kind is not torch.optim.Muon
        self.embedding = torch.nn.Embedding(9, 4, sparse=True) if kind is torch.optim.SparseAdam else None
        self.first = torch.nn.Linear(4, 5, bias=bias)
        self.second = torch.nn.Linear(5, 1, bias=bias)
        self.to(DEVICE)

    def forward(self, x):
        if self.embedding is not None:
            return self.embedding(x.argmax(1)).sum(1, keepdim=True)
        return self.second(torch.tanh(self.first(x)))

    def trained(self):
        return [self.embedding.weight] if self.embedding is not None else list(self.parameters())


def batch(step):
    generator = torch.Generator().manual_seed(step)
    x, y = torch.randn(SAMPLES, 4, generator=generator), torch.randn(SAMPLES, 1, generator=generator)
    return x.to(DEVICE), y.to(DEVICE)


def mine(step, accumulation_steps=1):
    """This rank's passes of a step: (x, y, weight)."""
    x, y = batch(step)
    sharding = Sharding(SAMPLES, SAMPLES, WORLD.size, accumulation_steps=accumulation_steps)
    for number in range(accumulation_steps):
        part = sharding.part(np.arange(SAMPLES), WORLD.rank, number)
        yield x[part.indices], y[part.indices], part.weight


def loss_of(model, x, y):
    return (model(x) - y).square().mean()


def train(model, optimizer, data, steps=5, clip=None):
    """The loop of a script for one process; `data(step)` yields (x, y, weight)."""
    for step in range(steps):
        for x, y, weight in data(step):

            def closure(x=x, y=y, weight=weight):
                optimizer.zero_grad()
                loss = loss_of(model, x, y) * weight
                loss.backward()
                return loss

            if isinstance(optimizer, torch.optim.LBFGS):
                optimizer.step(closure)
                continue
            closure()
            if clip:
                torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()


def whole(step):
    return [(*batch(step), 1.0)]


def equal_on_all_ranks(model, optimizer=None):
    digests = dp.gather(dp.digest(model, optimizer))
    return all(other == digests[0] for other in digests)


def assert_close(model, reference, tolerance=1e-5):
    for (name, p), q in zip(model.named_parameters(), reference.parameters(), strict=True):
        assert torch.allclose(p, q, rtol=tolerance, atol=tolerance), (name, (p - q).abs().max())


def new(kind, seed=0, **options):
    torch.manual_seed(seed)
    model = Net(kind)
    return model, kind(model.trained(), **({"lr": 0.05} | options))


def raises(function, *texts):
    try:
        function()
    except UsageError as error:
        assert "\n" not in str(error)
        assert all(text in str(error) for text in texts), str(error)
        return
    raise AssertionError(f"no UsageError with {texts}")


@case
def control_without_distribute_ranks_part():
    model, optimizer = new(torch.optim.SGD)
    train(model, optimizer, mine)
    assert WORLD.size == 1 or not equal_on_all_ranks(model), "the data can't show whether gradients are averaged"


@case
def every_optimizer_equals_one_process():
    assert len(OPTIMIZERS) >= 14
    for kind in OPTIMIZERS:
        options = {"line_search_fn": "strong_wolfe"} if kind is torch.optim.LBFGS else {}
        # A step of LBFGS is 20 evaluations; after several, rounding takes its line search another way.
        steps = 1 if kind is torch.optim.LBFGS else 5
        reference, plain = new(kind, **options)
        train(reference, plain, whole, steps)
        model, optimizer = new(kind, seed=WORLD.rank, **options)
        optimizer = dp.distribute(optimizer, model)
        assert isinstance(optimizer, kind)
        dp.broadcast_state(model, optimizer)
        train(model, optimizer, mine, steps)
        assert_close(model, reference)
        train(model, optimizer, mine)
        assert equal_on_all_ranks(model, optimizer), kind


@case
def state_round_trips_and_training_goes_on_to_the_same_bits():
    for kind in OPTIMIZERS:
        model, optimizer = new(kind)
        optimizer = dp.distribute(optimizer, model)
        train(model, optimizer, mine, steps=2)
        saved = dp.export_state(model, optimizer)
        train(model, optimizer, mine, steps=2)
        expected = dp.digest(model, optimizer)
        model, optimizer = new(kind, seed=5, lr=0.7)
        optimizer = dp.distribute(optimizer, model)
        dp.import_state(model, optimizer, saved)
        train(model, optimizer, mine, steps=2)
        assert dp.digest(model, optimizer) == expected, kind


@case
def import_refuses_what_does_not_fit_and_changes_nothing():
    model, optimizer = new(torch.optim.Adam)
    dp.distribute(optimizer, model)
    train(model, optimizer, mine, steps=1)
    before, saved = dp.digest(model, optimizer), dp.export_state(model, optimizer)
    raises(
        lambda: dp.import_state(model, optimizer, {**saved, "model/first.bias": np.zeros(6, "f4")}),
        "first.bias",
        "[6]",
        "[5]",
    )
    raises(
        lambda: dp.import_state(model, optimizer, {k: v for k, v in saved.items() if k != "model/second.weight"}),
        "second.weight is missing",
    )
    raises(
        lambda: dp.import_state(model, optimizer, {**saved, "optimizer/state/third.bias/step": np.zeros(())}),
        "third.bias",
    )
    raises(
        lambda: dp.import_state(model, optimizer, {**saved, "optimizer/state/first.bias/exp_avg": np.zeros(6, "f4")}),
        "first.bias",
    )
    assert dp.digest(model, optimizer) == before


MISFITS = {
    "wrong shape deep in the state": {"optimizer/state/first.bias/exp_avg": np.zeros(6, "f4")},
    "a shape that only broadcasts over": {"optimizer/state/first.bias/exp_avg": np.zeros((5, 5), "f4")},
    "another dtype": {"optimizer/state/first.bias/exp_avg": np.zeros(5, "f8")},
    "a number where the parameter has a shape": {"optimizer/state/first.bias/exp_avg": np.zeros((), "f4")},
    "an extra tensor": {"optimizer/state/first.bias/more": np.zeros(5, "f4")},
    "a tensor missing of one parameter": {"optimizer/state/first.bias/exp_avg": None},
    "an unknown parameter": {"optimizer/state/third.bias/exp_avg": np.zeros(5, "f4")},
    "an array for a number": {"optimizer/group0/lr#": np.ones(3)},
    "a tensor for a number": {"optimizer/group0/lr#": None, "optimizer/group0/lr": np.ones((), "f4")},
    "a number for a switch": {"optimizer/group0/amsgrad#": np.asarray(0.5)},
    "an option missing": {"optimizer/group0/eps#": None},
    "another option": {"optimizer/group0/momentum#": np.asarray(0.9)},
    "longer betas": {"optimizer/group0/betas[]#": np.asarray(3), "optimizer/group0/betas[2]#": np.asarray(0.9)},
    "betas of a length that they have not": {"optimizer/group0/betas[]#": np.asarray(3)},
    "one more group": {"optimizer/group2/lr#": np.asarray(0.1)},
    "a group missing": {"optimizer/group1/": None},
    "neither model nor optimizer": {"rank0/random/torch": np.zeros(3, "u1")},
    "an optimizer's own part unknown": {"optimizer/more": np.zeros(3, "f4")},
    "a model's tensor too": {"model/more": np.zeros(3, "f4")},
}


def grouped(seed=0):
    torch.manual_seed(seed)
    model = Net()
    groups = [{"params": model.first.parameters()}, {"params": model.second.parameters(), "lr": 0.3}]
    return model, dp.distribute(torch.optim.Adam(groups, lr=0.05), model)


def changed(saved, changes):
    removed = [name for name, array in changes.items() if array is None]
    kept = {n: a for n, a in saved.items() if not any(n == r or (r[-1] == "/" and n.startswith(r)) for r in removed)}
    return {**kept, **{name: array for name, array in changes.items() if array is not None}}


@case
def import_refuses_each_misfit_of_the_optimizer_and_changes_nothing():
    model, optimizer = grouped()
    train(model, optimizer, mine, steps=2)
    saved = dp.export_state(model, optimizer)
    for steps in (0, 1):  # an optimizer without state yet, and one that has its own
        for what, changes in MISFITS.items():
            model, optimizer = grouped(seed=5)
            train(model, optimizer, mine, steps=steps)
            before = dp.digest(model, optimizer)
            bad = changed(saved, changes)
            assert bad.keys() != saved.keys() or any(bad[n] is not saved[n] for n in bad), what
            named = next(iter(changes)).rstrip("#/").removesuffix("[]")
            raises(lambda m=model, o=optimizer, b=bad: dp.import_state(m, o, b), named)
            assert dp.digest(model, optimizer) == before, what
            dp.import_state(model, optimizer, saved)
            assert not np.array_equal(dp.export_state(model)["model/first.bias"], np.zeros(5)), what


@case
def import_refuses_the_state_of_another_optimizer_and_changes_nothing():
    alike = [kind for kind in OPTIMIZERS if kind not in (torch.optim.Muon, torch.optim.SparseAdam)]  # of one Net
    for kind in alike:
        model, optimizer = new(kind)
        optimizer = dp.distribute(optimizer, model)
        train(model, optimizer, mine, steps=1)
        saved = dp.export_state(model, optimizer)
        for other in alike:
            if {kind, other} <= {torch.optim.Adam, torch.optim.AdamW}:
                continue  # the same class but for the option decoupled_weight_decay, and options come from the state
            for steps in (0, 1):
                model, optimizer = new(other, seed=5)
                optimizer = dp.distribute(optimizer, model)
                train(model, optimizer, mine, steps=steps)
                before = dp.digest(model, optimizer)
                if other is kind:
                    dp.import_state(model, optimizer, saved)
                    assert dp.digest(model, optimizer) != before, kind
                    continue
                raises(lambda m=model, o=optimizer, s=saved: dp.import_state(m, o, s), "optimizer/group0/")
                assert dp.digest(model, optimizer) == before, (kind, other)


@case
def import_takes_what_a_scheduler_notes_and_how_steps_are_computed():
    model, optimizer = new(torch.optim.SGD, momentum=0.9, foreach=True)
    optimizer = dp.distribute(optimizer, model)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.5, total_steps=9)
    train(model, optimizer, mine, steps=2)
    scheduler.step()
    saved = dp.export_state(model, optimizer)
    assert "optimizer/group0/initial_lr#" in saved and "optimizer/group0/foreach#" in saved
    model, optimizer = new(torch.optim.SGD, momentum=0.9)
    optimizer = dp.distribute(optimizer, model)
    plain = dp.export_state(model, optimizer)
    dp.import_state(model, optimizer, saved)
    assert optimizer.param_groups[0]["lr"] == saved["optimizer/group0/lr#"] != plain["optimizer/group0/lr#"]
    dp.import_state(model, optimizer, plain)


@case
def import_that_fails_in_the_end_puts_the_model_back():
    class Own(torch.optim.SGD):
        def load_state_dict(self, state_dict):
            raise ValueError("not today")

    model, optimizer = new(Own)
    optimizer = dp.distribute(optimizer, model)
    before, saved = dp.digest(model, optimizer), dp.export_state(Net(), None)
    try:
        dp.import_state(model, optimizer, {**dp.export_state(model, optimizer), **saved})
    except ValueError:
        assert dp.digest(model, optimizer) == before
        return
    raise AssertionError("no error")


@case
def broadcast_gives_rank_0s_bits():
    torch.manual_seed(WORLD.rank)
    model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3), torch.nn.Linear(3, 1))
    model.register_buffer("turned", torch.rand(2, 3).t())  # not in one piece of memory
    model.register_buffer("short", torch.rand(2).bfloat16())  # which Horovod does not know
    model.to(DEVICE)
    optimizer = torch.optim.Adam(
        [
            {"params": model[0].parameters(), "lr": 0.1},
            {"params": [*model[1].parameters(), *model[2].parameters()], "lr": 0.01 * (1 + WORLD.rank)},
        ]
    )
    for step in range(WORLD.rank + 1):
        train(model, optimizer, whole, steps=1 + step)
    expected = dp.gather(dp.export_state(model, optimizer))[0]
    optimizer = dp.distribute(optimizer, model)
    if WORLD.rank > 0:
        for name in ("model/1.running_var", "model/turned", "model/short"):
            assert not np.array_equal(dp.export_state(model)[name], expected[name])
    dp.broadcast_state(model, optimizer)
    found = dp.export_state(model, optimizer)
    assert found.keys() == expected.keys()
    assert all(np.array_equal(found[name], array) for name, array in expected.items())
    assert "model/1.running_var" in expected and "model/1.running_var" not in dp.digest(model)


@case
def accumulation_is_the_mean_over_the_global_batch():
    for kind in (torch.optim.SGD, torch.optim.Adam):
        reference, plain = new(kind)
        train(reference, plain, whole)
        model, optimizer = new(kind)
        optimizer = dp.distribute(optimizer, model, accumulation_steps=3)
        train(model, optimizer, lambda step: mine(step, 3))
        assert equal_on_all_ranks(model, optimizer)
        assert_close(model, reference)


@case
def flush_applies_the_tail_as_a_mean():
    reference, plain = new(torch.optim.SGD)
    (sum(loss_of(reference, *batch(step)) for step in range(2)) / 2).backward()
    plain.step()
    model, optimizer = new(torch.optim.SGD)
    optimizer = dp.distribute(optimizer, model, accumulation_steps=5)
    train(model, optimizer, mine, steps=2)
    optimizer.flush()
    assert_close(model, reference)
    train(reference, plain, whole, steps=1)
    before = [p.clone() for p in model.parameters()]
    train(model, optimizer, mine, steps=1)
    assert all(torch.equal(p, q) for p, q in zip(before, model.parameters(), strict=True)), (
        "one pass of five is no step"
    )


@case
def gradients_cleared_behind_an_accumulation_are_refused():
    model, optimizer = new(torch.optim.SGD)
    optimizer = dp.distribute(optimizer, model, accumulation_steps=2)
    x, y = batch(0)
    loss_of(model, x, y).backward()
    optimizer.step()
    model.zero_grad()
    raises(loss_of(model, x, y).backward, "zero_grad")


@case
def clipping_acts_on_the_averaged_gradients():
    reference, plain = new(torch.optim.SGD, lr=0.5)
    train(reference, plain, whole, clip=0.1)
    unclipped, plain = new(torch.optim.SGD, lr=0.5)
    train(unclipped, plain, whole)
    ours, optimizer = new(torch.optim.SGD, lr=0.5)
    train(ours, dp.distribute(optimizer, ours, clip_norm=0.1), mine)
    own, optimizer = new(torch.optim.SGD, lr=0.5)
    train(own, dp.distribute(optimizer, own), mine, clip=0.1)  # the script's own line works as in one process
    for model in (ours, own):
        assert equal_on_all_ranks(model)
        assert_close(model, reference)
    assert any(not torch.allclose(p, q) for p, q in zip(ours.parameters(), unclipped.parameters(), strict=True))


@case
def loss_scaling_averages_before_it_looks_for_overflow():
    model, optimizer = new(torch.optim.SGD)
    optimizer = dp.distribute(optimizer, model, clip_norm=0.1)
    reference, plain = new(torch.optim.SGD)
    scaler = torch.amp.GradScaler(DEVICE.type, init_scale=1024.0)
    for step in range(4):
        ((x, y, weight),) = mine(step)
        optimizer.zero_grad()
        loss = loss_of(model, x, y) * weight
        if step == 2 and WORLD.rank == WORLD.size - 1:
            loss = loss * float("inf")  # overflow on one rank only
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        if step != 2:
            train(reference, plain, lambda _, step=step: whole(step), steps=1, clip=0.1)
        assert dp.gather(scaler.get_scale()) == [1024.0 if step < 2 else 512.0] * WORLD.size
    assert equal_on_all_ranks(model)
    assert_close(model, reference)
    raises(lambda: half_accumulated_scaler_step(), "GradScaler.step()")


def half_accumulated_scaler_step():
    model, optimizer = new(torch.optim.SGD)
    optimizer = dp.distribute(optimizer, model, accumulation_steps=2)
    scaler = torch.amp.GradScaler(DEVICE.type)
    scaler.scale(loss_of(model, *batch(0))).backward()
    scaler.step(optimizer)


def mixed_precision_step(model, optimizer, scaler, dtype, x, y, weight):
    optimizer.zero_grad()
    with torch.autocast(DEVICE.type, dtype):
        loss = loss_of(model, x, y) * weight
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
    scaler.step(optimizer)
    scaler.update()
    return norm


@case
def mixed_precision_unscales_averages_clips_and_steps_as_one_process():
    for dtype in (torch.bfloat16, torch.float16):
        # Float16's scale makes the norm 1000 times the limit: clipped before it is unscaled, no step would be seen.
        scaled = dtype == torch.float16
        scalers = [torch.amp.GradScaler(DEVICE.type, init_scale=1024.0, enabled=scaled) for _ in range(2)]
        reference, plain = new(torch.optim.SGD, lr=0.5)
        model, optimizer = new(torch.optim.SGD, lr=0.5)
        optimizer = dp.distribute(optimizer, model)
        begun = copy.deepcopy(model)
        for step in range(6):
            spoilt = scaled and step == 3
            before = [p.clone() for p in model.parameters()]
            ((x, y, weight),) = mine(step)
            if spoilt and WORLD.rank == WORLD.size - 1:
                y = y + 1e5  # beyond float16: it overflows on one rank only
            norm = mixed_precision_step(model, optimizer, scalers[0], dtype, x, y.to(dtype), weight)
            if spoilt:
                assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
                assert dp.gather(scalers[0].get_scale()) == [512.0] * WORLD.size
                continue
            x, y = batch(step)
            alone = mixed_precision_step(reference, plain, scalers[1], dtype, x, y.to(dtype), 1.0)
            assert torch.allclose(norm, alone, rtol=0.05), (dtype, norm, alone)
        assert equal_on_all_ranks(model)
        assert_close(model, reference, 1e-2)
        assert max((p - q).abs().max() for p, q in zip(model.parameters(), begun.parameters(), strict=True)) > 0.05


@case
def a_model_that_is_compiled_before_or_after_distribute():
    backend = os.environ.get("HVDKIT_TEST_COMPILER", "aot_eager")  # which compiles to no machine code
    reference, plain = new(torch.optim.SGD)
    train(reference, plain, whole)
    for before in (True, False):
        model, optimizer = new(torch.optim.SGD)
        compiled = torch.compile(model, backend=backend) if before else model
        optimizer = dp.distribute(optimizer, compiled)
        compiled = compiled if before else torch.compile(model, backend=backend)
        dp.broadcast_state(compiled, optimizer)
        train(compiled, optimizer, mine)
        assert equal_on_all_ranks(model)
        assert_close(model, reference)


@case
def a_parameter_without_gradient_counts_as_zero_or_stays():
    torch.manual_seed(0)
    model = torch.nn.ModuleDict({name: torch.nn.Linear(4, 1) for name in ("always", "sometimes", "never")}).to(DEVICE)
    optimizer = dp.distribute(torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5), model)
    start = copy.deepcopy(model.state_dict())
    x, _ = batch(0)
    for _ in range(2):
        optimizer.zero_grad()
        loss = model["always"](x).mean()
        if WORLD.rank == 0:
            loss = loss + model["sometimes"](x).mean()
        loss.backward()
        if WORLD.rank == 0:
            assert torch.allclose(model["sometimes"].bias.grad, torch.full((1,), 1 / WORLD.size, device=DEVICE))
        optimizer.step()
    assert equal_on_all_ranks(model, optimizer)
    assert torch.equal(model["never"].weight, start["never.weight"]), "no gradient anywhere: not even weight decay"
    assert not torch.equal(model["sometimes"].weight, start["sometimes.weight"])


@case
def gradients_set_by_hand_are_averaged_in_step():
    model, optimizer = new(torch.optim.SGD, lr=1.0)
    optimizer = dp.distribute(optimizer, model)
    before = [p.detach().clone() for p in model.parameters()]
    for p in model.parameters():
        p.grad = torch.full_like(p, float(WORLD.rank))
    optimizer.step()
    mean = (WORLD.size - 1) / 2
    assert all(torch.allclose(p, q - mean) for p, q in zip(model.parameters(), before, strict=True))


@case
def a_closure_that_sets_gradients_by_hand_is_averaged():
    model, optimizer = new(torch.optim.SGD, lr=1.0)
    optimizer = dp.distribute(optimizer, model)
    before = [p.detach().clone() for p in model.parameters()]

    def closure():
        for p in model.parameters():
            p.grad = torch.full_like(p, float(WORLD.rank))
        return torch.tensor(float(WORLD.rank), device=DEVICE)

    loss = optimizer.step(closure)
    mean = (WORLD.size - 1) / 2
    assert all(torch.allclose(p, q - mean) for p, q in zip(model.parameters(), before, strict=True))
    assert loss == mean


@case
def a_backward_pass_that_fails_does_not_end_the_averaging():
    model, optimizer = new(torch.optim.SGD)
    optimizer = dp.distribute(optimizer, model)
    x, y = batch(0)
    hidden = torch.tanh(model.first(x))

    def fail(_):
        raise MemoryError

    hidden.register_hook(fail)
    try:
        model.second(hidden).sum().backward()
        raise AssertionError("the hook must fail")
    except MemoryError:
        pass
    optimizer.zero_grad()
    (loss_of(model, x, y) * (1.0 + WORLD.rank)).backward()
    gradients = dp.gather([p.grad.cpu().numpy() for p in model.parameters()])
    assert all(np.array_equal(a, b) for other in gradients for a, b in zip(other, gradients[0], strict=True))


@case
def a_rank_whose_last_pass_reaches_nothing_counts_as_zero():
    for k in (1, 2):
        model, optimizer = new(torch.optim.SGD, lr=1.0)
        optimizer = dp.distribute(optimizer, model, accumulation_steps=k)
        before = model.second.bias.detach().clone()
        for number in range(k):
            optimizer.zero_grad()
            if WORLD.rank == 0 or number < k - 1:
                model.second.bias.sum().backward()
            optimizer.step()
        expected = (k * WORLD.size - (WORLD.size - 1)) / (k * WORLD.size)
        assert torch.allclose(model.second.bias, before - expected)
        assert equal_on_all_ranks(model)


@case
def a_new_optimizer_takes_over_the_old_ones_parameters():
    model, optimizer = new(torch.optim.SGD)
    dp.distribute(optimizer, model, accumulation_steps=2)
    reference, plain = new(torch.optim.SGD)
    train(reference, plain, whole)
    optimizer = dp.distribute(torch.optim.SGD(model.parameters(), lr=0.05), model)
    train(model, optimizer, mine)
    assert_close(model, reference)


@case
def one_workers_backward_pass_calls_once():
    for passes in (1, 2):
        model, optimizer = new(torch.optim.SGD)
        dp.distribute(optimizer, model, accumulation_steps=passes)
        hooks = [len(p._post_accumulate_grad_hooks or ()) for p in model.parameters()]
        all_call = WORLD.size > 1 or passes > 1
        assert hooks == [1 if all_call or i == len(hooks) - 1 else 0 for i in range(len(hooks))], (passes, hooks)


@case
def what_is_not_finite_is_found_among_small_and_large():
    shapes = [(3,), (200, 200), (5, 5), (), (0,)]
    for dtype in (torch.float32, torch.bfloat16):
        tensors = [torch.ones(shape, dtype=dtype) for shape in shapes] + [torch.ones(4, dtype=torch.float64), None]
        assert are_finite(tensors)
        for tensor in tensors[:4]:
            for wrong in (float("nan"), float("inf"), -float("inf")):
                tensor.view(-1)[-1] = wrong
                assert not are_finite(tensors)
            tensor.view(-1)[-1] = 1
        for i in (0, 2):
            tensors[i].fill_(torch.finfo(dtype).max)
        assert are_finite(tensors), "a sum that overflows is of finite numbers"


@case
def channels_last_and_bfloat16_models_work():
    torch.manual_seed(WORLD.rank)
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.Flatten(), torch.nn.Linear(4, 1))
    model = model.to(memory_format=torch.channels_last).to(DEVICE, torch.bfloat16)
    optimizer = dp.distribute(torch.optim.SGD(model.parameters(), lr=0.5), model)
    dp.broadcast_state(model, optimizer)
    assert equal_on_all_ranks(model) and model[0].weight.is_contiguous(memory_format=torch.channels_last)
    before = model[2].bias.item()
    optimizer.zero_grad()
    (model[2].bias.sum() * (1 + WORLD.rank)).backward()
    optimizer.step()
    assert abs(model[2].bias.item() - (before - 0.5 * (1 + WORLD.size) / 2)) < 0.02
    assert equal_on_all_ranks(model) and model[2].bias.dtype == torch.bfloat16


@case
def nested_state_and_slashes_in_names_round_trip():
    class Nested(torch.optim.SGD):
        def step(self, closure=None):
            for p in self.param_groups[0]["params"]:
                if p.grad is not None:
                    self.state[p]["pre"] = {"L": p.grad.clone(), "R": [p.grad.clone() * 2, None]}
            return super().step(closure)

    model = torch.nn.ModuleDict({"a/b": torch.nn.Linear(4, 1), "a": torch.nn.Linear(4, 1)}).to(DEVICE)
    optimizer = dp.distribute(Nested(model.parameters(), lr=0.1), model)
    (model["a/b"](batch(0)[0]).sum() + model["a"](batch(0)[0]).sum()).backward()
    optimizer.step()
    saved = dp.export_state(model, optimizer)
    optimizer.state.clear()
    dp.import_state(model, optimizer, saved)
    again = dp.export_state(model, optimizer)
    assert again.keys() == saved.keys() and any("a/b.weight/pre/L" in name for name in saved)
    assert all(np.array_equal(again[name], array) for name, array in saved.items())


@case
def nothing_to_train_is_no_error():
    model, _ = new(torch.optim.SGD)
    model.requires_grad_(False)
    dp.distribute(torch.optim.SGD(model.parameters(), lr=0.1), model).step()


@case
def compression_is_close_and_alike():
    reference, plain = new(torch.optim.SGD)
    train(reference, plain, whole)
    model, optimizer = new(torch.optim.SGD)
    train(model, dp.distribute(optimizer, model, compression="fp16"), mine)
    assert equal_on_all_ranks(model)
    assert_close(model, reference, 1e-3)


@case
def schedulers_freezing_and_new_groups_work():
    model, optimizer = new(torch.optim.SGD)
    model.first.requires_grad_(False)
    optimizer = dp.distribute(optimizer, model)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    train(model, optimizer, mine, steps=1)
    scheduler.step()
    model.first.requires_grad_(True)
    train(model, optimizer, mine, steps=2)
    assert optimizer.param_groups[0]["lr"] == 0.025
    assert equal_on_all_ranks(model, optimizer)
    model = Net()
    optimizer = dp.distribute(torch.optim.SGD(model.first.parameters(), lr=0.1), model)
    dp.broadcast_state(model, optimizer)
    optimizer.add_param_group({"params": list(model.second.parameters())})
    train(model, optimizer, mine)
    assert equal_on_all_ranks(model, optimizer)
    raises(lambda: optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(3))]}), "[3]")


@case
def averages_are_weighted():
    r, n = WORLD.rank, WORLD.size
    found = dp.average({"a": float(r), "b": np.array([[1.0, r]])}, weight=r + 1)
    weights = np.arange(1, n + 1)
    assert np.isclose(found["a"], np.average(np.arange(n), weights=weights))
    assert np.allclose(found["b"], [[1.0, found["a"]]]) and isinstance(found["a"], float)
    if n > 1:
        assert dp.average({"a": float("nan") if r == 0 else 2.0}, weight=0 if r == 0 else 1)["a"] == 2.0
    assert np.isnan(dp.average({"a": 1.0}, weight=0)["a"])
    assert dp.gather({"rank": r}) == [{"rank": i} for i in range(n)]
    raises(lambda: dp.average({"a": 1.0}, weight=-1), "-1")


@case
def mistakes_get_one_clear_line():
    model, optimizer = new(torch.optim.SGD)
    raises(lambda: dp.distribute("sgd", model), "str", "torch.optim.Optimizer")
    raises(lambda: dp.distribute(optimizer, None), "NoneType")
    raises(lambda: dp.distribute(optimizer, Net()), "not a parameter of the model")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch only warns of it
        twice = torch.optim.SGD([model.first.bias, model.first.bias], lr=0.1)
    sparse, plain = new(torch.optim.SparseAdam)
    raises(lambda: dp.distribute(plain, sparse, clip_norm=1.0), "sparse")
    raises(lambda: dp.distribute(twice, model), "first.bias", "twice")
    raises(lambda: dp.distribute(optimizer, model, accumulation_steps=0), "accumulation_steps is 0")
    raises(lambda: dp.distribute(optimizer, model, clip_norm=-1.0), "clip_norm is -1.0")
    raises(lambda: dp.distribute(optimizer, model, compression="zip"), "'zip'", "none, fp16, bf16")
    torch.optim.lr_scheduler.StepLR(optimizer, 1)
    raises(lambda: dp.distribute(optimizer, model), "create it after")
    model, optimizer = new(torch.optim.SGD)
    dp.distribute(optimizer, model)
    raises(lambda: dp.distribute(optimizer, model), "distributed already")


if __name__ == "__main__":
    run_cases(dp, WORLD, sys.argv[1:])
