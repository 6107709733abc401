"""Where the images of a batch are, and the shorter sequence that is left of it."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..methods.base import Selection
from ..methods.parts import upload
from ..profiling import step
from ..reference import weighted_mean
from .adapter import Encoded


class Place(NamedTuple):
    """One image (or crop, where crops have budgets of their own) in the prompts of a batch.

    `columns` `[N]` int64 on the CPU are its patches' places in the prompt `row`; `first` is the
    number of patches that the crops before it have. `source` and `image` say what was encoded;
    `parts` pictures in a row, where the encoder was given the crops of an image as so many.
    `breaks`, int64 on the CPU too, are the places of what is no patch in the whole image. `crops`
    are heights and widths of its crops in order, None where they are no whole grids.
    """

    row: int
    columns: Tensor
    grid: tuple[int, int]
    source: int = 0
    image: int = 0
    first: int = 0
    breaks: Tensor | None = None
    parts: int = 1
    crops: tuple[tuple[int, int], ...] | None = None

    @property
    def tokens(self) -> int:
        """`N`."""
        return len(self.columns)

    def take(self, encoded: tuple[Tensor, ...]) -> Tensor:
        """Its tokens `[N, ...]` of what was encoded, a tensor per picture."""
        own = encoded[self.image : self.image + self.parts]
        whole = own[0] if self.parts == 1 else torch.cat(own)
        return whole[self.first : self.first + self.tokens]


@dataclass(frozen=True)
class Layout:
    """The prompts of a prefill: which tokens are which image's.

    Attributes:
        ids: `[B, L]` int64 on the CPU.
        visual, valid: `[B, L]` bool on the CPU.
        asking: `[B, L]` bool on the CPU, of those valid: no answer that is to be predicted.
        breaks: `[B, L]` bool on the CPU, of those visual: no patches (line breaks, class tokens).
        places: the images, in the order of the prompts.
        device: where the embeddings are.
    """

    ids: Tensor
    visual: Tensor
    valid: Tensor
    asking: Tensor
    breaks: Tensor
    places: tuple[Place, ...]
    device: torch.device

    def without_last(self, count: int) -> Layout:
        """The same layout, where the last `count` places are no question."""
        if count == 0:
            return self
        last = torch.zeros_like(self.asking)
        last[:, -count:] = True
        return self.without(last)

    def unbroken(self, whole: Sequence[bool]) -> Tensor:
        """The breaks of images that stay as they are, `[B, L]` bool on the CPU; `whole` says of
        which groups all tokens are kept. An image of several crops is whole if all of them are."""
        cut = {
            (place.row, place.source, place.image)
            for group, every in zip(self.groups, whole, strict=True)
            for place in group.places
            if not every
        }
        kept = torch.zeros_like(self.breaks)
        for place in self.places:
            if place.breaks is not None and (place.row, place.source, place.image) not in cut:
                kept[place.row, place.breaks] = True
        return kept

    def without(self, mask: Tensor) -> Layout:
        """The same layout, where the places of a mask `[B, L]` are no question."""
        return replace(self, asking=self.asking & ~mask)

    @cached_property
    def text(self) -> Tensor:
        """The tokens that are valid and not visual, `[B, L]` bool on the CPU."""
        return self.valid & ~self.visual

    @cached_property
    def groups(self) -> tuple[Group, ...]:
        """The images by what a method can take at once: of one source, one size, one geometry."""
        found: dict[Any, list[int]] = {}
        for at, place in enumerate(self.places):
            kind = place.source, place.tokens, place.grid, place.crops
            found.setdefault(kind, []).append(at)
        return tuple(Group(self, tuple(members)) for members in found.values())


class Group:
    """`R` images of `N` tokens each.

    Attributes:
        layout: the prompts.
        members: their numbers among the images of the layout.
        sample_list: the row of each image.
        sample: the former as `[R]` int64 on the device.
        own: the same, or None where each prompt has one of the images, in order.
        columns: `[R, N]` int64 on the device, the place of each token in its row.
    """

    def __init__(self, layout: Layout, members: tuple[int, ...]) -> None:
        self.layout = layout
        self.members = members
        places = [layout.places[i] for i in members]
        self.places = places
        self.sample_list = tuple(place.row for place in places)
        self.sample = upload(torch.tensor(self.sample_list), layout.device)
        columns = torch.stack([place.columns for place in places])
        self.columns = upload(columns, layout.device)
        one_each = self.sample_list == tuple(range(len(layout.visual)))
        self.own = None if one_each else self.sample

    @cached_property
    def end_list(self) -> tuple[int, ...]:
        """The place of the last token of each image in its row."""
        return tuple(int(place.columns[-1]) for place in self.places)

    @property
    def tokens(self) -> int:
        """`N`."""
        return self.columns.shape[1]

    @property
    def grid(self) -> tuple[int, int]:
        """Height and width of the patch grid."""
        return self.places[0].grid

    @property
    def crops(self) -> tuple[tuple[int, int], ...] | None:
        """Heights and widths of the crops, or None where they are no whole grids."""
        return self.places[0].crops

    @cached_property
    def flat(self) -> Tensor:
        """Each token's place in the `B * L` tokens of the batch, `[R, N]` int64."""
        return self.sample[:, None] * self.layout.visual.shape[1] + self.columns

    def take(self, embeds: Tensor) -> Tensor:
        """The visual tokens `[R, N, D]` of `[B, L, D]`."""
        return embeds.flatten(0, 1)[self.flat]

    def of_prompts(self, values: Tensor) -> Tensor:
        """`[R, ...]` of `[B, ...]`: of each image's prompt, on the CPU or the device."""
        if self.own is None:
            return values
        return values[list(self.sample_list) if values.device.type == "cpu" else self.sample]


