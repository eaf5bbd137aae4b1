"""How long is a step of a model that is no plain decoder, and how much memory does it take?

    python benchmarks/breadth.py --models gemma3-4b,dora-8b --contenders fastft,inductor,eager --json rows.json
    for c in fastft inductor; do python benchmarks/breadth.py --contenders $c --turns /tmp/turns --json $c.json & done
    python benchmarks/breadth.py --models deepseek-v2-lite --layers 2 --batch 1x32 --tiny --device cpu --lower eager

Shapes of published models with random weights in bfloat16, LoRA r=16 on the projections of the decoder, AdamW on them,
use_cache off.  Every step is forward, loss, backward and optimizer, and its loss is read; tokens/s are at the median.
unsloth and unsloth-checkpoint come by Unsloth's loader, which reads the same weights from a folder.
Peaks are of what tensors allocate, the first steps included; "reserved" is what timed steps took from the device, with
the allocator's slack and with CUDA graphs' memory, which counts as allocated in no step that replays them.
Each contender runs in a process of its own with empty compile caches; --turns lets several compile side by side and
times one at a time, and first steps are then not to be compared.

gemma3-4b: with an image tower, given text alone and token_type_ids, as its processor gives them.
gemma4-e4b: its text model, with inputs for each layer.
qwen2.5-vl-3b: an image of 1,024 tokens in each row, 64 x 64 patches.
deepseek-v2-lite: its attention, with the dense MLP of its first layer in all 27; adapters on the attention alone.
dora-8b: Llama-3.1-8B in 4 bits with DoRA.
qwen3-30b-a3b, gpt-oss-20b: mixtures of experts in 4 bits, adapters on the attention and on the experts.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import arguments
import checkout
import peers
import torch
import workers
from contenders import CONTENDERS
from rich.console import Console
from rich.table import Table
from torch import Tensor
from turns import Turns

Row = dict[str, Any]
ATTENTION, MLP = "q_proj|k_proj|v_proj|o_proj|kv_a_proj_with_mqa|kv_b_proj", "gate_proj|up_proj|down_proj"
LOADED: dict[str, bool | str] = {"unsloth": False, "unsloth-checkpoint": "unsloth"}  # use_gradient_checkpointing
IMAGE, VISION_START = 151655, 151652
GEMMA = {
    "vocab_size": 262208,
    "hidden_size": 2560,
    "intermediate_size": 10240,
    "num_attention_heads": 8,
    "head_dim": 256,
}

SHAPES: dict[str, Row] = {
    "gemma3-4b": {
        "config": "Gemma3Config", "model": "Gemma3ForConditionalGeneration",
        "text_config": {**GEMMA, "num_hidden_layers": 34, "num_key_value_heads": 4, "sliding_window": 1024},
        "vision_config": {
            "hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "num_attention_heads": 16,
            "image_size": 896, "patch_size": 14,
        },
    },
    "gemma4-e4b": {
        "config": "Gemma4TextConfig", "model": "Gemma4ForCausalLM",
        "text_config": {
            **GEMMA, "vocab_size": 262144, "num_hidden_layers": 42, "num_key_value_heads": 2, "global_head_dim": 512,
            "num_kv_shared_layers": 18, "sliding_window": 512, "hidden_size_per_layer_input": 256,
        },
    },
    "qwen2.5-vl-3b": {
        "config": "Qwen2_5_VLConfig", "model": "Qwen2_5_VLForConditionalGeneration",
        "text_config": {
            "vocab_size": 151936, "hidden_size": 2048, "intermediate_size": 11008, "num_hidden_layers": 36,
            "num_attention_heads": 16, "num_key_value_heads": 2, "rms_norm_eps": 1e-6,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
        },
        "vision_config": {
            "depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "out_hidden_size": 2048,
            "patch_size": 14, "window_size": 112, "fullatt_block_indexes": [7, 15, 23, 31],
        },
        "image_token_id": IMAGE, "vision_start_token_id": VISION_START,
    },
    "deepseek-v2-lite": {
        "config": "DeepseekV2Config", "model": "DeepseekV2ForCausalLM",
        "attention_only": True,  # PEFT takes the MLP's names for those of experts, which none of these layers has
        "text_config": {
            "vocab_size": 102400, "hidden_size": 2048, "intermediate_size": 10944, "num_hidden_layers": 27,
            "num_attention_heads": 16, "num_key_value_heads": 16, "q_lora_rank": None, "kv_lora_rank": 512,
            "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "first_k_dense_replace": 10**6,
        },
    },
    "qwen3-30b-a3b": {
        "config": "Qwen3MoeConfig", "model": "Qwen3MoeForCausalLM", "nf4": True, "experts": True,
        "text_config": {
            "vocab_size": 151936, "hidden_size": 2048, "intermediate_size": 6144, "moe_intermediate_size": 768,
            "num_hidden_layers": 48, "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128,
            "num_experts": 128, "num_experts_per_tok": 8, "norm_topk_prob": True, "rms_norm_eps": 1e-6,
        },
    },
    "gpt-oss-20b": {
        "config": "GptOssConfig", "model": "GptOssForCausalLM", "nf4": True, "experts": True,
        "text_config": {
            "vocab_size": 201088, "hidden_size": 2880, "intermediate_size": 2880, "num_hidden_layers": 24,
            "num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 64, "num_local_experts": 32,
            "num_experts_per_tok": 4, "sliding_window": 128,
        },
    },
    "dora-8b": {
        "config": "LlamaConfig", "model": "LlamaForCausalLM", "nf4": True, "dora": True,
        "text_config": {
            "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
            "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "rms_norm_eps": 1e-5,
        },
    },
}  # fmt: skip
TINY = {
    "vocab_size": 512, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 16, "global_head_dim": 32, "sliding_window": 16, "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": 512, "num_kv_shared_layers": 0, "kv_lora_rank": 16, "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8, "v_head_dim": 16, "moe_intermediate_size": 64, "num_experts": 8, "num_local_experts": 8,
    "num_experts_per_tok": 2,
}  # fmt: skip


def parse(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    add = parser.add_argument
    shapes = arguments.listed(arguments.named("model", SHAPES))
    add("--models", type=shapes, default=list(SHAPES), help="comma-separated; all of them without it")
    add("--contenders", type=arguments.listed(arguments.contender), default=["fastft", "inductor", "eager"])
    add("--batch", type=arguments.shape, default=(2, 2048), help="rows x tokens (default 2x2048)")
    add("--layers", type=arguments.positive, help="cut the decoder, and a tower, to this many layers")
    add("--tiny", action="store_true", help="narrow layers, to try the command on a CPU")
    add("--steps", type=arguments.positive, default=8, help="timed steps (default 8)")
    add("--warmup", type=arguments.positive, default=3, help="steps before them, the first included (default 3)")
    add("--device", help="cuda if there is one, else cpu")
    add("--lower", default="inductor", help="fastft's option of that name")
    add("--memory-budget", help="fastft's option of that name, as 8GiB")
    add("--turns", help="a file: of commands that name the same one, started together, each is timed alone")
    add("--timeout", type=float, default=900, help="seconds for one process (default 900)")
    add("--commit", default=checkout.commit(), help="recorded in the rows (default: from git)")
    add("--json", type=Path, help="write the rows here, after each one")
    add("--rows", action="store_true", help="print each row as a line of JSON when it is done")
    return parser.parse_args(words)


def main() -> None:
    options = parse()
    rows = workers.run_all("breadth", jobs, options)
    Console().print(table(rows))


def table(rows: list[Row]) -> Table:
    """The figures of each row, and its rate relative to the same model's first contender."""
    shown = Table("model", "contender", "tokens/s", "ratio", "peak GiB", "reserved", "first step s", "graphs", "loss")
    first: dict[str, float] = {}
    for row in rows:
        if row["status"] != "ok":
            shown.add_row(row["model"], row["contender"], row["status"], row.get("error", "")[:60])
            continue
        rate = row["tokens_per_s"]
        shown.add_row(
            row["model"], row["contender"], f"{rate:,.0f}", f"{rate / first.setdefault(row['model'], rate):.2f}",
            f"{row['peak_gib']:.2f}", f"{row['reserved_gib']:.2f}", f"{row['first_step_s']:.0f}", str(row["graphs"]),
            f"{row['loss_last']:.4f}",
        )  # fmt: skip
    return shown


