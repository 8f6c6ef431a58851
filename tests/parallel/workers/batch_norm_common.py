"""What the workers of synchronised BatchNorm share: samples, their unequal parts, and the closed form in numpy."""

import numpy as np

SAMPLES = 9
GAMMA, BETA, EPSILON = np.array([0.5, -2.0, 1.5]), np.array([0.1, 0.0, -3.0]), 1e-3


def samples(shape, seed=0):
    """Samples with a mean far from 0, and a gradient for what is made of them: (9, 3) is 9 samples of 3 channels."""
    generator = np.random.default_rng(seed)
    return generator.normal(5.0, 3.0, shape), generator.normal(size=shape)


def part(world, empty=False):
    """This rank's samples, of parts as unequal as can be: ranks but the last have one, or where asked for, none."""
    first, last = world.rank, world.rank + 1
    if empty:
        first = last = 0
    return slice(first, SAMPLES if world.rank == world.size - 1 else last)


def closed_form(x, d_y, axis, gamma=GAMMA, beta=BETA, mask=None, epsilon=EPSILON):
    """BatchNorm's outputs, and the gradients of Σ d_y·y: {"y", "x", "gamma", "beta", "mean", "variance"}.

    From Ioffe and Szegedy (2015), section 3, with the sums over the samples that the mask has.
    """
    counts = np.ones(x.shape) if mask is None else np.broadcast_to(mask[..., None], x.shape).astype(float)
    others = tuple(i for i in range(x.ndim) if i != axis % x.ndim)

    def total(values):
        return values.sum(others, keepdims=True)

    shape = total(x).shape
    gamma, beta = np.reshape(gamma, shape), np.reshape(beta, shape)
    n = total(counts)
    mean = total(x * counts) / n
    variance = total((x - mean) ** 2 * counts) / n
    deviation = np.sqrt(variance + epsilon)
    normalised = (x - mean) / deviation
    d_normalised = d_y * gamma
    d_variance = total(d_normalised * (x - mean)) * -0.5 * deviation**-3
    d_mean = -total(d_normalised) / deviation  # what comes by way of the variance is 0
    return {
        "y": normalised * gamma + beta,
        "x": d_normalised / deviation + counts * (d_variance * 2 * (x - mean) + d_mean) / n,
        "gamma": total(d_y * normalised).ravel(),
        "beta": total(d_y).ravel(),
        "mean": mean.ravel(),
        "variance": variance.ravel(),
        "n": n.ravel(),
    }
