"""The diversity curve against its definition, its cost, and its figure."""

import random
import time

from graft.data import grammar
from graft.data.augment.diversity import Diversity
from graft.data.augment.novelty import jaccard, normal


def sentences(count):
    rng = random.Random(0)
    families = grammar.families()
    return [grammar.row(rng.choice(families), rng)["user"] for _ in range(count)]


def test_the_numbers_are_what_their_definitions_say():
    rounds = [sentences(90)[at : at + 30] for at in (0, 30, 60)]
    diversity = Diversity()
    points = [diversity.add(texts) for texts in rounds]
    assert points == diversity.points and [p["step"] for p in points] == [0, 1, 2] and [p["rows"] for p in points] == [30, 60, 90]
    made = [t for texts in rounds for t in texts]
    for n in (1, 2, 3):
        grams = [normal(t)[i : i + n] for t in made for i in range(len(normal(t)) - n + 1)]
        assert points[2][f"distinct_{n}"] == round(len(set(grams)) / len(grams), 4)
    before = rounds[0] + rounds[1]
    nearest = [max(jaccard(t, other) for other in before) for t in rounds[2]]
    assert points[0]["nearest"] is None and points[2]["nearest"] == round(sum(nearest) / len(nearest), 4)


def test_repeats_show_and_an_empty_round_does_no_harm():
    diversity = Diversity()
    assert diversity.add([]) == {"step": 0, "rows": 0, "distinct_1": None, "distinct_2": None, "distinct_3": None, "nearest": None}
    diversity.add(["請畫一隻貓", "今天天氣好嗎"])
    same = diversity.add(["請畫一隻貓！"])
    assert same["nearest"] == 1.0 and same["distinct_1"] < diversity.points[1]["distinct_1"]
    assert diversity.add([])["nearest"] is None


def test_10000_rows_in_60_rounds_take_less_than_2_seconds(tmp_path):
    texts = sentences(10_000)
    diversity = Diversity()
    started = time.process_time()
    for n in range(60):
        diversity.add(texts[n * 10_000 // 60 : (n + 1) * 10_000 // 60])
    took = time.process_time() - started
    print(f"\n10,000 rows: {took:.2f} s")
    assert took < 2 and diversity.points[-1]["rows"] == 10_000
    diversity.figure(tmp_path / "a.png")
    diversity.figure(tmp_path / "b.png")
    png = (tmp_path / "a.png").read_bytes()
    assert png.startswith(b"\x89PNG") and len(png) > 10_000 and png == (tmp_path / "b.png").read_bytes()
