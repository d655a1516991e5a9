"""Train the bundled model on stories drawn from the grammar, and write it in Hugging Face format.

    python -m helpers.maintain.train_stories --out helpers/model/stories/checkpoint

Every training story is fresh: the script draws as many as the training takes, so the model can not learn any
by heart and its loss can only approach the grammar's entropy from above. On one H100 it takes a few minutes.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import platform
import sys
import time
from collections.abc import Iterable
from datetime import datetime, timezone
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from helpers import BuildRecipe, SamplingParams, load
from helpers.backends.base import Engine
from helpers.bench import quality
from helpers.errors import status_of
from helpers.machine.hardware import free_cores, resolve_device
from helpers.model.checkpoint import BUNDLED
from helpers.model.stories.grammar import Story, draw_corpus, entropy, parses

PAD, BOS, END = "<|pad|>", "<|bos|>", "<|end|>"
PAD_ID, BOS_ID, END_ID = 0, 1, 2
BATCH = 256  # stories a step
PEAK = 2e-3  # learning rate
SEED = 0
CHUNK = 2000  # stories a worker draws at a time
TOKENIZER_CHUNKS = 10  # the tokenizer is trained on the first 20,000 training stories
HELD_OUT_STORIES = 2000
SAMPLED = 200  # stories at each temperature
LONGEST = 256  # tokens of a sampled story; one that has not ended by then is cut
SIZE_LIMIT = 16 * 2**20  # bytes; the checkpoint is tracked by git

# Shape and settings are those of the bundled checkpoint: edit its files to train another. They are in the form of
# transformers 4, which 5 reads too; what 5 writes has names that 4 cannot read.
SETTINGS = ("config.json", "generation_config.json", "tokenizer_config.json", "special_tokens_map.json")
CONFIG: dict[str, Any] = json.loads((BUNDLED / "config.json").read_text(encoding="utf-8"))


def train_tokenizer(texts: Iterable[str]) -> Tokenizer:
    """A byte-level BPE that adds the begin token to what it encodes."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=CONFIG["vocab_size"],
        special_tokens=[PAD, BOS, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, BOS_ID)]
    )
    if tokenizer.get_vocab_size() != CONFIG["vocab_size"]:
        raise RuntimeError(
            f"the tokenizer has {tokenizer.get_vocab_size()} tokens instead of {CONFIG['vocab_size']}: the stories "
            "have too few distinct words. Add words to helpers/model/stories/words.toml."
        )
    return tokenizer


def draw_texts(job: tuple[str, int]) -> list[str]:
    """One chunk of the corpus as texts: job is (name of the corpus with its seed, number of the chunk)."""
    name, chunk = job
    return [story.text for story in draw_corpus(CHUNK, f"{name}/{chunk}")]


def build_corpus(stories: int) -> tuple[Tokenizer, torch.Tensor, int]:
    """Draw the training corpus on all processors.

    Returns the tokenizer trained on its beginning, the stories' tokens [stories, longest] padded on the right
    (int16), and the number of tokens to predict.
    """
    jobs = [(f"train-{SEED}", chunk) for chunk in range(max(TOKENIZER_CHUNKS, math.ceil(stories / CHUNK)))]
    with multiprocessing.Pool(free_cores()) as pool:
        chunks = pool.imap(draw_texts, jobs)
        first = list(islice(chunks, TOKENIZER_CHUNKS))
        tokenizer = train_tokenizer(text for chunk in first for text in chunk)
        rows = [
            np.array([*encoding.ids, END_ID], dtype=np.int16)
            for chunk in chain(first, chunks)
            for encoding in tokenizer.encode_batch_fast(chunk)
        ][:stories]
    padded = np.full((stories, max(map(len, rows))), PAD_ID, dtype=np.int16)
    for target, row in zip(padded, rows, strict=True):
        target[: len(row)] = row
    return tokenizer, torch.from_numpy(padded), sum(map(len, rows)) - stories


