"""The expected reward beside the entropy: exact on average over every response, and the price of one in the other."""

from collections.abc import Callable

import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import torch
from conftest import World, gpt2, policy_of, random_direction
from enumeration import Direction, Everything, enumerate_world, every_batch
from pipeline_fixtures import NAMES, Probe, make_run, probe, skip_figures, values, write_reward
from test_answer import row as result_row
from test_proposals import at_temperature, planted
from torch import Tensor

from entropy_core.config.schema import VarianceRequest
from entropy_core.estimates.evaluation import EvaluationBatch
from entropy_core.estimates.measurement import Moved, MovedTokens, measured
from entropy_core.estimates.price import OnE, reward_change, reward_derivative
from entropy_core.numerics import importance, ragged, uncertainty
from entropy_core.numerics.baselines import baselines
from entropy_core.numerics.choices import Estimator
from entropy_core.numerics.first_order import first_order_columns
from entropy_core.numerics.functional import ENTROPY, FUNCTIONALS, REWARD, Tokens
from entropy_core.numerics.path_integral import derivative_columns
from entropy_core.numerics.quadrature import NODES, WEIGHTS
from entropy_core.numerics.uncertainty import Estimate
from entropy_core.numerics.weights import prefix_weights
from entropy_core.pipeline.power import planned
from entropy_core.pipeline.statistics import variance
from entropy_core.policy import moves
from entropy_core.report import frontier, interventions
from entropy_core.report import price as report
from entropy_core.report.answer import answer
from flows.cli import main

EXACT = 1e-10


def reward_of(response: list[int]) -> float:
    """A reward of the whole response: its order, its length and its end count."""
    return sum((position + 1) * token for position, token in enumerate(response)) / (1 + len(response)) - response[-1]


def expected_reward(world: World) -> Tensor:
    """J by going through every response, differentiable."""
    total = torch.zeros((), dtype=torch.float64)
    for prompt in world.prompts:
        responses, logp = world.responses(prompt)
        total = total + (logp.exp() * torch.tensor([reward_of(r) for r in responses], dtype=torch.float64)).sum()
    return total / len(world.prompts)


def moved_to(world: World, v: Direction, eta: float) -> Callable[[], float]:
    def there() -> float:
        with moves.moved(world.policy, v, eta), torch.no_grad():
            return expected_reward(world).item()

    return there


def along(world: World, v: Direction) -> float:
    parameters = world.policy.named_parameters()
    gradients = torch.autograd.grad(expected_reward(world), [parameters[name] for name in v])
    return sum(float((g * t).sum()) for g, t in zip(gradients, v.values(), strict=True))


def rewards_of(everything: Everything) -> Tensor:
    responses = [everything.sequences.response(i).tolist() for i in range(len(everything.sequences))]
    return torch.tensor([reward_of(response) for response in responses], dtype=torch.float64)


def rewarded(everything: Everything) -> Tokens:
    return everything.block.rewarded(rewards_of(everything))


def base_of(everything: Everything) -> Tensor:
    """A baseline that knows the position only, far from zero."""
    b_T = torch.tensor([0.9, -1.4, 2.3, 0.5], dtype=torch.float64)
    return b_T[ragged.position_index(everything.offsets_N1)]


@pytest.fixture(scope="module")
def everything(world: World, v: Direction) -> Everything:
    return enumerate_world(world, v)


def test_the_expected_reward_and_its_derivative_are_exact_on_average(everything: Everything):
    columns = first_order_columns(REWARD, rewarded(everything), base_of(everything))
    assert everything.mean(columns.total_N) == pytest.approx(expected_reward(everything.world).item(), abs=EXACT)
    slope = along(everything.world, everything.v)
    assert abs(slope) > 0.02
    assert everything.mean(columns.derivative_N) == pytest.approx(slope, abs=EXACT)
    assert not columns.local_N.any()  # a reward is no function of the parameters


@pytest.mark.parametrize("eta", [-0.5, 0.02, 2.0])
def test_the_moved_reward_is_exact_on_average(everything: Everything, eta: float):
    tokens, weights = everything.at(eta)
    moved = tokens._replace(rewards_K=rewarded(everything).rewards_K)
    column_N = importance.per_decision_column(REWARD, moved, weights, base_of(everything))
    assert everything.mean(column_N) == pytest.approx(moved_to(everything.world, everything.v, eta)(), abs=EXACT)


