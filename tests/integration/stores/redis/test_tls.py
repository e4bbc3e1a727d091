"""A log reached through TLS."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from celery_idempotent import RedisStore, StoreUnavailableError
from celery_idempotent.testing.examples import new_message, processing
from tests.support.servers import PrivateRedis, free_port, missing, skip_if_not_installed


class _Secured(PrivateRedis):
    """A Redis that has a port with TLS besides; its certificate is its own authority."""

    def __init__(self) -> None:
        super().__init__()
        self.tls_port = free_port()
        self.certificate, self.key = self.directory / "redis.crt", self.directory / "redis.key"

    def command(self) -> list[str]:
        options = {
            "tls-port": str(self.tls_port),
            "tls-cert-file": str(self.certificate),
            "tls-key-file": str(self.key),
            "tls-ca-cert-file": str(self.certificate),
            "tls-auth-clients": "no",
        }
        return [*super().command(), *(part for name, value in options.items() for part in (f"--{name}", value))]

    def prepare(self) -> None:
        subprocess.run(
            [
                *("openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1"),
                *("-keyout", str(self.key), "-out", str(self.certificate)),
                *("-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"),
            ],
            check=True,
            capture_output=True,
        )
        for file in (self.certificate, self.key):
            file.chmod(0o600)
            if self._user is not None:
                shutil.chown(file, self._user)


@pytest.fixture
def secured() -> Iterator[_Secured]:
    if shutil.which("openssl") is None:
        missing("openssl", "it makes the certificate")
    with skip_if_not_installed(), _Secured() as server:
        yield server


def url(server: _Secured, options: str) -> str:
    return f"rediss://127.0.0.1:{server.tls_port}/0?{options}"


def test_a_server_is_known_by_its_certificate(secured: _Secured, tmp_path: Path) -> None:
    authority = tmp_path / "authority.pem"
    authority.write_bytes(secured.certificate.read_bytes())
    with closing(RedisStore(url(secured, f"ssl_ca_certs={authority}"))) as store:
        assert store.complete(processing(store), result=b"1")
    with closing(RedisStore(url(secured, "ssl_cert_reqs=CERT_NONE&ssl_check_hostname=false"))) as store:
        assert store.check() is None  # type: ignore[func-returns-value]


def test_a_server_with_an_unknown_certificate_gets_nothing(secured: _Secured) -> None:
    with closing(RedisStore(url(secured, "ssl_cert_reqs=CERT_REQUIRED"))) as store:
        with pytest.raises(StoreUnavailableError, match="certificate") as caught:
            store.record(new_message())
        assert caught.value.unsent
