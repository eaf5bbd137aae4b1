"""``fastft explain --card``: a step's peak and time on cards that need not be here."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

from fastft.errors import UserError
from fastft.rewriter.cards import CARDS, Card, CardPlan, plan_for
from fastft.rewriter.explain import explained
from fastft.rewriter.options import OptionsError, bytes_of, nearest
from fastft.units import GIB, format_bytes


def card_of(text: str) -> Card:
    """Return a card by its name, or by its memory: the first of such a size, as far as rates go.

    Raises UserError for a name that is not known.
    """
    by_name = {name.lower(): card for name, card in CARDS.items()}
    if (card := by_name.get(text.lower())) is not None:
        return card
    try:
        memory = bytes_of("card", text)
    except OptionsError:
        known = ", ".join(CARDS)
        raise UserError(
            f"No card {text!r} is known; did you mean {nearest(text, list(CARDS))}? Known: {known}."
        ) from None
    like = min(CARDS.values(), key=lambda card: abs(card.memory - memory))
    return Card(f"{text}, as fast as {like.name}", memory, like.rates, like.link)


def show_cards(console: Console, model: Any, batch: dict[str, Any], card: Card, devices: int, *, shard: bool) -> int:
    """Print the planned peak and time of a step for each of so many cards; return 1 where the model does not fit."""
    made: list[CardPlan] = []

    def planned(gm: Any, pieces: Any, example_inputs: Any) -> None:
        made.append(plan_for(card, devices, shard=shard, gm=gm, pieces=pieces, example_inputs=example_inputs))

    report = explained(model, (), batch, planned)
    rows, tokens = batch["input_ids"].shape
    how = "one card" if devices == 1 else f"{devices} cards, {'sharded (FSDP2)' if shard else 'a copy on each (DDP)'}"
    console.print(f"{card.name}: {how}, {rows} x {tokens} tokens on each", highlight=False)
    if len(made) != 1:
        console.print(f"No plan: the model is {len(report.graphs)} graphs, and a plan is made for one with layers.")
        return 1
    plan = made[0]
    if plan.plan is None:
        console.print(f"It does not fit: {plan.reason}", highlight=False, soft_wrap=True)
        return 1
    console.print(_table(plan, rows * tokens * devices))
    console.print(
        "Memory is as a step is simulated before it runs; time is estimated from the operations and bytes of its "
        "ops, and leaves out the host's.", style="dim", soft_wrap=True,
    )  # fmt: skip
    return 0


def _table(made: CardPlan, tokens: int) -> Table:
    plan = made.plan
    assert plan is not None
    table = Table(show_header=False, box=None)
    table.add_row("planned peak", f"{format_bytes(plan.peak_bytes)} of {format_bytes(made.limit_bytes)} that are used")
    table.add_row("  reached in", plan.peak.label)
    for name, size in sorted(made.parts.items(), key=lambda part: -part[1]):
        if size >= 0.005 * GIB:
            table.add_row(f"  {name}", format_bytes(size))
    if plan.host_bytes:
        table.add_row("offloaded", f"{format_bytes(plan.host_bytes)} to the host, from each card")
    table.add_row("recomputing", f"{plan.seconds * 1e3:,.0f} ms a step")
    if made.gather:
        table.add_row("gathering", f"{made.gather * 1e3:,.0f} ms a step, beside {made.compute * 1e3:,.0f} ms at work")
    table.add_row("a step", f"about {made.seconds * 1e3:,.0f} ms")
    table.add_row("tokens/s", f"{tokens / made.seconds:,.0f} of all cards")
    return table
