// As much of a browser as the ballot's script uses: `document`, `localStorage`, downloads.
// node browser.js PAGE: votes, closes and opens the page again, votes, saves; prints what was kept and saved.
"use strict";
const html = require("fs").readFileSync(process.argv[2], "utf8");
const script = /<script>([^]*)<\/script>/.exec(html)[1];
const storage = {};

function element(extra) {
  return {
    listeners: {}, dataset: {}, textContent: "", classList: { toggle() {} }, scrollIntoView() {},
    addEventListener(kind, act) { this.listeners[kind] = act; }, ...extra,
  };
}

function section(name, text) {
  const radios = [...text.matchAll(/type="radio" name="[^"]*" value="([^"]*)"/g)]
    .map(match => element({ value: match[1], checked: false }));
  const note = element({ value: "" });
  return element({ dataset: { item: name }, note, radios, querySelector: () => note, querySelectorAll: () => radios });
}

function open() {
  const sections = [...html.matchAll(/data-item="([^"]*)"[^]*?<\/section>/g)].map(match => section(match[1], match[0]));
  const [, ballot, file] = /id="save" data-ballot="([^"]*)" data-file="([^"]*)"/.exec(html);
  const ids = { save: element({ dataset: { ballot, file } }), state: element(), progress: element(), next: element() };
  const document = {
    getElementById: id => ids[id], querySelectorAll: () => sections, createElement: () => element({ click() {} }),
  };
  const localStorage = { getItem: key => storage[key] || null, setItem(key, value) { storage[key] = value; } };
  const saved = [];
  const Blob = function (parts) { saved.push(parts[0]); };
  const names = ["document", "localStorage", "Blob", "URL", "window"];
  new Function(...names, script)(document, localStorage, Blob, { createObjectURL: () => "blob:" }, element());
  return { sections, ids, saved };
}

function vote(page, item, choice, note) {
  const found = page.sections.find(one => one.dataset.item === item);
  found.radios.find(radio => radio.value === choice).listeners.change();
  if (note) {
    found.note.value = note;
    found.note.listeners.input();
  }
}

let page = open();
vote(page, "a.jsonl:1", "accept");
vote(page, "a.jsonl:1", "reject", "wrong <place>");
page.sections[2].note.value = "no vote";
page.sections[2].note.listeners.input();
page = open();
const kept = page.sections.map(one => (one.radios.find(radio => radio.checked) || {}).value || null);
vote(page, "a.jsonl:2", "accept");
page.ids.save.listeners.click();
const { progress, save } = page.ids;
console.log(JSON.stringify({ kept, progress: progress.textContent, file: save.dataset.file, saved: page.saved }));
