"""Triton runs where it can, the reference elsewhere, and a kernel that cannot be compiled is said to be so, once."""

import logging
from types import SimpleNamespace

import pytest
import torch

from fastft.kernels.core import dispatch
from fastft.kernels.rms_norm import reference


@pytest.mark.parametrize(
    ("capability", "half", "bfloat"),
    [((7, 0), False, False), ((7, 5), True, False), ((8, 0), True, True), ((9, 0), True, True), ((12, 0), True, True)],
)
def test_dtypes_by_capability(
    capability: tuple[int, int], half: bool, bfloat: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(dispatch, "importlib", SimpleNamespace(util=SimpleNamespace(find_spec=lambda name: name)))
    found = dispatch.triton_dtypes.__wrapped__(torch.device("cuda", 0))
    assert (torch.float16 in found) == (torch.float32 in found) == half
    assert (torch.bfloat16 in found) == bfloat
    assert torch.float64 not in found


def test_nothing_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "importlib", SimpleNamespace(util=SimpleNamespace(find_spec=lambda name: None)))
    for device in ("cpu", "cuda:0"):
        assert dispatch.triton_dtypes.__wrapped__(torch.device(device)) == frozenset()


def test_what_triton_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "triton_dtypes", lambda device: frozenset({torch.float32}))
    x = torch.empty(2, 8)
    assert dispatch.takes(8, 8, [x, x])
    assert dispatch.takes(10**6, None, [x, x])
    assert not dispatch.takes(9, 8, [x, x])
    assert not dispatch.takes(8, 8, [x, x.double()])
    assert not dispatch.takes(8, 8, [x, x.to("meta")])


@pytest.fixture
def arguments(monkeypatch: pytest.MonkeyPatch) -> tuple:
    monkeypatch.setattr(dispatch, "triton_dtypes", lambda device: frozenset({torch.float32}))
    monkeypatch.setattr(dispatch, "interpreting", lambda: False)
    monkeypatch.setattr(dispatch, "_verdicts", {})
    return torch.randn(3, 8), torch.randn(8), 1e-6, 0.0, True


def test_a_kernel_that_does_not_compile_warns_once(arguments: tuple, caplog: pytest.LogCaptureFixture) -> None:
    triton = pytest.importorskip("triton")
    launches = []

    def launch(outputs: tuple, *arguments: object) -> None:
        launches.append(outputs)
        raise triton.OutOfResources(300_000, 232_448, "shared memory")

    outputs = torch.empty(3, 8), torch.empty(3)
    with caplog.at_level(logging.WARNING, logger="fastft"):
        for _ in range(2):
            dispatch.fill(outputs, arguments, lambda: launch, reference)
    expected = reference(*arguments)
    assert all(torch.equal(output, value) for output, value in zip(outputs, expected, strict=True))
    assert len(launches) == 1
    assert [record.name for record in caplog.records] == ["fastft"]
    assert "shared memory" in caplog.text


def test_one_call_across_devices_does_not_settle_the_next(arguments: tuple) -> None:
    launches = []

    def launch(outputs: tuple, *arguments: object) -> None:
        launches.append(outputs)

    x, weight, *others = arguments
    dispatch._verdicts.clear()
    outputs = torch.empty(3, 8), torch.empty(3)
    with pytest.raises(RuntimeError):  # the reference's own error: the weight lies elsewhere
        dispatch.fill(outputs, (x, weight.to("meta").requires_grad_(), *others), lambda: launch, _on_one_device)
    dispatch.fill(outputs, arguments, lambda: launch, _on_one_device)
    assert len(launches) == 1


def _on_one_device(x: torch.Tensor, weight: torch.Tensor, *others: object) -> tuple[torch.Tensor, ...]:
    if x.device != weight.device:
        raise RuntimeError("tensors on two devices")
    return reference(x, weight, *others)


def test_nothing_is_launched_for_no_elements(arguments: tuple) -> None:
    x, weight, *others = arguments
    outputs = torch.empty(0, 8), torch.empty(0)
    dispatch.fill(outputs, (x[:0], weight, *others), lambda: pytest.fail("launched"), reference)


def test_other_errors_are_not_hidden(arguments: tuple) -> None:
    def launch(outputs: tuple, *arguments: object) -> None:
        raise RuntimeError("an illegal memory access was encountered")

    with pytest.raises(RuntimeError, match="illegal"):
        dispatch.fill((torch.empty(3, 8), torch.empty(3)), arguments, lambda: launch, reference)


def test_a_launcher_writes_rows_side_by_side(arguments: tuple) -> None:
    def launch(outputs: tuple, *arguments: object) -> None:
        assert all(output.is_contiguous() for output in outputs)
        for output, value in zip(outputs, reference(*arguments), strict=True):
            output.copy_(value)

    columns = torch.empty(8, 3).t(), torch.empty(3)
    dispatch.fill(columns, arguments, lambda: launch, reference)
    assert torch.equal(columns[0], reference(*arguments)[0])
