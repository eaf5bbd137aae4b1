"""What fastft made of a model: printed, shown in a notebook, or saved as HTML."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console, RenderableType

from fastft.errors import UserError
from fastft.rewriter.report import html, repro_writer, tables
from fastft.rewriter.report.data import ReportData


@dataclass
class Report(ReportData):
    """What fastft makes of a model, graph by graph.

    A terminal prints it as tables, a notebook shows the page that ``save`` writes.
    """

    def print(self, console: Console | None = None) -> None:
        """Print to the terminal, in colour where it has any."""
        (console or Console()).print(self)

    def save(self, path: str | Path) -> None:
        """Write the report as one self-contained HTML page."""
        Path(path).write_text(self._repr_html_(), encoding="utf-8")

    def save_repro(self, folder: str | Path) -> list[Path]:
        """Write ``graph_0/repro.py`` ... into the folder, which compile these graphs again anywhere; return the paths.

        A file holds a graph's calls, the shapes of its inputs, names of modules, files and versions, and what failed;
        no weights, batches or texts: inputs are drawn at random.  ``python repro.py`` compares outputs and gradients
        with those of the graph as it is, or ends with fastft's error.  Graphs have one that were explained, and those
        in which something failed and was warned of; raises UserError where none has.
        """
        written = {f"graph_{number}": graph.repro for number, graph in enumerate(self.graphs) if graph.repro}
        if not written:
            raise UserError(
                "No graph here has a reproducer: call fastft.explain(model, **batch).save_repro(folder), or set "
                "FASTFT_DUMP to a folder before training, into which one is written for each graph."
            )
        return [repro_writer.write(text, Path(folder) / name) for name, text in written.items()]

    def tables(self) -> list[tuple[str, Sequence[str], list[Sequence[str]]]]:
        """Return title, columns and rows of all tables that have any."""
        return tables.tables(self)

    def __rich__(self) -> RenderableType:
        return tables.as_rich(self)

    def __str__(self) -> str:
        text = io.StringIO()
        Console(file=text, width=140, color_system=None).print(self)
        return text.getvalue()

    def _repr_html_(self) -> str:
        return html.page(self)
