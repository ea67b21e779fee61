"""Old configurations: what is carried over, that nothing is lost without a word, and that the result runs."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from pipeline_fixtures import make_run, probe, skip_figures

from entropy_core.config.legacy import convert
from entropy_core.config.read import parse_config
from entropy_core.errors import ConfigError
from flows.cli import main

ERAS = {path.stem: path for path in sorted((Path(__file__).parent / "legacy").glob("*.yaml"))}
LEAST = {"checkpoint": {"checkpoint_path": "runs/step_40"}}


def keys(values: dict[str, Any], prefix: str = "") -> set[str]:
    found = set()
    for key, value in values.items():
        found |= keys(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}"}
    return found


def converted(**sections: Any) -> tuple[dict[str, Any], str]:
    new, remarks = convert(LEAST | sections, "old", Path("/from"))
    return new, "\n".join(remarks)


def test_both_eras_are_here():
    assert list(ERAS) == ["final_era", "seed_era"]


@pytest.mark.parametrize("era", ERAS)
def test_every_key_is_carried_over_or_spoken_of(era, capsys):
    assert main(["legacy", str(ERAS[era])]) == 0
    out, err = capsys.readouterr()
    old, new = yaml.safe_load(ERAS[era].read_text()), yaml.safe_load(out)
    remarks = err.splitlines()
    assert [line.removeprefix("#   ") for line in out.splitlines() if line.startswith("#   ")] == remarks
    kept = keys(old) & keys(new)
    assert {"batch_config.B_U", "batch_config.G", "generation.temperature", "generation.max_new_tokens"} <= kept
    for key in keys(old) - kept:
        assert any(line.startswith((f"changed   {key}: ", f"dropped   {key}: ")) for line in remarks), key
    assert all(line.endswith(")") for line in remarks if not line.startswith("changed"))  # the reason
    assert "not a key that is known here" not in err
    assert all(len(line) < 400 for line in remarks)


@pytest.mark.parametrize("era", ERAS)
def test_an_old_configuration_runs(era, tmp_path, monkeypatch, capsys):
    skip_figures(monkeypatch)
    run = make_run(tmp_path / "run")
    main(["legacy", str(ERAS[era])])
    values = yaml.safe_load(capsys.readouterr().out)
    assert values["batch_config"]["E_sampling_mode"] == "distinct"
    values["checkpoints"] = [str(run / "checkpoint-3")]
    values["execution"] = values.get("execution", {}) | {"artifacts": str(tmp_path / "artifacts"), "device": "cpu"}
    rows = probe(values).rows
    assert {(row["n_sequences"], row["n_prompts_u"]) for row in rows} == {(8 * 4, 8)}
    if era == "seed_era":
        assert {row["learning_rate"] for row in rows} == {2e-4}
        assert {row["normalization"] for row in rows} == {"per_token", "per_sequence"}
        assert {row["eta"] for row in rows} == {0.0, 2e-4}
    else:
        assert {row["normalization"] for row in rows} == {"per_token"}
        assert {row["eta"] for row in rows} == {0.0, 8e-7, 1.6e-6, 1.28e-5}
    assert {row["estimator"] for row in rows} == {"snis"}


@pytest.mark.parametrize(
    ("sections", "key", "value", "said"),
    [
        ({"batch_config": {"B_E": 64}}, "batch_config.B_E_values", [64], "batch_config.B_E: 64 → "),
        ({"batch_config": {"B_E_values": 16}}, "batch_config.B_E_values", [16], "B_E_values: 16 → "),
        ({"batch_config": {"B_E_values": [16, 128, 32]}}, "batch_config.B_E_values", [128], "the largest"),
        ({"batch_config": {"B": 32}}, "batch_config.B_U", 32, "assumed   batch_config.B_U: 32"),
        ({"batch_config": {"B": 32}}, "batch_config.B_E_values", [32], "batch_config.B: 32 → "),
        ({"batch_config": {"B": 288, "B_E": 256, "B_U": 32}}, "batch_config.B_U", 32, "dropped   batch_config.B: 288"),
        ({"batch_config": {"B_U_values": [8], "B_E": 4}}, "batch_config.B_U", 8, "B_U_values: [8] → "),
        (
            {"batch_config": {"dataset_name": "gsm8k_r1_template"}},
            "update.reward",
            "answer_tag",
            "went with the dataset",
        ),
        ({"batch_config": {"dataset_name": "math"}}, "update.reward", "boxed", "assumed"),
        ({"batch_config": {"rollout_batch_size": 4, "G": 16}}, "generation.gen_batch_size", 64, "in sequences"),
        ({"generation": {"top_p": 0.995}}, "generation.top_p", 1.0, "changed   generation.top_p: 0.995 → 1.0"),
        ({"generation": {"do_sample": False}}, "generation.do_sample", True, "greedy"),
        ({"learning_rate": "2e-6"}, "update.learning_rate", 2e-6, "learning_rate: '2e-6' → "),
        ({"true_delta_h": {"lr_override": "2e-8"}}, "update.learning_rate", 2e-8, "lr_override"),
        ({"computation_options": {"master_seed": 7}}, "batch_config.U_batch_seed", 7, "streams of their own"),
        ({"estimator": {"single_eta": "4e-6"}}, "importance.etas", [0.0, 4e-6], "single_eta"),
        (
            {"estimator": {"eta_sweep": False, "single_eta": 2e-5, "eta_list": [1e-5]}},
            "importance.etas",
            [0.0, 2e-5],
            "dropped   estimator.eta_list",
        ),
        ({"estimator": {"eta_sweep": False, "eta_list": [1e-5]}}, "importance.eta_unit", "absolute", "eta_list"),
        ({"approx_delta_h": {"baseline": {"kind": "none"}}}, "variance.baseline", "none", "baseline.kind"),
        ({"approx_delta_h": {"baseline": {"kind": "hk_ridge"}}}, "variance.baseline", "time_loo", "does not bias"),
        ({"precision": {"runtime_dtype": "float64"}}, "policy.dtype", "float64", "runtime_dtype"),
        (
            {"checkpoint": {"checkpoint_path": "a/step_40/model/"}},
            "checkpoints",
            ["/from/a/step_40"],
            "model/ is found",
        ),
        ({"checkpoint": {"checkpoint_path": "a/my_model"}}, "checkpoints", ["/from/a/my_model"], "a list"),
    ],
)
def test_what_a_key_becomes(sections, key, value, said):
    new, remarks = converted(**sections)
    section, _, last = key.rpartition(".")
    assert (new[section] if section else new)[last] == value
    assert said in remarks
    parse_config(new)


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"importance": {"is_mode": "clip"}}, "dropped   importance.is_mode: 'clip'  (clipped weights are biased"),
        ({"approx_delta_h": {"normalize": "none"}}, "dropped   approx_delta_h.normalize: 'none'"),
        (
            {"precision": {"runtime_dtype": "bfloat16"}},
            "dropped   precision.runtime_dtype: 'bfloat16'  (weights are wid",
        ),
        ({"computation_options": {"master_seed": "none"}}, "dropped   computation_options.master_seed: 'none'"),
        ({"probe_rework": {"weighting_mode": "per_token_avg"}}, "assumed   update.loss: 'dr_grpo'"),
        ({"lucky_number": 7}, "dropped   lucky_number: 7  (not a key that is known here)"),
    ],
)
def test_what_has_no_meaning_here_is_said(sections, said):
    new, remarks = converted(**sections)
    assert said in remarks
    parse_config(new)


def test_replacement_sampling_stays_as_it_was():
    batch = {"E_sampling_mode": "replacement", "E_total_sequences": 512, "E_batch_seed": 3, "B_E_values": [512]}
    new, remarks = converted(batch_config=batch)
    assert new["batch_config"] == batch
    assert "batch_config" not in remarks


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is no configuration"),
        ("- a", "is no configuration"),
        ("a: [", "is not valid YAML"),
        ("checkpoints: [a]", "is a configuration of this version"),
        ("batch_config:\n", "names no checkpoint.*checkpoint.checkpoint_path"),
        ("checkpoint: {checkpoint_path: ''}", "names no checkpoint"),
        (
            "checkpoint: {checkpoint_path: a}\nbatch_config: {B_U: many}",
            "the new form of old: batch_config.B_U: must be an integer, not the string .many.",
        ),
        ("checkpoint: {checkpoint_path: a}\nbatch_config: {B_E: many}", "'many' is not a number"),
        ("checkpoint: {checkpoint_path: a}\nestimator: {eta_list: [[1]]}", r"\[1\] is not a number"),
        ("checkpoint: {checkpoint_path: a, device_map: {0: cuda}}\nlearning_rate: [1]", r"\[1\] is not a number"),
    ],
)
def test_what_cannot_be_converted_is_refused(tmp_path, capsys, content, message):
    path = tmp_path / "old.yaml"
    path.write_text(content)
    assert main(["legacy", str(path)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    with pytest.raises(ConfigError, match=message):
        raise ConfigError(err)
    assert err.count("\n") == 1


def test_the_command_line(tmp_path, capsys):
    assert main(["legacy", str(tmp_path / "missing.yaml")]) == 2
    assert "missing.yaml cannot be read" in capsys.readouterr().err
    path = tmp_path / "an old one!.yaml"
    path.write_text("checkpoint: {checkpoint_path: a}\n")
    assert main(["legacy", str(path)]) == 0
    assert yaml.safe_load(capsys.readouterr().out)["name"] == "an-old-one-"
