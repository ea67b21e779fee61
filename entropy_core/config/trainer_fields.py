"""What each setting of TRL's trainers is for the step that is predicted. Every one is in exactly one of these lists.

    SETTINGS     it is a setting of ours, and our default
    OPTIMIZER    the state of the optimizer says it, per parameter group
    NO_EFFECT    it changes nothing about the step, but for its rounding
    MODELLED_AT  it may have no other value than these; else the step here is not the trainer's

The names are those of TRL's GRPOConfig and RLOOConfig, and of the TrainingArguments that they extend.
"""

from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

Arguments = Mapping[str, Any]

SETTINGS = {
    "temperature": "generation.temperature",
    "max_completion_length": "generation.max_new_tokens",
    "num_generations": "batch_config.G",
    "per_device_train_batch_size": "batch_config.B_U",
    "gradient_accumulation_steps": "batch_config.B_U",
    "generation_batch_size": "batch_config.B_U",
    "loss_type": "update.loss",
    "scale_rewards": "update.scale_rewards",
    "beta": "update.kl_beta",
    "use_bias_correction_kl": "update.use_bias_correction_kl",
    "importance_sampling_level": "update.importance_sampling_level",
    "top_entropy_quantile": "update.top_entropy_quantile",
    "entropy_coef": "update.entropy_coef",
    "use_adaptive_entropy": "update.entropy_coef",
    "mask_truncated_completions": "update.mask_truncated_completions",
    "epsilon_high": "update.epsilon_high",
    "reward_clip_range": "update.reward_clip_range",
    "normalize_advantages": "update.normalize_advantages",
    "max_grad_norm": "update.max_grad_norm",
    "chat_template_kwargs": "batch_config.chat_template_kwargs",
    "reward_weights": "update.reward_weights",
    "multi_objective_aggregation": "update.multi_objective_aggregation",
}
"""Setting of the trainer → key of ours. Several make B_U, and with it `update.micro_batch`."""

SPECIAL_TOKENS_SINCE = {"GRPO": "use_bias_correction_kl", "RLOO": "vllm_group_port"}
"""Kind of trainer → a setting that is as old as its tokenizing texts with the tokenizer's own special tokens: since
TRL 0.26 (GRPO) and 0.27 (RLOO). Releases before left them out, and none says its number in what it saves."""

OPTIMIZER = {
    *("learning_rate", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "optim", "optim_args"),
    *("optim_target_modules", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "warmup_ratio"),
}


class Rule(NamedTuple):
    """A setting that is modelled at some values only.

    Attributes:
        same: says of a value, beside the other settings, that the step here is the trainer's.
        what: it does at other values, to follow "the trainer had NAME = VALUE: ".
        weight: `refuse` where the step is another one; `warn` where it is close, or can be; `note` for rounding.
        key: of ours; where the user sets it, what is said stays a warning.
    """

    same: Callable[[Any, Arguments], bool]
    what: str
    weight: Literal["refuse", "warn", "note"] = "refuse"
    key: str = ""


def _is(*values: Any) -> Callable[[Any, Arguments], bool]:
    """One of these, or nothing; truth values and numbers that are equal count as equal."""
    return lambda value, _: value is None or value in values


def _without_kl(*values: Any) -> Callable[[Any, Arguments], bool]:
    """One of these, or without a KL term."""
    return lambda value, arguments: value in values or not arguments.get("beta")


def _one_generation(value: Any, arguments: Arguments) -> bool:
    return not isinstance(value, int) or value <= arguments.get("gradient_accumulation_steps", value)


