"""Tests, in layers: unit, contract, integration, acceptance, chaos. What they share is in :mod:`tests.support`."""
