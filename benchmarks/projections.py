"""What do LoRA and 4-bit weights cost beside the GEMMs that cannot be avoided?  Microseconds, and a ratio to those.

    python benchmarks/projections.py --json projections.json
    python benchmarks/projections.py --rows 4096 --contenders fastft,inductor

The projections of one Llama layer in four groups: q, k and v; o; gate and up; down.  Each is bitsandbytes' NF4 with
double quantisation and PEFT's LoRA in float32, as a user has it; forward gives the results, backward the gradients of
the input and of every factor.  "bare" is what no fine-tuning is without: one GEMM forward and one backward for each
projection, with 16-bit weights.  "fastft" is the op as a compiled layer calls it: results side by side, and gradients
too where the gated activation gives them so; those of q, k and v are put side by side first.  Everything is recorded in
CUDA graphs and timed in turn.  Unsloth's functions are timed where they do the same work: for q, k, v and o.
A contender whose results or gradients are not eager's is not timed.
"""

from __future__ import annotations

import argparse
import datetime
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import arguments
import checkout
import torch
import torch._functorch.config
from measure import machine
from peft import LoraConfig, inject_adapter_in_model
from presets import PRESETS
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import kernels

Row = dict[str, Any]
CONTENDERS = ("bare", "fastft", "inductor", "unsloth", "eager")
TOLERANCE = 3e-2  # of the norm: bfloat16, rounded in other places
RANK = 16


class Siblings(nn.Module):
    """Projections of one input."""

    def __init__(self, layers: dict[str, nn.Module]) -> None:
        super().__init__()
        for name, layer in layers.items():
            self.add_module(name, layer)
        self.names = list(layers)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.get_submodule(name)(x) for name in self.names)


def groups(preset: str) -> dict[str, tuple[int, dict[str, int]]]:
    """By name: the width of the input, and of each projection."""
    shape = PRESETS[preset]
    hidden, inner, heads = shape["hidden_size"], shape["intermediate_size"], shape["num_attention_heads"]
    keys = hidden // heads * shape["num_key_value_heads"]
    return {
        "qkv": (hidden, {"q_proj": hidden, "k_proj": keys, "v_proj": keys}),
        "o": (hidden, {"o_proj": hidden}),
        "gate up": (hidden, {"gate_proj": inner, "up_proj": inner}),
        "down": (inner, {"down_proj": hidden}),
    }


def build(width: int, widths: dict[str, int], device: str) -> nn.Module:
    """4-bit layers with adapters whose second factor is not zero."""
    from bitsandbytes.nn import Linear4bit

    from fastft.quantize import on_default_stream

    layers: dict[str, nn.Module] = {}
    for name, out in widths.items():
        layer = Linear4bit(width, out, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4")
        layer.weight.data = torch.randn(out, width, dtype=torch.bfloat16) * 0.02
        with on_default_stream(torch.device(device)):
            layers[name] = layer.to(device)
    config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=list(widths), init_lora_weights=False)
    return inject_adapter_in_model(config, Siblings(layers)).to(device).train()


def trained(module: nn.Module) -> list[Tensor]:
    return [one for one in module.parameters() if one.requires_grad]


Call = Callable[[Tensor], Sequence[Tensor]]


def contender(name: str, module: Any, widths: dict[str, int]) -> Call:
    """The module's forward as a contender runs it."""
    if name == "unsloth":
        from unsloth.kernels import fast_lora

        apply = {
            "qkv": lambda m, x: fast_lora.apply_lora_qkv(m, x, inplace=False),
            "o": lambda m, x: (fast_lora.apply_lora_o(m, x),),
        }
        if (group := "qkv" if "q_proj" in widths else "o" if "o_proj" in widths else "") in apply:
            return lambda x: apply[group](module, x)
        raise LookupError("it has no function for this group alone")
    return module if name == "eager" else torch.compile(module, dynamic=False)


