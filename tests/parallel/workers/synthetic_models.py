"""synthetic_models.py torch|tensorflow OUT: the recipe's small models with given weights, and what they compute.

OUT.npz gets for each model its outputs for the first worker's batch, in training, and as `parameters/<model>/<size>`
the number of its parameters, of those sizes that are given after OUT.
"""

import os
import re
import runpy
import sys
from pathlib import Path

import numpy as np

from toolkit.synthetic import SHAPES, SyntheticOptions, workload
from toolkit.world import World

framework, out, *sizes = sys.argv[1:]
recipe = runpy.run_path(str(Path(__file__).parents[3] / "recipes" / f"synthetic_{framework}.py"))


def drawn(kind, number, *shapes):
    """The weights of the number-th layer of a kind, in Keras' layout."""
    generator = np.random.default_rng([*kind.encode(), number])
    return [generator.normal(0.5 if len(shape) == 1 else 0, 0.1, shape).astype(np.float32) for shape in shapes]


def fill_torch(model):
    import torch

    counts = {}
    for module in model.modules():
        kind = type(module).__name__
        number = counts[kind] = counts.get(kind, -1) + 1
        own = [parameter for _, parameter in module.named_parameters(recurse=False)]
        if kind == "MultiheadAttention":
            width = module.embed_dim
            cut = (module.num_heads, module.head_dim)
            weights = drawn(kind, number, *[(width, *cut), cut] * 3, (*cut, width), (width,))
            packed = np.concatenate([kernel.reshape(width, width).T for kernel in weights[0:6:2]])
            given = [(module.in_proj_weight, packed), (module.in_proj_bias, np.concatenate(weights[1:6:2]).ravel())]
            given += [(module.out_proj.weight, weights[6].reshape(width, width).T), (module.out_proj.bias, weights[7])]
        elif kind == "NonDynamicallyQuantizableLinear":  # attention's, which has its weights above
            continue
        else:
            order = {"Conv2d": (2, 3, 1, 0), "Linear": (1, 0)}.get(kind)  # torch's axes in Keras' layout
            turned = [order if order and p.dim() > 1 else tuple(range(p.dim())) for p in own]
            shapes = [tuple(p.shape[axis] for axis in axes) for p, axes in zip(own, turned, strict=True)]
            weights = zip(drawn(kind, number, *shapes), turned, strict=True) if own else ()
            given = zip(own, [weight.transpose(np.argsort(axes)) for weight, axes in weights], strict=True)
        for parameter, weight in given:
            parameter.data.copy_(torch.from_numpy(np.ascontiguousarray(weight)))


KINDS = {
    "conv2d": "Conv2d",
    "batch_normalization": "BatchNorm2d",
    "dense": "Linear",
    "layer_normalization": "LayerNorm",
    "multi_head_attention": "MultiheadAttention",
    "reversible_embedding": "Embedding",
    "embedding": "Embedding",
}


def fill_keras(model):
    for layer in model.layers:
        kind, number = re.fullmatch(r"(\w+?)_?(\d*)", layer.name).groups()
        if layer.trainable_variables:
            number = 1 if kind == "embedding" else int(number or 0)  # the positions, after the tokens
            own = layer.trainable_variables
            for variable, weight in zip(own, drawn(KINDS[kind], number, *(v.shape for v in own)), strict=True):
                variable.assign(weight)


def outputs(model, work):
    if framework == "torch":
        import torch

        fill_torch(model)
        x = torch.from_numpy(work.x)
        return model(x.movedim(-1, 1) if x.dim() == 4 else x).detach().numpy()
    import keras

    fill_keras(model)
    return keras.ops.convert_to_numpy(model(work.x, training=True))


def parameters(name, size):
    if framework == "torch":
        import torch

        with torch.device("meta"):
            return sum(p.numel() for p in recipe["build_model"](name, SHAPES[name][size]).parameters())
    return sum(np.prod(v.shape) for v in recipe["build_model"](name, SHAPES[name][size]).trainable_variables)


found = {}
for name in SHAPES:
    if framework != "torch":
        import keras

        keras.utils.clear_session(free_memory=False)  # layers are counted from 0 again
    work = workload(SyntheticOptions(model=name, size="small", batch_size=4), World())
    found[name] = outputs(recipe["build_model"](name, work.shape), work)
    found |= {f"parameters/{name}/{size}": parameters(name, size) for size in sizes}
np.savez(out, **found)
os._exit(0)  # no job was started
