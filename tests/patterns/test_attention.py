"""Which expressions become fastft::attention, which do not, and for what reason."""

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from lifting import assert_right, calls, compiled, frozen, normal, ops, reasons, rules, told
from torch import Tensor, nn

from fastft.patterns import attention as patterns

B, H, S, T, D = 2, 4, 5, 7, 8
ROOT = math.sqrt(D)
LOWEST = torch.finfo(torch.float32).min
DTYPES = [torch.float32, torch.bfloat16]
sdpa = F.scaled_dot_product_attention


def heads(dtype: torch.dtype = torch.float32, groups: int = H, rows: int = S, columns: int = T) -> list[Tensor]:
    """q, k and v."""
    k, v = (normal(B, groups, columns, D, dtype=dtype, seed=seed) for seed in (1, 2))
    return [normal(B, H, rows, D, dtype=dtype), k, v]


def bias(dtype: torch.dtype = torch.float32, shape: tuple[int, ...] = (B, 1, S, T)) -> Tensor:
    """Numbers to be added to scores."""
    return frozen(*shape, dtype=dtype, seed=3)


def flags(dtype: torch.dtype = torch.float32, shape: tuple[int, ...] = (B, 1, S, T)) -> Tensor:
    """1 where a query may attend to a key, 0 elsewhere; every row has a key."""
    found = (frozen(*shape, seed=4) > 0).to(dtype)
    found[..., 2] = 1
    return found


def sinks(dtype: torch.dtype = torch.float32) -> Tensor:
    return normal(H, dtype=dtype, seed=5)


