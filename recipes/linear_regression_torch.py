"""Fit a linear regression to the diabetes data with PyTorch, to the least-squares solution.

    horovodrun -np 2 python recipes/linear_regression_torch.py
    mpirun -np 2 --hostfile hostfiles/localhost python recipes/linear_regression_torch.py
    python recipes/linear_regression_torch.py

Lines marked `# distributed` are what data-parallel training adds to the script for one process.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch.nn.functional import dropout

import toolkit.adapters.torch as dp  # distributed
from toolkit import datasets, initial_weights
from toolkit.elastic import elastic
from toolkit.folds import each_fold
from toolkit.options import RunOptions, option, parse
from toolkit.run import Run


@dataclass(frozen=True)
class Options(RunOptions):
    epochs: int = option(250, "times that each sample is used", minimum=1)
    global_batch_size: int = option(442, "samples per step over all workers; 442 is all of them", minimum=1)
    learning_rate: float = option(0.4, "for the global batch size, or for one worker's --batch-size", above=0)
    checkpoint_every: int = option(50, "epochs between checkpoints; the last epoch has one always", minimum=1)
    print_every: int = option(50, "epochs between printed lines", minimum=1)
    momentum: float = option(0.9, "of SGD", minimum=0)
    dropout: float = option(0.0, "share of the features left out", minimum=0, below=1)
    noise: float = option(0.0, "augmentation: standard deviation of noise added to the features", minimum=0)


def half_squared_error(predicted, y):
    return 0.5 * (predicted - y).square().mean()


def metrics(weight, bias, train, test):
    """Distance to numpy's least-squares weights, relative to the largest; with --folds, the held-out error."""
    exact = np.append(*datasets.least_squares(train.x, train.y))
    distance = np.abs(np.append(weight, bias) - exact).max() / np.abs(exact).max()
    errors = test.x @ weight.reshape(-1, 1) + bias - test.y
    held_out = {"held_out_squared_error": float(np.mean(errors**2))} if len(test) else {}
    return {"distance_to_least_squares": float(distance), **held_out}


@elastic(dp)  # distributed: workers may die and come, under horovodrun --host-discovery-script
def fit(world, options, train, test):
    model = torch.nn.Linear(train.x.shape[1], 1).to(world.device)
    weights = initial_weights.linear(train.x.shape[1], options.seed)
    model.load_state_dict({name: torch.from_numpy(array) for name, array in weights.items()})
    optimizer = torch.optim.SGD(model.parameters(), lr=options.learning_rate, momentum=options.momentum)
    optimizer = dp.distribute(optimizer, model, **options.distribute)  # distributed

    def augmented(batch):
        return datasets.with_noise(batch.x, batch.generators(), options.noise)

    with Run(options, world, dp, model, optimizer, len(train)) as run:  # distributed: resume, broadcast
        for _ in run.epochs():
            for batch in run.tensors(train, augmented):  # distributed: this rank's part of each global batch
                for group in optimizer.param_groups:
                    group["lr"] = run.learning_rate()  # distributed: scaled with the batch, warmed up
                x = dropout(batch.x, options.dropout)
                optimizer.zero_grad()
                loss = half_squared_error(model(x), batch.y) * batch.weight  # distributed: exact for unequal parts
                loss.backward()
                optimizer.step()
                run.log(loss=loss)
            weight, bias = model.weight.detach().cpu().numpy(), model.bias.detach().cpu().numpy()
            run.end_epoch(**metrics(weight, bias, train, test))


def main():
    options = parse(Options, __doc__)
    world = dp.start(**options.start)  # distributed
    train = datasets.diabetes()
    for fold in each_fold(options, world, dp, train, train.take([])):  # once, without --folds
        fit(world, *fold)
    dp.stop()  # distributed


if __name__ == "__main__":
    main()
