"""The pass for one row against the modules' own, which the certificate compares with transformers; see tests/parity."""

import pytest
import torch

from minitune import decoding
from minitune.decoding import generate_ids
from minitune.model.adapter_set import add_named, choose, chosen_rows
from minitune.model.cache import KVCache
from minitune.model.config import LoRAConfig, ModelConfig
from minitune.model.lora import adapter_disabled, add_lora, linear_modules, make_adapters
from minitune.model.rope import Rope
from minitune.model.single import single_pass
from minitune.model.transformer import RMSNorm, Transformer
from minitune.ops.nf4 import quantize

LENGTH, PROMPT = 24, 9


def small(**changes) -> Transformer:
    sizes = dict(
        vocab_size=89, hidden_size=64, intermediate_size=96, num_layers=3, num_heads=8, num_kv_heads=2, head_dim=8
    )
    return Transformer(ModelConfig(**sizes | {"initializer_range": 0.2} | changes), seed=1).eval()


def drawn(adapters) -> None:
    """Draw what starts as nothing, so that adapters do something."""
    generator = torch.Generator().manual_seed(2)
    for lora in adapters.values():
        lora.B.data = torch.randn(lora.B.shape, generator=generator) * 0.1


@torch.inference_mode()
def texts(model: Transformer) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return the hidden states (T, D) of a text's last tokens through the modules, and by the plan if there is one."""
    ids = torch.randint(89, (1, LENGTH), generator=torch.Generator().manual_seed(0))
    found = []
    for planned in (False, True):
        cache = KVCache(model.config, 1, LENGTH, model.dtype)
        model.hidden(ids[:, :PROMPT], cache=cache)
        step = single_pass(model, cache) if planned else lambda token, cache=cache: model.hidden(token, cache=cache)
        found.append(step and torch.cat([step(ids[:, at : at + 1])[0] for at in range(PROMPT, LENGTH)]))
    return tuple(found)


def apart(model: Transformer) -> float:
    modules, plan = texts(model)
    assert plan.dtype == modules.dtype == model.dtype
    return float((plan - modules).double().norm() / modules.double().norm())


@pytest.mark.parametrize("dtype,bar", [("float64", 1e-13), ("float32", 1e-6), ("bfloat16", 1e-2), ("float16", 1e-3)])
def test_dtypes(dtype, bar):
    assert apart(small().to(getattr(torch, dtype))) < bar


@pytest.mark.parametrize("init", ["kaiming", "pissa"])
@pytest.mark.parametrize("targets", ["all-linear", ("k_proj", "up_proj", "o_proj")])
def test_adapters(init, targets):
    model = small().double()
    base = texts(model)[1]
    drawn(add_lora(model, LoRAConfig(rank=4, target_modules=targets, init=init)))
    assert apart(model) < 1e-13
    assert float((texts(model)[1] - base).norm() / base.norm()) > 0.1
    with adapter_disabled(model):
        assert torch.equal(texts(model)[1], base)


def test_the_adapter_that_is_chosen():
    model = small().double()
    for seed, name in enumerate(("one", "two")):
        drawn(added := make_adapters(model, dict.fromkeys(linear_modules(model), LoRAConfig(rank=2)), seed=seed))
        add_named(model, name, added)
    model.eval()
    answers = {}
    for name in ("one", "two", None):
        choose(model, name)
        assert apart(model) < 1e-13
        answers[name] = texts(model)[1]
    assert len({float(answer.sum()) for answer in answers.values()}) == 3
    with chosen_rows(model, ["one", "two"]):
        assert single_pass(model, KVCache(model.config, 1, LENGTH)) is None


def quantised(model):
    layer = model.model.layers[1].mlp.down_proj
    layer.replace_weight(quantize(layer.weight.data))


def of_dora(model):
    drawn(add_lora(model, LoRAConfig(rank=2, target_modules=("q_proj",), dora=True)))


def hooked(model):
    model.model.layers[0].mlp.register_forward_hook(lambda *_: None)


def patched(model):
    model.model.layers[2].mlp.forward = lambda x: x.make()


def of_another_class(model):
    class Doubled(RMSNorm):
        def forward(self, x):
            return 2 * super().forward(x)

    model.model.norm = Doubled(64, model.config, torch.float32, "cpu").eval()


def with_a_wide_norm(model):
    model.bfloat16().model.norm.float()


def dropping(model):
    add_lora(model, LoRAConfig(rank=2, dropout=0.5))
    model.model.layers[0].mlp.down_proj.lora.train()


def unstacked(model):
    layer = model.model.layers[0].self_attn.k_proj
    layer.replace_weight(layer.weight.data.clone())


@pytest.mark.parametrize("change", [quantised, of_dora, hooked, patched, of_another_class, with_a_wide_norm,
                                    dropping, unstacked, Transformer.train])  # fmt: skip
def test_what_has_no_plan(change):
    model = small()
    change(model)
    assert texts(model)[1] is None


def test_no_plan_under_hooks_of_all_modules():
    hook = torch.nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        assert texts(small())[1] is None
    finally:
        hook.remove()
    assert texts(small())[1] is not None


def test_no_gradient_flows():
    model = small()
    cache = KVCache(model.config, 1, LENGTH)
    with torch.no_grad():
        model.hidden(torch.ones(1, PROMPT, dtype=torch.int64), cache=cache)
    assert not single_pass(model, cache)(torch.ones(1, 1, dtype=torch.int64)).requires_grad


def test_no_plan_where_rope_depends_on_the_length():
    assert texts(small(rope=Rope(kind="dynamic", factor=2.0)))[1] is None


def test_a_full_cache_is_refused():
    model = small()
    with torch.inference_mode():
        cache = KVCache(model.config, 1, PROMPT)
        model.hidden(torch.ones(1, PROMPT, dtype=torch.int64), cache=cache)
        with pytest.raises(ValueError, match="9 tokens; 10 were asked for"):
            single_pass(model, cache)(torch.ones(1, 1, dtype=torch.int64))


def test_generation_takes_it_for_one_text_and_writes_the_same(monkeypatch):
    model, prompts, taken = small(), [[5, 6, 7], [8, 9, 3, 4]], []

    def watched(*given):
        taken.append(single_pass(*given))
        return taken[-1]

    together = generate_ids(model, prompts, max_new_tokens=20)
    monkeypatch.setattr(decoding, "single_pass", watched)
    assert generate_ids(model, prompts, max_new_tokens=20, batch_size=1) == together
    assert len(taken) == 2 and None not in taken
    assert generate_ids(model, prompts, max_new_tokens=20) == together and len(taken) == 2
    generate_ids(model, prompts, max_new_tokens=1, batch_size=1)
    assert len(taken) == 2, "a plan for no token"
