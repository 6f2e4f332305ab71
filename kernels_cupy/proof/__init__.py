"""What proves the kernels without a GPU: emulator, PTX interpreter, compile gates, seeded defects."""
