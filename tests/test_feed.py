"""The batches of the loop: `python -m pytest tests/test_feed.py`."""

from types import SimpleNamespace

import pytest
import torch
from conftest import make_comparisons, make_tokenizer, write_jsonl

from minirm.data.prepare import prepare
from minirm.feed import Feed


@pytest.mark.parametrize("accumulation, tokens", [(1, 0), (2, 0), (2, 150)])
def test_the_sample_has_the_first_batches_that_the_first_rank_trains_on(tmp_path, accumulation, tokens):
    """7 prompts on 2 ranks. With 2 micro-steps, the last one of the second step has a group for the second rank only."""
    tokenizer = make_tokenizer(pad="<|pad|>")
    rows, held_out = make_comparisons(7), make_comparisons(1, seed=1)
    paths = [str(write_jsonl(tmp_path / f"{name}.jsonl", part)) for name, part in (("a", rows), ("b", held_out))]
    inputs = SimpleNamespace(data=prepare(tokenizer, paths[:1], paths[1:]), tokenizer=tokenizer, layout="shared")
    args = SimpleNamespace(
        per_device_train_batch_size=1, gradient_accumulation_steps=accumulation, micro_batch_tokens=tokens, seed=0,
        max_length=550, loss="divergence", pair_weight="pair",
    )  # fmt: skip
    processes = SimpleNamespace(world_size=2, rank=0, device=torch.device("cpu"))
    steps = -(-7 // (2 * accumulation))
    feed = Feed(args, inputs, processes, steps)
    trained = [batch for _, _, batches in feed.train(0, steps) for batch in batches]
    wanted, sample = [batch for batch in trained if len(batch.chosen)], feed.sample()
    assert len(wanted) < len(trained) or (accumulation, tokens) != (2, 0)
    assert len(sample) == len(wanted) > 1
    assert all(torch.equal(a.input_ids, b.input_ids) for a, b in zip(sample, wanted))
