"""Rank 0's watching thread, which hears of every worker and decides what has ended the job."""

from __future__ import annotations

import hmac
import secrets
import selectors
import socket
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from toolkit.watching.diagnosis import oom_kills, process_state, stacks, why_killed
from toolkit.watching.lines import ANSWER, CALLING, Line, proof
from toolkit.watching.member import ALL_GROUPS, LAST, SHARED, Member, Watch, deputies, failure, seconds, waits_for, when
from toolkit.watching.verdict import Verdict, leave

_MOVING = "loading", "training at"  # how what a run does begins that is soon over
_LEFT_BEHIND = 3.0  # seconds; what a worker that leaves has just ended, others may be about to end
_FAREWELL = 0.5  # seconds between the failed worker's exit and the others', so that launchers name the first


class Hub(Watch):
    """Rank 0's: hears of every worker, decides what has ended the job, and tells."""

    def __init__(
        self, me: Member, members: list[Member], key: bytes, timeout: float, listener: socket.socket, waits: bool
    ) -> None:
        super().__init__(me, members, key, timeout)
        self._listener, self._own_waits = listener, waits
        self._strangers: set[Line] = set()
        self._first_error = self._first_shared = 0.0
        self._ended_without_me: dict[str, Any] = {}
        self._left_at = 0.0  # when the latest worker left
        self._gone: list[tuple[Member, str]] = []  # who ended without a word, and its verdict's cause
        self._asked = False
        self._warned_of_waits: set[int] = set()  # groups
        self._asked_in_waits: set[int] = set()
        self._oom = oom_kills()
        self._until = time.monotonic() + CALLING  # by when all have called
        self.selector.register(listener, selectors.EVENT_READ, self._accept)

    def _accept(self) -> None:
        try:
            connection, _ = self._listener.accept()
        except OSError:
            return
        line = Line(connection)
        if len(self._strangers) > 2 * len(self.members) + 16:
            line.close()
            return
        self._strangers.add(line)
        challenge = secrets.token_hex(16)
        line.send(challenge=challenge)
        self.selector.register(connection, selectors.EVENT_READ, lambda: self._greeted(line, challenge))

    def _greeted(self, line: Line, challenge: str) -> None:
        """A stranger has sent its first line, or should have."""
        try:
            messages = line.receive()
            if not messages:
                return
            rank, said, answer = (messages[0].get(name) for name in ("rank", "proof", "challenge"))
            right = proof(self.key, "worker", str(rank), challenge)
            if not hmac.compare_digest(str(said).encode(), right.encode()):
                raise EOFError
            member = self.members[int(str(rank))]
            if member is self.me or member.line is not None:
                raise EOFError
        except (EOFError, ValueError, IndexError):
            self._strangers.discard(line)
            self.drop(line)
            return
        self._strangers.discard(line)
        line.known = True
        member.line, member.heard, member.met = line, time.monotonic(), False
        line.send(welcome=proof(self.key, "rank 0", str(answer)))
        self.selector.modify(line.socket, selectors.EVENT_READ, lambda: self._heard(member))

    def _heard(self, member: Member) -> None:
        line = member.line
        if line is None:
            return
        try:
            messages = line.receive()
        except EOFError:
            self._lost(member)
            return
        member.heard, member.met = time.monotonic(), True
        if member.warned:
            member.warned = False
            self.warn(f"{member.name} is back.")
        for message in messages:
            self._take(member, message)

    def told(self, message: dict[str, Any]) -> None:
        """Take a message of this worker's main thread."""
        self._look_at_myself(time.monotonic())
        self._take(self.me, message)
        if message["kind"] == "left":
            for other in self._others():
                other.send(kind="left", how=message["how"])

    def _others(self) -> list[Line]:
        return [member.line for member in self.members if member.line is not None]

    def _take(self, member: Member, message: dict[str, Any]) -> None:
        kind, now = message.get("kind"), time.monotonic()
        if kind == "beat" or "doing" in message:
            member.doing, member.waiting = str(message.get("doing")), str(message.get("waiting", ""))
            member.doing_since = now - seconds(message.get("doing_for"))
            member.waiting_since = now - seconds(message.get("waiting_for"))
            member.directory = str(message.get("directory", ""))
        if kind == "failure":
            self._end(failure(member, message), member)
        elif kind == "shared":
            member.shared = message
            self._first_shared = self._first_shared or now
        elif kind == "consequence":
            member.error = str(message.get("text"))
            self._first_error = self._first_error or now
        elif kind == "left":
            member.left, self._left_at = str(message.get("how")), now
        elif kind == "ended":
            self._ended_without_me = message
        elif kind == "stack":
            member.stack = str(message.get("text"))

    def _lost(self, member: Member) -> None:
        """A worker's connection has closed."""
        line, member.line = member.line, None
        if line is not None:
            self.drop(line)
        # One that has not met the welcome in time calls again.
        if not member.left and member.met:
            more = why_killed(self._oom) if member.host == self.me.host else ""
            last = f", last heard of{when(member)}" if member.doing else ""
            cause = f"ended without a word{last}: killed (kill -9, or out of memory) or crashed{more}."
            self._gone.append((member, cause))  # for `look`, when all that has come is read

    def beat_now(self, now: float) -> None:
        """Tell the others that this worker lives, and who is to speak when it does not."""
        speakers = deputies(self.members)
        for line in self._others():
            line.send(kind="beat", deputies=speakers)

    def look(self, now: float) -> None:
        """Look for silence, for waits that are too long, and for errors that another's end explains."""
        if self._ended_without_me:  # this worker was the silent one, which another has told
            code = self._ended_without_me.get("code")
            self._end_all(code if isinstance(code, int) else 1, self.me)
            return
        while self._gone:
            member, cause = self._gone.pop(0)
            self._end(member.verdict(cause), member)
        for line in [line for line in self._strangers if now - line.began > LAST]:
            self._strangers.discard(line)
            self.drop(line)
        if all(m.left or m is not self.me and m.line is None and now > self._until for m in self.members):
            for line in self._others():
                line.send(kind="over")
            self.over.set()
            return
        if self._first_shared:
            self._settle_shared(now)
        self._look_for_left_behind(now)
        if self._first_error:
            self._settle_errors(now)
        elif self.timeout:
            self._look_for_silence(now)
            for group in dict.fromkeys(member.group for member in self.members):
                self._look_for_waits(group, now)

    def _settle_shared(self, now: float) -> None:
        """An error that all ranks of a group raise alike is told once, by the lowest that has it."""
        told = [member for member in self.members if member.shared]
        there = [member for member in self.members if member.line is not None or member is self.me]
        group = [member for member in there if member.group == told[0].group]
        if self.me in told or all(member.shared for member in group) or now > self._first_shared + SHARED:
            member = told[0]
            self._end(failure(member, member.shared), member)

    def _settle_errors(self, now: float) -> None:
        """Some got Horovod's error that another has ended: who has left is the one, or those that did not get it."""
        late = now - self._first_error
        if late < 1:  # a failure's own report may be on its way
            return
        present = [m for m in self.members if m.line is not None or m is self.me]
        missing = [m for m in present if not m.error]
        if left := [m for m in self.members if m.left]:
            self._end_left_early(left)
        elif missing and late < ANSWER + 1:
            if not self._asked:
                self._asked = True
                self._ask(missing)
        elif missing:
            self._end_stalled(missing, now)
        else:
            first = next(m for m in self.members if m.error)
            self._end(first.verdict(f"Horovod ended on all ranks: {first.error}"), first)

    def _look_for_left_behind(self, now: float) -> None:
        """Who waits in an operation of MPI, which does not fail as Horovod's do, for one that has left."""
        left = [m for m in self.members if m.left]
        for member in self.members:
            for other in left if member.waiting and not member.left else []:
                together = other.group == member.group or member.waiting.endswith(ALL_GROUPS)
                if together and now - max(member.waiting_since, self._left_at) > _LEFT_BEHIND:
                    self._end_left_early(left)
                    return

    def _end_left_early(self, left: Sequence[Member]) -> None:
        self._end(left[0].verdict(f"left early: it {left[0].left}{self._waited(left)}."), left[0])

    def _ask(self, members: Sequence[Member]) -> None:
        for member in members:
            if member is self.me:
                member.stack = stacks()
            elif member.line is not None:
                member.line.send(kind="stack?")

    def _look_for_silence(self, now: float) -> None:
        for member in self.members:
            silent = now - member.heard
            if member.line is None or member.left or silent < max(self.timeout / 5, 3 * self.beat):
                continue
            if not member.warned:
                member.warned = True
                limit = f"the job ends after {self.timeout:g} s (--stall-timeout)"
                self.warn(f"no sign of life of {member.name} for {silent:.0f} s; {limit}.")
            if silent >= self.timeout:
                self._end_stalled([member], now)

    def _look_for_waits(self, number: int, now: float) -> None:
        """Ranks in an operation that others, of this group, do not come to, where Horovod does not look itself."""
        group = [m for m in self.members if m.group == number and not m.left]
        heard = [m for m in group if now - m.heard < 3 * self.beat]
        waits = [m for m in heard if m.waiting and not m.waiting.endswith(ALL_GROUPS)]
        steps = [m for m in heard if self._may_wait(m)]
        late = [m for m in group if not m.waiting]
        afar = [m for m in self.members if m.left or m.waiting.endswith(ALL_GROUPS)]
        since, doubt = now, ""  # why it may be no stall, but work
        if waits:
            first = min(waits, key=lambda m: m.waiting_since)
            since, missing = first.waiting_since, [m for m in group if m.waiting != first.waiting]
        elif steps and (len(group) > 1 or not afar):  # in an earlier step than the last none waits any more
            first = max(steps, key=lambda m: m.doing_since)
            since, missing = first.doing_since, [m for m in group if m.doing != first.doing]
            if not missing:
                doubt = f"{_names(group)} are {first.doing}: a slow step, or one that waits for another"
        elif late and afar:  # nothing moves here, and another group waits for it, or others have left
            first = min(afar, key=lambda m: m.waiting_since)
            since, missing = max(first.waiting_since, *(max(m.doing_since, m.waiting_since) for m in late)), late
            if first.left or not all(m.doing.startswith(_MOVING) for m in late):  # such as in an evaluation
                doubt = f"{_names(late)}: {late[0].doing or 'at work'}; {first.name} "
                doubt += first.left or f"waits in {waits_for(first)}"
        waited = now - since
        if waited < self.timeout / 5:
            self._warned_of_waits.discard(number)
            self._asked_in_waits.discard(number)
            return
        if doubt or not missing:
            if doubt and waited > self.timeout:
                self._warn_of_waits(number, f"for {waited:.0f} s {doubt}.")
            return
        if self._own_waits:
            limit = f"the job ends after {self.timeout:g} s (--stall-timeout)"
            waits_in = f"{first.name} waits for {_names(missing)} in {first.waiting or waits_for(first)}"
            self._warn_of_waits(number, f"{waits_in} for {waited:.0f} s; {limit}.")
        if waited > self.timeout - 1 and number not in self._asked_in_waits:
            self._asked_in_waits.add(number)
            self._ask(missing)
        if waited > self.timeout:
            self._end_stalled(missing, now)

    def _warn_of_waits(self, number: int, text: str) -> None:
        if number not in self._warned_of_waits:
            self._warned_of_waits.add(number)
            self.warn(text)

    def _may_wait(self, member: Member) -> bool:
        """Whether a worker may wait in a compiled step, which can't tell, where Horovod does not look itself."""
        return self._own_waits and not member.waiting and member.doing.startswith("training at")

    def _waited(self, members: Sequence[Member]) -> str:
        """What the others were waiting for."""
        there = [m for m in self.members if m.group == members[0].group or m.waiting.endswith(ALL_GROUPS)]
        others = [m for m in there if m not in members and (m.waiting or m.error or self._may_wait(m))]
        if not others:
            return ""
        what = waits_for(others[0])
        names = ", ".join(m.name for m in others[:3]) + (f" and {len(others) - 3} more" if len(others) > 3 else "")
        return f"; {names} waited for it in {what}"

    def _end_stalled(self, members: list[Member], now: float) -> None:
        first = members[0]
        silent = now - first.heard
        what = first.status(now)
        if silent > 3 * self.beat:
            state = process_state(first.pid) if first.host == self.me.host else ""
            what = f"gave no sign of life for {silent:.0f} s{when(first)}{state}"
        others = "".join(f"; so is {m.name}: {m.status(now)}" for m in members[1:4])
        if len(members) > 4:
            others += f"; and {len(members) - 4} more"
        cause = f"did not come: it {what}{others}{self._waited(members)}."
        found = {m.name: m.stack for m in members if m.stack}
        self._end(first.verdict(cause, stacks=found, ranks=tuple(m.rank for m in members)), first)

    def _end(self, verdict: Verdict, member: Member) -> None:
        """Tell it, end the others, and this worker."""
        self._end_at = time.monotonic(), verdict.code
        if not verdict.traceback and not verdict.shown and self.stopped_by_signal():
            verdict = replace(verdict, code=143)
        else:
            self.report(verdict, member.directory)
        self._end_all(verdict.code, member)

    def _end_all(self, code: int, member: Member) -> None:
        """End the others, `member` before them, and this worker."""
        others = self._others()
        for other in self.members:
            if other.line is not None:
                other.line.send(kind="end", code=code, after=0.1 if other is member else _FAREWELL)
                self.wake(other)
        if others:
            time.sleep(_FAREWELL if member is not self.me else 0.1)
        leave(code)


def _names(members: Sequence[Member]) -> str:
    return ", ".join(m.name for m in members[:4])
