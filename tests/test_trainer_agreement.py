"""The probe beside a trainer's log: every quantity by hand, every mistake planted, and how often a right run is blamed.

`World` makes responses whose laws are known in full, so that what a trainer logs is computed from the laws themselves,
and the probe is given only ℓ and h of the sampled tokens.
"""

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any, NamedTuple

import pytest
import torch
from test_report import NOTHING, sweep
from torch import Tensor

from entropy_core.checkpoints.trainer_files import TrainerFiles
from entropy_core.estimates.logged_entropy import Sampling
from entropy_core.estimates.responses import Responses, responses_of, together
from entropy_core.estimates.trainer_agreement import Compared, Probed, compared, measured, near, rows_of
from entropy_core.numerics import ragged
from entropy_core.numerics.trend import level_at
from entropy_core.pipeline.trainer_log import trainer_log
from entropy_core.report.agreement import disagreements, section
from entropy_core.report.contents import OfTraining
from entropy_core.report.page import markdown
from entropy_core.stages.agreement import _kl as kl_of

SAMPLING = Sampling()
V, PROMPTS, G = 12, 32, 8
UPDATE = {"gradient_norm": 0.5, "loss": {"mask_truncated_completions": False, "scale_rewards": "group"}}


class Batch(NamedTuple):
    """Responses with their whole laws."""

    logits_KV: Tensor  # of the policy, not divided by the temperature
    tokens_K: Tensor
    offsets_N1: Tensor
    prompts_N: Tensor
    rewards_N: Tensor


