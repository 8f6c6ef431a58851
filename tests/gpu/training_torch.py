"""A transformer that torch trains, for `tests.gpu.overhead`."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

SIZES = {  # layers, width, samples, tokens a sample
    "cuda": (12, 1024, 16, 512),
    "cpu": (4, 128, 16, 32),
}


class Training:
    """With AdamW, on the same data in each step; by torch alone, or by the toolkit's adapter where one is given."""

    def __init__(self, place: str, dp: Any = None) -> None:
        device = torch.device(place)
        layers, width, samples, tokens = SIZES[device.type]
        torch.manual_seed(0)
        layer = torch.nn.TransformerEncoderLayer(width, width // 64, 4 * width, dropout=0.0, batch_first=True)
        self._model = torch.nn.TransformerEncoder(layer, layers, enable_nested_tensor=False).to(device)
        self._optimizer: Any = torch.optim.AdamW(self._model.parameters(), lr=1e-4)
        self._x = torch.randn(samples, tokens, width, device=device)
        self._dp = dp
        if dp:
            self._optimizer = dp.distribute(self._optimizer, self._model)

    def take(self, steps: int) -> None:
        """Some steps, as a script has them."""
        for _ in range(steps):
            if self._dp:
                self._dp.exchange_flag(False)  # as `Run` does
            self._optimizer.zero_grad()
            with torch.autocast(self._x.device.type, torch.bfloat16, enabled=self._x.is_cuda):
                loss = self._model(self._x).square().mean()
            loss.backward()
            self._optimizer.step()

    def weights(self) -> list[np.ndarray]:
        """All that is trained."""
        return [p.detach().cpu().numpy() for p in self._model.parameters()]


def wait() -> None:
    """Until the device has done all that it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def allocated() -> int:
    """The bytes of the GPU that tensors have."""
    return torch.cuda.memory_allocated()


def restart_peak() -> None:
    """Have `peak` begin anew."""
    torch.cuda.reset_peak_memory_stats()


def peak() -> int:
    """The most that `allocated` was."""
    return torch.cuda.max_memory_allocated()
