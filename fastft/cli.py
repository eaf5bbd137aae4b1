"""The command ``fastft``: finetune, explain, check, bisect, env.  Heavy packages are imported when one needs them."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from fastft.errors import UserError, describe
from fastft.rewriter.options import nearest


class Parser(argparse.ArgumentParser):
    """argparse that reports a mistake as a UserError and names the nearest option."""

    def error(self, message: str) -> NoReturn:
        """Raise UserError for a malformed command line; argparse calls this."""
        message = message.removeprefix("argument ").rstrip(".")
        raise UserError(f"{message[0].upper()}{message[1:]}; see `{self.prog} --help`.")

    def parse_strictly(self, arguments: Sequence[str]) -> argparse.Namespace:
        """Parse arguments; raise UserError for an unknown option, with the known one most like it."""
        namespace, unknown = self.parse_known_args(arguments)
        if unknown:
            known = re.findall(r"--[\w-]+", namespace.parser.format_help())
            hint = f"; did you mean {nearest(unknown[0].split('=')[0], known)}?" if unknown[0].startswith("-") else ""
            raise UserError(f"`{namespace.parser.prog}` does not take {unknown[0]}{hint or '; see --help.'}")
        return namespace


def at_least_two(text: str) -> float:
    """Parse an argument as a number of tokens of at least two, so that there is something to predict."""
    if (value := positive(int)(text)) < 2:
        raise argparse.ArgumentTypeError("it must be at least 2, or there is no next token to predict")
    return value


def positive(kind: Callable[[str], float]) -> Callable[[str], float]:
    """Return an argparse type: a number of this kind above zero."""

    def parse(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = kind("0")
        if not 0 < value < float("inf"):
            noun = "whole number" if kind is int else "number"
            raise argparse.ArgumentTypeError(f"it must be a {noun} above zero, not {text!r}")
        return value

    return parse


def seed(text: str) -> int:
    """Parse an argument as a seed: a whole number from zero on."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"it must be a whole number from zero on, not {text!r}")
    return int(text)


def parser() -> Parser:
    """Build the parser of the command line."""
    import fastft

    top = Parser(prog="fastft", description="Fine-tune language models through torch.compile.", allow_abbrev=False)
    top.add_argument("--version", action="version", version=f"fastft {fastft.__version__}")
    top.set_defaults(parser=top, command=lambda _: top.print_help())
    commands = top.add_subparsers(metavar="COMMAND", parser_class=Parser)
    _add_finetune(commands)
    _add_explain(commands)
    _add_check(commands)
    _add_bisect(commands)
    _add(commands, "env", show_env, "show versions, the device and the usable kernels")
    return top


def _add(
    commands: argparse._SubParsersAction,
    name: str,
    command: Callable[[argparse.Namespace], int],
    summary: str,
    description: str | None = None,
) -> argparse.ArgumentParser:
    it: argparse.ArgumentParser = commands.add_parser(name, help=summary, description=description, allow_abbrev=False)
    it.set_defaults(parser=it, command=command)
    return it


def _add_finetune(commands: argparse._SubParsersAction) -> None:
    from fastft.finetune import Settings
    from fastft.presets import PRESETS

    default = Settings()
    it = _add(
        commands,
        "finetune",
        finetune,
        "train a LoRA or QLoRA adapter",
        "Train a LoRA or QLoRA adapter. Without options: a tiny random Llama on the Python reference.",
    )
    count, size = positive(int), positive(float)
    what = it.add_argument_group("what to train")
    what.add_argument("--model", default=default.model, help=f"hub id, folder, .gguf file or {', '.join(PRESETS)}")
    what.add_argument("--data", help="text file, .jsonl file or dataset name (default: the Python language reference)")
    what.add_argument("--output", default=default.output, help="folder for the result (default: %(default)s)")
    how = it.add_argument_group("how to train")
    how.add_argument("--nf4", action="store_true", help="QLoRA: hold the base model in 4 bits")
    how.add_argument("--rank", type=count, default=default.rank, help="rank of the adapters (default: %(default)s)")
    how.add_argument("--lr", type=size, help="learning rate (default: 2e-4; 2e-3 for the tiny models)")
    how.add_argument("--steps", type=count, default=default.steps, help="(default: %(default)s)")
    how.add_argument("--batch-size", type=count, default=default.batch_size, help="(default: %(default)s)")
    how.add_argument(
        "--seq-len", type=at_least_two, default=default.seq_len, help="tokens a row (default: %(default)s)"
    )
    how.add_argument("--seed", type=seed, default=default.seed, help="(default: %(default)s)")
    where = it.add_argument_group("where and through what")
    where.add_argument("--device", default=default.device, help="cpu, cuda or cuda:N (default: a GPU if there is one)")
    where.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16"),
        default=default.dtype,
        help="(default: bfloat16 on a GPU that has it, else float32)",
    )
    where.add_argument(
        "--lower",
        choices=("inductor", "eager"),
        default=default.lower,
        help="compile with Inductor, or run the rewritten graph as it is (default: %(default)s)",
    )
    where.add_argument("--compare", choices=("eager", "inductor"), help="train a second time without fastft")


