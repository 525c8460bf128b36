import io
import json
import random
from collections import Counter

import numpy as np
from PIL import Image

from graft.core.sections import Corpus
from graft.data.corpora import made
from graft.data.drawings import COLOURS, COUNTS, KINDS, SIDE, drawn


def test_a_drawing_is_a_function_of_seed_and_number():
    first, again, other = (list(made(Corpus(kind="drawings", documents=n, seed=s))) for n, s in ((30, 1), (40, 1), (30, 2)))
    assert first == again[:30] != other
    assert len({row["images"][0]["bytes"] for row in first + other}) == 60


def test_answers_are_about_what_is_drawn():
    answers = Counter()
    for row in made(Corpus(kind="drawings", documents=400, seed=1)):
        asked, answer = (m["content"] for m in row["messages"])
        assert asked.startswith("<image>")
        found = json.loads(answer) if answer.startswith("{") else answer
        answers.update(found.values() if isinstance(found, dict) else [found])
    assert answers.keys() == {*KINDS, *COLOURS, *COUNTS, *map(str, COUNTS)}


def test_the_colour_is_there_and_the_others_are_not():
    for kind in KINDS:
        for colour, rgb in COLOURS.items():
            pixels = np.asarray(Image.open(io.BytesIO(drawn(kind, colour, 3, random.Random(1)))), int)
            assert pixels.shape == (SIDE, SIDE, 3)
            near = {name: int((np.abs(pixels - value).max(axis=2) <= 25).sum()) for name, value in COLOURS.items()}
            assert near[colour] > 100 and max(near, key=near.get) == colour, (kind, rgb, near)