@pytest.mark.parametrize("law", [at_temperature, planted], ids=["at another temperature", "a planted law"])
def test_another_law_may_have_drawn_the_responses(everything: Everything, law: Callable[..., Tensor]):
    log_q_K = law(everything, 1.9) if law is at_temperature else law(everything)
    q_N = ragged.sequence_sum(log_q_K, everything.offsets_N1).exp() / len(everything.world.prompts)
    tokens = rewarded(everything)._replace(proposal_logprobs_K=log_q_K)
    columns = first_order_columns(REWARD, tokens, base_of(everything))
    assert float(q_N @ columns.total_N) == pytest.approx(expected_reward(everything.world).item(), abs=EXACT)
    assert float(q_N @ columns.derivative_N) == pytest.approx(along(everything.world, everything.v), abs=EXACT)


def test_leaving_one_out_is_unbiased_over_every_batch():
    world = World(policy_of(gpt2(vocabulary=3)), [[1], [0, 2, 1]], temperature=0.8, max_new_tokens=2)
    few = enumerate_world(world, random_direction(world.policy))
    total = 0.0
    for chosen_N, probability in every_batch(few, 3):
        part = few.subset(chosen_N)
        tokens = rewarded(part)
        columns = first_order_columns(REWARD, tokens, baselines(REWARD, tokens, "time_loo"))
        total += probability * float(columns.derivative_N.mean())
    assert total == pytest.approx(along(world, few.v), abs=EXACT)


def test_the_path_integral_is_that_of_the_derivative(everything: Everything):
    eta, base_K, rewards_K = 0.5, base_of(everything), rewarded(everything).rewards_K
    total = 0.0
    for node, weight in zip(NODES, WEIGHTS, strict=True):
        with moves.moved(everything.world.policy, everything.v, node * eta):
            there = enumerate_world(everything.world, everything.v)
        ratios = prefix_weights(everything.tokens.logprobs_K, there.tokens.logprobs_K, everything.offsets_N1)
        moved = there.block._replace(rewards_K=rewards_K, proposal_logprobs_K=everything.tokens.logprobs_K)
        total += eta * weight * everything.mean(derivative_columns(REWARD, moved, ratios, base_K).derivative_N)
    exact = moved_to(everything.world, everything.v, eta)() - expected_reward(everything.world).item()
    assert total == pytest.approx(exact, rel=1e-4)


@pytest.mark.parametrize("estimator", ["per_decision", "weighted_per_decision", "snis"])
def test_the_change_on_a_batch_is_that_of_plain_sums(everything: Everything, estimator: Estimator):
    drawn = everything.drawn(40)
    functionals = (*FUNCTIONALS, REWARD)
    batch = EvaluationBatch.of([lambda: rewarded(drawn)], None, "none", functionals)
    tokens, weights = drawn.at(0.3)
    moved = Moved(0.3, lambda: [MovedTokens(tokens.logprobs_K, tokens.entropies_K)])
    change = reward_change(batch, measured(batch, moved, estimator), 0.3, estimator)
    rewards_N, w_N = rewards_of(drawn), weights.sequence_N
    if estimator == "snis":
        expected = float((w_N * rewards_N).sum() / w_N.sum() - rewards_N.mean())
    elif estimator == "per_decision":
        expected = float((w_N * rewards_N).mean() - rewards_N.mean())
    else:  # the weights of those that have a token at a position are normalised with those of the finished ones
        last_N = ragged.lengths(drawn.offsets_N1) - 1
        after_K = weights.after_K
        expected = 0.0
        for i, last in enumerate(last_N.tolist()):
            alive = [float(after_K[drawn.offsets_N1[j] + min(last, last_N[j])]) for j in range(len(last_N))]
            expected += float(w_N[i] * rewards_N[i]) / sum(alive)
        expected -= float(rewards_N.mean())
    assert change.value == pytest.approx(expected, rel=1e-10)
    assert float(change.influence_N.sum()) == pytest.approx(0.0, abs=1e-9)


# --- the price -------------------------------------------------------------------------------------------------------


def test_the_covariance_of_both_changes_is_in_the_price(everything: Everything):
    drawn = everything.drawn(60)
    batch = EvaluationBatch.of([lambda: rewarded(drawn)], None, "none", (*FUNCTIONALS, REWARD))
    slopes = uncertainty.mean(batch.columns[ENTROPY].derivative_N), reward_derivative(batch)
    # a = 2b exactly: whatever the error of b is, the ratio is known
    on_e, doubled = OnE(batch, 0.95), slopes[1].scaled(2.0)
    shifted = Estimate(slopes[1].value + 5.0, slopes[1].influence_N)  # far from 0
    assert on_e.ratio(Estimate(2 * shifted.value, doubled.influence_N), shifted) == pytest.approx((2.0, 2.0), rel=1e-6)


