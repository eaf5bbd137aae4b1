"""Models that FSDP2 has sharded are one graph, and right; with two processes in tests/training/devices.py."""

from __future__ import annotations

import copy
import gc
import re
import warnings
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsdp_models as models
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from fsdp_models import (
    EAGER,
    LAYERS,
    LENGTH,
    ROUGH,
    SHARDINGS,
    WIDTH,
    WORDS,
    Model,
    Watched,
    check,
    compiled,
    compiled_by,
    gradients,
    layers_of,
    sharded,
    step,
    tokens,
    watching,
    whole_in,
)
from torch import Tensor
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from training.setting import LAYERS as LLAMA_LAYERS
from training.setting import Setting, base, batch

from fastft.compat import layer_reuse
from fastft.rewriter import backend
from fastft.rewriter.memory.simulate import GATHERED

HOWS = pytest.mark.parametrize("how", ["around", "inside"])  # where the root's hooks are, of what is traced


@pytest.fixture(autouse=True)
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """One process is a group, too."""
    monkeypatch.setattr(backend, "_warned", set())
    watching.clear()
    gc.collect()  # forwards of other tests whose backward would still come are planned for, too
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'meeting'}", rank=0, world_size=1)
    torch._dynamo.reset()
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("how", ["around", "inside", "in place"])
def test_one_graph_serves_all_lengths(how: str) -> None:
    plain, model = Model(), sharded(Model())
    called = compiled(model, how)

    def train() -> None:
        for length in (5, 5, 7, 9):
            check(plain, model, called, tokens(length))

    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        graphs = compiled_by(train)
    assert len(graphs) <= 2
    assert [layers_of(graph) for graph in graphs] == [LAYERS] * len(graphs)
    assert graphs[-1].dynamic


@pytest.mark.parametrize(
    ("way", "tied"), [*((way, False) for way in SHARDINGS), ("the root alone", True), ("two layers together", True)]
)
def test_whatever_is_sharded(way: str, tied: bool) -> None:
    plain, model = Model(tied=tied), SHARDINGS[way](Model(tied=tied))
    called = compiled(model)
    (graph,) = compiled_by(lambda: [check(plain, model, called) for _ in range(2)])
    assert layers_of(graph) == LAYERS


@HOWS
def test_no_more_than_two_layers_are_whole(how: str) -> None:
    plain, model = Watched(), sharded(Watched())
    called, found = compiled(model, how), {}
    check(plain, model, called)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)

    def none_is_whole() -> bool:
        return not whole_in(model) and all(isinstance(one, DTensor) for one in model.parameters())

    watching.append(lambda when, number: found.setdefault((when, number), whole_in(model)))
    loss = called(tokens())
    assert none_is_whole()
    loss.backward()
    assert none_is_whole()
    optimizer.step()
    assert none_is_whole()
    assert len(found) == 2 * LAYERS
    for (_, number), names in found.items():
        layers = {int(name.split(".")[1]) for name in names if name.startswith("layers.")}
        assert number in layers
        assert len(layers) <= 2


@pytest.mark.parametrize(("how", "cast"), [("around", True), ("inside", True), ("in place", False)])
def test_mixed_precision(how: str, cast: bool) -> None:
    """Are the same as FSDP2's own, also for inputs that layers are given in float32 and cast themselves."""
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32, torch.float32, cast_forward_inputs=cast)
    eager, model = (sharded(Model(), mp_policy=policy) for _ in range(2))
    called, found = compiled(model, how), []
    for one, call in ((model, called), (eager, eager)):
        embeds = torch.ones(2, LENGTH, WIDTH, requires_grad=True)
        results = [step(one, call), step(one, call, tokens(), embeds)]
        assert [loss.dtype for loss, _ in results] == [torch.float32] * 2
        found.append({"loss": results[0][0], "embeds": embeds.grad, **results[0][1]})
        found[-1] |= {f"given {name}": grad for name, grad in results[1][1].items() if grad is not None}
    mine, expected = found
    assert mine.keys() == expected.keys()
    for name, grad in expected.items():
        assert mine[name].dtype == grad.dtype
        assert (mine[name] - grad).norm() <= ROUGH * grad.norm(), name


