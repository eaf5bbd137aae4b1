"""Models whose batches are padded, compiled and as they are, and how near their steps are."""

import copy
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.utils.flop_counter import FlopCounterMode

import fastft
from fastft.rewriter import backend
from models.families import FAMILIES, OTHERS, Family, build

LAYERS = 4  # from which on a graph is for any batch and length from the start
LENGTH = 64
LENGTHS = (64, 40, 9, 23, 2)
SIDES = ("right", "left", "holes")
FLOPS_A_TOKEN = 1.10


def batch(side: str, lengths: tuple[int, ...] = LENGTHS, length: int = LENGTH, seed: int = 1) -> dict[str, Tensor]:
    """Rows of these lengths, padded on a side; the first third of the second row is a prompt, without labels."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, 128, (len(lengths), length), generator=generator)
    place, sizes = torch.arange(length), torch.tensor(lengths)[:, None]
    read = place < sizes if side == "right" else place >= length - sizes
    if side == "holes":
        read = torch.rand(ids.shape, generator=generator) < sizes / length
    labels = ids.masked_fill(~read, -100)
    labels[1 % len(lengths), : length // 3] = -100
    return {"input_ids": ids, "attention_mask": read.long(), "labels": labels, "use_cache": False}


def without_first(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same, and nothing has to tell the first token of a row: on the left, that would be padding."""
    first = inputs["attention_mask"].cumsum(1) == 1
    return inputs | {"labels": inputs["labels"].masked_fill(first, -100)}


class Compiled:
    """A model compiled in place, the reports of its graphs, and the operations of a step."""

    def __init__(self, model: nn.Module, **options: Any) -> None:
        self.model, self.reports, self.counter = model, [], None
        chosen = {"lower": "eager", "strict": True, **options}

        def counting(gm: GraphModule, example_inputs: list[Any]) -> Callable:
            with fastft.rewriter.report.history.recorded() as reports:
                run = backend.fastft(gm, example_inputs, options=chosen)
            self.reports += reports

            def call(*inputs: Any) -> Any:
                with self.counter or nullcontext():
                    return run(*inputs)

            return call

        counting.traces_layers_once = True  # type: ignore[attr-defined]
        torch._dynamo.reset()
        model.compile(backend=counting)

    def operations(self, inputs: dict[str, Tensor]) -> int:
        """Count those of a step, forward and backward, once all is compiled."""
        self.model(**inputs).loss.backward()
        self.counter = counter = FlopCounterMode(display=False)
        loss = self.model(**inputs).loss
        self.counter = None
        with counter:
            loss.backward()
        return counter.get_total_flops()

    @property
    def rows(self) -> Any:
        """What the report of the last graph says of rows."""
        return self.reports[-1].rows


class OnlyLoss(nn.Module):
    """A model that returns nothing but its loss."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, **inputs: Any) -> Tensor:
        return self.model(**inputs).loss


def pair(family: Family, **more: Any) -> tuple[nn.Module, nn.Module]:
    """A model and the same again, which is not compiled."""
    model = build(family, nf4=False, checkpoint=False, train_norms=True, layers=LAYERS, **more)
    return model, copy.deepcopy(model)


def assert_same(model: nn.Module, eager: nn.Module, inputs: dict[str, Tensor], **more: Any) -> None:
    """Loss, the gradient of every parameter, and the logits of all tokens that are no padding."""
    results = []
    for one in (model, eager):
        one.zero_grad(set_to_none=True)
        outputs = one(**inputs, **more)
        outputs.loss.backward()
        results.append(outputs)
    torch.testing.assert_close(results[0].loss, results[1].loss, rtol=1e-5, atol=1e-5)
    read = inputs["attention_mask"].bool() if "attention_mask" in inputs else torch.ones_like(inputs["labels"]).bool()
    torch.testing.assert_close(results[0].logits[read], results[1].logits[read], rtol=1e-4, atol=2e-5)
    assert results[0].logits.isfinite().all()
    assert_same_gradients(model, eager)


def assert_same_gradients(model: nn.Module, eager: nn.Module) -> None:
    """Each is up to 2.3e-5 of the largest element from what float64 gives (olmo2), so two are up to 5e-5 apart."""
    for (name, mine), other in zip(model.named_parameters(), eager.parameters(), strict=True):
        assert (mine.grad is None) == (other.grad is None), name
        if other.grad is not None:
            scale = other.grad.abs().max().item()
            torch.testing.assert_close(mine.grad, other.grad, rtol=1e-3, atol=1e-4 * max(scale, 1e-2), msg=name)


_CHOSEN = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}
_LATENT = {"q_lora_rank": 32, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 16}
ROUTED = [  # with adapters on their experts
    Family("qwen3_moe", "Qwen3MoeConfig", {}, {}, sizes={"num_experts": 4, **_CHOSEN}),
    Family(  # groups of experts, experts that all tokens have, and a first layer without any
        "deepseek_v3", "DeepseekV3Config", {}, {},
        sizes={
            **_LATENT, **_CHOSEN, "num_key_value_heads": 4, "head_dim": None, "n_routed_experts": 8, "n_group": 4,
            "topk_group": 2, "first_k_dense_replace": 1,
        },
    ),
]  # fmt: skip
UNDERSTOOD = [family for family in (*FAMILIES, *OTHERS, *ROUTED) if family.head]
