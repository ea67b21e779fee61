"""Generate the reference pages from the code; `python -m entropy_core.config.reference` writes them to docs/."""

import argparse
import json
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from entropy_core.config.lab import InterventionsRequest
from entropy_core.config.schema import ProbeConfig, VarianceRequest
from entropy_core.estimates.phase_table import CLIPPED, PHASE
from entropy_core.estimates.post_mortem import POST_MORTEM
from entropy_core.estimates.price_table import PRICE
from entropy_core.estimates.rehearsal_table import REHEARSAL
from entropy_core.estimates.tables import AGREEMENT, COMPARISON, INTERVENTIONS, RESULTS, TABLES, of_checkpoints


def configuration_page() -> str:
    """Return, as Markdown, every key of the configuration with its type, default, bounds and meaning."""
    lines = [
        "# Configuration",
        "",
        "One YAML file describes one sweep. Unknown keys, wrong types and values out of range are reported together,",
        "before anything runs. `checkpoints` is the only key without a default. Relative paths are resolved against",
        "the folder of the file; in a form or a deployment parameter, against the folder where its server was started.",
        "",
        *_section("", ProbeConfig),
        "## The `request` of entropy-probe/variance",
        "",
        "Which recorded sweep, its store, and the keys of `variance` above. A key at its default keeps the recorded",
        "value.",
        "",
        *_table(VarianceRequest.model_fields, ""),
        "## The `request` of entropy-probe/interventions",
        "",
        "`lab` as above, and:",
        "",
        *_table({name: InterventionsRequest.model_fields[name] for name in ("run", "artifacts", "interventions")}, ""),
    ]
    return "\n".join(lines) + "\n"


def tables_page() -> str:
    """Return, as Markdown, every column of the tables of a run with its type, unit and meaning."""
    lines = [
        "# Columns",
        "",
        "Unit and description are also in the metadata of each Arrow field. A measurement whose weights overflowed is",
        "null; no value is NaN.",
    ]
    rows_of = {"results": "A row per checkpoint × step size × normalisation × estimator of ΔH."} | {
        "linearity": "A row per checkpoint × normalisation × estimator with at least two measured step sizes but 0.",
        "eta_pairs": "A row per checkpoint × normalisation × estimator × η > 0 for which −η was measured as well.",
        "replicates": "A row per checkpoint × normalisation × E batch, if `E_replicates` is above 1.",
        "predictors": "A row per checkpoint × normalisation × step size × predictor.",
        "price": "A row per checkpoint × normalisation × step size but 0, if `price` is set.",
        "phase": "A row per checkpoint × normalisation × intervention (`as it is` included) × optimizer step on the "
        "rollout, if `update.phase` is followed.",
        "clipped": "A row per checkpoint × intervention × optimizer step on the rollout × token that the step clips.",
        "rehearsal": "A row per checkpoint × normalisation × intervention × seed × measured step, and one of all seeds "
        "together, if `lab.rehearse` asks for steps.",
        "post_mortem": "A row per checkpoint × normalisation × part of the step that was taken, if asked for.",
        "agreement": "A row per checkpoint × quantity that the probe measures and a trainer may log.",
        "interventions": "A row per checkpoint × normalisation × level × intervention, if any are asked for.",
        "compare": "A row per pair of checkpoints × normalisation × quantity; `entropy-probe compare` writes it.",
    }
    schemas = {"results": RESULTS} | {name: of_checkpoints(schema) for name, schema in TABLES.items()}
    schemas |= {
        "price": of_checkpoints(PRICE),
        "phase": of_checkpoints(PHASE),
        "clipped": of_checkpoints(CLIPPED),
        "rehearsal": of_checkpoints(REHEARSAL),
        "post_mortem": of_checkpoints(POST_MORTEM),
        "agreement": AGREEMENT,
        "interventions": INTERVENTIONS,
    }
    schemas |= {"compare": COMPARISON}
    for name, schema in schemas.items():
        lines += [
            "",
            f"## {name}.parquet",
            "",
            rows_of[name],
            "",
            "| column | type | unit | meaning |",
            "|---|---|---|---|",
        ]
        for field in schema:
            metadata = {key.decode(): value.decode() for key, value in field.metadata.items()}
            lines.append(f"| `{field.name}` | {field.type} | {metadata['unit']} | {metadata['description']} |")
    return "\n".join(lines) + "\n"


PAGES = {"configuration.md": configuration_page, "columns.md": tables_page}


def _section(prefix: str, model: type[BaseModel]) -> list[str]:
    nested = {name: type(field.default) for name, field in model.model_fields.items() if _is_section(field)}
    plain = {name: field for name, field in model.model_fields.items() if name not in nested}
    lines = [f"## `{prefix}`" if prefix else "## Top level", "", (model.__doc__ or "").strip(), ""]
    lines += _table(plain, f"{prefix}." if prefix else "")
    for name, section in nested.items():
        lines += _section(f"{prefix}.{name}" if prefix else name, section)
    return lines


def _table(fields: dict[str, FieldInfo], prefix: str) -> list[str]:
    lines = ["| key | type | default | meaning |", "|---|---|---|---|"]
    for name, field in fields.items():
        default = "required" if field.is_required() else f"`{_yaml(field.get_default(call_default_factory=True))}`"
        lines.append(f"| `{prefix}{field.alias or name}` | {_type(field)} | {default} | {field.description} |")
    return [*lines, ""]


def _type(field: FieldInfo) -> str:
    kind = field.annotation
    if get_origin(kind) is dict:
        return "keys and values"
    if get_origin(kind) is Union:
        return "string or list of string"
    listed = get_origin(kind) is list
    if listed:
        kind = get_args(kind)[0]
        kind = get_args(kind)[0] if get_origin(kind) not in (None, Literal) else kind
        if get_origin(kind) is Union:
            return "list of string, or of a name and its value"
    if get_origin(kind) is Literal:
        name = ", ".join(f"`{choice if isinstance(choice, str) else _yaml(choice)}`" for choice in get_args(kind))
    else:
        name = _TYPES[getattr(kind, "__name__", "")]
    bounds = [f"{sign} {getattr(m, key)}" for m in field.metadata for key, sign in _BOUNDS.items() if hasattr(m, key)]
    return ("list of " if listed else "") + name + (f", {', '.join(bounds)}" if bounds else "")


def _yaml(default: Any) -> str:
    """A default as a file would have it."""
    return json.dumps(default, ensure_ascii=False)


_TYPES = {"int": "integer", "float": "number", "str": "string", "bool": "true or false"}
_BOUNDS = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}


def _is_section(field: FieldInfo) -> bool:
    return isinstance(field.default, BaseModel)


def main() -> None:
    """Write both pages to the folder that the command line names."""
    parser = argparse.ArgumentParser(
        "python -m entropy_core.config.reference", description="Write the reference pages."
    )
    parser.add_argument("folder", nargs="?", type=Path, default=Path("docs"), help="where to (default: docs)")
    folder = parser.parse_args().folder
    for name, page in PAGES.items():
        (folder / name).write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()
