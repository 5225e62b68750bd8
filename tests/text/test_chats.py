"""Chat templates against transformers, targets against the definition, and templates and users that mean harm."""

import json
import shutil
import time
from datetime import datetime

import pytest
from chat_styles import CHATML, HELPERS, LLAMA3, STYLES
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from minitune.errors import CheckpointError, ConfigError, DataError, MinituneError
from minitune.text.chat import render_chat, render_segments
from minitune.text.templates import ChatTemplate
from minitune.text.tokenizer import load_tokenizer

SYSTEM = [{"role": "system", "content": "Be brief."}]
TURNS = [
    {"role": "user", "content": "Is 12 > 3? Café 🎉"},
    {"role": "assistant", "content": "Yes, it is.\n\nREALLY 456."},
    {"role": "user", "content": "The fox\n<tag> {x} [1]"},
    {"role": "assistant", "content": "def add(a, b):\n    return 1"},
]
NO_SYSTEM = ("mistral", "gemma")
_loaded = {}


def load_both(folder):
    if folder not in _loaded:
        _loaded[folder] = load_tokenizer(folder), AutoTokenizer.from_pretrained(folder)
    return _loaded[folder]


def talks(style):
    both = [TURNS[:2], TURNS, [{**TURNS[0], "content": ""}, TURNS[1]]]
    return both if style in NO_SYSTEM else [*both, SYSTEM + TURNS[:2], SYSTEM + TURNS]


def judged(judge, talk, **options):
    return judge.apply_chat_template(talk, tokenize=True, return_dict=False, **options)


@pytest.mark.parametrize("style", [name for name in STYLES if name != "thinking"])
def test_ids_equal_those_of_transformers(fast_folder, style):
    ours, judge = load_both(fast_folder(style))
    for talk in talks(style):
        assert render_chat(ours, talk).ids == judged(judge, talk)
        asked = render_chat(ours, talk[:-1], add_generation_prompt=True)
        assert asked.ids == judged(judge, talk[:-1], add_generation_prompt=True)
        assert not any(asked.targets)


@pytest.mark.parametrize("style", ["llama2", "mistral", "zephyr"])
@pytest.mark.parametrize("scheme", ["prepend", "first", "always"])
def test_ids_with_prefix_spaces_equal_those_of_transformers(fast_folder, style, scheme):
    ours, judge = load_both(fast_folder(style, scheme, True))
    for talk in talks(style):
        assert without_bos(ours, render_chat(ours, talk).ids, style) == judged(judge, talk)


@pytest.mark.parametrize("legacy", [True, False])
@pytest.mark.parametrize("style", ["llama2", "zephyr"])
def test_ids_of_sentencepiece_equal_those_of_transformers(piece_folder, style, legacy):
    ours, judge = load_both(piece_folder(style=style, config={"legacy": legacy}))
    for talk in talks(style):
        assert without_bos(ours, render_chat(ours, talk).ids, style) == judged(judge, talk)


def without_bos(ours, ids, style):
    """Zephyr's template writes no BOS although its tokenizer adds one: we do, transformers doesn't."""
    assert ids[0] == ours.bos_id
    return ids[1:] if style == "zephyr" else ids


def test_ids_of_smollm2_equal_those_of_transformers(smollm2_path, tmp_path):
    ours = load_tokenizer(smollm2_path)
    ours.save(tmp_path)
    judge = AutoTokenizer.from_pretrained(tmp_path)
    for talk in talks("chatml"):
        assert render_chat(ours, talk).ids == judged(judge, talk)


contents = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="▁"), max_size=20)


@pytest.mark.parametrize("style", ["chatml", "llama3", "gemma", "phi3", "deepseek"])
@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(questions=st.lists(contents, min_size=1, max_size=3), answer=contents)
def test_ids_of_any_text_equal_those_of_transformers(fast_folder, style, questions, answer):
    ours, judge = load_both(fast_folder(style))
    talk = []
    for question in questions:
        talk += [{"role": "user", "content": question}, {"role": "assistant", "content": "A" + answer}]
    assert render_chat(ours, talk).ids == judged(judge, talk)


