"""``fastft finetune``: check what was asked for, train, compare, and save; nothing is written unless all went well."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from fastft import data, models, summary
from fastft.capability import BFLOAT16_FROM
from fastft.env import require_compiler, versions
from fastft.errors import UserError
from fastft.progress import Reporter

if TYPE_CHECKING:
    from fastft.training import Run

CACHES = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")


@dataclass(frozen=True)
class Settings:
    """What the user may choose; ``None`` and "auto" are filled in by ``resolve``."""

    model: str = "tiny-llama"
    data: str | None = None
    output: str = "fastft-out"
    nf4: bool = False
    rank: int = 16
    lr: float | None = None
    steps: int = 100
    batch_size: int = 8
    seq_len: int = 256
    seed: int = 0
    dtype: str = "auto"
    device: str = "auto"
    lower: str = "inductor"
    compare: str | None = None


def run(settings: Settings, console: Console) -> int:
    """Run the whole command; the exit code is 130 if Ctrl-C ended it early."""
    output = Path(settings.output).expanduser()
    check_device(settings.device)
    check_output(output)
    require_packages(settings)
    quieten()
    settings, source = resolve(settings)
    require_compiler(settings.device, settings.lower if settings.compare != "inductor" else "inductor")
    tokenizer = models.load_tokenizer(source)
    examples = load_data(settings, tokenizer)
    with staged(output) as folder, cold_caches(settings.compare is not None), memory_advice():
        base = models.materialise(source, folder / "base", seed=settings.seed, nf4=settings.nf4)
        intro = introduction(settings, source, data.same_length(examples))
        console.print(intro, highlight=False, soft_wrap=True)
        model, ours = contend(settings, base, "fastft", tokenizer, examples, console)
        final = models.moved(base, folder, output)
        on_disk = Path(base.location).exists()  # then the adapter is to load from any working directory
        save_adapter(model, tokenizer, os.path.abspath(final.location) if on_disk else final.location, folder)
        del model  # the other contender gets the memory
        runs, code, failure = [ours], 130 if ours.interrupted else 0, ""
        if settings.compare and not ours.interrupted:
            code, failure = add_contender(settings, base, runs, console)
        save_record(settings, runs, folder)
    conclude(settings, runs, final, output, console)
    if failure:
        print(failure, file=sys.stderr)
    return code


def resolve(settings: Settings) -> tuple[Settings, models.Source]:
    """Fill in what was left open; raise UserError for a model, device or dtype that is not available."""
    import torch

    source = models.find(settings.model)
    models.load_config(source)
    device = found_device(settings.device)
    bf16 = device.startswith("cuda") and torch.cuda.get_device_capability(device) >= BFLOAT16_FROM
    dtype = settings.dtype if settings.dtype != "auto" else "bfloat16" if bf16 else "float32"
    if dtype == "bfloat16" and device.startswith("cuda") and not bf16:
        raise UserError("This GPU's capability is below 8.0, so it has no bfloat16; pass --dtype float32.")
    lr = settings.lr if settings.lr is not None else 2e-3 if source.preset else 2e-4
    return replace(settings, device=device, dtype=dtype, lr=lr), source


def require_packages(settings: Settings) -> None:
    """Raise UserError if a package that this run needs is not installed."""
    needed = {"transformers": "Fine-tuning", "peft": "Fine-tuning", "matplotlib": "The loss plot"}
    if settings.nf4:
        needed |= {"bitsandbytes": "--nf4", "accelerate": "--nf4"}
    if settings.model.endswith(".gguf"):
        needed |= {"gguf": "A .gguf file", "accelerate": "A .gguf file"}
    for package, what in needed.items():
        if importlib.util.find_spec(package) is None:
            raise UserError(f"{what} needs {package}, which is not installed; run `pip install {package}`.")


def found_device(device: str) -> str:
    """Return the device that is meant; raise UserError if this machine has none of that name."""
    import torch

    check_device(device)
    found = device if device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    if found.startswith("cuda") and int(found[5:] or 0) >= torch.cuda.device_count():
        raise UserError(f"PyTorch finds no device {found} on this machine; see `fastft env`, or pass --device cpu.")
    return found


def check_device(device: str) -> None:
    """Raise UserError unless ``device`` is a device's name; whether it exists is checked once torch is loaded."""
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", device):
        raise UserError(f"--device is cpu, cuda or cuda:N, not {device!r}.")


