"""How good a story model is: its loss beside the grammar's, and the share of its stories that parse."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from helpers.model.stories.grammar import ParseError, Story, parse

IGNORED = -100  # the label that cross_entropy skips


def encode_story(tokenizer: Any, text: str) -> list[int]:
    """Begin token (the tokenizer adds it), the story, end token: what the model is trained on."""
    return [*tokenizer.encode(text), tokenizer.eos_token_id]


def story_loss(model: Any, tokens: torch.Tensor, pad: int, reduction: str = "mean") -> torch.Tensor:
    """Cross-entropy (nats) of the next token over a padded batch [stories, length], padding left out."""
    # Padding is on the right, so causal attention keeps it out of sight and no attention mask is needed.
    logits = model(input_ids=tokens[:, :-1], use_cache=False).logits
    labels = tokens[:, 1:].masked_fill(tokens[:, 1:] == pad, IGNORED)
    return F.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction=reduction)


@torch.no_grad()
def held_out_loss(model: Any, tokenizer: Any, stories: Sequence[Story], batch: int = 64) -> tuple[float, float]:
    """The model's loss and the grammar's own on the same stories, both in nats per token.

    A story's tokens are those that the model predicts: its text and the end token, not the begin token. The
    difference of the two numbers is what the model has not learned.
    """
    encoded = [encode_story(tokenizer, story.text) for story in stories]
    pad = tokenizer.pad_token_id
    total = 0.0
    for start in range(0, len(encoded), batch):
        rows = encoded[start : start + batch]
        longest = max(map(len, rows))
        padded = torch.tensor([row + [pad] * (longest - len(row)) for row in rows], device=model.device)
        total += story_loss(model, padded, pad, reduction="sum").item()
    count = sum(len(row) - 1 for row in encoded)
    return total / count, -sum(story.log_probability for story in stories) / count


@torch.no_grad()
def sample_stories(
    model: Any,
    tokenizer: Any,
    n: int,
    temperature: float,
    seed: int = 0,
    prompt: str = "",
    max_tokens: int = 256,
) -> list[str]:
    """Sample `n` continuations of one prompt in one batch; temperature 0 is greedy.

    Returns prompt and continuation without special tokens. A story without an end token is cut off at
    `max_tokens`.
    """
    generator = torch.Generator(model.device).manual_seed(seed)
    tokens = torch.tensor([tokenizer.encode(prompt)] * n, device=model.device)
    step, cache, columns = tokens, None, [tokens]
    ended = torch.zeros(n, dtype=torch.bool, device=model.device)
    for _ in range(max_tokens):
        output = model(input_ids=step, past_key_values=cache, use_cache=True)
        cache, logits = output.past_key_values, output.logits[:, -1].float()
        if temperature == 0:
            step = logits.argmax(-1, keepdim=True)
        else:
            step = torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)
        columns.append(step)
        ended |= step[:, 0] == tokenizer.eos_token_id
        if ended.all():
            break
    texts = []
    for row in torch.cat(columns, 1).tolist():
        end = row.index(tokenizer.eos_token_id) if tokenizer.eos_token_id in row else len(row)
        texts.append(tokenizer.decode(row[:end], skip_special_tokens=True))
    return texts


def parse_share(texts: Sequence[str]) -> float:
    """The share (0 to 1) of the texts that are stories of the grammar."""
    return float(np.mean([_parses(text) for text in texts]))


def _parses(text: str) -> bool:
    try:
        parse(text)
    except ParseError:
        return False
    return True