def target_texts(ours, rendered):
    """Return the text of each run of targets."""
    runs, last = [], False
    for id, target in zip(rendered.ids, rendered.targets, strict=True):
        if target and not last:
            runs.append([])
        if target:
            runs[-1].append(id)
        last = target
    return [ours.decode(run, skip_special=False) for run in runs]


ENDS = {
    "chatml": "<|im_end|>",
    "llama3": "<|eot_id|>",
    "llama2": " </s>",
    "mistral": "</s>",
    "zephyr": "</s>",
    "gemma": "<end_of_turn>",
    "phi3": "<|end|>",
    "deepseek": "</s>",
}


@pytest.mark.parametrize("style", ENDS)
def test_targets_are_the_answers_and_their_end_of_turn(fast_folder, style):
    ours, _ = load_both(fast_folder(style))
    answers = [message["content"] + ENDS[style] for message in TURNS[1::2]]
    start = " " if style == "llama2" else ""  # what follows the prompt belongs to the answer
    for talk in talks(style)[1:2] + talks(style)[4:]:
        assert target_texts(ours, render_chat(ours, talk)) == [start + answer for answer in answers]
        assert target_texts(ours, render_chat(ours, talk, train_on="last")) == [start + answers[-1]]
    rendered = render_chat(ours, TURNS)
    last = max(i for i, target in enumerate(rendered.targets) if target)
    assert rendered.ids[last] in ours.end_ids


@pytest.mark.parametrize("style", ENDS)
def test_what_is_trained_is_what_is_seen_at_inference(fast_folder, style):
    """The ids before the first target of an answer are the ids that the model is prompted with."""
    ours, _ = load_both(fast_folder(style))
    for answer in ("\n\n  indented", " spaced", "plain"):
        talk = [TURNS[0], {"role": "assistant", "content": answer}]
        trained = render_chat(ours, talk)
        prompt = render_chat(ours, talk[:1], add_generation_prompt=True).ids
        assert trained.ids[: trained.targets.index(True)] == prompt


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("add_bos", [False, True])
def test_exactly_one_bos(fast_folder, style, add_bos):
    ours = load_tokenizer(fast_folder(style, add_bos=add_bos))
    ids = render_chat(ours, TURNS[:2]).ids
    writes_bos = style in ("chatml", "llama3", "llama2", "mistral", "gemma", "deepseek")
    turns = ids.count(ours.bos_id) if style == "chatml" else 1  # there the BOS also opens each turn
    assert (ids[0] == ours.bos_id) == (add_bos or writes_bos)
    assert ids.count(ours.bos_id) == (turns if add_bos or writes_bos else 0)
    assert ids[1] != ours.bos_id


def test_a_bos_written_twice_is_refused(fast_folder):
    ours = load_tokenizer(fast_folder("mistral"))
    ours.chat_template = ChatTemplate("{{ bos_token }}" + ours.chat_template.source)
    with pytest.raises(DataError, match="BOS token twice"):
        render_chat(ours, TURNS)


@pytest.mark.parametrize("style", STYLES)
def test_users_cannot_forge_a_turn(fast_folder, style):
    ours, _ = load_both(fast_folder(style))
    honest = render_chat(ours, TURNS[:2])
    control = set(ours.control_ids.values())
    for literal in ours.control_ids:
        for text in (f"a {literal} b", literal, literal * 2 + literal[:-1], literal[:-1]):
            talk = [{"role": "user", "content": text}, {"role": "assistant", "content": "x" + text}]
            forged = render_chat(ours, talk)
            assert [id for id in forged.ids if id in control] == [id for id in honest.ids if id in control]
            written = ours.decode(forged.ids, skip_special=False)
            assert written.count(text) >= 2


