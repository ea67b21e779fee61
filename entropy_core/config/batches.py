"""What a user asks for about the batches: the evaluation batch E, the update batch U, and their prompts."""

from typing import Annotated, Literal

from pydantic import ConfigDict, Field, JsonValue, ValidationInfo, field_validator

from entropy_core.config.paths import (
    DatasetName,
    Directory,
    RolloutsPath,
)
from entropy_core.config.section import Section, Seed


class RecordedConfig(Section):
    """U as it was: rollouts that a trainer recorded, in place of responses that are sampled and rewarded anew."""

    model_config = ConfigDict(serialize_by_alias=True, revalidate_instances="never")  # which knows no alias

    source: RolloutsPath = Field(
        "",
        alias="from",
        description="File or folder of recorded rollouts, of which those of the checkpoint's next step are taken. "
        "Empty: U is sampled.",
    )
    first_step: Literal["auto", "0", "1"] = Field(
        "auto",
        description="Number that these files give to the first step of a training, so that the step after checkpoint-N "
        "is in the file of N + first_step. auto: 0 for prime-rl, else 1.",
    )
    old_logprobs: Literal["recorded", "scored"] = Field(
        "recorded",
        description="Which log-probabilities the loss has ratios to. recorded: those of the sampler that drew the "
        "tokens, where the file has them. scored: the policy's own, as a trainer has that takes its first step on a "
        "rollout and does not correct for its sampler; ratios are 1.",
    )


class BatchConfig(Section):
    """The evaluation batch E and the update batch U."""

    E_sampling_mode: Literal["replacement", "distinct"] = Field(
        "replacement",
        description="E: prompts drawn with replacement, one response each; or distinct prompts with G responses each.",
    )
    E_total_sequences: int = Field(4096, ge=2, le=10_000_000, description="Sequences in E (replacement mode).")
    E_batch_seed: Seed = Field(42, description="Seed of E; the same seed gives the same draws at every checkpoint.")
    E_replicates: int = Field(
        1,
        ge=1,
        le=100,
        description="Independent E batches, of seeds E_batch_seed, +1, …; those after the first for δH₁.",
    )
    B_E_values: list[Annotated[int, Field(ge=1, le=10_000_000)]] = Field(
        [512], min_length=1, max_length=1, description="Distinct prompts in E (distinct mode only)."
    )
    B_U: int = Field(
        64, ge=2, le=1_000_000, description="Distinct prompts in U, the batch that the optimizer step is taken on."
    )
    G: int = Field(8, ge=2, le=100_000, description="Responses per prompt in U (and in E in distinct mode).")
    U_batch_seed: Seed = Field(42, description="Seed of U.")
    U: RecordedConfig = RecordedConfig()
    dataset_name: DatasetName = Field(
        "arithmetic",
        min_length=1,
        description="Prompt pool: `arithmetic`, `gsm8k`, `gsm8k_r1_template`, `math`, `reasoning_gym:TASK`, the path "
        "of a file (.jsonl, .json, .csv, each also with .gz, or .parquet), that of a folder (by `save_to_disk`, or "
        "with such files), or `OWNER/NAME` of a dataset in the hub cache.",
    )
    dataset_config: str = Field(
        "", description="Configuration of a folder or of a dataset `OWNER/NAME`, where it has several; empty: its only."
    )
    dataset_path: Directory = Field(
        "", description="Folder of the local copy of `gsm8k` or `math`; empty: the hub cache of this machine."
    )
    allow_download: bool = Field(False, description="Fetch a dataset of the hub if it is not on this machine.")
    dataset_options: dict[str, JsonValue] = Field(
        {}, description="Of a reasoning-gym task: `size` (512), `seed` (42), and the task's own."
    )
    split: str = Field("train", description="Split of the pool, for E and U alike.")
    E_split: str = Field("", description="Split for E; empty: `split`.")
    U_split: str = Field("", description="Split for U; empty: `split`.")
    prompt_column: str = Field(
        "prompt", description="Column that holds the prompt: a text, or a conversation as a list of messages."
    )
    add_special_tokens: bool = Field(
        False,
        description="Let the tokenizer add its special tokens to a prompt that is a text, as TRL does since 0.26.",
    )
    apply_chat_template: bool = Field(
        False,
        description="Make of a text the user's turn in the tokenizer's chat template, and begin the answer. "
        "Conversations go through the template anyway.",
    )
    chat_template_kwargs: dict[str, JsonValue] = Field(
        {}, description="Further arguments of the chat template, such as `enable_thinking: false`."
    )
    system_prompt: str = Field("", description="System turn of the chat template; empty: none.")
    max_prompt_length: int = Field(
        0,
        ge=0,
        le=10_000_000,
        description="Leave out prompts of more tokens than this, the template's included; 0: no limit.",
    )

    @field_validator("apply_chat_template")
    @classmethod
    def _one_writer_of_special_tokens(cls, apply: bool, info: ValidationInfo) -> bool:
        if apply and info.data.get("add_special_tokens"):
            raise ValueError("the chat template writes the special tokens: set add_special_tokens: false")
        return apply

    @field_validator("system_prompt")
    @classmethod
    def _in_a_chat(cls, system_prompt: str, info: ValidationInfo) -> str:
        if system_prompt and info.data.get("apply_chat_template") is False:
            raise ValueError("it is a part of the chat template: set apply_chat_template: true")
        return system_prompt
