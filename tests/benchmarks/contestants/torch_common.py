"""What every torch contestant trains: the same model from the same weights on the same batches."""

import torch
from torch import nn
from torch.nn.functional import cross_entropy, max_pool2d, mse_loss, relu

from tests.benchmarks import models, turns


class CNN(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 10, 5)
        self.conv2 = nn.Conv2d(10, 20, 5)
        self.dense1 = nn.Linear(320, 50)
        self.dense2 = nn.Linear(50, 10)

    def forward(self, x):
        x = max_pool2d(relu(self.conv1(x)), 2)
        x = max_pool2d(relu(self.conv2(x)), 2)
        return self.dense2(relu(self.dense1(x.flatten(1))))


class MLP(nn.Module):
    def __init__(self, layers):
        super().__init__()
        for name, (outputs, inputs) in layers.items():
            self.add_module(name, nn.Linear(inputs, outputs))

    def forward(self, x):
        *hidden, last = self.children()
        for layer in hidden:
            x = relu(layer(x))
        return last(x)


class ResNet(nn.Module):
    def __init__(self, layers):
        super().__init__()
        before = {}  # the channels of each stage's input, for strides
        for name, shape in layers.items():
            stage = name.split("_")[0]
            if len(shape) == 4:
                before.setdefault(stage, shape[1])
                first = name.endswith(("block0_conv1", "skip")) and before[stage] != shape[0]
                conv = nn.Conv2d(shape[1], shape[0], shape[2], stride=2 if first else 1, padding=shape[2] // 2)
                self.add_module(name, conv)
            elif len(shape) == 1:
                self.add_module(name, nn.BatchNorm2d(shape[0], eps=models.EPSILON))
            else:
                self.add_module(name, nn.Linear(shape[1], shape[0]))

    def forward(self, x):
        layers = dict(self.named_children())
        x = relu(layers["stem_norm"](layers["stem"](x)))
        for block in [name.removesuffix("_conv1") for name in layers if name.endswith("_conv1")]:
            y = relu(layers[f"{block}_norm1"](layers[f"{block}_conv1"](x)))
            y = layers[f"{block}_norm2"](layers[f"{block}_conv2"](y))
            if f"{block}_skip" in layers:
                x = layers[f"{block}_norm3"](layers[f"{block}_skip"](x))
            x = relu(x + y)
        return layers["top"](x.mean((2, 3)))


def build():
    """The model, with its initial weights."""
    wanted = turns.model()
    model = CNN() if wanted.title == "CNN" else (ResNet if "stem" in wanted.layers else MLP)(wanted.layers)
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for layer, kind, array in models.weights(wanted):
            parameters[f"{layer}.{kind}"].copy_(torch.from_numpy(array))
    return model


def optimizer(model):
    return torch.optim.SGD(model.parameters(), lr=models.RATE)


def loss_of(outputs, y):
    return mse_loss(outputs, y) if y.is_floating_point() else cross_entropy(outputs, y)


def batches(rank):
    return [(torch.from_numpy(x), torch.from_numpy(y)) for x, y in models.batches(turns.model(), rank)]


def begin(rank, model):
    """Meet the benchmark's controller, once the model is ready to train."""
    return turns.Turns(
        rank, torch.get_num_threads(), lambda: ((name, p.detach().numpy()) for name, p in model.named_parameters())
    )
