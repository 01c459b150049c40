"""A conversation with and without memory, on a real server: ``python -m deltamem_vllm.demo``."""
