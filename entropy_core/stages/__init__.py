"""The stages: (upstream artifacts, settings that affect the result) → artifact. No Prefect here.

    load-prompts ── sample-e-batch ─┬─ score-e-batch ── entropy-gradient (∇H of two halves) ─┐
                                    │  rescore-e-batch (rounding) ───────────────────────────┼──────────────┐
    load-prompts ── sample-u-batch ─┼─ reward-u-batch ─┐                                     │              │
                                    │  score-u-batch ──┼─ compute-update ─┬─ first-order-u ──┘ ─────────────┤
    load-checkpoint ────────────────┘──────────────────┘                  │  half-steps-u ───────────────────┤
                                                                          │  dropout-u (a warning)           │
                                                                          ├─ first-order-e (calibrate) ──────┼─ variance
                                                                          ├─ importance (per η) ─────────────┤     │
                                                                          └─ path-integral (per η) ──────────┘   report

Where U was recorded, recorded-u-batch stands for sample-u-batch, and for reward-u-batch if rewards were recorded.

The expected reward, if `price` is set:

    sample-e-batch ── reward-e-batch ──────────────────────────────────────────┬─ price ── report
    score-e-batch, first-order-e, importance, path-integral, rescore-e-batch ─┤
    sample-e-batch, reward-e-batch ── reward-gradient ── reward-shares-u ─────┘

The step that the trainer took, if `post_mortem` is set:

    compute-update, entropy-gradient ── real-step ── importance ──┬─ post-mortem ── report
    recorded-u-batch, first-order-u, score-e-batch, first-order-e ┘

Interventions, if any are asked for:

    U, entropy-gradient, first-order-u ── half-sensitivities ── screen ─────────────┐
    E, U, half-sensitivities ── predict (interventions together) ───────────────────┼─ interventions ── report
    U, half-sensitivities ── altered-step (each that is measured) ── importance ────┘

The steps on one rollout, if `update.phase` is followed; each takes the last one as an input:

    U, compute-update ── phase-step ── phase-step ── …
                             │             │
    E ────────────────── importance ── importance ── … ── phase ── report

A rehearsal, if `lab.rehearse` asks for one; every batch is drawn from the policy after the steps before:

    U ── rehearsal-step ── U ── rehearsal-step ── U ── …
               │                     │
               E                     E ── … ── rehearsal ── report        E: sampled, scored and rewarded

Every stage that uses the policy reads it from the checkpoint, or from load-weights where its weights are in shards.

A stage is a function `(out, execution, **inputs) → summary`. Its keyword arguments are exactly the contents of its key,
so it cannot read a setting that is missing from the key. `execution` holds settings that do not affect the result, and
is in no key. Each stage has its own file here, and there are no other files; shared code is in the packages below.

`pipeline.catalogue` lists all stages. `pipeline.measure` runs the stages that need the policy of a checkpoint, and
`pipeline.sweep` the others.

Symbols: E evaluation batch, U update batch; θ parameters of the checkpoint, v optimizer step per unit of learning rate,
η step size; ℓ log-probability of a token and h its entropy, both in nats; dots are derivatives along v.
"""
