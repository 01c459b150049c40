"""δ-mem (arXiv 2605.12357) for vLLM: sessions whose memory persists across requests, restarts, replicas."""
