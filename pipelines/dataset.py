"""Preprocessed volumes and questions as packed training batches, drawn from the seed and the step alone."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from photon.config import PhotonConfig
from photon.errors import PhotonError
from photon.grid import Grid, num_visual_tokens, patchify
from photon.model.contexts import encoded, reduced
from photon.model.packing import IGNORE_INDEX, Branch, Context, pack_batch
from photon.model.vision import VisionTower
from photon.training.faults import naming
from photon.training.perturb import draw_kind, perturb
from photon.training.step import TrainingBatch
from pipelines.manifest import MANIFEST_NAME, read_manifest
from pipelines.questions import Question, read_questions
from pipelines.text import Prompter
from pipelines.volumes import Volume, normalise, read_volume


@dataclass(frozen=True)
class LabelledScan:
    """A preprocessed scan and the questions asked about it."""

    volume: Volume
    questions: tuple[Question, ...]


def read_split(data: Path, split: str) -> list[LabelledScan]:
    """Read the scans of a split from a data folder, in order of their ids.

    Raises:
        PhotonError: ``SPLIT_EMPTY`` when no preprocessed scan has questions in this split; whatever reading
            the manifest, a volume or the questions raises.
    """
    by_scan: dict[str, list[Question]] = defaultdict(list)
    for question in read_questions(data / "questions.jsonl"):
        if question.split == split:
            by_scan[question.scan_id].append(question)
    scans = []
    for row in read_manifest(data / "volumes" / MANIFEST_NAME).filter(status="ok").iter_rows(named=True):
        if questions := by_scan.get(row["scan_id"]):
            volume = read_volume(data / "volumes" / row["volume"])
            scans.append(LabelledScan(volume, tuple(questions)))
    if not scans:
        raise PhotonError(
            "SPLIT_EMPTY",
            data,
            f"no preprocessed scan has questions in the split {split!r}.",
            "Preprocess the scans of this data folder first; if questions.jsonl has none of this split, make it with a "
            "larger share (`--val-percent`, `--test-percent`).",
        )
    return scans


def volume_patches(volume: Volume, config: PhotonConfig) -> tuple[Tensor, Grid]:
    """Patches [P, 14*14*14] in [0, 1] of a preprocessed volume, and its grid."""
    voxels = torch.from_numpy(normalise(volume.voxels, volume.spec.window_hu))
    return patchify(voxels, config.vision)


def scan_context(volume: Volume, prompter: Prompter, config: PhotonConfig) -> Context:
    """The shared prefix of every prompt about a scan."""
    patches, grid = volume_patches(volume, config)
    return context_of(patches, grid, prompter, config)


def context_of(patches: Tensor, grid: Grid, prompter: Prompter, config: PhotonConfig) -> Context:
    """The shared prefix of every prompt about the patches of one whole volume, with the tokens that `config` lets in.

    What is empty is decided here, from what the model would see: a scan spoilt for training goes the way that a
    spoilt scan goes when it is scored.
    """
    ids = prompter.context_ids([num_visual_tokens(grid, config.vision)])
    return reduced(Context(ids, patches, (grid,)), config)


def empty_context(config: PhotonConfig) -> Context:
    """The context of a text-only prompt."""
    return Context(torch.zeros(0, dtype=torch.long), torch.zeros(0, config.vision.patch_voxels), ())


@dataclass(frozen=True, kw_only=True)
class Draw:
    """How batches are drawn.

    Attributes:
        scans_per_step, questions_per_scan: size of a batch.
        max_shift: voxels along z, y, x by which a volume may move, as if the patient lay elsewhere.
        robust_probability: odds that a scan is spoilt (robustness objective).
        flip_probability: odds that a branch's keep mask is inverted while flips are on.
        whole_probability: odds that a branch keeps every token in the hard stage, so that what it looks at teaches the
            scores of tokens that would have been dropped.
    """

    scans_per_step: int
    questions_per_scan: int
    max_shift: tuple[int, int, int]
    robust_probability: float
    flip_probability: float
    whole_probability: float = 0.0


@dataclass(frozen=True)
class _DrawnScan:
    """A scan of a step: its name, what makes its context, whether that is spoilt, and its drawn branches."""

    name: str
    context: Callable[[], Context]
    is_spoilt: bool
    branches: list[tuple[Tensor, Tensor]]


class BatchSource:
    """Training batches of a split. Batch ``step`` depends on the seed and the step, so resuming needs no state."""

    def __init__(
        self,
        scans: Sequence[LabelledScan],
        prompter: Prompter,
        config: PhotonConfig,
        draw: Draw,
        seed: int,
        tower: VisionTower | None = None,
    ) -> None:
        """Draw from scans and their questions.

        Args:
            tower: a vision tower that learns no more. Batches then hold its tokens instead of patches: those of a clean
                scan are made when it is first drawn and kept (float32, in memory), those of a spoilt one every time.

        Raises:
            PhotonError: ``CONFIG_INVALID`` when there is a tower and volumes move, so that no scan comes twice.
        """
        self.scans, self.prompter, self.config, self.seed, self.tower = scans, prompter, config, seed, tower
        self.draw = _without_moves(draw, tower)
        self._encoded: dict[int, Context] = {}
        self._branches = [[self._branch_tokens(q, True) for q in scan.questions] for scan in scans]
        self._blind = [[self._branch_tokens(q, False) for q in scan.questions] for scan in scans]

    def batch(self, step: int, with_flips: bool) -> TrainingBatch:
        """Batch of scans with their questions."""
        return self.parts(step, with_flips, [0], 1)[0]

    def parts(self, step: int, with_flips: bool, numbers: Sequence[int], count: int) -> list[TrainingBatch]:
        """Some of the ``count`` micro-batches to which the scans of a step's batch are dealt in turn.

        What is drawn for a step does not depend on them. A clean scan is cut into patches only for a micro-batch that
        is asked for; a spoilt one always, as its noise comes out of the step's random numbers.

        Args:
            numbers: of the micro-batches, from 0.

        Returns:
            The micro-batches in the order of ``numbers``, without those that no scan was left for.

        Raises:
            PhotonError: whatever reading a scan raises, with the scan named; ``TRAINING_FAILED`` for other faults.
        """
        generator = self._generator(step)
        drawn = [self._draw_scan(index, generator) for index in self._scan_order(step)]
        odds = self.draw.flip_probability if with_flips else 0.0
        num_branches = [len(scan.branches) for scan in drawn]
        flips = (torch.rand(sum(num_branches), generator=generator) < odds).split(num_branches)
        wholes = (torch.rand(sum(num_branches), generator=generator) < self.draw.whole_probability).split(num_branches)
        return [self._packed(drawn[n::count], flips[n::count], wholes[n::count]) for n in numbers if n < len(drawn)]

    def with_draw(self, draw: Draw) -> BatchSource:
        """The same scans drawn otherwise; what a tower encoded is shared. Raises as the constructor does."""
        other = copy.copy(self)
        other.draw = _without_moves(draw, self.tower)
        return other

    def names(self, step: int, numbers: Sequence[int], count: int) -> list[str]:
        """Ids of the scans in the micro-batches that :meth:`parts` makes."""
        order = self._scan_order(step)
        return [self._name(index) for number in numbers for index in order[number::count]]

    def blind_batch(self, step: int) -> TrainingBatch:
        """The same questions without their scans."""
        return self.blind_parts(step, [0], 1)[0]

    def blind_parts(self, step: int, numbers: Sequence[int], count: int) -> list[TrainingBatch]:
        """Micro-batches as of :meth:`parts`, of the same questions without their scans."""
        generator = self._generator(step)
        drawn = [(index, self._drawn(self._blind[index], generator)) for index in self._scan_order(step)]
        items = []
        for mine in (drawn[n::count] for n in numbers if n < len(drawn)):
            branches = [Branch(0, *tokens) for _, own in mine for tokens in own]
            nothing = torch.zeros(len(branches), dtype=torch.bool)
            packed = pack_batch([empty_context(self.config)], branches, self.config)
            items.append(TrainingBatch(packed, nothing, nothing, None, tuple(self._name(index) for index, _ in mine)))
        return items

    def _generator(self, step: int) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed * 1_000_003 + step)

    def _scan_order(self, step: int) -> list[int]:
        """Scans of a step. An epoch visits every scan once, in an order of its own; scans that do not fill a last
        batch wait for a later epoch."""
        per_epoch = max(len(self.scans) // self.draw.scans_per_step, 1)
        epoch, place = divmod(step, per_epoch)
        shuffler = torch.Generator().manual_seed(self.seed * 7_919 + epoch)
        order = torch.randperm(len(self.scans), generator=shuffler).tolist()
        return order[place * self.draw.scans_per_step :][: self.draw.scans_per_step]

    def _drawn(self, branches: list[tuple[Tensor, Tensor]], generator: torch.Generator) -> list[tuple[Tensor, Tensor]]:
        order = torch.randperm(len(branches), generator=generator)[: self.draw.questions_per_scan]
        return [branches[i] for i in order.tolist()]

    def _draw_scan(self, index: int, generator: torch.Generator) -> _DrawnScan:
        with naming([self._name(index)], "reading"):
            shift = draw_shift(self.draw.max_shift, generator)
            is_spoilt = float(torch.rand((), generator=generator)) < self.draw.robust_probability
            context = self._spoilt(index, shift, generator) if is_spoilt else partial(self._clean, index, shift)
            return _DrawnScan(self._name(index), context, is_spoilt, self._drawn(self._branches[index], generator))

    def _packed(self, drawn: Sequence[_DrawnScan], flips: Sequence[Tensor], wholes: Sequence[Tensor]) -> TrainingBatch:
        contexts, branches = [], []
        for place, scan in enumerate(drawn):
            with naming([scan.name], "reading"):
                contexts.append(scan.context())
            branches += [Branch(place, *tokens) for tokens in scan.branches]
        is_perturbed = torch.tensor([scan.is_spoilt for scan in drawn for _ in scan.branches])
        is_flipped = torch.cat(list(flips)) & ~is_perturbed
        is_whole = torch.cat(list(wholes)) & ~is_perturbed & ~is_flipped
        names = tuple(scan.name for scan in drawn)
        with naming(names, "packing"):
            return TrainingBatch(pack_batch(contexts, branches, self.config), is_perturbed, is_flipped, is_whole, names)

    def _name(self, index: int) -> str:
        return self.scans[index].questions[0].scan_id

    def _clean(self, index: int, shift: tuple[int, ...]) -> Context:
        if self.tower is None:
            return context_of(*self._patches(index, shift), self.prompter, self.config)
        if index not in self._encoded:
            context = context_of(*self._patches(index, shift), self.prompter, self.config)
            self._encoded[index] = encoded(context, self.tower)
        return self._encoded[index]

    def _spoilt(self, index: int, shift: tuple[int, ...], generator: torch.Generator) -> Callable[[], Context]:
        """What makes the context of a scan whose patches are spoilt here and now."""
        patches, grid = self._patches(index, shift)
        spoilt = perturb(patches, draw_kind(generator), generator)

        def context() -> Context:
            made = context_of(spoilt, grid, self.prompter, self.config)
            return made if self.tower is None else encoded(made, self.tower)

        return context

    def _patches(self, index: int, shift: tuple[int, ...]) -> tuple[Tensor, Grid]:
        volume = self.scans[index].volume
        moved = shifted(volume.voxels, shift, volume.spec.window_hu[0])
        return patchify(torch.from_numpy(normalise(moved, volume.spec.window_hu)), self.config.vision)

    def _branch_tokens(self, question: Question, has_volume: bool) -> tuple[Tensor, Tensor]:
        asked = self.prompter.branch_ids(question.question, has_volume=has_volume)
        answer = self.prompter.answer_ids(question.answer)
        return torch.cat([asked, answer]), torch.cat([torch.full_like(asked, IGNORE_INDEX), answer])


def _without_moves(draw: Draw, tower: VisionTower | None) -> Draw:
    """The draw, refused where volumes move under a tower that encodes them once."""
    if tower is not None and any(draw.max_shift):
        fact = f"volumes move by up to {draw.max_shift} voxels, and a frozen vision tower encodes a scan only once."
        raise PhotonError("CONFIG_INVALID", "max_shift", fact, "Set it to (0, 0, 0), or let the tower learn.")
    return draw


def draw_shift(limits: tuple[int, int, int], generator: torch.Generator) -> tuple[int, ...]:
    """Whole voxels along z, y and x, each within its limit either way."""
    span = torch.tensor(limits)
    return tuple(((torch.rand(3, generator=generator) * (2 * span + 1)).long() - span).tolist())


def shifted(voxels: np.ndarray, shift: tuple[int, ...], fill: int) -> np.ndarray:
    """Move a volume [Z, Y, X] by whole voxels, filling what comes in from outside."""
    out = np.full_like(voxels, fill)
    shift = tuple(int(np.clip(s, -size, size)) for s, size in zip(shift, voxels.shape, strict=True))
    target = tuple(slice(max(s, 0), size + min(s, 0)) for s, size in zip(shift, voxels.shape, strict=True))
    source = tuple(slice(max(-s, 0), size + min(-s, 0)) for s, size in zip(shift, voxels.shape, strict=True))
    out[target] = voxels[source]
    return out
