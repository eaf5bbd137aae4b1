"""Break the package in one place after another and see whether its tests notice: python tests/mutants.py [--engine]

A mutant of a kernel is the package with one expression of the kernel's source changed, in three ways: a sign, a mask
left out, a reduction over the wrong axis (an index, where a kernel reduces nothing).  The tests of the ops run in
Triton's interpreter.  What plain PyTorch does around kernels is broken too, for tests of its own.  The engine's mutants
are in engine_mutants.py.  Exit status 1 if a mutant survives.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.markup import escape
from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))
import checkout  # noqa: E402

SIGN, MASK, AXIS, INDEX = "wrong sign", "dropped mask", "wrong reduction axis", "wrong index"
SCALE, SIZE = "dropped scale", "wrong size"
TESTS = "test_nothing or test_agrees or test_every_element or test_inputs"


class Mutant(NamedTuple):
    """One change: in the function where of kernels/<file>_triton.py, which ops' kernel it is part of, old becomes new.

    Or of <folder>/<file>.py, where no file has its kernels.
    """

    kernel: str  # file.kernel; of the engine, what it does
    kind: str
    where: str  # file.function
    old: str
    new: str
    tests: str = ""  # in test_<tests>.py; else those of the op in test_ops.py
    folder: str = "kernels"


def over_all_rows(inner: str, rows: str) -> str:
    """A sum over rows where one of each row belongs, in the same shape."""
    return f"(tl.sum(tl.sum({inner}, 1), 0) + 0.0 * {rows})"


MASKED_ALIKE = (
    "rms_norm.forward_kernel", "rms_norm.backward_kernel", "rms_norm.backward_weight_kernel", "add_rms_norm.add_kernel",
    "layer_norm.backward_kernel", "layer_norm.backward_weight_kernel",
)  # fmt: skip
MUTANTS = (
    *(Mutant(kernel, MASK, kernel, "(d < D)[None, :]", "(d < BLOCK_D)[None, :]") for kernel in MASKED_ALIKE),
    *(
        Mutant(
            f"{norm}.backward_kernel", AXIS, f"{norm}.input_gradient", "tl.sum(dunit * unit, 1)",
            over_all_rows("dunit * unit", "rstd"),
        )
        for norm in ("rms_norm", "layer_norm")
    ),
    Mutant("rms_norm.forward_kernel", SIGN, "rms_norm.normalized", "(offset + weight)", "(offset - weight)"),
    Mutant("rms_norm.forward_kernel", AXIS, "rms_norm.normalized", "tl.sum(x * x, 1)", over_all_rows("x * x", "tl.sum(x, 1)")),
    Mutant("rms_norm.backward_kernel", SIGN, "rms_norm.input_gradient", "(dunit - unit", "(dunit + unit"),
    Mutant("rms_norm.backward_weight_kernel", SIGN, "rms_norm.backward_weight_kernel", "dweight += dy", "dweight -= dy"),
    Mutant(
        "rms_norm.backward_weight_kernel", AXIS, "rms_norm.backward_weight_kernel", "tl.sum(dweight, 0)",
        "tl.sum(tl.sum(dweight, 1), 0) + 0.0 * d",
    ),
    Mutant("add_rms_norm.add_kernel", SIGN, "add_rms_norm.add_kernel", "total += load", "total -= load"),
    Mutant("add_rms_norm.add_kernel", AXIS, "rms_norm.normalized", "tl.sum(x * x, 1)", over_all_rows("x * x", "tl.sum(x, 1)")),
    Mutant("layer_norm.forward_kernel", SIGN, "layer_norm.forward_kernel", "x - mean", "x + mean"),
    Mutant("layer_norm.forward_kernel", MASK, "layer_norm.forward_kernel", "tl.where(mask, x - mean[:, None], 0.0)", "x - mean[:, None]"),
    Mutant("layer_norm.forward_kernel", AXIS, "layer_norm.forward_kernel", "tl.sum(x, 1) /", over_all_rows("x", "tl.sum(x, 1)") + " /"),
    Mutant("layer_norm.backward_kernel", SIGN, "layer_norm.input_gradient", "(dunit - projected)", "(dunit + projected)"),
    Mutant("layer_norm.backward_weight_kernel", SIGN, "layer_norm.backward_weight_kernel", "dbias += dy", "dbias -= dy"),
    Mutant(
        "layer_norm.backward_weight_kernel", AXIS, "layer_norm.backward_weight_kernel", "tl.sum(dbias, 0)",
        "tl.sum(tl.sum(dbias, 1), 0) + 0.0 * d",
    ),
    Mutant("rotary.rotary_kernel", SIGN, "rotary.rotated", "a * cos_a - b", "a * cos_a + b"),
    Mutant("rotary.rotary_kernel", MASK, "rotary.store_pairs", "(i < half)[None, :]", "(i >= 0)[None, :]"),
    Mutant("rotary.rotary_kernel", INDEX, "rotary.rotated_by_angles", "n2, cos_strides)", "n2, operand[7])"),
    Mutant("norm_rotary.forward_kernel", SIGN, "norm_rotary.scaled", "(offset + weight)", "(offset - weight)"),
    Mutant("norm_rotary.forward_kernel", MASK, "norm_rotary.forward_rows", "row < n_rows", "row >= 0"),
    Mutant("norm_rotary.forward_kernel", AXIS, "norm_rotary.forward_rows", "tl.sum(b * b, 1)", over_all_rows("b * b", "tl.sum(b, 1)")),
    Mutant("norm_rotary.backward_kernel", SIGN, "norm_rotary.backward_rows", "(dunit_a - unit_a", "(dunit_a + unit_a"),
    Mutant("norm_rotary.backward_kernel", MASK, "norm_rotary.backward_rows", "row < n_rows", "row >= 0"),
    Mutant("norm_rotary.backward_kernel", AXIS, "norm_rotary.backward_rows", "tl.sum(sum_b, 0)", "(tl.sum(tl.sum(sum_b, 1), 0) + 0.0 * tl.sum(sum_b, 0))"),
    Mutant("glu.forward_kernel", SIGN, "glu.activation", "x / (1.0 + tl.exp(-x))", "x / (1.0 + tl.exp(x))"),
    Mutant("glu.forward_kernel", MASK, "glu.tile_of", "(d < D)[None, :]", "(d >= 0)[None, :]"),
    Mutant("glu.forward_kernel", INDEX, "glu.forward_kernel", "n2, up_s0, up_s1, up_s2), d", "n2, gate_s0, gate_s1, gate_s2), d"),
    Mutant("glu.backward_kernel", SIGN, "glu.activation_and_slope", "s + x * (s * rest)", "s - x * (s * rest)"),
    Mutant("glu.backward_kernel", MASK, "glu.tile_of", "(row < n_rows)[:, None]", "(row >= 0)[:, None]"),
    Mutant("glu.backward_kernel", INDEX, "glu.tile_of", "% pieces * BLOCK_D", "% pieces * ROWS"),
    Mutant("dequantize_4bit.blocks_kernel", SIGN, "dequantize_4bit.blocks_kernel", "upper * absmax", "-upper * absmax"),
    Mutant("dequantize_4bit.blocks_kernel", MASK, "dequantize_4bit.blocks_kernel", "mask = unit < row_units", "mask = unit >= 0"),
    Mutant("dequantize_4bit.blocks_kernel", INDEX, "dequantize_4bit.blocks_kernel", "(before + unit) //", "unit //"),
    Mutant("dequantize_4bit.elements_kernel", SIGN, "dequantize_4bit.elements_kernel", "nibble) * absmax", "nibble) * -absmax"),
    Mutant("dequantize_4bit.elements_kernel", MASK, "dequantize_4bit.elements_kernel", "element < n_elements", "element >= 0"),
    Mutant("dequantize_4bit.elements_kernel", INDEX, "dequantize_4bit.elements_kernel", "byte >> 4, byte & 15", "byte & 15, byte >> 4"),
    Mutant("dora_weight_norm.plain_kernel", SIGN, "dora_weight_norm.plain_kernel", "* scale + weight", "* scale - weight"),
    Mutant("dora_weight_norm.plain_kernel", MASK, "dora_weight_norm.plain_kernel", "& (k < K)[None, :]", "& (k >= 0)[None, :]"),
    Mutant("dora_weight_norm.plain_kernel", AXIS, "dora_weight_norm.plain_kernel", "tl.sum(value * value, 1)", over_all_rows("value * value", "n")),
    Mutant("dora_weight_norm.four_bit_kernel", SIGN, "dora_weight_norm.four_bit_kernel", "* scale + weight", "* scale - weight"),
    Mutant("dora_weight_norm.four_bit_kernel", MASK, "dora_weight_norm.four_bit_kernel", "tl.sqrt(total), mask=n < N", "tl.sqrt(total), mask=n >= 0"),
    Mutant("dora_weight_norm.four_bit_kernel", INDEX, "dora_weight_norm.four_bit_kernel", "before // units_a_block", "before"),
    Mutant("lora_linear.place_kernel", MASK, "lora_linear.place_kernel", "element % columns, element < n_elements", "element % columns, element >= 0"),
    Mutant("lora_linear.place_kernel", INDEX, "lora_linear.place_kernel", "column - first_column", "column"),
    Mutant("lora_linear.collect_kernel", MASK, "lora_linear.collect_kernel", "mask = element < n_elements", "mask = element >= 0"),
    Mutant("lora_linear.collect_kernel", INDEX, "lora_linear.collect_kernel", "first_column + element % columns", "element % columns"),
    Mutant("lora_linear.place_kernel", SIGN, "lora_linear.place_kernel", "* tl.cast(scale", "* -tl.cast(scale"),
    Mutant("lora_linear.collect_kernel", SIGN, "lora_linear.collect_kernel", "total += tl.load", "total -= tl.load"),
    Mutant("lora_linear.project_kernel", SIGN, "lora_linear.project_kernel", "add_product(x, term,", "add_product(x, -term,"),
    Mutant("lora_linear.project_kernel", MASK, "lora_linear.project_kernel", "mask = (row < M)[:, None] & (r < R)", "mask = (row < M)[:, None] & (r >= 0)"),
    Mutant("lora_linear.project_kernel", INDEX, "lora_linear.project_kernel", "(r * terms_stride_r)", "(r * terms_stride_k)"),
    Mutant("lora_linear.finish_kernel", SIGN, "lora_linear.finish_kernel", "total += tl.load", "total -= tl.load"),
    Mutant("lora_linear.finish_kernel", MASK, "lora_linear.finish_kernel", "mask = (row < M) & (r < R)", "mask = row < M"),
    Mutant("lora_linear.finish_kernel", INDEX, "lora_linear.finish_kernel", "row * R + r", "row * width + r"),
    Mutant("lora_linear.outer_kernel", SIGN, "lora_linear.outer_kernel", "add_product(tl.trans(x), s,", "add_product(tl.trans(x), -s,"),
    Mutant("lora_linear.outer_kernel", MASK, "lora_linear.outer_kernel", "last = min(first + rows, M)", "last = first + rows"),
    Mutant("lora_linear.outer_kernel", INDEX, "lora_linear.outer_kernel", "(r * partial_stride_r)", "(r * partial_stride_k)"),
    Mutant("lora_linear_backward.both_kernel", SIGN, "lora_linear_backward.both_kernel", "tl.dot(x, p)", "tl.dot(x, -p)"),
    Mutant("lora_linear_backward.both_kernel", MASK, "lora_linear_backward.both_kernel", "min((split + 1) * rows, M)", "(split + 1) * rows"),
    Mutant("lora_linear_backward.both_kernel", INDEX, "lora_linear_backward.both_kernel", "(block - first_block) *", "block *"),
    Mutant("lora_linear_backward.sum_kernel", SIGN, "lora_linear_backward.sum_kernel", "total += tl.sum(", "total -= tl.sum("),
    Mutant("lora_linear_backward.sum_kernel", MASK, "lora_linear_backward.sum_kernel", "(block < end)[:, None, None] & mask[None]", "mask[None]"),
    Mutant("lora_linear_backward.sum_kernel", INDEX, "lora_linear_backward.sum_kernel", "long_row * s_stride + rank + r", "long_row * s_stride + r"),
    Mutant("expert_order.count_kernel", SIGN, "expert_order.load_experts", "(found >= 0)", "(found > 0)", "experts"),
    Mutant("expert_order.count_kernel", MASK, "expert_order.load_experts", "tl.where(slot < slots, expert", "tl.where(slot >= 0, expert", "experts"),
    Mutant("expert_order.count_kernel", INDEX, "expert_order.count_kernel", "counts_ptr + tl.program_id(0) *", "counts_ptr + 0 *", "experts"),
    Mutant("expert_order.sum_kernel", SIGN, "expert_order.sum_kernel", "before = ends - total", "before = ends + total", "experts"),
    Mutant("expert_order.sum_kernel", AXIS, "expert_order.sum_kernel", "tl.cumsum(counts, 0) - counts", "tl.cumsum(counts, 1) - counts", "experts"),
    Mutant("expert_order.sum_kernel", INDEX, "expert_order.sum_kernel", "before[None, :] + earlier", "earlier", "experts"),
    Mutant("expert_order.place_kernel", SIGN, "expert_order.place_kernel", "row += tl.sum(", "row -= tl.sum(", "experts"),
    Mutant("expert_order.place_kernel", MASK, "expert_order.place_kernel", "(other[None, :] < slot[:, None])", "(other[None, :] >= 0)", "experts"),
    Mutant("expert_order.place_kernel", INDEX, "expert_order.place_kernel", "tl.store(place_ptr + slot, row", "tl.store(place_ptr + row, slot", "experts"),
    Mutant("expert_linear.product_kernel", SIGN, "expert_linear.product_kernel", "add_product(x, weight, total)", "add_product(x, -weight, total)", "experts"),
    Mutant("expert_linear.product_kernel", MASK, "expert_linear.product_kernel", "i_mask = i < own_end", "i_mask = i < rows", "experts"),
    Mutant("expert_linear.product_kernel", INDEX, "expert_linear.product_kernel", "n_first = tile % across", "n_first = tile // across", "experts"),
    Mutant("expert_linear.outer_kernel", SIGN, "expert_linear.outer_kernel", "total * scale", "total * -scale", "experts"),
    Mutant("expert_linear.outer_kernel", MASK, "expert_linear.outer_kernel", "i_mask = i < end", "i_mask = i < rows", "experts"),
    Mutant("expert_linear.outer_kernel", INDEX, "expert_linear.outer_kernel", "n = tile % across * BLOCK_N", "n = tile // across * BLOCK_N", "experts"),
    Mutant("key_copies.sum_kernel", SIGN, "key_copies.sum_kernel", "total += tl.cast(", "total -= tl.cast(", "key_copies"),
    Mutant("key_copies.sum_kernel", MASK, "key_copies.sum_kernel", "there = first + step < last", "there = first + step < last + 1", "key_copies"),
    Mutant("key_copies.sum_kernel", INDEX, "key_copies.sum_kernel", "tl.load(order_ptr + first + step, mask=there, other=0)", "(first + step)", "key_copies"),
    Mutant("expert_rows.combine_kernel", SIGN, "expert_rows.combine_kernel", "total += values", "total -= values", "experts"),
    Mutant("expert_rows.combine_kernel", SCALE, "expert_rows.combine_kernel", "if WEIGHTED:", "if WEIGHTED and top_k < 0:", "experts"),
    Mutant("expert_rows.combine_kernel", INDEX, "expert_rows.combine_kernel", "row * rows_stride", "slot * rows_stride", "experts"),
    Mutant("expert_rows.spread_kernel", SIGN, "expert_rows.spread_kernel", "+ n, values, mask", "+ n, -values, mask", "experts"),
    Mutant("expert_rows.spread_kernel", SCALE, "expert_rows.spread_kernel", "if WEIGHTED:", "if WEIGHTED and top_k < 0:", "experts"),
    Mutant("expert_rows.spread_kernel", INDEX, "expert_rows.spread_kernel", "slot // top_k, tl.int64", "slot, tl.int64", "experts"),
    Mutant("expert_rows.weigh_kernel", SIGN, "expert_rows.weigh_kernel", "dot += row", "dot -= row", "experts"),
    Mutant("expert_rows.weigh_kernel", SCALE, "expert_rows.weigh_kernel", "tl.cast(row * weight, rows", "tl.cast(row, rows", "experts"),
    Mutant("expert_rows.weigh_kernel", INDEX, "expert_rows.weigh_kernel", "tl.store(dots_ptr + slot", "tl.store(dots_ptr + i", "experts"),
    Mutant("linear_kl_div.rows_kernel", SIGN, "linear_kl_div.rows_kernel", "* pull - tl.exp(t)", "* pull + tl.exp(t)"),
    Mutant("linear_kl_div.rows_kernel", MASK, "linear_kl_div.rows_kernel", "y = tl.where(column < columns, y, -", "y = tl.where(column >= 0, y, -"),
    Mutant("linear_kl_div.rows_kernel", INDEX, "linear_kl_div.rows_kernel", "target_ptr += row * target_stride", "target_ptr += row * 0"),
    Mutant("linear_cross_entropy.rows_kernel", SIGN, "linear_cross_entropy.rows_kernel", "everywhere - tl.where(", "everywhere + tl.where("),
    Mutant("linear_cross_entropy.rows_kernel", MASK, "linear_cross_entropy.rows_kernel", "y = tl.where(column < columns, y, -", "y = tl.where(column >= 0, y, -"),
    Mutant("linear_cross_entropy.rows_kernel", INDEX, "linear_cross_entropy.rows_kernel", "upstream_ptr + row * upstream_stride)", "upstream_ptr)"),
    Mutant("linear_token_statistics.rows_kernel", SIGN, "linear_token_statistics.rows_kernel", "(of_lse - of_label - of", "(of_lse + of_label - of"),
    Mutant("linear_token_statistics.rows_kernel", MASK, "linear_token_statistics.rows_kernel", "y = tl.where(column < columns, y, -", "y = tl.where(column >= 0, y, -"),
    Mutant("linear_token_statistics.rows_kernel", INDEX, "linear_token_statistics.rows_kernel", "upstream_ptr += row", "upstream_ptr += 0"),
    Mutant("attention.forward_kernel", SIGN, "attention.forward_tiles", "tl.exp2(top - base)", "tl.exp2(base - top)", "attention"),
    Mutant("attention.forward_kernel", SCALE, "attention.forward_kernel", "tl.log2(total)) * LN2", "tl.log2(total))", "attention"),
    Mutant("attention.forward_kernel", INDEX, "attention.forward_kernel", "tl.cast(h // GROUP, tl.int64)", "tl.cast(h % GROUP, tl.int64)", "attention"),
    Mutant("attention_backward.query_kernel", SIGN, "attention_backward.query_tiles", "dp - delta[:, None]", "dp + delta[:, None]", "attention"),
    Mutant("attention_backward.query_kernel", SCALE, "attention_backward.query_kernel", "tl.cast(dq * scale,", "tl.cast(dq,", "attention"),
    Mutant("attention_backward.query_kernel", INDEX, "attention_backward.query_kernel", "tl.cast(h // GROUP, tl.int64)", "tl.cast(h % GROUP, tl.int64)", "attention"),
    Mutant("attention_backward.key_kernel", SIGN, "attention_backward.key_tiles", "dp - delta[None, :]", "dp + delta[None, :]", "attention"),
    Mutant("attention_backward.key_kernel", SCALE, "attention_backward.key_kernel", "tl.cast(dk * scale,", "tl.cast(dk,", "attention"),
    Mutant("attention_backward.key_kernel", SIZE, "attention_backward.key_kernel", "(g + 1) * GROUP", "g * GROUP + 1", "attention"),
    Mutant("attention_mask_backward.mask_kernel", SIGN, "attention_mask_backward.mask_kernel", "dp - delta[:, None]", "dp + delta[:, None]"),
    Mutant("attention_mask_backward.mask_kernel", INDEX, "attention_mask_backward.mask_kernel", "part // MASK_H + number // HEADS", "part // MASK_H + number % HEADS"),
    Mutant("attention_mask_backward.mask_kernel", MASK, "attention_mask_backward.mask_kernel", "tl.where(alike[:, None], 0.0, p * (dp - delta[:, None]))", "p * (dp - delta[:, None])"),
)  # fmt: skip
PLAIN = (
    Mutant("rotary.deinterleaved", INDEX, "rotary.rotate_rows", "rows, a, b, TO_PAIRS", "rows, a, b, FROM_PAIRS", "algebra"),
    Mutant("lora_products.place", MASK, "lora_linear.place_kernel", "number < terms", "number <= terms", "lora_products"),
    Mutant("lora_products.collect", INDEX, "lora_linear.collect_kernel", "which < FIRST", "which <= FIRST", "lora_products"),
    Mutant("expert_order.sums", INDEX, "expert_order.sum_kernel", "before += tl.sum(counts, 0)", "before += 0", "experts"),
    Mutant("expert_linear.adapters", SCALE, "expert_linear.scaled", "tl.cast(tile, tl.float32) * scale, tile", "tl.cast(tile, tl.float32), tile", "experts"),
    Mutant("expert_linear.none", MASK, "expert_linear.product_kernel", "tl.where(expert < EXPERTS, K, 0)", "tl.where(expert <= EXPERTS, K, 0)", "experts"),
    Mutant("expert_linear.stored", MASK, "expert_linear.product_kernel", "TILED_OUT and first + BLOCK_M <= own_end", "TILED_OUT and first < own_end", "experts"),
    Mutant("expert_linear.weighted", SCALE, "expert_linear.outer_kernel", "scaled(left, weights[:, None])", "left", "experts"),
    Mutant("expert_plan.forward", SCALE, "expert_plan.forward", "else call.scale", "else 1.0", "experts"),
    Mutant("expert_plan.backward", SCALE, "expert_plan.backward", "call.combines, scale=call.scale)", "call.combines, scale=1.0)", "experts"),
    Mutant("expert_plan.backward", INDEX, "expert_plan.backward", "x, *where, gathers=call.gathers", "x, *where, gathers=call.combines", "experts"),
    Mutant("expert_plan.backward", SIGN, "expert_plan.backward", "scale=call.scale, gathers", "scale=-call.scale, gathers", "experts"),
    Mutant("expert_plan.dots", INDEX, "expert_plan._backward_of_rows", "call.bias is not None:", "call.bias is not None and call.gathers:", "experts"),
    Mutant("expert_linear.rows", MASK, "expert_call.is_readable", "rows.stride(-1) == 1", "rows.stride(-1) >= 1"),
    Mutant("expert_call.sorted", SIZE, "expert_call.sorted_bytes", "self.features if self.combines", "0 if self.combines", "experts"),
    Mutant("expert_call.copied", SIZE, "expert_call.copied_bytes", "(*rows, *factors)", "rows", "experts"),
    Mutant("linear_token_statistics.first", MASK, "linear_token_statistics.rows_kernel", "tl.max(before) < target", "tl.max(before) <= target", "linear_token_statistics"),
    Mutant("head_call", MASK, "head_call._targets", "if not begun:", "if True:", "linear_token_statistics"),
    Mutant("head_call", SCALE, "head_call.run_chunks", "GAIN / max(1.0, abs(call.scale)) if", "1.0 if", "linear_cross_entropy"),
    Mutant("chunked_head", SIGN, "chunked_head._accumulate", "total.dtype), alpha=scale)", "total.dtype), alpha=-scale)", "linear_cross_entropy"),
    Mutant("chunked_head", INDEX, "chunked_head._multiply_back", "self.lora_s[rows].to(", "self.lora_s[: len(grad)].to(", "linear_cross_entropy"),
    Mutant("chunked_head", SCALE, "chunked_head._multiply_back", "1.0 / self.gain", "1.0", "linear_cross_entropy"),
    Mutant("chunked_head", SIZE, "chunked_head._rows_of_chunk", "rounded <= most", "rounded <= most + WHOLE", "linear_cross_entropy"),
    Mutant("attention_backward.backward", SIZE, "attention_backward.backward", "cdiv(S, most_rows) * most_rows", "S", "attention"),
    Mutant("attention.values", MASK, "attention.forward_kernel", "(e < DV)[None, :]", "(e < BLOCK_DV)[None, :]", "attention"),
    Mutant("attention.values", MASK, "attention_backward.key_kernel", "(e < DV)[None, :]", "(e < BLOCK_DV)[None, :]", "attention"),
    Mutant("attention.values", INDEX, "attention_backward.query_kernel", "i, e, dout_si, S, DV, BLOCK_DV", "i, e, dout_si, S, D, BLOCK_DV", "attention"),
    Mutant("attention_backward.row_span", MASK, "attention_backward.row_span", "meets & (alike == 0)", "meets", "attention"),
    Mutant("attention_backward.row_span", SIZE, "attention_backward.row_span", "tl.cdiv(begin, BLOCK_M) * BLOCK_M, until", "begin // BLOCK_M * BLOCK_M, until", "attention"),
    Mutant("attention_backward.row_span", INDEX, "attention_backward.row_span", "(i > begin) & (covers == 0), i, S", "i > S, i, S", "attention"),
    Mutant("attention_tiles.masked", MASK, "attention_tiles.masked", "mask > _HIGHEST, 0.0", "mask > 4 * _HIGHEST, 0.0", "attention"),
    Mutant("attention_tiles.narrowed", SIZE, "attention_tiles.narrowed", "until // BLOCK * BLOCK", "end // BLOCK * BLOCK", "attention"),
    Mutant("attention_tiles.narrowed", MASK, "attention_tiles.columns", "same & (tl.max(tl.where(alike, 1, 0), 0) == 0)", "same", "attention"),
    Mutant("attention_tiles.narrowed", INDEX, "attention_tiles.narrowed", "tl.where(equal, j + 1, low)", "tl.where(equal, j, low)", "attention"),
)  # fmt: skip


def path_of(mutant: Mutant) -> Path:
    file = mutant.where.split(".")[0]
    kernels = ROOT / mutant.folder / f"{file}_triton.py"
    return kernels if kernels.exists() and mutant.folder == "kernels" else ROOT / mutant.folder / f"{file}.py"


def mutated(mutant: Mutant) -> str:
    """The file's source with the change made, once, in the function that it names."""
    source = path_of(mutant).read_text(encoding="utf-8")
    function = mutant.where.split(".")[1]
    found = re.search(rf"^( *)def {function}\(.*?(?=^\1@|^\1def |\Z)", source, re.MULTILINE | re.DOTALL)
    if found is None or mutant.old not in found.group():
        raise ValueError(f"{mutant.where} has no {mutant.old!r}")
    return source[: found.start()] + found.group().replace(mutant.old, mutant.new, 1) + source[found.end() :]


