"""Where the images of a batch are, and the shorter sequence that is left of it."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..methods.base import Selection


@dataclass(frozen=True)
class Layout:
    """The prompts of a prefill: which tokens are which image's. `R` images of `N` tokens.

    Attributes:
        ids: `[B, L]` int64 on the CPU.
        visual, valid: `[B, L]` bool on the CPU.
        asking: `[B, L]` bool on the CPU, of those valid: no answer that is to be predicted.
        sample_list, end_list: the row of each image, and the place of its last token there.
        sample: the former as `[R]` int64 on the device.
        columns: `[R, N]` int64 on the device, the place of each token in its row.
    """

    ids: Tensor
    visual: Tensor
    valid: Tensor
    asking: Tensor
    sample_list: tuple[int, ...]
    end_list: tuple[int, ...]
    sample: Tensor
    columns: Tensor

    @property
    def flat(self) -> Tensor:
        """Each token's place in the `B * L` tokens of the batch, `[R, N]` int64."""
        return self.sample[:, None] * self.visual.shape[1] + self.columns

    def without_last(self, count: int) -> Layout:
        """The same layout, where the last `count` places are no question."""
        if count == 0:
            return self
        last = torch.zeros_like(self.asking)
        last[:, -count:] = True
        return self.without(last)

    def without(self, mask: Tensor) -> Layout:
        """The same layout, where the places of a mask `[B, L]` are no question."""
        return replace(self, asking=self.asking & ~mask)

    def tokens(self, embeds: Tensor) -> Tensor:
        """The visual tokens `[R, N, D]` of `[B, L, D]`."""
        return embeds.flatten(0, 1)[self.flat]


def locate(
    visual: Tensor, valid: Tensor | None, ids: Tensor, tokens: int, device: torch.device
) -> Layout:
    """Find the images; features go to placeholders in order, `tokens` to an image.

    One device synchronisation, the only one of a prefill: lengths must be known on the host.

    Args:
        visual: `[B, L]` bool.
        valid: `[B, L]`, 0 on padding, or None.
        ids: `[B, L]` int64.
        tokens: `N`.
        device: where the embeddings are.

    Raises:
        ValueError: the placeholders are not whole images.
    """
    real = torch.ones_like(ids) if valid is None else valid.long()
    ids, here, real = torch.stack([ids, visual.long(), real]).cpu()
    here = here.bool()
    places = here.flatten().nonzero().flatten()
    if tokens == 0 or len(places) % tokens:
        raise ValueError(f"{len(places)} image placeholders are not whole images of {tokens}")
    length = here.shape[1]
    places = places.view(-1, tokens)
    sample = places[:, 0] // length
    if not torch.equal(sample, places[:, -1] // length):
        raise ValueError(f"a prompt's image placeholders must be whole images of {tokens} tokens")
    return Layout(
        ids=ids,
        visual=here,
        valid=real.bool(),
        asking=real.bool(),
        sample_list=tuple(sample.tolist()),
        end_list=tuple((places[:, -1] % length).tolist()),
        sample=sample.to(device),
        columns=(places % length).to(device),
    )


def source_rows(layout: Layout, images: int) -> list[int] | None:
    """Which encoded image each image of the batch is, or None if they are the same in order.

    Beams and several returned sequences repeat each sample's images, sample by sample, after the
    encoder ran.

    Raises:
        ValueError: the counts fit no such repetition.
    """
    total = len(layout.sample_list)
    if total == images:
        return None
    batch = len(layout.visual)
    repeat = total // images if images else 0
    per_row = [0] * batch
    for row in layout.sample_list:
        per_row[row] += 1
    source: list[int] = []
    start = 0
    if repeat and total == repeat * images and batch % repeat == 0:
        for first in range(0, batch, repeat):
            count = per_row[first]
            source += list(range(start, start + count)) * repeat
            start += count
    if len(source) != total or start != images:
        raise ValueError(f"{images} images were encoded, but the prompts hold {total}")
    return source


@dataclass(frozen=True)
class Shortened:
    """A batch without its dropped tokens, rows aligned at the right.

    Attributes:
        embeds: `[B, K, D]`.
        mask: `[B, K]` bool, or None if every slot is a token.
        positions: `[B, K]` int64.
        removed: `[B, 1]` int64, by how much compact positions lag behind the prompt's; None
            with original positions.
        keep: `[B, L]` bool, the tokens of the prompt that are left.
        restore: `[B, L]` int64, for each token of the prompt the slot of the last token left at or
            before it (the row's first, if there is none).
        lengths: tokens left in each row, known on the host.
    """

    embeds: Tensor
    mask: Tensor | None
    positions: Tensor
    removed: Tensor | None
    keep: Tensor
    restore: Tensor
    lengths: tuple[int, ...]


def shorten(
    embeds: Tensor, positions: Tensor, layout: Layout, selection: Selection, compact: bool
) -> Shortened:
    """Replace the visual tokens of `[B, L, D]` by those selected, at their places in the prompt.

    `positions` is `[B, L]`. Compact positions are the prompt's less the tokens dropped before, so
    they run without gaps whatever the padding was.
    """
    batch, length, _ = embeds.shape
    device = embeds.device
    counts = _slot_counts(selection)
    lengths = (layout.valid & ~layout.visual).sum(1).tolist()
    for row, count in zip(layout.sample_list, counts, strict=True):
        lengths[row] += count
    width = max(lengths)

    # Unused slots (-1) go to one extra place that is cut off.
    places = layout.flat.gather(1, selection.index.clamp_min(0))
    places = torch.where(selection.index < 0, batch * length, places).flatten()
    text = (layout.valid & ~layout.visual).to(device)
    keep = torch.cat([text.flatten(), text.new_zeros(1)])
    keep = keep.index_fill_(0, places, True)[:-1].view(batch, length)

    order = keep.int().argsort(dim=1, stable=True)[:, -width:]
    shift = torch.tensor([width - n for n in lengths], device=device)[:, None]
    slot = keep.cumsum(1) - 1 + shift  # of each kept token, in its row
    out = embeds.gather(1, order[:, :, None].expand(-1, -1, embeds.shape[2]))
    out = _write(out, selection, slot, places, batch * length)

    removed = (layout.visual.to(device) & ~keep).cumsum(1)
    moved = positions - removed if compact else positions
    return Shortened(
        embeds=out,
        mask=None if min(lengths) == width else keep.gather(1, order),
        positions=moved.gather(1, order),
        removed=removed[:, -1:] if compact else None,
        keep=keep,
        restore=slot.maximum(shift),
        lengths=tuple(lengths),
    )


def _slot_counts(selection: Selection) -> list[int]:
    if selection.padded:
        return (selection.index >= 0).sum(1).tolist()
    return [selection.index.shape[1]] * len(selection.index)


def _write(out: Tensor, selection: Selection, slot: Tensor, places: Tensor, end: int) -> Tensor:
    """The rows `out [B, K, D]` with the merged tokens in their slots."""
    batch, width, model = out.shape
    row = torch.arange(batch, device=out.device)[:, None] * width
    target = torch.cat([(slot + row).flatten(), slot.new_full((1,), batch * width)])[places]
    tokens = selection.tokens.reshape(-1, model).to(out.dtype)
    flat = out.reshape(-1, model)
    if selection.padded:  # the extra place at the end takes what has none
        flat = torch.cat([flat, flat.new_zeros(1, model)])
    return flat.index_copy(0, target, tokens)[: batch * width].view(batch, width, model)
