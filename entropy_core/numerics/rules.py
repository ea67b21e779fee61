"""The optimizers whose next step is known, by name."""

from entropy_core.numerics.adafactor import AdafactorHyperparameters, AdafactorState, AdafactorStep
from entropy_core.numerics.adamw import AdamHyperparameters, AdamState, NextStep
from entropy_core.numerics.lion import LionHyperparameters, LionState, LionStep
from entropy_core.numerics.muon import MuonHyperparameters, MuonState, MuonStep
from entropy_core.numerics.next_step import Rule
from entropy_core.numerics.sgd import SGDHyperparameters, SGDState, SGDStep

RULES = {
    "adamw": Rule("AdamW", AdamHyperparameters, AdamState, NextStep),
    "sgd": Rule("SGD", SGDHyperparameters, SGDState, SGDStep, counts=False),
    "lion": Rule(
        "Lion",
        LionHyperparameters,
        LionState,
        LionStep,
        counts=False,
        no_interval="a step of Lion depends on nothing but signs, so that its derivative says nothing of other batches",
        has_after=False,
    ),
    "adafactor": Rule(
        "Adafactor", AdafactorHyperparameters, AdafactorState, AdafactorStep, elementwise=False, has_after=False
    ),
    "muon": Rule("Muon", MuonHyperparameters, MuonState, MuonStep, elementwise=False, counts=False),
}
"""Name in `groups.json` → rule."""