@pytest.mark.parametrize("reshard", [True, False])
def test_gradients_are_accumulated(reshard: bool) -> None:
    plain, model = Model(), sharded(Model())
    called = compiled(model)
    for _ in range(2):
        plain.zero_grad()
        model.zero_grad()
        for part in range(3):
            model.set_requires_gradient_sync(part == 2)
            model.set_reshard_after_backward(reshard or part == 2)
            plain(tokens(part=part)).backward()
            called(tokens(part=part)).backward()
        torch.testing.assert_close(gradients(model), gradients(plain))
    assert not whole_in(model)


def both(call: Any) -> None:
    (call(tokens()) + 2.0 * call(tokens(part=1))).backward()


def one_of_two(call: Any) -> None:
    first, _ = call(tokens()), call(tokens(part=1))
    first.backward()


def in_turns(call: Any) -> None:
    first, second = call(tokens()), call(tokens(part=1))
    first.backward()
    second.backward()


def twice(call: Any) -> None:
    loss = call(tokens())
    loss.backward(retain_graph=True)
    loss.backward()


def through_each_other(call: Any) -> None:
    embeds = torch.ones(2, LENGTH, WIDTH, requires_grad=True)
    loss = call(tokens(), embeds)
    (loss + call(tokens(), embeds * loss)).backward()


ORDERS: list[Callable[[Any], None]] = [both, one_of_two, in_turns, twice, through_each_other]


@pytest.mark.parametrize(
    ("how", "orders"),
    [*(("around", [order]) for order in ORDERS), ("inside", ORDERS)],
    ids=[*(order.__name__ for order in ORDERS), "inside"],
)
def test_forwards_and_backwards_in_any_order(how: str, orders: list[Callable[[Any], None]]) -> None:
    plain, model = Model(), sharded(Model())
    called = compiled(model, how)
    for order in orders * 2:
        plain.zero_grad()
        model.zero_grad()
        order(plain)
        order(called)
        torch.testing.assert_close(gradients(model), gradients(plain))
        assert not whole_in(model)


@HOWS
def test_inputs_get_gradients(how: str) -> None:
    plain, model = Model(), sharded(Model())
    called, found = compiled(model, how), []
    for one, call in ((model, called), (plain, plain)):
        embeds = torch.ones(2, LENGTH, WIDTH, requires_grad=True)
        found.append((step(one, call, tokens(), embeds), embeds.grad))
    torch.testing.assert_close(*found)


@pytest.mark.parametrize(
    ("how", "mode"), [("around", torch.no_grad), ("inside", torch.no_grad), ("around", torch.inference_mode)]
)
def test_evaluation_sees_each_step(how: str, mode: Any) -> None:
    plain, model = Model(), sharded(Model())
    called = compiled(model, how)
    # FSDP2 leaves weights of the root whole after a forward without gradients, also where model.zero_grad() looks
    optimizers = [torch.optim.SGD(one.parameters(), 0.5) for one in (plain, model)]

    def train() -> None:
        losses = called(tokens()), plain(tokens())
        for loss in losses:
            loss.backward()
        torch.testing.assert_close(*losses)
        torch.testing.assert_close(gradients(model), gradients(plain))
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()

    def alternate() -> None:
        for _ in range(3):
            train()
            with mode():
                torch.testing.assert_close(called(tokens()), plain(tokens()))

    assert len(compiled_by(alternate)) == 2


@pytest.mark.parametrize(("how", "where"), [("around", "an input"), ("around", "a layer"), ("inside", "a layer")])
def test_a_step_after_one_that_failed(how: str, where: str) -> None:
    plain, model = Watched(), sharded(Watched())
    called = compiled(model, how)
    check(plain, model, called)

    def fail(when: str, number: int) -> None:
        if number == 2:
            raise IndexError("made up")

    watching.extend([fail] if where == "a layer" else [])
    with pytest.raises(IndexError):
        called(tokens() + (WORDS if where == "an input" else 0))
    watching.clear()
    assert not whole_in(model)
    for _ in range(2):
        check(plain, model, called)


