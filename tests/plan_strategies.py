"""Random layers and sequences of stages, as the planner sees them, and what a step of them takes by another count."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from hypothesis import strategies as st

from fastft.rewriter.memory.joint_graph import Joint, Memory, Op, Storage
from fastft.rewriter.memory.pareto import Choice
from fastft.rewriter.memory.simulate import Facts, Kind, Stage, StageSequence, Value

MIB = 2**20


@st.composite
def joints(draw: st.DrawFn) -> Joint:
    """A chain of ops with branches, whose backward reads some of what forward made.

    Storage 0 is an input and storage 1 a gradient that comes in; ops of forward make one storage each.  Some may not
    run again, and some need memory beside their results.
    """
    count = draw(st.integers(1, 5))
    joint = Joint([Storage("x", MIB, "f", "", input=0), Storage("grad", MIB, "f", "", tangent=True)])
    made = [0]
    for number in range(count):
        reads = {made[-1], draw(st.sampled_from(made))}
        joint.storages.append(Storage(f"made_{number}", draw(st.integers(1, 9)) * MIB, "f", ""))
        made.append(len(joint.storages) - 1)
        again = draw(st.sampled_from((True, True, True, False)))
        joint.ops.append(draw(_ops(f"op_{number}", reads, made[-1], forward=True, again=again)))
    joint.forward_outputs = sorted({made[-1], draw(st.sampled_from(made[1:]))})
    gradient = 1
    for number in range(count):
        reads = {gradient, draw(st.sampled_from(made))}
        joint.storages.append(Storage(f"grad_{number}", draw(st.integers(1, 9)) * MIB, "f", ""))
        gradient = len(joint.storages) - 1
        joint.ops.append(draw(_ops(f"back_{number}", reads, gradient, forward=False, again=True)))
    joint.backward_outputs = [gradient]
    return joint


def _ops(name: str, reads: set[int], makes: int, *, forward: bool, again: bool) -> st.SearchStrategy[Op]:
    return st.builds(
        lambda microseconds, scratch: Op(
            name, name, "", tuple(reads), (makes,), microseconds / 1e6, scratch * MIB, True, forward, again
        ),
        st.integers(1, 9),
        st.sampled_from((0, 0, 3, 20)),
    )


def most_alive(joint: Joint, order: Sequence[Op], stays: Iterable[int], before: Iterable[int]) -> int:
    """The most bytes at one time: of what was there or made, until its last use or for good, and beside it."""
    stays, before = set(stays), set(before)
    places = range(len(joint.storages))
    uses = {one: [at for at, op in enumerate(order) if one in (*op.reads, *op.makes)] for one in places}
    begins = {one: at for at, op in enumerate(order) for one in op.makes} | dict.fromkeys(before, -1)
    most = sum(joint.storages[one].bytes for one in before)
    for at, op in enumerate(order):
        alive = [
            one for one, begin in begins.items()
            if begin <= at and (one in stays or not uses[one] or uses[one][-1] >= at)
        ]  # fmt: skip
        most = max(most, sum(joint.storages[one].bytes for one in alive) + op.scratch)
    return most


@dataclass
class Made:
    """A stage that is made up: bytes of its own, and of its inputs which its backward reads and which are offloaded."""

    memory: Memory
    own: int
    offloaded: bool
    gradient: int
    value: int
    inputs: list[int] = field(default_factory=list)  # stages whose values it reads
    saved: list[int] = field(default_factory=list)  # of these
    moved: list[int] = field(default_factory=list)  # of the saved ones

    @property
    def choice(self) -> Choice:
        names = [f"input {self.inputs.index(one)}" for one in self.moved]
        return Choice((), tuple([*names, "own"] if self.offloaded else names), self.memory.saved)

    def kind(self) -> Kind:
        """With a joint graph whose backward reads what is saved."""
        storages = [Storage(f"input {at}", self.value, "f", "", input=at) for at in range(len(self.inputs))]
        joint = Joint([*storages, Storage("own", self.own, "f", "")])
        joint.backward_outputs = [self.inputs.index(one) for one in self.saved]
        made = Kind("", joint, [self.choice])
        made.memories = {((), ()): self.memory}
        return made


@st.composite
def made_sequences(draw: st.DrawFn) -> tuple[list[Made], StageSequence]:
    stages: list[Made] = []
    few = st.integers(0, 9)
    for number in range(draw(st.integers(1, 5))):
        own = draw(few)
        memory = Memory(own + draw(few), draw(few), draw(few))
        made = Made(memory, own, draw(st.booleans()), draw(few), draw(few))
        if number:
            made.inputs = sorted({number - 1, draw(st.integers(0, number - 1))})
            made.saved = [one for one in made.inputs if draw(st.booleans())]
            made.moved = [one for one in made.saved if draw(st.booleans())]
        stages.append(made)
    sequence = StageSequence([], {}, {})
    for number, made in enumerate(stages):
        inputs = {place: str(one) for place, one in enumerate(made.inputs)}
        sequence.stages.append(Stage(made.kind(), str(number), inputs, made.gradient))
        sequence.values[str(number)] = Value(made.value, number)
        sequence.last[str(number)] = max([number, *(at for at, other in enumerate(stages) if number in other.inputs)])
    return stages, sequence


def peaks(stages: Sequence[Made], facts: Facts) -> list[int]:
    """The bytes at each moment of a step, summed from what lives when: forward of each, backward of each, optimizer."""
    count = len(stages)
    moments = [facts.before + facts.optimizer + facts.workspace + facts.error] * (2 * count + 1)

    def lives(size: int, first: int, last: int) -> None:
        for at in range(first, last + 1):
            moments[at] += size

    for number, made in enumerate(stages):
        forward, backward = number, 2 * count - 1 - number
        lives(made.memory.forward, forward, forward)
        lives(made.memory.backward, backward, backward)
        own = made.own if made.offloaded else 0
        lives(made.memory.saved - own, forward + 1, backward)
        away = own + sum(stages[one].value for one in made.moved)
        last = number == count - 1  # behind and before which there is none whose time a copy takes
        for at in (backward,) if last else (forward + 1, backward - 1, backward):  # out, back, in use
            lives(away, at, at)
        lives(made.gradient, backward + 1, 2 * count)
        readers = [at for at, other in enumerate(stages) if number in other.saved and number not in other.moved]
        last_forward = max([number, *(at for at, other in enumerate(stages) if number in other.inputs)])
        lives(made.value, number + 1, count - 1 if readers else last_forward)
        if readers:
            lives(made.value, count, 2 * count - 1 - max(readers[0], number + 1))
    return moments
