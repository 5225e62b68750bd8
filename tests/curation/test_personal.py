"""Personal data: hand-labelled texts with their matches, and look-alikes that must not fire."""

import random

import pytest

from minitune.curation.personal import find, luhn, mod97, redact

# Each says what is to be found, in order. Keys are put together here, so that no scanner takes them for real ones.
SECRET = "b7Kq" * 12
FOUND = [
    ("Write to jane.doe+news@mail.example-shop.co.uk please", ["jane.doe+news@mail.example-shop.co.uk"], "email"),
    ("Mail: <a_b@c-d.org>, or x@y.io.", ["a_b@c-d.org", "x@y.io"], "email"),
    ("mailto:info@firma.de?subject=Hi", ["info@firma.de"], "email"),
    ("Schreiben Sie an müller@büro.de!", ["müller@büro.de"], "email"),
    ("Ring +44 20 7946 0958 tomorrow", ["+44 20 7946 0958"], "phone"),
    ("Fon +49 (0)30 901820 ab 9 Uhr", ["+49 (0)30 901820"], "phone"),
    ("+14155550132", ["+14155550132"], "phone"),
    ("call (415) 555-0132.", ["(415) 555-0132"], "phone"),
    ("415-555-0132 or 415.555.0133", ["415-555-0132", "415.555.0133"], "phone"),
    ("1-800-356-9377", ["1-800-356-9377"], "phone"),
    ("Appelez le 06 12 34 56 78, merci", ["06 12 34 56 78"], "phone"),
    ("London 020 7946 0958", ["020 7946 0958"], "phone"),
    ("Berlin 030/9018200", ["030/9018200"], "phone"),
    ("My phone number is 555 0199 42", ["555 0199 42"], "phone"),
    ("tel: 5550132", ["5550132"], "phone"),
    ("card 4111 1111 1111 1111 exp 12/27", ["4111 1111 1111 1111"], "card"),
    ("5555-5555-5555-4444", ["5555-5555-5555-4444"], "card"),
    ("amex 378282246310005", ["378282246310005"], "card"),
    ("6011111111111117 and 3530111333300000", ["6011111111111117", "3530111333300000"], "card"),
    ("IBAN DE89 3704 0044 0532 0130 00", ["DE89 3704 0044 0532 0130 00"], "iban"),
    ("GB29NWBK60161331926819 is mine", ["GB29NWBK60161331926819"], "iban"),
    ("pay NO93 8601 1117 947 now", ["NO93 8601 1117 947"], "iban"),
    ("from 8.8.8.8 and 93.184.216.34:443", ["8.8.8.8", "93.184.216.34"], "ip_address"),
    ("key " + "AKIA" + "IOSFODNN7EXAMPLE"[:16], ["AKIA" + "IOSFODNN7EXAMPLE"], "key"),
    ("export T=" + "ghp_" + SECRET[:36], ["ghp_" + SECRET[:36]], "key"),
    ("github_pat_" + SECRET + SECRET[:30], ["github_pat_" + SECRET + SECRET[:30]], "key"),
    ("xoxb-" + "123456789012-abcdefABCDEF", ["xoxb-" + "123456789012-abcdefABCDEF"], "key"),
    ("OPENAI_API_KEY=sk-" + SECRET, ["sk-" + SECRET], "key"),
    ("use sk-proj-" + SECRET, ["sk-proj-" + SECRET], "key"),
    ("hf_" + "abcdefghij" * 3 + "KLMN", ["hf_" + "abcdefghij" * 3 + "KLMN"], "key"),
    ("AIza" + "Sy_" + "B3" * 16, ["AIza" + "Sy_" + "B3" * 16], "key"),
    ("sk_live_" + SECRET[:24], ["sk_live_" + SECRET[:24]], "key"),
    ("Bearer eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0In0." + SECRET[:43],
     ["eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0In0." + SECRET[:43]], "key"),
    ("-----BEGIN RSA PRIVATE KEY-----\nMIIE\n-----END RSA PRIVATE KEY----- end",
     ["-----BEGIN RSA PRIVATE KEY-----\nMIIE\n-----END RSA PRIVATE KEY-----"], "key"),
]  # fmt: skip
LOOK_ALIKES = [
    "A/C No. 00632000001783", "2\n+960397912423686\n", "4212883012996", "barcode number is 332960073452",
    "version 10.4.1.2 of the driver", "v1.2.3.4 and 2.13.0", "192.168.0.1, 10.0.0.1 and 127.0.0.1", "300.1.1.1",
    "Order 4111 1111 1111 1112 was sent", "order number 1234567890123456", "tracking 9400110200881234567890",
    "sha1 da39a3ee5e6b4b0d3255bfef95601890afd80709", "commit 4111111111111111abcdef",
    "uuid 123e4567-e89b-12d3-a456-426614174000", "in 1999-2003 and 2020-01-31", "12/05/2021 10:30",
    "ISBN 978-3-16-148410-0", "population 1,234,567,890", "pi = 3.14159265358979", "x@y", "@user and user@",
    "a @ b.com", "me@localhost", "name@example.com", "someone@mail.example.org", "decorators: @app.route", "git@2.1",
    "matrix[0@3.5]", "DE00 1234 5678 9012 3456 78", "FR7612345", "AB12 CDEF 3456 7890", "GB29NWBK60161331926818",
    "sk-learn-contrib-imbalanced-learn", "sk-hyphenated-words-only-and-more", "ask-me-anything-about-it-2",
    "task_live_things", "ghp_short", "hf_hub_download(repo)", "AKIA is a prefix", 'eyJ is base64 of {"',
    "the BEGIN PRIVATE KEY line", "room 415, 555 people, 0132", "2 + 415-55", "0.5 1.5 2.5 3.5",
    "1 2 3 4 5 6 7 8 9 10", "0000000000", "111-111-1111", "192-168-1000", "call 911", "call me at 5 or 6",
    "phone 12 and 13", "for i in range(1000000000):", "0x7fffffff", "+1 for this idea", "a+12345",
    "2021 2022 2023 2024", "score 10-12-14", "chapter 020 of 100", "$1 000 000 and €2.500.000", "007 is back",
    "1e-0712345", "-0123456", "call me on 12/10/2023", "Call us on 2023-12-10 at noon", "mobile 2019-2020",
    "the call of 1914-1918", "fax 2020/2021 models", "call me on 12.10.23", "lat +51.507351",
]  # fmt: skip


