import pytest

from graft.core.errors import ConfigError
from graft.data import init, prepare
from graft.data.tokenizer import END, END_OF_TEXT, PAD, START, train_tokenizer

TALK = [{"role": "user", "content": "畫一隻貓"}, {"role": "assistant", "content": "好"}]


def test_the_same_texts_give_the_same_tokenizer():
    texts = [f"今天天氣很好，第{i}天 hello world" for i in range(200)]
    a, b = (train_tokenizer(iter(texts), 320).backend_tokenizer.to_str() for _ in range(2))
    assert a == b


def test_bytes_of_any_text_come_back():
    tokenizer = train_tokenizer(["abc"] * 5, 300)
    assert len(tokenizer) <= 300
    for text in ("你好 world\n\tif x:", "🎨 naïve", " lead"):
        assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text


def test_the_stage_writes_a_model_folder_that_transformers_loads(tmp_path, workspace, ray_local):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    plan = workspace(tmp_path)
    prepare.run(plan.resolve("prepare"))
    init.run(plan.resolve("init"))
    artifact = plan.artifact("init")
    assert sorted(artifact.manifest["files"]) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]

    tokenizer = AutoTokenizer.from_pretrained(artifact.path)
    assert (tokenizer.eos_token, tokenizer.pad_token, tokenizer.bos_token) == (END, PAD, None)
    assert tokenizer.is_fast and tokenizer.chat_template
    assert tokenizer.apply_chat_template(TALK, tokenize=False) == f"{START}user\n畫一隻貓{END}\n{START}assistant\n好{END}\n"
    assert tokenizer(END_OF_TEXT, add_special_tokens=True)["input_ids"] == [tokenizer.convert_tokens_to_ids(END_OF_TEXT)], (
        "one id, and no bos before it"
    )
    text = next(prepare.documents(plan.artifact("prepare").path, "made"))
    assert len(tokenizer(text)["input_ids"]) < len(text.encode()) / 1.5, "it learned from the corpus"

    model = AutoModelForCausalLM.from_pretrained(artifact.path)
    assert model.config.vocab_size == len(tokenizer) == artifact.counts["vocabulary"] == 400
    assert model.config.eos_token_id == tokenizer.eos_token_id and model.generation_config.pad_token_id == tokenizer.pad_token_id
    assert model.config.max_position_embeddings == 2048
    assert model.num_parameters() == artifact.counts["parameters"]
    assert model.generate(**tokenizer(text[:9], return_tensors="pt"), max_new_tokens=3, do_sample=False).shape[0] == 1


def test_a_template_that_the_embedded_base_cannot_speak_is_refused(tmp_path, workspace, ray_local):
    plan = workspace(tmp_path, overrides=("model.chat_template=llama-3",))
    prepare.run(plan.resolve("prepare"))
    with pytest.raises(ConfigError, match="chatml"):
        init.run(plan.resolve("init"))
    assert plan.resolve("init").artifact is None