def _add_explain(commands: argparse._SubParsersAction) -> None:
    it = _add(
        commands,
        "explain",
        explain,
        "show what fastft does to a model",
        "Show what fastft does to a model. Its weights are neither loaded nor downloaded.",
    )
    it.add_argument("model", metavar="MODEL", help="hub id, folder, .gguf file or preset")
    it.add_argument("--rank", type=positive(int), default=16, help="rank of the LoRA adapters (default: %(default)s)")
    it.add_argument("--no-lora", action="store_true", help="the bare model, all of it trained")
    it.add_argument("--nf4", action="store_true", help="QLoRA: hold the base model in 4 bits")
    it.add_argument("--batch-size", type=positive(int), default=2, help="(default: %(default)s)")
    it.add_argument("--seq-len", type=at_least_two, default=128, help="(default: %(default)s)")
    it.add_argument("--batch", type=rows_and_tokens, metavar="ROWSxTOKENS", help="both at once, such as 1x4096")
    cards = it.add_argument_group("a step's peak and time on cards that need not be here")
    cards.add_argument("--devices", type=positive(int), default=1, help="how many of them (default: %(default)s)")
    cards.add_argument(
        "--shard", action="store_true", help="fully_shard of layers and model; else DistributedDataParallel"
    )
    cards.add_argument("--card", help="its name, such as H100, or its memory, such as 24GiB")


def rows_and_tokens(text: str) -> tuple[int, int]:
    """Parse an argument such as 1x4096."""
    found = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text)
    if found is None or int(found[2]) < 2:
        raise argparse.ArgumentTypeError(f"it must be rows and tokens, such as 1x4096, not {text!r}")
    return int(found[1]), int(found[2])


def _add_check(commands: argparse._SubParsersAction) -> None:
    from fastft.variants import ADAPTERS, QUANTIZATIONS

    it = _add(
        commands,
        "check",
        check,
        "compare a model with eager",
        "Compare a model's loss and all its gradients with eager, and show what became of it.",
    )
    _add_small(it, layers=6)
    it.add_argument("--adapter", choices=ADAPTERS, default="lora", help="(default: %(default)s)")
    it.add_argument(
        "--quantization", choices=QUANTIZATIONS, default="none", help="of the base model (default: %(default)s)"
    )
    it.add_argument("--image", action="store_true", help="each row has a picture")
    it.add_argument("--seq-len", type=at_least_two, default=32, help="tokens a row (default: %(default)s)")


def _add_bisect(commands: argparse._SubParsersAction) -> None:
    it = _add(
        commands,
        "bisect",
        bisect,
        "find what makes a model differ from eager",
        "Find the rule, and its application, that makes a model's loss or gradients differ from eager.",
    )
    _add_small(it, layers=2)


def _add_small(it: argparse.ArgumentParser, layers: int) -> None:
    """Add the options of what is built small and compared with eager."""
    it.add_argument(
        "model",
        metavar="MODEL",
        help="hub id, folder or preset, with random weights; or SCRIPT.py, whose make() returns a model and a batch",
    )
    it.add_argument(
        "--layers", type=positive(int), default=layers, help="of a MODEL, so many are built (default: %(default)s)"
    )
    it.add_argument("--rank", type=positive(int), default=8, help="rank of a MODEL's adapters (default: %(default)s)")
    it.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N (default: %(default)s)")
    it.add_argument("--lower", choices=("inductor", "eager"), default="eager", help="(default: %(default)s)")
    it.add_argument("--tolerance", type=positive(float), help="share of a result's norm (default: by its dtype)")


