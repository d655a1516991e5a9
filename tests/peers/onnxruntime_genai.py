"""The course's engine and onnxruntime-genai in one interleaved run on a CPU. See README.md beside this file."""

import argparse
import os
import subprocess
import tempfile
import time
from pathlib import Path

from helpers.bench import records
from helpers.bench import run as benchmark
from helpers.bench import tables as comparison
from helpers.bench.records import Row, Workload
from helpers.bench.run import Runner
from helpers.model.checkpoint import BUNDLED

PEER = "onnxruntime-genai"


class PeerRunner(Runner):
    """A contender whose worker runs under the peer's Python."""

    module = "tests.peers.onnxruntime_genai_worker"

    def __init__(self, workload: Workload, threads: int, precision: str, python: str, folder: Path):
        self.workload, self.threads, self.python, self.folder = workload, threads, python, folder
        self.row = Row(PEER, precision, batch_size=1)
        self.rows, self.answers, self.worker = {}, {}, None
        self.cache = tempfile.TemporaryDirectory()

    def _build(self) -> None:
        start = time.perf_counter()
        words = [self.python, "-m", "onnxruntime_genai.builder", "-i", str(BUNDLED), "-e", "cpu"]
        subprocess.run(
            [*words, "-o", str(self.folder), "-p", self.row.precision, "-c", self.cache.name],
            check=True,
            capture_output=True,
            env={**os.environ, "HF_HUB_OFFLINE": "1"},
        )
        self.row.build_s = time.perf_counter() - start
        self.row.disk_bytes = sum(file.stat().st_size for file in self.folder.rglob("*") if file.is_file())

    def _start(self):
        started = time.perf_counter()
        self.worker = benchmark.Worker(self.module, python=self.python)
        answer = self.worker.call("load", folder=str(self.folder), threads=self.threads)
        self.row.start_s = time.perf_counter() - started
        self.row.load_s, self.row.versions = answer["load_s"], answer["versions"]
        return self.worker


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--python", required=True, help="the Python that has onnxruntime-genai")
    parser.add_argument("--backends", default="pytorch,torch_compile,aot,aot:int8", help="of the course")
    parser.add_argument("--precisions", default="fp32,int8,int4", help="of the peer")
    parser.add_argument("--input", type=int, default=16)
    parser.add_argument("--output", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=0, help="for all alike; 0: as the course chooses")
    parser.add_argument("--peer-threads", type=int, default=-1, help="for the peer; -1: the same; 0: its own default")
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    workload = Workload("stories", given.input, given.output, given.repeats, threads=given.threads)
    record = benchmark.empty_record(workload)
    peer_threads = record.threads if given.peer_threads < 0 else given.peer_threads
    record.command = (
        f"python -m tests.peers.onnxruntime_genai --threads {given.threads} --peer-threads {given.peer_threads}"
    )
    runners = [benchmark.make_runner(workload, record.threads, name) for name in given.backends.split(",")]
    with tempfile.TemporaryDirectory() as work:
        for precision in given.precisions.split(","):
            runners.append(PeerRunner(workload, peer_threads, precision, given.python, Path(work, precision)))
        benchmark.run_all(record, runners, [1], keep=lambda part: records.save(part, given.out))
    print(comparison.table(record))


if __name__ == "__main__":
    main()
