"""From packed rows to adapters: DeepSpeed ZeRO, losses, elastic checkpoints, preemption."""
