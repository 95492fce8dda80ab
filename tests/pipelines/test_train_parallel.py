"""`torchrun ... photon train`: a rank that is killed is told with its scans, and the next start ends as one process."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from photon.checkpoint import read_model
from pipelines.results import TrainRecord


def start(data: Path, output: Path) -> subprocess.Popen[str]:
    options = ["--data", data, "--output", output, "--preset", "smoke", "--no-track", "--parallel", "fsdp"]
    launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "flows.cli", "train"]
    command = [sys.executable, "-m", *launcher, *map(str, options), "--save-every", "2", "--no-blind"]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def kill_second_rank(output: Path, step: int) -> list[str]:
    """Kill rank 1 once it works on this step or a later one of the model; the scans that it had then."""
    note, end = output / "working" / "rank-1.json", time.monotonic() + 120
    while time.monotonic() < end:
        content = json.loads(note.read_text()) if note.is_file() else {"step": -1}
        if content["step"] >= step:
            os.kill(content["pid"], signal.SIGSTOP)
            scans = json.loads(note.read_text())["scans"]
            os.kill(content["pid"], signal.SIGKILL)
            return list(scans)
        time.sleep(0.002)
    pytest.fail("rank 1 never came so far")


def test_a_killed_rank_is_told_and_the_next_start_ends_as_one_process(
    smoke_data: Path, trained: Path, tmp_path: Path
) -> None:
    """Sharded training, rank 1 killed in the middle: its scans are named, now and by the next start."""
    first = start(smoke_data, tmp_path)
    scans = kill_second_rank(tmp_path, 4)
    said, _ = first.communicate(timeout=120)
    assert first.returncode != 0
    named = f"working on scans {', '.join(scans)}"
    assert "TRAINING_FAILED" in said and "rank 1 ended without a message" in said and named in said, said
    assert not (tmp_path / "record.json").exists() and (tmp_path / "state" / "progress.json").is_file()

    second = start(smoke_data, tmp_path)
    said, _ = second.communicate(timeout=120)
    assert second.returncode == 0, said
    assert "The run before this one was killed" in said and named in said
    assert not (tmp_path / "working").exists()
    ours, theirs = (
        [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]
        for folder in (tmp_path, trained)
    )
    assert [row["step"] for row in ours] == list(range(10))
    for row, expected in zip(ours, theirs, strict=True):
        assert row["stage"] == expected["stage"]
        for name in ("loss", "answer_loss", "kept_fraction", "grad_norm", "tokens_per_sample", "learning_rate"):
            assert row[name] == pytest.approx(expected[name], rel=1e-3, abs=1e-4), (name, row["step"])
    record = TrainRecord.read(tmp_path / "record.json")
    assert read_model(Path(record.checkpoint)).config.digest() == record.config_digest
