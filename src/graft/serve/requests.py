"""What a request may hold, field by field; one that the server would ignore is refused by its name."""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, Tag, ValidationError

from graft.core.errors import ServeError

MOST_CHOICES, MOST_STOPS, MOST_MESSAGES, MOST_PARTS, MOST_LOGPROBS = 8, 4, 1024, 1024, 20
MAX_BODY = 2 << 20  # bytes, without images; a prompt of 128k tokens is about a quarter of it


class ApiError(ServeError):
    """An HTTP error in OpenAI's shape."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None):
        super().__init__(message)
        self.status = status
        kind = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}.get(
            status, "invalid_request_error" if status < 500 else "server_error"
        )
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class TextPart(Strict):
    type: Literal["text"]
    text: str


class ImageURL(Strict):
    """detail: only what leaves the size to the server, as the others would be ignored."""

    url: Annotated[str, Field(description="data:image/png;base64,… (or jpeg, webp, gif); http(s) where the server fetches")]
    detail: Literal["auto"] | None = None


class ImagePart(Strict):
    type: Literal["image_url"]
    image_url: ImageURL


def _kind_of_content(value: Any) -> str:
    return "<text>" if isinstance(value, str) else "<parts>"


def _kind_of_part(value: Any) -> str | None:
    kind = value.get("type") if isinstance(value, dict) else getattr(value, "type", None)
    return {"text": "<text>", "image_url": "<image>"}.get(kind) if isinstance(kind, str) else None


# Tags choose what an error speaks of; the brackets tell them from fields in its place
Part = Annotated[
    Annotated[TextPart, Tag("<text>")] | Annotated[ImagePart, Tag("<image>")],
    Discriminator(_kind_of_part, custom_error_type="part", custom_error_message='a part is {{"type": "text", …}} or {{"type": "image_url", …}}'),
]
Parts = Annotated[list[Part], Field(max_length=MOST_PARTS, fail_fast=True)]


class Message(Strict):
    role: Literal["system", "user", "assistant"]
    content: Annotated[Annotated[str, Tag("<text>")] | Annotated[Parts, Tag("<parts>")], Discriminator(_kind_of_content)]

    @property
    def rendered(self) -> dict[str, Any]:
        """As model/chat.py takes it: a content is a text, or, where it shows images, a list of parts."""
        if isinstance(self.content, str):
            return {"role": self.role, "content": self.content}
        parts = [{"type": "text", "text": p.text} if isinstance(p, TextPart) else {"type": "image"} for p in self.content]
        shows = any(p["type"] == "image" for p in parts)
        return {"role": self.role, "content": parts if shows else "".join(p["text"] for p in parts)}


class StreamOptions(Strict):
    include_usage: bool = False


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


Tokens = Annotated[int, Field(ge=1, le=2**31)]


class Sampled(Strict):
    """The fields that both ways of asking share; top_k is vLLM's."""

    model: str
    temperature: Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)] | None = None  # None is 1, as there
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0, le=2**31)] | None = None  # 0: all
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: Annotated[
        Annotated[list[Annotated[str, Field(min_length=1, max_length=256)]], Field(max_length=MOST_STOPS)] | None, BeforeValidator(_as_list)
    ] = None
    n: Annotated[int, Field(ge=1, le=MOST_CHOICES)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: Annotated[str, Field(max_length=512)] | None = None


class ChatRequest(Sampled):
    """https://platform.openai.com/docs/api-reference/chat/create, as far as it is served."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=MOST_MESSAGES)]
    max_tokens: Tokens | None = None
    max_completion_tokens: Tokens | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS)] | None = None

    @property
    def images(self) -> list[tuple[str, str]]:
        """(place, URL) of each, in order."""
        parts = (
            (f"messages.{i}.content.{j}", p) for i, m in enumerate(self.messages) if not isinstance(m.content, str) for j, p in enumerate(m.content)
        )
        return [(place, p.image_url.url) for place, p in parts if isinstance(p, ImagePart)]

    @property
    def most(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    @property
    def likeliest(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None


class CompletionRequest(Sampled):
    """https://platform.openai.com/docs/api-reference/completions/create, as far as it is served: one prompt, of text or token ids."""

    prompt: Annotated[str, Field(min_length=1)] | Annotated[list[Annotated[int, Field(ge=0, lt=2**31)]], Field(min_length=1)]
    max_tokens: Tokens | None = 16
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None

    @property
    def most(self) -> int | None:
        return self.max_tokens

    @property
    def likeliest(self) -> int | None:
        return self.logprobs


class AdapterRequest(Strict):
    """Of /admin: a name, or name@version."""

    model: Annotated[str, Field(min_length=1, max_length=128)]


class LoadRequest(AdapterRequest):
    override: Annotated[str, Field(min_length=1, max_length=512)] | None = None  # why it may answer although the gate refuses it


class AliasRequest(Strict):
    alias: Annotated[str, Field(min_length=1, max_length=64)]
    model: Annotated[str, Field(min_length=1, max_length=128)]


Asked = TypeVar("Asked", bound=Strict)
_TAGS = ("<text>", "<parts>", "<image>")
_BELOW: dict[Any, type[Strict]] = {"stream_options": StreamOptions, "<text>": TextPart, "<image>": ImagePart, "image_url": ImageURL}


def parse(body: bytes, kind: type[Asked]) -> Asked:
    """The validated request; ApiError 400 names the first field that is wrong or not served, 413 what is too long."""
    if body.count(b",") > MAX_BODY:  # no images: millions of values, which take many times their text to read
        raise ApiError(413, f"more than {MAX_BODY} bytes beside the images")
    try:
        asked = kind.model_validate_json(body)
    except ValidationError as e:
        error = e.errors(include_url=False)[0]
        param = ".".join(str(at) for at in error["loc"] if at not in _TAGS) or None
        if error["type"] == "extra_forbidden":
            at: Any = _BELOW.get(error["loc"][-2], Message) if len(error["loc"]) > 1 else kind
            raise ApiError(
                400, f"unsupported field {param!r}: this server takes {', '.join(at.model_fields)}", param, "unsupported_parameter"
            ) from None
        if error["type"] == "missing":
            raise ApiError(400, f"missing field {param!r}", param, "missing_required_parameter") from None
        raise ApiError(400, f"{param or 'the body'}: {error['msg']}", param, "invalid_value" if param else "invalid_json") from None
    if isinstance(asked, Sampled) and asked.stream_options and not asked.stream:
        raise ApiError(400, "stream_options goes with stream = true only", "stream_options", "invalid_value")
    if isinstance(asked, ChatRequest):
        if len(body) - sum(len(url) for _, url in asked.images) > MAX_BODY:
            raise ApiError(413, f"the messages take more than {MAX_BODY} bytes beside their images", "messages")
        for place, _ in asked.images:
            if (role := asked.messages[int(place.split(".")[1])].role) != "user":
                raise ApiError(400, f"{place}: an image of the {role}'s: only user messages show images", place, "invalid_value")
        if asked.max_tokens and asked.max_completion_tokens:
            raise ApiError(400, "max_tokens and max_completion_tokens mean the same: give one", "max_tokens", "invalid_value")
        if asked.top_logprobs is not None and not asked.logprobs:
            raise ApiError(400, "top_logprobs goes with logprobs = true only", "top_logprobs", "invalid_value")
    return asked
