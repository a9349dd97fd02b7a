"""Traces of training frameworks against what their experts were given: `make test-frameworks`."""
