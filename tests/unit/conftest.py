"""How Hypothesis makes its examples."""

from hypothesis import HealthCheck, settings

# On a busy machine an example takes any time.
settings.register_profile("busy", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("busy")
