"""What reducer_cases.py needs of torch, and the cases that only torch has."""

import os
from unittest import mock

import horovod.torch as hvd
import numpy as np
import torch

import toolkit.adapters.torch as dp
from toolkit import tuning
from toolkit.adapters import _job, _reduction


class Trial:
    """Weights under SGD of rate 1: those that begin as zeros are minus the mean gradient after a step, to the bit."""

    def __init__(self, shapes, dtypes=None, options=None, begin=0.0, **distribute):
        self.model = torch.nn.ParameterList(
            torch.full(shape, begin, dtype=getattr(torch, dtype))
            for shape, dtype in zip(shapes, dtypes or ["float32"] * len(shapes), strict=True)
        )
        optimizer = torch.optim.SGD(self.model.parameters(), **{"lr": 1.0, **(options or {})})
        self.optimizer = dp.distribute(optimizer, self.model, **distribute)

    def step(self, gradients):
        """One pass with this rank's gradients: arrays, or None."""
        self.optimizer.zero_grad()
        pairs = [(p, g) for p, g in zip(self.model, gradients, strict=True) if g is not None and p.requires_grad]
        if pairs:
            sum((p * torch.tensor(g).to(p.dtype)).sum().double() for p, g in pairs).backward()
        self.optimizer.step()

    def values(self):
        return [p.detach().double().numpy().copy() for p in self.model]

    def name(self, i):
        return str(i)

    def averager(self):
        return self.optimizer._averager


