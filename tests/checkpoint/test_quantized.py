"""4-bit weights in bitsandbytes' form: both ways, through a file, against its own reader and writer."""

import json

import bitsandbytes as bnb
import pytest
import torch
from bitsandbytes.functional import QuantState, dequantize_4bit, quantize_4bit
from safetensors.torch import load_file, save_file

from minitune.checkpoint.quantized import from_bitsandbytes, to_bitsandbytes
from minitune.errors import CheckpointError, ConfigError
from minitune.ops.nf4 import quantize

NAME = "model.layers.0.mlp.up_proj.weight"
STATE = f"{NAME}.quant_state.bitsandbytes__nf4"
KINDS = pytest.mark.parametrize("kind", ["nf4", "fp4"])
DOUBLE = pytest.mark.parametrize("double_quant", [True, False])


def draw(*shape, dtype=torch.bfloat16):
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(0)) * 0.02).to(dtype)


def written_by_bitsandbytes(weight, kind="nf4", double_quant=True, **options):
    """What the `state_dict` of its linear layer holds."""
    packed, state = quantize_4bit(weight, quant_type=kind, compress_statistics=double_quant, **options)
    parts = {f"{NAME}.{key}": part for key, part in state.as_dict(packed=True).items()}
    return {NAME: packed, **parts}, packed, state


def own(tensors):
    return {key[len(NAME) + 1 :]: tensor for key, tensor in tensors.items() if key != NAME}


@KINDS
@DOUBLE
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape,block_size", [((64, 96), 32), ((5, 7, 9), 64), ((128, 1024), 64), ((300, 64), 4096)])
def test_what_bitsandbytes_wrote(kind, double_quant, dtype, shape, block_size, tmp_path):
    tensors, packed, state = written_by_bitsandbytes(
        draw(*shape, dtype=dtype), kind, double_quant, blocksize=block_size
    )
    save_file({**tensors, "other.weight": torch.ones(3)}, tmp_path / "model.safetensors")
    ours = from_bitsandbytes(NAME, load_file(tmp_path / "model.safetensors"))
    assert (ours.kind, ours.block_size, ours.shape, ours.dtype) == (kind, block_size, shape, dtype)
    with torch.compiler.set_stance("force_eager"):
        theirs = torch.ops.bitsandbytes.dequantize_4bit.default._op_dk(
            torch._C.DispatchKey.CompositeExplicitAutograd, packed, ours.scales(), block_size, kind, shape, dtype
        )
    assert torch.equal(ours.dequantize(), theirs)
    if double_quant:
        scales = bnb.functional.dequantize_blockwise(state.absmax, state.state2) + state.offset
    assert torch.equal(ours.scales(), scales if double_quant else state.absmax)


@KINDS
@DOUBLE
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_what_bitsandbytes_reads(kind, double_quant, dtype, tmp_path):
    weight = quantize(draw(128, 1024, dtype=dtype), kind, double_quant=double_quant)
    save_file(to_bitsandbytes(NAME, weight), tmp_path / "model.safetensors")
    tensors = load_file(tmp_path / "model.safetensors")
    state = QuantState.from_dict(own(tensors), device=torch.device("cpu"))
    assert torch.equal(dequantize_4bit(tensors[NAME], state), weight.dequantize())
    layer = bnb.nn.Params4bit.from_prequantized(tensors[NAME], own(tensors), device="cpu")
    assert layer.quant_type == kind and layer.quant_state.nested == double_quant
    assert torch.equal(dequantize_4bit(layer.data, layer.quant_state), weight.dequantize())
    again = from_bitsandbytes(NAME, tensors)
    assert all(torch.equal(again.tensors()[field], tensor) for field, tensor in weight.tensors().items())
    assert again.tensors().keys() == weight.tensors().keys()


@KINDS
def test_the_same_tensors_and_bytes(kind):
    """Without double quantisation, whose codes bitsandbytes' CPU library finds in another way, all is equal."""
    theirs, _, _ = written_by_bitsandbytes(draw(64, 96), kind, double_quant=False)
    ours = to_bitsandbytes(NAME, quantize(draw(64, 96), kind, double_quant=False))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], tensor) and ours[key].dtype == tensor.dtype for key, tensor in theirs.items())


