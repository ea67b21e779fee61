"""Which policies, trainers and batches: one thing at a time differs from the plain scenario."""

import copy
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from itertools import product

import torch
from torch import Tensor
from transformers import PreTrainedModel

from entropy_core.losses.spec import LossSpec
from entropy_core.numerics import adamw
from entropy_core.numerics.adamw import AdamHyperparameters, AdamState
from entropy_core.numerics.advantages import divided_by
from entropy_core.numerics.choices import Normalization
from oracle.policies import MODELS, fitted, sharpened
from oracle.replicas import Laboratory, Trainer
from oracle.states import Responses

STEPS_SEEN = 100
"""Steps of the history that are simulated; of a longer one the moments are what these tell of it."""


@dataclass(frozen=True)
class Scenario:
    """A policy, a trainer, and two batches.

    Args:
        label: in the table.
        model: a key of `policies.MODELS`.
        tokens: of the vocabulary, the last of which ends a response.
        longest: response, in tokens.
        prompts: in the pool.
        temperature: τ.
        entropy: nats per token that the policy is sharpened to; 0 for the one that it has.
        law: name of a law that the policy is trained towards; empty for none.
        dtype: of the passes.
        normalization: of the entropy.
        loss: with `kl_beta`, its settings.
        reward: `normal` numbers, `binary`, `rare`, or all `equal`.
        prompts_u: number of prompts of U, with `G` responses each.
        of_e: number of sequences of E.
        steps: that the optimizer has made before.
        clipped_to: in mean norms of the gradient; 0 for no clipping.
        curvature: of the learning rate, as a share of the first order.
        null: what is made 0 by a choice of the first moment: δH₁ of `this` update, or of the `mean` update.
        ordinary: whether the limits apply, and an interval over U is expected.
    """

    label: str
    model: str = "GPT-2"
    tokens: int = 3
    longest: int = 3
    prompts: int = 12
    temperature: float = 1.0
    entropy: float = 0.0
    law: str = ""
    dtype: str = "float64"
    normalization: Normalization = "per_token"
    loss: str = "grpo"
    kl_beta: float = 0.0
    reward: str = "normal"
    prompts_u: int = 64
    G: int = 4
    of_e: int = 256
    steps: int = 10_000
    beta2: float = 0.999
    decay: float = 0.0
    clipped_to: float = 0.0
    curvature: float = 0.1
    null: str = ""
    ordinary: bool = True


PLAIN = Scenario("plain: GRPO, 64 prompts, E of 256")


def _like(label: str, **changes: object) -> Scenario:
    return replace(PLAIN, label=label, **changes)  # type: ignore[arg-type]


