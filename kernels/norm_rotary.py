"""RMSNorm of each head of queries and keys and their rotary embedding, in one pass (Qwen 3, Gemma 3).

q' = rotate(norm(q, q_weight)) and k' likewise: fastft::rms_norm over the last axis, then fastft::rotary_qk, with the
parameters described there.  q and k [..., D]; q_weight and k_weight [D].  q_rstd and k_rstd are kept for backward.
"""

from typing import Any

from torch import Tensor

from fastft.kernels import rms_norm
from fastft.kernels.core.registry import Shapes, define, require
from fastft.kernels.rms_norm import BACKWARD_SPELLINGS, SPELLINGS, new_rstd
from fastft.kernels.rotary import LONGEST_HEAD, angle_cases, new_output, rotate


def reference(
    q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor, eps: float, offset: float,
    round_first: bool, interleaved: bool, per_pair: bool, contiguous: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Compute q', k', q_rstd and k_rstd in plain PyTorch."""
    normalized_q, q_rstd = rms_norm.reference(q, q_weight, eps, offset, round_first)
    normalized_k, k_rstd = rms_norm.reference(k, k_weight, eps, offset, round_first)
    angles = (cos, sin, interleaved, per_pair)
    return rotate(normalized_q, *angles), rotate(normalized_k, *angles), q_rstd, k_rstd


def reference_backward(
    grad_q: Tensor, grad_k: Tensor, q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, q_rstd: Tensor,
    k_rstd: Tensor, cos: Tensor, sin: Tensor, offset: float, round_first: bool, interleaved: bool, per_pair: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Compute dq and dk in plain PyTorch."""
    turned = (rotate(gradient, cos, sin, interleaved, per_pair, back=True) for gradient in (grad_q, grad_k))
    rows = zip(turned, (q, k), (q_weight, k_weight), (q_rstd, k_rstd), strict=True)
    dq, dk = (rms_norm.reference_backward(*row_tensors, offset, round_first) for row_tensors in rows)
    return dq, dk


def reference_backward_weight(
    grad_q: Tensor, grad_k: Tensor, q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, q_rstd: Tensor,
    k_rstd: Tensor, cos: Tensor, sin: Tensor, offset: float, round_first: bool, interleaved: bool, per_pair: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Compute dq, dk, dq_weight and dk_weight in plain PyTorch, for trainable weights."""
    turned = (rotate(gradient, cos, sin, interleaved, per_pair, back=True) for gradient in (grad_q, grad_k))
    rows = zip(turned, (q, k), (q_weight, k_weight), (q_rstd, k_rstd), strict=True)
    (dq, dq_weight), (dk, dk_weight) = (
        rms_norm.reference_backward_weight(*row_tensors, offset, round_first) for row_tensors in rows
    )
    return dq, dk, dq_weight, dk_weight


def new_outputs(
    q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor, eps: float, offset: float,
    round_first: bool, interleaved: bool, per_pair: bool, contiguous: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Allocate empty q', k', q_rstd and k_rstd."""
    require(q.dim() == k.dim(), lambda: f"q {tuple(q.shape)}, but k {tuple(k.shape)}")
    new = []
    for x, weight in ((q, q_weight), (k, k_weight)):
        rms_norm.check(x, weight, offset, round_first)
        dtype = rms_norm.result_dtype(x, weight, round_first)
        new.append(new_output(x, cos, sin, interleaved, per_pair, False, contiguous, dtype))
    new_q, new_k = new
    return new_q, new_k, new_rstd(new_q, q), new_rstd(new_k, k)


def new_gradients(
    grad_q: Tensor, grad_k: Tensor, q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, q_rstd: Tensor,
    k_rstd: Tensor, cos: Tensor, sin: Tensor, offset: float, round_first: bool, interleaved: bool, per_pair: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Allocate empty dq, dk, dq_weight and dk_weight."""
    dq, dq_weight = rms_norm.new_gradients(grad_q, q, q_weight, q_rstd, offset, round_first)
    dk, dk_weight = rms_norm.new_gradients(grad_k, k, k_weight, k_rstd, offset, round_first)
    return dq, dk, dq_weight, dk_weight


def new_dx(
    grad_q: Tensor, grad_k: Tensor, q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, q_rstd: Tensor,
    k_rstd: Tensor, cos: Tensor, sin: Tensor, offset: float, round_first: bool, interleaved: bool, per_pair: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Allocate empty dq and dk alone."""
    dq = rms_norm.new_dx(grad_q, q, q_weight, q_rstd, offset, round_first)
    return dq, rms_norm.new_dx(grad_k, k, k_weight, k_rstd, offset, round_first)


def _weighted(shapes: Shapes) -> Shapes:
    """Add the shapes of the weights, one number for each element of a head."""
    return {**shapes, **dict.fromkeys(("q_weight", "k_weight"), shapes["q"].split()[-1])}


def _backward(shapes: Shapes) -> Shapes:
    """Add the shapes of the weights, of gradients like q and k, and of one number for each of their rows."""
    rows = {f"{name}_rstd": shapes[name].rpartition(" ")[0] for name in "qk"}
    return {**_weighted(shapes), "grad_q": shapes["q"], "grad_k": shapes["k"], **rows}


_LAYOUTS = [
    {**spelling, "contiguous": contiguous} for spelling, contiguous in zip(SPELLINGS, (False, True, False), strict=True)
]
_FORWARD_CASES = [(_weighted(shapes), choice) for shapes, choice in angle_cases("q", "k", choices=_LAYOUTS)]
_BACKWARD_CASES = [(_backward(shapes), choice) for shapes, choice in angle_cases("q", "k", choices=BACKWARD_SPELLINGS)]
norm_rotary = define(
    "norm_rotary", reference, new_outputs, "norm_rotary_triton.forward",
    cases=_FORWARD_CASES, gradients=("q", "k", "q_weight", "k_weight"), flops=7, longest_row=LONGEST_HEAD,
)  # fmt: skip
norm_rotary_backward = define(
    "norm_rotary_backward", reference_backward, new_dx, "norm_rotary_triton.backward",
    cases=_BACKWARD_CASES, statistics=("q_rstd", "k_rstd"), flops=10, longest_row=LONGEST_HEAD,
)  # fmt: skip
norm_rotary_backward_weight = define(
    "norm_rotary_backward_weight", reference_backward_weight, new_gradients, "norm_rotary_triton.backward_weight",
    cases=_BACKWARD_CASES, statistics=("q_rstd", "k_rstd"), flops=12, longest_row=LONGEST_HEAD,
)  # fmt: skip


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, k, q_weight, k_weight, cos, sin, _, *ctx.settings, _ = inputs
    rstds = output[2:]
    ctx.save_for_backward(q, k, q_weight, k_weight, *rstds, cos, sin)
    ctx.mark_non_differentiable(*rstds)


def _gradients(ctx: Any, grad_q: Tensor, grad_k: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    trained = any(ctx.needs_input_grad[2:4])
    backward = norm_rotary_backward_weight if trained else norm_rotary_backward
    gradients = backward(grad_q, grad_k, *ctx.saved_tensors, *ctx.settings)
    needed = [value if needs else None for value, needs in zip(gradients, ctx.needs_input_grad, strict=False)]
    return *needed, *(None,) * (12 - len(needed))


norm_rotary.register_autograd(_gradients, setup_context=_setup_context)
