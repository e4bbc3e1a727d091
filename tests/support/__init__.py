"""The test equipment: real servers, real workers, a ledger of what ran, and waiting with a deadline.

Import from the modules: :mod:`~tests.support.waiting`, :mod:`~tests.support.ledger`, :mod:`~tests.support.worker`,
:mod:`~tests.support.brokers`, :mod:`~tests.support.stores`, :mod:`~tests.support.apps`, :mod:`~tests.support.servers`.
The fixtures are in ``tests/conftest.py``.
"""
