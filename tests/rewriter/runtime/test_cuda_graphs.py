"""A stack of layers as CUDA graphs: the same gradients in whatever order a training loop calls."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from fastft.rewriter.lowering import cuda_graph_policy
from fastft.rewriter.runtime import cuda_graphs

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
LAYERS, WIDTH = 4, 32


class Layer(nn.Module):
    """A residual block with a frozen and a trained projection, as with LoRA."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.frozen, self.trained = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH, bias=False)
        self.frozen.requires_grad_(False)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, scale: Tensor) -> Tensor:
        return x + self.dropout(torch.tanh(self.frozen(x) + self.trained(x))) * scale


class Model(nn.Module):
    """A stack of layers between two projections."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.embed = nn.Linear(8, WIDTH)
        self.layers = nn.ModuleList([Layer(dropout) for _ in range(LAYERS)])
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden, scale = self.embed(x), x.mean(-1, keepdim=True)
        for layer in self.layers:
            hidden = layer(hidden, scale)
        return self.head(hidden).square().mean()


@pytest.fixture(autouse=True, params=[False, True], ids=["", "parts"])
def in_parts(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether each layer goes backward in a graph of its own, as where gradients are sent to other devices."""
    monkeypatch.setattr(cuda_graph_policy.ddp, "is_active", lambda: request.param)
    return request.param


