"""The sections of a recipe that say what is read, made and asked: task, API, augmentation, corpora, evaluation."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Count = Annotated[int, Field(ge=1)]
Text = Annotated[str, Field(pattern=r"\S")]  # not blank
Share = Annotated[float, Field(ge=0, lt=1)]
Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,63}$")]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Task(Section):
    """The decision that is learned: answer with a call of `function`, or with plain text."""

    function: str = "generate_image"
    argument: str = "prompt"


class Price(Section):
    """US dollars a million tokens."""

    input: Annotated[float, Field(ge=0)]
    cached_input: Annotated[float, Field(ge=0)] | None = None  # absent: as input
    output: Annotated[float, Field(ge=0)]
    batch: Annotated[float, Field(gt=0, le=1)] = 0.5  # factor on all three where the server says it served at batch price (service_tier "flex")


class Api(Section):
    """An OpenAI-compatible API; OPENAI_BASE_URL and OPENAI_API_KEY come from the environment."""

    model: str = "gpt-4o-mini"
    max_output_tokens: Count = 1024  # an answer's upper bound: sent with each request and reserved in the budget
    output_limit: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"  # the name that the server knows it by
    image_tokens: Count = 26_000  # upper bound of what the server counts for one image
    response_format: Literal["json_schema", "json_object", "none"] = "json_schema"  # the most that the server can hold an answer to
    service_tier: Literal["default", "flex"] | None = None
    budget_usd: Annotated[float, Field(gt=0)] | None = None  # all that this recipe may ever spend in this workspace
    budget_tokens: Count | None = None  # the same in tokens, input and output together
    prices: dict[str, Price] = {}  # by model
    in_flight: Count = 64  # concurrent requests, all actors together
    requests_per_minute: Count | None = None
    tokens_per_minute: Count | None = None
    actors: Count = 1  # processes that ask
    timeout_s: Annotated[float, Field(gt=0)] = 60.0  # of one attempt
    max_retries: Annotated[int, Field(ge=0)] = 8  # of one request
    give_up_after_s: Annotated[float, Field(gt=0)] = 300.0  # a server that is down this long ends the run

    @model_validator(mode="after")
    def _a_budget_has_a_price(self) -> Api:
        if self.budget_usd is not None and self.model not in self.prices:
            raise ValueError(f"api.budget_usd = {self.budget_usd} cannot be held without a price of {self.model!r}: add [api.prices.{self.model!r}]")
        return self


class Images(Section):
    """Images to ask about: a folder, or a JSONL file of {"image": path or http(s) URL, "prompt"?, "system"?}; paths relative to the recipe."""

    folder: str | None = None
    file: str | None = None
    system: str | None = None
    prompts: tuple[Text, ...] = ()  # each is asked of every image that brings no prompt of its own
    questions: Annotated[int, Field(ge=0)] = 0  # further questions an image, made by the model and then answered by it
    answer_schema: str | None = None  # a JSON Schema file, relative to the recipe; absent: free text
    max_side: Count = 1024  # pixels; larger images are scaled down
    max_bytes: Count = 1_000_000  # of an image as sent
    max_download_bytes: Count = 20_000_000
    duplicate_bits: Annotated[int, Field(ge=0, le=64)] = 4  # perceptual hashes that differ in at most so many of 64 bits are one image

    @model_validator(mode="after")
    def _a_source_and_something_to_ask(self) -> Images:
        if (self.folder is None) == (self.file is None):
            raise ValueError('augment.images needs either folder = "…" or file = "….jsonl"')
        if self.folder is not None and not self.prompts and not self.questions:
            raise ValueError('augment.images asks nothing: give prompts = ["…"], or questions = N to have them made')
        return self


class Augment(Section):
    """Self-instruct from seed sentences, or questions and answers about images."""

    seeds: str | None = None  # chat JSONL, relative to the recipe
    images: Images | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] = 1.0
    rows_per_class: Count = 600  # seeds included
    rows_per_seed: Count | None = None  # instead: each seed's family grows to so many rows, whatever the others do
    rewrites_per_call: Count = 4
    calls_per_generation: Count = 4  # requests of one family between two joins of its accepted rewrites to what it rewrites
    max_rounds: Count = 60
    saturation: Share = 0.05  # a family ends when a smaller share of a generation's rewrites is accepted
    novelty: Annotated[float, Field(gt=0, le=1)] = 0.7  # a rewrite this similar to an accepted row is refused; 1: only repeats
    language: Literal["any", "zh", "zh-Hant", "en"] = "any"
    min_chars: Count = 2
    max_chars: Count = 4096

    @model_validator(mode="after")
    def _seeds_or_images(self) -> Augment:
        if (self.seeds is None) == (self.images is None):
            raise ValueError('[augment] needs either seeds = "….jsonl" or an [augment.images] section')
        return self


class Prepare(Section):
    """Splits are by seed family: all rows that descend from one seed fall on one side."""

    validation: Share = 0.1  # share of the training families' rows
    test_families: Share = 0.25  # share of each class's seed families
    min_chars: Count = 2
    max_chars: Count = 4096


CLEANING = (
    "mojibake",
    "nfc",
    "control",
    "urls",
    "page_numbers",
    "punctuation",
    "repeated_lines",
    "whitespace",
)  # the steps of graft.data.cleaning, in the order they run
FORMATS = ("auto", "text", "json", "jsonl", "csv", "parquet", "arrow", "dataset")
LAYOUTS = ("auto", "text", "messages", "sharegpt", "alpaca", "ms-swift", "mcq", "qa")


class Clean(Section):
    """What is done to a document before it is used. A longer one is cut at sentence ends, a shorter one rejected."""

    steps: tuple[Literal[CLEANING], ...] = CLEANING  # type: ignore[valid-type]
    mask: tuple[Literal["email", "phone", "id"], ...] = ()  # personal data to replace
    min_chars: Count = 100
    max_chars: Count | None = 2048
    language: Literal["any", "zh", "zh-Hant", "en"] = "any"
    language_share: Annotated[float, Field(gt=0, le=1)] = 0.5  # of the letters, at least
    merge_by: str | None = None  # the key of records whose texts are one article: equal neighbours are joined


class Mcq(Section):
    """Keys of a reading-comprehension record, and the prompt that is made of it."""

    article: str = "article"
    question: str = "question"
    options: tuple[str, ...] = ("option1", "option2", "option3", "option4")
    answer: str = "answer"  # the option's number (from 1), its letter, or its text
    prompt: str = "{article}\n\n{question}\n{options}"
    option: str = "{letter}. {text}"
    reply: str = "{letter}. {text}"


class Corpus(Section):
    """A source of text or chats: `files` are read; `grammar`, `dialogues` (in chat markup) and `docstrings` are texts made on the machine.

    So are chats: `identity`, in which the model says its name and author, and `drawings`, charts, tables and forms with questions about them.
    """

    kind: Literal["files", "grammar", "dialogues", "docstrings", "identity", "drawings"] = "files"
    path: str | None = None  # a file, a folder or a pattern, relative to the recipe; or "hub:owner/name[@revision][/configuration][:split]"
    images: str | None = None  # the folder that its rows' images are in, relative to the recipe; absent: rows with images are rejected
    format: Literal[FORMATS] = "auto"  # type: ignore[valid-type]  # auto: by file name
    layout: Literal[LAYOUTS] = "auto"  # type: ignore[valid-type]  # auto: by the keys of the first records
    text: str = "text"  # the key of a text record
    mcq: Mcq = Mcq()
    clean: Clean | None = None  # absent: Clean's defaults for files, the bare minimum for what is made
    documents: Count | None = None  # at most this many; needed for grammar, dialogues and drawings
    seed: int = 0  # of the grammar and the drawings; two corpora of one kind differ by it
    name: Text | None = None  # identity: the model's own
    author: Text | None = None

    @model_validator(mode="after")
    def _files_have_paths(self) -> Corpus:
        if (self.kind == "files") != (self.path is not None):
            raise ValueError(f"kind = {self.kind!r} and path = {self.path!r} do not go together: files have a path, what is made has none")
        if self.images and (self.path is None or self.path.startswith("hub:")):
            raise ValueError(f"images = {self.images!r} is the folder of the images that local files name: path is {self.path!r}")
        if self.kind in ("grammar", "dialogues", "drawings") and self.documents is None:
            raise ValueError(f"kind = {self.kind!r} needs documents = N, it has no end of its own")
        if [self.name is not None, self.author is not None] != [self.kind == "identity"] * 2:
            raise ValueError(f"kind = {self.kind!r}: name and author are of kind = 'identity', which needs both")
        return self

    @property
    def shows_images(self) -> bool:
        """Whether its rows may have images."""
        return self.images is not None or self.kind == "drawings"


class Dedup(Section):
    """Equal documents are always dropped but the first; nearly equal ones by MinHash over n-grams of characters (Han) or words."""

    near: Annotated[float, Field(gt=0, le=1)] = 0.8  # Jaccard similarity from which two documents are one; 1: equal ones alone
    ngram_chars: Count = 5
    ngram_words: Count = 5
    permutations: Annotated[int, Field(ge=16, le=512)] = 128


class Decontaminate(Section):
    """No training text may hold an n-gram of an evaluation set; the test split of the recipe is always one."""

    sets: tuple[str, ...] = ()  # files relative to the recipe, in any layout
    ngram_chars: Count = 24  # of Han text
    ngram_words: Count = 13  # of other text (Brown et al. 2020, https://arxiv.org/abs/2005.14165, appendix C)
    on_hit: Literal["quarantine", "refuse"] = "quarantine"


class Shard(Section):
    seq_len: Count = 1024  # tokens a bin
    bins_per_shard: Count = 4096
    part_mib: Count = 64  # text that is read, packed and remembered as one part; larger files are cut, smaller ones of a corpus joined
    image_pixels: Annotated[int, Field(ge=3136)] = 1_003_520  # of an image, at most: larger ones are scaled down; 784 are a token of Qwen2.5-VL's


HELD_OUT_SEED = 1_000_003  # of an evaluation's drawings: no corpus's by default


class EvalTask(Section):
    """Questions that no training text may hold an n-gram of, or no training row show an image of: a file in any layout of [corpora], or drawings
    (of kind "drawings" in [corpora]), asked of the adapter and of its base."""

    path: str | None = None  # a file, relative to the recipe
    images: str | None = None  # the folder that its rows' images are in, relative to the recipe; absent: rows with images are refused
    drawings: Count | None = None  # in the place of a file: so many drawings, each with a question, made on the machine
    seed: int = HELD_OUT_SEED  # of the drawings
    # ROUGE and BLEU; options; what follows a text; a final answer; texts; JSON, item by item
    kind: Literal["generation", "choice", "cloze", "exact", "perplexity", "json"]
    layout: Literal[LAYOUTS] = "auto"  # type: ignore[valid-type]
    text: str = "text"  # the key of a text record
    mcq: Mcq = Mcq()
    rows: Count | None = None  # the first so many
    final: Text = r"####\s*(.+)"  # exact: where the final answer stands in a reply; its last match counts
    answer_schema: str | None = None  # json: the JSON Schema that answers must satisfy, a file relative to the recipe
    max_new_tokens: Count | None = None  # absent: evaluate.max_new_tokens

    @model_validator(mode="after")
    def _a_source_that_suits_the_kind(self) -> EvalTask:
        if (self.path is None) == (self.drawings is None):
            raise ValueError('a task of [evaluate.tasks] needs either path = "…" or drawings = N')
        if self.images is not None and (self.path is None or self.kind in ("cloze", "perplexity")):
            raise ValueError(f"images = {self.images!r} are shown in the conversations of a file: kind = {self.kind!r}, path = {self.path!r}")
        if self.drawings is not None and self.kind in ("choice", "cloze", "perplexity"):
            raise ValueError(f"drawings = {self.drawings} and kind = {self.kind!r}: drawings have answers, for kind 'generation', 'exact' or 'json'")
        if self.answer_schema is not None and self.kind != "json":
            raise ValueError(f"answer_schema = {self.answer_schema!r} is of kind 'json', and kind = {self.kind!r}")
        return self

    @model_validator(mode="after")
    def _final_is_a_pattern(self) -> EvalTask:
        try:
            re.compile(self.final)
        except re.error as e:
            raise ValueError(f"final = {self.final!r} is no regular expression: {e}") from None
        return self

    @property
    def shows_images(self) -> bool:
        """Whether its questions may have images."""
        return self.images is not None or self.drawings is not None


class Evaluate(Section):
    max_new_tokens: Count = 64
    batch_size: Count = 64
    tasks: dict[Name, EvalTask] = {}
    temperature: Annotated[float, Field(ge=0, le=2)] = 0.0  # of the tasks' answers
    repeats: Count = 1  # of each answer, by other seeds: the tasks' mean and standard deviation
    semantic: str | None = None  # a folder or hub id (owner/name, owner/name@revision) of an encoder: how near generated answers are in meaning
