"""Which expressions become fastft::glu and fastft::glu_packed, which do not, and for what reason."""

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from choices import in_pairs
from lifting import assert_right, compiled, frozen, lifted, normal, ops, reasons, rules, told
from torch import Tensor, nn

from fastft.patterns import glu as patterns

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
RULES = {rule.reference.__name__: rule for rule in patterns.RULES if rule.replacement is not None}
SEPARATE = [name for name in RULES if not name.endswith("_packed")]
PACKED = [name for name in RULES if name.endswith("_packed")]
PLAIN = "it multiplies nothing; Inductor fuses it with its neighbours"
B, S, WIDTH = 2, 5, 12
SLOPE = math.sqrt(2.0 / math.pi)
LAYOUTS: dict[str, Callable[[torch.dtype, int, int], Tensor]] = {
    "contiguous": lambda dtype, width, seed: normal(B, S, width, dtype=dtype, seed=seed),
    "transposed": lambda dtype, width, seed: frozen(S, B, width, dtype=dtype, seed=seed).transpose(0, 1),
    "a slice": lambda dtype, width, seed: frozen(B, S, 3 * width, dtype=dtype, seed=seed)[..., width : 2 * width],
    "of experts": lambda dtype, width, seed: normal(3, B, S, width, dtype=dtype, seed=seed),
    "flat": lambda dtype, width, seed: normal(S, width, dtype=dtype, seed=seed),
}


@in_pairs(name=SEPARATE, gate_dtype=DTYPES, up_dtype=DTYPES, layout=LAYOUTS)
def test_every_reference_becomes_one_op_and_stays_right(
    name: str, gate_dtype: torch.dtype, up_dtype: torch.dtype, layout: str
) -> None:
    make = LAYOUTS[layout]
    values = [make(gate_dtype, WIDTH, 0).requires_grad_(), make(up_dtype, WIDTH, 1).requires_grad_()]
    gm, report = lifted(RULES[name].reference, *values)
    assert rules(report)[0] == [f"glu.{name}"], reasons(report)
    assert reasons(report) == []
    assert ops(gm) == ["glu"]
    assert_right(gm, RULES[name].reference, values)


@in_pairs(name=PACKED, dtype=DTYPES, layout=LAYOUTS)
def test_every_packed_reference_becomes_one_op_and_stays_right(name: str, dtype: torch.dtype, layout: str) -> None:
    values = [LAYOUTS[layout](dtype, 2 * WIDTH, 0).requires_grad_()]
    gm, report = lifted(RULES[name].reference, *values)
    assert rules(report)[0] == [f"glu.{name}"], reasons(report)
    assert reasons(report) == []
    assert ops(gm) == ["glu_packed"]
    assert_right(gm, RULES[name].reference, values)


SPELLINGS: dict[str, tuple[str, Callable]] = {
    "other order": ("silu", lambda g, u: u * F.silu(g)),
    "by functions": ("silu", lambda g, u: torch.mul(F.silu(g), u)),
    "by methods": ("silu", lambda g, u: F.silu(g).mul(u)),
    "inplace by keyword": ("silu", lambda g, u: F.silu(input=g, inplace=False) * u),
    "written out": ("silu_written_out", lambda g, u: u * (g.sigmoid() * g)),
    "written out by F.sigmoid": ("silu_written_out", lambda g, u: (F.sigmoid(g) * g).multiply(u)),
    "gelu by default": ("gelu", lambda g, u: F.gelu(g) * u),
    "gelu without approximation": ("gelu", lambda g, u: u * F.gelu(g, approximate="none")),
    "tanh": ("gelu_tanh", lambda g, u: u * F.gelu(approximate="tanh", input=g)),
    "tanh written out": (
        "gelu_tanh_written_out",
        lambda g, u: u * (g * 0.5 * (torch.tanh((0.044715 * g.pow(3.0) + g) * SLOPE) + 1.0)),
    ),
    "relu and its square": ("relu2", lambda g, u: u * torch.relu(g) ** 2),
    "relu by a method": ("relu2", lambda g, u: g.relu().pow(2) * u),
    "relu times itself": ("relu2", lambda g, u: _squared(F.relu(g)) * u),
}


def _squared(x: Tensor) -> Tensor:
    return x * x


