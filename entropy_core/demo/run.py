"""The demo run: a trainer's checkpoints to probe, made from nothing in about a minute.

    python -m entropy_core.demo --out artifacts/demo-run

A Llama of about 100,000 parameters with a token per character learns addition (`arithmetic`): by supervised steps,
until it is right about two times in five, then by TRL's GRPO, which saves its checkpoints as it always does:

    artifacts/demo-run/
      checkpoint-6/ -12/ …   model.safetensors, config.json, tokenizer.json, optimizer.pt, trainer_state.json, …
      entropy-probe.yaml     its prompts and its reward, which no checkpoint records
      demo.json              written last: settings, versions, and per checkpoint what the trainer logged

Everything is drawn from `DemoSettings.seed`: the same settings, library versions and processor give the same weights.
Nothing is read from or sent to the network. Finding a finished run imports neither torch, transformers nor trl.
"""

import argparse
import sys
import time
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from entropy_core.demo.training_run import grpo, make_once, quiet, say_the_rest, versions
from entropy_core.errors import ConfigError, ProbeError
from entropy_core.prompts.arithmetic import CHARACTERS, exact_match, problems

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

PAD, EOS = "<pad>", "<eos>"
MANIFEST = "demo.json"


@dataclass(frozen=True)
class DemoSettings:
    """What the demo run is made with; a run is reused only for equal settings. Raises ConfigError if they make none."""

    seed: int = 0  # of the weights, the batches and the sampled responses
    hidden_size: int = 64  # a multiple of the heads
    layers: int = 2
    heads: int = 4
    intermediate_size: int = 160  # of the gated feed-forward layers
    warm_problems: int = 8192  # that the supervised steps draw from, with replacement
    warm_steps: int = 240
    warm_batch: int = 48
    warm_learning_rate: float = 4e-3  # the peak
    prompts: int = 512  # that GRPO draws from
    prompts_per_step: int = 64  # B_U
    generations: int = 8  # responses per prompt
    max_new_tokens: int = 32  # the longest right response has 26, with its end
    steps: int = 30  # one optimizer step each, on fresh responses
    save_every: int = 6
    learning_rate: float = 2e-4  # of GRPO's AdamW, constant
    weight_decay: float = 0.01  # of GRPO's AdamW

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if value <= 0 and name != "seed":
                raise ConfigError(f"The demo run's {name} is {value}", fix="give a positive number")
        if self.hidden_size % self.heads:
            fact = f"The demo run's {self.heads} heads do not divide its hidden size {self.hidden_size}"
            raise ConfigError(fact, fix="give a hidden size that is a multiple of the heads")
        if self.generations < 2:
            fact, cause = (
                "The demo run draws one response per prompt",
                "an advantage compares the responses of one prompt",
            )
            raise ConfigError(fact, cause=cause, fix="give two generations or more")
        if self.steps < self.save_every:
            fact = f"The demo run would save no checkpoint: {self.steps} steps, one checkpoint every {self.save_every}"
            raise ConfigError(fact, fix="lower save_every")


def build_tokenizer() -> "PreTrainedTokenizerFast":
    """The tokenizer: one token per character of `prompts.arithmetic.CHARACTERS`, and separate padding and end tokens.

    It adds nothing to a text, pads on the left, and refuses any other character. Id 0 is padding, id 1 the end.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: i for i, token in enumerate([PAD, EOS, *CHARACTERS])}
    characters = Tokenizer(models.WordLevel(vocabulary))
    characters.pre_tokenizer = pre_tokenizers.Split(Regex("."), behavior="isolated")
    characters.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=characters,
        pad_token=PAD,
        eos_token=EOS,
        padding_side="left",
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
    )


def build_model(settings: DemoSettings) -> "LlamaForCausalLM":
    """The policy before any training: a small Llama with random float32 weights and an untied output head.

    The weights are drawn from the settings' seed; the global random state is left as it was.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=len(CHARACTERS) + 2,
        hidden_size=settings.hidden_size,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        num_key_value_heads=settings.heads,
        intermediate_size=settings.intermediate_size,
        max_position_embeddings=64,
        initializer_range=0.05,
        tie_word_embeddings=False,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
        dtype="float32",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        return LlamaForCausalLM(config)