def locate(
    visual: Sequence[Tensor], encoded: Sequence[Encoded | None], valid: Tensor | None,
    ids: Tensor, device: torch.device, by_crop: bool = False, joined: Sequence[bool] = (),
) -> Layout:  # fmt: skip
    """Find the images; the features of a source go to its placeholders in order.

    Args:
        visual: `[B, L]` bool of every source, on the CPU.
        encoded: what each source encoded, or None where it has no placeholder.
        valid: `[B, L]`, 0 on padding, or None; on the device it is waited for.
        ids: `[B, L]` int64 on the CPU.
        device: where the embeddings are.
        by_crop: whether crops and frames count as images.
        joined: the sources whose pictures, where they stand side by side, are crops of one image.

    Raises:
        ValueError: the placeholders are not those of whole images.
    """
    real = torch.ones_like(ids, dtype=torch.bool) if valid is None else valid.cpu().bool()
    breaks = torch.zeros_like(ids, dtype=torch.bool)
    places: list[list[Place]] = [[] for _ in encoded]
    for source, (mask, found) in enumerate(zip(visual, encoded, strict=True)):
        if not bool(mask.any()) or found is None:
            if bool(mask.any()):
                raise ValueError("the prompt has placeholders of pictures that were not encoded")
            continue
        for row, image, columns in _images(mask, found.tokens):
            patches, others = found.is_patch(image), None
            if patches is not None:
                others, columns = columns[~patches], columns[patches]
                breaks[row, others] = True
            if len(columns):
                crops = _crops(found, image, len(columns))
                sides = _whole_grids(crops)
                place = Place(
                    row, columns, found.grids[image], source, image, breaks=others, crops=sides
                )
                places[source] += _by_crop(place, crops) if by_crop else [place]
        if any(joined[source : source + 1]) and not by_crop:
            places[source] = _joined(places[source])
    here = functools.reduce(torch.logical_or, visual)
    in_order = tuple(sorted(itertools.chain(*places), key=_where))
    return Layout(ids, here, real, real, breaks, in_order, device)


def _where(place: Place) -> tuple[int, int]:
    return place.row, int(place.columns[0])


def _joined(places: list[Place]) -> list[Place]:
    """Pictures that follow each other without a token between them as one, one above the other."""
    out: list[Place] = []
    for place in sorted(places, key=_where):
        last = out[-1] if out else None
        if last is not None and _where(place) == (last.row, int(last.columns[-1]) + 1):
            columns = torch.cat([last.columns, place.columns])
            grid = last.grid[0] + place.grid[0], place.grid[1]
            crops = last.crops and place.crops and last.crops + place.crops
            out[-1] = last._replace(
                columns=columns, grid=grid, parts=last.parts + place.parts, crops=crops
            )
        else:
            out.append(place)
    return out


