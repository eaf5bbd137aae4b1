"""Runs that are saved and loaded, that stop early, die or are set up by others, in two processes; see sharded_runs.py.

A run that goes on is as one that was never interrupted, in one process without fastft.
"""

from __future__ import annotations

import contextlib
import functools
import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

from training import habits, sharded_runs
from training.devices import STEPS, WORLD, environment
from training.outcome import compare
from training.setting import LAYERS, Setting, batch, trained
from training.sharded_runs import AFTER, BEFORE, PATIENCE

TWO_CARDS = pytest.mark.skipif(torch.cuda.device_count() < WORLD, reason="needs two CUDA devices")
ADAPTERS = StateDictOptions(ignore_frozen_params=True, strict=False)


def started(name: str, folder: Path, device: str = "cpu") -> list[subprocess.Popen]:
    """Start the processes; what they print goes to files.

    NCCL's watchdog sleeps four times what is set here before it ends a process, a minute by default.
    """
    surroundings = environment() | {"FASTFT_TEST_DEVICE": device, "TORCH_NCCL_WAIT_TIMEOUT_DUMP_MILSEC": "1000"}
    command = [sys.executable, "-m", "training.sharded_runs", name]
    meeting = str(folder / f"{name} meeting")
    return [
        subprocess.Popen(
            [*command, str(rank), str(WORLD), meeting, str(folder)],
            env=surroundings, stdout=(folder / f"{name} {rank}.txt").open("w"), stderr=subprocess.STDOUT,
        )
        for rank in range(WORLD)
    ]  # fmt: skip


def ended(processes: list[subprocess.Popen]) -> None:
    for process in processes:
        process.kill()
        process.wait()


def together(name: str, folder: Path) -> list[dict[str, Any]]:
    """Return what each process saw."""
    processes = started(name, folder)
    try:
        for process in processes:
            process.wait(timeout=300)
    finally:
        ended(processes)
    results = [folder / f"{name} {rank}.json" for rank in range(WORLD)]
    printed = [(folder / f"{name} {rank}.txt").read_text()[-3000:] for rank in range(WORLD)]
    assert all(result.exists() for result in results), "\n".join(printed)
    return [json.loads(result.read_text()) for result in results]


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """As the processes: threads that wait for one another are slow where others compute too."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def first(folder: Path) -> list[dict[str, Any]]:
    return together("first", folder)


@pytest.fixture(scope="module")
def second(first: Any, folder: Path) -> list[dict[str, Any]]:
    return together("second", folder)


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[None]:
    """One process is a group, too."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'meeting'}", rank=0, world_size=1)
    yield
    torch._dynamo.reset()
    dist.destroy_process_group()


def assert_as(scenario: Any, seen: list[float]) -> None:
    """As the scenario in this process, without fastft."""
    difference, allowed = compare(torch.tensor(seen, dtype=torch.float64), scenario)
    assert difference <= allowed, f"{difference:.1e} apart, {allowed:.1e} allowed"


def loaded_here(kind: str, folder: Path, tmp_path: Path) -> list[float]:
    """Go on in this process."""
    run = sharded_runs.begun(sharded_runs.fresh(tmp_path), kind, nf4=True)
    run.load(folder)
    return run.train(AFTER)


@pytest.mark.slow
def test_saving_disturbs_nothing_and_a_compiled_model_takes_what_was_saved(first: Any) -> None:
    seen = first[0]["saved"]
    assert seen["layers"] == [LAYERS]
    assert seen["again"] == seen["going on"]
    assert_as(sharded_runs.uninterrupted, seen["before"] + seen["going on"])


@pytest.mark.slow
def test_what_two_processes_saved_two_load(first: Any, second: Any) -> None:
    assert_as(sharded_runs.uninterrupted, first[0]["saved"]["before"] + second[0]["loaded"])


@pytest.mark.slow
def test_what_two_processes_saved_one_loads_sharded(first: Any, folder: Path, tmp_path: Path, alone: None) -> None:
    seen = first[0]["saved"]["before"] + loaded_here("sharded", folder / "saved", tmp_path)
    dist.barrier()
    assert_as(sharded_runs.uninterrupted, seen)


