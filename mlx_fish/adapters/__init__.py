"""LoRA adapters: specification and initial values, file formats, and merging into the base's weights."""
