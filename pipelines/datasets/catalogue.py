"""Which datasets can be imported, by the names that the command line has for them."""

from __future__ import annotations

from pipelines.datasets.abdomen_atlas import AbdomenAtlas
from pipelines.datasets.base import Adapter
from pipelines.datasets.chat import Chat
from pipelines.datasets.ct_rate import CtRate
from pipelines.datasets.deep_tumor_vqa import DeepTumorVqa
from pipelines.datasets.m3d import M3D
from pipelines.datasets.rad_3d import Rad3D

_ADAPTERS: tuple[Adapter, ...] = (CtRate(), Rad3D(), DeepTumorVqa(1), DeepTumorVqa(2), M3D(), AbdomenAtlas(), Chat())

DATASETS: dict[str, Adapter] = {adapter.name: adapter for adapter in _ADAPTERS}
