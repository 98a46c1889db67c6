"""How the decode kernels' work is cut into programs, and the cuts that are taken by default."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from runtime.kernels.banks import Banks
from runtime.kernels.gating import Gating
from traces.errors import InputError
from traces.model import QUANT_GROUP

#: Programs that a projection is split into at least, when its outputs alone give fewer: about
#: six for each of an H200's 132 multiprocessors.
PROGRAMS = 800

#: Tokens that a group of an expert takes at most: as many as a matrix instruction's columns.
GROUP_TOKENS = 16

#: Columns that a matrix instruction is given at least: with fewer, Triton takes one that wants
#: its weights in registers.
LEAST_COLUMNS = 16

#: Inputs of a matrix instruction at least.
LEAST_INPUTS = 16

#: Inputs of a matrix instruction's tile of low-precision weights: with four scales or so in a
#: row these are copied ahead like the weights themselves, which takes 4 bytes at least.
LOW_INPUTS = 256

#: Weights in a program's tile of 128 threads, where they are summed element by element: 64
#: bfloat16 a thread, in eight loads of 16 bytes, keep the memory busy within 128 registers.
SUMMED = 8192

#: The same of low-precision weights, which take twice the registers while they are raised.
LOW_SUMMED = 4096

#: Low-precision weights along memory that a tile read by runs of bytes has at least.
LEAST_RUN = 16

#: From so many inputs on a second projection's tiles pass through shared memory: its programs
#: have enough rounds for several tiles to be under way.
STAGED_INPUTS = 4096


@dataclass(frozen=True)
class Tiles:
    """How a projection is cut: outputs and inputs of a program's tile, and its warps.

    *splits* divides the inputs over several programs. With *dot*, matrix instructions multiply
    tiles, *stages* of which are under way at a time; without it each weight is multiplied by
    one input, and *stages* above 1 let tiles pass through shared memory. *low_k* inputs of
    low-precision weights make a tile, and *low_stages* of those are under way; 0 is as of
    others.
    """

    block_n: int
    block_k: int
    warps: int = 4
    splits: int = 1
    dot: bool = False
    stages: int = 1
    low_k: int = 0
    low_stages: int = 0

    def split_inputs(self, inputs: int) -> int:
        """Of *inputs*, those of one of the splits, in whole tiles."""
        return -(-inputs // (self.splits * self.block_k)) * self.block_k

    def low_inputs(self, inputs: int) -> int:
        """Inputs of a tile of low-precision weights: *low_k*, but no tile crosses a split's end."""
        block, split = self.low_k or self.block_k, self.split_inputs(inputs)
        while self.splits > 1 and split % block:
            block //= 2
        return block


@dataclass(frozen=True)
class Cut:
    """The cuts of both projections.

    *group* 0 gives every pair of token and expert its own programs; otherwise programs belong
    to an expert and up to *group* of its tokens, which read it once. That takes *dot*, one
    kernel more before to find the groups, and one after to add up. With *overlap* a kernel is
    launched while the one before ends (compute capability 9.0).
    """

    first: Tiles
    second: Tiles
    group: int = 0
    overlap: bool = False

    def __post_init__(self) -> None:
        if self.group and not (self.first.dot and self.second.dot):
            raise InputError(f"group is {self.group} without dot, expected dot in both Tiles")

    def columns(self, tiles: Tiles) -> int:
        """Rows of inputs that a program of *tiles* multiplies at once."""
        return max(self.group, LEAST_COLUMNS) if tiles.dot else 1


def power_of_two(number: int) -> int:
    """The smallest power of two that is at least *number*."""
    return 1 << (number - 1).bit_length()


def pair_cut(banks: Banks, gating: Gating, top_k: int, rounds: bool) -> Cut:
    """The cut for one token: every pair by itself.

    Weights are summed up element by element, but for transposed matrices with *rounds*:
    matrix instructions then take inputs as they are, and need no sums across threads.
    """
    if banks.layout.transposed:
        make = _pair_dots if rounds else _pair_columns
        first, second = make(banks, gating, top_k)
    else:
        first, second = _pair_first(banks, gating), _pair_second(banks, top_k)
    halves = 2 if gating.gated else 1
    first = _low(first, halves, banks.hidden)
    second = _low(second, 1, banks.intermediate)
    return Cut(first, second, overlap=_overlaps(banks))


