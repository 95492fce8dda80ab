"""Geometry: one arithmetic in three forms, held against two other libraries, and back to the scan's millimetres."""

from __future__ import annotations

import dataclasses
import hashlib
import tracemalloc
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import SimpleITK
import torch

from photon.errors import PhotonError
from pipelines import resample_kernels
from pipelines.grids import VOLUME_SPECS, VolumeSpec, body_middle, frame_of, grid_affine, is_aligned
from pipelines.resample import IDENTITY, Mapping, resample_nearest, resample_scan, slab_makers
from pipelines.resample_plain import nearest_plain, resample_plain
from pipelines.resample_torch import resample_torch
from pipelines.scans.scan import Scan
from pipelines.volumes import percentiles, read_volume_record, resample, store_scan, write_volume

SPEC = VolumeSpec(spacing_mm=3.0, shape=(28, 56, 56), window_hu=(-1000, 1000))
FINE = Mapping(0.0, 30.0, 0.0)
"""Thirtieths of an HU, so that rounding hides nothing."""
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))]


def turn(angle: float, first: int, second: int) -> np.ndarray:
    """Rotation [3, 3] by an angle in the plane of two axes."""
    matrix = np.eye(3)
    matrix[[first, second], [first, second]] = np.cos(angle)
    matrix[first, second], matrix[second, first] = -np.sin(angle), np.sin(angle)
    return matrix


def random_affine(random: np.random.Generator, kind: str) -> np.ndarray:
    """Any axis order, flips, spacing and origin; as asked also tilted a little, tilted much or sheared."""
    affine = np.eye(4)
    signs, spacing = random.choice([-1.0, 1.0], 3), random.uniform(0.5, 5.0, 3)
    affine[:3, :3] = np.eye(3)[:, random.permutation(3)] * signs * spacing
    if kind == "sheared":
        affine[:3, :3] = affine[:3, :3] @ (np.eye(3) + random.uniform(-0.4, 0.4, (3, 3)) * np.triu(np.ones((3, 3)), 1))
    if kind == "nearly straight":
        affine[:3, :3] = turn(random.uniform(0.001, 0.004), 0, 2) @ affine[:3, :3]
    if kind == "tilted":
        affine[:3, :3] = turn(random.uniform(-0.7, 0.7), 0, 1) @ turn(random.uniform(-0.7, 0.7), 1, 2) @ affine[:3, :3]
    affine[:3, 3] = random.uniform(-200, 200, 3)
    return affine


def random_scan(random: np.random.Generator, dtype: type) -> np.ndarray:
    """Values in HU, of any shape, lying in memory along its first or its last axis."""
    values = random.uniform(-1024, 2000, random.integers(2, 40, 3)).astype(dtype)
    return np.asfortranarray(values) if random.random() < 0.7 else values


def random_spec(random: np.random.Generator) -> VolumeSpec:
    """A grid that is larger or smaller than the scan, or stretched over it."""
    spacing = None if random.random() < 0.25 else (float(random.uniform(0.8, 5)), 2.0, float(random.uniform(0.8, 5)))
    return VolumeSpec(spacing_mm=spacing, shape=(14 * int(random.integers(1, 4)), 28, 56), window_hu=(-1000, 1000))


def as_scan(array: np.ndarray, affine: np.ndarray, modality: str | None = None) -> Scan:
    return Scan(
        array=array,
        affine=affine,
        path=Path("scan"),
        sha256="",
        spacing_mm=(1.0, 1.0, 1.0),
        orientation="RAS",
        notes=(),
        modality=modality,
    )


