"""Tables that a model with vision reads from the grids of its images, as programs on tensors.

``grid`` [images, 3] has the numbers of frames, rows and columns of patches of each image or video, ``count`` is the
number N of all patches, which come image by image, frame by frame.  In a frame, merge * merge patches that become one
token stand together.  How long a result is depends on sizes of tensors alone, so these can be traced.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def require(condition: Tensor, otherwise: str) -> None:
    """Check on the device, so that nothing waits for it; raise RuntimeError where it is false."""
    torch._assert_async(condition.all(), otherwise)


def merged(grid: Tensor, merge: int) -> Tensor:
    """Return grids in tokens, which merge * merge patches become."""
    frames, rows, columns = grid.long().unbind(-1)
    return torch.stack((frames, rows // merge, columns // merge), -1)


def _in_frames(grid: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return of each of ``count`` patches: its place in its frame, the frame's first patch, its rows and columns."""
    grid = grid.long()
    ends = grid.prod(-1).cumsum(0)
    require(ends[-1] == count, "the grids of the images are not of as many patches as there are")
    at = torch.arange(count, device=grid.device)
    image = torch.searchsorted(ends, at, right=True)
    frames, rows, columns = grid[image].unbind(-1)
    place = (at - ends[image] + frames * rows * columns) % (rows * columns)
    return place, at - place, rows, columns


def _boundaries(first: Tensor) -> Tensor:
    """Return where the segments begin that have these first elements, and then [N]: int32 [N + 1], as many as can be.

    Those behind the last segment are empty.
    """
    at = torch.arange(len(first) + 1, device=first.device)
    return torch.where(F.pad(first, (0, 1), value=True), at, len(first)).sort().values.int()