def finetune(options: argparse.Namespace) -> int:
    """Run ``fastft finetune``."""
    from dataclasses import fields

    from rich.console import Console

    from fastft.finetune import Settings, run

    settings = Settings(**{field.name: getattr(options, field.name) for field in fields(Settings)})
    return run(settings, Console())


def explain(options: argparse.Namespace) -> int:
    """Run ``fastft explain``."""
    from rich.console import Console

    from fastft import explain as explain_model
    from fastft.cards import card_of, show_cards
    from fastft.finetune import quieten
    from fastft.models import on_meta

    quieten()
    rank = 0 if options.no_lora else options.rank
    rows, tokens = options.batch or (options.batch_size, options.seq_len)
    card = options.card and card_of(options.card)
    if card is None and (options.devices > 1 or options.shard):
        raise UserError("--devices and --shard ask for a card too: add --card 24GiB or --card H100.")
    model, batch = on_meta(options.model, rank=rank, batch_size=rows, seq_len=tokens, nf4=options.nf4)
    if card is None:
        explain_model(model, **batch).print()
        return 0
    return show_cards(Console(), model, batch, card, options.devices, shard=options.shard)


def check(options: argparse.Namespace) -> int:
    """Run ``fastft check``; exit code 1 where something differs."""
    from rich.console import Console

    from fastft import check as compare
    from fastft.finetune import quieten

    quieten()
    length = options.seq_len
    model, args, batch, then = _built(
        options, adapter=options.adapter, quantization=options.quantization, image=options.image,
        lengths=(length, length + length // 2),
    )  # fmt: skip
    try:
        found = compare(model, *args, then=then, options={"lower": options.lower}, tolerance=options.tolerance, **batch)
    except Exception as error:  # of the model in eager: what fails when it is compiled is found
        if options.model.endswith(".py"):
            raise
        hint = "make a model and a batch for it in a SCRIPT.py"
        raise UserError(f"{options.model} does not train on random tokens ({describe(error)}); {hint}.") from error
    Console().print(found)
    return 0 if found.right else 1


def bisect(options: argparse.Namespace) -> int:
    """Run ``fastft bisect``; exit code 1 where something differs."""
    from fastft import bisect as find_culprit
    from fastft.finetune import quieten

    quieten()
    model, args, batch, _ = _built(options)
    culprit = find_culprit(
        model, *args, options={"lower": options.lower}, tolerance=options.tolerance, say=print, **batch
    )
    print(culprit or "The loss and all gradients are as in eager.")
    return 1 if culprit else 0


def _built(options: argparse.Namespace, **more: Any) -> tuple[Any, tuple, dict[str, Any], list[Any]]:
    """Return the model that was asked for, its batch as arguments with and without names, and further batches."""
    from fastft.env import require_compiler
    from fastft.finetune import found_device
    from fastft.models import made_by
    from fastft.small import small

    device = found_device(options.device)
    require_compiler(device, options.lower)
    if options.model.endswith(".py"):
        model, batch = made_by(options.model)
        return (model, batch, {}, []) if isinstance(batch, tuple) else (model, (), batch, [])
    model, (batch, *then) = small(options.model, layers=options.layers, rank=options.rank, device=device, **more)
    return model, (), batch, then


def show_env(options: argparse.Namespace) -> int:
    """Run ``fastft env``."""
    from rich.console import Console

    from fastft.env import show

    show(Console())
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; a UserError prints one sentence and returns exit code 2."""
    try:
        options = parser().parse_strictly(sys.argv[1:] if arguments is None else arguments)
        return options.command(options) or 0
    except UserError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        # CPython ends `python -m` by SIGINT if Ctrl-C fell into an exec of source text (dataclasses and Dynamo run
        # many), although it was caught; the next exec makes it forget that.
        exec("")
        print("Stopped by Ctrl-C; nothing was written.", file=sys.stderr)
        return 130
