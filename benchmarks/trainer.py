"""What does TRL's SFTTrainer gain, with packing and 4-bit weights, beside other libraries' own integrations?

    python benchmarks/trainer.py --model llama-1b --nf4 --json trainer.json --png trainer.png
    python benchmarks/trainer.py --model tiny --device cpu --dtype float32 --lower eager --contenders eager,fastft
    python benchmarks/trainer.py --show trainer.json --png trainer.png

Each contender, in a process of its own, loads the same model from a folder (random weights, a tokenizer of bytes), adds
LoRA (r=16 on all seven projections) and trains on the Python language reference, cut into documents of 100 to 1,500
bytes that SFTTrainer packs to rows of --length: what its users write, with SFTConfig's defaults but for what is listed
under CONTENDERS.  With --median 250 documents are of log-normal lengths about that, and not packed: each batch is
padded to its longest, but by those that leave padding out themselves, as Unsloth does, or are told to, as padding-free
and fastft-padding-free are.  fastft is one line more: ``trainer.model.compile(backend="fastft")``.

Tokens are those of each batch, without padding; seconds are from the end of one step to the end of the next, the median
of all after --warmup; memory is the peak of tensors over the whole run.  The loss is logged at each step and drawn.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import statistics
import tempfile
from pathlib import Path
from typing import Any

import arguments
import report
import workers
from report import COLOURS

Row = dict[str, Any]
NO_CHECKPOINTS = {"gradient_checkpointing": False}
PADDING_FREE = {"padding_free": True, "max_length": None}
CONTENDERS: dict[str, dict[str, Any]] = {  # what SFTConfig is told beside what all are
    "eager": {},  # with checkpointing, SFTConfig's default
    "eager-keep": NO_CHECKPOINTS,
    "liger": {"use_liger_kernel": True},
    "liger-keep": {"use_liger_kernel": True, **NO_CHECKPOINTS},
    "unsloth": {},  # with its own checkpointing
    "unsloth-keep": NO_CHECKPOINTS,
    "inductor": NO_CHECKPOINTS,
    "fastft": NO_CHECKPOINTS,  # the budget decides
    "fastft-min": NO_CHECKPOINTS,
    "fastft-9GiB": NO_CHECKPOINTS,
    "fastft-padded": {"pad_to_multiple_of": 1024, **NO_CHECKPOINTS},
    "fastft-all-rows": NO_CHECKPOINTS,
    "fastft-skip": NO_CHECKPOINTS,  # TRL takes its loss outside the model, so it has to be told
    "padding-free": PADDING_FREE | NO_CHECKPOINTS,  # TRL's own: one row, no padding
    "fastft-padding-free": PADDING_FREE | NO_CHECKPOINTS,
}
PADDING, BEGIN, END = 0, 1, 2  # tokens of the tokenizer of bytes
OPTIONS: dict[str, dict[str, Any]] = {
    "fastft-all-rows": {"skip_padding": False},
    "fastft-skip": {"skip_padding": True},
    "fastft-min": {"memory_budget": "min"},
    "fastft-9GiB": {"memory_budget": "9GiB"},
}


def parse(words: list[str] | None = None) -> argparse.Namespace:
    parser = arguments.common(__doc__)
    add = parser.add_argument
    add("--contenders", type=arguments.listed(_contender), default=["eager", "liger", "unsloth", "fastft"])
    add("--batch", type=arguments.positive, default=4, help="rows a step (default 4)")
    add("--length", type=arguments.positive, default=2048, help="tokens a row is packed to (default 2048)")
    add("--median", type=arguments.positive, help="do not pack: pad rows of log-normal lengths about this median")
    add("--steps", type=arguments.positive, default=40, help="timed steps (default 40)")
    add("--warmup", type=arguments.positive, default=20, help="steps before them (default 20)")
    add("--turns", help="a file: of commands that name the same one, started together, each is timed alone")
    add("--folder", type=Path, help="where the model is written, or lies already (default: a temporary folder)")
    add("--show", type=Path, nargs="+", help="files of rows to show instead of measuring")
    add("--png", type=Path, help="draw loss and speed here")
    return parser.parse_args(words)


def _contender(name: str) -> str:
    if name not in CONTENDERS:
        raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(CONTENDERS)}")
    return name


def main() -> None:
    options = parse()
    if options.show:
        rows = [row for path in options.show for row in json.loads(path.read_text())]
    else:
        with tempfile.TemporaryDirectory() as folder:
            options.folder = str(options.folder or folder)
            rows = workers.run_all("trainer", jobs, options)
    show(rows)
    if options.png:
        draw(rows, options.png)


def jobs(options: argparse.Namespace, scratch: Path) -> list[workers.Job]:
    asked = arguments.asked(options, "batch", "length", "median", "steps", "warmup", "turns", "folder")
    asked["layers"] = None
    return [workers.Job(name, asked | {"contender": name}, scratch / f"caches-{name}") for name in options.contenders]


def measure(asked: Row) -> Row:
    """In a worker."""
    import peers

    peers.import_first(asked["contender"])
    import torch
    from measure import device_of
    from turns import Turns

    device = device_of(asked["device"])
    write_model(asked, Path(asked["folder"]))
    turns = Turns(asked["turns"])
    turns.prepare()
    trainer = make_trainer(asked, device)
    watch = Watch(device, turns, asked["warmup"])
    trainer.add_callback(watch.callback())
    trainer.data_collator = watch.counting(trainer.data_collator)
    trainer.train()
    history = [row for row in trainer.state.log_history if "loss" in row]
    cuda = device.startswith("cuda")
    row = {
        "losses": [float(one["loss"]) for one in history],
        "tokens": watch.tokens[: len(history)],
        "ends": watch.ends,
        "peak_bytes": torch.cuda.max_memory_allocated() if cuda else None,
    }
    if asked["contender"].startswith("fastft"):
        import fastft

        row["rows"] = [str(graph.rows) for graph in fastft.compilations().graphs]
    return row | summary(row, asked["warmup"])


def summary(row: Row, warmup: int) -> Row:
    """tokens_s: by the median step, and first_s: with compilation."""
    ends, tokens = row["ends"], row["tokens"]
    each = tokens[warmup:]
    seconds = [ends[number] - ends[number - 1] for number in range(warmup + 1, len(ends))]
    return {
        "step_s": statistics.median(seconds),
        "tokens_s": statistics.median(one / took for one, took in zip(each, seconds, strict=True)),
        "first_s": ends[1] - ends[0],
        "last_loss": statistics.fmean(row["losses"][-10:]),
    }


def make_trainer(asked: Row, device: str) -> Any:
    from datasets import Dataset
    from models import PROJECTIONS
    from peft import LoraConfig
    from trl import SFTConfig, SFTTrainer

    name, cuda = asked["contender"], device.startswith("cuda")
    config = SFTConfig(
        output_dir=tempfile.mkdtemp(), max_steps=asked["warmup"] + asked["steps"], packing=not asked["median"],
        per_device_train_batch_size=asked["batch"], gradient_accumulation_steps=1,
        learning_rate=2e-4, logging_steps=1, report_to=[], save_strategy="no",
        bf16=cuda and asked["dtype"] == "bfloat16", use_cpu=not cuda, disable_tqdm=True, dataset_text_field="text",
        seed=asked["seed"], **{"max_length": asked["length"], **CONTENDERS[name]},
    )  # fmt: skip
    lora = {"r": 16, "lora_alpha": 32, "lora_dropout": 0.0, "target_modules": list(PROJECTIONS)}
    if name.startswith("unsloth"):
        model, tokenizer = load_unsloth(asked, lora)
        more: dict[str, Any] = {}
    else:
        model, tokenizer = load(asked, device)
        more = {"peft_config": LoraConfig(task_type="CAUSAL_LM", **lora)}
    data = Dataset.from_dict({"text": documents(asked["seed"], asked["median"], asked["length"])})
    trainer = SFTTrainer(model=model, args=config, train_dataset=data, processing_class=tokenizer, **more)
    if name.startswith("fastft"):
        trainer.model.compile(backend="fastft", options={"lower": asked["lower"], **OPTIONS.get(name, {})})
    elif name == "inductor":
        trainer.model.compile()
    return trainer


def load(asked: Row, device: str) -> tuple[Any, Any]:
    """As transformers does it."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

    dtype = getattr(torch, asked["dtype"])
    nf4 = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )
    more = {"quantization_config": nf4} if asked["nf4"] else {}
    model = AutoModelForCausalLM.from_pretrained(asked["folder"], dtype=dtype, device_map=device, **more)
    return model, AutoTokenizer.from_pretrained(asked["folder"])


