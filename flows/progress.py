"""Progress for people: a bar on a terminal, a plain line every tenth of the way anywhere else."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn


class OnProgress(Protocol):
    """What a stage calls after each piece of work."""

    def __call__(self, done: int, total: int, label: str = "", /) -> None:
        """Pieces done, pieces in all, and a word about the last one."""


@contextmanager
def show_progress(title: str, console: Console | None = None) -> Iterator[OnProgress]:
    """Yield the callback to hand to a stage.

    Args:
        title: what is going on, e.g. ``"score"``; it starts the bar or each line.
        console: where to write; standard error when not given, which leaves standard output to results.
    """
    console = console or Console(stderr=True)
    if not console.is_terminal:
        yield _plain_lines(title, console)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[label]}"),
    )
    with Progress(*columns, console=console) as bar:
        task = bar.add_task(title, total=None, label="")

        def on_progress(done: int, total: int, label: str = "", /) -> None:
            bar.update(task, completed=done, total=total, label=label)

        yield on_progress


def _plain_lines(title: str, console: Console) -> OnProgress:
    last_tenth = -1

    def on_progress(done: int, total: int, label: str = "", /) -> None:
        nonlocal last_tenth
        tenth = 10 * done // max(total, 1)
        if tenth != last_tenth:
            last_tenth = tenth
            line = f"{title}: {done}/{total} {label}".rstrip()
            console.print(line, markup=False, highlight=False, soft_wrap=True)

    return on_progress
