"""Axolotl: ``plugins: [fastft.integrations.axolotl.FastftPlugin]`` in its YAML.  Imported by Axolotl alone."""

from __future__ import annotations

from typing import Any

from axolotl.integrations.base import BasePlugin
from pydantic import BaseModel, field_validator

from fastft.integrations.trainer import TrainerCallback
from fastft.rewriter.options import Options

LORA_KERNELS = ("lora_mlp_kernel", "lora_qkv_kernel", "lora_o_kernel")  # Axolotl's own, on where the YAML says nothing


class FastftArgs(BaseModel):
    """What Axolotl's YAML may say: ``fastft:`` with the backend's options, such as ``memory_budget: 14GiB``."""

    fastft: dict[str, Any] | None = None

    @field_validator("fastft")
    @classmethod
    def known(cls, options: dict[str, Any] | None) -> dict[str, Any] | None:
        """Return the options; raise OptionsError, which Axolotl shows, for one that the backend does not have."""
        Options.parse(options)
        return options


class FastftPlugin(BasePlugin):
    """Have Axolotl's trainer compile its model, and log how fast and in how much memory it trains."""

    def register(self, cfg: Any) -> None:
        """Leave off Axolotl's LoRA kernels unless the YAML asks for one: of what they compute fastft sees nothing."""
        if all(cfg.get(name) is None for name in LORA_KERNELS):
            cfg.update(dict.fromkeys(LORA_KERNELS, False))

    def get_input_args(self) -> str:
        """Return where the class is that describes what the YAML may say."""
        return f"{FastftArgs.__module__}.{FastftArgs.__qualname__}"

    def add_callbacks_post_trainer(self, cfg: Any, trainer: Any) -> list[Any]:
        """Return the callback that compiles, for Axolotl to add to the trainer that it has made."""
        return [TrainerCallback(dict(cfg.get("fastft") or {}), log_to=trainer)]
