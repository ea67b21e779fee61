"""When a response ends: after EOS, after a stop string, or at its largest length."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from entropy_core.sequences.batch import FinishReason


@dataclass(frozen=True)
class StoppingRule:
    """Ends a response with the token after which it holds one of these.

    Args:
        eos: ids of the tokens that end a response.
        stop_strings: texts that end it.
        max_new_tokens: tokens that it has at most.
        decode: the tokenizer's, from token ids to text; called only if there are stop strings.
    """

    eos: frozenset[int]
    stop_strings: Sequence[str]
    max_new_tokens: int
    decode: Callable[[list[int]], str]

    def reason(self, tokens: list[int], length: int) -> FinishReason | None:
        """Return why a response ends with its token number `length`; None if it does not end there."""
        if tokens[length - 1] in self.eos:
            return "eos"
        if self.stop_strings and self._stopped(tokens, length):
            return "stop"
        return "length" if length == self.max_new_tokens else None

    def first_end(self, tokens: list[int]) -> tuple[int, FinishReason] | None:
        """Return the length at which a response ends, and why; None if it does not end within these tokens."""
        for length in range(1, len(tokens) + 1):
            if why := self.reason(tokens, length):
                return length, why
        return None

    def _stopped(self, tokens: list[int], length: int) -> bool:
        """Return whether the response contains a stop string, decoding only as many tokens as the string has bytes."""
        window = max(len(string.encode()) for string in self.stop_strings) + 1
        end = self.decode(tokens[max(0, length - window) : length])
        return any(string in end for string in self.stop_strings)