def group_cut(banks: Banks, gating: Gating) -> Cut:
    """The cut for several tokens: by experts, with matrix instructions."""
    rows = 64
    halves = 2 if gating.gated else 1
    first = Tiles(rows // halves, _dot_inputs(banks.hidden, 128), dot=True, stages=4)
    second = Tiles(rows, _dot_inputs(banks.intermediate, 128), dot=True, stages=4)
    if not banks.layout.transposed:
        first = replace(first, low_k=_dot_inputs(banks.hidden, LOW_INPUTS))
        second = replace(second, low_k=_dot_inputs(banks.intermediate, LOW_INPUTS))
    return Cut(first, second, group=GROUP_TOKENS, overlap=_overlaps(banks))


def low_reading(banks: Banks, matrix: str, tiles: Tiles, halves: int) -> tuple[bool, int, int]:
    """How low slots' *matrix* is read: by runs of bytes or not, inputs of a tile, tiles under way.

    A program takes *halves* times the outputs of *tiles*: 2 where a gate belongs to each. Runs
    want whole groups of weights with a scale in every row.
    """
    part, transposed = banks.layout.part(matrix), banks.layout.transposed
    block_k = tiles.low_inputs(part.shape[0 if transposed else 1])
    run = tiles.block_n * halves if transposed else block_k
    # Of a transposed matrix, gates and ups that do not alternate are two runs of columns.
    whole = not transposed or halves == 1 or banks.layout.interleaved
    sizes = (part.shape[1], part.first, banks.layout.params)
    groups = all(size % QUANT_GROUP == 0 for size in sizes)
    return whole and groups and run >= LEAST_RUN, block_k, tiles.low_stages or tiles.stages


def _low(tiles: Tiles, halves: int, inputs: int) -> Tiles:
    """*tiles*, of *halves* times as many rows, with fewer low-precision weights where summed.

    Sums of one round over *inputs* are not kept for another, and leave registers enough.
    """
    if tiles.dot or tiles.split_inputs(inputs) <= tiles.block_k:
        return tiles
    return replace(tiles, low_k=min(tiles.block_k, max(16, LOW_SUMMED // tiles.block_n // halves)))


def _pair_dots(banks: Banks, gating: Gating, top_k: int) -> tuple[Tiles, Tiles]:
    """Tiles of both projections for one pair, transposed, with matrix instructions."""
    rows = 128 // (2 if gating.gated else 1)
    first = Tiles(rows, _dot_inputs(banks.hidden, 32), dot=True, stages=6)
    second = Tiles(64, _dot_inputs(banks.intermediate, 64), dot=True, stages=4)
    return (
        _split(first, top_k, banks.intermediate, banks.hidden),
        _split(second, top_k, banks.output, banks.intermediate),
    )


def _pair_columns(banks: Banks, gating: Gating, top_k: int) -> tuple[Tiles, Tiles]:
    """Tiles of both projections for one pair, transposed, summed element by element."""
    rows, block_k = 128 // (2 if gating.gated else 1), SUMMED // 128
    return (
        _split(Tiles(rows, block_k), top_k, banks.intermediate, banks.hidden),
        _split(Tiles(128, block_k), top_k, banks.output, banks.intermediate),
    )


def _pair_first(banks: Banks, gating: Gating) -> Tiles:
    """Tiles of the first projection for one pair."""
    block_k = _within(banks.hidden, SUMMED // 4)
    return Tiles(max(1, SUMMED // block_k // (2 if gating.gated else 1)), block_k)


def _pair_second(banks: Banks, top_k: int) -> Tiles:
    """Tiles of the second projection for one pair."""
    if banks.intermediate >= STAGED_INPUTS:
        return Tiles(16, _within(banks.intermediate, 256), stages=3)
    block_k = _within(banks.intermediate, SUMMED // 8)
    tiles = Tiles(block_n=max(1, SUMMED // block_k), block_k=block_k)
    return _split(tiles, top_k, banks.output, banks.intermediate)


def _split(tiles: Tiles, top_k: int, outputs: int, inputs: int) -> Tiles:
    """*tiles* with inputs split evenly until one token's *top_k* pairs give :data:`PROGRAMS`."""
    blocks = top_k * -(-outputs // tiles.block_n)
    rounds = -(-inputs // tiles.block_k)
    enough = min(-(-PROGRAMS // blocks), rounds)
    even = next(splits for splits in range(enough, rounds + 1) if rounds % splits == 0)
    return replace(tiles, splits=even)


def _dot_inputs(size: int, most: int) -> int:
    """Inputs of a matrix instruction's tile, at most *most*, that suit *size* in all."""
    return max(LEAST_INPUTS, _within(size, most))


def _overlaps(banks: Banks) -> bool:
    """Whether this device can launch a kernel while the one before ends."""
    device = banks.full.device
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


def _within(size: int, most: int) -> int:
    """A block of at most *most*, a power of two, that wastes little on *size* inputs.

    The largest that leaves at most an eighth of the last round idle, or a quarter of *most*.
    """
    block = most
    while block > max(16, most // 4) and -(-size // block) * block > size * 9 / 8:
        block //= 2
    return block
