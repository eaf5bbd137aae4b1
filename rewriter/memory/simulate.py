"""Simulate a training step: how many bytes are allocated at each moment if the layers follow a plan."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fastft.compat.symbolic import Sizes, evaluate
from fastft.rewriter.memory.joint_graph import Joint, Memory
from fastft.rewriter.memory.pareto import Choice
from fastft.rewriter.report.plan import ACTIVATIONS, ERROR

POOL = "CUDA graphs"
GATHERED = "gathered from other devices"
# Of a CUDA graph's pool beyond its peak of live bytes, for fragmentation: measured on an H100 (docs/performance.md).
POOL_SHARE, POOL_SHARE_OF_WORK = 0.05, 0.5
Name = Hashable  # of a value that goes between stages
OUTSIDE_CUDA_GRAPHS = "what is beside the CUDA graphs"


@dataclass(eq=False)
class Kind:
    """What is known of pieces of one structure.  joint: None for a piece without backward."""

    label: str
    joint: Joint | None
    choices: list[Choice]
    memories: dict[Any, Memory] = field(default_factory=dict)

    def memory(self, choice: Choice, sizes: Sizes) -> Memory:
        """Return the memory of a choice at these sizes, from the cache if it was computed before."""
        if self.joint is None:
            return Memory(0, 0, 0)
        key = choice.ops, tuple(sizes.values())
        if key not in self.memories:
            self.memories[key] = self.joint.memory(choice.ops, sizes)
        return self.memories[key]


@dataclass(frozen=True)
class Value:
    """A tensor that goes from stage to stage: the expression of its bytes, and the stage that makes it."""

    bytes: Any
    made: int


@dataclass(eq=False)
class Stage:
    """A piece at its place in a graph.

    inputs: values that other stages made, by their index among the inputs of its kind.  gradient_bytes: of the
    parameters whose gradients its backward is the first to make.  gathered_forward, gathered_backward: of parameters
    and gradients that are whole while it runs, in a model that is sharded.
    """

    kind: Kind
    name: str
    inputs: dict[int, Name]
    gradient_bytes: int = 0
    gathered_forward: int = 0
    gathered_backward: int = 0


@dataclass(eq=False)
class StageSequence:
    """The stages of a graph, and the values that go between them.

    last: the last stage that reads a value in forward; the number of stages if the graph returns it.
    graphed: the stages that may run as CUDA graphs, whose memory pool is never shared.
    """

    stages: list[Stage]
    values: dict[Name, Value]
    last: dict[Name, int]
    hints: Sizes = field(default_factory=dict)
    graphed: range | None = None


@dataclass(frozen=True)
class Facts:
    """Bytes on the device besides activations.

    before: allocated before the step.  optimizer: what the first step of the optimizer will allocate.  workspace: of
    libraries.  host: what may be offloaded in all.  error: by how much a measurement exceeded the simulation.
    """

    before: int
    optimizer: int = 0
    workspace: int = 0
    host: int = 0
    error: int = 0


@dataclass(frozen=True)
class Moment:
    """A moment of the step, and the peak of allocated bytes in it; parts: what they are for."""

    label: str
    bytes: int
    parts: Mapping[str, int]


@dataclass(frozen=True)
class Plan:
    """A choice for every stage, and the step that was simulated with them.

    graphed: with CUDA graphs.  described: the report's items, once they were asked for: a plan is followed again and
    again where sizes change.
    """

    choices: tuple[Choice, ...]
    moments: tuple[Moment, ...]
    seconds: float
    graphed: bool = False
    described: list[Any] = field(default_factory=list, compare=False, repr=False)

    @property
    def peak(self) -> Moment:
        """The moment with the most bytes."""
        return max(self.moments, key=lambda moment: moment.bytes)

    @property
    def peak_bytes(self) -> int:
        """The bytes of that moment."""
        return self.peak.bytes

    @property
    def uncaptured_bytes(self) -> int:
        """The peak before CUDA graphs are captured, and where none are."""
        return max(moment.bytes for moment in self.moments if moment.label != OUTSIDE_CUDA_GRAPHS)

    @property
    def host_bytes(self) -> int:
        """The bytes that are offloaded."""
        return sum(choice.offloaded_bytes for choice in self.choices)


def simulate(
    sequence: StageSequence, chosen: Sequence[Choice], facts: Facts, sizes: Sizes, graphed: range | None = None
) -> Plan:
    """Simulate the step with these choices.  graphed: the stages that run as CUDA graphs."""
    simulation = _Simulation(sequence, chosen, facts, sizes)
    moments = list(simulation.run())
    if graphed is not None:
        moments.append(simulation.beside(graphed, moments))
    return Plan(tuple(chosen), tuple(moments), sum(choice.seconds for choice in chosen), graphed is not None)


class _Simulation:
    """Bytes by their purpose, stage by stage."""

    def __init__(self, sequence: StageSequence, chosen: Sequence[Choice], facts: Facts, sizes: Sizes) -> None:
        self.sequence, self.chosen, self.facts, self.sizes = sequence, chosen, facts, sizes
        self.memories = [
            stage.kind.memory(choice, sizes) for stage, choice in zip(sequence.stages, chosen, strict=True)
        ]
        self.size = {name: evaluate(value.bytes, sizes) for name, value in sequence.values.items()}
        self.offloaded = [self._offloaded(number) for number in range(len(chosen))]
        self.readers = self._readers()

    def _offloaded(self, number: int) -> tuple[int, set[Name]]:
        """Return the bytes of a stage's own results that go to the host, and the values between stages that do."""
        stage, choice = self.sequence.stages[number], self.chosen[number]
        joint = stage.kind.joint
        own, values = 0, set[Name]()
        for storage in joint.storages if joint is not None and choice.offloaded else ():
            if storage.name in choice.offloaded:
                if storage.input is None:
                    own += evaluate(storage.bytes, self.sizes)
                elif storage.input in stage.inputs:
                    values.add(stage.inputs[storage.input])
        return own, values

    def _readers(self) -> dict[Name, int]:
        """Map the values that some backward reads on the device to the first stage whose backward does."""
        readers: dict[Name, int] = {}
        for number, (stage, choice) in enumerate(zip(self.sequence.stages, self.chosen, strict=True)):
            if stage.kind.joint is not None:
                for place in stage.kind.joint.saved_inputs(choice.ops):
                    value = stage.inputs.get(place)
                    if value is not None and value not in self.offloaded[number][1]:
                        readers.setdefault(value, number)
        return readers

    def run(self) -> Iterator[Moment]:
        """Iterate over the moments of the step: forward of each stage, backward in reverse, the optimizer's step."""
        stages, kept = self.sequence.stages, 0
        for number, stage in enumerate(stages):
            pending = self._moved(number - 1) if number else 0
            held = self._between(number, forward=True)
            work = self.memories[number].forward + pending
            yield self._moment(f"forward of {stage.name}", kept, held, work, 0, stage.gathered_forward)
            kept += self.memories[number].saved - self.offloaded[number][0]
        gradients = 0
        for number in range(len(stages) - 1, -1, -1):
            stage = stages[number]
            fetched = self._moved(number) + (self._moved(number - 1) if number else 0)
            held = self._between(number, forward=False)
            label = f"backward of {stage.name}"
            work = self.memories[number].backward + fetched
            yield self._moment(label, kept, held, work, gradients, stage.gathered_backward)
            kept -= self.memories[number].saved - self.offloaded[number][0]
            gradients += stage.gradient_bytes
        yield self._moment("the optimizer's step", 0, 0, 0, gradients)

    def beside(self, graphed: range, moments: Sequence[Moment]) -> Moment:
        """Simulate the other stages at work while the CUDA graphs' memory pool stays allocated, for them alone.

        What goes in and out of the graphs, and its gradients, is copied to and from buffers.
        """
        count = len(self.sequence.stages)
        inside = [*(moments[number] for number in graphed), *(moments[2 * count - 1 - number] for number in graphed)]
        most = max(sum(moment.parts[name] for name in ACTIVATIONS) for moment in inside)
        work = max(moment.parts["at work"] for moment in inside)
        others = [memory for number, memory in enumerate(self.memories) if number not in graphed]
        crossing = [
            self.size[name] for name, value in self.sequence.values.items()
            if (value.made in graphed) != (self.sequence.last[name] in graphed)
        ]  # fmt: skip
        other_work = max((max(memory.forward, memory.backward + memory.saved) for memory in others), default=0)
        gradients = sum(stage.gradient_bytes for stage in self.sequence.stages)
        pool = int((1 + POOL_SHARE) * most + POOL_SHARE_OF_WORK * work) + gradients
        outside = self._moment(OUTSIDE_CUDA_GRAPHS, 0, 3 * sum(crossing), other_work, gradients)
        return Moment(outside.label, outside.bytes + pool, {**outside.parts, POOL: pool})

    def _moved(self, number: int) -> int:
        """Return the bytes of a stage that are being copied to the host, or back."""
        own, values = self.offloaded[number]
        return own + sum(self.size[value] for value in values)

    def _between(self, number: int, *, forward: bool) -> int:
        """Count the bytes of values made before a stage that it, a later one or a coming backward reads."""
        held = 0
        for name, value in self.sequence.values.items():
            saved = name in self.readers and (forward or self.readers[name] <= number)
            if value.made < number and (saved or (forward and self.sequence.last[name] >= number)):
                held += self.size[name]
        return held

    def _moment(self, label: str, kept: int, between: int, work: int, gradients: int, gathered: int = 0) -> Moment:
        facts = self.facts
        parts = {
            "held before": facts.before, "gradients": gradients, "optimizer": facts.optimizer,
            "libraries": facts.workspace, ERROR: facts.error, "kept activations": kept, "between layers": between,
            "at work": work, GATHERED: gathered,
        }  # fmt: skip
        return Moment(label, sum(parts.values()), parts)
