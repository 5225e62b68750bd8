"""Mojibake: texts are spoiled as readers spoil them, so what they were is known; sound texts stay as they are."""

import ftfy
import pytest

from minitune.curation.mojibake import find_mojibake, repair_mojibake

SOUND = [
    "L’été, déjà vu à Besançon — «naïve» façade; 5 €", "Größe, Übermaß, Äpfel, ß", "El niño comió ¿qué? ¡Sí! Ñandú",
    "Zażółć gęślą jaźń, Łódź", "Příliš žluťoučký kůň úpěl ďábelské ódy", "Tiếng Việt rất đẹp và dễ học",
    "Съешь ещё этих мягких французских булок", "Ξεσκεπάζω την ψυχοφθόρα", "中文字符编码错误 测试", "日本語のテキスト",
    "“Don’t” – he said… ™ © ® 20°C £5", "I 😀 it 👍🏽", "שלום עולם", "Ștefan cel Mare și Țara", "São Paulo, coração",
    "हिन्दी भाषा", "한국어 문장", "5 Å and Øre, smørrebrød", "½ cup · 3×4 µm", "plain ASCII text, 100%",
]  # fmt: skip
RARE = [  # sound texts in which letters and typography meet as the bytes of other characters would
    "“café…”", "« déjà… »", "IRMÃ— e", "MANHÃ…", "“IRMÔ", "HÔTEL À…", "5 Å… and", "2.5 Å±0.1", "Ø°", "DÉJÀ—vu", "‘Ñ’",
    "(Ä–Ö)", "É®", "groß…", "voilà…", "é“x”", "à l’“été”", "Ça…", "ÉTÉ™", "CAFÉ’s", "naïve…“", "Ã and Â", "Ñ", "ðŸ",
    "â€",
]  # fmt: skip


def windows(text: str) -> str:
    """UTF-8 read as Windows-1252; the five bytes that it has not become control characters, as browsers do it."""
    return "".join(bytes([byte]).decode("cp1252", "ignore") or chr(byte) for byte in text.encode())


def latin(text: str) -> str:
    """UTF-8 read as Latin-1."""
    return text.encode().decode("latin-1")


@pytest.mark.parametrize("text", SOUND)
@pytest.mark.parametrize("wrong", [windows, latin])
@pytest.mark.parametrize("times", [1, 2])
def test_what_was_read_wrongly_is_found_and_undone(text, wrong, times):
    spoiled = text
    for _ in range(times):
        spoiled = wrong(spoiled)
    assert (find_mojibake(spoiled) is None) == text.isascii()
    assert repair_mojibake(spoiled) == text


@pytest.mark.parametrize("text", SOUND + RARE)
def test_sound_text_stays(text):
    assert find_mojibake(text) is None and repair_mojibake(text) == text


def test_typography_that_became_control_characters():
    assert repair_mojibake("it\x92s \x93new\x94 \x96 5 \x80\x85") == "it’s “new” – 5 €…"
    assert find_mojibake("a\x97b") == ("\x97", "—")
    assert repair_mojibake("\x81") == "\x81"  # Windows-1252 has no such character


def test_the_first_place_is_shown_with_what_it_means():
    assert find_mojibake("A cafÃ© and a rÃ´le") == ("Ã©", "é")
    assert find_mojibake("lost: ï¿½") == ("ï¿½", "\ufffd")
    assert find_mojibake("ï»¿start") == ("ï»¿", "\ufeff")


def test_ftfy_agrees():
    """The package that is made for it: the same texts are broken, and mended alike."""
    for text in SOUND:
        assert ftfy.fix_encoding(text) == text
        if ftfy.fix_encoding(windows(text)) == text:
            assert repair_mojibake(windows(text)) == text
