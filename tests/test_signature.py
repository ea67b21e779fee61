"""With a key, a store refuses what was made without it, and never takes it for damage."""

import json
import shutil

import pytest
from store_fixtures import DRAW, EXECUTED, TOTAL, quarantined, visible

from entropy_core.errors import StoreError
from entropy_core.store import archive, manifest
from entropy_core.store.signature import VARIABLE, SignatureError
from entropy_core.store.store import Store
from flows.cli import main


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
    assert f"draw/{made[2].key}: text.txt was altered" in said and "3 artifacts are signed" in said
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
