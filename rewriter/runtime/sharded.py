"""Run a graph of a model whose parameters FSDP2 has sharded: gather what each piece reads, free it behind.

The modules keep their sharded parameters throughout.  Before a piece runs forward, the parameters that it reads are
gathered, those of the next piece are asked for, so that they come meanwhile, and those that it does not read are freed.
Backward goes the same way in reverse; there only what backward reads is gathered.  Gradients go to FSDP2, which reduces
a group's once the pieces that make them are through.

All processes gather in the same order, as the pieces of a graph and what they read are the same for all of them.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from fastft.compat import fsdp
from fastft.compat.fsdp import Gathering, Home


@dataclass(eq=False)
class Unit:
    """Inputs of a graph that are gathered together: parameters of one group that the same pieces read.

    places: of the inputs.  forward, backward: the pieces that read them, by number.  trained: the first of the pieces
    that make a gradient of one of them, or None.  taken: whether they are let go of behind the last piece that reads
    them though FSDP2 itself has gathered them.
    """

    places: tuple[int, ...]
    forward: frozenset[int]
    backward: frozenset[int]
    trained: int | None
    taken: bool = False


@dataclass(eq=False)
class _Held:
    """A unit in one run.

    given: FSDP2 has gathered it, before the run.  gathering: while it is on its way.  whole: its parameters are in
    memory.
    """

    unit: Unit
    homes: list[Home]
    given: bool = False
    gathering: Gathering | None = None
    whole: bool = False

    def __post_init__(self) -> None:
        self.given = self.whole = all(home.is_given for home in self.homes)

    def ask(self) -> None:
        """Have the parameters come."""
        if not self.whole and self.gathering is None:
            self.given = self.whole = all(home.is_given for home in self.homes)
            if not self.whole:
                self.gathering = Gathering(self.homes)

    def get(self) -> None:
        """Wait for the parameters."""
        self.ask()
        if self.gathering is not None:
            self.gathering.finish()
            self.gathering, self.whole = None, True

    def free(self) -> None:
        """Let go of the parameters, unless they are FSDP2's."""
        if self.gathering is not None:
            self.get()
        if self.whole and (self.unit.taken or not self.given):
            fsdp.free(self.homes)
        self.given = self.whole = False


@dataclass(eq=False)
class _Run:
    """One forward, and the backward that may follow.

    memory: by the storage of a whole parameter.  begun: the pieces whose outputs need a gradient, in order.
    in_backward: whether backward has begun.  reduced: the groups whose gradients it has reduced.  pinned: units of
    which a piece has returned a view, that others may read.
    """

    held: list[_Held]
    roots: list[Any]
    memory: dict[int, _Held]
    begun: list[int] = field(default_factory=list)
    in_backward: bool = False
    reduced: set[Any] = field(default_factory=set)
    pinned: set[_Held] = field(default_factory=set)

    def forward(self, piece: int) -> None:
        """Have the parameters of a piece in memory, those of the next on their way, and no others."""
        later = [held for held in self.held if held.given and (max(held.unit.forward) > piece or not held.unit.taken)]
        self._have(lambda unit: unit.forward, piece, piece + 1, later if torch.is_grad_enabled() else self._given())

    def backward(self, piece: int) -> None:
        """Do the same for a piece's backward, and reduce the gradients of the pieces above."""
        if not self.in_backward:
            self.in_backward = True
            for root in self.roots:
                fsdp.at_end_of_backward(root, self.end)
        below = [number for number in self.begun if number < piece]
        self._have(lambda unit: unit.backward, piece, below[-1] if below else None)
        self._reduce(piece)

    def _given(self) -> list[_Held]:
        return [held for held in self.held if held.given]

    def _have(
        self, readers: Callable[[Unit], frozenset[int]], now: int, then: int | None, stays: Sequence[_Held] = ()
    ) -> None:  # fmt: skip
        wanted = [held for held in self.held if now in readers(held.unit) or held in self.pinned]
        coming = [held for held in self.held if then in readers(held.unit)]
        for held in self.held:
            if held not in wanted and held not in coming and held not in stays:
                held.free()
        for held in wanted:
            held.get()
        for held in coming:
            held.ask()

    @cached_property
    def _lowest(self) -> dict[Any, int]:
        """The lowest piece that makes a gradient of each group."""
        lowest: dict[Any, int] = {}
        for held in self.held:
            if held.unit.trained is not None:
                group = held.homes[0].group
                lowest[group] = min(lowest.get(group, held.unit.trained), held.unit.trained)
        return lowest

    def _reduce(self, piece: int) -> None:
        """Reduce the gradients of all groups that only pieces above this one make gradients of."""
        for group, number in self._lowest.items():
            if number > piece and group not in self.reduced:
                self.reduced.add(group)
                fsdp.reduce(group)

    def pin(self, results: Sequence[Any]) -> None:
        """Note the units of which one of a piece's results is a view."""
        kept = {value.untyped_storage()._cdata for value in results if isinstance(value, Tensor)}
        self.pinned |= {self.memory[key] for key in kept if key in self.memory}

    def leave(self) -> None:
        """Free all parameters: what is gathered again is as it is then.

        Without gradients FSDP2 finds what it has gathered itself as it left it; nothing would make it look again.
        """
        for held in self.held:
            if torch.is_grad_enabled() or not held.given:
                held.free()
        if torch.is_grad_enabled():
            for group in {held.homes[0].group for held in self.held if held.unit.taken}:
                fsdp.give_up(group)

    def end(self) -> None:
        """Free all parameters at the end of backward."""
        for held in self.held:
            held.free()
        self.in_backward = False
        self.reduced.clear()


