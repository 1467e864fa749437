"""Reading and writing: safetensors files, checkpoints."""
