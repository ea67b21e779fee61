"""A checkpoint that reads from where no digest looks, asks for code from elsewhere, or does not come to an end."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from lora_fixtures import make_base, make_lora
from pipeline_fixtures import make_gpt2
from safetensors.torch import load_file, save_file

from entropy_core.checkpoints.layout import find_layout
from entropy_core.checkpoints.tokenizer import load_tokenizer
from entropy_core.checkpoints.trainer_files import read_trainer_files
from entropy_core.errors import CheckpointError, PromptError
from entropy_core.files.checkpoint import tokenizer_digest, weights_digest
from entropy_core.isolation.process import Isolation
from entropy_core.pipeline import patterns
from entropy_core.policy.pretrained import load_policy
from entropy_core.prompts.pools import Pool
from entropy_core.prompts.tokens import encode

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("original")
    make_gpt2(folder / "checkpoint-3")
    make_base(folder / "base")
    make_lora(folder / "lora", folder / "base")
    return folder


@pytest.fixture
def sound(original: Path, tmp_path: Path) -> Path:
    return shutil.copytree(original / "checkpoint-3", tmp_path / "checkpoint-3")


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def load(directory: Path) -> float:
    load_policy.cache_clear()
    policy = load_policy(directory, weights_digest(directory), "float32", "eager", "cpu")
    return float(sum(p.detach().double().abs().sum() for p in policy.model.parameters()))


def other_weights(directory: Path, name: str, scale: float = 1.5) -> None:
    (directory / name).parent.mkdir(exist_ok=True)
    tensors = {key: scale * tensor for key, tensor in load_file(directory / WEIGHTS).items()}
    save_file(tensors, directory / name, metadata={"format": "pt"})


def index(directory: Path, name: str, shard: str) -> None:
    names = load_file(directory / WEIGHTS)
    (directory / name).write_text(json.dumps({"metadata": {}, "weight_map": dict.fromkeys(names, shard)}))


def elsewhere(name: str) -> Callable[[Path], None]:
    def spoil(directory: Path) -> None:
        other_weights(directory, name)
        edit(directory / "config.json", transformers_weights=name)

    return spoil


def behind_a_link(directory: Path) -> None:
    outside = directory.parent / "outside"
    outside.mkdir()
    other_weights(directory, "../outside/others.safetensors")
    (directory / "linked").symlink_to(outside)
    edit(directory / "config.json", transformers_weights="linked/others.safetensors")


def by_an_index(directory: Path) -> None:
    other_weights(directory, "../others.safetensors")
    index(directory, "README.safetensors.index.json", "../others.safetensors")
    edit(directory / "config.json", transformers_weights="README.safetensors.index.json")


@pytest.mark.attack("weights that config.json has somewhere else")
@pytest.mark.parametrize(
    "spoil", [elsewhere("sub/x.safetensors"), elsewhere(".x.safetensors"), behind_a_link, by_an_index]
)
def test_weights_from_elsewhere_are_not_loaded(sound: Path, spoil: Callable[[Path], None]):
    spoil(sound)
    with pytest.raises(CheckpointError, match=r"has the weights in '.*', and they are read from model\.safetensors"):
        load(sound)
    edit(sound / "config.json", transformers_weights=WEIGHTS)
    assert load(sound)


@pytest.mark.attack("shards and tokenizer files under the names of bystanders")
@pytest.mark.parametrize("shard", [".x.safetensors", "README.safetensors", "x.md.safetensors", "NOTICE-1.safetensors"])
def test_a_shard_counts_whatever_it_is_called(sound: Path, shard: str):
    other_weights(sound, shard, 1.0)
    index(sound, INDEX, shard)
    (sound / WEIGHTS).rename(sound / "kept")
    plain, before = load(sound), weights_digest(sound)
    (sound / "kept").rename(sound / WEIGHTS)
    other_weights(sound, shard)
    (sound / WEIGHTS).rename(sound / "kept")
    assert load(sound) == pytest.approx(1.5 * plain)
    assert weights_digest(sound) != before


@pytest.mark.attack("shards and tokenizer files under the names of bystanders")
@pytest.mark.parametrize(
    "name", ["tokenizer.4.0.json", "tokenizer.4.0+x_results.json", "tokenizer.4.0+x.bin.index.json"]
)
def test_a_tokenizer_file_counts_whatever_it_is_called(sound: Path, name: str):
    edit(sound / "tokenizer_config.json", fast_tokenizer_files=[name])
    shutil.copy(sound / "tokenizer.json", sound / name)
    plain, before = load_tokenizer(sound)("12").input_ids, tokenizer_digest(sound)
    text = (sound / name).read_text()
    assert '"1": 3' in text and '"2": 4' in text
    (sound / name).write_text(text.replace('"1": 3', '"1": 4').replace('"2": 4', '"2": 3'))
    assert load_tokenizer(sound)("12").input_ids == plain[::-1]
    assert tokenizer_digest(sound) != before


@pytest.mark.attack("a tokenizer from a file somewhere else")
def test_a_tokenizer_from_elsewhere_is_not_read(sound: Path):
    edit(sound / "tokenizer_config.json", gguf_file="/somewhere/else.gguf")
    (sound / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"has the tokenizer in '/somewhere/else\.gguf'"):
        load_tokenizer(sound)


DOUBLES = [{"type": "Replace", "pattern": {"String": "1"}, "content": "11"}] * 40
NOTHING = {"type": "Replace", "pattern": {"Regex": "x?"}, "content": "y" * 2000}
BOMBS = {
    "a normalizer that doubles": {"normalizer": {"type": "Sequence", "normalizers": DOUBLES}},
    "a normalizer within one": {
        "normalizer": {"type": "Sequence", "normalizers": [{"type": "Sequence", "normalizers": DOUBLES[:20]}] * 2}
    },
    "a decoder that doubles": {"decoder": {"type": "Sequence", "decoders": DOUBLES}},
    "a long text for nothing": {"normalizer": NOTHING},
}


@pytest.mark.attack("a tokenizer that fills the memory, or fails in Rust")
@pytest.mark.parametrize("name", BOMBS)
def test_a_tokenizer_that_fills_the_memory_is_refused(sound: Path, name: str):
    edit(sound / "tokenizer.json", **BOMBS[name])
    with pytest.raises(CheckpointError, match=r"of .*tokenizer\.json makes up to .* characters of one"):
        load_tokenizer(sound)


@pytest.mark.attack("a tokenizer that fills the memory, or fails in Rust")
def test_a_panic_is_an_error(sound: Path):
    pattern = {"type": "Split", "pattern": {"Regex": "^(1+)+$"}, "behavior": "Isolated", "invert": False}
    edit(sound / "tokenizer.json", pre_tokenizer=pattern)
    pool = Pool(pa.table({"prompt": ["1" * 60 + "2"]}), ())
    with pytest.raises(PromptError, match=r"cannot encode every prompt: Onig: .*retry-limit"):
        encode(pool, load_tokenizer(sound))


def test_a_usual_tokenizer_is_loaded(sound: Path):
    space = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    usual = [{"type": "NFKC"}, {"type": "Prepend", "prepend": "▁"}, space, {"type": "Lowercase"}]
    edit(sound / "tokenizer.json", normalizer={"type": "Sequence", "normalizers": usual})
    assert load_tokenizer(sound)


@pytest.mark.attack("an attention kernel from the hub")
@pytest.mark.parametrize(
    "said", ["a/kernel", "paged|a/kernel", {"": "a/kernel"}, {"text_config": "a/kernel"}, ["a/kernel"]]
)
@pytest.mark.parametrize("key", ["_attn_implementation", "attn_implementation", "experts_implementation"])
def test_a_kernel_from_the_hub_is_not_loaded(sound: Path, key: str, said: Any):
    edit(sound / "config.json", **{key: said})
    with pytest.raises(CheckpointError, match=f"asks for {key} .*, which is code on the hub"):
        load(sound)


NEVER = "(([a-z._0-9]*)*)*!"


@pytest.mark.attack("an adapter that names modules by a pattern without end")
@pytest.mark.parametrize(
    "changes",
    [
        {"target_modules": NEVER},
        {"exclude_modules": NEVER},
        {"modules_to_save": [NEVER]},
        {"rank_pattern": {NEVER: 4}},
        {"alpha_pattern": {NEVER: 4}},
        {"layers_pattern": NEVER, "layers_to_transform": [0]},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_a_pattern_without_end_is_refused(original: Path, tmp_path: Path, monkeypatch, changes: dict[str, Any]):
    monkeypatch.setattr(patterns, "LIMITS", Isolation(seconds=0.5))
    directory = shutil.copytree(original / "lora", tmp_path / "checkpoint-3")
    edit(directory / "adapter_config.json", **changes)
    with pytest.raises(CheckpointError, match=r"by patterns that take longer than 0\.5 s to match.*repetitions within"):
        patterns.require_quick_patterns(find_layout(directory))


def test_a_pattern_that_ends_is_left_to_peft(original: Path, tmp_path: Path):
    directory = shutil.copytree(original / "lora", tmp_path / "checkpoint-3")
    for changes in ({}, {"target_modules": r".*\.(q|v)_proj"}, {"target_modules": "("}, {"rank_pattern": {"a+": 2}}):
        edit(directory / "adapter_config.json", **changes)
        patterns.require_quick_patterns(find_layout(directory))


@pytest.mark.parametrize(
    "named", [8, True, ["base"], {"a": 1}, "~nobody-of-this-name/base", "x" * 5000, "a\0b", "\ud800"]
)
@pytest.mark.parametrize("base", ["", "base"])
def test_a_base_that_can_be_none_is_refused(original: Path, tmp_path: Path, named: Any, base: str):
    directory = shutil.copytree(original / "lora", tmp_path / "checkpoint-3")
    edit(directory / "adapter_config.json", base_model_name_or_path=named)
    try:
        layout = find_layout(directory, base and original / base)
        assert base and read_trainer_files(layout).is_adapter
    except CheckpointError as error:
        assert "names the base model" in str(error) or "not on this machine: it names" in str(error)
