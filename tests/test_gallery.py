"""The figures at their extremes: 1, 5 and 40 checkpoints, every script, no measurement, no unit that fits on an axis.

`GALLERY=folder pytest tests/test_gallery.py` leaves them there, to be looked at.
"""

import os
import re
import unicodedata
from functools import cache
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib import colormaps
from matplotlib.backends.backend_agg import RendererAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.transforms import Bbox
from test_report import MEASURED, row, sweep, tokens_of, without_measurement

from entropy_core.report import figures, glyphs, ratios
from entropy_core.report.comparison_figure import comparison_figure
from entropy_core.report.drawing import BY_STEP, MARKERS, Training
from entropy_core.report.rehearsal_figure import rehearsal_figure

ETAS = (0.0, 0.01, 0.1, 0.3, 1.0, 3.0)
CHAT = ["<|im_start|>", "assistant", "\n", "<think>", "\n", "The", " answer", " is", " 42", "</think>", "<|im_end|>"]
SCRIPTS = {
    "chinese": ["我们", "首先", "计算", "三", "加", "四", "，", "得到", "七", "。", "<|im_end|>"],
    "arabic": ["أولا", " ن", "حسب", " مجموع", " العددين", "،", " وهو", " سبعة", "<eos>"],
    "hebrew": ["ראשית", " נ", "חשב", " את", " הסכום", "שָׁלוֹם", "<eos>"],
    "hindi": ["पहले", " हम", " जोड़", "ते", " हैं", "।", "<eos>"],
    "emoji": ["👩‍👩‍👧", "🎉", "�", "\ufeff", "e\u0301", "\u0301", "<eos>"],
    "chat": CHAT,
    "long": ["word" * 60, " 长" * 80, "x"],
    "digits": list("12+30=42"),
}


def training_run(
    count: int, size: float = 1.0, name: str = "checkpoint-{}", noise: float = 0.0
) -> list[dict[str, Any]]:
    """A run whose entropy falls towards 0, with curvature that grows along it, as rows of one normalisation."""
    random = np.random.default_rng(1)
    rows = []
    for k in range(count):
        step = 25 * (k + 1)
        H, h1 = size * 1.2 * 0.93**k, -size * 0.002 * 0.93**k
        for eta in ETAS:
            shared, bent = random.normal() * noise, 0.03 + 0.1 * k / max(count - 1, 1)
            for estimator in ("per_decision", "snis"):
                first = h1 * eta
                measured = first * (1 - bent * eta) * (1 + 0.3 * shared)
                changes = {"H": H, "H_se": 0.01 * H, "delta_h1": first, "delta_h": measured}
                changes |= {
                    "delta_h12": first * (1 - bent * eta),
                    "paired_difference_se": abs(first) * 0.01 * (1 + eta),
                }
                for prefix, center in (("", first), ("delta_h12_", changes["delta_h12"]), ("delta_h_", measured)):
                    for update, part in (("this", 0.08), ("mean", 0.2), ("next", 0.35)):
                        changes[f"{prefix}{update}_update_low"] = center - part * abs(first)
                        changes[f"{prefix}{update}_update_high"] = center + part * abs(first)
                changes["weights_reliable"] = eta < 3 or k % 3 > 0
                rows.append(row(name.format(step), step, eta, "per_token", estimator) | changes)
    return rows