class Sharded:
    """A graph that runs on gathered parameters: a function of the graph's inputs, some of which are sharded.

    ``around`` makes the call of a piece; ``run`` is what is made of all of these.
    """

    def __init__(self, units: Sequence[Unit]) -> None:
        self.units = units
        self.run: Callable = lambda *inputs: None
        self.current: _Run | None = None
        self.known: dict[int, tuple[weakref.ref[Any], weakref.ref[Home]]] = {}  # by place: an input, and its home

    def _home(self, place: int, given: Any) -> Home:
        """Return where an input is kept.  Raises RuntimeError where that is not known any more."""
        known = self.known.get(place)
        home = known[1]() if known is not None and known[0]() is given else None
        home = home or fsdp.home_of(given)
        if home is None:
            raise RuntimeError("a parameter is not where FSDP2 kept it: call torch.compiler.reset() and compile again.")
        self.known[place] = weakref.ref(given), weakref.ref(home)
        return home

    def around(self, number: int, call: Callable) -> Callable:
        """Return a piece's call that has its parameters gathered, and gathered again for its backward."""

        def piece(*inputs: Any) -> Any:
            run = self.current
            assert run is not None
            run.forward(number)
            results = call(*inputs)
            run.pin(results)
            if torch.is_grad_enabled():
                made = [value for value in results if isinstance(value, Tensor) and value.grad_fn is not None]
                if made:
                    run.begun.append(number)
                for value in made:
                    value.register_hook(lambda _: run.backward(number))
            return results

        return piece

    def __call__(self, *inputs: Any) -> Any:
        given, held, memory = list(inputs), [], {}
        for unit in self.units:
            homes = [self._home(place, inputs[place]) for place in unit.places]
            one = _Held(unit, homes)
            held.append(one)
            for place, home in zip(unit.places, homes, strict=True):
                given[place] = home.whole()
                memory[given[place].untyped_storage()._cdata] = one
        run = _Run(held, list(dict.fromkeys(one.homes[0].root for one in held)), memory)
        before, self.current = self.current, run
        try:
            for root in run.roots:
                fsdp.begin(root)
            return self.run(*given)
        finally:
            run.leave()
            self.current = before


def units(
    reads: Sequence[Sequence[int]], saves: Sequence[Sequence[int]], homes: Mapping[int, Home],
    taken: Callable[[Home], bool] = lambda home: False,
) -> list[Unit]:  # fmt: skip
    """Group the inputs that are sharded: by what FSDP2 reduces together, and by the pieces that read them.

    reads, saves: the inputs that each piece reads, and those that its backward reads.  homes: by input.  taken: tells
    which groups are let go of though FSDP2 has gathered them.
    """
    found: dict[Any, list[int]] = {}
    for place, home in homes.items():
        forward, backward = (_readers(place, lists) for lists in (reads, saves))
        if forward:
            found.setdefault((id(home.group), forward, backward), []).append(place)
    made = []
    for (_, forward, backward), places in found.items():
        first = min(forward) if any(homes[place].trained for place in places) else None
        made.append(Unit(tuple(places), forward, backward, first, taken(homes[places[0]])))
    return made


def _readers(place: int, lists: Sequence[Sequence[int]]) -> frozenset[int]:
    return frozenset(number for number, read in enumerate(lists) if place in read)
