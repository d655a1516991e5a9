"""What every peer's worker answers, under the peer's own Python: the calls that a benchmark makes.

A peer's module gives four functions and a list, and takes its CALLS from here.

    build(model, folder, precision, scratch)   writes the peer's form of a checkpoint's folder into another folder
    load(folder, threads)                      loads it; 0 threads: as many as the peer takes by itself
    generate(ids, count)                       yields that many tokens, greedily, each when the caller could hold it
    last_logits(ids)                           those after the last of these tokens
    packages                                   whose versions the record names
"""

import sys
import time
from importlib.metadata import version

from helpers.machine.hardware import peak_host_bytes


def calls(build, load, generate, last_logits, packages):
    def loaded(folder, threads):
        start = time.perf_counter()
        load(folder, threads)
        versions = {"python": sys.version.split()[0], **{name: version(name) for name in packages}}
        used = {"device": "cpu", "threads": threads or None, "decode_graphs": []}
        return {"load_s": time.perf_counter() - start, "versions": versions, **used}

    def timed(prompts, count):
        """Tokens of the first prompt's answer, and the seconds from the request to each of them."""
        tokens, times, start = [], [], time.perf_counter()
        for token in generate(prompts[0], count):
            tokens.append(token)
            times.append(time.perf_counter() - start)
        return tokens, times

    def check(prompts, output_len, logits):
        tokens, times = timed(prompts, output_len)
        scores = [last_logits(prompts[0])] if logits else []
        return {"tokens": tokens, "logits": scores, "seconds": times[-1], "host_bytes": peak_host_bytes()}

    def measure(prompts, output_len):
        _, times = timed(prompts, output_len)
        gaps = [round(later - earlier, 7) for earlier, later in zip(times, times[1:], strict=False)]
        return {"ttft_s": times[0], "tpot_s": sum(gaps) / len(gaps), "e2e_s": times[-1], "itl_s": gaps}

    return {"build": build, "load": loaded, "check": check, "measure": measure}
