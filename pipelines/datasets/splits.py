"""Train, val and test by patient: the dataset's own where it has them, the rest by a checksum of the patient's id."""

from __future__ import annotations

import dataclasses
import hashlib
import re

from photon.errors import PhotonError

SPLITS = ("train", "val", "test")
_SPLIT_WORD = re.compile(r"e?(train|val|test)(?:ing|id|idation|uation|set)?\d*k?")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SplitRule:
    """How patients are divided; the same patient gets the same split in every dataset and every import.

    Args:
        val_percent: share of patients that goes to val, of those not given to test or val by the dataset.
        test_percent: share that goes to test, where the dataset names no split at all.
    """

    val_percent: int = 10
    test_percent: int = 20

    def __post_init__(self) -> None:
        if self.val_percent < 0 or self.test_percent < 0 or self.val_percent + self.test_percent >= 100:
            fact = f"{self.val_percent} % for val and {self.test_percent} % for test leave nothing for train."
            raise PhotonError("OPTION_UNKNOWN", "the split", fact, "Use shares of which some are left.")

    def split_of(self, patient_id: str, given: str, has_own_val: bool) -> str:
        """``train``, ``val`` or ``test`` of a patient.

        Args:
            given: the dataset's own split, or "".
            has_own_val: the dataset has val rows of its own, so none are taken out of its train rows.
        """
        if given in ("val", "test") or (given == "train" and has_own_val):
            return given
        place = _percentile(patient_id)
        if place < self.val_percent:
            return "val"
        return "test" if not given and place < self.val_percent + self.test_percent else "train"


def split_in_name(stem: str) -> str:
    """The first of train, val and test that is a word of a file's name, as in ``my_train-1`` or ``validation``."""
    found = (_SPLIT_WORD.fullmatch(word) for word in re.split(r"[^a-z0-9]+", stem.casefold()))
    return next((match[1] for match in found if match), "")


def _percentile(patient_id: str) -> float:
    digest = hashlib.sha256(f"split of {patient_id}".encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big") / 2**64 * 100