def check_output(output: Path) -> None:
    """Raise UserError if ``output`` cannot become the result's folder."""
    if output.exists() and not output.is_dir():
        raise UserError(f"{output} is a file; pass another folder to --output.")
    if output.is_dir() and any(output.iterdir()) and not summary.made_by_fastft(output):
        raise UserError(f"The folder {output} is not empty and was not made by fastft; pass another one to --output.")
    if not output.resolve().parent.is_dir():
        raise UserError(f"The folder {output.parent} does not exist; create it or pass another --output.")


@contextmanager
def staged(output: Path) -> Iterator[Path]:
    """Yield a hidden folder beside ``output`` that replaces it if all goes well, and is deleted if not."""
    output = output.resolve()
    staging, replaced = (output.with_name(f".{output.name}.{os.getpid()}.{end}") for end in ("new", "old"))
    try:
        staging.mkdir()
    except OSError as error:
        raise UserError(f"Cannot write to {output.parent}: {error.strerror}; pass another --output.") from error
    try:
        yield staging
        if output.exists():
            output.rename(replaced)
        staging.rename(output)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        shutil.rmtree(replaced, ignore_errors=True)


@contextmanager
def cold_caches(enabled: bool) -> Iterator[None]:
    """Use fresh compile caches: in a comparison nobody profits from what was compiled before."""
    if not enabled:
        yield
        return
    before = {name: os.environ.get(name) for name in CACHES}
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        os.environ.update({name: str(Path(folder, name.lower())) for name in CACHES})
        try:
            yield
        finally:
            for name, value in before.items():
                if value is None:
                    del os.environ[name]
                else:
                    os.environ[name] = value


@contextmanager
def memory_advice() -> Iterator[None]:
    """Turn running out of GPU memory into a UserError that says what to do."""
    import torch

    try:
        yield
    except torch.OutOfMemoryError as error:
        raise UserError("The GPU ran out of memory; try --nf4, or a smaller --batch-size or --seq-len.") from error


def load_data(settings: Settings, tokenizer: Any) -> list[data.Example]:
    """Load the training examples."""
    return data.load(settings.data, tokenizer, seq_len=settings.seq_len, batch_size=settings.batch_size)


def contend(
    settings: Settings, base: models.Source, name: str, tokenizer: Any, examples: list[data.Example], console: Console
) -> tuple[Any, Run]:
    """Load the model and train it as one contender; the same seed gives each the same start and the same data."""
    import torch

    from fastft.training import Run, train

    model = models.load(base, device=settings.device, dtype=settings.dtype, nf4=settings.nf4)
    torch.manual_seed(settings.seed)
    model = models.add_lora(model, rank=settings.rank, random_base=settings.model in models.PRESETS)
    if settings.nf4:
        models.four_bit_experts(model, dtype=settings.dtype)
    batches = data.batches(
        examples, batch_size=settings.batch_size, pad_id=tokenizer.pad_token_id or 0, seed=settings.seed
    )
    with Reporter(console, name, settings.steps) as reporter, compilation_shown(reporter):
        trained = train(
            model,
            batches,
            Run(name),
            steps=settings.steps,
            lr=settings.lr or 0.0,
            lower=settings.lower,
            fixed_shape=data.same_length(examples),
            on_step=reporter,
        )
    return model, trained


@contextmanager
def compilation_shown(reporter: Reporter) -> Iterator[None]:
    """Show what is being compiled in the run's progress bar, which has the terminal to itself."""
    from fastft.rewriter.report.compile_progress import shown_by

    with shown_by(lambda text: reporter.bar.update(reporter.task, description=text or "running...")):
        yield


