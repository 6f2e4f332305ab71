"""An OpenAI-compatible server on one engine: interactive calls are real-time, flex calls and batches best-effort."""
