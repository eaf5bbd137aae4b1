"""Weights come out bit for bit as PyTorch's own expression gives them, several of them and rows apart."""

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from strategies import DEVICES, DTYPES, Spec
from torch import Tensor

from fastft.kernels.dequantize_4bit import CODES, NESTED_BLOCK, dequantize_into, reference

COLUMNS = (64, 192, 2112, 100)  # one unit, a few, more than one program's, and none of the kernel's
FEATURES = ((5,), (7, 1, 3))


def statistics(blocks: int, nested: bool, device: str, seed: int) -> list[Tensor]:
    count = -(-blocks // NESTED_BLOCK) if nested else blocks
    absmax = [Spec((count,), torch.float32, seed=seed)]
    beside = [Spec((blocks,), torch.uint8, seed=seed), Spec((256,), torch.float32), Spec((), torch.float32, seed=seed)]
    return [one.build(device) for one in (*absmax, *(beside if nested else []))]


def weights(features: tuple[int, ...], columns: int, blocksize: int, nested: bool, device: str) -> Iterator[Any]:
    for seed, rows in enumerate(features):
        count = rows * columns
        packed = Spec((-(-count // 2),), torch.uint8, seed=seed).build(device)
        yield packed, statistics(-(-count // blocksize), nested, device, seed)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", COLUMNS)
@pytest.mark.parametrize("device", DEVICES)
def test_bits_are_those_of_the_reference(device: str, columns: int, dtype: torch.dtype) -> None:
    for features, blocksize, quant_type, nested in itertools.product(FEATURES, (64, 4096), CODES, (False, True)):
        given = list(weights(features, columns, blocksize, nested, device))
        framed = torch.full((sum(features) + 2, columns + 64), 7.0, dtype=dtype, device=device)
        out = framed[1:-1, :columns]
        dequantize_into(out, given, features, blocksize, quant_type)
        parts = [
            [packed, *found, *[None] * (4 - len(found)), rows]
            for (packed, found), rows in zip(given, features, strict=True)
        ]
        expected = [reference(*part, columns, blocksize, quant_type, dtype) for part in parts]
        assert torch.equal(out, torch.cat(expected))
        assert (framed[0] == 7.0).all()
        assert (framed[-1] == 7.0).all()
        assert (framed[:, columns:] == 7.0).all()