def add_contender(settings: Settings, base: models.Source, runs: list[Run], console: Console) -> tuple[int, str]:
    """Train a second time without fastft; return the exit code, and what went wrong if anything did.

    It runs in a process of its own: what the first run compiled, cached and allocated would flatter its figures.
    """
    import multiprocessing

    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_second_process, args=(sender, settings, base, console.is_terminal))
    process.start()
    sender.close()  # so that the receiver notices if the process dies
    try:
        result = receiver.recv()
    except EOFError:
        return 1, f"The run without fastft died; the folder {settings.output} has the run with it."
    except KeyboardInterrupt:
        return 130, f"Ctrl-C: the comparison was stopped; the folder {settings.output} has the run with fastft."
    finally:
        process.terminate()
        process.join()
    if isinstance(result, str):
        return 1, f"The run without fastft failed: {result}"
    runs.append(result)
    return 130 if result.interrupted else 0, ""


def _second_process(sender: Any, settings: Settings, base: models.Source, terminal: bool) -> None:
    import signal

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the first process hears Ctrl-C too, and ends this one
    quieten()
    console = Console(force_terminal=terminal)
    try:
        with cold_caches(True), memory_advice():
            tokenizer = models.load_tokenizer(base)
            examples = load_data(settings, tokenizer)
            _, result = contend(settings, base, settings.compare or "eager", tokenizer, examples, console)
            sender.send(result)
    except Exception as error:
        sender.send(str(error))


def quieten() -> None:
    """Keep the progress readable: silence the bars and warnings of other libraries, but not torch's or fastft's own."""
    import logging
    import warnings

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    for module in ("transformers", "peft", "bitsandbytes", "huggingface_hub", "datasets"):
        warnings.filterwarnings("ignore", module=module)
        logging.getLogger(module).setLevel(logging.ERROR)
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()


def save_adapter(model: Any, tokenizer: Any, base: str, folder: Path) -> None:
    """Save the adapter in PEFT's format, which records where its base model is, with the tokenizer beside it."""
    from fastft.training import Deferred

    model.peft_config["default"].base_model_name_or_path = base
    with Deferred("Ctrl-C: saving, one moment."):
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def save_record(settings: Settings, runs: list[Run], folder: Path) -> None:
    """Save metrics.json and the plot."""
    from fastft.training import Deferred

    title = f"{Path(settings.model).name}: {'QLoRA' if settings.nf4 else 'LoRA'} of rank {settings.rank}"
    about = {"settings": asdict(settings), "versions": versions()}
    with Deferred("Ctrl-C: saving, one moment."):
        summary.plot(runs, folder / summary.PLOT, title)
        summary.write_metrics(runs, folder / summary.METRICS, about)


def introduction(settings: Settings, source: models.Source, fixed: bool) -> str:
    """Return one line that says what is about to happen."""
    kind = "QLoRA (NF4)" if settings.nf4 else "LoRA"
    what = f"{settings.model}{', random weights' if source.preset else ''}"
    text = settings.data or "the Python language reference"
    up_to = "" if fixed else "up to "
    batch = f"{settings.steps} steps of {settings.batch_size} x {up_to}{settings.seq_len} tokens"
    return f"{kind} of rank {settings.rank} on {what}: {text}, {batch}, {settings.dtype} on {settings.device}"


def conclude(settings: Settings, runs: list[Run], base: models.Source, output: Path, console: Console) -> None:
    """Print the table, where everything is, and how to load it."""
    console.print(summary.table(runs))
    for interrupted in (each for each in runs if each.interrupted):
        count = f"{len(interrupted.steps)} of {settings.steps} steps"
        console.print(f"Stopped by Ctrl-C after {count}; what was trained so far is saved.", highlight=False)
    console.print(
        f"Saved in {output}: the adapter, {summary.PLOT}, {summary.METRICS}.", highlight=False, soft_wrap=True
    )
    prompt = "The" if settings.data else "The for statement"
    console.print("\n[bold]Load it with[/bold]\n")
    # Not through the console, whose line breaks and markup would spoil the code.
    print(summary.snippet(base, output, dtype=settings.dtype, nf4=settings.nf4, prompt=prompt), flush=True)
