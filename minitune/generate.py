"""Command: ask a model. One prompt, a conversation in the terminal, or a file of prompts.

python -m minitune.generate --model M --prompt "..."             # streams the answer
python -m minitune.generate --model M --adapter A --chat         # /reset, /exit, Ctrl-C stops an answer
python -m minitune.generate --model M --adapter [poet=A,judge=B] --use judge --prompt "..."
python -m minitune.generate --model M --input prompts.jsonl --output answers.jsonl
"""

import json
import os.path
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minitune.cli import parse
from minitune.errors import (
    ConfigError,
    DataError,
    MinituneError,
    check_counts,
    check_seed,
    counted,
    nearest,
    run_command,
)
from minitune.loading import ModelOptions, check_adapters
from minitune.sampling import Sampling

if TYPE_CHECKING:
    from minitune.decoding import Answer, Prompt

Adapters = dict[str, str] | str | None
TURN_COLOUR = "\033[1;36m{}\033[0m"


@dataclass(frozen=True, kw_only=True)
class GenerateConfig(Sampling, ModelOptions):
    """What to ask, of which model, and how to choose the words."""

    prompt: str | None = None
    """Ask this, and print the answer."""
    chat: bool = False
    """Talk in the terminal."""
    input: str | None = None
    """Ask every line of a .txt file, or every row of a .jsonl, .json or .csv file: {"prompt"} or {"messages"}.

    With several adapters a row can name its own: {"adapter"}, null for the base alone."""
    output: str | None = None
    """With input: the JSONL file for the rows, each with answer, tokens and finished added."""
    overwrite: bool = False
    """Replace that file where it is there."""
    system: str | None = None
    """System message before the prompt or the conversation."""
    raw: bool = False
    """Continue the prompt as plain text, without the chat template."""
    stop: tuple[str, ...] | str = ()
    """Text that ends an answer, as END or ["END", "###"]."""
    max_new_tokens: int = 256
    """Longest answer, in tokens."""
    seed: int | None = None
    """With a temperature: the same seed gives the same answers (default 0)."""
    batch_size: int | None = None
    """With input: prompts answered at once (default 8)."""

    def __post_init__(self):
        """Refuse missing, contradicting and ignored options, and a file that would be lost."""
        super().__post_init__()
        modes = [name for name in ("prompt", "chat", "input") if getattr(self, name) not in (None, False)]
        if len(modes) != 1:
            found = "none of them" if not modes else " and ".join(modes)
            raise ConfigError(f"give one of --prompt, --chat and --input; found {found}")
        for name in ("output", "overwrite", "batch_size"):
            if getattr(self, name) not in (None, False) and self.input is None:
                raise ConfigError(f"{name} is set without input, which it belongs to; leave it out")
        if self.input is not None:
            self._check_output()
        if self.raw and (self.chat or self.system is not None):
            other = "chat" if self.chat else "system"
            raise ConfigError(f"raw uses no chat template and {other} needs one; leave one of them out")
        if self.seed is not None and self.temperature == 0:
            raise ConfigError("seed has no effect at temperature 0 (greedy); set a temperature above 0")
        check_adapters(self.adapter, self.use, self.weights)
        check_seed(self.seed)
        check_counts(max_new_tokens=self.max_new_tokens, batch_size=self.batch_size)
        if self.prompt is not None and not self.prompt.strip():
            raise ConfigError("the prompt is empty; give it some text")

    def _check_output(self) -> None:
        """Refuse an output that is missing, would replace the prompts, or is there already and may not be replaced."""
        if self.output is None:
            raise ConfigError("output is missing; name the JSONL file for the answers, as in --output answers.jsonl")
        if os.path.exists(self.output) and not os.path.isdir(self.output):
            if os.path.exists(self.input) and os.path.samefile(self.input, self.output):
                raise ConfigError(f"input and output are both {self.output}; the answers need a file of their own")
            if not self.overwrite:
                raise ConfigError(f"{self.output} is there already; name another file, or replace it with --overwrite")

    def options(self) -> dict[str, Any]:
        """Return the keyword arguments of `generate_texts`."""
        return {
            "max_new_tokens": self.max_new_tokens,
            "sampling": Sampling.of(self),
            "stop": (self.stop,) if isinstance(self.stop, str) else self.stop,
            "raw": self.raw,
            "seed": self.seed or 0,
        }

    @property
    def answering(self) -> "Adapters":
        """The adapters that a row may name, as `ModelOptions.adapters`; with weights also their sum, called sum."""
        return self.adapters if self.weights is None else {**self.adapters, "sum": ""}

    def opening(self) -> list[dict[str, str]]:
        """Return the messages that every conversation starts with."""
        return [] if self.system is None else [{"role": "system", "content": self.system}]

    def asked(self, prompt: str) -> "Prompt":
        """Return a user's text as `generate_texts` takes it."""
        return prompt if self.system is None else [*self.opening(), {"role": "user", "content": prompt}]


