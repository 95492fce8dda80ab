"""Scans in archives: found, taken out one by one, and nothing else done that an archive asks for."""

from __future__ import annotations

import io
import os
import stat
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from photon.errors import PhotonError
from pipelines.scans import archives
from pipelines.scans.find import Source, find_scans, located, read_source
from pipelines.scans.nifti import write_scan

AFFINE = np.diag([3.0, 3.0, 4.0, 1.0])
MHD = (
    "ObjectType = Image\nNDims = 3\nDimSize = 4 5 6\nElementSpacing = 3 3 4\nTransformMatrix = 1 0 0 0 1 0 0 0 1\n"
    "ElementType = MET_SHORT\nElementDataFile = {}\n"
)


def scan_bytes(tmp_path: Path, seed: int = 0, ending: str = ".nii.gz") -> bytes:
    path = tmp_path / f"made{ending}"
    write_scan(np.random.RandomState(seed).randint(-900, 900, (9, 10, 11)).astype(np.int16), AFFINE, path)
    return path.read_bytes()


def write_archive(path: Path, files: dict[str, bytes]) -> Path:
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, content in files.items():
                archive.writestr(name, content)
        return path
    with tarfile.open(path, "w" if path.suffix == ".tar" else "w:gz") as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def write_tar_entry(path: Path, change: Callable[[tarfile.TarInfo], None], content: bytes = b"") -> Path:
    """A tar with one entry that is not what it should be."""
    with tarfile.open(path, "w") as archive:
        info = tarfile.TarInfo("a.nii")
        info.size = len(content)
        change(info)
        archive.addfile(info, io.BytesIO(content) if content else None)
    return path


