"""Several processes that save, load, stop early, die or are set up by others: what each of them does.

``python -m training.sharded_runs NAME RANK WORLD FILE FOLDER`` is one of the processes; FILE is where they find one
another, and what it saw is written into FOLDER.
"""

from __future__ import annotations

import errno
import faulthandler
import itertools
import json
import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from peft import PeftModel
from torch import Tensor, nn
from torch.distributed.algorithms.join import Join
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.nn.parallel import DistributedDataParallel

import fastft
from training import devices, habits, outcome
from training.devices import BUCKET, RATE, WORLD
from training.setting import LAYERS, Setting, base, batch, trained

BEFORE, AFTER = range(2), range(2, 4)  # steps before a run is saved, and after it is loaded
PATIENCE = 20  # seconds that a process waits for another
FEWER = LAYERS - 1  # layers of models of which little else is asked
DEVICE = os.environ.get("FASTFT_TEST_DEVICE", "cpu")  # of these processes


@dataclass
class Run:
    """A model in training: what is called, and its optimizer."""

    model: Any
    forward: Callable
    optimizer: torch.optim.Optimizer

    def train(self, numbers: Iterable[int]) -> list[float]:
        """Train for the steps of these numbers; return the losses of all processes' batches."""
        together = dist.is_initialized() and dist.get_world_size() > 1
        seen = []
        for number in numbers:
            losses = []
            for rank in [dist.get_rank()] if together else range(WORLD):
                inputs = batch(number * WORLD + rank)
                loss = self.forward(**{name: value.to(self.model.device) for name, value in inputs.items()}).loss
                (loss if together else loss / WORLD).backward()
                losses.append(loss.detach())
            mean = torch.stack(losses).mean()
            if together:
                dist.all_reduce(mean)
                mean /= WORLD
            seen.append(mean.item())
            self.optimizer.step()
            self.optimizer.zero_grad()
        return seen

    def state(self) -> dict[str, Any]:
        """Return what training changes: a 4-bit base stays as it is, and is made anew from the model."""
        adapters = {name: value for name, value in self.model.named_parameters() if value.requires_grad}
        return {"adapters": adapters, "optimizer": get_optimizer_state_dict(self.model, self.optimizer)}

    def save(self, folder: Path) -> None:
        """Save, each process its part."""
        dcp.save(self.state(), checkpoint_id=folder)

    def load(self, folder: Path) -> None:
        """Load what any number of processes saved: adapters where they lie, and the optimizer's state."""
        state = self.state()
        dcp.load(state, checkpoint_id=folder)
        set_optimizer_state_dict(self.model, self.optimizer, state["optimizer"])


def begun(setting: Setting, kind: str, **more: Any) -> Run:
    """Return a run of a model that is sharded, in DDP or plain; more: what the model is."""
    model = setting.model(**more)
    called = {"sharded": devices._sharded, "ddp": DistributedDataParallel, "plain": lambda model: model}[kind](model)
    return Run(model, setting.compile(called), torch.optim.AdamW(trained(model), lr=RATE))


def uninterrupted(setting: Setting, *, nf4: bool = True, layers: int = LAYERS) -> list[float]:
    """All steps at once, LoRA"""
    return begun(setting, "plain", nf4=nf4, layers=layers).train([*BEFORE, *AFTER])


def saved(folder: Path) -> dict[str, Any]:
    """Train, save, and go on; then load into the same model, which is compiled by now, and go on once more.

    And save the adapters alone, each gathered by itself.
    """
    with graphs() as made:
        run = begun(fresh(folder), "sharded", nf4=True)
        losses = run.train(BEFORE)
        run.save(folder / "saved")
        fail_to_save(run, folder / "unfinished")
        going_on = run.train(AFTER)
        run.load(folder / "saved")
        again = run.train(AFTER)
    found = {"before": losses, "going on": going_on, "again": again, "layers": layers_of(made())}
    with torch.no_grad():
        state = {name: value.full_tensor() for name, value in run.state()["adapters"].items()}
    if dist.get_rank() == 0:
        run.model.save_pretrained(folder / "peft saved", state_dict=state)
    return found | logits_of(run)