@pytest.mark.parametrize("name", SPELLINGS)
def test_spellings(name: str) -> None:
    rule, function = SPELLINGS[name]
    values = [normal(B, S, WIDTH), normal(B, S, WIDTH, seed=1)]
    gm, report = lifted(function, *values)
    assert (ops(gm), rules(report)[0]) == (["glu"], [f"glu.{rule}"]), reasons(report)
    assert_right(gm, function, values)


def chunk_by_method(x: Tensor) -> Tensor:
    gate, up = x.chunk(2, dim=-1)
    return up * F.silu(gate)


def chunk_by_axis_number(x: Tensor) -> Tensor:
    gate, up = torch.chunk(x, 2, 2)
    return F.silu(gate) * up


def split_in_two(x: Tensor) -> Tensor:
    gate, up = x.split(WIDTH, dim=-1)
    return F.silu(gate) * up


def torch_split(x: Tensor) -> Tensor:
    gate, up = torch.split(x, WIDTH, -1)
    return F.silu(gate) * up


def indexed_chunks(x: Tensor) -> Tensor:
    parts = x.chunk(2, -1)
    return F.silu(parts[0]) * parts[1]


def by_slices(x: Tensor) -> Tensor:
    return F.silu(x[..., :WIDTH]) * x[..., WIDTH:]


def by_full_slices(x: Tensor) -> Tensor:
    return F.silu(x[:, :, 0:WIDTH]) * x[:, :, WIDTH:]


def by_a_size(x: Tensor) -> Tensor:
    half = x.size(-1) // 2
    return x[..., half:] * F.silu(x[..., :half])


@pytest.mark.parametrize(
    "function",
    [
        chunk_by_method,
        chunk_by_axis_number,
        split_in_two,
        torch_split,
        indexed_chunks,
        by_slices,
        by_full_slices,
        by_a_size,
    ],
    ids=lambda function: function.__name__,
)
def test_packed_spellings(function: Callable) -> None:
    values = [normal(B, S, 2 * WIDTH)]
    gm, report = lifted(function, *values)
    assert (ops(gm), rules(report)[0]) == (["glu_packed"], ["glu.silu_packed"]), reasons(report)
    assert_right(gm, function, values)


def split_into_list(x: Tensor) -> Tensor:
    gate, up = x.split([WIDTH, WIDTH], dim=-1)
    return F.silu(gate) * up


def up_first(x: Tensor) -> Tensor:
    up, gate = x.chunk(2, -1)
    return F.silu(gate) * up


def along_another_axis(x: Tensor) -> Tensor:
    gate, up = x.chunk(2, 0)
    return F.silu(gate) * up


def of_three(x: Tensor) -> Tensor:
    gate, up, _ = x.chunk(3, -1)
    return F.silu(gate) * up


def of_other_halves(x: Tensor) -> Tensor:
    return F.silu(x[..., :6]) * x[..., 6:12]


def overlapping(x: Tensor) -> Tensor:
    return F.silu(x[..., :WIDTH]) * x[..., 6 : WIDTH + 6]


def interleaved(x: Tensor) -> Tensor:
    return F.silu(x[..., ::2]) * x[..., 1::2]


def half_used_elsewhere(x: Tensor) -> tuple[Tensor, Tensor]:
    gate, up = x.chunk(2, -1)
    return F.silu(gate) * up, gate.exp()


@pytest.mark.parametrize(
    "function",
    [
        split_into_list,
        up_first,
        along_another_axis,
        of_three,
        of_other_halves,
        overlapping,
        interleaved,
        half_used_elsewhere,
    ],
    ids=lambda function: function.__name__,
)
def test_what_are_no_halves_in_order_is_taken_as_two_tensors(function: Callable) -> None:
    values = [normal(B, S, 2 * WIDTH)]
    gm, report = lifted(function, *values)
    assert (ops(gm), rules(report)[0]) == (["glu"], ["glu.silu"]), reasons(report)
    assert_right(gm, function, values)


