"""Commands of `photon` about versions of the data: record one, list them, compare two, go back to one."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from flows.cli_support import Data, command, show_results, show_table, tracked
from flows.progress import show_progress

if TYPE_CHECKING:
    import polars as pl

MAX_ROWS = 50
Track = Annotated[bool, typer.Option("--track/--no-track", help="Log to MLflow.")]


@command
def record(data: Data = Path("data"), track: Track = True) -> None:
    """Record the present bytes of a data folder as a version of DVC, and tell what changed since the last one.

    Writes data.dvc beside the folder and fills DVC's cache, so that `photon restore` can go back to this version.
    MLflow gets a run with the table of changed scans and the data as its input.

    Example: `photon record --data data`
    """
    record_version(data, track)


def record_version(data: Path, is_tracked: bool) -> None:
    """Record a version and show it."""
    from pipelines.data_changes import record_data
    from pipelines.versioning import folder_version

    version = folder_version(data)
    with tracked("record", is_tracked, version) as tracker:
        told, changes = record_data(data, tracker)
    _show_changes(changes)
    show_results(version=told.data_version, message=told.message)


@command
def versions(
    data: Data = Path("data"),
    all_: Annotated[bool, typer.Option("--all", help="Those of other data folders of the project too.")] = False,
) -> None:
    """List the versions of a data folder that DVC's cache holds, the latest first; * is the one data.dvc records.

    Data folders side by side share one cache. A version of which nobody noted the folder is listed for all of them,
    as unknown: it was recorded before folders were noted, or by `dvc add`, or came by `dvc fetch`.

    Example: `photon versions --data data`
    """
    from pipelines.old_versions import list_versions

    found = list_versions(data)
    shown = [old for old in found if all_ or old.is_for(data)]
    rows = [
        (
            "*" if old.is_current else "",
            old.version,
            f"{old.recorded_at} UTC",
            old.num_files,
            ", ".join(old.folders) or "unknown",
        )
        for old in shown
    ]
    show_table("versions", ("", "version", "recorded", "files", "data folder"), rows)
    if any(not old.folders for old in shown):
        typer.echo("unknown: nobody noted the folder; compare it by `photon diff` before you restore it.")
    if len(shown) < len(found):
        typer.echo(f"{len(found) - len(shown)} more of other data folders: `photon versions --all`.")


@command
def diff(
    before: Annotated[str, typer.Argument(metavar="BEFORE", help="First characters of a version.")],
    after: Annotated[str, typer.Argument(metavar="AFTER", help="First characters of another.")],
    data: Data = Path("data"),
) -> None:
    """Tell which scans were added, removed, redone or refused between two versions of a data folder, or of two.

    Example: `photon diff 3fc6 d211 --data data`
    """
    from pipelines.data_changes import changes_between
    from pipelines.old_versions import find_version

    _show_changes(changes_between(data, find_version(data, before), find_version(data, after)))


@command
def restore(
    version: Annotated[
        str, typer.Argument(metavar="VERSION", help="Its first characters; `photon versions` lists them.")
    ],
    data: Data = Path("data"),
    force: Annotated[bool, typer.Option("--force", help="Although files that are in no version are lost.")] = False,
    from_other: Annotated[
        bool, typer.Option("--from-other", help="Although it is a version of another data folder.")
    ] = False,
) -> None:
    """Go back to an older version: the data folder holds exactly its bytes again, and data.dvc records it.

    Every file is checked against its hash. What a remote holds is fetched by `dvc fetch` first. A version of another
    data folder is refused.

    Example: `photon restore 3fc6 --data data`
    """
    from pipelines.old_versions import find_version, restore_version

    whole = find_version(data, version)
    with show_progress("restore") as on_progress:
        num_written, num_deleted = restore_version(
            data, whole, is_forced=force, is_any=from_other, on_progress=on_progress
        )
    show_results(version=whole, written=f"{num_written} files", deleted=f"{num_deleted} files")


def _show_changes(changes: pl.DataFrame) -> None:
    from pipelines.data_changes import count_changes

    rows = [(row["change"], row["scan_id"], row["status"]) for row in changes.head(MAX_ROWS).iter_rows(named=True)]
    if rows:
        show_table("changed scans", ("change", "scan", "status"), rows)
    if changes.height > MAX_ROWS:
        show_results(more=f"{changes.height - MAX_ROWS} further scans")
    show_results(**count_changes(changes))