def fail_to_save(run: Run, folder: Path) -> None:
    """Save where one process has no room for it; all are told."""

    def full(*_: Any) -> NoReturn:
        raise OSError(errno.ENOSPC, "no space")

    with pytest.MonkeyPatch.context() as patched:
        if dist.get_rank() == WORLD - 1:
            patched.setattr(dcp.FileSystemWriter, "write_data", full)
        with pytest.raises(dcp.api.CheckpointException, match="no space"):
            run.save(folder)


def gathered(folder: Path) -> dict[str, Any]:
    """Save the adapters of a model whose base is not 4-bit, gathered by torch's own function."""
    run = begun(fresh(folder), "sharded", layers=FEWER)
    run.train(BEFORE)
    whole = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
    state = get_model_state_dict(run.model, options=whole)
    if dist.get_rank() == 0:
        run.model.save_pretrained(folder / "peft gathered", state_dict=state)
    return logits_of(run)


def logits_of(run: Run) -> dict[str, Any]:
    """Return the logits of the sharded model as torch runs it, and those of what fastft compiled."""
    found: dict[str, Any] = {}
    for name, called in (("torch", run.model), ("fastft", run.forward)):
        with torch.no_grad():
            try:
                found[name] = called(input_ids=batch(0)["input_ids"]).logits.tolist()
            except RuntimeError as error:
                found[name] = str(error)
    return found


def reading(setting: Setting) -> list[float]:
    """FSDP2 as one graph, all weights, a loss of the logits' numbers"""
    model = setting.model(lora=None, layers=FEWER)
    called = setting.compile(devices._sharded(model))

    def forward(labels: Tensor, **inputs: Tensor) -> Any:
        logits = called(**inputs).logits  # by rows, then as a whole
        return SimpleNamespace(
            loss=logits.log_softmax(-1).square().mean() + logits.sort(-1).values.cumsum(0).square().mean()
        )

    return devices.train(setting, model, forward, each=True)


def read(folder: Path) -> dict[str, Any]:
    """Read a sharded model's logits, and have their gradients."""
    try:
        return {"seen": outcome.seen_with_fastft(reading)[0].tolist(), "error": ""}
    except RuntimeError as error:
        return {"error": str(error)}


def with_adapters(folder: Path, *, nf4: bool = False, layers: int = LAYERS) -> Any:
    """Return a base with the adapters in a folder, in one process."""
    model = base(layers=layers)
    if nf4:
        fastft.quantize_(model.requires_grad_(False))
    return PeftModel.from_pretrained(model, folder).train()


def uneven(setting: Setting) -> list[float]:
    """DDP, LoRA; the last process has a batch more, `Join`"""
    model = setting.model(layers=FEWER)
    wrapped = DistributedDataParallel(model)
    run = Run(model, setting.compile(wrapped), torch.optim.AdamW(trained(model), lr=RATE))
    seen = []
    with Join([wrapped]):
        for number in range(2 + dist.get_rank()):
            loss = run.forward(**batch(number * WORLD + dist.get_rank())).loss
            loss.backward()
            seen += [loss.item(), *(value.grad.norm().item() for value in trained(model))]
            run.optimizer.step()
            run.optimizer.zero_grad()
    return seen + [value.norm().item() for value in trained(model)]


def joined(folder: Path) -> dict[str, Any]:
    """Stop at different times, with fastft and without, in the same processes."""
    found = outcome.outcome(uneven)
    return {"difference": found.difference, "allowed": found.allowed, "layers": layers_of(found.graphs)}