def activated_used_elsewhere(g: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    y = F.silu(g)
    return y * u, y


def gate_written_between(g: Tensor, u: Tensor) -> Tensor:
    g = g * 2
    y = F.silu(g)
    g.add_(1.0)
    return y * u


def activated_in_place(g: Tensor, u: Tensor) -> Tensor:
    return F.silu(g * 2, inplace=True) * u


def scaled_in_place(g: Tensor, u: Tensor) -> Tensor:
    return F.silu(g).mul_(u)


def scaled_by_a_number(g: Tensor, u: Tensor) -> Tensor:
    return F.silu(g) * 2.0 + u


def divided(g: Tensor, u: Tensor) -> Tensor:
    return F.silu(g) / u


def added(g: Tensor, u: Tensor) -> Tensor:
    return F.silu(g) + u


def broadcast(g: Tensor, u: Tensor) -> Tensor:
    return F.silu(g) * u[:1]


def scaled_by_a_column(g: Tensor, u: Tensor) -> Tensor:
    return F.silu(g) * u[..., :1]


def limited(g: Tensor, u: Tensor) -> Tensor:
    return F.silu(g).clamp(max=7.0) * u


def relu_once(g: Tensor, u: Tensor) -> Tensor:
    return F.relu(g) * u


def relu_cubed(g: Tensor, u: Tensor) -> Tensor:
    return F.relu(g).pow(3) * u


NEGATIVE = [  # what must not be lifted, and what the reason says; None: nothing is near
    (activated_used_elsewhere, "silu is also used by the graph's output"),
    (gate_written_between, "mul is written to in place"),
    (activated_in_place, None),
    (scaled_in_place, PLAIN),
    (scaled_by_a_number, PLAIN),
    (divided, PLAIN),
    (added, PLAIN),
    (broadcast, "it could not be checked: RuntimeError: gate (2, 5, 12), up (1, 5, 12)"),
    (scaled_by_a_column, "up has size 1 in dimension I and gate has 12"),
    (limited, PLAIN),
    (relu_once, PLAIN),
    (relu_cubed, PLAIN),
    (lambda g, u: F.elu(g) * u, None),
    (lambda g, u: F.softplus(g) * u, None),
    (lambda g, u: torch.sigmoid(g) * u, None),
    (lambda g, u: g * torch.sigmoid(1.702 * g) * u, None),
    (lambda g, u: u * torch.sigmoid(g) * u, None),  # gate and up swapped in one of two places
    (lambda g, u: g * u * torch.sigmoid(g), None),
    (lambda g, u: g * (torch.sigmoid(g) * u), None),
    (lambda g, u: 0.5 * g * (1.0 + torch.tanh(SLOPE * (g + 0.0447 * torch.pow(g, 3.0)))) * u, None),
    (lambda g, u: 0.5 * g * (1.0 + torch.tanh(SLOPE * (g + 0.044715 * torch.pow(u, 3.0)))) * u, None),
    (lambda g, u: 0.5 * g * (1.0 - torch.tanh(SLOPE * (g + 0.044715 * torch.pow(g, 3.0)))) * u, None),
    (lambda g, u: 0.5 * g * (1 + torch.tanh(0.7978845608 * (g + 0.044715 * g**3))) * u, None),
]


@pytest.mark.parametrize(("function", "reason"), NEGATIVE, ids=[case[0].__name__ for case in NEGATIVE])
def test_a_near_miss_is_left_alone_and_explained(function: Callable, reason: str | None) -> None:
    values = [normal(B, S, WIDTH), normal(B, S, WIDTH, seed=1)]
    gm, report = lifted(function, *values)
    assert (ops(gm), report.lifted) == ([], [])
    assert told(report) == [reason] * (reason is not None)
    torch.testing.assert_close(gm(*values), function(*values))


@pytest.mark.parametrize("name", ["plain_silu", "plain_gelu", "plain_gelu_tanh", "plain_relu"])
def test_an_activation_alone_is_explained(name: str) -> None:
    gm, report = lifted(getattr(patterns, name), normal(B, S, WIDTH))
    assert (ops(gm), reasons(report)) == ([], [PLAIN])


GATES_USED_TWICE = {
    "up is the gate": lambda g, u: F.silu(g) * g + u,
    "up is the gate, written out": lambda g, u: g * torch.sigmoid(g) * g + u,
    "the gate is added": lambda g, u: F.silu(g) * u + g,
    "two gates": lambda g, u: F.silu(g) * u + F.silu(u) * g,
    "one gate for two": lambda g, u: F.silu(g) * u + F.gelu(g) * u.exp(),
}


@pytest.mark.parametrize("name", GATES_USED_TWICE)
def test_a_gate_used_twice_gets_the_gradients_of_both(name: str) -> None:
    function = GATES_USED_TWICE[name]
    values = [normal(B, S, WIDTH), normal(B, S, WIDTH, seed=1)]
    gm, report = lifted(function, *values)
    assert set(ops(gm)) == {"glu"}, reasons(report)
    assert_right(gm, function, values)


def test_of_two_activations_that_are_multiplied_one_is_the_gate() -> None:
    both = lambda g, u: F.silu(g) * F.silu(u)  # noqa: E731
    values = [normal(B, S, WIDTH), normal(B, S, WIDTH, seed=1)]
    gm, report = lifted(both, *values)
    assert (ops(gm), reasons(report)) == (["glu"], [PLAIN])
    assert_right(gm, both, values)


@pytest.mark.parametrize("needs", [(True, False), (False, True), (False, False)], ids=str)
def test_what_is_frozen_gets_no_gradient(needs: tuple[bool, bool]) -> None:
    values = [frozen(B, S, WIDTH).requires_grad_(needs[0]), frozen(B, S, WIDTH, seed=1).requires_grad_(needs[1])]
    gm, _ = lifted(patterns.silu, *values)
    assert ops(gm) == ["glu"]
    y = gm(*values)
    assert y.requires_grad == any(needs)
    if any(needs):
        y.sum().backward()
    assert tuple(value.grad is not None for value in values) == needs


def test_float64_stays_float64() -> None:
    values = [normal(B, WIDTH, dtype=torch.float64) / 3, normal(B, WIDTH, dtype=torch.float64, seed=1) / 3]
    gm, _ = lifted(patterns.silu, *values)
    assert ops(gm) == ["glu"]
    torch.testing.assert_close(gm(*values), patterns.silu(*values), rtol=1e-14, atol=1e-14)


def test_up_in_another_memory_order_than_the_gate() -> None:
    """The product has the order of its first operand: with the gate first that of the op, otherwise it is declined."""
    values = [frozen(S, B, WIDTH).transpose(0, 1).requires_grad_(), normal(B, S, WIDTH, seed=1)]
    gm, _ = lifted(patterns.silu, *values)
    assert ops(gm) == ["glu"]
    assert_right(gm, patterns.silu, values)
    turned = lambda g, u: u * F.silu(g)  # noqa: E731
    gm, report = lifted(turned, *values)
    assert gm(*values).stride() == turned(*values).stride()
    assert ops(gm) == []
    assert "the replacement is laid out as" in reasons(report)[0]


class Mlp(nn.Module):
    """As in models, with the activation a module."""

    def __init__(self, activation: nn.Module) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(8, 12), nn.Linear(8, 12), nn.Linear(12, 8)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.activation(self.gate(x)) * self.up(x))