def draw(seed: int, prompts: int = PROMPTS, temperature: float = 1.0, sharpness: float = 1.0) -> Batch:
    """Responses of 2 to 12 tokens: long ones are surer, and the first token is the least sure."""
    generator = torch.Generator().manual_seed(seed)
    N = prompts * G
    lengths_N = torch.randint(2, 13, (N,), generator=generator)
    offsets_N1 = ragged.offsets_from_lengths(lengths_N)
    scale_K = sharpness * (0.2 + lengths_N[ragged.sequence_index(offsets_N1)] / 3)
    scale_K = torch.where(ragged.position_index(offsets_N1) == 0, 0.2, scale_K)
    logits_KV = torch.randn(len(scale_K), V, generator=generator, dtype=torch.float64) * scale_K[:, None]
    tokens_K = torch.multinomial((logits_KV / temperature).softmax(1), 1, generator=generator).squeeze(1)
    rewards_N = (torch.rand(N, generator=generator) < 0.4).double()
    return Batch(logits_KV, tokens_K, offsets_N1, torch.arange(N) // G + 1000 * seed, rewards_N)


def entropies(logits_KV: Tensor) -> Tensor:
    logs = logits_KV.log_softmax(1)
    return -torch.where(logs > -1e9, logs.exp() * logs, 0.0).sum(1)


def seen(batch: Batch, temperature: float = 1.0) -> Responses:
    """What the probe has cached of a batch."""
    logits_KV = batch.logits_KV / temperature
    logprobs_K = logits_KV.log_softmax(1).gather(1, batch.tokens_K[:, None]).squeeze(1)
    cut_N = torch.zeros(len(batch.prompts_N), dtype=torch.bool)
    return responses_of(batch.prompts_N, cut_N, batch.offsets_N1, logprobs_K, entropies(logits_KV))


def by_response(values_K: Tensor, batch: Batch) -> list[list[float]]:
    ends = batch.offsets_N1.tolist()
    return [values_K[a:b].tolist() for a, b in pairwise(ends)]


# --- the quantities, by hand -----------------------------------------------------------------------------------------

HAND = responses_of(
    torch.tensor([0, 0, 1, 1]),
    torch.tensor([False, True, False, False]),
    torch.tensor([0, 2, 5, 6, 8]),
    torch.log(torch.tensor([0.5, 0.25, 0.5, 0.5, 0.5, 0.125, 0.5, 1.0], dtype=torch.float64)),
    torch.tensor([1.0, 2.0, 3.0, 1.0, 1.0, 4.0, 0.5, 0.5]),
)
REWARDS = torch.tensor([1.0, 1.0, 0.0, 3.0], dtype=torch.float64)
NO_LOG: dict[str, Any] = {"entries": [], "prompts": 2, "responses_per_prompt": 2, "micro_batch": 0}


def of_hand(**changes: Any) -> dict[str, Probed]:
    settings: dict[str, Any] = {"e": None, "kl_N": None, "update": UPDATE, "log": NO_LOG} | changes
    return measured(
        settings["e"], HAND, REWARDS, settings["kl_N"], settings["update"], settings["log"], learning_rate=1e-3
    )


def test_every_quantity_is_the_one_that_the_trainer_logs():
    found = {name: probed.value for name, probed in of_hand(kl_N=torch.tensor([1.0, 1.0, 1.0, 5.0])).items()}
    assert found == pytest.approx(
        {
            "entropy": 13 / 8,
            "mean_reward": 1.25,
            "equal_reward_fraction": 0.5,
            "mean_length": 2.0,
            "truncated_fraction": 0.25,
            "gradient_norm": 0.5,
            "learning_rate": 1e-3,
            "kl": 1.0,
        }
    )


def test_standard_errors_are_over_prompts():
    found = of_hand()
    # mean rewards of the prompts: 1 and 1.5; lengths: 2.5 and 1.5. √(C/(C − 1) Σ(Σψ)²)/N with C = 2 and N = 4
    assert found["mean_reward"].standard_error == pytest.approx(math.sqrt(2 * (0.5**2 + 0.5**2)) / 4)
    assert found["mean_length"].standard_error == pytest.approx(math.sqrt(2 * (1.0 + 1.0)) / 4)
    assert found["mean_reward"].degrees_of_freedom == 1
    share = 3 / 6  # (1 + 2)/(2 + 4)
    assert found["equal_reward_fraction"].standard_error == pytest.approx(math.sqrt(share * (1 - share) / 2))


def test_the_noise_of_one_batch_is_that_of_a_batch_as_large_as_the_trainers():
    same, larger = of_hand(), of_hand(log=NO_LOG | {"prompts": 8})
    for name in ("entropy", "mean_reward", "mean_length"):
        assert same[name].of_one_batch == pytest.approx(same[name].standard_error)
        assert larger[name].of_one_batch == pytest.approx(same[name].standard_error / 2)


def test_e_counts_where_its_prompts_are_the_trainers():
    both = of_hand(e=HAND)
    alone = of_hand()
    assert both["entropy"].value == alone["entropy"].value
    assert both["mean_reward"] == alone["mean_reward"]
    other = responses_of(
        torch.tensor([7]), torch.tensor([False]), torch.tensor([0, 2]), torch.zeros(2), torch.full((2,), 13 / 2)
    )
    assert of_hand(e=other)["entropy"].value == pytest.approx(26 / 10)
    assert of_hand(e=other)["mean_length"].value == pytest.approx(10 / 5)


def test_cut_responses_are_left_out_where_the_trainer_masks_them():
    masked = {"loss": UPDATE["loss"] | {"mask_truncated_completions": True}}
    found = of_hand(update=UPDATE | masked, kl_N=torch.tensor([1.0, 9.0, 1.0, 3.0]))
    assert found["entropy"].value == pytest.approx((3 + 4 + 1) / 5)
    assert found["kl"].value == pytest.approx(5 / 5)
    assert (found["mean_length"].value, found["truncated_fraction"].value) == (2.0, 0.25)


@pytest.mark.parametrize(
    ("changes", "lost"),
    [
        ({"log": NO_LOG | {"prompts": 4}}, {"gradient_norm"}),
        ({"log": NO_LOG | {"responses_per_prompt": 4}}, {"gradient_norm", "equal_reward_fraction"}),
        ({"update": UPDATE | {"loss": UPDATE["loss"] | {"scale_rewards": "batch"}}}, {"equal_reward_fraction"}),
        ({"log": NO_LOG | {"prompts": 0, "responses_per_prompt": 0}}, set()),  # nothing says that they differ
    ],
)
def test_what_depends_on_the_size_of_batches_is_not_compared_across_sizes(changes, lost):
    assert {name for name, probed in of_hand(**changes).items() if not probed.comparable} == lost


def test_one_prompt_has_no_standard_error_and_no_response_no_entropy():
    alone = HAND.chosen(torch.tensor([True, True, False, False]))
    found = measured(None, alone, REWARDS[:2], None, UPDATE, NO_LOG | {"prompts": 1}, 1e-3)
    assert (found["entropy"].value, found["entropy"].standard_error) == (8 / 5, None)
    assert row_of([1.0, 2.0, 1.0, 2.0], found["mean_reward"]).verdict(0.05) == "not comparable"
    masked = UPDATE | {"loss": UPDATE["loss"] | {"mask_truncated_completions": True}}
    cut = HAND.chosen(HAND.cut_N)
    found = measured(None, cut, REWARDS[:1], torch.ones(1), masked, NO_LOG | {"prompts": 1}, 1e-3)
    assert "entropy" not in found and "kl" not in found and found["truncated_fraction"].value == 1.0


# --- the log ---------------------------------------------------------------------------------------------------------


def test_a_line_is_read_off_within_and_beyond_its_values():
    assert level_at([0, 1, 2, 3], [1.0, 3.0, 5.0, 7.0], 5)[:3] == pytest.approx((11.0, 0.0, 0.0), abs=1e-9)
    # odd about the middle, so that the parabola is there where the line is: residuals ∓.4, ±1.2 about −.4t
    value, error, scatter, freedom = level_at([-3, -1, 1, 3], [1.0 + 0.6, -1.0, 1.0, -1.0 - 0.6], 0)
    slope = (2 * -3 * 1.6 + 2 * 1.0) / 20
    squares = 2 * (1.6 + 3 * slope) ** 2 + 2 * (1 - slope) ** 2
    assert (value, scatter, freedom) == pytest.approx((0.0, math.sqrt(squares / 2), 2))
    assert error == pytest.approx(math.sqrt(squares / 2 / 4))
    with pytest.raises(ValueError, match="3 values do not tell"):
        level_at([0, 1, 2], [0.0, 1.0, 2.0], 0)


def test_a_series_that_bends_is_known_less_well():
    times = [*range(-4, 6)]
    level = level_at(times, [float(t * t) for t in times], 0)
    assert abs(level.value) <= 2 * level.standard_error  # the parabola is 0 there
    assert level.standard_error > abs(level.value)


def test_an_entry_is_about_the_policy_before_its_step():
    entries = [{"step": s, "since": s - 1, "reward": float(s), "grad_norm": float(s)} for s in (5, 6, 7)]
    assert near(entries, "mean_reward", 6) == ([6.0, 5.0, 4.0], [7.0, 6.0, 5.0], [1, 1, 1])
    every_ten = [{"step": s, "since": s - 10, "reward": float(s), "grad_norm": float(s)} for s in (10, 20)]
    assert near(every_ten, "mean_reward", 20) == ([14.5, 4.5], [20.0, 10.0], [10, 10])  # θ₁₀ … θ₁₉
    assert near(every_ten, "gradient_norm", 20) == ([19.0, 9.0], [20.0, 10.0], [1, 1])  # of the last step alone


def row_of(values: list[float], probed: Probed, quantity: str = "mean_reward", step: int = 6) -> Compared:
    key = {"mean_reward": "reward", "gradient_norm": "grad_norm", "learning_rate": "learning_rate"}[quantity]
    entries = [{"step": i + 1, "since": i, key: value} for i, value in enumerate(values)]
    (row,) = compared("checkpoint-6", step, {quantity: probed}, NO_LOG | {"entries": entries})
    return row


def test_the_standard_error_has_both_parts():
    row = row_of([1.0, -1.0, -1.0, 1.0], Probed(0.5, 0.3, 9.0), step=1)  # θ₀ … θ₃, at θ₁
    line = level_at([0, 1, 2, 3], [1.0, -1.0, -1.0, 1.0], 1)
    assert (row.trainer, row.standard_error) == pytest.approx((line.value, math.hypot(line.standard_error, 0.3)))
    a, b = line.standard_error**2, 0.3**2
    assert row.degrees_of_freedom == pytest.approx((a + b) ** 2 / (a**2 / 2 + b**2 / 9))
    assert row.z == pytest.approx((0.5 - line.value) / row.standard_error)


def test_few_values_have_the_noise_of_a_batch_and_the_way_to_the_next():
    row = row_of([1.0, 3.0], Probed(0.0, 0.3, 9.0, of_one_batch=0.4), step=2)
    assert (row.trainer, row.standard_error) == pytest.approx((3.0, math.sqrt(0.3**2 + 0.4**2 + 2.0**2)))
    alone = row_of([3.0], Probed(0.0, 0.3, 9.0, of_one_batch=0.4), step=1)
    assert alone.standard_error == pytest.approx(0.5)


def test_a_gradient_norm_has_the_noise_of_one_step():
    values = [1.0, -1.0, -1.0, 1.0]
    row = row_of(values, Probed(0.5), "gradient_norm", step=1)
    line = level_at([0, 1, 2, 3], values, 1)
    assert row.standard_error == pytest.approx(math.hypot(line.standard_error, line.scatter))
    assert row_of(values, Probed(0.5, comparable=False), "gradient_norm").verdict(0.05) == "not comparable"
    assert row_of([1.0], Probed(0.5), "gradient_norm").verdict(0.05) == "not comparable"


@pytest.mark.parametrize(
    ("values", "probe", "verdict"),
    [
        ([3.0, 3.0, 3.0], 3.0, "agrees"),
        ([3.0, 3.0, 3.0], 3.01, "disagrees"),
        ([3.0, 2.5, 2.0], 1.5, "agrees"),  # where the schedule goes
        ([3.0, 2.5, 2.0], 0.9, "disagrees"),
        ([3.0], 2.0, "not comparable"),  # which schedule, one value does not say
        ([], 2.0, "not logged"),
    ],
)
def test_a_learning_rate_follows_its_schedule(values, probe, verdict):
    assert row_of(values, Probed(probe), "learning_rate", step=len(values)).verdict(0.05) == verdict


def test_a_difference_of_one_percent_agrees_whatever_its_z():
    values = [1.0, 1.0, 1.0, 1.0]
    assert row_of(values, Probed(1.009, 1e-5, 100.0)).verdict(0.05) == "agrees"
    assert row_of(values, Probed(1.011, 1e-5, 100.0)).verdict(0.05) == "disagrees"
    assert row_of(values, Probed(1.011, 0.0, 100.0)).verdict(0.05) == "disagrees"


# --- mistakes of a logged entropy ------------------------------------------------------------------------------------

Mistake = Callable[[Batch, float], float]


def per_token(batch: Batch, temperature: float) -> float:
    return float(entropies(batch.logits_KV / temperature).mean())


def per_response(batch: Batch, temperature: float) -> float:
    rows = by_response(entropies(batch.logits_KV / temperature), batch)
    return sum(map(sum, rows)) / len(rows)


def sequence_means(batch: Batch, temperature: float) -> float:
    rows = by_response(entropies(batch.logits_KV / temperature), batch)
    return sum(sum(row) / len(row) for row in rows) / len(rows)


def micro_batches(batch: Batch, temperature: float) -> float:
    rows = by_response(entropies(batch.logits_KV / temperature), batch)
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(int(batch.tokens_K.sum()))).tolist()
    parts = [[rows[i] for i in order[start : start + 4]] for start in range(0, len(rows), 4)]
    return sum(sum(map(sum, part)) / sum(map(len, part)) for part in parts) / len(parts)


