"""How many examples fuzzing makes: few in the usual tests, many by `make fuzz`."""

from __future__ import annotations

from hypothesis import HealthCheck, settings

settings.register_profile("fuzz", max_examples=2000, deadline=None, database=None, suppress_health_check=list(HealthCheck))