def load_unsloth(asked: Row, lora: Row) -> tuple[Any, Any]:
    """As Unsloth does it."""
    import torch
    from unsloth import FastLanguageModel

    model, tokenizer = FastLanguageModel.from_pretrained(
        asked["folder"], max_seq_length=asked["length"], dtype=getattr(torch, asked["dtype"]),
        load_in_4bit=asked["nf4"], local_files_only=True,
    )  # fmt: skip
    checkpoints = False if asked["contender"].endswith("-keep") else "unsloth"
    return FastLanguageModel.get_peft_model(model, use_gradient_checkpointing=checkpoints, **lora), tokenizer


def write_model(asked: Row, folder: Path) -> None:
    """Random weights of the preset's shape and a tokenizer of bytes, once."""
    import torch
    from measure import device_of
    from presets import PRESETS
    from transformers import AutoConfig, AutoModelForCausalLM

    from fastft.presets import byte_tokenizer

    if (folder / "tokenizer_config.json").exists():
        return
    torch.manual_seed(asked["seed"])
    shape = {"pad_token_id": PADDING, "bos_token_id": BEGIN, "eos_token_id": END, **PRESETS[asked["model"]]}
    with torch.device(device_of(asked["device"])):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**shape)).to(getattr(torch, asked["dtype"]))
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)


