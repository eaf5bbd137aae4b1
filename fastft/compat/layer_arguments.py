"""What a layer is called with and what it returns, as Dynamo has it: compared, followed, made again."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.variables.constant import ConstantVariable
from torch._dynamo.variables.dicts import ConstDictVariable
from torch._dynamo.variables.lazy import LazyVariableTracker
from torch._dynamo.variables.lists import TupleVariable
from torch._dynamo.variables.tensor import SymNodeVariable, TensorVariable
from torch.fx import Node

from fastft.compat.fake_tensors import computing_in, empty_like_fake, storage_key, tensors_in, value_of, written_to
from fastft.compat.layer_facts import Differs


def kinds_of(tensors: Sequence[Any]) -> list[tuple]:
    """Return what a trace depends on in tensors, and which of them are the same."""
    first: dict[int, int] = {}
    return [(*_kind(tensor), first.setdefault(id(tensor), place)) for place, tensor in enumerate(tensors)]


def _kind(tensor: Any) -> tuple:
    if not isinstance(tensor, Tensor):
        raise Differs("what was a tensor is none")
    # Dynamo itself says of a module's tensors that they stay in place, once it has met them.
    marks = [
        (name, value) for name, value in vars(tensor).items() if name.startswith("_dynamo") and "static" not in name
    ]
    geometry = (tensor.shape, tensor.stride(), tensor.storage_offset()) if tensor.layout is torch.strided else ()
    return (
        type(tensor), tensor.dtype, tensor.device, tensor.layout, geometry, tensor.requires_grad, tensor.is_leaf,
        torch._C._dispatch_keys(tensor), marks,
    )  # fmt: skip


def flatten(args: Sequence[Any], kwargs: dict[str, Any]) -> dict[tuple, Any]:
    """Return a layer's arguments by their place, with what is in tuples and dicts by its place there."""
    pairs: list[tuple[tuple, Any]] = [((place,), value) for place, value in enumerate(args)]
    pairs += [((name,), value) for name, value in kwargs.items()]
    return dict(leaf for path, value in pairs for leaf in _leaves(path, value))


def _leaves(path: tuple, variable: Any) -> Iterator[tuple[tuple, Any]]:
    if isinstance(variable, LazyVariableTracker) and variable.is_realized():
        variable = variable.realize()
    if isinstance(variable, TupleVariable):
        yield (*path, "tuple", len(variable.items)), None
        for place, item in enumerate(variable.items):
            yield from _leaves((*path, place), item)
    elif type(variable) is ConstDictVariable and all(isinstance(key.vt, ConstantVariable) for key in variable.items):
        yield (*path, "dict", len(variable.items)), None
        for key, item in variable.items.items():
            yield from _leaves((*path, key.vt.value), item)
    else:
        yield path, variable


def check_argument(path: tuple, old: Any, new: Any, moved: dict[Node, Node], *, gradients: bool) -> None:
    """Check that one layer's argument may take the place of another's.  Raises Differs.

    gradients: see Trace.fit.
    """
    if isinstance(old, LazyVariableTracker):
        if old.is_realized():
            old = old.realize()
        elif old is new or (isinstance(new, LazyVariableTracker) and old.source == new.source):
            return
    if isinstance(new, LazyVariableTracker):
        new = new.realize()
    if old is None and new is None:
        return
    if isinstance(old, (TensorVariable, SymNodeVariable)) and type(old) is type(new):
        nodes = old.as_proxy().node, new.as_proxy().node
        if moved.setdefault(nodes[0], nodes[1]) is not nodes[1]:
            raise Differs(f"argument {path} is another at each place")
        kinds = [kind_of_fake(value_of(node), gradients=gradients) for node in nodes]
        if old is not new and kinds[0] != kinds[1]:
            raise Differs(f"argument {path} has another shape, or another need for a gradient")
        return
    if isinstance(old, ConstantVariable) and isinstance(new, ConstantVariable):
        if type(old.value) is type(new.value) and (old.value is new.value or old.value == new.value):
            return
    elif type(old) is type(new) and getattr(old, "source", None) is not None and old.source == new.source:
        return
    raise Differs(f"argument {path} is another {type(new).__name__}")


def kind_of_fake(value: Any, *, gradients: bool = True) -> Any:
    """Return what a trace depends on in a fake tensor or size; gradients: whether it needs one counts."""
    if not isinstance(value, Tensor):
        return type(value), repr(value)
    geometry = repr((tuple(value.shape), tuple(value.stride()), value.storage_offset()))
    return (
        type(value), value.dtype, value.device, value.layout, geometry, value.is_conj(), value.is_neg(),
        value._version, *((value.requires_grad, value.is_leaf) if gradients else ()),
    )  # fmt: skip


def tensors_of(result: Any) -> Iterable[Node]:
    """List the nodes of a result.  Raises Differs for one that is more than tensors, tuples and constants."""
    if type(result) is TensorVariable:
        return [result.as_proxy().node]
    if type(result) is TupleVariable:
        return [node for item in result.items for node in tensors_of(item)]
    if isinstance(result, ConstantVariable):
        return []
    raise Differs(f"it returns a {type(result).__name__}")


def check_memory(read: Iterable[Node], results: Sequence[Node]) -> None:
    """Check that a layer writes to nothing it reads, and returns tensors of its own.  Raises Differs.

    What is made of its results for another layer shares no storage with anything, and counts no writes.
    """
    given = [tensor for node in read for tensor in tensors_in(value_of(node))]
    if any(map(written_to, given)):
        raise Differs("something that it reads is written to in place")
    keys = [storage_key(tensor) for node in results for tensor in tensors_in(value_of(node))]
    if len(set(keys)) < len(keys) or not {storage_key(tensor) for tensor in given}.isdisjoint(keys):
        raise Differs("a result is a view of something else")


def like(result: Any, made: dict[Node, Any]) -> Any:
    """Return a layer's result with other tensors in it."""
    if isinstance(result, TupleVariable):
        return TupleVariable([like(item, made) for item in result.items])
    return made[result.as_proxy().node] if isinstance(result, TensorVariable) else result


def fresh(fake: Tensor, mode: Any) -> Tensor:
    """Return a fake tensor like this one, in storage of its own."""
    empty = empty_like_fake(fake, mode)
    with computing_in(mode), torch.enable_grad():
        if isinstance(fake, nn.Parameter):
            return nn.Parameter(empty, requires_grad=fake.requires_grad)
        return empty.clone() if fake.requires_grad and not fake.is_leaf else empty


def state_of(tx: Any) -> tuple:
    """Return what a trace depends on beside arguments and guards: modes, and which objects it has changed so far."""
    effects, output = tx.output.side_effects, tx.output
    changed = frozenset(
        id(variable) for variable in effects.id_to_variable.values()
        if getattr(variable, "source", None) is not None and variable.mutation_type is not None
        and effects.is_modified(variable)
    )  # fmt: skip
    stored = tuple(
        (id(item), *map(id, names.values())) for item, names in effects.store_attr_mutations.items()
        if getattr(item, "source", None) is not None
    )  # fmt: skip
    autocast = [(torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in ("cpu", "cuda")]
    modes = torch.is_grad_enabled(), torch.is_inference_mode_enabled(), *autocast, torch.is_autocast_cache_enabled()
    counts = len(effects.tensor_hooks), len(effects.save_for_backward), len(getattr(output, "random_calls", ()))
    return modes, changed, stored, counts
