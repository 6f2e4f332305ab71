"""Drawing: pure functions from traces and summaries to figures. Nothing here changes state or runs a model."""
