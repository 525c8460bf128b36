"""What benchmarks/data.py compares with, and its inputs: `python data_peers.py PEER FOLDER` runs one peer and prints JSON."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

CORES = len(os.sched_getaffinity(0))
SEQ_LEN = 4096
FILES = 4 * CORES  # that an input is cut into: graft's parts
PERMUTATIONS, SIMILAR, GRAM = 128, 0.8, 5  # of MinHash
SPECIALS = ("<|begin_of_text|>", "<|eot_id|>", "<|endoftext|>", "<|start_header_id|>", "<|end_header_id|>")
LLAMA_3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def timed(work: Callable[[], Any]) -> tuple[Any, float]:
    began_s = time.perf_counter()
    result = work()
    return result, time.perf_counter() - began_s


# ---- input ------------------------------------------------------------------------------------------------------------
def prose(seed: int) -> Iterator[str]:
    """Paragraphs without end, English and Chinese in turn, some with emoji."""
    from graft.core.sections import Corpus
    from graft.data import grammar
    from graft.data.corpora import made

    rng = random.Random(seed)
    english = [line for text in made(Corpus(kind="docstrings")) for line in text.splitlines() if line.strip()]
    for chinese in grammar.corpus(sys.maxsize, seed):
        yield "\n".join(rng.choices(english, k=rng.randint(1, 6))).strip()
        yield chinese + rng.choice(("", "", "", "👍🏽", " 🇹🇼"))


def make_inputs(folder: Path, of_chats: int, of_texts: int) -> None:
    """tokenizer/, tokenizer-2/ (a copy), chats-N.parquet and texts-N.parquet, so many bytes of each."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(LLAMA_3), "isolated")
    bpe.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    bpe.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=32_000, special_tokens=list(SPECIALS), initial_alphabet=alphabet, show_progress=False)
    bpe.train_from_iterator(taken(prose(1), 10**7), trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=SPECIALS[0],
        eos_token=SPECIALS[1],
        extra_special_tokens=list(SPECIALS[2:]),
        clean_up_tokenization_spaces=False,
    )
    import trl

    template = Path(trl.__file__).parent / "chat_templates/llama3_training.jinja"  # its marked answers begin and end where graft's do
    tokenizer.chat_template = template.read_text(encoding="utf-8")
    for name in ("tokenizer", "tokenizer-2"):
        tokenizer.save_pretrained(folder / name, save_jinja_files=False)

    rng, paragraphs = random.Random(2), prose(2)

    def chats() -> Iterator[str]:
        while True:
            roles = ["system"] * (rng.random() < 0.2) + ["user", "assistant"] * rng.choice((1, 1, 1, 2, 3))
            yield json.dumps([{"role": role, "content": next(paragraphs)} for role in roles], ensure_ascii=False)

    def texts() -> Iterator[str]:
        while True:
            yield "\n\n".join(next(paragraphs) for _ in range(min(12, int(rng.lognormvariate(1.5, 0.7)) + 1)))

    write_texts(folder, "chats", list(taken(chats(), of_chats)))
    write_texts(folder, "texts", list(taken(texts(), of_texts)))


def taken(texts: Iterator[str], size: int) -> Iterator[str]:
    """Of `texts`, the first of `size` bytes together."""
    while size > 0:
        text = next(texts)
        size -= len(text.encode())
        yield text


