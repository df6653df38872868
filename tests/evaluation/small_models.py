"""Tiny models with tokenizers of their own, in folders as transformers saves them, and what they compute in float64."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

LETTERS = "abcdefghijklmnopqrstuvwxyz .=é"


def language_model(
    folder: Path,
    kind: str = "llama",
    *,
    merges: Sequence[tuple[str, str]] = (),
    begin: bool = True,
    adds_end: bool = False,
    context: int = 48,
    seed: int = 0,
) -> Path:
    """A causal model with a tokenizer of bytes. ``merges``: pairs that become one token; ``begin``: it adds <s>."""
    import tokenizers as t
    import transformers

    alphabet = sorted(t.pre_tokenizers.ByteLevel.alphabet())
    words = ["<s>", "</s>", *alphabet, *(a + b for a, b in merges)]
    tokenizer = t.Tokenizer(t.models.BPE({word: place for place, word in enumerate(words)}, list(merges)))
    tokenizer.pre_tokenizer = t.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = t.decoders.ByteLevel()
    single = ("<s> " if begin else "") + "$A" + (" </s>" if adds_end else "")
    tokenizer.post_processor = t.processors.TemplateProcessing(single=single, special_tokens=[("<s>", 0), ("</s>", 1)])
    ends = {"eos_token": "</s>", **({"bos_token": "<s>"} if begin else {})}
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **ends).save_pretrained(folder)
    torch.manual_seed(seed)
    common = {"vocab_size": len(words), "bos_token_id": 0, "eos_token_id": 1}
    if kind == "gpt2":
        config = transformers.GPT2Config(n_positions=context, n_embd=32, n_layer=2, n_head=4, **common)
    else:
        config = transformers.LlamaConfig(
            hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            max_position_embeddings=context, **common)  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():  # as initialised, all tokens are nearly equally likely
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    model.save_pretrained(folder)
    return folder


class Reference:
    """The same folder in float64, one sequence at a time, without padding, cache or any code of ours."""

    def __init__(self, folder: Path):
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()

    def log_likelihood(self, tokens: Sequence[int], start: int) -> float:
        """log p of tokens[start:], each given all before it."""
        with torch.no_grad():
            logits = self.model(input_ids=torch.tensor([tokens[:-1]]), use_cache=False).logits[0]
        assert logits.dtype == torch.float64
        return sum((logits[p - 1] - logits[p - 1].logsumexp(0))[tokens[p]].item() for p in range(start, len(tokens)))
