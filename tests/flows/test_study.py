"""The study as a command and as a flow: killed with -9 in the middle, finished under Prefect, and what it refuses."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from flows import cli
from pipelines.preprocess import preprocess
from pipelines.tracking import open_store
from pipelines.volumes import VOLUME_SPECS

CHOICE = ("--preset", "smoke", "--variants", "photon,fixed")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Phantoms of the demonstration on a grid of twelve tokens."""
    from pipelines.phantoms import PhantomSpec, generate

    folder = tmp_path_factory.mktemp("study") / "data"
    generate(PhantomSpec(num_train=5, num_val=2, num_test=2), folder)
    preprocess(folder / "raw" / "images", folder / "volumes", VOLUME_SPECS["smoke"], num_workers=1)
    return folder


@pytest.fixture
def photon(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Run a command line; returns exit code, standard output and standard error."""

    def call(*arguments: object) -> tuple[int, str, str]:
        code = cli.run([str(argument) for argument in arguments])
        return code, *capsys.readouterr()

    return call


@pytest.fixture(scope="module")
def killed(data: Path) -> Path:
    """The folder of a study killed with -9 once its first variant trains, with two processes at work."""
    output = data.parent / "out"
    command = [sys.executable, "-m", "flows.cli", "study", *CHOICE, "--data", str(data), "--output", str(output)]
    history = output / "seed-0" / "photon" / "train" / "history.jsonl"
    with (data.parent / "log").open("w") as log:
        process = subprocess.Popen([*command, "--workers", "2"], stdout=log, stderr=log)
        deadline = time.monotonic() + 120
        while not history.exists():
            if process.poll() is not None or time.monotonic() > deadline:
                process.kill()
                pytest.fail(f"the study did not come to its variants: {(data.parent / 'log').read_text()[-2000:]}")
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        process.wait()
    return output


def test_its_processes_end_with_it(killed: Path) -> None:
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        alive = [path for path in Path("/proc").glob("[0-9]*/cwd") if _works_in(path.parent, killed)]
        if not alive:
            return
        time.sleep(0.2)
    pytest.fail(f"{len(alive)} processes still work for nobody")


def test_a_killed_study_is_finished_as_a_flow(
    killed: Path, data: Path, prefect_server: str, photon: Callable[..., tuple[int, str, str]]
) -> None:
    stages = json.loads((killed / "records" / "stages.json").read_text())
    code, out, err = photon("study", *CHOICE, "--data", data, "--output", killed, "--workers", 1, "--prefect")
    assert code == 0, err
    for word in ("photon", "fixed", "blind", "majority", "study.html", "study.json"):
        assert word in out
    after = json.loads((killed / "records" / "stages.json").read_text())
    for name in ("vision-seed-0", "warm-up-seed-0"):
        assert after[name]["run_id"] == stages[name]["run_id"], "what was finished is not done again"
    assert after["photon-seed-0"]["run_id"] == stages["photon-seed-0"]["run_id"], "the run goes on"
    store = open_store(experiment="photon-study")
    run = store.client.get_run(after["photon-seed-0"]["run_id"])
    assert run.info.status == "FINISHED" and "accuracy" in run.data.metrics
    assert (killed / "study.html").stat().st_size > 20_000


@pytest.mark.parametrize(
    ("arguments", "code", "word"),
    [
        (("--preset", "huge"), 1, "PRESET_UNKNOWN"),
        (("--preset", "smoke", "--variants", "photon,best"), 1, "VARIANT_UNKNOWN"),
        (("--preset", "real", "--data", "nowhere"), 1, "DATA_MISSING"),
        (("--preset", "smoke", "--seeds", "0,one"), 2, "whole numbers"),
        (("--preset", "smoke", "--keep-ratio", "0"), 2, "keep-ratio"),
    ],
)
def test_what_is_refused_before_anything_is_done(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    photon: Callable[..., tuple[int, str, str]],
    arguments: tuple[str, ...],
    code: int,
    word: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    found, out, err = photon("study", *arguments, "--output", "out/here")
    assert found == code and word in err.replace("\n", " ") + out
    assert not (tmp_path / "out").exists()


def test_help_explains_every_policy(photon: Callable[..., tuple[int, str, str]]) -> None:
    code, out, _ = photon("study", "--help")
    assert code == 0
    for word in ("photon", "all", "fixed-blind", "slices", "pooled", "study.html", "Example"):
        assert word in out


def _works_in(process: Path, folder: Path) -> bool:
    """Whether a process has a file of the folder open."""
    try:
        return any(str(link.readlink()).startswith(str(folder)) for link in (process / "fd").iterdir())
    except OSError:
        return False
