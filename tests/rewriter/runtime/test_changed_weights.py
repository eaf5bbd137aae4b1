"""Weights that are resized, replaced, tied, untied or cast between steps: the next step is as without fastft."""

import copy
import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

VOCABULARY = 160


def build(*, tied: bool = True) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(
        **sizes, num_hidden_layers=1, vocab_size=VOCABULARY, tie_word_embeddings=tied, initializer_range=0.1
    )
    return LlamaForCausalLM(config)


def resized(model: Any) -> None:
    """As for new special tokens: the same parameter or another, of another size."""
    torch.manual_seed(1)
    model.resize_token_embeddings(VOCABULARY + 11, mean_resizing=False)


def resized_in_place(model: Any) -> None:
    """The parameter stays, and gets other memory of another size."""
    weight = model.get_input_embeddings().weight
    weight.grad = None
    weight.data = torch.cat([weight.data, weight.data[:9]])
    model.lm_head.out_features = model.config.vocab_size = model.get_input_embeddings().num_embeddings = len(weight)


def replaced(model: Any) -> None:
    torch.manual_seed(2)
    model.lm_head = nn.Linear(64, model.config.vocab_size, bias=False)


def untied(model: Any) -> None:
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())


def tied(model: Any) -> None:
    model.lm_head.weight = model.get_input_embeddings().weight


def cast(model: Any) -> None:
    model.to(torch.float64)


def head_cast(model: Any) -> None:
    """The head in another dtype than what comes to it, as a cast module's hook makes possible."""
    untied(model)
    model.lm_head.to(torch.float64)
    model.lm_head.register_forward_pre_hook(lambda module, args: (args[0].double(),))


def moved(model: Any) -> None:
    """Every parameter gets other memory."""
    for value in model.parameters():
        value.data = value.data.clone()


def frozen(model: Any) -> None:
    model.get_input_embeddings().weight.requires_grad_(False)


CHANGES = (resized, resized_in_place, replaced, untied, cast, head_cast, moved, frozen)


def step(call: Callable, model: nn.Module, number: int) -> list[Tensor]:
    """A loss of both kinds: fused, and by logits that are read."""
    model.zero_grad(set_to_none=True)
    ids = torch.randint(3, 150, (2, 12), generator=torch.Generator().manual_seed(number))
    out = call(input_ids=ids, labels=ids)
    out.logits.argmax(-1)
    loss = out.loss + 1e-2 * out.logits.square().mean()
    loss.backward()
    return [loss.detach(), *(value.grad for value in model.parameters() if value.grad is not None)]


def assert_as_without(changes: tuple[Callable[[Any], None], ...], *, start_tied: bool = True) -> None:
    torch.compiler.reset()
    model = build(tied=start_tied)
    plain = copy.deepcopy(model)
    compiled = torch.compile(model, backend="fastft", options={"lower": "eager", "strict": True})
    for number, change in enumerate((lambda model: None, *changes)):
        gc.collect()  # a compilation's frames in Dynamo, and what called it, may wait for that (seen on torch 2.14)
        change(model)
        change(plain)
        for again in range(2):
            actual, expected = step(compiled, model, 2 * number + again), step(plain, plain, 2 * number + again)
            assert len(actual) == len(expected)
            for one, other in zip(actual, expected, strict=True):
                torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_change_between_steps(change: Callable[[Any], None]) -> None:
    assert_as_without((change,))


def test_one_change_after_another() -> None:
    assert_as_without((untied, resized, tied, moved, replaced), start_tied=True)


def test_tied_late() -> None:
    assert_as_without((tied, resized), start_tied=False)
