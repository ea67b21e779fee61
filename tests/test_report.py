"""What people look at: the page has the numbers, and every kind of sweep can be drawn, the same way each time."""

import re
from typing import Any
from xml.etree import ElementTree

import pytest
from matplotlib.figure import Figure

from entropy_core.estimates.tables import RESULTS, TABLES
from entropy_core.report import figures, glyphs, tokens_in_text
from entropy_core.report import page as report
from entropy_core.report.verdict_lines import order_sentences

NOTHING: dict[str, list[dict[str, Any]]] = {name: [] for name in TABLES}
ETAS = (0.0, 0.01, 0.3, 1.0, 3.0)
END = ("low", "high")
WIDTHS = {"this": 5, "mean": 4, "next": 2}  # the intervals' half widths, as parts of δH₁
MEASURED = (
    *("delta_h", "delta_h_se", "curvature", "curvature_se", "paired_difference", "paired_difference_se"),
    *("p_this_update", "p_mean_update"),
    *(f"delta_h_{name}_update_{end}" for name in WIDTHS for end in ("low", "high")),
)


def row(checkpoint: str, step: int, multiple: float, normalization: str, estimator: str) -> dict[str, Any]:
    """A row as the variance stage makes them, with δH₁ = −0.02 at the learning rate."""
    size = -0.02 * multiple
    values: dict[str, Any] = dict.fromkeys(RESULTS.names, 0.001 * abs(multiple))
    return values | {
        "checkpoint": checkpoint,
        "step": step,
        "eta": multiple * 2e-4,
        "eta_over_lr": multiple,
        "learning_rate": 2e-4,
        "normalization": normalization,
        "estimator": estimator,
        "H": 1.25 - 0.01 * step,
        "H_se": 0.01,
        "confidence_level": 0.95,
        "delta_h1": size,
        **{f"{name}_update_low": size - abs(size) / part for name, part in WIDTHS.items()},
        **{f"{name}_update_high": size + abs(size) / part for name, part in WIDTHS.items()},
        **{f"delta_h_{name}_update_low": 0.9 * size - abs(size) / part for name, part in WIDTHS.items()},
        **{f"delta_h_{name}_update_high": 0.9 * size + abs(size) / part for name, part in WIDTHS.items()},
        "interval_over_u": "valid",
        "delta_h2": 0.09 * abs(size) * multiple,
        "delta_h12": size * (1 - 0.09 * multiple),
        "second_order": "resolved",
        "delta_h12_interval_over_u": "valid",
        "remainder": -0.01 * size * multiple,
        **{f"delta_h12_{name}_update_low": 0.91 * size - abs(size) / part for name, part in WIDTHS.items()},
        **{f"delta_h12_{name}_update_high": 0.91 * size + abs(size) / part for name, part in WIDTHS.items()},
        "interval_over_e": "valid",
        "sampler": "policy",
        **{f"sign_{name}_update": "negative" for name in WIDTHS},
        "linearity": "undecided",
        "above_rounding": True,
        "weights_reliable": True,
        "delta_h": size * (1 - 0.1 * multiple),
        "delta_h_se": abs(size) / 10,
        "ess_fraction": 0.9,
        "n_sequences": 4096,
        "n_prompts_u": 64,
        "verdict": "resolved" if multiple else "reference",
        "rule": "a rule",
        "gradient_check": 1.5e-7,
        "mean_score_z": 0.75,
        "noise_floor": 2e-8 * multiple,
        "excess_kurtosis": 1.0,
        "largest_influence": 0.01,
        "truncated_fraction": 0.125,
        "clip_factor": 0.5,
        "equal_reward_fraction": 0.25,
    }


def sweep(
    steps: tuple[int, ...] = (6, 12),
    etas: tuple[float, ...] = ETAS,
    normalizations: tuple[str, ...] = ("per_token", "per_sequence"),
    estimators: tuple[str, ...] = ("per_decision", "snis"),
) -> list[dict[str, Any]]:
    return [
        row(f"checkpoint-{step}", step, eta, normalization, estimator)
        for step in steps
        for normalization in normalizations
        for eta in etas
        for estimator in estimators
    ]


def without_measurement(rows: list[dict[str, Any]], from_eta: float) -> list[dict[str, Any]]:
    """What overflowed weights leave."""
    null = dict.fromkeys((*MEASURED, "minimum_detectable"))
    lost = null | {"verdict": "weights-unreliable", "ess": 0.0, "ess_fraction": 0.0, "weights_reliable": False}
    return [row | lost if row["eta_over_lr"] >= from_eta and row["eta"] else row for row in rows]


