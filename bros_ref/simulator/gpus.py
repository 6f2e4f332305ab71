"""The numbers that the simulator runs on, each with its source. Data only; `cost_model.py` says what they mean.

Efficiencies were fitted by us, one set for each measured GPU, on public per-operator profiles:

    microsoft/vidur (MIT)                  linear layers of Llama-2-7B and Llama-3-8B on A100 and H100
    ai-dynamo/aiconfigurator (Apache-2.0)  linear layers and attention of Llama-2-7B, -13B, Llama-3-8B (vLLM 0.14)
    NetX-lab/Frontier (MIT)                attention of Llama-2-7B on A800 (FlashInfer); checked against, not fitted

Mean absolute error of the fit over the measured points (p95 in brackets): A100 linear 4.0 % (14 %), prefill attention
4.7 % (16 %), decode attention 16 % (43 %, worst where the kernel takes less than 20 us); H100 6.1 % (18 %), 7.7 %
(24 %), 16 % (61 %, likewise). `tests/simulator/test_cost_model.py` recomputes them where the profiles are present.
Everything else (other GPUs, other models, tensor parallelism) is extrapolation by bytes and FLOPs, and says so in
`GPU.measured`.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Efficiency:
    """The share of a GPU's peaks that kernels reach, fitted; see `cost_model.py` for the formulas."""

    weight_read_share: float  # of peak memory bandwidth, when a linear layer reads its weights
    linear_share: float  # of peak fp16 FLOP/s, when it multiplies many tokens
    knee: float  # exponent of the smooth maximum of the two: the smaller, the softer the knee
    prefill_share: float  # of peak FLOP/s, prefill attention
    prefill_read_share: float  # of peak bandwidth, prefill attention's rows in and out
    prefill_launch_s: float  # a layer
    decode_read_share: float  # of peak bandwidth, decode attention reading K and V
    decode_launch_s: float  # a layer
    decode_sequence_s: float  # a layer and sequence, a floor


@dataclass(frozen=True)
class GPU:
    """One GPU. Peaks are the vendor's data-sheet figures, dense fp16 with fp32 accumulation.

    `link_bytes_per_s` is what an all-reduce moves per direction and GPU: NVLink at the data sheet's figure halved, or
    PCIe. `measured`: the efficiencies were fitted on this very GPU; False: taken from the nearest one.
    """

    memory_bytes: float
    memory_bytes_per_s: float
    flops_per_s: float
    link_bytes_per_s: float
    host_bytes_per_s: float  # PCIe, one direction, as pinned copies reach it (80 % of the raw rate)
    efficiency: Efficiency
    measured: bool


@dataclass(frozen=True)
class ModelShape:
    """What costs depend on. Published shapes (model cards and config files); weights and KV are fp16."""

    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    mlp_matrices: int  # 3 with a gate, 2 without
    embeddings: int = 2  # tables of vocab_size rows: 1 if input and output share one
    max_context_tokens: int = 4096

    @property
    def layer_parameters(self) -> int:
        """Parameters of one layer that each token is multiplied by."""
        heads = (2 * self.num_heads + 2 * self.num_kv_heads) * self.head_dim * self.hidden_size
        return heads + self.mlp_matrices * self.hidden_size * self.intermediate_size

    @property
    def parameters(self) -> int:
        """All parameters except norms and biases (under 0.1 %)."""
        return self.num_layers * self.layer_parameters + self.embeddings * self.vocab_size * self.hidden_size

    @property
    def kv_bytes_per_token(self) -> int:
        """K and V of all layers, fp16."""
        return 4 * self.num_layers * self.num_kv_heads * self.head_dim


# Fitted on A100-80GB (peaks 2,039 GB/s and 312 TFLOP/s) and H100 (3,350 GB/s, 989 TFLOP/s): see above.
A100 = Efficiency(weight_read_share=1393 / 2039, linear_share=202 / 312, knee=1.574,
                  prefill_share=182 / 312, prefill_read_share=867 / 2039, prefill_launch_s=10.7e-6,
                  decode_read_share=1446 / 2039, decode_launch_s=13.8e-6, decode_sequence_s=0.58e-6)
H100 = Efficiency(weight_read_share=2426 / 3350, linear_share=625 / 989, knee=1.377,
                  prefill_share=600 / 989, prefill_read_share=1344 / 3350, prefill_launch_s=11.6e-6,
                  decode_read_share=2913 / 3350, decode_launch_s=10.8e-6, decode_sequence_s=0.52e-6)

GPUS = {
    "a100-40gb": GPU(40e9, 1.555e12, 312e12, 300e9, 25e9, A100, False),  # the A100's slower memory, same cores
    "a100-80gb": GPU(80e9, 2.039e12, 312e12, 300e9, 25e9, A100, True),
    "h100-80gb": GPU(80e9, 3.350e12, 989e12, 450e9, 50e9, H100, True),
    "h200-141gb": GPU(141e9, 4.800e12, 989e12, 450e9, 50e9, H100, False),
    "rtx4090": GPU(24e9, 1.008e12, 165e12, 25e9, 25e9, A100, False),
    "l4": GPU(24e9, 0.300e12, 121e12, 25e9, 25e9, A100, False),
}

MODELS = {
    "opt-13b": ModelShape(40, 5120, 20480, 40, 40, 128, 50272, 2, embeddings=1, max_context_tokens=2048),
    "opt-30b": ModelShape(48, 7168, 28672, 56, 56, 128, 50272, 2, embeddings=1, max_context_tokens=2048),
    "llama-2-7b": ModelShape(32, 4096, 11008, 32, 32, 128, 32000, 3),
    "llama-2-13b": ModelShape(40, 5120, 13824, 40, 40, 128, 32000, 3),
    "llama-3-8b": ModelShape(32, 4096, 14336, 32, 8, 128, 128256, 3, max_context_tokens=8192),
    "llama-3-70b": ModelShape(80, 8192, 28672, 64, 8, 128, 128256, 3, max_context_tokens=8192),
    "qwen3-8b": ModelShape(36, 4096, 12288, 32, 8, 128, 151936, 3, max_context_tokens=32768),
    "qwen3-32b": ModelShape(64, 5120, 25600, 64, 8, 128, 151936, 3, max_context_tokens=32768),
    "mistral-7b": ModelShape(32, 4096, 14336, 32, 8, 128, 32768, 3, max_context_tokens=32768),
}

MEMORY_SHARE = 0.9  # of the GPU's memory that the server may use (paper's setting, vLLM's default then)
# Activations, workspaces, CUDA context, a GPU. Chosen so that the pools come out as the paper's hardware implies:
# 51k tokens (OPT-13B, 2 x A100-40GB), 55k (OPT-30B, 4 x A100-40GB), 1.28M (Llama-3-70B, 8 x A100-80GB). Our arithmetic.
RESERVED_BYTES = 2.1e9

# Per iteration and per sequence on the host, outside the GPU: our assumption for a server of vLLM V1's kind. Vidur's
# profile of vLLM 0.3 gives 0.94 ms and 49 us.
HOST_STEP_S = 0.6e-3
HOST_SEQUENCE_S = 8e-6
# Checked against vidur's measurements on DGX A100 and H100 in tests/simulator/test_all_reduce.py: the share is in the
# middle of what they show; the latency is that of a custom kernel, and NCCL launched from PyTorch takes 27 to 64 us.
ALL_REDUCE_LATENCY_S = 12e-6  # two a layer; our assumption
LINK_SHARE = 0.75  # of the link's rate that a large all-reduce reaches; our assumption
COPY_LATENCY_S = 20e-6  # to start a batched copy between host and device; our assumption
