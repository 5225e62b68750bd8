"""llama.cpp judges GGUF: its converter's files are read, ours hold the same bits, and it answers as the engine does."""

import gguf
import pytest
import torch

from minitune.checkpoint.gguf_writer import save_gguf
from minitune.checkpoint.load import load_model, load_tokenizer
from minitune.errors import CheckpointError
from minitune.sources import resolve
from tests.checkpoint.gguf_cases import CASES, NAMES, folder_of
from tests.checkpoint.llama_cpp import LlamaCpp, convert, home

pytestmark = pytest.mark.real
TEXT = "hello and what? The harbour was quiet. <|im_end|> 3.14 näive\n\n\tx = 7; 🎉 don't"
PROMPT = "hello, it was 7 o'clock and twelve"  # longer than longrope's trained context, so that both use its long set
# llama.cpp takes GELU from a table in fp16, and its tanh form of GPT-NeoX too, whose checkpoints mean the exact one.
BARS = {"gptneox": 2e-2} | dict.fromkeys(("gemma", "gemma2", "gemma3", "gpt2"), 2e-3)


@pytest.fixture(scope="module", autouse=True)
def built():
    """llama.cpp, or a reason why not."""
    return home()


@torch.no_grad()
def greedy(model, ids, count):
    for _ in range(count):
        ids = [*ids, int(model(torch.tensor([ids]))[0, -1].argmax())]
    return ids[-count:]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Every case's folder, with what llama.cpp's converter makes of it."""
    made = {case.name: folder_of(case, tmp_path_factory.mktemp("hf")) for case in CASES}
    convert(list(made.values()))
    return made


@torch.no_grad()
@pytest.mark.parametrize("case", CASES, ids=NAMES)
def test_its_converter_and_our_writer_store_the_same(case, folders, tmp_path):
    """Read what it writes: logits are the folder's. Write what it writes: every tensor in the same bits."""
    folder = folders[case.name]
    model, ids = load_model(folder), torch.arange(2 * 30).view(2, 30) * 37 % 260
    rows = 272 if case.family == "gemma3" else None  # it drops rows that it counts no token for
    expected = model(ids)[..., :rows]
    assert (load_model(folder / "f32.gguf")(ids) - expected).norm() < 1e-6 * expected.norm()
    for kind, dtype in (("f32", "float32"), ("bf16", "bfloat16"), ("q8_0", "q8_0")):
        path = tmp_path / f"{kind}.gguf"
        save_gguf(model, None, path, dtype=dtype)
        theirs, ours = ({t.name: t for t in gguf.GGUFReader(p).tensors} for p in (folder / path.name, path))
        assert theirs.keys() == ours.keys()
        for name, tensor in theirs.items():
            data = ours[name].data[:rows] if name == "token_embd.weight" else ours[name].data
            assert ours[name].tensor_type == tensor.tensor_type
            if name.startswith("rope_freqs"):  # computed in fp32 there
                torch.testing.assert_close(torch.tensor(data), torch.tensor(tensor.data), rtol=1e-6, atol=0)
            else:
                assert bytes(data) == bytes(tensor.data), name


@torch.no_grad()
@pytest.mark.parametrize("case", CASES, ids=NAMES)
def test_it_answers_as_the_engine_does(case, tmp_path):
    folder_of(case, tmp_path / "hf")
    model, tokenizer = load_model(tmp_path / "hf"), load_tokenizer(tmp_path / "hf")
    save_gguf(model, tokenizer, tmp_path / "model.gguf", dtype="float32")
    judge = LlamaCpp(tmp_path / "model.gguf", length=64)
    ids = tokenizer.encode(PROMPT, bos=False)
    assert judge.tokens(TEXT) == tokenizer.encode(TEXT)
    theirs, ours = torch.tensor(judge.logits(ids)), model(torch.tensor([ids]))[0]
    assert (ours - theirs).norm() < BARS.get(case.family, 1e-4) * ours.norm()
    assert len(ids) > 16 and judge.greedy(ids, 8) == greedy(model, ids, 8)


@torch.no_grad()
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "q8_0"])
def test_smollm2_written_by_us_gives_the_same_greedy_tokens(smollm2_path, dtype, tmp_path):
    model, tokenizer = load_model(smollm2_path), load_tokenizer(smollm2_path)
    path = tmp_path / "model.gguf"
    assert save_gguf(model, tokenizer, path, dtype=dtype) == []
    judge, again = LlamaCpp(path), load_model(path, dtype="float32")
    assert judge.tokens(TEXT) == tokenizer.encode(TEXT)
    turn = tokenizer.chat_template.render(
        [{"role": "user", "content": "Name a fruit."}], [(1, True)], tokenizer.special
    )
    for text in ("The capital of France is", "def add(a, b):\n", "".join(map(str, turn))):
        ids = tokenizer.encode(text, control=True)
        assert judge.tokens(text, special=True) == ids
        assert judge.greedy(ids, 12) == greedy(again, ids, 12)


def test_a_wrong_row_order_is_caught(tmp_path, monkeypatch):
    """Without rows put in llama.cpp's order its answers are others: the tests above do guard it."""
    from minitune.checkpoint import gguf_writer

    folder_of(CASES[0], tmp_path / "hf")
    model, tokenizer = load_model(tmp_path / "hf"), load_tokenizer(tmp_path / "hf")
    monkeypatch.setattr(gguf_writer, "layout_of", lambda config, name: gguf_writer.Layout())
    save_gguf(model, tokenizer, tmp_path / "model.gguf", dtype="float32")
    ids = tokenizer.encode(PROMPT, bos=False)
    theirs, ours = torch.tensor(LlamaCpp(tmp_path / "model.gguf").logits(ids)), model(torch.tensor([ids]))[0]
    assert (ours - theirs).norm() > 0.1 * ours.norm()


def test_gemma_written_by_us_gives_the_same_greedy_tokens(tmp_path):
    try:
        (source,) = resolve("gemma-3-270m").glob("*.gguf")
    except CheckpointError as error:
        pytest.skip(f"{error} --accept_licence, after reading its terms")
    model, tokenizer = load_model(source), load_tokenizer(source)
    save_gguf(model, tokenizer, tmp_path / "model.gguf", dtype="float32")
    judge, ids = LlamaCpp(tmp_path / "model.gguf"), tokenizer.encode("The capital of France is")
    assert judge.tokens(TEXT) == tokenizer.encode(TEXT)
    assert judge.greedy(ids, 12) == greedy(model, ids, 12)
