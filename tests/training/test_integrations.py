"""The callback for transformers' trainers, and what hands it to Axolotl and LLaMA-Factory; habits.py trains with it."""

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from transformers import Trainer, TrainingArguments

import fastft
from fastft.compat.dynamo import is_compiled
from fastft.errors import UserError
from fastft.integrations import trainer as integration
from training.setting import Setting
from training.trainer_setting import arguments

LENGTH, ROWS = 6, 2
EAGER = {"lower": "eager"}
AXOLOTL = '''
class BasePlugin:
    def __init__(self): ...
    def register(self, cfg): ...
    def get_input_args(self): ...
    def add_callbacks_pre_trainer(self, cfg, model): return []
    def add_callbacks_post_trainer(self, cfg, trainer): return []
'''  # fmt: skip
READ_ARGS = """
import sys, yaml

def read_args(args=None):
    if args is not None:
        return args
    return yaml.safe_load(open(sys.argv[1])) if sys.argv[1].endswith(".yaml") else sys.argv[1:]
"""
RUN_EXP = """
seen = []

def run_exp(args=None, callbacks=None):
    seen.append((args, callbacks))
"""


class Tiny(nn.Module):
    """As much of a model as a Trainer needs."""

    main_input_name = "ids"

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(8, 4)

    def forward(self, ids: Tensor) -> dict[str, Tensor]:
        return {"loss": self.table(ids).square().mean()}


class Telling(Trainer):
    """A Trainer that logs, with whatever it logs, what it collected since: as TRL's do."""

    collected = 0

    def training_step(self, *args: Any, **more: Any) -> Tensor:
        self.collected += 1
        return super().training_step(*args, **more)

    def log(self, logs: dict[str, float], *args: Any, **more: Any) -> None:
        super().log({**logs, "collected": self.collected}, *args, **more)
        self.collected = 0


def settings(folder: Path, **more: Any) -> TrainingArguments:
    return TrainingArguments(**arguments(Setting(folder), **{"per_device_train_batch_size": ROWS, **more}))


def made(folder: Path, kind: Any = Trainer, **more: Any) -> Any:
    rows = [{"ids": torch.arange(LENGTH) % 8}] * 8
    return kind(Tiny(), settings(folder, **more), train_dataset=rows, eval_dataset=rows[:ROWS])


def begin(args: TrainingArguments, model: nn.Module) -> None:
    fastft.TrainerCallback(EAGER).on_train_begin(args, None, None, model=model)


