"""What ends a run from outside: signals, and the end of the torchrun that started this process."""

import os
import select
import signal
import sys
import threading
from typing import Self

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
GRACE = 5.0  # seconds that the main thread has to end after a signal while nothing is being trained


class Watch:
    """`with Watch() as watch:` around a run; watch.saving says whether it is in its training loop.

    There, signals are only noted in watch.caught, and the loop finishes its step, saves and stops. Everywhere else (data
    preparation, loading, export) the main thread gets a KeyboardInterrupt with the signal's number; if it is stuck inside
    a library, say waiting for another process, a thread ends the process after GRACE seconds.

    torchrun's workers are sessions of their own and outlive a torchrun that is killed (SIGKILL, the out-of-memory killer,
    scancel). The thread looks every second whether the parent is still there; if not, that counts as SIGTERM.
    """

    def __init__(self) -> None:
        self.caught: list[int] = []
        self.saving = False
        self.parent = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else 0  # 0: no torchrun, nobody to look at

    def __enter__(self) -> Self:
        usual = {number: signal.getsignal(number) for number in SIGNALS}
        # nohup has SIGHUP ignored, and so it stays.
        self.usual = {number: handler for number, handler in usual.items() if handler is not signal.SIG_IGN}
        for number in self.usual:
            signal.signal(number, self._handle)
        self.read, self.write = os.pipe()
        os.set_blocking(self.write, False)
        self.wakeup = signal.set_wakeup_fd(
            self.write, warn_on_full_buffer=False
        )  # written even if the main thread is stuck
        self.thread = threading.Thread(target=self._look, name="minirm signals", daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *_) -> None:
        signal.set_wakeup_fd(self.wakeup)
        for number, handler in self.usual.items():
            signal.signal(number, handler)
        os.close(self.write)  # the thread reads the end of the pipe, and ends
        self.thread.join()
        os.close(self.read)

    def _handle(self, number: int, _) -> None:
        if number == signal.SIGHUP:
            leave_closed_terminal()
        if not self.saving:
            raise KeyboardInterrupt(number)
        self.caught.append(number)

    def _look(self) -> None:
        while True:
            numbers = self._read(1.0)
            if numbers is None:
                return
            if self.parent and os.getppid() != self.parent:
                self.parent = 0
                numbers += bytes([signal.SIGTERM])
                os.kill(os.getpid(), signal.SIGTERM)
            noticed = [number for number in numbers if number in self.usual]
            if noticed and not self.saving and self._read(GRACE) is not None and not self.saving:
                print(f"train.py: {interrupted(noticed[0])}", file=sys.stderr, flush=True)
                os._exit(128 + noticed[0])

    def _read(self, seconds: float) -> bytes | None:
        """The signals that came within so many seconds; None if the run is over."""
        if not select.select([self.read], [], [], seconds)[0]:
            return b""
        return os.read(self.read, 64) or None


def interrupted(number: int) -> str:
    """What to say where a signal ended a run outside of its training loop."""
    return f"{signal.Signals(number).name}: stopped; no finished step is lost, and the same command goes on"


def leave_closed_terminal() -> None:
    """Send output to /dev/null if its terminal is closed: a line that cannot be written must not end a run that saves."""
    for descriptor in (1, 2):
        try:
            os.write(descriptor, b"")
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)