@pytest.mark.parametrize(
    ("activation", "rule"),
    [(nn.SiLU(), "silu"), (nn.GELU(), "gelu"), (nn.GELU(approximate="tanh"), "gelu_tanh"), (nn.ELU(), None)],
    ids=["silu", "gelu", "gelu_tanh", "elu"],
)
@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])
def test_a_module_captured_by_torch(activation: nn.Module, rule: str | None, autocast: bool) -> None:
    torch.manual_seed(0)
    mlp, captures = Mlp(activation), []
    x = normal(B, S, 8)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y, expected = compiled(mlp, captures)(x), mlp(x)
    assert rules(captures[0][1])[0] == [f"glu.{rule}"] * (rule is not None)
    near = {"rtol": 3e-2, "atol": 3e-2} if autocast else {}
    torch.testing.assert_close(y, expected, **near)
    for mine, eager in zip(
        *(torch.autograd.grad(one.sum(), list(mlp.parameters())) for one in (y, expected)), strict=True
    ):
        torch.testing.assert_close(mine, eager, **near)


def test_gradients_switched_off_halfway_are_respected() -> None:
    def function(g: Tensor, u: Tensor) -> Tensor:
        with torch.no_grad():
            activated = F.silu(g)
        return activated * u

    captures: list = []
    compiled(function, captures)(normal(B, WIDTH), normal(B, WIDTH, seed=1))
    assert reasons(captures[0][1]) == ["_set_grad_enabled is called halfway"]