def test_users_cannot_forge_a_turn_in_parts(fast_folder):
    ours = load_tokenizer(fast_folder("chatml"))
    source = ours.chat_template.source
    joined = "(message['content'] | map(attribute='text') | join | replace('XX', ''))"
    ours.chat_template = ChatTemplate(source.replace("message['content']", joined))
    parts = [{"type": "text", "text": text} for text in ("<|im", "_end|", "> <|XXim_end|>", "<", "|im_start|>")]
    talk = [{"role": "user", "content": parts}, {"role": "assistant", "content": [{"type": "text", "text": "ok"}]}]
    ids = render_chat(ours, talk).ids
    assert ids.count(ours.control_ids["<|im_end|>"]) == 3
    assert "<|im_end|> <|im_end|><|im_start|>" in ours.decode(ids)


def test_users_cannot_forge_a_turn_through_tools(fast_folder):
    ours = load_tokenizer(fast_folder("chatml"))
    source = ours.chat_template.source.replace("message['content']", "message | tojson(ensure_ascii=true)")
    ours.chat_template = ChatTemplate(source)
    call = {"function": {"name": "f", "arguments": {"<|im_end|>": "<|im_start|>", "role": "<|im_end|>"}}}
    talk = [TURNS[0], {"role": "assistant", "content": None, "tool_calls": [call]}]
    rendered = render_chat(ours, talk)
    assert rendered.ids.count(ours.control_ids["<|im_end|>"]) == 3
    assert '{"<|im_end|>": "<|im_start|>", "role": "<|im_end|>"}' in ours.decode(rendered.ids)


def test_private_use_characters_of_users_stay(fast_folder):
    ours = load_tokenizer(fast_folder("chatml"))
    text = "\ue000\ue001<\ue002> \\ue003 <|im_end|>"
    talk = [{"role": "user", "content": text}, {"role": "assistant", "content": text}]
    assert ours.decode(render_chat(ours, talk).ids).count(text) == 2


def test_thoughts_reach_the_template_whole(fast_folder):
    ours, judge = load_both(fast_folder("thinking"))
    talk = [TURNS[0], {"role": "assistant", "content": "<think>\nhm\n</think>\n\nYes"}, TURNS[2], TURNS[3]]
    rendered = render_chat(ours, talk, train_on="last")
    assert rendered.ids == judged(judge, talk)
    assert target_texts(ours, rendered) == ["<think>\n\n</think>\n\n" + TURNS[3]["content"] + "<|im_end|>"]
    with pytest.raises(DataError, match="message 1: .*prefix property.*train_on='last'"):
        render_chat(ours, talk)


BROKEN_TEMPLATES = {
    "prompts otherwise": (CHATML + "{% if add_generation_prompt %}<think>{% endif %}", "prefix property"),
    "no end": ("{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}", "no end-of-turn token"),
    "syntax": ("{% for m in messages %}{{ m.role }}", "not valid Jinja2: line 1"),
    "undefined": ("{{ messages[0].absent.absent }}", "UndefinedError"),
    "refuses": ("{{ raise_exception('System role not supported') }}", "refuses the conversation: System role"),
}


@pytest.mark.parametrize("case", BROKEN_TEMPLATES)
def test_unfit_templates_are_refused(fast_folder, case):
    ours = load_tokenizer(fast_folder("chatml"))
    source, message = BROKEN_TEMPLATES[case]
    ours.chat_template = ChatTemplate(source)
    with pytest.raises(MinituneError, match=message) as caught:
        render_chat(ours, TURNS[:2])
    assert "\n" not in str(caught.value)


