"""How a reward function is called: as TRL calls it, or as verl or OpenRLHF do. It may be `async`, as in TRL and verl.

    TRL         f(prompts, completions, completion_ids, **columns, trainer_state, log_extra, log_metric) -> list
    verl        compute_score(data_source, solution_str, ground_truth, extra_info) -> float or {"score": float}
    OpenRLHF    reward_func(queries, prompts, labels) -> list, tensor, or {"rewards": list or tensor, …}

A function is verl's if it has a parameter `solution_str`, and OpenRLHF's if it has a parameter `queries`. What TRL
passes besides the columns is left out where a function has no place for it.
"""

import asyncio
import inspect
from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

from entropy_core.errors import RewardError


class Responses(NamedTuple):
    """What a reward function is given.

    Attributes:
        prompts: of each response, a text or a conversation.
        texts: of each response, without special tokens.
        completions: the same as the function is given them: messages where the prompts are conversations.
        token_ids: of each response, the token that ended it included.
        columns: further columns of the pool, one entry per response.
        trainer_state: what `trainer_state.json` of the checkpoint says.
    """

    prompts: Sequence[Any]
    texts: Sequence[str]
    completions: Sequence[Any]
    token_ids: Sequence[Sequence[int]]
    columns: Mapping[str, Sequence[Any]]
    trainer_state: Mapping[str, Any]

    def part(self, first: int, stop: int) -> "Responses":
        """Some of them."""
        own = {name: values[first:stop] for name, values in self.columns.items()}
        prompts, texts, completions, token_ids = (list(values[first:stop]) for values in self[:4])
        return Responses(prompts, texts, completions, token_ids, own, self.trainer_state)


def call(function: Callable[..., Any], responses: Responses) -> Any:
    """What a reward function returns, awaited where it is to be."""
    parameters = _parameters(function)
    if "solution_str" in parameters:
        return _one_by_one(function, responses)
    if "queries" in parameters:
        return _of_queries(function, responses)
    # TRL leaves these columns out, and its own arguments come before columns of their names
    columns = {name: v for name, v in responses.columns.items() if name not in ("completion", "completion_ids")}
    given = {
        "completion_ids": [list(ids) for ids in responses.token_ids],
        "trainer_state": SimpleNamespace(**responses.trainer_state),
        "log_extra": _nothing,
        "log_metric": _nothing,
    }
    takes_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    given = {name: value for name, value in given.items() if takes_all or name in parameters}
    found = function(prompts=list(responses.prompts), completions=list(responses.completions), **columns | given)
    return asyncio.run(_awaited(found)) if inspect.isawaitable(found) else found


def _one_by_one(function: Callable[..., Any], responses: Responses) -> list[Any]:
    """Call a function of verl's, once for each response."""
    columns, scores = responses.columns, []
    judged = columns.get("reward_model", [])
    truths = [row.get("ground_truth") for row in judged] if all(isinstance(row, dict) for row in judged) else []
    if not truths or "data_source" not in columns:
        raise RewardError(
            "the function takes solution_str, as verl's do, and the pool has no columns reward_model (with "
            "ground_truth) and data_source",
            cause="the prompts are not a file of verl's",
            fix="add these columns, or take prompts and completions, as TRL's rewards do",
        )
    for i, text in enumerate(responses.texts):
        extra = columns["extra_info"][i] if "extra_info" in columns else None
        found = function(
            data_source=columns["data_source"][i], solution_str=text, ground_truth=truths[i], extra_info=extra or {}
        )
        found = asyncio.run(_awaited(found)) if inspect.isawaitable(found) else found
        scores.append(found["score"] if isinstance(found, dict) else found)
    return scores


def _of_queries(function: Callable[..., Any], responses: Responses) -> Any:
    """Call a function of OpenRLHF's; a query is a prompt and its response, without special tokens."""
    if "label" not in responses.columns or not all(isinstance(prompt, str) for prompt in responses.prompts):
        raise RewardError(
            "the function takes queries, as OpenRLHF's do, and the pool has no column label, or its prompts are no "
            "texts",
            cause="the labels are in a column of another name, or the prompts are conversations",
            fix="name the column label and write the prompts as texts, or take prompts and completions, as TRL's "
            "rewards do",
        )
    queries = [prompt + text for prompt, text in zip(responses.prompts, responses.texts, strict=True)]
    found = function(queries=queries, prompts=list(responses.prompts), labels=list(responses.columns["label"]))
    return found["rewards"] if isinstance(found, dict) else found


async def _awaited(found: Any) -> Any:
    return await found


def _nothing(*_: Any) -> None:
    """In place of what writes into TRL's logs."""


def _parameters(function: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    try:
        return inspect.signature(function).parameters
    except (TypeError, ValueError):  # of a function that is not written in Python
        return {}
