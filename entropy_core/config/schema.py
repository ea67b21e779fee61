"""What a user asks for: frozen, typed, bounded, described. An unknown key is an error; so is a value of another type.

A rule about several keys is checked at the last of them, and only if the others are valid: then every error of a
configuration is found at once.

The names of the batch and generation keys are those that researchers of this field have in their files already.
"""

from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import Field, JsonValue, ValidationInfo, field_validator

from entropy_core.config.lab import LabConfig
from entropy_core.config.paths import (
    CheckpointPattern,
    DatasetName,
    Directory,
    FunctionName,
    FunctionNames,
    InterventionEntry,
    ModelName,
    StoreFolder,
)
from entropy_core.config.sampling import SamplingConfig
from entropy_core.config.section import DISTINCT, Section, Seed, each_once
from entropy_core.isolation.process import Isolation
from entropy_core.numerics.advantages import Aggregation, Loss, Scaling
from entropy_core.numerics.choices import Baseline, Estimator, Normalization


class PolicyConfig(Section):
    """How the checkpoint's weights are computed with."""

    dtype: Literal["float32", "float64"] = Field(
        "float32", description="Number format of every forward and derivative pass; narrower weights are widened."
    )
    attn_implementation: Literal["blockwise", "eager"] = Field(
        "blockwise",
        description="Attention in forward mode; every other pass uses torch's fused kernel. blockwise: exact, memory "
        "that grows with the length of a sequence; a model with another kind of attention uses its own. eager: the "
        "model's own, memory that grows with the square of the length.",
    )
    derivative: Literal["forward_mode", "central_difference"] = Field(
        "forward_mode",
        description="Derivatives of E's tokens along the step. central_difference: two forward passes in place of "
        "about three, its width calibrated and its error measured against forward mode.",
    )
    base_model: ModelName = Field(
        "",
        description="Base model under LoRA adapters, its directory or its name in the hub cache; empty: the one that "
        "each adapter names. Of checkpoints in shards without a config.json, the directory that has it and the "
        "tokenizer.",
    )
    weights: Literal["trained", "master"] = Field(
        "trained",
        description="Which weights are θ where a trainer keeps two copies. trained: those that it saved to be opened, "
        "such as model.safetensors, in the number format that it sampled from; where there are none, what its shards "
        "hold, which for DeepSpeed are the float32 masters. master: those of the shards in any case.",
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


class UpdateConfig(Section):
    """The optimizer step whose effect is predicted: that of your trainer."""

    loss: FunctionName = Field(
        "grpo",
        min_length=1,
        description=f"Objective: {', '.join(get_args(Loss))}, or your own, `file.py:function` or "
        "`package.module:function`.",
        json_schema_extra={"pattern": f"^({'|'.join(get_args(Loss))})$|:"},
    )
    scale_rewards: Scaling = Field(
        "auto",
        description="What advantages are divided by: the standard deviation of their group, that of all rewards of U "
        "(batch), or none. auto: as the loss was published (dr_grpo, rloo and reinforce do not divide). TRL's trainer "
        "divides under any loss: group. A loss of your own needs another one than auto.",
    )
    max_grad_norm: float = Field(1.0, ge=0, le=1e6, description="Global-norm gradient clipping; 0 switches it off.")
    learning_rate: float = Field(
        0.0, ge=0, le=10, description="Nominal learning rate; 0: the one saved in the checkpoint."
    )
    optimizer_state: Literal["checkpoint", "fresh"] = Field(
        "checkpoint",
        description="Adam's moments: those of `optimizer.pt`, or none yet (fresh: before the first step; needs "
        "`learning_rate`).",
    )
    kl_beta: float = Field(0.0, ge=0, le=1000, description="β of a KL term to a reference policy; 0: none.")
    kl_in: Literal["loss", "reward"] = Field(
        "loss", description="Where the KL term is: in the loss, per token, or in the reward of a response (TRL's RLOO)."
    )
    use_bias_correction_kl: bool = Field(
        False,
        description="The KL term of a token is multiplied by its importance ratio, so that its gradient is that of the "
        "KL divergence, as TRL does by default.",
    )
    importance_sampling_level: Literal["token", "sequence"] = Field(
        "token", description="sequence: one importance ratio for a whole response (GSPO)."
    )
    top_entropy_quantile: float = Field(
        1.0, gt=0, le=1, description="Share of the tokens, those of the highest entropy, that have a policy term."
    )
    entropy_coef: float = Field(
        0.0,
        ge=-100,
        le=100,
        description="Coefficient of an entropy bonus; an adaptive one: as of the next step.",
    )
    epsilon_high: float = Field(0.0, ge=0, le=1e6, description="Cap of the weights of cispo; 0: none.")
    reward_clip_range: list[Annotated[float, Field(ge=-1e9, le=1e9)]] = Field(
        default_factory=list, max_length=2, description="Lower and upper bound that rewards are clipped to; []: none."
    )
    normalize_advantages: bool = Field(
        False, description="Advantages are standardised over all of U in the end, as TRL's RLOO can."
    )
    mask_truncated_completions: bool = Field(
        False, description="Responses that were cut at `max_new_tokens` do not count in the loss."
    )
    micro_batch: int = Field(
        0,
        ge=0,
        le=10_000_000,
        description="Responses in a micro-batch of the trainer, if it accumulates gradients: bnpo, an entropy bonus "
        "and top_entropy_quantile average over each of them. 0: all are in one.",
    )
    reference: ModelName = Field(
        "",
        description="Reference policy, its directory or its name in the hub cache; empty: the base under an adapter.",
    )
    reward: FunctionNames = Field(
        "exact_match",
        description="A known reward, `package.module:function`, or `file.py:function`; or a list of these, whose "
        "weighted sum is the reward.",
    )
    reward_weights: list[Annotated[float, Field(ge=-1e9, le=1e9)]] = Field(
        default_factory=list, max_length=100, description="Weights of several rewards, in their order; []: all 1."
    )
    multi_objective_aggregation: Aggregation = Field(
        "sum_then_normalize",
        description="Several rewards are summed, and the sum makes the advantages; or each is normalised within its "
        "group first, and the sum over the batch then (normalize_then_sum).",
    )
    leave_out: list[Annotated[str, Field(min_length=1)]] = Field(
        default_factory=list,
        max_length=100,
        description="Settings of your trainer, by its own names, that the step here may leave out: what is not "
        "modelled is then warned of, and otherwise refused.",
    )

    @property
    def rewards(self) -> tuple[str, ...]:
        """The rewards, one or several."""
        return (self.reward,) if isinstance(self.reward, str) else tuple(self.reward)

    @field_validator("loss")
    @classmethod
    def _is_known(cls, loss: str) -> str:
        if loss not in get_args(Loss) and ":" not in loss:
            raise ValueError(
                f"unknown loss {loss!r}. Use one of {', '.join(get_args(Loss))}, file.py:function, or "
                "package.module:function"
            )
        return loss

    @field_validator("scale_rewards")
    @classmethod
    def _within_groups(cls, scale_rewards: Scaling, info: ValidationInfo) -> Scaling:
        if scale_rewards == "group" and info.data.get("loss") == "reinforce":
            raise ValueError("reinforce compares no responses within a group. Set scale_rewards: auto")
        return scale_rewards

    @field_validator("reward_clip_range")
    @classmethod
    def _is_a_range(cls, reward_clip_range: list[float]) -> list[float]:
        if reward_clip_range and (len(reward_clip_range) != 2 or not reward_clip_range[0] < reward_clip_range[1]):
            raise ValueError("it must be a lower and a larger upper bound, or empty")
        return reward_clip_range

    @field_validator("optimizer_state")
    @classmethod
    def _with_a_learning_rate(cls, optimizer_state: str, info: ValidationInfo) -> str:
        if optimizer_state == "fresh" and info.data.get("learning_rate") == 0:
            raise ValueError("a fresh optimizer has no learning rate of its own. Set learning_rate to that of the run")
        return optimizer_state


class ImportanceConfig(Section):
    """The step sizes at which the real change ΔH is measured."""

    etas: list[float] = Field(
        [0.0, 0.01, 0.1, 0.3, 1.0, 3.0],
        min_length=1,
        description="Step sizes, in the unit below; 0 is exact.",
        json_schema_extra=DISTINCT,
    )
    eta_unit: Literal["learning_rate", "absolute"] = Field(
        "learning_rate", description="Whether step sizes are multiples of the checkpoint's learning rate."
    )
    estimators: list[Estimator] = Field(
        ["per_decision", "snis"],
        min_length=1,
        description="Estimators of ΔH; each gets its own rows.",
        json_schema_extra=DISTINCT,
    )

    _distinct = field_validator("etas", "estimators")(each_once)


class VarianceConfig(Section):
    """How the cached per-token columns are turned into estimates and intervals; needs no model."""

    confidence_level: float = Field(0.95, gt=0, le=0.999999, description="Of every interval.")
    baseline: Baseline = Field("time_loo", description="Baseline of the reward-to-go, from the other sequences.")
    cluster: Literal["auto", "prompt"] = Field(
        "auto",
        description="Independent units of E. auto: sequences when prompts are drawn with replacement (target: the "
        "pool), prompts in distinct mode. prompt: always prompts (target: prompts like these).",
    )
    normalizations: list[Normalization] = Field(
        ["per_token", "per_sequence"],
        min_length=1,
        description="Entropy per token, per sequence, or both.",
        json_schema_extra=DISTINCT,
    )

    _distinct = field_validator("normalizations")(each_once)


class ExecutionConfig(Section):
    """How the work is done; nothing here changes a result."""

    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="Where the policy runs.")
    shard_size: int = Field(
        1024, ge=1, le=10_000_000, description="Sequences per shard, the unit of caching and of resuming."
    )
    head_chunk_megabytes: float = Field(
        64, gt=0, le=1_000_000, description="Memory of the logits that exist at one time; does not change the result."
    )
    keep_vectors: bool = Field(
        True,
        description="Keep what is of the size of the policy in the store (24 bytes a parameter and checkpoint in "
        "float32). false: it goes when the sweep is done with it; a later sweep that needs it computes it again.",
    )
    library_versions: Literal["same", "recompute"] = Field(
        "same",
        description="What to do where results of this sweep were made with other releases of the libraries. same: "
        "refuse to go on. recompute: compute all of it anew.",
    )
    user_code_seconds: float = Field(
        600,
        gt=0,
        le=7 * 24 * 3600,
        description="Time that one call of your own reward or loss may take; then it is stopped, and the sweep fails.",
    )
    user_code_gigabytes: float = Field(
        16,
        gt=0,
        le=1_000_000,
        description="Memory that your own reward or loss may take, with all processes that it starts.",
    )
    unusable_checkpoints: Literal["skip", "refuse"] = Field(
        "skip",
        description="What to do with one of several checkpoints that is half-written or cannot be probed. skip: leave "
        "it out and say so. refuse: end with the reason.",
    )
    artifacts: StoreFolder = Field("artifacts", min_length=1, description="Folder of the store and of the results.")

    @property
    def isolation(self) -> Isolation:
        """How functions of the user are called."""
        return Isolation(self.user_code_seconds, self.user_code_gigabytes)