def test_the_state_of_double_quantisation_is_the_same():
    theirs, _, state = written_by_bitsandbytes(draw(64, 96))
    ours = to_bitsandbytes(NAME, quantize(draw(64, 96)))
    assert ours.keys() == theirs.keys()
    for key in (NAME, STATE, f"{NAME}.nested_quant_map", f"{NAME}.nested_absmax", f"{NAME}.quant_map"):
        assert torch.equal(ours[key], theirs[key])


def test_bytes_kept_as_another_dtype():
    """bitsandbytes stores them so where all parameters have to be of one dtype."""
    tensors, _, _ = written_by_bitsandbytes(draw(64, 96), quant_storage=torch.bfloat16)
    assert tensors[NAME].dtype == torch.bfloat16
    plain, _, _ = written_by_bitsandbytes(draw(64, 96))
    assert torch.equal(from_bitsandbytes(NAME, tensors).packed, from_bitsandbytes(NAME, plain).packed)


def test_int8_has_no_such_form():
    with pytest.raises(ConfigError, match="up_proj.weight is int8"):
        to_bitsandbytes(NAME, quantize(draw(8, 64), "int8"))


def packed_json(fields):
    return torch.tensor(list(json.dumps(fields).encode()), dtype=torch.uint8)


def changed(**changes):
    """A state with other fields; None leaves one out."""

    def change(tensors):
        fields = json.loads(bytes(tensors[STATE].tolist())) | changes
        tensors[STATE] = packed_json({key: value for key, value in fields.items() if value is not None})

    return change


def replaced(key, function):
    def change(tensors):
        name = f"{NAME}.{key}" if key else NAME
        tensors[name] = function(tensors[name])

    return change


def without(key):
    return lambda tensors: tensors.pop(f"{NAME}.{key}" if key else NAME)


def poisoned(tensor):
    tensor = tensor.clone()
    tensor[0] = float("nan")
    return tensor


