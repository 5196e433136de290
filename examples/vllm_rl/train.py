"""Teaches a model to say even token ids; a vLLM server that gets each version samples: ``train.py MODEL [STEPS]``."""

import os
import sys

import httpx
import torch
from transformers import AutoModelForCausalLM

import weight_transfer as wt
from weight_transfer_vllm import VllmChannel

url, prompt = f"http://127.0.0.1:{os.environ.get('PORT', '8000')}", [5, 6, 7, 8]
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
sampling = {"n": 16, "max_tokens": 16, "temperature": 1.0, "ignore_eos": True, "detokenize": False}

with VllmChannel(url) as vllm, wt.WeightSender({"backend": "ipc"}, workers=[vllm]) as sender:
    for _ in range(int(sys.argv[2]) if len(sys.argv) > 2 else 20):
        version = sender.send(model).version  # goes on after the last one that this server had
        request = {"token_ids": prompt, "sampling_params": sampling}
        answer = httpx.post(f"{url}/inference/v1/generate", json=request, timeout=120).raise_for_status().json()
        samples = torch.tensor([choice["token_ids"] for choice in answer["choices"]])
        reward = (samples % 2 == 0).float()
        print(f"version {version}: {reward.mean():.0%} of the tokens are even", flush=True)
        texts = torch.cat([torch.tensor(prompt).expand(len(samples), -1), samples], dim=1)
        logits = model(texts).logits[:, len(prompt) - 1 : -1]
        chosen = logits.log_softmax(dim=-1).gather(2, samples.unsqueeze(2)).squeeze(2)
        loss = -((reward - reward.mean()) * chosen).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