class Sometimes(nn.Module):
    """A model, a scale of its loss that is used for some batches, and another that is never."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.used, self.never = model, nn.Linear(1, 1), nn.Linear(1, 1)
        nn.init.constant_(self.used.weight, 0.5)
        nn.init.zeros_(self.used.bias)

    def forward(self, use: bool, **inputs: Tensor) -> Any:
        result = self.model(**inputs)
        if use:
            result.loss = result.loss + self.used(result.loss.reshape(1)).sum()
        return result


def ddp_unused(setting: Setting) -> list[float]:
    """DDP, LoRA, `find_unused_parameters`: some are used for some batches, of one process or of both"""
    whole = Sometimes(setting.model(layers=FEWER))
    wrapped = setting.compile(devices._ddp(whole, bucket_cap_mb=BUCKET / 2**20, find_unused_parameters=True))
    numbers = itertools.count(dist.get_rank(), WORLD) if dist.is_initialized() else itertools.count()

    def forward(**inputs: Tensor) -> Any:
        return wrapped(use=next(numbers) % 3 != 1, **inputs)

    return devices.train(setting, nn.ModuleList([whole.model, whole.used]), forward, each=True)


def ddp_static(setting: Setting) -> list[float]:
    """DDP, LoRA, `static_graph`"""
    model = setting.model(layers=FEWER)
    wrapped = devices._ddp(model, bucket_cap_mb=BUCKET / 2**20, static_graph=True)
    return devices.train(setting, model, setting.compile(wrapped), each=True)


def ddp_no_sync(setting: Setting) -> list[float]:
    """DDP, LoRA, `no_sync` while gradients are accumulated"""
    model = setting.model(layers=FEWER)
    wrapped = devices._ddp(model, bucket_cap_mb=BUCKET / 2**20)
    waiting = getattr(wrapped, "no_sync", None)
    return devices.train(setting, model, setting.compile(wrapped), parts=2, waiting=waiting, each=True)


WAYS: Sequence[Callable[[Setting], list[float]]] = (ddp_unused, ddp_static, ddp_no_sync)


def ways(folder: Path) -> dict[str, Any]:
    """DDP on its default settings, torch's `optimize_ddp` among them, with several buckets."""
    dist._DEFAULT_FIRST_BUCKET_BYTES = BUCKET
    found = {}
    for way in WAYS:
        values, made = outcome.seen_with_fastft(way)
        found[way.__name__] = {"seen": values.tolist(), "layers": layers_of(made)}
    return found


def loaded(folder: Path) -> list[float]:
    """Go on from what others saved."""
    run = begun(fresh(folder), "sharded", nf4=True)
    run.load(folder / "saved")
    return run.train(AFTER)


def prepared(setting: Setting, when: str) -> dict[str, Any]:
    """accelerate's FSDP2; the model is compiled before or after it is prepared.

    Its plugin is for GPUs: on CPUs it is not heeded, so accelerate is told here that it is where it would be.
    """
    from accelerate import Accelerator, FullyShardedDataParallelPlugin, PartialState
    from accelerate.utils import DistributedType

    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap", transformer_cls_names_to_wrap=["LlamaDecoderLayer"],
        cpu_ram_efficient_loading=False,
    )  # fmt: skip
    accelerator = Accelerator(cpu=True, fsdp_plugin=plugin)
    accelerator.state.fsdp_plugin = plugin
    accelerator.state.distributed_type = PartialState().distributed_type = DistributedType.FSDP
    model = setting.model()
    if when == "before":
        setting.compile_in_place(model)
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(trained(model), lr=RATE))
    if when == "after":
        setting.compile_in_place(model)

    def step(number: int) -> list[float]:
        loss = model(**batch(number * WORLD + accelerator.process_index)).loss
        accelerator.backward(loss)
        norm = accelerator.clip_grad_norm_(model.parameters(), float("inf"))
        optimizer.step()
        optimizer.zero_grad()
        return [accelerator.reduce(loss.detach(), "mean").item(), norm.item()]

    seen = [value for number in range(devices.STEPS) for value in step(number)]
    model.save_pretrained(
        setting.folder / f"prepared {when}", state_dict=accelerator.get_state_dict(model),
        is_main_process=accelerator.is_main_process,
    )  # fmt: skip
    accelerator.save_state(str(setting.folder / f"state {when}"))
    going_on = step(devices.STEPS)
    accelerator.load_state(str(setting.folder / f"state {when}"))
    return {"seen": seen, "going on": going_on, "again": step(devices.STEPS)}


