"""Faults of a training step that say which scans it was working on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from photon.errors import PhotonError

_REMEDY = "Look at these scans, or give steps fewer scans and questions if memory ran out; then run the command again."


@contextmanager
def naming(scans: Sequence[str], subject: str) -> Iterator[None]:
    """Let every exception of the block name the scans that it was about.

    Args:
        scans: ids of the scans; nothing is added where there are none.
        subject: what was being done, for faults that tell nothing themselves.

    Raises:
        PhotonError: the block's own with the scans in its subject; ``TRAINING_FAILED`` for any other exception.
    """
    about = f" ({'scan' if len(scans) == 1 else 'scans'} {', '.join(scans)})" if scans else ""
    try:
        yield
    except PhotonError as error:
        raise type(error)(error.code, error.subject + about, error.fact, error.remedy) from error
    except Exception as error:
        fact = " ".join(f"{type(error).__name__}: {error}".split())
        raise PhotonError("TRAINING_FAILED", subject + about, f"{fact}.", _REMEDY) from error
