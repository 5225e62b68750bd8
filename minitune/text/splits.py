"""How text is cut into words before its bytes are merged, by the name that a GGUF file gives (`tokenizer.ggml.pre`).

    text -> pieces of rule 1 and what is between them -> each of these cut by rule 2 -> ... -> words

A byte pair never merges across two words, so another rule gives other ids. GGUF stores only a name for the rules.
The table has those that llama.cpp (src/llama-vocab.cpp) and the models' own tokenizer.json files give to the names of
supported families; an unknown or missing name is refused, since a guess tokenises almost right, silently. Of the
rules each regular expression is a fact of the models; where llama.cpp leaves Unicode normalisation out that the
models were trained with (NFC), the models decide, as they do in llama.cpp's own test vectors.
"""

from dataclasses import dataclass

from tokenizers import Regex, pre_tokenizers

from minitune.errors import CheckpointError, nearest


@dataclass(frozen=True)
class Split:
    """One way to cut: `rules` in order; `whole_words` (a word of the vocabulary is one token, merges or not);
    `bos` (the model's files put BOS first); `nfc` (text is composed by Unicode's NFC before it is cut).
    """

    rules: tuple[str, ...]
    whole_words: bool = False
    bos: bool = False
    nfc: bool = False

    def pre_tokenizer(self) -> pre_tokenizers.PreTokenizer:
        """Return the steps as `tokenizers` takes them, bytes as characters last."""
        steps = [pre_tokenizers.Split(Regex(rule), behavior="isolated") for rule in self.rules]
        return pre_tokenizers.Sequence([*steps, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


_SHORT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"  # English contractions
_BLANK = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_OTHER = r" ?[^\s\p{L}\p{N}]+[\r\n]*"
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3 = rf"{_SHORT}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{_OTHER}|{_BLANK}"
QWEN2 = rf"{_SHORT}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{_OTHER}|{_BLANK}"
# A word of these ends where a capital letter follows a small one.
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_HEAD, _SLASHED = r"[^\r\n\p{L}\p{N}]?", r" ?[^\s\p{L}\p{N}]+[\r\n/]*"
TEKKEN = rf"{_HEAD}{_UPPER}*{_LOWER}+|{_HEAD}{_UPPER}+{_LOWER}*|\p{{N}}|{_SLASHED}|{_BLANK}"
GPT4O = rf"{_HEAD}{_UPPER}*{_LOWER}+{_SHORT}?|{_HEAD}{_UPPER}+{_LOWER}*{_SHORT}?|\p{{N}}{{1,3}}|{_SLASHED}|{_BLANK}"
_DIGIT = r"\p{N}"
_ASIAN = "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"
# The letters with case that were in Unicode when DeepSeek's first tokenizer was made.
_CASED = (
    "A-Za-zµÀ-ÖØ-öø-ƺƼ-ƿǄ-ʓʕ-ʯͰ-ͳͶͷͻ-ͽͿΆΈ-ΊΌΎ-ΡΣ-ϵϷ-ҁҊ-ԯԱ-ՖႠ-ჅᎠ-Ᏽᏸ-ᏽᲐ-ᲺᲽ-Ჿᴀ-ᴫᵫ-ᵷᵹ-ᶚḀ-ἕἘ-Ἕἠ-ὅὈ-Ὅὐ-ὗὙὛὝὟ-\u1f7dᾀ"
    "-ᾴᾶ-ᾼ\u1fbeῂ-ῄῆ-ῌῐ-\u1fd3ῖ-\u1fdbῠ-Ῥῲ-ῴῶ-ῼℂℇℊ-ℓℕℙ-ℝℤ\u2126ℨ\u212a-ℭℯ-ℴℹℼ-ℿⅅ-ⅉⅎↃↄⰀ-ⱻⱾ-ⳤⳫ-ⳮⳲⳳꙀ-ꙭꚀ-ꚛꜢ-ꝯꝱ-ꞇꞋ-"
    "ꞎꭰ-ꮿﬀ-ﬆﬓ-ﬗＡ-Ｚａ-ｚ𐐀-𐑏𐒰-𐓓𐓘-𐓻𐲀-𐲲𐳀-𐳲𑢠-𑣟𞤀-𞥃"
)
_PUNCTUATION = "[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+"
DEEPSEEK_LLM = (r"[\r\n]", rf"\s?[{_CASED}]+", rf"\s?{_PUNCTUATION}", r"\s+$", _ASIAN, r"\p{N}+")
DEEPSEEK_CODER = (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _ASIAN, _DIGIT)

_SPLITS = {
    ("gpt-2", "phi-2"): Split((GPT2,)),
    ("mpt", "olmo"): Split((GPT2,), nfc=True),  # GPT-NeoX's tokenizer, under the names of the first to be converted
    ("smollm", "starcoder", "refact"): Split((_DIGIT, GPT2)),  # refact: Granite's, too
    ("command-r",): Split((_DIGIT, GPT2), nfc=True),
    ("llama-bpe", "llama3", "llama-v3", "falcon3"): Split((LLAMA3,), whole_words=True, bos=True),
    ("dbrx", "smaug-bpe"): Split((LLAMA3,)),  # OLMo-2 and SmolLM3
    ("qwen2", "deepseek-r1-qwen", "megrez"): Split((QWEN2,), nfc=True),
    ("tekken",): Split((TEKKEN,), whole_words=True, bos=True),  # Mistral Nemo
    ("gpt-4o",): Split((GPT4O,)),  # Phi-4-mini
    ("deepseek-llm",): Split(DEEPSEEK_LLM),
    ("deepseek-coder",): Split(DEEPSEEK_CODER),
}
SPLITS = {name: split for names, split in _SPLITS.items() for name in names}
_UNNAMED = {"gpt2": "gpt-2", "gptneox": "mpt"}  # architectures with one tokenizer, in files older than the field


def split_named(name: str | None, architecture: str | None, where: object) -> Split:
    """Return the split that `tokenizer.ggml.pre` names, of an old file without it that of its architecture.

    Raises CheckpointError, beginning with `where`, for a name that is not known or missing.
    """
    name = _UNNAMED.get(str(architecture)) if name is None else name
    if str(name) not in SPLITS:
        known = f"known: {', '.join(sorted(SPLITS))}{nearest(str(name), SPLITS)}"
        raise CheckpointError(f"{where}: tokenizer.ggml.pre {name!r}; {known}; else use the folder with tokenizer.json")
    return SPLITS[str(name)]
