"""Who answers: local models and servers behind one kind of function, and the options that choose."""

from dataclasses import dataclass

import pytest

from minitune import generate, load_model, load_tokenizer
from minitune.cli import parse
from minitune.endpoint import Reply
from minitune.errors import ConfigError, DataError
from minitune.responder import ResponderOptions, local_responder
from tests.chat_server import chat_server


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of a command that asks."""

    judge: ResponderOptions = ResponderOptions()
    """Who judges."""


def ask(text):
    return [{"role": "user", "content": text}]


@pytest.fixture(scope="module")
def folder(tiny_folder, tmp_path_factory):
    return str(tiny_folder(tmp_path_factory.mktemp("responder") / "model"))


@pytest.fixture(scope="module")
def loaded(folder):
    return load_model(folder), load_tokenizer(folder)


def test_a_local_model_answers_as_generate_does(loaded):
    asked = [ask("one"), ask("the second"), ask("3")]
    replies = local_responder(*loaded, max_new_tokens=6)(asked)
    assert [reply.text for reply in replies] == [generate(*loaded, one, max_new_tokens=6) for one in asked]
    assert all(reply.finished == (len(reply.text.encode()) < 6) or "\ufffd" in reply.text for reply in replies)


def test_replies_are_a_function_of_the_seed_and_the_call(loaded):
    def replies(seed, asked, **options):
        return local_responder(*loaded, max_new_tokens=8, temperature=1.0, seed=seed, **options)(asked)

    pair = [ask("one"), ask("one")]
    first = replies(0, pair)
    assert first == replies(0, pair) == replies(0, pair, batch_size=1)
    assert first[0] != first[1]  # the same question twice has two answers
    assert first != replies(1, pair)
    assert replies(0, [ask("two"), ask("one")])[1] != first[1]  # another call draws anew


def test_a_tokenizer_without_chat_template_cannot_be_asked(loaded, monkeypatch):
    model, tokenizer = loaded
    monkeypatch.setattr(tokenizer, "chat_template", None)
    with pytest.raises(ConfigError, match="has no chat template, which questions need; use an instruct model"):
        local_responder(model, tokenizer, max_new_tokens=4)


def test_a_question_that_is_too_long_is_named(loaded):
    with pytest.raises(DataError, match="prompt 2 has .* tokens"):
        local_responder(*loaded, max_new_tokens=4)([ask("x"), ask("x" * 400)])


def test_options_load_either(folder, monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    local = ResponderOptions(model=folder, dtype="float32", max_new_tokens=5)
    assert local.name == folder and isinstance(local.responder()([ask("x")])[0], Reply)
    with chat_server(lambda request: f"{request['model']} {request['max_tokens']} {'seed' in request}") as server:
        judge = parse(
            Options,
            ["--judge.endpoint", server.url, "--judge.model=big", "--judge.temperature=1", "--judge.retries=0"],
            prog="x", description="x",
        ).judge  # fmt: skip
        assert judge.responder()([ask("x")]) == [Reply("big 256 True", True)]
        assert judge.name == f"big at {server.url}"
        assert ResponderOptions(model="m", endpoint=server.url).responder()([ask("x")])[0].text == "m 256 False"


def test_nobody_is_asked_by_default():
    nobody = parse(Options, [], prog="x", description="x").judge
    assert nobody.model is None
    with pytest.raises(ConfigError, match="no model is named that answers"):
        nobody.responder()


@pytest.mark.parametrize(
    "arguments, expected",
    [
        ("temperature=1", "temperature is set, but no model is named"),
        ("endpoint=http://localhost:1/v1", "endpoint is set, but no model is named"),
        ("model=m retries=3", "retries belongs to an endpoint, and none is given"),
        ("model=m key_variable=K", "key_variable belongs to an endpoint"),
        ("model=m endpoint=http://localhost:1/v1 dtype=float32", "dtype has no effect on answers of the endpoint"),
        ("model=m endpoint=http://localhost:1/v1 batch_size=4", "batch_size has no effect"),
        ("model=m endpoint=http://localhost:1/v1 adapter=a", "adapter has no effect"),
        ("model=m endpoint=localhost", "write it as http://localhost:8000/v1"),
        ("model=m endpoint=http://localhost:1/v1 key_variable=NO_SUCH_KEY", "NO_SUCH_KEY is not set"),
        ("model=m seed=1", "seed has no effect at temperature 0"),
        ("model=m seed=-1 temperature=1", "seed is -1"),
        ("model=m temperature=-1", "temperature is -1"),
        ("model=m max_new_tokens=0", "max_new_tokens is 0"),
        ("model=m batch_size=0", "batch_size is 0"),
        ("model=m timeout=soon", "timeout"),
    ],
)
def test_options_that_would_be_ignored_or_have_no_meaning(arguments, expected):
    with pytest.raises(ConfigError, match=expected):
        parse(Options, [f"--judge.{argument}" for argument in arguments.split()], prog="x", description="x")
