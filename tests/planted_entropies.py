"""TRL's trainer with a mistake in the entropy that it logs, and the probe's comparison with that log.

The policy is trained beforehand to answer so that every mistake shows: half of the responses are short and unsure, the
others long and sure, and the first token of both is the least sure.
"""

import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from pipeline_fixtures import SHAPE, values
from torch import Tensor

from entropy_core.config.read import parse_config
from entropy_core.demo.run import EOS, build_model, build_tokenizer
from entropy_core.demo.training_run import ON_A_CPU, quiet
from entropy_core.estimates.logged_entropy import UNTEMPERED
from entropy_core.pipeline import catalogue as stage
from entropy_core.pipeline import sweep as pipeline
from entropy_core.pipeline.final_stages import compared
from entropy_core.pipeline.measure import Measurement
from entropy_core.pipeline.preflight import preflight
from entropy_core.pipeline.runner import Inputs, direct_runner
from entropy_core.prompts.arithmetic import problems
from entropy_core.store.store import Store

trl = pytest.importorskip("trl")

PROMPTS, G, STEPS, LENGTH = 32, 8, 10, 12
SHORT, LONG, REST, WEIGHTS = "01234", "+=,;>", "56789", (30, 10, 5, 3, 2)
REWARD = "def low(completions, **_):\n    return [sum(c in '01234' for c in text) / 4 for text in completions]\n"
TOP_P = 0.75


class Seen(NamedTuple):
    """What a trainer has of a micro-batch when it logs; tokens after the end are masked."""

    tokens_BT: Tensor
    logprobs_BT: Tensor
    entropies_BT: Tensor
    mask_BT: Tensor
    logits_BUV: Tensor  # of these tokens and the one after them, not divided by the temperature

    @property
    def logits_BTV(self) -> Tensor:
        return self.logits_BUV[:, :-1]

    def mean(self, values_BT: Tensor) -> Tensor:
        """Over all tokens."""
        return (values_BT * self.mask_BT).sum() / self.mask_BT.sum()


def worked(count: int) -> list[str]:
    """Answers of two letters of `SHORT`, or of one of `LONG` and all of `REST`."""
    generator = torch.Generator().manual_seed(0)
    weights = torch.tensor([*WEIGHTS, *WEIGHTS], dtype=torch.float64)
    answers = []
    for _ in range(count):
        first, second = ((SHORT + LONG)[i] for i in torch.multinomial(weights, 2, True, generator=generator).tolist())
        answers.append(first + (SHORT[(SHORT + LONG).index(second) % 5] if first in SHORT else REST))
    return answers


def policy() -> Any:
    """A model after supervised steps on such answers."""
    model, tokenizer = build_model(SHAPE), build_tokenizer()
    prompts = [row["prompt"] for row in problems("train", 512)]
    texts = [prompt + answer + EOS for prompt, answer in zip(prompts, worked(len(prompts)), strict=True)]
    ids = tokenizer(texts, padding=True, padding_side="right", return_tensors="pt")["input_ids"]
    in_prompt = torch.arange(ids.shape[1]) < torch.tensor([[len(prompt)] for prompt in prompts])
    labels = ids.masked_fill(in_prompt | (ids == 0), -100)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-2)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for _ in range(150):
            rows = torch.randint(len(ids), (64,))
            model(input_ids=ids[rows], labels=labels[rows]).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    return model


def train(model: Any, run: Path, mistake: Callable[[Seen], Tensor] | None, **settings: Any) -> None:
    """Train with TRL's GRPO trainer, which logs an entropy with this mistake; None: its own."""
    from datasets import Dataset
    from transformers import PrinterCallback

    class Planted(trl.GRPOTrainer):  # type: ignore[misc]
        def _get_per_token_logps_and_entropies(self, *inputs: Any, **how: Any) -> Any:
            out = super()._get_per_token_logps_and_entropies(*inputs, **how)
            if mistake is not None:
                model, ids, attended, kept = inputs[:4]
                with torch.no_grad():
                    logits = model(input_ids=ids, attention_mask=attended).logits[:, -kept - 1 :]
                self.seen = out[0].detach(), out[1].detach(), logits
            return out

        def _compute_loss(self, model: Any, inputs: Any) -> Any:
            loss = super()._compute_loss(model, inputs)
            if mistake is not None:
                logprobs_BT, entropies_BT, logits_BUV = self.seen
                tokens_BT, mask_BT = inputs["completion_ids"], inputs["completion_mask"]
                seen = Seen(tokens_BT, logprobs_BT, entropies_BT, mask_BT, logits_BUV)
                self._metrics["train"]["entropy"][-1] = float(mistake(seen))
            return loss

    rules: dict[str, Any] = {}
    exec(REWARD, rules)
    given = {
        "num_generations": G,
        "per_device_train_batch_size": PROMPTS * G,
        "max_completion_length": LENGTH,
        "max_steps": STEPS,
        "save_steps": STEPS // 2,
        "learning_rate": 1e-4,
        "top_k": 0,
        "logging_steps": 1,
        **ON_A_CPU,
        "seed": 1,
    }
    rows = Dataset.from_list([{"prompt": row["prompt"]} for row in problems("train", 256)])
    with torch.random.fork_rng(devices=[]), quiet(threads=1), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TRL's advice
        config = trl.GRPOConfig(output_dir=str(run), **given | settings)
        trainer = Planted(model, rules["low"], config, train_dataset=rows, processing_class=build_tokenizer())
        trainer.remove_callback(PrinterCallback)
        trainer.train()


