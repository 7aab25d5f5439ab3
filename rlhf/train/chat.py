"""A model's tokenizer with the template of a recipe: opened here for stages and commands, then handed down."""

from collections.abc import Sequence
from pathlib import Path

from rlhf.core.errors import ConfigError, ModelError
from rlhf.core.tokenizers import tokenizer_digest
from rlhf.data.options import TemplateChoice
from rlhf.data.templates import ChatFormat, chat_format
from rlhf.models.stops import model_stop_tokens
from rlhf.models.tokenizer import load_tokenizer


def load_chat(
    path: str | Path,
    template: str | TemplateChoice | None = None,
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
    stop_token_ids: Sequence[int] = (),
) -> ChatFormat:
    """How the model at ``path`` reads and writes conversations.

    Responses end where the template and the model's generation config say, and at ``stop_token_ids``.

    Args:
        path: Transformers folder or hub name.
        template: as ``data.template``, alone or with the settings that go with it; ``None`` for the model's own.
        revision: branch, tag or commit on the hub, of the tokenizer and the generation config.
        trust_remote_code: whether Python code that comes with the model may run.
        stop_token_ids: as ``rollout.stop_token_ids``.
    Raises:
        ModelError: if there is no usable tokenizer.
        DataError: if there is no such template.
        ConfigError: if the tokenizer does not know a stop token.
    """
    tokenizer = load_tokenizer(path, revision=revision, trust_remote_code=trust_remote_code)
    absent = [token for token in stop_token_ids if token >= len(tokenizer)]
    if absent:
        raise ConfigError(f"rollout.stop_token_ids = {absent}: the tokenizer has tokens 0 to {len(tokenizer) - 1}")
    given = model_stop_tokens(path, tokenizer, revision=revision, trust_remote_code=trust_remote_code)
    return chat_format(tokenizer, template, (*given, *stop_token_ids))


def check_same_tokens(setting: str, path: str | None, chat: ChatFormat, owner: str, *, trust_remote_code: bool) -> None:
    """Refuse a model beside the trained one that would read its tokens as another text.

    Args:
        setting: the key of the recipe that names the model.
        path: its value; ``None`` needs no check.
        chat: of the trained model.
        owner: the setting of the trained model with its value, for the message.
        trust_remote_code: whether Python code that comes with the model may run.
    Raises:
        ModelError: if it has another tokenizer.
    """
    if path is None:
        return
    other = load_tokenizer(path, trust_remote_code=trust_remote_code)
    if tokenizer_digest(other, eos_token=chat.ending.token) != chat.tokenizer_digest:
        raise ModelError(
            f"{setting} = {path} has another tokenizer than {owner}: it would read the same tokens as another text. "
            "Choose a model of the same family"
        )
