"""The table against the chips that the data sheets are of: units x clock, and what is known by name."""

import pytest

from minitune.errors import ConfigError
from minitune.planning.devices import DEVICES, device

# multiprocessors, fused multiply-adds a cycle in each with sums in fp32 (tensor cores, plain fp32), boost clock in GHz
CHIPS = {
    "H100-SXM": (132, 4 * 512, 128, 1.830, 1.980),
    "H200": (132, 4 * 512, 128, 1.830, 1.980),
    "A100-40GB": (108, 4 * 256, 64, 1.410, 1.410),
    "RTX-3090": (82, 4 * 64, 128, 1.695, 1.695),
    "RTX-4090": (128, 4 * 64, 128, 2.520, 2.520),
    "RTX-5090": (170, 4 * 64, 128, 2.407, 2.407),
    "T4": (40, None, 64, None, 1.590),
}


@pytest.mark.parametrize("name", CHIPS)
def test_peaks_are_units_times_clock(name):
    processors, tensor, plain, tensor_clock, clock = CHIPS[name]
    found = device(name)
    assert found.float32 == pytest.approx(2 * processors * plain * clock * 1e9, rel=0.01)
    if tensor is None:
        assert found.bfloat16 is None
    else:
        assert found.rate("bfloat16") == pytest.approx(2 * processors * tensor * tensor_clock * 1e9, rel=0.01)


def test_every_device_says_where_its_numbers_are_from():
    for one in DEVICES:
        assert one.source and one.bandwidth > 1e10
        for low, high in one.utilisation:
            assert 0 < low < high < 1
        assert one.bfloat16 is None or one.bfloat16 > one.float32


@pytest.mark.parametrize(
    "name,message", [("A100", "A100-40GB, A100-80GB"), ("h100-smx", "'H100-SXM'"), ("abacus", "there are H100-SXM")]
)
def test_an_unknown_device_is_refused_with_the_nearest(name, message):
    with pytest.raises(ConfigError, match=message):
        device(name)


def test_names_are_found_in_any_case_and_missing_units_are_refused():
    assert device("rtx-4090").name == "RTX-4090"
    with pytest.raises(ConfigError, match="float32"):
        device("T4").rate("bfloat16")
