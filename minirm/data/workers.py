"""Run a function in processes on all cores of this machine, with results in order."""

import ctypes
import os
import signal
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from typing import Any

from minirm.errors import Stop
from minirm.signals import SIGNALS

AHEAD = 4  # tasks submitted per process: enough to keep it busy
PR_SET_PDEATHSIG = 1  # of prctl(2)

_job: tuple[Callable, Sequence[tuple]]  # in a worker process: the function and all its tasks


def on_all_cores(function: Callable, tasks: Sequence[tuple], processes: int = 0) -> Iterator[Any]:
    """Yield function(*task) for each task, in order. processes: how many to use; 0: one per core that this one may use.

    The processes are forked and share the memory of function and tasks; only results are sent. A single task runs in
    this process. Raises the exception of the first task that fails, and Stop if a process is killed.
    """
    processes = min(processes or len(os.sched_getaffinity(0)), len(tasks))
    if processes < 2:
        yield from (function(*task) for task in tasks)
        return
    pool = ProcessPoolExecutor(processes, get_context("fork"), _begin, (os.getpid(), function, tasks))
    waiting: deque = deque()
    try:
        for number in range(len(tasks)):
            waiting.append(pool.submit(_compute, number))
            if len(waiting) == AHEAD * processes:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool:
        what = "a process that prepared data was killed, perhaps because memory ran out"
        raise Stop(f"{what}; free some memory and run the same command again", 3) from None
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _begin(parent: int, function: Callable, tasks: Sequence[tuple]) -> None:
    """Set up a worker: it dies with its parent, ignores signals, and uses one core."""
    global _job
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)
    signal.set_wakeup_fd(-1)
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _job = function, tasks


def _compute(number: int) -> Any:
    function, tasks = _job
    return function(*tasks[number])