def padding(batch: Batch, temperature: float) -> float:
    rows = by_response(entropies(batch.logits_KV / temperature), batch)
    return sum(map(sum, rows)) / (len(rows) * max(map(len, rows)))


def shifted(batch: Batch, temperature: float) -> float:
    rows = [row[1:] for row in by_response(entropies(batch.logits_KV / temperature), batch)]
    return sum(map(sum, rows)) / sum(map(len, rows))


def untempered(batch: Batch, temperature: float) -> float:
    return float(entropies(batch.logits_KV).mean())


def untempered_samples(batch: Batch, temperature: float) -> float:
    return -float(batch.logits_KV.log_softmax(1).gather(1, batch.tokens_K[:, None]).mean())


def nucleus(batch: Batch, temperature: float) -> float:
    logs = (batch.logits_KV / temperature).log_softmax(1)
    ordered, index = logs.sort(1, descending=True)
    out = ordered.exp().cumsum(1) - ordered.exp() >= 0.9
    return float(entropies(logs.masked_fill(out.gather(1, index.argsort(1)), -math.inf)).mean())


def top_three(batch: Batch, temperature: float) -> float:
    return float(entropies((batch.logits_KV / temperature).topk(3, dim=1).values).mean())


MISTAKES: dict[str, tuple[Mistake, str, Sampling]] = {
    "per response": (per_response, "an entropy per response", Sampling()),
    "sequence means": (sequence_means, "the mean of sequence means", Sampling()),
    "micro-batches": (micro_batches, "micro-batches of 4 responses", Sampling(micro_batch=4)),
    "unknown micro-batches": (micro_batches, "micro-batches of 4 responses", Sampling()),
    "padding": (padding, "counts padding", Sampling(longest=12.0)),
    "shifted": (shifted, "shifted by one token", Sampling()),
    "temperature .7": (untempered, "entropies of logits that are not divided", Sampling(temperature=0.7)),
    "temperature 1.3": (untempered, "entropies of logits that are not divided", Sampling(temperature=1.3)),
    "samples without temperature": (
        untempered_samples,
        "the mean of −log π",
        Sampling(temperature=0.7, micro_batch=256),
    ),
    "top-p": (nucleus, "the distribution that top_p = 0.9 leaves", Sampling(top_p=0.9)),
    "top-k": (top_three, "the distribution that top_k = 3 leaves", Sampling(top_k=3)),
}