def directions(call: Call, module: nn.Module, x: Tensor, upstream: Sequence[Tensor]) -> dict[str, Callable[[], Any]]:
    """Forward, and a backward that can be run again and again."""
    wanted = [x, *trained(module)]
    outputs = call(x)
    return {
        "forward": lambda: call(x),
        "backward": lambda: torch.autograd.grad(outputs, wanted, upstream, retain_graph=True),
    }


def ours(module: Any, x: Tensor, upstream: Sequence[Tensor]) -> dict[str, Callable[[], Any]]:
    """The op, and its backward."""
    layers = [module.get_submodule(name) for name in module.names]
    states = [layer.base_layer.weight.quant_state for layer in layers]
    nested = [[state.state2.absmax, state.absmax, state.state2.code, state.offset] for state in states]
    factors = [[getattr(layer, name)["default"].weight for layer in layers] for name in ("lora_A", "lora_B")]
    features = [state.shape[0] for state in states]
    group = (
        x.detach(), [layer.base_layer.weight.data for layer in layers], *map(list, zip(*nested, strict=True)), [],
        *factors, [], features, [], list(range(len(layers))), [layer.scaling["default"] for layer in layers],
        states[0].blocksize, states[0].quant_type, False, False,
    )  # fmt: skip
    needed = [True, *[False] * len(layers), *[True] * 2 * len(layers)]
    side_by_side = torch.cat(list(upstream), -1)
    s = torch.ops.fastft.lora_linear(*group)[1]

    def forward() -> Any:
        return torch.ops.fastft.lora_linear(*group)[0].split(features, -1)

    def backward() -> Any:
        gradient = torch.cat(list(upstream), -1) if len(layers) > 2 else side_by_side
        dx, *found = torch.ops.fastft.lora_linear_backward(gradient, s, *group, needed)
        das, dbs = found[: len(layers)], found[len(layers) :]
        return [dx, *(one for pair in zip(das, dbs, strict=True) for one in pair)]

    return {"forward": forward, "backward": backward}


def bare(module: Any, x: Tensor, upstream: Sequence[Tensor]) -> dict[str, Callable[[], Any]]:
    """The GEMMs alone."""
    from bitsandbytes.functional import dequantize_4bit

    layers = [module.get_submodule(name).base_layer for name in module.names]
    weights = [dequantize_4bit(layer.weight.data, layer.weight.quant_state).to(x.dtype) for layer in layers]
    data, upstream = x.detach()[0], [one[0] for one in upstream]
    outputs, dx = [torch.empty_like(one) for one in upstream], torch.empty_like(data)

    def forward() -> None:
        for weight, y in zip(weights, outputs, strict=True):
            torch.mm(data, weight.T, out=y)

    def backward() -> None:
        for weight, dy in zip(weights, upstream, strict=True):
            torch.mm(dy, weight, out=dx)

    return {"forward": forward, "backward": backward}


def agree(given: dict[str, Callable[[], Any]], expected: dict[str, Callable[[], Any]]) -> None:
    """Raise if results or gradients are others than eager's."""
    for direction in ("forward", "backward"):
        for mine, other in zip(given[direction](), expected[direction](), strict=True):
            error = (mine.float() - other.float()).norm() / other.float().norm()
            if not error <= TOLERANCE:
                raise AssertionError(f"{direction}: {error:.1e} from eager")


