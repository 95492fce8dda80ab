"""The `photon` command: every stage by itself, through the plain functions that the flows call too.

Stages are imported inside their commands, so that `photon --help` answers at once.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Sequence

import typer

from flows import (  # noqa: F401 - registers their commands
    cli_data,
    cli_model,
    cli_stages,
    cli_study,
    cli_training,
    cli_versions,
)
from flows.cli_support import COMMANDS, EXIT_ERROR, EXIT_FAULT, EXIT_OK
from photon.errors import PhotonError

app = typer.Typer(
    name="photon",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)
for command in COMMANDS:
    app.command()(command)


def _show_version(is_asked: bool) -> None:
    if is_asked:
        from importlib.metadata import version

        typer.echo(f"photon {version('photon-volumes')}")
        raise typer.Exit


@app.callback()
def options(
    version: bool = typer.Option(False, "--version", callback=_show_version, is_eager=True, help="Show the version."),
    debug: bool = typer.Option(False, "--debug", help="Show where in the code an error came from."),
) -> None:
    """Question answering on 3D medical volumes that keeps only the tokens a question needs.

    `photon retrain` runs all stages in order; the others are these stages one by one:
    generate, preprocess, train, evaluate, export, score, report. `photon study` trains several ways of choosing tokens
    and shows where they look. `photon parity` compares the model with the numbers of another implementation.

    Exit codes: 0 all is well; 1 an error, told in one line with its code (see docs/errors.md); 2 wrong usage
    or an unexpected fault; 3 done, but some scans were refused or some rows have an error.
    """


def run(arguments: Sequence[str]) -> int:
    """Run one command line and return its exit code; errors become one line on standard error."""
    is_debug = "--debug" in arguments or bool(os.environ.get("PHOTON_DEBUG"))
    try:
        app(list(arguments), prog_name="photon")
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else EXIT_OK
    except PhotonError as error:
        if is_debug:
            traceback.print_exc()
        typer.echo(f"photon: {error}", err=True)
        return EXIT_ERROR
    except Exception as error:
        if is_debug:
            traceback.print_exc()
        fact = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        typer.echo(f"photon: unexpected {fact} (`photon --debug ...` or PHOTON_DEBUG=1 shows where)", err=True)
        return EXIT_FAULT
    return EXIT_OK


def main() -> None:
    """Entry point of the console command."""
    sys.exit(run(sys.argv[1:]))


if __name__ == "__main__":
    main()
