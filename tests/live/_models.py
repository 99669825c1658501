"""Folders of models: all-MiniLM-L6-v2 with one thing changed, and a chat model of half a megabyte."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

__all__ = ["chat_model", "variant"]

_WEIGHTS = "model.safetensors"


def variant(
    source: str,
    target: Path,
    *,
    cls_pooling: bool = False,
    normalize: bool = True,
    prompts: dict[str, str] | None = None,
) -> str:
    """A copy of a sentence-transformers folder, its weights linked.

    Args:
        source: the folder to copy.
        target: the folder to make.
        cls_pooling: the vector of [CLS] instead of the mean.
        normalize: whether it keeps its Normalize module.
        prompts: put into its `config_sentence_transformers.json`.

    Returns:
        The folder's path.
    """
    shutil.copytree(source, target, ignore=shutil.ignore_patterns(_WEIGHTS))
    (target / _WEIGHTS).symlink_to(Path(source, _WEIGHTS).resolve())
    if cls_pooling:
        modes = {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}
        _change(target / "1_Pooling" / "config.json", modes)
    if not normalize:
        modules = json.loads((target / "modules.json").read_text())
        kept = [module for module in modules if not module["type"].endswith(".Normalize")]
        assert len(kept) == len(modules) - 1
        (target / "modules.json").write_text(json.dumps(kept))
    if prompts is not None:
        _change(target / "config_sentence_transformers.json", {"prompts": prompts, "default_prompt_name": None})
    return str(target)


def _change(path: Path, changes: dict[str, object]) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def chat_model(target: Path) -> str:
    """A Llama with random weights, two layers of 64, and a tokenizer of bytes; what it says is nonsense.

    Returns:
        The folder's path.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    letters = {letter: number for number, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=letters, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    wrapped.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    wrapped.save_pretrained(target)
    small = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 256}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(wrapped), **small, **heads)).save_pretrained(target)
    return str(target)
