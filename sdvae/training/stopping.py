"""On SIGTERM or SIGINT, a run finishes its step, writes a checkpoint and exits with 128 + the signal's number."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType

from sdvae.errors import Stopped

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopSignal:
    """A context that records the first signal instead of acting on it. A second signal has its usual effect.

    Attributes:
        received: the number of the signal, or None if none came.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._former: dict[int, object] = {}

    def __enter__(self) -> StopSignal:
        if threading.current_thread() is threading.main_thread():  # Python allows handlers nowhere else
            for number in SIGNALS:
                self._former[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        self._restore()

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = number
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        self._former.clear()

    def was_received(self) -> bool:
        return self.received is not None

    def stopped(self, message: str) -> Stopped:
        """The exception that ends the run. If only another process got the signal, it counts as SIGTERM."""
        return Stopped(message, self.received or signal.SIGTERM)
