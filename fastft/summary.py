"""The results of a run: the table, the plot, metrics.json, and how to load the adapter."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from fastft.models import Source, nf4_arguments
from fastft.units import format_bytes

if TYPE_CHECKING:
    from fastft.training import Run

METRICS, PLOT = "metrics.json", "loss.png"
COLOURS = ("#d9480f", "#1c7ed6")
INK = "#343a40"


def table(runs: list[Run]) -> Table:
    """Build a table of the figures of one contender, or of two side by side."""
    first = runs[0]
    result = Table(title="Training", title_justify="left", title_style="bold", header_style="bold")
    result.add_column("")
    for run in runs:
        result.add_column(run.name, justify="right")
    rows = {
        "steps": lambda run: str(len(run.steps)),
        "first step, with compilation": lambda run: f"{run.first_seconds:.1f} s",
        "median step": lambda run: f"{1000 * run.median_seconds:,.1f} ms",
        "tokens/s": lambda run: f"{run.tokens_per_second:,.0f}",
        "peak memory": lambda run: format_bytes(run.peak_bytes),
        "first loss": lambda run: f"{run.steps[0].loss:.4f}",
        "last loss": lambda run: f"{run.steps[-1].loss:.4f}",
    }
    for name, cell in rows.items():
        result.add_row(name, *(cell(run) for run in runs))
    for run in runs[1:]:
        result.add_row("largest loss difference", f"{first.loss_difference(run):.1e} relative", "")
    return result


def plot(runs: list[Run], path: Path, title: str) -> None:
    """Plot the loss of each step as a PNG; two contenders are told apart by colour and dash."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(8, 4.5), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for number, (run, colour) in enumerate(zip(runs, COLOURS, strict=False)):
        x = [step.number for step in run.steps]
        y = [step.loss for step in run.steps]
        style: dict[str, Any] = {"linewidth": 2.2} if number == 0 else {"linewidth": 1.4, "linestyle": (0, (4, 3))}
        axes.plot(x, y, label=run.name, color=colour, marker="o" if len(x) < 2 else None, **style)
    axes.set_title(title, loc="left", fontsize=12, color=INK)
    axes.set_xlabel("step", fontsize=11, color=INK)
    axes.set_ylabel("training loss (cross-entropy)", fontsize=11, color=INK)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.margins(x=0.01)
    axes.grid(axis="y", color="#dee2e6", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(colors=INK, labelsize=10)
    if len(runs) > 1:
        axes.legend(frameon=False, fontsize=11)
    figure.savefig(path)


def write_metrics(runs: list[Run], path: Path, about: dict[str, Any]) -> None:
    """Write every step of every contender; the file also marks a folder as made by fastft."""
    contenders = {
        run.name: {
            "first_step_seconds": run.first_seconds,
            "median_step_seconds": run.median_seconds,
            "tokens_per_second": run.tokens_per_second,
            "peak_memory_bytes": run.peak_bytes,
            "interrupted": run.interrupted,
            "steps": [
                {"step": step.number, "loss": step.loss, "seconds": step.seconds, "tokens": step.tokens}
                for step in run.steps
            ],
        }
        for run in runs
    }
    metrics: dict[str, Any] = {"made_by": "fastft", **about, "contenders": contenders}
    for run in runs[1:]:
        metrics["max_relative_loss_difference"] = runs[0].loss_difference(run)
    path.write_text(json.dumps(metrics, indent=1) + "\n", encoding="utf-8")


def made_by_fastft(folder: Path) -> bool:
    """Return whether an earlier run wrote this folder, so that a new one may replace it."""
    try:
        return json.loads((folder / METRICS).read_text(encoding="utf-8")).get("made_by") == "fastft"
    except (OSError, ValueError, AttributeError):
        return False


def snippet(base: Source, adapter: Path, *, dtype: str, nf4: bool, prompt: str) -> str:
    """Return Python code that loads the base model and the adapter and generates text."""
    names = "AutoModelForCausalLM, AutoTokenizer" + (", BitsAndBytesConfig" if nf4 else "")
    arguments = [quoted(base.location), *(f"{name}={quoted(value)}" for name, value in base.arguments.items())]
    lines = ["from peft import PeftModel", f"from transformers import {names}", ""]
    if nf4:
        options = ", ".join(f"{name}={quoted(value)}" for name, value in nf4_arguments(dtype).items())
        lines += [f"nf4 = BitsAndBytesConfig({options})"]
        arguments += ["quantization_config=nf4"]
    arguments += [f"dtype={quoted(dtype)}"]
    lines += [
        f"base = AutoModelForCausalLM.from_pretrained({', '.join(arguments)})",
        f"model = PeftModel.from_pretrained(base, {quoted(str(adapter))})",
        f"tokenizer = AutoTokenizer.from_pretrained({quoted(str(adapter))})",
        "",
        f'inputs = tokenizer({quoted(prompt)}, return_tensors="pt").to(model.device)',
        "print(tokenizer.decode(model.generate(**inputs, max_new_tokens=60)[0], skip_special_tokens=True))",
    ]
    return "\n".join(lines)


def quoted(value: object) -> str:
    """Write a value as Python code that a formatter would leave alone."""
    return json.dumps(value, ensure_ascii=False) if isinstance(value, str) else repr(value)
