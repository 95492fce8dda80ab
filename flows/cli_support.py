"""What every `photon` command shares: the registry, trackers, tables of results, and how they end."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer
from rich.console import Console
from rich.table import Column, Table

from flows import settings
from photon.errors import PhotonError
from pipelines.files import prepare_output_folder

if TYPE_CHECKING:
    from pipelines.tracking import Tracker

Preset = TypeVar("Preset")

EXIT_OK, EXIT_ERROR, EXIT_FAULT, EXIT_SOME_FAILED = 0, 1, 2, 3
"""0 all is well; 1 a coded error; 2 wrong usage or an unexpected fault; 3 done, but not for every scan."""

Data = Annotated[Path, typer.Option(help="Data folder: questions.jsonl and volumes/ (see docs/architecture.md).")]
Checkpoint = Annotated[Path, typer.Option(help="Checkpoint folder of `photon train`.")]
Modality = Annotated[str, typer.Option(help="auto, ct (values are HU), mr or pt (values have no bound).")]

COMMANDS: list[Callable[..., Any]] = []
_PIPE_WIDTH = 1000


def command(function: Callable[..., Any]) -> Callable[..., Any]:
    """Register a command; when it runs, environment defaults are set before anything reads them."""

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        prepare_output_folder(settings.state_folder())
        settings.apply()
        return function(*args, **kwargs)

    # As it is typed: `contact-sheet`, and `import`, which is a word of Python's own.
    run.__name__ = function.__name__.rstrip("_").replace("_", "-")
    COMMANDS.append(run)
    return run


@contextmanager
def tracked(run_name: str, is_tracked: bool, data_version: str) -> Iterator[Tracker]:
    """An MLflow run for the length of the block, or a tracker that forgets everything."""
    from pipelines.tracking import NullTracker, open_store, tracked_run

    if not is_tracked:
        yield NullTracker()
        return
    with tracked_run(open_store(), run_name, tags={"data_version": data_version}) as tracker:
        yield tracker


@contextmanager
def show_log() -> Iterator[None]:
    """What the model's code has to say, on standard error for the length of the block; the same thing only once."""
    logger, handler = logging.getLogger("photon"), _LineHandler(logging.INFO)
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.setLevel(level)
        logger.removeHandler(handler)


class _LineHandler(logging.Handler):
    """A line a message, above a progress bar if there is one."""

    def __init__(self, level: int) -> None:
        super().__init__(level)
        self._shown: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        if message not in self._shown:
            self._shown.add(message)
            Console(stderr=True, highlight=False, markup=False, soft_wrap=True).print(message)


def show_table(title: str, header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """A table on standard output; its cells fold on a narrow terminal and are whole in a file or a pipe."""
    table = Table(*(Column(name, overflow="fold") for name in header), title=title, title_justify="left")
    for row in rows:
        table.add_row(*(str(cell) for cell in row))
    console = Console(highlight=False, markup=False)
    if not console.is_terminal:
        console.width = _PIPE_WIDTH
    console.print(table)


def show_counts(title: str, counts: Mapping[str, int]) -> None:
    """How many of each code, the most frequent first."""
    rows = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    show_table(title, ("code", "number"), rows)


def show_results(**places: object) -> None:
    """One line a result: its name and its path or value."""
    width = max(len(name) for name in places)
    console = Console(highlight=False, markup=False, soft_wrap=True)
    for name, place in places.items():
        console.print(f"{name.replace('_', ' '):{width}}  {place}")


def choose(presets: Mapping[str, Preset], name: str) -> Preset:
    """The preset of this name.

    Raises:
        PhotonError: ``PRESET_UNKNOWN``.
    """
    if name not in presets:
        known = ", ".join(presets)
        raise PhotonError("PRESET_UNKNOWN", name, "there is no such preset.", f"Choose one of: {known}.")
    return presets[name]


def rows_by_code(table: str) -> dict[str, int]:
    """Rows of a table of scores: how many are ``ok``, how many have which error."""
    import polars as pl

    errors = pl.read_parquet(table, columns=["error"], glob=False)["error"].fill_null("ok")
    return {row["error"]: row["count"] for row in errors.value_counts().iter_rows(named=True)}
