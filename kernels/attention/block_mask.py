"""Block-sparse attention: which blocks of queries and keys attend to each other at all."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..common import checks

MaskFunction = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class BlockMask:
    """A mask by blocks: the empty ones cost nothing, the full ones no look at a mask.

    Build one with `from_mask`, `from_function` or a pattern (`sliding_window`, `big_bird`, `documents`), once for many
    calls, and pass it to `attention` as `block_mask`. It holds elements of partly filled blocks only, so its memory, as
    the time of the kernels, grows with the live blocks.

    Example:
        >>> import torch, fusenc
        >>> mask = fusenc.kernels.BlockMask.from_mask(torch.ones(300, 300, dtype=torch.bool).tril())
        >>> f"{mask.density():.2f}"  # of the blocks, 6 of 9 are not empty
        '0.67'
        >>> near = fusenc.kernels.BlockMask.from_function(lambda q, k: (q - k).abs() < 100, 4096, 4096)
        >>> f"{near.density():.2f}"
        '0.09'
    """

    shape: tuple[int, int, int, int]
    """``[1 or B, 1 or H, Lq, Lk]``"""
    block_size: int
    block_map: Tensor
    """int32 ``[1 or B, 1 or H, blocks of queries, blocks of keys]``: 0 empty, 1 full, else 2 + number of its tile."""
    blocks_of_query: Tensor
    """int32 ``[..., blocks of queries, 2 + blocks of keys]``: how many full, how many partly filled, then which."""
    blocks_of_key: Tensor
    """The same the other way round."""
    tiles: Tensor
    """bool ``[n, block_size, block_size]``"""

    @classmethod
    def from_mask(cls, mask: Tensor, block_size: int = 128) -> BlockMask:
        """From a bool mask ``[Lq, Lk]`` or ``[1 or B, 1 or H, Lq, Lk]``, True where a key is seen.

        Raises:
            TypeError: `mask` is no bool tensor.
            ValueError: another number of dimensions, or a `block_size` that is no power of two from 16 on.
        """
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
            checks.fail_type("mask", "a bool tensor", mask)
        if mask.dim() not in (2, 4):
            checks.fail_value("mask", "two or four dimensions, [Lq, Lk] or [B, H, Lq, Lk]", mask)
        mask = mask.view((1,) * (4 - mask.dim()) + mask.shape)
        return cls._build((*mask.shape,), block_size, mask.device, lambda first, last: mask[:, :, first:last])

    @classmethod
    def from_function(
        cls, function: MaskFunction, len_q: int, len_k: int, block_size: int = 128, device: torch.device | str = "cpu"
    ) -> BlockMask:
        """From a function of positions, evaluated for one row of blocks at a time, so nothing is ever ``Lq x Lk``.

        Args:
            function: of positions of queries ``[n, 1]`` and of keys ``[1, Lk]``, int64, to bool ``[n, Lk]``: True where
                a key is seen.
            len_q, len_k: queries and keys.
            block_size: a power of two from 16 on.
            device: where the positions and the mask are.

        Raises:
            TypeError: what `function` returns is no bool tensor.
            ValueError: what it returns has another shape, negative lengths, or a bad `block_size`.
        """
        if len_q < 0 or len_k < 0:
            checks.fail_value("len_q, len_k", "lengths of at least 0", (len_q, len_k))
        keys = torch.arange(len_k, device=device)[None, :]

        def rows(first: int, last: int) -> Tensor:
            seen = function(torch.arange(first, min(last, len_q), device=device)[:, None], keys)
            if not isinstance(seen, Tensor) or seen.dtype != torch.bool:
                checks.fail_type("function", "one that returns a bool tensor", seen)
            full = (min(last, len_q) - first, len_k)
            try:
                return seen.expand(full)[None, None]
            except RuntimeError:
                checks.fail_value("function", f"one that returns a tensor that broadcasts to {list(full)}", seen)

        return cls._build((1, 1, len_q, len_k), block_size, torch.device(device), rows)

    @classmethod
    def _build(
        cls, shape: tuple[int, ...], block_size: int, device: torch.device, rows: Callable[[int, int], Tensor]
    ) -> BlockMask:
        if not isinstance(block_size, int) or block_size < 16 or block_size & (block_size - 1):
            checks.fail_value("block_size", "a power of two from 16 on", block_size)
        batch, heads, len_q, len_k = shape
        blocks_k = -(-len_k // block_size)
        maps, tiles, count = [], [], 0
        for first in range(0, len_q, block_size):
            seen = rows(first, first + block_size)
            padding = (0, blocks_k * block_size - len_k, 0, block_size - seen.shape[2])
            inside = torch.nn.functional.pad(torch.ones_like(seen[:1, :1]), padding)
            blocks = torch.nn.functional.pad(seen, padding).unflatten(3, (blocks_k, block_size)).transpose(2, 3)
            inside = inside.unflatten(3, (blocks_k, block_size)).transpose(2, 3)
            some = blocks.flatten(3).any(3)
            # What lies past the ends is never seen, so it takes no part in whether a block is full.
            full = (blocks | ~inside).flatten(3).all(3) & some
            partly = some & ~full
            numbers = partly.flatten().cumsum(0).view(partly.shape) + count + 1
            maps.append(torch.where(partly, numbers, full.long()).int())
            tiles.append(blocks[partly])
            count += int(partly.sum())
        empty = torch.zeros((batch, heads, 0, blocks_k), dtype=torch.int32, device=device)
        block_map = torch.stack(maps, 2) if maps else empty
        no_tile = torch.zeros((1, block_size, block_size), dtype=torch.bool, device=device)
        return cls(
            (batch, heads, len_q, len_k), block_size, block_map, _lists(block_map), _lists(block_map.transpose(2, 3)),
            torch.cat(tiles) if count else no_tile,
        )  # fmt: skip

    @classmethod
    def sliding_window(
        cls, len_q: int, window: int, global_tokens: int = 0, block_size: int = 128, device: torch.device | str = "cpu"
    ) -> BlockMask:
        """Each token sees those up to `window` away; the first `global_tokens` see all and are seen by all.

        Longformer: Beltagy et al., 2020, section 3.1.
        """
        return cls.from_function(
            lambda q, k: ((q - k).abs() <= window) | (q < global_tokens) | (k < global_tokens),
            len_q, len_q, block_size, device,
        )  # fmt: skip

    @classmethod
    def big_bird(
        cls, len_q: int, window_blocks: int = 3, global_blocks: int = 1, random_blocks: int = 3,
        block_size: int = 64, seed: int = 0, device: torch.device | str = "cpu",
    ) -> BlockMask:  # fmt: skip
        """BigBird's pattern: blocks near the diagonal, the first blocks as rows and columns, and some at random.

        Zaheer et al., 2020, section 2 (the "itc" construction), by whole blocks.
        """
        blocks = -(-len_q // block_size)
        position = torch.arange(blocks)
        near = (position[:, None] - position).abs() <= window_blocks // 2
        edge = (position[:, None] < global_blocks) | (position < global_blocks)
        generator = torch.Generator().manual_seed(seed)
        chosen = torch.rand(blocks, blocks, generator=generator).masked_fill(near | edge, -1.0)
        picks = chosen.topk(min(random_blocks, blocks), 1).indices
        live = (near | edge).scatter(1, picks, True).to(device)
        return cls.from_function(lambda q, k: live[q // block_size, k // block_size], len_q, len_q, block_size, device)

    @classmethod
    def documents(cls, ids: Tensor, block_size: int = 128) -> BlockMask:
        """Each token sees those with the same number in `ids`, ``[L]`` or ``[B, L]``: documents packed into one row.

        Raises:
            ValueError: another number of dimensions.
        """
        if not isinstance(ids, Tensor) or ids.dim() not in (1, 2):
            checks.fail_value("ids", "a tensor [L] or [B, L]", ids)
        ids = ids.view(-1, ids.shape[-1])
        batch, length = ids.shape

        def rows(first: int, last: int) -> Tensor:
            return (ids[:, first:last, None] == ids[:, None, :])[:, None]

        return cls._build((batch, 1, length, length), block_size, ids.device, rows)

    def density(self) -> float:
        """The share of blocks that are not empty: what of dense attention's work remains."""
        return float((self.block_map != 0).float().mean()) if self.block_map.numel() else 0.0

    def to(self, device: torch.device | str) -> BlockMask:
        """The same mask on another device."""
        moved = (t.to(device) for t in (self.block_map, self.blocks_of_query, self.blocks_of_key, self.tiles))
        return BlockMask(self.shape, self.block_size, *moved)

    def to_dense(self) -> Tensor:
        """The mask element by element, bool, of `shape`."""
        from .eager import elements_seen

        return elements_seen(self.block_map, self.tiles, 0, *self.shape[2:])


def _lists(block_map: Tensor) -> Tensor:
    """For each row of blocks: how many are full, how many are partly filled, and which, the full ones first."""
    full, partly = block_map == 1, block_map > 1
    order = (full.int() * 2 + partly.int()).argsort(dim=-1, descending=True, stable=True)
    counts = torch.stack([full.sum(-1), partly.sum(-1)], -1)
    return torch.cat([counts, order], -1).int().contiguous()
