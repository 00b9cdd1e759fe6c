"""Tables of a comparison: pooled lines, wins, and LaTeX that a compiler would take."""

from __future__ import annotations

import re

import pytest

from medaug.grading.tables import class_rows, interval, latex_escape, latex_table, markdown_table, table_rows, won

METRIC = "balanced_accuracy"


def row(arm, network, seed, score, validation=None):
    metrics = dict.fromkeys(("accuracy", "macro_f1", "auc", "quadratic_kappa", "grade_mae", "ece"))
    return {
        "arm": arm, "network": network, "seed": seed, "num_training": 10, "ratio": 0, "image_passes": 5,
        "test": {"metrics": metrics | {METRIC: score}},
        "validation": None if validation is None else {"metrics": metrics | {METRIC: validation}},
    }  # fmt: skip


def difference(value):
    return {"difference": value, "low": value - 0.1, "high": value + 0.1, "p_value": 0.5}


ROWS = [row(arm, network, seed, score + 0.1 * seed, 0.5) for arm, network, score in (
    ("none", "n_1", 0.5), ("none", "k", 0.7), ("a_b", "n_1", 0.6), ("a_b", "k", 0.6)) for seed in (0, 1)]  # fmt: skip
VERDICT = {
    "a_b": {
        "against_none": difference(0.0), "against_control": difference(-0.05),
        "per_network": {"n_1": difference(0.1), "k": difference(-0.1)},
        "per_network_control": {"n_1": difference(0.05), "k": difference(-0.15)},
    }
}  # fmt: skip


def test_a_line_for_every_class():
    found = {name: difference(value) | {"score_a": 0.6, "score_b": 0.5} for name, value in (("one", 0.1), ("two", 0.2))}
    entry = {
        "per_class": [
            {"against_none": found["one"], "against_control": None},
            {"against_none": found["two"], "against_control": found["one"]},
        ]
    }
    first, second = class_rows({"a": entry}, ("x", "y"), (7, 9))
    assert (first["arm"], first["class"], first["images"], first["recall"], first["recall_none"]) == ("a", "x", 7, 0.6, 0.5)
    assert interval(first) == "+0.100 (+0.000 to +0.200)" and interval(first, "control_difference") == "–"
    assert interval(second, "control_difference") == interval(first)


def test_lines_of_networks_and_of_all():
    table = {(line["arm"], line["network"]): line for line in table_rows(ROWS, VERDICT)}
    assert list(table) == [(arm, network) for arm in ("none", "a_b") for network in ("n_1", "k", "all")]
    pooled = table["a_b", "all"]
    assert pooled[METRIC] == pytest.approx(0.65) and pooled["seeds"] == 2
    assert pooled[f"{METRIC}_std"] == pytest.approx(0.1 / 2**0.5)  # of the two seeds' means over networks, 0.6 and 0.7
    assert (pooled["won"], pooled["num_networks"], pooled["control_difference"]) == (1, 2, -0.05)
    assert [table["a_b", network]["won"] for network in ("n_1", "k")] == [1, 0]
    assert table["none", "all"]["difference"] is None and won(table["none", "all"]) == "–"
    alone = [one for one in ROWS if one["network"] == "k"]
    assert [line["network"] for line in table_rows(alone, VERDICT)] == ["k", "k"]


def test_markdown_has_wins_and_both_differences():
    text = markdown_table(table_rows(ROWS, VERDICT), METRIC)
    assert "| a_b | all | 10 | 0.650 ± 0.071 | +0.000 (-0.100 to +0.100) | -0.050 (-0.150 to +0.050) | 1 of 2 |" in text
    lines = text.split("\n\n")[0].splitlines()
    assert len({line.count("|") for line in lines}) == 1
    assert "Intervals of one network are over test groups alone" in text.split("\n\n")[1]


@pytest.mark.parametrize("sign", list("\\~^&%$#_{}"))
def test_every_sign_of_latex_is_escaped(sign):
    escaped = latex_escape(f"a{sign}b")
    # What is left after the known escapes holds no sign with a meaning of its own.
    left = re.sub(r"\\(textbackslash|textasciitilde|textasciicircum)\{\}|\\[&%$#_{}]", "", escaped)
    assert left == "ab"


@pytest.mark.parametrize(("copies", "environment"), [(1, "tabular"), (10, "longtable")])
def test_latex_is_balanced_and_rectangular(copies, environment):
    text = latex_table(table_rows(ROWS, VERDICT) * copies, METRIC)
    comments, body = re.fullmatch(r"((?:%[^\n]*\n)+)(.*)", text, re.DOTALL).groups()
    assert "booktabs" in comments and "Intervals of one network" in comments and comments.isascii()
    assert body.startswith(f"\\begin{{{environment}}}") and body.endswith(f"\\end{{{environment}}}\n")
    assert body.count("{") == body.count("}") and body.count("$") % 2 == 0
    assert all(f"\\{rule}rule" in body for rule in ("top", "mid", "bottom"))
    lines = [line for line in body.splitlines() if line.endswith(r"\\")]
    assert len(lines) == 1 + 6 * copies
    assert {len(re.findall(r"(?<!\\)&", line)) for line in lines} == {6}
    assert r"a\_b" in body and not re.search(r"(?<!\\)[_#%^~]", body) and body.isascii()
    assert r"$-0.050$ ($-0.150$ to $+0.050$)" in body and r"0.650 $\pm$ 0.071" in body
