"""SIGINT and SIGTERM, noted until a run can be stopped."""

import contextlib
import signal
import threading
from collections.abc import Iterator
from multiprocessing import resource_tracker
from typing import Any


class Interrupted(KeyboardInterrupt):
    """A signal stopped the run, after a checkpoint was written."""


@contextlib.contextmanager
def blocked() -> Iterator[None]:
    """Hold back SIGINT and SIGTERM; processes that are forked or spawned meanwhile never get them."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    resource_tracker.ensure_running()  # which unblocks them where it is started by the first process
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class Signals:
    """The signal that came last, or 0."""

    def __init__(self) -> None:
        self.number = 0

    @contextlib.contextmanager
    def noted(self) -> Iterator[None]:
        """Note SIGINT and SIGTERM; the second one acts as usual."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def note(number: int, _: Any) -> None:
            self.number = number
            signal.signal(number, before[signal.Signals(number)])

        before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            for number in before:
                signal.signal(number, note)
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
