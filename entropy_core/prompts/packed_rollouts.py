"""Read `rollouts.bin` of prime-rl: msgpack, whose records are lists of values in the order of a class's attributes.

    batch     [samples, …]
    sample    [prompt_ids, prompt_mask, completion_ids, completion_mask, completion_logprobs, …, advantage, reward, …]

Between the log-probabilities and the advantage stands, depending on the release: nothing; temperatures (a list) and the
log-probabilities of a teacher (a list, or none); or these two with the environment (a text) between them. Trailing
values that are defaults are left out.
"""

import struct
from collections.abc import Iterator
from typing import Any

from entropy_core.errors import PromptError

PACKED = "rollouts.bin"
_DEEPEST = 16  # lists within lists; a batch has four
_NUMBERS = {0xCA: ">f", 0xCB: ">d", 0xCC: ">B", 0xCD: ">H", 0xCE: ">I", 0xCF: ">Q"} | {
    **{0xD0: ">b", 0xD1: ">h", 0xD2: ">i", 0xD3: ">q"}
}
_LENGTHS = {0xD9: ">B", 0xDA: ">H", 0xDB: ">I", 0xC4: ">B", 0xC5: ">H", 0xC6: ">I", 0xDC: ">H", 0xDD: ">I"} | {
    **{0xDE: ">H", 0xDF: ">I"}
}


def unpacked(content: bytes) -> Iterator[dict[str, Any]]:
    """The samples of a batch.

    Args:
        content: of the file.

    Returns:
        A row per sample, with the columns of `rollout_files`.

    Raises:
        PromptError: a sample is not of the form above.
        ValueError: it is no msgpack, or was cut off.
    """
    reader = _Reader(content)
    batch = reader.value(0)
    if reader.at != len(content) or not isinstance(batch, list) or not batch or not isinstance(batch[0], list):
        raise ValueError("it is no batch of prime-rl")
    for index, sample in enumerate(batch[0]):
        yield _row(sample, index)


def _row(sample: Any, index: int) -> dict[str, Any]:
    kinds = [type(part) for part in sample[:5]] if isinstance(sample, list) else []
    if kinds != [list] * 5:
        raise PromptError(
            f"sample {index} of {PACKED} is none of prompt_ids, prompt_mask, completion_ids, completion_mask, "
            "completion_logprobs",
            cause="another release of prime-rl, which writes a sample as one sequence",
            fix="write the batch to a Parquet file with prompt_ids, completion_ids, reward and advantage",
        )
    prompt_ids, _, response_ids, mask, logprobs, *rest = sample
    if not all(mask):
        raise PromptError(
            f"sample {index} of {PACKED} has tokens of its completion that do not count, as those of a tool",
            fix="probe steps on responses that the policy wrote alone",
        )
    if rest and isinstance(rest[0], list):  # temperatures, the environment's name, and the teacher
        rest = rest[3 if len(rest) > 1 and isinstance(rest[1], str) else 2 :]
    row = {"prompt_ids": prompt_ids, "completion_ids": response_ids, "logprobs": logprobs}
    return row | dict(zip(("advantage", "reward"), rest[:2], strict=False))


class _Reader:
    """Reads the values of msgpack one after the other; raises ValueError at what is none."""

    def __init__(self, content: bytes) -> None:
        self._content, self.at = content, 0

    def _take(self, count: int) -> bytes:
        self.at += count
        if self.at > len(self._content):
            raise ValueError("it ends within a value")
        return self._content[self.at - count : self.at]

    def _number(self, form: str) -> Any:
        return struct.unpack(form, self._take(struct.calcsize(form)))[0]

    def value(self, depth: int) -> Any:
        """The next value."""
        if depth > _DEEPEST:
            raise ValueError("it has lists within lists without end")
        tag = self._take(1)[0]
        if tag < 0x80 or tag >= 0xE0:
            return tag if tag < 0x80 else tag - 0x100
        if tag in (0xC0, 0xC2, 0xC3):
            return {0xC0: None, 0xC2: False, 0xC3: True}[tag]
        if tag in _NUMBERS:
            return self._number(_NUMBERS[tag])
        if tag < 0xC0:  # short lists, maps and texts have their length in the tag
            count = tag & (0x1F if tag >= 0xA0 else 0x0F)
        elif tag in _LENGTHS:
            count = self._number(_LENGTHS[tag])
        else:
            raise ValueError("it has a value of an unknown kind")
        if 0xA0 <= tag < 0xC0 or 0xD9 <= tag <= 0xDB:
            return self._take(count).decode()
        if 0xC4 <= tag <= 0xC6:
            return self._take(count)
        if 0x90 <= tag < 0xA0 or tag in (0xDC, 0xDD):
            return [self.value(depth + 1) for _ in self._counted(count)]
        return {str(self.value(depth + 1)): self.value(depth + 1) for _ in self._counted(count)}

    def _counted(self, count: int) -> range:
        if count > len(self._content) - self.at:  # each value has a byte at least
            raise ValueError("it says to have more values than it has bytes")
        return range(count)