def unprepared(setting: Setting) -> list[float]:
    """The same in one process"""
    model = setting.model()
    return devices.train(setting, model, model)


def accelerated(folder: Path) -> dict[str, Any]:
    """What accelerate's plugin makes of a model, and what fastft makes of that."""
    rank, world = str(dist.get_rank()), str(dist.get_world_size())
    os.environ.update(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=world, LOCAL_WORLD_SIZE=world)
    found = {}
    for when in ("before", "after"):
        with graphs() as made:
            found[when] = prepared(fresh(folder), when)
        found[when]["layers"] = layers_of(made())
    return found


def launched(folder: Path) -> dict[str, Any]:
    """What transformers' Trainer makes of these processes, and `fastft.TrainerCallback` of its model."""
    from accelerate.state import AcceleratorState

    found = {}
    for habit in habits.LAUNCHED:
        AcceleratorState._reset_state(reset_partial_state=True)
        values, made = outcome.seen_with_fastft(habit)
        found[habit.__name__] = {"seen": values.tolist(), "layers": layers_of(made)}
    return found


def die(*_: Any, **__: Any) -> NoReturn:
    """End this process at once, as the system does that is short of memory."""
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError


def dying(kind: str, folder: Path) -> None:
    """Train and save each step; in one of them, one process dies between its forward and its backward."""
    run = begun(fresh(folder), kind, layers=FEWER)
    for number in (*BEFORE, *AFTER):
        if number == AFTER[0] and dist.get_rank() == WORLD - 1:
            run.forward = lambda forward=run.forward, **inputs: die(forward(**inputs))
        run.train([number])
        run.save(folder / f"step {number}")


def dying_sharded(folder: Path) -> None:
    """FSDP2 as one graph"""
    dying("sharded", folder)


def dying_ddp(folder: Path) -> None:
    """DDP on its default settings"""
    dying("ddp", folder)


def fresh(folder: Path) -> Setting:
    """Return a setting in which nothing is compiled yet."""
    torch._dynamo.reset()
    setting = Setting(folder, compiled=True, device=DEVICE)
    setting.seed()
    return setting


@contextmanager
def graphs() -> Iterator[Callable[[], list[Any]]]:
    """Yield what returns the graphs that are compiled meanwhile."""
    before = {id(graph) for graph in fastft.compilations().graphs}
    yield lambda: [graph for graph in fastft.compilations().graphs if id(graph) not in before]


def layers_of(made: Sequence[Any]) -> list[int]:
    """Return how many layers each graph has; a graph that failed has none."""
    return [0 if graph.failure else outcome.lifted_in([graph])["glu"] for graph in made]


PARTS: dict[str, Sequence[Callable[[Path], Any]]] = {
    "first": (saved, gathered, read, joined, ways), "second": (loaded, accelerated, launched),
    "dying_sharded": (dying_sharded,), "dying_ddp": (dying_ddp,),
}  # fmt: skip


def main(name: str, rank: int, world: int, file: str, folder: Path) -> None:
    """Do all parts of that name, and write what was seen."""
    faulthandler.register(signal.SIGUSR1)  # where it is, to who waits for too long
    torch.set_num_threads(1)
    patience = timedelta(seconds=PATIENCE if name.startswith("dying") else 10 * PATIENCE)
    if DEVICE == "cuda":
        torch.cuda.set_device(rank)
    backend = "nccl" if DEVICE == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=f"file://{file}", rank=rank, world_size=world, timeout=patience)
    found = {part.__name__: part(folder) for part in PARTS[name]}
    (folder / f"{name} {rank}.json").write_text(json.dumps(found))
    dist.barrier()
    os._exit(0)  # gloo's threads may outlive the interpreter otherwise


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4], Path(sys.argv[5]))
