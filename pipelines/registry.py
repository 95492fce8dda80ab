"""The model registry: versions of the exported ONNX folder, and which of them is the champion.

A version is the whole export folder (``scan.onnx``, ``question.onnx``, ``decode.onnx``, their JSON files),
kept as artifacts of the run that made it, so ``models:/photon@champion`` downloads everything scoring needs.
The decision that gave a version its alias is written on the version as a tag.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from photon.errors import PhotonError
from pipelines.results import Record
from pipelines.tracking import MlflowTracker, Store, found_or_none, open_store

ARTIFACT_FOLDER = "model"
CHAMPION = "champion"
CHALLENGER = "challenger"
PREVIOUS = "previous"
SCHEME = "models:/"


@dataclass(frozen=True, kw_only=True)
class RegisteredModel(Record):
    """A model version, the alias it got and the sentence that explains why."""

    name: str
    version: str
    alias: str
    decision: str


def register_model(
    store: Store,
    tracker: MlflowTracker,
    folder: Path,
    *,
    name: str,
    accuracy: float,
    data_version: str,
    config_digest: str = "",
    measure: Callable[[Path], float] | None = None,
) -> RegisteredModel:
    """Register an accepted export and decide whether it becomes the champion.

    The first version does. A later one is the challenger, and takes over when it answers the same frozen test
    questions at least as well. A champion that was measured on other data is fetched and measured on these first;
    where that is impossible the new version stays challenger.

    Args:
        store: where the registry lives.
        tracker: the run that gets the folder as artifact.
        folder: the export folder; must hold at least one ``.onnx`` file.
        name: registered model name.
        accuracy: fraction of test questions answered rightly.
        data_version: DVC version of the data the accuracy was measured on.
        config_digest: digest of the model configuration.
        measure: the accuracy of an export folder on the present data.

    Raises:
        PhotonError: ``MODEL_MISSING`` when the folder holds no ONNX file.
    """
    if not any(folder.glob("*.onnx")):
        remedy = "Export a checkpoint into it first."
        raise PhotonError("MODEL_MISSING", folder, "the folder holds no .onnx file.", remedy)
    client = store.client
    tracker.log_artifact(folder, ARTIFACT_FOLDER)
    _ensure_model(store, name)
    champion = find_version(store, name, CHAMPION)
    source = f"{client.get_run(tracker.run_id).info.artifact_uri}/{ARTIFACT_FOLDER}"
    tags = {"accuracy": repr(accuracy), "data_version": data_version, "config_digest": config_digest}
    made = client.create_model_version(name, source, run_id=tracker.run_id, tags=tags)
    rival, obstacle = _rival_accuracy(store, champion, data_version, measure)
    alias, decision = _decide(champion, accuracy, rival, obstacle)
    client.set_model_version_tag(name, made.version, "decision", decision)
    if alias == CHAMPION:
        if champion is not None:
            client.set_registered_model_alias(name, PREVIOUS, champion.version)
        client.set_registered_model_alias(name, CHAMPION, made.version)
        client.delete_registered_model_alias(name, CHALLENGER)
    else:
        client.set_registered_model_alias(name, CHALLENGER, made.version)
    return RegisteredModel(name=name, version=str(made.version), alias=alias, decision=decision)


def find_version(store: Store, name: str, alias: str) -> Any | None:
    """The model version behind an alias or a version number, or None."""
    client = store.client
    return found_or_none(
        client.get_model_version if alias.isdigit() else client.get_model_version_by_alias, name, alias
    )


def resolve_model(reference: str, destination: Path, store: Store | None = None) -> tuple[Path, str]:
    """Fetch a registered model.

    Args:
        reference: ``models:/<name>@<alias>`` or ``models:/<name>/<version>``.
        destination: folder to put it into; each version gets its own sub-folder and is fetched once.
        store: where the registry lives; default the environment's.

    Returns:
        The model folder, and the version's name, e.g. ``photon/3``.

    Raises:
        PhotonError: ``MODEL_UNKNOWN`` when the reference is malformed or names no version.
    """
    remedy = "Give a folder, models:/<name>@<alias> or models:/<name>/<version>; `photon retrain` registers one."
    name, separator, which = reference.removeprefix(SCHEME).partition("@")
    if not separator:
        name, separator, which = name.partition("/")
    if not (reference.startswith(SCHEME) and name and separator and which):
        raise PhotonError("MODEL_UNKNOWN", reference, "this is no model reference.", remedy)
    opened = store or open_store()
    found = find_version(opened, name, which)
    if found is None:
        fact = f"the registry at {opened.uri} has no such model version."
        raise PhotonError("MODEL_UNKNOWN", reference, fact, remedy)
    folder = destination / f"{name}-{found.version}"
    if not folder.is_dir():
        _download(opened, found, folder)
    return folder, f"{name}/{found.version}"


def _download(store: Store, found: Any, folder: Path) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        fetched = store.client.download_artifacts(found.run_id, ARTIFACT_FOLDER, temporary)
        Path(fetched).replace(folder)


def _ensure_model(store: Store, name: str) -> None:
    if found_or_none(store.client.get_registered_model, name) is None:
        store.client.create_registered_model(name, description="Photon exported to ONNX, one folder a version.")


def _rival_accuracy(
    store: Store, champion: Any | None, data_version: str, measure: Callable[[Path], float] | None
) -> tuple[float | None, str]:
    """The champion's accuracy on the present data, or None and why there is none."""
    if champion is None:
        return None, ""
    if champion.tags.get("data_version") == data_version:
        return float(champion.tags["accuracy"]), ""
    if measure is None:
        return None, "it was measured on other test data"
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "champion"
        _download(store, champion, folder)
        try:
            return measure(folder), ""
        except PhotonError as error:
            return None, f"it cannot answer the present test data: {error.fact}"


def _decide(champion: Any | None, accuracy: float, rival: float | None, obstacle: str) -> tuple[str, str]:
    if champion is None:
        return CHAMPION, "the first version"
    if rival is None:
        return CHALLENGER, f"not comparable with version {champion.version}: {obstacle}"
    is_kept = accuracy < rival
    verb = "is worse than" if is_kept else "is not worse than"
    decision = f"accuracy {accuracy:.4f} {verb} {rival:.4f} of version {champion.version} on the same test data"
    return (CHALLENGER if is_kept else CHAMPION), decision
