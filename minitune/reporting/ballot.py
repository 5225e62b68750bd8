"""A page on which somebody judges texts, one by one, and the votes that it saves.

A ballot is items, each with what it is about and one or more texts to judge, and the choices that every item has. The
page is one HTML file: votes are kept in the browser's storage as they are given, so that closing it loses nothing, and
"Save votes" hands them over as a JSON file:

    {"ballot": ID, "votes": [{"item": "row-17", "choice": "accept", "note": "..."}, ...]}

The ballot's ID is a hash of all that was on the page, so votes cannot be counted for other texts. A small web server
that writes the votes itself was rejected: a file can be sent to whoever judges, and opened without a command.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from minitune.errors import DataError, counted, type_name
from minitune.reporting.page import escape, heading, page, preformatted, prose
from minitune.strict_json import loads


@dataclass(frozen=True)
class Item:
    """One thing to judge: its name in the votes (printable, its own), what it is about, the texts: (heading, text)."""

    name: str
    context: tuple[tuple[str, str], ...]
    texts: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Vote:
    """What somebody said of an item."""

    item: str
    choice: str
    note: str = ""


def ballot_id(items: Sequence[Item], choices: Mapping[str, str]) -> str:
    """Return the hash that ties votes to their texts, 16 hexadecimal digits."""
    content = json.dumps([[asdict(item) for item in items], dict(choices)], ensure_ascii=True)
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def ballot_page(
    title: str, instructions: str, items: Sequence[Item], choices: Mapping[str, str], file_name: str = "votes.json"
) -> str:
    """Return the page; `choices` maps what the votes say to what the button says, as {"accept": "Accept"}."""
    identity = ballot_id(items, choices)
    body = [prose(instructions), '<p id="progress" role="status"></p>']
    body += [_item(number, item, choices) for number, item in enumerate(items, 1)]
    body.append(
        f'<div class="bar"><button id="save" data-ballot="{identity}" data-file="{escape(file_name)}">'
        "Save votes</button>"
        ' <button id="next">Next without a vote</button> <span id="state" role="status"></span></div>'
    )
    return page(title, body, style=_STYLE, script=_SCRIPT)


def _item(number: int, item: Item, choices: Mapping[str, str]) -> str:
    """Return one item's section: context above, texts side by side, choices and a note below."""
    columns = "".join(f"<div>{heading(name, 4)}{preformatted(text)}</div>" for name, text in item.texts)
    context = "".join(heading(name, 4) + preformatted(text) for name, text in item.context)
    buttons = "".join(
        f'<label><input type="radio" name="vote-{number}" value="{escape(value)}"> {escape(shown)}</label>'
        for value, shown in choices.items()
    )
    return (
        f'<section class="item" data-item="{escape(item.name)}">{heading(f"{number}", 3)}{context}'
        f'<div class="texts">{columns}</div><fieldset><legend>Your vote</legend>{buttons} '
        '<label class="note">Note <input type="text"></label></fieldset></section>'
    )


def read_votes(path: str | Path, items: Sequence[Item], choices: Mapping[str, str]) -> list[Vote]:
    """Return the votes of a file that the page saved, in its order; items without a vote are just not there.

    Raises:
        DataError: no JSON of that form, votes on another ballot, for an item or with a choice that is not on it, or
            two votes for one item.
    """
    try:
        found = loads(Path(path).read_text(encoding="utf-8"))
    except (UnicodeDecodeError, ValueError) as error:
        raise DataError(f"{path}: no JSON ({error}); give the file that the page's 'Save votes' made") from None
    if not isinstance(found, dict) or not isinstance(found.get("votes"), list):
        raise DataError(f'{path}: no votes in it; give the file that the page\'s "Save votes" made')
    if found.get("ballot") != ballot_id(items, choices):
        raise DataError(f"{path}: votes on ballot {found.get('ballot')}, but this is {ballot_id(items, choices)}; "
                        "the texts have changed since that page was made")  # fmt: skip
    known, votes = {item.name for item in items}, {}
    for number, line in enumerate(found["votes"], 1):
        vote = _vote(line, f"{path}: vote {number}", known, choices)
        if vote.item in votes:
            raise DataError(f"{path}: vote {number} is the second for {vote.item!r}; keep one of them")
        votes[vote.item] = vote
    return list(votes.values())


