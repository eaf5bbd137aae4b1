"""TRL's trainers on a model whose head is most of it: equal to what they are without fastft, and never all logits.

    cd tests && python -m training.preference [NAME ...]     # the table of all, or of some

Each trains with plain SGD, so that what the parameters moved by tells of their gradients.  Generation, where there is
any, is transformers' own on the CPU.  The vocabulary is so much larger than everything else that a tensor of all tokens
by all classes is more than twice as large as any other; in the last step every allocation is noted.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from torch.profiler import ProfilerActivity, profile
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
    TrainerCallback,
)
from trl import (
    DistillationConfig,
    DistillationTrainer,
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    KTOConfig,
    KTOTrainer,
    RewardConfig,
    RewardTrainer,
    RLOOConfig,
    RLOOTrainer,
    SFTConfig,
    SFTTrainer,
)
from trl.experimental.gkd import GKDConfig, GKDTrainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer

from training.outcome import Outcome, outcome
from training.setting import END, FEW, PADDING, Setting, adapter, trained

STEPS, ROWS = 2, 4
PROMPT, ANSWER = 8, 16  # tokens
VOCABULARY, WIDTH = 8192, 32
LOGITS = ROWS * ANSWER * VOCABULARY * 4  # bytes of the fewest logits that are all of a batch's
MUCH = LOGITS * 3 // 4  # what no tensor of a step may take; the embedding's weights take half of LOGITS
OPTIONS = {"lower": "eager", "strict": True, "logits_memory": LOGITS // 8}
HISTORY = ("loss", "grad_norm")
TILES = {  # of TRL's own heads: for as small a part of the classes as theirs are of a real model's
    "trl.trainer.utils._CHUNKED_LOGPROB_CHUNK_SIZE": VOCABULARY // 8,
    "trl.kernels.chunked_divergence.VOCAB_CHUNK_SIZE": VOCABULARY // 8,
}
Make = Callable[[Setting], Any]


@dataclass(frozen=True)
class Memory:
    """Of a training step: the bytes of its largest allocation, and how many more were allocated than at its start."""

    largest: int
    peak: int


class Watch(TrainerCallback):
    """Notes every allocation of the last step, those of compiled code and of autograd among them."""

    memory: Memory

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == STEPS - 1:
            self.profile = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
            self.profile.__enter__()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == STEPS:
            self.profile.__exit__(None, None, None)
            self.memory = memory_of(self.profile)


def memory_of(profiled: Any) -> Memory:
    allocations = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    sizes = [event.nbytes() for event in sorted(allocations, key=lambda event: event.start_ns())]
    held = peak = 0
    for size in sizes:
        held += size
        peak = max(peak, held)
    return Memory(max(sizes), peak)


class Scenario:
    """Trains with a trainer; what is seen are its losses, and what every trained parameter moved by, along a line.

    One is added to losses: RLOO's is nothing but rounding, as what a group's answers gain sums to zero.
    memory: of each run.
    """

    def __init__(self, make: Make) -> None:
        self.make, self.__name__, self.__doc__ = make, make.__name__, make.__doc__
        self.memory: list[Memory] = []

    def __call__(self, setting: Setting) -> list[float]:
        setting.options = OPTIONS
        watch = Watch()
        made = self.make(setting)
        made.add_callback(watch)
        before = [one.detach().clone() for one in trained(made.model)]
        setting.compile_in_place(made.model)
        if isinstance(getattr(made, "teacher_model", None), nn.Module):
            setting.compile_in_place(made.teacher_model)
        with contextlib.ExitStack() as tiles:
            for name, size in TILES.items():
                tiles.enter_context(mock.patch(name, size))
            made.train()
        self.memory.append(watch.memory)
        seen = [float(row[name]) + 1 for row in made.state.log_history for name in HISTORY if name in row]
        generator = torch.Generator().manual_seed(0)
        for old, new in zip(before, trained(made.model), strict=True):
            line = torch.randn(old.shape, generator=generator)
            moved = new.detach().cpu() - old.cpu()
            seen.append(float((moved * line).sum() / line.norm()))
        return seen


def policy(setting: Setting, kind: type = LlamaForCausalLM, **more: Any) -> Any:
    """Two layers below a head of 8,192 classes, without adapters."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=WIDTH, intermediate_size=2 * WIDTH, num_attention_heads=2, num_key_value_heads=1,
        num_hidden_layers=2, vocab_size=VOCABULARY, max_position_embeddings=256, initializer_range=0.2,
        pad_token_id=PADDING, eos_token_id=END, bos_token_id=END, **more,
    )  # fmt: skip
    return setting.nudged(kind(config))


def tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {"<pad>": PADDING, "<eos>": END, "<unk>": 2} | {f"w{token}": token for token in range(3, VOCABULARY)}
    plain = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    plain.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=plain, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", padding_side="left"
    )


def texts(length: int, seed: int, beginning: str = "") -> list[str]:
    """Of so many words each; the last word of an answer is left out, for the end that trainers add."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(3, VOCABULARY, (ROWS * STEPS, length), generator=generator).tolist()
    return [beginning + " ".join(f"w{token}" for token in row) for row in drawn]


def columns(*answers: str) -> Dataset:
    """Prompts, and these columns of answers."""
    rows = {name: texts(ANSWER - 1, number + 1, " ") for number, name in enumerate(answers)}
    return Dataset.from_dict({"prompt": texts(PROMPT, 0), **rows})


def settings(setting: Setting, **more: Any) -> dict[str, Any]:
    """What every trainer's configuration is told."""
    return {
        "output_dir": str(setting.folder), "max_steps": STEPS, "per_device_train_batch_size": ROWS,
        "learning_rate": 0.5, "optim": "sgd", "lr_scheduler_type": "constant", "logging_steps": 1, "report_to": [],
        "save_strategy": "no", "use_cpu": setting.device == "cpu", "bf16": False, "disable_tqdm": True,
        "gradient_checkpointing": False, **more,
    }  # fmt: skip


def shared(setting: Setting, **more: Any) -> dict[str, Any]:
    """What every trainer of a policy is given."""
    return {
        "model": policy(setting),
        "processing_class": tokenizer(),
        "peft_config": adapter(target_modules=FEW),
        **more,
    }


def sft(setting: Setting) -> Any:
    """TRL `SFTTrainer`"""
    config = SFTConfig(**settings(setting))
    return SFTTrainer(args=config, train_dataset=columns("completion"), **shared(setting))


def dpo(setting: Setting) -> Any:
    """TRL `DPOTrainer`, the reference without its adapter"""
    config = DPOConfig(**settings(setting, beta=0.5))
    return DPOTrainer(args=config, train_dataset=columns("chosen", "rejected"), **shared(setting))


