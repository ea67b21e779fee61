"""With a key, a store refuses artifacts and runs that were made without it, and never takes them for damage."""

import json
import shutil
from pathlib import Path

import pytest
from store_fixtures import DRAW, EXECUTED, TOTAL, quarantined, visible

from entropy_core.config.schema import VarianceRequest
from entropy_core.errors import StoreError
from entropy_core.pipeline.statistics import variance
from entropy_core.store import archive, manifest, runs
from entropy_core.store.pruning import waste
from entropy_core.store.signature import VARIABLE, SignatureError
from entropy_core.store.store import Store
from flows.cli import main
from flows.store_commands import adopt


@pytest.fixture
def keyed(monkeypatch):
    def set_key(key: str = "correct horse") -> None:
        monkeypatch.setenv(VARIABLE, key)

    set_key()
    return set_key


def command(store: Store, *words: str) -> int:
    return main(["store", *words, "--artifacts", str(store.root)])


def edited(made, change, signed: bool = True) -> None:
    """Other numbers, with a digest and a seal that are right, as anybody can write them."""
    path = made.directory / "manifest.json"
    content = json.loads(path.read_bytes())
    said = {name: content.pop(name) for name in ("seal", "signature") if name in content}
    change(content)
    content["digest"] = manifest.content_digest(content["files"], content["summary"])
    sealed = json.loads(manifest._sealed(content))
    if signed and "signature" in said:
        sealed["signature"] = said["signature"]
    else:
        sealed.pop("signature", None)
    path.write_text(manifest.json_text(sealed))


def test_what_is_signed_is_found_with_its_key(store, keyed):
    made = store.run(DRAW, None, {"seed": 1})
    assert Store(store.root).run(TOTAL, None, {"numbers": made}).summary == {"sum": 3}
    assert store.run(DRAW, None, {"seed": 1}) == made and len(EXECUTED) == 2
    assert command(store, "verify") == 0


def test_the_digest_and_the_key_are_the_same_with_and_without(store, tmp_path, keyed):
    made = store.run(DRAW, None, {"seed": 1})
    keyed("")
    assert Store(tmp_path / "other").run(DRAW, None, {"seed": 1}) == made


@pytest.mark.attack("a manifest with other numbers in a signed store, rightly sealed")
@pytest.mark.parametrize("signed", [True, False], ids=["under the old signature", "without one"])
def test_other_numbers_are_refused_and_not_set_aside(store, keyed, capsys, signed):
    made = store.run(DRAW, None, {"seed": 1})
    edited(made, lambda content: content["summary"].update(mean=0.7), signed)
    before = visible(store)
    for use in (lambda: store.run(DRAW, None, {"seed": 1}), lambda: store.find("draw", made.key), lambda: made.summary):
        with pytest.raises(SignatureError, match=rf"draw/{made.key} is (not signed|signed with another key).*Fix: "):
            use()
    assert list(store.ls()) == [] and store.manifest("draw", made.key) == {}
    assert command(store, "verify") == 1 and f"draw/{made.key} is " in capsys.readouterr().out
    assert quarantined(store) == [] and visible(store) == before and len(EXECUTED) == 1


@pytest.mark.parametrize(
    ("then", "now", "said"),
    [
        ("", "mine", "is not signed, and ENTROPY_PROBE_SEAL_KEY is set.*store seal"),
        ("mine", "", "is signed with a key, and ENTROPY_PROBE_SEAL_KEY is not set.*ask them for it"),
        ("mine", "yours", "is signed with another key than ENTROPY_PROBE_SEAL_KEY has.*correct ENTROPY_PROBE_SEAL_KEY"),
    ],
)
def test_a_key_that_is_missing_or_another_costs_nothing(store, keyed, then, now, said):
    keyed(then)
    made = store.run(DRAW, None, {"seed": 1})
    keyed(now)
    with pytest.raises(SignatureError, match=said) as raised:
        store.run(DRAW, None, {"seed": 1})
    assert "\n" not in str(raised.value) and quarantined(store) == []
    keyed(then)
    assert store.run(DRAW, None, {"seed": 1}) == made and len(EXECUTED) == 1


def test_damage_is_still_damage(store, keyed):
    made = store.run(DRAW, None, {"seed": 1})
    path = made.directory / "manifest.json"
    path.write_text(path.read_text().replace('"mean": 0.1', '"mean": 0.2'))
    assert store.run(DRAW, None, {"seed": 1}) == made
    assert len(EXECUTED) == 2 and len(quarantined(store)) == 1


@pytest.mark.parametrize("value", [5, None, "", "ÿ", ["x"]])
def test_a_signature_that_makes_no_sense_is_none(store, keyed, value):
    made = store.run(DRAW, None, {"seed": 1})
    path = made.directory / "manifest.json"
    content = json.loads(path.read_bytes()) | {"signature": value}
    path.write_text(manifest.json_text(content))
    with pytest.raises(SignatureError):
        store.run(DRAW, None, {"seed": 1})


def test_a_store_is_signed_as_it_is(store, keyed, capsys):
    keyed("")
    made = [store.run(DRAW, None, {"seed": seed}) for seed in (1, 2, 3)]
    assert command(store, "seal") == 2 and "ENTROPY_PROBE_SEAL_KEY is not set" in capsys.readouterr().err
    (made[2].directory / "more" / "text.txt").write_text("seed 4")
    keyed("mine")
    assert command(store, "seal") == 1
    said = capsys.readouterr().out
    assert f"draw/{made[2].key}: text.txt was altered" in said and "3 artifacts and 0 runs are signed" in said
    assert [store.run(DRAW, None, {"seed": seed}) for seed in (1, 2)] == made[:2] and len(EXECUTED) == 3
    keyed("another")
    assert command(store, "seal") == 1 and store.find("draw", made[0].key) == made[0]


