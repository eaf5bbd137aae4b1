"""Optimizers; which of them run on a CPU is their authors' affair."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import bitsandbytes
import torch
from torch import Tensor
from transformers.optimization import Adafactor

from training.loops import RATE, train
from training.setting import Setting, trained

Made = Callable[[Iterable[Tensor]], torch.optim.Optimizer]


def steps(setting: Setting, make: Made) -> list[float]:
    """Train all of a model: its embedding and projections are large enough for states of 8 bits."""
    model = setting.model(lora=None)
    return train(setting, model, setting.compile(model), optimizer=make(trained(model)))


def adamw_fused(setting: Setting) -> list[float]:
    """torch `AdamW(fused=True)`"""
    return steps(setting, lambda values: torch.optim.AdamW(values, lr=RATE, fused=True))


def adamw_foreach(setting: Setting) -> list[float]:
    """torch `AdamW(foreach=True)`"""
    return steps(setting, lambda values: torch.optim.AdamW(values, lr=RATE, foreach=True))


def adamw_8bit(setting: Setting) -> list[float]:
    """bitsandbytes `AdamW8bit`"""
    return steps(setting, lambda values: bitsandbytes.optim.AdamW8bit(values, lr=RATE))


def paged_adamw_8bit(setting: Setting) -> list[float]:
    """bitsandbytes `PagedAdamW8bit`"""
    return steps(setting, lambda values: bitsandbytes.optim.PagedAdamW8bit(values, lr=RATE))


def paged_adamw_32bit(setting: Setting) -> list[float]:
    """bitsandbytes `PagedAdamW32bit`"""
    return steps(setting, lambda values: bitsandbytes.optim.PagedAdamW32bit(values, lr=RATE))


def torchao_adamw_8bit(setting: Setting) -> list[float]:
    """torchao `AdamW8bit`"""
    from torchao.optim import AdamW8bit

    return steps(setting, lambda values: AdamW8bit(values, lr=RATE))


def adafactor(setting: Setting) -> list[float]:
    """transformers `Adafactor`"""
    more: dict[str, Any] = {"lr": RATE, "relative_step": False, "scale_parameter": False}
    return steps(setting, lambda values: Adafactor(values, **more))


OPTIMIZERS: Sequence[Any] = (
    adamw_fused, adamw_foreach, adamw_8bit, paged_adamw_8bit, paged_adamw_32bit, torchao_adamw_8bit, adafactor
)  # fmt: skip