_TRUNCATED = "responses were not sampled from the policy itself"
MODELLED_AT = {
    # the law that is sampled
    "top_p": Rule(_is(1), _TRUNCATED, key="generation.top_p"),
    "top_k": Rule(_is(0, -1), _TRUNCATED),
    "min_p": Rule(_is(0), _TRUNCATED),
    "repetition_penalty": Rule(_is(1), _TRUNCATED),
    "generation_kwargs": Rule(_is({}), "responses were sampled with settings that are not modelled"),
    "vllm_structured_outputs_regex": Rule(_is(""), _TRUNCATED),
    "vllm_guided_decoding_regex": Rule(_is(""), _TRUNCATED),
    "use_vllm": Rule(
        _is(False),
        "responses were drawn by vLLM, whose numbers differ a little from the trainer's, and weights made up for it; "
        "here the policy that is differentiated draws them, and there are no such weights",
        "warn",
    ),
    # the prompts
    "max_prompt_length": Rule(
        _is(),
        "longer prompts were cut on the left; here they are left out, or whole",
        "warn",
        key="batch_config.max_prompt_length",
    ),
    "max_tool_calling_iterations": Rule(_is(), "responses with tools, of several turns, are not modelled", "warn"),
    # the loss
    "sync_ref_model": Rule(_without_kl(False), "the reference policy followed the policy", key="update.reference"),
    "delta": Rule(lambda value, _: value is None or value > 1, "tokens were clipped on-policy"),
    "router_aux_loss_coef": Rule(_is(0), "the loss had a term that balances the load of the experts"),
    "neftune_noise_alpha": Rule(_is(0), "noise was added to the embeddings"),
    "num_iterations": Rule(
        _is(1), "the later steps of a rollout are off-policy; the step here is the first of them", "warn"
    ),
    "steps_per_generation": Rule(
        _one_generation, "the later steps of a rollout are off-policy; the step here is the first of them", "warn"
    ),
    # the numbers
    "bf16": Rule(_is(False), "it computed in bfloat16 where autocast does; here everything is in policy.dtype", "note"),
    "fp16": Rule(_is(False), "it computed in float16 where autocast does; here everything is in policy.dtype", "note"),
    "model_init_kwargs": Rule(
        lambda value, _: not isinstance(value, dict) or not {"quantization_config", "load_in_4bit"} & set(value),
        "the model was loaded in a quantised form; here it is whole",
        "warn",
        key="policy.base_model",
    ),
}

OF_ROLLOUTS = ("num_iterations", "steps_per_generation")
"""Settings by which several steps are taken on one rollout."""

OF_THE_PHASE = ("epsilon", "epsilon_high", "delta", "off_policy_mask_threshold")
"""Settings that act on the later of these steps, by their names in `update.phase`; 0 is none there."""

