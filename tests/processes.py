"""Run train.py in processes that can be killed, stopped and counted, and that start in milliseconds.

Importing torch and transformers takes longer than a tiny training run. So one server process imports them once and
forks into the processes of every run, which behave as under `torchrun train.py`, with RANK, WORLD_SIZE and so on in
the environment. No torchrun agent cleans up after them, so minirm itself has to end them.
"""

import gc
import importlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
import traceback
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

# A patch for `Server.start`. It writes every c10d operation to collectives-<rank>.json in --output_dir, with the bytes of
# each tensor among its arguments and None for each other argument.
COLLECTIVES = """
import json, torch
from torch.utils._python_dispatch import TorchDispatchMode
calls = []
class Collectives(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.name().startswith("c10d::"):
            calls.append([func.name(), [arg.nbytes if isinstance(arg, torch.Tensor) else None for arg in args]])
        return func(*args, **(kwargs or {}))
main = train.main
def counted(argv):
    with Collectives():
        code = main(argv)
    with open(f"{argv[argv.index('--output_dir') + 1]}/collectives-{rank}.json", "w") as file:
        json.dump(calls, file)
    return code
train.main = counted
"""


class Server:
    """run = Server(folder).start(*flags, world=2), then run.kill(), run.wait(), run.text()."""

    def __init__(self, folder: Path):
        self.folder, self.count = folder, 0
        self.process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        )

    def ask(self, timeout: float = 180, **request):
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        if not select.select([self.process.stdout], [], [], timeout)[0]:
            raise TimeoutError(f"no answer within {timeout} s to {request}")
        return json.loads(self.process.stdout.readline())

    def start(self, *flags, world: int = 1, patch: str = "", env: dict | None = None) -> "Run":
        """patch: Python code that each process runs before train.main; `train` and `rank` are defined in it."""
        self.count += 1
        log = self.folder / f"run-{self.count}.log"
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        argv = [str(flag) for flag in flags]
        pids = self.ask(argv=argv, world=world, log=str(log), patch=patch, port=port, env=env or {})
        return Run(self, pids, log)

    def run(self, *flags, timeout: float = 120, **options) -> "Run":
        """Start a run and wait for it."""
        run = self.start(*flags, **options)
        run.wait(timeout)
        return run

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait(10)


class Run:
    def __init__(self, server: Server, pids: list[int], log: Path):
        self.server, self.pids, self.log, self.codes = server, pids, log, None

    def kill(self, number: int = signal.SIGKILL, ranks=None) -> None:
        for rank in range(len(self.pids)) if ranks is None else ranks:
            os.kill(self.pids[rank], number)

    def wait(self, timeout: float = 120) -> list[int]:
        """Exit codes by rank; -9 means killed. Kills the processes and raises TimeoutError after `timeout` seconds."""
        if self.codes is None:
            end, self.codes = time.monotonic() + timeout, []
            for pid in self.pids:
                while (code := self.server.ask(wait=pid)) is None:
                    if time.monotonic() > end:
                        self.kill()
                        raise TimeoutError(f"still running after {timeout} s:\n{self.text()[-3000:]}")
                    time.sleep(0.02)
                self.codes.append(code)
        return self.codes

    def text(self) -> str:
        return self.log.read_text(errors="replace").replace("\r", "\n") if self.log.exists() else ""

    def until(self, condition, timeout: float = 60) -> bool:
        """Wait until condition() is true; returns False if the run ends first."""
        end = time.monotonic() + timeout
        while not condition():
            if any(self.server.ask(ended=pid) for pid in self.pids):
                return False
            assert time.monotonic() < end, f"waited {timeout} s in vain:\n{self.text()[-3000:]}"
            time.sleep(0.002)
        return True


def serve() -> None:
    sys.path.insert(0, str(ROOT))
    import torch.distributed.tensor._ops  # noqa: F401 - imported here once, because every run would import it late
    import transformers.optimization  # noqa: F401
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    import train

    for number in (signal.SIGINT, signal.SIGHUP):  # commands started with & ignore SIGINT, with nohup SIGHUP
        signal.signal(number, signal.SIG_DFL)
    get_checkpoint_conversion_mapping("llama")
    for name in ("gpt2", "gptj", "llama"):
        importlib.import_module(f"transformers.models.{name}.modeling_{name}")
    sys.modules["matplotlib"] = None  # as if not installed: drawing the curves takes longer than a run

    gc.freeze()  # garbage collection in a child would copy the shared memory
    codes: dict[int, int | None] = {}

    def ended(pid: int) -> bool:
        if codes[pid] is None:
            done, status = os.waitpid(pid, os.WNOHANG)
            codes[pid] = os.waitstatus_to_exitcode(status) if done else None
        return codes[pid] is not None

    for line in sys.stdin:
        request = json.loads(line)
        if "argv" in request:
            pids = []
            for rank in range(request["world"]):
                pid = os.fork()
                if pid == 0:
                    child(train, rank, request)
                pids.append(pid)
                codes[pid] = None
            answer = pids
        elif "wait" in request:
            answer = codes[request["wait"]] if ended(request["wait"]) else None
        else:
            answer = ended(request["ended"])
        print(json.dumps(answer), flush=True)
    for pid in codes:
        if not ended(pid):
            os.kill(pid, signal.SIGKILL)


def child(train, rank: int, request: dict) -> None:
    log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for descriptor in (1, 2):
        os.dup2(log, descriptor)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    if request["world"] > 1:
        where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(request["port"])}
        ranks = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(request["world"])}
        os.environ.update(where | ranks)
    os.environ.update(request["env"])
    code = 1
    try:
        exec(request["patch"], {"train": train, "rank": rank})  # noqa: S102 - the tests' own code
        code = train.main(request["argv"])
    except SystemExit as error:
        code = error.code
    except Exception:  # noqa: BLE001 - any error belongs in the log
        traceback.print_exc()
    finally:
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    serve()
