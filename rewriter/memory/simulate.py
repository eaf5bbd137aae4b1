"""Simulate a training step: how many bytes are allocated at which moment if layers do what a plan says."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fastft.compat.symbolic import Sizes, evaluate
from fastft.rewriter.memory.joint_graph import Joint, Memory
from fastft.rewriter.memory.pareto import Choice
from fastft.rewriter.report.plan import ACTIVATIONS, ERROR

POOL = "CUDA graphs"
# Of a graph's pool beyond the most that lives in it, for what lies between: measured on an H100 (docs/performance.md).
POOL_SHARE, POOL_SHARE_OF_WORK = 0.05, 0.5
Name = Hashable  # of a value between stages
OUTSIDE_CUDA_GRAPHS = "what is beside the CUDA graphs"


@dataclass(eq=False)
class Kind:
    """What is known of pieces of one structure.  joint: None for what has no backward."""

    label: str
    joint: Joint | None
    choices: list[Choice]
    memories: dict[Any, Memory] = field(default_factory=dict)

    def memory(self, choice: Choice, sizes: Sizes) -> Memory:
        if self.joint is None:
            return Memory(0, 0, 0)
        key = choice.ops, tuple(sizes.values())
        if key not in self.memories:
            self.memories[key] = self.joint.memory(choice.ops, sizes)
        return self.memories[key]


@dataclass(frozen=True)
class Value:
    """A tensor that goes from stage to stage: expression of its bytes, and the stage that makes it."""

    bytes: Any
    made: int


@dataclass(eq=False)
class Stage:
    """A piece at its place in a graph.

    inputs: by their place among the inputs of its kind, the values that other stages made.  gradient_bytes: of the
    parameters whose gradients its backward is the first to make.
    """

    kind: Kind
    name: str
    inputs: dict[int, Name]
    gradient_bytes: int = 0


@dataclass(eq=False)
class StageSequence:
    """The stages of a graph, and the values that go between them.

    last: the last stage that reads a value in forward, one more than there are if the graph returns it.
    graphed: the stages that may run as CUDA graphs, whose memory is theirs for good.
    """

    stages: list[Stage]
    values: dict[Name, Value]
    last: dict[Name, int]
    hints: Sizes = field(default_factory=dict)
    graphed: range | None = None


@dataclass(frozen=True)
class Facts:
    """Bytes on the device beside activations.

    before: allocated before the step.  optimizer: what the first step of the optimizer will allocate.  workspace: of
    libraries.  host: what may be offloaded in all.  error: what a measurement found beyond the simulation, or less.
    """

    before: int
    optimizer: int = 0
    workspace: int = 0
    host: int = 0
    error: int = 0


@dataclass(frozen=True)
class Moment:
    """A time of the step, and the most bytes that are allocated then; parts: what holds them."""

    label: str
    bytes: int
    parts: Mapping[str, int]


@dataclass(frozen=True)
class Plan:
    """A choice for every stage, and the step as it was simulated.  graphed: with CUDA graphs."""

    choices: tuple[Choice, ...]
    moments: tuple[Moment, ...]
    seconds: float
    graphed: bool = False

    @property
    def peak(self) -> Moment:
        return max(self.moments, key=lambda moment: moment.bytes)

    @property
    def peak_bytes(self) -> int:
        return self.peak.bytes

    @property
    def host_bytes(self) -> int:
        """What is offloaded."""
        return sum(choice.offloaded_bytes for choice in self.choices)


def simulate(
    sequence: StageSequence, chosen: Sequence[Choice], facts: Facts, sizes: Sizes, graphed: range | None = None
) -> Plan:
    """The step of these choices.  graphed: the stages that run as CUDA graphs."""
    simulation = _Simulation(sequence, chosen, facts, sizes)
    moments = list(simulation.run())
    if graphed is not None:
        moments.append(simulation.beside(graphed, moments))
    return Plan(tuple(chosen), tuple(moments), sum(one.seconds for one in chosen), graphed is not None)


class _Simulation:
    """Bytes by what they are for, stage by stage."""

    def __init__(self, sequence: StageSequence, chosen: Sequence[Choice], facts: Facts, sizes: Sizes) -> None:
        self.sequence, self.chosen, self.facts, self.sizes = sequence, chosen, facts, sizes
        self.memories = [stage.kind.memory(one, sizes) for stage, one in zip(sequence.stages, chosen, strict=True)]
        self.size = {name: evaluate(value.bytes, sizes) for name, value in sequence.values.items()}
        self.offloaded = [self._offloaded(number) for number in range(len(chosen))]
        self.readers = self._readers()

    def _offloaded(self, number: int) -> tuple[int, set[Name]]:
        """The bytes of a stage's own making that go to the host, and the values that do."""
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
        """Values that some backward reads on the device, and the first stage of those that do."""
        found: dict[Name, int] = {}
        for number, (stage, choice) in enumerate(zip(self.sequence.stages, self.chosen, strict=True)):
            if stage.kind.joint is not None:
                for place in stage.kind.joint.saved_inputs(choice.ops):
                    value = stage.inputs.get(place)
                    if value is not None and value not in self.offloaded[number][1]:
                        found.setdefault(value, number)
        return found

    def run(self) -> Iterator[Moment]:
        stages, kept = self.sequence.stages, 0
        for number, stage in enumerate(stages):
            pending = self._moved(number - 1) if number else 0
            held = self._between(number, forward=True)
            yield self._moment(f"forward of {stage.name}", kept, held, self.memories[number].forward + pending, 0)
            kept += self.memories[number].saved - self.offloaded[number][0]
        gradients = 0
        for number in range(len(stages) - 1, -1, -1):
            stage = stages[number]
            fetched = self._moved(number) + (self._moved(number - 1) if number else 0)
            held = self._between(number, forward=False)
            label = f"backward of {stage.name}"
            yield self._moment(label, kept, held, self.memories[number].backward + fetched, gradients)
            kept -= self.memories[number].saved - self.offloaded[number][0]
            gradients += stage.gradient_bytes
        yield self._moment("the optimizer's step", 0, 0, 0, gradients)

    def beside(self, graphed: range, moments: Sequence[Moment]) -> Moment:
        """The other stages at work, while the memory of CUDA graphs lies there: it is nobody else's.

        What goes in and out, and its gradients, is in buffers, and copied.
        """
        count = len(self.sequence.stages)
        inside = [*(moments[at] for at in graphed), *(moments[2 * count - 1 - at] for at in graphed)]
        most = max(sum(moment.parts[name] for name in ACTIVATIONS) for moment in inside)
        work = max(moment.parts["at work"] for moment in inside)
        others = [memory for at, memory in enumerate(self.memories) if at not in graphed]
        crossing = [
            self.size[name] for name, value in self.sequence.values.items()
            if (value.made in graphed) != (self.sequence.last[name] in graphed)
        ]  # fmt: skip
        other_work = max((max(one.forward, one.backward + one.saved) for one in others), default=0)
        gradients = sum(stage.gradient_bytes for stage in self.sequence.stages)
        pool = int((1 + POOL_SHARE) * most + POOL_SHARE_OF_WORK * work) + gradients
        found = self._moment(OUTSIDE_CUDA_GRAPHS, 0, 3 * sum(crossing), other_work, gradients)
        return Moment(found.label, found.bytes + pool, {**found.parts, POOL: pool})

    def _moved(self, number: int) -> int:
        """What a stage has on its way to the host, or back."""
        own, values = self.offloaded[number]
        return own + sum(self.size[value] for value in values)

    def _between(self, number: int, *, forward: bool) -> int:
        """Values that live beside a stage: made before it, and read by it, later, or by a backward to come."""
        held = 0
        for name, value in self.sequence.values.items():
            saved = name in self.readers and (forward or self.readers[name] <= number)
            if value.made < number and (saved or (forward and self.sequence.last[name] >= number)):
                held += self.size[name]
        return held

    def _moment(self, label: str, kept: int, between: int, work: int, gradients: int) -> Moment:
        facts = self.facts
        parts = {
            "held before": facts.before, "gradients": gradients, "optimizer": facts.optimizer,
            "libraries": facts.workspace, ERROR: facts.error, "kept activations": kept, "between layers": between,
            "at work": work,
        }  # fmt: skip
        return Moment(label, sum(parts.values()), parts)
