"""onnxruntime-genai's side: the calls that a benchmark makes, served under the peer's own Python."""

import json
import sys
import time
from importlib.metadata import version
from pathlib import Path

from helpers.machine.hardware import peak_host_bytes

state = {}


def load(folder, threads):
    if threads:  # else as it comes: every core
        config = Path(folder, "genai_config.json")
        fields = json.loads(config.read_text())
        fields["model"]["decoder"]["session_options"]["intra_op_num_threads"] = threads
        config.write_text(json.dumps(fields))
    start = time.perf_counter()
    import onnxruntime_genai

    state["og"], state["model"] = onnxruntime_genai, onnxruntime_genai.Model(folder)
    names = ("onnxruntime-genai", "onnxruntime")
    versions = {"python": sys.version.split()[0], **{name: version(name) for name in names}}
    used = {"device": "cpu", "threads": threads or None, "decode_graphs": []}
    return {"load_s": time.perf_counter() - start, "versions": versions, **used}


def generate(ids, output_len):
    """Tokens, and the seconds from the request to each of them."""
    og = state["og"]
    start = time.perf_counter()
    params = og.GeneratorParams(state["model"])
    params.set_search_options(do_sample=False, max_length=len(ids) + output_len, min_length=len(ids) + output_len)
    generator = og.Generator(state["model"], params)
    generator.append_tokens(ids)
    tokens, times = [], []
    for _ in range(output_len):
        generator.generate_next_token()
        tokens.append(int(generator.get_next_tokens()[0]))
        times.append(time.perf_counter() - start)
    return tokens, times


def check(prompts, output_len, logits):
    tokens, times = generate(prompts[0], output_len)
    og = state["og"]
    params = og.GeneratorParams(state["model"])
    params.set_search_options(max_length=len(prompts[0]) + 2)
    generator = og.Generator(state["model"], params)
    generator.append_tokens(prompts[0])
    logits = generator.get_logits()
    last = logits.reshape(-1, logits.shape[-1])[-1].tolist()  # of the last position
    return {"tokens": tokens, "logits": [last], "seconds": times[-1], "host_bytes": peak_host_bytes()}


def measure(prompts, output_len):
    _, times = generate(prompts[0], output_len)
    gaps = [round(later - earlier, 7) for earlier, later in zip(times, times[1:], strict=False)]
    tpot = (times[-1] - times[0]) / (len(times) - 1)
    return {"ttft_s": times[0], "tpot_s": tpot, "e2e_s": times[-1], "itl_s": gaps}


CALLS = {"load": load, "check": check, "measure": measure}
