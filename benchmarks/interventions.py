"""What the interventions cost on a recorded sweep, all checkpoints together, by the command that a user types."""

import json
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.common import Row
from benchmarks.scale import demo_run
from benchmarks.time_to_error import SMOLLM2
from entropy_core.config.read import load_config
from entropy_core.store.manifest import MANIFEST

LARGEST = 5  # stages that a reason names


def interventions() -> Iterator[Row]:
    """Yield a row for what is screened and predicted, and one for what is then measured."""
    demo_run()
    parts = {"screened and predicted": ("none", 60.0), "the best 5 measured, after that": ("best 5", 60.0)}
    yield from _timed("demo", load_config("configs/demo.yaml").model_dump(mode="json"), parts)


def interventions_smollm2() -> Iterator[Row]:
    """Yield a row for all of it on SmolLM2's LoRA run, where `make sweep-smollm2` has left it."""
    if SMOLLM2.exists():
        config = load_config("configs/smollm2.yaml").model_dump(mode="json")
        config["batch_config"]["E_replicates"] = 1
        parts = {"screened, predicted, and the best 5 measured": ("best 5", 600.0)}
        yield from _timed("SmolLM2 LoRA", config, parts)


def _timed(name: str, config: dict[str, Any], parts: dict[str, tuple[str, float]]) -> Iterator[Row]:
    """Record a sweep, and time what is asked of it: by what is said of it, which are measured, and the mark."""
    with tempfile.TemporaryDirectory() as folder:
        store, file = Path(folder) / "store", Path(folder) / "config.yaml"
        config["execution"]["artifacts"] = str(store)
        file.write_text(json.dumps(config), encoding="utf-8")
        _command("sweep", str(file))
        count = len(list(store.glob("load-checkpoint/*")))
        for what, (measure, mark) in parts.items():
            before, started = set(_manifests(store)), time.perf_counter()
            _command("interventions", "--artifacts", str(store), "--measure", measure)
            taken = time.perf_counter() - started
            row = Row(
                f"`published` on the recorded {name} sweep, {count} checkpoints: {what}",
                f"{taken:.1f} s",
                f"{mark:.0f} s",
                taken / mark,
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
