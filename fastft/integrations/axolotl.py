"""Axolotl: ``plugins: [fastft.integrations.axolotl.FastftPlugin]`` in its YAML.  Imported by Axolotl alone."""

from __future__ import annotations

from typing import Any

from axolotl.integrations.base import BasePlugin
from pydantic import BaseModel, field_validator

from fastft.integrations.trainer import TrainerCallback
from fastft.rewriter.options import Options


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

    def get_input_args(self) -> str:
        """Return where the class is that describes what the YAML may say."""
        return f"{FastftArgs.__module__}.{FastftArgs.__qualname__}"

    def add_callbacks_post_trainer(self, cfg: Any, trainer: Any) -> list[Any]:
        """Return the callback that compiles, for Axolotl to add to the trainer that it has made."""
        return [TrainerCallback(dict(cfg.get("fastft") or {}), log_to=trainer)]
