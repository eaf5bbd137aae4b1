"""What is traced in place of TRL's head, an autograd.Function over chunks of tokens and of the vocabulary: one op.

TRL's functions return of each row of hidden states [N, H] the log-probability of its target and the entropy, from 1.15
on also the log of the sum of squared probabilities, the mean logit and whether the target is the most likely.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastft.compat.substitutions import Substitution

RULE = "linear_token_statistics"
CHUNK_BYTES = 2**28  # until the rewriter puts there what the options say
_LATER = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")


def apply_with_outputs(
    original: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, temperature: float,
    chunk_size: int, final_logit_softcapping: float | None = None, logit_scale: float = 1.0,
    outputs: tuple[str, ...] = _LATER,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """Compute what 1.15 and 1.16 ask for by name; the others are None."""
    if not _is_plain(hidden, weight):
        return original.apply(
            hidden, weight, bias, targets, temperature, chunk_size, final_logit_softcapping, logit_scale, outputs
        )
    dtype = _autocast_dtype(hidden)
    found = _statistics(hidden, weight, bias, targets, temperature, final_logit_softcapping, logit_scale, dtype)
    return (
        found[0],
        found[1] if "entropy" in outputs else None,
        found[4] if "log_sum_sq_probs" in outputs else None,
        found[3] if "mean_logits" in outputs else None,
        found[5] if "is_top1" in outputs else None,
    )


def apply_in_autocast(
    original: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, temperature: float,
    chunk_size: int, final_logit_softcapping: float | None = None, logit_scale: float = 1.0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Compute log-probabilities and entropies as 1.14 does, in autocast's dtype where it is on."""
    given = (hidden, weight, bias, targets, temperature, chunk_size, final_logit_softcapping, logit_scale)
    return _two_results(original, _autocast_dtype(hidden), *given)


def apply_with_bias(
    original: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, temperature: float,
    chunk_size: int, final_logit_softcapping: float | None = None, logit_scale: float = 1.0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Compute log-probabilities and entropies as 1.13 does, in the dtype of the hidden states."""
    given = (hidden, weight, bias, targets, temperature, chunk_size, final_logit_softcapping, logit_scale)
    return _two_results(original, hidden.dtype, *given)


def _two_results(
    original: Any, dtype: torch.dtype, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor,
    temperature: float, chunk_size: int, softcap: float | None, logit_scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Compute log-probabilities and entropies in this dtype."""
    if not _is_plain(hidden, weight):
        return original.apply(hidden, weight, bias, targets, temperature, chunk_size, softcap, logit_scale)
    found = _statistics(hidden, weight, bias, targets, temperature, softcap, logit_scale, dtype)
    return found[0], found[1]


def apply_first(
    original: Any, hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float, chunk_size: int,
    final_logit_softcapping: float | None = None, logit_scale: float = 1.0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Compute them as 1.12 does, whose entropies have no gradient."""
    if not _is_plain(hidden, weight):
        return original.apply(hidden, weight, targets, temperature, chunk_size, final_logit_softcapping, logit_scale)
    dtype = hidden.dtype
    found = _statistics(hidden, weight, None, targets, temperature, final_logit_softcapping, logit_scale, dtype)
    return found[0], found[1].detach()


def never(device: torch.device) -> bool:
    """Answer that positions without a label are not left out by indexing: how many there are would be data."""
    return False


def _is_plain(hidden: Tensor, weight: Tensor) -> bool:
    """Tell whether a head is a matrix of numbers: not packed in 4 bits, not sharded."""
    known = type(weight) in (Tensor, torch.nn.Parameter) and weight.is_floating_point()
    return known and weight.dim() == 2 and hidden.dim() == 2 and weight.shape[1] == hidden.shape[1]


def _autocast_dtype(hidden: Tensor) -> torch.dtype:
    kind = hidden.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype


def _statistics(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, temperature: float, softcap: float | None,
    logit_scale: float, dtype: torch.dtype,
) -> list[Tensor]:  # fmt: skip
    """Compute all six results of each row: those of logits over the temperature."""
    return torch.ops.fastft.linear_token_statistics(
        hidden.to(dtype), weight.to(dtype), targets, None if bias is None else bias.to(dtype), None, None, -(2**62),
        logit_scale / temperature, 0.0 if softcap is None else softcap / temperature, CHUNK_BYTES, [False] * 5,
    )  # fmt: skip


_CHUNKS = "it goes over chunks of tokens and of the vocabulary in Python, by Triton kernels of its own"
_FUNCTION = "trl.trainer.utils:_ChunkedLogProbFunction"
SUBSTITUTIONS = (
    Substitution(
        "trl.kernels.chunked_logprob:ChunkedLogProbFunction", "trl", "1.15", "1.17", _CHUNKS, apply_with_outputs,
        rule=RULE,
    ),
    Substitution(
        "trl.kernels.chunked_logprob:_use_triton", "trl", "1.16", "1.17",
        "how many positions have a label depends on the data, and the graph breaks there", never, rule=RULE,
        caller="_fused_forward",
    ),
    Substitution(_FUNCTION, "trl", "1.14", "1.15", _CHUNKS, apply_in_autocast, rule=RULE),
    Substitution(_FUNCTION, "trl", "1.13", "1.14", _CHUNKS, apply_with_bias, rule=RULE),
    Substitution(_FUNCTION, "trl", "1.12", "1.13", _CHUNKS, apply_first, rule=RULE),
)  # fmt: skip
