"""Several processes on torch's own engines, each with its part of a batch: as one process with all of it.

``python -m training.devices RANK FILE RESULTS`` is one of the processes; FILE is where they find one another.
"""

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from training.outcome import lifted_in, seen_with_fastft
from training.setting import Setting, batch, trained

TESTS = Path(__file__).parents[1]
STEPS, WORLD, RATE = 3, 2, 1e-2
BUCKET, MANY = 20_480, 8  # bytes that fill a bucket, so that a small model has several; layers, of which it holds four


def train(
    setting: Setting, model: Any, forward: Any, *, parts: int = 1, waiting: Callable | None = None, each: bool = False
) -> list[float]:
    """Steps of so many parts for each process; waiting: what holds back the reduction of gradients.

    Alone, one process computes all processes' parts.  What is seen: losses, and the norm of all gradients or of each.
    """
    alone = not dist.is_initialized()
    optimizer = torch.optim.AdamW(trained(model), lr=RATE)
    seen = []
    for step in range(STEPS):
        losses = []
        for part in range(parts):
            for rank in range(WORLD) if alone else [dist.get_rank()]:
                number = (step * parts + part) * WORLD + rank
                last = part == parts - 1
                with contextlib.nullcontext() if last or waiting is None else waiting():
                    loss = forward(**batch(number, device=setting.device)).loss
                    (loss / (parts * WORLD if alone else parts)).backward()
                losses.append(loss.detach())
        mean = torch.stack(losses).mean()
        if not alone:
            dist.all_reduce(mean)
            mean /= WORLD
        seen += [mean.item(), *([_number(value.grad.norm()) for value in trained(model)] if each else [_norm(model)])]
        optimizer.step()
        optimizer.zero_grad()
    return seen


def _norm(model: nn.Module) -> float:
    return _number(nn.utils.get_total_norm([value.grad for value in trained(model)]))


def _number(norm: torch.Tensor) -> float:
    return (norm.full_tensor() if isinstance(norm, DTensor) else norm).item()


def ddp(setting: Setting) -> list[float]:
    """DDP, LoRA: `torch.compile(DDP(model))`"""
    model = setting.model()
    return train(setting, model, setting.compile(_ddp(model)))


def ddp_4bit(setting: Setting) -> list[float]:
    """DDP, 4-bit weights and LoRA, `no_sync` while gradients are accumulated"""
    model = setting.model(nf4=True)
    wrapped = _ddp(setting.compile_in_place(model))
    return train(setting, model, wrapped, parts=2, waiting=getattr(wrapped, "no_sync", None))


def ddp_split(setting: Setting) -> list[float]:
    """DDP, 4-bit weights and LoRA, torch's default `optimize_ddp`: several layers in each bucket"""
    model = setting.model(nf4=True, layers=MANY)
    with torch._dynamo.config.patch(optimize_ddp=True):
        return train(setting, model, setting.compile(_ddp(model, bucket_cap_mb=BUCKET / 2**20)), each=True)


