"""One vLLM engine behind HTTP: ``python -m margin_engine --model FOLDER ...`` in an environment that has vLLM.

It answers one request at a time, in the order in which they come, so that weights cannot change under a response.
Only the standard library, torch and vLLM are imported, and vLLM not before it is started: the trainer imports this file
for :func:`weight_sums`.
"""

import argparse
import json
import math
import os
import secrets
import select
import sys
import threading
import time
from collections.abc import Generator, Iterable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

TOKEN_VARIABLE = "MARGIN_ENGINE_TOKEN"
READABLE_VARIABLE = "MARGIN_ENGINE_READABLE"
SECONDS_BETWEEN_TICKS = 1.0
CACHE_GIB_ON_CPU = 1.0  # vLLM would take most of the memory of the machine
INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
CHUNK = 2**21
CHUNK_ON_CPU = 2**17  # what is computed on the way fits into a cache
FACTORS = -7046029254386353131, -4658895280553007687  # odd; those of SplitMix64 and its relatives


def group_of(name: str) -> str:
    """The layer that a weight belongs to: the first number in its name; what has none stands for itself."""
    return next((part for part in name.split(".") if part.isdigit()), "outside of the layers")


def tensor_sum(tensor: Tensor) -> int:
    """A sum over the mixed bits of all entries, modulo 2^64.

    It does not depend on how entries are arranged: an engine puts projections together that are apart in a checkpoint.
    Zeros add nothing, so padding does not count.
    """
    flat = tensor.detach().contiguous().view(-1).view(INTEGERS[tensor.element_size()])
    total = torch.zeros((), dtype=torch.int64, device=flat.device)
    for part in flat.split(CHUNK_ON_CPU if flat.device.type == "cpu" else CHUNK):
        mixed = part.to(torch.int64).mul_(FACTORS[0])
        mixed.bitwise_xor_(mixed >> 29).mul_(FACTORS[1])
        mixed.bitwise_xor_(mixed >> 32)
        total += mixed.sum()
    return int(total)


def weight_sums(named: Iterable[tuple[str, Tensor]]) -> dict[str, str]:
    """The sum of each layer, as hexadecimal text."""
    totals: dict[str, int] = {}
    for name, tensor in named:
        add_sum(totals, name, tensor_sum(tensor))
    return as_text(totals)


def add_sum(totals: dict[str, int], name: str, value: int) -> None:
    """Count the sum of a weight in with those of its layer."""
    totals[group_of(name)] = totals.get(group_of(name), 0) + value


def as_text(totals: dict[str, int]) -> dict[str, str]:
    """The totals modulo 2^64 as hexadecimal text."""
    return {group: f"{total % 2**64:016x}" for group, total in sorted(totals.items())}


class Worker:
    """What is added to a vLLM worker: it holds a part of each weight, or under tensor parallelism 1 all of it."""

    model_runner: Any
    rank: int
    _receiver: Any = None

    def join_weights(self, meeting: dict[str, Any]) -> None:
        """Join the group in which a trainer sends weights, in the place of one that was joined before."""
        from margin_stream import Receiver  # type: ignore[import-not-found]  # beside this file, in vLLM's process

        self._receiver = Receiver(meeting, 1 + self.rank)

    def receive_weights(self) -> None:
        """Load the weights that come."""
        stream = iter(self._receiver)
        self.model_runner.reload_weights(weights_iterator=stream)
        for _ in stream:  # all are received, if vLLM has a use for them or not
            pass

    def sums_by_name(self) -> dict[str, tuple[int, int]]:
        """Entries and sum of what each weight of this worker counts for."""
        model: nn.Module = self.model_runner.get_model()
        elsewhere = _counted_elsewhere(model)
        parts = {name: weight[: elsewhere.get(id(weight))] for name, weight in model.named_parameters()}
        return {name: (part.numel(), tensor_sum(part)) for name, part in parts.items()}


def _counted_elsewhere(model: nn.Module) -> dict[int, int]:
    """Where keys and values begin in weights (by id) of which another worker has the same keys and values.

    With more workers than heads of keys and values, several have the same head: the first of them counts it.
    """
    found: dict[int, int] = {}
    module: Any
    for module in model.modules():
        replicas = getattr(module, "num_kv_head_replicas", 1)
        if replicas > 1 and module.tp_rank % replicas:
            queries = module.num_heads * module.head_size
            found |= {id(weight): queries for weight in module.parameters()}
    return found


class Refused(Exception):
    """What was asked cannot be done; the engine is as it was."""

    def __init__(self, text: str, status: int = 409) -> None:
        super().__init__(text)
        self.status = status