@pytest.mark.parametrize("text,values,kind", FOUND)
def test_personal_data_is_found(text, values, kind):
    assert [(m.kind, text[m.start : m.end]) for m in find(text)] == [(kind, value) for value in values]
    redacted = redact(text)
    assert redacted.count(f"[{kind.upper()}]") == len(values) and not find(redacted)
    assert not any(value in redacted for value in values)


@pytest.mark.parametrize("text", LOOK_ALIKES)
def test_look_alikes_do_not_fire(text):
    assert find(text) == [] and redact(text) == text


def test_several_kinds_in_one_text():
    text = "Ann (ann@corp.com, +1 212 555 0187) paid with 4111111111111111 from 8.8.4.4."
    assert redact(text) == "Ann ([EMAIL], [PHONE]) paid with [CARD] from [IP_ADDRESS]."
    assert redact(redact(text)) == redact(text)


def test_checksums_catch_every_single_wrong_digit():
    """Luhn and mod 97 are made for that; a checksum that lets one pass is wrong."""
    card, iban = "4111111111111111", "GB29NWBK60161331926819"
    assert luhn(card) and mod97(iban)
    for place in range(len(card)):
        for digit in set("0123456789") - {card[place]}:
            assert not luhn(card[:place] + digit + card[place + 1 :])
    for place in range(8, len(iban)):
        for digit in set("0123456789") - {iban[place]}:
            assert not mod97(iban[:place] + digit + iban[place + 1 :])


def test_no_text_takes_long_or_fails():
    draw = random.Random(0)
    for alphabet in ("0123456789 -.", "aA0@.-_ ", "+() 0123456789", "\n\t sk-xoxeyJ@."):
        for _ in range(30):
            text = "".join(draw.choices(alphabet, k=300))
            for match in find(text):
                assert 0 <= match.start < match.end <= len(text)
    assert find("1 " * 20_000) == [] and find("a." * 20_000 + "@") == [] and find("eyJ" * 20_000) == []
