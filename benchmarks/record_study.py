"""Keep the numbers of a finished `photon study`: python benchmarks/record_study.py out/study
[results/study_small.json].

The target's default is benchmarks/results/study_<preset>.json.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from common import RESULTS, save_results

from pipelines.study.report import table_of


def main() -> None:
    """Read a study's ``study.json`` and write it with machine, versions and commit."""
    study = Path(sys.argv[1] if len(sys.argv) > 1 else "out/study")
    content = json.loads((study / "study.json").read_text(encoding="utf-8"))
    target = Path(sys.argv[2]) if len(sys.argv) > 2 else RESULTS / f"study_{content['study']}.json"
    trained = {"trained_by": {"code_version": content.pop("code_version"), "environment": content.pop("environment")}}
    written = save_results(target.stem, rounded({**content, **trained}), target.parent, is_compact=True)
    header, rows = table_of(content)
    print(written, "\t".join(header), *("\t".join(row) for row in rows), sep="\n")


def rounded(value: Any) -> Any:
    """Numbers to five decimals, which is finer than any interval and halves the file."""
    if isinstance(value, float):
        return round(value, 5)
    if isinstance(value, dict):
        return {key: rounded(each) for key, each in value.items()}
    return [rounded(each) for each in value] if isinstance(value, list) else value


if __name__ == "__main__":
    main()
