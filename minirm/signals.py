"""Stop a run from outside: on signals, and when the torchrun that started this process dies."""

import os
import select
import signal
import sys
import threading
from typing import Self

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
GRACE = 5.0  # seconds for the main thread to exit after a signal outside the training loop


class Watch:
    """Wrap a run in `with Watch() as watch:`. watch.saving says whether the run is in its training loop.

    In the loop, signals are only recorded in watch.caught; the loop finishes its step, saves and stops. Elsewhere (data
    preparation, loading, export), the main thread gets a KeyboardInterrupt with the signal's number. If it is stuck in
    a library, perhaps waiting for another process, a second thread ends the process after GRACE seconds.

    torchrun's workers have their own sessions and outlive a killed torchrun (SIGKILL, out-of-memory killer, scancel).
    The second thread checks every second that the parent is alive, and treats its death as SIGTERM.
    """

    def __init__(self) -> None:
        self.caught: list[int] = []
        self.saving = False
        self.parent = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else 0  # 0: no torchrun to watch

    def __enter__(self) -> Self:
        # nohup ignores SIGHUP; keep it that way.
        self.usual = {number: old for number in SIGNALS if (old := signal.getsignal(number)) is not signal.SIG_IGN}
        for number in self.usual:
            signal.signal(number, self._handle)
        self.read, self.write = os.pipe()
        os.set_blocking(self.write, False)
        # Python writes a signal's number to this pipe even if the main thread is stuck.
        self.wakeup = signal.set_wakeup_fd(self.write, warn_on_full_buffer=False)
        self.thread = threading.Thread(target=self._look, name="minirm signals", daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *_) -> None:
        signal.set_wakeup_fd(self.wakeup)
        for number, handler in self.usual.items():
            signal.signal(number, handler)
        os.close(self.write)  # then the thread reads end-of-file and exits
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
        """Signals that arrive within this many seconds; None if the run is over."""
        if not select.select([self.read], [], [], seconds)[0]:
            return b""
        return os.read(self.read, 64) or None


def interrupted(number: int) -> str:
    """The message when a signal ends a run outside its training loop."""
    return f"{signal.Signals(number).name}: stopped; no finished step is lost; run the same command again to resume"


def leave_closed_terminal() -> None:
    """Redirect output to /dev/null if its terminal is closed: a failed print must not end a run that is saving."""
    for descriptor in (1, 2):
        try:
            os.write(descriptor, b"")
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)