class Engine:
    """vLLM with the weights of one version."""

    def __init__(self, options: argparse.Namespace) -> None:
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # one process: what is scheduled does not depend on time
        os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
        # Else vLLM binds a thread to each core, whoever else computes there, and wants a NUMA node for each worker.
        if "OMP_NUM_THREADS" in os.environ or options.tensor_parallel > 1:
            os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        from vllm import LLM
        from vllm.platforms import current_platform

        self._workers = options.tensor_parallel
        self._on_cpu = current_platform.is_cpu()
        if self._on_cpu:
            os.environ[READABLE_VARIABLE] = "1"
        self.sleeps = bool(options.sleep and current_platform.is_sleep_mode_available())
        further: dict[str, Any] = {}
        cache_gib = options.cache_gib or (CACHE_GIB_ON_CPU if self._on_cpu else None)
        if cache_gib:
            further["kv_cache_memory_bytes"] = int(cache_gib * 2**30)
        if options.max_model_tokens:
            further["max_model_len"] = options.max_model_tokens
        if self.sleeps:
            further["enable_sleep_mode"] = True
        if options.empty:
            further["load_format"] = "dummy"
        self._llm = LLM(
            model=options.model,
            tokenizer=options.tokenizer or options.model,
            dtype=options.dtype,
            tensor_parallel_size=options.tensor_parallel,
            max_num_seqs=options.rows,
            logprobs_mode=options.logprobs,
            max_logprobs=1,
            enforce_eager=self._on_cpu,
            enable_prefix_caching=False,
            worker_extension_cls="margin_engine.Worker",
            seed=0,
            **further,
        )
        self._asleep = False
        self._newest = options.version
        self.set_version(options.version)

    def set_version(self, version: int) -> None:
        self._version = version
        self._llm.update_weight_version(str(version))

    def state(self) -> dict[str, Any]:
        """What it is, and the sums of the weights as they are now in the memory of the workers."""
        import vllm

        self._wake()
        return {
            "vllm": vllm.__version__,
            "version": self._version,
            "newest": self._newest,
            "workers": self._workers,
            "vllm_version": self._llm.get_weight_version(),
            "sums": self.sums(),
            "sleeps": self.sleeps,
            "max_model_tokens": self._llm.llm_engine.model_config.max_model_len,
        }

    def sums(self) -> dict[str, str]:
        """Sums over all workers; a weight that all of them hold counts once."""
        workers = self._llm.collective_rpc("sums_by_name")
        totals: dict[str, int] = {}
        for name in workers[0]:
            parts = [worker[name] for worker in workers]
            alike = all(part == parts[0] for part in parts)
            add_sum(totals, name, parts[0][1] if alike else sum(value for _, value in parts))
        return as_text(totals)

    def join(self, asked: dict[str, Any]) -> dict[str, Any]:
        """Have the workers meet a trainer that sends weights."""
        if asked["kind"] == "nccl" and not torch.cuda.is_available():
            raise Refused("transport = nccl: the engine has no CUDA device; take gloo or folder", 400)
        self._llm.collective_rpc("join_weights", kwargs={"meeting": asked})
        return {}

    def receive(self, asked: dict[str, Any]) -> Generator[dict[str, Any], None, None]:
        """Load the weights that the trainer sends, which are nobody's until :meth:`update` has compared them."""
        self._begin(int(asked["version"]))
        yield {"listens": True}
        self._llm.collective_rpc("receive_weights")

    def _begin(self, version: int) -> None:
        """Give up the weights of now for those of ``version``, if these are newer."""
        if version <= self._newest:
            raise Refused(f"weights of version {version} came after those of version {self._newest}")
        self._wake()
        self.set_version(-1)  # nobody asks for this one: half of the weights may be new

    def update(self, asked: dict[str, Any]) -> dict[str, Any]:
        """Load the weights of a folder, or take those that were received, as those of ``version``, if they are the
        ones that were meant."""
        version = int(asked["version"])
        self._begin(version)
        if asked["folder"] is not None:
            self._llm.collective_rpc("reload_weights", kwargs={"weights_path": asked["folder"]})
        found, meant = self.sums(), asked["sums"]
        differ = sorted(name for name in found.keys() | meant.keys() if found.get(name) != meant.get(name))
        if differ:
            raise Refused(
                f"the weights of version {version} are not what was sent: layers {', '.join(differ[:8])}"
                f"{' ...' if len(differ) > 8 else ''} ({len(differ)} of {len(found)}) have other checksums"
            )
        self._newest = version
        self.set_version(version)
        return {"version": version, "sums": found}

    def generate(self, asked: dict[str, Any]) -> Generator[dict[str, Any], None, None]:
        """Responses as they are done, and a sign of life every second while none is."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        if asked["version"] != self._version:
            raise Refused(f"asked for weights of version {asked['version']}, the engine has version {self._version}")
        self._wake()
        settings, engine, mark = dict(asked["settings"]), self._llm.llm_engine, secrets.token_hex(4)
        stop = Stop(self._llm.get_tokenizer(), settings.pop("stop"), settings.pop("stop_tail"))
        names: dict[str, int] = {}
        try:
            for place, (tokens, seed) in enumerate(asked["rows"]):
                name = f"{mark}-{place}"
                try:
                    params = SamplingParams(
                        seed=seed,
                        ignore_eos=True,  # the end tokens are told
                        detokenize=False,
                        output_kind=RequestOutputKind.CUMULATIVE if stop.texts else RequestOutputKind.FINAL_ONLY,
                        **settings,
                    )
                    engine.add_request(name, {"prompt_token_ids": tokens}, params)
                except ValueError as error:
                    raise Refused(str(error), 400) from error
                names[name] = place
            yield from self._steps(engine, names, stop)
        finally:
            if names:
                engine.abort_request(list(names))

    def _steps(self, engine: Any, names: dict[str, int], stop: "Stop") -> Iterator[dict[str, Any]]:
        told = time.monotonic()
        while names:
            for output in engine.step():
                (written,) = output.outputs
                ended = output.finished or stop.is_in(written.token_ids)
                if not ended or output.request_id not in names:
                    continue
                place = names.pop(output.request_id)
                if output.finished:
                    yield {"place": place, **_response(written)}
                else:
                    engine.abort_request([output.request_id])
                    yield {"place": place, **_response(written), "ended": True, "versions": [str(self._version)]}
                told = time.monotonic()
            if time.monotonic() - told > SECONDS_BETWEEN_TICKS:
                told = time.monotonic()
                yield {"left": len(names)}

    def sleep(self, asked: dict[str, Any]) -> dict[str, Any]:
        """Give the memory of the device to others until the next request."""
        if self.sleeps and not self._asleep:
            self._llm.sleep(level=1)
            self._asleep = True
        return {"asleep": self._asleep}

    def _wake(self) -> None:
        if self._asleep:
            self._llm.wake_up()
            self._asleep = False


class Stop:
    """Texts that end a response, looked for as the trainer does it: vLLM's own way also sees the end of the prompt."""

    def __init__(self, tokenizer: Any, texts: list[str], tail: int) -> None:
        self._tokenizer, self.texts, self._tail = tokenizer, texts, tail

    def is_in(self, tokens: Any) -> bool:
        if not self.texts:
            return False
        text = self._tokenizer.decode(
            list(tokens)[-self._tail :], skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        return any(stop in text for stop in self.texts)


def _response(done: Any) -> dict[str, Any]:
    tokens = list(done.token_ids)
    found: dict[str, Any] = {"tokens": tokens, "ended": done.finish_reason == "stop"}
    if done.logprobs is not None:
        values = [step[token].logprob for step, token in zip(done.logprobs, tokens, strict=True)]
        found["logprobs"] = [value if math.isfinite(value) else None for value in values]
    found["versions"] = sorted({span.version for span in done.weight_versions or ()})
    return found


class Handler(BaseHTTPRequestHandler):
    """Requests as JSON; answers as JSON, those to ``/generate`` as a stream of lines."""

    engine: Engine
    token: str
    timeout = 30.0  # a request that does not come keeps others out no longer
    protocol_version = "HTTP/1.0"  # a connection for each request: none keeps others out

    def do_GET(self) -> None:
        self._answer(lambda asked: self.engine.state() if self.path == "/state" else None)

    def do_POST(self) -> None:
        if self.path in ("/generate", "/receive"):
            self._stream(self.engine.generate if self.path == "/generate" else self.engine.receive)
        elif self.path in ("/update", "/join", "/sleep"):
            self._answer(getattr(self.engine, self.path[1:]))
        else:
            self._answer(lambda asked: None)

    def log_message(self, *_: Any) -> None:
        """Say nothing: every step makes requests."""

    def _asked(self) -> dict[str, Any]:
        """What a request says, once it has come and knows the token: anybody may knock."""
        told, expected = self.headers.get("Authorization", ""), f"Bearer {self.token}"
        try:
            content = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            self.connection.settimeout(None)  # an answer may take its time
            if not secrets.compare_digest(told.encode(), expected.encode()):
                raise Refused(f"the token ({TOKEN_VARIABLE}) is not the engine's", 401)
            return json.loads(content or b"{}")
        except (ValueError, OSError) as error:
            raise Refused(f"the request is no JSON: {error}", 400) from error

    def _answer(self, action: Any) -> None:
        try:
            found = action(self._asked())
            status, body = (404, {"error": f"no {self.path} here"}) if found is None else (200, found)
        except Refused as fault:
            status, body = fault.status, {"error": str(fault)}
        except Exception as fault:
            self._die(fault)
        self._send(status, json.dumps(body).encode())

    def _send(self, status: int, content: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def _stream(self, action: Any) -> None:
        try:
            lines = action(self._asked())
            first = next(lines, None)
        except Refused as fault:
            self._send(fault.status, json.dumps({"error": str(fault)}).encode())
            return
        except Exception as fault:
            self._die(fault)
        self.send_response(200)
        self.send_header("Content-Type", "application/x-ndjson")
        self.end_headers()
        try:
            while first is not None:
                self.wfile.write(json.dumps(first).encode() + b"\n")
                self.wfile.flush()
                first = next(lines, None)
            self.wfile.write(b'{"done": true}\n')
        except (BrokenPipeError, ConnectionResetError):
            lines.close()  # nobody waits any more: the rows are dropped
        except Exception as fault:
            self._die(fault)

    def _die(self, fault: Exception) -> Any:
        """End this process: vLLM cannot be relied on after a fault of its own."""
        print(f"{type(fault).__name__}: {fault}", file=sys.stderr, flush=True)
        os._exit(3)


def _watch(parent: int) -> None:
    """End with the process that started this one, be it through another: a script, say, that sets variables."""
    try:
        select.select([os.pidfd_open(parent)], [], [])
    except (AttributeError, OSError):  # a system without
        while _is_alive(parent):
            time.sleep(0.5)
    os._exit(0)


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="A vLLM engine that a trainer speaks to over HTTP.")
    parser.add_argument("--model", required=True, help="folder of the model")
    parser.add_argument("--tokenizer", help="folder of the tokenizer (that of the model)")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at (127.0.0.1)")
    parser.add_argument("--port", type=int, default=0, help="port to listen at (a free one)")
    parser.add_argument("--ready", type=Path, help="file to write the port to, when all is there")
    parser.add_argument("--version", type=int, default=0, help="of the weights in the folder (0)")
    parser.add_argument("--empty", action="store_true", help="load no weights: a trainer sends them")
    parser.add_argument("--dtype", default="auto", help="of the weights")
    parser.add_argument("--rows", type=int, default=64, help="responses written together (64)")
    parser.add_argument("--tensor-parallel", type=int, default=1, help="devices that share the model (1)")
    parser.add_argument("--logprobs", choices=("processed_logprobs", "raw_logprobs"), default="processed_logprobs")
    parser.add_argument("--cache-gib", type=float, help="memory for keys and values")
    parser.add_argument("--max-model-tokens", type=int, help="longest prompt and response together")
    parser.add_argument("--sleep", action="store_true", help="give device memory back between rollouts")
    parser.add_argument("--parent", type=int, help="process whose end ends this one")
    return parser


def main() -> None:
    parser = build_parser()
    options = parser.parse_args()
    if options.parent:
        threading.Thread(target=_watch, args=(options.parent,), daemon=True).start()
    Handler.token = os.environ.pop(TOKEN_VARIABLE, "")
    if not Handler.token:
        parser.error(f"{TOKEN_VARIABLE} is not set: give engine and trainer one secret")
    Handler.engine = Engine(options)
    server = HTTPServer((options.host, options.port), Handler)
    if options.ready:
        temporary = options.ready.with_suffix(".tmp")
        temporary.write_text(str(server.server_port))
        temporary.replace(options.ready)
    print(f"listening at {options.host}:{server.server_port}", flush=True)
    server.serve_forever()


def _keep_weights_readable() -> None:
    """Have vLLM compute with the weights themselves on a CPU.

    By default it packs them for oneDNN and drops what was packed: checksums would then be those of nothing, and an
    output projection that shares its weight with the embedding would keep the weights of before a reload.
    """
    from vllm import _custom_ops

    _custom_ops._supports_onednn = False


if __name__ == "__main__":
    main()
elif READABLE_VARIABLE in os.environ:  # imported by a vLLM worker, before it loads weights; each may be a process
    _keep_weights_readable()
