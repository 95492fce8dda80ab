"""From a scan file to a cached volume of 364 x 364 x 364 int16 voxels of 1 mm, clipped to -1000..1000 HU: the job of
`bench_volumes.py`, in one process and by one library. Run by it as a program of its own:

    volume_jobs.py JOB OUTPUT REPEATS SCAN...

does the first scan once to warm up, says "ready", waits for a line, does all scans, and tells times and peak memory.
The other libraries do what their documentation shows for this job and store by `np.save`; only ours compresses,
hashes and syncs what it stores, verifies the file's checksum and its header.
"""

from __future__ import annotations

import gzip
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

Job = Callable[[Path, Path], None]

SIDE = 364
WINDOW_HU = (-1000, 1000)
BLOCK = 1 << 22


def photon() -> Job:
    """This project, with the threads that `photon preprocess` gives a lone scan, unless the environment says one."""
    from pipelines.grids import VOLUME_SPECS
    from pipelines.preprocess import MAX_THREADS
    from pipelines.scans.scan import read_scan
    from pipelines.volumes import store_scan
    from pipelines.workers import default_num_workers

    num_threads = int(os.environ.get("OMP_NUM_THREADS", min(MAX_THREADS, default_num_workers())))

    def job(source: Path, target: Path) -> None:
        store_scan(read_scan(source), VOLUME_SPECS["iso1mm"], target, "ct", num_threads=num_threads)

    return job


def simpleitk() -> Job:
    """SimpleITK: one resampling onto the target grid."""
    import SimpleITK as sitk

    def job(source: Path, target: Path) -> None:
        scan = sitk.ReadImage(str(source))
        centre = scan.TransformContinuousIndexToPhysicalPoint([(n - 1) / 2 for n in scan.GetSize()])
        onto = sitk.ResampleImageFilter()
        onto.SetSize([SIDE] * 3)
        onto.SetOutputSpacing([1.0] * 3)
        onto.SetOutputOrigin([value - (SIDE - 1) / 2 for value in centre])
        onto.SetInterpolator(sitk.sitkLinear)
        onto.SetDefaultPixelValue(-1000)
        onto.SetOutputPixelType(sitk.sitkFloat32)
        volume = onto.Execute(scan)
        del scan
        _save(sitk.GetArrayFromImage(volume), target)

    return job


def monai() -> Job:
    """MONAI: orientation, spacing, then crop or pad to size."""
    import torch
    from monai.transforms import Compose, LoadImage, Orientation, ResizeWithPadOrCrop, Spacing

    steps = Compose(
        [
            LoadImage(image_only=True, ensure_channel_first=True),
            Orientation(axcodes="LPS"),
            Spacing(pixdim=(1.0, 1.0, 1.0), mode="bilinear"),
            ResizeWithPadOrCrop(spatial_size=(SIDE,) * 3, mode="constant", value=-1000),
        ]
    )

    def job(source: Path, target: Path) -> None:
        with torch.inference_mode():
            volume = steps(source)
        _save(volume[0].numpy().transpose(2, 1, 0), target)

    return job


def monai_onto_grid() -> Job:
    """MONAI: one resampling onto the target grid, which is given by its matrix."""
    import torch
    from monai.transforms import LoadImage, SpatialResample

    load, onto = LoadImage(image_only=True, ensure_channel_first=True), SpatialResample(mode="bilinear")

    def job(source: Path, target: Path) -> None:
        with torch.inference_mode():
            scan = load(source)
            middle = torch.tensor([*((n - 1) / 2 for n in scan.shape[1:]), 1.0], dtype=scan.affine.dtype)
            grid = torch.diag(torch.tensor([-1.0, -1.0, 1.0, 1.0], dtype=scan.affine.dtype))
            grid[:3, 3] = (scan.affine @ middle)[:3] - grid[:3, :3] @ torch.full_like(middle[:3], (SIDE - 1) / 2)
            # Outside it fills with 0, which is made air.
            volume = onto(scan + 1000, dst_affine=grid, spatial_size=(SIDE,) * 3, padding_mode="zeros") - 1000
        _save(volume[0].numpy().transpose(2, 1, 0), target)

    return job


def torchio() -> Job:
    """TorchIO: orientation, spacing, then crop or pad to size."""
    import torchio as tio

    steps = tio.Compose(
        [tio.ToCanonical(), tio.Resample(1.0), tio.CropOrPad(SIDE, padding_mode=-1000), tio.Clamp(*WINDOW_HU)]
    )

    def job(source: Path, target: Path) -> None:
        volume = steps(tio.ScalarImage(source)).data[0].numpy()
        _save(volume[::-1, ::-1].transpose(2, 1, 0), target)

    return job


def decompress_isal() -> Job:
    """The voxels' bytes out of gzip with its checksum verified, by the library this project uses."""
    from isal import igzip

    def job(source: Path, target: Path) -> None:
        with igzip.open(source, "rb") as stream:
            _read_all(stream)

    return job


def decompress_zlib() -> Job:
    """The same by the standard library, as nibabel does."""

    def job(source: Path, target: Path) -> None:
        with gzip.open(source, "rb") as stream:
            _read_all(stream)

    return job


JOBS: dict[str, Callable[[], Job]] = {
    "photon": photon,
    "simpleitk": simpleitk,
    "monai": monai,
    "monai_onto_grid": monai_onto_grid,
    "torchio": torchio,
    "decompress_isal": decompress_isal,
    "decompress_zlib": decompress_zlib,
}


def main() -> None:
    """Do what the arguments say."""
    name, output, repeats = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    scans = [Path(text) for text in sys.argv[4:]]
    job = JOBS[name]()
    target = output / f"{name}.volume"
    job(scans[0], target)
    print("ready", flush=True)
    sys.stdin.readline()
    before = time.process_time()
    times = []
    for _ in range(repeats):
        for scan in scans:
            started = time.perf_counter()
            job(scan, target)
            times.append(time.perf_counter() - started)
    print(json.dumps({"times_s": times, "cpu_s": time.process_time() - before, "peak_mib": peak_mib()}), flush=True)


def peak_mib() -> float:
    """Largest resident memory of this process; `getrusage` would count that of the process that started it, too."""
    status = Path("/proc/self/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1]) / 1024


def read_volume(name: str, path: Path) -> np.ndarray:
    """int16 [Z, Y, X] that a job stored."""
    if name != "photon":
        return np.load(path)
    from pipelines.volumes import read_volume as read_ours

    return read_ours(path).voxels


def _save(values: np.ndarray, target: Path) -> None:
    values = np.clip(values, *WINDOW_HU, out=values if values.flags.writeable else None)
    voxels = np.rint(values, out=values if values.flags.writeable and values.dtype.kind == "f" else None)
    with target.open("wb") as stream:
        np.save(stream, np.ascontiguousarray(voxels.astype(np.int16)))


def _read_all(stream: gzip.GzipFile) -> None:
    """Header, voxels into memory taken once, and on to the end, where the checksum is."""
    header = stream.read(352)
    shape = np.frombuffer(header, "<i2", 8, 40)[1:4].astype(np.int64)
    voxels = memoryview(np.empty(int(shape.prod()) * int(np.frombuffer(header, "<i2", 1, 72)[0]) // 8, np.uint8))
    filled = 0
    while count := stream.readinto(voxels[filled : filled + BLOCK]):
        filled += count
    stream.read()


if __name__ == "__main__":
    main()