@pytest.mark.slow
def test_what_two_processes_saved_one_loads_whole(first: Any, folder: Path, tmp_path: Path) -> None:
    assert_as(
        sharded_runs.uninterrupted, first[0]["saved"]["before"] + loaded_here("plain", folder / "saved", tmp_path)
    )


@pytest.mark.parametrize("nf4", [False, True], ids=["float", "4-bit"])
def test_torchs_own_function_gets_the_adapters_alone(nf4: bool, tmp_path: Path, alone: None) -> None:
    """As it does before the first step, and without fastft; and it sets them."""
    run = sharded_runs.begun(sharded_runs.fresh(tmp_path), "sharded", nf4=nf4)
    names = {name for name, value in run.model.named_parameters() if value.requires_grad}
    for _ in range(2):
        adapters, optimizer = get_state_dict(run.model, run.optimizer, options=ADAPTERS)
        assert set(adapters) == names
        set_state_dict(
            run.model, run.optimizer, model_state_dict=adapters, optim_state_dict=optimizer, options=ADAPTERS
        )
        run.train([0])


def test_adapters_alone_are_set_into_a_whole_4bit_model(tmp_path: Path) -> None:
    """Where `ignore_frozen_params` leaves the statistics of 4-bit weights among what is saved."""
    run = sharded_runs.begun(Setting(tmp_path), "plain", nf4=True)
    adapters, optimizer = get_state_dict(run.model, run.optimizer, options=ADAPTERS)
    set_state_dict(run.model, run.optimizer, model_state_dict=adapters, optim_state_dict=optimizer, options=ADAPTERS)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["saved", "gathered"])
def test_peft_loads_the_adapters_of_a_sharded_model(name: str, first: Any, folder: Path) -> None:
    kind: dict[str, Any] = {"saved": {"nf4": True}, "gathered": {"layers": sharded_runs.FEWER}}[name]
    with torch.no_grad():
        logits = sharded_runs.with_adapters(folder / f"peft {name}", **kind)(input_ids=batch(0)["input_ids"]).logits
    for seen in first:
        torch.testing.assert_close(torch.tensor(seen[name]["torch"]), logits, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["saved", "gathered"])