@pytest.fixture
def replays(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the stacks did with each call: a test of graphs in which nothing is replayed tests nothing."""
    calls: list[str] = []
    real = cuda_graphs.Capture.load

    def load(self: cuda_graphs.Capture, inputs: list) -> None:
        calls.append("load")
        real(self, inputs)

    monkeypatch.setattr(cuda_graphs.Capture, "load", load)
    return calls


def build(lower: str = "eager", dropout: float = 0.0, asked: bool | None = True) -> tuple[Model, Callable]:
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = Model(dropout).cuda()
    options = {"lower": lower, "cuda_graphs": asked, "strict": True}
    return model, torch.compile(model, backend="fastft", options=options)


def batch(seed: int, length: int = 5) -> Tensor:
    return torch.randn(2, length, 8, generator=torch.Generator().manual_seed(seed)).cuda()


def gradients(model: nn.Module) -> list[Tensor]:
    grads = [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]
    model.zero_grad(set_to_none=True)
    return grads


def assert_same(actual: list[Tensor], expected: list[Tensor]) -> None:
    assert len(actual) == len(expected) > 0
    for place, (one, other) in enumerate(zip(actual, expected, strict=True)):
        torch.testing.assert_close(one, other, msg=lambda text, place=place: f"tensor {place}: {text}")


@pytest.mark.parametrize("lower", ["eager", "inductor"])
def test_training(lower: str, replays: list[str]) -> None:
    """Parameters change in place between the steps, and every step sees them."""
    model, compiled = build(lower)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.5)
    losses = []
    for seed in range(6):
        model(batch(seed)).backward()
        expected = gradients(model)
        losses.append(compiled(batch(seed)))
        losses[-1].backward()
        assert_same([parameter.grad for parameter in trained], expected)
        optimizer.step()
        model.zero_grad(set_to_none=True)
    assert len({loss.item() for loss in losses}) == 6, "each loss keeps its own value"
    assert len(replays) >= 4


def test_gradients_accumulate(replays: list[str]) -> None:
    model, compiled = build()
    for round_ in range(3):
        for seed in range(4):
            model(batch(seed + round_)).backward()
        expected = gradients(model)
        for seed in range(4):
            compiled(batch(seed + round_)).backward()
        assert_same(gradients(model), expected)
    assert len(replays) >= 10


def test_two_forwards_before_their_backwards(replays: list[str]) -> None:
    """The second is run without graphs, whose activations the first still needs."""
    model, compiled = build()
    for _ in range(3):
        compiled(batch(0)).backward()
    model.zero_grad(set_to_none=True)
    for order in ((0, 1), (1, 0)):
        (model(batch(1)) - 2 * model(batch(2))).backward()
        expected = gradients(model)
        losses = [compiled(batch(1)), -2 * compiled(batch(2))]
        for which in order:
            losses[which].backward()
        assert_same(gradients(model), expected)
    assert len(replays) >= 3


def test_a_forward_without_backward_does_not_block(replays: list[str]) -> None:
    model, compiled = build()
    for seed in range(4):
        compiled(batch(seed)).backward()
    model.zero_grad(set_to_none=True)
    compiled(batch(7))
    before = len(replays)
    compiled(batch(8)).backward()
    assert len(replays) == before + 1
    actual = gradients(model)
    model(batch(8)).backward()
    assert_same(actual, gradients(model))


def test_lengths_evaluation_and_moved_parameters(replays: list[str]) -> None:
    model, compiled = build()
    for number, length in enumerate([5, 5, 5, 9, 9, 9, 9, 7, 7, 7, 5, 9]):
        if number == 6:
            for parameter in model.parameters():
                parameter.data = parameter.data.clone() * 1.25
        x = batch(number, length)
        with torch.no_grad():
            torch.testing.assert_close(compiled(x), model(x))
        compiled(x).backward()
        actual = gradients(model)
        model(x).backward()
        assert_same(actual, gradients(model))
    assert len(replays) >= 6


def test_backward_twice_is_an_error_that_says_what_to_do() -> None:
    _, compiled = build()
    for seed in range(3):
        compiled(batch(seed)).backward()
    loss = compiled(batch(3))
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="set cuda_graphs=False"):
        loss.backward()


def test_a_parameter_changed_before_backward_is_an_error() -> None:
    model, compiled = build()
    for seed in range(3):
        compiled(batch(seed)).backward()
    loss = compiled(batch(3))
    with torch.no_grad():
        model.layers[1].trained.weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("lower", ["eager", "inductor"])
def test_dropout_differs_from_call_to_call(lower: str, replays: list[str]) -> None:
    model, compiled = build(lower, dropout=0.5)
    losses = []
    for _ in range(6):
        losses.append(compiled(batch(0)))
        losses[-1].backward()
    assert len({loss.item() for loss in losses}) == 6
    assert len(replays) >= 4
    model.eval()
    torch.testing.assert_close(compiled(batch(0)), model(batch(0)))


@pytest.mark.parametrize(
    ("asked", "length", "graphs"),
    [(None, 5, True), (False, 5, False), (None, cuda_graph_policy.SMALL // (2 * WIDTH) + 1, False)],
)
def test_small_layers_of_fixed_size_are_graphed_unasked(
    asked: bool | None, length: int, graphs: bool, replays: list[str]
) -> None:
    _, compiled = build(asked=asked)
    for seed in range(4):
        compiled(batch(seed, length)).backward()
    assert bool(replays) == graphs


def test_changing_lengths_are_not_graphed_unasked(replays: list[str]) -> None:
    _, compiled = build(asked=None)
    for length in (5, 6, 7, 7, 8, 8, 8, 7, 7, 7):
        compiled(batch(0, length)).backward()
    assert not replays


def test_a_length_that_stays_is_graphed_unasked(replays: list[str]) -> None:
    """Also in a graph for any length."""
    model, compiled = build(asked=None)
    for seed, length in enumerate((5, 6, *[7] * (cuda_graph_policy.PATIENCE + 2))):
        compiled(batch(seed, length)).backward()
        actual = gradients(model)
        model(batch(seed, length)).backward()
        assert_same(actual, gradients(model))
    assert replays


@torch.library.custom_op("fastft_test::synchronised", mutates_args=())
def synchronised(x: Tensor) -> Tensor:
    """A copy that waits for the device, which no capture allows."""
    return x * float(x.sum().item() == x.sum().item())


synchronised.register_fake(torch.empty_like)
synchronised.register_autograd(lambda ctx, grad_output: grad_output)


class Waiting(Layer):
    """A layer that cannot be captured."""

    def forward(self, x: Tensor, scale: Tensor) -> Tensor:
        return super().forward(synchronised(x), scale)


def test_layers_that_cannot_be_captured_run_as_they_are(replays: list[str], caplog: pytest.LogCaptureFixture) -> None:
    model, compiled = build()
    model.layers = nn.ModuleList([Waiting(0.0) for _ in range(LAYERS)]).cuda()
    for seed in range(4):
        compiled(batch(seed)).backward()
        actual = gradients(model)
        model(batch(seed)).backward()
        assert_same(actual, gradients(model))
    assert len(replays) == 1, "one attempt, and no other"
    assert "no CUDA graph" in caplog.text
    torch.rand(2, device="cuda")  # what torch leaves of a failed capture would make this an error