def figures(trainer: Trainer) -> list[dict[str, float]]:
    return [row for row in trainer.state.log_history if "fastft/seconds_per_step" in row]


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Stand-ins for Axolotl and LLaMA-Factory: of each what is called, with its signature."""
    files = {
        "axolotl/integrations/base.py": AXOLOTL, "llamafactory/hparams/__init__.py": READ_ARGS,
        "llamafactory/train/tuner.py": RUN_EXP,
    }  # fmt: skip
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        if name.partition(".")[0] in ("axolotl", "llamafactory") or name == "fastft.integrations.axolotl":
            del sys.modules[name]


def test_the_model_is_compiled_once(tmp_path: Path) -> None:
    model = Tiny()
    begin(settings(tmp_path), model)
    assert is_compiled(model)
    before = model._compiled_call_impl
    begin(settings(tmp_path), model)
    assert model._compiled_call_impl is before


@pytest.mark.parametrize("how", ["in place", "inside", "around"])
def test_a_model_that_is_compiled_stays_as_it_is(how: str, tmp_path: Path) -> None:
    model: Any = Tiny()
    if how == "around":
        model = torch.compile(model, backend="eager")
    else:
        (model if how == "in place" else model.table).compile(backend="eager")
    before = model._compiled_call_impl
    begin(settings(tmp_path), model)
    assert model._compiled_call_impl is before


def test_what_compiled_models_do_not_stand_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, args = Tiny(), settings(tmp_path)
    args.torch_compile = True
    with pytest.raises(UserError, match="leave out torch_compile"):
        begin(args, model)
    args = settings(tmp_path)
    with monkeypatch.context() as patch:
        patch.setenv("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR")
        with pytest.raises(UserError, match="dynamo_backend"):
            begin(args, model)
    args._n_gpu = 2
    with pytest.raises(UserError, match="torchrun --nproc-per-node 2"):
        begin(args, model)
    args = settings(tmp_path)
    args.deepspeed_plugin = object()
    with pytest.raises(UserError, match="DeepSpeed"):
        begin(args, model)
    assert not is_compiled(model)


def test_models_that_fsdp1_sharded_are_refused(tmp_path: Path) -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        model = FullyShardedDataParallel(Tiny(), device_id=torch.device("cpu"))
        with pytest.raises(UserError, match="FSDP2"):
            begin(settings(tmp_path), model)
        assert not is_compiled(model)
    finally:
        dist.destroy_process_group()


def test_an_unknown_option_is_told_at_once() -> None:
    with pytest.raises(fastft.OptionsError, match="memory_budget"):
        fastft.TrainerCallback({"memory_budge": "14GiB"})


def test_figures_are_logged_beside_losses(tmp_path: Path) -> None:
    trainer = made(tmp_path, Telling, include_num_input_tokens_seen="all")
    trainer.add_callback(fastft.TrainerCallback(EAGER, log_to=trainer))
    trainer.train()
    found = figures(trainer)
    losses = [row for row in trainer.state.log_history if "loss" in row]
    assert [row["step"] for row in found] == [row["step"] for row in losses] == [1, 2, 3, 4]
    for row in found:
        tokens = row["fastft/tokens_per_second"] * row["fastft/seconds_per_step"]
        assert tokens == pytest.approx(ROWS * LENGTH)
        assert row["fastft/compile_seconds"] > 0
        assert row["fastft/graphs"] >= 1
        assert "collected" not in row
    assert [row["collected"] for row in losses] == [1] * 4


@pytest.mark.parametrize("what", ["eval", "save"])
def test_evaluation_and_saving_are_not_counted(what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock on which a step takes a second, and all else a hundred."""
    now = 0.0

    class Timed(Trainer):
        def training_step(self, *args: Any, **more: Any) -> Tensor:
            nonlocal now
            now += 1
            return super().training_step(*args, **more)

        def evaluate(self, *args: Any, **more: Any) -> dict[str, float]:
            nonlocal now
            now += 100
            return super().evaluate(*args, **more)

        def _save_checkpoint(self, *args: Any, **more: Any) -> None:
            nonlocal now
            now += 100
            super()._save_checkpoint(*args, **more)

    monkeypatch.setattr(integration, "time", SimpleNamespace(perf_counter=lambda: now))
    more = {"logging_steps": 4, "logging_first_step": False, f"{what}_strategy": "steps", f"{what}_steps": 2}
    trainer = made(tmp_path, Timed, include_num_input_tokens_seen="all", **more)
    trainer.add_callback(fastft.TrainerCallback(EAGER, log_to=trainer))
    trainer.train()
    (found,) = figures(trainer)
    assert found["fastft/seconds_per_step"] == 1
    assert found["fastft/tokens_per_second"] == ROWS * LENGTH


def test_axolotl_loads_the_plugin(installed: None, tmp_path: Path) -> None:
    """As its PluginManager does it: by its name, with its arguments a base of the class that reads the YAML."""
    from pydantic import BaseModel, ValidationError

    def load(name: str) -> Any:
        module, _, member = name.rpartition(".")
        return getattr(importlib.import_module(module), member)

    plugin = load("fastft.integrations.axolotl.FastftPlugin")()
    assert isinstance(plugin, load("axolotl.integrations.base.BasePlugin"))
    asked: dict[str, Any] = {"lora_qkv_kernel": True}
    plugin.register(asked)
    assert asked == {"lora_qkv_kernel": True}
    plugin.register(unasked := {})
    assert list(unasked.values()) == [False] * 3
    own = type("Config", (BaseModel,), {})
    reading = type("ConfigOfPlugins", (own, load(plugin.get_input_args())), {})
    with pytest.raises(ValidationError, match="did you mean 'memory_budget'"):
        reading(fastft={"memory": "14GiB"})
    assert reading().fastft is None
    config = reading(fastft=EAGER).model_dump(exclude_none=True)
    trainer = made(tmp_path)
    for callback in plugin.add_callbacks_post_trainer(config, trainer):
        trainer.add_callback(callback)
    trainer.train()
    assert is_compiled(trainer.model)
    assert len(figures(trainer)) == 4


def test_llamafactory_gets_the_callback(installed: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fastft.integrations import llamafactory

    seen = importlib.import_module("llamafactory.train.tuner").seen
    (tmp_path / "train.yaml").write_text("stage: sft\nfastft: {memory_budget: 14GiB}\n")
    for words, expected, options in (
        ([str(tmp_path / "train.yaml")], {"stage": "sft"}, {"memory_budget": "14GiB"}),
        (["--stage", "sft"], ["--stage", "sft"], None),
    ):
        monkeypatch.setattr(sys, "argv", ["train", *words])
        llamafactory.main()
        args, (callback,) = seen.pop()
        assert args == expected
        assert isinstance(callback, fastft.TrainerCallback)
        assert callback.options == options
