"""The Python facts that the trace of a layer relies on, as one function that looks all of them up in any layer.

They are those that Dynamo guards.  A guard for each of them costs a tenth of a millisecond to make, and a layer has
some hundreds; compared in one go they are as fast to check as Dynamo's own.
"""

from __future__ import annotations

import dataclasses
import functools
import operator
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch._C._dynamo.guards import TensorGuards
from torch._dynamo.eval_frame import skip_code
from torch._dynamo.guards import GuardManagerType
from torch._dynamo.source import TypeSource
from torch._guards import Guard, Source
from torch.nn.utils import parametrize


class Differs(Exception):  # noqa: N818
    """A reason why a layer has to be traced by itself."""


_PLAIN = (
    int, float, complex, str, bytes, bool, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format,
)  # fmt: skip
_VALUE = {"CONSTANT_MATCH", "EQUALS_MATCH", "BOOL_MATCH", "NONE_MATCH"}
_OBJECT = {
    "ID_MATCH", "FUNCTION_MATCH", "CLASS_MATCH", "MODULE_MATCH", "CLOSURE_MATCH", "BUILTIN_MATCH", "WEAKREF_ALIVE",
}  # fmt: skip
_CONTAINERS = (tuple, list, set, frozenset)  # torch.Size is a tuple
_KEYS = {"DICT_KEYS_MATCH", "MAPPING_KEYS_CHECK"}


class Facts:
    """What guards say of a layer, as a function of the layer.

    values: returns Python objects by their source.  tensors: where the layer's tensors are.  Raises Differs for a guard
    that is not understood.
    """

    def __init__(
        self, layer: Source, guards: Iterable[Guard], values: Callable[[Source], Any], tensors: Iterable[Source]
    ) -> None:
        self.layer, self.values = layer, values
        self.lines: list[str] = []
        self.names: dict[Source, str] = {layer: "layer"}
        # Expressions: values of which each place has its own object; those made anew when asked; objects; once-only.
        self.same, self.equal, self.objects, self.first = {}, {}, {}, {}  # type: ignore[var-annotated]
        for guard in guards:
            self._add(guard)
        places = [self._name(source) for source in tensors]
        if None in places:
            raise Differs("a tensor of it belongs to its class")
        self.look_up = self._function(self.same, self.equal, self.objects, self.first)
        self.look_again = self._function(self.same, self.equal, self.objects, places)
        self.tensors_of = self._function(places)

    def of(self, layer: Any) -> tuple[tuple, ...]:
        """Look up the facts of a layer.  Raises Differs where something is missing."""
        try:
            return self.look_up(layer)
        except Exception as error:
            raise Differs(f"it lacks something: {error}") from error

    def guard(self, source: Source, layer: Any) -> Guard:
        """Make Dynamo's guard that a layer's facts and tensors stay as they are; it keeps none of its objects alive."""
        same, equal, objects, _ = self.of(layer)
        reference_of_layer = weakref.ref(layer)
        references = [weakref.ref(value) for value in objects]
        look_up, text = self.look_again, f"what was compiled for {source.name} still holds of it"

        def check(alike: Callable[..., bool], wrapped: tuple[Any]) -> bool:
            (layer,) = wrapped
            now, equal_now, objects_now, tensors_now = look_up(layer)
            return (
                (all(map(operator.is_, now, same)) or all(map(_are_same, now, same)))
                and equal_now == equal
                and all(value is reference() for value, reference in zip(objects_now, references, strict=True))
                and alike(*tensors_now)
            )

        def layer_facts(builder: Any, guard: Guard) -> None:
            # Here and not before: what a tensor dispatches to depends on the modes in which guards are checked.
            layer = reference_of_layer()
            tensors = self.tensors_of(layer)
            sizes, strides = ([list(of(tensor)) for tensor in tensors] for of in (Tensor.size, Tensor.stride))
            guards: Any = TensorGuards
            alike = guards(*tensors, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides).check
            # In a tuple, as torch does not look at a module again while what it knows of its dicts stays the same.
            manager = builder.get_guard_manager(guard).lambda_manager(
                python_lambda=_wrapped, source=f"({source.name},)", example_value=(layer,),
                guard_manager_enum=GuardManagerType.GUARD_MANAGER,
            )  # fmt: skip
            manager.add_lambda_guard(functools.partial(check, alike), [text], None)

        return Guard(source, layer_facts)

    def _function(self, *groups: Iterable[Any]) -> Callable[[Any], tuple]:
        """Make a function of a layer that returns a tuple for each group of expressions, or for the only one itself."""
        body = "".join(f"    {line}\n" for line in self.lines)
        tuples = ", ".join(f"({''.join(f'{fact}, ' for fact in group)})" for group in groups)
        code = f"def facts(layer):\n{body}    return {tuples}\n"
        scope: dict[str, Any] = {}
        exec(compile(code, "<facts of a layer>", "exec"), scope)
        skip_code(scope["facts"].__code__)  # or Dynamo would compile it too
        return scope["facts"]

    def _add(self, guard: Guard) -> None:
        name, source = guard.create_fn_name(), guard.originating_source
        keywords = guard.create_fn.keywords if isinstance(guard.create_fn, functools.partial) else {}
        member = keywords.get("attr", getattr(source, "member", None))
        if name == "HASATTR" and "attr" not in keywords:  # torch 2.11
            source = source.base  # type: ignore[attr-defined]
        place = self._name(source)
        if place is None or name == "TENSOR_MATCH":  # a fact of a class, or one that Dynamo checks with the tensor
            return
        group, fact = self._expression(name, place, member, source, keywords)
        group[fact] = None

    def _expression(
        self, name: str, place: str, member: Any, source: Source, keywords: dict[str, Any]
    ) -> tuple[dict[str, None], str]:
        """Return what a guard says of what is at a place, and the group that it belongs to."""
        if name == "HASATTR":
            return self.same, f"hasattr({place}, {member!r})"
        if name == "TYPE_MATCH":
            return self._class(source, place)
        if name == "NOT_NONE_MATCH":
            return self.same, f"{place} is not None"
        if name == "NOT_PRESENT_IN_GENERIC_DICT":
            return self.same, f"{member!r} in {place}.__dict__"
        if name == "EMPTY_NN_MODULE_HOOKS_DICT":
            return self.first if torch._dynamo.config.skip_nnmodule_hook_guards else self.equal, f"len({place})"
        if name == "SEQUENCE_LENGTH":
            return self.equal, f"len({place})"
        value = self.values(source)
        if name in _KEYS and is_plain(list(value)):
            return self.equal, f"list({place})"
        if name in _VALUE and is_plain(value):
            return (self.equal, f"repr({place})") if isinstance(value, _CONTAINERS) else (self.same, place)
        if name in ("DICT_CONTAINS", "SET_CONTAINS") and is_plain(keywords["key"]):
            return self.same, f"{keywords['key']!r} in {place}"
        if name == "DUPLICATE_INPUT" and (other := self._within(keywords["source_b"])) is not None:
            return self.same, f"{place} is {other}"
        if name in _OBJECT or name == "DUPLICATE_INPUT":
            return self._object(value, place)
        raise Differs(f"{name} of {source.name} is not understood")

    def _class(self, source: Source, place: str) -> tuple[dict[str, None], str]:
        """Return an expression for the class of what is at a place; each parametrized module has one of its own."""
        value = self.values(source)
        if isinstance(value, nn.Module) and parametrize.is_parametrized(value):
            return self.equal, f"(*type({place}).__bases__, *{place}.parametrizations)"
        return self.same, f"type({place})"

    def _object(self, value: Any, place: str) -> tuple[dict[str, None], str]:
        """Return an expression that is the same only for the same object."""
        try:
            weakref.ref(value)
        except TypeError:
            if not is_plain(value):
                raise Differs(f"a {type(value).__name__} cannot be told from another") from None
            # A list of names that all layers share: its id is its own, as the layer that was traced keeps it alive.
            return self.equal, f"id({place})"
        return self.objects, place

    def _within(self, source: Any) -> str | None:
        """Return the variable of a source if it is one of the layer's."""
        return self._name(source) if is_under(source, self.layer) else None

    def _name(self, source: Any) -> str | None:
        """Return the variable that holds what is at a source; None for what all objects of a class share."""
        if source in self.names:
            return self.names[source]
        base, index = self._name(source.base), getattr(source, "index", None)
        if base is None:
            return None
        if isinstance(source, TypeSource):
            group, fact = self._class(source.base, base)
            group[fact] = None
            return None
        if isinstance(index, Source):
            key = self._within(index)
            if key is None:
                raise Differs(f"{source.name} is not understood")
            text = f"{base}[{key}]"
        else:
            text = source._name_template.format(base)
        if "L[" in text or "G[" in text or "___" in text:
            raise Differs(f"{source.name} is not understood")
        if text != base:
            self.lines.append(f"v{len(self.lines)} = {text}")
            text = f"v{len(self.lines) - 1}"
        self.names[source] = text
        return text


