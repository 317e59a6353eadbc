"""--profile: where a step spends its time."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from minirm.errors import printable

PROFILED = ("matrix products", "attention", "other operations", "communication", "waiting", "gaps")


def profiler(steps: int, coming: int, output: Path, group: dist.ProcessGroup) -> Callable[[], None]:
    """Return a function to call after every step. It profiles `steps` (0: none) of the `coming` ones.

    It skips the first two. Then every process writes its Chrome trace to `output`, and rank 0 prints shares of time.
    """
    rank = dist.get_rank()
    if not steps or coming < steps + 2:
        if steps and rank == 0:
            print(f"--profile {steps} needs {steps + 2} steps, but only {coming} remain; nothing is profiled")
        return lambda: None

    def done(profile: torch.profiler.profile) -> None:
        profile.export_chrome_trace(str(output / f"trace-rank{rank}.json.gz"))
        everyone: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, time_shares(profile.events()), group=group)
        if rank == 0:
            traces = f"{printable(output)}/trace-rank*.json.gz"
            print(f"profiled {steps} steps (traces: {traces}); shares of each process's time:")
            print(profile_table(everyone, steps))

    schedule = torch.profiler.schedule(wait=0, warmup=1, active=steps, repeat=1, skip_first=1)
    profile = torch.profiler.profile(schedule=schedule, on_trace_ready=done)
    profile.start()
    return profile.step


def time_shares(events) -> Counter[str]:
    """Microseconds by kind of operation and in total, on the GPU if there is one, else on this process's CPU thread."""
    times: Counter[str] = Counter()
    cuda, end = torch.cuda.is_available(), 0.0
    for event in sorted(events, key=lambda event: event.time_range.start):
        name, span = event.name, event.time_range
        if name.startswith("ProfilerStep"):
            times["whole"] += 0 if event.device_type == torch.autograd.DeviceType.CUDA else span.elapsed_us()
        elif name.startswith(("ncclDevKernel", "ncclKernel") if cuda else "gloo:"):  # count overlaps once
            times["communication"] += max(0.0, span.end - max(span.start, end))
            end = max(end, span.end)
        elif name.startswith("aten::"):
            matrices = name in ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::_grouped_mm")
            kind = PROFILED[0 if matrices else 1 if "scaled_dot_product" in name or "_attention_" in name else 2]
            times[kind] += event.self_device_time_total if cuda else event.self_cpu_time_total
    return times


def profile_table(everyone: list[Counter[str]], steps: int) -> str:
    """Format times by process. Waiting is time in collectives beyond that of the process that spends least in them."""
    least = min(times["communication"] for times in everyone)
    lines = [f"{'process':<9}{'ms/step':>10}" + "".join(f"{name:>18}" for name in PROFILED)]
    for rank, times in enumerate(everyone):
        times["waiting"], times["communication"] = times["communication"] - least, least
        times[PROFILED[-1]] = max(0, times["whole"] - sum(times[name] for name in PROFILED[:-1]))
        shares = "".join(f"{times[name] / times['whole']:>18.1%}" for name in PROFILED)
        lines.append(f"{rank:<9}{times['whole'] / steps / 1000:>10.1f}{shares}")
    return "\n".join(lines)