def logged(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The entropy that the trainer logged, 10 % above the probe's."""
    values = {row["checkpoint"]: row["H"] for row in rows}
    return [{"checkpoint": name, "quantity": "entropy", "trainer": 1.1 * value} for name, value in values.items()]


RUNS = {
    "one": training_run(1),
    "five": training_run(5),
    "six": training_run(6),
    "forty": training_run(40, noise=0.1),
    "tiny": training_run(5, size=1e-6),
    "huge": training_run(5, size=4e4),
    "noisy": training_run(5, noise=5.0),
    "cjk-names": training_run(5, name="实验/检查点-{}"),
    "rtl-names": training_run(5, name="نقطة-{}"),
    "long-names": training_run(6, name="qwen2.5-1.5b-grpo-gsm8k-lr1e-6-seed3/checkpoint-{}"),
    "markup-names": training_run(5, name="$\\frac{{_^$ & <b>{}"),
    "nothing-measured": without_measurement(training_run(5), 0.0),
    "forty-unmeasured": without_measurement(training_run(40), 0.0),
    "measured-in-part": without_measurement(training_run(5), 0.3),
    "both-directions": sweep(steps=(6, 12), etas=(-1.0, -0.3, 0.0, 0.3, 1.0), normalizations=("per_token",)),
    "one-step-size": sweep(steps=(6, 12), etas=(1.0,)),
    "only-zero": sweep(steps=(6, 12), etas=(0.0,)),
    "no-effect": [row | dict.fromkeys((*MEASURED, "delta_h1", "delta_h12"), 0.0) for row in training_run(5)],
    "all-estimators": [
        row
        for one in training_run(5)
        if one["estimator"] == "snis"
        for row in [one | {"estimator": name} for name in ratios.ESTIMATORS]
    ],
    "per-sequence": [row | {"normalization": "per_sequence", "H": 90 * row["H"]} for row in training_run(5)],
}


def interventions_of(count: int, margin: float = 1e-4) -> list[dict[str, Any]]:
    verdicts = ("acts", "acts", "does not act", "cannot tell", "does not act")
    names = (
        "as it is",
        "entropy_advantage: 0.4",
        "kl_beta: 0.05",
        "dynamic_sampling",
        "clip_high: 0.28 及 更长的名字名字名字",
    )
    rows = []
    for k in range(count):
        for number, (name, verdict) in enumerate(zip(names, verdicts, strict=True)):
            difference = (5e-4, 3e-4, 5e-5, -2e-4, -3e-5)[number] * (name != "as it is")
            for level in ("screen", "measure"):
                ends = {"low": difference - 1e-4, "high": difference + 1e-4}
                verdict = "as it is" if name == "as it is" else verdict
                rows.append(
                    {"checkpoint": f"checkpoint-{k}", "intervention": name, "level": level, "verdict": verdict}
                    | {"difference": difference, "margin": margin, "normalization": "per_token"}
                    | ends
                )
    return rows


def rehearsal_of(count: int, seeds: int, rewarded: bool = True) -> list[dict[str, Any]]:
    """Rows of all seeds together, under so many interventions."""
    names = [
        "as it is",
        "entropy_advantage: 0.4",
        "loss: luspo",
        "lr: 0.5",
        "dynamic_sampling",
        "pass_rate: [0.2, 0.8]",
    ]
    rows = []
    for place, name in enumerate(names[: count + 1]):
        for step in range(0, 9, 2):
            H = 0.17 - 0.002 * step * (1 - 0.2 * place)
            row = {"checkpoint": "checkpoint-30", "step": 30, "normalization": "per_token", "replicate": None}
            row |= {"intervention": name, "rehearsal_step": step, "floor": 0.16, "difference": 0.0004 * step * place}
            for of, value, half in (("H", H, 0.001), ("J", 0.5 + 0.01 * step, 0.02)):
                known = of == "H" or rewarded
                ends = {
                    f"{of}_{end}": value + sign * half if known else None for end, sign in (("low", -1), ("high", 1))
                }
                band = {f"{of}_run_{end}": value + 3 * sign * half for end, sign in (("low", -1), ("high", 1))}
                row |= {of: value if known else None} | ends
                row |= band if seeds > 1 and known else dict.fromkeys(band)
            rows.append(row)
    return rows


SWEPT = ("prediction", "eta_sweep", "training")
ONLY = {
    **dict.fromkeys(("six", "noisy", "measured-in-part", "both-directions", "all-estimators"), ("eta_sweep",)),
    **dict.fromkeys(("tiny", "huge"), ("prediction", "training")),
    **dict.fromkeys(("cjk-names", "rtl-names", "markup-names"), ("prediction",)),
    **dict.fromkeys(("long-names", "no-effect"), ("prediction", "eta_sweep")),
    **dict.fromkeys(("forty-unmeasured",), ("prediction", "eta_sweep")),
    **dict.fromkeys(("per-sequence",), ()),
}
"""Which figures show what is extreme about a run, where not all do."""
NAMES = [
    *(f"{which}-{name}" for name in RUNS for which in ONLY.get(name, SWEPT)),
    *(f"tokens-{name}" for name in (*SCRIPTS, "silent")),
    *(f"interventions-{count}" for count in (1, 5, 40)),
    *(f"comparison-{count}" for count in (1, 40)),
    *(f"rehearsal-{count}" for count in (0, 5)),
]
"""Every figure of the gallery, by file name."""


@cache
def swept(name: str) -> dict[str, Figure]:
    return figures.figures(RUNS[name], [] if name == "six" else logged(RUNS[name]))


@cache
def drawn(name: str) -> Figure:
    which, _, of = name.partition("-")
    if which in SWEPT:
        return swept(of)[which]
    if which == "interventions":
        return figures.intervention_figure(interventions_of(int(of)))
    if which == "rehearsal":
        return rehearsal_figure(rehearsal_of(int(of), seeds=1 + int(of), rewarded=of != "0"))
    if which == "comparison":
        series = {name: training_run(int(of), size) for name, size in (("demo-3710175b0557", 1.0), ("实验-b", 0.8))}
        return comparison_figure(series, [])
    texts = SCRIPTS.get(of, [])
    tokens, sequences = tokens_of([texts[k:] + texts[:k] for k in range(min(len(texts), 8))])
    for sequence in sequences:
        sequence["prompt"] = "".join(texts[:6]) + "?"
    return figures.token_figure(tokens, sequences, RUNS["one"], "".join([*texts[:1], " checkpoint-25"]))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    gallery = Path(os.environ.get("GALLERY") or tmp_path_factory.mktemp("gallery"))
    gallery.mkdir(parents=True, exist_ok=True)
    return gallery


def saved(figure: Figure, folder: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Bbox]]:
    """Write a figure; returns what is written on the PNG, and where, in its pixels."""
    found = []
    draw = Text.draw

    def noted(self: Text, renderer: Any, *arguments: Any, **named: Any) -> None:
        if isinstance(renderer, RendererAgg) and self.get_visible() and self.get_text().strip():
            found.append((self.get_text(), self.get_window_extent(renderer).frozen()))
        draw(self, renderer, *arguments, **named)

    with monkeypatch.context() as patch:
        patch.setattr(Text, "draw", noted)
        figures.save_figure(figure, folder / f"{name}.png", folder / f"{name}.svg")
    return found


