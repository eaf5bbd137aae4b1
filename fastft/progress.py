"""Live progress: a bar in a terminal, plain lines elsewhere."""

from __future__ import annotations

from types import TracebackType
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from fastft.units import format_bytes

if TYPE_CHECKING:
    from fastft.training import Run

LINES = 20  # how many steps are printed where there is no terminal


def describe(run: Run) -> str:
    """Describe the last step in one line."""
    last = run.steps[-1]
    return f"loss {last.loss:.4f}   {last.tokens / last.seconds:>7,.0f} tokens/s   peak {format_bytes(run.peak_bytes)}"


class Reporter:
    """Shows one contender's run; used as a context around training, and called after each step."""

    def __init__(self, console: Console, contender: str, steps: int) -> None:
        self.console = console
        self.contender = contender
        self.steps = steps
        columns = [
            SpinnerColumn(),
            TextColumn("[bold]{task.fields[contender]}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.description}"),
            TimeElapsedColumn(),
        ]
        self.bar = Progress(*columns, console=console, disable=not console.is_terminal)

    def __enter__(self) -> Reporter:
        doing = "running the first step..." if self.contender == "eager" else "compiling..."
        self.task = self.bar.add_task(doing, total=self.steps, contender=self.contender)
        self.bar.start()
        if not self.console.is_terminal:
            self.console.print(f"{self.contender}: {doing}", highlight=False)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.bar.stop()

    def __call__(self, run: Run) -> None:
        """Show the step that has just ended."""
        number = len(run.steps)
        self.bar.update(self.task, completed=number, description=describe(run))
        if not self.console.is_terminal and (number in (1, self.steps) or number % max(1, self.steps // LINES) == 0):
            position = f"{number:>{len(str(self.steps))}}/{self.steps}"
            line = f"{self.contender}: step {position}   {describe(run)}   {run.steps[-1].seconds:>6.2f} s"
            self.console.print(line, highlight=False, soft_wrap=True)
