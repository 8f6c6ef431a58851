"""Train a small convolutional network on handwritten digits with PyTorch.

    horovodrun -np 2 python recipes/cnn_torch.py
    mpirun -np 2 --hostfile hostfiles/localhost python recipes/cnn_torch.py
    python recipes/cnn_torch.py

Lines marked `# distributed` are what data-parallel training adds to the script for one process.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.nn.functional import cross_entropy, max_pool2d, relu

import toolkit.adapters.torch as dp  # distributed
from toolkit import datasets, initial_weights
from toolkit.elastic import elastic
from toolkit.folds import each_fold
from toolkit.options import RunOptions, option, parse
from toolkit.run import Run
from toolkit.sharding import block


@dataclass(frozen=True)
class Options(RunOptions):
    momentum: float = option(0.9, "of SGD", minimum=0)
    dropout: float = option(0.0, "share of the hidden units left out", minimum=0, below=1)
    shift: int = option(0, "augmentation: pixels that a training image is moved by at most", minimum=0, maximum=8)
    data_dir: Path | None = option(
        None, "directory of MNIST's IDX files, plain or .gz, or of train_x.npy … (default: digits of scikit-learn)"
    )


class CNN(torch.nn.Module):
    def __init__(self, dropout):
        super().__init__()
        self.conv1 = torch.nn.Conv2d(1, 10, 5)
        self.conv2 = torch.nn.Conv2d(10, 20, 5)
        self.fc1 = torch.nn.Linear(320, 50)
        self.dropout = torch.nn.Dropout(dropout)
        self.fc2 = torch.nn.Linear(50, 10)

    def forward(self, x):
        x = max_pool2d(relu(self.conv1(x)), 2)
        x = max_pool2d(relu(self.conv2(x)), 2)
        return self.fc2(self.dropout(relu(self.fc1(x.flatten(1)))))


def inputs(images):
    return images[:, np.newaxis]


@torch.no_grad()
def evaluate(model, data, world):
    mine = block(len(data), world.rank, world.size)  # distributed: this rank's part of the test data
    x, y = dp.on_device(inputs(data.x[mine]), data.y[mine])
    accuracy = (model(x).argmax(1) == y).float().mean().item() if len(y) else 0.0
    return dp.average({"test_accuracy": accuracy}, weight=len(y))  # distributed: mean over all samples


@elastic(dp)  # distributed: workers may die and come, under horovodrun --host-discovery-script
def fit(world, options, train, test):
    model = CNN(options.dropout).to(world.device)
    weights = initial_weights.cnn(options.seed)
    model.load_state_dict({name: torch.from_numpy(array) for name, array in weights.items()})
    optimizer = torch.optim.SGD(model.parameters(), lr=options.learning_rate, momentum=options.momentum)
    optimizer = dp.distribute(optimizer, model, **options.distribute)  # distributed

    def augmented(batch):
        return inputs(datasets.shifted(batch.x, batch.generators(), options.shift))

    with Run(options, world, dp, model, optimizer, len(train)) as run:  # distributed: resume, broadcast
        for _ in run.epochs():
            model.train()
            for batch in run.tensors(train, augmented):  # distributed: this rank's part of each global batch
                for group in optimizer.param_groups:
                    group["lr"] = run.learning_rate()  # distributed: scaled with the batch, warmed up
                optimizer.zero_grad()
                loss = cross_entropy(model(batch.x), batch.y) * batch.weight  # distributed: exact for unequal parts
                loss.backward()
                optimizer.step()
                run.log(loss=loss)
            model.eval()
            run.end_epoch(**evaluate(model, test, world))


def main():
    options = parse(Options, __doc__)
    world = dp.start(**options.start)  # distributed
    train, test = datasets.digits(options.data_dir)
    for fold in each_fold(options, world, dp, train, test):  # once, without --folds
        fit(world, *fold)
    dp.stop()  # distributed


if __name__ == "__main__":
    main()
