"""Measure how many images or tokens a second PyTorch trains on: ResNet-50, or a transformer of GPT-2's kind.

    horovodrun -np 2 python recipes/synthetic_torch.py
    mpirun -np 2 --hostfile hostfiles/localhost python recipes/synthetic_torch.py --model transformer
    python recipes/synthetic_torch.py --precision bf16 --compile

Each worker trains on one batch of random data, over and over. On CPUs the models are small ones, without --size full.
Lines marked `# distributed` are what data-parallel training adds to the script for one process.
"""

import torch
from torch.nn.functional import cross_entropy, linear, relu

import toolkit.adapters.torch as dp  # distributed
from toolkit.options import parse
from toolkit.synthetic import SyntheticOptions, workload
from toolkit.throughput import measure

PRECISIONS = {"float32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def convolution(inputs, filters, size, stride=1):
    layer = torch.nn.Conv2d(inputs, filters, size, stride, padding=size // 2, bias=False)
    return torch.nn.Sequential(layer, torch.nn.BatchNorm2d(filters))


class Bottleneck(torch.nn.Module):
    def __init__(self, inputs, width, stride):
        super().__init__()
        self.reduce = convolution(inputs, width, 1)
        self.middle = convolution(width, width, 3, stride)
        self.expand = convolution(width, 4 * width, 1)
        same = stride == 1 and inputs == 4 * width
        self.shortcut = torch.nn.Identity() if same else convolution(inputs, 4 * width, 1, stride)

    def forward(self, x):
        return relu(self.expand(relu(self.middle(relu(self.reduce(x))))) + self.shortcut(x))


def resnet50(blocks, width, pixels, classes):
    layers = [convolution(3, width, 7, 2), torch.nn.ReLU(), torch.nn.MaxPool2d(3, 2, padding=1)]
    channels = width
    for stage, count in enumerate(blocks):
        for block in range(count):
            layers.append(Bottleneck(channels, width << stage, 2 if stage > 0 and block == 0 else 1))
            channels = 4 * width << stage
    return torch.nn.Sequential(
        *layers, torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(channels, classes)
    )


class Transformer(torch.nn.Module):
    def __init__(self, blocks, width, heads, length, vocabulary):
        super().__init__()
        self.tokens, self.positions = torch.nn.Embedding(vocabulary, width), torch.nn.Embedding(length, width)
        for embedding in (self.tokens, self.positions):
            torch.nn.init.normal_(embedding.weight, std=0.02)
        block, order = torch.nn.TransformerEncoderLayer, {"batch_first": True, "norm_first": True}
        self.blocks = torch.nn.ModuleList(block(width, heads, 4 * width, 0.0, "gelu", **order) for _ in range(blocks))
        self.norm = torch.nn.LayerNorm(width)

    def forward(self, tokens):
        x = self.tokens(tokens) + self.positions.weight
        mask = torch.nn.Transformer.generate_square_subsequent_mask(tokens.shape[1], tokens.device)
        for block in self.blocks:
            x = block(x, mask, is_causal=True)
        return linear(self.norm(x), self.tokens.weight)


def build_model(name, shape):
    return {"resnet50": resnet50, "transformer": Transformer}[name](**shape).to(memory_format=torch.channels_last)


def main():
    options = parse(SyntheticOptions, __doc__)
    world = dp.start(**options.start)  # distributed
    device = torch.device(world.device)
    torch.backends.cudnn.benchmark = not options.deterministic
    work = workload(options, world)
    x, y = dp.on_device(work.x, work.y)
    x = x.movedim(-1, 1) if x.dim() == 4 else x  # the channels stay last in memory, as GPUs like it
    model = build_model(options.model, work.shape).to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=options.learning_rate)
    optimizer = dp.distribute(optimizer, model, **options.distribute)  # distributed
    dp.broadcast_state(model, optimizer)  # distributed
    scaler = torch.amp.GradScaler(device.type, enabled=options.precision == "fp16")
    forward = torch.compile(model) if options.compile else model

    def train_step():
        optimizer.zero_grad()
        with torch.autocast(device.type, PRECISIONS[options.precision], enabled=options.precision != "float32"):
            loss = cross_entropy(forward(x).flatten(0, -2), y.flatten())
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        return loss.detach()

    measure(train_step, model, optimizer, options=options, world=world, adapter=dp, work=work)
    dp.stop()  # distributed


if __name__ == "__main__":
    main()