def logged(
    mistake: Mistake, temperature: float = 1.0, seed: int = 0, steps: int = 10, **changes: float
) -> list[dict[str, float]]:
    """What a trainer with this mistake logs of fresh batches, the last entry of checkpoint-`steps`' neighbourhood."""
    entries = []
    for i in range(steps):
        batch = draw(10_000 * (seed + 1) + i, temperature=temperature)
        lengths_N = batch.offsets_N1.diff().double()
        of_groups = batch.rewards_N.view(PROMPTS, G)
        entries.append(
            {
                "step": i + 1,
                "since": i,
                "entropy": mistake(batch, temperature),
                "reward": float(batch.rewards_N.mean()),
                "frac_reward_zero_std": float((of_groups.amax(1) == of_groups.amin(1)).double().mean()),
                "completions/mean_length": float(lengths_N.mean()),
                "completions/clipped_ratio": 0.0,
                "completions/max_length": float(lengths_N.max()),
            }
            | changes
        )
    return entries


def verdicts(
    entries: list[dict[str, float]], e: Batch, u: Batch, sampling: Sampling = SAMPLING, name: str = "checkpoint-5"
) -> list[dict[str, Any]]:
    """Rows of a run with one checkpoint in the middle of the log."""
    of_e, of_u = seen(e, sampling.temperature), seen(u, sampling.temperature)
    log = {"entries": entries, "prompts": PROMPTS, "responses_per_prompt": G, "micro_batch": 0}
    probed = measured(of_e, of_u, u.rewards_N, None, UPDATE, log, learning_rate=1e-3)
    return list(rows_of(compared(name, 5, probed, log), lambda _: (together([of_u, of_e]), sampling)))