def test_an_archive_without_the_key_is_refused(store, tmp_path, keyed, monkeypatch):
    keyed("")
    made = store.run(DRAW, None, {"seed": 1})
    arrived = Store(tmp_path / "arrived")
    shutil.copytree(made.directory, arrived.root / "draw" / made.key)
    keyed("mine")
    with pytest.raises(StoreError, match=rf"x\.tar is refused: draw/{made.key} is not signed"):
        archive._verify(tmp_path / "x.tar", arrived, store, arrived.names(), [])


def recorded(store: Store, run_id: str = "a-run", seed: int = 1) -> Path:
    """A run that needs one artifact."""
    made = store.run(DRAW, None, {"seed": seed}).to_dict()
    entry = {"checkpoint": "checkpoint-3", "inputs": {"scores": {"artifact": made}}}
    finished = f"2026-11-26T00:00:0{seed}+00:00"
    with runs.writing(store, run_id) as folder:
        runs.write(folder, {"finished": finished, "checkpoints": [entry], "report": made, "config": {}})
    return runs.folder(store.root, run_id) / runs.RECORD


def edit(path: Path, signed: bool) -> None:
    record = json.loads(path.read_text())
    record["checkpoints"][0]["checkpoint"] = "checkpoint-6"
    if not signed:
        del record["signature"]
    path.write_text(json.dumps(record))


USES = {
    "find": lambda store: runs.find(store.root, "a-run"),
    "latest": lambda store: runs.find(store.root, "latest"),
    "named": lambda store: runs.named(store.root, "a-run"),
    "prune": lambda store: waste(store, 0),
    "export": lambda store: archive.export(store, "a-run", store.root.parent / "x.tar"),
    "adopt": lambda store: adopt(store, "a-run"),
    "variance": lambda store: variance(VarianceRequest(artifacts=str(store.root), run="a-run"), store, None),
}


@pytest.mark.attack("an edited record of a run in a signed store")
@pytest.mark.parametrize("signed", [True, False], ids=["under the old signature", "without one"])
@pytest.mark.parametrize("use", USES)
def test_an_edited_record_is_refused(store, keyed, capsys, use, signed):
    path = recorded(store)
    edit(path, signed)
    before = visible(store)
    with pytest.raises(StoreError, match=r"runs/a-run is (not signed|signed with another key).*Fix: "):
        USES[use](store)
    assert command(store, "verify") == 1 and "runs/a-run is " in capsys.readouterr().out
    assert visible(store) == before


def test_a_run_that_is_signed_is_used_and_one_that_is_not_is_never_the_latest(store, keyed):
    kept = recorded(store).parent
    assert json.loads((kept / runs.RECORD).read_text())["signature"]
    edit(recorded(store, "later", seed=2), signed=False)
    assert runs.recorded(store.root) == ["a-run"] and runs.find(store.root, "latest") == kept


@pytest.mark.parametrize(("then", "now"), [("", "mine"), ("mine", ""), ("mine", "yours")])
def test_a_run_is_used_with_its_key_alone(store, keyed, then, now, tmp_path):
    keyed(then)
    recorded(store)
    content = (runs.folder(store.root, "a-run") / runs.RECORD).read_bytes()
    archive.export(store, "latest", tmp_path / "x.tar")
    keyed(now)
    with pytest.raises(SignatureError, match=r"runs/a-run is (not )?signed"):
        runs.find(store.root, "latest")
    with pytest.raises(StoreError, match=r"x\.tar is refused"):
        archive.load(Store(tmp_path / "arrived"), tmp_path / "x.tar")
    keyed(then)
    assert archive.load(Store(tmp_path / "arrived"), tmp_path / "x.tar")[1] == ["a-run"]
    assert (runs.folder(tmp_path / "arrived", "a-run") / runs.RECORD).read_bytes() == content


def test_the_record_of_an_archive_is_not_believed_without_the_key(store, keyed, tmp_path):
    edit(recorded(store), signed=False)
    arrived = Store(shutil.copytree(store.root, tmp_path / "arrived"))
    with pytest.raises(StoreError, match=r"x\.tar is refused: runs/a-run is not signed"):
        archive._verify(tmp_path / "x.tar", arrived, store, arrived.names(), runs.present(arrived.root))


def test_runs_are_signed_as_they_are(store, keyed, capsys):
    keyed("")
    path = recorded(store)
    bad = recorded(store, "bad", seed=2)
    bad.write_text('{"finished": 5}')
    before = json.loads(path.read_text())
    keyed("mine")
    assert command(store, "seal") == 1
    said = capsys.readouterr().out
    assert "2 artifacts and 2 runs are signed" in said and f"{bad} does not say what the run needs" in said
    after = json.loads(path.read_text())
    assert after.pop("signature") and after == before and "signature" not in before
    assert runs.find(store.root, "latest") == path.parent and bad.read_text() == '{"finished": 5}'
    keyed("another")
    assert command(store, "seal") == 1 and runs.find(store.root, "latest") == path.parent
