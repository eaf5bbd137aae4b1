"""Attention that was lifted, made simpler: masks and repeated heads that are gone, and those that stay."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lifting import Capture, calls, compiled, frozen, normal, ops, rewritten
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.utils.checkpoint import checkpoint

from fastft.compat.fake_tensors import value_of
from fastft.rewriter.attention.simplify import PARAMETERS
from fastft.rewriter.fx.bodies import bodies

B, H, G, S, D = 2, 4, 2, 6, 8
LOWEST = torch.finfo(torch.float32).min
PADDING = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0]])
sdpa = F.scaled_dot_product_attention


def heads(length: int = S, groups: int = H) -> list[Tensor]:
    """q, k and v."""
    shapes = [(B, H, length, D), (B, groups, length, D), (B, groups, length, D)]
    return [normal(*shape, seed=seed) for seed, shape in enumerate(shapes)]


def attentions(gm: GraphModule) -> list[dict[str, Any]]:
    """What each attention of a graph and its bodies is given."""
    nodes = [
        node
        for body in bodies(gm)
        for node in body.graph.find_nodes(op="call_function", target=torch.ops.fastft.attention)
    ]
    return [dict(zip(PARAMETERS, node.args, strict=True)) for node in nodes]


def same(function: Callable, *values: Tensor, count: int = 1) -> Capture:
    """Rewritten, with as many attentions; outputs and gradients are those of the function."""
    captures: list[Capture] = []
    actual = compiled(function, captures)
    assert_same(actual, function, *values)
    ((gm, report),) = captures
    assert len(attentions(gm)) == count, (ops(gm), report.near_misses)
    return gm, report


def assert_same(actual: Callable, function: Callable, *values: Tensor) -> None:
    trained = [value for value in values if value.requires_grad]
    got, expected = actual(*values), function(*values)
    torch.testing.assert_close(got, expected)
    upstream = frozen(*expected.shape, seed=9)
    gradients = [torch.autograd.grad(y, trained, upstream) for y in (got, expected)]
    torch.testing.assert_close(*gradients)


def kinds(capture: Capture) -> list[str]:
    return [mask.rule for mask in capture[1].masks]


def squares(gm: GraphModule, length: int = S) -> list[Node]:
    """What has an element for each query and key."""
    nodes = [node for body in bodies(gm) for node in body.graph.nodes]
    shaped = [node for node in nodes if isinstance(value_of(node), Tensor)]
    return [node for node in shaped if tuple(value_of(node).shape[-2:]) == (length, length)]


REPEATED: dict[str, Callable[[Tensor], Tensor]] = {
    "transformers": lambda x: x[:, :, None, :, :].expand(B, G, 2, S, D).reshape(B, H, S, D),
    "a short index": lambda x: x[:, :, None].expand(B, G, 2, S, D).reshape(B, H, S, D),
    "unsqueeze": lambda x: x.unsqueeze(2).expand(-1, -1, 2, -1, -1).reshape(B, H, S, D),
    "unsqueeze from the end": lambda x: x.unsqueeze(-3).expand(B, G, 2, S, D).reshape(B, -1, S, D),
    "repeat_interleave": lambda x: x.repeat_interleave(2, dim=1),
    "torch.repeat_interleave": lambda x: torch.repeat_interleave(x, 2, 1),
    "repeat_interleave from the end": lambda x: x.repeat_interleave(repeats=2, dim=-3),
    "contiguous": lambda x: x[:, :, None].expand(B, G, 2, S, D).reshape(B, H, S, D).contiguous(),
    "after an empty cache": lambda x: (
        torch.cat((torch.tensor([]), x), dim=-2)[:, :, None].expand(B, G, 2, S, D).reshape(B, H, S, D)
    ),
}


@pytest.mark.parametrize("name", REPEATED)
def test_heads_are_read_where_they_were_not_repeated(name: str) -> None:
    repeat = REPEATED[name]
    gm, _ = same(lambda q, k, v: sdpa(q, repeat(k), repeat(v), is_causal=True), *heads(groups=G))
    (call,) = attentions(gm)
    assert [call[one].op for one in ("key", "value")] == ["placeholder"] * 2
    assert [call[one].name for one in ("key", "value")] == ["l_k_", "l_v_"]


def test_values_of_another_size_are_read_where_they_were_not_repeated() -> None:
    repeat = REPEATED["repeat_interleave"]
    gm, _ = same(lambda q, k, v: sdpa(q, repeat(k), repeat(v[..., :5]), is_causal=True), *heads(groups=G))
    (call,) = attentions(gm)
    assert [value_of(call[name]).shape for name in ("key", "value")] == [(B, G, S, D), (B, G, S, 5)]


def test_an_empty_cache_is_read_through() -> None:
    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return sdpa(q, torch.cat((torch.tensor([]), k), -2), torch.cat([torch.tensor([]), v], dim=-2), is_causal=True)

    gm, _ = same(function, *heads())
    assert [attentions(gm)[0][one].name for one in ("key", "value")] == ["l_k_", "l_v_"]


def test_a_cache_that_is_not_empty_is_not() -> None:
    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return sdpa(q, torch.cat((k[:, :, :1], k), -2), torch.cat((v[:, :, :1], v), -2))

    gm, _ = same(function, *heads())
    assert value_of(attentions(gm)[0]["key"]).shape[2] == S + 1


def repeated(x: Tensor) -> Tensor:
    return REPEATED["transformers"](x)


OTHERWISE: dict[str, Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]] = {
    "only the key": lambda k, v: (repeated(k), torch.cat((v, v.exp()), 1)),
    "only the value": lambda k, v: (torch.cat((k, k.exp()), 1), repeated(v)),
    "repeat": lambda k, v: (k.repeat(1, 2, 1, 1), v.repeat(1, 2, 1, 1)),
    "the other order": lambda k, v: tuple(x[:, None].expand(B, 2, G, S, D).reshape(B, H, S, D) for x in (k, v)),
    "positions repeated": lambda k, v: tuple(
        torch.cat((x, x), 1).repeat_interleave(2, dim=2)[:, :, ::2] + 0.0 for x in (k, v)
    ),
    "positions repeated, and no more": lambda k, v: tuple(
        torch.cat((x, x.exp()), 1).repeat_interleave(2, dim=2) for x in (k, v)
    ),
}


@pytest.mark.parametrize("name", OTHERWISE)
def test_what_is_repeated_otherwise_is_read_as_it_is(name: str) -> None:
    gm, _ = same(lambda q, k, v: sdpa(q, *OTHERWISE[name](k, v)), *heads(groups=G))
    (call,) = attentions(gm)
    assert [value_of(call[one]).shape[1] for one in ("key", "value")] == [H, H]


def source_written(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """In a way of which no new tensor is made."""
    k = k * 1.5
    keys = repeated(k)
    k.zero_()
    return sdpa(q, keys, repeated(v))


def repeated_written(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    keys = repeated(k)
    keys[:, 1] = 0.0
    return sdpa(q, keys, repeated(v))


def copy_written(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """A clone of each, of which the source is written to."""
    k, v = k * 1.5, v * 1.5
    keys, values = k.clone(), v.clone()
    k.zero_()
    v.zero_()
    return sdpa(q, keys, values)


@pytest.mark.parametrize("function", [source_written, repeated_written, copy_written])
def test_what_is_written_to_is_not_read_elsewhere(function: Callable) -> None:
    captures: list[Capture] = []
    values = heads(groups=H if function is copy_written else G)
    assert_same(compiled(function, captures), function, *values)
    ((gm, _),) = captures
    assert all(value_of(call["key"]).shape[1] == H for call in attentions(gm))


def test_heads_that_are_put_beside_each_other_are_written_so() -> None:
    gm, _ = same(lambda q, k, v: sdpa(q, k, v).transpose(1, 2).contiguous().view(B, S, H * D) * 2, *heads())
    assert calls(gm) == ["fastft.attention", "getitem", "transpose", "view", "mul"]
    assert attentions(gm)[0]["contiguous"] is False


def test_a_result_that_is_used_as_it_is_stays_so() -> None:
    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        y = torch.softmax(q @ k.transpose(2, 3) * 0.3, -1) @ v
        return y.transpose(1, 2).contiguous().view(B, S, H * D) + y.view(B, S, H * D)

    gm, _ = same(function, *heads())
    assert attentions(gm)[0]["contiguous"] is True
    assert "contiguous" in calls(gm)


def causal(padding: Tensor) -> Tensor:
    """Padding and causal, bool."""
    rows = torch.arange(padding.shape[1])
    return (rows <= rows[:, None]) & (padding[:, None, None, :] != 0)


def packed(positions: Tensor) -> Tensor:
    documents = (positions == 0).cumsum(-1)
    rows = torch.arange(positions.shape[1])
    return (documents[:, None, :, None] == documents[:, None, None, :]) & (rows <= rows[:, None])


def additive(mask: Tensor) -> Tensor:
    return torch.where(mask, torch.zeros(()), torch.finfo(torch.float32).min)


def eager(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    weights = torch.matmul(q, k.transpose(2, 3)) * 0.3 + mask
    return torch.matmul(F.softmax(weights, dim=-1, dtype=torch.float32).to(q.dtype), v)


POSITIONS = torch.tensor([[0, 1, 2, 0, 1, 2], [0, 1, 0, 1, 2, 3]])
ALL = torch.ones(B, S, dtype=torch.int64)
RECOGNISED: dict[str, tuple[Callable, Tensor, str]] = {
    "sdpa, padded": (lambda q, k, v, x: sdpa(q, k, v, causal(x)), ALL, "causal, padding"),
    "sdpa, packed": (lambda q, k, v, x: sdpa(q, k, v, packed(x)), POSITIONS, "causal, documents"),
    "eager, padded": (lambda q, k, v, x: eager(q, k, v, additive(causal(x))), PADDING, "causal, padding"),
    "eager, packed": (lambda q, k, v, x: eager(q, k, v, additive(packed(x))), POSITIONS, "causal, documents"),
    "filled": (
        lambda q, k, v, x: (
            torch.softmax(
                (q @ k.transpose(2, 3) * 0.3).masked_fill(torch.tril(torch.ones(S, S)) == 0, float("-inf")), -1
            )
            @ v
        ),
        ALL, "causal",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", RECOGNISED)
def test_a_mask_that_is_recognised_is_gone(name: str) -> None:
    function, given, kind = RECOGNISED[name]
    capture = same(function, *heads(), given)
    assert kinds(capture) == [kind]
    assert attentions(capture[0])[0]["mask"] is None
    assert not squares(capture[0])


def test_a_mask_that_is_used_otherwise_stays() -> None:
    def function(q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> Tensor:
        mask = packed(x)
        return sdpa(q, k, v, mask) * mask.float().mean()

    capture = same(function, *heads(), POSITIONS)
    assert kinds(capture) == ["causal, documents"]
    assert attentions(capture[0])[0]["mask"] is None
    assert squares(capture[0])


@pytest.mark.parametrize("mask", [lambda x: packed(x), lambda x: additive(packed(x))], ids=["bool", "added"])
def test_layers_share_what_a_mask_means(mask: Callable) -> None:
    def layers(count: int) -> Callable:
        def function(q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> Tensor:
            found = mask(x)
            for _ in range(count):
                q = sdpa(q, k, v, found)
            return q

        return function

    one, two = (same(layers(count), *heads(), POSITIONS, count=count) for count in (1, 2))
    first, second = attentions(two[0])
    assert isinstance(first["start"], Node)
    assert first["start"] is second["start"]
    assert kinds(two) == kinds(one) * 2
    assert len(calls(two[0])) == len(calls(one[0])) + 2  # the op and its first result
    assert not squares(two[0])


def test_a_mask_that_is_data_stays_dense() -> None:
    mask = torch.ones(S, S, dtype=torch.bool).tril()
    capture = same(lambda q, k, v, mask: sdpa(q, k, v, mask), *heads(), mask)
    assert kinds(capture) == ["dense: l_mask_ is data, of queries and keys"]
    assert isinstance(attentions(capture[0])[0]["mask"], Node)


def rows_masked(lowest: float = LOWEST) -> Tensor:
    """A dense mask that is added: the first row of one of the batch sees nothing, nor do the last two of the other."""
    mask = torch.zeros(B, 1, S, S).masked_fill(torch.ones(S, S).tril() == 0, lowest)
    mask[0, :, 0], mask[1, :, -2:] = lowest, lowest
    return mask


SINKS = torch.linspace(-1, 1, H)


def with_sinks(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, sinks: Tensor) -> Tensor:
    weights = torch.matmul(q, k.transpose(2, 3)) * 0.3 + mask
    combined = torch.cat([weights, sinks.reshape(1, -1, 1, 1).expand(B, -1, S, -1)], dim=-1)
    combined = combined - combined.max(dim=-1, keepdim=True).values
    scores = F.softmax(combined, dim=-1, dtype=combined.dtype)[..., :-1]
    return torch.matmul(scores, v)


def by_torch(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return sdpa(q, k, v, mask, scale=0.3)


@pytest.mark.parametrize("function", [eager, by_torch])
def test_rows_that_a_dense_mask_masks_throughout_by_the_lowest_number_are_alike(function: Callable) -> None:
    """As eager computes; the gradients of torch's flash kernel on a CPU are T times too large in such rows."""
    captures: list[Capture] = []
    values, actual = heads(), compiled(function, captures)
    assert_same(actual, eager, *values, rows_masked())
    assert kinds(captures[0])[0].startswith("dense: ")
    torch.testing.assert_close(actual(*values, rows_masked())[0, :, 0], values[2][0].mean(-2))


