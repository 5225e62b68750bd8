"""Who answers: a model of this machine or a server's, chosen by options, asked as one kind of function.

A `Responder` takes conversations and returns a reply to each; judges, teachers and golden sets need no more, and so
know neither models nor HTTP. Its replies are a function of (seed, the conversations of that call): a run that was
interrupted and asks the same again gets the same, where the model's arithmetic is deterministic. Seeding each call by
a counter was rejected for that reason.
"""

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from minitune.endpoint import Conversation, Endpoint, Reply, Responder, derived_seed
from minitune.errors import ConfigError, check_counts, check_seed
from minitune.loading import ModelOptions
from minitune.sampling import Sampling

if TYPE_CHECKING:
    from minitune.model.transformer import Transformer
    from minitune.text.tokenizer import Tokenizer

REMOTE = ("key_variable", "timeout", "retries", "parallel", "limit_name")


def local_responder(
    model: "Transformer",
    tokenizer: "Tokenizer",
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    seed: int = 0,
    batch_size: int = 32,
) -> Responder:
    """Return what answers with a loaded model.

    Args:
        model: the model.
        tokenizer: its tokenizer, with a chat template.
        max_new_tokens: longest answer, in tokens; one that is cut off there is not finished.
        temperature: 0 is greedy.
        seed: with a temperature, fixes the replies to a call's conversations.
        batch_size: conversations answered at once.

    Raises:
        ConfigError: there is no chat template. The responder: DataError where a conversation is too long.
    """
    from minitune.decoding import generate_texts

    if tokenizer.chat_template is None:
        raise ConfigError(f"{tokenizer.origin} has no chat template, which questions need; use an instruct model")

    def respond(conversations: Sequence[Conversation]) -> list[Reply]:
        answers = generate_texts(
            model, tokenizer, conversations, max_new_tokens=max_new_tokens,
            sampling=Sampling(temperature=temperature), seed=derived_seed(seed, *conversations), batch_size=batch_size,
        )  # fmt: skip
        return [Reply(answer.text, answer.finished) for answer in answers]

    return respond


@dataclass(frozen=True, kw_only=True)
class ResponderOptions(ModelOptions):
    """Who answers: a model loaded here, or one behind an endpoint. Without a model, nobody: then nothing may be set."""

    model: str | None = None
    """A fetched model's name, a Hugging Face folder or a GGUF file; with endpoint, the server's name for it."""
    endpoint: str | None = None
    """Ask the server at this address, as http://localhost:8000/v1, in OpenAI's chat-completions form."""
    key_variable: str | None = None
    """With endpoint: the environment variable that holds the key."""
    timeout: float | None = None
    """With endpoint: seconds that one request may take (default 120)."""
    retries: int | None = None
    """With endpoint: how often a request that failed for the moment is sent again (default 4)."""
    parallel: int | None = None
    """With endpoint: requests under way at once (default 4)."""
    limit_name: str | None = None
    """With endpoint: what it calls the longest answer, max_tokens (default) or max_completion_tokens."""
    max_new_tokens: int = 256
    """Longest answer, in tokens."""
    temperature: float = 0.0
    """0 is greedy."""
    seed: int | None = None
    """With a temperature: the same seed gives the same answers (default 0)."""
    batch_size: int | None = None
    """Without endpoint: conversations answered at once (default 32)."""

    def __post_init__(self):
        """Refuse numbers without meaning, and options that would be ignored."""
        given = [field.name for field in dataclasses.fields(self) if getattr(self, field.name) != field.default]
        local = {field.name for field in dataclasses.fields(ModelOptions)} - {"model"} | {"batch_size"}
        for name in given:
            if self.model is None:
                raise ConfigError(f"{name} is set, but no model is named that answers; name one with .model")
            if self.endpoint is None and name in REMOTE:
                raise ConfigError(f"{name} belongs to an endpoint, and none is given; leave it out")
            if self.endpoint is not None and name in local:
                raise ConfigError(f"{name} has no effect on answers of the endpoint {self.endpoint}; leave it out")
        check_counts(max_new_tokens=self.max_new_tokens, batch_size=self.batch_size)
        check_seed(self.seed)
        Sampling(temperature=self.temperature)
        if self.seed is not None and self.temperature == 0:
            raise ConfigError("seed has no effect at temperature 0 (greedy); set a temperature above 0")
        if self.endpoint is not None:
            self._remote()

    @property
    def name(self) -> str:
        """What answers, for reports: the model and its address or adapter."""
        if self.endpoint is not None:
            return f"{self.model} at {self.endpoint}"
        return self.model if self.adapter is None else f"{self.model} + {self.adapter}"

    @property
    def identity(self) -> str:
        """What decides the replies, for journals of them: the model and how it answers, not how it is reached.

        What else the options of a subclass say is not of the one who answers.
        """
        ignored = {"device", "backend", "batch_size", *REMOTE}
        chosen = {field.name: getattr(self, field.name) for field in dataclasses.fields(ResponderOptions)}
        return json.dumps({name: value for name, value in chosen.items() if name not in ignored}, sort_keys=True)

    @property
    def at_once(self) -> int:
        """How many conversations to hand over in one call, so that none waits and little is lost with a call."""
        return (self.batch_size or 32) if self.endpoint is None else (self.parallel or 4)

    def responder(self) -> Responder:
        """Return what answers, its model loaded where it is one of this machine.

        Raises ConfigError, CheckpointError as `ModelOptions.load`, where there is no chat template, or no model named.
        """
        if self.model is None:
            raise ConfigError("no model is named that answers; give its name, as --teacher.model or --judge.model")
        if self.endpoint is not None:
            return self._remote()
        model, tokenizer = self.load()
        return local_responder(
            model, tokenizer, max_new_tokens=self.max_new_tokens, temperature=self.temperature, seed=self.seed or 0,
            batch_size=self.at_once,
        )  # fmt: skip

    def _remote(self) -> Endpoint:
        given: dict[str, Any] = {name: getattr(self, name) for name in REMOTE if getattr(self, name) is not None}
        return Endpoint(
            self.endpoint, self.model, **given, max_new_tokens=self.max_new_tokens, temperature=self.temperature,
            seed=(self.seed or 0) if self.temperature else None,
        )  # fmt: skip
