"""The course's engine and its peers in one interleaved run on a CPU. See README.md beside this file."""

import argparse
import time
from pathlib import Path

from helpers.bench import records
from helpers.bench import run as benchmark
from helpers.bench import tables as comparison
from helpers.bench.records import Workload
from helpers.bench.run import Runner
from helpers.machine.worker import Worker
from helpers.model.checkpoint import find_checkpoint

PEERS = {"onnxruntime-genai": "onnxruntime_genai", "llama.cpp": "llama_cpp"}  # and the module of each one's worker
PRECISIONS = ("fp32", "int8", "int4")


class PeerRunner(Runner):
    """A contender whose worker runs under the peers' Python. What it builds is kept for the next run."""

    def __init__(self, workload: Workload, threads: int, peer: str, precision: str, python: Path, work: Path):
        super().__init__(workload, threads, peer, precision)
        self.module, self.python = f"tests.peers.{PEERS[peer]}", str(python)
        self.folder = work / f"{workload.model}-{peer}-{precision}"

    def _build(self) -> None:
        if not self.folder.exists():
            part, start = self.folder.with_name(self.folder.name + ".part"), time.perf_counter()
            model = find_checkpoint(self.workload.model).folder
            with Worker(self.module, python=self.python) as builder:
                arguments = {"model": str(model), "folder": str(part), "scratch": self.cache}
                builder.call("build", time_limit=900, precision=self.row.precision, **arguments)
            (part / "seconds").write_text(str(time.perf_counter() - start), encoding="utf-8")
            part.rename(self.folder)
        self.row.build_s = float((self.folder / "seconds").read_text(encoding="utf-8"))
        self.row.disk_bytes = sum(file.stat().st_size for file in self.folder.rglob("*") if file.is_file())

    def _load_arguments(self):
        return {"folder": str(self.folder), "threads": self.threads}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.peers", description=__doc__)
    parser.add_argument("--python", type=Path, required=True, help="the Python that has the peers")
    parser.add_argument("--work", type=Path, required=True, help="folder for the peers' forms of the model")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--threads", type=int, required=True, help="for all alike")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--backends", default="pytorch,aot,aot:int8,aot:int4", help="of the course")
    parser.add_argument("--out", type=Path, required=True)
    settings = parser.parse_args()
    limits = {"max_batch_size": 1, "max_input_len": 64, "max_seq_len": 256}
    workload = Workload(
        settings.model, 16, 128, repeats=settings.rounds, warmup=1, threads=settings.threads, device="cpu", **limits
    )
    settings.work.mkdir(parents=True, exist_ok=True)
    keep = records.keeper(settings.out)
    record = benchmark.empty_record(workload)
    record.command = f"python -m tests.peers --model {settings.model} --threads {settings.threads}"
    runners = [benchmark.make_runner(workload, record.threads, name) for name in settings.backends.split(",")]
    for peer in PEERS:
        for precision in PRECISIONS:
            runners.append(PeerRunner(workload, record.threads, peer, precision, settings.python, settings.work))
    benchmark.run_all(record, runners, [1], keep=keep)
    print(comparison.table(record))


if __name__ == "__main__":
    main()
