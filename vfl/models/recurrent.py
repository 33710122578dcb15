"""Character models, safe under vmap because a task writes their recurrent layers out (`vfl.recurrence`).

Letters: B batch, T positions, V the vocabulary's size. Weights are torch's default initialisation.
"""

from __future__ import annotations

from torch import Tensor, nn

from vfl.errors import UsageError


class CharRNN(nn.Module):
    """Embeds tokens, runs recurrent layers over them, and scores the next token after each position or after all."""

    def __init__(self, vocabulary: int, embedding: int, rnn: nn.RNNBase, every: bool) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, embedding)
        self.rnn = rnn
        self.output = nn.Linear(rnn.hidden_size, vocabulary)
        self.every = every

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens [B, T] int64 from 0 to V − 1 → scores [B, T, V], or [B, V] for the last position alone."""
        h, _ = self.rnn(self.embedding(tokens))  # [B, T, hidden]
        return self.output(h if self.every else h[:, -1])


def char_lstm(
    embedding: int = 8,
    hidden: int = 256,
    layers: int = 2,
    *,
    input_shape: tuple[int, ...],
    classes: int,
    target_shape: tuple[int, ...],
) -> nn.Module:
    """Next-character LSTM of McMahan et al. (1602.05629, §3): embedding of 8, two layers of 256; 819,920 parameters for
    80 characters.

    Scores every position if the targets are sequences, else the one after the input. One class is one character.
    """
    vocabulary, every = _sequences("char_lstm", embedding, hidden, layers, input_shape, classes, target_shape)
    return CharRNN(vocabulary, embedding, nn.LSTM(embedding, hidden, layers, batch_first=True), every)


def char_gru(
    embedding: int = 8,
    hidden: int = 256,
    layers: int = 2,
    *,
    input_shape: tuple[int, ...],
    classes: int,
    target_shape: tuple[int, ...],
) -> nn.Module:
    """`char_lstm` with gated recurrent units (Cho et al., arXiv 1406.1078)."""
    vocabulary, every = _sequences("char_gru", embedding, hidden, layers, input_shape, classes, target_shape)
    return CharRNN(vocabulary, embedding, nn.GRU(embedding, hidden, layers, batch_first=True), every)


def _sequences(
    who: str,
    embedding: int,
    hidden: int,
    layers: int,
    input_shape: tuple[int, ...],
    classes: int,
    target_shape: tuple[int, ...],
) -> tuple[int, bool]:
    """V, and whether every position is scored. Raises UsageError for sizes or shapes that are no character model's."""
    for name, value in (("embedding", embedding), ("hidden", hidden), ("layers", layers)):
        if value < 1:
            raise UsageError(f"{who}: {name} must be at least 1, not {value}")
    if len(input_shape) != 1:
        raise UsageError(f"{who}: needs sequences of tokens [positions], not inputs of shape {list(input_shape)}")
    if classes < 2:
        raise UsageError(f"{who}: needs at least 2 classes, one a character, not {classes}")
    if target_shape not in ((), input_shape):
        raise UsageError(
            f"{who}: needs one target an example or one a position, {list(input_shape)}, not {list(target_shape)}"
        )
    return classes, bool(target_shape)
