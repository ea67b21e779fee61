"""The stages: (upstream artifacts, result-affecting values) → artifact. No Prefect here.

    load-prompts ── sample-e-batch ─┬─ score-e-batch ── entropy-gradient (∇H of two halves) ─┐
                                    │  rescore-e-batch (rounding) ───────────────────────────┼──────────────┐
    load-prompts ── sample-u-batch ─┼─ reward-u-batch ─┐                                     │              │
                                    │  score-u-batch ──┼─ compute-update ─┬─ first-order-u ──┘ ─────────────┤
    load-checkpoint ────────────────┘──────────────────┘                  ├─ first-order-e (calibrate) ──────┼─ variance
                                                                          ├─ importance (per η) ─────────────┤     │
                                                                          └─ path-integral (per η) ──────────┘   report

A stage is a function `(out, execution, **inputs) → summary`. Its keyword arguments are exactly what goes into its key,
so it cannot read a setting that the key does not know; `execution` says how to compute and is in no key. Each stage
has a file of its own name here, and nothing else is here: what several of them need is in the rooms below.

`pipeline.catalogue` names them all, `pipeline.measure` has the order of those that need the policy of a checkpoint, and
`pipeline.sweep` that of the rest.
"""
