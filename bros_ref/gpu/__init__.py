"""The model and its runner, arranged for a GPU: few launches, one upload and one wait per step, CUDA graphs.

`decoder.py` computes the same as `model/decoder.py`, which remains the reference. Nothing here is needed on a CPU, but
all of it also runs there with emulated kernels (`--backend cpu-emulated`), which is how it is tested.
"""
