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
from helpers.bench.records import Workload
from helpers.bench.run import Runner
from helpers.model.checkpoint import BUNDLED

PEER = "onnxruntime-genai"


class PeerRunner(Runner):
    """A contender whose worker runs under the peer's Python."""

    module = "tests.peers.onnxruntime_genai_worker"

    def __init__(self, workload: Workload, threads: int, precision: str, python: str, folder: Path):
        super().__init__(workload, threads, PEER, precision)
        self.python, self.folder = python, folder

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

    def _load_arguments(self):
        return {"folder": str(self.folder), "threads": self.threads}


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
    settings = parser.parse_args()
    workload = Workload("stories", settings.input, settings.output, settings.repeats, threads=settings.threads)
    keep = records.keeper(settings.out)
    record = benchmark.empty_record(workload)
    peer_threads = record.threads if settings.peer_threads < 0 else settings.peer_threads
    record.command = (
        f"python -m tests.peers.onnxruntime_genai --threads {settings.threads} --peer-threads {settings.peer_threads}"
    )
    runners = [benchmark.make_runner(workload, record.threads, name) for name in settings.backends.split(",")]
    with tempfile.TemporaryDirectory() as work:
        for precision in settings.precisions.split(","):
            runners.append(PeerRunner(workload, peer_threads, precision, settings.python, Path(work, precision)))
        benchmark.run_all(record, runners, [1], keep=keep)
    print(comparison.table(record))


if __name__ == "__main__":
    main()
