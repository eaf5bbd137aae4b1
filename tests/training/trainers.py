"""Trainers of other projects, as their documentation uses them; the model is compiled before it is handed over."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from datasets import Dataset
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from training.habits import HABITS
from training.setting import FEW, VOCABULARY, Setting, adapter, base, trained
from training.trainer_setting import STEPS, Rows, arguments, run, tokenizer


def words(count: int = 2 * STEPS * 4, least: int = 5, most: int = 20, seed: int = 0) -> list[str]:
    """Texts of words that the tokenizer knows."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(least, most, (count,), generator=generator).tolist()
    return [
        " ".join(f"w{token}" for token in torch.randint(3, VOCABULARY, (length,), generator=generator).tolist())
        for length in lengths
    ]


def trainer(setting: Setting) -> list[float]:
    """transformers `Trainer`"""
    model = setting.compile_in_place(setting.model())
    return run(Trainer(model, TrainingArguments(**arguments(setting)), train_dataset=Rows()))


def trainer_of_wrapped(setting: Setting) -> list[float]:
    """transformers `Trainer` given `torch.compile(model)`; gradient accumulation, clipping, evaluation"""
    model = setting.compile(setting.model())
    more = {"gradient_accumulation_steps": 2, "eval_strategy": "steps", "eval_steps": 2, "max_grad_norm": 0.1}
    unasked = {"remove_unused_columns": False, "label_names": ["labels"]}  # Trainer would ask torch.compile's wrapper
    settings = TrainingArguments(**arguments(setting, **more, **unasked))
    return run(Trainer(model, settings, train_dataset=Rows(), eval_dataset=Rows()))


def trainer_bf16(setting: Setting) -> list[float]:
    """transformers `Trainer(bf16=True)`, 4-bit weights"""
    model = setting.compile_in_place(setting.model(nf4=True, rounded=torch.bfloat16))
    return run(Trainer(model, TrainingArguments(**arguments(setting, bf16=True)), train_dataset=Rows()))


def trainer_checkpointed(setting: Setting) -> list[float]:
    """transformers `Trainer(gradient_checkpointing=True)`"""
    model = setting.compile_in_place(setting.model(lora=["q_proj"]))
    settings = TrainingArguments(**arguments(setting, gradient_checkpointing=True))
    return run(Trainer(model, settings, train_dataset=Rows()))


def trainer_resumed(setting: Setting) -> list[float]:
    """transformers `Trainer` that saves and resumes"""
    more = {"save_strategy": "steps", "save_steps": 2}
    seen = []
    for resume in (False, str(setting.folder / "checkpoint-2")):
        model = setting.compile_in_place(setting.model())
        made = Trainer(model, TrainingArguments(**arguments(setting, **more)), train_dataset=Rows())
        made.train(resume_from_checkpoint=resume)
        seen += [float(row["loss"]) for row in made.state.log_history if "loss" in row]
    return seen


def sft(setting: Setting, model: Any = None, **more: Any) -> list[float]:
    config = SFTConfig(**arguments(setting, **more))
    made = SFTTrainer(
        model or setting.nudged(base()), config, train_dataset=Dataset.from_dict({"text": words()}),
        processing_class=tokenizer(), peft_config=adapter(target_modules=FEW),
    )  # fmt: skip
    setting.compile_in_place(made.model)
    return run(made)


def sft_padded(setting: Setting) -> list[float]:
    """TRL `SFTTrainer`, padded"""
    return sft(setting, max_length=32, pad_to_multiple_of=32)


def sft_packed(setting: Setting) -> list[float]:
    """TRL `SFTTrainer(packing=True)`"""
    return sft(setting, packing=True, max_length=32)


def sft_padding_free(setting: Setting) -> list[float]:
    """TRL `SFTTrainer(padding_free=True)`"""
    return sft(setting, padding_free=True, max_length=None)


def dpo_padded(setting: Setting) -> list[float]:
    """TRL `DPOTrainer`, the reference without its adapter"""
    rows = {"prompt": words(16, 4, 8), "chosen": words(16, seed=1), "rejected": words(16, seed=2)}
    made = DPOTrainer(
        setting.nudged(base()), args=DPOConfig(**arguments(setting, beta=0.5, pad_to_multiple_of=32)),
        train_dataset=Dataset.from_dict(rows), processing_class=tokenizer(), peft_config=adapter(target_modules=FEW),
    )  # fmt: skip
    setting.compile_in_place(made.model)
    return run(made)


def with_accelerate(setting: Setting) -> list[float]:
    """An `accelerate` loop: `prepare`, `accumulate`, `clip_grad_norm_`"""
    accelerator = Accelerator(gradient_accumulation_steps=2, cpu=setting.device == "cpu")
    model = setting.compile(setting.model())
    optimizer = torch.optim.AdamW(trained(model), lr=1e-2)
    model, optimizer, loader = accelerator.prepare(model, optimizer, DataLoader(Rows(), batch_size=2))
    seen = []
    for _, each in zip(range(2 * STEPS), loader, strict=False):
        with accelerator.accumulate(model):
            loss = model(**each).loss
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                seen.append(float(accelerator.clip_grad_norm_(model.parameters(), 0.1)))
            optimizer.step()
            optimizer.zero_grad()
        seen.append(loss.item())
    return seen


def with_lightning(setting: Setting) -> list[float]:
    """Lightning `Trainer`, the model compiled in its module"""
    return _lightning(setting, setting.compile, lambda module: module)


def with_lightning_whole(setting: Setting) -> list[float]:
    """Lightning `Trainer` given `torch.compile(module)`"""
    return _lightning(setting, lambda model: model, setting.compile)


def _lightning(setting: Setting, inside: Callable[[Any], Any], outside: Callable[[Any], Any]) -> list[float]:
    """inside, outside: what is done to the model and to the module that has it."""
    import lightning

    seen = []

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = inside(setting.model())

        def training_step(self, each: dict[str, Tensor], number: int) -> Tensor:
            return self.model(**each).loss

        def on_train_batch_end(self, outputs: Any, *_: Any) -> None:
            seen.append(outputs["loss"].item())

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(trained(self), lr=1e-2)

    made = lightning.Trainer(
        accelerator="cpu" if setting.device == "cpu" else "gpu", devices=1, max_steps=STEPS, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, gradient_clip_val=0.1,
        default_root_dir=setting.folder,
    )  # fmt: skip
    made.fit(outside(Module()), DataLoader(Rows(), batch_size=4, shuffle=False))
    return seen


TRAINERS: Sequence[Any] = (
    trainer, trainer_of_wrapped, trainer_bf16, trainer_checkpointed, trainer_resumed, sft_padded, sft_packed,
    sft_padding_free, dpo_padded, with_accelerate, with_lightning, with_lightning_whole, *HABITS,
)  # fmt: skip