def _wrapped(layer: Any) -> tuple[Any]:
    return (layer,)


def alike(one: tuple[tuple, ...], other: tuple[tuple, ...]) -> bool:
    """Return whether two layers' facts are the same."""
    same, equal, objects, first = zip(one, other, strict=True)
    return (
        all(map(_are_same, *same))
        and equal[0] == equal[1]
        and all(map(operator.is_, *objects))
        and first[0] == first[1]
    )


def _are_same(one: Any, other: Any) -> bool:
    return one is other or (type(one) is type(other) and is_plain(one) and one == other)


def is_plain(value: Any) -> bool:
    """Return whether two of these are the same where they are equal."""
    if type(value) in (tuple, list, torch.Size, set, frozenset):
        return all(map(is_plain, value))
    return type(value) in _PLAIN and value == value


def is_under(source: Any, layer: Source) -> bool:
    """Return whether a source is the layer's, or of something in it."""
    while source is not None:
        if source == layer:
            return True
        source = getattr(source, "base", None)
    return False


def values_of(tx: Any) -> Callable[[Source], Any]:
    """Return a function that looks up the Python object at a source, each once."""
    root = tx.output.root_tx
    scope = {"G": root.f_globals, "L": root.f_locals}
    cache: Any = {}
    return lambda source: source.get_value(scope, {}, cache)


def moved_source(source: Source, places: dict[Source, Source]) -> Source:
    """Return where a layer has what another has at ``source``.  places: what is known of it, to which this adds."""
    if source in places:
        return places[source]
    changes = {
        item.name: moved
        for item in dataclasses.fields(source)
        if isinstance(value := getattr(source, item.name, None), Source)
        and (moved := moved_source(value, places)) is not value
    }
    result = dataclasses.replace(source, **changes) if changes else source
    return places.setdefault(source, result)
