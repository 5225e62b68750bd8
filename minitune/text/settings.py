"""What stands beside a tokenizer: special tokens, added tokens, the chat template, the ids that end a text.

transformers spread these over tokenizer_config.json and four earlier files; here they become one dict with the keys
of tokenizer_config.json. A value of another kind than transformers writes is refused by name: it would otherwise
fail later, without a place, or silently mean something else.
"""

from pathlib import Path
from typing import Any

from minitune.errors import CheckpointError
from minitune.files import read_json

NAMED = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")
EXTRA = ("extra_special_tokens", "additional_special_tokens")  # transformers' present and earlier key


def read_settings(folder: Path) -> tuple[dict[str, Any], list[int]]:
    """Return the settings of a folder's tokenizer and the ids of text's end that its model's configs name.

    Raises CheckpointError where a file is damaged.
    """
    names = ("special_tokens_map.json", "tokenizer_config.json", "added_tokens.json")
    special, settings, added = (read_json(folder / name, optional=True) for name in names)
    settings = special | settings
    settings["added_tokens_decoder"] = settings.get("added_tokens_decoder") or {}
    settings["chat_template"] = _template(folder, settings.get("chat_template"))
    for name, sound in _judged(settings).items():
        if not sound:
            found = str(settings[name])
            raise CheckpointError(f"{folder}: the tokenizer's {name} cannot be {found[:60]!r}; fetch its files again")
    for content, id in added.items():
        if not _is_id(id):
            raise CheckpointError(f"{folder}/added_tokens.json: {content!r} has the id {str(id)[:60]}; fetch it again")
        settings["added_tokens_decoder"].setdefault(str(id), {"content": content, "special": True})
    ends = []
    for name in ("generation_config.json", "config.json"):
        found = read_json(folder / name, optional=True).get("eos_token_id")
        found = found if isinstance(found, list) else [] if found is None else [found]
        if not all(map(_is_id, found)):
            raise CheckpointError(f"{folder}/{name}: eos_token_id is {str(found)[:60]}: no token id; fetch it again")
        ends += found
    return {name: value for name, value in settings.items() if value != {}}, ends


def _template(folder: Path, template: Any) -> Any:
    """Return the chat template: the content of its own file, else the one given, of several that named default."""
    if (folder / "chat_template.jinja").is_file():
        try:
            return (folder / "chat_template.jinja").read_text(encoding="utf-8")
        except ValueError as error:
            raise CheckpointError(f"{folder}/chat_template.jinja is no UTF-8 text ({error}); fetch it again") from None
    if isinstance(template, list) and all(isinstance(entry, dict) for entry in template):
        return next((entry.get("template") for entry in template if entry.get("name") == "default"), None)
    return template


def _judged(settings: dict[str, Any]) -> dict[str, bool]:
    """Return setting -> whether it is of the kind that transformers writes."""
    extra = {key: settings.get(key) or [] for key in EXTRA}
    listed = {key: group.values() if isinstance(group, dict) else group for key, group in extra.items()}
    added, template = settings["added_tokens_decoder"], settings["chat_template"]
    return {
        **{name: settings.get(name) is None or _is_token(settings[name]) for name in NAMED},
        **{key: isinstance(extra[key], dict | list) and all(map(_is_token, listed[key])) for key in EXTRA},
        "added_tokens_decoder": isinstance(added, dict)
        and all(
            len(id) < 10 and id.isdecimal() and isinstance(token, dict) and _is_token(token)
            for id, token in added.items()
        ),
        "chat_template": template is None or isinstance(template, str),
    }


def _is_token(value: Any) -> bool:
    return isinstance(value.get("content") if isinstance(value, dict) else value, str)


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**31
