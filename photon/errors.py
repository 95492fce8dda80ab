"""The one exception a user meets: a code for machines, and subject, fact and remedy for people."""

from __future__ import annotations

from collections.abc import Mapping


class PhotonError(Exception):
    """Something the user can understand and mend.

    Args:
        code: stable upper-case identifier, e.g. ``GZIP_CORRUPT``; the ``status`` of a manifest row and the
            ``error`` of a score row. Every code is listed in ``docs/errors.md``.
        subject: what it is about: a file, a setting, a question id. Never a patient's name.
        fact: what was found, with the number or value that was wrong.
        remedy: what the reader can do about it.
    """

    def __init__(self, code: str, subject: object, fact: str, remedy: str) -> None:
        self.code = code
        self.subject = str(subject)
        self.fact = fact
        self.remedy = remedy
        super().__init__(f"[{code}] {self.subject}: {fact} {remedy}")

    def __reduce__(self) -> tuple[type[PhotonError], tuple[str, str, str, str]]:
        return (type(self), (self.code, self.subject, self.fact, self.remedy))

    def as_row(self) -> Mapping[str, str]:
        """The error as manifest or score columns."""
        return {"code": self.code, "subject": self.subject, "fact": self.fact, "remedy": self.remedy}