def joined(*batches: Batch) -> Batch:
    offsets_N1 = ragged.concatenate([batch.offsets_N1 for batch in batches])
    flat = {name: torch.cat([getattr(batch, name) for batch in batches]) for name in Batch._fields if name[0] != "o"}
    return Batch(offsets_N1=offsets_N1, **flat)


@pytest.mark.parametrize("name", ["per response", "sequence means", "padding", "shifted", "temperature .7"])
def test_a_mistake_is_named_from_other_batches_than_the_probes(name):
    mistake, what, sampling = MISTAKES[name]
    tau = sampling.temperature
    rows = verdicts(logged(mistake, tau), draw(1, 512, tau), draw(2, PROMPTS, tau), sampling)
    explained = next(row["explained_by"] for row in rows if row["quantity"] == "entropy")
    assert explained is not None and what in explained


@pytest.mark.parametrize("name", MISTAKES)
def test_a_known_mistake_of_a_logged_entropy_is_named(name):
    """A trainer that logs it of all responses of the probe, at every step."""
    mistake, what, sampling = MISTAKES[name]
    tau = sampling.temperature
    e, u = draw(1, 256, tau), draw(2, PROMPTS, tau)
    value = mistake(joined(u, e), tau)
    rows = verdicts(logged(lambda *_: value, tau), e, u, sampling)
    assert {row["quantity"] for row in rows if row["verdict"] == "disagrees"} == {"entropy"}
    explained = next(row["explained_by"] for row in rows if row["quantity"] == "entropy")
    assert explained is not None and what in explained
    (said,) = disagreements(rows)
    assert "Entropy per token: the trainer logged" in said and what in said