SWEEPS = {
    "usual": sweep(),
    "one checkpoint": sweep(steps=(6,)),
    "four checkpoints": sweep(steps=(6, 12, 18, 24), etas=(0.0, 1.0)),
    "one step size": sweep(etas=(1.0,)),
    "one row": sweep((6,), (1.0,), ("per_token",), ("snis",)),
    "only eta 0": sweep(etas=(0.0,)),
    "both directions": sweep(etas=(-1.0, 0.0, 1.0)),
    "some rows null": without_measurement(sweep(), 3.0),
    "null at the learning rate": without_measurement(sweep(), 1.0),
    "every measurement null": without_measurement(sweep(etas=(1.0, 3.0)), 1.0),
    "null but for eta 0": without_measurement(sweep(), 0.0),
    "one checkpoint null": sweep(steps=(6,)) + without_measurement(sweep(steps=(12,), etas=(1.0,)), 1.0),
    "no effect at all": [
        row | {"delta_h": 0.0, "delta_h1": 0.0, "this_update_low": 0.0, "this_update_high": 0.0} for row in sweep()
    ],
}


@pytest.fixture(params=SWEEPS.values(), ids=SWEEPS.keys())
def rows(request) -> list[dict[str, Any]]:
    return request.param


def written(drawn: dict[str, Figure], folder) -> dict[str, bytes]:
    folder.mkdir()
    for name, figure in drawn.items():
        figures.save_figure(figure, folder / f"{name}.png", folder / f"{name}.svg")
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_every_sweep_can_be_drawn(rows):
    drawn = figures.figures(rows)
    assert sorted(drawn) == ["eta_sweep", "prediction", "training"]
    for figure in drawn.values():
        figure.draw_without_rendering()


def test_a_checkpoint_may_have_any_name():
    rows = [row | {"checkpoint": "$\\frac{_^$ & <b>"} for row in SWEEPS["one row"]]
    for figure in figures.figures(rows).values():
        figure.draw_without_rendering()


def test_equal_rows_give_equal_files(tmp_path):
    rows = sweep(steps=(6,), etas=(0.0, 1.0))

    def drawn() -> dict[str, Figure]:
        return figures.figures(rows) | {"tokens": figures.token_figure(*tokens_of(TEXTS[:2]), rows, "checkpoint-6")}

    first, second = (written(drawn(), tmp_path / name) for name in ("first", "second"))
    assert {name.partition(".")[0] for name in first} == {"prediction", "eta_sweep", "training", "tokens"}
    assert first == second
    for name, content in first.items():
        assert content.startswith(b"\x89PNG" if name.endswith("png") else b"<?xml")
        assert not re.search(rb"matplotlib v?\d|\d{4}-\d{2}-\d{2}T", content)


def test_drawing_leaves_the_settings_of_a_notebook_alone():
    import matplotlib

    before = dict(matplotlib.rcParams)
    figures.figures(SWEEPS["one row"])
    assert dict(matplotlib.rcParams) == before


def test_what_was_measured_is_in_the_sweep_of_its_checkpoint():
    figure = figures.figures(without_measurement(sweep(steps=(6, 12, 18, 24)), 3.0))["eta_sweep"]
    assert [axes.get_title() for axes in figure.axes] == [f"checkpoint-{step}" for step in (6, 12, 18, 24)]
    for axes in figure.axes:
        of_one = [bars for bars in axes.containers if bars.lines[0].get_marker() == "o"]
        assert [bars.lines[0].get_ydata()[0] for bars in of_one] == pytest.approx([0.999, 0.97, 0.9])
        assert len(axes.containers) == 2 * len(of_one)


def test_a_checkpoint_without_a_measurement_keeps_its_place():
    figure = figures.figures(SWEEPS["one checkpoint null"])["eta_sweep"]
    panel = next(axes for axes in figure.axes if axes.get_title() == "checkpoint-12")
    assert not panel.containers and [text.get_text() for text in panel.texts] == ["ΔH not measured"]


# --- the tokens ------------------------------------------------------------------------------------------------------

TEXTS = [["12", "+", "7", "=", "19", "<eos>"], ["a", "$x_1$", " costs $5", "\n", "\t", "", "-->"], ["1"] * 100]


