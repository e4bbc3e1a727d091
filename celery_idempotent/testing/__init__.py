"""The contract of a store as a test suite, for every implementation of :class:`~celery_idempotent.core.store.Store`.

Importing this module imports pytest. A store passes if a subclass like this one passes::

    class TestMyStore(StoreContract):
        @pytest.fixture
        def open_store_again(self, tmp_path):
            return functools.partial(MyStore, tmp_path / "queue_log")

For a store that supports ``atomic=True``, add :class:`TransactionContract` to the bases.
"""

from __future__ import annotations

import pkgutil

import pytest

# Before the imports: pytest explains asserts only in registered modules.
for _module in pkgutil.iter_modules(__path__):
    pytest.register_assert_rewrite(f"{__name__}.{_module.name}")

from celery_idempotent.testing.admin import AdminContract  # noqa: E402 - see above
from celery_idempotent.testing.claiming import ClaimContract  # noqa: E402
from celery_idempotent.testing.ending import EndingContract  # noqa: E402
from celery_idempotent.testing.handing_on import HandingOnContract  # noqa: E402
from celery_idempotent.testing.keeping_steps import StepsContract  # noqa: E402
from celery_idempotent.testing.life import LifeContract  # noqa: E402
from celery_idempotent.testing.publishing import PublishContract  # noqa: E402
from celery_idempotent.testing.purging import PurgeContract  # noqa: E402
from celery_idempotent.testing.races import RaceContract  # noqa: E402
from celery_idempotent.testing.recording import RecordContract  # noqa: E402
from celery_idempotent.testing.relaying import RelayContract  # noqa: E402
from celery_idempotent.testing.rescuing import RescueContract  # noqa: E402
from celery_idempotent.testing.taking_over import TakeOverContract  # noqa: E402
from celery_idempotent.testing.transactions import TransactionContract  # noqa: E402

__all__ = ["StoreContract", "TransactionContract"]


class StoreContract(
    RecordContract,
    PublishContract,
    ClaimContract,
    TakeOverContract,
    EndingContract,
    HandingOnContract,
    StepsContract,
    RescueContract,
    RelayContract,
    PurgeContract,
    AdminContract,
    LifeContract,
    RaceContract,
):
    """Test every promise of the port. Override the fixture ``open_store_again``; nothing else is needed."""