def test_an_entropy_that_no_known_mistake_gives_is_not_explained():
    rows = verdicts(logged(lambda *_: 0.123), draw(1, 256), draw(2))
    (entropy,) = [row for row in rows if row["quantity"] == "entropy"]
    assert (entropy["verdict"], entropy["explained_by"]) == ("disagrees", None)
    assert "no known mistake of a logged entropy gives its value" in disagreements(rows)[0]


def test_a_mistake_is_named_only_where_the_responses_are_the_trainers():
    entries = [entry | {"completions/mean_length": 3.0} for entry in logged(sequence_means)]
    rows = verdicts(entries, draw(1, 256), draw(2))
    assert {row["explained_by"] for row in rows} == {None}
    assert "Check the prompts" in disagreements(rows)[0]


def test_the_right_entropy_is_not_called_out_at_any_temperature():
    for tau in (0.7, 1.0, 1.3):
        rows = verdicts(
            logged(per_token, tau), draw(1, 256, tau), draw(2, PROMPTS, tau), Sampling(temperature=tau, longest=12.0)
        )
        assert disagreements(rows) == []


# --- how often a right run is blamed ----------------------------------------------------------------------------------

SIMULATED = ("mean_reward", "equal_reward_fraction", "mean_length", "truncated_fraction", "gradient_norm", "kl")
CHECKPOINTS = (1, 6, 12, 18, 30)


def unexplained(checkpoint: str) -> tuple[Responses, Sampling]:
    raise AssertionError("no entropy is simulated")