def main(argv: list[str] | None = None) -> None:
    """Parse the options, load the model, answer."""
    config = parse(GenerateConfig, argv, prog="python -m minitune.generate", description=__doc__.split("\n")[0])
    rows = [] if config.input is None else read_prompts(Path(config.input), config.answering)
    model, tokenizer = config.load()
    if config.chat:
        chat(model, tokenizer, config)
    elif config.input is not None:
        answer_file(model, tokenizer, config, rows)
    else:
        stream(model, tokenizer, config.asked(config.prompt), config)


def stream(model: Any, tokenizer: Any, prompt: "Prompt", config: GenerateConfig, **options: Any) -> "Answer":
    """Print an answer while it is generated; a note on stderr says when it was cut off."""
    from minitune.decoding import generate_texts

    def show(row: int, text: str) -> None:
        print(text, end="", flush=True)
        if heard is not None:
            heard.append(text)

    heard = options.pop("heard", None)
    (answer,) = generate_texts(model, tokenizer, [prompt], on_text=show, **config.options() | options)
    print(flush=True)
    if not answer.finished:
        print(f"[cut off at max_new_tokens {config.max_new_tokens}]", file=sys.stderr)
    return answer


def chat(model: Any, tokenizer: Any, config: GenerateConfig) -> None:
    """Hold a conversation; every turn goes on from the whole of it."""
    if tokenizer.chat_template is None:
        raise ConfigError(f"{config.model} has no chat template; use --prompt, which continues plain text")
    if sys.stdin.isatty():
        print("/reset starts anew, /exit or Ctrl-D leaves, Ctrl-C stops an answer")
    messages = config.opening()
    while True:
        said = _ask()
        if said == "/exit":
            return
        if said == "/reset":
            messages = config.opening()
            print("(new conversation)")
        elif said.split()[:1] == ["/use"]:
            _use(model, said.removeprefix("/use").strip())
        elif said.startswith("/"):
            print(f"unknown command {said.split()[0]}; known: /reset, /exit, /use ADAPTER, /use (the base alone)")
        elif said:
            messages = _turn(model, tokenizer, config, messages, said)


def _use(model: Any, name: str) -> None:
    """Switch to another of several adapters for the rest of the conversation; "" and "base" are none of them."""
    from minitune.model.adapter_set import adapter_names, choose

    base = name in ("", "base") and name not in adapter_names(model)
    try:
        choose(model, None if base else name)
        print(f"({'base' if base else name} answers now)")
    except MinituneError as error:
        print(f"error: {error}", file=sys.stderr)


def _ask() -> str:
    """Return the next line of the user; the end of the input counts as /exit, Ctrl-C as an empty line.

    Only a person is prompted: with lines from a pipe, the answers alone are printed.
    """
    try:
        prompt = "you> " if sys.stdin.isatty() else ""
        return input(TURN_COLOUR.format(prompt) if sys.stdout.isatty() else prompt).strip()
    except EOFError:
        if sys.stdin.isatty():
            print()
        return "/exit"
    except KeyboardInterrupt:
        print("\n(/exit leaves)")
        return ""


def _turn(model: Any, tokenizer: Any, config: GenerateConfig, messages: list, said: str) -> list:
    """Answer one message; return the conversation with both, or as it was when there is no answer."""
    asked = [*messages, {"role": "user", "content": said}]
    heard: list[str] = []
    try:
        stream(model, tokenizer, asked, config, heard=heard, seed=(config.seed or 0) + len(messages))
    except KeyboardInterrupt:
        print("\n(stopped)")
    except MinituneError as error:
        print(f"error: {error} (/reset starts anew)", file=sys.stderr)
    answer = "".join(heard)
    return [*asked, {"role": "assistant", "content": answer}] if answer.strip() else messages


