"""Real vLLM engines, offline and behind HTTP, as tests and examples see them."""

from __future__ import annotations

import asyncio
import gc
import json
import os
import socket
import subprocess
import sys
import threading
import time
import uuid
from pathlib import Path
from typing import Any, Protocol

import attrs
import httpx

from weight_transfer_vllm import AsyncServer

MODELS = Path(sys.prefix, "models")
ENVIRONMENT = {
    "VLLM_TARGET_DEVICE": "cpu",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_SERVER_DEV_MODE": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "PLAIN_LINEAR": "1",
}
_STARTING = 180.0  # seconds
_LENGTH = 256  # tokens


@attrs.frozen
class Setup:
    """How an engine is started.

    Attributes:
        kind: of the tiny checkpoints; it starts with ``-a``.
        ranks: tensor parallel size.
        over: ``"offline"``, ``"http"``, ``"async"`` or ``"ray"``.
        recorded: whether loaders are recorded.
        backend: of weight-transfer.
        draft: whether checkpoint ``-b`` speculates.
    """

    kind: str
    ranks: int
    over: str
    recorded: bool = True
    backend: str = "ipc"
    draft: bool = False

    def __str__(self) -> str:
        way = "recorded" if self.recorded else "unrecorded"
        return f"{self.kind}-tp{self.ranks}-{self.over}-{way}-{self.backend}{'-draft' * self.draft}"

    @property
    def options(self) -> dict[str, Any]:
        """Arguments of vLLM's ``LLM``; those of its server are the same with dashes."""
        model = str(MODELS / f"{self.kind}-b")
        draft = {"model": model, "num_speculative_tokens": 2, "method": "draft_model"}
        return ({"speculative_config": draft} if self.draft else {}) | {
            "tensor_parallel_size": self.ranks,
            "dtype": "float32",
            "max_model_len": _LENGTH,
            "weight_transfer_config": {"backend": f"wt_{self.backend}"},
            "additional_config": {"weight_transfer_recorded": self.recorded, "weight_transfer": {"timeout": 30}},
            "worker_extension_cls": "vllm_plain_linear.Peek",
        }

    def start(self) -> Live:
        """Start it, and wait until it answers."""
        forms: dict[str, type[Live]] = {"offline": Offline, "http": Served, "async": Asynchronous, "ray": Actor}
        return forms[self.over](self)


class Live(Protocol):
    """A running engine.

    Attributes:
        target: what a `VllmChannel` is made of.
    """

    target: Any

    def __init__(self, setup: Setup) -> None: ...

    def generate(self, prompt: list[int], count: int = 8) -> list[int]:
        """Return the next tokens, greedily."""

    def ask(self, method: str, **arguments: Any) -> list[Any]:
        """Call a method of `Peek` on each rank."""

    def close(self) -> None:
        """End it."""


class Offline:
    """vLLM's ``LLM`` in this process."""

    def __init__(self, setup: Setup) -> None:
        from vllm import LLM

        model = str(MODELS / f"{setup.kind}-a")
        self.target = LLM(model=model, enforce_eager=True, skip_tokenizer_init=True, **setup.options)

    def generate(self, prompt: list[int], count: int = 8) -> list[int]:
        from vllm import SamplingParams

        how = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True, detokenize=False)
        (result,) = self.target.generate([{"prompt_token_ids": prompt}], how, use_tqdm=False)
        return list(result.outputs[0].token_ids)

    def ask(self, method: str, **arguments: Any) -> list[Any]:
        found: list[Any] = self.target.collective_rpc(method, kwargs=arguments)
        return found

    def close(self) -> None:
        self.target.llm_engine.engine_core.shutdown()
        self.target = None
        gc.collect()


