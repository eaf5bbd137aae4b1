"""Hypothesis profiles, FASTFT_HYPOTHESIS_PROFILE: ci (the default: few examples, always the same), interpreter, gpu."""

import os

from hypothesis import HealthCheck, settings

settings.register_profile(
    "ci", max_examples=25, derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.register_profile("gpu", max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile(  # hundreds of times slower than a compiled kernel
    "interpreter", max_examples=10, derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile(os.environ.get("FASTFT_HYPOTHESIS_PROFILE", "ci"))
