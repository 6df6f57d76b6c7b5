"""Bounded, reproducible hypothesis runs for all tests."""

from hypothesis import HealthCheck, settings

settings.register_profile(
    "hydrahead",
    deadline=None,
    derandomize=True,
    max_examples=25,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.load_profile("hydrahead")
