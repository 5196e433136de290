"""Certificate files on both sides of the control channel."""

from __future__ import annotations

import datetime
import socket
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
import trustme
from click.testing import CliRunner

import weight_transfer as wt
from support.models import Odd, digest
from weight_transfer.cli import main
from weight_transfer.control import HttpChannel, HttpLimits, Tls, serve

CONFIG = wt.load_config(backend="loopback", timeout=20, init_timeout=10)
YESTERDAY = datetime.datetime.now(datetime.UTC) - datetime.timedelta(days=1)


class Authority:
    """Signs certificates, and writes them into files."""

    def __init__(self, folder: Path) -> None:
        self._authority = trustme.CA()
        self._folder = folder
        folder.mkdir()
        self.ca = str(folder / "ca.pem")
        self._authority.cert_pem.write_to_path(self.ca)

    def issue(self, *names: str, **arguments: Any) -> dict[str, str]:
        """Return the keys of a configuration that name the files of a new certificate."""
        issued = self._authority.issue_cert(*names, **arguments)
        cert, key = (self._folder / f"{names[0]}.{kind}" for kind in ("cert", "key"))
        cert.write_bytes(b"".join(blob.bytes() for blob in issued.cert_chain_pems))
        issued.private_key_pem.write_to_path(key)
        return {"tls_cert": str(cert), "tls_key": str(key)}


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("tls") / "ours")


@pytest.fixture(scope="module")
def others(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("tls") / "others")


def test_every_bit_arrives_over_https_and_a_line(ours: Authority) -> None:
    worker = wt.load_config(CONFIG, **ours.issue("127.0.0.1"))
    trainer = wt.load_config(CONFIG, tls_ca=ours.ca)
    with wt.WeightReceiver(worker, model := Odd(1)) as receiver, serve(receiver) as server:
        assert server.url.startswith("https://127.0.0.1:")
        with wt.WeightSender(trainer, [server.url]) as sender:
            for version, seed in enumerate((2, 3, 2)):
                sender.send(Odd(seed), version=version)
                assert (receiver.version, digest(model)) == (version, digest(Odd(seed)))
        with HttpChannel(server.url, tls=Tls(ca=ours.ca)) as channel:
            assert channel.status()["line"] is True
            channel.status()
            assert channel._line is not None


@pytest.mark.parametrize(
    ("names", "expires", "trusted", "words"),
    [
        (["127.0.0.1"], None, False, "unable to get local issuer certificate"),
        (["127.0.0.1"], YESTERDAY, True, "certificate has expired"),
        (["127.0.0.2", "localhost"], None, True, "IP address mismatch"),
        (["worker.example"], None, True, "IP address mismatch"),
    ],
    ids=["of another authority", "expired", "of another address", "of another name"],
)
def test_a_worker_whose_certificate_is_refused_gets_one_clear_error_at_once(
    ours: Authority, others: Authority, names: list[str], expires: Any, trusted: bool, words: str
) -> None:
    worker = wt.load_config(CONFIG, **ours.issue(*names, not_after=expires))
    trainer = wt.load_config(CONFIG, init_timeout=60, tls_ca=(ours if trusted else others).ca)
    since = time.monotonic()
    with (
        wt.WeightReceiver(worker, Odd(1)) as receiver,
        serve(receiver) as server,
        wt.WeightSender(trainer, [server.url]) as sender,
        pytest.raises(wt.HandshakeError, match=f"certificate is refused: .*{words}.*; renew it") as caught,
    ):
        sender.send(Odd(2))
    assert caught.value.peer == server.url
    assert time.monotonic() - since < 10


def test_a_trainer_that_is_not_told_whom_to_trust_trusts_the_public_authorities_only(ours: Authority) -> None:
    with (
        wt.WeightReceiver(wt.load_config(CONFIG, **ours.issue("127.0.0.1")), Odd(1)) as receiver,
        serve(receiver) as server,
        wt.WeightSender(CONFIG, [server.url]) as sender,
        pytest.raises(wt.HandshakeError, match="set tls_ca"),
    ):
        sender.send(Odd(2))


def test_a_worker_may_ask_trainers_for_a_certificate(ours: Authority, others: Authority) -> None:
    worker = wt.load_config(CONFIG, tls_ca=ours.ca, **ours.issue("127.0.0.1"))
    with wt.WeightReceiver(worker, model := Odd(1)) as receiver, serve(receiver) as server:
        for shown, error, words in (
            ({}, wt.HandshakeError, "asks trainers for a certificate; set tls_cert and tls_key"),
            (others.issue("trainer"), wt.PeerLostError, "it may not trust this trainer's certificate"),
        ):
            trainer = wt.load_config(CONFIG, init_timeout=1, tls_ca=ours.ca, **shown)
            with wt.WeightSender(trainer, [server.url]) as sender, pytest.raises(error, match=words):
                sender.send(Odd(2))
        assert receiver.version is None
        assert httpx.get(f"{server.url}/healthz", trust_env=False, verify=Tls(ca=ours.ca).for_trainer()).is_success
        trainer = wt.load_config(CONFIG, tls_ca=ours.ca, **ours.issue("trainer"))
        with wt.WeightSender(trainer, [server.url]) as sender:
            sender.send(Odd(3))
        assert digest(model) == digest(Odd(3))


