"""How long are TRL's GRPO and DPO steps, and how much memory do they take, beside other libraries' own?

    python benchmarks/preference.py --loss grpo --model llama-1b --json grpo.json
    python benchmarks/preference.py --loss dpo --model qwen3-4b --nf4 --contenders trl,trl-liger,liger,unsloth,fastft
    python benchmarks/preference.py --loss grpo --model tiny --device cpu --dtype float32 --lower eager \\
        --contenders trl,fastft --completions 4 --prompt 32 --completion 16 --steps 2 --warmup 1
    python benchmarks/preference.py --show grpo.json dpo.json

Each contender, in a process of its own, loads the same model from a folder (random weights, a tokenizer of bytes), adds
LoRA (r=16 on all seven projections) and trains with TRL's trainer, set up as its users do but for what is listed under
CONTENDERS.  The reference is the policy with its adapter off.  LoRA's A and B are the same random numbers for all, so
that the policy is not its reference and all contenders must agree in the first step's loss and gradient norm.

grpo: a step scores --groups prompts with --completions answers to each under the reference, then trains on them once.
Nothing is generated: a rollout_func returns random bytes, and the reward is one of their sum.  dpo: a step trains on
--pairs pairs of random text, whose chosen and rejected answers share the prompt.

All rows of a batch are --prompt + --completion tokens long, and tokens/s count all of them for every contender.
Seconds are from the end of one step to the end of the next, the median of all after --warmup.  Memory is counted from
when the model is loaded to the end: the peak of tensors, and what the allocator reserved for them.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import arguments
import report
import workers
from presets import PROJECTIONS
from trainer import NO_CHECKPOINTS, Watch, load, load_unsloth, summary, write_model

Row = dict[str, Any]
LIGER = {"use_liger_kernel": True}  # norms, rotary embedding and MLP; TRL's own head
CONTENDERS: dict[str, dict[str, Any]] = {  # what the trainer's configuration is told beside what all are
    "trl": {},  # with checkpointing, the configurations' default
    "trl-keep": NO_CHECKPOINTS,
    "trl-liger": LIGER,
    "trl-liger-keep": LIGER | NO_CHECKPOINTS,
    "liger": LIGER,  # and its fused head and loss in the place of TRL's, as TRL had it up to 1.13
    "liger-keep": LIGER | NO_CHECKPOINTS,
    "unsloth": {},  # with its own checkpointing; for GRPO it reads a group's prompt once
    "unsloth-keep": NO_CHECKPOINTS,
    "unsloth-whole": {},  # every row reads its prompt
    "unsloth-fused": {},  # DPO's log-probabilities in chunks, which it does when told
    "inductor": NO_CHECKPOINTS,
    "fastft": NO_CHECKPOINTS,  # the budget decides
    "fastft-shared": NO_CHECKPOINTS,
    "fastft-min": NO_CHECKPOINTS,
    "fastft-shared-min": NO_CHECKPOINTS,
    "fastft-budget": NO_CHECKPOINTS,  # of --budget
    "fastft-shared-budget": NO_CHECKPOINTS,
}
OPTIONS: dict[str, dict[str, Any]] = {
    "fastft-shared": {"share_prefixes": True},
    "fastft-min": {"memory_budget": "min"},
    "fastft-shared-min": {"share_prefixes": True, "memory_budget": "min"},
    "fastft-shared-budget": {"share_prefixes": True},
}
VARIABLES = {
    "unsloth-whole": {"UNSLOTH_GRPO_PREFIX_GROUPER": "0"},
    "unsloth-fused": {"UNSLOTH_FUSED_PREFERENCE_LOSS": "1"},
}
FIRST_BYTE, BYTES = 3, 256  # the tokenizer's numbers for bytes
BETA = {"grpo": 0.04, "dpo": 0.1}
SHAPE = ("groups", "completions", "pairs", "prompt", "completion")


def parse(words: list[str] | None = None) -> argparse.Namespace:
    parser = arguments.common(__doc__, losses={"grpo": "answers scored by a reward", "dpo": "pairs of answers"})
    add = parser.add_argument
    contenders = arguments.listed(arguments.named("contender", CONTENDERS))
    add("--contenders", type=contenders, default=["trl", "trl-liger", "unsloth", "fastft"])
    add("--groups", type=arguments.positive, default=1, help="prompts of a step of GRPO (default 1)")
    add("--completions", type=arguments.positive, default=8, help="answers to each of them (default 8)")
    add("--pairs", type=arguments.positive, default=4, help="pairs of a step of DPO (default 4)")
    add("--prompt", type=arguments.positive, default=1024, help="tokens of a prompt (default 1024)")
    add("--completion", type=arguments.positive, default=512, help="tokens of an answer (default 512)")
    add("--steps", type=arguments.positive, default=10, help="timed steps (default 10)")
    add("--warmup", type=arguments.positive, default=4, help="steps before them (default 4)")
    add("--budget", help="what fastft-budget and fastft-shared-budget may take, such as 4GiB")
    add("--turns", help="a file: of commands that name the same one, started together, each is timed alone")
    add("--folder", type=Path, help="where the model is written, or lies already (default: a temporary folder)")
    add("--show", type=Path, nargs="+", help="files of rows to show instead of measuring")
    return parser.parse_args(words)


def main() -> None:
    options = parse()
    if options.show:
        rows = [row for path in options.show for row in json.loads(path.read_text())]
        for title in dict.fromkeys(title_of([row]) for row in rows):
            mine = [row for row in rows if title_of([row]) == title]
            show(sorted(mine, key=lambda row: list(CONTENDERS).index(row["contender"])))
        return
    with tempfile.TemporaryDirectory() as folder:
        options.folder = str(options.folder or folder)
        show(workers.run_all("preference", jobs, options))


def jobs(options: argparse.Namespace, scratch: Path) -> list[workers.Job]:
    asked = arguments.asked(options, *SHAPE, "budget", "steps", "warmup", "turns", "folder")
    asked |= {"layers": None, "batch": rows_of(asked), "length": options.prompt + options.completion}
    return [workers.Job(name, asked | {"contender": name}, scratch / f"caches-{name}") for name in options.contenders]


def rows_of(asked: Row) -> int:
    """Rows that are trained on in a step."""
    return asked["groups"] * asked["completions"] if asked["loss"] == "grpo" else 2 * asked["pairs"]


def measure(asked: Row) -> Row:
    """In a worker."""
    os.environ.update(VARIABLES.get(asked["contender"], {}))
    import peers

    peers.import_first(asked["contender"])
    import torch
    from measure import device_of
    from turns import Turns

    device = device_of(asked["device"])
    cuda = device.startswith("cuda")
    write_model(asked, Path(asked["folder"]))
    turns = Turns(asked["turns"])
    turns.prepare()
    trainer = make_trainer(asked, device)
    watch = Watch(device, turns, asked["warmup"])
    trainer.add_callback(watch.callback())
    losses = record_losses(trainer)
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    trainer.train()
    norms = [float(row["grad_norm"]) for row in trainer.state.log_history if "grad_norm" in row]
    row: Row = {
        "losses": [loss.item() for loss in losses], "grad_norms": norms, "ends": watch.ends,
        "tokens": [asked["batch"] * asked["length"]] * len(losses),
        "peak_bytes": torch.cuda.max_memory_allocated() if cuda else None,
        "reserved_bytes": torch.cuda.max_memory_reserved() if cuda else None,
    }  # fmt: skip
    if asked["contender"].startswith("fastft"):
        import fastft

        row["rows"] = [str(graph.rows) for graph in fastft.compilations().graphs]
    return row | summary(row, asked["warmup"])


def record_losses(trainer: Any) -> list[Any]:
    """The list to which the trainer adds each step's loss, unrounded, as it trains; nothing waits for them."""
    losses: list[Any] = []
    step = trainer.training_step

    def recorded(*args: Any, **kwargs: Any) -> Any:
        loss = step(*args, **kwargs)
        losses.append(loss.detach().clone())  # a CUDA graph overwrites its outputs
        return loss

    trainer.training_step = recorded
    return losses