def read_prompts(path: Path, adapters: Adapters = None) -> list[dict[str, Any]]:
    """Return the rows of a file of prompts, each with "prompt" (text) or "messages" (ending with the user's).

    Raises DataError with file:line for a row that has neither or both, cannot be asked, or names none of `adapters`.
    """
    from minitune.data.reading import RowError, data_path, read_rows

    path = data_path(path)
    if path.suffix == ".txt":
        (_, fields), = read_rows(path)  # fmt: skip
        return [{"prompt": line} for line in fields["text"].splitlines() if line.strip()]
    rows = []
    for origin, fields in read_rows(path):
        if isinstance(fields, RowError):
            raise fields
        problem = _problem(fields) or ("adapter" in fields and _adapter_problem(fields["adapter"], adapters))
        if problem:
            raise DataError(f"{origin}: {problem}")
        rows.append(fields)
    if not rows:
        raise DataError(f"{path}: no rows; give a file with at least one prompt")
    return rows


def _problem(fields: dict[str, Any]) -> str | None:
    """Say why a row cannot be asked, None if it can."""
    prompt, messages = fields.get("prompt"), fields.get("messages")
    if (prompt is None) == (messages is None):
        return 'a row needs one of "prompt" and "messages"'
    if prompt is not None:
        return None if isinstance(prompt, str) and prompt.strip() else "the prompt is empty or not text"
    good = isinstance(messages, list) and all(
        isinstance(turn, dict) and isinstance(turn.get("role"), str) and isinstance(turn.get("content"), str)
        for turn in messages
    )
    if not good or not messages:
        return '"messages" is not a list of {"role", "content"} with text in both'
    return None if messages[-1]["role"] == "user" else "the last message is not the user's; leave the answer out"


def _adapter_problem(name: Any, adapters: Adapters) -> str | None:
    """Say why a row's adapter cannot answer it, None if it can; null is the base alone."""
    if isinstance(adapters, dict):
        if name is None or name in list(adapters):
            return None
        return f"no adapter is called {name!r}; there are {', '.join(adapters)}{nearest(str(name), adapters)}"
    if name is None and adapters is None:
        return None
    found = "null (the base alone)" if name is None else repr(name)
    return f'"adapter" is {found} and no adapter is loaded by name; give --adapter "[{name or "poet"}=FOLDER]"'


def answer_file(model: Any, tokenizer: Any, config: GenerateConfig, rows: list[dict[str, Any]]) -> None:
    """Answer every row in batches and write them in their order, at once, when all are there."""
    from tqdm import tqdm

    from minitune.decoding import generate_texts
    from minitune.files import atomic_file

    prompts = [
        config.asked(row["prompt"]) if "prompt" in row else [*config.opening(), *row["messages"]] for row in rows
    ]
    with (
        atomic_file(config.output) as path,
        open(path, "w", encoding="utf-8") as file,
    ):  # fails before the work, not after
        with tqdm(total=len(rows), desc="answers", unit=" rows") as bar:
            answers = generate_texts(
                model, tokenizer, prompts,
                batch_size=config.batch_size or 8, adapters=named_adapters(model, rows),
                on_batch=bar.update, **config.options(),
            )  # fmt: skip
        for row, answer in zip(rows, answers, strict=True):
            result = {"answer": answer.text, "tokens": answer.tokens, "finished": answer.finished}
            file.write(json.dumps(row | result, ensure_ascii=False) + "\n")
    cut = sum(not answer.finished for answer in answers)
    print(f"{counted(len(rows), 'answer')} in {config.output}; {cut} cut off at max_new_tokens {config.max_new_tokens}")


def named_adapters(model: Any, rows: list[dict[str, Any]]) -> list[str | None] | None:
    """Return the adapter of each row, that which is on where a row names none; None where no row does."""
    from minitune.model.adapter_set import chosen_name

    named = any("adapter" in row for row in rows)
    return [row.get("adapter", chosen_name(model)) for row in rows] if named else None


if __name__ == "__main__":
    run_command(main)