DAMAGE = {
    "no weight": (without(""), "is missing, but its shape .64, 96. takes 3072"),
    "no state": (without("quant_state.bitsandbytes__nf4"), "has nothing for its state"),
    "two states": (lambda t: t.update({STATE[:-3] + "fp4": t[STATE]}), "needs one uint8 tensor"),
    "unknown kind": (lambda t: t.update({STATE[:-3] + "nf3": t.pop(STATE)}), "bitsandbytes__nf3 for its state"),
    "kind against name": (lambda t: t.update({STATE[:-3] + "fp4": t.pop(STATE)}), "not a state"),
    "state not bytes": (replaced("quant_state.bitsandbytes__nf4", torch.Tensor.float), "needs one uint8 tensor"),
    "state cut": (replaced("quant_state.bitsandbytes__nf4", lambda t: t[:-5]), "is not JSON"),
    "state not text": (replaced("quant_state.bitsandbytes__nf4", lambda t: t + 128), "is not JSON"),
    "state too deep": (lambda t: t.update({STATE: torch.full((200_000,), ord("["), dtype=torch.uint8)}), "not JSON"),
    "state a list": (lambda t: t.update({STATE: packed_json([1])}), "not a state"),
    "state null": (lambda t: t.update({STATE: packed_json(None)}), "not a state"),
    "other quant_type": (changed(quant_type="fp4"), "not a state"),
    "other block size": (changed(blocksize=48), "not a state"),
    "block size a float": (changed(blocksize=64.0), "not a state"),
    "block size a list": (changed(blocksize=[64]), "not a state"),
    "dtype unknown": (changed(dtype="float8_e4m3fn"), "not a state"),
    "dtype a list": (changed(dtype=["float16"]), "not a state"),
    "shape null": (changed(shape=None), "not a state"),
    "shape empty": (changed(shape=[]), "not a state"),
    "shape a number": (changed(shape=6144), "not a state"),
    "shape negative": (changed(shape=[-64, -96]), "not a state"),
    "shape of truth values": (changed(shape=[True, 96]), "not a state"),
    "shape with zero": (changed(shape=[0, 96]), "not a state"),
    "shape too large": (changed(shape=[64, 97]), "absmax is .96. .* instead of .97."),
    "shape enormous": (changed(shape=[2**62, 2**62]), "instead of"),
    "shape within the last block": (changed(shape=[64 * 96 - 2]), "3072 bytes, but its shape .6142. takes 3071"),
    "block size against counts": (changed(blocksize=128), "absmax is .96. .* instead of .48."),
    "nested block size": (changed(nested_blocksize=128), "not a state"),
    "nested dtype": (changed(nested_dtype="float16"), "not a state"),
    "offset a text": (changed(nested_offset="0.1"), "not a state"),
    "offset not a number": (changed(nested_offset=float("nan")), "not a state"),
    "offset above fp32": (changed(nested_offset=1e300), "not a state"),
    "no offset": (changed(nested_offset=None), "not a state"),
    "field long": (changed(note="x" * 100_000), "not a state"),
    "field unknown": (changed(rotation="hadamard"), "not a state"),
    "not nested, with nested parts": (
        changed(nested_offset=None, nested_blocksize=None, nested_dtype=None), "beside its state",
    ),
    "no absmax": (without("absmax"), "beside its state"),
    "no map": (without("quant_map"), "beside its state"),
    "no nested map": (without("nested_quant_map"), "beside its state"),
    "part unknown": (lambda t: t.update({f"{NAME}.zeros": torch.ones(1)}), "beside its state"),
    "map of another kind": (replaced("quant_map", lambda t: t.flip(0)), "quant_map is another map"),
    "map an ulp off": (replaced("quant_map", lambda t: t * (1 + 2**-23)), "quant_map is another map"),
    "map in fp64": (replaced("quant_map", torch.Tensor.double), "quant_map is another map"),
    "nested map": (replaced("nested_quant_map", lambda t: t.flip(0)), "nested_quant_map is another"),
    "absmax short": (replaced("absmax", lambda t: t[:-1]), "absmax is .95. torch.uint8 instead of .96."),
    "absmax long": (replaced("absmax", lambda t: torch.cat([t, t])), "absmax is .192."),
    "absmax of two dimensions": (replaced("absmax", lambda t: t[:, None]), "absmax is .96, 1."),
    "absmax in fp32": (replaced("absmax", torch.Tensor.float), "absmax is .96. torch.float32 instead"),
    "nested absmax long": (replaced("nested_absmax", lambda t: torch.cat([t, t])), "nested_absmax is .2."),
    "nested absmax not finite": (replaced("nested_absmax", poisoned), "nested_absmax holds a NaN"),
    "weight cut": (replaced("", lambda t: t[:-1]), "up_proj.weight is 3071 bytes"),
    "weight long": (replaced("", lambda t: torch.cat([t, t])), "up_proj.weight is 6144 bytes"),
    "weight with gaps": (replaced("", lambda t: t.repeat(2, 1)[::2]), "up_proj.weight"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage(damage):
    change, message = DAMAGE[damage]
    tensors, _, _ = written_by_bitsandbytes(draw(64, 96))
    from_bitsandbytes(NAME, tensors)
    change(tensors)
    with pytest.raises(CheckpointError, match=message) as caught:
        from_bitsandbytes(NAME, tensors)
    assert NAME in str(caught.value) and "\n" not in str(caught.value) and len(str(caught.value)) < 500


def test_scales_that_are_not_finite():
    tensors, _, _ = written_by_bitsandbytes(draw(64, 96), double_quant=False)
    tensors[f"{NAME}.absmax"] = poisoned(tensors[f"{NAME}.absmax"])
    with pytest.raises(CheckpointError, match="absmax holds a NaN"):
        from_bitsandbytes(NAME, tensors)


def test_a_name_that_begins_another():
    tensors, _, _ = written_by_bitsandbytes(draw(64, 96))
    tensors[NAME + "_extra"] = torch.ones(1)
    assert from_bitsandbytes(NAME, tensors).shape == (64, 96)