def make_trainer(asked: Row, device: str) -> Any:
    name = asked["contender"]
    lora = {"r": 16, "lora_alpha": 32, "lora_dropout": 0.0, "target_modules": list(PROJECTIONS)}
    if name.startswith("unsloth"):
        model, tokenizer = load_unsloth(asked, lora)
        more: dict[str, Any] = {}
    else:
        from peft import LoraConfig

        model, tokenizer = load(asked, device)
        more = {"peft_config": LoraConfig(task_type="CAUSAL_LM", **lora)}
    make = _grpo if asked["loss"] == "grpo" else _dpo
    trainer = make(asked, _settings(asked, device), {"model": model, "processing_class": tokenizer, **more})
    fill_adapters(trainer.model, asked["seed"])
    if name in ("liger", "liger-keep"):
        loss = _liger_grpo(trainer) if asked["loss"] == "grpo" else _liger_dpo(trainer)
        trainer.compute_loss = lambda model, inputs, **_: loss(inputs)
    if name.startswith("fastft"):
        budget = {"memory_budget": asked["budget"]} if name.endswith("-budget") else {}
        trainer.model.compile(backend="fastft", options={"lower": asked["lower"], **OPTIONS.get(name, {}), **budget})
    elif name == "inductor":
        trainer.model.compile()
    return trainer


