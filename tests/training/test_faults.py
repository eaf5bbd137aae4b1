"""What goes wrong in a long run: it is told, nothing is left behind, and the next step is as it would have been."""

import errno
import gc
import os
import shutil
import tempfile
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import fastft
from fastft.rewriter import backend
from fastft.rewriter.lowering import cache_dirs
from fastft.rewriter.runtime import controller
from training.setting import Setting, batch, trained

OPTIONS = {"lower": "eager", "strict": True, "memory_budget": "max-speed"}


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """No plan of another test is alive."""
    monkeypatch.setattr(controller, "alive", weakref.WeakSet())


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Any, Any, Callable]:
    """A model, the same without fastft, and the first compiled."""
    torch._dynamo.reset()
    setting = Setting(tmp_path, compiled=True, options=OPTIONS)
    model, plain = (setting.model(lora=["down_proj"]) for _ in range(2))
    return model, plain, setting.compile(model)


def gradients(model: nn.Module, forward: Callable, number: int) -> list[Tensor]:
    model.zero_grad(set_to_none=True)
    forward(**batch(number)).loss.backward()
    return [value.grad for value in trained(model)]


def assert_right(pair: tuple[Any, Any, Callable], number: int = 3) -> None:
    """The next step is as without fastft, and no forward is counted whose backward will not come."""
    model, plain, compiled = pair
    torch.testing.assert_close(gradients(model, compiled, number), gradients(plain, plain, number))
    gc.collect()  # what an interrupted frame held may wait for it
    assert not any(one.waiting() for one in controller.alive)


@pytest.mark.parametrize("where", ["rewrite", "lower"])
def test_ctrl_c_while_compiling(where: str, pair: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = pair[2]
    before = len(fastft.compilations().graphs)

    def interrupted(*args: Any, **more: Any) -> Any:
        run(*args, **more)
        raise KeyboardInterrupt

    run = getattr(backend, where)
    with monkeypatch.context() as patched:
        patched.setattr(backend, where, interrupted)
        with pytest.raises(KeyboardInterrupt):
            compiled(**batch(0))
    assert len(fastft.compilations().graphs) == before
    assert_right(pair)


@pytest.mark.parametrize("when", ["forward", "backward"])
def test_ctrl_c_in_a_step(when: str, pair: Any) -> None:
    """In the middle of the layers: at a hook of torch's that runs there."""
    model, _, compiled = pair
    assert_right(pair)

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    calls = next(iter(controller.alive)).calls
    if when == "forward":
        variants, middle = calls[2].variants, calls[2].variants.compiled
        variants.compiled = dict.fromkeys(middle, interrupted)
        with pytest.raises(KeyboardInterrupt):
            compiled(**batch(0))
        variants.compiled = middle
    else:
        value = model.get_base_model().model.layers[1].mlp.down_proj.lora_A["default"].weight
        handle = value.register_hook(interrupted)
        with pytest.raises(KeyboardInterrupt):
            compiled(**batch(0)).loss.backward()
        handle.remove()
    assert_right(pair)


def test_out_of_memory_and_then_a_smaller_batch(pair: Any) -> None:
    """In backward, where only the user can let go of the batch."""
    model, plain, compiled = pair

    def full(*_: Any) -> None:
        raise torch.OutOfMemoryError("none is left")

    handle = model.get_base_model().model.layers[1].mlp.down_proj.lora_A["default"].weight.register_hook(full)
    with pytest.raises(torch.OutOfMemoryError):
        compiled(**batch(0, rows=4)).loss.backward()
    handle.remove()
    small = {name: value[:2] for name, value in batch(0, rows=4).items()}
    model.zero_grad(set_to_none=True)
    for forward in (compiled, plain):
        forward(**small).loss.backward()
    torch.testing.assert_close(*[[value.grad for value in trained(one)] for one in (model, plain)])
    assert_right(pair)


def test_nan_in_a_batch(pair: Any) -> None:
    """The loss and gradients are NaN, as without fastft, and of the next batch nothing is."""
    model, plain, compiled = pair
    embedded = torch.randn(2, 24, 64)
    embedded[1, 7, 3] = float("nan")
    labels = batch(0)["labels"]
    nans = []
    for one, forward in ((model, compiled), (plain, plain)):
        one.zero_grad(set_to_none=True)
        loss = forward(inputs_embeds=embedded, labels=labels).loss
        loss.backward()
        nans.append([loss.isnan(), *(value.grad.isnan().any() for value in trained(one))])
    assert nans[0] == nans[1]
    assert nans[0][0]
    assert_right(pair)


class Dying(Dataset):
    def __len__(self) -> int:
        return 8

    def __getitem__(self, number: int) -> dict[str, Tensor]:
        if number == 3:
            raise OSError("the disk is gone")
        return {name: value[0] for name, value in batch(number, 1).items()}


def test_a_data_loader_that_dies(pair: Any) -> None:
    """Between a forward and its backward, which then never comes."""
    compiled, kept = pair[2], []
    with pytest.raises(OSError, match="the disk is gone"):
        kept += [compiled(**each) for each in DataLoader(Dying(), 2, num_workers=1, multiprocessing_context="fork")]
    assert_right(pair)


def test_a_second_thread_runs_inference(pair: Any) -> None:
    """On the same compiled model, meanwhile."""
    model, plain, compiled = pair
    with torch.no_grad():
        expected = plain(**batch(9)).logits.clone()
    failures: list[BaseException] = []
    rounds = 0
    done = threading.Event()

    def infer() -> None:
        nonlocal rounds
        try:
            while not done.is_set():
                with torch.no_grad():
                    torch.testing.assert_close(compiled(**batch(9)).logits.clone(), expected)
                rounds += 1
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=infer)
    thread.start()
    try:
        wanted = [gradients(plain, plain, number) for number in range(6)]
        for number in range(6):
            torch.testing.assert_close(gradients(model, compiled, number), wanted[number])
    finally:
        done.set()
        thread.join()
    assert not failures, failures
    assert rounds > 0
    assert_right(pair)


@pytest.fixture
def _variable() -> Iterator[None]:
    before = os.environ.get("TORCHINDUCTOR_CACHE_DIR", "")
    yield
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = before


@pytest.mark.usefixtures("_variable")
@pytest.mark.parametrize("fault", ["cannot be written", "is full"])
def test_a_cache_that_cannot_be_written(fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "cache"
    usage, temporary = shutil.disk_usage, tempfile.TemporaryFile

    def file(dir: Any) -> Any:  # root may write everywhere
        if Path(dir) == folder and fault != "is full":
            raise OSError(errno.EROFS, "Read-only file system")
        return temporary(dir=dir)

    monkeypatch.setattr(tempfile, "TemporaryFile", file)
    full = fault == "is full"
    monkeypatch.setattr(
        shutil, "disk_usage", lambda at: usage(at)._replace(free=0) if full and Path(at) == folder else usage(at)
    )
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder)
    setting = Setting(tmp_path, compiled=True)
    model, plain = setting.model(lora=None), setting.model(lora=None)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        for _ in range(2):
            torch._dynamo.reset()
            assert_right((model, plain, setting.compile(model)))
    told = [str(one.message) for one in warned if "fastft" in str(one.message)]
    assert len(told) == 1
    assert f"{folder} {fault}" in told[0]
    assert "set TORCHINDUCTOR_CACHE_DIR to a folder with space" in told[0]
    assert cache_dirs.unwritable_reason(cache_dirs.inductor_folder()) == ""
