"""A small OpenAI-compatible server over transformers, for the tests: the embedded (or any Qwen-VL) model, and faults.

    python -m tests.reference.openai_server FOLDER PORT LOG NAME

``extensions``: takes what vLLM takes beyond OpenAI's fields (``logprob_token_ids``, ``prompt_logprobs``,
``use_beam_search``, images by ``uuid``); without, a field that OpenAI does not know is refused. ``faults`` is a list of
what happens to the next completions, one each: a status code, "cut", "slow", "garbage", "held" (until the server is
stopped), "after" (one is being held), or "" for nothing. Every completion that was computed is written to the log as
the hash of what was asked (an image is its content, however it was sent), so that a test can count what was paid for,
and what twice.
"""

import base64
import copy
import hashlib
import io
import json
import socket
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from open_mmicl.interface.prompts import PromptFormat
from tests.reference.naive_lvlm import NaiveLvlm

OPENAI_FIELDS = {
    "model", "messages", "temperature", "max_tokens", "max_completion_tokens", "n", "logprobs", "top_logprobs", "seed",
}  # fmt: skip


class BadRequest(Exception):
    """Answered with 400."""


class Replies:
    """A model that is asked with OpenAI's messages, one request at a time; equal requests are computed once."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.by_uuid: dict[str, bytes] = {}
        self.replies: dict[str, dict] = {}

    def complete(self, body: dict[str, Any]) -> dict[str, Any]:
        """The reply to one request, with ``asked``: the hash of what was asked, however its images were sent."""
        turns, images = [], []
        for message in body["messages"]:
            content = message["content"]
            parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
            turns.append({"role": message["role"], "content": []})
            for part in parts:
                turns[-1]["content"].append(part if part["type"] == "text" else {"type": "image"})
                if part["type"] != "text":
                    images.append(self._data(part))
        others = {key: value for key, value in body.items() if key != "messages"}
        known = json.dumps([turns, [hashlib.sha256(data).hexdigest() for data in images], others], sort_keys=True)
        asked = hashlib.sha256(known.encode()).hexdigest()
        if asked not in self.replies:
            self.replies[asked] = self.computed(body, turns, images)
        return {**copy.deepcopy(self.replies[asked]), "asked": asked}

    def computed(self, body: dict[str, Any], turns: list[dict], images: list[bytes]) -> dict[str, Any]:
        """A new reply."""
        raise NotImplementedError

    def _data(self, part: dict) -> bytes:
        if part.get("image_url") is None:
            if part.get("uuid") not in self.by_uuid:
                raise BadRequest(f"no image with uuid {part.get('uuid')}")
            return self.by_uuid[part["uuid"]]
        data = base64.b64decode(part["image_url"]["url"].split(",", 1)[1])
        if "uuid" in part:
            self.by_uuid[part["uuid"]] = data
        return data


def reply_of(texts: list[str], prompt: int, new: int) -> dict[str, Any]:
    """A reply with these texts and numbers of tokens."""
    return {
        "choices": [
            {"index": i, "finish_reason": "stop", "message": {"role": "assistant", "content": text}}
            for i, text in enumerate(texts)
        ],
        "usage": {"prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new},
    }


def with_tokens(reply: dict[str, Any], ids: list[int], log_probs: list[float]) -> dict[str, Any]:
    """The reply with log-probabilities of these tokens at its first position."""
    shown = [
        {"token": f"token_id:{i}", "logprob": value, "bytes": None, "top_logprobs": []}
        for i, value in zip(ids, log_probs, strict=True)
    ]
    reply["choices"][0]["logprobs"] = {"content": [{**shown[0], "top_logprobs": shown}]}
    return reply


class Canned(Replies):
    """Answers words that follow from a hash of the question and the seed. Enough for faults, and costs nothing."""

    WORDS = ("red", "blue", "fish", "boat", "two", "wooden", "a metal house")

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.seed = seed

    def computed(self, body: dict[str, Any], turns: list[dict], images: list[bytes]) -> dict[str, Any]:
        """A new reply."""
        text = json.dumps([self.seed, turns, [hashlib.sha256(data).hexdigest() for data in images]])
        number = int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big")
        words = [self.WORDS[(number + i) % len(self.WORDS)] for i in range(body.get("n", 1))]
        reply = reply_of(words, 100, 1)
        if ids := body.get("logprob_token_ids"):
            return with_tokens(reply, ids, [-0.1 - (number * token) % 1000 / 200 for token in ids])
        return reply


class Served(Replies, NaiveLvlm):
    """A Qwen-VL folder through transformers."""

    def __init__(self, folder: Path) -> None:
        Replies.__init__(self)
        NaiveLvlm.__init__(self, folder, PromptFormat())

    def tensors(self, text: str, images: list[Image.Image]) -> dict[str, torch.Tensor]:
        """Model inputs."""
        vision = dict(self.processor(images=images, return_tensors="pt")) if images else {}
        for grid in vision.get("image_grid_thw", ()):
            count = int(grid.prod()) // self.processor.merge_size**2
            text = text.replace("<|image_pad|>", "<|placeholder|>" * count, 1)
        text = text.replace("<|placeholder|>", "<|image_pad|>")
        ids = self.tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
        kinds = {"mm_token_type_ids": (ids == self.model.config.image_token_id).int()}
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), **kinds, **vision}

    @torch.no_grad()
    def computed(self, body: dict[str, Any], turns: list[dict], images: list[bytes]) -> dict[str, Any]:
        """A new reply."""
        text = self.tokenizer.apply_chat_template(
            turns, tokenize=False, add_generation_prompt=body.get("add_generation_prompt", True),
            continue_final_message=body.get("continue_final_message", False),
        )  # fmt: skip
        inputs = self.tensors(text, [Image.open(io.BytesIO(data)).convert("RGB") for data in images])
        limit = body.get("max_tokens") or body.get("max_completion_tokens") or 16
        count, start, texts = body.get("n", 1), inputs["input_ids"].shape[1], [""]
        scored = body.get("logprob_token_ids") or body.get("prompt_logprobs") is not None
        if limit > 1 or not scored:
            beams = {"num_beams": count, "length_penalty": body.get("length_penalty", 1.0)}
            beams["num_return_sequences"] = count
            self.model.model.rope_deltas = None
            out = self.model.generate(
                **inputs, max_new_tokens=limit, do_sample=False, **(beams if body.get("use_beam_search") else {})
            )
            texts = [self.tokenizer.decode(row[start:], skip_special_tokens=True) for row in out]
        reply = reply_of(texts if len(texts) == count else texts * count, start, limit)
        if not scored:
            return reply
        self.model.model.rope_deltas = None
        log_probs = self.model(**inputs).logits[0].log_softmax(-1)
        if body.get("logprob_token_ids"):
            ids = [int(log_probs[-1].argmax()), *body["logprob_token_ids"]]
            return with_tokens(reply, ids, log_probs[-1, ids].tolist())
        tokens = inputs["input_ids"][0].tolist()[1:]
        reply["prompt_logprobs"] = [None] + [
            {str(token): {"logprob": float(log_probs[i, token])}} for i, token in enumerate(tokens)
        ]
        return reply


class Server(ThreadingHTTPServer):
    """Serves ``served`` under ``name`` until :meth:`stop`."""

    daemon_threads = True
    allow_reuse_address = True
    request_queue_size = 256

    def __init__(self, served: Replies, log: Path, port: int = 0, name: str = "tiny", extensions: bool = True):
        super().__init__(("127.0.0.1", port), _Handler)
        self.served, self.log, self.name, self.extensions = served, Path(log), name, extensions
        self.version, self.answers_as, self.delay = "1.0", name, 0.0
        self.faults: list[Any] = []
        self.seen: list[str] = []
        self.most_at_once = self.at_once = 0
        self.shift = 0.0
        self.open: set[socket.socket] = set()
        self.guard = threading.Lock()
        self.holding, self.stopped = threading.Event(), threading.Event()

    @property
    def url(self) -> str:
        """The base address."""
        return f"http://127.0.0.1:{self.server_address[1]}/v1"

    def start(self) -> "Server":
        """Serve in a thread."""
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def stop(self) -> None:
        """Stop as a killed server does: connections break."""
        self.shutdown()
        self.server_close()
        for connection in list(self.open):
            try:
                connection.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass
        self.stopped.set()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that is gone is no error."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def setup(self) -> None:
        super().setup()
        self.server.open.add(self.connection)

    def finish(self) -> None:
        self.server.open.discard(self.connection)
        super().finish()

    def do_GET(self) -> None:
        server = self.server
        if self.path == "/version":
            return self._send(200, {"version": server.version}) if server.extensions else self._send(404, {})
        return self._send(
            200, {"object": "list", "data": [{"id": server.name, "object": "model", "owned_by": "tests"}]}
        )

    def do_POST(self) -> None:
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with server.guard:
            server.at_once += 1
            server.most_at_once = max(server.most_at_once, server.at_once)
            fault = server.faults.pop(0) if server.faults else ""
        try:
            self._answer(server, body, fault)
        finally:
            with server.guard:
                server.at_once -= 1

    def _answer(self, server: Server, body: dict[str, Any], fault: Any) -> None:
        if fault == "cut":
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True
            return
        if fault == "held":
            server.holding.set()
            server.stopped.wait()
            self.close_connection = True
            return
        if fault == "after":
            server.holding.wait()
        if fault == "garbage":
            self._send(200, "<html>not here</html>", "text/html")
            return
        if isinstance(fault, int):
            self._send(fault, {"error": {"message": f"planned {fault}", "code": None}})
            return
        time.sleep(30 if fault == "slow" else server.delay)
        if body["model"] != server.name:
            self._send(404, {"error": {"message": f"The model `{body['model']}` does not exist."}})
            return
        unknown = set(body) - OPENAI_FIELDS
        if unknown and not server.extensions:
            message = f"Unrecognized request argument supplied: {', '.join(sorted(unknown))}"
            self._send(400, {"error": {"message": message}})
            return
        try:
            with server.served.lock:
                reply = server.served.complete(body)
        except (BadRequest, ValueError, TypeError) as error:
            self._send(400, {"error": {"message": str(error)}})
            return
        if server.shift:
            for choice in reply["choices"]:
                for entry in (choice.get("logprobs") or {"content": []})["content"]:
                    for shown in entry["top_logprobs"]:
                        shown["logprob"] += server.shift
        with server.guard, server.log.open("a") as handle:
            handle.write(reply.pop("asked") + "\n")
        head = {"id": "x", "object": "chat.completion", "created": 0, "model": server.answers_as}
        self._send(200, {**head, **reply})

    def _send(self, status: int, body: Any, kind: str = "application/json") -> None:
        data = (body if isinstance(body, str) else json.dumps(body)).encode()
        try:
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)
        except OSError:
            self.close_connection = True

    def log_message(self, *words: object) -> None:
        """Nothing on the screen."""


def main(folder: str, port: str, log: str, name: str) -> None:
    """Serve one folder for ever."""
    torch.set_num_threads(1)
    server = Server(Served(Path(folder)), Path(log), int(port), name)
    print(server.url, flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main(*sys.argv[1:])