# --- in a sweep ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def priced(tmp_path_factory) -> Probe:
    folder = tmp_path_factory.mktemp("priced")
    with pytest.MonkeyPatch.context() as patch:
        skip_figures(patch)
        return probe(
            values(
                make_run(folder / "run"),
                folder / "artifacts",
                update={"reward": write_reward(folder)},
                importance={"etas": [0, 0.5, 1], "estimators": ["per_decision", "path_integral"]},
                interventions=[{"lr": 0.5}, "positives_only"],
                lab={"predict": "none", "measure": "all"},
                price=True,
            )
        )


def test_the_reward_of_e_is_the_mean_of_its_responses(priced: Probe):
    rows = priced.result.report.table("price.parquet").to_pylist()
    assert [(row["checkpoint"], row["normalization"], row["eta_over_lr"]) for row in rows][:4] == [
        ("checkpoint-3", "per_token", 0.5),
        ("checkpoint-3", "per_sequence", 0.5),
        ("checkpoint-3", "per_token", 1.0),
        ("checkpoint-3", "per_sequence", 1.0),
    ]
    shards = priced.run.artifacts("reward-e-batch")
    assert len(shards) == 4  # two of each checkpoint
    found = [reward for shard in shards[:2] for reward in shard.table("rewards.parquet")["reward"].to_pylist()]
    assert rows[0]["J"] == pytest.approx(sum(found) / len(found), rel=1e-12) and len(set(found)) > 1
    of_results = {
        (row["checkpoint"], row["normalization"], row["eta"]): row
        for row in priced.rows
        if row["estimator"] == "per_decision"
    }
    for row in rows:
        same = of_results[row["checkpoint"], row["normalization"], row["eta"]]
        for name in ("delta_h1", "delta_h", "confidence_level"):
            assert row[name] == pytest.approx(same[name], rel=1e-12)
        assert row["delta_j"] == pytest.approx(row["delta_j1"], rel=0.3, abs=3 * row["delta_j_se"])
        assert row["price"] == pytest.approx(row["delta_h"] / row["delta_j"], rel=1e-12)


def test_the_price_is_in_the_report_and_in_a_rerun_of_the_statistics(priced: Probe, monkeypatch):
    skip_figures(monkeypatch)
    page = priced.result.report.path("report.md").read_text(encoding="utf-8")
    assert "## The price of the entropy" in page and "the expected reward of" in page
    store = priced.run.store
    request = VarianceRequest(run=priced.result.run_id, artifacts=str(store.root), confidence_level=0.5)
    before = priced.run.computed.copy()
    again = variance(request, store, priced.run)
    assert priced.run.computed["price"] == before["price"] + 2
    assert priced.run.computed["reward-e-batch"] == before["reward-e-batch"]
    wide, narrow = (
        pq.read_table(of / "price.parquet").to_pylist()[0] for of in (priced.result.run_directory, again.run_directory)
    )
    assert narrow["delta_j"] == wide["delta_j"]
    assert narrow["delta_j_high"] - narrow["delta_j_low"] < 0.5 * (wide["delta_j_high"] - wide["delta_j_low"])


def test_an_intervention_has_its_reward_beside_that_of_the_run(priced: Probe):
    of_etas = {
        (row["checkpoint"], row["normalization"], row["eta_over_lr"]): row
        for row in priced.result.report.table("price.parquet").to_pylist()
    }
    rows = priced.result.report.table("interventions.parquet").to_pylist()
    measured = [row for row in rows if row["level"] == "measure"]
    assert {row["intervention"] for row in measured} == {"as it is", "lr: 0.5", "positives_only"}
    assert all(row["delta_j"] is None for row in rows if row["level"] == "screen")
    assert all(row["difference_j_low"] is row["price"] is None for row in rows if row["level"] != "measure")
    for row in measured:
        half, whole = (of_etas[row["checkpoint"], row["normalization"], multiple] for multiple in (0.5, 1.0))
        if row["intervention"] == "as it is":
            assert (row["delta_j"], row["difference_j"], row["price"]) == (whole["delta_j"], 0.0, None)
        if row["intervention"] == "lr: 0.5":  # half of the same step
            assert row["delta_j"] == pytest.approx(half["delta_j"], rel=1e-9)
            assert row["difference_j"] == pytest.approx(half["delta_j"] - whole["delta_j"], rel=1e-9)
            assert row["price"] == pytest.approx(row["difference"] / row["difference_j"], rel=1e-12)
            assert row["difference_j_low"] < row["difference_j"] < row["difference_j_high"]


