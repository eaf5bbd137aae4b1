"""Training data: text packed into blocks, or rows of which only the answer is learnt.

An example is a pair (token ids, labels); the loss ignores a label of -100.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from fastft.errors import UserError
from fastft.models import go_offline_if_unreachable

IGNORED = -100
FORMATS = '"text", "prompt" and "completion", or "messages"'

Example = tuple[list[int], list[int]]
Marked = tuple[str, list[tuple[int, int]]]  # a text, and the spans of its characters that are learnt


def python_reference() -> str:
    """Return the Python language reference, which the standard library carries for ``help()``."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))


def load(name: str | None, tokenizer: Any, *, seq_len: int, batch_size: int) -> list[Example]:
    """Load the examples of a text file, a .jsonl file or a dataset; of the Python reference if no name is given."""
    if name is None:
        examples = pack(python_reference(), tokenizer, seq_len)
    elif Path(name).is_file() and Path(name).suffix not in (".jsonl", ".json"):
        examples = pack(_read(name), tokenizer, seq_len)
    else:
        rows = _jsonl_rows(name) if Path(name).is_file() else _dataset_rows(name)
        examples = [example for where, row in rows if (example := _row_example(row, where, tokenizer, seq_len))]
    if len(examples) < batch_size:
        raise UserError(
            f"{name or 'The Python reference'} gives {len(examples)} examples of up to {seq_len} tokens, too few for a "
            f"batch of {batch_size}; pass more data, or a smaller --batch-size or --seq-len."
        )
    return examples


def pack(text: str, tokenizer: Any, seq_len: int) -> list[Example]:
    """Split text into blocks of exactly ``seq_len`` tokens; what is left at the end is dropped."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    starts = range(0, len(ids) - seq_len + 1, seq_len)
    return [(ids[start : start + seq_len], ids[start : start + seq_len]) for start in starts]


def batches(examples: list[Example], *, batch_size: int, pad_id: int, seed: int) -> Iterator[dict[str, Any]]:
    """Yield endless batches, reshuffled each epoch; a ragged last batch is dropped, so the batch size is fixed."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(len(examples), generator=generator).tolist()
        for start in range(0, len(order) - batch_size + 1, batch_size):
            yield collate([examples[number] for number in order[start : start + batch_size]], pad_id)


def collate(examples: list[Example], pad_id: int) -> dict[str, Any]:
    """Build one batch, padded on the right to its longest example."""
    import torch

    longest = max(len(ids) for ids, _ in examples)

    def padded(sequences: Iterable[list[int]], filler: int) -> torch.Tensor:
        return torch.tensor([sequence + [filler] * (longest - len(sequence)) for sequence in sequences])

    return {
        "input_ids": padded((ids for ids, _ in examples), pad_id),
        "attention_mask": padded(([1] * len(ids) for ids, _ in examples), 0),
        "labels": padded((labels for _, labels in examples), IGNORED),
    }


def same_length(examples: list[Example]) -> bool:
    """Return whether every batch will have the same shape."""
    return len({len(ids) for ids, _ in examples}) == 1


def _read(name: str) -> str:
    try:
        return Path(name).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{name} is not UTF-8 text (byte {error.start}); convert it first.") from error


def _jsonl_rows(name: str) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(_read(name).split("\n"), start=1):  # splitlines() would also split at U+2028
        if line.strip():
            where = f"{name} line {number}"
            try:
                yield where, json.loads(line)
            except json.JSONDecodeError as error:
                raise UserError(f"{where} is not JSON ({error.msg}); write one object a line.") from error


