"""Runs with prompts, tokenizers and rewards of their own, for `trainer_fixtures.held_against_the_trainer`."""

from typing import Any

from tokenizers.processors import TemplateProcessing
from trainer_fixtures import Own

from entropy_core.prompts.arithmetic import problems

CHAT = (
    "{% for m in messages %}{{ {'system': '>', 'user': ',', 'assistant': '='}[m['role']] + m['content'] }}{% endfor %}"
    "{% if hint is defined and hint %}++{% endif %}{% if add_generation_prompt %};{% endif %}"
)
SEMICOLON = 16  # its token


def with_bos(tokenizer: Any) -> Any:
    """A tokenizer that begins every text with a token, as Llama's does."""
    token = tokenizer.convert_tokens_to_ids(">")
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="> $A", special_tokens=[(">", token)])
    return tokenizer


def with_template(tokenizer: Any) -> Any:
    tokenizer.chat_template = CHAT
    return tokenizer


def conversations() -> list[dict[str, Any]]:
    """A user's turn; a system turn before it; a dialogue; and one that ends with the beginning of an answer."""
    rows = []
    for number, problem in enumerate(problems("train", 32)):
        user = {"role": "user", "content": problem["prompt"]}
        turns = [
            [user],
            [{"role": "system", "content": "0"}, user],
            [{"role": "user", "content": "1+1="}, {"role": "assistant", "content": "2"}, user],
            [user, {"role": "assistant", "content": "1"}],
        ]
        rows.append({"prompt": turns[number % 4], "level": number / 16})
    return rows


BOS = Own(tokenizer=with_bos)
CHATS = Own(rewards=("low_digits", "of_messages"), tokenizer=with_template, rows=conversations())
SEVERAL = Own(rewards=("low_digits", "high_digits", "only_some"))
WEIGHTS = {"reward_weights": [1.0, -0.5, 2.0]}
NORMALISED = {"multi_objective_aggregation": "normalize_then_sum"}

OF_GRPO: dict[str, dict[str, Any]] = {
    "a BOS before the prompts": {"own": BOS},
    "another EOS in the generation config": {"own": Own(ends=[SEMICOLON]), "mask_truncated_completions": True},
    "lora, another EOS in the base's": {"own": Own(ends=[SEMICOLON]), "lora": {}},
    "conversations": {"own": CHATS},
    "conversations, BOS, DAPO": {
        "own": CHATS._replace(tokenizer=lambda tokenizer: with_bos(with_template(tokenizer))),
        "loss_type": "dapo",
    },
    "arguments of the template": {"own": CHATS, "chat_template_kwargs": {"hint": True}},
    "several rewards": {"own": SEVERAL},
    "several rewards, weighted": {"own": SEVERAL} | WEIGHTS,
    "several rewards, normalised one by one": {"own": SEVERAL} | WEIGHTS | NORMALISED,
    "several rewards, by the batch": {"own": SEVERAL, "scale_rewards": "batch"} | WEIGHTS,
    "one reward, normalised over the batch": {"own": Own(rewards=("low_digits",))} | NORMALISED,
    "a reward that leaves responses open": {"own": Own(rewards=("only_some",))},
    "a reward that leaves responses open, not divided": {
        "own": Own(rewards=("only_some",)),
        "scale_rewards": "none",
        "loss_type": "dr_grpo",
    },
    "an async reward": {"own": Own(rewards=("high_digits",))},
    "a reward of the trainer's state": {"own": Own(rewards=("of_the_trainer",))},
    "a reward of a column": {"own": CHATS._replace(rewards=("of_a_column",))},
}
OF_RLOO: dict[str, dict[str, Any]] = {
    "a BOS before the prompts": {"own": BOS, "beta": 0.0},
    "conversations, arguments of the template": {"own": CHATS, "beta": 0.0, "chat_template_kwargs": {"hint": True}},
    "several rewards, weighted": {"own": SEVERAL, "beta": 0.0} | WEIGHTS,
    "a reward that leaves responses open, normalised": {
        "own": Own(rewards=("only_some",)),
        "beta": 0.0,
        "normalize_advantages": True,
    },
}
