"""Every format of training data, and which tokens of it are learnt."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from fastft import data
from fastft.presets import byte_tokenizer

QUESTION = [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]
TURNS = [*QUESTION, {"role": "user", "content": "sure?"}, {"role": "assistant", "content": "yes"}]
TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return byte_tokenizer()


def rows(folder: Path, tokenizer: Any, *found: dict[str, Any], seq_len: int = 256) -> list[data.Example]:
    path = folder / "rows.jsonl"
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in found), encoding="utf-8")
    return data.load(str(path), tokenizer, seq_len=seq_len, batch_size=1)


def learnt(tokenizer: Any, example: data.Example) -> str:
    return tokenizer.decode([label for label in example[1] if label != data.IGNORED])


def test_tokenizer_round_trip(tokenizer: Any, tmp_path: Path) -> None:
    text = "  def f(x):\n\treturn 'ÄÖ 漢字 🙂'  # <|x|>\r\n"
    ids = tokenizer(text)["input_ids"]
    assert len(ids) == len(text.encode())
    assert tokenizer.decode(ids) == text
    tokenizer.save_pretrained(tmp_path)
    from transformers import AutoTokenizer

    again = AutoTokenizer.from_pretrained(tmp_path)
    assert again(text)["input_ids"] == ids
    assert again.decode(ids) == text
    assert again("</s>")["input_ids"] == [again.eos_token_id]
    assert (again.pad_token_id, again.bos_token_id, again.eos_token_id) == (0, 1, 2)


def test_text_is_packed_without_gaps(tokenizer: Any, tmp_path: Path) -> None:
    text = "".join(f"line {number}: é\n" for number in range(40))
    (tmp_path / "book.txt").write_text(text, encoding="utf-8")
    examples = data.load(str(tmp_path / "book.txt"), tokenizer, seq_len=32, batch_size=4)
    ids = [token for block, _ in examples for token in block]
    assert ids == tokenizer(text)["input_ids"][: len(ids)]
    assert len(examples) == len(text.encode()) // 32
    assert all(block == labels for block, labels in examples)
    assert data.same_length(examples)


def test_default_is_the_python_reference(tokenizer: Any) -> None:
    assert "for_stmt" in data.python_reference()
    assert len(data.load(None, tokenizer, seq_len=256, batch_size=8)) > 1000


def test_text_rows(tokenizer: Any, tmp_path: Path) -> None:
    examples = rows(tmp_path, tokenizer, {"text": "one"}, {"text": "zwölf\u2028!"})
    assert [learnt(tokenizer, example) for example in examples] == ["one</s>", "zwölf\u2028!</s>"]


def test_only_the_completion_is_learnt(tokenizer: Any, tmp_path: Path) -> None:
    (example,) = rows(tmp_path, tokenizer, {"prompt": "Capital of Österreich? ", "completion": "Wien"})
    assert tokenizer.decode(example[0]) == "Capital of Österreich? Wien</s>"
    assert learnt(tokenizer, example) == "Wien</s>"


def test_only_the_assistant_is_learnt(tokenizer: Any, tmp_path: Path) -> None:
    (example,) = rows(tmp_path, tokenizer, {"messages": TURNS})
    plain = "User: 2+2?\nAssistant: 4</s>\nUser: sure?\nAssistant: yes</s>"
    assert tokenizer.decode(example[0]) == plain
    assert learnt(tokenizer, example) == "4</s>yes</s>"


def test_chat_template(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    (example,) = rows(tmp_path, tokenizer, {"messages": TURNS})
    assert tokenizer.decode(example[0]).startswith("<|user|>2+2?<|end|><|assistant|>4<|end|>")
    assert learnt(tokenizer, example) == "4<|end|>yes<|end|>"


def test_long_rows_are_cut_and_rows_without_an_answer_left_out(tokenizer: Any, tmp_path: Path) -> None:
    kept, lost = {"prompt": "a", "completion": "b" * 50}, {"prompt": "a" * 50, "completion": "b"}
    (example,) = rows(tmp_path, tokenizer, lost, kept, {"text": ""}, seq_len=10)
    assert learnt(tokenizer, example) == "b" * 9


def test_batches_are_padded_and_masked(tokenizer: Any, tmp_path: Path) -> None:
    examples = rows(tmp_path, tokenizer, {"text": "a"}, {"text": "bcd"})
    batch = data.collate(examples, tokenizer.pad_token_id)
    assert batch["input_ids"].shape == (2, 4)
    assert batch["attention_mask"].tolist() == [[1, 1, 0, 0], [1, 1, 1, 1]]
    assert batch["labels"][0].tolist()[2:] == [data.IGNORED, data.IGNORED]
    assert batch["input_ids"][0].tolist()[2:] == [tokenizer.pad_token_id] * 2
    assert not data.same_length(examples)


def test_batches_are_the_same_for_one_seed_and_shuffled_anew_each_time_round() -> None:
    examples: list[data.Example] = [([number], [number]) for number in range(10)]

    def order(seed: int) -> list[list[int]]:
        found = data.batches(examples, batch_size=4, pad_id=0, seed=seed)
        return [batch["input_ids"].flatten().tolist() for batch in islice(found, 4)]

    assert order(0) == order(0) != order(1)
    first, second = order(0)[:2], order(0)[2:]
    assert first != second
    assert len({number for batch in first for number in batch}) == 8  # none repeated, the ragged rest dropped


def test_dataset(tokenizer: Any, tmp_path: Path) -> None:
    folder = tmp_path / "my-dataset"
    folder.mkdir()
    (folder / "train.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    examples = data.load(str(folder), tokenizer, seq_len=16, batch_size=2)
    assert [learnt(tokenizer, example) for example in examples] == ["one</s>", "two</s>"]
