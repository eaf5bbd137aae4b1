"""What the passes over one graph share: options, the report that they fill in, and what is switched off."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from fastft.rewriter.options import Options
from fastft.rewriter.report.data import GraphReport

SWITCHED_OFF = "it is switched off by options={'disable': ...}"


@dataclass
class Context:
    """One graph's passage through the passes.

    rules: what is lifted; merging: what is made of it.  inline_checkpoints: whether the plan decides about what the
    user checkpointed.  deferred: outputs that the graph does not compute any more are added here; without it they all
    stay.
    """

    options: Options = field(default_factory=Options)
    report: GraphReport = field(default_factory=GraphReport)
    rules: Sequence[Any] = ()
    merging: Sequence[Any] = ()
    inline_checkpoints: bool = False
    deferred: list[Any] | None = None

    def refusal(self, rule: str, module: str, *ops: str) -> str | None:
        """Return why a rule is not to be applied in a module, None if it may be.

        ops: what it would make, by name: ``lora_linear``.
        """
        names = (rule, f"{rule}@{module}", *(f"op:{op}" for op in ops))
        return SWITCHED_OFF if any(name in self.options.disable for name in names) else None
