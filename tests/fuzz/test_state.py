"""The state of a run on disk, made wrong: a checkpoint is refused, or is what was saved."""

import json

import pytest
import torch
from hypothesis import strategies as st

from minitune.errors import CheckpointError
from minitune.training.config import OptimizerConfig
from minitune.training.optimizer import Optimizer
from minitune.training.state import Progress, latest_checkpoint, restore, save_checkpoint
from tests.fuzz.mutations import COUNTS, fuzz, mutated_bytes, mutated_json, outcome


def parameters() -> dict[str, torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return {"a.weight": torch.nn.Parameter(torch.randn(4, 3, generator=generator)),
            "b.bias": torch.nn.Parameter(torch.randn(5, generator=generator))}  # fmt: skip


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    """The folder of a checkpoint in the middle of a window, and the content of each of its files."""
    root = tmp_path_factory.mktemp("fuzz") / "checkpoints"
    trained = parameters()
    optimizer = Optimizer(trained, OptimizerConfig())
    for parameter in trained.values():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step(1e-3)
    progress = Progress(step=7, batches=29, micro=1, window_loss=3.5, window_weight=12, window_metrics={"m": [1.0, 2]},
                        evaluations=[{"step": 5, "validation_loss": 1.5}], best_step=5, best_loss=1.5)  # fmt: skip
    folder = save_checkpoint(root, trained, optimizer, progress, {"seed": 0, "base model": "x"}, keep=2)
    return root, folder.name, {file.name: file.read_bytes() for file in folder.iterdir()}


@COUNTS
def test_mutated_checkpoints(case, count):
    root, name, contents = case
    seen, sound = {"resumed": 0, "refused": 0}, json.loads(contents["state.json"])
    cases = [mutated_bytes(content).map(lambda text, file=file: (file, text)) for file, content in contents.items()]
    cases += [mutated_json(sound).map(lambda text: ("state.json", text))] * 2

    def check(drawn) -> None:
        file, content = drawn
        for refused in root.glob("*.refused"):
            refused.rename(root / name)
        for other, original in contents.items():
            (root / name / other).write_bytes(original)
        content = content if isinstance(content, bytes) else content.encode(errors="surrogatepass")
        (root / name / file).write_bytes(content)
        found = outcome(lambda: latest_checkpoint(root, pytest.fail))
        seen["refused" if found is None else "resumed"] += 1
        if found is None:
            return
        folder, state = found
        assert state["progress"] == sound["progress"] and state["fingerprint"] == sound["fingerprint"]
        assert file == "state.json" or content == contents[file]
        restored = {key: torch.nn.Parameter(torch.zeros_like(value)) for key, value in parameters().items()}
        assert outcome(lambda: restore(folder, restored, Optimizer(restored, OptimizerConfig())) or True)
        assert Progress(**state["progress"]).step == 7

    fuzz(st.one_of(cases), check, count)
    assert seen["refused"] > count // 2


def test_tensors_of_another_model_are_refused(case):
    """Sound files that belong to other parameters."""
    root, name, contents = case
    for other, original in contents.items():
        (root / name / other).write_bytes(original)
    for wrong in ({"a.weight": (3, 4), "b.bias": (5,)}, {"a.weight": (4, 3), "c.bias": (5,)}):
        others = {key: torch.nn.Parameter(torch.zeros(shape)) for key, shape in wrong.items()}
        with pytest.raises(CheckpointError, match="has no weight"):
            restore(root / name, others, Optimizer(others, OptimizerConfig()))