def story_loss(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy (nats) of the next token over a padded batch [stories, length], padding left out."""
    # Padding is on the right, so causal attention keeps it out of sight and no attention mask is needed.
    logits = model(input_ids=tokens[:, :-1], use_cache=False).logits
    return F.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten(), ignore_index=PAD_ID)


def held_out_loss(engine: Engine, stories: list[Story]) -> tuple[float, float]:
    """The model's loss and the grammar's own on the same stories, both in nats per token.

    A story's tokens are those that the model predicts: its text and the end token, not the begin token. The
    difference of the two numbers is what the model has not learned.
    """
    encoded = [[*engine.tokenize(story.text), END_ID] for story in stories]
    chunks = (encoded[start : start + SAMPLED] for start in range(0, len(encoded), SAMPLED))
    surprise = torch.cat([quality.score(engine, chunk, quiet=True).surprise for chunk in chunks])
    return surprise.mean().item(), -sum(story.log_probability for story in stories) / len(surprise)


def sample_stories(engine: Engine, n: int, temperature: float, seed: int) -> list[str]:
    """`n` stories without a prompt, in one batch. Not by `generate`: with one seed it gives one story n times."""
    generator = torch.Generator().manual_seed(seed)
    logits = engine.prefill([[BOS_ID]] * n)
    columns: list[torch.Tensor] = []
    ended = torch.zeros(n, dtype=torch.bool)
    while len(columns) < LONGEST and not ended.all():
        columns.append(torch.multinomial((logits.cpu() / temperature).softmax(-1), 1, generator=generator)[:, 0])
        ended |= columns[-1] == END_ID
        logits = engine.decode(columns[-1])
    rows = torch.stack(columns, 1).tolist()
    return [engine.detokenize(row[: row.index(END_ID)] if END_ID in row else row) for row in rows]


def parse_share(texts: list[str]) -> float:
    """The share (0 to 1) of the texts that the grammar could have told."""
    return sum(map(parses, texts)) / len(texts)


def learning_rate_at(step: int, steps: int) -> float:
    """Linear warm-up over 3 % of the steps, then a cosine down to zero: it ends on settled weights."""
    warmup = max(1, steps * 3 // 100)
    if step < warmup:
        return PEAK * (step + 1) / warmup
    return PEAK * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))


def train(corpus: torch.Tensor, device: str) -> transformers.LlamaForCausalLM:
    """Train a model from scratch, BATCH stories a step, each story once. Prints its progress."""
    steps = len(corpus) // BATCH
    torch.manual_seed(SEED)
    torch.set_float32_matmul_precision("high")
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**CONFIG)).float().to(device)
    matrices = [p for p in model.parameters() if p.dim() > 1]
    norms = [p for p in model.parameters() if p.dim() == 1]
    groups = [{"params": matrices, "weight_decay": 0.05}, {"params": norms, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=PEAK, betas=(0.9, 0.95), fused=device == "cuda")
    corpus = corpus.to(device)
    started = printed = time.monotonic()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate_at(step, steps)
        tokens = corpus[step * BATCH : (step + 1) * BATCH].long()
        with torch.autocast(device, dtype=torch.bfloat16, enabled=device == "cuda"):
            loss = story_loss(model, tokens)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        now = time.monotonic()
        if now - printed > 3 or step + 1 == steps:
            # loss.item() waits for the GPU, so only ask every few seconds
            speed = (step + 1) * BATCH / (now - started)
            message = f"step {step + 1:5d}/{steps}  loss {loss.item():.4f} nats/token"
            print(f"{message}  {now - started:4.0f} s, {speed:,.0f} stories/s", flush=True)
            printed = now
    return model


def save_checkpoint(model: Any, tokenizer: Tokenizer, out: Path) -> None:
    """Write weights (bfloat16), configuration and tokenizer in Hugging Face format."""
    out.mkdir(parents=True, exist_ok=True)
    # tied embeddings: the output matrix is the input matrix, so it is not stored
    weights = {
        name: weight.detach().to("cpu", torch.bfloat16).contiguous()
        for name, weight in model.state_dict().items()
        if name != "lm_head.weight"
    }
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    (out / "model.safetensors").chmod(0o644)  # save_file lets nobody else read it
    tokenizer.save(str(out / "tokenizer.json"))
    for name in SETTINGS:
        (out / name).write_text((BUNDLED / name).read_text(encoding="utf-8"), encoding="utf-8")


CARD = """---
license: apache-2.0
language: en
pipeline_tag: text-generation
---
# stories: the bundled model

A Llama of {parameters:,} parameters that tells short children's stories. It was trained from scratch by
`helpers/maintain/train_stories.py` on stories drawn from the seeded grammar in
`helpers/model/stories/grammar.py`: nobody else's text went into it, and it knows nothing but these stories. It is
there to be compiled, measured and sampled from: small enough for any machine, with head size {head_dim} and grouped
key and value heads as large models have.

Prompts that it knows: "Once upon a time", "Long ago", "One morning", "Hello, my name is".

## How good it is

The grammar is unambiguous, so the probability of each story is known, and no model can have a lower mean loss
than the grammar's own.

| on {held_out:,} held-out stories (seed `held-out-{seed}`) | nats/token |
|---|---|
| grammar: mean of -log probability / tokens | {floor:.4f} |
| this checkpoint: bfloat16 weights, evaluated in float32 | {loss:.4f} |
| excess over the grammar | {excess:.2%} |

Entropy of the grammar: {entropy:.2f} nats per story, exact. A story has {tokens_per_story:.1f} tokens in the
mean, its end token included.

| sampled without a prompt, {sampled} stories each | share that parse |
|---|---|
| temperature 0.7 | {share_cool:.0%} |
| temperature 1.0 | {share_plain:.0%} |
| temperature 1.5 | {share_hot:.0%} |

Greedy, from "Once upon a time":

> {greedy}

## How it was made

    python -m helpers.maintain.train_stories --out DIR --steps {steps}

- corpus: {stories:,} stories (seed `train-{seed}`), each seen once; {tokens:,} tokens to predict;
  {overlap} of the held-out stories are among them
- tokenizer: byte-level BPE, {vocab_size:,} tokens, trained on the first {tokenizer_stories:,} stories; adds
  `<|bos|>`; a story ends with `<|end|>`
- model: hidden size {hidden_size}, {num_hidden_layers} layers, {num_attention_heads} heads,
  {num_key_value_heads} key and value heads, intermediate size {intermediate_size}, tied embeddings
- training: {steps:,} steps of {batch} stories, AdamW, peak learning rate {peak:g}, cosine
  to zero, seed {seed}
- time: {seconds:.0f} s in all, {training_seconds:.0f} s of them training, on {machine}
- versions: Python {python}, torch {torch}, transformers {transformers}, tokenizers {tokenizers}
- date: {date}

Licence: Apache-2.0.
"""


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m helpers.maintain.train_stories")
    parser.add_argument("--out", type=Path, required=True, help="folder for the checkpoint")
    parser.add_argument("--steps", type=int, default=5000)
    options = parser.parse_args(arguments)
    device = resolve_device()

    started = time.monotonic()
    stories = options.steps * BATCH
    print(f"drawing {stories:,} stories ...", flush=True)
    tokenizer, corpus, tokens = build_corpus(stories)
    print(f"  {tokens:,} tokens, {time.monotonic() - started:.0f} s", flush=True)
    training = time.monotonic()
    model = train(corpus, device)
    training_seconds = time.monotonic() - training
    save_checkpoint(model, tokenizer, options.out)

    print("evaluating the saved weights ...", flush=True)
    # Loaded again as a user would: what counts is the rounded weights, evaluated without further rounding.
    torch.set_float32_matmul_precision("highest")
    held_out = draw_corpus(HELD_OUT_STORIES, f"held-out-{SEED}")
    recipe = BuildRecipe(
        str(options.out),
        "pytorch",
        max_batch_size=SAMPLED,
        max_input_len=64,
        max_seq_len=CONFIG["max_position_embeddings"],
    )
    with load(recipe) as engine:
        loss, floor = held_out_loss(engine, held_out)
        shares = {t: parse_share(sample_stories(engine, SAMPLED, t, SEED)) for t in (0.7, 1.0, 1.5)}
        greedy = engine.generate("Once upon a time", SamplingParams(temperature=0, max_tokens=LONGEST))[0].text
    seen = {bytes(row[row != PAD_ID]) for row in corpus.numpy()}
    encoded = [np.array([*tokenizer.encode(story.text).ids, END_ID], dtype=np.int16) for story in held_out]
    card = CARD.format(
        **CONFIG,
        parameters=sum(p.numel() for p in model.parameters()),
        held_out=len(held_out), seed=SEED, floor=floor, loss=loss, excess=loss / floor - 1,
        entropy=entropy(), tokens_per_story=tokens / stories,
        sampled=SAMPLED, share_cool=shares[0.7], share_plain=shares[1.0], share_hot=shares[1.5],
        greedy="Once upon a time" + greedy, steps=options.steps,
        stories=stories, tokens=tokens, overlap=sum(bytes(row) in seen for row in encoded),
        tokenizer_stories=TOKENIZER_CHUNKS * CHUNK, batch=BATCH, peak=PEAK,
        seconds=time.monotonic() - started, training_seconds=training_seconds,
        machine=torch.cuda.get_device_name() if device == "cuda" else platform.machine(),
        python=platform.python_version(), torch=torch.__version__,
        transformers=transformers.__version__, tokenizers=tokenizers.__version__,
        date=datetime.now(timezone.utc).date().isoformat(),
    )  # fmt: skip
    (options.out / "README.md").write_text(card, encoding="utf-8")
    size = sum(path.stat().st_size for path in options.out.iterdir())
    print(f"held-out loss {loss:.4f}, grammar {floor:.4f} nats/token: {loss / floor - 1:.2%} above")
    print("share of stories that parse: " + ", ".join(f"{s:.0%} at {t}" for t, s in shares.items()))
    print(f"{options.out}: {size / 1e6:.1f} MB, {time.monotonic() - started:.0f} s in all")
    if size > SIZE_LIMIT:
        sys.exit(f"{options.out} is larger than {SIZE_LIMIT / 2**20:.0f} MiB: remove what is no part of it")


if __name__ == "__main__":
    sys.exit(status_of(main))
