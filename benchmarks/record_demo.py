"""Keep the numbers of a finished `make demo` as a results file: python benchmarks/record_demo.py [out/demo]."""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from common import write_results


def main() -> None:
    """Read a run's summary and evaluation and write ``results/demo.json``."""
    run = Path(sys.argv[1] if len(sys.argv) > 1 else "out/demo")
    summary = json.loads((run / "summary.json").read_text())
    evaluation = json.loads((run / "evaluate" / "evaluation.json").read_text())
    history = (run / "train" / "history.jsonl").read_text().splitlines()
    write_results(
        "demo",
        {
            **{key: summary[key] for key in ("data_version", "accuracy", "tokens", "onnx", "scoring")},
            **{key: evaluation[key] for key in ("differences", "findings", "regions", "breakdown")},
            "num_steps": len(history),
        },
    )


if __name__ == "__main__":
    main()
