"""Which models, loops, trainers, optimizers and engines train with fastft as without it?  Makes docs/compatibility.md.

    python benchmarks/compatibility.py --json rows.json
    python benchmarks/compatibility.py --device cuda --json rows-cuda.json
    python benchmarks/compatibility.py --groups models --json models.json
    python benchmarks/compatibility.py --show rows.json rows-cuda.json --markdown docs/compatibility.md

The scenarios are those of tests/training, which must be there with the packages that they name; compatibility_models.py
tells of models.  What is compared: the
losses and gradient norms of all steps, relative to their size; allowed is three times what runs without fastft differ
by if their weights are a rounding apart, and the step nearest to it is told.  The rewritten graphs run without
Inductor, in float32 unless a scenario says otherwise.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import re
import sys
import tempfile
import warnings
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import checkout
import compatibility_models as models
import report

Row = dict[str, Any]
TESTS = Path(__file__).resolve().parents[1] / "tests"
GROUPS = {
    "models": "Models", "loops": "Loops", "trainers": "Trainers", "preference": "Preferences, rewards and teachers",
    "optimizers": "Optimizers", "devices": "Many devices",
}  # fmt: skip
NOT_WORKING = (
    ("`torch_compile_backend=\"fastft\"`, `accelerate launch --dynamo_backend fastft`",
     "accelerate knows a closed list of backends and refuses other names; use "
     "`fastft.TrainerCallback()` or `model.compile(backend=\"fastft\")`"),
    ("`Trainer(torch.compile(model))` of a 4-bit model",
     "transformers refuses any compiled 4-bit model that is wrapped; use `model.compile(...)`, in place"),
    ("`nn.DataParallel` (a Trainer that sees several GPUs in one process), FSDP1, DeepSpeed",
     "`fastft.TrainerCallback` refuses them: the first copies a module with another's compiled forward; use "
     "`torchrun`, FSDP2"),
    ("TRL `DPOTrainer(padding_free=True)`", "TRL 1.15 and 1.16 switch it off themselves, and pad"),
    ("Layers compiled one by one, then sharded by FSDP2 with their 4-bit weights",
     "right, but bitsandbytes makes a parameter anew in each forward, where torch breaks the graph: its layers are not "
     "fused (torch 2.14 ends in an error of Dynamo's own); shard, then compile the model"),
    ("double backward", "not supported by torch.compile"),
)  # fmt: skip
INTRODUCTION = """# What runs, and how it was compared

Made by `benchmarks/compatibility.py`, {when}. The same scenarios are tests (`tests/training`), run with every change.

A scenario trains a small Llama for a few steps, with and without fastft, and the losses and gradient norms of all
steps are compared: the difference relative to their size. *Allowed* is three times what runs without fastft differ by
whose weights are a rounding apart; of all steps, the one that is nearest to it is shown. *Ops* are what was lifted in
all graphs that the scenario compiled.  A row that a device lacks was not run there for this table.

"""


def parse(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--groups", choices=GROUPS, nargs="+", default=list(GROUPS), help="(default: all)")
    parser.add_argument("--only", help="scenarios whose name has this in it")
    parser.add_argument("--commit", default=checkout.commit())
    parser.add_argument("--json", type=Path, help="write the rows here")
    parser.add_argument("--show", type=Path, nargs="+", help="files of rows to show instead of running")
    parser.add_argument("--markdown", type=Path, help="write the page here")
    return parser.parse_args(words)


def main() -> None:
    options = parse()
    if options.show:
        rows = [row for path in options.show for row in json.loads(path.read_text())]
    else:
        rows = run(options)
    show(rows)
    if options.markdown:
        before = options.markdown.read_text() if options.markdown.exists() else ""
        options.markdown.write_text(page(rows, before))


def run(options: argparse.Namespace) -> list[Row]:
    sys.path.insert(0, str(TESTS))
    os.environ["PYTHONPATH"] = os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")])
    quiet()
    from measure import machine

    rows: list[Row] = []
    for group in options.groups:
        for row in rows_of(group, options):
            rows.append(row | {"commit": options.commit, **machine(options.device)})
            told = row["error"] or f"{row['difference']:.1e} of {row['allowed']:.1e}"
            print(f"{row['name']}: {told}", file=sys.stderr, flush=True)
            if options.json:
                options.json.write_text(json.dumps(rows, indent=1) + "\n")
    return rows


def quiet() -> None:
    """The trainers' own words would hide the table."""
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")