class ProbeConfig(Section):
    """One sweep: which checkpoints, which batches, which step sizes."""

    name: str = Field(
        "probe",
        pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]*$",
        max_length=100,
        description="Begins the names of the results.",
    )
    checkpoints: list[CheckpointPattern] = Field(
        min_length=1,
        description="Checkpoint directories, or run directories, which stand for their checkpoint-*; patterns such as "
        "runs/grpo/checkpoint-* are expanded.",
    )
    policy: PolicyConfig = PolicyConfig()
    batch_config: BatchConfig = BatchConfig()
    generation: SamplingConfig = SamplingConfig()
    update: UpdateConfig = UpdateConfig()
    importance: ImportanceConfig = ImportanceConfig()
    variance: VarianceConfig = VarianceConfig()
    price: bool = Field(
        False,
        description="Compute the reward of every response of E, too, and say what a step does to the expected reward "
        "and how much entropy goes with it.",
    )
    interventions: list[InterventionEntry] = Field(
        default_factory=list,
        max_length=1000,
        description="What might change the entropy, tried on every checkpoint: `published`, a name, a name with its "
        "value such as `entropy_coef: 0.01`, or your own `file.py:function`.",
    )
    lab: LabConfig = LabConfig()
    execution: ExecutionConfig = ExecutionConfig()

    @property
    def units_of_e(self) -> Literal["sequence", "prompt"]:
        """What is independent in E: responses to one prompt are not, unless the prompt was drawn for each of them."""
        replacement = self.batch_config.E_sampling_mode == "replacement"
        return "sequence" if replacement and self.variance.cluster == "auto" else "prompt"

    @property
    def splits(self) -> tuple[str, str]:
        """The splits from which the batches E and U draw prompts."""
        batch = self.batch_config
        return batch.E_split or batch.split, batch.U_split or batch.split

    @property
    def store_root(self) -> Path:
        """Folder of the store."""
        return Path(self.execution.artifacts)

    def as_given(self) -> dict[str, Any]:
        """What was set, as JSON has it, and the folder of the store: for another process to read as this one did."""
        given = self.model_dump(mode="json", exclude_unset=True)
        return given | {"execution": given.get("execution", {}) | {"artifacts": self.execution.artifacts}}


