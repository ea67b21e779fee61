"""The form of a deployment: what a user needs first comes first, and what cannot be changed is not shown.

The types of a flow's parameters make the form, in the order of the configuration's reference. This arranges it.
"""

from typing import Any

_FIRST: dict[str, tuple[str, ...]] = {
    "ProbeConfig": (
        *("checkpoints", "batch_config", "generation", "update", "importance", "price", "interventions", "variance"),
        *("lab", "post_mortem", "name", "policy", "execution"),
    ),
    "BatchConfig": ("dataset_name", "split", "E_total_sequences", "B_U", "G", "prompt_column"),
    "UpdateConfig": ("reward", "loss", "scale_rewards", "max_grad_norm"),
    "InterventionsRequest": ("run", "interventions", "lab"),
}
"""By model, the fields that come first, in this order; the others follow as they are."""


def arranged(definitions: dict[str, Any]) -> dict[str, Any]:
    """Arrange the models of a form.

    Args:
        definitions: by name of the model its JSON schema.

    Returns:
        The same, with fields in order of need. Those of one possible value have moved to where a form does not look:
        they are still taken, with this value.
    """
    return {name: _arranged(schema, _FIRST.get(name, ())) for name, schema in definitions.items()}


def _arranged(schema: dict[str, Any], first: tuple[str, ...]) -> dict[str, Any]:
    fields = schema.get("properties", {})
    ordered = {name: fields[name] for name in dict.fromkeys([*first, *fields])}
    fixed = {name for name, field in fields.items() if is_fixed(field)}
    if not fixed:
        return schema | ({"properties": ordered} if fields else {})
    return schema | {
        "properties": {name: field for name, field in ordered.items() if name not in fixed},
        "patternProperties": {f"^{name}$": fields[name] for name in fixed},
    }


def is_fixed(field: dict[str, Any]) -> bool:
    """Whether the JSON schema of a field has one possible value."""
    return "const" in field or ("minimum" in field and field.get("minimum") == field.get("maximum"))


def without_fixed(values: dict[str, Any], schema: dict[str, Any], definitions: dict[str, Any]) -> dict[str, Any]:
    """Leave out of the values of a model those that its form does not show.

    Args:
        values: by name of the field.
        schema: of the model.
        definitions: of all models.
    """
    fields = schema.get("properties", {})
    kept = {}
    for name, value in values.items():
        field = fields.get(name, {})
        if not is_fixed(field):
            model = definitions.get(str(field.get("$ref", "")).rpartition("/")[2])
            kept[name] = without_fixed(value, model, definitions) if model and isinstance(value, dict) else value
    return kept
