"""What holds for every test."""

from __future__ import annotations

from hypothesis import HealthCheck, settings

# Deadlines and the pace of data generation measure how busy the machine is, not whether a property holds.
# Runs stay random: each one looks somewhere else, and prints what reproduces a failure.
settings.register_profile("ci", deadline=None, print_blob=True, suppress_health_check=[HealthCheck.too_slow])
# pytest --hypothesis-profile=thorough
settings.register_profile("thorough", settings.get_profile("ci"), max_examples=2_000)
settings.load_profile("ci")
