"""What holds for every test."""

from __future__ import annotations

import os

from hypothesis import HealthCheck, settings

# Deadlines and the pace of data generation measure how busy the machine is, not whether a property holds.
settings.register_profile("here", deadline=None, print_blob=True, suppress_health_check=[HealthCheck.too_slow])
# A change is judged by the same examples whenever it is judged; runs at a desk look somewhere else each time.
settings.register_profile("ci", settings.get_profile("here"), derandomize=True, database=None)
# pytest --hypothesis-profile=thorough
settings.register_profile("thorough", settings.get_profile("here"), max_examples=2_000)
settings.load_profile("ci" if os.environ.get("CI") else "here")