def refusal(path: Path) -> PhotonError:
    """Why an archive as a whole is refused; nothing is left behind by finding that out."""
    before = sorted(path.parent.rglob("*"))
    (source,) = find_scans(path.parent)
    assert source.path == path and source.relative == path.name
    with pytest.raises(PhotonError) as caught, located(source):
        raise AssertionError("it must not be opened")
    assert sorted(path.parent.rglob("*")) == before
    return caught.value


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An empty folder, which is searched; `tmp_path` itself is for what must not be found."""
    path = tmp_path / "in"
    path.mkdir()
    return path


@pytest.mark.parametrize("name", ["all.tar", "all.tar.gz", "all.tgz", "all.zip", "ALL.ZIP"])
def test_scans_in_archives_are_found_and_read(tmp_path: Path, folder: Path, name: str) -> None:
    voxels = np.arange(120, dtype="<i2")
    content = {
        "./one/a.nii.gz": scan_bytes(tmp_path, 1),
        "one/b.nii": scan_bytes(tmp_path, 2, ".nii"),
        "two/a.mhd": MHD.format("a.raw").encode(),
        "two/a.raw": voxels.tobytes(),
        "c.mha": MHD.format("LOCAL").encode() + voxels.tobytes(),
        "readme.txt": b"no scan",
        "__MACOSX/one/._b.nii": b"no scan",
        "one/.hidden.nii": b"no scan",
        "old.mgz": b"another format",
        "inner.tar.gz": b"an archive in an archive",
    }
    path = folder / "made.tar"
    write_archive(folder / name.lower(), content).rename(folder / name)
    sources = {source.relative.removeprefix(f"{name}/"): source for source in find_scans(folder)}
    assert not path.exists()
    assert sorted(sources) == ["c.mha", "inner.tar.gz", "old.mgz", "one/a.nii.gz", "one/b.nii", "two/a.mhd"]
    assert sources["c.mha"].scan_id == "c" and sources["one/b.nii"].scan_id == "b"
    assert len({source.scan_id for source in sources.values()}) == 6  # a.nii.gz and a.mhd among them
    assert read_source(sources["one/b.nii"]).array[0, 0, 0] == np.random.RandomState(2).randint(-900, 900)
    for detached in ("c.mha", "two/a.mhd"):
        assert np.array_equal(read_source(sources[detached]).array.ravel("F"), voxels)
    for refused, code in (("old.mgz", "FORMAT_UNSUPPORTED"), ("inner.tar.gz", "ARCHIVE_NESTED")):
        with pytest.raises(PhotonError) as caught:
            read_source(sources[refused])
        assert caught.value.code == code and str(folder) in caught.value.subject
    assert [source.relative for source in find_scans(folder / name)] == sorted(sources)


def test_a_member_is_unpacked_for_as_long_as_it_is_used(tmp_path: Path, folder: Path) -> None:
    write_archive(folder / "a.zip", {"x/a.nii.gz": scan_bytes(tmp_path)})
    (source,) = find_scans(folder)
    with located(source) as path:
        assert path.read_bytes() == scan_bytes(tmp_path)
        assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert not path.parent.exists()
    with pytest.raises(PhotonError) as caught, located(source) as path:
        raise PhotonError("SCAN_UNREADABLE", path, "fact", "remedy")
    assert caught.value.subject == str(folder / "a.zip" / "x/a.nii.gz")


@pytest.mark.parametrize("name", ["../a.nii", "/etc/a.nii", "x/../../a.nii", "C:/a.nii", "..\\a.nii"])
@pytest.mark.parametrize("archive", ["a.tar", "a.tar.gz", "a.zip"])
def test_names_that_lead_out_are_refused(tmp_path: Path, folder: Path, archive: str, name: str) -> None:
    error = refusal(write_archive(folder / archive, {"good.nii.gz": scan_bytes(tmp_path), name: b"x"}))
    assert error.code == "ARCHIVE_UNSAFE" and "leads out" in error.fact
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "made.nii.gz"]


KINDS = {
    "symbolic link": tarfile.SYMTYPE,
    "hard link": tarfile.LNKTYPE,
    "device": tarfile.CHRTYPE,
    "block device": tarfile.BLKTYPE,
    "pipe": tarfile.FIFOTYPE,
    "file with holes": tarfile.GNUTYPE_SPARSE,
}


@pytest.mark.parametrize("kind", KINDS)
def test_links_and_devices_in_a_tar_are_refused(folder: Path, kind: str) -> None:
    def change(info: tarfile.TarInfo) -> None:
        info.type, info.linkname = KINDS[kind], "/etc/passwd"

    error = refusal(write_tar_entry(folder / "a.tar", change))
    assert error.code in ("ARCHIVE_UNSAFE", "ARCHIVE_UNREADABLE")
    assert kind == "file with holes" or error.code == "ARCHIVE_UNSAFE"


def test_links_in_a_zip_are_refused(folder: Path) -> None:
    with zipfile.ZipFile(folder / "a.zip", "w") as archive:
        info = zipfile.ZipInfo("a.nii")
        info.external_attr = (stat.S_IFLNK | 0o777) << 16
        archive.writestr(info, "/etc/passwd")
    assert refusal(folder / "a.zip").code == "ARCHIVE_UNSAFE"


@pytest.mark.parametrize("archive", ["a.tar", "a.tar.gz", "a.zip"])
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_two_files_of_one_name_are_refused_and_case_is_told_apart(tmp_path: Path, folder: Path, archive: str) -> None:
    first, second = scan_bytes(tmp_path, 1), scan_bytes(tmp_path, 2)
    write_archive(folder / archive, {"a.nii.gz": first, "A.nii.gz": second})
    sources = find_scans(folder)
    assert len({source.scan_id.casefold() for source in sources}) == 2
    arrays = [read_source(source).array for source in sources]
    assert not np.array_equal(*arrays)
    write_archive(folder / archive, {"x/a.nii.gz": first, "x/./a.nii.gz": second})
    assert refusal(folder / archive).code == "ARCHIVE_UNSAFE"


def test_quotas(tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {f"{n}.nii": b"x" * 100 for n in range(6)}
    for name in ("a.tar", "a.tar.gz", "a.zip"):
        path = write_archive(folder / name, files)
        assert len(find_scans(path)) == 6
        total = "MAX_COMPRESSED_TAR_BYTES" if name == "a.tar.gz" else "MAX_TOTAL_BYTES"
        for limit, value in (("MAX_ENTRIES", 5), (total, 599), ("MAX_MEMBER_BYTES", 99)):
            monkeypatch.setattr(archives, limit, value)
            assert refusal(path).code == "ARCHIVE_TOO_LARGE"
            monkeypatch.undo()
        path.unlink()


def test_sizes_that_no_real_file_has_are_refused_before_they_are_unpacked(folder: Path) -> None:
    def change(info: tarfile.TarInfo) -> None:
        info.size = 2 << 30

    write_tar_entry(folder / "a.tar", change)
    assert refusal(folder / "a.tar").code == "ARCHIVE_TOO_LARGE"
    (folder / "a.tar").unlink()
    write_archive(folder / "a.zip", {"a.nii": bytes(1 << 20)})
    content = bytearray((folder / "a.zip").read_bytes())
    table = content.rfind(b"PK\1\2")
    content[table + 24 : table + 28] = (2 << 30).to_bytes(4, "little")
    (folder / "a.zip").write_bytes(content)
    assert refusal(folder / "a.zip").code == "ARCHIVE_TOO_LARGE"


def test_a_header_of_a_tar_cannot_make_us_take_memory(folder: Path) -> None:
    def change(info: tarfile.TarInfo) -> None:
        info.type, info.size = tarfile.GNUTYPE_LONGNAME, 1 << 29

    assert refusal(write_tar_entry(folder / "a.tar", change)).code == "ARCHIVE_UNREADABLE"


@pytest.mark.parametrize("name", ["a.tar", "a.tar.gz", "a.zip"])
def test_every_truncation_is_refused_or_costs_no_scan(tmp_path: Path, folder: Path, name: str) -> None:
    """A tar may lose zeros of its end, which hold nothing."""
    files = {f"{n}.nii": scan_bytes(tmp_path, n, ".nii") for n in range(4)}
    content = write_archive(folder / name, files).read_bytes()
    for percent in range(100):
        (folder / name).write_bytes(content[: len(content) * percent // 100])
        sources = find_scans(folder)
        if name == "a.tar" and len(sources) == 4:
            assert all(np.isfinite(read_source(source).array).all() for source in sources)
            continue
        assert len(sources) == 1 and sources[0].refusal is not None
        assert sources[0].refusal.code in ("ARCHIVE_UNREADABLE", "SCAN_TRUNCATED")


@pytest.mark.parametrize("name", ["a.tar.gz", "a.zip"])
def test_flipped_bits_are_refused_or_harmless(tmp_path: Path, folder: Path, name: str) -> None:
    files = {f"{n}.nii": scan_bytes(tmp_path, n, ".nii") for n in range(2)}
    content = write_archive(folder / name, files).read_bytes()
    arrays = [np.random.RandomState(n).randint(-900, 900, (9, 10, 11)) for n in range(2)]
    random = np.random.RandomState(0)
    num_refused = 0
    for _ in range(100):
        broken = bytearray(content)
        broken[random.randint(len(content))] ^= 1 << random.randint(8)
        (folder / name).write_bytes(broken)
        for source in find_whatever(folder):
            try:
                array = read_source(source).array
            except PhotonError:
                num_refused += 1
                continue
            assert any(np.array_equal(array, expected) for expected in arrays)
    assert num_refused > 90


def find_whatever(folder: Path) -> list[Source]:
    """Sources, none where a name was damaged so that it is no scan's any more."""
    try:
        return find_scans(folder)
    except PhotonError as error:
        assert error.code == "ARCHIVE_EMPTY"
        return []


