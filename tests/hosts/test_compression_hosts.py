"""Compression between two hosts over a slow link: steps are shorter, and bytes as many as the toolkit says."""

import re

from tests.benchmarks import compression as benchmark
from toolkit.compression import NAMES

RATE = 50e6  # bits per second: none needs 0.15 s a step for its bytes alone
WIDTHS = 384, 512, 10
# Of none's bytes at most, with some room for what a busy machine adds to a step, beside the bytes.
SHARES = {"fp16": 0.8, "bf16": 0.8, "int8": 0.6, "topk": 0.4, "powersgd": 0.5}
BESIDE = 10_000  # bytes a step at most for what goes between hosts beside gradients


def test_on_a_slow_link_a_compressed_step_is_shorter_and_sends_what_the_toolkit_says(cluster):
    found, printed = benchmark.measure(cluster, RATE, rounds=3, steps=3, widths=WIDTHS)
    said = [int(text.replace(",", "")) for text in re.findall(r"a worker sends ([\d,]+) bytes", printed)]
    assert len(said) == len(NAMES), printed
    for name, length in zip(NAMES, said, strict=True):
        assert abs(length - found["bytes_said"][name]) < 100, "what the plan reckons with"
        counted = min(found["bytes_counted"][name])
        assert length < counted < 1.05 * length + BESIDE, (name, length, found["bytes_counted"][name])
    quickest = {name: min(seconds) for name, seconds in found["seconds_per_step"].items()}
    assert quickest["none"] > 8 * said[0] / RATE, "the link is not slow"
    for name, share in SHARES.items():
        assert benchmark.pays_below(found, name, WIDTHS) > RATE / 1e6, (name, found)
        assert quickest[name] < share * quickest["none"], (name, quickest)
