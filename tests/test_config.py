"""The configuration: nothing is accepted that is not understood, and an error names every key that is wrong."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel, ValidationError

from entropy_core.config.lab import InterventionsRequest
from entropy_core.config.read import load_config, parse_config
from entropy_core.config.schema import ProbeConfig, Section, VarianceConfig, VarianceRequest
from entropy_core.errors import ConfigError

DEMO = Path(__file__).parents[1] / "configs" / "demo.yaml"
LEAST = {"checkpoints": ["runs/grpo/checkpoint-*"]}


def with_value(dotted: str, value: Any) -> dict[str, Any]:
    """The least configuration with one key set."""
    values: dict[str, Any] = dict(LEAST)
    *sections, key = dotted.split(".")
    inner = values
    for section in sections:
        inner[section] = dict(inner.get(section, {}))
        inner = inner[section]
    inner[key] = value
    return values


def sections_of(model: type[BaseModel]) -> list[type[BaseModel]]:
    found = [model]
    for field in model.model_fields.values():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            found += sections_of(field.annotation)
    return found


def test_checkpoints_are_all_that_must_be_said():
    config = parse_config(LEAST)
    assert config.checkpoints == ["runs/grpo/checkpoint-*"]
    assert (config.batch_config.E_total_sequences, config.batch_config.B_U, config.batch_config.G) == (4096, 64, 8)
    assert config.importance.etas[0] == 0.0
    assert config.store_root == Path("artifacts")


def test_the_demo_configuration_is_valid():
    config = load_config(DEMO)
    assert config.name == "demo"
    assert config.update.reward == "arithmetic"


def test_a_configuration_survives_json_and_yaml():
    config = load_config(DEMO)
    plain = config.model_dump(mode="json")
    assert parse_config(json.loads(json.dumps(plain))) == config
    assert parse_config(yaml.safe_load(yaml.safe_dump(plain))) == config


def test_nothing_can_be_changed_afterwards():
    config = parse_config(LEAST)
    with pytest.raises(ValidationError, match="frozen"):
        config.name = "other"
    with pytest.raises(ValidationError, match="frozen"):
        config.batch_config.B_U = 2


@pytest.mark.parametrize("model", [*sections_of(ProbeConfig), VarianceRequest])
def test_every_section_is_closed_and_every_value_is_described(model):
    assert issubclass(model, Section)
    assert model.__doc__
    for name, field in model.model_fields.items():
        is_section = isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)
        assert is_section or field.description, name
    with pytest.raises(ValidationError, match="no_such_key"):
        model.model_validate({"no_such_key": 1})


@pytest.mark.parametrize("model", [ProbeConfig, VarianceRequest, InterventionsRequest])
def test_the_forms_of_the_user_interface_are_plain(model):
    """No toggles between a value and none; a choice is a drop-down; every number is bounded but for the step sizes."""
    schema = model.model_json_schema()
    assert json.loads(json.dumps(schema))["additionalProperties"] is False
    leaves = 0
    for section in (schema, *schema.get("$defs", {}).values()):
        for name, field in section.get("properties", {}).items():
            if "$ref" in field:
                continue
            leaves += 1
            assert field["description"], name
            for value in (field, field.get("items", {})):
                assert not {"anyOf", "oneOf", "allOf"} & set(value), name
                if value.get("type") in ("integer", "number") and name != "etas":
                    assert {"minimum", "exclusiveMinimum"} & set(value), name
                    assert {"maximum", "exclusiveMaximum"} & set(value), name
    assert leaves >= len(model.model_fields) - 7


@pytest.mark.parametrize(
    ("dotted", "value"),
    [
        ("batchconfig", {}),
        ("batch_config.B_V", 4),
        ("generation.top_k", 50),
        ("update.kl_coef", 0.1),
        ("importance.eta", [1]),
        ("variance.confidence", 0.9),
        ("execution.num_workers", 2),
        ("policy.trust_remote_code", True),
    ],
)
def test_an_unknown_key_is_named(dotted, value):
    with pytest.raises(ConfigError, match=rf"the configuration: {dotted}: unknown key"):
        parse_config(with_value(dotted, value))


@pytest.mark.parametrize(
    ("dotted", "value"),
    [
        ("checkpoints", []),
        ("checkpoints", "runs/checkpoint-1"),
        ("name", "a name"),
        ("name", "../up"),
        ("name", ".hidden"),
        ("name", "-option"),
        ("name", "x" * 101),
        ("policy.dtype", "bfloat16"),
        ("policy.attn_implementation", "sdpa"),
        ("batch_config.E_sampling_mode", "greedy"),
        ("batch_config.E_total_sequences", 1),
        ("batch_config.E_total_sequences", 10**9),
        ("batch_config.E_total_sequences", 16.5),
        ("batch_config.E_batch_seed", -1),
        ("batch_config.U_batch_seed", 2**63),
        ("batch_config.B_E_values", []),
        ("batch_config.B_E_values", [4, 8]),
        ("batch_config.B_U", 1),
        ("batch_config.G", 1),
        ("batch_config.dataset_name", ""),
        ("batch_config.dataset_options", [512]),
        ("batch_config.dataset_options", {"size": float("nan")}),
        ("batch_config.max_prompt_length", -1),
        ("generation.temperature", 0),
        ("generation.temperature", 1e-320),
        ("generation.temperature", float("nan")),
        ("generation.temperature", float("inf")),
        ("generation.max_new_tokens", 0),
        ("generation.stop_strings", [""]),
        ("generation.do_sample", False),
        ("generation.gen_batch_size", 0),
        ("update.loss", "ppo"),
        ("update.max_grad_norm", -1),
        ("update.learning_rate", -1e-4),
        ("update.reward", ""),
        ("importance.etas", []),
        ("importance.etas", [0, float("nan")]),
        ("importance.etas", [float("inf")]),
        ("importance.etas", [0, 1, 1.0]),
        ("importance.etas", [0.0, -0.0]),
        ("importance.eta_unit", "relative"),
        ("importance.estimators", []),
        ("importance.estimators", ["is"]),
        ("importance.estimators", ["snis", "snis"]),
        ("variance.confidence_level", 1),
        ("variance.confidence_level", 95),
        ("variance.baseline", "mean"),
        ("variance.cluster", "none"),
        ("variance.normalizations", []),
        ("variance.normalizations", ["per_token", "per_token"]),
        ("execution.device", "tpu"),
        ("execution.shard_size", 0),
    ],
)
def test_a_value_out_of_range_is_named(dotted, value):
    with pytest.raises(ConfigError) as raised:
        parse_config(with_value(dotted, value))
    message = str(raised.value)
    assert message.startswith(f"the configuration: {dotted}")
    assert "Fix: " in message
    assert "\n" not in message


def test_a_cut_off_law_is_refused_with_the_reason():
    with pytest.raises(ConfigError, match=r"generation\.top_p: it is 0\.9, but .* Set top_p: 1\.0"):
        parse_config(with_value("generation.top_p", 0.9))


def test_a_prompt_has_one_writer_of_special_tokens():
    both = {"apply_chat_template": True, "add_special_tokens": True}
    with pytest.raises(ConfigError, match="apply_chat_template: the chat template writes the special tokens"):
        parse_config(LEAST | {"batch_config": both})
    with pytest.raises(ConfigError, match="system_prompt: it is a part of the chat template"):
        parse_config(with_value("batch_config.system_prompt", "Be brief."))
    assert parse_config(with_value("batch_config.apply_chat_template", True)).batch_config.system_prompt == ""


def test_every_wrong_key_is_named_at_once():
    values = LEAST | {"batch_config": {"B_U": 0, "g": 8}, "generation": {"max_new_tokens": "many"}}
    with pytest.raises(ConfigError) as raised:
        parse_config(values)
    assert str(raised.value).splitlines() == [
        "the configuration has 3 errors:",
        "  batch_config.B_U: must be greater than or equal to 2, not 0",
        "  batch_config.g: unknown key; the closest known key is batch_config.G",
        '  generation.max_new_tokens: must be an integer, not the string "many".',
        "Fix: correct them; docs/configuration.md lists all keys.",
    ]


def test_many_errors_are_counted_and_the_first_are_named():
    with pytest.raises(ConfigError) as raised:
        parse_config(LEAST | {"importance": {"estimators": list(range(500))}})
    first, *named, more, _ = str(raised.value).splitlines()
    assert first == "the configuration has 500 errors:" and more == "  and 480 more."
    assert [line.split(":")[0] for line in named] == [f"  importance.estimators.{i}" for i in range(20)]


@pytest.mark.parametrize("values", [None, [], "demo", 3])
def test_what_is_no_mapping_is_refused(values):
    with pytest.raises(ConfigError, match=r"the configuration(: must be a mapping of keys to values| is empty)"):
        parse_config(values)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"checkpoints: [a\nname: b", "is not valid YAML"),
        (b"\tname: demo", "is not valid YAML"),
        (b"name: \x00", "is not valid YAML"),
        (b"name: caf\xe9", "is not valid YAML"),
        (b"\x80\x02}q\x00.", "is not valid YAML"),
        (b"name: !!python/object/apply:os.getcwd []", "is not valid YAML"),
        (b"", r"is empty\. .*checkpoints: \["),
        (b"# nothing yet\n", "is empty"),
        (b"checkpoints: [a]\nbatch_config:\n", r"batch_config: is empty; add keys to it, or remove it\."),
        (b"checkpoints: [a]\ngeneration: 3\n", r"generation: must be a mapping of keys to values\."),
        (b"- name: demo", "must be a mapping of keys to values"),
    ],
    ids=["open bracket", "tab", "zero byte", "latin-1", "pickle", "code", "empty", "comment", "section", "3", "list"],
)
def test_a_file_that_is_no_configuration_is_named(tmp_path, content, message):
    path = tmp_path / "probe.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=message) as raised:
        load_config(path)
    assert str(path) in str(raised.value)
    assert "\n" not in str(raised.value)
    assert not re.search(r"Config\b|instance of", str(raised.value))  # no class of pydantic's or of ours


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"missing\.yaml cannot be read \(No such file or directory\)"):
        load_config(tmp_path / "missing.yaml")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config(tmp_path)


def test_a_file_is_read_as_utf_8_everywhere(tmp_path, monkeypatch):
    monkeypatch.setattr("locale.getencoding", lambda: "ascii")
    path = tmp_path / "probe.yaml"
    path.write_text("checkpoints: [läufe/checkpoint-1]  # η in units of lr\n", encoding="utf-8")
    assert load_config(path).checkpoints == [str(tmp_path / "läufe" / "checkpoint-1")]


def test_a_value_of_another_type_is_no_value():
    """Nothing is turned into what was wanted: true is not 1, 16.0 not 16, and "4" is a string."""
    for dotted, value, wanted in (
        ("update.learning_rate", True, "a number, not true"),
        ("update.learning_rate", "1e-4", 'a number, not the string "1e-4"'),
        ("batch_config.G", True, "an integer, not true"),
        ("batch_config.G", 16.0, "an integer, not 16.0"),
        ("batch_config.G", "4", 'an integer, not the string "4"'),
        ("batch_config.allow_download", 1, "true or false, not 1"),
        ("batch_config.allow_download", "yes", 'true or false, not the string "yes"'),
        ("batch_config.split", 7, "a string, not 7"),
        ("name", False, "a string, not false"),
        ("importance.etas", 1, "a list, not 1"),
        ("importance.etas", [0, True], "a number, not true"),
        ("generation.stop_strings", [None], "a string, not null"),
    ):
        with pytest.raises(ConfigError, match=rf"the configuration: {dotted}(\.\d)?: must be {re.escape(wanted)}\."):
            parse_config(with_value(dotted, value))


@pytest.mark.parametrize(
    ("dotted", "near"),
    [
        ("chekpoints", "checkpoints"),
        ("batch_config.g", "batch_config.G"),
        ("batch_config.E_total_sequence", "batch_config.E_total_sequences"),
        ("temperature", "generation.temperature"),  # of another section
        ("execution.max_new_tokens", "generation.max_new_tokens"),
        ("variance.confidence", "variance.confidence_level"),
        ("updates", "update"),
        ("lucky_number", ""),
    ],
)
def test_the_nearest_known_key_is_named(dotted, near):
    said = rf"{dotted}: unknown key{f'; the closest known key is {near}' if near else ''}\. "
    with pytest.raises(ConfigError, match=said):
        parse_config(with_value(dotted, {}))


def test_a_rule_about_two_keys_is_broken_beside_every_other_error():
    """And is not spoken of where the other key is wrong: nobody knows what was meant there."""
    values = with_value("update.scale_rewards", "group") | {"importance": {"etas": [1, 1]}, "colour": "red"}
    values["update"] |= {"loss": "reinforce", "optimizer_state": "fresh"}
    values["generation"] = {"top_p": 0.9, "temperature": -1}
    with pytest.raises(ConfigError) as raised:
        parse_config(values)
    keys = [line.split(":")[0].strip() for line in str(raised.value).splitlines()[1:-1]]
    assert keys == [
        "generation.temperature",
        "generation.top_p",
        "update.scale_rewards",
        "update.optimizer_state",
        "importance.etas",
        "colour",
    ]
    values["update"] |= {"loss": "ppo", "learning_rate": "fast", "kl_beta": -1}
    with pytest.raises(ConfigError) as raised:
        parse_config(values)
    keys = [line.split(":")[0].strip() for line in str(raised.value).splitlines() if line.startswith("  update.")]
    assert keys == ["update.loss", "update.learning_rate", "update.kl_beta"]


def test_numbers_as_yaml_writes_them(tmp_path):
    path = tmp_path / "probe.yaml"
    path.write_text("checkpoints: [a]\nupdate: {learning_rate: 1e-4}\nimportance: {etas: [0, 1e-2, -1, .3]}\n")
    config = load_config(path)
    assert config.update.learning_rate == 1e-4  # which YAML 1.1 takes for a text
    assert config.importance.etas == [0.0, 0.01, -1.0, 0.3]


def test_a_request_changes_what_it_says_and_nothing_else():
    recorded = VarianceConfig(confidence_level=0.9, cluster="prompt", baseline="none")
    assert VarianceRequest().applied_to(recorded) == recorded
    shown = VarianceRequest.model_validate(VarianceRequest().model_dump(mode="json"))  # a form sends all that it shows
    assert shown.applied_to(recorded) == recorded
    asked = VarianceRequest(run="tiny-1", confidence_level=0.99, cluster="auto")
    assert asked.applied_to(recorded) == VarianceConfig(confidence_level=0.99, cluster="auto", baseline="none")