@HOWS
def test_hooks_of_others(how: str) -> None:
    """Run, also one that is there for a while."""
    plain, model = Model(), sharded(Model())
    for one in (plain, model):
        one.layers[1].register_forward_pre_hook(lambda module, args: (args[0] * 0.5,))
        one.layers[2].register_forward_hook(lambda module, args, output: output * 0.25)
        one.layers[3].register_forward_hook(lambda module, args, kwargs, output: output * 2.0, with_kwargs=True)
    called = compiled(model, how)
    (graph,) = compiled_by(lambda: check(plain, model, called))
    assert layers_of(graph) > 1
    handles = [one.layers[0].register_forward_hook(lambda module, args, output: output * 3.0) for one in (plain, model)]
    check(plain, model, called)
    for handle in handles:
        handle.remove()
    check(plain, model, called)


SETTINGS: dict[str, Any] = {
    "kept": {"reshard_after_forward": False}, "fewer": {"reshard_after_forward": 1},
    "offloaded": {"offload_policy": CPUOffloadPolicy(pin_memory=False)},
}  # fmt: skip


@pytest.mark.parametrize("settings", SETTINGS)
def test_settings(settings: str) -> None:
    plain, model = Model(), sharded(Model(), **SETTINGS[settings])
    called = compiled(model)
    (graph,) = compiled_by(lambda: [check(plain, model, called) for _ in range(2)])
    assert layers_of(graph) == LAYERS


READERS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "in chunks": lambda logits, ids: F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()),
    "as a whole": lambda logits, ids: logits.logsumexp(-1).square().mean(),
}


@pytest.mark.parametrize("reader", READERS)
def test_logits_are_read_outside(reader: str) -> None:
    plain, model = base(), sharded(base())
    called, ids = compiled(model), batch(0)["input_ids"]

    def train() -> None:
        mine, other = (lambda ids, call=call: READERS[reader](call(ids).logits, ids) for call in (called, plain))
        torch.testing.assert_close(step(model, mine, ids), step(plain, other, ids))

    (graph,) = compiled_by(train)
    assert graph.deferred


@pytest.mark.parametrize("storage", [torch.uint8, torch.float32], ids=str)
def test_4_bit_weights(storage: torch.dtype, tmp_path: Path) -> None:
    plain, model = (Setting(tmp_path).model(nf4=True, lora="all-linear", storage=storage) for _ in range(2))
    for layer in model.get_base_model().model.layers:
        fully_shard(layer)
    called = compiled(fully_shard(model))
    (graph,) = compiled_by(lambda: [check(plain, model, called, **batch(number)) for number in range(2)])
    projections = [found for found in graph.lifted if found.rule == "lora_linear.four_bit"]
    assert len(projections) == 7 * LLAMA_LAYERS
    assert layers_of(graph) == LLAMA_LAYERS


@pytest.mark.slow
def test_experts_with_adapters() -> None:
    import peft
    import transformers

    torch.manual_seed(0)
    config = transformers.Qwen3MoeConfig(
        vocab_size=WORDS, hidden_size=32, intermediate_size=32, moe_intermediate_size=16, num_hidden_layers=LAYERS,
        num_attention_heads=2, num_key_value_heads=1, head_dim=16, num_experts=4, num_experts_per_tok=2,
        use_cache=False,
    )  # fmt: skip
    adapters = {"target_modules": ["q_proj"], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}
    base = transformers.Qwen3MoeForCausalLM(config).requires_grad_(False)
    model = peft.get_peft_model(base, peft.LoraConfig(r=2, init_lora_weights=False, **adapters))
    plain = copy.deepcopy(model)
    for layer in model.get_base_model().model.layers:
        fully_shard(layer)
    fully_shard(model)
    ids = torch.randint(WORDS, (2, LENGTH))
    call, losses = compiled(model), []
    (graph,) = compiled_by(lambda: losses.append(call(input_ids=ids, labels=ids).loss))
    losses.append(plain(input_ids=ids, labels=ids).loss)
    for loss in losses:
        loss.backward()
    torch.testing.assert_close(*losses)
    expected = {name: one.grad for name, one in plain.named_parameters() if one.grad is not None}
    found = {name: one.grad.full_tensor() for name, one in model.named_parameters() if one.grad is not None}
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    assert [lifted.rule for lifted in graph.lifted].count("experts") == 2 * LAYERS


