"""Replications of a sweep: E and U drawn by index, the statistics of the product, and the exact answers.

What the stages before `variance` read from a model is looked up in the tables of `states`, and their arithmetic is that
of the package. The rows are made by the stage `variance` itself.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import pyarrow as pa
import torch
from torch import Tensor

from entropy_core.losses.apart import coefficients_of_each, influences, token_coefficients
from entropy_core.losses.spec import LossSpec
from entropy_core.numerics import adamw, ragged
from entropy_core.numerics.adamw import AdamHyperparameters, AdamState
from entropy_core.numerics.advantages import groups_of_equal
from entropy_core.numerics.choices import Normalization
from entropy_core.numerics.first_order import score_coefficients
from entropy_core.numerics.functional import FUNCTIONALS, TokenPair, Tokens
from entropy_core.numerics.half_samples import balanced_halves
from entropy_core.numerics.halves import by_normalization, entropy_and_length, of_all
from entropy_core.sequences.functional_gradient import BASELINE
from entropy_core.stages.variance import variance
from entropy_core.store.columns import TokenTable
from oracle.states import Responses

ETAS = (0.3, 1.0, 3.0)
NOISE_DRAWS = {"float64": 1, "float32": 4}  # the product has 4, but in float64 there is hardly any noise
NOISE_SEQUENCES = 1024  # as in the product


class InMemory:
    """An artifact that is in no store."""

    digest = ""

    def __init__(
        self,
        summary: Mapping[str, Any] | None = None,
        tables: Mapping[str, pa.Table] | None = None,
        tensors: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.summary, self._tables, self._tensors = summary or {}, tables or {}, tensors or {}

    def table(self, name: str) -> pa.Table:
        return self._tables[name]

    def tensors(self, name: str, only: Sequence[str] = (), optional: Sequence[str] = ()) -> dict[str, Tensor]:
        return {one: self._tensors[one] for one in (*only, *optional) if one in self._tensors}


class Rows:
    """A writer that keeps the rows of `estimates.parquet`."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def table(self, table: pa.Table, name: str) -> None:
        if name == "estimates.parquet":
            self.rows = table.to_pylist()


class Trainer(NamedTuple):
    """How U is drawn and the step is taken on it."""

    prompts: int
    G: int
    loss: LossSpec
    max_norm: float
    hyperparameters: AdamHyperparameters
    state: AdamState
    reward_R: Tensor
    reference_K: Tensor | None = None  # ℓ of every token under the reference policy


class Step(NamedTuple):
    """A step and what led to it: the artifacts that `variance` reads of U, but for those that need ∇H."""

    u_N: Tensor
    tokens: TokenTable
    rewards_PG: Tensor
    truncated_N: Tensor
    pick_K: Tensor
    coefficients: TokenPair
    gradient_Q: Tensor
    parts: adamw.NextStep
    v_Q: Tensor


class Truth(NamedTuple):
    """What a step really does, at each of `ETAS` in learning rates: δH₁, δH₁ + δH₂ and ΔH."""

    first: list[float]
    second: list[float]
    change: list[float]


class Replica(NamedTuple):
    """The rows of a sweep, one for each of `ETAS`, and what they should say."""

    rows: list[dict[str, Any]]
    truth: Truth


