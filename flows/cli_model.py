"""Commands of `photon` about a model itself rather than a stage of the work."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from flows.cli_support import EXIT_ERROR, command, show_results, show_table

if TYPE_CHECKING:
    from photon.parity import ParityRow


@command
def parity(
    model_dir: Annotated[Path, typer.Argument(metavar="MODEL_DIR", help="Checkpoint folder: config.json and weights.")],
    cases: Annotated[Path, typer.Argument(metavar="CASES", help="Golden inputs and outputs, a safetensors file.")],
    seconds_per_grid: Annotated[
        float, typer.Option(help="Seconds between depth slabs the golden numbers were made with.")
    ] = 1.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document instead of the table.")] = False,
) -> None:
    """Compare the model, number by number, with what another implementation computed.

    MODEL_DIR is a checkpoint and CASES holds inputs and what the other implementation computed from them with that
    checkpoint; tests/golden/README.md describes the layout. One line a quantity: the largest error relative to
    the largest number, how large it may be (1e-4 forward, 1e-3 for gradients) and whether it holds. Exit code 1
    says that something does not, or that CASES holds something that is not checked.

    Example: `photon parity tests/golden tests/golden/cases.safetensors`
    """
    from photon.parity import check_parity, largest_errors

    rows = check_parity(model_dir, cases, seconds_per_grid=seconds_per_grid)
    largest = largest_errors(rows)
    num_failed = sum(not row.holds for row in rows)
    if as_json:
        errors = {kind: _finite(error) for kind, error in largest.items()}
        content = {"holds": num_failed == 0, "max_error": errors, "rows": [_as_json(row) for row in rows]}
        typer.echo(json.dumps(content, indent=1, allow_nan=False))
    else:
        header = ("sample", "mode", "quantity", "error", "tolerance", "holds", "")
        show_table("parity", header, [_cells(row) for row in rows])
        show_results(
            quantities=f"{len(rows)}, {num_failed} of them do not hold" if num_failed else f"{len(rows)}, all hold",
            **{f"largest_error_{kind}": f"{error:.1e}" for kind, error in largest.items()},
        )
    if num_failed:
        raise typer.Exit(EXIT_ERROR)


def _finite(error: float | None) -> float | None:
    """JSON has no word for infinity."""
    return error if error is not None and math.isfinite(error) else None


def _as_json(row: ParityRow) -> dict[str, object]:
    return {**vars(row), "error": _finite(row.error)}


def _cells(row: ParityRow) -> tuple[str, ...]:
    error = "" if row.error is None else f"{row.error:.1e}"
    tolerance = "" if row.tolerance is None else f"{row.tolerance:.0e}" if row.tolerance else "0"
    return row.sample, row.mode, row.quantity, error, tolerance, "yes" if row.holds else "NO", row.note
