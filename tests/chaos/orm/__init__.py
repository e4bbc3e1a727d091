"""The tables of a run of chaos as a Django app: see :mod:`tests.support.orm`."""