def test_a_damaged_header_in_the_middle_of_a_tar_does_not_hide_what_follows(tmp_path: Path, folder: Path) -> None:
    path = write_archive(folder / "a.tar", {f"{n}.nii": scan_bytes(tmp_path, n, ".nii") for n in range(3)})
    content = bytearray(path.read_bytes())
    second = content.index(b"1.nii")
    content[second + 20] ^= 1
    path.write_bytes(content)
    assert refusal(path).code == "ARCHIVE_UNREADABLE"
    path.write_bytes(content[:second])
    assert refusal(path).code == "ARCHIVE_UNREADABLE"
    path.write_bytes(2 * write_archive(tmp_path / "b.tar", {"a.nii": b"x"}).read_bytes())
    assert refusal(path).code == "ARCHIVE_UNREADABLE"


def test_an_archive_that_changes_is_noticed(tmp_path: Path, folder: Path) -> None:
    for name in ("a.tar.gz", "a.zip", "a.tar"):
        path = write_archive(folder / name, {"a.nii": scan_bytes(tmp_path, 1, ".nii")})
        (source,) = find_scans(folder)
        write_archive(path, {"b.nii": scan_bytes(tmp_path, 1, ".nii")})
        with pytest.raises(PhotonError, match="ARCHIVE_CHANGED"):
            read_source(source)
        if name == "a.tar.gz":
            write_archive(path, {"a.nii": scan_bytes(tmp_path, 2, ".nii")})
            with pytest.raises(PhotonError, match="ARCHIVE_CHANGED"):
                read_source(source)
        path.unlink()
        with pytest.raises(PhotonError, match="SCAN_MISSING"):
            read_source(source)


def test_a_data_file_in_an_archive_lies_beside_its_header(folder: Path) -> None:
    for name in ("../a.raw", "/etc/passwd", "x/a.raw", "scan.mhd"):
        write_archive(folder / "a.zip", {"x/a.mhd": MHD.format(name).encode()})
        (source,) = find_scans(folder)
        with pytest.raises(PhotonError, match="FORMAT_UNSUPPORTED"):
            read_source(source)


def test_files_that_are_no_archives(folder: Path) -> None:
    for name in ("a.zip", "a.tar", "a.tgz"):
        (folder / name).write_bytes(os.urandom(2000))
        assert refusal(folder / name).code in ("ARCHIVE_UNREADABLE", "GZIP_CORRUPT")
        (folder / name).write_bytes(b"")
        assert refusal(folder / name).code in ("ARCHIVE_UNREADABLE", "SCAN_TRUNCATED")
        (folder / name).unlink()
    write_archive(folder / "a.zip", {"readme.txt": b"text"})
    assert refusal(folder / "a.zip").code == "ARCHIVE_EMPTY"
