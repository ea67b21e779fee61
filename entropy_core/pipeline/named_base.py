"""An adapter that names a quantised base, and is probed on another one: what that makes of the log-probabilities.

It was trained on the dequantised weights, which differ from those of the model that was quantised, so that the policy
that is probed is not quite the trained one.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from entropy_core.checkpoints.adapter_files import adapter_base
from entropy_core.checkpoints.architecture import read_architecture
from entropy_core.checkpoints.layout import Layout, named_base
from entropy_core.errors import CheckpointError
from entropy_core.numerics import ragged
from entropy_core.store.artifact import Artifact
from entropy_core.store.columns import read_tokens


def comparable_base(layout: Layout) -> tuple[Path | None, str]:
    """Find the quantised base that an adapter was trained on, to compare it with the one that it is probed on.

    Args:
        layout: of a checkpoint whose adapter names such a base.

    Returns:
        Its directory, if it can be loaded; else None and a sentence that says why nothing is measured.
    """
    home, why = named_base(layout.model), "it is not on this machine"
    if home is not None:
        try:
            read_architecture(replace(layout, base=home))
            return home, ""
        except CheckpointError as error:
            why = f"it cannot be read ({error.fact})"
    named, given = adapter_base(layout.model), layout.base.name if layout.base else ""
    return None, f"What {given} changes under the adapter in place of {named} is not measured: {why}."


def base_differences(adapter: Path, given: str, scores: Sequence[Artifact], on_named: Sequence[Artifact]) -> str:
    """Say how far log-probabilities differ between two bases under an adapter.

    Args:
        adapter: its directory.
        given: the base that it is probed on.
        scores: of U with the probed policy.
        on_named: of U with the adapter on the base that it names.

    Returns:
        A sentence.
    """
    ours = read_tokens(scores, "logprobs")
    theirs = read_tokens(on_named, "logprobs").require(ours.sequences_N, ours.offsets_N1)
    difference_K = ours["logprobs"].double() - theirs["logprobs"].double()
    of_responses_N = ragged.sequence_sum(difference_K, ours.offsets_N1)
    apart_K, apart_N = difference_K.abs(), of_responses_N.abs()
    token, largest, response = (f"{float(x):.2g}" for x in (apart_K.mean(), apart_K.max(), apart_N.mean()))
    return (
        f"The adapter names the quantised base {adapter_base(adapter)}, and is probed on {given}: log π of a token of "
        f"U differs by {token} nats on average and by {largest} at most, that of a whole response by {response} on "
        "average. To probe the policy that was trained, leave `policy.base_model` out."
    )
