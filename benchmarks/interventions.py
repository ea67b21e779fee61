"""What the interventions cost on a recorded sweep: the demo's, by the command that a user types, from start to end."""

import json
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from benchmarks.common import Row
from benchmarks.scale import demo_run
from entropy_core.config.read import load_config
from entropy_core.store.manifest import MANIFEST

CONFIG = "configs/demo.yaml"
MARK = 60.0  # seconds, of all checkpoints together
LARGEST = 5  # stages that a reason names


def interventions() -> Iterator[Row]:
    """Yield a row for what is screened and predicted, and one for what is then measured."""
    demo_run()
    with tempfile.TemporaryDirectory() as folder:
        store, config = Path(folder) / "store", load_config(CONFIG).model_dump(mode="json")
        config["execution"]["artifacts"] = str(store)
        file = Path(folder) / "demo.yaml"
        file.write_text(json.dumps(config), encoding="utf-8")
        _command("sweep", str(file))
        count = len(list(store.glob("load-checkpoint/*")))
        for what, measure in (("screened and predicted", "none"), ("the best 5 measured, after that", "best 5")):
            before, started = set(_manifests(store)), time.perf_counter()
            _command("interventions", "--artifacts", str(store), "--measure", measure)
            taken = time.perf_counter() - started
            row = Row(
                f"`published` on the recorded demo sweep, {count} checkpoints: {what}",
                f"{taken:.1f} s",
                f"{MARK:.0f} s",
                taken / MARK,
                "≤ 1",
            )
            yield row.because(lambda known=before: _by_stage(store, known))


def _command(*words: str) -> None:
    subprocess.run([sys.executable, "-m", "flows.cli", *words, "--direct"], check=True, stdout=subprocess.DEVNULL)


def _manifests(store: Path) -> Iterator[Path]:
    return store.glob(f"*/*/{MANIFEST}")


def _by_stage(store: Path, known: set[Path]) -> str:
    """The seconds of the stages that were computed since."""
    seconds: Counter[str] = Counter()
    for path in set(_manifests(store)) - known:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        seconds[manifest["stage"]] += manifest["wall_seconds"]
    largest = ", ".join(f"{stage} {of:.1f} s" for stage, of in seconds.most_common(LARGEST))
    return f"seconds of the stages that are computed: {largest}; the rest is the start, the checks and the report"
