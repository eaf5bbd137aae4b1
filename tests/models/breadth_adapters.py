"""Adapters of every kind, and base models in fewer bits, on a small Llama."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from fastft import variants
from models.breadth import LAYERS, Case, Made, built, config, sizes, text

PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TITLES = {
    "lora": "LoRA", "dora": "DoRA", "rslora": "rsLoRA", "lora-bias": "LoRA with `lora_bias`", "loha": "LoHa",
    "lokr": "LoKr", "adalora": "AdaLoRA", "oft": "OFT", "vera": "VeRA", "ia3": "IA3",
}  # fmt: skip


def base() -> nn.Module:
    return built(config("LlamaConfig", **sizes()))


def adapted(adapter: str, quantization: str = "none") -> Callable[[], Made]:
    return lambda: Made(variants.adapted(variants.quantized(base(), quantization), adapter, 4).train(), text())


def activated_lora() -> Made:
    """aLoRA, whose adapters act from the last words that invoke them on."""
    from peft import LoraConfig, get_peft_model

    batches = text()
    for batch in batches:
        batch["input_ids"][:, 5:7] = torch.tensor([20, 21])
    adapter = LoraConfig(
        r=4, target_modules="all-linear", alora_invocation_tokens=[20, 21], init_lora_weights=False,
        task_type="CAUSAL_LM",
    )  # fmt: skip
    return Made(get_peft_model(base(), adapter).train(), batches)


def of_another_library(quantize: Callable[[nn.Module], None]) -> Callable[[], Made]:
    """LoRA on a base that another library than bitsandbytes quantised."""

    def made() -> Made:
        from peft import LoraConfig, get_peft_model

        model = base().requires_grad_(False)
        quantize(model)
        adapter = LoraConfig(r=4, target_modules=PROJECTIONS, init_lora_weights=False)
        return Made(get_peft_model(model, adapter).train(), text())

    return made


def torchao(name: str, **settings: Any) -> Callable[[nn.Module], None]:
    def quantize(model: nn.Module) -> None:
        from torchao import quantization

        chosen = {key: value(quantization) if callable(value) else value for key, value in settings.items()}
        quantization.quantize_(
            model, getattr(quantization, name)(**chosen),
            filter_fn=lambda module, path: isinstance(module, nn.Linear) and path != "lm_head",
        )  # fmt: skip

    return quantize


def linear_layers(model: nn.Module) -> dict[str, nn.Linear]:
    """What is quantised: all but the head."""
    return {path: one for path, one in model.named_modules() if isinstance(one, nn.Linear) and path != "lm_head"}


def hqq(model: nn.Module) -> None:
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    for path, layer in linear_layers(model).items():
        settings = BaseQuantizeConfig(nbits=4, group_size=64)
        model.set_submodule(path, HQQLinear(layer, settings, compute_dtype=torch.float32, device="cpu"))


def gptqmodel(name: str, dtype: torch.dtype = torch.float32, **settings: Any) -> Callable[[nn.Module], None]:
    """Layers in the format of GPTQ or AWQ, with random codes.  dtype: of the model."""

    def quantize(model: nn.Module) -> None:
        from gptqmodel.nn_modules.qlinear import torch as gptq
        from gptqmodel.nn_modules.qlinear import torch_awq as awq

        kind, random = getattr(gptq, name, None) or getattr(awq, name), torch.Generator().manual_seed(3)
        for path, layer in linear_layers(model.to(dtype)).items():
            new = kind(
                bits=4, group_size=32, desc_act=False, in_features=layer.in_features, out_features=layer.out_features,
                bias=False, register_buffers=True, **settings,
            )  # fmt: skip
            for codes in (new.qweight, new.qzeros):
                codes.copy_(torch.randint(-(2**31), 2**31, codes.shape, generator=random))
            new.scales = (torch.rand(new.scales.shape, generator=random) * 0.01).to(dtype)
            new.post_init()
            model.set_submodule(path, new)

    return quantize


# Where layers are not traced once, the first is a kind of its own: its input needs no gradient.
APART = LAYERS - 1
GPTQMODEL = ("gptqmodel", "optimum", "torchvision")  # the last of which it imports and does not require


def adapter_case(adapter: str, **told: Any) -> Case:
    ops = "rms_norm rotary attention glu"
    return Case(TITLES[adapter], adapted(adapter), **{"ops": ops, "needs": ("peft",), **told})


def base_case(name: str, make: Callable[[], Made], *needs: str, **told: Any) -> Case:
    settings = {"ops": "rms_norm rotary attention glu lora", "shared": APART, "needs": ("peft", *needs), **told}
    return Case(f"LoRA, base in {name}", make, **settings)


ADAPTERS = (
    adapter_case("lora", ops="rms_norm rotary attention glu lora"),
    adapter_case("rslora", ops="rms_norm rotary attention glu lora"),
    adapter_case("lora-bias", ops="rms_norm rotary attention glu lora", slow=True),
    adapter_case("dora", ops="rms_norm rotary attention glu dora", shared=APART, slow=True),
    Case(
        "DoRA, base in NF4", adapted("dora", "nf4"), ops="rms_norm rotary attention glu dora lora_linear",
        shared=APART, needs=("peft", "bitsandbytes"), slow=True,
    ),
    adapter_case("loha", shared=APART, slow=True),
    adapter_case("lokr", slow=True),
    Case("aLoRA", activated_lora, ops="rms_norm rotary attention glu lora", needs=("peft",), slow=True),
    adapter_case("adalora", shared=APART, slow=True),
    adapter_case("oft"),
    adapter_case("vera"),
    adapter_case("ia3"),
)  # fmt: skip
BASES = (
    base_case(
        "FP4 (bitsandbytes)", adapted("lora", "fp4"), "bitsandbytes",
        ops="rms_norm rotary attention glu lora lora_linear", shared=LAYERS,
    ),
    base_case("int8 (bitsandbytes)", adapted("lora", "int8"), "bitsandbytes"),
    base_case("int8 (torchao)", of_another_library(torchao("Int8WeightOnlyConfig")), "torchao", slow=True),
    base_case(
        "int4 (torchao)",
        of_another_library(
            torchao("IntxWeightOnlyConfig", weight_dtype=torch.int4, granularity=lambda of: of.PerGroup(32))
        ),
        "torchao", slow=True,
    ),
    base_case("fp8 (torchao)", of_another_library(torchao("Float8WeightOnlyConfig")), "torchao", slow=True),
    base_case("4 bits (HQQ)", of_another_library(hqq), "hqq", slow=True),
    base_case(
        "4 bits (GPTQ)", of_another_library(gptqmodel("TorchLinear", sym=True)), *GPTQMODEL, shared=LAYERS,
        slow=True,
    ),
    base_case(  # whose layers compute in 16 bits in any case
        "4 bits (AWQ), in float16", of_another_library(gptqmodel("AwqTorchLinear", torch.float16, sym=False)),
        *GPTQMODEL, shared=LAYERS, slow=True,
    ),
)  # fmt: skip
