"""overlap_torch.py [CASE …]: torch gradients in buckets that travel during the backward pass.

The same training is done by way of one buffer after the backward pass (`reducer="mpi"`), which must give the same.
Each case prints `passed <case>` on rank 0 once every rank has come through it. Run by `as_on_gpus.py`.
"""

import functools
import os
import sys
import warnings

import torch
from torch.utils.checkpoint import checkpoint

import toolkit.adapters.torch as dp
from tests.parallel.workers.cases import case, run_cases
from toolkit.adapters import _torch_buckets, _torch_buffer
from toolkit.errors import UsageError

WORLD = dp.start(seed=1, device=os.environ.get("HVDKIT_TEST_DEVICE", "cpu"), share_gpus=True)
DEVICE = torch.device(WORLD.device)
WAYS = "auto", "mpi"  # in buckets, and in one buffer
ROUNDS = []  # how many gradients came to each round of adding up buckets
_add_up = _torch_buckets.Buckets._add_up


def counted(buckets, gradients, scale):
    ROUNDS.append(len(gradients))
    return _add_up(buckets, gradients, scale)


_torch_buckets.Buckets._add_up = counted


class Net(torch.nn.Module):
    """Two branches, an end, and what only some cases use."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.left, self.right, self.end = torch.nn.Linear(4, 6), torch.nn.Linear(4, 6), torch.nn.Linear(6, 6)
        self.more = torch.nn.Linear(6, 6)
        self.to(DEVICE)

    def forward(self, x, left_first=True):
        # The branch that is computed last is the first one of the backward pass.
        branches = [self.left, self.right] if left_first else [self.right, self.left]
        first, second = (torch.tanh(branch(x)) for branch in branches)
        return self.end(first + second)


def data(step):
    generator = torch.Generator().manual_seed(100 * step + WORLD.rank)
    return torch.randn(3, 4, generator=generator).to(DEVICE)


def new(way, kind=torch.optim.SGD, **options):
    model = Net()
    return model, dp.distribute(kind(model.parameters(), lr=0.1), model, reducer=way, **options)


def one_step(model, optimizer, step):
    optimizer.zero_grad()
    model(data(step)).square().sum().backward()
    optimizer.step()


def both_ways(train):
    """Train in buckets and in one buffer, and compare the weights; returns the model that went in buckets."""
    models = {way: train(way) for way in WAYS}
    for (name, p), q in zip(models["auto"].named_parameters(), models["mpi"].parameters(), strict=True):
        # Of two numbers there is one sum; of more the order of addition is each algorithm's own. A GPU's own kernels,
        # as of the norm that clips, may add up in an order that goes by where in memory the numbers begin.
        exact = WORLD.size == 2 and DEVICE.type == "cpu"
        same = torch.equal(p, q) if exact else torch.allclose(p, q, rtol=1e-5, atol=1e-6)
        assert same, (name, (p - q).abs().max())
    digests = dp.gather(dp.digest(models["auto"]))
    assert all(other == digests[0] for other in digests)
    return models["auto"]


def parts(optimizer):
    return optimizer._averager._buckets._buckets


def number_of(parameter, optimizer):
    """Its bucket's."""
    return next(i for i, bucket in enumerate(parts(optimizer)) if any(p is parameter for p in bucket.parameters))


def sent(optimizer):
    return [bucket.is_sent for bucket in parts(optimizer)]


def look_when_reached(hidden, optimizer, seen):
    """Note which buckets are under way when the backward pass comes to what was computed from here on."""
    hidden.register_hook(lambda _: seen.append(sent(optimizer)))


@case
def buckets_travel_while_the_backward_pass_goes_on():
    def train(way):
        model, optimizer = new(way)
        for step in range(4):
            optimizer.zero_grad()
            x = data(step).requires_grad_()
            seen = []
            hidden = torch.tanh(model.left(x))
            if way == "auto" and step:
                look_when_reached(hidden, optimizer, seen)
            model.end(hidden).square().sum().backward()
            if way == "auto" and step:
                assert any(seen[0]) and not all(seen[0]), seen
                assert not any(sent(optimizer))
            optimizer.step()
        return model

    both_ways(train)


