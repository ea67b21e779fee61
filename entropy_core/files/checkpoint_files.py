"""Names of the files of checkpoints: on which of them results depend, and where trainers have their state."""

TRAINER_FILES = ("optimizer.pt", "optimizer_param_names.json", "trainer_state.json", "training_info.json")
WEIGHT_FILES = ("*.safetensors", "*.safetensors.index.json", "adapter_config.json", "generation_config.json")
BYSTANDERS = (
    *(
        "training_args.bin",
        "rng_state*",
        "extra_state_world_size_*",
        "random_states_*",
        "scheduler.pt",
        "scaler.pt",
    ),  # to resume a training
    *("events.out.tfevents.*", "*.log", "*_results.json", "latest", "zero_to_fp32.py"),  # beside it
    *("*.bin", "*.bin.index.json", "*.pkl", "*.pth", "*.ckpt", "*.h5", "*.msgpack", "*.onnx", "*.gguf"),  # never read
    *("README*", "*.md", "LICENSE*", "NOTICE*", "*.png", "*.html", "*.py", ".*", "*~", "*.tmp", "*.lock"),  # for people
)
"""Files on which no result depends. All others count, for a tokenizer may be made of files of any name."""
ALWAYS = ("*.safetensors", "tokenizer*")
"""Files that count although a bystander may be called so: an index names shards, and a tokenizer its files."""

SHARDS = (
    *("*.distcp", ".metadata", "*_optim_states.pt", "*_model_states.pt"),
    *("model_world_size_*_rank_*.pt", "optim_world_size_*_rank_*.pt"),
    *("fp32.pt", "exp_avg.pt", "exp_avg_sq.pt", "step.pt", "optimizer_state.pt"),  # DeepSpeed's universal ones
)
"""Files of trainers that shard."""
STATE_FILES = (
    *("optimizer.bin", "pytorch_model_fsdp.bin", "latest", "latest_universal", "trainer_state.json"),
    *("lora_train_meta.json", *SHARDS),
)
UNIVERSAL = ("zero", "zero/*")
"""Folders of DeepSpeed's universal checkpoints, below that of the model states."""
STATE_FOLDERS = (
    *("", "optimizer_[0-9]*", "pytorch_model_fsdp_[0-9]*", "global_step[0-9]*", "actor", "policy", "trainer"),
    *("optimizer", "weights", "policy/optimizer", "policy/weights"),
    *(*UNIVERSAL, *(f"*_universal/{folder}" for folder in ("", *UNIVERSAL))),
)
"""Where trainers that write no `optimizer.pt` have their state, see `checkpoints.layouts.places`."""
