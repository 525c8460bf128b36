"""The semantic score beside a plain reference in fp64, with a small random BERT."""

import random

import pytest
import torch

from graft.core.errors import ConfigError
from graft.core.recipe import load
from graft.evaluate.semantic import Encoder

HAN = "幫我畫一隻在海邊散步的柴犬今天天氣如何"
TEXTS = ["a cat walks", "over the sea and the dog " * 30, "柴犬在海邊散步", "今天天氣如何？", "一", "🐕", "..."]


def write_encoder(folder, limit=64):
    """A BERT of 64 places and random weights, whose tokenizer knows words, Han characters and nothing else."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *["the", "a", "cat", "dog", "sea", "walks", "over", "and", "b", "c"], *dict.fromkeys(HAN)]
    t = Tokenizer(models.WordLevel({word: n for n, word in enumerate(words)}, unk_token="[UNK]"))
    t.normalizer, t.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    t.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    PreTrainedTokenizerFast(tokenizer_object=t, model_max_length=limit, **names).save_pretrained(folder)
    torch.manual_seed(5)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64, "max_position_embeddings": 64}
    model = BertModel(BertConfig(vocab_size=len(words), initializer_range=0.5, **sizes))
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_encoder(tmp_path_factory.mktemp("encoder"))


def reference(folder, a, b):
    """In fp64, a text at a time: no padding, so no mask."""
    from transformers import AutoModel, AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).double().eval()
    with torch.no_grad():
        x, y = (model(**tokenizer(t, truncation=True, return_tensors="pt")).last_hidden_state[0].mean(0) for t in (a, b))
    return float((x @ y) / (x.norm() * y.norm()))


def test_it_is_the_cosine_of_the_means_over_the_tokens(folder):
    rng = random.Random(0)
    answers = TEXTS + ["".join(rng.choices(HAN, k=rng.randint(1, 40))) for _ in range(10)]
    wanted = [*answers[1:], answers[0]]
    found = Encoder(str(folder), None, 4, "cpu").similarity(answers, wanted)
    for near, a, b in zip(found, answers, wanted, strict=True):
        assert near == pytest.approx(reference(folder, a, b), abs=2e-6)
    assert max(found) - min(found) > 0.3, "the texts are told apart"


def test_equal_texts_score_one_and_a_batch_is_its_rows(folder):
    encoder = Encoder(str(folder), None, 64, "cpu")
    assert encoder.similarity(TEXTS, TEXTS) == pytest.approx([1.0] * len(TEXTS), abs=1e-6)
    together, alone = encoder.embed(TEXTS), torch.cat([encoder.embed([text]) for text in TEXTS])
    assert torch.allclose(together, alone, atol=1e-6) and torch.allclose(together.norm(dim=-1), torch.ones(len(TEXTS)))
    assert encoder.similarity(["柴犬在海邊散步"], ["今天天氣如何？"])[0] < 0.99


def test_a_blank_answer_is_near_to_nothing_but_a_blank(folder):
    assert Encoder(str(folder), None, 4, "cpu").similarity(["", " \n", "a cat"], ["a cat", "", ""]) == [0.0, 1.0, 0.0]


@pytest.mark.parametrize("limit", [64, int(1e30)])
def test_a_text_is_cut_where_the_encoder_ends(tmp_path, limit):
    encoder = Encoder(str(write_encoder(tmp_path, limit)), None, 4, "cpu")
    assert encoder.similarity(["the sea " * 200], ["the sea " * 300])[0] == pytest.approx(1, abs=1e-6)


def test_what_is_no_encoder_is_one_line(tmp_path, folder):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"evaluate\.semantic = .* cannot be loaded"):
        Encoder(str(tmp_path), None, 4, "cpu")
    with pytest.raises(ConfigError, match=r"evaluate\.semantic = './none' is no folder"):
        Encoder("./none", None, 4, "cpu")
    recipe = tmp_path / "r.toml"
    recipe.write_text('name = "r"\n[corpora.a]\npath = "a.txt"\n[evaluate]\nsemantic = "owner/encoder"\n')
    with pytest.raises(ConfigError, match="there is none: add one"):
        load(recipe)