@pytest.mark.parametrize("name", NAMES)
def test_a_figure_holds_what_it_says(name, folder, monkeypatch):
    """No text out of the canvas or over another, no missing glyph, no legend over data, no limit without end."""
    figure = drawn(name)
    written = saved(figure, folder, name, monkeypatch)  # a glyph that is missing is a warning, and so an error
    wide, high = 144 * figure.get_size_inches()
    for text, box in written:
        assert -2 <= box.x0 < box.x1 <= wide + 2 and -2 <= box.y0 < box.y1 <= high + 2, text
    for (text, box), (other, other_box) in combinations(written, 2):
        common = Bbox.intersection(box, other_box)
        assert common is None or min(common.width, common.height) <= 4, (text, other)
    for axes in figure.axes:
        assert np.isfinite([*axes.get_xlim(), *axes.get_ylim()]).all()
        for legend in figure.legends:
            common = Bbox.intersection(axes.get_window_extent(), legend.get_window_extent())
            assert common is None or common.height < 1
    assert (folder / f"{name}.png").stat().st_size < 2e6


def test_forty_checkpoints_are_told_apart_by_a_colour_scale_and_few_by_name():
    for name, few in (("five", True), ("six", True), ("forty", False)):
        figure = drawn(f"prediction-{name}")
        labels = [text.get_text() for legend in figure.legends for text in legend.get_texts()]
        scales = [axes for axes in figure.axes if axes.get_ylabel() == "training step"]
        assert ("checkpoint-50" in labels, len(scales)) == (few, 0 if few else 1)
        assert len(labels) <= 7


