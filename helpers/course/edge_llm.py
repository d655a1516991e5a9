"""TensorRT Edge-LLM's exporter, run as a command: from a checkpoint to the ONNX file that its engine builder reads.

    folder = export("smollm2", "smollm2-edge")       # smollm2-edge/llm/model.onnx, and what lies beside it

It runs on a CPU, in an environment of its own (helpers env create edgellm). The builder and the runtime need a GPU that
Edge-LLM supports, and are not used here.
"""

from __future__ import annotations

import os
import platform
from dataclasses import asdict
from pathlib import Path
from subprocess import CompletedProcess

from helpers import store
from helpers.course.recorded import recorded, words
from helpers.display import Table
from helpers.errors import BackendUnavailable, BuildError, CourseError, InputError, ModelError, is_full
from helpers.machine import commands, environments, hardware
from helpers.model.checkpoint import find_checkpoint
from helpers.paths import name_of_folder, named, owned_folder
from helpers.progress import Progress, hushed, say

NAME = "edgellm"
KIND = "export"  # in a manifest
GRAPH = "llm/model.onnx"  # in the folder of an export


def export(model: Path | str, folder: Path | str, *, limit: float = 1800.0, quiet: bool = False) -> Path:
    """Export a checkpoint into a new folder, whole or not at all, with a manifest beside; returns the folder.

    limit: seconds that the exporter may take. Raises ModelError, BackendUnavailable, InputError, BuildError.
    """
    checkpoint, folder = find_checkpoint(name_of_folder(model)), named(folder)
    if checkpoint.dummy:
        raise ModelError(f"{checkpoint.name!r} has no weights to export.", fix="Name a checkpoint without 'dummy:'.")
    checkpoint.check(1)
    checkpoint.check_sole_weights(environments.ENVIRONMENTS[NAME].title)  # it follows an index before a single file
    python = environments.need_python(NAME)
    if folder.exists():
        raise InputError(f"There is something at {folder} already.", fix="Take it away, or name another folder.")
    environment = environments.ENVIRONMENTS[NAME]
    title = f"Exporting {checkpoint.short_name} with {environment.title}"
    try:
        with (
            hushed(quiet),
            owned_folder(".exporting-", folder.parent) as work,
            Progress(title) as progress,
        ):
            unfinished, before = work / folder.name, os.times()
            with progress.phase("export"):
                command = [python, "-m", environment.module, str(checkpoint.folder), str(unfinished)]
                done = commands.run(command, limit)
                if done.returncode != 0 or not (unfinished / GRAPH).is_file():
                    raise _explained(done, checkpoint.short_name)
            after = os.times()
            cpu = after.children_user + after.children_system - before.children_user - before.children_system
            version = environments.installed_version(Path(python), environment.package)
            store.write_manifest(
                unfinished,
                {"kind": KIND, "checkpoint": checkpoint.digest(), "architecture": f"linux {platform.machine()}"},
                {"model": checkpoint.short_name},
                hardware=asdict(hardware.describe("cpu")),
                compiler="none",
                seconds=progress.seconds,
                details={"provider": environment.title, "version": version, "cpu_seconds": round(cpu, 1)},
            )
            unfinished.replace(folder)
    except OSError as error:
        raise BuildError(
            f"The export cannot be written to {folder}: {error.strerror or error}. Nothing was left there.",
            fix="Name a folder on a disk that has room and that you may write.",
        ) from error
    return folder


def export_or_recording(model: Path | str, folder: Path | str) -> Path:
    """An export of this model; where that cannot be done, the recorded one of smollm2, and why in words."""
    try:
        return export(model, folder)
    except (BackendUnavailable, BuildError) as error:
        say(str(error))
    return recorded("edge_llm", "smollm2")


def files(folder: Path) -> Table:
    """What an export, or a recorded one, consists of."""
    manifest = store.read_manifest(folder)
    if manifest["identity"].get("kind") != KIND:
        raise InputError(f"{folder.name!r} is no export of TensorRT Edge-LLM.", fix="Give what export returned.")
    caption = f"{manifest['recipe']['model']}, {words(folder)}: {manifest['details']['cpu_seconds']:.0f} s of processor"
    rows = [(name, f"{entry['bytes'] / 1e6:,.3f}") for name, entry in manifest["files"].items()]
    return Table(caption, ("file", "MB"), rows)


def _explained(done: CompletedProcess[str], name: str) -> CourseError:
    """What the exporter's end means, where it has not left a whole export."""
    status, output = done.returncode, f"{done.stdout}\n{done.stderr}".strip()
    last = (output.splitlines() or ["It said nothing."])[-1].strip()[:300]
    if "does not provide a chat template" in output:
        return BuildError(
            f"TensorRT Edge-LLM exports no model without a chat template, and {name!r} has none.",
            cause="Its runtime answers messages, and the template says how they become text.",
            fix="Copy the checkpoint's folder and put a chat_template.jinja into the copy.",
        )
    if is_full(OSError(output)):
        return BuildError("The disk is full; nothing was exported.", cause=last, fix="Free some space.")
    if status == commands.TOO_SLOW:
        return BuildError(f"The export took too long and was ended: {last}.", fix="Give it more time: limit=SECONDS.")
    if status in (-9, 137):
        return BuildError("The exporter was killed; nothing was exported.", cause="The memory may have run out.")
    if status < 0:
        return BuildError(f"The exporter crashed (signal {-status}); nothing was exported.", cause=last)
    return BuildError(
        f"The exporter ended with exit status {status} and has exported nothing.",
        cause=last,
        fix="Look whether TensorRT Edge-LLM supports this model, and whether helpers env list shows its environment.",
    )
