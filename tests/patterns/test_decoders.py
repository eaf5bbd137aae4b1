"""Small decoders in plain PyTorch of three plans: what is lifted and merged of each, as eager under autocast too."""

from collections import Counter
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from compare import FORWARD, GRADIENT
from lifting import compiled, reasons
from torch import Tensor, nn

LAYERS, HIDDEN, HEADS, GROUPS, SIZE, INNER = 3, 32, 4, 2, 8, 48
B, S = 2, 7


class Rms(nn.Module):
    """Llama's, written out."""

    def __init__(self, size: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.rand(size) + 0.5), eps

    def forward(self, x: Tensor) -> Tensor:
        h = x.float()
        h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * h.to(x.dtype)


class GemmaRms(Rms):
    def forward(self, x: Tensor) -> Tensor:
        h = x.float()
        h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + self.eps)
        return (h * (1.0 + self.weight.float())).type_as(x)


def linear(inputs: int, outputs: int) -> nn.Linear:
    return nn.Linear(inputs, outputs, bias=False)


class Attention(nn.Module):
    def __init__(self, normed: bool) -> None:
        super().__init__()
        self.q, self.o = linear(HIDDEN, HEADS * SIZE), linear(HEADS * SIZE, HIDDEN)
        self.k, self.v = linear(HIDDEN, GROUPS * SIZE), linear(HIDDEN, GROUPS * SIZE)
        self.q_norm, self.k_norm = (Rms(SIZE), Rms(SIZE)) if normed else (nn.Identity(), nn.Identity())

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        q = self.q_norm(self.q(x).view(B, S, HEADS, SIZE)).transpose(1, 2)
        k = self.k_norm(self.k(x).view(B, S, GROUPS, SIZE)).transpose(1, 2)
        v = self.v(x).view(B, S, GROUPS, SIZE).transpose(1, 2)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        y = F.scaled_dot_product_attention(q, k.to(q.dtype), v.to(q.dtype), is_causal=True, enable_gqa=True)
        return self.o(y.transpose(1, 2).reshape(B, S, -1))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, dim=-1)
    return (x * cos) + (torch.cat([-b, a], dim=-1) * sin)


class Mlp(nn.Module):
    def __init__(self, activation: Callable) -> None:
        super().__init__()
        self.gate, self.up, self.down = linear(HIDDEN, INNER), linear(HIDDEN, INNER), linear(INNER, HIDDEN)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.activation(self.gate(x)) * self.up(x))


class PreNorm(nn.Module):
    """Qwen 3's plan."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Rms(HIDDEN), Rms(HIDDEN)
        self.attention, self.mlp = Attention(normed=True), Mlp(F.silu)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        residual = x
        x = residual + self.attention(self.first(x), cos, sin)
        residual = x
        return residual + self.mlp(self.second(x))


class Sandwich(nn.Module):
    """Gemma 2's plan."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(GemmaRms(HIDDEN) for _ in range(4))
        self.attention, self.mlp = Attention(normed=False), Mlp(lambda x: F.gelu(x, approximate="tanh"))

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        before, after, before_mlp, after_mlp = self.norms
        x = x + after(self.attention(before(x), cos, sin))
        return x + after_mlp(self.mlp(before_mlp(x)))


class Parallel(nn.Module):
    """GPT-J's plan: one norm for both, and one sum of three."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(HIDDEN)
        self.attention, self.mlp = Attention(normed=False), Mlp(F.gelu)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        h = self.norm(x)
        return x + self.attention(h, cos, sin) + self.mlp(h)


class Decoder(nn.Module):
    """layers.0 and so on, and cos and sin, which all of them share."""

    def __init__(self, layer: type[nn.Module], autocast: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layer() for _ in range(LAYERS))
        self.final, self.autocast = Rms(HIDDEN), autocast
        angles = torch.outer(torch.arange(S).float(), 10.0 ** (-torch.arange(0, SIZE, 2) / SIZE)).repeat(1, 2)
        self.register_buffer("cos", angles.cos())
        self.register_buffer("sin", angles.sin())

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=self.autocast):
            for layer in self.layers:
                x = layer(x, self.cos, self.sin)
            return self.final(x)


Counts = dict[str, int]
ATTENTION = {"attention.grouped_query": LAYERS}
PLANS: dict[type[nn.Module], tuple[Counts, Counts]] = {  # lifted, and merged of it
    PreNorm: (
        {"rms_norm.llama": 4 * LAYERS + 1, "rotary.half": 2 * LAYERS, "glu.silu": LAYERS, **ATTENTION},
        {"norm_rotary.normed_then_transposed": LAYERS, "add_rms_norm.before_a_block": LAYERS},
    ),
    Sandwich: (
        {
            "rms_norm.gemma": 4 * LAYERS, "rms_norm.llama": 1, "rotary.half": 2 * LAYERS, "glu.gelu_tanh": LAYERS,
            **ATTENTION,
        },
        {
            "rotary.queries_and_keys": LAYERS,
            "add_rms_norm.around_an_addition": LAYERS,
            "add_rms_norm.after_a_block": LAYERS,
        },
    ),
    Parallel: (
        {
            "layer_norm.torch_layer_norm": LAYERS, "rms_norm.llama": 1, "rotary.half": 2 * LAYERS, "glu.gelu": LAYERS,
            **ATTENTION,
        },
        {"rotary.queries_and_keys": LAYERS},
    ),
}  # fmt: skip
MODES = ["float32", "bfloat16", "autocast outside", "autocast inside"]


def run(function: Callable, model: nn.Module, x: Tensor, outside: bool) -> list[Tensor]:
    with torch.autocast("cpu", torch.bfloat16, enabled=outside):
        y = function(x)
    upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y.dtype)
    return [y.detach(), *torch.autograd.grad(y, [x, *model.parameters()], upstream)]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("plan", PLANS, ids=lambda plan: plan.__name__)
def test_a_decoder(plan: type[nn.Module], mode: str) -> None:
    """Under autocast the residual stream is float32, and so are norms' weights and the angles."""
    torch.manual_seed(0)
    model = Decoder(plan, autocast=mode == "autocast inside")
    dtype = torch.bfloat16 if mode == "bfloat16" else torch.float32
    model.to(dtype)
    x = torch.randn(B, S, HIDDEN).to(dtype).requires_grad_()
    captures: list = []
    outside = mode == "autocast outside"
    actual, eager = (run(one, model, x, outside) for one in (compiled(model, captures), model))
    ((_, report),) = captures
    lifted, fused = PLANS[plan]
    assert Counter(one.rule for one in report.lifted) == lifted, reasons(report)
    assert Counter(one.rule for one in report.fused) == fused
    assert reasons(report) == []
    exact = Decoder(plan, autocast=False).double()
    exact.load_state_dict({name: value.double() for name, value in model.state_dict().items()})
    truth = run(exact, exact, x.detach().double().requires_grad_(), outside=False)
    factors = (FORWARD, *[GRADIENT] * (len(truth) - 1))
    for factor, mine, other, right in zip(factors, actual, eager, truth, strict=True):
        assert (mine.dtype, mine.shape, mine.stride()) == (other.dtype, other.shape, other.stride())
        error, allowed = ((one.double() - right).norm() for one in (mine, other))
        assert error <= factor * allowed + 1e-6 * right.norm()
