"""A decoder in plain PyTorch, written as users write theirs: nothing of transformers."""

from collections import Counter
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from compare import FORWARD, GRADIENT, assert_close_to_truth
from torch import Tensor, nn

from fastft.rewriter.passes import rewrite
from fastft.rewriter.report.data import GraphReport

HIDDEN, HEADS, GROUPS, LAYERS, VOCABULARY, LENGTH = 32, 4, 2, 3, 50, 7
SIZE = HIDDEN // HEADS


def turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-b, a], dim=-1) * sin


class Block(nn.Module):
    """Attention with normed queries and keys, and a gated MLP of one projection."""

    def __init__(self) -> None:
        super().__init__()
        self.before_attention, self.before_mlp = nn.RMSNorm(HIDDEN, eps=1e-5), nn.RMSNorm(HIDDEN, eps=1e-5)
        self.q_norm, self.k_norm = nn.RMSNorm(SIZE, eps=1e-6), nn.RMSNorm(SIZE, eps=1e-6)
        self.qkv = nn.Linear(HIDDEN, (HEADS + 2 * GROUPS) * SIZE, bias=False)
        self.out = nn.Linear(HIDDEN, HIDDEN, bias=False)
        self.gate_up, self.down = nn.Linear(HIDDEN, 96, bias=False), nn.Linear(48, HIDDEN, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.attend(self.before_attention(x), cos, sin)
        gate, up = self.gate_up(self.before_mlp(x)).split(48, dim=-1)
        return x + self.down(F.silu(gate) * up)

    def attend(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        batch, length, _ = x.shape
        q, k, v = self.qkv(x).view(batch, length, -1, SIZE).split([HEADS, GROUPS, GROUPS], dim=2)
        q, k = self.q_norm(q).transpose(1, 2), self.k_norm(k).transpose(1, 2)
        q, k = turn(q, cos, sin), turn(k, cos, sin)
        y = F.scaled_dot_product_attention(q, k, v.transpose(1, 2), is_causal=True, enable_gqa=True)
        return self.out(y.transpose(1, 2).reshape(batch, length, HIDDEN))


class Decoder(nn.Module):
    """Embedding, blocks, norm, head and loss."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, HIDDEN)
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
        self.norm, self.head = nn.RMSNorm(HIDDEN, eps=1e-5), nn.Linear(HIDDEN, VOCABULARY, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        positions = torch.arange(ids.shape[1], device=ids.device)
        angles = positions[:, None] * 10.0 ** (torch.arange(SIZE // 2, device=ids.device) / -4)
        angles = torch.cat((angles, angles), -1).to(self.head.weight.dtype)
        cos, sin = angles.cos(), angles.sin()
        x = self.embedding(ids)
        for block in self.blocks:
            x = block(x, cos, sin)
        logits = self.head(self.norm(x))
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_decoder_in_plain_pytorch(dtype: torch.dtype) -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = Decoder().to(dtype)
    ids = torch.randint(VOCABULARY, (2, LENGTH))
    reports: list[GraphReport] = []

    def backend(gm: torch.fx.GraphModule, _: object) -> Callable:
        reports.append(rewrite(gm))
        return gm.forward

    def gradients(run: Callable, of: nn.Module) -> tuple[Tensor, list[Tensor]]:
        loss = run(ids)
        return loss.detach(), list(torch.autograd.grad(loss, list(of.parameters())))

    exact = Decoder().double()
    exact.load_state_dict({name: value.double() for name, value in model.state_dict().items()})
    truth, eager, actual = (
        gradients(exact, exact),
        gradients(model, model),
        gradients(torch.compile(model, backend=backend), model),
    )
    assert len(reports) == 1
    lifted, fused = (Counter(one.rule for one in found) for found in (reports[0].lifted, reports[0].fused))
    assert lifted == {
        "rms_norm.torch_rms_norm": 4 * LAYERS + 1,
        "rotary.half": 2 * LAYERS,
        "glu.silu_packed": LAYERS,
        "attention.grouped_query": LAYERS,
        "linear_cross_entropy.cross_entropy": 1,
    }
    assert fused == {"norm_rotary.normed_then_transposed": LAYERS, "add_rms_norm.before_a_block": LAYERS}
    assert reports[0].near_misses == []
    worst = (eager[0].double() - truth[0]).abs() + torch.finfo(dtype).eps * truth[0]
    assert (actual[0].double() - truth[0]).abs() <= FORWARD * worst
    for mine, other, right in zip(actual[1], eager[1], truth[1], strict=True):
        assert_close_to_truth(mine, other, right, GRADIENT)