def make_demo_run(out: Path, settings: DemoSettings = DemoSettings()) -> Path:
    """Makes the demo run at `out`, or finds it made; returns the absolute path.

    What happens is printed. The trainer seeds the global generators of Python and NumPy; torch's are left as they were.

    Raises:
        ProbeError: trl is not installed.
        StoreError: `out` holds a run made otherwise or something that is no demo run, or cannot be written.
    """
    libraries = versions("demo run", ("torch", "transformers", "trl"), "pip install -e '.[trl]'")
    identity = {"settings": asdict(settings), "versions": libraries}
    own = r"checkpoint-.*|entropy-probe(\.yaml)?"
    run = make_once(out, "demo run", MANIFEST, own, identity, lambda run: _train(run, settings))
    return say_the_rest(run, "batch_config: {dataset_name: arithmetic, split: train}\nupdate: {reward: arithmetic}\n")


def _train(run: Path, settings: DemoSettings) -> dict[str, Any]:
    """Fills `run` with the checkpoints; returns what the manifest says of them."""
    import torch

    started, say = time.monotonic(), partial(print, flush=True)
    tokenizer, model = build_tokenizer(), build_model(settings)
    size = sum(p.numel() for p in model.parameters())
    say(f"a policy of {size:,} parameters, {len(tokenizer)} tokens; {settings.warm_steps} supervised steps")
    # sums do not depend on the number of cores; a policy this small gains nothing from more
    with torch.random.fork_rng(devices=[]), quiet(threads=1):
        loss = _warm_start(model, tokenizer, settings)
        say(f"loss {loss:.3f} nats per token after {time.monotonic() - started:.0f} s; {settings.steps} GRPO steps")
        rows = [{name: p[name] for name in ("prompt", "answer")} for p in problems("train", settings.prompts)]
        saved = grpo(
            model,
            tokenizer,
            exact_match,
            rows,
            run,
            seed=settings.seed,
            max_steps=settings.steps,
            save_steps=settings.save_every,
            per_device_train_batch_size=settings.prompts_per_step * settings.generations,
            steps_per_generation=1,
            num_generations=settings.generations,
            max_completion_length=settings.max_new_tokens,
            learning_rate=settings.learning_rate,
            weight_decay=settings.weight_decay,
        )
    print(f"{time.monotonic() - started:.0f} s in all")
    return {"parameters": size, "checkpoints": saved}


def _warm_start(model: Any, tokenizer: Any, settings: DemoSettings) -> float:
    """Supervised AdamW on worked solutions; returns the last loss, in nats per response token."""
    import torch

    worked = problems("train", settings.warm_problems)
    texts = [problem["prompt"] + problem["solution"] + EOS for problem in worked]
    batch = tokenizer(texts, padding=True, padding_side="right", return_tensors="pt")
    ids = batch["input_ids"]  # [problems, tokens]
    in_prompt = torch.arange(ids.shape[1]) < torch.tensor([[len(problem["prompt"])] for problem in worked])
    labels = ids.masked_fill(in_prompt | (batch["attention_mask"] == 0), -100)  # which the loss skips
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.warm_learning_rate, betas=(0.9, 0.95))
    n, rise = settings.warm_steps, max(settings.warm_steps // 8, 1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: min((i + 1) / rise, 2 * (n - i) / n, 1.0))
    draws = torch.Generator().manual_seed(settings.seed)
    for _ in range(n):
        rows = torch.randint(len(ids), (settings.warm_batch,), generator=draws)
        # no attention mask: the padding is on the right and its labels are ignored
        loss = model(input_ids=ids[rows], labels=labels[rows]).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return loss.item()


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status: 0, or 1 where a `ProbeError` was printed."""
    parser = argparse.ArgumentParser("python -m entropy_core.demo", description="Make a small GRPO run to probe.")
    parser.add_argument("--out", type=Path, default=Path("artifacts/demo-run"), help="run directory (%(default)s)")
    try:
        make_demo_run(parser.parse_args(arguments).out)
    except ProbeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0
