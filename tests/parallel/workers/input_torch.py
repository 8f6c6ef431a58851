"""`Loader` of the torch adapter: a map-style dataset with random transforms, in and out of worker processes."""

import random
from dataclasses import replace

import numpy as np
import torch
from input_common import (
    BASE,
    FEATURES,
    NOISE,
    OPTIONS,
    SAMPLES,
    WEIGHTS,
    X,
    Y,
    check_losses,
    check_resume,
    losses,
    losses_in_numpy,
    refused,
)

import toolkit.adapters.torch as dp
from toolkit.random_streams import sample_seeds
from toolkit.run import Run


class Augmented(torch.utils.data.Dataset):
    """Draws from all three global generators, as users' transforms do."""

    def __len__(self):
        return SAMPLES

    def __getitem__(self, index):
        noise = torch.randn(FEATURES) + np.random.normal() + random.gauss(0, 1)
        return torch.from_numpy(X[index]) + NOISE * noise.float(), Y[index]


def augmented(indices, epoch):
    """The same inputs by generators of our own."""
    noise = [
        torch.randn(FEATURES, generator=torch.Generator().manual_seed(seed)).numpy()
        + np.random.RandomState([seed >> 32, seed % 2**32]).normal()
        + random.Random(seed).gauss(0, 1)
        for seed in sample_seeds(OPTIONS.seed, epoch, indices).tolist()
    ]
    return X[indices] + NOISE * np.stack(noise)


def linear():
    model = torch.nn.Linear(FEATURES, 1, bias=False)
    model.weight.data = torch.from_numpy(WEIGHTS.T.copy())
    return model, torch.optim.SGD(model.parameters(), lr=0.1)


def with_dropout():
    torch.manual_seed(1)
    model = torch.nn.Sequential(torch.nn.Linear(FEATURES, 8), torch.nn.Dropout(0.4), torch.nn.Linear(8, 1))
    return model, torch.optim.Adam(model.parameters(), lr=0.1)


def train(world, options, build, **loader_options):
    model, optimizer = build()
    optimizer = dp.distribute(optimizer, model, accumulation_steps=options.accumulation_steps)
    with Run(options, world, dp, model, optimizer, SAMPLES) as run:
        loader = dp.Loader(run, Augmented(), **loader_options)
        for _ in run.epochs():
            assert len(loader) == run.steps_left_in_epoch * options.accumulation_steps
            for (x, y), weight in loader:
                for group in optimizer.param_groups:
                    group["lr"] = run.learning_rate()
                optimizer.zero_grad()
                loss = torch.nn.functional.mse_loss(model(x), y) * weight
                loss.backward()
                optimizer.step()
                run.log(loss=loss)
            run.end_epoch()
    dp.gather(None)  # rank 0 has written it


def mistakes(world):
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(Augmented())

    model, optimizer = linear()
    run = Run(OPTIONS, world, dp, model, optimizer, SAMPLES)
    for option in ("batch_size", "sampler", "batch_sampler", "generator"):
        refused(lambda name=option: dp.Loader(run, Augmented(), **{name: 7}), f"given {option}:", "leave it out")
    for option in ("shuffle", "drop_last", "in_order"):
        refused(lambda name=option: dp.Loader(run, Augmented(), **{name: False}), f"given {option}:", "leave it out")
    refused(lambda: dp.Loader(run, Stream()), "Stream", "map-style")
    refused(lambda: dp.Loader(run, iter(Augmented())), "map-style")
    refused(lambda: dp.Loader(run, torch.utils.data.Subset(Augmented(), range(20))), "20 samples", "22")
    refused(lambda: dp.Loader(run, Augmented(), workers=2), "workers")
    refused(lambda: dp.Loader(run, Augmented(), persistent_workers=True), "num_workers")


def main():
    world = dp.start(seed=5)
    expected = losses_in_numpy(augmented)
    kept = {"num_workers": 2, "persistent_workers": True}
    pipelines = {"here": {}, "workers": {"num_workers": 2}, "kept": kept}
    if world.size == 2:
        pipelines["forkserver"] = {**kept, "num_workers": 1, "multiprocessing_context": "forkserver"}
    for name, options in pipelines.items():
        train(world, replace(OPTIONS, output=BASE / name), linear, **options)
        check_losses(name, losses(BASE / name), expected)

    for name in ("here", "kept"):  # stopped in the second epoch, with two passes a step

        def dropout(options, name=name):
            train(world, replace(options, accumulation_steps=2), with_dropout, **pipelines[name])

        check_resume(f"resume {name}", dropout, dp.gather, steps=12, stop=8)
    places = [BASE / f"resume {name}" / "straight" for name in ("here", "kept")]
    assert losses(places[0]) == losses(places[1]), "reading in this process disturbs dropout's random numbers"
    if world.size == 1:
        mistakes(world)
    if world.rank == 0:
        print("all cases passed")
    dp.stop()


if __name__ == "__main__":
    main()