ATTACKS = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ messages.__class__.__base__.__subclasses__() }}",
    "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
    "{{ raise_exception.__globals__['os'].environ }}",
    "{{ strftime_now.__globals__ }}",
    "{{ (''|attr('__class__'))|attr('__mro__') }}",
    "{{ '{0.__class__.__mro__}'.format('') }}",
    "{{ messages.append(1) }}",
    "{{ messages[0].update({'role': 'x'}) }}",
    "{{ self.__init__.__globals__.__builtins__ }}",
    "{% for c in [].__class__.__base__.__subclasses__() %}{{ c }}{% endfor %}",
    "{{ lipsum.__globals__['os'].popen('id').read() }}",
    "{{ namespace.__init__.__globals__ }}",
    "{{ dict.mro() }}",
    "{% set x = joiner.__init__['__globals__'] %}{{ x.os }}",
    "{% include '/etc/passwd' %}",
    "{% import 'os' as os %}{{ os.environ }}",
    "{% extends '/etc/passwd' %}",
    "{% set f = '{0.__class__.__mro__}'.format %}{{ f('') }}",
    "{{ ('{0.__class__}' | attr('format'))('') }}",
    "{{ (['{0.__class__}'] | map('attr', 'format') | first)('') }}",
    "{{ '{x.__class__}'.format_map({'x': 1}) }}",
    "{{ messages | map(attribute='__class__') | list }}",
    "{{ messages | map('attr', '__class__') | list }}",
    "{{ messages | sort(attribute='__class__.__mro__') }}",
    "{{ messages | groupby('__class__') }}",
    "{{ ''['__cla' ~ 'ss__'] }}",
    "{{ '' | attr('\\x5f\\x5fclass\\x5f\\x5f') }}",
    "{{ messages[0].__getattribute__('x') }}",
    "{{ self._TemplateReference__context }}",
    "{{ messages[0].setdefault('x', 1) }}",
    "{{ messages.pop() }}",
    "{% for m in messages %}{{ loop.__init__.__globals__ }}{% endfor %}",
    "{{ raise_exception.__code__ }}",
]


@pytest.mark.parametrize("source", ATTACKS)
def test_templates_cannot_reach_python(source):
    (answer,) = ChatTemplate(source).render(TURNS, [(4, False)], {})
    assert isinstance(answer, MinituneError), answer
    assert "\n" not in str(answer)


@pytest.mark.parametrize(
    "source,talk",
    [
        ("{{ messages | nonsense }}", TURNS),
        ("{{ raise_exception('no') }}", TURNS),
        ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", TURNS),
        ("{{ ''.__class__ }}", TURNS),
        (CHATML.replace("<|im_end|>", ""), TURNS[:2]),  # writes no end of turn
        (None, TURNS),
    ],
)
def test_errors_name_the_model_that_the_template_is_of(fast_folder, tmp_path, source, talk):
    folder = shutil.copytree(fast_folder("chatml"), tmp_path / "some model")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": source}))
    with pytest.raises(MinituneError) as caught:
        render_chat(load_tokenizer(folder), talk)
    what = f"{folder} has no chat template" if source is None else f"the chat template of {folder} "
    assert what in str(caught.value) and "\n" not in str(caught.value)


RUNAWAYS = [
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "{{ 10 ** (10 ** 9) }}",
    "{{ 'x' * 10 ** 11 }}",
    "{{ ('x' * 10 ** 7) * 10 ** 4 }}",
    "{{ '%099999999999d' | format(1) }}",
    "{{ '{:>99999999999}'.format('x') }}",
    "{{ 'x'.ljust(10 ** 11) }}",
    "{{ lipsum(n=10000000) }}",
    "{% macro f(n) %}{{ f(n) }}{% endmacro %}{{ f(1) }}",
    "{% set ns = namespace(x='x') %}{% for a in range(99) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}{{ ns.x }}",
    "{% for a in range(99999) %}{{ 'x' * 9999 }}{% endfor %}",
    "{{ range(99999) | map('string') | join('x' * 99999) }}",
    "{{ ('a' * 9999999) | replace('a', 'a' * 9999999) }}",
    "{{ messages | tojson(indent=10 ** 9) }}",
    "{{ '%*d' % (10 ** 11, 1) }}",
    "{{ strftime_now('%Y' * 10 ** 8) }}",
    "{{ 'x' | indent(10 ** 10, true) }}",
    "{% for x in [[1]] recursive %}{{ loop([[1]]) }}{% endfor %}",
    "{{ (9 ** (9 ** 9)) | string }}",
    "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
]


