"""What a precision costs: engines scored on a text, each beside a reference engine, and drawn against size and speed.

loss         mean of -log p(the token that came), in nats per token: the engine reads the true text (teacher forcing)
change       loss less the reference's on the same tokens, and how far chance alone would move it (1.96 standard errors)
greedy kept  share of the tokens at which the engine's likeliest next token is the reference's
KL           mean of the sum over all tokens of p_ref (log p_ref - log p), in nats: how far the distribution has moved

Every backend gives logits after a prompt and after each token that is appended to it. So a passage is read as decode
reads it, token by token, and several passages at a time where the engine takes a batch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from helpers.backends.base import need_engine
from helpers.bench.records import REFERENCES, Record, need_records
from helpers.display import COLOURS, Picture, Table, new_panels, plain
from helpers.errors import InputError, LimitError, NumericsError, need, shown
from helpers.model.prompts import as_list
from helpers.progress import Progress, hushed

if TYPE_CHECKING:
    from torch import Tensor

    from helpers.backends.base import Engine

WIDTH = 1.96  # standard errors to each side: 95 % of such texts would give a mean in there


def evaluation_text() -> list[str]:
    """The passages that come with the course. They are excerpts of its own text, kept apart from it, so that a loss
    measured today can be compared with one measured after the text has changed."""
    return (REFERENCES / "evaluation.txt").read_text(encoding="utf-8").strip().split("\n\n")


# One engine on a text


@dataclass(frozen=True, eq=False)
class Scores:
    """What an engine expected at each token of some passages, their first tokens left out."""

    targets: Tensor  # [N], the token that came
    log_probs: Tensor  # [N, V], natural logarithm of each token's probability; float32 on the CPU

    @property
    def surprise(self) -> Tensor:
        """[N], minus the logarithm of the probability of the token that came."""
        return -self.log_probs.gather(1, self.targets[:, None])[:, 0]

    @property
    def loss(self) -> float:
        return self.surprise.double().mean().item()

    def change(self, reference: Scores) -> tuple[float, float]:
        """Loss less the reference's, and WIDTH standard errors of it: both engines saw the same tokens, so that the
        text's own difficulty drops out. Tokens are taken as independent."""
        self._check_same_text(reference)
        difference = (self.surprise - reference.surprise).double()
        error = difference.std().item() / math.sqrt(len(difference)) if len(difference) > 1 else math.nan
        return difference.mean().item(), WIDTH * error

    def greedy_kept(self, reference: Scores) -> float:
        self._check_same_text(reference)
        return (self.log_probs.argmax(-1) == reference.log_probs.argmax(-1)).double().mean().item()

    def kl(self, reference: Scores) -> float:
        self._check_same_text(reference)
        total = 0.0
        for theirs, mine in zip(reference.log_probs, self.log_probs, strict=True):  # a row at a time, in float64
            total += (theirs.double().exp() * (theirs.double() - mine.double())).sum().item()
        return total / len(self.targets)

    def _check_same_text(self, reference: Scores) -> None:
        need(reference, Scores, 'Give the scores of one engine: scores["aot fp32"].')
        if self.log_probs.shape != reference.log_probs.shape or not bool((self.targets == reference.targets).all()):
            raise InputError(
                "These scores are of different tokens, so they cannot be compared.",
                cause="The engines read other texts, or their models have other tokenizers.",
                fix="Score both on the same passages: score(engine, evaluation_text()).",
            )


def score(engine: Engine, passages: str | Sequence[str | Sequence[int]], *, quiet: bool = False) -> Scores:
    """Read each passage (a text, or token ids) with the engine, and keep what it expected at every token. One passage
    need not stand in a list.

    Keeps tokens x vocabulary x 4 bytes. Raises LimitError for a passage longer than the engine takes, before any work.
    """
    import torch

    need_engine(engine)
    sequences = [engine.tokenize(passage) for passage in as_list(passages)]
    count = sum(len(ids) - 1 for ids in sequences)
    if not count:
        raise InputError("There is nothing to score: no passage has a second token.", fix="Give a longer text.")
    if (longest := max(map(len, sequences))) > engine.recipe.max_seq_len:
        raise LimitError(
            f"A passage has {longest} tokens; this engine was built with max_seq_len={engine.recipe.max_seq_len}.",
            fix="Cut the passage, or build with a larger max_seq_len.",
        )
    size = engine.recipe.max_batch_size
    rows: list[Tensor] = []
    title = f"{engine.recipe.short_name}: {len(sequences)} passages"
    with hushed(quiet), Progress(title) as progress, progress.phase(f"score {count} tokens"):
        for start in range(0, len(sequences), size):
            with progress.part(f"passage {start + 1}"):
                rows += _read(engine, sequences[start : start + size])
    log_probs = torch.stack(rows)
    if not bool(log_probs.isfinite().all()):
        raise NumericsError(
            "The engine's logits hold infinity or NaN, so they have no loss.",
            cause="An intermediate result was too large for the precision; fp16 holds no more than 65504.",
            fix="Build with precision='bf16' or 'fp32'.",
        )
    return Scores(torch.tensor([token for ids in sequences for token in ids[1:]], device="cpu"), log_probs)


def _read(engine: Engine, batch: list[list[int]]) -> Iterator[Tensor]:
    """Log probabilities [V] at each token of each sequence but its first, sequence by sequence."""
    steps = max(map(len, batch)) - 1
    kept: list[list[Tensor]] = [[] for _ in batch]
    with engine.alone():
        logits = engine.prefill([ids[:1] for ids in batch])  # [B, V]
        for step in range(steps):
            log_probs = logits.float().log_softmax(-1).cpu()
            for ids, row, own in zip(batch, log_probs, kept, strict=True):
                if step + 1 < len(ids):
                    own.append(row.clone())
            if step + 1 < steps:  # a sequence that has ended gets its last token again, and nobody looks
                logits = engine.decode([ids[min(step + 1, len(ids) - 1)] for ids in batch])
    for own in kept:
        yield from own