def rows_of(group: str, options: argparse.Namespace) -> Any:
    """The rows of a group, one after the other."""
    from importlib import import_module

    if group == "models":
        yield from models.rows(options.only, options.device)
        return
    if group == "devices":
        if options.device == "cpu" and not options.only:
            yield from devices()
        return
    from training.outcome import outcome

    for scenario in getattr(import_module(f"training.{group}"), group.upper()):
        if options.only and options.only not in scenario.__name__:
            continue
        row = begun(group, scenario)
        try:
            with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
                found = outcome(scenario, device=options.device)
        except Exception as error:
            yield row | {"error": f"{type(error).__name__}: {first_line(str(error))}"}
            continue
        yield row | {
            "difference": found.difference, "allowed": found.allowed, "lifted": dict(found.lifted),
            "fused": found.fused, "graphs": len(found.graphs), "right": found.right,
        }  # fmt: skip


def begun(group: str, scenario: Any) -> Row:
    """What a row says of its scenario, whatever becomes of it."""
    return {"group": group, "name": scenario.__name__, "title": scenario.__doc__.strip(), "error": ""}


def first_line(text: str) -> str:
    return text.partition("\n")[0][:200]


def devices() -> Any:
    """Two processes by gloo, beside one without fastft."""
    import torch
    from training import devices as scenarios
    from training.outcome import compare

    with tempfile.TemporaryDirectory() as folder:
        found = scenarios.together(Path(folder))
    for scenario in scenarios.DEVICES:
        mine = found[scenario.__name__]
        row = begun("devices", scenario)
        if "error" in mine:
            yield row | {"error": first_line(mine["error"])}
            continue
        difference, allowed = compare(torch.tensor(mine["seen"], dtype=torch.float64), scenario)
        yield row | {
            "difference": difference, "allowed": allowed, "lifted": mine["lifted"], "right": difference <= allowed
        }  # fmt: skip


def ops_of(row: Row) -> str:
    return ", ".join(f"{times} {name}" for name, times in row["lifted"].items()) or "none"


def show(rows: list[Row]) -> None:
    out = report.columns(("device", "scenario"), ("difference", "allowed", "ops"))
    for row in rows:
        cells = [row["error"][:60]] if row["error"] else [f"{row['difference']:.1e}", f"{row['allowed']:.1e}"]
        ops = "" if row["error"] else str(sum(row["lifted"].values()))
        out.add_row(row["device"], row["name"], *cells, *([""] if row["error"] else []), ops)
    report.present("with fastft and without", out, [])
    wrong = [row["name"] for row in rows if row["error"] or not row["right"]]
    print("wrong or not run:", ", ".join(wrong) if wrong else "none")


def page(rows: list[Row], before: str = "") -> str:
    """The page; groups without rows are as in the page before."""
    text = [beginning([row for row in rows if row["group"] != "models"]) or before.partition("## ")[0]]
    for group, title in GROUPS.items():
        mine = [row for row in rows if row["group"] == group]
        if mine:
            text.append(models.section(mine) if group == "models" else section(title, mine))
        elif found := re.search(rf"^## {title}\n.*?(?=^## |\Z)", before, re.MULTILINE | re.DOTALL):
            text.append(found.group())
    text.append("## What does not work, and why\n\n| what | why |\n|---|---|\n")
    text += [f"| {what} | {why} |\n" for what, why in NOT_WORKING]
    return "".join(text)


def beginning(rows: list[Row]) -> str:
    """What the page says before its tables; "" without rows."""
    devices = {row["device"]: row for row in reversed(rows)}
    text = [INTRODUCTION.format(when=datetime.now(timezone.utc).strftime("%Y-%m-%d"))] if rows else []
    for device, row in reversed(devices.items()):
        listed = ", ".join(f"{name} {version}" for name, version in row["versions"].items() if version)
        text.append(f"**{device}**: commit {row['commit']}; {listed}.\n\n")
    return "".join(text)


def section(title: str, rows: list[Row]) -> str:
    """The table of a group."""
    text = [f"## {title}\n\n| what | device | difference | allowed | ops |\n|---|---|---|---|---|\n"]
    for row in rows:
        cells = (
            f"**{row['error']}** | | "
            if row["error"]
            else f"{row['difference']:.1e} | {row['allowed']:.1e} | {ops_of(row)}"
        )
        text.append(f"| {row['title']} | {row['device']} | {cells} |\n")
    return "".join([*text, "\n"])


if __name__ == "__main__":
    main()
