"""Small models to shard, what is done with them, and what can be seen of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.utils.checkpoint import checkpoint

import fastft
from fastft.compat import fsdp

LAYERS, WIDTH, WORDS, LENGTH = 4, 16, 32, 5
EAGER = {"lower": "eager", "strict": True}
ROUGH = 2e-2  # by which two right runs in bfloat16 may differ, of a gradient's norm
watching: list[Callable[[str, int], None]] = []  # called in each layer that is watched, in forward and in backward


def _watched(x: Tensor, when: str, number: int) -> Tensor:
    for watch in watching:
        watch(when, number)
    return x.clone()


watched: Any = torch.library.custom_op("test_fsdp::watched", _watched, mutates_args=())
watched.register_fake(lambda x, when, number: torch.empty_like(x))
watched.register_autograd(
    lambda ctx, grad: (watched(grad, "backward", ctx.number), None, None),
    setup_context=lambda ctx, inputs, output: setattr(ctx, "number", inputs[2]),
)


class Layer(nn.Module):
    def __init__(self, number: int) -> None:
        super().__init__()
        self.norm, self.number = nn.RMSNorm(WIDTH), number
        self.attention = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH))
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 24, bias=False), nn.SiLU(), nn.Linear(24, WIDTH, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(self.norm.weight.dtype)
        x = x + self.attention(self.norm(x))
        return x + self.mlp(x)


class WatchedLayer(Layer):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(watched(x, "forward", self.number))


class Model(nn.Module):
    """A language model that returns its loss; of inputs that are embedded already, if there are some."""

    layer: Any = Layer

    def __init__(self, *, tied: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = nn.Embedding(WORDS, WIDTH), nn.Linear(WIDTH, WORDS, bias=False)
        self.layers, self.norm = nn.ModuleList(map(self.layer, range(LAYERS))), nn.RMSNorm(WIDTH)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, ids: Tensor, embeds: Tensor | None = None) -> Tensor:
        return self.loss(self.run(self.embed(ids) if embeds is None else embeds), ids)

    def run(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x

    def loss(self, x: Tensor, ids: Tensor) -> Tensor:
        logits = self.head(self.norm(x.to(self.head.weight.dtype)))
        return F.cross_entropy(logits.flatten(0, 1), ids.flatten())


class Watched(Model):
    layer = WatchedLayer


class Checkpointed(Model):
    def run(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=False)
        return x


class CallsTwice(Model):
    def run(self, x: Tensor) -> Tensor:
        return self.layers[1](super().run(x))


class Skipping(Model):
    """Leaves out a layer for a batch of some length: it has two graphs, which take turns."""

    def run(self, x: Tensor) -> Tensor:
        for number, layer in enumerate(self.layers):
            x = layer(x) if number != 2 or x.shape[1] != LENGTH else x
        return x


class Breaking(Model):
    """Breaks the graph between two uses of a weight."""

    def __init__(self) -> None:
        super().__init__(tied=True)

    def loss(self, x: Tensor, ids: Tensor) -> Tensor:
        torch._dynamo.graph_break()
        return super().loss(x, ids)


class Uncompiled(Breaking):
    """Uses a weight a second time in code that is not compiled."""

    loss = torch.compiler.disable(Model.loss)


class Outer(nn.Module):
    """Is not sharded, but for what it holds."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, *inputs: Any, **more: Any) -> Any:
        return self.model(*inputs, **more)


def sharded(model: Any, **more: Any) -> Any:
    """Shard layers and root."""
    for layer in (model if hasattr(model, "layers") else model.model).layers:
        fully_shard(layer, **more)
    return fully_shard(model, **more)


def each(groups: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Return what shards some modules, or groups of modules, and the root after them."""

    def shard(model: Any) -> Any:
        for group in groups(model):
            fully_shard(group)
        return fully_shard(model)

    return shard


SHARDINGS: dict[str, Callable[[Any], Any]] = {
    "the root alone": each(lambda model: []),
    "embedding and head": each(lambda model: [model.embed, model.head, *model.layers]),
    "embedding and head together": each(lambda model: [[model.embed, model.head], *model.layers]),
    "parts of layers": each(lambda model: [part for one in model.layers for part in (one.mlp, one.attention, one)]),
    "parts of layers together": each(lambda model: [[one.mlp, one.attention] for one in model.layers]),
    "two layers together": each(lambda model: [[*model.layers[:2]], [*model.layers[2:4]]]),
    "columns": lambda model: sharded(model, shard_placement_fn=lambda one: Shard(one.ndim - 1)),
    "not all weights": lambda model: sharded(model, ignored_params={model.layers[1].mlp[0].weight}),
}


def compiled(model: Any, how: str = "around", **options: Any) -> Any:
    """Compile a model, what it is inside of, or the model in place."""
    if how == "in place":
        model.compile(backend="fastft", options=EAGER | options)
        return model
    return torch.compile(Outer(model) if how == "inside" else model, backend="fastft", options=EAGER | options)


def tokens(length: int = LENGTH, part: int = 0) -> Tensor:
    return torch.randint(WORDS, (2, length), generator=torch.Generator().manual_seed(length + 100 * part))


def gradients(model: Any) -> dict[str, Tensor | None]:
    grads = {name: one.grad for name, one in model.named_parameters()}
    return {name: grad.full_tensor() if isinstance(grad, DTensor) else grad for name, grad in grads.items()}


def step(model: Any, called: Any, *inputs: Any, **more: Any) -> tuple[Tensor, dict[str, Tensor | None]]:
    """Return the loss and every gradient."""
    model.zero_grad()
    result = called(*inputs, **more) if inputs or more else called(tokens())
    loss = getattr(result, "loss", result)
    loss.backward()
    return loss.detach(), gradients(model)


def check(plain: Any, model: Any, called: Any, *inputs: Any, **more: Any) -> None:
    """Compare a step with that of the same model, which is not sharded."""
    torch.testing.assert_close(step(model, called, *inputs, **more), step(plain, plain, *inputs, **more))


def compiled_by(call: Any) -> list[Any]:
    """The graphs that fastft compiles in this call."""
    before = {id(graph) for graph in fastft.compilations().graphs}
    call()
    return [graph for graph in fastft.compilations().graphs if id(graph) not in before]


def layers_of(graph: Any) -> int:
    """How many layers a graph holds."""
    assert not graph.failure
    return sum(region.calls for region in graph.regions if region.module)


def whole_in(model: Any) -> set[str]:
    """The names of all parameters that are whole in memory."""
    groups = [group for state in fsdp.state_of(model)._state_ctx.all_states for group in fsdp.groups_of(state)]
    parameters = [one for group in groups for one in group.fsdp_params if hasattr(one, "_unsharded_param")]
    return {one._param_fqn for one in parameters if one._unsharded_param.untyped_storage().size()}