class VarianceRequest(Section):
    """The statistics of a recorded sweep, again, from cached batches alone.

    What stays as recorded is a value like any other, and the default: a form sends all that it shows.
    """

    run: str = Field(
        "latest", min_length=1, description="Id of a recorded run, or latest: the sweep that finished last."
    )
    confidence_level: float = Field(0.0, ge=0, le=0.999999, description="Of every interval. 0: as recorded.")
    baseline: Literal["as_recorded", Baseline] = Field(
        "as_recorded", description="Baseline of the reward-to-go, from the other sequences."
    )
    cluster: Literal["as_recorded", "auto", "prompt"] = Field("as_recorded", description="Independent units of E.")
    normalizations: list[Normalization] = Field(
        default_factory=list,
        description="Entropy per token, per sequence, or both. []: as recorded.",
        json_schema_extra=DISTINCT,
    )
    artifacts: StoreFolder = Field("artifacts", min_length=1, description="Folder of the store and of the results.")

    def applied_to(self, recorded: VarianceConfig) -> VarianceConfig:
        """The recorded settings with those that were asked for in their place."""
        asked = {name: getattr(self, name) for name in VarianceConfig.model_fields}
        return recorded.model_copy(update={name: value for name, value in asked.items() if value not in _AS_RECORDED})

    _distinct = field_validator("normalizations")(each_once)


_AS_RECORDED: tuple[Any, ...] = (0.0, "as_recorded", [])