def test_without_a_reward_for_each_response_nothing_is_said(priced: Probe, tmp_path, monkeypatch):
    skip_figures(monkeypatch)
    body = "    return [None if '0' in c else len(c) / 9 for c in completions]\n"
    text = f"def share_of_low_digits(completions, **_):\n{body}"
    document = priced.config.model_dump(mode="json", exclude_unset=True)
    document["update"]["reward"] = write_reward(tmp_path, text)
    found = probe(document).result.report
    assert found.table("price.parquet").num_rows == 0
    assert "responses of E have no reward" in found.path("report.md").read_text(encoding="utf-8")


def test_a_recorded_sweep_says_what_it_would_take_to_tell_more(priced: Probe, capsys):
    store, run_id = priced.run.store, priced.result.run_id
    now = planned(store, run_id)
    assert [(row["checkpoint"], row["question"]) for row in now] == [(name, "this update") for name in NAMES]
    assert all(row["E"] == 16 and row["U"] == 4 and row["seconds"] > 0 for row in now)  # of too few prompts for more
    half = planned(store, run_id, effect=now[0]["detects"] / 2)[0]
    assert half["needs E"] == pytest.approx(4 * 16, rel=0.25) and half["needs U"] == 4  # t tells less of fewer
    assert half["detects then"] <= now[0]["detects"] / 2
    assert planned(store, run_id, budget=10 * now[0]["seconds"])[0]["detects then"] < now[0]["detects"]
    other = planned(store, run_id, intervention="lr: 0.5")
    assert 0 < other[0]["detects"] != now[0]["detects"]
    arguments = ["power", run_id, "--artifacts", str(store.root)]
    assert main([*arguments, "--tell", "1e-4"]) == 0
    assert "needs E" in capsys.readouterr().out
    for wrong, said in (
        (
            ["--intervention", "nope"],
            "has not tried the intervention 'nope'. Likely cause: it tried lr: 0.5, positives_only.",
        ),
        (["--tell", "0"], "--tell is 0"),
        (["--seconds", "nan"], "--seconds is nan"),
    ):
        assert main([*arguments, *wrong]) == 2
        assert said in capsys.readouterr().err


def test_a_plan_leaves_out_what_was_not_tried_and_refuses_what_it_cannot_read(priced: Probe, capsys):
    store, folder = priced.run.store, priced.result.run_directory
    kept = {name: (folder / f"{name}.parquet").read_bytes() for name in ("interventions", "results")}
    try:
        tried = pq.ParquetFile(folder / "interventions.parquet").read()
        pq.write_table(tried.filter(pc.field("checkpoint") == NAMES[1]), folder / "interventions.parquet")
        rows = planned(store, folder.name, intervention="lr: 0.5")
        assert [row["checkpoint"] for row in rows] == [NAMES[1]]
        assert planned(store, folder.name, budget=1e-9)[0]["needs E"] is None  # not even U can be paid
        (folder / "results.parquet").write_bytes(b"PAR1 and nothing more")
        assert main(["power", folder.name, "--artifacts", str(store.root)]) == 2
        assert "results.parquet cannot be read" in capsys.readouterr().err
    finally:
        for name, content in kept.items():
            (folder / f"{name}.parquet").write_bytes(content)


ROW = {
    "checkpoint": "checkpoint-10", "step": 10, "normalization": "per_token", "eta": 1e-3, "eta_over_lr": 1.0,
    "J": 0.62, "delta_j": 0.0083, "delta_j_low": 0.0053, "delta_j_high": 0.0113, "minimum_detectable": 0.004,
    "price": -0.26, "price_low": -0.41, "price_high": -0.18, "verdict": "reward rises",
}  # fmt: skip
RAISES = "At checkpoint-10 the step raises the expected reward of 0.62 by +0.0083 [+0.0053, +0.011]"
SENTENCES = {
    "rises": ({}, f"{RAISES}; each 0.01 of reward costs 0.0026 nats per token [0.0018, 0.0041] of entropy."),
    "free": (
        {"price": 0.26, "price_low": 0.18, "price_high": 0.41},
        f"{RAISES}; each 0.01 of reward gains 0.0026 nats per token [0.0018, 0.0041] of entropy.",
    ),
    "falls": (
        {"delta_j": -0.0083, "delta_j_low": -0.0113, "delta_j_high": -0.0053, "verdict": "reward falls"}
        | {"price_low": None, "price_high": None},
        "At checkpoint-10 the step lowers the expected reward of 0.62 by -0.0083 [-0.011, -0.0053]; what that "
        "costs in entropy cannot be told.",
    ),
    "falls, and entropy with it": (
        {"delta_j": -0.0083, "delta_j_low": -0.0113, "delta_j_high": -0.0053, "verdict": "reward falls"}
        | {"price": 0.26, "price_low": 0.18, "price_high": 0.41},
        "At checkpoint-10 the step lowers the expected reward of 0.62 by -0.0083 [-0.011, -0.0053]; each 0.01 of "
        "reward lost costs 0.0026 nats per token [0.0018, 0.0041] of entropy.",
    ),
    "unknown": (
        {"delta_j_low": -0.001, "verdict": "cannot tell"},
        "At checkpoint-10 the step changes the expected reward of 0.62 by +0.0083 [-0.001, +0.011]: whether it rises "
        "cannot be told. This E tells changes from 0.004 up.",
    ),
    "unreliable": (
        {"verdict": "weights-unreliable"},
        "At checkpoint-10 the step cannot be said to raise or to lower the expected reward: the importance "
        "weights are unreliable.",
    ),
}