def _dataset_rows(name: str) -> Iterator[tuple[str, Any]]:
    """Yield the rows of a dataset's train split; a name may include its configuration, as in ``name:config``."""
    if not Path(name).exists() and (
        Path(name).suffix in (".txt", ".jsonl", ".json", ".md") or name.startswith(("/", "."))
    ):
        raise UserError(f"There is no file {name}; check the path given to --data.")
    go_offline_if_unreachable()
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise UserError("Reading a dataset by name needs datasets; run `pip install datasets`.") from error
    path, _, configuration = name.partition(":")
    try:
        rows = load_dataset(path, configuration or None, split="train")
    except Exception as error:  # datasets raises a different class for each thing that can be wrong
        reason = str(error).strip().split("\n")[0].rstrip(".")
        if isinstance(error, ConnectionError):
            reason = "the hub cannot be reached and the local cache does not hold it"
        raise UserError(f"Cannot load the data {name}: {reason}; pass a file, or check the name.") from error
    for number, row in enumerate(rows):
        yield f"{name} row {number}", row


def _row_example(row: Any, where: str, tokenizer: Any, seq_len: int) -> Example | None:
    """Turn a row into an example, or None if nothing of it is left to learn within ``seq_len`` tokens."""
    (text, spans), special = _marked(row, where, tokenizer)
    encoded = tokenizer(text, add_special_tokens=special, return_offsets_mapping=True)
    ids = encoded["input_ids"][:seq_len]
    labels = [
        token if any(first < end <= last for first, last in spans) else IGNORED  # a token may begin in the prompt
        for token, (_, end) in zip(ids, encoded["offset_mapping"], strict=False)
    ]
    learnt = any(label != IGNORED for label in labels[1:])  # nothing predicts the first token
    return (ids, labels) if learnt else None


def _marked(row: Any, where: str, tokenizer: Any) -> tuple[Marked, bool]:
    """Return a row's text with its learnt spans, and whether the tokenizer still has to add its special tokens."""
    end = tokenizer.eos_token or ""
    if isinstance(row, dict) and isinstance(row.get("text"), str):
        return (row["text"] + end, [(0, len(row["text"] + end))]), True
    if isinstance(row, dict) and isinstance(row.get("prompt"), str) and isinstance(row.get("completion"), str):
        text = row["prompt"] + row["completion"] + end
        return (text, [(len(row["prompt"]), len(text))]), True
    if isinstance(row, dict) and _is_messages(row.get("messages")):
        render = _template if tokenizer.chat_template else _plain_chat
        return _marked_chat(row["messages"], tokenizer, render), not tokenizer.chat_template
    fields = ", ".join(map(repr, row)) if isinstance(row, dict) else type(row).__name__
    raise UserError(f"{where} has {fields}; a row needs {FORMATS}, as text.")


def _is_messages(messages: Any) -> bool:
    return isinstance(messages, list) and all(
        isinstance(turn, dict) and isinstance(turn.get("role"), str) and isinstance(turn.get("content"), str)
        for turn in messages
    )


def _marked_chat(messages: list[dict[str, str]], tokenizer: Any, render: Any) -> Marked:
    """Mark what the assistant says, from the end of the prompt before it to the end of its turn.

    A template may write an earlier turn differently once more turns follow, hence the common prefixes.
    """
    text = render(messages, tokenizer, False)
    spans = []
    for number, turn in enumerate(messages):
        if turn["role"] == "assistant":
            before = _shared(text, render(messages[:number], tokenizer, True))
            after = _shared(text, render(messages[: number + 1], tokenizer, False))
            spans.append((before, after))
    return text, spans


def _shared(text: str, other: str) -> int:
    """Count the characters that two texts have in common at their start."""
    differing = (number for number, (a, b) in enumerate(zip(text, other, strict=False)) if a != b)
    return next(differing, min(len(text), len(other)))


def _template(messages: list[dict[str, str]], tokenizer: Any, prompt: bool) -> str:
    if not messages:
        return ""
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)


def _plain_chat(messages: list[dict[str, str]], tokenizer: Any, prompt: bool) -> str:
    """Write ``User: ...`` and ``Assistant: ...``, for tokenizers without a chat template."""
    turns = [
        f"{turn['role'].capitalize()}: {turn['content']}{tokenizer.eos_token if turn['role'] == 'assistant' else ''}"
        for turn in messages
    ]
    return "\n".join(turns + ["Assistant: "] * prompt)
