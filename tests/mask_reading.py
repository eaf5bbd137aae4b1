"""Masks that a graph returns, read, and what the op is told of them held to what they are."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from transformers import masking_utils as hf

from fastft.compat.fake_tensors import value_of
from fastft.kernels.attention import allowed
from fastft.rewriter.attention.masks import recognize

TENSORS = ("start", "end", "query_ids", "key_ids")


@dataclass
class Seen:
    """A mask of a function, what it was recognised as, and the op's arguments where it was."""

    mask: Tensor
    found: recognize.Mask | str
    arguments: dict[str, Any] = field(default_factory=dict)

    @property
    def kind(self) -> str:
        assert not isinstance(self.found, str), self.found
        return self.found.kind

    @property
    def given(self) -> set[str]:
        """The arguments that say something."""
        return {name for name, value in self.arguments.items() if isinstance(value, Tensor) or value}


class Reading:
    """A graph that returns masks, and gives the op's arguments for those that are recognised beside them."""

    def __init__(self, gm: GraphModule, sizes: dict[str, int]) -> None:
        self.gm, self.sizes = gm, sizes
        self.found: list[recognize.Mask | str] = []
        self.static: list[dict[str, Any]] = []  # arguments; in the place of tensors the names of them all
        self.results: Sequence[Tensor] = ()
        end = gm.graph.output_node()
        nodes: Any = end.args[0]
        added: list[Node] = []
        for node in nodes:
            self.found.append(recognize.recognize(node, **sizes))
            arguments = {} if isinstance(self.found[-1], str) else self.found[-1].arguments(end)
            tensors = [name for name in TENSORS if isinstance(arguments.get(name), Node)]
            assert all(value_of(arguments[name]).dim() == 2 for name in tensors)
            added += [arguments[name] for name in tensors]
            self.static.append(arguments | dict.fromkeys(tensors, tensors))
        end.args = ((*nodes, *added),)
        gm.graph.lint()
        gm.recompile()

    def run(self, *inputs: Any) -> Sequence[Tensor]:
        """The masks alone."""
        self.results = self.gm(*inputs)
        return self.results[: len(self.found)]

    def seen(self) -> list[Seen]:
        """Each mask of the last run, held to the arguments."""
        rest = iter(self.results[len(self.found) :])
        read = [
            {name: next(rest) if isinstance(value, list) else value for name, value in arguments.items()}
            for arguments in self.static
        ]
        shown = [Seen(*one) for one in zip(self.results, self.found, read, strict=False)]
        for one in shown:
            if not isinstance(one.found, str):
                assert_exact(one, **self.sizes)
        return shown


def assert_exact(one: Seen, rows: int | None = None, columns: int | None = None) -> None:
    """The op's arguments allow what the mask does; rows that are alike are those masked throughout by the lowest."""
    mask = one.mask.reshape((1,) * (4 - one.mask.dim()) + one.mask.shape)
    B, _, S, T = mask.shape
    S, T = rows or S, columns or T
    mask = mask.expand(B, -1, S, T)
    for name, length in zip(TENSORS, (S, S, S, T), strict=True):
        tensor = one.arguments[name]
        if tensor is not None:
            assert tensor.dim() == 2
            assert tensor.shape[0] in (1, B)
            assert tensor.shape[1] == length
            assert tensor.is_contiguous()
            assert not tensor.is_floating_point()
    query, key = torch.empty(B, 1, S, 1), torch.empty(B, 1, T, 1)
    flags = one.arguments["causal"], one.arguments["window"]
    got = allowed(query, key, *(one.arguments[name] for name in TENSORS), None, *flags)
    start = one.arguments["start"]
    same_weight = None if start is None else start[:, None, :, None] < 0
    same_weight = torch.zeros(1, 1, 1, 1, dtype=torch.bool) if same_weight is None else same_weight
    expected, masked = mask, torch.zeros(1, 1, 1, 1, dtype=torch.bool)
    if mask.dtype != torch.bool:
        expected, masked = mask == 0, (mask == torch.finfo(mask.dtype).min).all(-1, keepdim=True)
    assert torch.equal(same_weight.expand(B, 1, S, 1), masked.expand(B, 1, S, 1))
    assert torch.equal(got.expand(mask.shape), expected | masked)


def seen(function: Callable, *values: Any, dynamic: bool = False, **sizes: int) -> list[Seen]:
    """Each mask that a function returns; those that are recognised say exactly what they did."""
    ways: list[Reading] = []

    def backend(gm: GraphModule, _: object) -> Callable:
        ways.append(Reading(gm, sizes))
        return ways[-1].run

    torch._dynamo.reset()
    torch.compile(function, backend=backend, dynamic=dynamic)(*values)
    assert len(ways) == 1, "the graph broke"
    return ways[0].seen()


def only(function: Callable, *values: Any, **options: Any) -> Seen:
    (one,) = seen(function, *values, **options)
    return one


def sdpa(rule: Callable, padded: bool = False, **more: Any) -> Callable:
    """transformers' mask of what a rule makes of the input; the input is padding too if it is padded."""

    def mask(given: Tensor) -> Tensor:
        sizes = {"batch_size": given.shape[0], "q_length": given.shape[1], "kv_length": given.shape[1], **more}
        padding = given.bool() if padded else None
        return hf.sdpa_mask(mask_function=rule(given), attention_mask=padding, allow_is_causal_skip=False, **sizes)

    return mask
