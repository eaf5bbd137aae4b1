"""Groups of projections: which are merged, and that nothing else of the graph changes with them."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from bitsandbytes.functional import quantize_4bit
from lifting import Capture, calls, compiled, reasons, rules
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastft.compat.fake_tensors import value_of
from fastft.kernels.lora_group import Group

WIDTH, RANK = 64, 4
GROUP = "lora_linear.group"


class Lora(nn.Module):
    """A linear layer with an adapter."""

    def __init__(self, out: int = WIDTH, bias: bool = False, adapter: bool = True) -> None:
        super().__init__()
        self.base = nn.Linear(WIDTH, out, bias=bias).requires_grad_(False)
        self.a = nn.Parameter(torch.randn(RANK, WIDTH) / 8) if adapter else None
        self.b = nn.Parameter(torch.randn(out, RANK) / 2) if adapter else None

    def delta(self, x: Tensor) -> Tensor:
        return F.linear(F.linear(x, self.a), self.b) * 0.5

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) if self.a is None else self.base(x) + self.delta(x)


class Net(nn.Module):
    """Siblings q and k, with adapters, and v without; a buffer that may be written to; what the test makes of them."""

    def __init__(self, function: Callable[["Net", Tensor], Any]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q, self.k, self.v = Lora(), Lora(32, bias=True), Lora(32, adapter=False)
        self.register_buffer("bank", torch.zeros(2, 5, 32))
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


def results(run: Callable, net: nn.Module, x: Tensor) -> dict[str, Tensor | None]:
    """Outputs, gradients, and the buffers afterwards, of a step; buffers and random numbers begin the same."""
    net.zero_grad(set_to_none=True)
    for buffer in net.buffers():
        buffer.detach_().zero_()
    x = x.detach().requires_grad_()
    torch.manual_seed(1)
    given = run(x)
    outputs = [given] if isinstance(given, Tensor) else list(given)
    needing = [one for one in outputs if one.requires_grad]
    upstream = [torch.linspace(-1, 1, one.numel()).view_as(one).to(one.dtype) for one in needing]
    torch.autograd.backward(needing, upstream)
    found: dict[str, Tensor | None] = {f"output {at}": one.detach() for at, one in enumerate(outputs)}
    found |= {name: buffer.detach().clone() for name, buffer in net.named_buffers()}
    return found | {"x": x.grad} | {name: parameter.grad for name, parameter in net.named_parameters()}


def check(net: nn.Module, x: Tensor | None = None, tolerance: float = 3e-6) -> list[Capture]:
    """Everything as the unmodified model has it; the graphs."""
    x = torch.randn(2, 5, WIDTH, generator=torch.Generator().manual_seed(2)) if x is None else x
    captures: list[Capture] = []
    run = compiled(net, captures)
    expected, actual = results(net, net, x), results(run, net, x)
    assert actual.keys() == expected.keys()
    for name, mine in actual.items():
        other = expected[name]
        assert (mine is None) == (other is None), f"{name}: a gradient where there was none, or none"
        if mine is not None and other is not None:
            assert (mine.shape, mine.dtype, mine.stride()) == (other.shape, other.dtype, other.stride()), name
            assert (mine - other).norm() <= tolerance * other.norm(), name
    return captures


def groups(captures: list[Capture]) -> int:
    return sum(rules(report)[1].count(GROUP) for _, report in captures)


def bias_by_keyword(net: Net, x: Tensor) -> Tensor:
    return F.linear(x, net.k.base.weight, bias=net.k.base.bias) + net.k.delta(x)


def all_by_keyword(net: Net, x: Tensor) -> Tensor:
    return F.linear(input=x, weight=net.k.base.weight, bias=net.k.base.bias) + net.k.delta(x)


def one_after_the_other(net: Net, x: Tensor) -> Tensor:
    return net.k(net.q(x))


def an_adapter_reads_another_result(net: Net, x: Tensor) -> Tensor:
    return net.k.base(x) + net.k.delta(net.q(x))


def returned(net: Net, x: Tensor) -> tuple[Tensor, ...]:
    return net.q(x), net.k(x)


def returned_as_views(net: Net, x: Tensor) -> tuple[Tensor, ...]:
    return net.q(x).view(2, 5, 4, 16).transpose(1, 2), net.k(x)[:, 1:]


def strided(net: Net, x: Tensor) -> Tensor:
    return net.q(x).sum() + net.k(x).as_strided((2, 3), (1, 7)).square().sum()


def written_to_afterwards(net: Net, x: Tensor) -> Tensor:
    q, k = net.q(x), net.k(x)
    k = k * 1.0
    k.add_(1.0)
    return torch.cat([q, k], -1)


def into_a_checkpoint(net: Net, x: Tensor) -> Tensor:
    q, k = net.q(x), net.k(x)
    return checkpoint(
        lambda one, other: torch.cat([one.tanh(), other.view(-1, 32).tanh().view(2, 5, 32)], -1),
        q,
        k,
        use_reentrant=False,
    )


def out_of_a_checkpoint(net: Net, x: Tensor) -> tuple[Tensor, ...]:
    q, k = checkpoint(lambda x: (net.q(x), net.k(x)), x, use_reentrant=False)
    return q.view(-1), k.view(-1)


def with_writes_in_a_checkpoint(net: Net, x: Tensor) -> Tensor:
    def inner(x: Tensor) -> Tensor:
        z = x * 1.0
        z.add_(1.0)
        z[..., :3].zero_()
        return net.q(F.relu(z, inplace=True))

    return checkpoint(inner, x, use_reentrant=False)


def reshaped(net: Net, x: Tensor) -> Tensor:
    q, k, v = net.q(x).view(2, 5, 2, 32), net.k(x).view(2, 5, 1, 32), net.v(x).view(2, 5, 1, 32)
    return (q * k.expand(2, 5, 2, 32) + v.repeat(1, 1, 2, 1)).transpose(1, 2).reshape(2, -1)


def half_the_siblings_cast(net: Net, x: Tensor) -> Tensor:
    return torch.cat([net.q(x.double().float()), net.k(x)], -1)


MERGED: dict[Callable, int] = {
    bias_by_keyword: 1, all_by_keyword: 1, one_after_the_other: 2, an_adapter_reads_another_result: 2, returned: 1,
    returned_as_views: 1, strided: 1, written_to_afterwards: 1, into_a_checkpoint: 1, out_of_a_checkpoint: 1,
    with_writes_in_a_checkpoint: 0, reshaped: 1, half_the_siblings_cast: 1,
}  # fmt: skip


@pytest.mark.parametrize("function", MERGED, ids=lambda one: one.__name__)
def test_merged_and_everything_else_as_before(function: Callable) -> None:
    assert groups(check(Net(function))) == MERGED[function]


def test_what_is_returned_may_be_written_to_and_viewed() -> None:
    net = Net(returned)
    q, k = compiled(net, [])(torch.randn(2, 5, WIDTH))
    loss = (q * q).sum() + k.view(-1).sum()
    k.detach().add_(1.0)
    loss.backward()
    assert net.q.a.grad is not None


def another_rounding(net: Net, x: Tensor) -> Tensor:
    return torch.cat([net.q(x), net.k(x.bfloat16().float())], -1)


def an_integer_between(net: Net, x: Tensor) -> Tensor:
    return torch.cat([net.q(x), net.k((4 * x).to(torch.int32).float())], -1)


def without_a_gradient_of_the_input(net: Net, x: Tensor) -> Tensor:
    with torch.no_grad():
        other = x.double()
    return torch.cat([net.q(x.double().float()), net.k(other.float())], -1)


def a_base_on_less(net: Net, x: Tensor) -> Tensor:
    return net.q.base(x.to(torch.float8_e4m3fn).float()) + net.q.delta(x)


def a_result_that_nothing_uses(net: Net, x: Tensor) -> Tensor:
    net.k(x) * 2.0
    return net.q(x)


def a_result_used_detached(net: Net, x: Tensor) -> Tensor:
    return net.q(x).sum() + net.k(x).detach().sum()


def a_bank_of_results(net: Net, x: Tensor) -> Tensor:
    net.bank.copy_(net.v(x.detach()) * 1.0)
    return net.q(x.detach())


def another_input(net: Net, x: Tensor) -> Tensor:
    return torch.cat([net.q(x), net.k(x * 2.0)], -1)


def other_random_numbers(net: Net, x: Tensor) -> Tensor:
    q = F.dropout(net.q(x), 0.5)
    return torch.cat([q, net.k.base(x) + net.k.delta(F.dropout(x, 0.5))], -1)


APART: dict[Callable, int] = {
    another_rounding: 2, an_integer_between: 2, without_a_gradient_of_the_input: 2, a_base_on_less: 1,
    a_result_that_nothing_uses: 1, a_result_used_detached: 1, a_bank_of_results: 1, another_input: 2,
    other_random_numbers: 2,
}  # fmt: skip


@pytest.mark.parametrize("function", APART, ids=lambda one: one.__name__)
def test_no_siblings(function: Callable) -> None:
    captures = check(Net(function))
    assert groups(captures) == APART[function]
    widths = [
        node.args[10]
        for gm, _ in captures
        for node in gm.graph.find_nodes(op="call_function", target=torch.ops.fastft.lora_linear)
    ]
    assert all(len(one) == 1 for one in widths)


def a_cast_source_written_to(net: Net, x: Tensor) -> Tensor:
    h = (x * 1.0).double()
    q = net.q(h.float())
    h.add_(1.0)
    return torch.cat([q, net.k(h.float())], -1)


def a_bias_written_to(net: Net, x: Tensor) -> Tensor:
    q, bias = net.q(x), net.bank[0, 0]
    bias.add_(1.0)
    return torch.cat([q, F.linear(x, net.k.base.weight, bias) + net.k.delta(x)], -1)


def an_input_written_to(net: Net, x: Tensor) -> Tensor:
    h = x * 1.0
    q = net.q.base(h)
    h.mul_(2.0)
    return q + net.q.delta(h)


@pytest.mark.parametrize(
    "function", [a_cast_source_written_to, a_bias_written_to, an_input_written_to], ids=lambda one: one.__name__
)
def test_what_is_written_to_is_left_alone(function: Callable) -> None:
    captures = check(Net(function))
    assert all("written to" in reason for _, report in captures for reason in reasons(report))


def across_modes(net: Net, x: Tensor) -> Tensor:
    q = net.q(x)
    with torch.autocast("cpu", torch.bfloat16):
        k = net.k(x)
    return torch.cat([q, k], -1)


def test_modes_are_not_mixed() -> None:
    captures = check(Net(across_modes), tolerance=1e-2)
    assert groups(captures) == 2
    assert [reason for _, report in captures for reason in reasons(report)] == []


def under_autocast(net: Net, x: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return torch.cat([net.q(x), net.k(x)], -1)


def test_autocast_costs_adapters_no_casts() -> None:
    """The op reads them as they are and counts them as rounded; their gradients need no cast either."""
    ((gm, _),) = check(Net(under_autocast), tolerance=1e-2)
    (call,) = gm.graph.find_nodes(op="call_function", target=torch.ops.fastft.lora_linear)
    group: Any = Group(*call.args)  # type: ignore[arg-type]
    assert group.rounded
    factors = [*group.lora_a, *group.lora_b]
    assert all(node.op == "placeholder" and value_of(node).dtype == torch.float32 for node in factors)
    assert value_of(group.x).dtype == torch.bfloat16


def test_float64_is_left_alone_by_autocast() -> None:
    net = Net(lambda net, x: torch.autocast("cpu", torch.bfloat16)(lambda x: torch.cat([net.q(x), net.k(x)], -1))(x))
    x = torch.randn(2, 5, WIDTH, dtype=torch.float64)
    assert groups(check(net.double(), x, 1e-12)) == 1


def test_sums_of_other_shapes_are_left_alone() -> None:
    """What broadcasts is no adapter of the layer."""
    for function in (
        lambda net, x: net.q.base(x) + net.q.delta(x.mean(1, keepdim=True)),
        lambda net, x: net.q.base(x.mean(1, keepdim=True)) + net.q.delta(x),
        lambda net, x: F.linear(x, net.q.base.weight, net.bank[0, 0, :1]) + net.q.delta(x),
    ):
        assert groups(check(Net(function))) == 0


def test_layers_are_groups_of_their_own() -> None:
    """Blocks that read one input, as parallel branches do, stay apart."""

    class Layers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.layers = nn.ModuleList([Lora(), Lora()])

        def forward(self, x: Tensor) -> Tensor:
            return self.layers[0](x) + self.layers[1](x).relu()

    assert groups(check(Layers())) == 2


def test_transforms_keep_the_graph_as_it_is() -> None:
    net = Net(lambda net, x: torch.vmap(net.q)(x))
    captures = check(net)
    assert groups(captures) == 0
    assert all("fastft.lora_linear" not in calls(gm) for gm, _ in captures)


@pytest.mark.parametrize("shape", [(WIDTH,), (3, WIDTH), (2, 3, 4, WIDTH), (1, 1, WIDTH)])
def test_any_number_of_axes(shape: tuple[int, ...]) -> None:
    net = Net(lambda net, x: torch.cat([net.q(x), net.k(x), net.v(x)], -1))
    assert groups(check(net, torch.randn(shape))) == 1


class FourBit(nn.Module):
    """A weight in 4 bits, its statistics quantised or not."""

    def __init__(self, out: int, nested: bool, quant_type: str = "nf4") -> None:
        super().__init__()
        packed, self.state = quantize_4bit(torch.randn(out, WIDTH), compress_statistics=nested, quant_type=quant_type)
        self.packed = nn.Parameter(packed, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        from bitsandbytes import matmul_4bit

        return matmul_4bit(x, self.packed, self.state)


@pytest.mark.parametrize(
    ("others", "count"), [(("nf4", True), 1), (("nf4", False), 0), (("fp4", True), 0)], ids=["alike", "flat", "fp4"]
)
def test_4_bit_siblings_of_one_kind(others: tuple[str, bool], count: int) -> None:
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.first, self.second = FourBit(64, True), FourBit(32, others[1], others[0])

        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([self.first(x), self.second(x)], -1)

    captures = check(Pair())
    assert groups(captures) == count
    assert sum(rules(report)[0].count("lora_linear.four_bit") for _, report in captures) == 2
