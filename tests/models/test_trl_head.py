"""TRL's fused head, as its trainers call it: one graph with one op, and as near to float64 as TRL's own function."""

import contextlib
import importlib.metadata
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from compare import FORWARD, GRADIENT, assert_close_to_truth
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

from fastft.compat import trl_substitutes
from fastft.kernels import REGISTRY
from fastft.rewriter.report import history
from models.padded_models import LAYERS, SIDES, Compiled, assert_same_gradients, batch

trl = pytest.importorskip("trl.trainer.utils")
VERSION = tuple(map(int, importlib.metadata.version("trl").split(".")[:2]))
if not (1, 16) <= VERSION < (1, 17):
    pytest.skip("for TRL's head as 1.16 has it", allow_module_level=True)

V = 131
SIZES = {"vocab_size": V, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64}
SIZES |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
ALL = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
FIELDS = ("loss", *ALL, "aux_loss")


@dataclass(frozen=True)
class Case:
    """A model, how TRL is asked for its head, and the step."""

    make: Callable[[], nn.Module] = lambda: LlamaForCausalLM(LlamaConfig(**SIZES))
    temperature: float = 1.0
    outputs: tuple[str, ...] = ALL
    scale: float = 1.0
    softcap: float = 0.0
    in_float32: bool = False  # the head
    dtype: torch.dtype = torch.float32
    autocast: bool = False
    trained: bool = False  # the head, and all of the model, without an adapter
    batch: tuple[str, ...] = ("input_ids", "attention_mask", "labels")
    more: tuple[tuple[str, Any], ...] = ()

    def build(self) -> nn.Module:
        torch.manual_seed(0)
        model = self.make().to(self.dtype)
        trl.add_fused_lm_head(model, self.temperature, self.in_float32, self.outputs)
        if self.trained:
            return model.train()
        config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
        return get_peft_model(model, config, autocast_adapter_dtype=False).train()

    def inputs(self) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(1)
        ids = torch.randint(3, V, (2, 9), generator=generator)
        mask = torch.ones_like(ids)
        mask[1, 6:] = 0
        labels = ids.masked_fill(mask == 0, -100)
        labels[0, :4] = -100
        given = {"input_ids": ids, "attention_mask": mask, "labels": labels}
        given["shift_labels"] = F.pad(labels, (0, 1), value=-100)[:, 1:]
        return {name: given[name] for name in self.batch} | dict(self.more)


CASES = {
    "temperature": Case(temperature=0.7, outputs=("log_probs", "entropy")),
    "softcap": Case(
        lambda: Gemma2ForCausalLM(Gemma2Config(**SIZES, head_dim=16, final_logit_softcapping=3.0)), 1.5, softcap=3.0,
    ),
    "logit_scale": Case(
        lambda: CohereForCausalLM(CohereConfig(**SIZES, logit_scale=0.25)), outputs=("log_probs", "is_top1"),
        scale=0.25, more=(("num_items_in_batch", 7),),
    ),
    "autocast": Case(autocast=True),
    "float32_head": Case(in_float32=True, dtype=torch.bfloat16, autocast=True),
    "shifted": Case(batch=("input_ids", "attention_mask", "shift_labels"), outputs=("log_probs",)),
    "trained": Case(trained=True, outputs=("log_probs", "entropy")),
    "experts": Case(
        lambda: MixtralForCausalLM(MixtralConfig(**SIZES, num_local_experts=4)), outputs=("log_probs",),
        more=(("output_router_logits", True),),
    ),
}  # fmt: skip


