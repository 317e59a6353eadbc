"""Compare the speed of shared and separate rows: pairs per second of whole optimizer steps.

    OMP_NUM_THREADS=2 python tests/bench/rows.py [--model llama|gptj] [--width 512] [--layers 12] [--precision fp32]
        [--lora_rank 0] [--shape PROMPT ANSWER ANSWERS] [--repeat 5]

Shapes: (a) summaries, one comparison per prompt; (b) ranking, 4 answers and all 6 comparisons; (c) transcripts. Layouts:
shared (each prompt once), separate (each answer once with its prompt), and two full sequences per comparison, as in other
trainers. Shared rows are also timed without the thread that reads batches ahead, with attention in one part (see
`attention_mask`; it differs for long rows, for example --shape 2900 400 2), and with adapters. The layouts take turns, so a
busy machine slows all of them. Medians are shown.
"""

import argparse
import math
import statistics
import time
from contextlib import nullcontext
from functools import partial
from itertools import combinations

import torch
import transformers

from minirm.attention import LONG, attention_mask, use_sdpa
from minirm.freeze import find_blocks, freeze_bottom_layers
from minirm.lora import add_lora, init_lora
from minirm.loss import divergence_loss
from minirm.model import RewardModel, empty_model, init_head, saved_tensors
from minirm.rows import Batch, ahead, collate
from minirm.shard import begin_micro_step, cast_frozen, fill, shard, start_processes

