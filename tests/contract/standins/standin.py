"""What the stand-ins share: the failure that a test asks for, and the law by which the "model" answers."""

import builtins
import json
import os
import types


def fail(at: str) -> None:
    """Raise what STANDIN_FAIL says, if this is the place."""
    wanted = json.loads(os.environ.get("STANDIN_FAIL", "{}"))
    if wanted.get("at") == at:
        if wanted.get("log"):
            os.write(1, wanted["log"].encode() + b"\n")  # native code logs to the file descriptor
        raise getattr(builtins, wanted["type"])(wanted["text"])


def gpu(torch: types.ModuleType) -> None:
    """Let torch.cuda speak of the GPU of STANDIN_GPU."""
    capability = os.environ.get("STANDIN_GPU", "9.0")
    torch.cuda.is_available = lambda: capability != "none"
    if capability == "none":
        return
    major, minor = (int(part) for part in capability.split("."))
    properties = types.SimpleNamespace(
        name="Stand-in GPU", major=major, minor=minor, multi_processor_count=132, total_memory=80 * 2**30
    )
    torch.cuda.get_device_properties = lambda device=0: properties
    torch.cuda.mem_get_info = lambda device=0: (60 * 2**30, 80 * 2**30)


def following(token: int, vocab_size: int) -> int:
    """The token after a token: the next larger id."""
    return (token + 1) % vocab_size


def answer(prompt: list, count: int, end_ids: list, vocab_size: int) -> tuple:
    """Token ids and finish reason. Whether the end token is among them is uncertain for 1.2.1."""
    tokens, token = [], prompt[-1]
    for _ in range(count):
        token = following(token, vocab_size)
        if token in end_ids:
            if os.environ.get("STANDIN_END_TOKEN") == "included":
                tokens.append(token)
            return tokens, "stop"
        tokens.append(token)
    return tokens, "length"
