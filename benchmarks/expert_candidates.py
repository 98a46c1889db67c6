"""Cuts of the decode kernels that are worth trying on a GPU (expert_tuning.py)."""

from __future__ import annotations

from dataclasses import replace

from benchmarks.expert_kernels import Shape
from runtime.kernels.cuts import Cut, Tiles


def _dot(block_n: int, block_k: int, stages: int, splits: int = 1, warps: int = 4) -> Tiles:
    return Tiles(block_n, block_k, warps, splits, dot=True, stages=stages)


def pair_candidates(shape: Shape) -> dict[str, list[Tiles]]:
    """Cuts worth trying for one token."""
    if shape.transposed:
        return {
            "first": [
                Tiles(32, 64, splits=3),
                Tiles(64, 32, splits=5),
                Tiles(64, 32, splits=9),
                Tiles(64, 64, 8, splits=5),
                Tiles(128, 32, splits=9),
                Tiles(128, 32, 8, splits=10),
                Tiles(64, 32, splits=5, stages=3),
                Tiles(64, 32, splits=9, stages=4),
                Tiles(128, 16, splits=9, stages=4),
                _dot(32, 64, 4, 3),
                _dot(32, 64, 4, 5),
                _dot(32, 64, 6, 5),
                _dot(64, 64, 4, 5),
                _dot(64, 64, 4, 9),
                _dot(64, 32, 6, 5),
            ],
            "second": [
                Tiles(64, 64, splits=5),
                Tiles(128, 32, splits=9),
                Tiles(128, 32, splits=15),
                Tiles(128, 64, splits=15),
                Tiles(256, 32, 8, splits=15),
                Tiles(128, 32, splits=9, stages=3),
                Tiles(64, 32, splits=9, stages=4),
                _dot(64, 64, 4, 5),
                _dot(64, 64, 4, 9),
                _dot(64, 64, 6, 5),
                _dot(128, 64, 4, 9),
                _dot(128, 32, 6, 9),
            ],
        }
    first = [
        Tiles(8, 512),
        Tiles(8, 1024),
        Tiles(4, 2048),
        Tiles(2, 2048),
        Tiles(8, 1024, 8),
        Tiles(8, 1024, splits=2),
        Tiles(4, 512, stages=4),
        Tiles(8, 512, stages=3),
        _dot(32, 64, 6),
        _dot(32, 128, 4),
        _dot(32, 128, 4, 2),
        _dot(32, 256, 3),
        _dot(64, 64, 4, 2),
    ]
    second = [
        Tiles(16, 256),
        Tiles(32, 256),
        Tiles(8, 256),
        Tiles(8, 512),
        Tiles(16, 512),
        Tiles(4, 1024),
        Tiles(8, 1024),
        Tiles(8, 1024, splits=2),
        Tiles(16, 256, stages=3),
        _dot(64, 64, 4, 2),
        _dot(64, 64, 6),
        _dot(64, 128, 4),
        _dot(64, 128, 4, 2),
        _dot(64, 256, 3),
    ]
    return {
        "first": _useful(first, shape.hidden),
        "second": _useful(second, shape.intermediate),
    }


def group_candidates(shape: Shape) -> dict[str, list[Tiles]]:
    """Cuts worth trying for several tokens."""
    cuts = [
        _dot(32, 64, 4),
        _dot(32, 64, 6),
        _dot(32, 128, 3),
        _dot(32, 128, 4, 2),
        _dot(32, 256, 3),
        _dot(64, 64, 4),
        _dot(64, 64, 5, 2),
        _dot(64, 128, 3, 1, 8),
    ]
    rows = [replace(tiles, block_n=2 * tiles.block_n) for tiles in cuts]
    return {"first": _useful(cuts, shape.hidden), "second": _useful(rows, shape.intermediate)}


def low_candidates(shape: Shape, base: Cut) -> dict[str, list[Tiles]]:
    """Cuts worth trying for low-precision experts: *base* with other tiles for them, and others."""
    make = _low_dots if base.first.dot else _low_sums
    return {
        "first": make(base.first, shape.hidden),
        "second": make(base.second, shape.intermediate),
    }


def _low_dots(base: Tiles, inputs: int) -> list[Tiles]:
    """Variants of *base*, whose tiles matrix instructions multiply, over *inputs*."""
    shapes = [base, replace(base, warps=8), replace(base, block_n=2 * base.block_n)]
    shapes.append(replace(base, block_n=2 * base.block_n, warps=8))
    found = [
        replace(tiles, low_k=low_k, low_stages=low_stages)
        for tiles in shapes
        for low_k, low_stages in ((128, 4), (256, 3), (256, 4), (512, 3))
        if base.splits == 1 or low_k <= base.block_k
    ]
    found += [replace(base, low_stages=stages) for stages in (2, 3, 5)]
    found += [tiles for tiles in (replace(base, splits=2), replace(base, splits=3))
              if base.splits == 1 and -(-inputs // base.block_k) % tiles.splits == 0]  # fmt: skip
    return list(dict.fromkeys(found))


def _low_sums(base: Tiles, inputs: int) -> list[Tiles]:
    """Variants of *base*, whose weights are summed one by one, and matrix instructions."""
    found = [replace(base, low_k=base.block_k // part) for part in (1, 2, 4, 8)]
    found += [replace(tiles, low_stages=3) for tiles in found[1:3]]
    found += [replace(base, warps=8), replace(base, block_n=2 * base.block_n)]
    for rows, stages in ((16, 6), (32, 4), (64, 4)):
        found += [replace(_dot(rows, 128, stages), low_k=low_k) for low_k in (128, 256)]
    return _useful(list(dict.fromkeys(found)), inputs)


def ordered_cuts(shape: Shape, grouped: Cut) -> list[Cut]:
    """Cuts for one token whose sums go through the inputs in order, as those of *grouped* do."""
    cuts = [
        replace(grouped, group=0),
        replace(grouped, group=0, first=_dot(32, 64, 6)),
        replace(grouped, group=0, first=_dot(16, 64, 6), second=_dot(32, 64, 6)),
    ]
    if shape.transposed:
        cuts.append(replace(grouped, group=0, first=_dot(16, 128, 4), second=_dot(16, 128, 4)))
    return cuts


def _useful(tiles: list[Tiles], inputs: int) -> list[Tiles]:
    """Those of *tiles* that leave at most a quarter of their last round over *inputs* idle."""
    kept = []
    for cut in tiles:
        rounds = -(-inputs // cut.block_k)
        if rounds * cut.block_k <= inputs * 5 / 4 and cut.splits <= rounds:
            kept.append(cut)
    return kept