def _images(mask: Tensor, tokens: tuple[int, ...]) -> Iterable[tuple[int, int, Tensor]]:
    """The row, the number and the columns of every image whose features fill a mask `[B, L]`.

    Beams and several returned sequences repeat each sample's images, sample by sample, after the
    encoder ran.
    """
    columns = [row.nonzero().flatten() for row in mask]
    counts = [len(places) for places in columns]
    total, encoded = sum(counts), sum(tokens)
    sizes = f"{sorted(set(tokens))}" if tokens else "none"
    if encoded == 0 or total % encoded or len(mask) % (total // encoded):
        raise ValueError(
            f"{total} image placeholders are not whole images of {sizes} tokens "
            f"({len(tokens)} encoded)"
        )
    repeat, image = total // encoded, 0
    for first in range(0, len(mask), repeat):
        start, ends = image, [0]
        while ends[-1] < counts[first] and image < len(tokens):
            ends.append(ends[-1] + tokens[image])
            image += 1
        if ends[-1] != counts[first] or len(set(counts[first : first + repeat])) != 1:
            raise ValueError(
                f"a prompt's {counts[first]} image placeholders must be whole images, of "
                f"{list(tokens[start:image])} tokens"
            )
        for at, (begin, end) in enumerate(itertools.pairwise(ends), start):
            for row in range(first, first + repeat):
                yield row, at, columns[row][begin:end]
    if image != len(tokens):
        raise ValueError(f"{len(tokens)} images were encoded, but the prompts hold {image}")


def _crops(encoded: Encoded, image: int, patches: int) -> list[tuple[int, tuple[int, int]]]:
    """The tokens, and height and width, of the crops of an image; one of `patches` without any."""
    height, width = encoded.grids[image]
    if encoded.crops is None:
        return [(patches, (height, width))]
    counts = encoded.crops[image]
    if encoded.crop_grids is not None:
        return list(zip(counts, encoded.crop_grids[image], strict=True))
    return [
        (n, (n // width, width) if n % width == 0 and n <= height * width else (1, n))
        for n in counts
    ]


def _whole_grids(
    crops: Sequence[tuple[int, tuple[int, int]]],
) -> tuple[tuple[int, int], ...] | None:
    if any(count != height * width for count, (height, width) in crops):
        return None
    return tuple(grid for _, grid in crops)


def _by_crop(place: Place, crops: Sequence[tuple[int, tuple[int, int]]]) -> list[Place]:
    parts, first = [], 0
    for count, side in crops:
        columns = place.columns[first : first + count]
        own = (side,) if count == side[0] * side[1] else None
        parts.append(place._replace(columns=columns, grid=side, first=first, crops=own))
        first += count
    return parts


@dataclass(frozen=True)
class Shortened:
    """A batch without its dropped tokens, rows aligned at the right.

    Attributes:
        embeds: `[B, K, D]`.
        mask: `[B, K]` bool, or None if every slot is a token.
        positions: `[B, K]` int64, or `[3, B, K]`, `[4, B, K]` with spatial positions.
        removed: `[B, 1]` int64, by how much compact positions lag behind the prompt's; None
            with original positions.
        top: `[B, 1]` int64, the largest position of the prompt, with spatial positions; else None.
        keep: `[B, L]` bool, the tokens of the prompt that are left.
        order: `[B, K]` int64, the place in the prompt of each slot; of an unused one, any dropped.
        restore: `[B, L]` int64, for each token of the prompt the slot of the last token left at or
            before it (the row's first, if there is none).
        lengths: tokens left in each row, known on the host.
        slots: for each group, the place of each of its slots in the `B * K` slots, `[R * S]`;
            `B * K` where it is unused.
    """

    embeds: Tensor
    mask: Tensor | None
    positions: Tensor
    removed: Tensor | None
    top: Tensor | None
    keep: Tensor
    order: Tensor
    restore: Tensor
    lengths: tuple[int, ...]
    slots: tuple[Tensor, ...]


@step("shorten")
def shorten(
    embeds: Tensor, positions: Tensor, layout: Layout, chosen: Sequence[Selection], compact: bool,
    breaks: Tensor | None = None,
) -> Shortened:  # fmt: skip
    """Replace the visual tokens of `[B, L, D]` by those chosen of each group, at their places.

    `positions` is `[B, L]`, or has spatial dimensions before. Compact positions are the prompt's
    less the tokens dropped before, so they run without gaps whatever the padding was. `breaks`
    `[B, L]` bool on the CPU are the breaks that stay; None: none do.
    """
    batch, length, _ = embeds.shape
    device = embeds.device
    stay = layout.text
    if breaks is not None:
        stay = stay | (breaks & layout.valid)
    lengths = stay.sum(1).tolist()
    places = []
    for group, selection in zip(layout.groups, chosen, strict=True):
        for row, count in zip(group.sample_list, slot_counts(selection), strict=True):
            lengths[row] += count
        places.append(chosen_places(group.flat, selection, batch * length))
    left = compacted(embeds, upload(stay, device), places, lengths, chosen)
    removed, moved = None, positions
    if compact:
        dropped = upload(layout.valid & layout.visual, device) & ~left.keep
        before = dropped.cumsum(1)
        removed, moved = before[:, -1:], positions - before
    index = left.order.expand(*positions.shape[:-2], -1, -1)
    return Shortened(
        embeds=left.tokens,
        mask=left.mask,
        positions=moved.gather(-1, index),
        removed=removed,
        top=_largest(positions, layout) if positions.dim() == 3 else None,
        keep=left.keep,
        order=left.order,
        restore=left.restore,
        lengths=tuple(lengths),
        slots=left.slots,
    )


def _largest(positions: Tensor, layout: Layout) -> Tensor:
    """The largest of spatial positions in each prompt, `[B, 1]`: the model counts on from there, as
    a picture may reach further than the text after it, or be the end of the prompt."""
    valid = upload(layout.valid, positions.device)
    return positions[-3:].amax(0).masked_fill(~valid, 0).amax(1, keepdim=True)


def chosen_places(places: Tensor, selection: Selection, end: int) -> Tensor:
    """`[R * S]`: of the places `[R, N]` of some tokens those chosen; `end` for an unused slot."""
    if not selection.padded:
        return places.gather(1, selection.index).flatten()
    here = places.gather(1, selection.index.clamp_min(0))
    return torch.where(selection.index < 0, end, here).flatten()


class Compacted(NamedTuple):
    """Rows without their dropped tokens, aligned at the right; fields as in `Shortened`."""

    tokens: Tensor
    mask: Tensor | None
    keep: Tensor
    order: Tensor
    restore: Tensor
    slots: tuple[Tensor, ...]


def compacted(
    rows: Tensor, stay: Tensor, places: Sequence[Tensor], lengths: Sequence[int],
    chosen: Sequence[Selection],
) -> Compacted:  # fmt: skip
    """Rows `[B, L, D]` of which `stay [B, L]` and those chosen are left.

    `places` are the places of each group's slots in the `B * L` tokens, `B * L` where a slot is
    unused; `lengths` is what is left of each row.
    """
    batch, length, _ = rows.shape
    width, device = max(lengths), rows.device
    # Unused slots go to one extra place that is cut off.
    extra = 0, int(any(selection.padded for selection in chosen))
    keep = torch.nn.functional.pad(stay.flatten(), extra)  # a copy in any case
    keep.index_fill_(0, torch.cat(list(places)), True)
    keep = keep[: batch * length].view(batch, length)
    order = keep.int().argsort(dim=1, stable=True)[:, -width:]
    starts = [[[width - n] for n in lengths], [[at * width] for at in range(batch)]]
    shift, row = upload(torch.tensor(starts), device)
    slot = keep.cumsum(1) - 1 + shift  # of each kept token, in its row
    target = torch.nn.functional.pad((slot + row).flatten(), extra, value=batch * width)
    slots = tuple(target[here] for here in places)
    out = rows.gather(1, order[:, :, None].expand(-1, -1, rows.shape[2]))
    for where, selection in zip(slots, chosen, strict=True):
        out = _write(out, selection, where)
    mask = None if min(lengths) == width else keep.gather(1, order)
    return Compacted(out, mask, keep, order, slot.maximum(shift), slots)


def slot_counts(selection: Selection) -> list[int]:
    """Slots in use of each image; a device synchronisation if it is padded."""
    if selection.padded:
        return (selection.index >= 0).sum(1).tolist()
    return [selection.index.shape[1]] * len(selection.index)


def _write(out: Tensor, selection: Selection, where: Tensor) -> Tensor:
    """The rows `out [B, K, D]` with the merged tokens in their slots."""
    batch, width, model = out.shape
    tokens = selection.tokens.reshape(-1, model).to(out.dtype)
    flat = out.reshape(-1, model)
    if selection.padded:  # the extra place at the end takes what has none
        flat = torch.cat([flat, flat.new_zeros(1, model)])
    return flat.index_copy(0, where, tokens)[: batch * width].view(batch, width, model)


def merge_alike(selection: Selection, values: Tensor, blend: float) -> Tensor:
    """Other features `[R, N, D]` of the same tokens, merged as `selection` merged: `[R, S, D]`."""
    ones = torch.ones(values.shape[:2], device=values.device)
    return weighted_mean(values, selection.assign, selection.index, ones, blend)[0]
