"""Per-token columns: whose they are, and that those of others are refused where they are put beside each other."""

from dataclasses import replace
from itertools import chain, combinations

import pytest
import torch
from pipeline_fixtures import Counting, make_run, probe, skip_figures, values

from entropy_core.errors import StoreError
from entropy_core.numerics import ragged
from entropy_core.pipeline.catalogue import STAGES
from entropy_core.sequences.batch import BatchedSequences, tokens_of
from entropy_core.store.columns import TokenTable, concatenate, read_tokens
from entropy_core.store.store import Store


def sequences(*pairs: tuple[list[int], list[int]], first: int = 0) -> BatchedSequences:
    prompts, responses = zip(*pairs, strict=True)
    N = len(pairs)
    return BatchedSequences(
        sequence_ids_N=torch.arange(first, first + N),
        prompt_ids_N=torch.arange(N),
        draws_N=torch.zeros(N, dtype=torch.int64),
        prompt_tokens=torch.tensor([*chain(*prompts)]),
        prompt_offsets_N1=ragged.offsets_from_lengths(torch.tensor([len(p) for p in prompts])),
        response_tokens_K=torch.tensor([*chain(*responses)]),
        response_offsets_N1=ragged.offsets_from_lengths(torch.tensor([len(r) for r in responses])),
        finish_reasons=("eos",) * N,
    )


OTHERS = {
    "as it is": sequences(([1, 2], [3, 4])),
    "another response": sequences(([1, 2], [3, 5])),
    "another prompt": sequences(([2, 1], [3, 4])),
    "a token on the other side": sequences(([1, 2, 3], [4])),
    "another id": sequences(([1, 2], [3, 4]), first=1),
}


def test_a_sequence_is_its_id_its_prompt_and_its_response():
    identities = {name: int(batch.identities_N) for name, batch in OTHERS.items()}
    assert all(identities[a] != identities[b] for a, b in combinations(identities, 2))
    assert int(sequences(([1, 2], [3, 4])).identities_N) == identities["as it is"]


def test_a_selection_keeps_who_its_sequences_are():
    batch = sequences(([1], [2, 3]), ([4, 5], [6]), ([7], [8]))
    chosen = torch.tensor([2, 0])
    assert torch.equal(batch.select(chosen).identities_N, batch.identities_N[chosen])


def test_a_join_has_the_columns_of_both():
    batch = sequences(([1], [2, 3]), ([4, 5], [6]))
    a, b = batch.table({"a": torch.tensor([1.0, 2.0, 3.0])}), batch.table({"b": torch.tensor([4.0, 5.0, 6.0])})
    both = a.join(b)
    assert list(both.columns) == ["a", "b"] and both["b"].tolist() == [4.0, 5.0, 6.0]


@pytest.mark.parametrize("other", [name for name in OTHERS if name != "as it is"])
def test_a_join_refuses_strangers(other):
    ours, theirs = OTHERS["as it is"], OTHERS[other]
    table = ours.table({"a": torch.zeros(len(ours.response_tokens_K))})
    with pytest.raises(StoreError, match=r"the columns b of 1 sequences are of others.*Fix: "):
        table.join(theirs.table({"b": torch.zeros(len(theirs.response_tokens_K))}))


def test_a_join_refuses_the_same_sequences_in_another_order_and_tokens_that_lie_otherwise():
    batch = sequences(([1], [2, 3]), ([4, 5], [6]))
    table = batch.table({})
    with pytest.raises(StoreError, match="are of others"):
        table.join(batch.select(torch.tensor([1, 0])).table({}))
    with pytest.raises(StoreError, match="are of others"):
        table.join(replace(table, offsets_N1=torch.tensor([0, 1, 3])))


def test_the_first_of_several_tables():
    shards = [sequences(([1], [2, 3]), ([4], [5])), sequences(([6], [7, 8, 9]), first=2)]
    tables = [shard.table({"x": shard.response_tokens_K}) for shard in shards]
    whole = concatenate(tables)
    assert torch.equal(whole.sequences_N, tokens_of(shards).sequences_N)
    assert whole.first(2)["x"].tolist() == [2, 3, 5] and whole.first(3)["x"].tolist() == [2, 3, 5, 7, 8, 9]


# --- in a sweep ------------------------------------------------------------------------------------------------------

TABLES = {
    "score-e-batch": ("entropy-gradient", "variance"),
    "first-order-e": ("variance",),
    "importance": ("variance",),
    "path-integral": ("variance",),
    "rescore-e-batch": ("variance",),
    "score-u-batch": ("compute-update", "variance"),
    "score-u-reference": ("compute-update",),
    "discriminate-u": ("variance",),
}
"""What writes a table of tokens, and which stages read it."""


@pytest.fixture(scope="module")
def swept(tmp_path_factory) -> Counting:
    """A sweep in which every stage that writes a table is run, and the same with other draws."""
    home = tmp_path_factory.mktemp("columns")
    run = make_run(home / "run")
    with pytest.MonkeyPatch.context() as patch:
        skip_figures(patch)
        done = probe(
            values(
                home / "run",
                home / "artifacts",
                checkpoints=[str(run / "checkpoint-3")],
                generation={"max_new_tokens": 1},  # so that all responses are equally long
                update={"kl_beta": 0.1, "reference": str(run / "checkpoint-5")},
                importance={"etas": [0, 1], "estimators": ["per_decision", "path_integral"]},
            )
        )
    return done.run


@pytest.mark.parametrize(("writer", "reader"), [(w, reader) for w, readers in TABLES.items() for reader in readers])
def test_a_stage_refuses_numbers_of_other_sequences(swept, tmp_path, monkeypatch, writer, reader):
    """Tables of as many tokens, of sequences that differ in one token of one prompt."""
    stage = next(stage for stage in STAGES if stage.name == reader)
    altered = {artifact.digest for artifact in swept.artifacts(writer)}

    def strangers(self, file="tensors.safetensors", only=(), optional=()):
        found = real(self, file, only, optional)
        if self.digest in altered and "sequences" in found:
            found["sequences"] = found["sequences"].clone()
            found["sequences"][-1] += 1
        return found

    from entropy_core.store.artifact import Artifact

    real = Artifact.tensors
    monkeypatch.setattr(Artifact, "tensors", strangers)
    with pytest.raises(StoreError, match="are of others"):
        Store(tmp_path).run(stage, swept.execution, swept.inputs(reader))


def test_every_table_of_tokens_says_whose_they_are(swept):
    writers = set()
    for _, _, artifact in swept.asked:
        for file in artifact.manifest["files"]:
            if file.endswith(".safetensors") and not file.startswith("vectors/") and "sample" not in artifact.stage:
                table = read_tokens([artifact], file=file)
                assert isinstance(table, TokenTable) and len(table.offsets_N1) == len(table.sequences_N) + 1
                writers.add(artifact.stage)
    assert writers == TABLES.keys() | {"compute-update", "first-order-u"}
