"""What goes over the wire: our own format, OpenRLHF's remote reward, and vLLM's classification."""

import time
import uuid
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

# One fault is enough: a list of a million wrong items would make a million error records.
_Token = Annotated[int, Field(strict=True, ge=0, lt=2**31)]
_Texts = Annotated[list[str], Field(fail_fast=True)]
_Tokens = Annotated[list[_Token], Field(fail_fast=True)]
_TokenLists = Annotated[list[_Tokens], Field(fail_fast=True)]


class Message(BaseModel):
    """One turn of a conversation."""

    model_config = ConfigDict(extra="forbid")

    role: str = Field(description="`system` (first only), `user` or `assistant`")
    content: str


_Messages = Annotated[list[Message], Field(fail_fast=True)]


class PromptResponse(BaseModel):
    """A response with what it answers."""

    model_config = ConfigDict(extra="forbid")

    prompt: str | _Messages = Field(
        description="text, a `Human:`/`Assistant:` transcript, or messages ending in `user`"
    )
    response: str


class ScoreRequest(BaseModel):
    """Rows to score."""

    model_config = ConfigDict(extra="forbid")

    rows: Annotated[list[PromptResponse], Field(fail_fast=True)]


class ScoreResponse(BaseModel):
    """Rewards in the order of the rows."""

    model: str
    rewards: list[float]
    tokens: int = Field(description="tokens of all rows, each with its prompt")


class RemoteRewardRequest(BaseModel):
    """What OpenRLHF posts to its `--reward.remote_url`; other fields are ignored."""

    query: _Texts = Field(description="prompt and response as one text, special tokens written out")
    prompts: Any = Field(default=None, description="not used: `query` holds them")
    labels: Any = Field(default=None, description="not used")


class RemoteRewardResponse(BaseModel):
    """What OpenRLHF reads: the three fields that its own reward server answers with."""

    rewards: list[float]
    scores: list[float] = Field(description="the rewards again: OpenRLHF filters prompts by these")
    extra_logs: dict[str, list[float]] = Field(default_factory=dict, description="nothing to log besides")


class ClassifyRequest(BaseModel):
    """vLLM's classification request: `input` or `messages`; fields that do not change a reward are ignored."""

    model: str | None = Field(default=None, description="not used: there is one model")
    input: str | _Texts | _Tokens | _TokenLists | None = Field(
        default=None, description="texts, or token ids, each prompt and response in one"
    )
    messages: _Messages | None = Field(default=None, description="one conversation that ends in `assistant`")
    add_special_tokens: bool = Field(
        default=True, description="for texts, as in vLLM: the tokenizer adds its special tokens (often only BOS)"
    )
    truncate_prompt_tokens: int | None = Field(default=None, description="refused: nothing is cut")
    use_activation: bool | None = Field(default=None, description="true is refused: rewards are raw")
    activation: bool | None = Field(default=None, description="older name of use_activation")
    softmax: bool | None = Field(default=None, description="older name of use_activation")


class ClassifyItem(BaseModel):
    """One row's reward in the shape of a class probability."""

    index: int
    label: str | None
    probs: list[float] = Field(description="one number, the raw reward; not a probability")
    num_classes: Literal[1] = 1


class Usage(BaseModel):
    """Token counts."""

    prompt_tokens: int
    total_tokens: int
    completion_tokens: Literal[0] = 0


class ClassifyResponse(BaseModel):
    """vLLM's classification response."""

    id: str = Field(default_factory=lambda: f"classify-{uuid.uuid4().hex}")
    object: Literal["list"] = "list"
    created: int = Field(default_factory=lambda: int(time.time()), description="Unix time in seconds")
    model: str
    data: list[ClassifyItem]
    usage: Usage


class Health(BaseModel):
    """The server answers."""

    status: Literal["ok"] = "ok"
    model: str


class ErrorBody(BaseModel):
    """Why a request was refused or failed; `row` is the first row at fault, from 0, where one is."""

    error: str
    row: int | None = None