def ddp_padded(setting: Setting) -> list[float]:
    """DDP, LoRA, batches of which each process has another number of tokens"""
    model = setting.model(layers=MANY // 2)
    wrapped = setting.compile(_ddp(model))

    def forward(**inputs: torch.Tensor) -> Any:
        tokens = 3 + int(inputs["input_ids"].sum()) % 5  # of the first row
        read = torch.ones_like(inputs["input_ids"])
        read[0, tokens:] = 0
        return wrapped(**inputs | {"attention_mask": read, "labels": inputs["input_ids"].masked_fill(read == 0, -100)})

    return train(setting, model, forward, each=True)


def fsdp(setting: Setting) -> list[float]:
    """FSDP2 `fully_shard`, LoRA, each layer compiled"""
    model = setting.model()
    return train(setting, model, _fsdp(setting, model))


def fsdp_full(setting: Setting) -> list[float]:
    """FSDP2, all weights, gradients accumulated without reducing them"""
    model = setting.model(lora=None)
    return train(setting, model, _fsdp(setting, model), parts=2, waiting=_unreduced(model))


def fsdp_4bit(setting: Setting) -> list[float]:
    """FSDP2, LoRA sharded, 4-bit weights whole on every device (`ignored_params`)"""
    model = setting.model(nf4=True)
    packed = {value for value in model.parameters() if not value.is_floating_point()}
    return train(setting, model, _fsdp(setting, model, ignored_params=packed))


def fsdp_4bit_sharded(setting: Setting) -> list[float]:
    """FSDP2, 4-bit weights sharded too"""
    model = setting.model(nf4=True)
    return train(setting, model, _fsdp(setting, model))


def fsdp_whole(setting: Setting) -> list[float]:
    """FSDP2 as one graph, LoRA: `torch.compile(model)`"""
    model = setting.model()
    return train(setting, model, setting.compile(_sharded(model)), each=True)


def fsdp_whole_full(setting: Setting) -> list[float]:
    """FSDP2 as one graph, all weights, gradients accumulated without reducing them"""
    model = setting.model(lora=None)
    return train(setting, model, setting.compile_in_place(_sharded(model)), parts=2, waiting=_unreduced(model))


def fsdp_whole_4bit(setting: Setting) -> list[float]:
    """FSDP2 as one graph, LoRA, 4-bit weights sharded, stored as the other weights are"""
    model = setting.model(nf4=True, storage=torch.float32)
    return train(setting, model, setting.compile(_sharded(model)), each=True)


def fsdp_whole_planned(setting: Setting) -> list[float]:
    """FSDP2 as one graph, LoRA, 4-bit weights sharded, as little memory as possible"""
    model = setting.model(nf4=True, layers=MANY // 2)
    least = Setting(setting.folder, setting.compiled, options={**setting.options, "memory_budget": "min"})
    return train(setting, model, least.compile(_sharded(model)), each=True)


def _sharded(model: Any) -> Any:
    """``fully_shard`` of layers and root, as it is usually written."""
    if dist.is_initialized():
        for layer in (model.get_base_model() if hasattr(model, "get_base_model") else model).model.layers:
            fully_shard(layer)
        fully_shard(model)
    return model


def _unreduced(model: Any) -> Any:
    @contextlib.contextmanager
    def waiting() -> Any:
        model.set_requires_gradient_sync(False)
        yield
        model.set_requires_gradient_sync(True)

    return waiting if dist.is_initialized() else None


def _ddp(model: nn.Module, **more: Any) -> Any:
    return DistributedDataParallel(model, **more) if dist.is_initialized() else model


def _fsdp(setting: Setting, model: Any, **more: Any) -> Any:
    layers = (model.get_base_model() if hasattr(model, "get_base_model") else model).model.layers
    for layer in layers:
        setting.compile_in_place(layer)
    if dist.is_initialized():
        mesh = dist.init_device_mesh(setting.device, (WORLD,))
        for layer in layers:
            fully_shard(layer, mesh=mesh, **more)
        fully_shard(model, mesh=mesh, **more)
    return model


DEVICES: Sequence[Any] = (
    ddp, ddp_4bit, ddp_split, ddp_padded, fsdp_whole, fsdp_whole_full, fsdp_whole_4bit, fsdp_whole_planned,
    fsdp, fsdp_full, fsdp_4bit, fsdp_4bit_sharded,
)  # fmt: skip


ON_CARDS = (ddp_4bit, fsdp_whole_full, fsdp_whole_4bit)  # a minute's compilation


def environment() -> dict[str, str]:
    """What processes that these tests start find in their environment."""
    path = os.pathsep.join(filter(None, [str(TESTS), os.environ.get("PYTHONPATH")]))
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path}


def together(folder: Path, device: str = "cpu") -> dict[str, Any]:
    """What the processes saw; on cards, of ON_CARDS alone and through Inductor."""
    results = folder / "results.json"
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "training.devices", str(rank), str(folder / "meeting"), str(results), device],
            env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in range(WORLD)
    ]  # fmt: skip
    try:
        printed = [process.communicate(timeout=500)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert results.exists(), "\n".join(text[-3000:] for text in printed)
    return json.loads(results.read_text())


def main(rank: int, file: str, results: str, device: str = "cpu") -> None:
    """Every scenario with fastft; the first process writes what it saw and what was lifted."""
    torch.set_num_threads(1)
    settings: dict[str, Any] = {}
    if device == "cuda":
        torch.cuda.set_device(rank)
        settings = {"device": "cuda", "options": {"strict": True}}
    torch._dynamo.config.optimize_ddp = False
    dist._DEFAULT_FIRST_BUCKET_BYTES = BUCKET
    backend = "gloo" if device == "cpu" else "nccl"
    dist.init_process_group(backend, init_method=f"file://{file}", rank=rank, world_size=WORLD)
    found = {}
    for scenario in DEVICES if device == "cpu" else ON_CARDS:
        try:
            values, graphs = seen_with_fastft(scenario, **settings)
        except torch._dynamo.exc.InternalTorchDynamoError as error:  # Dynamo's own, of torch 2.14 at a 4-bit parameter
            found[scenario.__name__] = {"error": str(error)}
            continue
        failures = [graph.failure for graph in graphs if graph.failure]
        layers = [[region.calls for region in graph.regions if region.module] for graph in graphs]
        left_out = sum(graph.rows.rows - graph.rows.live for graph in graphs if graph.rows is not None)
        found[scenario.__name__] = {
            "seen": values.tolist(), "lifted": lifted_in(graphs), "failures": failures, "layers": layers,
            "left_out": left_out,
        }  # fmt: skip
    if rank == 0:
        Path(results).write_text(json.dumps(found))
    dist.barrier()
    os._exit(0)  # gloo's threads may outlive the interpreter otherwise


if __name__ == "__main__":
    main(int(sys.argv[1]), *sys.argv[2:])