def test_logits_of_a_sharded_model_are_read(name: str, first: Any) -> None:
    for seen in first:
        found, expected = seen[name]["fastft"], torch.tensor(seen[name]["torch"])
        assert not isinstance(found, str), found
        torch.testing.assert_close(torch.tensor(found), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_logits_of_a_sharded_model_have_gradients(first: Any) -> None:
    seen = first[0]["read"]
    assert not seen["error"]
    assert_as(sharded_runs.reading, seen["seen"])


def loss_of(called: Any, number: int) -> Tensor:
    return called(**batch(number)).loss


def evaluated(called: Any) -> None:
    """Two steps, and an evaluation between them."""
    loss_of(called, 0).backward()
    with torch.no_grad():
        loss_of(called, 2)
    loss_of(called, 1).backward()


def dropped(called: Any) -> None:
    """A loss that no backward follows, and two steps."""
    loss_of(called, 0)
    loss_of(called, 0).backward()
    loss_of(called, 1).backward()


def one_after_another(called: Any) -> None:
    """Two forwards, and a backward of each."""
    for loss in [loss_of(called, 0), loss_of(called, 1)]:
        loss.backward()


def at_once(called: Any) -> None:
    """Two forwards, and a backward of both, as of two answers that are compared."""
    (loss_of(called, 0) + loss_of(called, 1)).backward()


@pytest.mark.parametrize("order", [evaluated, dropped, one_after_another, at_once], ids=lambda order: order.__name__)
def test_forwards_and_backwards_in_any_order(order: Any, tmp_path: Path, alone: None) -> None:
    """The gradients are those of two steps."""
    plain = sharded_runs.begun(Setting(tmp_path), "plain", layers=sharded_runs.FEWER)
    sharded = sharded_runs.begun(sharded_runs.fresh(tmp_path), "sharded", layers=sharded_runs.FEWER)
    at_once(plain.forward)
    order(sharded.forward)
    for expected, value in zip(trained(plain.model), trained(sharded.model), strict=True):
        torch.testing.assert_close(value.grad.full_tensor(), expected.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("grad", [True, False], ids=["train", "evaluate"])
def test_a_loss_of_the_users_own(grad: bool, tmp_path: Path, alone: None) -> None:
    losses = []
    for setting, kind in ((Setting(tmp_path), "plain"), (sharded_runs.fresh(tmp_path), "sharded")):
        run = sharded_runs.begun(setting, kind, layers=sharded_runs.FEWER)
        with torch.set_grad_enabled(grad):
            logits = run.forward(input_ids=batch(0)["input_ids"]).logits
            losses.append(nn.functional.cross_entropy(logits.flatten(0, 1), batch(0)["labels"].flatten()).item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.slow
def test_a_process_may_have_a_batch_more(first: Any) -> None:
    for rank in first:
        seen = rank["joined"]
        assert seen["layers"] == [sharded_runs.FEWER]
        assert seen["difference"] <= seen["allowed"]


@pytest.mark.slow
@pytest.mark.parametrize("way", sharded_runs.WAYS, ids=lambda way: way.__name__)
def test_ways_of_ddp(way: Any, first: Any) -> None:
    seen = first[0]["ways"][way.__name__]
    assert set(seen["layers"]) == {sharded_runs.FEWER}
    assert_as(way, seen["seen"])


@pytest.mark.slow
@pytest.mark.parametrize("when", ["before", "after"])
def test_what_accelerate_shards_is_one_graph(when: str, second: Any) -> None:
    """And what accelerate saves it loads."""
    seen = second[0]["accelerated"][when]
    assert seen["layers"] == [LAYERS]
    assert seen["again"] == seen["going on"]
    assert_as(sharded_runs.unprepared, seen["seen"])


@pytest.mark.slow
@pytest.mark.parametrize("when", ["before", "after"])
def test_peft_loads_what_accelerate_gathered(when: str, second: Any, folder: Path) -> None:
    model = sharded_runs.with_adapters(folder / f"prepared {when}")
    with torch.no_grad():
        losses = [model(**batch(STEPS * WORLD + rank)).loss.item() for rank in range(WORLD)]
    loss, _ = second[0]["accelerated"][when]["going on"]
    assert loss == pytest.approx(sum(losses) / WORLD, rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("habit", habits.LAUNCHED, ids=lambda habit: habit.__name__)
def test_a_trainer_in_two_processes_is_as_in_one(habit: Any, second: Any) -> None:
    seen = second[0]["launched"][habit.__name__]
    assert seen["layers"] == [LAYERS]
    assert_as(habit, seen["seen"])


@pytest.mark.slow
def test_what_could_not_be_saved_is_told_from_what_was(first: Any, folder: Path) -> None:
    assert complete(folder) == [folder / "saved"]
    assert (folder / "unfinished").exists()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dying_sharded", "dying_ddp"])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, TWO_CARDS])])
def test_where_one_process_dies_the_other_ends(name: str, device: str, tmp_path: Path) -> None:
    """With an error and in time; and the last checkpoint that is complete is as good as any."""
    processes = started(name, tmp_path, device)
    try:
        assert processes[-1].wait(timeout=120) == -signal.SIGKILL
        died = time.monotonic()
        with contextlib.suppress(subprocess.TimeoutExpired):
            processes[0].wait(timeout=4 * PATIENCE)
        took, code = time.monotonic() - died, processes[0].poll()
        if code is None:
            processes[0].send_signal(signal.SIGUSR1)
            time.sleep(1)
    finally:
        ended(processes)
    printed = (tmp_path / f"{name} 0.txt").read_text()[-6000:]
    assert code, f"after {took:.0f} s: {code}\n{printed}"
    assert ("gloo" if device == "cpu" else "NCCL") in printed
    assert took < (PATIENCE + 5 if device == "cpu" else 3 * PATIENCE)
    assert complete(tmp_path) == [tmp_path / f"step {number}" for number in BEFORE]
    run = sharded_runs.begun(Setting(tmp_path), "plain", layers=sharded_runs.FEWER)
    run.load(complete(tmp_path)[-1])
    seen = run.train(AFTER)
    plain = functools.partial(sharded_runs.uninterrupted, nf4=False, layers=sharded_runs.FEWER)
    assert_as(lambda setting: plain(setting)[len(BEFORE) :], seen)


def complete(folder: Path) -> list[Path]:
    """Return the checkpoints in a folder that were saved to their end: dcp writes this file last."""
    return sorted(file.parent for file in folder.glob("*/.metadata"))