class Asynchronous:
    """vLLM's ``AsyncLLM`` in this process, on the event loop of another thread."""

    def __init__(self, setup: Setup) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._llm = self._run(self._make(setup))
        self.target = AsyncServer(self._llm, self._loop)

    def generate(self, prompt: list[int], count: int = 8) -> list[int]:
        return self._run(self._generate(prompt, count))

    def ask(self, method: str, **arguments: Any) -> list[Any]:
        found: list[Any] = self._run(self._llm.collective_rpc(method, kwargs=arguments))
        return found

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._llm.shutdown)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(30)

    async def _make(self, setup: Setup) -> Any:
        from vllm import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        model = str(MODELS / f"{setup.kind}-a")
        arguments = AsyncEngineArgs(model=model, enforce_eager=True, skip_tokenizer_init=True, **setup.options)
        return AsyncLLM.from_engine_args(arguments)

    async def _generate(self, prompt: list[int], count: int) -> list[int]:
        from vllm import SamplingParams

        how = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True, detokenize=False)
        request = uuid.uuid4().hex
        results = [each async for each in self._llm.generate({"prompt_token_ids": prompt}, how, request)]
        return list(results[-1].outputs[0].token_ids)

    def _run(self, task: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(task, self._loop).result(_STARTING)


class Actor:
    """vLLM's ``LLM`` as a Ray actor on this machine."""

    def __init__(self, setup: Setup) -> None:
        import ray

        ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, runtime_env={"env_vars": ENVIRONMENT})
        model = str(MODELS / f"{setup.kind}-a")
        options = {"enforce_eager": True, "skip_tokenizer_init": True, **setup.options}
        self.target = ray.remote(num_cpus=1)(_engine_class()).remote(model, **options)
        self._get = ray.get
        assert self.ask("weight_digests")

    def generate(self, prompt: list[int], count: int = 8) -> list[int]:
        found: list[int] = self._get(self.target.tokens.remote(prompt, count), timeout=60)
        return found

    def ask(self, method: str, **arguments: Any) -> list[Any]:
        found: list[Any] = self._get(self.target.collective_rpc.remote(method, kwargs=arguments), timeout=_STARTING)
        return found

    def close(self) -> None:
        import ray

        ray.shutdown()


class Served:
    """``vllm serve`` in a process of its own."""

    def __init__(self, setup: Setup) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.target = f"http://127.0.0.1:{port}"
        options = [
            part
            for name, value in setup.options.items()
            for part in (f"--{name.replace('_', '-')}", json.dumps(value) if isinstance(value, dict) else str(value))
        ]
        command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(MODELS / f"{setup.kind}-a")]
        command += ["--port", str(port), "--host", "127.0.0.1", "--enforce-eager", "--skip-tokenizer-init"]
        command += ["--enable-scale-out", *options]
        self._process = subprocess.Popen(command, env=os.environ | ENVIRONMENT)
        self._client = httpx.Client(base_url=self.target, timeout=60, trust_env=False)
        end = time.monotonic() + _STARTING
        while not self._is_up():
            assert self._process.poll() is None, "vllm serve has ended; what it printed says why"
            assert time.monotonic() < end, f"vllm serve was not up within {_STARTING:.0f} s"
            time.sleep(0.2)

    def generate(self, prompt: list[int], count: int = 8) -> list[int]:
        how = {"temperature": 0, "max_tokens": count, "ignore_eos": True, "detokenize": False}
        answer = self._post("inference/v1/generate", {"token_ids": prompt, "sampling_params": how})
        found: list[int] = answer["choices"][0]["token_ids"]
        return found

    def ask(self, method: str, **arguments: Any) -> list[Any]:
        found: list[Any] = self._post("collective_rpc", {"method": method, "kwargs": arguments})["results"]
        return found

    def close(self) -> None:
        self._client.close()
        self._process.terminate()
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait(10)

    def _post(self, route: str, body: dict[str, Any]) -> Any:
        response = self._client.post(f"/{route}", json=body)
        assert response.is_success, response.text
        return response.json()

    def _is_up(self) -> bool:
        try:
            return self._client.get("/health").is_success
        except httpx.TransportError:
            return False


def _engine_class() -> Any:
    """Return the class of the actor; vLLM is imported where it runs."""
    from vllm import LLM, SamplingParams

    class Engine(LLM):
        def tokens(self, prompt: list[int], count: int) -> list[int]:
            how = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True, detokenize=False)
            (result,) = self.generate([{"prompt_token_ids": prompt}], how, use_tqdm=False)
            return list(result.outputs[0].token_ids)

    return Engine
