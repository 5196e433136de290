"""What encrypts the control channel, and shows who is at its other end: certificate files, on both sides."""

from __future__ import annotations

import ssl
from functools import cache
from typing import TYPE_CHECKING

import attrs

from weight_transfer.errors import ConfigError

if TYPE_CHECKING:
    from weight_transfer.config.settings import WeightTransferConfig


@attrs.frozen(kw_only=True)
class Tls:
    """Certificate files of one side, in PEM.

    Attributes:
        cert: this side's certificate, and those of intermediate authorities behind it. A worker that has one serves
            HTTPS; a trainer shows it to workers that ask.
        key: the certificate's private key, unencrypted; None if ``cert`` holds it.
        ca: certificates of the authorities that the other side's certificate has to be of. A worker that has some asks
            trainers for a certificate. A trainer without trusts the public authorities.
    """

    cert: str | None = None
    key: str | None = None
    ca: str | None = None

    @classmethod
    def of(cls, config: WeightTransferConfig) -> Tls:
        """Return what a configuration says."""
        return cls(cert=config.tls_cert, key=config.tls_key, ca=config.tls_ca)

    def for_worker(self) -> ssl.SSLContext | None:
        """Return what a worker serves with; None without a certificate: it serves HTTP.

        Raises:
            ConfigError: a file cannot be read, or is no certificate or key; or there is none for the key or the ``ca``.
        """
        if self.cert is None:
            if self.key is not None or self.ca is not None:
                raise ConfigError("tls_cert: a worker that has tls_key or tls_ca needs a certificate, too.")
            return None
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._show_own(context)
        if self.ca is not None:
            self._trust(context, self.ca)
            context.verify_mode = ssl.CERT_OPTIONAL  # asyncio hangs up without a word on who has none: the guard tells
        return context

    def for_trainer(self) -> ssl.SSLContext:
        """Return what a trainer calls ``https://`` addresses with.

        Raises:
            ConfigError: a file cannot be read, or is no certificate or key.
        """
        if self == Tls():
            return _public()
        if self.ca is None:
            context = _trusting_public()
        else:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
            self._trust(context, self.ca)
        self._show_own(context)
        return context

    def _show_own(self, context: ssl.SSLContext) -> None:
        if self.cert is None:
            return
        try:
            context.load_cert_chain(self.cert, self.key, password=_no_password)
        except (OSError, ValueError) as error:  # SSLError is an OSError
            raise ConfigError(
                f"tls_cert, tls_key: {self.cert} and {self.key or 'the same file'} are no certificate and its "
                "unencrypted private key in PEM.",
                cause=str(error),
            ) from error

    @staticmethod
    def _trust(context: ssl.SSLContext, ca: str) -> None:
        try:
            context.load_verify_locations(ca)
        except (OSError, ValueError) as error:
            raise ConfigError(f"tls_ca: {ca} holds no certificates in PEM.", cause=str(error)) from error


def _no_password() -> str:
    """Keep OpenSSL from asking at the terminal."""
    return ""


def _trusting_public() -> ssl.SSLContext:
    import httpx

    return httpx.create_ssl_context(trust_env=False)


@cache
def _public() -> ssl.SSLContext:
    """Return what most channels share: reading the certificates takes some ten milliseconds."""
    return _trusting_public()
