"""LoRA adapters on demand: where they come from, which are in memory, and how they are loaded."""
