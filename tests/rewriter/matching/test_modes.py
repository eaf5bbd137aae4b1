"""One compiled model in every mode that a fine-tuning script puts it in, each as the model itself would be."""

import copy
from collections import deque
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import fastft
from fastft.rewriter.report import history

OPTIONS = {"lower": "eager", "strict": True}
LAYERS = 4


def tiny() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(**sizes, num_hidden_layers=LAYERS, vocab_size=64, pad_token_id=0, eos_token_id=None)
    model = LlamaForCausalLM(config)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            nn.init.normal_(parameter, mean=0.5, std=0.5)
    return model.train()


def wrapped(model: LlamaForCausalLM) -> nn.Module:
    return torch.compile(model, backend="fastft", options=OPTIONS)


def in_place(model: LlamaForCausalLM) -> nn.Module:
    model.compile(backend="fastft", options=OPTIONS)
    return model


BOTH = pytest.mark.parametrize("compiling", [wrapped, in_place])


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    torch._dynamo.reset()
    monkeypatch.setattr(history, "_graphs", deque(maxlen=history.LIMIT))


def batch(rows: int = 2, length: int = 9) -> dict[str, Tensor]:
    ids = torch.randint(1, 64, (rows, length), generator=torch.Generator().manual_seed(rows * length))
    mask = torch.ones_like(ids)
    mask[0, -3:] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def assert_trains_alike(compiled: nn.Module, plain: nn.Module) -> None:
    results = []
    for model in (compiled, plain):
        model.train()
        model.zero_grad(set_to_none=True)
        loss = model(**batch()).loss
        loss.backward()
        grads = {name.removeprefix("_orig_mod."): parameter.grad for name, parameter in model.named_parameters()}
        assert len(grads) == 9 * LAYERS + 3
        results.append((loss.detach(), grads))
    torch.testing.assert_close(*results)


def assert_infers_alike(compiled: nn.Module, plain: nn.Module, mode: Callable) -> None:
    compiled.eval()
    plain.eval()
    with mode():
        actual, expected = compiled(**batch()), plain(**batch())
    assert not actual.logits.requires_grad
    torch.testing.assert_close(actual.logits, expected.logits)
    torch.testing.assert_close(actual.loss, expected.loss)


@BOTH
def test_every_mode_in_turn(compiling: Callable) -> None:
    model = tiny()
    plain = copy.deepcopy(model)
    compiled = compiling(model)
    assert_trains_alike(compiled, plain)
    for mode in (torch.no_grad, torch.inference_mode):
        assert_infers_alike(compiled, plain, mode)
    compiled.eval()
    torch.testing.assert_close(compiled(**batch()).loss, plain.eval()(**batch()).loss)
    assert_trains_alike(compiled, plain)
    graphs = fastft.compilations().graphs
    assert all([region.calls for region in graph.regions] == [1, LAYERS, 1] for graph in graphs)
    assert 3 <= len(graphs) <= 4  # train, no_grad, inference_mode; eval where it differs from train
    assert len({tuple(graph.dynamic) for graph in graphs}) == 1  # other modes are no reason for changing sizes


def generated(model: nn.Module, **more: object) -> Tensor:
    model.eval()
    inputs = {name: value for name, value in batch(2, 6).items() if name == "input_ids"}
    return model.generate(**inputs, max_new_tokens=8, do_sample=False, use_cache=True, **more)


@BOTH
def test_generation_then_training(compiling: Callable) -> None:
    model = tiny()
    plain = copy.deepcopy(model)
    compiled = compiling(model)
    assert_trains_alike(compiled, plain)
    expected = generated(plain)
    with history.recorded() as generating:
        actual = generated(compiled)
    assert actual.shape == (2, 14)
    assert torch.equal(actual, expected)
    assert (len(generating) > 0) == (compiling is in_place)  # generate() of a wrapped model is the model's own
    assert not any(graph.failure for graph in generating)
    assert_trains_alike(compiled, plain)
    assert torch.equal(generated(compiled), expected)
