"""Strangers: who was not told the secret that came with an invitation is not let in."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import attrs

from weight_transfer.errors import HandshakeError, PeerLostError, TransferTimeoutError
from weight_transfer.plugins.backend import Capability
from weight_transfer.testing.conformance.kit import Kit, needs

if TYPE_CHECKING:
    from weight_transfer.testing.conformance.cast import Cast


class StrangersTests(Kit):
    """The control channel is authenticated; what it carries authenticates the transport.

    A secret is a field of the init info, or of a part of it, that is declared with ``repr=False``. A backend whose
    transport authenticates nobody says so: its test class overrides the test with ``pytest.mark.skip(reason=...)``, and
    its documentation warns.
    """

    @needs(Capability.CROSS_PROCESS)
    def test_a_stranger_without_the_secret_is_not_let_in(self, cast: Cast) -> None:
        """A worker that knows everything of an invitation but one secret fails to join; the invited one joins still.

        If this fails: compare a secret that the trainer makes for each session, with ``hmac.compare_digest``, before
        anything else is done for who has connected; close the connection if it differs, and wait on for the others.
        """
        trainer = cast.inviter()
        invitation = trainer.ask("invite", timeout=4 * self.grace)
        engine, _ = self.engines()
        secrets = list(_secrets(engine.parse_init_info(invitation)))
        assert secrets, "no field of the init info is declared with repr=False: nothing in it is a secret"
        trainer.tell("admit", timeout=4 * self.grace)
        stranger, invited = cast.worker(), cast.worker()
        for path in secrets:
            stranger.tell("init", info=_forged(invitation, path) | {"timeout": self.deadline})
            error = stranger.error(self.deadline + self.grace)
            assert isinstance(error, (HandshakeError, PeerLostError, TransferTimeoutError)), repr(error)
        invited.ask("init", info=invitation)
        trainer.reply(self.grace)


def _secrets(info: Any, *path: str) -> Iterator[tuple[str, ...]]:
    """Yield where the secrets of an info are."""
    for field in attrs.fields(type(info)):
        value = getattr(info, field.name)
        if not field.repr:
            yield (*path, field.name)
        elif attrs.has(type(value)):
            yield from _secrets(value, *path, field.name)


def _forged(info: dict[str, Any], path: tuple[str, ...]) -> dict[str, Any]:
    """Return an info with another text of the same length at ``path``."""
    name, *inner = path
    if inner:
        return info | {name: _forged(info[name], tuple(inner))}
    return info | {name: "".join("2" if letter == "1" else "1" for letter in info[name])}