SHAPES = {  # (prompt tokens, answer tokens, answers per prompt); lengths vary by up to a quarter
    "(a) summaries, 1 comparison a prompt": (340, 38, 2),
    "(b) ranking, 4 answers, 6 comparisons": (340, 38, 4),
    "(c) transcripts, 1 comparison a prompt": (200, 150, 2),
}
VOCABULARY, POSITIONS = 8000, 8192
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def make_config(kind: str, width: int, layers: int) -> transformers.PreTrainedConfig:
    heads = max(1, width // 64)
    if kind == "gptj":
        return transformers.GPTJConfig(
            vocab_size=VOCABULARY, n_embd=width, n_layer=layers, n_head=max(1, width // 256), rotary_dim=64, n_positions=POSITIONS
        )  # fmt: skip
    return transformers.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=width, intermediate_size=width * 8 // 3, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=heads,
    )  # fmt: skip


def make_groups(count: int, prompt: int, answer: int, answers: int, generator: torch.Generator) -> list[dict]:
    def ids(about: int) -> list[int]:
        low, high = about * 3 // 4, about * 5 // 4
        length = int(torch.randint(low, high + 1, (), generator=generator))
        return torch.randint(1, VOCABULARY, (length,), generator=generator).tolist()

    pairs = list(combinations(range(answers), 2))
    sides = {"chosen": [c for c, _ in pairs], "rejected": [r for _, r in pairs], "margin": [0.0] * len(pairs)}
    return [
        {"prefix": ids(prompt), "completions": [ids(answer) for _ in range(answers)], **sides} for _ in range(count)
    ]


def one_comparison_each(group: dict) -> list[dict]:
    """The same comparisons as groups of two sequences each, which share nothing."""
    return [
        {**group, "completions": [group["completions"][c], group["completions"][r]], "chosen": [0], "rejected": [1],
         "margin": [0.0]}
        for c, r in zip(group["chosen"], group["rejected"])
    ]  # fmt: skip


def random_rows(shapes: dict[str, torch.Tensor], device, name: str, start: int, stop: int | None) -> torch.Tensor:
    """Rows of a tensor of a random model, made on the device. Norms are ones, as in a model that trains."""
    shape = shapes[name].shape
    if name == "score.weight":
        return init_head(shape[1], 0)[start:stop].to(device)
    if len(shape) < 2:
        return torch.full(shape, float(name.endswith("weight")), device=device)[start:stop]
    return torch.randn(stop - start, *shape[1:], device=device) * shape[-1] ** -0.5


class Trainer:
    """train.py's treatment of a model and its optimizer step, without files and flags."""

    def __init__(
        self, config, weights: dict[str, torch.Tensor] | None, device, mesh, dtype: torch.dtype, *, freeze_ratio=0.7,
        lora_rank=0, backend="",
    ):  # fmt: skip
        """weights: None makes random ones on the device. backend: of torch.compile; "" does not compile."""
        self.model, self.device, self.dtype = empty_model(config), device, dtype
        use_sdpa(self.model.trunk)
        self.frozen = freeze_bottom_layers(self.model, freeze_ratio)
        add_lora(self.model, lora_rank, 2.0 * lora_rank, self.frozen)
        for block in find_blocks(self.model)[1] if backend else ():
            block.compile(dynamic=True, backend=backend)
        cast_frozen(self.model, dtype)
        shard(self.model, mesh, dtype)
        read = None if weights else partial(random_rows, dict(saved_tensors(self.model)), device)
        fill(self.model, device, False, None, read, lambda: weights)
        init_lora(self.model, 0)
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=1e-5, weight_decay=0.0)
        self.scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
        self.cache = None  # a TrunkCache

    def read(self, groups: list[dict], layout: str) -> Batch:
        batch = collate(groups, row_layout=layout, pad_id=0, row_limit=POSITIONS)
        return (self.cache.look_up(batch) if self.cache else batch).pinned(self.device)

    def step(self, micro_steps: list[list[dict]], layout: str, threaded=True, long=LONG) -> tuple[int, int, int]:
        """One optimizer step -> (pairs, tokens computed, tokens with padding).

        threaded: read batches in a thread; long: see `attention_mask`.
        """
        pairs = tokens = places = 0
        read = partial(self.read, layout=layout)
        batches = ahead(read, micro_steps) if threaded else ((groups, read(groups)) for groups in micro_steps)
        for m, (_, batch) in enumerate(batches):
            begin_micro_step(self.model, last=m == len(micro_steps) - 1)
            about = batch.segments, batch.position_ids, batch.visible, self.model.trunk.config
            mask = attention_mask(*about, self.dtype, self.device, long)
            batch = batch.to(self.device)
            skip = self.cache.over(batch) if self.cache else nullcontext()
            with skip, torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
                rewards = self.model(batch.input_ids, mask, batch.position_ids)
            chosen, rejected = batch.pair_rewards(rewards)
            loss = divergence_loss(chosen, rejected, batch.start, batch.end)
            self.scaler.scale(loss / len(micro_steps)).backward()
            pairs, tokens, places = pairs + len(chosen), tokens + batch.tokens, places + batch.input_ids.numel()
        self.scaler.unscale_(self.optimizer)
        torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return pairs, tokens, places


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llama", choices=["llama", "gptj"])
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--precision", default="fp32", choices=["fp32", "bf16", "fp16"])
    parser.add_argument("--lora_rank", type=int, default=0, help="also time shared rows with adapters of this rank")
    shape_help = "time this shape instead: tokens of a prompt, tokens of an answer, answers per prompt"
    parser.add_argument("--shape", type=int, nargs=3, metavar=("PROMPT", "ANSWER", "ANSWERS"), help=shape_help)
    parser.add_argument("--repeat", type=int, default=5)
    args = parser.parse_args()

    device, mesh, *_ = start_processes()
    dtype = DTYPES[args.precision]
    config = make_config(args.model, args.width, args.layers)
    torch.manual_seed(0)
    source = RewardModel(transformers.AutoModel.from_config(config))
    weights = dict([*source.named_parameters(), *source.named_buffers()])
    trainer, adapted = (Trainer(config, weights, device, mesh, dtype, lora_rank=rank) for rank in (0, args.lora_rank))

    print(f"{args.model}, {args.layers} layers of width {args.width}, 70 % frozen, {args.precision}, {device.type}, "
          f"{torch.get_num_threads()} threads, 4 prompts a step")  # fmt: skip
    print(f"{'':<40} {'pairs/s':>9} {'ratio':>7} {'tokens a pair':>14}")
    title = "prompt of {} tokens, answers of {}, {} of them"
    shapes = {title.format(*args.shape): args.shape} if args.shape else SHAPES
    for name, (prompt, answer, answers) in shapes.items():
        groups = make_groups(4, prompt, answer, answers, torch.Generator().manual_seed(1))
        work = {
            "shared": ([[g] for g in groups], "shared"),
            "shared, batches not read in a thread": ([[g] for g in groups], "shared", False),
            "shared, attention in one part": ([[g] for g in groups], "shared", True, math.inf),
            "separate": ([[g] for g in groups], "separate"),
            "two sequences a comparison": ([one_comparison_each(g) for g in groups], "separate"),
        }
        if args.lora_rank:
            work[f"shared, LoRA of rank {args.lora_rank}"] = work["shared"]
        if answers == 2:
            del work["two sequences a comparison"]  # equal to separate
        seconds: dict[str, list[float]] = {layout: [] for layout in work}
        counts = {}
        for turn in range(args.repeat + 1):
            for layout, arguments in work.items():
                start = time.perf_counter()
                counts[layout] = (adapted if "LoRA" in layout else trainer).step(*arguments)
                if turn:  # the first turn warms up
                    seconds[layout].append(time.perf_counter() - start)
        print(name)
        best = statistics.median(seconds["shared"])
        for layout, (pairs, tokens, _) in counts.items():
            median = statistics.median(seconds[layout])
            print(f"  {layout:<38} {pairs / median:>9.2f} {median / best:>6.2f}x {tokens / pairs:>14.0f}")
    if device.type == "cuda":
        print(f"peak memory {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB on {torch.cuda.get_device_name()}")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