class Laboratory:
    """The tables of a policy, and the exact policy whose answers count (another one where the passes are float32)."""

    def __init__(self, responses: Responses, exact: Responses, normalization: Normalization) -> None:
        self.responses, self.exact, self.normalization = responses, exact, normalization
        self.scores = responses.scores()
        draws = NOISE_DRAWS[str(responses.policy.dtype).removeprefix("torch.")]
        self.jittered = [responses.jittered(draw) for draw in range(draws)]
        self.law_R = exact.law(exact.scores().logprobs_K)
        self.law_PR = torch.stack([self.law_R * (responses.prompt_R == p) for p in range(len(responses.prompts))])
        self.logprob_SVQ, self.entropy_SQ = exact.gradients()
        self.logprob_KQ = self.logprob_SVQ[responses.state_K, responses.tokens_K]
        self.dH_Q, self.ddH_QQ = exact.derivatives(normalization)
        self.H = float(exact.exact_from(exact.scores()).of(normalization))

    # --- U ---------------------------------------------------------------------------------------------------------

    def draw_u(self, trainer: Trainer, generator: torch.Generator) -> Tensor:
        """Responses to prompts drawn with replacement, [P·G]."""
        prompts_P = torch.randint(len(self.law_PR), (trainer.prompts,), generator=generator)
        return torch.multinomial(self.law_PR[prompts_P], trainer.G, replacement=True, generator=generator).flatten()

    def of_tokens(self, chosen_N: Tensor) -> tuple[Tensor, Tensor]:
        """Where the tokens of some responses are in the tables, and the offsets of these responses."""
        lengths_N = self.responses.lengths_R[chosen_N]
        offsets_N1 = ragged.offsets_from_lengths(lengths_N)
        start_K = torch.repeat_interleave(self.responses.offsets_R1[chosen_N], lengths_N)
        return start_K + ragged.position_index(offsets_N1), offsets_N1

    def gradient(self, coefficients: TokenPair, pick_K: Tensor) -> Tensor:
        """Σ_k (c_k ∇ℓ_k + d_k ∇h_k), [Q]."""
        c_K, d_S = torch.zeros(len(self.logprob_KQ)).double(), torch.zeros(len(self.entropy_SQ)).double()
        c_K.index_add_(0, pick_K, coefficients.logprob_K)
        d_S.index_add_(0, self.responses.state_K[pick_K], coefficients.entropy_K)
        return c_K @ self.logprob_KQ + d_S @ self.entropy_SQ

    def next_step(self, trainer: Trainer, gradient_Q: Tensor) -> adamw.NextStep:
        """The step of AdamW on a gradient, clipped as the trainer does."""
        clip = adamw.clip_factor(float(gradient_Q.norm()), trainer.max_norm)
        return adamw.NextStep(clip * gradient_Q, self.exact.theta, trainer.state, trainer.hyperparameters)

    def step(self, trainer: Trainer, u_N: Tensor) -> Step:
        """The step on a U."""
        pick_K, offsets_N1 = self.of_tokens(u_N)
        columns = {"logprobs": self.scores.logprobs_K[pick_K], "entropies": self.scores.entropies_K[pick_K]}
        if trainer.reference_K is not None:
            columns["reference_logprobs"] = trainer.reference_K[pick_K]
        tokens = TokenTable(torch.arange(len(u_N)), offsets_N1, columns)
        rewards_PG = trainer.reward_R[u_N].view(-1, trainer.G)
        truncated_N = self.responses.truncated_R[u_N]
        coefficients = token_coefficients(trainer.loss.name, trainer.loss.batch(tokens, rewards_PG, truncated_N))
        gradient_Q = self.gradient(coefficients, pick_K)
        parts = self.next_step(trainer, gradient_Q)
        of_u = u_N, tokens, rewards_PG, truncated_N, pick_K
        return Step(*of_u, coefficients, gradient_Q, parts, parts.direction)

    def of_u(self, trainer: Trainer, step: Step, e_N: Tensor) -> dict[str, Any]:
        """What first-order-u, half-steps-u and compute-update say of a step, with the ∇H of E."""
        halves, covectors = self.gradient_of_e(e_N)
        kinds = [of_all(halves, list(of_halves)) for of_halves in covectors]
        averages = entropy_and_length(halves)

        def products(v_Q: Tensor) -> dict[Normalization, Tensor]:
            return by_normalization([torch.stack([v_Q @ kind_Q]) for kind_Q in kinds], *averages)

        batch = trainer.loss.batch(step.tokens, step.rewards_PG, step.truncated_N)
        norm = float(step.gradient_Q.norm())
        along = []
        for covector_Q in [covector_Q for of_halves in covectors for covector_Q in of_halves]:
            pulled_Q = step.parts.pulled_back(covector_Q)
            through = adamw.through_clipping(
                {0: pulled_Q}, {0: step.gradient_Q}, norm, float(step.gradient_Q @ pulled_Q), trainer.max_norm
            )[0]
            states_K = self.responses.state_K[step.pick_K]
            along.append(TokenPair((self.logprob_KQ @ through)[step.pick_K], (self.entropy_SQ @ through)[states_K]))
        found = influences(trainer.loss.name, batch, along)
        by_kind = [found[:2], found[2:]]
        whole = by_normalization([of_all(halves, of_halves) for of_halves in by_kind], *averages)
        columns = {f"influence_{of}": values_N for of, values_N in whole.items()}
        for half, said in enumerate(halves):
            one = by_normalization([of_halves[half] for of_halves in by_kind], said["H_tok"], said["mean_length"])
            columns |= {f"influence_{of}_half_{half}": values_N for of, values_N in one.items()}
        names = "per_token", "per_sequence"

        def each(v_Q: Tensor) -> dict[str, float]:
            return {of: float(value) for of, value in products(v_Q).items()}

        first_order = {"inner_product": each(step.v_Q), "baseline": BASELINE, "closure": dict.fromkeys(names, 0.0)}
        first_order |= {part: each(getattr(step.parts, part)) for part in ("momentum", "decay")}
        first_order["rounding"] = dict.fromkeys(names, 0.0)
        rewards_N = step.rewards_PG.flatten()
        update = {
            "gradient_norm": norm,
            "clip_factor": adamw.clip_factor(norm, trainer.max_norm),
            "update_norm": float(step.v_Q.norm()),
            "moved_fraction": 1.0,
            "mean_reward": float(rewards_N.mean()),
            "prompts": trainer.prompts,
            "prompts_with_equal_rewards": groups_of_equal(step.rewards_PG),
        }
        zeros_K = torch.zeros(len(step.pick_K)).double()
        of_tokens = {"sequences": step.tokens.sequences_N, "offsets": step.tokens.offsets_N1, **step.tokens.columns}
        return {
            "first_order_u": InMemory(first_order, {"sequences.parquet": table_of(columns)}),
            "half_steps_u": self.half_steps(trainer, step, products),
            "update": InMemory(update, {"sequences.parquet": table_of({"advantage": batch.advantages_N})}),
            "scores_u": [InMemory(tensors=of_tokens)],
            "discriminators_u": InMemory(tensors=of_tokens | {"expected": zeros_K}),
        }

    def half_steps(self, trainer: Trainer, step: Step, products: Any) -> InMemory:
        """The steps on halves of U."""
        first_RP = balanced_halves(trainer.prompts)
        parts_P = [part_P for row_P in first_RP for part_P in (row_P, ~row_P)]
        batches, picks = [], []
        for part_P in parts_P:
            chosen_N = part_P.repeat_interleave(trainer.G).nonzero().squeeze(1)
            tokens = step.tokens.select(chosen_N)
            batches.append(trainer.loss.batch(tokens, step.rewards_PG[part_P], step.truncated_N[chosen_N]))
            picks.append(self.of_tokens(step.u_N[chosen_N])[0])
        rows: list[dict[str, Any]] = []
        for part_P, pair, pick_K in zip(parts_P, coefficients_of_each(trainer.loss.name, batches), picks, strict=True):
            assert pair is not None
            v_Q = self.next_step(trainer, self.gradient(pair, pick_K)).direction
            inner = {f"inner_product_{of}": float(x) for of, x in products(v_Q).items()}
            rows.append({"prompts": int(part_P.sum())} | inner)
        names = ["prompts", "inner_product_per_token", "inner_product_per_sequence"]
        columns = {name: [row[name] for row in rows] for name in names}
        summary = {"splits": len(first_RP), "fresh": trainer.state.step == 0, "no_interval": ""}
        return InMemory(summary, {"halves.parquet": pa.table(columns)})

    # --- E ---------------------------------------------------------------------------------------------------------

    def gradient_of_e(self, e_N: Tensor) -> tuple[list[dict[str, float]], list[list[Tensor]]]:
        """What entropy-gradient says of a batch: of each half its means, and ∇H_seq and ∇L, by kind and half."""
        pick_K, offsets_N1 = self.of_tokens(e_N)
        entropies_K = self.scores.entropies_K[pick_K].double()
        tokens = Tokens(self.scores.logprobs_K[pick_K], entropies_K, offsets_N1)
        score = [score_coefficients(functional, tokens, BASELINE) for functional in FUNCTIONALS]
        half_K = ragged.sequence_index(offsets_N1) % 2
        halves, found = [], [[], []]  # type: ignore[var-annotated]
        for half in (0, 1):
            mine_K = half_K == half
            count = len(e_N[half::2])
            halves.append(
                {
                    "sequences": count,
                    "H_tok": float(entropies_K[mine_K].mean()),
                    "mean_length": int(mine_K.sum()) / count,
                }
            )
            for kind, score_K in enumerate(score):
                own_K = torch.full_like(score_K, 1.0 if kind == 0 else 0.0)
                pair = TokenPair(*(x_K[mine_K] / count for x_K in (score_K, own_K)))
                found[kind].append(self.gradient(pair, pick_K[mine_K]))
        return halves, found

    def rows(self, trainer: Trainer, step: Step, e_N: Tensor, learning_rate: float) -> Replica:
        """The rows of a sweep of these batches."""
        responses = self.responses
        pick_K, offsets_N1 = self.of_tokens(e_N)
        who = {"sequences": torch.arange(len(e_N)), "offsets": offsets_N1}

        def scored(logprobs_K: Tensor, entropies_K: Tensor, **more: Tensor) -> InMemory:
            of_tokens = {"logprobs": logprobs_K[pick_K], "entropies": entropies_K[pick_K]}
            return InMemory(tensors=who | of_tokens | {name: of_K[pick_K] for name, of_K in more.items()})

        reasons = ["length" if cut else "stop" for cut in responses.truncated_R[e_N].tolist()]
        scores = scored(*self.scores, states=responses.identities_K)
        scores.summary = {"tokens": len(pick_K), "vocabulary": responses.vocabulary}
        scores._tables = {
            "scores.parquet": pa.table({"prompt_id": responses.prompt_R[e_N].numpy(), "finish_reason": reasons})
        }
        dtype = responses.policy.dtype
        along = {
            "dlogprobs": (self.logprob_KQ @ step.v_Q)[pick_K].to(dtype),
            "dentropies": (self.entropy_SQ @ step.v_Q)[responses.state_K][pick_K].to(dtype),
        }
        few = min(NOISE_SEQUENCES, len(e_N))
        of_few = {"sequences": who["sequences"][:few], "offsets": offsets_N1[: few + 1]}
        few_K = pick_K[: int(offsets_N1[few])]
        rescores = []
        for draw in self.jittered:
            of_draw = {"logprobs": draw.logprobs_K[few_K], "entropies": draw.entropies_K[few_K]}
            rescores.append(InMemory({"sequences": few}, tensors=of_few | of_draw))
        etas = [multiple * learning_rate for multiple in ETAS]
        moved = [responses.scores_at(step.v_Q, eta) for eta in etas]
        exact = moved if self.exact is responses else [self.exact.scores_at(step.v_Q, eta) for eta in etas]
        out = Rows()
        variance(
            out,  # type: ignore[arg-type]
            None,  # type: ignore[arg-type]
            learning_rate=learning_rate,
            max_new_tokens=responses.max_new_tokens,
            scores=[scores],  # type: ignore[list-item]
            rescores=rescores,  # type: ignore[arg-type]
            first_order_e=[InMemory(tensors=who | along)],  # type: ignore[list-item]
            calibration=None,
            moved=[
                {"eta": eta, "eta_over_lr": multiple, "shards": [scored(*at)], "path": []}  # type: ignore[list-item]
                for eta, multiple, at in zip(etas, ETAS, moved, strict=True)
            ],
            seed=0,
            replicates=[],
            estimators=["per_decision"],
            normalizations=[self.normalization],
            baseline="time_loo",
            units="sequence",
            confidence_level=0.95,
            **self.of_u(trainer, step, e_N),
        )
        first, curved = float(self.dH_Q @ step.v_Q), float(step.v_Q @ self.ddH_QQ @ step.v_Q) / 2
        truth = Truth(
            [eta * first for eta in etas],
            [eta * first + eta**2 * curved for eta in etas],
            [float(self.exact.exact_from(at).of(self.normalization)) - self.H for at in exact],
        )
        return Replica(out.rows, truth)


def table_of(columns: Mapping[str, Tensor]) -> pa.Table:
    """Numbers as a table."""
    return pa.table({name: values.detach().numpy() for name, values in columns.items()})
