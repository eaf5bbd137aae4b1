"""Two processes with fastft against one without; see devices.py."""

from pathlib import Path

import pytest
import torch

import fastft
from training import devices, setting
from training.outcome import compare
from training.setting import LAYERS, Setting, batch


@pytest.mark.slow
def test_two_processes_are_as_one(tmp_path: Path) -> None:
    found = devices.together(tmp_path)
    wrong = {}
    for scenario in devices.DEVICES:
        mine = found[scenario.__name__]
        if "error" in mine:
            assert scenario is devices.fsdp_4bit_sharded  # the last: nothing after it is lost
            assert torch.__version__.startswith("2.14")
            assert "tp_descr_set_impl" in mine["error"]
            continue
        assert not mine["failures"]
        if scenario is devices.ddp_split:
            assert mine["layers"] == [[1, devices.MANY - 1]]  # one graph: the first layer, and all others as one
        if scenario is devices.ddp_padded:
            assert mine["left_out"] > 0
        difference, allowed = compare(torch.tensor(mine["seen"], dtype=torch.float64), scenario)
        if difference > allowed:
            wrong[scenario.__name__] = f"{difference:.1e} apart, {allowed:.1e} allowed"
        if "whole" in scenario.__name__:
            assert len(mine["layers"]) == 1  # one graph
        if "sharded" not in scenario.__name__:
            deeper = (devices.ddp_padded, devices.fsdp_whole_planned)
            depths = {devices.ddp_split: devices.MANY} | dict.fromkeys(deeper, devices.MANY // 2)
            layers = depths.get(scenario, LAYERS)
            assert mine["lifted"]["glu"] % layers == 0
            assert mine["lifted"]["attention"] == mine["lifted"]["glu"] > 0
    assert not wrong


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.device_count() < devices.WORLD, reason="needs two CUDA devices")
def test_two_cards_are_as_one(tmp_path: Path) -> None:
    found = devices.together(tmp_path, "cuda")
    for scenario in devices.ON_CARDS:
        mine = found[scenario.__name__]
        assert not mine["failures"]
        difference, allowed = compare(torch.tensor(mine["seen"], dtype=torch.float64), scenario, device="cuda")
        assert difference <= allowed, f"{scenario.__name__}: {difference:.1e} apart, {allowed:.1e} allowed"


def test_gradients_of_a_layer_are_there_before_those_of_the_layer_below(tmp_path: Path) -> None:
    """So DDP may reduce them meanwhile, though the graph is one: `optimize_ddp` has nothing to add."""
    model = Setting(tmp_path, compiled=True).compile_in_place(setting.base())
    order = []
    for number, layer in enumerate(model.model.layers):
        layer.mlp.down_proj.weight.register_post_accumulate_grad_hook(
            lambda _, number=number: order.append((number, model.model.layers[0].mlp.down_proj.weight.grad is None))
        )
    model(**batch(0)).loss.backward()
    assert len(fastft.compilations().graphs[-1].regions) > 1
    assert order == [(number, number > 0) for number in reversed(range(LAYERS))]
