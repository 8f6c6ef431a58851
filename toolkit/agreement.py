"""What ranks have to tell each other between steps: a wish to stop, and numbers that are not finite.

That there is something to tell travels as one number with the step's gradients, so all ranks know it after the same
step, without an operation of its own; only then they gather what it is.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

from toolkit.adapters import Adapter
from toolkit.errors import RunFailed
from toolkit.stopping import Signals
from toolkit.world import World

_WARNINGS = 10  # steps that were not finite, each with a line of its own


class Word(NamedTuple):
    """What one rank tells.

    Attributes:
        name: the rank's.
        asked: to stop: a signal's number, or 0 for the script's own wish; None: not.
        trouble: which of its numbers are not finite; "": none.
    """

    name: str
    asked: int | None
    trouble: str


class Agreement:
    """One rank's part in what all agree on; every rank makes the same calls, but for `ask_to_stop`.

    Args:
        adapter: the adapter in use.
        world: what `start` returned.
        on_nan: stop or skip.
        warn: prints a line on rank 0.

    Attributes:
        stopping: who asked for the run's end, once all ranks know; else None.
    """

    def __init__(self, adapter: Adapter, world: World, on_nan: str, warn: Callable[[str], None]) -> None:
        self._adapter, self._name, self._on_nan, self._warn = adapter, world.name, on_nan, warn
        self.stopping: Word | None = None
        self._signals = Signals()
        self._asked_by_script = False
        self._trouble = ""  # a loss that was not finite, not told yet
        self._warned = 0
        self._heard: tuple[bool, str | None] = False, None  # what came with the gradients and was not acted on yet

    def begin(self, signals: bool) -> None:
        """Begin to listen, and with `signals` to take those as wishes."""
        self._exchange()
        self._heard = False, None
        if signals:
            self._signals.install()

    def end(self) -> None:
        """Leave signals to whoever had them before, and steps as they are."""
        self._signals.restore(answered=self.stopping is not None)
        self._adapter.exchange_flag(None)

    def ask_to_stop(self) -> None:
        """Have the next step's gradients tell that this rank's script wants the run's end."""
        self._asked_by_script = True
        self._exchange()

    def after_pass(self, loss: float, step: int) -> bool:
        """Look at what came with the gradients of the pass just done, in the step of this number.

        Returns:
            Whether the step was left out, on all ranks, because its gradients were not finite.

        Raises:
            RunFailed: it was, or a loss was not finite, and that is to end the run; on every rank.
        """
        if not math.isfinite(loss):
            self._trouble = f"loss {loss} in step {step}"
        self._exchange()
        (heard, broken), self._heard = self._heard, (False, None)
        if heard or broken is not None:
            gradient = f"gradient of {broken} not finite in step {step}" if broken else ""
            self._tell(", ".join(filter(None, [self._trouble, gradient])), left_out=broken is not None)
        return broken is not None

    def between_epochs(self) -> None:
        """Tell each other what there is to tell, where no gradients are averaged.

        Raises:
            RunFailed: the last loss was not finite, and that is to end the run; on every rank.
        """
        self._tell(self._trouble, left_out=False)

    @property
    def _asked(self) -> int | None:
        received = self._signals.received
        return 0 if received is None and self._asked_by_script else received

    def _exchange(self) -> None:
        """Have the coming gradients say whether this rank has something to tell; note what the last ones said."""
        heard, broken = self._adapter.exchange_flag(bool(self._trouble) or self._asked is not None)
        self._heard = self._heard[0] or heard, broken if self._heard[1] is None else self._heard[1]

    def _tell(self, trouble: str, left_out: bool) -> None:
        words: list[Word] = self._adapter.gather(Word(self._name, self._asked, trouble))
        self._trouble = ""
        asked = [word for word in words if word.asked is not None]
        self.stopping = max(asked, key=lambda word: word.asked or 0, default=None)
        troubled = [f"{word.name}: {word.trouble}" for word in words if word.trouble]
        if left_out and not troubled:  # each rank's was finite
            troubled = ["the mean of all ranks' gradients overflows"]
        if not troubled:
            return
        if self._on_nan == "stop":
            skip = ", or leave out steps of such gradients with --on-nan skip" if left_out else ""
            raise RunFailed(f"{troubled[0]}: look at the data and the learning rate{skip}.")
        self._warned += 1
        if self._warned <= _WARNINGS:
            last = "; of more such steps the epochs' lines tell" if self._warned == _WARNINGS else ""
            self._warn(f"warning: {troubled[0]}: {'step left out' if left_out else 'its gradients were finite'}{last}")