def own_cases(case, world, given, by_numpy, same_everywhere):
    """Make the cases that only torch has.

    Args:
        case: the decorator.
        world: this worker's.
        given: from a step and shapes to this rank's gradients.
        by_numpy: from the same to the mean over all ranks.
        same_everywhere: whether all ranks hold these arrays.
    """
    shapes = [(7, 5), (5,)]

    def flush():
        """Two of five passes, applied as their mean."""
        trial = Trial(shapes, accumulation_steps=5, reducer="mpi")
        for step in range(2):
            trial.step(given(step, shapes))
        assert all((value == 0).all() for value in trial.values()), "two passes of five are no step"
        trial.optimizer.flush()
        expected = [-(a + b) / 2 for a, b in zip(by_numpy(0, shapes), by_numpy(1, shapes), strict=True)]
        for value, mean in zip(trial.values(), expected, strict=True):
            np.testing.assert_allclose(value, mean, rtol=1e-5, atol=1e-6)

    def channels_last():
        """Its weights keep their order in memory, and so do the means."""
        torch.manual_seed(0)
        model = torch.nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
        optimizer = dp.distribute(torch.optim.SGD(model.parameters(), lr=1.0), model, reducer="mpi")
        before = model.weight.detach().clone()
        (gradient,) = given(0, [(4, 3, 3, 3)])
        for layout in (torch.channels_last, torch.contiguous_format):
            model.weight.grad = torch.tensor(gradient).contiguous(memory_format=layout)
            optimizer.step()
            assert model.weight.grad.stride() == model.weight.stride()
            optimizer.zero_grad()
        assert model.weight.is_contiguous(memory_format=torch.channels_last)
        expected = before.numpy() - 2 * by_numpy(0, [(4, 3, 3, 3)])[0]
        np.testing.assert_allclose(model.weight.detach().numpy(), expected, rtol=1e-4, atol=1e-5)

    def sparse_embeddings():
        """Rows of an embedding travel by themselves, the dense weights beside them by the reducer."""
        found = {}
        for reducer in ("mpi", "horovod"):
            torch.manual_seed(0)
            model = torch.nn.ModuleList([torch.nn.Embedding(9, 3, sparse=True), torch.nn.Linear(3, 1)])
            optimizer = dp.distribute(torch.optim.SGD(model.parameters(), lr=1.0), model, reducer=reducer)
            before = model[0].weight.detach().clone()
            for _ in range(2):
                optimizer.zero_grad()
                model[1](model[0](torch.tensor([world.rank, world.rank, 8]))).sum().backward()
                if reducer == "mpi":
                    assert model[0].weight.grad.is_sparse and not model[1].weight.grad.is_sparse
                optimizer.step()
            moved = (model[0].weight.detach() != before).any(1).tolist()
            assert moved == [row < world.size or row == 8 for row in range(9)], moved
            found[reducer] = [p.detach().numpy() for p in model.parameters()]
            assert same_everywhere(found[reducer])
        if world.size == 2:  # of two numbers there is one sum
            assert all(np.array_equal(a, b) for a, b in zip(*found.values(), strict=True))

    slow = tuning.SLOW_CYCLE if world.groups == 1 else tuning.CYCLE_TIME

    def cycle_after(*reducers, sparse=False):
        """Who adds up for optimizers that are distributed one after the other, and Horovod's cycle in the end."""
        if world.groups == 1:
            _job._cycles.update(fast=tuning.CYCLE_TIME, slow=tuning.SLOW_CYCLE)  # as after start()
        chosen = []
        for reducer in reducers:
            model = torch.nn.Sequential(torch.nn.Embedding(9, 3, sparse=sparse), torch.nn.Linear(3, 1))
            optimizer = dp.distribute(torch.optim.SGD(model.parameters(), lr=0.1), model, reducer=reducer)
            model(torch.tensor([world.rank])).sum().backward()
            chosen.append(optimizer._averager.reducer)
        return chosen, os.environ["HOROVOD_CYCLE_TIME"]

    def quick():
        """Horovod keeps its quick cycle as soon as a step waits for it, whoever else adds up by MPI."""
        assert cycle_after("mpi") == (["mpi"], slow)
        assert cycle_after("mpi", "horovod") == (["mpi", "horovod"], tuning.CYCLE_TIME)
        assert cycle_after("horovod", "mpi") == (["horovod", "mpi"], tuning.CYCLE_TIME)
        assert cycle_after("mpi") == (["mpi"], slow)
        assert cycle_after("auto", sparse=True) == (["horovod"], tuning.CYCLE_TIME), "whose rows Horovod gathers"
        assert cycle_after("mpi") == (["mpi"], slow)
        assert cycle_after("mpi", sparse=True) == (["mpi"], tuning.CYCLE_TIME)

    def stays():
        """Whoever was the faster one at first adds up after the parameters have become others, too."""
        for quicker, horovods in (("mpi", 1.0), ("horovod", 0.0)):
            trial = Trial(shapes)
            for seconds in (horovods, 1.0 - horovods):
                with mock.patch.object(_reduction, "_seconds", side_effect=[seconds, 0.5]):
                    trial.step(given(0, shapes))
                assert trial.averager().reducer == quicker
                trial.model[1].requires_grad_(False)
                trial.model[1].grad = None

    def own_sets():
        """Horovod is not started again where that would lose the script's process sets, or begin its timeline anew."""
        if world.groups > 1:
            return  # which are process sets, so that nothing is ever started again
        wanted = {"HOROVOD_DYNAMIC_PROCESS_SETS": "1", "HOROVOD_CYCLE_TIME": tuning.CYCLE_TIME}
        with mock.patch.dict(os.environ, wanted):
            hvd.shutdown()
            hvd.init()
            own = hvd.add_process_set(range(world.size - 1, world.size))
            assert cycle_after("mpi", "horovod", "mpi") == (["mpi", "horovod", "mpi"], tuning.CYCLE_TIME)
            if own.included():
                assert hvd.allreduce(torch.ones(1), process_set=own).item() == 1
            hvd.remove_process_set(own)
            with mock.patch.dict(os.environ, HOROVOD_TIMELINE="DYNAMIC"):
                assert cycle_after("mpi") == (["mpi"], tuning.CYCLE_TIME)
            assert cycle_after("mpi") == (["mpi"], slow)
        hvd.shutdown()
        hvd.init()

    def closures():
        """The mean of a closure's loss, by which LBFGS decides, comes by MPI too: Horovod is slow then."""
        weight = torch.nn.Parameter(torch.zeros(3))
        model = torch.nn.ParameterList([weight])
        optimizer = dp.distribute(torch.optim.LBFGS([weight], max_iter=4), model, reducer="mpi")
        losses = []

        def closure():
            optimizer.zero_grad()
            loss = (weight - world.rank).square().sum()
            loss.backward()
            losses.append(loss.item())
            return loss

        with mock.patch.object(hvd, "allreduce", side_effect=AssertionError("by Horovod")):
            first = optimizer.step(closure)
        assert first.dtype == torch.float32 and first.item() == np.mean(dp.gather(losses[0]))
        np.testing.assert_allclose(weight.detach().numpy(), (world.size - 1) / 2, rtol=1e-5)

    ways = {
        "itself": lambda p: p.grad,
        "detached": lambda p: p.grad.detach(),
        "as an array": lambda p: p.grad.numpy(),
        "a slice": lambda p: p.grad[1:],
        "a slice of the array": lambda p: p.grad.numpy()[1:],
        "seen otherwise": lambda p: p.grad.view(-1),
    }

    def kept():
        """What a user keeps of the gradients after zero_grad() is the user's, as in one process."""
        for reducer in ("mpi", "horovod"):
            for what, keep in ways.items():
                trial = Trial(shapes, reducer=reducer)
                trial.step(given(0, shapes))
                mine = keep(trial.model[0])
                before = np.array(mine)
                assert before.any()
                for step in (1, 2):
                    trial.step(given(step, shapes))
                assert np.array_equal(before, np.array(mine)), f"{reducer}: a gradient kept {what} changed"
                assert not np.array_equal(np.array(keep(trial.model[0])), before)

    def reused():
        """Where nobody keeps them the next means are in the same memory, also after somebody let go of them."""
        for reducer in ("mpi", "horovod"):
            for to_none in (True, False):
                trial, places = Trial(shapes, reducer=reducer), set()
                for step in range(4):
                    trial.step(given(step, shapes))
                    places.add(trial.model[0].grad.data_ptr())
                    trial.optimizer.zero_grad(set_to_none=to_none)
                assert len(places) == 1, f"{reducer}: {len(places)} places"
                trial.step(given(0, shapes))
                mine = trial.model[0].grad
                trial.step(given(1, shapes))
                assert trial.model[0].grad.data_ptr() not in places
                del mine
                place = trial.model[0].grad.data_ptr()
                trial.step(given(2, shapes))
                assert trial.model[0].grad.data_ptr() == place

    case(flush, "flush_applies_the_passes_that_there_are")
    case(channels_last, "channels_last_weights_keep_their_layout")
    case(sparse_embeddings, "sparse_embeddings_beside_dense_weights")
    case(quick, "horovod_stays_quick_where_a_step_waits_for_it")
    case(stays, "the_choice_outlives_a_change_of_parameters")
    case(own_sets, "horovod_is_not_started_again_under_process_sets")
    case(closures, "a_closures_loss_comes_by_mpi")
    case(kept, "gradients_that_a_user_keeps_do_not_change")
    case(reused, "gradients_that_nobody_keeps_share_their_memory")
