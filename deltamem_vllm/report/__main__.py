"""The process of an `Arm`: ``python -m deltamem_vllm.report FD``."""

from deltamem_vllm.report.arm import main

if __name__ == "__main__":
    main()
