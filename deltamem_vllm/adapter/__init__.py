"""δ-mem adapters: their config, strict loading, inspection and conversion. Imports torch, never vLLM."""
