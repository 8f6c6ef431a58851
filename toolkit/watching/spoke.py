"""The other ranks' watching thread, which tells rank 0 of its worker, and ends it when the job has failed."""

from __future__ import annotations

import selectors
import time
from collections.abc import Sequence
from typing import Any

from toolkit.watching.diagnosis import process_state, stacks
from toolkit.watching.lines import CALLING, reach
from toolkit.watching.member import LAST, Member, Watch, failure, seconds, waits_for
from toolkit.watching.verdict import Verdict, leave, mute


class Spoke(Watch):
    """The other ranks': tells rank 0 of this worker, and ends it when rank 0 says so or is lost."""

    def __init__(
        self, me: Member, members: list[Member], key: bytes, timeout: float, addresses: Sequence[tuple[str, int]]
    ) -> None:
        super().__init__(me, members, key, timeout)
        self._addresses = addresses
        self._hub = members[0]
        self._deputies = [1]
        self._left = False

    def run(self) -> None:
        """Reach rank 0, then watch until the job is over."""
        end = time.monotonic() + CALLING
        line = reach(self._addresses, self.me.rank, self.key)
        while line is None and time.monotonic() < end:  # such as while rank 0 loads what keeps Python's lock
            time.sleep(0.2)
            line = reach(self._addresses, self.me.rank, self.key)
        if line is None:
            self.warn(f"can't reach rank 0 at {self._addresses}: this worker goes on unwatched.")
            self.over.set()
        else:
            self._hub.line, self._hub.heard = line, time.monotonic()
            self.selector.register(line.socket, selectors.EVENT_READ, self._heard)
        super().run()

    def _heard(self) -> None:
        line = self._hub.line
        if line is None:
            return
        try:
            messages = line.receive()
        except EOFError:
            self._hub.line = None
            self.drop(line)
            self._lost_hub()
            return
        now = self._hub.heard = time.monotonic()
        for message in messages:
            kind = message.get("kind")
            if kind == "beat" and isinstance(message.get("deputies"), list):
                self._deputies = message["deputies"]
            elif kind == "stack?":
                line.send(kind="stack", text=stacks())
            elif kind == "left":
                self._hub.left = str(message.get("how"))
            elif kind == "over":
                self.over.set()
            elif kind == "end" and self._end_at is None:
                code = message.get("code")
                mute()
                self._end_at = now + seconds(message.get("after")), code if isinstance(code, int) else 1

    def _lost_hub(self) -> None:
        hub = self._hub
        if self._needs_no_one():
            self.over.set()
        elif self._end_at is None and not hub.left:
            self._speak(hub.verdict("ended without a word: killed (kill -9, or out of memory) or crashed."))
        elif self._end_at is None and self.me.error:
            self._speak_of_leaving()

    def _needs_no_one(self) -> bool:
        """Whether this worker has left, and so has rank 0, or the script goes on."""
        return self._left and (bool(self._hub.left) or not self.me.waiting)

    def _speak_of_leaving(self) -> None:
        """Rank 0 has left and is gone, and this worker has failed on account of it."""
        hub = self._hub
        self._speak(hub.verdict(f"left early: it {hub.left}; {self.me.name} waited for it in {waits_for(self.me)}."))

    def _speak(self, verdict: Verdict, silence: float = 0.0) -> None:
        """End this worker on account of rank 0, and say so where it is for this worker to say."""
        if self.stopped_by_signal():
            leave(143)
        if self.me.rank in self._deputies:
            time.sleep(self._deputies.index(self.me.rank))  # the second speaks only if the first has not ended it all
            if self._hub.line is not None:  # it may only be held up, and find the others gone when it goes on
                self._hub.line.send(kind="ended", code=verdict.code)
            self.report(verdict, silence=silence)
            self.wake(self._hub)
            leave(verdict.code)
        self._end_at = time.monotonic() + LAST, verdict.code

    def told(self, message: dict[str, Any]) -> None:
        """Take a message of this worker's main thread."""
        now = time.monotonic()
        self._look_at_myself(now)
        kind, hub = message["kind"], self._hub
        if kind == "consequence":
            self.me.error = message["text"]
        if self._end_at is not None:  # the job has failed; this is of no more interest
            return
        if hub.line is not None:
            hub.line.send(**message, **self._state(now))
            self._left = self._left or kind == "left"
        elif kind == "consequence" and hub.left:
            self._speak_of_leaving()
        elif kind in ("failure", "shared"):
            verdict = failure(self.me, message)
            self.report(verdict)
            leave(verdict.code)
        else:
            self.over.set()

    def _state(self, now: float) -> dict[str, Any]:
        me = self.me
        waits = {"waiting": me.waiting, "waiting_for": now - me.waiting_since}
        return {"doing": me.doing, "doing_for": now - me.doing_since, "directory": me.directory, **waits}

    def beat_now(self, now: float) -> None:
        """Tell rank 0 that this worker lives, and what it does."""
        if self._hub.line is not None:
            self._hub.line.send(kind="beat", **self._state(now))

    def look(self, now: float) -> None:
        """End this worker when it is time, and look for rank 0's silence."""
        if self._end_at is not None:
            if now >= self._end_at[0]:
                leave(self._end_at[1])
            return
        hub = self._hub
        if not self.timeout or hub.line is None or hub.left or self._needs_no_one():
            return
        silent = now - hub.heard
        # A beat later than rank 0 would end this worker, had it been the silent one.
        if silent > self.timeout + self.beat:
            state = process_state(hub.pid) if hub.host == self.me.host else ""
            cause = f"did not come: it gave no sign of life for {silent:.0f} s{state}"
            self._speak(hub.verdict(f"{cause}; {self.me.name} waited for it in {waits_for(self.me)}."), silent)
        elif silent > max(self.timeout / 5, 3 * self.beat):
            if not hub.warned and self.me.rank == self._deputies[0]:
                limit = f"the job ends after {self.timeout:g} s (--stall-timeout)"
                self.warn(f"no sign of life of {hub.name} for {silent:.0f} s; {limit}.")
            hub.warned = True
        else:
            hub.warned = False
