"""The header of safetensors files: refused, or read as the safetensors library reads it."""

import json
import struct

import pytest
import torch
from hypothesis import strategies as st
from safetensors import SafetensorError
from safetensors.torch import load_file

from minitune.errors import CheckpointError
from minitune.safetensors_io import DTYPES, read_metadata, read_tensors, write_tensors
from tests.fuzz.mutations import COUNTS, fuzz, mutated_bytes, mutated_json, outcome


def split(content: bytes) -> tuple[dict, bytes]:
    """Return header and tensors of a file's content."""
    length = struct.unpack("<Q", content[:8])[0]
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def joined(header: str, tensors: bytes) -> bytes:
    return (
        struct.pack("<Q", len(header.encode(errors="surrogatepass"))) + header.encode(errors="surrogatepass") + tensors
    )


@pytest.fixture(scope="module")
def content(tmp_path_factory) -> bytes:
    file = tmp_path_factory.mktemp("safetensors") / "t.safetensors"
    tensors = {str(dtype): torch.arange(-6, 6).view(3, 4).to(dtype) for dtype in DTYPES.values()}
    write_tensors(file, tensors | {"empty": torch.zeros(0, 3), "one": torch.ones(())}, {"step": "3"})
    return file.read_bytes()


@COUNTS
def test_mutated_files(content, tmp_path, count):
    file, seen = tmp_path / "m.safetensors", {"read": 0, "refused": 0}
    header, tensors = split(content)
    documents = mutated_json(header).map(lambda text: joined(text, tensors))

    def check(mutated: bytes) -> None:
        file.write_bytes(mutated)
        found = outcome(lambda: read_tensors(file))
        seen["refused" if found is None else "read"] += 1
        if found is None:
            return
        expected = load_file(file)  # the library reads whatever we read, and the same
        assert found.keys() == expected.keys()
        for name, tensor in found.items():
            assert tensor.dtype == expected[name].dtype and tensor.shape == expected[name].shape
            assert torch.equal(tensor.view(-1).view(torch.uint8), expected[name].reshape(-1).view(torch.uint8))
        assert outcome(lambda: read_metadata(file)) is not None

    fuzz(st.one_of(mutated_bytes(content), documents), check, count)
    assert min(seen.values()) > count // 50  # both happen


@pytest.mark.parametrize(
    "header, ours_alone",
    [
        ('{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}, "a": {"dtype": "F32", "shape": [1, 2], '
         '"data_offsets": [0, 8]}}', True),
        ('{"a": ["F32", [2], [0, 8]]}', True),
        ('{"a": {"dtype": "F32", "shape": [0, 18446744073709551615], "data_offsets": [0, 0]}, '
         '"b": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}', True),
        ('{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 16]}}', False),
        ('{"a": {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]}}', False),
        ('{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}, "b": {"dtype": "F32", "shape": [2], '
         '"data_offsets": [0, 8]}}', False),
        ('{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}', False),
        ('{"a": {"dtype": "F32", "shape": [-2], "data_offsets": [0, -8]}}', False),
        ('{"a": {"dtype": "F32", "shape": [4294967296, 4294967296, 2], "data_offsets": [0, 8]}}', False),
        ('{"__metadata__": {"a": 1}, "a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}', False),
        ('{"a\\ud800": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}', False),
        ("[" * 100_000, False),
    ],
)  # fmt: skip
def test_headers_that_lie_are_refused(tmp_path, header, ours_alone):
    """Overlaps, gaps, names given twice, counts beyond the file; what is ours alone to refuse, the library takes."""
    file = tmp_path / "m.safetensors"
    file.write_bytes(joined(header, bytes(8)))
    with pytest.raises(CheckpointError, match="m.safetensors is not a whole safetensors file"):
        read_tensors(file)
    if not ours_alone:
        with pytest.raises((SafetensorError, RecursionError)):
            load_file(file)