def tokens_of(texts: list[list[str]]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Tokens and sequences as first-order-u has them; shares are 1, −2, 3, …, in the next sequence twice that."""
    tokens = [
        {"sequence_id": i, "position": k, "text": text, "share_per_token": (i + 1) * (k + 1) * (-1.0) ** k}
        for i, sequence in enumerate(texts)
        for k, text in enumerate(sequence)
    ]
    sequences = [
        {"sequence_id": i, "prompt": f"{i}+{i}=\n", "reward": 0.5, "advantage": -0.25} for i in range(len(texts))
    ]
    return tokens, sequences


def test_the_strongest_token_of_each_sequence_is_shown():
    texts = [["a", "b", "c"], ["d", "e", "f"]]
    lowering, raising = tokens_in_text.passages(*tokens_of(texts), "share_per_token")
    assert (lowering.texts, lowering.shares) == (("d", "e", "f"), (2.0, -4.0, 6.0))  # −4 is the lowest of all
    assert raising.texts == ("a", "b", "c")
    assert raising.title == "0+0=↵   reward 0.5, A -0.25"


def test_at_most_four_of_each_sign_are_shown_from_different_sequences():
    shown = tokens_in_text.passages(*tokens_of([["a", "b", "c"]] * 20), "share_per_token")
    assert len(shown) == 8
    assert len({passage.title.partition("=")[0] for passage in shown}) == 8


def test_a_long_response_is_cut_around_its_token():
    texts = ["x"] * 300
    tokens, sequences = tokens_of([texts])
    tokens[150]["share_per_token"] = -1e6
    (passage,) = tokens_in_text.passages(tokens, sequences, "share_per_token")
    assert -1e6 in passage.shares
    assert sum(map(glyphs.cells, passage.texts)) <= tokens_in_text.LONGEST_LINE


@pytest.mark.parametrize(
    "texts",
    [
        TEXTS,
        [["$", "$$", "\\frac{", "^_{", "&<>\"'", "]]>", "--"]],
        [["\x00", "\x07", "\x1b[0m", "\r", "\x0c", "\u2028", "\ud800", "\ufeff"]],
        [["a" * 500]],
        [["é", "ß", "η", "“", "�"]],
    ],
    ids=["usual", "markup", "control", "long", "letters"],
)
def test_every_token_can_be_drawn(texts, tmp_path):
    figure = figures.token_figure(*tokens_of(texts), SWEEPS["one row"], "$\\frac$")
    files = written({"tokens": figure}, tmp_path / "figures")
    ElementTree.fromstring(files["tokens.svg"])


def test_no_contribution_at_all_can_be_drawn():
    tokens, sequences = tokens_of(TEXTS)
    silent = [token | {"share_per_token": 0.0} for token in tokens]
    assert tokens_in_text.passages(silent, sequences, "share_per_token") == []
    figures.token_figure(silent, sequences, SWEEPS["one row"], "checkpoint-6").draw_without_rendering()


# --- the page --------------------------------------------------------------------------------------------------------


def table_of(page: str, heading: str) -> list[list[str]]:
    """The cells of the first table after a heading, without its rule."""
    lines = page.partition(f"## {heading}\n")[2].splitlines()
    table = [line for line in lines[: lines.index("", 1)] if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in (table[0], *table[2:])]


def test_the_page_has_every_row_of_its_normalization():
    page = report.markdown("demo", sweep(), NOTHING, ["Something was assumed."])
    head, *body = table_of(page, "Results")
    assert head == list(report.COLUMNS.values())
    assert len(body) == 2 * len(ETAS) * 2
    assert {len(cells) for cells in body} == {len(head)}
    cells = dict(zip(head, body[6], strict=True))
    assert cells == {
        "checkpoint": "checkpoint-6",
        "η / lr": "1",
        "estimator": "per_decision",
        "H": "1.190",
        "δH₁": "-0.02",
        "δH₁, this update": "[-0.024, -0.016]",
        "δH₁, mean update": "[-0.025, -0.015]",
        "δH₁, next update": "[-0.03, -0.01]",
        "δH₁ + δH₂": "-0.0182",
        "δH₁ + δH₂, this update": "[-0.0222, -0.0142]",
        "δH₁ + δH₂, next update": "[-0.0282, -0.0082]",
        "ΔH": "-0.018",
        "ΔH, this update": "[-0.022, -0.014]",
        "ΔH, next update": "[-0.028, -0.008]",
        "ΔH − δH₁": "+0.001",
        "SE": "0.001",
        "ESS/N": "0.900",
        "verdict": "resolved",
    }
    assert "(per_token); intervals at 95 %" in page
    assert page.endswith("## Assumptions\n\n- Something was assumed.\n")


def test_the_page_says_it_first_and_in_a_sentence():
    page = report.markdown("demo", sweep(), NOTHING, [])
    said = "- **checkpoint-12**: H = 1.1300; this step of 1 × lr changes it by "
    assert f"{said}δH₁ + δH₂ = -0.0182 [-0.0222, -0.0142], the next one [-0.0282, -0.0082]; " in page
    assert "; measured for this step: -0.018 [-0.022, -0.014] (resolved)" in page
    page = report.markdown("demo", [row | {"second_order": "unresolved"} for row in sweep()], NOTHING, [])
    assert f"{said}δH₁ = -0.02 [-0.024, -0.016], the next one [-0.03, -0.01]; measured" in page
    assert page.index("**checkpoint-12**") < page.index("## Results")
    assert "## Assumptions" not in page


def orders(**changes: Any) -> str:
    (said,) = order_sentences([row("checkpoint-6", 6, 1.0, "per_token", "snis") | {"delta_h1": -0.02} | changes])
    return said


def test_what_the_orders_leave_is_said_in_a_sentence():
    curvature = "the curvature is δH₂ = +0.0018 [+0.001, +0.001]"
    assert orders() == (
        f"checkpoint-6, 1 × lr: the change is 10% smaller than predicted at first order; {curvature}; with it the "
        "prediction is within 1.1%."
    )
    assert "is 5.0% larger than predicted at first order" in orders(delta_h=-0.021)
    assert "the change is as the first order predicts it; " in orders(delta_h=-0.02)
    assert "the change is +0.01, and the first order predicts -0.02; " in orders(delta_h=0.01)
    assert orders(second_order="unresolved").endswith(f"at first order; {curvature}, which may be none.")
    none = orders(second_order="none: …", delta_h2=None, delta_h12=None, remainder=None)
    assert none.endswith("at first order; there is no δH₂: at no step size but 0 are the weights reliable.")
    for unknown in ({"weights_reliable": False}, {"sign_this_update": "unknown"}, {"delta_h1": 0.0}):
        assert f"the change is not measured well enough to compare; {curvature}." in orders(**unknown)


def test_the_page_links_the_figures_by_file_name():
    rows = sweep()
    linked = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", report.markdown("demo", rows, NOTHING, []))
    assert sorted(linked) == sorted(f"{name}.png" for name in (*figures.figures(rows), "tokens"))


def test_every_sweep_has_a_page(rows):
    page = report.markdown("demo", rows, NOTHING, [])
    shown = [row for row in rows if row["normalization"] == rows[0]["normalization"]]
    assert len(table_of(page, "Results")) == 1 + len(shown)
    assert len(table_of(page + "\n", "Checks")) == 1 + len({row["checkpoint"] for row in rows})
    assert not re.search(r"\bnan\b|\bNone\b|\binf\b", page)


def test_the_page_says_what_could_not_be_measured():
    page = report.markdown("demo", SWEEPS["every measurement null"], NOTHING, [])
    assert "measured for this step: not measurable (weights-unreliable)" in page
    assert table_of(page, "Results")[1][-7:-2] == ["–"] * 5


def test_the_largest_noise_floor_is_shown():
    checks = table_of(report.markdown("demo", sweep(), NOTHING, []) + "\n", "Checks")
    assert dict(zip(*checks[:2], strict=True))["largest noise floor"] == "6.0e-08"


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("delta_h", None, "–"),
        ("delta_h", 0.0, "0"),
        ("delta_h1", -0.0, "0"),
        ("delta_h", 1.23456e-5, "+1.235e-05"),
        ("delta_h_se", 1.23456e-5, "1.23e-05"),
        ("se_over_u", 0.5, "0.5"),
        ("H", 1.23456, "1.235"),
        ("eta_over_lr", 0.01, "0.01"),
        ("ess_fraction", 1.0, "1.000"),
        ("step", 12, "12"),
        ("verdict", "resolved", "resolved"),
    ],
)
def test_cells_are_rounded(name, value, text):
    assert report.format_value(name, value) == text


def test_without_a_valid_interval_over_u_none_is_printed_and_the_page_says_why():
    reason = "no valid interval over U: 3 prompts of U have unequal rewards, and it takes 8"
    prefixes = ("", "delta_h12_", "delta_h_")
    none = {f"{of}{name}_update_{end}": None for of in prefixes for name in ("mean", "next") for end in END}
    none |= {"interval_over_u": reason, "delta_h12_interval_over_u": reason, "p_mean_update": None}
    rows = [row | none for row in sweep()]
    page = report.markdown("demo", rows, NOTHING, [])
    assert f"**checkpoint-6: {reason}.**" in page and f"[-0.0222, -0.0142], {reason}; measured" in page
    head, *body = table_of(page, "Results")
    for cells in body:
        named = dict(zip(head, cells, strict=True))
        assert named["δH₁, mean update"] == named["δH₁, next update"] == named["ΔH, next update"] == "–"
    for figure in figures.figures(rows).values():
        figure.draw_without_rendering()


def test_the_p_values_of_the_checkpoints_are_adjusted_together():
    rows = sweep(steps=(6, 12, 18), etas=(0.0, 1.0))
    rows = [row | {"p_this_update": 0.01 * row["step"] / 6, "p_mean_update": None} for row in rows]
    page = report.markdown("demo", rows, NOTHING, [])
    lines = page.partition("p, this update")[2].splitlines()
    assert [line.split(" | ")[1:4] for line in lines[2:5]] == [
        ["0.01", "0.03", "0.03"],
        ["0.02", "0.04", "0.03"],
        ["0.03", "0.04", "0.03"],
    ]
