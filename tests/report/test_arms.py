"""A sweep's table and plot say what the results hold, and no more than that."""

from statistics import mean, stdev
from xml.etree import ElementTree

import pytest

from graft.report.arms import plot, table
from graft.report.charts import NAMED, spread_chart
from graft.report.tree import Spread

SVG = "{http://www.w3.org/2000/svg}"


def spread(*each):
    return {"mean": mean(each), **({"std": stdev(each)} if len(each) > 1 else {}), "n": len(each), "by_seed": {str(n): v for n, v in enumerate(each)}}


def results(arms, seeds=3, base=0.1, differences=()):
    """arms: {name: [rougeL of each seed]}, of two tasks."""
    told = []
    for name, each in arms.items():
        runs = [{"seed": n, "rows": 1000, "steps": 50, "epochs": 1.0, "tokens_seen": 123_456, "device_s": 90.0} for n in range(len(each))]
        one = {"kind": "generation", "main": "rougeL", "metrics": {"rougeL": spread(*each), "bleu": spread(*(50 * v for v in each))}}
        base_of = base[name] if isinstance(base, dict) else base
        tasks = {task: {**one, "base": {"rougeL": spread(base_of), "bleu": spread(1.0)}} for task in ("chat", "news")}
        told.append({"name": name, "set": {}, "match_tokens": None, "runs": runs, "tasks": tasks})
    return {
        "sweep": "study",
        "recipe": "r.toml",
        "seeds": list(range(seeds)),
        "runs": seeds * len(arms),
        "arms": told,
        "differences": list(differences),
    }


ARMS = {"small": [0.30, 0.32, 0.31], "large": [0.40, 0.41, 0.45]}


def rows(text, title):
    """{first cell: other cells} of the table under a title."""
    lines = text.split(title)[1].split("\n#")[0].splitlines()
    cells = [[c.strip() for c in line.strip("|").split("|")] for line in lines if line.startswith("| ")]
    return {row[0]: row[1:] for row in cells}


def test_the_table_has_means_deviations_and_what_was_seen():
    text = table(results(ARMS))
    first = rows(text, "# study\n")
    assert first["arm"] == ["seeds", "rows", "epochs", "steps", "tokens seen", "device time", "chat rougeL", "news rougeL"]
    assert first["large"] == ["3", "1,000", "1", "50", "123.5k", "0:01:30", "0.4200 ± 0.0265", "0.4200 ± 0.0265"]
    assert rows(text, "## chat: generation\n") == {
        "arm": ["rougeL", "bleu"],
        "small": ["0.3100 ± 0.0100", "15.50 ± 0.50"],
        "large": ["0.4200 ± 0.0265", "21.00 ± 1.32"],
        "base": ["0.1000", "1.0000"],
    }
    assert "6 of 6 runs are complete. Mean ± sample standard deviation" in text and "Differences" not in text


def test_bases_that_differ_are_told_apart():
    text = table(results(ARMS, base={"small": 0.1, "large": 0.2}))
    assert [rows(text, "## news: generation\n")[f"base of {name}"][0] for name in ARMS] == ["0.1000", "0.2000"]


def test_differences_are_of_the_main_metric_or_of_what_rows_have():
    both = {
        "of": "large",
        "less": "small",
        "difference": 0.11,
        "low": -0.02,
        "high": 0.2,
        "p": 0.04,
        "wins": 9,
        "losses": 1,
        "seeds": 3,
        "rows": 1200,
    }
    found = [{"task": "chat", "metric": m, **both} for m in ("bleu_of_a_row", "rougeL")] + [{"task": "news", "metric": "nats_per_token", **both}]
    text = table(results(ARMS, differences=found)).split("## Differences")[1]
    lines = [[c.strip() for c in line.strip("|").split("|")] for line in text.splitlines() if line.startswith(("| chat", "| news"))]
    assert [line[:2] for line in lines] == [["chat", "rougeL"], ["news", "nats_per_token"]]
    assert lines[0][2:] == ["large less small", "+0.1100", "-0.0200 to +0.2000", "0.040", "3", "1,200"]


@pytest.mark.parametrize("draw", [table, plot])
def test_with_one_seed_no_deviation_is_shown(draw):
    text = draw(results({"small": [0.3], "large": [0.4]}, seeds=1))
    assert "±" not in text and "0.4000" in text


def test_an_arm_with_fewer_runs_says_so():
    text = table(results({"small": [0.3, 0.4, 0.5], "large": [0.4]}))
    assert "4 of 6 runs are complete" in text and rows(text, "# study\n")["large"][0] == "1" and rows(text, "# study\n")["large"][-1] == "0.4000"


def test_the_plot_is_a_file_of_its_own_with_everything_inside():
    name = "an-arm-of-a-name-that-is-longer-than-there-is-room"
    drawn = ElementTree.fromstring(plot(results({**ARMS, name: [0.2, 0.21, 0.22]})))
    assert drawn.tag == f"{SVG}svg" and not list(drawn.iter(f"{SVG}script")) and drawn.get("width")
    pictures = drawn.findall(f"{SVG}svg")
    assert [p.get("aria-label").split(":")[0] for p in pictures] == ["chat, rougeL", "news, rougeL"]
    for picture in pictures:
        circles = list(picture.iter(f"{SVG}circle"))
        assert [sum(c.get("class") == kind for c in circles) for kind in ("one", "mean")] == [9, 3]
        assert all(120 < float(c.get("cx")) < 420 - 105 and 0 < float(c.get("cy")) < float(picture.get("height")) for c in circles)
        at = {c.get("cy"): float(c.get("cx")) for c in circles if c.get("class") == "mean"}
        small, large, other = (at[y] for y in sorted(at, key=float))
        assert other < small < large, "the rows in their order, the axis to the right"
        names = [t.text for t in picture.iter(f"{SVG}text") if t.get("class") == "arm"]
        assert names == ["small", "large", f"{name[: NAMED - 1]}…"] and name in [t.text for t in picture.iter(f"{SVG}title")]
    low, right = (max(float(p.get(a)) + float(p.get(size)) for p in pictures) for a, size in (("y", "height"), ("x", "width")))
    assert low < float(drawn.get("height")) and right < float(drawn.get("width"))


def test_a_row_of_one_and_rows_that_are_equal_can_be_drawn():
    for spreads in ([Spread("one", 0.5, None, (0.5,))], [Spread("a", 0.5, 0.0, (0.5, 0.5)), Spread("<b>", 0.5, 0.0, (0.5, 0.5))]):
        picture, height = spread_chart("T & co", spreads)
        assert height == 26 + 28 * len(spreads) + 24 and all(0 < float(c.get("cx")) < 420 for c in ElementTree.fromstring(picture).iter("circle"))


def test_a_mean_that_is_no_number_has_no_dot():
    picture, _ = spread_chart("T", [Spread("good", 2.0, 0.1, (1.9, 2.1)), Spread("broken", float("nan"), float("nan"), (float("nan"), 1.0))])
    root = ElementTree.fromstring(picture)
    assert len(list(root.iter("circle"))) == 3 and "nan" not in "".join(e.get("cx", "") + e.get("d", "") for e in root.iter())
    assert ">inf<" in spread_chart("T", [Spread("broken", float("inf"), None, (float("inf"),))])[0]