@pytest.mark.parametrize("source", RUNAWAYS)
def test_templates_cannot_run_away(source):
    quick = ChatTemplate("fine")
    assert quick.render(TURNS, [(4, False)], {}) == ["fine"]
    start = time.monotonic()
    with pytest.raises(CheckpointError, match="stopped"):
        raise ChatTemplate(source).render(TURNS, [(4, False)], {})[0]
    assert time.monotonic() - start < 3
    assert quick.render(TURNS, [(4, False)], {}) == ["fine"]  # the next conversation is served as before


def test_helpers_of_transformers(fast_folder):
    from transformers.utils.chat_template_utils import render_jinja_template

    talk = [*TURNS, {"role": "tool", "content": "left <out> & 'done'"}]
    for prompt in (False, True):
        (judge,), _ = render_jinja_template([talk], chat_template=HELPERS, add_generation_prompt=prompt)
        (answer,) = ChatTemplate(HELPERS).render(talk, [(5, prompt)], {})
        assert answer == judge and str(datetime.now().year) in answer


BAD_TALKS = [
    ([], "without messages"),
    ([{"role": "usr", "content": "x"}], "message 0: role 'usr'.*did you mean 'user'"),
    ([{"content": "x"}], "message 0: role None"),
    (["x"], "message 0: role None"),
    ([TURNS[0], {"role": "assistant", "content": None}], "message 1: 'content' is null"),
    ([{"role": "user", "content": ["x", {1, 2}]}], "plain JSON"),
    ([{"role": "user", "content": "half \ud83d"}], "surrogate"),
]


@pytest.mark.parametrize("talk,message", BAD_TALKS)
def test_unfit_conversations_are_refused(fast_folder, talk, message):
    ours, _ = load_both(fast_folder("chatml"))
    with pytest.raises(DataError, match=message):
        render_chat(ours, talk)


def test_a_template_that_forgets_turns_is_refused(fast_folder):
    """Also where the forgotten turn reads like the one that stays, so that every prefix matches."""
    ours = load_tokenizer(fast_folder("chatml"))
    last = "{% set kept = messages[-2:] if messages[-1].role == 'assistant' else messages[-1:] %}"
    ours.chat_template = ChatTemplate(last + CHATML.replace("in messages", "in kept").replace("messages[0]", "kept[0]"))
    with pytest.raises(DataError, match="message 3: .*prefix property"):
        render_chat(ours, TURNS[:2] * 2)
    last_only = render_chat(ours, TURNS[:2])
    assert target_texts(ours, last_only) == [TURNS[1]["content"] + "<|im_end|>"]


TOOLS = [{"type": "function", "function": {"name": "weather", "description": "Say <|im_end|> the weather."}}]
CALLED = [
    {"role": "user", "content": "Rome?"},
    {"role": "assistant", "content": "Let me look."},
    {"role": "tool", "content": "sunny"},
    {"role": "assistant", "content": "Sunny."},
]
KEEPS = "{% for m in messages if m.role in ['user', 'assistant'] %}{{ '<|im_start|>' + m.role + '\\n' + m.content }}"
KEEPS += "{{ '<|im_end|>\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
# Templates that would train what is never seen: (template, conversation, tools, what is said).
LOSING = {
    "system": (KEEPS, SYSTEM + TURNS, None, "message 0: .* leaves out what the system says; put it into a user"),
    "developer": (KEEPS, [{"role": "developer", "content": "x y"}, *TURNS], None, "leaves out what the developer says"),
    "late system": (KEEPS, [*TURNS[:2], *SYSTEM, *TURNS[2:]], None, "message 2: .* leaves out what the system says"),
    "parts": (KEEPS, [{"role": "system", "content": [{"type": "text", "text": "x"}]}, *TURNS], None, "the system says"),
    "tool": (KEEPS, CALLED, None, "message 2: .* leaves out what the tool says"),
    "tools": (CHATML, TURNS, TOOLS, "takes no tools; leave them out"),
}


