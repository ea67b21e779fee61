"""A real GRPO run of a tiny policy, in a process of its own or in that of a test.

python watch_trainer.py RUN STEPS [RESUME]
"""

import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from entropy_core.demo.run import DemoSettings, build_model, build_tokenizer
from entropy_core.demo.training_run import ON_A_CPU, quiet
from entropy_core.prompts.arithmetic import problems
from entropy_core.training import ProbeCallback

SHAPE = DemoSettings(hidden_size=16, layers=1, heads=2, intermediate_size=24)
SAVE_STEPS, KEEP = 2, 2


def trainer(run: Path, steps: int, reward: Any, callbacks: Sequence[Any] = (), **settings: Any) -> Any:
    """A trainer that saves every second step and keeps two checkpoints, with the probe's callback."""
    from datasets import Dataset
    from transformers import PrinterCallback
    from trl import GRPOConfig, GRPOTrainer

    config = GRPOConfig(
        **{
            "output_dir": str(run),
            "per_device_train_batch_size": 16,
            "num_generations": 4,
            "max_completion_length": 8,
            "max_steps": steps,
            "save_steps": SAVE_STEPS,
            "save_total_limit": KEEP,
            "logging_steps": 1,
            "learning_rate": 1e-3,
            "loss_type": "grpo",
            "lr_scheduler_type": "constant",
            **ON_A_CPU,
            "seed": 3,
        }
        | settings
    )
    rows = Dataset.from_list(problems("train", 64)).select_columns(["prompt"])
    made = GRPOTrainer(
        build_model(SHAPE),
        reward,
        config,
        train_dataset=rows,
        processing_class=build_tokenizer(),
        callbacks=[*callbacks],
    )
    made.remove_callback(PrinterCallback)
    made.add_callback(ProbeCallback(made))
    return made


if __name__ == "__main__":
    from trainer_rewards import low_digits
    from transformers import TrainerCallback

    class NotFasterThanAPerson(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            import time

            time.sleep(0.5)

    with quiet(threads=1), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = trainer(Path(sys.argv[1]), int(sys.argv[2]), low_digits, [NotFasterThanAPerson()])
        made.train(resume_from_checkpoint=len(sys.argv) > 3)