def test_rows_that_differ_between_heads() -> None:
    """A mask of three axes [H, S, T]: a row that one head does not see is not alike in the others."""
    mask = torch.zeros(H, S, S)
    mask[0, 1] = LOWEST
    mask[2, 4] = LOWEST
    captures: list[Capture] = []
    function = lambda q, k, v, m: sdpa(q, k, v, m)  # noqa: E731
    assert_same(compiled(function, captures), function, *heads(), mask)


def masked_by_head() -> Tensor:
    """Numbers that are added, others in each head: one head's row sees nothing, nor do some rows of a batch's."""
    mask = frozen(1, H, S, S, seed=5) + rows_masked()
    mask[:, 1, 3], mask[0, 2, 2:4] = LOWEST, LOWEST
    return mask


@pytest.mark.parametrize("trained", [False, True])
def test_rows_that_one_head_does_not_see_are_alike_in_it(trained: bool) -> None:
    """In outputs and gradients, a trained mask's own too."""
    captures: list[Capture] = []
    assert_same(compiled(eager, captures), eager, *heads(), masked_by_head().requires_grad_(trained))
    ((_, report),) = captures
    assert [mask.rule for mask in report.masks] == [f"dense: it is {'trained' if trained else 'data'}"]


@pytest.mark.parametrize("trained", [False, True])
def test_rows_of_a_head_in_which_some_keys_are_nothing(trained: bool) -> None:
    """-inf has no gradient, and makes none NaN."""
    mask = masked_by_head().masked_fill(torch.ones(S, S).tril() == 0, -torch.inf).requires_grad_(trained)
    captures: list[Capture] = []
    assert_same(compiled(eager, captures), eager, *heads(), mask)