def jobs(options: argparse.Namespace, scratch: Path) -> list[workers.Job]:
    """Every contender with every model."""
    made = []
    for model in options.models:
        for name in options.contenders:
            kept = ("layers", "tiny", "steps", "warmup", "device", "lower", "memory_budget", "turns")
            asked = {key: getattr(options, key) for key in kept}
            asked |= {"model": model, "contender": name, "batch": options.batch[0], "length": options.batch[1]}
            made.append(workers.Job(f"{model} {name}", asked, scratch / f"caches-{len(made)}"))
    return made


def measure(asked: Row) -> Row:
    """The inside of a worker."""
    from measure import Clock, device_of

    turns, device = Turns(asked["turns"]), device_of(asked["device"])
    turns.prepare()
    peers.import_first(asked["contender"])
    clock = Clock(device)
    if asked["contender"] in LOADED:
        nf4, lora = bool(SHAPES[asked["model"]].get("nf4")), lora_of(asked)
        model = peers.unsloth_loaded(base_of(asked, device), lora, LOADED[asked["contender"]], asked["length"], nf4)
        _fill_adapters(model)
    else:
        budget = asked["memory_budget"] if asked["contender"] == "fastft" else None
        options = {"memory_budget": budget} if budget else {}
        model = CONTENDERS[asked["contender"]](lambda: build(asked, device), asked["lower"], **options)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)
    row: Row = {"model_gib": clock.allocated_gib(), "trained_parameters": sum(p.numel() for p in trained)}
    generator = torch.Generator().manual_seed(0)
    batches = [batch_of(asked, device, generator) for _ in range(asked["warmup"] + asked["steps"])]
    clock.reset_peak()
    losses, seconds = [], []
    for number, batch in enumerate(batches):
        if number > 0 and number + 1 == asked["warmup"]:
            clock.give_back()
        began = clock.now()
        optimizer.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        seconds.append(clock.now() - began)
        if number == 0:
            turns.time()
        if number + 1 == asked["warmup"]:
            row["peak_warmup_gib"] = clock.peak_gib()
            clock.reset_peak()
    timed = seconds[asked["warmup"] :]
    p20, p50, p80 = torch.tensor(timed).quantile(torch.tensor([0.2, 0.5, 0.8])).tolist()
    row |= {"first_step_s": seconds[0], "warmup_s": seconds[: asked["warmup"]], "seconds": timed}
    row |= {"seconds_p20": p20, "seconds_p50": p50, "seconds_p80": p80}
    row["tokens_per_s"] = asked["batch"] * asked["length"] / p50
    row["peak_steps_gib"] = clock.peak_gib()
    row["peak_gib"] = max(row["peak_steps_gib"], row["peak_warmup_gib"])
    row["reserved_gib"] = clock.reserved_gib()
    row |= {"loss_first": losses[0], "loss_last": losses[-1]}
    row["grad_norm_last"] = torch.nn.utils.get_total_norm([p.grad for p in trained if p.grad is not None]).item()
    stats = torch._dynamo.utils.counters
    return row | {"graphs": stats["stats"]["unique_graphs"], "graph_breaks": sum(stats["graph_break"].values())}


