"""What a result was made with: the code, the environment and the process, in plain strings."""

from __future__ import annotations

import hashlib
import os
import platform
import socket
import subprocess
from functools import cache, lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[1]
KEY_PACKAGES = ("torch", "numpy", "nibabel", "polars", "onnx", "onnxruntime-gpu", "mlflow", "prefect", "dvc")


@cache
def source_digest(without: tuple[str, ...] = ()) -> str:
    """First 16 hex digits of the SHA-256 over the source files of ``photon`` and ``pipelines``.

    Stages compare it to know whether an earlier result came from the same code.

    Args:
        without: files left out, as paths from the project's root with slashes.
    """
    digest = hashlib.sha256()
    for package in ("photon", "pipelines"):
        for source in sorted((PROJECT / package).rglob("*.py")):
            name = source.relative_to(PROJECT).as_posix()
            if name not in without:
                digest.update(name.encode())
                digest.update(source.read_bytes())
    return digest.hexdigest()[:16]


@lru_cache(maxsize=1)
def code_version() -> str:
    """``<commit>`` or ``<commit>-dirty`` in a git checkout of this project, else ``source-<digest>``."""
    if not (PROJECT / ".git").exists():
        return f"source-{source_digest()}"
    commit = _git("rev-parse", "HEAD")
    if not commit:
        return f"source-{source_digest()}"
    changed = _git("status", "--porcelain", "--untracked-files=no")
    return f"{commit}-dirty" if changed else commit


def environment_tags() -> dict[str, str]:
    """Python, platform, cores and package versions. Names no user, host or path."""
    tags = {
        "environment.python": platform.python_version(),
        "environment.platform": f"{platform.system()}-{platform.machine()}",
        "environment.cpu_count": str(os.cpu_count() or 0),
    }
    for package in KEY_PACKAGES:
        try:
            tags[f"environment.{package}"] = version(package)
        except PackageNotFoundError:
            tags[f"environment.{package}"] = "absent"
    return tags


def process_identity(pid: int) -> str:
    """``<host digest>:<boot id>:<pid>:<start time>``: names one process, also after its pid is used again."""
    host = hashlib.sha256(socket.gethostname().encode()).hexdigest()[:12]
    return f"{host}:{_boot_id()}:{pid}:{_start_time(pid)}"


def is_process_alive(identity: str) -> bool:
    """Whether the process still runs. One of another host counts as alive: nobody here can tell."""
    parts = identity.split(":")
    if len(parts) != 4 or not parts[2].isdigit():
        return False
    here = process_identity(int(parts[2])).split(":")
    if parts[0] != here[0]:
        return True
    if parts[1] != here[1]:
        return False
    try:
        os.kill(int(parts[2]), 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return parts[3] == here[3]


def _boot_id() -> str:
    source = Path("/proc/sys/kernel/random/boot_id")
    return source.read_text().strip()[:8] if source.exists() else ""


def _start_time(pid: int) -> str:
    """Start time in clock ticks since boot where /proc tells it; "gone" for a dead or a reaped process."""
    if not Path("/proc/self/stat").exists():
        return ""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return "gone"
    return "gone" if fields[0] == "Z" else fields[19]


def _git(*arguments: str) -> str:
    try:
        done = subprocess.run(["git", *arguments], cwd=PROJECT, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()
