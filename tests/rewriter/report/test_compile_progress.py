"""The line that says what is being compiled: where it is drawn, that it disappears, and that it breaks nothing."""

import io
import logging
import re
from collections.abc import Callable

import pytest
import rich
import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor, nn

from fastft.finetune import compilation_shown
from fastft.progress import Reporter
from fastft.rewriter.report import compile_progress

SAID = ["compiling region 1 of 2, (the rest)", "compiling region 2 of 2, layers.0 (3 layers)"]
ERASE = "\r\x1b[2K"


class Terminal(io.StringIO):
    """Text that says it is a terminal."""

    def isatty(self) -> bool:
        return True


class Layer(nn.Module):
    """A layer that is worth compiling once for all."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return (x + nn.functional.silu(self.linear(x)) * torch.tanh(x)) / 2


class Layers(nn.Module):
    """Three layers after a beginning."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(8))
        self.layers = nn.ModuleList(Layer() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = x * self.scale
        for layer in self.layers:
            x = layer(x)
        return x


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    torch._dynamo.reset()
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")


def at_terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """From here on stderr is a terminal; not as a fixture, which pytest's own capturing would undo."""
    stream = Terminal()
    monkeypatch.setattr("sys.stderr", stream)
    return stream


def compiled() -> Callable:
    return torch.compile(Layers(), backend="fastft", options={"lower": "eager", "strict": True})


def lines(written: str) -> list[str]:
    return re.sub(r"\x1b\[\d*m", "", written).split(ERASE)


def test_it_is_drawn_and_disappears(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = at_terminal(monkeypatch)
    function = compiled()
    function(torch.randn(2, 8))
    *drawn, last = lines(terminal.getvalue())
    assert drawn[1:] == [f"fastft: {text}" for text in SAID]
    assert last == ""
    assert "\n" not in terminal.getvalue()
    before = terminal.getvalue()
    function(torch.randn(2, 8))
    assert terminal.getvalue() == before  # nothing compiles, nothing is drawn


def test_elsewhere_it_is_logged(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    stream = io.StringIO()
    monkeypatch.setattr("sys.stderr", stream)
    with caplog.at_level(logging.INFO, logger="fastft"):
        compiled()(torch.randn(2, 8))
    messages = [one.getMessage() for one in caplog.records if one.name == "fastft"]
    assert messages[:2] == SAID
    assert re.fullmatch(r"compiled in 2 regions, \d+\.\d s; 3 lifted, 0 near misses", messages[-1])
    assert stream.getvalue() == ""


def test_a_live_display_is_not_disturbed(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = at_terminal(monkeypatch)
    console = Console(file=io.StringIO(), force_terminal=True)
    monkeypatch.setattr(rich, "get_console", lambda: console)
    with Progress(console=console):
        compiled()(torch.randn(2, 8))
    assert terminal.getvalue() == ""


def test_the_display_of_finetune_shows_it(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = at_terminal(monkeypatch)
    console = Console(file=io.StringIO(), force_terminal=True)
    with Reporter(console, "fastft", 3) as reporter, compilation_shown(reporter):
        shown = []
        update = reporter.bar.update
        reporter.bar.update = lambda task, **what: (shown.append(what["description"]), update(task, **what))
        compiled()(torch.randn(2, 8))
        assert reporter.bar.tasks[0].description == "running..."
    assert shown == [*SAID, "running..."]
    assert terminal.getvalue() == ""
    torch._dynamo.reset()
    compiled()(torch.randn(2, 8))
    assert "compiling region" in terminal.getvalue()  # as before


def test_drawing_is_not_worth_a_compilation() -> None:
    def failing(text: str) -> None:
        raise OSError("the terminal is gone")

    model = Layers()
    x = torch.randn(2, 8)
    with compile_progress.shown_by(failing):
        actual = torch.compile(model, backend="fastft", options={"lower": "eager", "strict": True})(x)
    torch.testing.assert_close(actual, model(x))


def test_it_disappears_when_compiling_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = at_terminal(monkeypatch)

    def fail() -> None:
        with compile_progress.line() as say:
            say("compiling")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert lines(terminal.getvalue())[1:] == ["fastft: compiling", ""]


def test_a_long_line_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = at_terminal(monkeypatch)
    with compile_progress.line() as say:
        say("x" * 1000)
    assert [len(line) for line in lines(terminal.getvalue())] == [0, 100, 0]
