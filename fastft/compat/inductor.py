"""Let Inductor's code call the launch plan of an op where it would call the op, and be right about memory reused."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import sympy
import torch
from torch._inductor import ir, lowering
from torch._inductor.codegen.common import DeferredLine
from torch._inductor.codegen.triton import TritonKernel
from torch._inductor.codegen.wrapper import PythonWrapperCodegen
from torch._inductor.virtualized import V
from torch._library.utils import get_layout_constraint_tag
from torch.utils import _pytree as pytree
from torch.utils._sympy.printers import PythonPrinter

from fastft.compat import symbolic
from fastft.compat.symbolic import Sizes
from fastft.compat.triton_launch import ALIGNMENT

log = logging.getLogger("fastft")


def call_plans(
    ops: Iterable[Any], planned_on: Callable[[torch.device], bool], ahead: Callable[[str, dict[str, int]], None]
) -> None:
    """Lower these operators to calls of their launch plans, on the devices that planned_on returns True for.

    ahead: is called with the arguments of launch_plan.plan, as text, and the named sizes that are expected first.
    """
    PlannedKernel.planned_on, PlannedKernel.ahead = staticmethod(planned_on), staticmethod(ahead)
    for op in ops:
        if op not in lowering.lowerings:
            tag = get_layout_constraint_tag(op, with_default=True)
            lowering.make_fallback(op, layout_constraint=lowering.tag_to_layout_constraint(tag), warn=False)
        handler: Any = functools.partial(_lower, op)
        handler._is_fallback_handler = True
        lowering.lowerings[op] = handler


@contextmanager
def expecting(sizes: Sizes) -> Iterator[None]:
    """Let kernels be compiled ahead for these sizes, where they are not those of the example."""
    before, PlannedKernel.expected = PlannedKernel.expected, sizes
    try:
        yield
    finally:
        PlannedKernel.expected = before


@functools.cache
def guard_stores_in_place() -> None:
    """Let Inductor's Triton kernels wait for all warps before they store over what a reduction reads.

    Where a tile has fewer elements than the program has threads, several warps hold each element.  One of them stores
    it, while another may not have loaded it yet and then sums up what was stored.  Inductor waits only where the
    element is broadcast (triton-lang/triton#1615).
    """
    store = TritonKernel.store

    @functools.wraps(store)
    def guarded(self: Any, name: str, *args: Any, **kwargs: Any) -> None:
        if self.inside_reduction and name in self.args.inplace_buffers:
            self.stores.writeline(DeferredLine(name, "tl.debug_barrier()"))
        store(self, name, *args, **kwargs)

    TritonKernel.store = guarded  # type: ignore[method-assign]


def _lower(op: Any, *args: Any, **kwargs: Any) -> Any:
    wrap = lambda value: ir.TensorBox.create(value) if isinstance(value, ir.IRNode) else value  # noqa: E731
    return pytree.tree_map(wrap, PlannedKernel.create(op, *args, **kwargs))


class PlannedKernel(ir.FallbackKernel):
    """A call of an operator that becomes a call of its launch plan once the layouts of all buffers are known."""

    planned_on: Callable[[torch.device], bool]
    ahead: Callable[[str, dict[str, int]], None]
    expected: ClassVar[Sizes] = {}

    def codegen(self, wrapper: PythonWrapperCodegen) -> None:
        """Write the call, and the plan into the code's header."""
        if type(wrapper) is PythonWrapperCodegen and self.planned_on(self.inputs[0].get_device()):  # type: ignore
            try:
                described, hints = self._described()
            except Exception as error:  # an argument of a kind that no op has now
                log.debug("%s is called without a plan: %s", self.op_overload, error)
            else:
                self._call_plan(wrapper, described, hints)
        super().codegen(wrapper)

    def _call_plan(self, wrapper: PythonWrapperCodegen, described: str, hints: dict[str, int] | None) -> None:
        wrapper.header.splice(f"""
            from fastft.kernels.core.launch_plan import Described, Named, plan
            {self._plan_name} = plan({described})
        """)
        self.python_kernel_name = self._plan_name
        if hints is not None:
            self.ahead(described, hints)

    def codegen_args(self) -> list[str]:
        """Write all arguments in their places: a plan takes none by name."""
        args = super().codegen_args()
        if self.python_kernel_name != self._plan_name:
            return args
        return [*args, *map(V.graph.wrapper_code.val_to_arg_str, self._rest(args, self.kwargs))]

    def codegen_kwargs(self, skip_out: bool = False) -> list[str]:
        """Write the arguments that are given by name."""
        return [] if self.python_kernel_name == self._plan_name else super().codegen_kwargs(skip_out)

    def _rest(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any]:
        """List what follows the arguments that are given by place: what is given by name, and defaults."""
        arguments = self.op_overload._schema.arguments[len(args) :]  # type: ignore[union-attr]
        return [kwargs.get(argument.name, argument.default_value) for argument in arguments]

    @property
    def _plan_name(self) -> str:
        return f"plan_of_{self.get_name()}"

    def _described(self) -> tuple[str, dict[str, int] | None]:
        """Write the operator's name and a description of each argument, as launch_plan.plan takes them.

        Also returns the named sizes that are expected, None where they are not known.
        """
        args, kwargs = self.unflatten_args(self.inputs, self.constant_args)
        every = [*args, *self._rest(args, kwargs)]
        tensors = [value for value in pytree.tree_leaves(every) if isinstance(value, ir.IRNode)]
        sizes = _Sizes(tensors)

        def describe(value: Any) -> str:
            if isinstance(value, ir.IRNode):
                return sizes.describe(value)
            if isinstance(value, (list, tuple)):
                return f"[{', '.join(map(describe, value))}]"
            number = value.node.expr if isinstance(value, torch.SymInt) else value
            return sizes.describe_number(number) if isinstance(number, sympy.Expr) else repr(value)

        return ", ".join([repr(self.op_overload._schema.name), *map(describe, every)]), sizes.hints()  # type: ignore[union-attr]


class _Sizes:
    """Names for the sizes of some tensors: a symbol that is a size by itself, and else a whole expression, has one."""

    def __init__(self, tensors: Iterable[Any]) -> None:
        self.names: dict[Any, str] = {}
        for size in (size for tensor in tensors for size in tensor.get_size()):
            if isinstance(size, sympy.Symbol):
                self._name(size)

    def describe(self, tensor: Any) -> str:
        """Describe a tensor."""
        shape, stride = (tuple(map(self._size, sizes)) for sizes in (tensor.get_size(), tensor.get_stride()))
        given = f"{tensor.get_dtype()}, {str(tensor.get_device())!r}, {shape!r}, {stride!r}"
        return f"Described({given}, {_is_aligned(tensor)})"

    def describe_number(self, number: sympy.Expr) -> str:
        """Describe an integer argument: one that may change has a name of its own."""
        return str(int(number)) if number.is_Integer else f"Named({self._name(number)!r})"

    def hints(self) -> dict[str, int] | None:
        """Return the named sizes that are expected, or in the example; None if one is not known."""
        sizevars = V.graph.sizevars
        known = dict(symbolic.hints_in(sizevars.shape_env))
        for symbol in {symbol for expression in self.names for symbol in expression.free_symbols}:
            for other, size in PlannedKernel.expected.items():
                if sizevars.statically_known_equals(symbol, other):
                    known[symbol] = sympy.Integer(size)
        values = {name: expression.xreplace(known) for expression, name in self.names.items()}
        return {n: int(value) for n, value in values.items()} if all(v.is_Integer for v in values.values()) else None

    def _size(self, size: Any) -> int | str:
        expression = sympy.sympify(size)
        if expression.is_Integer:
            return int(expression)
        if not expression.free_symbols <= set(self.names):
            return self._name(expression)
        renamed = {symbol: sympy.Symbol(name, integer=True) for symbol, name in self.names.items()}
        return PythonPrinter().doprint(expression.xreplace(renamed))

    def _name(self, expression: Any) -> str:
        return self.names.setdefault(expression, f"n{len(self.names)}")


def _is_aligned(tensor: Any) -> bool:
    """Return whether Inductor makes sure that a tensor's address is a multiple of ALIGNMENT: buffers and inputs."""
    offset = tensor.get_layout().offset * tensor.get_dtype().itemsize
    aligned = V.graph.sizevars.statically_known_multiple_of(sympy.sympify(offset), ALIGNMENT)
    return aligned and tensor.get_name() not in V.graph.unaligned_buffers
