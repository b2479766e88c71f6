"""What is trained: the shape of an adapter, its values, PEFT's format on disk, other trainers' formats, merging into weights."""