def simulated(seed: int, course: Callable[[float], float], every: int, error: float = 0.02) -> bool:
    """Whether anything is called out in a right run whose batches have a noise of 0.05."""
    generator = torch.Generator().manual_seed(seed)

    def noise() -> float:
        return float(torch.randn((), generator=generator, dtype=torch.float64))

    found: list[Compared] = []
    for name in SIMULATED:
        key = {"mean_reward": "reward", "mean_length": "completions/mean_length", "gradient_norm": "grad_norm"}
        key |= {"equal_reward_fraction": "frac_reward_zero_std", "truncated_fraction": "completions/clipped_ratio"}
        steps = 1 if name == "gradient_norm" else every  # over which it is averaged
        entries = []
        for step in range(every, 30 * every + 1, every):
            of_each = [course((step - k - 1) / every) + 0.05 * noise() for k in range(steps)]
            entries.append({"step": step, "since": step - every, key.get(name, name): sum(of_each) / steps})
        for checkpoint in CHECKPOINTS:
            own = 0.05 if name == "gradient_norm" else error
            probed = Probed(course(checkpoint) + own * noise(), error, 63.0, of_one_batch=0.05)
            near_it = NO_LOG | {"entries": entries}
            found += compared(f"checkpoint-{checkpoint}", checkpoint * every, {name: probed}, near_it)
    assert len(found) == len(SIMULATED) * len(CHECKPOINTS)
    return any(row["verdict"] == "disagrees" for row in rows_of(found, unexplained))


COURSES = {
    "level": lambda t: 0.4,
    "rising": lambda t: 0.4 + 0.01 * t,
    "collapsing": lambda t: 0.1 + 0.8 * math.exp(-t / 8),
    "at a plateau": lambda t: 0.4 + 0.3 * math.tanh((t - 15) / 5),
}


@pytest.mark.parametrize("every", [1, 5])
@pytest.mark.parametrize("course", COURSES)
def test_a_right_run_is_rarely_called_out(course, every):
    assert sum(simulated(seed, COURSES[course], every) for seed in range(100)) <= 5


def test_a_clear_difference_is_always_called_out():
    for seed in range(10):
        generator = torch.Generator().manual_seed(seed)
        noise = (0.05 * torch.randn(10, generator=generator, dtype=torch.float64)).tolist()
        row = row_of([1.0 + x for x in noise], Probed(1.5, 0.02, 63.0))
        assert row.verdict(0.02 / 40) == "disagrees"


# --- from the files to the page ---------------------------------------------------------------------------------------


def test_the_log_of_a_later_checkpoint_goes_on_after_this_step():
    def files(*steps: int, rewards: float = 0.0, **arguments: Any) -> TrainerFiles:
        log = [{"step": s, "reward": rewards + s, "loss": 0.0, "epoch": 1.0} for s in steps]
        return TrainerFiles("GRPO", arguments=arguments, log=({"step": 3, "eval_reward": 9.0}, *log))

    first, last, other = files(2, 4), files(2, 4, 6, 8), files(2, 4, 6, 8, 10, rewards=1.0)
    assert [entry["step"] for entry in trainer_log(4, first, [first, last])["entries"]] == [2, 4, 6, 8]
    assert trainer_log(4, first, [first, other])["entries"] == [
        {"step": 2, "since": 0, "reward": 2.0},
        {"step": 4, "since": 2, "reward": 4.0},
    ]
    again = TrainerFiles(log=({"step": 1, "reward": 1.0}, {"step": 1, "reward": 2.0}, {"step": 2, "reward": math.nan}))
    assert trainer_log(1, again, [again])["entries"] == [{"step": 1, "since": 0, "reward": 2.0}]
    assert trainer_log(4, TrainerFiles(), []) == {
        "entries": [],
        "prompts": 0,
        "responses_per_prompt": 0,
        "micro_batch": 0,
        "top_p": 1.0,
        "top_k": 0,
    }
    settings = {"per_device_train_batch_size": 16, "gradient_accumulation_steps": 4, "num_generations": 8, "top_k": 5}
    assert trainer_log(4, files(4, **settings), []) == {
        "entries": [{"step": 4, "since": 0, "reward": 4.0}],
        "prompts": 8,
        "responses_per_prompt": 8,
        "micro_batch": 16,
        "top_p": 1.0,
        "top_k": 5,
    }
    many = files(*range(1, 1000))
    assert [entry["step"] for entry in trainer_log(500, many, [many])["entries"]] == [*range(490, 510)]


