"""Where rows of a branch look: the attention that they give to each visual token, layer after layer."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from photon.model.attention import padded_rows, starts_of
from photon.ops.layout import Layout
from photon.ops.selection.op import Selection


@dataclass(frozen=True)
class Sight:
    """Which rows look, what they may see, and which of that are visual tokens.

    Letters: B branches, A rows of the branch with most that look, L rows of the branch with most in sight.

    Attributes:
        rows: int64 [B, A] query rows that look; looks: bool [B, A] which of them are real.
        keys: int64 [B, L] key rows in the order in which they are seen.
        seen: bool [B, A, L] what each row may see.
        slots: int64 [B, L] flattened [S, N] index of the visual token that a key row is, -1 for text.
        shape: (S, N).
    """

    rows: Tensor
    looks: Tensor
    keys: Tensor
    seen: Tensor
    slots: Tensor
    shape: tuple[int, int]

    @classmethod
    def shared(cls, looking: Tensor, layout: Layout, num_context_rows: int) -> Sight:
        """Of branches behind a shared context; key rows are those of all contexts, then those of all branches."""
        own, context = layout.own_lengths, layout.context_lengths
        device = own.device
        span = torch.arange(int((own + context).max()), device=device)
        is_context = span < context[:, None]
        within = torch.where(is_context, layout.context_starts[:, None] + span, 0)
        after = num_context_rows + layout.own_starts[:, None] + span - context[:, None]
        is_real = span < (own + context)[:, None]
        keys = torch.where(is_context, within, torch.where(is_real, after, 0))
        # Slots of a context are counted through its own part of a table.
        slots = torch.where(is_context, layout.context_slots[within], -1)
        slots = torch.where(slots >= 0, slots + layout.first_pairs[:, None] * layout.num_columns, -1)
        return cls._of(looking, layout, layout.own_starts, context, keys, is_real, slots)

    @classmethod
    def pruned(cls, looking: Tensor, layout: Layout, selection: Selection) -> Sight:
        """Of branches after pruning, each behind rows that nobody shares."""
        lengths = selection.host_lengths
        keys, is_real = padded_rows(starts_of(lengths), lengths, selection.slots.device)
        slots = torch.where(is_real, selection.slots[keys], -1)
        own_starts = selection.lengths.cumsum(0) - layout.own_lengths
        return cls._of(looking, layout, own_starts, selection.lengths - layout.own_lengths, keys, is_real, slots)

    @classmethod
    def _of(
        cls,
        looking: Tensor,
        layout: Layout,
        own_starts: Tensor,
        before: Tensor,
        keys: Tensor,
        is_real: Tensor,
        slots: Tensor,
    ) -> Sight:
        """Lay out the rows that look.

        Args:
            looking: bool [Tb] branch rows that look.
            own_starts: [B] query row of each branch's first own row; before: [B] rows in its sight before that one.
        """
        own = layout.own_lengths
        place = torch.arange(int(own.max()), device=own.device)
        is_own = place < own[:, None]
        looks = is_own & looking[torch.where(is_own, layout.own_starts[:, None] + place, 0)]
        # Questions come first and hardly ever look: start where the first branch does.
        first = int(torch.where(looks.any(0), place, place.shape[0] - 1).min())
        place, looks, is_own = place[first:], looks[:, first:], is_own[:, first:]
        rows = own_starts[:, None] + torch.where(is_own, place, 0)
        span = torch.arange(keys.shape[1], device=own.device)
        seen = (span <= (before[:, None] + place)[:, :, None]) & is_real[:, None]
        return cls(rows, looks, keys, seen, slots, (layout.num_pairs, layout.num_columns))

    @torch.no_grad()
    def attention(self, q: Tensor, k: Tensor) -> Tensor:
        """Attention to each visual token, summed over heads and rows that look: float32 [S, N].

        Args:
            q: [Tq, H, d] rotated queries; k: [Tk, G, d] rotated keys.
        """
        with torch.autocast(q.device.type, enabled=False):
            queries = q[self.rows].float().unflatten(2, (k.shape[1], -1))
            products = torch.einsum("bagsd,blgd->bgsal", queries, k[self.keys].float()) / q.shape[-1] ** 0.5
            weights = products.masked_fill(~self.seen[:, None, None], -torch.inf).softmax(-1).sum((1, 2))
            weights = (weights * self.looks[:, :, None]).sum(1)
        flat = weights.new_zeros(self.shape[0] * self.shape[1] + 1)
        flat.index_add_(0, torch.where(self.slots >= 0, self.slots, flat.shape[0] - 1).flatten(), weights.flatten())
        return flat[:-1].unflatten(0, self.shape)