NO_EFFECT = {
    # where it ends, what it writes, which prompts come when
    *("output_dir", "overwrite_output_dir", "num_train_epochs", "max_steps", "seed", "data_seed", "full_determinism"),
    *("do_train", "do_eval", "do_predict", "resume_from_checkpoint", "ignore_data_skip", "auto_find_batch_size"),
    *("restore_callback_states_from_checkpoint", "enable_jit_checkpoint", "shuffle_dataset", "remove_unused_columns"),
    *("train_sampling_strategy", "group_by_length", "length_column_name", "label_names", "trust_remote_code"),
    # logs and evaluation
    *("logging_strategy", "logging_steps", "logging_first_step", "log_on_each_node", "logging_nan_inf_filter"),
    *("include_num_input_tokens_seen", "include_tokens_per_second", "log_level", "log_level_replica", "logging_dir"),
    *("disable_tqdm", "report_to", "run_name", "project", "trackio_space_id", "trackio_bucket_id"),
    *("trackio_static_space_id", "log_completions", "log_multimodal", "num_completions_to_print"),
    *("log_unique_prompts", "wandb_log_unique_prompts", "log_completions_hub_repo", "debug", "skip_memory_metrics"),
    *("eval_strategy", "evaluation_strategy", "eval_steps", "eval_delay", "per_device_eval_batch_size"),
    *("eval_on_start", "eval_do_concat_batches", "eval_use_gather_object", "eval_accumulation_steps"),
    *("prediction_loss_only", "include_for_metrics", "include_inputs_for_metrics", "batch_eval_metrics"),
    *("num_generations_eval", "load_best_model_at_end", "metric_for_best_model", "greater_is_better", "fp16_full_eval"),
    *("bf16_full_eval", "per_gpu_train_batch_size", "per_gpu_eval_batch_size", "past_index"),
    # saving and the hub
    *("save_only_model", "save_strategy", "save_steps", "save_on_each_node", "save_total_limit", "save_safetensors"),
    *("push_to_hub", "hub_token", "hub_private_repo", "hub_model_id", "hub_strategy", "hub_always_push"),
    *("hub_revision", "push_to_hub_model_id", "push_to_hub_organization", "push_to_hub_token"),
    # machines, memory, speed: the same step, but for its rounding
    *("use_cpu", "no_cuda", "use_mps_device", "local_rank", "accelerator_config", "parallelism_config", "deepspeed"),
    *("fsdp", "fsdp_config", "fsdp_min_num_params", "fsdp_transformer_layer_cls_to_wrap", "dispatch_batches"),
    *("split_batches", "ddp_find_unused_parameters", "ddp_bucket_cap_mb", "ddp_broadcast_buffers", "ddp_static_graph"),
    *("ddp_backend", "ddp_timeout", "dataloader_drop_last", "dataloader_num_workers", "dataloader_pin_memory"),
    *("dataloader_persistent_workers", "dataloader_prefetch_factor", "dataloader_multiprocessing_context"),
    *("dataloader_in_order", "tf32", "activation_checkpointing", "activation_checkpointing_kwargs"),
    *("gradient_checkpointing", "gradient_checkpointing_kwargs", "torch_compile", "torch_compile_backend"),
    *("torch_compile_mode", "torchdynamo", "use_liger_kernel", "use_liger_loss", "liger_kernel_config", "use_cache"),
    *("torch_empty_cache_steps", "cast_lm_head_to_fp32", "ds3_gather_for_generation", "pad_to_multiple_of"),
    *("cache_implementation", "use_transformers_continuous_batching", "transformers_continuous_batching_config"),
    *("use_transformers_paged", "mixed_precision", "fp16_backend", "fp16_opt_level", "half_precision_backend"),
    *("jit_mode_eval", "use_ipex", "tpu_num_cores", "tpu_metrics_debug", "mp_parameters", "ray_scope"),
    *("use_legacy_prediction_loop", "distributed_state", "fsdp_plugin_args", "deepspeed_plugin"),
    # where vLLM runs
    *("vllm_mode", "vllm_model_impl", "vllm_enable_sleep_mode", "vllm_server_base_url", "vllm_server_host"),
    *("vllm_server_port", "vllm_server_timeout", "vllm_group_port", "vllm_gpu_memory_utilization"),
    *("vllm_max_model_length", "vllm_max_model_len", "vllm_tensor_parallel_size", "vllm_device", "vllm_dtype"),
    *("vllm_enable_prefix_caching",),
    # what is at work off-policy only: at the policy that sampled U every ratio is 1, and every such weight
    *("epsilon", "off_policy_mask_threshold"),
    *("sapo_temperature_neg", "sapo_temperature_pos", "vespo_k_pos", "vespo_lambda_pos", "vespo_k_neg"),
    *("vespo_lambda_neg", "vllm_importance_sampling_correction", "vllm_importance_sampling_mode"),
    *("vllm_importance_sampling_clip_max", "vllm_importance_sampling_clip_min", "vllm_importance_sampling_cap"),
    # what is at work with another setting only, by which it is judged
    *("ref_model_mixup_alpha", "ref_model_sync_steps", "entropy_coef_min", "entropy_coef_max", "entropy_coef_delta"),
    *("entropy_target", "average_tokens_across_devices", "label_smoothing_factor", "disable_dropout"),
}
"""`label_smoothing_factor` and `average_tokens_across_devices` are of losses that these trainers replace; dropout is
judged by what the model's and the adapter's own files say of it."""

GENERATION = {
    "min_p": _is(0),
    "typical_p": _is(1),
    "top_h": _is(),
    "epsilon_cutoff": _is(0),
    "eta_cutoff": _is(0),
    "no_repeat_ngram_size": _is(0),
    "encoder_repetition_penalty": _is(1),
    "suppress_tokens": _is([]),
    "begin_suppress_tokens": _is([]),
    "bad_words_ids": _is([]),
    "sequence_bias": _is({}, []),
    "exponential_decay_length_penalty": _is(),
    "forced_eos_token_id": _is(),
    "forced_bos_token_id": _is(),
    "min_length": _is(0),
    "min_new_tokens": _is(0),
    "num_beams": _is(1),
    "penalty_alpha": _is(0),
    "guidance_scale": _is(1),
    "stop_strings": _is([]),
}
"""Of the model's generation_config.json: what TRL leaves open, and `generate` then takes from there. TRL itself sets
temperature, top_p, top_k and repetition_penalty."""

LOSSES = {
    **{name: name for name in ("grpo", "dapo", "dr_grpo", "bnpo", "luspo", "cispo")},
    "sapo": "grpo",
    "vespo": "dapo",
}
"""`loss_type` → the loss here that has the same gradient on-policy."""
