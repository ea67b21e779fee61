"""A causal language model as a function from a micro-batch to log-probabilities ℓ and entropies h of response tokens.

The model is split into its trunk (up to the last hidden states) and its head (hidden states to logits), so that only
the logits of one chunk of positions are in memory at a time.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from entropy_core.numerics import token_statistics
from entropy_core.numerics.token_statistics import TokenStatistics
from entropy_core.policy.arithmetic import computing_in_full

HEAD_TOLERANCE = 5e-6  # relative to the largest |logit|; above rounding, below the effect of a softcap on small logits


class TeacherForcedRows(NamedTuple):
    """A micro-batch of whole sequences, padded on the right, with the positions that predict the K response tokens.

    Causal attention keeps real positions from attending to padding on the right, so no mask is needed.
    """

    input_ids_BL: Tensor
    row_K: Tensor  # row of the token in the batch
    position_K: Tensor  # position *before* the token, whose logits predict the token
    tokens_K: Tensor


class Scorer(nn.Module):
    """Computes ℓ and h of a micro-batch; a module, so that `functional_call` can substitute parameters.

    The logits are c·tanh(s·Wx/c) for hidden state x, output matrix W, and the scale s and softcap c of the model's
    config: s is `logit_scale` (Cohere) or 1/`logits_scaling` (Granite), and c is `final_logit_softcapping` (Gemma).
    Without them the logits are Wx. If a model computes its logits differently, its own full logits are used instead.

    Args:
        model: a causal language model.
        head_chunk_rows: number of positions with logits in memory at a time.
    """

    def __init__(self, model: PreTrainedModel, head_chunk_rows: int) -> None:
        super().__init__()
        self.model, self.head_chunk_rows = model, head_chunk_rows
        config = model.config.get_text_config()
        self.scale = (getattr(config, "logit_scale", None) or 1.0) / (getattr(config, "logits_scaling", None) or 1.0)
        self.softcap = getattr(config, "final_logit_softcapping", None)
        self.head_is_known = self._head_matches()

    def forward(self, rows: TeacherForcedRows, temperature: float) -> TokenStatistics:
        """Compute ℓ and h, each [K]; the head and the statistics always in the number format of the weights."""
        of_trunk = self.hidden(rows) if self.head_is_known else self.all_logits(rows)
        of_trunk = of_trunk.to(self.model.get_output_embeddings().weight.dtype)
        with computing_in_full(of_trunk.device):
            if not self.head_is_known:
                return token_statistics.token_statistics(of_trunk, rows.tokens_K, temperature)
            return token_statistics.chunked_statistics(
                self.head, of_trunk, rows.tokens_K, temperature, self.head_chunk_rows
            )

    def all_logits(self, rows: TeacherForcedRows) -> Tensor:
        """Return the model's own logits [K, V]; the logits of all positions are briefly in memory."""
        return self.model(input_ids=rows.input_ids_BL, use_cache=False).logits[rows.row_K, rows.position_K]

    def hidden(self, rows: TeacherForcedRows) -> Tensor:
        """Return the last hidden states [K, D]."""
        hidden_BLD = self.model.base_model(input_ids=rows.input_ids_BL, use_cache=False).last_hidden_state
        return hidden_BLD[rows.row_K, rows.position_K]

    def head(self, hidden_RD: Tensor) -> Tensor:
        """Return the logits [R, V] of hidden states."""
        logits_RV = self.model.get_output_embeddings()(hidden_RD)
        if self.scale != 1.0:
            logits_RV = self.scale * logits_RV
        return self.softcap * torch.tanh(logits_RV / self.softcap) if self.softcap else logits_RV

    def _head_matches(self) -> bool:
        count = min(8, self.model.get_output_embeddings().weight.shape[0])
        input_ids = torch.arange(count, device=self.model.device).unsqueeze(0)
        with torch.no_grad():
            expected = self.model(input_ids=input_ids, use_cache=False).logits
            got = self.head(self.model.base_model(input_ids=input_ids, use_cache=False).last_hidden_state)
        return bool((got - expected).abs().max() <= HEAD_TOLERANCE * expected.abs().max())