SCENARIOS = (
    PLAIN,
    _like("clipped to the mean norm", clipped_to=1.0),
    _like("clipped to half of it", clipped_to=0.5),
    _like("clipped to a tenth of it", clipped_to=0.1),
    _like("first step of the optimizer", steps=0, ordinary=False),
    _like("second step", steps=1, ordinary=False),
    _like("third step", steps=2, ordinary=False),
    _like("step 10", steps=9),
    _like("step 200", steps=199),
    _like("4 prompts", prompts_u=4, ordinary=False),
    _like("8 prompts", prompts_u=8, ordinary=False),
    _like("16 prompts", prompts_u=16),
    _like("16 prompts, clipped to half", prompts_u=16, clipped_to=0.5, ordinary=False),
    _like("24 prompts, clipped to half", prompts_u=24, clipped_to=0.5),
    _like("τ = 0.7", temperature=0.7),
    _like("τ = 1.3", temperature=1.3),
    _like("Dr. GRPO", loss="dr_grpo"),
    _like("DAPO", loss="dapo"),
    _like("RLOO", loss="rloo"),
    _like("REINFORCE", loss="reinforce"),
    _like("GRPO with KL", kl_beta=0.2),
    _like("weight decay", decay=0.1),
    _like("all rewards equal", reward="equal", ordinary=False),
    _like("all rewards equal, weight decay", reward="equal", decay=0.1, ordinary=False),
    _like("rewards of 0 and 1, 8 responses", reward="binary", G=8),
    _like("rare reward", reward="rare"),
    _like("GPT-2, untied", model="GPT-2, untied"),
    _like("Llama", model="Llama"),
    _like("Gemma 2", model="Gemma 2"),
    _like("Qwen 3", model="Qwen 3"),
    _like("Llama with LoRA", model="Llama, LoRA"),
    _like("skewed lengths", law="skewed", longest=6, prompts=4),
    _like("skewed lengths, per sequence", law="skewed", longest=6, prompts=4, normalization="per_sequence"),
    _like("H = 0.01", entropy=0.01, ordinary=False),
    _like("H = 0.01, E of 4,096", entropy=0.01, of_e=4096, ordinary=False),
    _like("H = 0.01, float32", entropy=0.01, of_e=4096, dtype="float32", ordinary=False),
    _like("H = 0.001", entropy=0.001, ordinary=False),
    _like("H = 0.001, E of 4,096", entropy=0.001, of_e=4096, ordinary=False),
    _like("rare branch", law="rare", longest=6, prompts=2, ordinary=False),
    _like("rare branch, E of 4,096", law="rare", longest=6, prompts=2, of_e=4096, ordinary=False),
    _like("E of 64", of_e=64),
    _like("E of 4,096", of_e=4096),
    _like("small step", curvature=0.01),
    _like("large step", curvature=0.3),
    _like("β₂ = 0.9", beta2=0.9, ordinary=False),
    _like("this update changes nothing", reward="equal", null="this", curvature=0.01, ordinary=False),
    _like("the mean update changes nothing", null="mean", curvature=0.01, ordinary=False),
)


