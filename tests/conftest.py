"""Hypothesis' profiles: by default as many examples as a test asks for; `--hypothesis-profile=fuzz` for a long hunt."""

import os

from hypothesis import HealthCheck, settings

# A change is judged by the same examples each time; new ones are for the hunt.
settings.register_profile("default", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("default")
settings.register_profile(
    "fuzz",
    deadline=None,
    max_examples=int(os.environ.get("HVDKIT_FUZZ", "20000")),
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
