"""The tokenizer of a checkpoint."""

from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from entropy_core.checkpoints.content import read_json
from entropy_core.checkpoints.expansion import require_moderate
from entropy_core.errors import CheckpointError, is_failure, shortage


def tokenizer_directory(model: Path, base: Path | None) -> Path:
    """The directory with the tokenizer: that of the model or adapter, or of the base if the adapter has none."""
    return model if base is None or any(model.glob("tokenizer*")) else base


def load_tokenizer(directory: Path) -> PreTrainedTokenizerBase:
    """The checkpoint's tokenizer, from local files.

    Raises:
        CheckpointError: there is none, or none that can be loaded.
    """
    settings = directory / "tokenizer_config.json"
    if settings.exists() and (file := read_json(settings).get("gguf_file")):
        raise CheckpointError(
            f"{settings} has the tokenizer in {file!r:.80}, which may be anywhere and is not read",
            cause="it was converted from GGUF, or edited",
            fix="save the tokenizer with tokenizer.save_pretrained",
        )
    require_moderate(directory)
    try:
        return AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    except BaseException as error:  # tokenizers of all kinds raise errors of all kinds
        if not is_failure(error):
            raise
        raise shortage(error) or CheckpointError(
            f"{directory} has no tokenizer that can be loaded ({type(error).__name__})",
            cause="the trainer was not given the tokenizer, and did not save it",
            fix="save the tokenizer into the checkpoint directory",
        ) from error
