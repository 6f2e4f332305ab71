"""The same scheduler and KV accounting on a virtual clock and a GPU cost model."""
