"""The model and its runner as a GPU wants them: few launches, one upload and one wait per step, CUDA graphs.

`decoder.py` computes what `model/decoder.py` does, which stays the reference. Nothing here is needed on a CPU, but all
of it runs there too, with the kernels emulated (`--backend cpu-emulated`); that is how it is tested.
"""