@case
def the_order_is_the_one_in_which_gradients_get_ready_on_rank_0():
    model, optimizer = new("auto")
    optimizer.zero_grad()
    model(data(0), left_first=WORLD.rank == 0).sum().backward()
    names = {id(p): name for name, p in model.named_parameters()}
    first = [names[id(p)].partition(".")[0] for bucket in parts(optimizer) for p in bucket.parameters]
    assert list(dict.fromkeys(first)) == ["end", "right", "left", "more"], first
    assert len(parts(optimizer)) > 3


@case
def ranks_whose_gradients_get_ready_in_another_order_agree():
    def train(way):
        model, optimizer = new(way, torch.optim.Adam)
        for step in range(6):
            optimizer.zero_grad()
            model(data(step), left_first=(WORLD.rank + step // 2) % 2 == 0).square().sum().backward()
            optimizer.step()
        return model

    both_ways(train)


@case
def gradients_that_are_missing():
    def train(way):
        model = Net()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5)
        optimizer = dp.distribute(optimizer, model, reducer=way)
        untouched = model.more.weight.detach().clone()
        for step in range(6):
            optimizer.zero_grad()
            x = data(step)
            hidden = torch.tanh(model.left(x))
            if (WORLD.rank + step) % 3 == 0:  # one rank, none, or more
                hidden = hidden + model.right(x)
            model.end(hidden).square().sum().backward()
            assert model.more.weight.grad is None and model.left.weight.grad is not None
            optimizer.step()
        assert torch.equal(model.more.weight, untouched), "no gradient anywhere: not even weight decay"
        for step in range(2):  # nothing at all on one rank
            optimizer.zero_grad()
            if WORLD.rank == 0:
                model(data(step)).square().sum().backward()
            optimizer.step()
        return model

    both_ways(train)


@case
def parameters_that_are_frozen_thawed_and_added():
    def train(way):
        model = Net()
        optimizer = torch.optim.SGD([*model.left.parameters(), *model.right.parameters()], lr=0.1)
        optimizer = dp.distribute(optimizer, model, reducer=way)
        for step in range(8):
            model.left.requires_grad_(step not in (2, 3))
            if step == 5:
                optimizer.add_param_group({"params": list(model.end.parameters()), "lr": 0.01})
            one_step(model, optimizer, step)
        return model

    both_ways(train)


@case
def gradients_that_are_zeroed_in_place_while_a_bias_is_frozen():
    def train(way):
        model, optimizer = new(way)
        for step in range(6):
            model.left.bias.requires_grad_(step not in (2, 3))  # whose bucket has its weight too
            optimizer.zero_grad(set_to_none=False)
            model(data(step)).square().sum().backward()
            optimizer.step()
        return model

    both_ways(train)


@case
def nested_passes_that_cannot_be_counted_are_refused():
    model, optimizer = new("auto", accumulation_steps=2)
    optimizer.zero_grad()
    hidden = checkpoint(model.left, data(0).requires_grad_(), use_reentrant=True)
    try:
        checkpoint(model.end, hidden, use_reentrant=True).sum().backward()
    except UsageError as error:
        assert "use_reentrant=False" in str(error)
    else:
        raise AssertionError(f"{optimizer._passes} passes were counted where one was made")


@case
def accumulation_sends_in_the_last_pass_alone():
    def train(way):
        model, optimizer = new(way, accumulation_steps=3, clip_norm=0.5)
        for number in range(9):
            optimizer.zero_grad()
            seen = []
            hidden = torch.tanh(model.left(data(number)))
            if way == "auto" and number > 2:
                look_when_reached(hidden, optimizer, seen)
            if number % 3 != 2:  # what only earlier passes reach
                hidden = hidden + model.right(data(number))
            model.end(hidden).square().sum().backward()
            assert all(any(each) == (number % 3 == 2) for each in seen)
            optimizer.step()
        for number in range(2):
            one_step(model, optimizer, number)
        optimizer.flush()
        return model

    both_ways(train)


@case
def a_parameter_that_is_used_twice():
    def train(way):
        model, optimizer = new(way)
        for step in range(4):
            optimizer.zero_grad()
            model.end(model.end(model.left(data(step)))).square().sum().backward()
            optimizer.step()
        return model

    before = len(ROUNDS)
    both_ways(train)
    assert len(ROUNDS) - before == 4


@case
def checkpointing_of_both_kinds_and_a_layer_that_two_parts_share():
    def train(way, re_entrant, on_all=True, **options):
        model, optimizer = new(way, **options)
        for step in range(4 * optimizer.passes_per_step):
            optimizer.zero_grad()
            hidden = torch.tanh(model.left(data(step).requires_grad_()))
            if on_all or WORLD.rank == 0:
                for _ in range(2):  # re-entrant, its gradients get ready twice
                    hidden = checkpoint(model.more, hidden, use_reentrant=re_entrant)
            model.end(hidden).square().sum().backward()
            optimizer.step()
        return model

    for options in ({}, {"accumulation_steps": 2}):
        for re_entrant in (True, False):
            for on_all in (True, False):
                both_ways(functools.partial(train, re_entrant=re_entrant, on_all=on_all, **options))


@case
def what_is_checkpointed_re_entrantly_travels_early_too():
    def train(way):
        model, optimizer = new(way)
        for step in range(3):
            optimizer.zero_grad()
            seen = []
            hidden = torch.tanh(model.left(data(step)))
            if way == "auto" and step:
                look_when_reached(hidden, optimizer, seen)
            model.end(checkpoint(model.more, hidden, use_reentrant=True)).square().sum().backward()
            for each in seen:
                assert each[number_of(model.more.weight, optimizer)] and not all(each)
            optimizer.step()
        return model

    before = len(ROUNDS)
    both_ways(train)
    assert len(ROUNDS) - before == 3


@case
def a_gradient_that_is_changed_after_its_bucket_was_sent():
    """On one rank alone, by a hook of the user's; all ranks send all of their buckets once more."""

    def double(p):
        p.grad = p.grad * 2

    def halve(p):
        p.grad /= 2

    def train(way, change, to_none):
        model, optimizer = new(way)
        if WORLD.rank == 0:
            model.end.weight.register_post_accumulate_grad_hook(change)
        for step in range(4):
            optimizer.zero_grad(set_to_none=to_none)
            model(data(step)).square().sum().backward()
            optimizer.step()
        return model

    for change in (double, halve):
        for to_none in (True, False):
            before = len(ROUNDS)
            both_ways(functools.partial(train, change=change, to_none=to_none))
            assert len(ROUNDS) - before == 1 + 2 * 3  # the first step has no buckets yet that could go early


@case
def a_backward_pass_that_fails_when_some_buckets_are_under_way():
    def train(way):
        model, optimizer = new(way)
        for step in range(3):
            model.right.requires_grad_(step != 1)
            one_step(model, optimizer, step)
            one_step(model, optimizer, step)
            hidden = torch.tanh(model.left(data(step)))
            loss = model.end(hidden).sum()
            (hidden if WORLD.rank == 0 else loss).register_hook(fail)  # on the others before any gradient is there
            optimizer.zero_grad()
            try:
                loss.backward()
                raise AssertionError("the hook must fail")
            except MemoryError:
                assert way == "mpi" or any(sent(optimizer)) == (WORLD.rank == 0)
        one_step(model, optimizer, 9)
        return model

    both_ways(train)


def fail(_):
    raise MemoryError


@case
def several_optimizers_under_one_backward_pass():
    def train(way):
        model = Net()
        halves = [model.left, model.right], [model.end, model.more]
        optimizers = [
            dp.distribute(torch.optim.SGD([p for m in half for p in m.parameters()], lr=0.1), model, reducer=way)
            for half in halves
        ]
        for step in range(4):
            for optimizer in optimizers:
                optimizer.zero_grad()
            model(data(step)).square().sum().backward()
            for optimizer in optimizers:
                optimizer.step()
        return model

    both_ways(train)


@case
def passes_that_add_to_averaged_gradients():
    """Twice through one graph, gradients that are zeroed where they are, and a graph of the gradients themselves."""

    def train(way, to_none, create_graph):
        model, optimizer = new(way)
        for step in range(4):
            optimizer.zero_grad(set_to_none=to_none)
            loss = model(data(step)).square().sum()
            loss.backward(retain_graph=True)
            loss.backward(create_graph=create_graph)
            optimizer.step()
        return model

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of create_graph and memory
        for to_none in (True, False):
            for create_graph in (True, False):
                both_ways(functools.partial(train, to_none=to_none, create_graph=create_graph))


@case
def a_gradient_that_is_not_finite_leaves_the_step_out_and_is_named():
    def train(way):
        model, optimizer = new(way)
        for step in range(5):
            dp.exchange_flag(WORLD.rank == 1 and step == 3)
            optimizer.zero_grad()
            x = data(step)
            if step == 2 and WORLD.rank == 0:
                x[0, 1] = float("nan")
            before = model.end.weight.detach().clone()
            model(x).square().sum().backward()
            averager = optimizer._averager
            expected = None if step != 2 else 0 if WORLD.rank == 0 else -1
            assert averager.broken == expected, (way, step, averager.broken)
            optimizer.step()
            assert torch.equal(before, model.end.weight) == (step == 2)
            heard, broken = dp.exchange_flag(False)
            assert heard == (step == 3)
            assert broken == (None if step != 2 else "left.weight" if WORLD.rank == 0 else "")
        dp.exchange_flag(None)
        return model

    both_ways(train)


@case
def finite_numbers_whose_sum_is_not_are_finite():
    huge = torch.finfo(torch.float32).max
    plain = [torch.full((9,), huge), torch.tensor([float("-inf"), 1]), torch.empty(0)]
    mixed = [
        torch.full((2,), 1e300, dtype=torch.float64),
        torch.tensor([1, float("nan")]).half(),
        torch.ones(2, 2).to_sparse(),
    ]
    for tensors in (plain, mixed):
        assert _torch_buffer.finite([each.to(DEVICE) for each in tensors]).tolist() == [True, False, True]


@case
def gradients_of_another_stream_wait_for_the_end():
    """It is played that those of one layer do, as a CPU has no streams."""
    real, now = _torch_buckets._stream, [0]

    def train(way):
        model, optimizer = new(way)
        weight = model.end.weight
        weight.register_hook(lambda _: now.__setitem__(0, 7))
        weight.register_post_accumulate_grad_hook(lambda _: now.__setitem__(0, 0))  # called after ours
        for step in range(3):
            optimizer.zero_grad()
            seen = []
            hidden = torch.tanh(model.left(data(step)))
            if way == "auto" and step:
                look_when_reached(hidden, optimizer, seen)
            model.end(model.more(hidden)).square().sum().backward()
            for each in seen:
                assert any(each) and not each[number_of(weight, optimizer)]
            optimizer.step()
        return model

    _torch_buckets._stream = lambda device: now[0]
    try:
        both_ways(train)
    finally:
        _torch_buckets._stream = real


@case
def types_of_their_own():
    def train(way):
        torch.manual_seed(0)
        kinds = torch.float32, torch.float64, torch.bfloat16, torch.float16
        model = torch.nn.ModuleList([torch.nn.Linear(4, 4, dtype=kind) for kind in kinds]).to(DEVICE)
        optimizer = dp.distribute(torch.optim.SGD(model.parameters(), lr=0.1), model, reducer=way)
        for step in range(3):
            optimizer.zero_grad()
            sum(layer(data(step)[:, :4].to(layer.weight.dtype)).double().sum() for layer in model).backward()
            if way == "auto":
                assert all(p.grad.dtype == p.dtype for p in model.parameters())
            optimizer.step()
        return model

    if WORLD.size == 2:  # float16 travels as it is in Horovod, as float32 in MPI
        exact, found = (dict(train(way).named_parameters()) for way in ("mpi", "auto"))
        for name, p in exact.items():
            assert torch.allclose(p.double(), found[name].double(), atol=1e-2 if p.dtype.itemsize == 2 else 0), name


if __name__ == "__main__":
    run_cases(dp, WORLD, sys.argv[1:])