def build(asked: Row, device: str) -> Any:
    """A model with random weights and adapters, in train mode."""
    from peft import LoraConfig, get_peft_model

    import fastft

    model, shape = base_of(asked, device), SHAPES[asked["model"]]
    if shape.get("nf4") and not shape.get("experts"):
        fastft.quantize_(model, compute_dtype=torch.bfloat16)
    model = get_peft_model(model, LoraConfig(**lora_of(asked))).train()
    if shape.get("experts"):  # behind their adapters: PEFT does not know experts in 4 bits
        fastft.quantize_(model, compute_dtype=torch.bfloat16)
    _fill_adapters(model)
    return model


def lora_of(asked: Row) -> Row:
    """The arguments of LoraConfig."""
    shape = SHAPES[asked["model"]]
    experts = bool(shape.get("experts"))
    names = ATTENTION if experts or shape.get("attention_only") else f"{ATTENTION}|{MLP}"
    parameters = {"target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]} if experts else {}
    return {
        "r": 16, "lora_alpha": 32, "target_modules": rf"(?!.*(vision|visual)).*\.({names})", "init_lora_weights": False,
        "use_dora": bool(shape.get("dora")), **parameters,
    }  # fmt: skip


def _fill_adapters(model: Any) -> None:
    """Give both factors values, so that all of them have gradients."""
    for name, parameter in model.named_parameters():
        if "lora_" in name and parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.02)