def documents(seed: int, median: int | None = None, longest: int = 0) -> list[str]:
    """Pieces of the Python reference: of 100 to 1,500 bytes, or log-normal as measure.py has them, up to longest."""
    from measure import SPREAD

    from fastft.data import python_reference

    text, chance, start = python_reference(), random.Random(seed), 0
    pieces = []
    while start < len(text):
        drawn = round(median * math.exp(SPREAD * chance.gauss(0, 1))) if median else chance.randint(100, 1500)
        end = start + (min(max(drawn, 16), longest) if median else drawn)
        pieces.append(text[start:end])
        start = end
    return pieces


class Watch:
    """When steps end, by the clock; the GPU has then done them, as the trainer has read their loss."""

    def __init__(self, device: str, turns: Any, warmup: int) -> None:
        self.device, self.turns, self.warmup = device, turns, warmup
        self.ends: list[float] = []
        self.tokens: list[int] = []  # of each batch

    def counting(self, collate: Any) -> Any:
        """The collator, its batches' tokens counted."""

        def collated(rows: Any) -> Any:
            batch = collate(rows)
            self.tokens.append(int((batch["input_ids"] != PADDING).sum()))
            return batch

        return collated

    def note(self) -> None:
        import time

        import torch

        if self.device.startswith("cuda"):
            torch.cuda.synchronize()
        if len(self.ends) == self.warmup:
            self.turns.time()
        self.ends.append(time.perf_counter())

    def callback(self) -> Any:
        from transformers import TrainerCallback

        watch = self

        class Callback(TrainerCallback):
            def on_train_begin(self, *_: Any, **__: Any) -> None:
                watch.note()

            def on_step_end(self, *_: Any, **__: Any) -> None:
                watch.note()

        return Callback()


def title_of(rows: list[Row]) -> str:
    row = rows[0]
    kind = "NF4 LoRA" if row["nf4"] else "LoRA"
    where = row.get("gpu") or row.get("device") or "unknown device"
    rows = f"{row['batch']} rows of about {row['median']} to {row['length']}" if row.get("median") else ""
    rows = rows or f"packed to {row['batch']}x{row['length']}"
    return f"SFTTrainer, {row['model']}, {kind}, {row['dtype']}, {rows}, {where}"


def show(rows: list[Row]) -> None:
    out = report.columns(("contender",), ("s/step", "tokens/s", "ratio", "peak GiB", "ratio", "first s", "loss"))
    first = next((row for row in rows if row["status"] == "ok"), {})
    for row in rows:
        out.add_row(row["contender"], *(_cells(row, first) if row["status"] == "ok" else [row["status"]]))
    report.present(title_of(rows), out, rows)


def _cells(row: Row, first: Row) -> list[str]:
    peak, other = row["peak_bytes"] or 0, first["peak_bytes"] or 0
    return [
        f"{row['step_s']:.3f}", f"{row['tokens_s']:,.0f}", f"{row['tokens_s'] / first['tokens_s']:.2f}",
        f"{peak / 2**30:.2f}" if peak else "", f"{peak / other:.2f}" if other else "", f"{row['first_s']:.0f}",
        f"{row['last_loss']:.4f}",
    ]  # fmt: skip


def draw(rows: list[Row], path: Path) -> None:
    """Losses by step in one plot, and beside it speed by memory."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    done = [row for row in rows if row["status"] == "ok"]
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    slower = [row["contender"] for row in sorted(done, key=lambda row: row["tokens_s"])]
    for row, colour in zip(done, COLOURS * 2, strict=False):
        style = "--" if row["contender"].endswith(("-keep", "-min", "-padded")) else "-"
        left.plot(range(1, len(row["losses"]) + 1), row["losses"], style, color=colour, label=row["contender"], lw=1.3)
        at = (row["peak_bytes"] or 0) / 2**30, row["tokens_s"]
        right.scatter(*at, color=colour, s=50, zorder=3)
        beside = (0, 7 if slower.index(row["contender"]) % 2 else -14)
        right.annotate(row["contender"], at, xytext=beside, textcoords="offset points", ha="center", fontsize=8)
    left.set(xlabel="step", ylabel="loss")
    left.legend(fontsize=8, frameon=False)
    right.set(xlabel="peak GiB", ylabel="tokens/s", xlim=(0, None), ylim=(0, None))
    right.margins(x=0.15)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
    figure.suptitle(title_of(rows), fontsize=10)
    figure.savefig(path, dpi=130)
    plt.close(figure)


if __name__ == "__main__":
    main()
