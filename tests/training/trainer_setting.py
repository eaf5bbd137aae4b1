"""What scenarios of transformers' Trainer, and of the trainers made from it, share."""

from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from training.setting import END, PADDING, VOCABULARY, Setting, batch

STEPS = 4
HISTORY = ("loss", "grad_norm", "eval_loss", "rewards/margins")


def arguments(setting: Setting, **more: Any) -> dict[str, Any]:
    """What all of transformers' trainers are told.

    By Adam's own epsilon a gradient that is nothing but rounding moves its weight by a whole step, to either side.
    """
    return {
        "output_dir": str(setting.folder), "max_steps": STEPS, "per_device_train_batch_size": 2, "learning_rate": 1e-2,
        "adam_epsilon": 1e-4, "logging_steps": 1, "logging_first_step": True, "report_to": [], "save_strategy": "no",
        "use_cpu": setting.device == "cpu", "bf16": False, "disable_tqdm": True, "gradient_checkpointing": False,
        **more,
    }  # fmt: skip


def run(trainer: Any) -> list[float]:
    """Train, and what the trainer logged."""
    trainer.train()
    return [float(row[name]) for row in trainer.state.log_history for name in HISTORY if name in row]


def tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {"<pad>": PADDING, "<eos>": END, "<unk>": 2} | {f"w{token}": token for token in range(3, VOCABULARY)}
    plain = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    plain.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=plain, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


class Rows(torch.utils.data.Dataset):
    """Tokenised rows."""

    def __init__(self) -> None:
        self.rows = [{name: value[0] for name, value in batch(number, 1).items()} for number in range(8 * STEPS)]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> dict[str, Tensor]:
        return self.rows[number]