def tests_of(mutant: Mutant) -> Path:
    folder, _, name = mutant.tests.rpartition("/")
    return ROOT / "tests" / mutant.folder / folder / f"test_{name or 'ops'}.py"


def arguments_of(mutant: Mutant) -> list[str]:
    """The tests that must notice it, as pytest is told of them."""
    arguments = ["-q", "-x", "-p", "no:cacheprovider", "-c", str(ROOT / "pyproject.toml"), "--rootdir", str(ROOT)]
    arguments += ["-m", "not gpu", "--tb=no", str(tests_of(mutant))]
    only = "" if mutant.tests else f"({TESTS}) and fastft::{mutant.kernel.split('.')[0]}"
    return [*arguments, "-k", only] if only else arguments


def caught_by(mutant: Mutant) -> str | None:
    """The first test that fails, None if all pass."""
    code, printed = (in_a_checkout if mutant.folder == "kernels" else in_a_fork)(mutant)
    if code == 0 and " passed" in printed:
        return None
    named = re.search(r"^FAILED \S+?::(.+?)(?: - .*)?$", printed, re.MULTILINE)
    if code == 1 and named:
        return named.group(1)
    if code < 0:
        return f"killed by signal {-code}"  # it wrote where it should not
    raise RuntimeError(f"{mutant.kernel}, {mutant.kind}: the tests did not run ({code}): {printed[-1000:]}")


