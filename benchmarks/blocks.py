"""The allocator's blocks at the moment when most bytes are live, and what they are: plain data in, plain data out.

A block is told by its size, or by its address if it was live before the step.  Sizes that two classes share get both
names: at 4096 tokens of llama-8b a hidden state is as large as q_proj's weight.  Choose a length that tells them apart.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

ROUNDING_BYTES = 512  # the allocator's; of blocks from before the step only the rounded size may be known
FREES = ("free_requested", "free_completed")
OTHER = "other"
Event = Mapping[str, Any]  # one of a device's traces in torch.cuda.memory._snapshot()
Sizes = dict[str, set[int]]  # class: how many bytes one of its blocks may have


@dataclass(frozen=True)
class Block:
    size_bytes: int
    kind: str | None = None  # what it is, if that is known from before the step


def replay(before: Mapping[int, Block], events: Sequence[Event]) -> tuple[int, list[Block]]:
    """How many events had happened when most bytes were live, and the blocks that were.

    before: by address, what was live when the recording began.
    """
    sizes, live = [_total(before)], dict(before)
    for event in events:
        sizes.append(sizes[-1] + _apply(event, live))
    at = sizes.index(max(sizes))
    live = dict(before)
    for event in events[:at]:
        _apply(event, live)
    return at, list(live.values())


def _apply(event: Event, live: dict[int, Block]) -> int:
    """By how many bytes an event changes what is live.

    A block is live until it is asked to be freed, as in torch.cuda.max_memory_allocated.  free_completed comes later
    if another stream still uses the block, and then finds nothing.
    """
    if event["action"] == "alloc":
        live[event["addr"]] = Block(event["size"])
        return event["size"]
    if event["action"] in FREES and event["addr"] in live:
        return -live.pop(event["addr"]).size_bytes
    return 0


def classify(block: Block, sizes: Sizes) -> str:
    if block.kind:
        return block.kind
    names = [name for name, of in sizes.items() if any(0 <= block.size_bytes - size < ROUNDING_BYTES for size in of)]
    return " or ".join(names) or OTHER


def sizes_of(shape: Mapping[str, Any], batch: int, length: int, *, nf4: bool, rank: int) -> Sizes:
    """What the tensors of a step are as large as, in 16 and in 32 bits.

    shape: the model configuration's arguments.  De-quantised weights exist only if the base is in 4 bits.
    """
    hidden, inner = shape["hidden_size"], shape["intermediate_size"]
    head = shape.get("head_dim") or hidden // shape["num_attention_heads"]
    queries, keys = head * shape["num_attention_heads"], head * shape["num_key_value_heads"]
    widths = {
        "logits": {shape["vocab_size"]},
        "hidden states": {hidden},
        "queries": {queries} - {hidden},
        "keys or values": {keys} - {queries, hidden},
        "MLP activations": {inner},
        "LoRA activations": {rank},
    }
    tokens = {batch * length, batch * (length - 1)}  # a loss may cut the last position off
    sizes = {name: {n * width * bits for n in tokens for width in of for bits in (2, 4)} for name, of in widths.items()}
    sizes["weights in 16 bits"] = {2 * hidden * out for out in (queries, keys, inner)} if nf4 else set()
    return sizes


def summarise(blocks: Sequence[Block], sizes: Sizes) -> list[dict[str, Any]]:
    """A row for each class, the largest first."""
    groups: dict[str, list[int]] = {}
    for block in blocks:
        groups.setdefault(classify(block, sizes), []).append(block.size_bytes)
    rows = [{"class": name, "blocks": len(group), "bytes": sum(group)} for name, group in groups.items()]
    return sorted(rows, key=lambda row: -row["bytes"])


def largest_other(blocks: Sequence[Block], sizes: Sizes, count: int = 10) -> list[dict[str, int]]:
    """The sizes that nothing was found for, those first that hold most together."""
    found: dict[int, int] = {}
    for block in blocks:
        if classify(block, sizes) == OTHER:
            found[block.size_bytes] = found.get(block.size_bytes, 0) + 1
    order = sorted(found.items(), key=lambda item: -item[0] * item[1])
    return [{"bytes": size, "blocks": blocks} for size, blocks in order[:count]]


def _total(live: Mapping[int, Block]) -> int:
    return sum(block.size_bytes for block in live.values())