def base_of(asked: Row, device: str) -> Any:
    """The model with random weights in bfloat16, nothing of it trained."""
    import transformers

    torch.manual_seed(0)
    shape = SHAPES[asked["model"]]
    text = dict(shape["text_config"])
    if asked["layers"]:
        text |= {"num_hidden_layers": asked["layers"]}
        text |= {"num_kv_shared_layers": asked["layers"] // 3} if "num_kv_shared_layers" in text else {}
    text |= _tiny(shape, text) if asked["tiny"] else {}
    config = getattr(transformers, shape["config"])(**_parts(shape, text, asked))
    config.use_cache = config.get_text_config().use_cache = False  # as in Trainer
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            model = getattr(transformers, shape["model"])(config)
    finally:
        torch.set_default_dtype(before)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.02) if parameter.dim() > 1 else parameter.fill_(1.0)
    return model.requires_grad_(False)


def _tiny(shape: Row, text: Row) -> Row:
    """What is smaller in a model to try the command with."""
    small = {name: size for name, size in TINY.items() if name in text or name == "vocab_size_per_layer_input"}
    if text["num_key_value_heads"] == text["num_attention_heads"]:
        small["num_key_value_heads"] = small["num_attention_heads"]
    if "image_token_id" in shape:
        small |= {"vocab_size": text["vocab_size"]}
        small["rope_parameters"] = text["rope_parameters"] | {"mrope_section": [2, 3, 3]}
    return small


def _parts(shape: Row, text: Row, asked: Row) -> Row:
    """The arguments of the configuration: of the text alone, or of each part."""
    if "vision_config" not in shape:
        return text
    vision = dict(shape["vision_config"])
    if asked["layers"]:
        depth = "depth" if "depth" in vision else "num_hidden_layers"
        vision[depth] = min(vision[depth], asked["layers"])
    if "out_hidden_size" in vision:
        vision["out_hidden_size"] = text["hidden_size"]
    more = {name: value for name, value in shape.items() if name.endswith("_token_id")}
    return {"text_config": text, "vision_config": vision, **more}


def batch_of(asked: Row, device: str, generator: torch.Generator) -> dict[str, Tensor]:
    """Random tokens, with what the model's processor adds to them."""
    rows, length, shape = asked["batch"], asked["length"], SHAPES[asked["model"]]
    vocabulary = 512 if asked["tiny"] else min(shape["text_config"]["vocab_size"], 100_000)
    ids = torch.randint(vocabulary, (rows, length), generator=generator)
    made = {"input_ids": ids, "labels": ids.clone(), "attention_mask": torch.ones_like(ids)}
    if asked["model"].startswith("gemma3"):
        made["token_type_ids"] = torch.zeros_like(ids)
    if "image_token_id" in shape:
        made |= _with_images(ids, generator)
    return {name: value.to(device) for name, value in made.items()}


def _with_images(ids: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
    """An image of 1,024 tokens in each row, behind its first eight."""
    ids[:, 7], ids[:, 8 : 8 + 1024] = VISION_START, IMAGE
    labels = ids.masked_fill(ids == IMAGE, -100)
    pixels = torch.randn(len(ids) * 4096, 3 * 2 * 14 * 14, generator=generator).bfloat16()
    grid = torch.tensor([[1, 64, 64]] * len(ids))
    kinds = (ids == IMAGE).long()
    return {
        "input_ids": ids, "labels": labels, "pixel_values": pixels, "image_grid_thw": grid, "mm_token_type_ids": kinds,
    }  # fmt: skip


if __name__ == "__main__":
    main()