# Engines side by side


@dataclass(frozen=True)
class Precision:
    """What one contender costs and gives. `change` and `margin`: its loss less the reference's, and chance's share."""

    name: str
    disk_bytes: int
    tpot_s: float
    loss: float
    change: float
    margin: float
    greedy_kept: float
    kl: float

    @property
    def verdict(self) -> str:
        """What this text can say about the loss."""
        if not abs(self.change) > self.margin:  # NaN, the margin of a single token, is no margin to be beyond
            return "no change that this text shows"
        return f"{abs(self.change):.4f} nats {'more' if self.change > 0 else 'less'}, more than chance"


def compare(record: Record, scores: Mapping[str, Scores], reference: str = "aot fp32") -> list[Precision]:
    """Size and TPOT from a benchmark's record, quality from the scores of the same contenders, by their names in it."""
    need_records(record)
    if not isinstance(scores, Mapping) or reference not in scores:
        raise InputError(f"There are no scores of the reference, {reference!r}.", fix="Score that engine too.")
    for own in scores.values():
        need(own, Scores, "Give what score(engine, passages) returned.")
    exact = scores[reference]
    results = []
    for name, own in scores.items():
        row = record.row(name)
        quality = (own.loss, *own.change(exact), own.greedy_kept(exact), own.kl(exact))
        results.append(Precision(name, row.disk_bytes, row.median("tpot_s"), *quality))
    return results


def _need_compared(results: Sequence[Precision]) -> None:
    """InputError for another thing than `compare` returns, such as the scores."""
    for result in results:
        need(result, Precision, "Give what compare(record, scores) returned.")


def table(results: Sequence[Precision], tokens: int) -> Table:
    """tokens: how many the losses are means of."""
    _need_compared(results)
    rows = [
        (
            p.name,
            f"{p.disk_bytes / 1e6:,.0f}",
            f"{p.tpot_s * 1e3:.2f}",
            f"{p.loss:.4f}",
            f"{p.change:+.4f}",
            f"{p.margin:.4f}",
            f"{p.greedy_kept:.1%}",
            f"{max(0.0, p.kl):.5f}",
            p.verdict,
        )
        for p in results
    ]
    columns = ("contender", "MB on disk", "TPOT, ms", "loss", "change", "chance, +-", "greedy kept", "KL", "so")
    return Table(f"Loss in nats per token, mean of {tokens} tokens", columns, rows)


# What a front can be drawn over: the attribute, the unit's factor, and the words.
COSTS = {"TPOT": ("tpot_s", 1e3, "TPOT, milliseconds"), "size": ("disk_bytes", 1e-6, "MB on disk")}


def front(results: Sequence[Precision], cost: str = "TPOT") -> list[Precision]:
    """The Pareto front, cheapest first: those that no other beats in cost without a higher loss, or the other way."""
    if cost not in COSTS:
        raise InputError(f"There is no cost {shown(cost)}.", fix=f"Use {' or '.join(COSTS)}.")
    _need_compared(results)
    attribute = COSTS[cost][0]

    def beats(one: Precision, other: Precision) -> bool:
        mine, theirs = ((getattr(p, attribute), p.loss) for p in (one, other))
        return mine != theirs and mine[0] <= theirs[0] and mine[1] <= theirs[1]

    best = [p for p in results if not any(beats(other, p) for other in results)]
    return sorted(best, key=lambda p: getattr(p, attribute))


def pareto(results: Sequence[Precision]) -> Picture:
    """Loss against TPOT and against size: full points on the front, hollow ones beaten, bars for chance's share."""
    if not results:
        raise InputError("There is nothing to draw: no engine was compared.", fix="Give what compare returned.")
    figure, panels = new_panels(1, len(COSTS), height=3.2, sharey=True)
    words = []
    for axes, (cost, (attribute, factor, label)) in zip(panels, COSTS.items(), strict=True):
        best = front(results, cost)
        line = [(getattr(p, attribute) * factor, p.loss) for p in best]
        axes.step(*zip(*line, strict=True), where="post", color=COLOURS[0], linestyle="--", zorder=1)
        for at, p in enumerate(sorted(results, key=lambda p: getattr(p, attribute))):
            x = getattr(p, attribute) * factor
            face = COLOURS[0] if p in best else "white"
            axes.errorbar(x, p.loss, p.margin or None, color="black", marker="o", markersize=8, markerfacecolor=face)
            place = (7, -15) if at % 2 else (7, 5)  # in turn, so that neighbours' names do not meet
            axes.annotate(plain(p.name), (x, p.loss), place, textcoords="offset points")
        axes.margins(y=0.2)
        axes.set_xlim(0, max(getattr(p, attribute) for p in results) * factor * 1.3)
        axes.set_xlabel(f"{label} (less is better)")
        axes.ticklabel_format(axis="y", useOffset=False)
        axes.label_outer()
        words.append(f"On the front of loss and {cost}: {', '.join(p.name for p in best)}")
    panels[0].set_ylabel("loss, nats per token")
    figure.suptitle("full: on the front; hollow: another is no worse in both; bars: chance", fontsize="small")
    points = "; ".join(
        f"{p.name} loss {p.loss:.4f}, TPOT {p.tpot_s * 1e3:.2f} ms, {p.disk_bytes / 1e6:,.0f} MB" for p in results
    )
    return Picture(figure, f"Points: loss against TPOT and size. {points}. {'. '.join(words)}.")
