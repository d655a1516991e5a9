"""onnxruntime-genai. Its own model builder converts; int8 and int4 quantize the activations too."""

import json
import os
import subprocess
import sys
from pathlib import Path

from tests.peers.worker import calls

state = {}


def build(model, folder, precision, scratch):
    words = ["-i", model, "-o", folder, "-p", precision, "-e", "cpu", "-c", scratch]
    surroundings = {**os.environ, "HF_HUB_OFFLINE": "1"}
    module = [sys.executable, "-m", "onnxruntime_genai.models.builder"]
    subprocess.run([*module, *words], check=True, capture_output=True, env=surroundings)


def load(folder, threads):
    config = Path(folder, "genai_config.json")
    fields = json.loads(config.read_text(encoding="utf-8"))
    options = fields["model"]["decoder"]["session_options"]
    options.pop("intra_op_num_threads", None)
    if threads:
        options["intra_op_num_threads"] = threads
    config.write_text(json.dumps(fields), encoding="utf-8")
    import onnxruntime_genai

    state["og"], state["model"] = onnxruntime_genai, onnxruntime_genai.Model(folder)


def start(ids, count):
    params = state["og"].GeneratorParams(state["model"])
    length = len(ids) + count
    params.set_search_options(do_sample=False, max_length=length, min_length=length)
    generator = state["og"].Generator(state["model"], params)
    generator.append_tokens(ids)
    return generator


def generate(ids, count):
    generator = start(ids, count)
    for _ in range(count):
        generator.generate_next_token()
        yield int(generator.get_next_tokens()[0])


def logits(ids):
    rows = start(ids, 1).get_logits()
    return rows.reshape(-1, rows.shape[-1])[-1].tolist()


CALLS = calls(build, load, generate, logits, ("onnxruntime-genai", "onnxruntime"))