def write_texts(folder: Path, name: str, texts: list[str]) -> None:
    step = -(-len(texts) // FILES)
    for n in range(FILES):
        column = pa.array(texts[n * step : (n + 1) * step], pa.large_string())
        pq.write_table(pa.table({"text": column}), folder / f"{name}-{n}.parquet", row_group_size=1000, compression="zstd")


def read_texts(folder: Path, name: str) -> list[str]:
    return [text for n in range(FILES) for text in pq.read_table(folder / f"{name}-{n}.parquet")["text"].to_pylist()]


def make_documents(folder: Path, count: int) -> np.ndarray:
    """near-N.parquet: half of 320 Chinese characters, half of 120 English words, drawn by Zipf's law; bool [count], the planted copies.

    A fifth are copies of an earlier document with a run of 1 to 5 of 100 units written anew: 0.85 to 0.97 alike.
    """
    rng = np.random.default_rng(3)
    words = ["".join(rng.choice(list("etaoinshrdlu"), size)) for size in rng.integers(2, 10, 20_000)]
    kinds = ((" ", words, 120), ("", [chr(0x4E00 + n) for n in rng.permutation(6000)], 320))
    kept: list[tuple[int, np.ndarray]] = []
    copies = rng.random(count) < 0.2
    copies[0] = False

    def text(copy: bool) -> str:
        if not copy:
            kind = int(rng.integers(2))
            _, units, size = kinds[kind]
            kept.append((kind, (rng.zipf(1.1, size) + rng.integers(len(units), size=size) * (rng.random(size) < 0.7)) % len(units)))
            kind, chosen = kept[-1]
        else:
            kind, chosen = kept[rng.integers(len(kept))]
            size = max(1, int(len(chosen) * rng.uniform(0.01, 0.04)))
            at = rng.integers(len(chosen) - size)
            chosen = np.concatenate([chosen[:at], rng.integers(len(kinds[kind][1]), size=size), chosen[at + size :]])
        return kinds[kind][0].join(kinds[kind][1][i] for i in chosen.tolist())

    write_texts(folder, "near", [text(copy) for copy in copies.tolist()])
    return copies


def make_shard(folder: Path, bins: int = 20_000) -> None:
    """One shard of random tokens, 400 MB, and its index; made once."""
    from graft.core.shards import Columns, write_index, write_shard

    if folder.exists():
        return
    folder.mkdir()
    rng = np.random.default_rng(4)
    ids, mask = rng.integers(0, 100_000, (bins, SEQ_LEN), np.int32), rng.integers(0, 2, (bins, SEQ_LEN), np.uint8)
    source, every = np.zeros(bins, np.int32), np.arange(bins + 1)
    entry = write_shard(folder / "0.arrow", Columns(ids, mask, source + SEQ_LEN, every, source, every[:-1]), ["random"])
    write_index(folder, seq_len=SEQ_LEN, pad_id=0, tokenizer="", shards=[entry])


def rows_of(ids: np.ndarray, mask: np.ndarray, lengths: np.ndarray) -> Counter[bytes]:
    """How often each row occurs, by a digest of its ids and mask."""
    ids, mask, ends = ids.astype(np.int32), mask.astype(np.uint8), np.cumsum([0, *lengths])
    return Counter(hashlib.blake2b(ids[a:b].tobytes() + mask[a:b].tobytes(), digest_size=16).digest() for a, b in pairwise(ends.tolist()))


# ---- peers ------------------------------------------------------------------------------------------------------------
def peer(name: str, folder: Path, threads: int = 1) -> dict[str, Any]:
    """What a peer says of its run, in a process of its own."""
    parallel = {"TOKENIZERS_PARALLELISM": str(threads > 1).lower(), "RAYON_NUM_THREADS": str(threads)}
    command = [sys.executable, __file__, name, str(folder)]
    done = subprocess.run(command, stdout=subprocess.PIPE, env=os.environ | parallel, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def trl_stage(folder: Path) -> dict[str, Any]:
    """What TRL's trainer does with assistant_only_loss and packing, and save_to_disk."""
    import datasets
    from transformers import AutoTokenizer
    from trl import pack_dataset

    datasets.disable_progress_bars()

    def run() -> None:
        tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")

        def tokenize(row: dict[str, str]) -> dict[str, list[int]]:
            found: Any = tokenizer.apply_chat_template(json.loads(row["text"]), tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
            return {key: found[key] for key in ("input_ids", "assistant_masks")}

        with tempfile.TemporaryDirectory(dir=folder) as cache:
            rows = datasets.load_dataset("parquet", data_files=f"{folder}/chats-*.parquet", split="train", cache_dir=cache)
            rows = rows.map(tokenize, num_proc=CORES, remove_columns="text")
            pack_dataset(rows, SEQ_LEN, "bfd", {"num_proc": CORES}).save_to_disk(folder / "packed", num_proc=CORES)

    return {"seconds": timed(run)[1]}


def bare_encode(folder: Path) -> dict[str, Any]:
    """Leaves bare.npz: ids of all texts, each with the end of text that graft writes, and their lengths."""
    from transformers import AutoTokenizer

    tokenizer, texts = AutoTokenizer.from_pretrained(folder / "tokenizer"), read_texts(folder, "texts")
    found, seconds = timed(lambda: tokenizer.backend_tokenizer.encode_batch(texts, add_special_tokens=False))
    end = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    ids = [np.array([*encoding.ids, end], np.int32) for encoding in found]
    np.savez(folder / "bare.npz", ids=np.concatenate(ids), lengths=[len(i) for i in ids])
    return {"seconds": seconds}


def tokenize_alone(folder: Path) -> dict[str, Any]:
    from graft.data.tokens import tokenize_texts

    bare, texts = bare_encode(folder), read_texts(folder, "texts")
    source = (str(folder / "tokenizer"), None, "tokenizer")
    tokenize_texts(source, read_texts(folder, "chats"))  # loads the engine; other text, for it remembers words
    found, graft_s = timed(lambda: tokenize_texts(source, texts))
    wanted = np.load(folder / "bare.npz")
    equal = np.array_equal(found.ids, wanted["ids"]) and np.array_equal(np.diff(found.ends), wanted["lengths"])
    return {"bare_s": bare["seconds"], "graft_s": graft_s, "equal": equal}


def shingles(text: str) -> set[bytes]:
    units, glue = (text.split(), b" ") if text[0] < "\u4e00" else (text, b"")
    encoded = [unit.encode() for unit in units]
    return {glue.join(encoded[i : i + GRAM]) for i in range(len(encoded) - GRAM + 1)}


def sketches(texts: list[str]) -> list[np.ndarray]:
    from datasketch import MinHash

    return [found.hashvalues for found in MinHash.bulk(map(shingles, texts), num_perm=PERMUTATIONS)]


def signed_one_by_one(texts: list[str]) -> Iterator[np.ndarray]:
    """As datasketch's documentation writes it."""
    from datasketch import MinHash

    for text in texts:
        found = MinHash(num_perm=PERMUTATIONS)
        found.update_batch(shingles(text))
        yield found.hashvalues


def signed_in_bulk(texts: list[str]) -> Iterator[np.ndarray]:
    """As fast as datasketch goes: many at once, in as many processes as there are cores."""
    with multiprocessing.get_context("fork").Pool(CORES) as pool:
        for some in pool.imap(sketches, (texts[i : i + 256] for i in range(0, len(texts), 256))):
            yield from some


def datasketch_dedup(folder: Path, sign: Callable[[list[str]], Iterator[np.ndarray]]) -> dict[str, Any]:
    """Each document is dropped that an earlier, kept one is like; candidates by the index, confirmed by their signatures."""
    from datasketch import MinHash, MinHashLSH

    texts = read_texts(folder, "near")[: int((folder / "some").read_text())]
    blank = MinHash(num_perm=PERMUTATIONS)
    known = {"num_perm": PERMUTATIONS, "permutations": blank.permutations, "scheme": blank.scheme}

    def run() -> list[int]:
        index = MinHashLSH(threshold=SIMILAR, num_perm=PERMUTATIONS)
        kept: dict[int, MinHash] = {}
        dropped = []
        for n, values in enumerate(sign(texts)):
            found = MinHash(hashvalues=values, **known)
            if any(kept[other].jaccard(found) >= SIMILAR for other in index.query(found)):
                dropped.append(n)
            else:
                index.insert(n, found)
                kept[n] = found
        return dropped

    dropped, seconds = timed(run)
    return {"seconds": seconds, "documents": len(texts), "dropped": dropped}


PEERS = {
    "trl": trl_stage,
    "bare": bare_encode,
    "tokenize": tokenize_alone,
    "datasketch": partial(datasketch_dedup, sign=signed_one_by_one),
    "datasketch-bulk": partial(datasketch_dedup, sign=signed_in_bulk),
}

if __name__ == "__main__":
    print(json.dumps(PEERS[sys.argv[1]](Path(sys.argv[2]))))
