"""agreement: what the trainer logged near each checkpoint beside what the probe measures of it, from cached columns."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from entropy_core.estimates.logged_entropy import Sampling
from entropy_core.estimates.responses import MOST_TOKENS, Responses, read_responses, together
from entropy_core.estimates.tables import AGREEMENT, to_table
from entropy_core.estimates.trainer_agreement import LONGEST, Compared, compared, measured, rows_of
from entropy_core.numerics import ragged
from entropy_core.store.columns import as_numbers, read_tokens

if TYPE_CHECKING:
    from entropy_core.execution import Execution
    from entropy_core.store.artifact import Artifact, Writer
    from entropy_core.store.inputs import LoggedCheckpoint


def agreement(
    out: "Writer",
    execution: "Execution",
    *,
    checkpoints: "Sequence[LoggedCheckpoint]",
    temperature: float,
    same_prompts: bool,
) -> dict[str, Any]:
    """Compare the probe with the log of the trainer at every checkpoint.

    Args:
        out: writer of `agreement.parquet` (schema `tables.AGREEMENT`).
        execution: unused.
        checkpoints: one mapping per checkpoint: `checkpoint` (name), `step`, `learning_rate`, `scores` and `scores_u`
            (shards of score-e-batch and score-u-batch), `update` (artifact of compute-update, of which only the summary
            and what the loss reads is used), and `log`, see `trainer_agreement.compared`.
        temperature: of the sampling.
        same_prompts: E is drawn as U is, from the same prompts and by the policy, so that it tells of the trainer, too.

    Returns:
        Summary: numbers of rows and of disagreements.
    """
    found: list[Compared] = []
    for entry in checkpoints:
        log, update = entry["log"], entry["update"]
        u, e = _responses(entry, same_prompts)
        rewards_N = as_numbers(update.table("sequences.parquet")["reward"].to_pylist())
        probed = measured(e, u, rewards_N, _kl(update), update.summary, log, entry["learning_rate"])
        found += compared(entry["checkpoint"], entry["step"], probed, log)

    def logging(checkpoint: str) -> tuple[Responses, Sampling]:
        entry = next(entry for entry in checkpoints if entry["checkpoint"] == checkpoint)
        u, e = _responses(entry, same_prompts)
        both = together([u, e]) if e is not None else u
        if entry["update"].summary["loss"]["mask_truncated_completions"]:
            both = both.chosen(~both.cut_N)
        return both, _sampling(entry["log"], temperature)

    rows = list(rows_of(found, logging))
    out.table(to_table(rows, AGREEMENT), "agreement.parquet")
    return {"rows": len(rows), "disagree": sum(row["verdict"] == "disagrees" for row in rows)}


def _responses(entry: "LoggedCheckpoint", same_prompts: bool) -> tuple[Responses, Responses | None]:
    """Those of U, all of them; and those of E, as many as are needed."""
    return read_responses(entry["scores_u"]), read_responses(entry["scores"], MOST_TOKENS) if same_prompts else None


def _kl(update: "Artifact") -> Tensor | None:
    """The KL terms of each response of U as the trainer logs them, summed; None without a reference.

    With r = ℓ_ref − ℓ, GRPO logs e^r − r − 1 of each token, and RLOO, which has its KL in the reward, −r.
    """
    loss: Mapping[str, Any] = update.summary["loss"]
    if not loss["kl_beta"]:
        return None
    tokens = read_tokens([update], "logprobs", "reference_logprobs", file="loss.safetensors")
    r_K = tokens["reference_logprobs"].double() - tokens["logprobs"].double()
    term_K = -r_K if loss["kl_in"] == "reward" else r_K.exp() - r_K - 1
    return ragged.sequence_sum(term_K, tokens.offsets_N1)


def _sampling(log: Mapping[str, Any], temperature: float) -> Sampling:
    longest = [entry[LONGEST] for entry in log["entries"] if LONGEST in entry]
    return Sampling(
        temperature=temperature,
        micro_batch=log["micro_batch"],
        longest=sum(longest) / len(longest) if longest else 0.0,
        top_p=log["top_p"],
        top_k=log["top_k"],
    )
