"""python -m tests.gpu.overhead: what the toolkit's step costs beside the same step bare, with one worker.

Two copies of a transformer are trained in turn in one process, on a GPU, or without one on the CPU a small one: by
torch alone, and with the toolkit's `distribute` and the look at each step that `Run` has (is a gradient not finite?).
Prints both medians of a step, their ratio, and on a GPU the most memory that each takes beside its weights.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

import toolkit.adapters.torch as dp

SIZES = {  # layers, width, samples, tokens a sample
    "cuda": (12, 1024, 16, 512),
    "cpu": (4, 128, 16, 32),
}


class Training:
    """A transformer with AdamW, on the same data in each step."""

    def __init__(self, device: torch.device, by_toolkit: bool) -> None:
        layers, width, samples, tokens = SIZES[device.type]
        torch.manual_seed(0)
        layer = torch.nn.TransformerEncoderLayer(width, width // 64, 4 * width, dropout=0.0, batch_first=True)
        self.model = torch.nn.TransformerEncoder(layer, layers, enable_nested_tensor=False).to(device)
        self.optimizer: Any = torch.optim.AdamW(self.model.parameters(), lr=1e-4)
        self.x = torch.randn(samples, tokens, width, device=device)
        self.by_toolkit = by_toolkit
        if by_toolkit:
            self.optimizer = dp.distribute(self.optimizer, self.model)

    def step(self) -> None:
        """One step, as a script has it."""
        if self.by_toolkit:
            dp.exchange_flag(False)  # as `Run` does
        self.optimizer.zero_grad()
        with torch.autocast(self.x.device.type, torch.bfloat16, enabled=self.x.is_cuda):
            loss = self.model(self.x).square().mean()
        loss.backward()
        self.optimizer.step()


def seconds(work: Callable[[], None], device: torch.device) -> float:
    """How long it takes until it is done on the device too."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    wait()
    began = time.perf_counter()
    work()
    wait()
    return time.perf_counter() - began


def peak(training: Training, steps: int) -> int:
    """The most bytes of a GPU that some steps take beside what was taken before."""
    training.optimizer.zero_grad()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    for _ in range(steps):
        training.step()
    torch.cuda.synchronize()
    found = torch.cuda.max_memory_allocated() - before
    training.optimizer.zero_grad()
    return found


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "gpu"))
    parser.add_argument("--rounds", type=int, default=60, help="measurements of each (default: 60)")
    parser.add_argument("--steps", type=int, default=5, help="steps in each (default: 5)")
    options = parser.parse_args()
    world = dp.start(device=options.device)
    device = torch.device(world.device)
    trainings = {"bare": Training(device, False), "toolkit": Training(device, True)}
    took: dict[str, list[float]] = {name: [] for name in trainings}
    for number in range(options.rounds + 1):
        # In turn, and the first in turn too, so that neither has the better times of the machine.
        for name in sorted(trainings, reverse=number % 2 == 1):
            training = trainings[name]
            found = seconds(lambda each=training: [each.step() for _ in range(options.steps)], device)  # type: ignore
            if number:  # the first time is for memory and libraries
                took[name].append(found / options.steps)
    bare, ours = (statistics.median(took[name]) for name in ("bare", "toolkit"))
    print(f"{device}: bare {1000 * bare:.3f} ms a step, toolkit {1000 * ours:.3f} ms, ratio {ours / bare:.4f}")
    if device.type == "cuda":
        bytes_bare, bytes_ours = (peak(trainings[name], 3) for name in ("bare", "toolkit"))
        gradients = sum(p.numel() * p.element_size() for p in trainings["bare"].model.parameters())
        print(
            f"peak memory of a step: bare {bytes_bare:,} bytes, toolkit {bytes_ours - bytes_bare:+,} "
            f"(the gradients are {gradients:,})"
        )
    pairs = zip(*(training.model.parameters() for training in trainings.values()), strict=True)
    if device.type == "cpu" and not all(torch.equal(p, q) for p, q in pairs):  # a GPU's additions have no fixed order
        raise SystemExit("the two were not trained alike")
    dp.stop()


if __name__ == "__main__":
    main()