def test_a_token_is_asked_for_over_https_too(ours: Authority) -> None:
    with wt.WeightReceiver(CONFIG, Odd(1)) as receiver:
        files = ours.issue("127.0.0.1")
        tls = Tls(cert=files["tls_cert"], key=files["tls_key"])
        with serve(receiver, token="right", tls=tls) as server:
            for token, error in (("wrong", wt.HandshakeError), ("right", None)):
                with HttpChannel(server.url, token=token, tls=Tls(ca=ours.ca)) as channel:
                    if error is None:
                        assert channel.status()["state"] == "created"
                        continue
                    with pytest.raises(error, match="token is missing or wrong"):
                        channel.status()


@pytest.mark.parametrize("asked", [0, 1, 2], ids=["not at all", "once", "over a line"])
def test_a_server_ends_soon_whoever_is_connected(ours: Authority, asked: int) -> None:
    with wt.WeightReceiver(wt.load_config(CONFIG, **ours.issue("127.0.0.1")), Odd(1)) as receiver:
        server = serve(receiver)
        url = httpx.URL(server.url)
        with HttpChannel(server.url, tls=Tls(ca=ours.ca)) as channel, socket.socket() as silent:
            silent.connect((url.host, url.port))
            for _ in range(asked):
                channel.status()
            since = time.monotonic()
            server.close()
            assert time.monotonic() - since < 5


def test_who_stops_in_the_middle_of_a_handshake_is_hung_up_on(ours: Authority) -> None:
    with (
        wt.WeightReceiver(wt.load_config(CONFIG, **ours.issue("127.0.0.1")), Odd(1)) as receiver,
        serve(receiver, limits=HttpLimits(stranger_seconds=0.3)) as server,
        socket.socket() as silent,
    ):
        url = httpx.URL(server.url)
        silent.connect((url.host, url.port))
        silent.settimeout(10)
        silent.sendall(b"\x16\x03\x01\x02\x00\x01")
        assert silent.recv(1) == b""


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"tls_cert": "missing.pem"}, "missing.pem and the same file are no certificate"),
        ({"tls_cert": "CA"}, "are no certificate and its unencrypted private key"),
        ({"tls_cert": "CERT", "tls_key": "OTHER"}, "are no certificate and its unencrypted private key"),
        ({"tls_ca": "CA"}, "a worker that has tls_key or tls_ca needs a certificate, too"),
        ({"tls_cert": "CERT", "tls_key": "KEY", "tls_ca": "missing.pem"}, "tls_ca: missing.pem holds no certificates"),
        ({"tls_cert": "CERT", "tls_key": "KEY", "tls_ca": "KEY"}, "holds no certificates in PEM"),
    ],
)
def test_files_that_are_no_certificates_are_a_sentence(ours: Authority, keys: dict[str, str], words: str) -> None:
    own, other = ours.issue("127.0.0.1"), ours.issue("trainer")
    files = {"CA": ours.ca, "CERT": own["tls_cert"], "KEY": own["tls_key"], "OTHER": other["tls_key"]}
    config = wt.load_config(CONFIG, **{key: files.get(file, file) for key, file in keys.items()})
    with wt.WeightReceiver(config, Odd(1)) as receiver, pytest.raises(wt.ConfigError, match=words):
        serve(receiver)
    if keys.keys() != {"tls_ca"}:
        with pytest.raises(wt.ConfigError, match="tls_"), wt.WeightSender(config, ["https://127.0.0.1:9"]) as sender:
            sender.send(Odd(1))


def test_the_reference_server_is_as_encrypted_as_its_configuration_says(ours: Authority, tmp_path: Path) -> None:
    pytest.importorskip("prometheus_client", reason="the extra serve is not installed")
    from support.tiny_llama import save
    from weight_transfer.reference_server.worker import open_worker

    certificate = ours.issue("127.0.0.1")
    worker = wt.load_config(CONFIG, **certificate, tls_ca=ours.ca)
    trainer = tmp_path / "trainer.toml"
    keys = {"tls_ca": ours.ca} | ours.issue("trainer.example")
    lines = [f'{key} = "{file}"' for key, file in keys.items()]
    trainer.write_text("\n".join(["[weight_transfer]", 'backend = "loopback"', *lines]))
    with open_worker(worker, save(tmp_path / "tiny", 1), "127.0.0.1", 0, device="cpu") as server:
        assert server.url.startswith("https://")
        shown = CliRunner().invoke(main, ["status", server.url, "--config", str(trainer)])
        assert (shown.exit_code, "created" in shown.stdout) == (0, True), shown.output
        for tls, code in ((Tls(ca=ours.ca), 401), (Tls.of(wt.load_config(trainer)), 200)):
            with httpx.Client(base_url=server.url, verify=tls.for_trainer(), timeout=30) as client:
                body = {"prompt": "x", "max_tokens": 1}
                assert client.post("/v1/completions", json=body).status_code == code