class Step(NamedTuple):
    """Of compute-update: its summary and the tokens of two responses."""

    summary: dict[str, Any]

    def tensors(self, name: str, only: Any, optional: Any) -> dict[str, Tensor]:
        ratio_K = torch.log(torch.tensor([2.0, 0.5, 4.0], dtype=torch.float64))
        found = {"reference_logprobs": ratio_K - 1.0, "logprobs": torch.full((3,), -1.0, dtype=torch.float64)}
        return found | {"sequences": torch.tensor([7, 8]), "offsets": torch.tensor([0, 2, 3])}


def test_the_kl_is_the_estimator_that_the_trainer_logs():
    def kl(**loss: Any) -> list[float] | None:
        found = kl_of(Step({"loss": loss}))  # type: ignore[arg-type]
        return None if found is None else found.tolist()

    assert kl(kl_beta=0.0, kl_in="loss") is None
    log2 = math.log(2.0)
    assert kl(kl_beta=0.1, kl_in="loss") == pytest.approx([(1 - log2) + (log2 - 0.5), 3 - 2 * log2])
    assert kl(kl_beta=0.1, kl_in="reward") == pytest.approx([0.0, -2 * log2], abs=1e-12)


def compared_rows(**verdict: str) -> list[dict[str, Any]]:
    shared = {"standard_error": 0.1, "z": 5.0, "explained_by": None}
    return [
        {"checkpoint": name, "step": step, "quantity": quantity, "trainer": value, "probe": 1.0}
        | shared
        | {"verdict": verdict.get(quantity, "agrees")}
        for name, step, value in (("checkpoint-6", 6, 0.5), ("checkpoint-12", 12, 0.375))
        for quantity in ("entropy", "mean_reward", "kl")
    ]


@pytest.mark.parametrize(
    ("odd", "advice"),
    [
        ({"kl": "disagrees"}, "Check update.reference."),
        ({"mean_reward": "disagrees"}, "check update.reward and the columns it reads"),
        ({"mean_reward": "disagrees", "entropy": "disagrees"}, "Check the prompts"),
        ({"entropy": "disagrees"}, "no known mistake of a logged entropy gives its value"),
    ],
)
def test_the_first_lines_say_what_disagrees_and_where_to_look(odd, advice):
    (sentence,) = disagreements(compared_rows(**odd))
    exact = [row | {"derivative_check": None} for row in sweep()]
    page = markdown("demo", exact, NOTHING, [], OfTraining((), ["Another."], compared_rows(**odd)))
    assert page.split("\n\n")[1:3] == [f"> **Warning:** {sentence}", "> **Warning:** Another."]
    assert advice in sentence and sentence.count("z = +5.0; 2 of 2") == len(odd)


def test_the_section_has_the_change_between_checkpoints_beside_the_predicted_steps():
    rows = [row for row in sweep() if row["normalization"] == "per_token"]
    errors = {"se_given_u": 0.002, "se_over_u": 0.003, "se_interaction": 0.002}
    results = [row | {name: size * row["eta_over_lr"] for name, size in errors.items()} for row in rows]
    lines = section(compared_rows(kl="not logged"), results)
    assert "| checkpoint-6 | entropy per token | agrees | 0.5 | 1 | 0.1 | +5.0 |" in lines
    assert "Not logged at one checkpoint or more: KL to the reference." in lines
    # H falls by .01 a step, and δH₁ is −.02 at the learning rate of both; the logged entropy falls by .125
    error = f"{3 * (0.003 + 0.003):.2g}"  # of one seed of E and U
    assert f"| checkpoint-6 → checkpoint-12 | 6 | -0.06 ± 0.014 | -0.125 | -0.12 ± {error} |" in lines
    assert section([], results[:1]) == []
