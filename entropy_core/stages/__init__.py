"""The stages: (upstream artifacts, result-affecting values) → artifact. No Prefect here.

    load-checkpoint ───────────────┐
    load-prompts ─┬─ sample-e-batch│── score-e-batch ─┬─ entropy-gradient ──────┐
                  │                │                  ├─ first-order-e ─────────┤
                  └─ sample-u-batch┴─ reward-u-batch ── compute-update ─┬───────┼─ first-order-u ─┐
                                                                        └─ importance (per η) ───┼─ variance ─ report
                                                      rescore-e-batch (rounding) ────────────────┘
A stage is a function `(out, execution, **inputs) → summary`. Its keyword arguments are exactly what goes into its key,
so it cannot read a setting that the key does not know; `execution` says how to compute and is in no key. Each stage
has a module of its own, so that an edit reaches only the stages that import it.

`catalogue` names them all, `pipeline` puts them in order.
"""