def _settings(asked: Row, device: str) -> Row:
    """What both trainers' configurations are told."""
    cuda = device.startswith("cuda")
    rows = asked["batch"] if asked["loss"] == "grpo" else asked["pairs"]
    return {
        "output_dir": tempfile.mkdtemp(), "max_steps": asked["warmup"] + asked["steps"],
        "per_device_train_batch_size": rows, "gradient_accumulation_steps": 1, "beta": BETA[asked["loss"]],
        "learning_rate": 1e-5, "logging_steps": 1, "report_to": [], "save_strategy": "no",
        "bf16": cuda and asked["dtype"] == "bfloat16", "use_cpu": not cuda, "disable_tqdm": True,
        "seed": asked["seed"], **CONTENDERS[asked["contender"]],
    }  # fmt: skip


def _grpo(asked: Row, settings: Row, more: Row) -> Any:
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    def reward(completion_ids: list[list[int]], **_: Any) -> list[float]:
        return [sum(ids) % 101 / 100 for ids in completion_ids]

    config = GRPOConfig(
        num_generations=asked["completions"], max_completion_length=asked["completion"],
        **settings,
    )  # fmt: skip
    prompts = [str(number) for number in range(asked["groups"] * settings["max_steps"])]
    return GRPOTrainer(
        args=config, train_dataset=Dataset.from_dict({"prompt": prompts}), reward_funcs=reward,
        rollout_func=rollouts(asked), **more,
    )  # fmt: skip