def exact(case: Case, model: nn.Module, inputs: dict[str, Any]) -> dict[str, Tensor]:
    """By torch's own functions of all logits."""
    given = {name: value for name, value in inputs.items() if "label" not in name and name != "num_items_in_batch"}
    inner = model if case.trained else model.get_base_model()
    if hasattr(inner, "set_experts_implementation"):
        inner.set_experts_implementation("eager")  # the others are for no float64
    found = inner.model(**given, use_cache=False)
    hidden, labels = found.last_hidden_state, inputs.get("shift_labels")
    if labels is None:
        hidden, labels = hidden[:, :-1], inputs["labels"][:, 1:]
    y = F.linear(hidden, inner.lm_head.weight) * case.scale
    y = case.softcap * torch.tanh(y / case.softcap) if case.softcap else y
    log_p, mask = (y / case.temperature).log_softmax(-1), labels != -100
    index = labels.clamp(min=0)
    results = {
        "log_probs": log_p.gather(-1, index[..., None])[..., 0],
        "entropy": -(log_p.exp() * log_p).sum(-1),
        "log_sum_sq_probs": torch.logsumexp(2.0 * log_p, -1).detach(),
        "mean_logits": (y / case.temperature).mean(-1).detach(),
        "is_top1": y.argmax(-1) == index,
    }
    results = {name: one.masked_fill(~mask, 0) for name, one in results.items() if name in case.outputs}
    results["loss"] = -results["log_probs"].sum() / inputs.get("num_items_in_batch", mask.sum())
    if inputs.get("output_router_logits"):
        from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

        aux = load_balancing_loss_func(found.router_logits, 4, 2, inputs["attention_mask"])
        results["aux_loss"] = aux
        results["loss"] = results["loss"] + inner.config.router_aux_loss_coef * aux
    return results


def step(case: Case, model: nn.Module, run: Callable[..., Any], entropy: float = 0.0) -> tuple[list[Any], list[Tensor]]:
    """What is returned, and the gradients of the loss and of so much of the entropies."""
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=case.autocast):
        found = run(**case.inputs(), fused_lm_head=True)
    if not isinstance(found, dict):
        found = dict(found)
    results = [found.get(name) for name in FIELDS]
    loss = found["loss"] + (entropy * found["entropy"].sum() if entropy else 0.0)
    if loss.requires_grad:
        loss.backward()
    gradients = [one.grad.clone() for one in model.parameters() if one.grad is not None]
    return [None if one is None else one.detach() for one in results], gradients


@contextlib.contextmanager
def on_a_gpu() -> Iterator[None]:
    """TRL leaves out positions as it does where Triton runs: by an index whose size depends on the data."""

    def use_triton(device: torch.device) -> bool:
        return True

    use_triton.__module__, use_triton.__qualname__ = "trl.kernels.chunked_logprob", "_use_triton"
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(trl, "_use_triton", use_triton)
        yield


def compiled(model: nn.Module, **options: Any) -> Callable[..., Any]:
    torch._dynamo.reset()
    return torch.compile(model, backend="fastft", options={"lower": "eager", "strict": True, **options})


def check(case: Case, entropy: float = 0.0) -> None:
    model = case.build()
    with on_a_gpu():
        eager = step(case, model, model, entropy)
        with history.recorded() as graphs:
            mine = step(case, model, compiled(model), entropy)
        (graph,) = graphs
    assert [one.rule for one in graph.lifted].count("linear_token_statistics") == 1
    wide = Case(**{**vars(case), "autocast": False, "dtype": torch.float64})
    model.double()
    truth = step(wide, model, lambda fused_lm_head, **given: exact(wide, model, given), entropy)
    each = [(eager[0][1], truth[0][1].double())]  # of the rows that a loss is the mean of, which may err little by luck
    for name, one, other, right in zip(FIELDS, mine[0], eager[0], truth[0], strict=True):
        assert (one is None) == (other is None) == (right is None), name
        if one is not None and one.dtype == torch.bool:
            assert torch.equal(one, other), name
        elif one is not None:
            assert_close_to_truth(
                one, other, right.double(), FORWARD, magnitude=5.0, others=each if name == "loss" else ()
            )
    assert len(mine[1]) == len(eager[1]) == len(truth[1])
    for one, other, right in zip(mine[1], eager[1], truth[1], strict=True):
        assert_close_to_truth(one, other, right, GRADIENT, magnitude=1.0)


@pytest.mark.parametrize("name", CASES)
def test_one_graph_with_one_op(name: str) -> None:
    check(CASES[name], entropy=0.1 if "entropy" in CASES[name].outputs else 0.0)


def test_without_gradients() -> None:
    """As a reference is scored, with its adapter switched off."""
    case = CASES["temperature"]
    model = case.build()
    with on_a_gpu(), torch.no_grad(), model.disable_adapter():
        eager, _ = step(case, model, model)
        with history.recorded() as graphs:
            mine, _ = step(case, model, compiled(model))
    assert len(graphs) == 1
    for one, other in zip(mine, eager, strict=True):
        assert (one is None and other is None) or torch.allclose(one, other, rtol=1e-5, atol=1e-6)