class OfTheAgreement(Measurement):
    """The stages that the comparison with the trainer needs, and no others."""

    def variance_inputs(self) -> Inputs:
        _, scores = self._sample_e(self.config.batch_config.E_batch_seed, "")
        u_batch = self._sample_u()
        scores_u = self.stages.score(stage.SCORE_U, self.policy, u_batch)
        update = self._update(u_batch, scores_u)
        found = {"scores": scores, "scores_u": scores_u, "update": update}
        return found | {"learning_rate": self.optimizer.summary["learning_rate"]}


def agreement(asked: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Rows of agreement.parquet of a sweep, of which no more is computed."""
    config = parse_config(asked)
    checkpoints = preflight(config)
    config = pipeline.settled_config(config, checkpoints)
    runner = direct_runner(Store(config.store_root), pipeline.execution_for(config, checkpoints))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "Measurement", OfTheAgreement)
        recorded = pipeline._measured(config, checkpoints, runner)
    table = runner(stage.AGREEMENT, compared(recorded, config), config.name)
    return table.table("agreement.parquet").to_pylist()


def seen_by_the_probe(home: Path, leave_out: Sequence[str] = (), sequences: int = 512) -> list[dict[str, Any]]:
    """What the probe says of the run in `home`, told nothing but its prompts and its reward."""
    (home / "reward.py").write_text(REWARD)
    asked = values(
        home / "run",
        home / "artifacts",
        policy={"dtype": "float32"},
        update={"reward": f"{home / 'reward.py'}:low", "leave_out": [*leave_out]},
        generation={"gen_batch_size": 512, "tf_batch_size": 256},
        execution={"shard_size": 512},
    )
    asked["batch_config"] = {"E_total_sequences": sequences}
    del asked["generation"]["max_new_tokens"]
    return agreement(asked)


# --- mistakes --------------------------------------------------------------------------------------------------------


def entropies(logits_BTV: Tensor) -> Tensor:
    logs = logits_BTV.log_softmax(-1)
    return -torch.where(logs > -1e9, logs.exp() * logs, 0.0).sum(-1)


def nucleus(logits_BTV: Tensor) -> Tensor:
    """The entropy of the law that top-p leaves."""
    logs = logits_BTV.log_softmax(-1).sort(-1, descending=True).values
    outside = logs.exp().cumsum(-1) - logs.exp() >= TOP_P
    return entropies(logs.masked_fill(outside, -torch.inf))


class Planted(NamedTuple):
    """A mistake, the settings that it needs, and what the probe has to call it."""

    mistake: Callable[[Seen], Tensor] | None
    name: str  # part of it; empty where nothing is to be called out
    settings: Mapping[str, Any] = {}


COLD, HOT = {"temperature": 0.7}, {"temperature": 1.6}
MICRO = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": PROMPTS * G // 4}

RIGHT = {
    "none": Planted(None, ""),
    "none, at temperature 0.7": Planted(None, "", COLD),
    "none, with top-p": Planted(None, "", {"top_p": TOP_P}),
    "−log π of the samples, which on average is the entropy": Planted(lambda seen: -seen.mean(seen.logprobs_BT), ""),
}
MISTAKES = {
    "−log π of the samples, summed over a response": Planted(
        lambda seen: -(seen.logprobs_BT * seen.mask_BT).sum(1).mean(), "an entropy per response"
    ),
    "−log π of the samples, at temperature 1": Planted(
        lambda seen: seen.mean(-seen.logits_BTV.log_softmax(-1).gather(-1, seen.tokens_BT[..., None]).squeeze(-1)),
        f"the mean of −log π of the sampled tokens, from {UNTEMPERED}",
        HOT,
    ),
    "padding counted": Planted(
        lambda seen: (seen.entropies_BT * seen.mask_BT).mean(), "an average that counts padding"
    ),
    "shifted by one: each token has the entropy of the next": Planted(
        lambda seen: seen.mean(entropies(seen.logits_BUV[:, 1:])), "entropies that are shifted by one token"
    ),
    "shifted by one: each token has the entropy of the one before": Planted(
        lambda seen: (seen.entropies_BT[:, :-1] * seen.mask_BT[:, 1:]).sum() / seen.mask_BT[:, 1:].sum(),
        "entropies that are shifted by one token, the other way",
    ),
    "temperature ignored": Planted(
        lambda seen: seen.mean(entropies(seen.logits_BTV)), f"entropies of {UNTEMPERED}", COLD
    ),
    "mean of sequence means": Planted(
        lambda seen: ((seen.entropies_BT * seen.mask_BT).sum(1) / seen.mask_BT.sum(1)).mean(),
        "the mean of sequence means",
    ),
    "the law that top-p leaves": Planted(
        lambda seen: seen.mean(nucleus(seen.logits_BTV)),
        f"the entropy of the distribution that top_p = {TOP_P:g} leaves",
        {"top_p": TOP_P},
    ),
    "micro-batches of 2, which TRL itself averages so": Planted(
        None, "a mean over micro-batches of 2 responses that all count alike", MICRO
    ),
}