def _vote(line: object, where: str, known: set[str], choices: Mapping[str, str]) -> Vote:
    """Return one vote, checked."""
    fields = line if isinstance(line, dict) else {}
    if not all(isinstance(fields.get(name), str) for name in ("item", "choice")) or not isinstance(
        fields.get("note", ""), str
    ):
        raise DataError(f'{where} is {type_name(line)}, not an object with "item", "choice" and perhaps "note"')
    if fields["item"] not in known:
        raise DataError(f"{where} is for {fields['item']!r}, which is not among the {counted(len(known), 'item')}")
    if fields["choice"] not in choices:
        raise DataError(f"{where} says {fields['choice']!r}; it must be one of {', '.join(choices)}")
    return Vote(fields["item"], fields["choice"], fields.get("note", ""))


_STYLE = """
.item { border-top: 1px solid var(--line); padding: .5rem 0 1rem; } .item h4 { margin: .6rem 0 .2rem; }
.texts { display: grid; grid-template-columns: repeat(auto-fit, minmax(18rem, 1fr)); gap: 1rem; }
fieldset { border: 1px solid var(--line); border-radius: .3rem; display: flex; flex-wrap: wrap; gap: .4rem 1.4rem; }
label { cursor: pointer; padding: .2rem 0; } .note { flex: 1; } .note input { width: 60%; }
.item.done { opacity: .65; } .bar { position: sticky; bottom: 0; background: var(--paper); padding: .8rem 0;
  border-top: 1px solid var(--line); } button { font: inherit; padding: .3rem 1rem; }
"""
_SCRIPT = """
"use strict";
const save = document.getElementById("save"), ballot = save.dataset.ballot, key = "ballot-" + ballot;
const sections = [...document.querySelectorAll(".item")];
let votes = {}, unsaved = false, kept = true;
try { votes = JSON.parse(localStorage.getItem(key)) || {}; } catch (error) { kept = false; }
function tell(text) { document.getElementById("state").textContent = text; }
function show() {
  const done = sections.filter(section => votes[section.dataset.item] && votes[section.dataset.item].choice).length;
  document.getElementById("progress").textContent = done + " of " + sections.length + " judged";
  for (const section of sections) section.classList.toggle("done", Boolean((votes[section.dataset.item] || {}).choice));
}
function keep() {
  unsaved = true;
  try { localStorage.setItem(key, JSON.stringify(votes)); } catch (error) { kept = false; }
  tell(kept ? "kept in this browser; save them when you are done" : "this browser keeps nothing: save before closing");
  show();
}
for (const section of sections) {
  const name = section.dataset.item, note = section.querySelector(".note input");
  const given = votes[name] || {};
  note.value = given.note || "";
  for (const input of section.querySelectorAll("input[type=radio]")) {
    input.checked = input.value === given.choice;
    input.addEventListener("change", () => {
      votes[name] = {choice: input.value, note: note.value}; keep();
    });
  }
  note.addEventListener("input", () => { votes[name] = {...votes[name], note: note.value}; keep(); });
}
save.addEventListener("click", () => {
  const lines = sections.map(section => section.dataset.item).filter(name => votes[name] && votes[name].choice)
    .map(name => ({item: name, choice: votes[name].choice, note: votes[name].note || ""}));
  const text = JSON.stringify({ballot: ballot, votes: lines}, null, 1);
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([text], {type: "application/json"}));
  link.download = save.dataset.file;
  link.click();
  unsaved = false;
  tell(lines.length + " votes saved to " + save.dataset.file);
});
document.getElementById("next").addEventListener("click", () => {
  const open = sections.find(section => !(votes[section.dataset.item] || {}).choice);
  if (open) open.scrollIntoView({behavior: "smooth"});
});
window.addEventListener("beforeunload", event => { if (unsaved && !kept) event.preventDefault(); });
show();
"""