def test_padding_is_left_out() -> None:
    """On either side and in between, with the same results of all tokens and the same gradients."""
    sizes = {**SIZES, "num_hidden_layers": LAYERS, "vocab_size": 128}
    case = Case(lambda: LlamaForCausalLM(LlamaConfig(**sizes)), 0.7, ("log_probs", "entropy", "is_top1"))
    model = case.build()
    eager = case.build()
    compiled = Compiled(model)
    for side in SIDES:
        inputs = {name: value for name, value in batch(side).items() if name != "use_cache"}
        found = []
        for one in (model, eager):
            one.zero_grad()
            results = one(**inputs, fused_lm_head=True)
            (results.loss + 0.1 * results.entropy.square().sum()).backward()
            found.append([getattr(results, name) for name in ("loss", *case.outputs)])
        for mine, right in zip(*found, strict=True):
            torch.testing.assert_close(mine, right, rtol=1e-4, atol=1e-5)
        assert_same_gradients(model, eager)
    assert len(compiled.reports) == 1
    assert not compiled.rows.reason
    assert compiled.rows.live < compiled.rows.rows / 2


def test_it_can_be_switched_off() -> None:
    """And is then TRL's own, with TRL's break."""
    case = CASES["temperature"]
    model = case.build()
    run = compiled(model, disable=["linear_token_statistics"])
    with history.recorded() as graphs:
        mine = step(case, model, run, 0.1)
    assert not any(one.rule == "linear_token_statistics" for graph in graphs for one in graph.lifted)
    for one, other in zip(mine[1], step(case, model, model, 0.1)[1], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_what_is_no_matrix_of_numbers_is_left_to_trl() -> None:
    """A head packed in 4 bits, say, of which TRL says itself that it cannot multiply by it."""
    hidden, labels, asked = torch.randn(3, 8), torch.tensor([1, 2, 3]), []

    class Original:
        @staticmethod
        def apply(*given: Any) -> tuple[None, None]:
            asked.append(given)
            return None, None

    arguments = (hidden, torch.zeros(40, 1, dtype=torch.uint8), None, labels, 0.7, 64)
    trl_substitutes.apply_with_outputs(Original, *arguments, outputs=("entropy",))
    trl_substitutes.apply_in_autocast(Original, *arguments)
    trl_substitutes.apply_with_bias(Original, *arguments)
    trl_substitutes.apply_first(Original, *arguments[:2], *arguments[3:])
    assert asked[0] == (*arguments, None, 1.0, ("entropy",))
    assert asked[1] == asked[2] == (*arguments, None, 1.0)
    assert asked[3] == (*arguments[:2], *arguments[3:], None, 1.0)


@pytest.mark.parametrize("function", ["apply_in_autocast", "apply_with_bias", "apply_first"])
def test_what_earlier_versions_return(function: str) -> None:
    """Log-probabilities and entropies, of which the first version's have no gradient."""
    assert "fastft::linear_token_statistics" in REGISTRY
    generator = torch.Generator().manual_seed(0)
    hidden, weight, bias = (torch.randn(*shape, generator=generator) for shape in ((6, 8), (V, 8), (V,)))
    labels = torch.randint(V, (6,), generator=generator)
    more = [] if function == "apply_first" else [bias]
    hidden.requires_grad_()
    found = getattr(trl_substitutes, function)(None, hidden, weight, *more, labels, 0.7, 64, 3.0, 0.5)
    y = 3.0 * torch.tanh(F.linear(hidden, weight, *more) * 0.5 / 3.0) / 0.7
    log_p = y.log_softmax(-1)
    expected = [log_p.gather(1, labels[:, None])[:, 0], -(log_p.exp() * log_p).sum(-1)]
    for one, right in zip(found, expected, strict=True):
        torch.testing.assert_close(one, right, rtol=1e-4, atol=1e-5)
    assert found[1].requires_grad == (function != "apply_first")
    counted = expected if function != "apply_first" else expected[:1]
    mine, right = (torch.autograd.grad(sum(one.sum() for one in ones), hidden)[0] for ones in (found, counted))
    torch.testing.assert_close(mine, right, rtol=1e-4, atol=1e-5)