@pytest.mark.parametrize("kind", ["straight", "nearly straight", "tilted", "sheared"])
def test_compiled_loops_give_the_bytes_of_plain_numpy(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resample_kernels, "SLAB", 4)  # several slabs in small scans too
    random = np.random.default_rng(len(kind))
    num_inside = 0
    for number in range(40):
        array = random_scan(random, (np.int16, np.float32)[number % 2])
        affine, spec = random_affine(random, kind), random_spec(random)
        mapping = Mapping(-200.5, 0.7, -1000) if number % 3 == 0 else IDENTITY
        frame = frame_of(array.shape, affine)
        expected = resample_plain(array, affine, frame, spec, mapping)
        found = resample_scan(array, affine, frame, spec, mapping)
        assert found.dtype == np.int16 and found.shape == spec.shape
        assert np.array_equal(found, expected), (kind, number)
        makers = slab_makers(array, affine, frame, spec, mapping, num_makers=2)
        slabs = [makers[n % 2](n).copy() for n in range(spec.shape[0] // 14)]
        assert {len(slab) for slab in slabs} == {14} and np.array_equal(np.concatenate(slabs), expected)
        labels = (np.abs(array) % 200).astype(np.uint8)
        assert np.array_equal(resample_nearest(labels, affine, spec), nearest_plain(labels, affine, frame, spec))
        num_inside += int((expected != -1000).any())
    assert num_inside > 35


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", ["straight", "tilted", "sheared"])
def test_torch_gives_the_bytes_of_plain_numpy(kind: str, device: str) -> None:
    random = np.random.default_rng(len(kind))
    for number in range(12):
        array = random_scan(random, (np.int16, np.float32)[number % 2])
        affine, spec = random_affine(random, kind), random_spec(random)
        mapping = Mapping(-200.5, 0.7, -1000) if number % 3 == 0 else IDENTITY
        frame = frame_of(array.shape, affine)
        expected = resample_plain(array, affine, frame, spec, mapping)
        assert np.array_equal(resample_torch(array, affine, frame, spec, mapping, device).cpu().numpy(), expected)


def test_volumes_of_today_are_those_of_yesterday() -> None:
    # Digests of specs and voxels as of the first version; numbers without sine and cosine, equal on every machine.
    digests_of_specs = {name: spec.digest() for name, spec in VOLUME_SPECS.items() if not name.startswith("vqa-")}
    assert digests_of_specs == {
        "demo": "2b431e00830f",
        "smoke": "95810d965f6c",
        "iso1mm": "8dd0b0096cd1",
        "photon": "238d2b4d961c",
    }
    array = (np.arange(40 * 50 * 30) * 7919 % 2311 - 1024).astype(np.int16).reshape((40, 50, 30), order="F")
    straight, tilted = np.diag([-2.0, 1.5, 3.0, 1.0]), np.eye(4)
    tilted[:3, :3] = np.array([[0.8, -0.6, 0], [0.6, 0.8, 0], [0, 0, 1]]) * 2.5
    digests = [
        hashlib.sha256(resample(as_scan(array, affine), SPEC, modality).voxels.data).hexdigest()[:16]
        for affine in (straight, tilted)
        for modality in ("ct", "mr")
    ]
    assert digests == ["7f996c4ba124f9da", "27dc44bbd7dd5895", "c03bb1b42f2345c6", "c9c182e9dbc1470e"]


@pytest.mark.parametrize("kind", ["straight", "nearly straight", "tilted", "sheared"])
def test_simpleitk_reads_the_same_values_on_the_same_grid(kind: str) -> None:
    random = np.random.default_rng(7)
    num_compared = 0
    for number in range(12):
        array = random_scan(random, (np.int16, np.float32)[number % 2])
        affine = random_affine(random, kind)
        spec = dataclasses.replace(random_spec(random), window_hu=(-32768, 32767), pad_hu=-32768)
        frame = frame_of(array.shape, affine)
        found = resample_scan(array.astype(np.float32) / 2, affine, frame, spec, FINE)
        image = itk_image(array.astype(np.float32) / 2, affine)
        grid = itk_image(np.zeros(tuple(reversed(spec.shape)), np.uint8), grid_affine(frame, spec))
        expected = SimpleITK.GetArrayFromImage(SimpleITK.Resample(image, grid, SimpleITK.Transform(), 2, -9999.0))
        is_inside = inside(array.shape, affine, grid_affine(frame, spec), spec)
        num_compared += int(is_inside.sum())
        assert np.abs(found / 30 - expected)[is_inside].max(initial=0.0) <= 0.05
        assert (found[~inside(array.shape, affine, grid_affine(frame, spec), spec, -1e-6)] == -32768).all()
    assert num_compared > 10000


def inside(
    shape: tuple[int, ...], affine: np.ndarray, grid: np.ndarray, spec: VolumeSpec, margin: float = 1e-6
) -> np.ndarray:
    """bool [Z, Y, X]: grid points in the scan's field of view, by matrices alone."""
    z, y, x = np.indices(spec.shape)
    points = np.stack([x, y, z, np.ones_like(x)]).reshape(4, -1)
    index = (np.linalg.inv(affine) @ grid @ points)[:3]
    size = np.array(shape)[:, None]
    return ((index > -0.5 + margin) & (index < size - 0.5 - margin)).all(axis=0).reshape(spec.shape)


def itk_image(array: np.ndarray, affine: np.ndarray) -> SimpleITK.Image:
    """An [i, j, k] array with a RAS matrix as SimpleITK sees it, in its LPS world."""
    image = SimpleITK.GetImageFromArray(np.ascontiguousarray(array.transpose(2, 1, 0)))
    lps = np.diag([-1.0, -1.0, 1.0]) @ affine[:3]
    spacing = np.linalg.norm(lps[:, :3], axis=0)
    image.SetSpacing(spacing.tolist())
    image.SetOrigin(lps[:, 3].tolist())
    image.SetDirection((lps[:, :3] / spacing).ravel().tolist())
    return image


def test_a_stretched_grid_is_that_of_the_published_loader() -> None:
    # It resizes the whole array, voxel edges onto voxel edges.
    array = np.random.default_rng(3).uniform(-900, 900, (37, 52, 31)).astype(np.float32)
    affine = np.diag([-0.8, -0.8, 2.5, 1.0])  # LPS: the array reversed is [Z, Y, X]
    spec = dataclasses.replace(VOLUME_SPECS["photon"], shape=(42, 56, 84), window_hu=(-32768, 32767))
    found = resample_scan(array, affine, frame_of(array.shape, affine), spec, FINE)
    resized = torch.nn.functional.interpolate(
        torch.from_numpy(array.transpose(2, 1, 0).copy())[None, None], size=spec.shape, mode="trilinear"
    )
    assert np.abs(found / 30 - resized[0, 0].numpy()).max() < 0.03
    assert VOLUME_SPECS["photon"].shape == (140, 280, 280) and VOLUME_SPECS["photon"].spacing_mm is None
    assert VOLUME_SPECS["iso1mm"].shape == (364, 364, 364) and VOLUME_SPECS["iso1mm"].spacing_mm == 1.0


@pytest.mark.parametrize("kind", ["straight", "nearly straight", "tilted", "sheared"])
@pytest.mark.parametrize("spacing_mm", [2.0, None])
def test_grid_points_lead_to_scan_millimetres_and_back(kind: str, spacing_mm: float | None) -> None:
    random = np.random.default_rng(1)
    spec = VolumeSpec(spacing_mm=spacing_mm, shape=(28, 28, 56), window_hu=(-30000, 30000))
    for _ in range(10):
        affine, shape = random_affine(random, kind), tuple(int(n) for n in random.integers(20, 40, 3))
        frame = frame_of(shape, affine)
        grid = grid_affine(frame, spec)
        index = np.array([*random.uniform(0, 27, (3,)), 1.0])
        assert np.abs(np.linalg.inv(grid) @ grid @ index - index).max() < 1e-9
        # The grid's centre is the field of view's, and its axes point to left, back and head.
        middle = grid @ [27.5, 13.5, 13.5, 1]
        assert np.abs(middle - affine @ [*((n - 1) / 2 for n in shape), 1]).max() < 1e-9
        if kind != "sheared":
            assert grid[0, 0] < 0 and grid[1, 1] < 0 and grid[2, 2] > 0
        # A scan that holds its own millimetres shows them at the right places of the grid.
        i, j, k = np.indices(shape)
        for world in range(3):
            mm = sum(affine[world, axis] * part for axis, part in enumerate((i, j, k))) + affine[world, 3]
            found = resample_scan(mm.astype(np.float32), affine, frame, spec, FINE)
            z, y, x = np.indices(spec.shape)
            expected = grid[world, 0] * x + grid[world, 1] * y + grid[world, 2] * z + grid[world, 3]
            is_inner = inside(shape, affine, grid, spec, 0.5 + 1e-6)  # in the outermost half voxel the edge value holds
            assert np.abs(found / 30 - expected)[is_inner].max(initial=0.0) < 0.02


def test_whichever_way_memory_runs_no_copy_of_the_scan_is_made() -> None:
    array = np.random.default_rng(0).integers(-1000, 1000, (120, 130, 140), np.int16)
    spec = VolumeSpec(spacing_mm=1.0, shape=(84, 56, 56), window_hu=(-1000, 1000))
    voxels = []
    for laid_out in (array, np.asfortranarray(array)):
        resample_scan(laid_out, np.eye(4), frame_of(array.shape, np.eye(4)), spec)  # compiled before memory is counted
        tracemalloc.start()
        voxels.append(resample_scan(laid_out, np.eye(4), frame_of(array.shape, np.eye(4)), spec))
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < voxels[0].nbytes + 33 * 130 * 140 * 2 + 100_000
    assert np.array_equal(*voxels)


@pytest.mark.parametrize("num_threads", [1, 3])
@pytest.mark.parametrize("kind", ["straight", "tilted"])
def test_stored_slab_by_slab_is_the_same_file(kind: str, num_threads: int, tmp_path: Path) -> None:
    random = np.random.default_rng(2)
    for modality in ("auto", "ct", "mr"):
        scan = as_scan(random_scan(random, np.int16), random_affine(random, kind))
        record = store_scan(scan, SPEC, tmp_path / "slabs", modality, num_threads=num_threads)
        volume = resample(scan, SPEC, modality)
        assert record.slabs_sha256 == write_volume(volume, tmp_path / "whole")
        assert (tmp_path / "slabs").read_bytes() == (tmp_path / "whole").read_bytes()
        assert record.metadata == volume.metadata == read_volume_record(tmp_path / "slabs").metadata


@pytest.mark.parametrize("device", DEVICES)
def test_torch_stores_the_same_file(device: str, tmp_path: Path) -> None:
    random = np.random.default_rng(3)
    for kind in ("straight", "tilted"):
        scan = as_scan(random_scan(random, np.int16), random_affine(random, kind), "ct")
        for name, place, num_threads in (("loops", None, 1), ("torch", device, 2)):
            store_scan(scan, SPEC, tmp_path / name, num_threads=num_threads, device=place)
        assert (tmp_path / "loops").read_bytes() == (tmp_path / "torch").read_bytes()


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("full"), RuntimeError("no driver"), AssertionError("no CUDA")]
)
def test_the_cpu_does_what_a_gpu_cannot(error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scan = as_scan(random_scan(np.random.default_rng(4), np.int16), np.eye(4), "ct")
    store_scan(scan, SPEC, tmp_path / "cpu")
    monkeypatch.setattr("pipelines.resample_torch.resample_torch", Mock(side_effect=error))
    store_scan(scan, SPEC, tmp_path / "gpu", device="cuda")
    assert (tmp_path / "cpu").read_bytes() == (tmp_path / "gpu").read_bytes()


def test_values_of_other_types_and_scattered_memory_are_read_too() -> None:
    array = np.random.default_rng(0).integers(0, 200, (20, 30, 40))
    frame, expected = frame_of(array.shape, np.eye(4)), None
    for other in (array.astype(np.int16), array, array.astype(np.uint8), array.astype(np.float64)):
        for laid_out in (other, np.repeat(other, 2, axis=1)[:, ::2]):
            found = resample_scan(laid_out, np.eye(4), frame, SPEC)
            expected = found if expected is None else expected
            assert np.array_equal(found, expected)


@pytest.mark.parametrize("pad_hu", [-1000, -3000, 500])
def test_a_grid_beside_the_scan_is_padding(pad_hu: int) -> None:
    array = np.full((10, 10, 10), 700, np.int16)
    spec = VolumeSpec(spacing_mm=1.0, shape=(14, 28, 28), window_hu=(-1000, 1000), pad_hu=pad_hu)
    for affine in (np.eye(4), np.eye(4) @ np.block([[turn(0.5, 0, 1), np.zeros((3, 1))], [np.zeros((1, 3)), 1.0]])):
        frame = frame_of(array.shape, affine, middle=(200.0, 4.5, 4.5))
        assert (resample_scan(array, affine, frame, spec) == max(pad_hu, -1000)).all()
        assert not resample_nearest(array, affine, spec, frame).any()


@pytest.mark.parametrize("kind", ["straight", "tilted"])
def test_a_grid_can_be_centred_on_the_body(kind: str) -> None:
    random = np.random.default_rng(5)
    spec = VolumeSpec(spacing_mm=2.0, shape=(28, 56, 56), window_hu=(-1000, 1000), crop="body")
    for _ in range(5):
        affine = random_affine(random, kind)
        array = np.full((60, 64, 56), -1000, np.int16)
        array[6:31, 30:61, 10:40] = 50
        array[50, 5, 50] = 2000  # a speck is no body
        assert body_middle(array) == (18.0, 45.0, 24.5)
        volume = resample(as_scan(array, affine), spec, "ct")
        centre = volume.affine @ [27.5, 27.5, 13.5, 1]
        assert np.abs(centre - affine @ [18.0, 45.0, 24.5, 1]).max() < 1e-9
        assert is_aligned(frame_of(array.shape, affine), spec) == (kind == "straight")
        frame = frame_of(array.shape, affine, body_middle(array))
        expected = resample_plain(array, affine, frame, spec, IDENTITY)
        assert np.array_equal(volume.voxels, expected) and volume.voxels.max() == 50


def test_without_a_body_the_field_of_view_stays() -> None:
    array = np.random.default_rng(0).integers(0, 900, (20, 20, 20), np.int16)
    body = dataclasses.replace(SPEC, crop="body")
    for scan, modality in ((as_scan(array, np.eye(4)), "mr"), (as_scan(array - 2000, np.eye(4)), "ct")):
        volume = resample(scan, body, modality)
        assert any("no body found" in note for note in volume.metadata["notes"])
        assert np.array_equal(volume.voxels, resample(scan, SPEC, modality).voxels)


def test_crop_enters_the_digest_only_when_it_is_chosen() -> None:
    body = dataclasses.replace(SPEC, crop="body")
    assert "crop" not in SPEC.as_dict() and body.as_dict()["crop"] == "body"
    assert VolumeSpec.from_dict(body.as_dict()) == body and body.digest() != SPEC.digest()
    for wrong in ({"crop": "head"}, {"crop": "body", "spacing_mm": None}):
        with pytest.raises(PhotonError, match="SPEC_INVALID"):
            dataclasses.replace(SPEC, **wrong)


def test_percentiles_are_those_of_numpy() -> None:
    random = np.random.default_rng(0)
    for size in [(2, 2, 2), (5, 7, 11), (40, 50, 60)]:
        for low, high in [(-32768, 32768), (-5, 5), (0, 4000)]:
            array = random.integers(low, high, size).astype(np.int16)
            for laid_out in (array, np.asfortranarray(array), array[:, ::-1], array.astype(np.float32)):
                assert percentiles(laid_out) == tuple(np.percentile(laid_out, (0.5, 99.5)).tolist())


def test_the_file_says_its_modality_unless_told_otherwise() -> None:
    array = np.random.default_rng(0).integers(0, 900, (20, 20, 20), np.int16)
    for said, asked, kind, source in [
        (None, "auto", "mr", "inferred"),
        ("ct", "auto", "ct", "header"),
        ("pt", "auto", "pt", "header"),
        ("pt", "ct", "ct", "declared"),
    ]:
        metadata = resample(as_scan(array, np.eye(4), said), SPEC, asked).metadata
        assert (metadata["modality"], metadata["modality_source"]) == (kind, source)
