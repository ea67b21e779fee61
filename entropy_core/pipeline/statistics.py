"""The statistics and the report: the end of a sweep, or all that is run when those of a recorded sweep are run again.

Nothing here imports a stage that needs a policy, so that a rerun need not wait for the libraries of the models.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from entropy_core.config.schema import ProbeConfig, VarianceRequest
from entropy_core.errors import StoreError
from entropy_core.pipeline.final_stages import AGREEMENT, ASKED_FOR, REPORT, VARIANCE, compared, settings_of
from entropy_core.pipeline.recorded import WITH_ARTIFACTS, read_run, write_run
from entropy_core.pipeline.repairs import with_repairs
from entropy_core.pipeline.runner import Inputs, Runner
from entropy_core.store.artifact import Artifact, artifacts_in
from entropy_core.store.store import Store


@dataclass(frozen=True)
class SweepResult:
    """Result of a sweep: its report artifact, and the run folder with copies of the result files."""

    run_id: str
    run_directory: Path
    report: Artifact


def variance(request: VarianceRequest, store: Store, run: Runner) -> SweepResult:
    """Rerun the statistics of a recorded sweep with other settings, from cached columns alone.

    Args:
        request: the recorded run, and the new settings.
        store: the store of the artifacts.
        run: runner of stages.

    Returns:
        The report, and the folder of the new run, as from `sweep`.

    Raises:
        StoreError: the run does not exist, or one of its artifacts is missing; names the artifact.
        ConfigError: the configuration that was recorded has an error.
    """
    directory, config, recorded = read_run(store, request.run)
    config = config.model_copy(update={"variance": request.applied_to(config.variance)})

    def work() -> SweepResult:
        for entry in recorded:
            for artifact in artifacts_in([entry[of] for of in WITH_ARTIFACTS]):
                if store.find(artifact.stage, artifact.key) is None:
                    raise StoreError(
                        f"the artifact {artifact.stage}/{artifact.key} of {entry['checkpoint']} is not in {store.root}",
                        cause="it was deleted, or the store was moved without it",
                        fix=f"make it again: `entropy-probe sweep {directory / 'config.yaml'}`",
                    )
        return record(recorded, reported(recorded, config, run), config, store, rerun_of=directory.name)

    with store.in_use():
        return with_repairs(store, work)


def reported(recorded: Sequence[Inputs], config: ProbeConfig, run: Runner) -> Artifact:
    """Run the variance stage of every checkpoint, the agreement stage, and the report stage.

    Args:
        recorded: for each checkpoint what `write_run` records of it.
        config: configuration of the sweep.
        run: runner of stages.

    Returns:
        Artifact of the report stage.
    """
    estimated = [
        {
            "checkpoint": entry["checkpoint"],
            "step": entry["step"],
            "estimates": run(VARIANCE, entry["inputs"] | settings_of(config), entry["checkpoint"]),
            "attribution": entry["inputs"]["first_order_u"],
        }
        | {
            of: run(stage, inputs_of(entry, config), entry["checkpoint"]) if entry[of] else None
            for of, (stage, inputs_of) in ASKED_FOR.items()
        }
        for entry in recorded
    ]
    notes = list(dict.fromkeys([note for entry in recorded for note in entry["notes"]] + assumptions(config)))
    agreement = run(AGREEMENT, compared(recorded, config), config.name)
    inputs = {"name": config.name, "checkpoints": estimated, "agreement": agreement, "notes": notes}
    warnings = list(dict.fromkeys(warning for entry in recorded for warning in entry["warnings"]))
    said = {"settings": recorded[0]["settings"], "warnings": warnings}
    return run(REPORT, inputs | said, config.name)


def record(
    recorded: Sequence[Inputs], report: Artifact, config: ProbeConfig, store: Store, rerun_of: str = ""
) -> SweepResult:
    """Write the folder of the run, which may be a rerun of another, and return the result."""
    run_id = f"{config.name}-{report.digest[:12]}"  # equal results give the same run id
    return SweepResult(run_id, write_run(store, run_id, config, recorded, report, rerun_of), report)


def assumptions(config: ProbeConfig) -> list[str]:
    """List the settings that a checkpoint does not record and that come from the configuration, as sentences."""
    update = config.update
    divided = {"group": "divided", "none": "not divided"}.get(update.scale_rewards)
    scaled = f" (advantages {divided} by the standard deviation of their group)" if divided else ""
    clipping = f"clipped at global norm {update.max_grad_norm:g}" if update.max_grad_norm else "not clipped"
    kl = f"with {update.kl_beta:g} · KL to the reference policy" if update.kl_beta else "without a KL term"
    how = config.policy.arithmetic
    cheaper = "" if how == "full" else f", its derivatives along the step in {how}"
    named = " + ".join(f"`{Path(name).name}`" for name in update.rewards)
    several = f"rewards {named}" if len(update.rewards) > 1 else f"reward {named}"
    return [
        f"The step is that of the `{Path(update.loss).name}` loss{scaled} on {config.batch_config.B_U} prompts "
        f"× {config.batch_config.G} responses with the {several}, its gradient {clipping}; "
        f"on-policy, {kl}, cut responses included.",
        f"Responses are sampled at temperature {config.generation.temperature:g} without truncation of the "
        f"distribution and cut at {config.generation.max_new_tokens} tokens; the policy is computed in "
        f"{config.policy.dtype}{cheaper}.",
    ]