def measured(group: str, rows: int, options: argparse.Namespace) -> Iterator[Row]:
    """A row for each contender and direction."""
    width, widths = groups(options.model)[group]
    torch.manual_seed(0)
    torch._dynamo.reset()
    module = build(width, widths, options.device)
    x = torch.randn(1, rows, width, dtype=torch.bfloat16, device=options.device, requires_grad=True)
    upstream = [torch.randn(1, rows, out, dtype=torch.bfloat16, device=options.device) for out in widths.values()]
    eager = directions(module, module, x, upstream)
    runs: dict[tuple[str, str], Callable[[], Any]] = {}
    for name in options.contenders:
        try:
            if name == "bare":
                found = bare(module, x, upstream)
            elif name == "fastft":
                found = ours(module, x, upstream)
                agree(found, eager)
            else:
                found = directions(contender(name, module, widths), module, x, upstream)
                agree(found, eager)
            for direction, run in found.items():
                runs[name, direction] = run if options.device == "cpu" else kernels.recorded([run] * options.calls)
        except Exception as error:  # one contender must not cost the others their rows
            lines = str(error).strip().splitlines() or ["no message"]
            yield {"group": group, "rows": rows, "contender": name, "error": f"{type(error).__name__}: {lines[0]}"}
    seconds: dict[tuple[str, str], list[float]] = {key: [] for key in runs}
    for _ in range(options.rounds):
        for key, run in runs.items():
            seconds[key].append(kernels.timed(run, options.device) / (1 if options.device == "cpu" else options.calls))
    for (name, direction), times in seconds.items():
        p20, p50, p80 = (1e6 * one for one in kernels.quantiles(times))
        yield {
            "group": group, "rows": rows, "contender": name, "direction": direction, "us_p20": p20, "us": p50,
            "us_p80": p80,
        }  # fmt: skip


def table(rows: list[Row], count: int) -> Table:
    """Forward and backward of each group and all of them together, and the ratio to the GEMMs."""
    of = {
        (row["group"], row["contender"], row["direction"]): row["us"]
        for row in rows
        if row["rows"] == count and "us" in row
    }
    names = [name for name in CONTENDERS if any(key[1] == name for key in of)]
    shown = Table(
        "group",
        *(f"{name} us" for name in names),
        *(f"{name} /bare" for name in names[1:]),
        title=f"{count} rows, forward + backward",
    )
    totals: dict[str, list[float]] = {name: [] for name in names}
    for group in dict.fromkeys(key[0] for key in of):
        sums = {
            name: sum(of.get((group, name, way), float("nan")) for way in ("forward", "backward")) for name in names
        }
        for name in names:
            totals[name].append(sums[name])
        _add(shown, group, sums, names)
    _add(shown, "all", {name: sum(found) for name, found in totals.items()}, names)
    return shown


def _add(shown: Table, group: str, sums: dict[str, float], names: Sequence[str]) -> None:
    cell = lambda value, digits: "–" if value != value else f"{value:,.{digits}f}"  # noqa: E731
    ratios = [cell(sums[name] / sums["bare"], 3) if "bare" in sums else "" for name in names[1:]]
    shown.add_row(group, *(cell(sums[name], 0) for name in names), *ratios)


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    add = parser.add_argument
    add("--model", choices=list(PRESETS), default="llama-8b")
    add("--rows", type=arguments.listed(arguments.positive), default=[4096, 16384])
    add("--contenders", type=lambda text: text.split(","), default=list(CONTENDERS))
    add("--device", default="cuda", help="cpu runs everything without graphs, to try this script out")
    add("--rounds", type=arguments.positive, default=15)
    add("--calls", type=arguments.positive, default=4, help="in one graph")
    add("--commit", default=checkout.commit(), help="recorded in the rows (default: from git)")
    add("--json", type=Path, help="write the rows here")
    return parser.parse_args(words)


def main(words: Sequence[str] | None = None) -> None:
    options = parse(words)
    if options.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("projections.py needs a CUDA device; --device cpu only tries it out.")
    torch._functorch.config.donated_buffer = False  # backward is run many times
    common = {**machine(options.device), "model": options.model, "commit": options.commit}
    common["date"] = datetime.date.today().isoformat()
    rows: list[Row] = []
    with kernels.one_stream(options.device):
        for count in options.rows:
            for group in groups(options.model):
                rows += [{**common, **row} for row in measured(group, count, options)]
                print(f"{group} of {count} rows done", flush=True)
                if options.json:
                    options.json.write_text(json.dumps(rows, indent=1))
    console = Console(width=150)
    for count in options.rows:
        console.print(table(rows, count))
    for line in dict.fromkeys(f"{row['contender']}, {row['group']}: {row['error']}" for row in rows if "error" in row):
        console.print(line[:150])


if __name__ == "__main__":
    main()