def test_layers_are_traced_once(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, model = base(layers=LAYERS), sharded(base(layers=LAYERS))
    called, call = compiled(model), layer_reuse.Bound.call
    reused: list[Any] = []
    monkeypatch.setattr(layer_reuse.Bound, "call", lambda self: (call(self), reused.append(self))[0])
    (graph,) = compiled_by(lambda: [check(plain, model, called, **batch(0), use_cache=False) for _ in range(2)])
    assert len(reused) >= LAYERS - 2
    assert layers_of(graph) == LAYERS


@pytest.mark.parametrize("fast", [False, True])
def test_a_deleted_model_is_gone(fast: bool) -> None:
    model = sharded(Model())
    called = compiled(model) if fast else model
    step(model, called)
    seen = [weakref.ref(model.embed.weight), weakref.ref(model.layers[1].mlp[0].weight)]
    del model, called
    gc.collect()
    assert [one() for one in seen] == [None, None]


@pytest.mark.parametrize("make", ["Checkpointed", "CallsTwice", "Skipping", "Breaking", "Uncompiled"])
def test_what_models_do(make: str) -> None:
    plain, model = getattr(models, make)(), sharded(getattr(models, make)())
    called = compiled(model)
    for length in (5, 7, 5):
        check(plain, model, called, tokens(length))


@pytest.mark.parametrize("budget", ["min", "max-speed"])
def test_memory_is_planned(budget: str) -> None:
    plain, model = Model(), sharded(Model())
    called = compiled(model, memory_budget=budget)
    (graph,) = compiled_by(lambda: [check(plain, model, called, tokens(length)) for length in (5, 7)])
    assert graph.plan is not None
    moments = {label: parts[GATHERED] for label, parts in graph.plan.moments}
    in_layers = [size for label, size in moments.items() if re.match(r"\w+ of layers\.", label)]
    assert len(in_layers) == 2 * LAYERS
    assert min(in_layers) > 0
    assert moments["the optimizer's step"] == 0


@pytest.mark.parametrize("why", ["outline=False", "a failure", "layers"])
def test_what_is_left_to_hooks(why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, model = Model(), sharded(Model())
    failures, lower = [ValueError("made up")] if why == "a failure" else [], backend.lower

    def failing(*arguments: Any, **more: Any) -> Any:
        if failures:
            raise failures.pop()
        return lower(*arguments, **more)

    monkeypatch.setattr(backend, "lower", failing)
    called = model
    if why == "layers":
        for layer in model.layers:
            layer.compile(backend="fastft", options=EAGER)
    else:
        called = compiled(model, outline=why != "outline=False", strict=why != "a failure")
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        graphs = compiled_by(lambda: [check(plain, model, called, tokens(length)) for length in (5, 5, 7)])
    ours = [str(one.message) for one in told if one.category is RuntimeWarning]
    assert ["made up" in message for message in ours] == [True] * (why == "a failure")
    assert graphs
    assert not any(graph.failure for graph in graphs)


@pytest.mark.parametrize("trained", [True, False], ids=["both", "the policy"])
def test_two_models_in_a_function(trained: bool) -> None:
    plain, pair = (Model(), Model(tied=True)), (sharded(Model()), sharded(Model(tied=True)))

    def distance(policy: Any, reference: Any, ids: Tensor) -> Tensor:
        with torch.set_grad_enabled(trained):
            wanted = reference(ids)
        return (policy(ids) - wanted).square()

    fast = torch.compile(distance, backend="fastft", options=EAGER)

    def train() -> None:
        optimizers = [torch.optim.SGD(one.parameters(), 0.1) for one in (*pair, *plain)]
        for length in (5, 7):
            for optimizer in optimizers:
                optimizer.zero_grad()
            for two, function in ((pair, fast), (plain, distance)):
                function(*two, tokens(length)).backward()
            for mine, other in zip(pair, plain, strict=True):
                torch.testing.assert_close(gradients(mine), gradients(other))

    graphs = compiled_by(train)
    assert not any(graph.failure for graph in graphs)
    assert len(graphs) == 1 or not trained
