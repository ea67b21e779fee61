"""What a user asks for: frozen, typed, bounded, described. An unknown key is an error; so is a value of another type.

A rule about several keys is checked at the last of them, and only if the others are valid: then every error of a
configuration is found at once.

The names of the batch and generation keys are those that researchers of this field have in their files already.
"""

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationInfo, field_validator

from entropy_core.config.batches import BatchConfig
from entropy_core.config.lab import LabConfig
from entropy_core.config.paths import (
    CheckpointPattern,
    Interpreter,
    InterventionEntry,
    ModelName,
    StoreFolder,
)
from entropy_core.config.sampling import SamplingConfig
from entropy_core.config.section import DISTINCT, Section, each_once
from entropy_core.config.update import UpdateConfig
from entropy_core.isolation.process import Isolation
from entropy_core.numerics.choices import Arithmetic, Baseline, Estimator, Normalization


class PolicyConfig(Section):
    """How the checkpoint's weights are computed with."""

    dtype: Literal["float32", "float64"] = Field(
        "float32",
        description="Number format of the weights, of what is stored of a pass, and of every operation unless "
        "`arithmetic` says otherwise; narrower weights are widened.",
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
    arithmetic: Arithmetic = Field(
        "full",
        description="Arithmetic of the passes that subtract nothing: forward mode over E, and the path integral. full: "
        "dtype. tf32 (on a GPU) and bf16 (under autocast): several times faster on a GPU; the error of δH₁ is measured "
        "on 64 sequences, reported, and part of the intervals. All other passes are in full.",
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

    @field_validator("dtype", mode="before")
    @classmethod
    def _subtracts_passes(cls, dtype: Any) -> Any:
        if dtype in ("bfloat16", "bf16", "float16", "fp16", "half"):
            raise ValueError(
                f"it is {dtype}, in which a log-probability is rounded by more than a step changes it, and ΔH is the "
                "difference of two passes. Set policy.arithmetic: bf16 for the passes that subtract nothing, and "
                "generation.sampler: bf16 to sample"
            )
        return dtype

    @field_validator("arithmetic")
    @classmethod
    def _subtracts_nothing(cls, arithmetic: Arithmetic, of: ValidationInfo) -> Arithmetic:
        if arithmetic == "full":
            return arithmetic
        if of.data.get("derivative") == "central_difference":
            raise ValueError(
                f"it is {arithmetic}, and a central difference subtracts passes whose rounding would be larger than "
                "what is left. Set policy.derivative: forward_mode"
            )
        if of.data.get("dtype") == "float64":
            raise ValueError(f"it is {arithmetic}, which is for weights in float32. Set policy.dtype: float32")
        return arithmetic


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
    workers: Literal["local", "pool", "ray"] = Field(
        "local",
        description="What runs the stages that need the policy. local: this process, on one device. pool: several "
        "processes on this machine, each on its own device; shards, step sizes and checkpoints then run at the same "
        "time. ray: the same as actors of Ray, on the cluster that RAY_ADDRESS names, else on this machine.",
    )
    worker_count: int = Field(
        0,
        ge=0,
        le=1024,
        description="Workers of a pool or of Ray. 0: one for each device. On a CPU they share its cores.",
    )
    devices: list[str] = Field(
        default_factory=list,
        description="GPUs of a pool, as CUDA_VISIBLE_DEVICES names them, such as '0' or 'GPU-…'. []: all visible ones.",
        json_schema_extra=DISTINCT,
    )
    devices_per_policy: int = Field(
        1,
        ge=1,
        le=64,
        description="GPUs of one machine that share the layers of a policy which is too large for one; of a pool or of "
        "Ray, those of each worker.",
    )
    vllm_python: Interpreter = Field(
        "",
        description="Interpreter of an environment that has vLLM, for `generation.sampler: vllm`; it needs nothing of "
        "this project.",
    )
    vllm_memory: float = Field(
        0.4,
        gt=0,
        le=1,
        description="Share of a device's memory that vLLM takes for its weights and its cache, beside the policy.",
    )
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

    _distinct = field_validator("devices")(each_once)

    @field_validator("devices")
    @classmethod
    def _of_several_workers(cls, value: list[str], info: ValidationInfo) -> list[str]:
        if info.data.get("workers") == "local" and (value or info.data.get("worker_count")):
            raise ValueError("worker_count and devices are those of a pool, and workers is local")
        if info.data.get("workers") == "ray" and value:
            raise ValueError("devices are those of a pool, and Ray chooses which GPU a worker gets")
        return value

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
    post_mortem: bool = Field(
        False,
        description="Split what the trainer's step from each checkpoint to the next one beside it did to the entropy: "
        "tokens, sampler, momentum, decay, rounding, and the rest. Needs `batch_config.U.from`.",
    )
    interventions: list[InterventionEntry] = Field(
        default_factory=list,
        max_length=1000,
        description="What might change the entropy, tried on every checkpoint: `published`, a name, a name with its "
        "value such as `entropy_coef: 0.01`, or your own `file.py:function`.",
    )
    lab: LabConfig = LabConfig()
    execution: ExecutionConfig = ExecutionConfig()

    @field_validator("post_mortem")
    @classmethod
    def _on_the_batch_of_the_step(cls, post_mortem: bool, info: ValidationInfo) -> bool:
        batch = info.data.get("batch_config")
        if post_mortem and batch and not batch.U.source:
            raise ValueError(
                "U is sampled, and the step that was taken was on another batch. Set batch_config.U.from to the "
                "rollouts that the trainer recorded"
            )
        return post_mortem

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