def windows(grid: Tensor, count: int, merge: int, size: int) -> tuple[Tensor, Tensor]:
    """Return the order of ``count`` merged patches by windows, and their boundaries in patches.

    As transformers' get_vision_window_index: windows of size * size merged patches, smaller at the borders.
    """
    place, start, rows, columns = _in_frames(merged(grid, merge), count)
    top = place // (size * columns) * size
    height = (rows - top).clamp(max=size)
    place = place - top * columns
    left = place // (size * height) * size
    width = (columns - left).clamp(max=size)
    place = place - left * height
    order = start + (top + place // width) * columns + left + place % width
    return order, _boundaries(place == 0) * merge**2


def vision_tables(tower: Any, grid: Tensor, count: int) -> dict[str, Tensor]:
    """Return by name what a tower reads from its grids, for ``count`` patches.

    position_ids [N, 2], cu_seqlens; where the tower has windows, window_index [N / merge**2] and cu_window_seqlens;
    where it interpolates positions, interp_indices and interp_weights [N, 4].
    """
    merge = tower.spatial_merge_size
    place, _, rows, columns = _in_frames(grid, count)
    block, inner = place // merge**2, place % merge**2
    row = block // (columns // merge) * merge + inner // merge
    column = block % (columns // merge) * merge + inner % merge
    tables = {"position_ids": torch.stack((row, column), -1), "cu_seqlens": _boundaries(place == 0)}
    if hasattr(tower, "window_size"):
        size = tower.window_size // merge // tower.patch_size
        order, boundaries = windows(grid, count // merge**2, merge, size)
        tables |= {"window_index": order, "cu_window_seqlens": boundaries}
    if hasattr(tower, "num_grid_per_side"):
        indices, weights = _interpolated(tower, (row, rows), (column, columns))
        tables |= {"interp_indices": indices, "interp_weights": weights}
    return tables


def _interpolated(tower: Any, row: tuple[Tensor, Tensor], column: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Return which learned positions [N, 4 or 16] are mixed for patches, in which shares.

    row, column: of each patch, and the number of all.
    """
    from transformers.vision_utils import _interpolation_axis_taps_weights as taps

    side, how = tower.num_grid_per_side, (tower.interpolation_mode, tower.interpolation_align_corners)
    (down, shares_down), (right, shares_right) = (taps(at, of, side, *how) for at, of in (row, column))
    indices = down[:, :, None] * side + right[:, None, :]
    return indices.flatten(1), (shares_down[:, :, None] * shares_right[:, None, :]).flatten(1)


def rope_positions(
    kinds: Tensor, here: Tensor, images: Tensor | None, videos: Tensor | None, *, apart: Tensor | None = None,
    by_frame: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return the positions [3, B, S] of tokens in frames, rows and columns, and what these are ahead of S [B, 1].

    A run of tokens of an image or video has the positions of its grid, ahead of what went before; text behind it goes
    on after the larger of its sides.
    kinds [B, S]: 0 for text, 1 in an image, 2 in a video.  here [B, S], bool: which tokens count.
    images, videos [n, 3]: grids in tokens, one for each run.  by_frame: each frame of a video is a run of its own.
    apart [n]: what lies between frames of each video, if not 1.
    """
    begins = here & (kinds != _before(kinds, here))
    grid, between = torch.ones((*kinds.shape, 3), dtype=torch.long, device=kinds.device), None
    for kind, grids in ((1, images), (2, videos)):
        runs = begins & (kinds == kind)
        if grids is None or not len(grids):
            require(~runs, "there are tokens of an image or video without a grid")
            continue
        each = grids[:, 0] if kind == 2 and by_frame else torch.ones_like(grids[:, 0])
        number = _numbered(runs, each)
        found = grids[number]
        if kind == 2 and by_frame:
            found = torch.cat((torch.ones_like(found[..., :1]), found[..., 1:]), -1)
        if kind == 2 and apart is not None:
            between = torch.where(kinds == kind, apart[number], 1)
        grid = torch.where((kinds == kind)[..., None], found, grid)
    return _placed(kinds > 0, here, begins, grid, between)


def _before(kinds: Tensor, here: Tensor) -> Tensor:
    """Return the kind of the last token before each that counts, -1 where there is none."""
    at = torch.arange(kinds.shape[1], device=kinds.device)
    last = F.pad(torch.where(here, at, -1).cummax(-1).values[:, :-1], (1, 0), value=-1)
    return torch.where(last < 0, -1, kinds.gather(1, last.clamp(min=0)))


def _numbered(runs: Tensor, each: Tensor) -> Tensor:
    """Return for each token which grid the last run of its kind is of, where grid i has each[i] runs, in order."""
    number, ends = runs.flatten().long().cumsum(0) - 1, each.cumsum(0)
    require(number[-1] < ends[-1], "there are more images or videos among the tokens than grids")
    return torch.searchsorted(ends, number.clamp(min=0), right=True).clamp(max=len(each) - 1).view_as(runs)


def _placed(seen: Tensor, here: Tensor, begins: Tensor, grid: Tensor, between: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return positions of tokens whose grids [B, S, 3] are known, and what they are ahead of S; see rope_positions."""
    seen = seen & here
    _, rows, columns = grid.unbind(-1)
    side = torch.maximum(rows, columns)
    passed = torch.where(seen, torch.where(begins, side, 0), here.long()).cumsum(-1)
    place = here.long().cumsum(-1)
    place = torch.where(seen, place - torch.where(begins, place, 0).cummax(-1).values, 0)
    require(~seen | (place < grid.prod(-1)), "an image or video has more tokens than its grid")
    whole = torch.where(seen & begins, grid.prod(-1), 0)
    require(whole.sum(-1) == seen.sum(-1), "an image or video has fewer tokens than its grid")
    frame = place // (rows * columns)
    frame = frame if between is None else (frame * between).long()
    ahead = torch.stack((frame, place // columns % rows, place % columns))
    positions = torch.where(here, passed - torch.where(seen, side, 1) + ahead, 0)
    return positions, positions.amax((0, 2))[:, None] + 1 - here.sum(-1, keepdim=True)