def in_a_checkout(mutant: Mutant) -> tuple[int, str]:
    """Exit status and output of a process of its own, which imports a copy of the package."""
    with tempfile.TemporaryDirectory() as folder:
        checkout.link_package(Path(folder))
        target = Path(folder) / "fastft" / mutant.folder / path_of(mutant).name
        target.unlink()
        target.write_text(mutated(mutant), encoding="utf-8")
        environment = {**os.environ, "PYTHONPATH": folder}
        if "." in mutant.kernel:  # one of Triton
            environment |= {"TRITON_INTERPRET": "1", "FASTFT_HYPOTHESIS_PROFILE": "interpreter"}
        command = [sys.executable, "-m", "pytest", *arguments_of(mutant)]
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


def in_a_fork(mutant: Mutant) -> tuple[int, str]:
    """The same of a process that has imported torch."""
    from mutant_process import tested

    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / path_of(mutant).name
        target.write_text(mutated(mutant), encoding="utf-8")
        module = f"{mutant.folder}.{mutant.where.split('.')[0]}".replace("/", ".")
        return tested(f"fastft.{module}", target, arguments_of(mutant))


def chosen(options: argparse.Namespace) -> Iterator[Mutant]:
    """Those of the kernels, of the engine, or of both."""
    from engine_mutants import ENGINE

    both = options.engine == options.kernels
    every = (*(MUTANTS + PLAIN if both or options.kernels else ()), *(ENGINE if both or options.engine else ()))
    yield from (mutant for mutant in every if options.file in (mutant.kernel[: len(options.file)], mutant.kind))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--engine", action="store_true", help="only those of the engine")
    parser.add_argument("--kernels", action="store_true", help="only those of the kernels")
    parser.add_argument("--file", default="", help="only what begins so, or is of this kind")
    parser.add_argument("--jobs", type=int, default=1, help="how many to try at once")
    options = parser.parse_args()
    table, kinds = Table("kernel or part of the engine", "mutant", "caught by"), dict[str, list[bool]]()
    mutants = list(chosen(options))
    with ThreadPoolExecutor(options.jobs) as pool:
        for mutant, caught in zip(mutants, pool.map(caught_by, mutants), strict=True):
            kinds.setdefault(mutant.kind, []).append(caught is not None)
            table.add_row(mutant.kernel, mutant.kind, escape(caught) if caught else "[red]nothing[/red]")
            print(f"{mutant.kernel}, {mutant.kind}: {caught or 'NOT CAUGHT'}", flush=True)
    summary = Table("kind", "caught", "survived")
    for kind, found in kinds.items():
        summary.add_row(kind, str(sum(found)), str(len(found) - sum(found)))
    for one in (table, summary):
        Console(width=150).print(one)
    survivors = sum(len(found) - sum(found) for found in kinds.values())
    raise SystemExit(f"{survivors} survived" if survivors else 0)


if __name__ == "__main__":
    main()
