"""A completions server on loopback that speaks vLLM's protocol over a real tiny model and real PEFT adapters.

It shares no code with the package: plain full forward passes of transformers, its own sampling, its own scoring.
Switches let it misbehave as servers do.
"""

from __future__ import annotations

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

BASE = "base"


class LoraServer:
    """Serves the model of a folder; `with` starts and stops it."""

    def __init__(self, folder, port=0, **switches):
        self.folder = str(folder)
        self.base = AutoModelForCausalLM.from_pretrained(self.folder, dtype=torch.float32).eval()
        self.adapters, self.tensors = {}, {}
        self.requests, self.log = [], []
        self.lock = threading.Lock()
        self.key = switches.get("key", "")
        self.loads_adapters = switches.get("loads_adapters", True)
        self.processed = switches.get("processed", True)
        self.delay_s = 0.0
        self.noise = 0.0
        self.answers_as = None  # another model's name in the reply
        self.applies = None  # another adapter than the one that was asked for, under the right name
        self.fail_next = []  # status codes
        self.forget_next = False  # drops all adapters before the next completion, as a restart does
        self.change_reply = None
        self.http = _Http(("127.0.0.1", port), _Handler)
        self.http.owner = self
        self.port = self.http.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}/v1"

    def __enter__(self):
        self.thread = threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.http.shutdown()
        self.http.server_close()
        self.thread.join()

    def handle(self, method, path, body):
        """Return (status, reply)."""
        if path == "/v1/models":
            cards = [{"id": BASE, "root": self.folder, "parent": None}]
            return 200, {"data": cards + [{"id": n, "root": p, "parent": BASE} for n, p in self.adapters.items()]}
        if path == "/v1/load_lora_adapter" and self.loads_adapters:
            name, where = body["lora_name"], body["lora_path"]
            if not name or not where:
                return 400, {"error": {"message": "Both 'lora_name' and 'lora_path' must be provided."}}
            if name in self.adapters:
                return 400, {"error": {"message": f"The lora adapter '{name}' has already been loaded."}}
            if not (Path(where) / "adapter_model.safetensors").is_file():
                return 404, {"error": {"message": f"No adapter found for {where}"}}
            self.adapters[name] = where
            self.tensors[name] = PeftModel.from_pretrained(
                AutoModelForCausalLM.from_pretrained(self.folder, dtype=torch.float32), where
            ).eval()
            self.log.append(("load", name))
            return 200, f"Success: LoRA adapter '{name}' added successfully."
        if path == "/v1/unload_lora_adapter" and self.loads_adapters:
            if body["lora_name"] not in self.adapters:
                return 404, {"error": {"message": "cannot be found"}}
            self.forget(body["lora_name"])
            self.log.append(("unload", body["lora_name"]))
            return 200, "Success"
        if path == "/v1/completions":
            if self.forget_next:
                self.forget_next = False
                self.forget(*self.adapters)
            if body["model"] not in {BASE, *self.adapters}:
                return 404, {"error": {"message": f"The model `{body['model']}` does not exist."}}
            self.requests.append(body)
            reply = self.complete(body)
            return 200, self.change_reply(reply) if self.change_reply else reply
        return 404, {"detail": "Not Found"}

    def forget(self, *names):
        for name in names:
            self.adapters.pop(name)

    @torch.no_grad()
    def complete(self, body):
        name = self.applies or body["model"]
        model = self.base if name == BASE else self.tensors[name]
        choices = [self.draw(model, body, index) for index in range(body["n"])]
        return {"model": self.answers_as or body["model"], "choices": choices}

    def draw(self, model, body, index):
        generator = torch.Generator().manual_seed(body["seed"] + index)
        prompt, tops = body["prompt"], []
        ids: list[int] = []
        log_probs: list[float] = []
        stop, text_end = set(body["stop_token_ids"]), "length"
        for step in range(body["max_tokens"]):
            raw = model(torch.tensor([prompt + ids])).logits[0, -1].float()
            logits = raw / body["temperature"]
            if step < body["min_tokens"]:
                logits[list(stop)] = -torch.inf
            if body["top_k"] > 0:
                logits[logits < logits.topk(body["top_k"]).values[-1]] = -torch.inf
            scores = (logits if self.processed else raw).log_softmax(-1)
            token = int(torch.multinomial(logits.softmax(-1), 1, generator=generator))
            ids.append(token)
            log_probs.append(float(scores[token]) + self.noise * float(torch.randn((), generator=generator)))
            tops.append({"top": float(scores.max())})
            if token in stop:
                text_end = "stop"
                break
        return {
            "index": index,
            "text": "",
            "finish_reason": text_end,
            "stop_reason": None,
            "token_ids": ids,
            "prompt_token_ids": prompt,
            "logprobs": {
                "tokens": [f"token_id:{token}" for token in ids],
                "token_logprobs": [min(value, 0.0) for value in log_probs],
                "top_logprobs": tops,
            },
        }


class _Http(ThreadingHTTPServer):
    owner: LoraServer
    daemon_threads = True
    allow_reuse_address = True

    def handle_error(self, request, client_address):  # clients that gave up
        pass


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Http

    def do_GET(self):
        self.answer("GET", {})

    def do_POST(self):
        self.answer("POST", json.loads(self.rfile.read(int(self.headers["content-length"]))))

    def answer(self, method, body):
        server = self.server.owner
        if self.path == "/v1/completions":
            time.sleep(server.delay_s)
        status: int
        reply: Any
        with server.lock:
            if server.key and self.headers.get("authorization") != f"Bearer {server.key}":
                status, reply = 401, {"error": f"wrong key {self.headers.get('authorization')}"}
            elif server.fail_next and self.path == "/v1/completions":
                status, reply = server.fail_next.pop(0), {"error": {"message": "busy"}}
            else:
                status, reply = server.handle(method, self.path, body)
        data = (reply if isinstance(reply, str) else json.dumps(reply)).encode()
        self.send_response(status)
        self.send_header("content-type", "text/plain" if isinstance(reply, str) else "application/json")
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_):
        pass