@pytest.mark.parametrize("trained", [False, True])
def test_layers_share_the_rows_of_a_mask(trained: bool) -> None:
    """They are looked for once, outside of checkpointed layers."""

    def function(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        mask = mask * 1.0
        for _ in range(2):
            q = checkpoint(eager, q, k, v, mask, use_reentrant=False)
        return q

    gm, _ = same(function, *heads(), masked_by_head().requires_grad_(trained), count=2)
    assert calls(gm).count("all") == 1
    assert not any("all" in calls(body) for body in bodies(gm) if body is not gm)


def test_rows_without_a_key_are_nothing_to_torch() -> None:
    mask = rows_masked() == 0
    captures: list[Capture] = []
    values = heads()
    y = compiled(lambda q, k, v, m: sdpa(q, k, v, m), captures)(*values, mask)
    assert len(attentions(captures[0][0])) == 1
    assert not y[0, :, 0].any()
    assert not y[1, :, -2:].any()
    torch.testing.assert_close(y, sdpa(*values, mask))
    gradients = torch.autograd.grad(y.sum(), values)
    assert all(one.isfinite().all() for one in gradients)
    assert not gradients[0][0, :, 0].any()


def test_beside_a_sink_rows_without_a_key_are_nothing() -> None:
    captures: list[Capture] = []
    values, actual = [*heads(), rows_masked(), SINKS.clone().requires_grad_()], compiled(with_sinks, captures)
    assert_same(actual, with_sinks, *values)
    (call,) = attentions(captures[0][0])
    assert isinstance(call["mask"], Node)
    assert call["start"] is None
    y = actual(*values)
    assert not y[0, :, 0].any()
    assert y[0, :, 1].any()


@pytest.mark.parametrize("padding", [PADDING, ALL], ids=["padded", "full"])
def test_beside_a_sink_with_a_mask_that_is_recognised(padding: Tensor) -> None:
    function = lambda q, k, v, x, sinks: with_sinks(q, k, v, additive(causal(x)), sinks)  # noqa: E731
    capture = same(function, *heads(), padding, SINKS.clone().requires_grad_())
    assert kinds(capture) == ["causal, padding"]
    assert not squares(capture[0])


def checkpointed(mask: Callable, layers: int = 2) -> Callable:
    def layer(q: Tensor, k: Tensor, v: Tensor, given: Tensor) -> Tensor:
        return sdpa(q.sin(), k, v, given)

    def function(q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> Tensor:
        given = mask(x)
        for _ in range(layers):
            q = checkpoint(layer, q, k, v, given, use_reentrant=False)
        return q

    return function


@pytest.mark.parametrize("mask", [lambda x: packed(x), lambda x: additive(packed(x))], ids=["bool", "added"])
def test_checkpointed_layers_are_given_what_the_mask_means(mask: Callable) -> None:
    gm, report = same(checkpointed(mask), *heads(), POSITIONS, count=2)
    assert [one.rule for one in report.masks] == ["causal, documents"] * 2
    around = [node for node in gm.graph.nodes if "checkpoint" in str(node.target)]
    assert len(around) == 2
    assert not squares(gm)
    starts = [[one for one in node.args[1:] if not value_of(one).is_floating_point()] for node in around]
    assert [len(one) for one in starts] == [1, 1]
    assert starts[0] == starts[1]


def test_a_checkpointed_layer_with_a_dense_mask() -> None:
    mask = torch.ones(B, 1, S, S, dtype=torch.bool).tril()
    gm, report = same(checkpointed(lambda x: x), *heads(), mask, count=2)
    assert all(one.rule.startswith("dense: ") for one in report.masks)
    assert len(squares(gm)) >= 3


def saved(function: Callable, *values: Tensor) -> int:
    """The elements of the largest tensor that is kept for backward."""
    sizes: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        sizes.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        function(*values)
    return max(sizes)


@pytest.mark.parametrize("mask", [packed, causal])
def test_nothing_of_the_size_of_the_scores_is_kept(mask: Callable) -> None:
    length = 64
    function = lambda q, k, v, x: eager(q, k, v, additive(mask(x)))  # noqa: E731
    x = torch.arange(length).remainder(24).expand(B, length).contiguous()
    values, actual = [*heads(length), x], compiled(function, [])
    actual(*values)
    assert saved(function, *values) >= B * H * length * length
    assert saved(actual, *values) == B * H * length * D


@pytest.mark.parametrize("name", ["sdpa, padded", "sdpa, packed", "eager, padded", "eager, packed"])
def test_lengths_that_change(name: str) -> None:
    """One graph for all."""
    inner, given, kind = RECOGNISED[name]
    captures: list[Capture] = []

    projections = torch.nn.ModuleList(torch.nn.Linear(H * D, H * D) for _ in range(3))  # whose sizes stay

    def function(hidden: Tensor, x: Tensor) -> Tensor:
        q, k, v = (one(hidden).view(B, -1, H, D).transpose(1, 2) for one in projections)
        return inner(q, k, v, x)

    def backend(gm: GraphModule, _: object) -> Callable:
        run, report = rewritten(gm)
        captures.append((gm, report))
        return run

    torch._dynamo.reset()
    actual = torch.compile(function, backend=backend, dynamic=True)
    for length in (S, S + 5, 2 * S):
        assert_same(actual, function, normal(B, length, H * D), given.repeat(1, 2)[:, :length].contiguous())
    (capture,) = captures
    assert kinds(capture) == [kind]
    assert [call["mask"] for call in attentions(capture[0])] == [None]


def test_a_copied_key_that_is_written_to() -> None:
    """Partial rotary embedding in place: what is read is the copy, once it was written to."""

    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k = k.clone()
        k[..., :4] = k[..., :4] * 2.0 + 1.0
        return sdpa(q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1), is_causal=True)

    captures: list[Capture] = []
    assert_same(compiled(function, captures), function, *heads(groups=G))


def test_a_copy_without_gradients() -> None:
    """Repeated under no_grad, keys and values get none."""

    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with torch.no_grad():
            k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
        return sdpa(q, k, v, is_causal=True)

    captures: list[Capture] = []
    values = heads(groups=G)
    y = compiled(function, captures)(*values)
    gradients = torch.autograd.grad(y.sum(), values, allow_unused=True)
    assert [one is None for one in gradients] == [False, True, True]


def test_an_output_copied_without_gradients() -> None:
    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = torch.matmul(torch.softmax(q @ k.transpose(2, 3) * 0.5, -1), v)
        with torch.no_grad():
            out = out.transpose(1, 2).contiguous()
        return out + q.sum()

    values = heads()
    y = compiled(function, [])(*values)
    assert torch.autograd.grad(y.sum(), values, allow_unused=True)[1] is None
