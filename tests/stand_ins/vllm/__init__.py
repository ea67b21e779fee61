"""What `vllm_process` uses of vLLM 0.32, on a model of transformers; with vLLM's habits that a logits processor meets.

Rows of the batch are moved and swapped, a long prompt is prefilled in two parts of which the first draws a token that
counts for nothing, and a request is thrown out in the middle and prefilled again. The file `STAND_IN` plants a fault.
"""

import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from vllm.v1.sample.logits_processor import BatchUpdate, MoveDirectionality

__version__ = "0.0.1"


def fault() -> str:
    return Path(os.environ["STAND_IN"]).read_text()


@dataclass
class SamplingParams:
    temperature: float
    max_tokens: int
    stop_token_ids: list[int]
    ignore_eos: bool
    detokenize: bool
    extra_args: dict[str, Any]


@dataclass
class _Request:
    prompt: list[int]
    params: SamplingParams
    tokens: list[int] = field(default_factory=list)
    part: bool = True  # its first draw is of a part of the prompt
    thrown_out: bool = False


class LLM:
    def __init__(self, model: str, max_num_seqs: int, max_model_len: int, **settings: Any) -> None:
        assert settings["trust_remote_code"] is False and settings["async_scheduling"] is False
        if fault() == "unknown":
            sys.exit("ValueError: Model architectures ['Strange'] are not supported for now.")
        dtype = getattr(torch, settings["dtype"])
        self.model = AutoModelForCausalLM.from_pretrained(model, dtype=dtype, local_files_only=True).eval()
        self.rows, self.longest = max_num_seqs, max_model_len
        self.processor = settings["logits_processors"][0](None, torch.device("cpu"), False)
        self.processor.update_state(None)
        self.processor.apply(torch.zeros(3, 5))  # warms up
        print("loaded", model)

    def generate(self, prompts: Any, params: list[SamplingParams], use_tqdm: bool) -> list[Any]:
        self.fault = fault()
        requests = [_Request(p["prompt_token_ids"], each) for p, each in zip(prompts, params, strict=True)]
        waiting, batch, step = list(requests), [], 0
        while waiting or batch:
            removed, added, moved = [], [], []
            finished = [i for i, request in enumerate(batch) if self._ended(request)]
            if step == 5 and len(batch) > 2 and not finished:  # a request is thrown out and comes again
                batch[1].part, batch[1].thrown_out = True, True
                waiting.append(batch[1])
                finished = [1]
            for i in reversed(finished):
                removed.append(i)
                last = len(batch) - 1
                if i != last:
                    batch[i] = batch[last]
                    moved.append((last, i, MoveDirectionality.UNIDIRECTIONAL))
                batch.pop()
            if not moved and not removed and len(batch) > 1 and step % 3 == 0:
                batch[0], batch[-1] = batch[-1], batch[0]
                moved.append((0, len(batch) - 1, MoveDirectionality.SWAP))
            before = len(batch)
            if not moved:  # the places of what was moved are free in the next step
                while waiting and len(batch) < self.rows:
                    batch.append(waiting.pop(0))
                added = [(i, r.params, r.prompt, r.tokens) for i, r in enumerate(batch) if i >= before]
            if not batch:
                continue
            changed = removed or added or moved
            self.processor.update_state(BatchUpdate(len(batch), removed, added, moved) if changed else None)
            logits_RV = torch.stack([self._logits(request) for request in batch])
            chosen = self.processor.apply(logits_RV).argmax(-1).tolist()
            for request, token in zip(batch, chosen, strict=True):
                if request.part:
                    request.part = False
                    continue
                request.tokens.append((token + 1) % logits_RV.shape[1] if self.fault == "other tokens" else token)
            step += 1
            if self.fault == "dies" and step == 3:
                os._exit(9)
        return [SimpleNamespace(outputs=[SimpleNamespace(token_ids=request.tokens)]) for request in requests]

    def _logits(self, request: _Request) -> torch.Tensor:
        ids = request.prompt + request.tokens
        assert len(request.prompt) + request.params.max_tokens <= self.longest
        with torch.no_grad():
            logits_V = self.model(torch.tensor([ids[:-1] if request.part and len(ids) > 1 else ids])).logits[0, -1]
        return logits_V * torch.nan if self.fault == "not finite" and len(request.tokens) == 2 else logits_V

    def _ended(self, request: _Request) -> bool:
        tokens, params = request.tokens, request.params
        early = self.fault == "ends early" and len(tokens) == 1
        return bool(tokens) and (early or tokens[-1] in params.stop_token_ids or len(tokens) == params.max_tokens)