@pytest.mark.parametrize("situation", SENTENCES)
def test_what_is_said_of_the_reward(situation: str):
    columns, expected = SENTENCES[situation]
    assert (
        report.sentence([{**ROW, "eta": 1e-4, "eta_over_lr": 0.1, "verdict": "cannot tell"}, ROW | columns]) == expected
    )
    assert expected in answer([result_row()], prices=[ROW | columns])
    assert "reward of" not in answer([result_row()])


def intervention(
    name: str, difference: float, verdict: str, level: str = "predict", **columns: object
) -> dict[str, object]:
    ends = {"low": difference - 1e-4, "high": difference + 1e-4, "difference_j": None}
    row = {"checkpoint": "checkpoint-10", "intervention": name, "level": level, "delta_h1": -0.002 + difference}
    return row | ends | {"difference": difference, "verdict": verdict} | columns


def test_what_would_change_the_entropy_is_said_with_its_price():
    run = intervention("as it is", 0.0, "as it is")
    best = intervention("lr: 0.5", 1e-3, "acts")
    idle = [intervention("clip_cov", 1e-5, "cannot tell"), intervention("positives_only", -4e-4, "acts")]
    reward = {"difference_j": -0.004, "difference_j_low": -0.005, "difference_j_high": -0.003}
    measured = intervention("lr: 0.5", 9e-4, "acts", "measure", **reward)
    tried = "Of 3 interventions tried at checkpoint-10, 2 surely act"
    start = f"{tried}; lr: 0.5 keeps most entropy, +0.001 [+0.0009, +0.0011] a step "
    assert interventions.sentence([best, idle[0], run, idle[1]]) == f"{start}(+50% of the step)."
    with_price = f"{start}(+50% of the step), and changes the expected reward by -0.004 [-0.005, -0.003]."
    rows = [best, idle[0], run, idle[1], measured]
    assert interventions.sentence(rows) == with_price
    assert with_price in answer([result_row()], tried=rows)
    none = "Of 2 interventions tried at checkpoint-10, 1 surely act, and none of them keeps entropy."
    assert interventions.sentence([idle[0], run, idle[1]]) == none


def test_the_frontier_has_what_no_other_beats_in_both():
    def at(entropy: float, reward: float) -> dict:
        return {"difference": entropy, "difference_j": reward}

    run, better, worse, keeps, gains = at(0.0, 0.0), at(1.0, 0.0), at(-1.0, -1.0), at(2.0, -1.0), at(0.0, 3.0)
    assert frontier.undominated([run, better, worse, keeps, gains]) == [keeps, better, gains]
    assert frontier.undominated([run]) == [run]


def test_the_frontier_is_drawn_where_rewards_were_measured(priced: Probe):
    rows = priced.result.report.table("interventions.parquet").to_pylist()
    shown = [row for row in rows if row["normalization"] == "per_token"]
    figure = frontier.frontier_figure(shown)
    [axes] = figure.axes
    points = [tuple(line.get_xydata()[0]) for line in axes.lines if line.get_marker() == "o"]
    assert len(points) >= 1 and axes.get_xlabel().startswith("reward gained")
    assert "![entropy kept against reward gained](frontier.png)" in priced.result.report.path("report.md").read_text()
    assert priced.result.report.path("frontier.svg").exists()
    assert not frontier.with_rewards([row for row in shown if row["intervention"] == "as it is"])
