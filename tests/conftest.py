"""What all tests share."""

from hypothesis import settings

# Other work on the machine must not fail a property: no test here is a measurement.
settings.register_profile("bixse", deadline=None)
settings.load_profile("bixse")