def kto(setting: Setting) -> Any:
    """TRL `KTOTrainer`"""
    data = columns("completion").add_column("label", [True, False] * (ROWS * STEPS // 2))
    return KTOTrainer(args=KTOConfig(**settings(setting, beta=0.5)), train_dataset=data, **shared(setting))


def orpo(setting: Setting) -> Any:
    """TRL `ORPOTrainer` (experimental)"""
    config = ORPOConfig(**settings(setting, max_length=64))
    return ORPOTrainer(args=config, train_dataset=columns("chosen", "rejected"), **shared(setting))


def reward(setting: Setting) -> Any:
    """TRL `RewardTrainer`"""
    given = shared(setting, model=policy(setting, LlamaForSequenceClassification, num_labels=1))
    given["peft_config"].task_type = "SEQ_CLS"
    return RewardTrainer(args=RewardConfig(**settings(setting)), train_dataset=columns("chosen", "rejected"), **given)


def score(completion_ids: Sequence[Sequence[int]], **_: Any) -> list[float]:
    """A reward of the tokens themselves."""
    return [sum(ids) % 11 / 10 for ids in completion_ids]


def grpo(setting: Setting) -> Any:
    """TRL `GRPOTrainer`, generation and reference included"""
    config = GRPOConfig(**settings(setting, beta=0.5, num_generations=ROWS, max_completion_length=ANSWER))
    return GRPOTrainer(args=config, train_dataset=columns(), reward_funcs=score, **shared(setting))


def rloo(setting: Setting) -> Any:
    """TRL `RLOOTrainer`, generation and reference included"""
    config = RLOOConfig(**settings(setting, beta=0.5, num_generations=ROWS, max_completion_length=ANSWER))
    return RLOOTrainer(args=config, train_dataset=columns(), reward_funcs=score, **shared(setting))


def teacher(setting: Setting) -> Any:
    """The policy's shape, other weights."""
    made = policy(setting)
    with torch.no_grad():
        made.model.embed_tokens.weight.mul_(1.5)
    return made


def distillation(setting: Setting) -> Any:
    """TRL `DistillationTrainer`, generation included"""
    config = DistillationConfig(**settings(setting, max_completion_length=ANSWER))
    return DistillationTrainer(args=config, train_dataset=columns(), teacher_model=teacher(setting), **shared(setting))


def gkd(setting: Setting) -> Any:
    """TRL `GKDTrainer` (experimental), on the dataset's answers; the teacher compiled too"""

    def collate(rows: Any) -> dict[str, torch.Tensor]:
        ids = torch.tensor([row["ids"] for row in rows])
        labels = ids.clone()
        labels[:, :PROMPT] = -100
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}

    drawn = torch.randint(3, VOCABULARY, (ROWS * STEPS, PROMPT + ANSWER), generator=torch.Generator().manual_seed(0))
    return GKDTrainer(
        args=GKDConfig(**settings(setting, lmbda=0.0)), train_dataset=Dataset.from_dict({"ids": drawn.tolist()}),
        teacher_model=teacher(setting), data_collator=collate, **shared(setting),
    )  # fmt: skip


PREFERENCE = tuple(Scenario(make) for make in (sft, dpo, kto, orpo, reward, grpo, rloo, distillation, gkd))


def main(names: Sequence[str]) -> None:
    """Print a row for each scenario, or for those named; how large a tensor is, is told as a share of all logits."""
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    form = "{:<14}{:>11}{:>10}{:>8}{:>8}{:>14}{:>8}{:>12}{:>8}  {}"
    heads = ("graphs", "breaks", "largest/plain", "", "peak/plain", "MiB", "ops; lines that read all logits")
    print(form.format("trainer", "difference", "allowed", *heads))
    for scenario in PREFERENCE:
        if names and scenario.__name__ not in names:
            continue
        scenario.memory.clear()
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
            found, breaks = seen_whole(scenario)
        ours, plain = scenario.memory[:2]
        ops = ", ".join(f"{times} {name}" for name, times in found.lifted.items())
        read = sorted({short(line) for graph in found.graphs for line in graph.reads})
        print(
            form.format(
                scenario.__name__, f"{found.difference:.1e}", f"{found.allowed:.1e}", len(found.graphs), breaks,
                f"{ours.largest / LOGITS:.2f}", f"{plain.largest / LOGITS:.2f}", f"{ours.peak / 2**20:.1f}",
                f"{plain.peak / 2**20:.1f}", "; ".join([ops, *read]),
            ),
            flush=True,
        )  # fmt: skip


def seen_whole(scenario: Scenario) -> tuple[Outcome, int]:
    """The outcome, and how often Dynamo broke a graph on the way."""
    counters = torch._dynamo.utils.counters["graph_break"]
    counters.clear()
    found = outcome(scenario)
    return found, sum(counters.values())


def short(line: str) -> str:
    """The file's name and the line's number."""
    return line.rpartition("/")[2]


if __name__ == "__main__":
    main(sys.argv[1:])