def grey(colour: Any) -> float:
    """Lightness as the eye sees it, from 0 to 100 (CIE L*)."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(colour)]
    y = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return 116 * y ** (1 / 3) - 16 if y > 0.008856 else 903.3 * y


def deuteranopic(colour: Any) -> np.ndarray:
    """The colour as seen without the middle cones (Machado, Oliveira and Fernandes, 2009)."""
    matrix = [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]]
    return np.asarray(matrix) @ np.asarray(to_rgb(colour))


def test_the_training_goes_from_dark_to_light_also_in_grey_and_never_too_light():
    lightness = [grey(BY_STEP(k / 39)) for k in range(40)]
    assert all(after - before > 0.5 for before, after in pairwise(lightness))
    assert lightness[-1] < 88
    assert all(
        np.linalg.norm(deuteranopic(BY_STEP(k / 5)) - deuteranopic(BY_STEP((k + 1) / 5))) > 0.08 for k in range(5)
    )


def test_few_checkpoints_and_estimators_have_a_marker_each():
    looks = Training(RUNS["six"]).looks
    assert len({look.marker for look in looks.values()}) == 6 == len(MARKERS)
    assert len({marker for _, marker in ratios.ESTIMATORS.values()}) == len(ratios.ESTIMATORS)


def test_the_sign_of_a_token_is_not_its_colour_alone():
    axes = drawn("tokens-digits").axes[0]
    bars = [patch for patch in axes.patches if patch.get_facecolor() == (0, 0, 0, 1)]
    cells = [patch for patch in axes.patches if patch.get_facecolor() != (0, 0, 0, 1)]
    assert len(bars) == len(cells)
    for bar, cell in zip(bars, cells, strict=True):
        red, _, blue, _ = cell.get_facecolor()
        below = bar.get_y() < cell.get_y() + 0.3
        assert below == (red > blue)
    assert colormaps["RdBu"](0.0)[0] > colormaps["RdBu"](0.0)[2]


def test_axes_say_the_unit_and_its_power_of_ten():
    def label(name: str, which: int = 0) -> str:
        return drawn(name).axes[which].get_ylabel()

    assert label("prediction-five") == "measured ΔH [10⁻³ nats per token]"
    assert label("prediction-huge") == "measured ΔH [nats per token]"
    assert label("training-five") == "entropy [nats per token]"
    assert label("training-tiny") == "entropy [10⁻⁶ nats per token]"
    assert label("training-huge") == "entropy [10³ nats per token]"
    assert label("training-per-sequence") == "entropy [nats per sequence]"
    assert label("training-five", 1) == "change by a step of 1 × lr\n[10⁻³ nats per token]"
    ticks = [text.get_text() for text in drawn("prediction-tiny").axes[0].get_yticklabels()]
    assert all(re.fullmatch(r"−?\d+(\.\d{1,2})?", text) for text in ticks)


def test_the_points_are_the_ratio_of_the_measured_to_the_predicted_change():
    panel = drawn("eta_sweep-five").axes[0]
    values = {
        float(container.lines[0].get_xdata()[0]): float(container.lines[0].get_ydata()[0])
        for container in panel.containers
        if container.lines[0].get_marker() == "o"
    }
    assert list(values.values()) == pytest.approx([1 - 0.03 * eta for eta in ETAS if eta])
    assert list(values) == pytest.approx([eta for eta in ETAS if eta], rel=0.2)  # beside those of the other estimator
    band = next(patch for patch in panel.patches if "within 5%" in str(patch.get_label()))
    assert (band.get_y(), band.get_height()) == pytest.approx((0.95, 0.1))


def test_the_predicted_steps_go_from_each_entropy_to_the_next_checkpoint():
    axes = drawn("training-five").axes[0]
    lines = [line.get_xydata().tolist() for line in axes.lines if "each step" in str(line.get_label())]
    first = [row for row in RUNS["five"] if row["eta_over_lr"] == 1 and row["estimator"] == "per_decision"]
    assert lines == [
        pytest.approx(np.array([[row["step"], row["H"]], [row["step"] + 25, row["H"] + 25 * row["delta_h1"]]]))
        for row in first
    ]


def test_the_trainers_entropy_is_drawn_where_it_is_logged_per_token():
    def values(name: str) -> list[float]:
        lines = drawn(name).axes[0].lines
        return [y for line in lines if line.get_label() == "logged by the trainer" for y in line.get_ydata()]

    assert values("training-five") == pytest.approx([1.1 * 1.2 * 0.93**k for k in range(5)])
    assert values("training-six") == values("training-per-sequence") == []


# --- scripts ---------------------------------------------------------------------------------------------------------


def test_what_no_font_has_is_a_box_and_the_figure_says_so(monkeypatch):
    monkeypatch.setattr(glyphs, "_others", tuple)
    figure = figures.token_figure(*tokens_of([["三", "=3"]]), RUNS["one"], "三")
    said = [text.get_text() for axes in figure.axes for text in axes.texts]
    assert "□" in said and "=3" in said
    assert "□: no font here has it" in figure.axes[1].get_xlabel()
    assert "□" not in drawn("tokens-digits").axes[1].get_xlabel()


def test_fonts_of_the_machine_are_used_for_what_the_usual_one_lacks(monkeypatch):
    monkeypatch.setattr(glyphs, "_others", lambda: ("none of it", "two of it", "one of it"))
    characters = {"DejaVu Sans": "abc", "two of it": "三四", "one of it": "四五", "none of it": "x"}
    monkeypatch.setattr(glyphs, "_characters", lambda family: frozenset(map(ord, characters[family])))
    assert glyphs.families("abc") == ["DejaVu Sans"]
    assert glyphs.families("a三四") == ["DejaVu Sans", "two of it"]
    assert glyphs.families("a三四五六") == ["DejaVu Sans", "two of it", "one of it"]
    assert glyphs.drawable("a三六\n", glyphs.families("a三六")) == "a三□□"


def test_columns_are_counted_and_cut_by_width():
    assert [glyphs.cells(text) for text in ("ab", "三四", "e\u0301", "")] == [2, 4, 1, 0]
    assert glyphs.cut("三四五", 6) == "三四五" and glyphs.cut("三四五", 5) == "三四…"
    assert glyphs.cut("abcdef", 4, "end") == "…def" and glyphs.cut("abcdef", 5, "both") == "ab…ef"
    assert unicodedata.category("\u0301") == "Mn"