def exact(
    q: Tensor, k: Tensor, v: Tensor, added: Tensor | None = None, sinks: Tensor | None = None,
    *, scale: float = 1 / ROOT, softcap: float = 0.0, causal: bool = False,
) -> Tensor:  # fmt: skip
    """What all of them compute, in whatever dtype they are given."""
    k, v = (one.repeat_interleave(q.shape[1] // one.shape[1], 1) for one in (k, v))
    scores = q @ k.mT * scale
    scores = softcap * torch.tanh(scores / softcap) if softcap else scores
    scores = scores + added if added is not None else scores
    if causal:
        scores = scores.masked_fill(torch.ones_like(scores).tril() == 0, -torch.inf)
    if sinks is not None:
        scores = torch.cat((scores, sinks[:, None, None].expand(*scores.shape[:-1], 1)), -1)
    return scores.softmax(-1)[..., : k.shape[-2]] @ v


def repeat_kv(x: Tensor, times: int) -> Tensor:
    """transformers'"""
    return x[:, :, None, :, :].expand(B, x.shape[1], times, T, D).reshape(B, H, T, D)


def latent_keys(k: Tensor) -> Tensor:
    """DeepSeek-V2's: a part of every head's own, and a part that all heads share."""
    return torch.cat((k[..., :5], k[:, :1, :, 5:].expand(B, H, T, 3)), -1)


def merged(x: Tensor) -> Tensor:
    """Heads beside each other, as the output projection takes them."""
    return x.transpose(1, 2).contiguous().view(B, S, H * D)


def llama(xq: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None = None) -> Tensor:
    """The reference code of Llama, after its repeat_kv."""
    scores = torch.matmul(xq, keys.transpose(2, 3)) / math.sqrt(D)
    if mask is not None:
        scores = scores + mask
    scores = F.softmax(scores.float(), dim=-1).type_as(xq)
    return torch.matmul(scores, values).transpose(1, 2).contiguous().view(B, S, -1)


def hf_eager(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """transformers' eager_attention_forward."""
    weights = torch.matmul(q, k.transpose(2, 3)) * 0.3
    if mask is not None:
        weights = weights + mask[:, :, :, :T]
    weights = nn.functional.softmax(weights, dim=-1, dtype=torch.float32).to(q.dtype)
    weights = nn.functional.dropout(weights, p=0.1, training=False)
    return torch.matmul(weights, v).transpose(1, 2).contiguous()


def gemma2(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    weights = torch.matmul(q, k.transpose(2, 3)) * 0.3
    weights = weights / 0.7
    weights = torch.tanh(weights)
    weights = weights * 0.7
    if mask is not None:
        weights = weights + mask
    weights = nn.functional.softmax(weights, dim=-1, dtype=torch.float32).to(q.dtype)
    return torch.matmul(nn.functional.dropout(weights, p=0.0, training=True), v).transpose(1, 2).contiguous()


def gpt_oss(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, sinks: Tensor) -> Tensor:
    weights = torch.matmul(q, k.transpose(2, 3)) * 0.3
    weights = weights + mask
    more = sinks.reshape(1, -1, 1, 1).expand(B, -1, S, -1)
    combined = torch.cat([weights, more], dim=-1)
    combined = combined - combined.max(dim=-1, keepdim=True).values
    probs = F.softmax(combined, dim=-1, dtype=torch.float32)
    scores = probs[..., :-1]
    return torch.matmul(F.dropout(scores, p=0.0).to(v.dtype), v).transpose(1, 2).contiguous()


def gpt_oss_as_it_is(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, sinks: Tensor) -> Tensor:
    more = sinks.reshape(1, -1, 1, 1).expand(B, -1, S, -1)
    combined = torch.cat([torch.matmul(q, k.transpose(2, 3)) * 0.3 + mask, more], dim=-1)
    combined = combined - combined.max(dim=-1, keepdim=True).values
    probs = F.softmax(combined, dim=-1, dtype=combined.dtype)
    return torch.matmul(F.dropout(probs[..., :-1], p=0.0).to(v.dtype), v).transpose(1, 2).contiguous()


def nano_gpt(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    att = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(D))
    att = att.masked_fill(mask == 0, float("-inf"))
    att = F.softmax(att, dim=-1)
    att = F.dropout(att, 0.0)
    return (att @ v).transpose(1, 2).contiguous().view(B, S, H * D)


def annotated(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    """The Annotated Transformer."""
    scores = torch.matmul(query, key.transpose(-2, -1)) / math.sqrt(D)
    scores = scores.masked_fill(mask == 0, -torch.inf)
    return torch.matmul(scores.softmax(dim=-1), value)


def by_methods(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    scores = q.matmul(k.transpose(-1, -2)).mul(0.3).add(mask)
    return scores.softmax(-1, torch.float32).to(q.dtype).matmul(v)


def cast_first(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    scores = 0.3 * (q @ k.transpose(2, 3))
    scores = scores if mask is None else scores + mask
    return scores.float().softmax(dim=-1).to(dtype=v.dtype) @ v


def mpt(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, position_bias: Tensor) -> Tensor:
    scores = torch.matmul(q, k.transpose(-1, -2)) * 0.3
    scores = scores + position_bias
    scores = scores.masked_fill(mask == 0, torch.finfo(q.dtype).min)
    weights = nn.functional.softmax(scores.float(), dim=-1).to(v.dtype)
    return torch.matmul(weights, v).permute(0, 2, 1, 3).contiguous().view(B, S, H * D)


def bloom(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, alibi: Tensor) -> Tensor:
    q, k, v = q.reshape(B * H, -1, D), k.reshape(B * H, -1, D).transpose(-1, -2), v.reshape(B * H, -1, D)
    scores = alibi.baddbmm(batch1=q, batch2=k, beta=1.0, alpha=0.3).view(B, H, S, -1) + mask
    probs = F.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype).view(B * H, S, -1)
    x = torch.bmm(probs, v).view(B, H, S, D).permute(0, 2, 1, 3)
    return x.reshape(B, S, H * D)


Case = tuple[str, Callable, Callable, Callable]  # reference, spelling, the truth, further inputs
nothing = lambda dtype: []  # noqa: E731
a_bias = lambda dtype: [bias(dtype)]  # noqa: E731
some_flags = lambda dtype: [flags(dtype)]  # noqa: E731
with_a_sink = lambda dtype: [bias(dtype), sinks(dtype)]  # noqa: E731
allowed = lambda q, k, v, mask, *, bias=0.0, **more: exact(q, k, v, mask.log() + bias, **more)  # noqa: E731
beside = lambda function, **more: lambda *values: function(*values, **more).transpose(1, 2)  # noqa: E731
joined = lambda function, **more: lambda *values: merged(function(*values, **more))  # noqa: E731
scaled = lambda *values: exact(*values, scale=0.3)  # noqa: E731
CASES: dict[str, Case] = {
    "sdpa": ("dot_product", lambda q, k, v: sdpa(q, k, v), exact, nothing),
    "sdpa, causal, as nanoGPT": (
        "dot_product",
        lambda q, k, v: merged(sdpa(q, k, v, attn_mask=None, dropout_p=0, is_causal=True)),
        joined(exact, causal=True), nothing,
    ),
    "sdpa, as transformers": (
        "dot_product",
        lambda q, k, v: (
            sdpa(q, k, v, attn_mask=None, dropout_p=0.0, scale=0.3, is_causal=False).transpose(1, 2).contiguous()
        ),
        beside(exact, scale=0.3), nothing,
    ),
    "sdpa, bool": ("dot_product_masked", lambda q, k, v, m: sdpa(q, k, v, attn_mask=m > 0), allowed, some_flags),
    "sdpa, bias": ("dot_product_masked", lambda q, k, v, m: sdpa(q, k, v, m, scale=0.3), scaled, a_bias),
    "sdpa, a bias of two axes": (
        "dot_product_masked", lambda q, k, v, m: sdpa(q, k, v, m), exact, lambda dtype: [bias(dtype, (S, T))],
    ),
    "gqa": (
        "grouped_query", lambda q, k, v: sdpa(q, k[:, :2], v[:, :2], is_causal=True, enable_gqa=True),
        lambda q, k, v: exact(q, k[:, :2], v[:, :2], causal=True), nothing,
    ),
    "gqa, bool": (
        "grouped_query_masked", lambda q, k, v, m: sdpa(q, k[:, :2], v[:, :2], m > 0, 0.0, False, enable_gqa=True),
        lambda q, k, v, m: allowed(q, k[:, :2], v[:, :2], m), some_flags,
    ),
    "Falcon": (
        "multi_query", lambda q, k, v: sdpa(q, k[:, :1], v[:, :1], is_causal=True),
        lambda q, k, v: exact(q, k[:, :1], v[:, :1], causal=True), nothing,
    ),
    "Falcon, bias": (
        "multi_query_masked", lambda q, k, v, m: sdpa(q, k[:, :1], v[:, :1], attn_mask=m),
        lambda q, k, v, m: exact(q, k[:, :1], v[:, :1], m), a_bias,
    ),
    "values of another size": (
        "dot_product", lambda q, k, v: sdpa(q, latent_keys(k), v[..., :6], scale=0.3),
        lambda q, k, v: scaled(q, latent_keys(k), v[..., :6]), nothing,
    ),
    "values of another size, gqa, bool": (
        "grouped_query_masked", lambda q, k, v, m: sdpa(q[..., :5], k[:, :2, :, :5], v[:, :2], m > 0, enable_gqa=True),
        lambda q, k, v, m: allowed(q[..., :5], k[:, :2, :, :5], v[:, :2], m, scale=5**-0.5), some_flags,
    ),
    "values of another size, transformers": (
        "eager_additive_mask", lambda q, k, v, m: hf_eager(q, latent_keys(k), v[..., :6], m),
        beside(lambda q, k, v, m: scaled(q, latent_keys(k), v[..., :6], m)), a_bias,
    ),
    "transformers": ("eager_additive_mask", hf_eager, beside(scaled), a_bias),
    "transformers, repeated heads": (
        "eager_additive_mask", lambda q, k, v, m: hf_eager(q, repeat_kv(k[:, :2], 2), repeat_kv(v[:, :2], 2), m),
        beside(lambda q, k, v, m: scaled(q, k[:, :2], v[:, :2], m)), a_bias,
    ),
    "methods": ("eager_additive_mask", by_methods, scaled, a_bias),
    "transformers, unmasked": ("eager", hf_eager, beside(scaled), nothing),
    "cast first": ("eager_widened", cast_first, scaled, nothing),
    "cast first, bias": ("eager_additive_mask_widened", cast_first, scaled, a_bias),
    "Gemma 2": ("eager_softcap_additive_mask", gemma2, beside(exact, scale=0.3, softcap=0.7), a_bias),
    "Gemma 2, unmasked": ("eager_softcap", gemma2, beside(exact, scale=0.3, softcap=0.7), nothing),
    "GPT-OSS": ("eager_sinks", gpt_oss, beside(scaled), with_a_sink),
    "GPT-OSS in 16 bits": ("eager_sinks_in_input_dtype", gpt_oss_as_it_is, beside(scaled), with_a_sink),
    "Llama": ("eager_additive_mask_divided", llama, joined(exact), a_bias),
    "Llama, unmasked": ("eager_divided", llama, joined(exact), nothing),
    "nanoGPT": ("eager_masked_fill", nano_gpt, joined(allowed), some_flags),
    "Annotated Transformer": ("eager_masked_fill_divided", annotated, allowed, some_flags),
    "MPT": (
        "eager_bias_masked_fill", mpt,
        lambda q, k, v, m, b: merged(allowed(q, k, v, m, scale=0.3, bias=b)),
        lambda dtype: [flags(dtype), bias(torch.float32, (H, 1, T))],
    ),
    "Bloom": (
        "eager_bias_additive_mask", bloom,
        lambda q, k, v, m, b: merged(scaled(q, k, v, m + b.view(B, H, 1, T))),
        lambda dtype: [bias(dtype), bias(dtype, (B * H, 1, T))],
    ),
    "plain": (
        "softmax_in_input_dtype", lambda q, k, v: F.softmax(q @ k.transpose(-2, -1) * 0.3, dim=-1) @ v, scaled, nothing,
    ),
    "plain, bias": (
        "softmax_in_input_dtype_additive_mask",
        lambda q, k, v, m: torch.softmax(m + 0.3 * torch.matmul(q, k.transpose(3, 2)), -1) @ v, scaled, a_bias,
    ),
}  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_spellings(name: str, dtype: torch.dtype) -> None:
    rule, function, right, more = CASES[name]
    captures: list = []
    values, actual = [*heads(dtype), *more(dtype)], compiled(function, captures)
    assert_right(actual, function, values, right)
    ((gm, report),) = captures
    assert (ops(gm), reasons(report)) == (["attention"], [])
    if dtype != torch.float32:  # in which a softmax in float32 is any softmax
        assert rules(report)[0] == [f"attention.{rule}"]
    assert not {"softmax", "matmul", "scaled_dot_product_attention", "tanh", "dropout"} & set(calls(gm))


def test_every_reference_has_a_spelling() -> None:
    with_dropout = {"eager_masked_fill_dropout"}  # below
    assert {case[0] for case in CASES.values()} | with_dropout == {rule.reference.__name__ for rule in patterns.RULES}


@pytest.mark.parametrize("name", ["sdpa", "sdpa, bool", "transformers", "Llama", "nanoGPT", "GPT-OSS"])
def test_under_autocast(name: str) -> None:
    """Matrices are multiplied in bfloat16, whatever is given."""
    _, function, right, more = CASES[name]

    def cast(given: Callable) -> Callable:
        def run(*values: Tensor) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                return given(*values)

        return run

    captures: list = []
    values = [*heads(), *more(torch.float32)]
    inside, outside = cast(compiled(function, captures)), compiled(cast(function), captures)
    for one in (inside, outside):
        torch._dynamo.reset()
        captures.clear()
        assert_right(one, cast(function), values, right)
        ((gm, report),) = captures
        assert (ops(gm), reasons(report)) == (["attention"], [])


class Attention(nn.Module):
    """nanoGPT's, with its own mask and dropout."""

    def __init__(self, dropout: float, flash: bool) -> None:
        super().__init__()
        self.c_attn, self.dropout, self.flash = nn.Linear(H * D, 3 * H * D), dropout, flash
        self.attn_dropout = nn.Dropout(dropout)
        self.register_buffer("bias", torch.tril(torch.ones(16, 16)).view(1, 1, 16, 16))

    def forward(self, x: Tensor) -> Tensor:
        B, T, C = x.size()
        q, k, v = self.c_attn(x).split(H * D, dim=2)
        k = k.view(B, T, H, C // H).transpose(1, 2)
        q = q.view(B, T, H, C // H).transpose(1, 2)
        v = v.view(B, T, H, C // H).transpose(1, 2)
        if self.flash:
            y = sdpa(q, k, v, attn_mask=None, dropout_p=self.dropout if self.training else 0, is_causal=True)
        else:
            att = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(k.size(-1)))
            att = att.masked_fill(self.bias[:, :, :T, :T] == 0, float("-inf"))
            att = F.softmax(att, dim=-1)
            att = self.attn_dropout(att)
            y = att @ v
        return y.transpose(1, 2).contiguous().view(B, T, C)


@pytest.mark.parametrize(("dropout", "training"), [(0.0, True), (0.4, False)])
@pytest.mark.parametrize("flash", [False, True])
def test_no_dropout_leaves_nothing(flash: bool, dropout: float, training: bool) -> None:
    captures: list = []
    torch.manual_seed(0)
    module, x = Attention(dropout, flash).train(training), normal(B, S, H * D)
    actual = compiled(module, captures)
    assert_right(lambda x: actual(x), lambda x: module(x), [x], exact=lambda x: nn.Module.double(module)(x))
    ((gm, report),) = captures
    assert (ops(gm), reasons(report)) == (["attention"], [])
    assert "dropout" not in calls(gm)
    (node,) = gm.graph.find_nodes(op="call_function", target=torch.ops.fastft.attention)
    assert node.args[9] is None  # the seed
    assert node.args[-2] == 0.0


@pytest.mark.parametrize("flash", [False, True])
def test_dropout(flash: bool) -> None:
    """The mean of many is the undropped, and what was dropped forward is dropped backward."""
    captures: list = []
    torch.manual_seed(0)
    module, x = Attention(0.25, flash).eval(), frozen(B, S, H * D)
    expected = module(x)
    actual = compiled(module.train(), captures)
    results = torch.stack([actual(x) for _ in range(400)]).detach()
    ((gm, report),) = captures
    assert (ops(gm), reasons(report)) == (["attention"], [])
    assert rules(report)[0] == ["attention.dot_product" if flash else "attention.eager_masked_fill_dropout"]
    (node,) = gm.graph.find_nodes(op="call_function", target=torch.ops.fastft.attention)
    assert node.args[9] is not None
    assert node.args[-3] == 0.25
    assert (results[0] - results[1]).abs().max() > 0.01
    error = (results.mean(0) - expected).abs()
    assert (error <= 5 * results.std(0) / 20 + 1e-6).all(), error.max()
    assert results.std(0).mean() > 0.05


@pytest.mark.parametrize("share", [0.25, 0.5])  # 0.5 is F.dropout's default
@pytest.mark.parametrize("name", ["sdpa", "nanoGPT"])
def test_dropout_backward_drops_what_forward_did(name: str, share: float) -> None:
    """The result is linear in the values: sum(y * g) is sum(v * dv), and the same seed gives the same numbers."""
    functions = {
        "sdpa": lambda q, k, v, m: sdpa(q, k, v, m > 0, dropout_p=share),
        "nanoGPT": lambda q, k, v, m: (
            F.dropout(F.softmax((q @ k.transpose(2, 3) * 0.3).masked_fill(m == 0, -torch.inf), -1), share) @ v
        ),
    }
    captures: list = []
    values, actual = [*heads(), flags()], compiled(functions[name], captures)
    torch.manual_seed(3)
    y = actual(*values)
    assert ops(captures[0][0]) == ["attention"]
    upstream = frozen(*y.shape, seed=6)
    dq, dk, dv = torch.autograd.grad(y, values[:3], upstream)
    torch.testing.assert_close((y * upstream).sum(), (values[2] * dv).sum())
    assert all(one.abs().max() > 0.01 for one in (dq, dk))
    torch.manual_seed(3)
    assert torch.equal(actual(*values), y)
    assert not torch.equal(actual(*values), y)


def weighted(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
    return F.softmax(q @ k.transpose(2, 3) * 0.3 + m, dim=-1, dtype=torch.float32).to(q.dtype) @ v


def weights_returned(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> tuple[Tensor, Tensor]:
    """output_attentions=True"""
    weights = F.softmax(q @ k.transpose(2, 3) * 0.3 + m, dim=-1, dtype=torch.float32).to(q.dtype)
    return weights @ v, weights


def sinks_used_twice(q: Tensor, k: Tensor, v: Tensor, m: Tensor, sinks: Tensor) -> tuple[Tensor, Tensor]:
    """The score of a sink, as it is beside the others, goes elsewhere too."""
    more = sinks.reshape(1, -1, 1, 1).expand(B, -1, S, -1)
    combined = torch.cat([q @ k.transpose(2, 3) * 0.3 + m, more], dim=-1)
    combined = combined - combined.max(dim=-1, keepdim=True).values
    scores = F.softmax(combined, dim=-1, dtype=torch.float32)[..., :-1]
    return scores.to(v.dtype) @ v, more.exp()


def sinks_not_dropped(q: Tensor, k: Tensor, v: Tensor, m: Tensor, sinks: Tensor) -> Tensor:
    """Another column than the sink's is left out."""
    combined = torch.cat([q @ k.transpose(2, 3) * 0.3 + m, sinks.reshape(1, -1, 1, 1).expand(B, -1, S, -1)], dim=-1)
    combined = combined - combined.max(dim=-1, keepdim=True).values
    return F.softmax(combined, dim=-1, dtype=torch.float32)[..., 1:].to(v.dtype) @ v


def key_written_to(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
    k = k * 1.5
    scores = q @ k.transpose(2, 3) * 0.3
    k.exp_()
    return F.softmax(scores + m, dim=-1, dtype=torch.float32).to(q.dtype) @ v + k.sum()


def written_afterwards(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> tuple[Tensor, Tensor]:
    k = k * 1.5
    y = sdpa(q, k, v, m)
    return y, k.detach().exp_()


def filled_with(number: float) -> Callable:
    return lambda q, k, v, m: F.softmax((q @ k.transpose(2, 3) * 0.3).masked_fill(m < 0, number), dim=-1) @ v


def of_one_head() -> list[Tensor]:
    return [normal(B, 1, S, D), *heads()[1:]]


square = lambda: [normal(4, 4, 4, 4, seed=seed) for seed in range(3)]  # noqa: E731
no_rank = lambda: [normal(H, S, D), normal(H, T, D, seed=1), normal(H, T, D, seed=2)]  # noqa: E731
none_at_all = lambda: [normal(B, 0, S, D), normal(B, 0, T, D), normal(B, 0, T, D)]  # noqa: E731
plain_softmax = lambda q, k, v: F.softmax(q @ k.transpose(-2, -1) * 0.3, dim=-1) @ v  # noqa: E731
NEAR = {  # name: function, values, the reason; None: routers have softmaxes too, so that none is told
    "-1e4": (
        filled_with(-1e4), lambda: [*heads(), bias()],
        "scores are filled with -10000.0 and not with -inf",
    ),
    "weights returned": (weights_returned, lambda: [*heads(), bias()], "is also used by the graph's output"),
    "a sink used twice": (sinks_used_twice, lambda: [*heads(), bias(), sinks()], "expand is also used by exp"),
    "another column dropped": (sinks_not_dropped, lambda: [*heads(), bias(), sinks()], None),
    "a softmax over queries": (lambda q, k, v: F.softmax(q @ k.transpose(2, 3) * 0.3, -2) @ v, heads, None),
    "a softmax over heads": (lambda q, k, v: F.softmax(q @ k.transpose(2, 3) * 0.3, 1) @ v, heads, None),
    "keys not transposed": (lambda q, k, v: F.softmax(q @ k * 0.3, -1) @ v, square, None),
    "keys transposed otherwise": (lambda q, k, v: F.softmax(q @ k.transpose(1, 3) * 0.3, -1) @ v, square, None),
    "a softmax of a softmax": (
        lambda q, k, v: F.softmax(F.softmax(q @ k.transpose(2, 3) * 0.3, -1), -1) @ v, heads, None,
    ),
    "one query head": (plain_softmax, of_one_head, "k has size 4 in dimension H and q has 1"),
    "one query head, torch's": (
        lambda q, k, v: sdpa(q, k, v), of_one_head, "k has size 4 in dimension H and q has 1",
    ),
    "no heads": (
        lambda q, k, v: sdpa(q, k, v), none_at_all, "the number of query heads is no multiple of that of key heads",
    ),
    "three axes": (lambda q, k, v: sdpa(q, k, v), no_rank, "q has 3 dimensions, not 'B H S D'"),
    "three axes, by hand": (plain_softmax, no_rank, None),
    "a mask of keys alone": (
        lambda q, k, v, m: sdpa(q, k, v, m), lambda: [*heads(), bias(shape=(B, 1, 1, T))],
        "mask has size 1 in dimension S and q has 5",
    ),
    "keys written to": (key_written_to, lambda: [*heads(), bias()], "is written to in place"),
    "keys written to afterwards": (written_afterwards, lambda: [*heads(), bias()], "is written to in place"),
    "all dropped": (lambda q, k, v: sdpa(q, k, v, dropout_p=1.0), heads, "dropout is 1.0"),
}  # fmt: skip


@pytest.mark.parametrize("name", NEAR)
def test_a_near_miss_is_left_alone_and_explained(name: str) -> None:
    function, make, reason = NEAR[name]
    captures: list = []
    values, actual = make(), compiled(function, captures)
    expected, mine = function(*values), actual(*values)
    ((gm, report),) = captures
    assert (ops(gm), report.lifted, report.masks) == ([], [], [])
    assert len(report.near_misses) == (reason is not None), reasons(report)
    assert all(reason in one for one in told(report)), reasons(report)
    torch.testing.assert_close(mine, expected)


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("name", ["-1e9", "the lowest", "with a bias"])
def test_rows_that_are_filled_throughout(name: str, trained: bool) -> None:
    """They weigh all keys alike, and nothing of queries, keys or a bias has a part in that."""
    function = {
        "-1e9": filled_with(-1e9), "the lowest": filled_with(LOWEST),
        "with a bias": lambda q, k, v, m: mpt(q, k, v, (m >= 0).float(), m),
    }[name]  # fmt: skip
    mask = bias(shape=(B, H, S, T) if name == "with a bias" else (B, 1, S, T))
    mask[0, :, 1], mask[1, :, 3:] = -mask[0, :, 1].abs(), -mask[1, :, 3:].abs()
    captures: list = []
    values = [*heads(), mask.requires_grad_(trained and name == "with a bias")]
    assert_right(compiled(function, captures), function, values)
    assert ops(captures[0][0]) == ["attention"]


ADDED = {  # a spelling, and the truth
    "transformers": (weighted, scaled),
    "torch": (lambda q, k, v, m: sdpa(q, k, v, m), exact),
    "Falcon": (lambda q, k, v, m: sdpa(q, k[:, :1], v[:, :1], m), lambda q, k, v, m: exact(q, k[:, :1], v[:, :1], m)),
    "Gemma 2": (lambda q, k, v, m: gemma2(q, k, v, m.expand(B, H, S, T)), beside(exact, scale=0.3, softcap=0.7)),
}


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("shape", [(B, 1, S, T), (1, H, S, T), (B, H, S, T), (H, S, T), (S, T)], ids=str)
@pytest.mark.parametrize("name", ADDED)
def test_what_is_added_may_differ_between_heads_and_be_trained(
    name: str, shape: tuple[int, ...], trained: bool
) -> None:
    function, right = ADDED[name]
    dtype = torch.bfloat16 if len(shape) == 3 else torch.float32
    captures: list = []
    values = [*heads(dtype), bias(dtype, shape).requires_grad_(trained)]
    assert_right(compiled(function, captures), function, values, right)
    ((gm, report),) = captures
    assert (ops(gm), reasons(report)) == (["attention"], [])


def test_a_bool_mask_may_differ_between_heads() -> None:
    captures: list = []
    function = lambda q, k, v, m: sdpa(q, k, v, m > 0)  # noqa: E731
    values = [*heads(), flags(shape=(1, H, S, T))]
    assert_right(compiled(function, captures), function, values, allowed)
    assert ops(captures[0][0]) == ["attention"]


def test_a_sink_of_two_layers() -> None:
    captures: list = []
    function = lambda q, k, v, m, s: gpt_oss(q, k, v, m, s) * gpt_oss(q, k, v, m, s.exp())  # noqa: E731
    right = lambda q, k, v, m, s: (scaled(q, k, v, m, s) * scaled(q, k, v, m, s.exp())).transpose(1, 2)  # noqa: E731
    values = [*heads(), bias(), sinks()]
    assert_right(compiled(function, captures), function, values, right)
    assert ops(captures[0][0]) == ["attention", "attention"]