class Ready:
    """A scenario with its tables, its trainer and its learning rate."""

    def __init__(self, scenario: Scenario, seed: int = 0) -> None:
        self.scenario = scenario
        number = sum(ord(c) * (i + 1) for i, c in enumerate(scenario.label))
        self.generator = torch.Generator().manual_seed(1_000_003 * seed + number)
        self.laboratory = laboratory_of(replace(scenario, **OF_THE_TRAINER))
        self.trainer = self._trainer()
        self.learning_rate = self._learning_rate()

    def draw(self) -> tuple[Tensor, Tensor]:
        """E and U, as numbers of responses."""
        e_N = torch.multinomial(self.laboratory.law_R, self.scenario.of_e, replacement=True, generator=self.generator)
        return e_N, self.laboratory.draw_u(self.trainer, self.generator)

    def _trainer(self) -> Trainer:
        scenario, laboratory = self.scenario, self.laboratory
        loss = LossSpec(
            name=scenario.loss,
            scale_rewards=divided_by(scenario.loss, "auto"),
            max_new_tokens=scenario.longest,
            kl_beta=scenario.kl_beta,
        )
        parameters = AdamHyperparameters(0.9, scenario.beta2, 1e-8, scenario.decay)
        zero = torch.zeros_like(laboratory.exact.theta)
        reference_K = self._reference() if scenario.kl_beta else None
        of_u = scenario.prompts_u, scenario.G, loss
        trainer = Trainer(*of_u, 0.0, parameters, AdamState(0, zero, zero), self._rewards(), reference_K)
        norms = [float(self._gradient(trainer).norm()) for _ in range(100)]
        trainer = trainer._replace(max_norm=scenario.clipped_to * sum(norms) / len(norms))
        trainer = trainer._replace(state=self._state(trainer))
        return self._nullified(trainer) if scenario.null else trainer

    def _gradient(self, trainer: Trainer) -> Tensor:
        return self.laboratory.step(trainer, self.laboratory.draw_u(trainer, self.generator)).gradient_Q

    def _rewards(self) -> Tensor:
        count = len(self.laboratory.law_R)
        normal_R = torch.randn(count, generator=self.generator, dtype=torch.float64)
        if self.scenario.reward == "normal":
            return normal_R
        if self.scenario.reward == "equal":
            return torch.ones_like(normal_R)
        if self.scenario.reward == "binary":
            return (normal_R > 0).double()
        chosen_R = torch.zeros_like(normal_R)
        for i in normal_R.argsort().tolist():  # an eighth of the responses, none of them a common one
            if float(self.laboratory.law_R @ chosen_R) < 0.12 and float(self.laboratory.law_R[i]) < 0.02:
                chosen_R[i] = 1.0
        return chosen_R

    def _reference(self) -> Tensor:
        """ℓ under a policy at some distance."""
        exact = self.laboratory.exact
        v_Q = torch.randn(len(exact.theta), generator=self.generator, dtype=torch.float64)
        return exact.scores_at(v_Q, 0.05).logprobs_K

    def _state(self, trainer: Trainer) -> AdamState:
        """Moments after as many clipped steps at the same θ.

        Equal rewards came after others: the moments are those of random rewards, and g alone is 0.
        """
        (beta1, beta2, *_), steps = trainer.hyperparameters, self.scenario.steps
        if self.scenario.reward == "equal":
            normal_R = torch.randn(len(trainer.reward_R), generator=self.generator, dtype=torch.float64)
            trainer = trainer._replace(reward_R=normal_R)
        first = torch.zeros_like(self.laboratory.exact.theta)
        second, taken = first.clone(), min(steps, STEPS_SEEN)
        for _ in range(taken):
            g = self._gradient(trainer)
            g = adamw.clip_factor(float(g.norm()), trainer.max_norm) * g
            first, second = beta1 * first + (1 - beta1) * g, beta2 * second + (1 - beta2) * g**2
        if steps > taken:
            second = second * (1 - beta2**steps) / (1 - beta2**taken)
        return AdamState(steps, first, second)

    def _nullified(self, trainer: Trainer) -> Trainer:
        """Change the first moment so that δH₁ is 0, of this update (which is that of every U) or on average."""
        dH_Q, draws = self.laboratory.dH_Q, 1 if self.scenario.null == "this" else 2000
        for _ in range(3):
            v_Q = torch.zeros_like(dH_Q)
            for _ in range(draws):
                v_Q += self.laboratory.next_step(trainer, self._gradient(trainer)).direction / draws
            at_zero = self.laboratory.next_step(trainer, torch.zeros_like(dH_Q))
            shift_Q = self.laboratory.next_step(
                trainer._replace(state=trainer.state._replace(exp_avg=trainer.state.exp_avg + dH_Q)), 0 * dH_Q
            ).direction
            of_shift = float(dH_Q @ (shift_Q - at_zero.direction))
            exp_avg = trainer.state.exp_avg - dH_Q * float(dH_Q @ v_Q) / of_shift
            trainer = trainer._replace(state=trainer.state._replace(exp_avg=exp_avg))
            if self.scenario.null == "mean":
                break
        return trainer

    def _learning_rate(self) -> float:
        """The step size with the curvature of the scenario, but no more than even weights allow.

        Where δH₁ is made 0 the step is so small that δH₂ is nothing beside the standard error.
        """
        variance = 1e-5 if self.scenario.null else 0.02  # of the whole-sequence weights
        laboratory, of_steps = self.laboratory, []
        for _ in range(20):
            v_Q = laboratory.step(self.trainer, laboratory.draw_u(self.trainer, self.generator)).v_Q
            first, second = float(laboratory.dH_Q @ v_Q), float(v_Q @ laboratory.ddH_QQ @ v_Q) / 2
            score_K = laboratory.logprob_KQ @ v_Q
            score_R = torch.zeros_like(laboratory.law_R).index_add_(0, self._response_of_token(), score_K)
            of_steps.append(
                (
                    self.scenario.curvature * abs(first / second) if not self.scenario.null else float("inf"),
                    (variance / float(laboratory.law_R @ score_R**2)) ** 0.5,
                )
            )
        curved, uneven = (sorted(values)[len(values) // 2] for values in zip(*of_steps, strict=True))
        return min(curved, uneven)

    def _response_of_token(self) -> Tensor:
        lengths_R = self.laboratory.responses.lengths_R
        return torch.repeat_interleave(torch.arange(len(lengths_R)), lengths_R)


def moved_responses(model: PreTrainedModel, like: Responses, by_Q: Tensor) -> Responses:
    """The responses of a policy whose parameters are moved, to the same prompts."""
    with torch.no_grad():
        for name, part in like.direction(by_Q).items():
            dict(model.named_parameters())[name].add_(part)
    return Responses(model, like.prompts, like.max_new_tokens, like.temperature)


OF_THE_TRAINER = {
    field.name: field.default
    for field in fields(Scenario)
    if field.name in ("loss", "kl_beta", "reward", "prompts_u", "G", "of_e", "steps", "beta2", "decay")
    or field.name in ("clipped_to", "curvature", "null", "ordinary")
} | {"label": ""}
"""What a scenario can change without another policy."""


@lru_cache(maxsize=4)
def laboratory_of(scenario: Scenario) -> Laboratory:
    """The tables of a policy."""
    exact = responses_of(scenario)
    responses = exact
    if scenario.dtype == "float32":
        model = copy.deepcopy(exact.policy.model).float()
        responses = Responses(model, exact.prompts, exact.max_new_tokens, exact.temperature)
        exact = Responses(copy.deepcopy(model).double(), exact.prompts, exact.max_new_tokens, exact.temperature)
    return Laboratory(responses, exact, scenario.normalization)


def responses_of(scenario: Scenario) -> Responses:
    """The policy of a scenario with its law."""
    model = MODELS[scenario.model](scenario.tokens)
    plain = range(scenario.tokens - 1)
    texts = [list(text) for length in (1, 2, 3, 4) for text in product(plain, repeat=length)]
    found = Responses(model, texts[: scenario.prompts], scenario.longest, scenario.temperature)
    if scenario.law:
        target_SV, weight_S = LAWS[scenario.law](found)
        fitted(model, found.logprobs, target_SV, weight_S)
    if scenario.entropy:
        sharpened(model, lambda: found.exact(found.logprobs().detach()).of("per_token").item(), scenario.entropy)
    return found


def _skewed(found: Responses) -> tuple[Tensor, Tensor]:
    """Four of five responses end at once; the others go on nearly to the limit."""
    depth_S = torch.tensor(found.depths)
    end_S = torch.where(depth_S == 0, 0.8, 0.05).double()
    rest_S = (1 - end_S) / (found.vocabulary - 1)
    target_SV = torch.stack([rest_S] * (found.vocabulary - 1) + [end_S], 1)
    return target_SV, torch.where(depth_S == 0, 1.0, 1.0 / 2.0**depth_S).double() / len(found.prompts)


def _rare(found: Responses) -> tuple[Tensor, Tensor]:
    """The token 0 comes once in a thousand, and what follows it is uniform; after all others the end is nearly sure."""
    target = torch.full((len(found.depths), found.vocabulary), 1e-4, dtype=torch.float64)
    target[:, -1] = 1 - 1e-4 * (found.vocabulary - 1)
    for p, response in found.texts:
        start = found.texts.index((p, response))
        states = found.state_K[found.offsets_R1[start] : found.offsets_R1[start + 1]].tolist()
        if response[0] == 0:
            for state in states[1:]:
                target[state] = 1 / found.vocabulary
        target[states[0]] = torch.tensor([1e-3] + [1e-4] * (found.vocabulary - 2) + [0.0])
        target[states[0], -1] = 1 - target[states[0]].sum()
    weight_S = torch.tensor([1.0 if depth == 0 else 0.3 / 2.0**depth for depth in found.depths]).double()
    return target, weight_S / len(found.prompts)


LAWS = {"skewed": _skewed, "rare": _rare}
