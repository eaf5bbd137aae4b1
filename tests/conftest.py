"""Hypothesis profiles, FASTFT_HYPOTHESIS_PROFILE: ci (the default: few examples, always the same), interpreter, gpu,
and mutants, where a failure need not be made small.

And how many threads torch computes with: several processes with as many each as there are cores wait for one another.
"""

import os

import pytest
from hypothesis import HealthCheck, Phase, settings

settings.register_profile(
    "ci", max_examples=25, derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.register_profile("gpu", max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile(  # hundreds of times slower than a compiled kernel
    "interpreter", max_examples=3, derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.register_profile(
    "mutants", settings.get_profile("ci"), phases=[Phase.explicit, Phase.generate], report_multiple_bugs=False
)
settings.load_profile(os.environ.get("FASTFT_HYPOTHESIS_PROFILE", "ci"))


def pytest_configure(config: pytest.Config) -> None:
    """Before torch is imported, for the processes of xdist and those that tests start too."""
    processes = len(config.getoption("tx", None) or [])
    if processes > 1:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // processes)))