@pytest.mark.parametrize("case", LOSING)
@pytest.mark.parametrize("prompt", [False, True])
def test_templates_that_lose_what_steers_the_answer_are_refused(fast_folder, case, prompt):
    ours = load_tokenizer(fast_folder("chatml"))
    source, talk, tools, message = LOSING[case]
    ours.chat_template = ChatTemplate(source)
    with pytest.raises(DataError, match=message) as caught:
        render_chat(ours, talk[:-1] if prompt else talk, tools=tools, add_generation_prompt=prompt)
    assert "\n" not in str(caught.value)
    assert render_chat(ours, TURNS).ids


@pytest.mark.parametrize("written", ["tojson", "upper", "replace('e', '3')", "length"])
def test_a_system_message_in_other_words_is_no_lost_one(fast_folder, written):
    ours = load_tokenizer(fast_folder("chatml"))
    source = "{{ messages[0].content | " + written + " }}" + KEEPS
    ours.chat_template = ChatTemplate(source)
    for content in ('Be\nbrief, <|im_end|> "please".', "x", [{"type": "text", "text": "e"}]):
        if isinstance(content, str) or written in ("tojson", "length"):
            assert render_chat(ours, [{"role": "system", "content": content}, *TURNS]).ids
    assert render_chat(ours, [{"role": "system", "content": ""}, *TURNS]).ids


# What the rendering of earlier turns depends on -> whether the last answer alone can be learned.
REWRITING = {
    "a sign in the last question": (
        KEEPS.replace("{{ '<|im_start|>' + m.role", "{{ '<|im_start|>' + ('!' if loop.revindex < 3 else '') + m.role"),
        False,
    ),
    "thoughts cut out of history": (STYLES["thinking"][0], True),
    "answers shortened in history": (
        KEEPS.replace("m.content }}", "(m.content if loop.last or m.role == 'user' else m.content[:3]) }}"),
        True,
    ),
    "the number of turns in the head": ("{{ messages | length }}" + KEEPS, False),
    "turns counted from the end": (KEEPS.replace("m.content }}", "(m.content ~ loop.revindex) }}"), False),
    "a day of the week": ("{{ strftime_now('%f') }}" + KEEPS, False),
}


@pytest.mark.parametrize("case", REWRITING)
def test_templates_that_rewrite_earlier_turns_are_refused(fast_folder, case):
    ours = load_tokenizer(fast_folder("chatml"))
    source, last_works = REWRITING[case]
    ours.chat_template = ChatTemplate(source)
    talk = [TURNS[0], {"role": "assistant", "content": "<think>\nhm\n</think>\n\nYes"}, *TURNS[2:]]
    with pytest.raises(DataError, match="message [13]: .*prefix property.*") as caught:
        render_chat(ours, talk)
    assert "\n" not in str(caught.value)
    if last_works:
        assert "train_on='last'" in str(caught.value)
        assert target_texts(ours, render_chat(ours, talk, train_on="last"))[0].endswith("return 1<|im_end|>")
    else:
        with pytest.raises(DataError, match="message 3: .*prefix property"):
            render_chat(ours, talk, train_on="last")


def test_a_control_token_behind_the_last_turn_is_no_other_answer(fast_folder):
    """Phi-3.5 ends a conversation with one: earlier answers end at their own, the last one learns both."""
    ours = load_tokenizer(fast_folder("chatml"))
    ours.chat_template = ChatTemplate(KEEPS + "{% if not add_generation_prompt %}{{ '<|endoftext|>' }}{% endif %}")
    first, last = (message["content"] + "<|im_end|>" for message in TURNS[1::2])
    assert target_texts(ours, render_chat(ours, TURNS)) == [first, last + "\n<|endoftext|>"]


