"""A LoRA adapter over a model in this process: the vectors of the weights with the adapter merged in.

The model is random, two layers of Qwen3, since vLLM has LoRA for BERT only of late (0.32 has, 0.30 has not); its
tokenizer is all-MiniLM-L6-v2's.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vllm_embed import Embedder

pytestmark = [
    pytest.mark.live,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="NOT TESTED: vLLM is not installed"),
    pytest.mark.filterwarnings("ignore"),  # vLLM and torch are loaded into this process, and they warn
]

TEXTS = ["Saturn has rings.", "서울은 대한민국의 수도이다.", "moons, dust and ice; " * 20]
RANK, ALPHA = 8, 16
TARGETS = ["q_proj", "v_proj", "o_proj", "up_proj"]


def _base(folder: Path, live_model: str) -> tuple[Any, Any]:
    """A tokenizer and a model, saved; vLLM's attention on CPU takes no head of 16 (0.32)."""
    import torch
    from transformers import AutoTokenizer, Qwen3Config, Qwen3Model

    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(live_model)
    tokenizer.save_pretrained(folder)
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=64,
        max_position_embeddings=512,
        initializer_range=0.2,
        pad_token_id=0,
    )
    model = Qwen3Model(config).eval()
    model.save_pretrained(folder)
    return tokenizer, model


def _adapter(folder: Path, model: Any) -> dict[str, Any]:
    """An adapter as peft writes it, and its change of each weight."""
    import torch
    from safetensors.torch import save_file

    folder.mkdir()
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "target_modules": TARGETS, "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    weights, changes = {}, {}
    for name, module in model.named_modules():
        if name.rpartition(".")[2] in TARGETS:
            a, b = 0.2 * torch.randn(RANK, module.in_features), 0.2 * torch.randn(module.out_features, RANK)
            weights |= {f"base_model.model.{name}.lora_A.weight": a, f"base_model.model.{name}.lora_B.weight": b}
            changes[name] = ALPHA / RANK * b @ a
    save_file(weights, folder / "adapter_model.safetensors")
    return changes


def _vectors(tokenizer: Any, model: Any) -> np.ndarray:
    """The last token's, of unit length: vLLM's pooling for a model that says nothing of its own."""
    import torch

    with torch.no_grad():
        read = [torch.tensor([tokenizer(text)["input_ids"]]) for text in TEXTS]
        rows = np.stack([model(input_ids=ids).last_hidden_state[0, -1].numpy() for ids in read])
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def test_an_adapter_gives_the_vectors_of_the_merged_weights(tmp_path, live_model) -> None:
    tokenizer, model = _base(tmp_path / "model", live_model)
    changes = _adapter(tmp_path / "adapter", model)
    plain = _vectors(tokenizer, model)
    for name, change in changes.items():
        model.get_submodule(name).weight.data += change
    merged = _vectors(tokenizer, model)
    assert np.sum(plain * merged, axis=1).max() < 0.5  # the adapter makes a difference
    lora = {"lora_name": "mine", "lora_int_id": 1, "lora_path": str(tmp_path / "adapter")}
    arguments = {"dtype": "float32", "enforce_eager": True, "enable_lora": True, "lora_request": lora}
    with Embedder(model=str(tmp_path / "model"), in_process=True, engine_args=arguments) as embedder:
        vectors = embedder.embed(TEXTS)
    assert np.sum(vectors * merged, axis=1).min() >= 0.9999