def rollouts(asked: Row) -> Callable[..., Row]:
    """What answers in generation's place: new random bytes in each call, the same for every contender."""
    chance = random.Random(asked["seed"])

    def draw(length: int) -> list[int]:
        return [FIRST_BYTE + number for number in chance.choices(range(BYTES), k=length)]

    def roll_out(prompts: list[str], trainer: Any) -> Row:
        groups = [draw(asked["prompt"]) for _ in range(len(prompts) // asked["completions"])]
        return {
            "prompt_ids": [list(prompt) for prompt in groups for _ in range(asked["completions"])],
            "completion_ids": [draw(asked["completion"]) for _ in prompts],
            "logprobs": None,
        }

    return roll_out


def _dpo(asked: Row, settings: Row, more: Row) -> Any:
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    config = DPOConfig(max_length=asked["length"], **settings)
    return DPOTrainer(args=config, train_dataset=Dataset.from_list(pairs(asked, settings["max_steps"])), **more)


def pairs(asked: Row, steps: int) -> list[dict[str, str]]:
    """Random text, a byte a token; each answer is a byte short, for the end that DPOTrainer adds."""
    chance = random.Random(asked["seed"])
    sizes = {"prompt": asked["prompt"], "chosen": asked["completion"] - 1, "rejected": asked["completion"] - 1}
    letters = "abcdefghijklmnopqrstuvwxyz "
    return [
        {name: "".join(chance.choices(letters, k=size)) for name, size in sizes.items()}
        for _ in range(asked["pairs"] * steps)
    ]


def fill_adapters(model: Any, seed: int) -> None:
    """Give LoRA's A and B the same random numbers in every contender, whatever it drew before."""
    import torch

    chance = torch.Generator().manual_seed(seed)
    for name, parameter in sorted(model.named_parameters()):
        if "lora_A" in name or "lora_B" in name:
            spread = parameter.shape[1] ** -0.5 if "lora_A" in name else 0.05
            drawn = torch.randn(parameter.shape, generator=chance) * spread
            parameter.data.copy_(drawn)


def _hidden(trainer: Any, ids: Any, mask: Any) -> Any:
    """What the head reads, [B, S - 1, D]: of all tokens but the last, whose successor is unknown."""
    backbone = trainer.accelerator.unwrap_model(trainer.model).get_base_model().model
    with trainer.accelerator.autocast():
        return backbone(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state[:, :-1]


def _liger_grpo(trainer: Any) -> Callable[[Row], Any]:
    """Liger's fused head and loss; the reference is scored by TRL."""
    import torch
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    args = trainer.args
    loss = LigerFusedLinearGRPOLoss(
        beta=args.beta, epsilon_low=trainer.epsilon_low, epsilon_high=trainer.epsilon_high, loss_type=args.loss_type,
        temperature=args.temperature, max_completion_length=args.max_completion_length,
    )  # fmt: skip

    def compute(inputs: Row) -> Any:
        answers = inputs["completion_ids"]
        ids = torch.cat([inputs["prompt_ids"], answers], dim=1)
        mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
        value, _ = loss(
            _hidden(trainer, ids, mask)[:, -answers.shape[1] :], trainer.model.get_output_embeddings().weight,
            answers, inputs["completion_mask"], inputs["advantages"],
            ref_per_token_logps=inputs["ref_per_token_logps"], num_items_in_batch=inputs.get("num_items_in_batch"),
        )  # fmt: skip
        return value

    return compute


def _liger_dpo(trainer: Any) -> Callable[[Row], Any]:
    """Liger's fused heads and loss, of the policy and of its reference together."""
    import torch
    from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss

    loss = LigerFusedLinearDPOLoss(beta=trainer.args.beta)

    def compute(inputs: Row) -> Any:
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        head = trainer.model.get_output_embeddings().weight
        labels = ids.masked_fill(inputs["completion_mask"] == 0, -100)[:, 1:]
        with torch.no_grad(), trainer.accelerator.unwrap_model(trainer.model).disable_adapter():
            reference = _hidden(trainer, ids, mask)
        value, _ = loss(head, _hidden(trainer, ids, mask), labels, ref_input=reference, ref_weight=head)
        return value

    return compute


def title_of(rows: list[Row]) -> str:
    row = rows[0]
    kind = "NF4 LoRA" if row["nf4"] else "LoRA"
    where = row.get("gpu") or row.get("device") or "unknown device"
    drawn = f"{row['groups']} x {row['completions']} answers" if row["loss"] == "grpo" else f"{row['pairs']} pairs"
    sizes = f"of {row['completion']} tokens to prompts of {row['prompt']}"
    return f"{row['loss'].upper()}, {row['model']}, {kind}, {row['dtype']}, {drawn} {sizes}, {where}"


def show(rows: list[Row]) -> None:
    figures = ("s/step", "tokens/s", "ratio", "peak GiB", "ratio", "reserved", "first s", "first loss", "grad norm")
    out = report.columns(("contender",), figures)
    first = next((row for row in rows if row["status"] == "ok"), {})
    for row in rows:
        out.add_row(row["contender"], *(_cells(row, first) if row["status"] == "ok" else [row["status"]]))
    report.present(title_of(rows), out, rows)
    for row in rows:
        if row["status"] == "ok":
            print(f"{row['contender']}, losses: {' '.join(f'{loss:.5g}' for loss in row['losses'])}")


def _cells(row: Row, first: Row) -> list[str]:
    gib = {key: row[key] / 2**30 if row[key] else None for key in ("peak_bytes", "reserved_bytes")}
    return [
        f"{row['step_s']:.3f}", f"{row['tokens_s']:,.0f}", report.ratio(row, first, "tokens_s"),
        report.figure(gib["peak_bytes"], form=".2f"), report.ratio(row, first, "peak_bytes"),
        report.figure(gib["reserved_bytes"], form=".2f"), f"{row['first_s']:.0f}", f"{row['losses'][0]:.5g}",
        f"{row['grad_norms'][0]:.5g}",
    ]  # fmt: skip


if __name__ == "__main__":
    main()