def test_an_answer_that_is_rewritten_behind_a_control_token_is_refused(fast_folder):
    """What stays the same of it ends with a control token, but not with its end of turn."""
    ours = load_tokenizer(fast_folder("chatml"))
    shortened = "'<|endoftext|>' + (m.content if loop.last or m.role == 'user' else m.content[:3]) }}"
    ours.chat_template = ChatTemplate(KEEPS.replace("m.content }}", shortened))
    with pytest.raises(DataError, match="message 1: .*prefix property.*train_on='last'"):
        render_chat(ours, TURNS)


def test_tools_reach_the_template_and_cannot_forge_a_turn(fast_folder):
    ours, judge = load_both(fast_folder("chatml"))
    source = "{% if tools %}{{ '<|im_start|>tools\\n' + tools | tojson + '<|im_end|>\\n' }}{% endif %}" + CHATML
    template, ours.chat_template = ours.chat_template, ChatTemplate(source)
    segments = render_segments(ours, TURNS, tools=TOOLS)
    rendered = render_chat(ours, TURNS, tools=TOOLS)
    ours.chat_template = template
    expected = judge.apply_chat_template(TURNS, tools=TOOLS, chat_template=source, tokenize=False)
    assert "".join(segment.text for segment in segments) == expected
    assert rendered.ids.count(ours.control_ids["<|im_end|>"]) == 2 + len(TURNS)
    assert len(target_texts(ours, rendered)) == 2


def test_other_refusals(fast_folder):
    with pytest.raises(ConfigError, match="train_on is 'first'"):
        render_chat(load_tokenizer(fast_folder("chatml")), TURNS, train_on="first")
    ours = load_tokenizer(fast_folder("gemma"))
    with pytest.raises(DataError, match="System role not supported"):
        render_chat(ours, SYSTEM + TURNS)
    with pytest.raises(DataError, match="refuses the conversation: Conversation roles must alternate"):
        render_chat(ours, TURNS[1:2])
    ours.chat_template = None
    with pytest.raises(DataError, match="no chat template"):
        render_chat(ours, TURNS)


def test_a_template_in_its_own_file_wins(fast_folder, tmp_path):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((fast_folder("chatml") / name).read_bytes())
    (tmp_path / "chat_template.jinja").write_text(LLAMA3)
    judge = AutoTokenizer.from_pretrained(tmp_path)
    assert load_tokenizer(tmp_path).chat_template.source == LLAMA3 == judge.chat_template


def test_segments_join_to_the_rendering(fast_folder):
    ours, judge = load_both(fast_folder("phi3"))
    segments = render_segments(ours, TURNS)
    assert "".join(segment.text for segment in segments) == judge.apply_chat_template(TURNS, tokenize=False)
    assert [segment.text.strip() for segment in segments if segment.control][::2] == ["<|user|>", "<|assistant|>"] * 2


@pytest.mark.parametrize("mutant", ["marker", "split", "end"])
def test_the_tests_above_notice_a_mutant(fast_folder, monkeypatch, mutant):
    """Without its guards the code fails the tests of forged turns, of inference and of ends of turn."""
    from minitune.text import chat

    if mutant == "marker":
        monkeypatch.setattr(chat, "_mark", lambda tokenizer, messages, tools: ("\ue000", messages, tools))
        check = test_users_cannot_forge_a_turn
    elif mutant == "split":
        spans = chat._answer
        monkeypatch.setattr(chat, "_answer", lambda *args: (spans(*args)[0] + 1, spans(*args)[1]))
        check = test_what_is_trained_is_what_is_seen_at_inference
    else:
        spans = chat._answer
        monkeypatch.setattr(chat, "_answer", lambda *args: (spans(*args)[0], spans(*args)[1] - len("<|im_end|>")))
        check = test_targets_are_the_answers_and_their_end_of_turn
    with pytest.raises((AssertionError, ValueError)):
        check(fast_folder, "chatml")
