"""Statistics of 4-bit weights as parameters: the same numbers, sharded or not, and nothing that is cast unseen."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from training.setting import LAYERS, Setting, base, batch, trained

import fastft
from fastft.statistics import NAME, statistics_as_parameters_

STORED = pytest.mark.parametrize("storage", [torch.uint8, torch.float32], ids=str)


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[None]:
    """One process is a group, too."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'meeting'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def seen(model: Any, called: Any) -> list[Tensor]:
    """The loss and every gradient."""
    loss = called(**batch(0)).loss
    loss.backward()
    gradients = [one.grad for one in trained(model)]
    return [loss.detach(), *(one.full_tensor() if isinstance(one, DTensor) else one for one in gradients)]


def compiled(model: Any) -> Any:
    torch._dynamo.reset()
    return torch.compile(model, backend="fastft", options={"lower": "eager", "strict": True})


@STORED
@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("sharded", [False, True])
def test_numbers_are_the_same(fast: bool, sharded: bool, storage: torch.dtype, alone: None, tmp_path: Path) -> None:
    plain, model = (Setting(tmp_path).model(nf4=True, storage=storage) for _ in range(2))
    names = statistics_as_parameters_(model)
    assert len(names) == 7 * LAYERS
    assert statistics_as_parameters_(model) == []
    if sharded:
        for layer in model.get_base_model().model.layers:
            fully_shard(layer)
        fully_shard(model)
        assert all(isinstance(getattr(model.get_submodule(name), NAME), DTensor) for name in names)
    found, wanted = seen(model, compiled(model) if fast else model), seen(plain, plain)
    if fast:
        graph = fastft.compilations().graphs[-1]
        assert sum("four_bit" in one.rule for one in graph.lifted) == len(names)
        torch.testing.assert_close(found, wanted)
    else:
        assert all(map(torch.equal, found, wanted))


@pytest.mark.parametrize("nested", [True, False])
def test_no_cast_goes_unseen(nested: bool, tmp_path: Path) -> None:
    model = Setting(tmp_path).model()
    fastft.quantize_(model.requires_grad_(False), double_quant=nested)
    statistics_as_parameters_(model)
    before = model(**batch(0)).loss
    assert torch.equal(model.to(torch.float32)(**batch(0)).loss, before)
    fastft.quantize_(other := base().requires_grad_(False), storage=torch.float32)
    statistics_as_parameters_(other)
    layer = other.model.layers[0].mlp.up_proj
    layer._parameters[NAME].data = layer._parameters[NAME].data.to(torch.bfloat16)
    with pytest.raises(RuntimeError, match="were cast"):
        other(**batch(0))


def test_adapters_alone_are_saved_as_before(tmp_path: Path) -> None:
    from peft import get_peft_model_state_dict

    plain, model = (Setting(tmp_path).model(nf4=True) for _ in range(2))
    statistics_as_parameters_(model)
    saved, wanted = get_peft_model_state_dict(model), get_peft_model_state_dict(plain)
    assert saved.keys() == wanted.keys()
    assert all(torch.equal(saved[name], wanted[name]) for name in saved)
