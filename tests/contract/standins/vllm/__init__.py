"""A stand-in for vLLM 0.25.1: the calls that helpers/backends/vllm/worker.py makes, with its signatures.

It checks what it is given as vLLM does, keeps the arguments in the file that STANDIN_LOG names, and answers each
request with the ids 3, 4, 5, ... It has seen no model; it stands for vLLM's interface, not for vLLM.
"""

import json
import os
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

from vllm.sampling_params import RequestOutputKind, SamplingParams

__all__ = ["LLM", "SamplingParams"]
__version__ = "0.25.1"
VOCABULARY = 2048


@dataclass
class Logprob:
    logprob: float


@dataclass
class CompletionOutput:
    token_ids: list
    logprobs: list | None = None


@dataclass
class RequestOutput:
    request_id: str
    outputs: list
    finished: bool


@dataclass
class Request:
    request_id: str
    params: SamplingParams
    given: int = 0
    tokens: list = field(default_factory=list)


class Core:
    def shutdown(self, timeout=None):
        pass


class LLMEngine:
    def __init__(self, profiler_config=None):
        self.engine_core, self.requests = Core(), {}
        self.profiler_config, self.steps = profiler_config, None

    def start_profile(self, profile_prefix=None):
        if not self.profiler_config or self.profiler_config["profiler"] != "torch":
            raise RuntimeError("Profiling is not enabled.")
        self.steps = 0

    def stop_profile(self):
        """Writes the trace from another thread, as vLLM does: 1 ms of prefill, then 0.5 ms of work in each step."""
        folder, steps, self.steps = Path(self.profiler_config["torch_profiler_dir"]), self.steps, None
        seen = steps and "STANDIN_BLIND" not in os.environ  # some drivers let nobody look
        times = [(0, 1000), *((10_000 * step, 500) for step in range(1, steps))] if seen else []
        events = [{"ph": "X", "cat": "kernel", "ts": start, "dur": took} for start, took in times]
        events.append({"ph": "X", "cat": "cuda_runtime", "ts": 0, "dur": 10_000})
        text = json.dumps({"traceEvents": events})

        def write():
            folder.mkdir(exist_ok=True)
            path = folder / f"rank0.{time.time_ns()}.pt.trace.json"
            path.write_text(text[: len(text) // 2])
            time.sleep(0.3)
            path.write_text(text)

        threading.Thread(target=write, daemon=True).start()

    def add_request(self, request_id, prompt, params, arrival_time=None):
        assert isinstance(request_id, str) and prompt["type"] == "token" and prompt["prompt_token_ids"]
        assert params.output_kind is RequestOutputKind.DELTA and not params.detokenize
        self.requests[request_id] = Request(request_id, params)
        return f"{request_id}-internal"

    def has_unfinished_requests(self):
        return bool(self.requests)

    def step(self):
        if self.steps is not None:
            self.steps += 1
        answers = []
        for request in list(self.requests.values()):
            token, request.given = 3 + request.given, request.given + 1
            ends = request.given == int(os.environ.get("STANDIN_ENDS_AFTER", 0)) and not request.params.ignore_eos
            token = 2 if ends else token  # the end token of the model's configuration
            stops = ends or token in (request.params.stop_token_ids or ())
            done = stops or request.given == request.params.max_tokens
            if done:
                del self.requests[request.request_id]
            every = {i: Logprob(-float(i)) for i in reversed(range(VOCABULARY))}
            logprobs = [every] if request.params.logprobs == -1 else None
            output = CompletionOutput([token], logprobs)
            answers.append(RequestOutput(request.request_id, [output], done))
        return answers


class LLM:
    def __init__(self, model, **settings):
        if "fails" in model:
            print(os.environ.get("STANDIN_CORE_SAYS", ""), file=sys.stderr)
            raise RuntimeError("Engine core initialization failed. See root cause above.")
        if log := os.environ.get("STANDIN_LOG"):
            with open(log, "w", encoding="utf-8") as file:  # noqa: PTH123
                json.dump({"model": model, **settings}, file)
        self.llm_engine = LLMEngine(settings.get("profiler_config"))
